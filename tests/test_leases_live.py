"""Credentials stay alive, and are few: the provider as a process before real OpenBao and PostgreSQL, in real time.

What takes the longest runs beside the other tests, on servers of its own: a window that the module's first test opens
and the last ones look at.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import grpc
import pytest

from tests.live import DATABASE, STATIC, Application, Cluster, Daemon, class_of, credential, remount_every
from tests.stand.driver import Driver
from tests.stand.waiting import eventually

# All in seconds. The lease and the token that the window is about, and kubelet's pace in it.
LEASE_TTL, LEASE_MAX_TTL, TOKEN_TTL = 6, 18, 9
WINDOW, INTERVAL = 30, 2
MAX_USERS = 3
# Several pods, which begin at different times within the interval: the phase decides whether a cap is learnt in time.
PODS = 4
# Rotation off: by renewals alone for so long, and a token that ends soon after.
OFF, OFF_TOKEN_MAX_TTL = 15, 21
# Vault away: the renewal is due between 60 and 67 % of this.
PAUSED_TTL, PAUSED_UNTIL = 12, 9
STOPPED_TTL = 16
# How long a driver waits that is about to give up.
IMPATIENCE = 1.0


@dataclass(frozen=True)
class Seen:
    """What came of one pod in the window."""

    remounts: int
    logins: int
    refused: list[str]
    users: set[str]
    issued: int
    issued_without_remounts: int = 0
    vault_logins_without_remounts: int = 0


class Window:
    """The pods of the window, each on a thread of its own."""

    def __init__(self, pool: ThreadPoolExecutor, cluster: Cluster, daemon: Daemon) -> None:
        self._cluster = cluster
        self._daemon = daemon
        self.remounted: list[Future[Seen]] = [pool.submit(self._remounted, number) for number in range(PODS)]
        self.rotation_off: Future[Seen] = pool.submit(self._rotation_off)

    def _remounted(self, number: int) -> Seen:
        cluster, role = self._cluster, f"live{number}"
        cluster.role(role, ttl=f"{LEASE_TTL}s", max_ttl=f"{LEASE_MAX_TTL}s", token_ttl=f"{TOKEN_TTL}s")
        time.sleep(INTERVAL * number / PODS)
        with Driver(self._daemon.socket) as driver:
            mounted = cluster.mount(driver, cluster.pod(role), class_of(role, *DATABASE))
            with Application(cluster, role, mounted) as application:
                remounts = remount_every(INTERVAL, driver, mounted, until=time.monotonic() + WINDOW)
        return Seen(remounts, application.logins, application.refused, application.users, cluster.issued(role))

    def _rotation_off(self) -> Seen:
        cluster, role = self._cluster, "off"
        cluster.role(role, ttl=f"{LEASE_TTL}s", token_ttl=f"{TOKEN_TTL}s", token_max_ttl=f"{OFF_TOKEN_MAX_TTL}s")
        with Driver(self._daemon.socket) as driver:
            mounted = cluster.mount(driver, cluster.pod(role), class_of(role, *DATABASE))
            with Application(cluster, role, mounted) as application:
                time.sleep(OFF)
                before = cluster.issued(role), cluster.logins(role)
                driver.remount(mounted)
                remounts = 1 + remount_every(INTERVAL, driver, mounted, until=time.monotonic() + WINDOW - OFF)
        return Seen(remounts, application.logins, application.refused, application.users, cluster.issued(role), *before)


@pytest.fixture(scope="module", autouse=True)
def window(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Window]:
    """The window, opened before the first test."""
    with (
        Cluster(tmp_path_factory.mktemp("window")) as cluster,
        Daemon(cluster) as daemon,
        ThreadPoolExecutor(PODS + 1) as pool,
    ):
        yield Window(pool, cluster, daemon)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Servers that a test may stop, if it starts them again; OpenBao keeps its storage."""
    with Cluster(tmp_path_factory.mktemp("leases"), storage="raft") as cluster:
        yield cluster


@pytest.fixture(scope="module")
def daemon(cluster: Cluster) -> Iterator[Daemon]:
    """A daemon that all tests but the window's share."""
    with Daemon(cluster) as daemon:
        yield daemon


def test_paused_vault_renews_when_it_is_back(cluster: Cluster, daemon: Daemon) -> None:
    """A Vault that answers nothing from before the renewal until after it, but comes back within the lease: renewed."""
    cluster.role("paused", ttl=f"{PAUSED_TTL}s", token_ttl=f"{PAUSED_TTL}s")
    with Driver(daemon.socket) as driver:
        mounted = cluster.mount(driver, cluster.pod("paused"), class_of("paused", *DATABASE))
        began, before = time.monotonic(), credential(mounted)
        cluster.bao.pause()
        time.sleep(PAUSED_UNTIL)
        cluster.bao.resume()
        time.sleep(max(0.0, began + PAUSED_TTL + INTERVAL - time.monotonic()))
        assert cluster.postgres.can_login(*before)
        driver.remount(mounted)
        assert credential(mounted) == before
    assert (cluster.issued("paused"), cluster.logins("paused")) == (1, 1)


def test_restarted_vault_renews_when_it_is_back(cluster: Cluster, daemon: Daemon) -> None:
    """A Vault that is down when the renewal is due, and back within the lease: renewed, and nothing issued anew."""
    cluster.role("stopped", ttl=f"{STOPPED_TTL}s", token_ttl=f"{STOPPED_TTL}s")
    with Driver(daemon.socket) as driver:
        mounted = cluster.mount(driver, cluster.pod("stopped"), class_of("stopped", *DATABASE))
        began, before = time.monotonic(), credential(mounted)
        cluster.bao.stop()
        eventually(lambda: daemon.said("renewal unanswered"), "a renewal finds no Vault", seconds=STOPPED_TTL)
        cluster.bao.start()
        time.sleep(max(0.0, began + STOPPED_TTL + INTERVAL - time.monotonic()))
        assert cluster.postgres.can_login(*before)
        driver.remount(mounted)
        assert credential(mounted) == before
    assert (cluster.issued("stopped"), cluster.logins("stopped")) == (1, 1)


def test_lost_storage_is_issued_anew(tmp_path: Path) -> None:
    """OpenBao restarted with nothing of what it knew: the next re-mount logs in, and brings a credential that lives."""
    with Cluster(tmp_path) as cluster, Daemon(cluster) as daemon, Driver(daemon.socket) as driver:
        cluster.role("lost")
        mounted = cluster.mount(driver, cluster.pod("lost"), class_of("lost", *DATABASE, *STATIC))
        before, logins = credential(mounted), cluster.logins("lost")
        cluster.bao.restart()
        cluster.set_up()
        cluster.role("lost")
        driver.remount(mounted)
        assert credential(mounted) != before
        assert cluster.postgres.can_login(*credential(mounted))
        assert cluster.users("lost") == sorted([before[0], credential(mounted)[0]])
        assert (cluster.issued("lost"), cluster.logins("lost")) == (2, logins + 1)


@pytest.mark.parametrize("waiting_for", ["the login", "the credential"])
def test_driver_that_gives_up_leaves_nothing_behind(cluster: Cluster, daemon: Daemon, waiting_for: str) -> None:
    """A driver whose deadline passes while Vault is slow gets, when it asks again, what was under way: one of each."""
    role = "giveup-" + ("l" if waiting_for == "the login" else "c")
    cluster.role(role)
    pod = cluster.pod(role)
    with Driver(daemon.socket) as driver, Driver(daemon.socket, timeout=IMPATIENCE) as impatient:
        if waiting_for == "the credential":
            cluster.mount(driver, pod, class_of(role, *STATIC), "static")
        cluster.bao.pause()
        try:
            for _ in range(2):
                with pytest.raises(grpc.RpcError) as given_up:
                    cluster.mount(impatient, pod, class_of(role, *DATABASE))
                assert isinstance(given_up.value, grpc.Call)
                assert given_up.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        finally:
            cluster.bao.resume()
        mounted = cluster.mount(driver, pod, class_of(role, *DATABASE))
        assert cluster.users(role) == [credential(mounted)[0]]
    assert (cluster.issued(role), cluster.logins(role)) == (1, 1)


@pytest.mark.parametrize(("stays", "drops"), [("one", "two"), ("two", "one")])
def test_two_classes_share_one_credential(cluster: Cluster, daemon: Daemon, stays: str, drops: str) -> None:
    """Two volumes of a pod have one credential; the one's class drops it, and the other's files stay as they are."""
    role = f"share{stays}"
    cluster.role(role)
    pod = cluster.pod(role)
    with Driver(daemon.socket) as driver:
        volumes = {
            name: cluster.mount(driver, pod, class_of(role, *DATABASE, *STATIC), name) for name in ("one", "two")
        }
        kept = credential(volumes["one"])
        assert credential(volumes["two"]) == kept
        dropped = cluster.mount(driver, pod, class_of(role, *STATIC), drops)
        assert set(dropped.files) == {"api-key"}
        again = driver.remount(volumes[stays])
        assert not again.rewritten
        assert credential(again) == kept
        assert cluster.postgres.can_login(*kept)
    assert (cluster.issued(role), cluster.logins(role)) == (1, 1)


def test_no_login_fails_over_a_lease_that_ends(window: Window) -> None:
    """Re-mounts every 2 s and logins twice a second: all succeed, though users end after 18 s, and users are few."""
    for future in window.remounted:
        seen = future.result()
        assert seen.refused == []
        assert len(seen.users) <= seen.issued <= MAX_USERS
        # The window is longer than a user can live, and the application looked at all of it.
        assert seen.issued > 1
        assert seen.remounts >= WINDOW / INTERVAL - 2
        assert seen.logins > WINDOW


def test_no_login_fails_with_rotation_off(window: Window) -> None:
    """Without a re-mount renewals keep the one credential alive; with them again, it outlives its token's maximum."""
    seen = window.rotation_off.result()
    assert seen.refused == []
    assert (seen.issued_without_remounts, seen.vault_logins_without_remounts) == (1, 1)
    assert len(seen.users) <= seen.issued <= MAX_USERS
    assert seen.issued > 1
    assert seen.logins > WINDOW
