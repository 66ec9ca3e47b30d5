"""All that one run of the benchmark found, and what it ran on."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import re
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import provider
from tests.bench import scenarios
from tests.bench.profile import Profile, profile
from tests.bench.scenarios import (
    Boot,
    Figure,
    Floor,
    FromMemory,
    FullNode,
    Idle,
    Large,
    Plan,
    Replicas,
    Rotation,
    Single,
)
from tests.bench.sidecar import Agents, agents
from tests.bench.stand import BenchStand
from tests.stand.openbao import find_binary

_PACKAGES = ("grpcio", "httptools", "hvac", "uvloop", "protobuf", "aiohttp")


@dataclass(frozen=True)
class Machine:
    """What it ran on. `load` is the load average of the minute before the run."""

    processor: str
    cores: int
    memory_gib: float
    kernel: str
    versions: tuple[tuple[str, str], ...]
    load: float
    day: str

    @classmethod
    def this(cls) -> Self:
        """The machine that this runs on."""
        found = re.search(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1024**3
        told = subprocess.run([str(find_binary()), "version"], capture_output=True, text=True, check=True).stdout
        bao = re.search(r"v(\d\S*?),? ", told)
        versions = [("vault-csi-provider", provider.__version__), ("Python", platform.python_version())]
        versions += [("OpenBao", bao[1] if bao else told.strip())]
        versions += [(name, importlib.metadata.version(name)) for name in _PACKAGES]
        return cls(
            processor=found[1].strip() if found else platform.machine(),
            cores=len(os.sched_getaffinity(0)),
            memory_gib=memory,
            kernel=platform.release().partition("-")[0],
            versions=tuple(versions),
            load=os.getloadavg()[0],
            day=datetime.datetime.now(datetime.UTC).date().isoformat(),
        )


@dataclass(frozen=True)
class Results:
    """What came of each scenario. `took` is the whole run's seconds."""

    machine: Machine
    floors: tuple[Floor, ...]
    singles: tuple[Single, ...]
    boot: Boot
    replicas: Replicas
    rotations: tuple[Rotation, ...]
    from_memory: tuple[FromMemory, ...]
    full_node: FullNode
    small_alone: Figure
    large: tuple[Large, ...]
    idle: Idle
    start_up: Figure
    agents: tuple[Agents, ...]
    profile: Profile
    took: float

    def floor(self, round_trip: float) -> Floor:
        """The floors at one round-trip time."""
        return next(floor for floor in self.floors if floor.round_trip == round_trip)

    def single(self, objects: int, round_trip: float) -> Single:
        """One mount of so many objects."""
        return next(one for one in self.singles if (one.objects, one.round_trip) == (objects, round_trip))


def run(plan: Plan, say: Callable[[str], None]) -> Results:
    """Everything, one scenario after the other; `say` is told what begins."""
    began = time.monotonic()
    machine = Machine.this()
    say("starting OpenBao, PostgreSQL, the Kubernetes API and the proxy")
    with BenchStand() as stand:
        # First, since it may want a right that the user lacks.
        say("a profile of a node's boot")
        profiled = profile(stand, plan.boots, plan.pods)
        say(f"start-up, {plan.runs} times")
        start_up = scenarios.start_up(stand, plan.runs)
        floors, singles = [], []
        with stand.daemon() as daemon:
            for round_trip in plan.round_trips:
                say(
                    f"floors, and one mount of {', '.join(map(str, plan.objects))} objects, {round_trip * 1000:g} "
                    "ms away"
                )
                floors.append(scenarios.floor(stand, round_trip, plan.runs))
                singles += [scenarios.single(stand, daemon, objects, round_trip, plan.runs) for objects in plan.objects]
        say(f"a node's boot, {plan.boots} times, and as often by the reference")
        boot = scenarios.boot(stand, plan.boots, plan.pods)
        say(f"replicas, {plan.boots} times")
        replicas = scenarios.replicas(stand, plan.boots, plan.pods)
        say("re-mounts from memory")
        from_memory = scenarios.from_memory(stand, plan.boots, mounts=plan.memory_mounts)
        say(f"an hour of re-mounts of {plan.rotating_pods} pods, five times")
        rotations = scenarios.rotations(stand, plan.rotating_pods, plan.hour_seconds)
        say(
            f"{plan.full_node_pods} pods re-mounting over {plan.full_node_seconds:g} s, and {plan.full_node_rounds} "
            "times more"
        )
        full_node = scenarios.full_node(stand, plan.full_node_pods, plan.full_node_seconds, plan.full_node_rounds)
        say(f"doing nothing for {plan.idle_seconds:g} s")
        idle = scenarios.idle(stand, plan.idle_seconds, plan.pods)
        say("Vault Agent as a sidecar")
        beside = [agents(stand, pods, plan.agent_runs) for pods in plan.agents]
        # Last, as it leaves OpenBao slow.
        say("large volumes with small ones beside")
        with stand.daemon() as daemon:
            small_alone, large = scenarios.large(stand, daemon, plan.boots)
    return Results(
        machine,
        tuple(floors),
        tuple(singles),
        boot,
        replicas,
        tuple(rotations),
        tuple(from_memory),
        full_node,
        small_alone,
        tuple(large),
        idle,
        start_up,
        tuple(beside),
        profiled,
        time.monotonic() - began,
    )
