"""Where the daemon's CPU goes while a node boots: samples of its Python stack, taken from outside by py-spy."""

from __future__ import annotations

import collections
import re
import shutil
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tests.bench.load import BenchFailed
from tests.bench.scenarios import boot_lanes
from tests.bench.stand import BenchStand
from tests.stand.process import Process, StandError

RATE: Final = 500
"""Samples a second."""
SHOWN: Final = 5


@dataclass(frozen=True)
class Cost:
    """A function's own part of the samples, without what it calls in Python; what it calls in C counts as its own."""

    function: str
    where: str
    part: float


@dataclass(frozen=True)
class Profile:
    """The costliest functions of a node's boot, and how many samples that is said of."""

    samples: int
    costs: tuple[Cost, ...]


def profile(stand: BenchStand, boots: int, pods: int) -> Profile:
    """Boot a node `boots` times in one daemon, whose modules and engines are known after a boot before them."""
    stand.proxy.delay(0.005)
    with stand.daemon() as daemon:
        stand.load.drive(daemon.socket, boot_lanes(stand, pods))
        batches = [boot_lanes(stand, pods) for _ in range(boots)]
        output = stand.directory / "profile.txt"
        argv = [
            str(find_py_spy()),
            "record",
            "--pid",
            str(daemon.pid),
            "--rate",
            str(RATE),
            "--function",
            "--gil",
            "--format",
        ]
        # The longest that it may take; a signal ends it sooner.
        argv += ["raw", "--duration", "300", "--output", str(output)]
        sampler = Process(argv, log=stand.directory / "py-spy.log", stop_signal=signal.SIGINT)
        time.sleep(1.5)  # until it has read the interpreter's symbols
        if not sampler.running:
            raise StandError(
                "py-spy may not look at the daemon: run as root, or set kernel.yama.ptrace_scope to 0\n"
                + sampler.log_tail()
            )
        for lanes in batches:
            stand.load.drive(daemon.socket, lanes)
        sampler.stop(30)
        if not output.exists():
            raise StandError(f"py-spy wrote nothing:\n{sampler.log_tail()}")
    return read(output.read_text())


def read(stacks: str) -> Profile:
    """The costliest of py-spy's folded stacks: frames from the outermost, `;` between them, and a count."""
    own: collections.Counter[tuple[str, str]] = collections.Counter()
    for line in stacks.splitlines():
        frames, _, samples = line.rpartition(" ")
        found = re.fullmatch(r"(.*) \((.*)\)", frames.rpartition(";")[2])
        if found is not None:
            own[found[1], found[2].partition(":")[0]] += int(samples)
    total = sum(own.values())
    if not total:
        raise BenchFailed("the profile has no samples")
    return Profile(
        total, tuple(Cost(function, where, count / total) for (function, where), count in own.most_common(SHOWN))
    )


def find_py_spy() -> Path:
    """The program of the py-spy wheel; StandError without one."""
    beside = Path(sys.executable).with_name("py-spy")
    found = beside if beside.exists() else shutil.which("py-spy")
    if found is None:
        raise StandError("py-spy is missing: `make bench` brings it")
    return Path(found)
