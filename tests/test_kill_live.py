"""kill -9 at random moments during a thousand mounts, while secrets rotate: what pods see, and what Vault keeps.

The provider is a process before real OpenBao and PostgreSQL, with its state directory; pods come, are mounted again and
again, and go, while the daemon is killed and started anew.
"""

from __future__ import annotations

import itertools
import json
import random
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.live import DATABASE, NODE, Cluster, Daemon, class_of, contents
from tests.stand.driver import MountOutcome
from tests.stand.kubelet import Failure, Kubelet
from tests.stand.process import StandError
from tests.stand.waiting import eventually

# It fills the machine, and beside others each of some twenty starts of a daemon would take ten seconds.
pytestmark = pytest.mark.alone

PODS = 100
MOUNTS_EACH = 10
# Pods that are there at a time, each with a kubelet's thread of its own.
AT_A_TIME = 8
ROLE = "killed"
# Mounts after which a daemon is killed: some serve hardly one, some live through several sweeps. And the most seconds
# after the last of them, so that it is no certain moment.
LIVES, MOMENT = (0, 10, 40, 150), 0.2
# All in seconds. Between two versions of the secret that rotates.
ROTATION = 0.1
# Of tokens and leases, which renewals keep alive. What a daemon was given in the moment of its end, nobody knows: it
# ends with this. No shorter, since a busy machine takes ten seconds to start a daemon.
TTL = 45
# Between two rounds of whoever looks into all volumes.
LOOKING = 0.05
# After so many failures in a row a volume would have failed for good; one daemon or another answers long before.
PATIENCE = 120
# Kubelet's backoff, compressed, since daemons' lives are.
LONGEST_BACKOFF = 2.0

ROTATING = (
    "{objectName: kv-username, secretPath: shop/data/pair, secretKey: username}",
    "{objectName: kv-password, secretPath: shop/data/pair, secretKey: password}",
)
NAMES = {"db-username", "db-password", "kv-username", "kv-password"}


@dataclass
class Run:
    """What came of it."""

    mounts: int = 0
    kills: int = 0
    rotations: int = 0
    looks: int = 0
    versions_seen: set[str] = field(default_factory=set)
    wrong: list[str] = field(default_factory=list)
    """Sets of files that no pod should have seen."""
    failures: list[Failure] = field(default_factory=list)
    logins: int = 0
    revoked_by_another: int = 0
    """Tokens of pods that are gone, revoked by another daemon than the one that had logged in."""
    left: tuple[int, int, int] = (-1, -1, -1)


class Node:
    """The pods of the node, who looks into their volumes, who rotates the secret, and who kills the daemon."""

    def __init__(self, cluster: Cluster, daemon: Daemon, run: Run) -> None:
        self._cluster = cluster
        self._daemon = daemon
        self._run = run
        self._numbers = itertools.count()
        self._volumes: dict[int, MountOutcome] = {}
        self._kubelets: list[Kubelet] = []
        self._let_in: set[tuple[str, str]] = set()
        self._over = threading.Event()

    def live(self) -> None:
        """All pods come and go; then nobody rotates or kills any more."""
        with ThreadPoolExecutor(AT_A_TIME + 3) as pool:
            others = [pool.submit(work) for work in (self._rotate, self._look, self._kill)]
            try:
                for kubelet in [pool.submit(self._pods) for _ in range(AT_A_TIME)]:
                    kubelet.result()
            finally:
                self._over.set()
            for other in others:
                other.result()
        self._run.mounts = self._mounts()

    def _pods(self) -> None:
        parameters = class_of(ROLE, *DATABASE, *ROTATING)
        with Kubelet(
            self._cluster, self._daemon, patience=PATIENCE, longest_backoff=LONGEST_BACKOFF, restarts=True
        ) as kubelet:
            self._kubelets.append(kubelet)
            while (number := next(self._numbers)) < PODS:
                pod = self._cluster.pod(f"killed-{number}")
                mounted = kubelet.mount(pod, parameters)
                self._volumes[number] = mounted
                self._check(mounted)
                for _ in range(MOUNTS_EACH - 1):
                    kubelet.remount(mounted)
                    self._check(mounted)
                self._check(mounted, last=True)
                del self._volumes[number]
                self._cluster.kube.remove_pod(pod)
        self._run.failures += kubelet.failures

    def _mounts(self) -> int:
        return sum(kubelet.mounts for kubelet in list(self._kubelets))

    def _check(self, mounted: MountOutcome, *, last: bool = False) -> None:
        """Log in with what the volume holds: for each pair once, and at the end of the pod."""
        files = self._looked_at(mounted)
        pair = files["db-username"], files["db-password"]
        if last or pair not in self._let_in:
            self._let_in.add(pair)
            if not self._cluster.postgres.can_login(*pair):
                self._run.wrong.append(f"{mounted.pod.name}: {pair[0]} is not let in")

    def _looked_at(self, mounted: MountOutcome) -> dict[str, str]:
        files = contents(mounted)
        if files.keys() != NAMES or files["kv-password"] != password_of(files["kv-username"]):
            self._run.wrong.append(f"{mounted.pod.name}: {files}")
        self._run.versions_seen.add(files["kv-username"])
        return files

    def _look(self) -> None:
        """Look into all volumes all the time, as their pods do."""
        while not self._over.wait(LOOKING):
            for number, mounted in list(self._volumes.items()):
                try:
                    self._looked_at(mounted)
                except StandError:
                    if number in self._volumes:
                        raise
                    continue  # its pod has gone meanwhile, and its kubelet with all volumes
                self._run.looks += 1

    def _rotate(self) -> None:
        while not self._over.wait(ROTATION):
            self._run.rotations += 1
            write_pair(self._cluster, self._run.rotations)

    def _kill(self) -> None:
        enough = 0
        while not self._over.wait(random.uniform(0, MOMENT)):
            if self._mounts() >= enough:
                self._daemon.kill()
                self._run.kills += 1
                enough = self._mounts() + random.choice(LIVES)
                self._daemon.start()


def password_of(username: str) -> str:
    """The password that belongs to a username, in each version of the secret that rotates."""
    return f"password-of-{username}"


def write_pair(cluster: Cluster, version: int) -> None:
    """Write this version of the secret that rotates."""
    username = f"user-{version}"
    cluster.bao.write_kv("shop/data/pair", {"username": username, "password": password_of(username)})


def revoked_by_another(directory: Path) -> int:
    """How many tokens were revoked by another daemon than the one that had logged in, by the daemons' logs."""
    number, here = 0, set[str]()
    for log in directory.glob("*.log"):
        here.clear()
        # The last line of a daemon that was killed may be half a line.
        for event in (json.loads(line) for line in log.read_text().splitlines(keepends=True) if line.endswith("\n")):
            if event["message"] == "logged in":
                here.add(event["accessor"])
            elif event["message"].startswith("revoked the token of a pod"):
                number += event["accessor"] not in here
    return number


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """A node on which the daemon is killed again and again, until all its pods have come and gone."""
    run = Run()
    directory = tmp_path_factory.mktemp("kill")
    with Cluster(directory) as cluster:
        cluster.role(ROLE, ttl=f"{TTL}s", token_ttl=f"{TTL}s")
        write_pair(cluster, 0)
        flags = (f"--state-dir={directory / 'state'}", f"--node-name={NODE}", "--sweep-interval=1s")
        with Daemon(cluster, *flags) as daemon:
            Node(cluster, daemon, run).live()
            swept = time.monotonic()
            eventually(
                lambda: not any(cluster.left(ROLE)),
                "nothing is left",
                seconds=TTL + 60,
                instead=lambda: cluster.left(ROLE),
            )
            run.left = cluster.left(ROLE).counts
            eventually(lambda: not list((directory / "state").glob("*.session")), "no file is left")
        run.logins = cluster.logins(ROLE)
        run.revoked_by_another = revoked_by_another(directory)
        print(f"{run.mounts} mounts, {run.kills} kills, {run.rotations} rotations, {run.looks} looks,")
        print(f"{len(run.failures)} failures, {run.logins} logins, {run.revoked_by_another} revoked by another daemon,")
        print(f"clean {time.monotonic() - swept:.0f} s after the last pod")
        yield run


def test_thousand_mounts_succeed_under_kills(run: Run) -> None:
    """Each of 1,000 mounts succeeds, at the latest when kubelet tries again, however often the daemon was killed."""
    assert run.mounts == PODS * MOUNTS_EACH
    assert run.kills >= 5
    # Whatever fails is for want of a daemon, not of a secret.
    assert [str(failure) for failure in run.failures if failure.code != "UNAVAILABLE"] == []


def test_no_pod_sees_half_or_mixed_files(run: Run) -> None:
    """In each look at a volume there are all files, and a username with its own password, which PostgreSQL takes."""
    assert run.wrong == []
    assert run.looks > run.mounts
    assert len(run.versions_seen) > run.kills


def test_nothing_is_left_at_vault_after_kills(run: Run) -> None:
    """After the sweep there are as many tokens, leases and users who can log in as before: none."""
    assert run.left == (0, 0, 0)


def test_what_killed_daemons_held_is_revoked(run: Run) -> None:
    """The next daemon knows and revokes what the one before was given, but for what came in the moment of its end."""
    assert run.revoked_by_another >= run.kills
    assert run.logins - PODS <= run.kills * AT_A_TIME
