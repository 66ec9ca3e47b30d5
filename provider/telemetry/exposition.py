"""The state of one moment as Prometheus reads it, in its own text or in OpenMetrics.

prometheus_client writes it, imported by the first scrape (docs/decisions/metrics.md). That takes milliseconds, so it is
for a thread.
"""

from __future__ import annotations

import gzip
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, TypeAlias

from provider.telemetry.families import Family
from provider.telemetry.http import Answer

if TYPE_CHECKING:
    from prometheus_client.core import Metric

Labels: TypeAlias = tuple[str, ...]
Values: TypeAlias = dict[Labels, float] | dict[Labels, tuple[float, ...]]
"""By label values: a number; of a histogram how many fell into each bucket and beyond the last, and the sum."""


def write(state: Sequence[tuple[Family, Values]], *, openmetrics: bool, packed: bool) -> Answer:
    """The answer to a scrape: ``state`` with what the process says of itself; ``packed`` by gzip."""
    from prometheus_client import CollectorRegistry, ProcessCollector, exposition
    from prometheus_client.openmetrics import exposition as openmetrics_exposition

    # A registry of our own, for this scrape alone: the library's global one is nobody's.
    registry = CollectorRegistry()
    registry.register(_State(state))
    ProcessCollector(registry=registry)
    if openmetrics:
        body, kind = openmetrics_exposition.generate_latest(registry), openmetrics_exposition.CONTENT_TYPE_LATEST  # type: ignore[no-untyped-call]
    else:
        body, kind = exposition.generate_latest(registry), exposition.CONTENT_TYPE_PLAIN_0_0_4
    if packed:
        return Answer(gzip.compress(body, 5, mtime=0), content_type=kind, headers={"Content-Encoding": "gzip"})
    return Answer(body, content_type=kind)


class _State:
    """The state of one moment, as prometheus_client takes it."""

    def __init__(self, state: Sequence[tuple[Family, Values]]) -> None:
        self._state = state

    def collect(self) -> Iterable[Metric]:
        from prometheus_client.core import Metric

        for family, values in self._state:
            metric = Metric(family.name, family.meaning, family.kind, family.unit)
            for found, value in values.items():
                labels = dict(zip(family.labels, found, strict=True))
                if isinstance(value, tuple):
                    _add_histogram(metric, labels, family.buckets, value)
                else:
                    metric.add_sample(family.sample, labels, float(value))
            yield metric


def _add_histogram(metric: Metric, labels: dict[str, str], bounds: Sequence[float], counts: Sequence[float]) -> None:
    below = 0.0
    for bound, count in zip((*map(str, bounds), "+Inf"), counts[:-1], strict=True):
        below += count
        metric.add_sample(f"{metric.name}_bucket", {**labels, "le": bound}, below)
    metric.add_sample(f"{metric.name}_count", labels, below)
    metric.add_sample(f"{metric.name}_sum", labels, counts[-1])
