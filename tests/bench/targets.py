"""What the provider must reach, and whether a run did."""

from __future__ import annotations

import itertools
import statistics
from dataclasses import dataclass
from typing import Final

from tests.bench.results import Results

_MS: Final = 1000
SLACK_SECONDS: Final = 0.010
"""What a mount of 10 objects may take beyond its floor."""
AWAY: Final = 0.005
"""The round-trip time, in seconds, that targets are set for."""
BOOT_WALL: Final = 0.85
BOOT_CPU: Final = 0.5
"""Seconds that a node's boot may take, and seconds of CPU."""
REFERENCE_WALL: Final = 0.85
"""Seconds of a node's boot by the program that the limits were set by, where they were set."""
REFERENCE_CPU: Final = 0.4
"""Seconds of its CPU in that boot."""


@dataclass(frozen=True)
class Target:
    """One promise: `limit` and `measured` are of one unit, and less is better.

    `factor` is how many times as long as the reference machine this one takes for the same; None for what does not
    depend on a machine's speed: memory, counts, ratios.
    """

    name: str
    limit: float
    measured: float
    unit: str
    factor: float | None = None

    @property
    def met(self) -> bool:
        """Whether it was reached, as measured."""
        return self.measured <= self.limit

    @property
    def at_reference(self) -> float | None:
        """What was measured, computed for the reference machine's speed; None where speed does not matter."""
        return None if self.factor is None else self.measured / self.factor

    @property
    def met_at_reference(self) -> bool:
        """Whether it would be reached at the reference machine's speed; as measured where speed does not matter."""
        return self.met if self.at_reference is None else self.at_reference <= self.limit


def slowness(results: Results) -> float:
    """How many times the reference machine's CPU the reference took on this one."""
    return results.boot.reference_cpu.median / REFERENCE_CPU


def slowness_of_boots(results: Results) -> float:
    """The same of the time until all were mounted, which OpenBao, load and proxy on the same cores have a part in."""
    return results.boot.reference_wall.median / REFERENCE_WALL


def targets(results: Results) -> list[Target]:
    """All promises, held against a run's medians (for wake-ups and shares: against what was counted)."""
    floor, ten = results.floor(AWAY), results.single(10, AWAY)
    boot, replicas, full = results.boot, results.replicas, results.full_node
    factor = slowness(results)
    of_200, of_50 = (next(one for one in results.large if one.name == f"{count} objects") for count in (200, 50))
    big, small = (next(one for one in results.large if one.name.endswith(f" {size} MiB")) for size in ("3.9", "1"))
    return [
        Target(
            "cold mount of 10 objects, beyond one login and one read",
            SLACK_SECONDS * _MS,
            (ten.cold.median - floor.login.median - floor.read.median) * _MS,
            "ms",
            factor,
        ),
        Target(
            "warm mount of 10 objects, beyond one read",
            SLACK_SECONDS * _MS,
            (ten.warm.median - floor.read.median) * _MS,
            "ms",
            factor,
        ),
        Target("node boot: CPU", BOOT_CPU, boot.cpu.median, "s", factor),
        Target(
            "node boot: time until all pods are mounted", BOOT_WALL, boot.wall.median, "s", slowness_of_boots(results)
        ),
        Target("node boot: peak memory", 90, boot.peak.median, "MiB"),
        Target("memory idle, before any mount", 75, boot.idle.median, "MiB"),
        Target("from start to listening", 0.4, results.start_up.median, "s", factor),
        Target(
            "110 replicas: part of the reads that go out", 100 / 3, 100 * replicas.reads.median / replicas.wanted, "%"
        ),
        *(
            Target(f"re-mount of {one.name}: CPU", 1.0, one.cpu.median * _MS, "ms", factor)
            for one in results.from_memory
        ),
        Target(f"{full.pods} pods re-mounting: part of one core", 5, full.core * 100, "%", factor),
        Target("memory gained over half an hour of re-mounts", 2, growth(full.memory), "MiB"),
        Target("idle: wake-ups of the event loop a second", 1, results.idle.loop_wakeups, ""),
        Target("200 objects, in times of 50 objects", 6, of_200.took.median / of_50.took.median, "x"),
        Target("3.9 MiB, in times of 1 MiB", 6, big.took.median / small.took.median, "x"),
        Target(
            "a small mount beside 3.9 MiB, at worst, beyond one alone",
            50,
            (big.beside.median - results.small_alone.median) * _MS,
            "ms",
            factor,
        ),
        Target(
            "a small mount beside 200 objects, at worst, beyond one alone",
            50,
            (of_200.beside.median - results.small_alone.median) * _MS,
            "ms",
            factor,
        ),
        Target("connections to Vault at most", 64, boot.connections, ""),
    ]


def quarters(memory: tuple[float, ...]) -> list[float]:
    """The median of each quarter of an hour's samples, at least four.

    From one sample to the next it goes up and down by some MiB, in which a single one says little: malloc keeps what a
    round of mounts took, and gives it back after a few.
    """
    ends = [len(memory) * number // 4 for number in range(5)]
    return [statistics.median(memory[begin:end]) for begin, end in itertools.pairwise(ends)]


def growth(memory: tuple[float, ...]) -> float:
    """MiB from the second quarter to the last, half an hour later; in the first, buffers find their size."""
    _, second, _, last = quarters(memory)
    return max(0.0, last - second)
