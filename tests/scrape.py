"""A scrape, as Prometheus reads it."""

from __future__ import annotations

import urllib.request
from collections.abc import Iterable

from prometheus_client.core import Metric, Sample
from prometheus_client.openmetrics.parser import text_string_to_metric_families as read_openmetrics
from prometheus_client.parser import text_string_to_metric_families as read_text

OPENMETRICS = "application/openmetrics-text; version=1.0.0"


class Scrape:
    """The samples of an answer, in either of the two formats; `openmetrics` reads strictly what it says."""

    def __init__(self, body: str, *, openmetrics: bool = False) -> None:
        self.families: list[Metric] = list((read_openmetrics if openmetrics else read_text)(body))
        self.samples: list[Sample] = [sample for family in self.families for sample in family.samples]

    @classmethod
    def of(cls, port: int) -> Scrape:
        """What a daemon on this port of the loopback interface tells."""
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=30) as answer:
            return cls(answer.read().decode())

    @property
    def names(self) -> set[str]:
        """The names of all samples."""
        return {sample.name for sample in self.samples}

    def values(self, name: str, **labels: str) -> list[float]:
        """The values of the samples of that name that have these labels."""
        return [
            sample.value for sample in self.samples if sample.name == name and labels.items() <= sample.labels.items()
        ]

    def value(self, name: str, **labels: str) -> float:
        """The one such value."""
        (value,) = self.values(name, **labels)
        return value

    def labels(self, name: str) -> list[dict[str, str]]:
        """The labels of the samples of that name."""
        return [sample.labels for sample in self.samples if sample.name == name]

    def differing(self, before: Scrape, ignoring: Iterable[str] = ()) -> dict[tuple[str, tuple[str, ...]], float]:
        """By name and label values (in the order of the labels' names) what has grown by how much.

        Names that begin with one of `ignoring` are left out.
        """
        old = {_key(sample): sample.value for sample in before.samples}
        return {
            key: sample.value - old.get(key, 0.0)
            for sample in self.samples
            if not sample.name.startswith(tuple(ignoring)) and sample.value != old.get(key := _key(sample), 0.0)
        }


def _key(sample: Sample) -> tuple[str, tuple[str, ...]]:
    return sample.name, tuple(value for _, value in sorted(sample.labels.items()))
