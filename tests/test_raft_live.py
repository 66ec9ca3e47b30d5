"""Leader changes of an OpenBao cluster under a steady load of mounts: no mount fails for good, no credential dies.

Three real servers, a real PostgreSQL, and two daemons as processes: one reaches the cluster through a load balancer
that knows the active node, the other has one node's address, which forwards while it is a standby.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field

import pytest

from tests.live import DATABASE, STATIC, Application, Cluster, Daemon, class_of, credential
from tests.stand.balancer import Balancer
from tests.stand.kubelet import Failure, Kubelet
from tests.stand.raft import RaftCluster

# All in seconds. Long enough that a renewal which finds no leader is tried again in time, short enough that each
# credential needs renewals to live through the window.
TTL = 24
# Between two changes of the leader, and after the last.
CALM = 4
# Between two mounts of one pod, and between two new pods of one daemon.
REMOUNT, ARRIVAL = 1.0, 0.3
# A change takes a few seconds; kubelet's backoff has then come to some eight.
PATIENCE = 90
# Pods of each daemon that live through all of it, with an application that logs in twice a second.
RESIDENTS = 3


@dataclass
class Seen:
    """What came of the load on one daemon."""

    mounts: int = 0
    failures: list[Failure] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)
    logins: int = 0
    users: list[set[str]] = field(default_factory=list)


@dataclass(frozen=True)
class Window:
    """The whole of it: which nodes led, when that changed (`time.monotonic()`), and what each daemon's pods saw."""

    leaders: list[str]
    changes: list[tuple[float, float]]
    seconds: float
    seen: dict[str, Seen]


class Load:
    """Pods of one daemon, until told to end: some that stay, and one after the other that come."""

    def __init__(self, cluster: Cluster, daemon: Daemon, name: str, over: threading.Event) -> None:
        self._cluster = cluster
        self._daemon = daemon
        self._name = name
        self._over = over
        self._seen = Seen()

    def start(self, pool: ThreadPoolExecutor) -> list[Future[None]]:
        """Begin; each future ends when its pods have."""
        return [*(pool.submit(self._resident, number) for number in range(RESIDENTS)), pool.submit(self._arrivals)]

    def result(self) -> Seen:
        """What was seen; once all futures are done."""
        return self._seen

    def _resident(self, number: int) -> None:
        role = f"{self._name}{number}"
        self._cluster.role(role, ttl=f"{TTL}s", token_ttl=f"{TTL}s")
        with Kubelet(self._cluster, self._daemon, patience=PATIENCE) as kubelet:
            mounted = kubelet.mount(self._cluster.pod(role), class_of(role, *DATABASE, *STATIC))
            with Application(self._cluster, role, mounted) as application:
                while not self._over.wait(REMOUNT):
                    kubelet.remount(mounted)
        self._note(kubelet)
        self._seen.refused += application.refused
        self._seen.logins += application.logins
        self._seen.users.append(application.users)

    def _arrivals(self) -> None:
        role = f"{self._name}new"
        self._cluster.role(role)
        with Kubelet(self._cluster, self._daemon, patience=PATIENCE) as kubelet:
            for number in itertools.count():
                if self._over.wait(ARRIVAL):
                    break
                mounted = kubelet.mount(self._cluster.pod(f"{role}-{number}"), class_of(role, *DATABASE, *STATIC))
                user, password = credential(mounted)
                if not self._cluster.postgres.can_login(user, password):
                    self._seen.refused.append(user)
        self._note(kubelet)

    def _note(self, kubelet: Kubelet) -> None:
        self._seen.mounts += kubelet.mounts
        self._seen.failures += kubelet.failures


def change_leaders(bao: RaftCluster) -> tuple[list[str], list[tuple[float, float]]]:
    """Kill the leader, make the next one step down, and kill the one after that; the names of all that led, and when
    each change was.
    """
    leaders = [bao.active().name]
    changes = []
    for change in (bao.kill_leader, bao.step_down, bao.kill_leader):
        time.sleep(CALM)
        began = time.monotonic()
        before = change()
        leaders.append(bao.active().name)
        changes.append((began, time.monotonic()))
        if change == bao.kill_leader:
            time.sleep(CALM)
            before.start()
    time.sleep(CALM)
    return leaders, changes


@pytest.fixture(scope="module")
def window(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Window]:
    """The leader changes three times under the load of two daemons."""
    bao = RaftCluster()
    with ExitStack() as stack:
        cluster = stack.enter_context(Cluster(tmp_path_factory.mktemp("raft"), bao=bao))
        balancer = stack.enter_context(Balancer([node.address.removeprefix("http://") for node in bao.nodes]))
        ways = {"balancer": balancer.address, "standby": bao.nodes[-1].address}
        assert not bao.nodes[-1].is_active
        daemons = {
            name: stack.enter_context(Daemon(cluster, f"--vault-addr={address}")) for name, address in ways.items()
        }
        over = threading.Event()
        pool = stack.enter_context(ThreadPoolExecutor(len(ways) * (RESIDENTS + 1)))
        stack.callback(over.set)
        began = time.monotonic()
        loads = {name: Load(cluster, daemon, name[:4], over) for name, daemon in daemons.items()}
        running = [future for load in loads.values() for future in load.start(pool)]
        leaders, changes = change_leaders(bao)
        over.set()
        for future in running:
            future.result()
        yield Window(leaders, changes, time.monotonic() - began, {name: load.result() for name, load in loads.items()})


WAYS = ("balancer", "standby")


def test_leader_changed_each_time(window: Window) -> None:
    """The leader was killed twice and stepped down once, each time for another node, and lives outlasted their TTL."""
    assert len(window.leaders) == 4
    assert all(before != after for before, after in itertools.pairwise(window.leaders))
    assert window.seconds > TTL


@pytest.mark.parametrize("way", WAYS)
def test_no_mount_fails_for_good_while_the_leader_changes(window: Window, way: str) -> None:
    """Each mount succeeds, at the latest when it is tried again as kubelet does, and fails for want of Vault alone."""
    seen = window.seen[way]
    assert len(seen.users) == RESIDENTS
    assert seen.mounts > RESIDENTS * 10
    # A failure that kubelet would believe, or that blames the class, would be another fault than the cluster's.
    assert [
        str(failure)
        for failure in seen.failures
        if failure.code != "FAILED_PRECONDITION" and not failure.is_cut_login(window.changes)
    ] == []


@pytest.mark.parametrize("way", WAYS)
def test_no_credential_dies_while_the_leader_changes(window: Window, way: str) -> None:
    """Whatever is in the files logs in at PostgreSQL, from the first second to the last."""
    seen = window.seen[way]
    assert seen.refused == []
    assert seen.logins > RESIDENTS * TTL
