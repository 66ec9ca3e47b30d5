"""A node for minutes or hours: pods come and go, secrets rotate, Vault flaps; at the end everything is as at the start.

`python -m tests.soak --minutes N` runs it and prints its figures; it ends with 1 when something was lost or left.

The daemon is a process before real OpenBao and PostgreSQL. Time is compressed: pods live for seconds that stand for
hours, and kubelet mounts again every two seconds instead of every ninety.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import itertools
import json
import os
import random
import signal
import sys
import tempfile
import threading
import time
import urllib.request
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from tests.live import CERTIFICATE, DATABASE, NODE, Cluster, Daemon, class_of, contents
from tests.stand.driver import MountOutcome
from tests.stand.kubelet import Failure, Kubelet
from tests.stand.openbao import OpenBaoError
from tests.stand.process import free_port
from tests.stand.waiting import eventually

ROLE = "soak"
PAIR = "shop/data/pair"
# The pods that are on the node at a time.
SLOTS = 20
# All in seconds. How long a pod lives, at the least and at the most; some outlive their lease's maximum TTL.
LIVES = (4.0, 60.0)
WARM_UP = 10.0
REMOUNT = 2.0
ROTATION = 0.5
# How long Vault is away each time, and between two times. A renewal has a third of a TTL to get through.
AWAY, CALM = (1.0, 4.0), (4.0, 10.0)
TTL, MAX_TTL = 30, 40
# How long one volume may go on failing: Vault is away for seconds, and kubelet's pauses are compressed to two.
PATIENCE = 60
LONGEST_BACKOFF = 2.0
# What is left at Vault of an answer that was lost in an outage ends with its TTL; then leases are revoked in turn.
CLEAN = TTL + 60

# What may differ between start and end without being a leak. Memory: what the allocator does not give back of a load
# whose answers, requests and TLS contexts came and went; the same after two minutes as after an hour.
GROWTH_MIB = 16.0
# Objects of Python: caches that are bounded by number (parsed classes, engines, metrics' series) fill up by and by.
GROWTH_OBJECTS = 20_000
# Threads that wait for work: Python's pool, which grows to this by its own rule, and gRPC's, which comes and goes.
SPARE_THREADS = min(32, (os.cpu_count() or 1) + 4) + 4
# Whoever asks just then: a probe of Vault, a scrape, a sweep, each a descriptor and a task.
SPARE = 4

OBJECTS = (
    *DATABASE,
    *CERTIFICATE,
    f"{{objectName: kv-username, secretPath: {PAIR}, secretKey: username}}",
    f"{{objectName: kv-password, secretPath: {PAIR}, secretKey: password}}",
    f'{{objectName: config, secretPath: {PAIR}, template: "{{{{ secret.username }}}} {{{{ secret.password }}}}"}}',
)
NAMES = {"db-username", "db-password", "tls.crt", "tls.key", "kv-username", "kv-password", "config"}


@dataclass(frozen=True)
class Level:
    """What the daemon, OpenBao and PostgreSQL hold at one moment."""

    rss_mib: float
    objects: int
    tasks: int
    threads: int
    descriptors: int
    sessions: int
    kept: int
    files: int
    tokens: int
    leases: int
    users: int

    def of_pods(self) -> tuple[int, ...]:
        """What must come to nothing once there are no pods."""
        return self.sessions, self.kept, self.files, self.tokens, self.leases, self.users


@dataclass
class Soak:
    """What came of it."""

    minutes: float
    start: Level | None = None
    end: Level | None = None
    pods: int = 0
    mounts: int = 0
    rotations: int = 0
    rewritten: int = 0
    outages: Counter[str] = field(default_factory=Counter)
    cuts: list[tuple[float, float]] = field(default_factory=list)
    """From when to when Vault was being sealed, as `time.monotonic()`."""
    failures: list[Failure] = field(default_factory=list)
    """Mounts that failed and were tried again."""
    wrong: list[str] = field(default_factory=list)
    """Volumes that no pod should have seen."""
    bugs: list[str] = field(default_factory=list)
    """What the daemon logged as an error."""

    def faults(self) -> list[str]:
        """What was lost or left, in words; empty where all is well."""
        assert self.start is not None
        assert self.end is not None
        start, end = self.start, self.end
        found = [*self.wrong, *self.bugs]
        found += [str(one) for one in self.failures if one.code != RETRIED and not one.is_cut_login(self.cuts)]
        bounds = {
            "rss_mib": start.rss_mib + GROWTH_MIB,
            "objects": start.objects + GROWTH_OBJECTS,
            "tasks": start.tasks + SPARE,
            "threads": start.threads + SPARE_THREADS,
            "descriptors": start.descriptors + SPARE,
        }
        for name, now in vars(end).items():
            bound = bounds.get(name, 0)
            if now > bound:
                found.append(
                    f"{name}: {vars(start)[name]:g} at the start, {now:g} at the end, at most {bound:g} is right"
                )
        return found

    def report(self) -> str:
        """The figures, for people."""
        lines = [
            f"{self.minutes:g} minutes: {self.mounts} mounts for {self.pods} pods, {self.rotations} rotations of a "
            f"secret, {self.rewritten} volumes rewritten, {sum(self.outages.values())} outages of Vault "
            f"({', '.join(f'{number} {kind}' for kind, number in sorted(self.outages.items()))}), "
            f"{len(self.failures)} failed mounts that were tried again",
        ]
        if self.start is not None and self.end is not None:
            lines.append(f"{'':>12} {'start':>8} {'end':>8}")
            for name, before in vars(self.start).items():
                lines.append(f"{name:>12} {before:>8.6g} {vars(self.end)[name]:>8.6g}")
        return "\n".join(lines)


RETRIED = "FAILED_PRECONDITION"
"""How a mount fails while Vault is away."""


class Observed(Daemon):
    """The daemon, which tells what is inside it."""

    def __init__(self, cluster: Cluster, *flags: str) -> None:
        self._port = free_port()
        self._told = cluster.directory / "observed.json"
        self.state = cluster.directory / "state"
        own = (f"--state-dir={self.state}", f"--health-addr=127.0.0.1:{self._port}", f"--node-name={NODE}")
        super().__init__(cluster, *own, "--sweep-interval=1s", *flags)
        module = self._argv.index("provider.cli")
        self._argv[module : module + 1] = ["tests.observed", str(self._told)]

    def gauge(self, family: str) -> int:
        """The sum of a family of gauges."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self._port}/metrics", timeout=10) as answer:
            lines = answer.read().decode().splitlines()
        return int(
            sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith((f"{family} ", f"{family}{{")))
        )

    def level(self, cluster: Cluster) -> Level:
        """What it holds now, and what the servers hold of its role."""
        self._told.unlink(missing_ok=True)
        os.kill(self.process.pid, signal.SIGUSR1)
        eventually(self._told.exists, "the daemon tells what is inside it")
        inside = json.loads(self._told.read_text())
        tokens, leases, users = cluster.left(ROLE).counts
        proc = Path(f"/proc/{self.process.pid}")
        status = dict(line.split(":", 1) for line in (proc / "status").read_text().splitlines())
        return Level(
            rss_mib=int(status["VmRSS"].split()[0]) / 1024,
            objects=inside["objects"],
            tasks=inside["tasks"],
            threads=int(status["Threads"]),
            # Its number is its size, since Linux 6.2; who is not root may look no further.
            descriptors=(proc / "fd").stat().st_size or len(os.listdir(proc / "fd")),
            sessions=self.gauge("vault_csi_sessions"),
            kept=self.gauge("vault_csi_leases"),
            files=len(list(self.state.glob("*.session"))),
            tokens=tokens,
            leases=leases,
            users=users,
        )


class Node:
    """The pods of the node, who rotates their secret, and who takes Vault away from them."""

    def __init__(self, cluster: Cluster, daemon: Daemon, soak: Soak) -> None:
        self._cluster = cluster
        self._daemon = daemon
        self._soak = soak
        self._numbers = itertools.count()
        self._lock = threading.Lock()
        self._over = threading.Event()

    def warm_up(self) -> None:
        """Pods in all slots for a while, so that what is loaded and opened once is there at the start."""
        with ThreadPoolExecutor(SLOTS) as pool:
            for slot in [pool.submit(self._slot, time.monotonic() + WARM_UP) for _ in range(SLOTS)]:
                slot.result()

    def live(self, seconds: float) -> None:
        """Pods come and go for so long; the last ones go at its end."""
        until = time.monotonic() + seconds
        with ThreadPoolExecutor(SLOTS + 2) as pool:
            others = [pool.submit(work) for work in (self._rotate, self._flap)]
            try:
                for slot in [pool.submit(self._slot, until) for _ in range(SLOTS)]:
                    slot.result()
            finally:
                self._over.set()
            for other in others:
                other.result()

    def _slot(self, until: float) -> None:
        """One pod after the other, until a monotonic time."""
        parameters = class_of(ROLE, *OBJECTS)
        with Kubelet(self._cluster, self._daemon, patience=PATIENCE, longest_backoff=LONGEST_BACKOFF) as kubelet:
            rewritten = pods = 0
            while time.monotonic() < until:
                pods += 1
                pod = self._cluster.pod(f"soak-{next(self._numbers)}")
                mounted = kubelet.mount(pod, parameters)
                self._check(mounted)
                ends = min(until, time.monotonic() + random.uniform(*LIVES))
                while time.monotonic() < ends:
                    time.sleep(REMOUNT * random.uniform(0.8, 1.2))
                    rewritten += kubelet.remount(mounted).rewritten
                    self._check(mounted)
                self._cluster.kube.remove_pod(pod)
        with self._lock:
            self._soak.pods += pods
            self._soak.mounts += kubelet.mounts
            self._soak.rewritten += rewritten
            self._soak.failures += kubelet.failures

    def _check(self, mounted: MountOutcome) -> None:
        files = contents(mounted)
        whole = files.keys() == NAMES
        if not whole or files["config"] != f"{files['kv-username']} {password_of(files['kv-username'])}":
            self._soak.wrong.append(f"{mounted.pod.name} sees half of a version, or two: {sorted(files)}")
        elif files["kv-password"] != password_of(files["kv-username"]):
            self._soak.wrong.append(f"{mounted.pod.name} sees a password of another version")
        elif not self._cluster.postgres.can_login(files["db-username"], files["db-password"]):
            self._soak.wrong.append(f"{mounted.pod.name}: PostgreSQL does not let {files['db-username']} in")

    def _rotate(self) -> None:
        while not self._over.wait(ROTATION):
            with contextlib.suppress(OSError, OpenBaoError, http.client.HTTPException):  # it may be away
                write_pair(self._cluster, self._soak.rotations + 1)
                self._soak.rotations += 1

    def _flap(self) -> None:
        bao = self._cluster.bao
        outages = {
            "killed": (bao.kill, bao.start),
            "frozen": (bao.pause, bao.resume),
            "sealed": (bao.seal, bao.unseal),
        }
        for kind, (end, begin) in itertools.cycle(outages.items()):
            if self._over.wait(random.uniform(*CALM)):
                return
            began = time.monotonic()
            end()
            if kind == "sealed":
                self._soak.cuts.append((began, time.monotonic()))
            try:
                self._over.wait(random.uniform(*AWAY))
            finally:
                begin()
            self._soak.outages[kind] += 1


def password_of(username: str) -> str:
    """The password that belongs to a username, in each version of the secret that rotates."""
    return f"password-of-{username}"


def write_pair(cluster: Cluster, version: int) -> None:
    """Write this version of the secret that rotates."""
    username = f"user-{version}"
    cluster.bao.write_kv(PAIR, {"username": username, "password": password_of(username)})


def soak(directory: Path, minutes: float) -> Soak:
    """Run it; `directory` is for logs and sockets."""
    result = Soak(minutes)
    with Cluster(directory, storage="raft") as cluster:
        cluster.role(ROLE, ttl=f"{TTL}s", max_ttl=f"{MAX_TTL}s", token_ttl=f"{TTL}s")
        write_pair(cluster, 0)
        with Observed(cluster) as daemon:
            Node(cluster, daemon, Soak(0)).warm_up()
            result.start = _settled(cluster, daemon)
            Node(cluster, daemon, result).live(minutes * 60)
            result.end = _settled(cluster, daemon)
            result.bugs = [
                f"the daemon logged: {event['message']}"
                for event in daemon.events()
                if event["severity"] in ("ERROR", "CRITICAL") or "bug" in event["message"]
            ]
    return result


def _settled(cluster: Cluster, daemon: Observed) -> Level:
    """The level once nothing of any pod is left, or when that does not come about."""
    until = time.monotonic() + CLEAN
    while any(daemon.level(cluster).of_pods()) and time.monotonic() < until:
        time.sleep(1)
    # Ends the connections that are kept open for the next request: how many there are is chance.
    cluster.bao.restart()
    return daemon.level(cluster)


def main() -> int:
    """Run as the command line says, print the figures, and return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__.partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=10, help="how long (default 10)")
    minutes = parser.parse_args().minutes
    with tempfile.TemporaryDirectory(prefix="soak-") as directory:
        result = soak(Path(directory), minutes)
    print(result.report())
    faults = result.faults()
    print("\n".join(faults) if faults else "Nothing lost, nothing left.")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
