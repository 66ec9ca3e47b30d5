"""Restarts: a daemon that ends, however it ends, and the next one that goes on with what the pods hold.

The provider is a process before real OpenBao and PostgreSQL; a restart is another process on the same state directory.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.live import CERTIFICATE, DATABASE, STATIC, Cluster, Daemon, class_of, credential
from tests.stand.driver import Driver, MountOutcome
from tests.stand.kubeapi import Pod
from tests.stand.waiting import eventually

# All in seconds. A lease and a token that end unless the second daemon renews what it took up.
SHORT_TTL = 12
# How late the API server answers with the HMAC key.
KEY_DELAY = 2.0
# Between two re-mounts of a pod while daemons change.
PACE = 0.05
# Pods on a node whose daemon is replaced under load.
PODS = 8


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """The servers, which all tests share; each has roles of its own."""
    with Cluster(tmp_path_factory.mktemp("restart")) as cluster:
        yield cluster


@pytest.fixture(scope="module", autouse=True)
def renewed_after_restart(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Future[bool]]:
    """Whether a credential of a daemon that was killed and started again outlived its TTL; beside the other tests."""
    cluster.role("goeson", ttl=f"{SHORT_TTL}s", token_ttl=f"{SHORT_TTL}s")

    def outlived() -> bool:
        with with_state(cluster, tmp_path_factory.mktemp("renewed")) as daemon, Driver(daemon.socket) as driver:
            mounted = cluster.mount(driver, cluster.pod("goeson"), class_of("goeson", *DATABASE))
            daemon.kill()
            daemon.start()
            time.sleep(SHORT_TTL + 2)
            return cluster.postgres.can_login(*credential(mounted))

    with ThreadPoolExecutor(1) as pool:
        yield pool.submit(outlived)


def with_state(cluster: Cluster, path: Path, *, socket: Path | None = None, key_file: bool = True) -> Daemon:
    """A daemon that keeps its sessions in a directory of this test."""
    return Daemon(cluster, f"--state-dir={path / 'state'}", socket=socket, key_file=key_file)


def pods_of(daemon: Daemon) -> set[str]:
    """The pods that a daemon has mounted for."""
    return {event["pod"] for event in daemon.events() if event["message"] == "mounted"}


@pytest.mark.parametrize("end", ["kill -9", "SIGTERM"])
def test_restart_between_two_remounts(cluster: Cluster, tmp_path: Path, end: str) -> None:
    """After a crash or an orderly end the next re-mount brings the same files: no login, no user, nothing revoked."""
    role = "crash" if end == "kill -9" else "term"
    cluster.role(role)
    with with_state(cluster, tmp_path) as daemon, Driver(daemon.socket) as driver:
        mounted = cluster.mount(driver, cluster.pod(role), class_of(role, *DATABASE, *CERTIFICATE, *STATIC))
        before = credential(mounted)
        daemon.kill() if end == "kill -9" else daemon.terminate()
        assert cluster.postgres.can_login(*before)
        daemon.start()
        again = driver.remount(mounted)
        assert daemon.said("took up sessions of another process")
        assert not again.rewritten
        assert again.files == mounted.files
        assert again.versions == mounted.versions
        assert cluster.postgres.can_login(*before)
        assert cluster.users(role) == [before[0]]
    assert (cluster.issued(role), cluster.logins(role)) == (1, 1)


def test_certificate_is_byte_stable_across_restarts(cluster: Cluster, tmp_path: Path) -> None:
    """A certificate and its key stay the same bytes over crashes; without the state directory they would not."""
    cluster.role("pki")
    issued = len(cluster.bao.requests("pki/issue/web"))
    with with_state(cluster, tmp_path) as daemon, Driver(daemon.socket) as driver:
        mounted = cluster.mount(driver, cluster.pod("pki"), class_of("pki", *CERTIFICATE))
        for _ in range(2):
            daemon.kill()
            daemon.start()
            assert driver.remount(mounted).files == mounted.files
    assert len(cluster.bao.requests("pki/issue/web")) == issued + 1
    with Daemon(cluster) as daemon, Driver(daemon.socket) as driver:
        assert driver.remount(mounted).files != mounted.files


def test_rolling_update_issues_nothing_anew(cluster: Cluster, tmp_path: Path) -> None:
    """Two daemons overlap on one socket and state directory under re-mounts: each pod keeps its files, none fails."""
    cluster.role("rolling")
    parameters = class_of("rolling", *DATABASE, *STATIC)
    over = threading.Event()

    def live(pod: Pod, socket: Path, mounted: threading.Event) -> list[MountOutcome]:
        with Driver(socket) as driver:
            outcomes = [cluster.mount(driver, pod, parameters)]
            mounted.set()
            while not over.wait(PACE):
                outcomes.append(driver.remount(outcomes[0]))
            return outcomes

    with with_state(cluster, tmp_path) as old, ThreadPoolExecutor(PODS) as pool:
        ready = [threading.Event() for _ in range(PODS)]
        running = [
            pool.submit(live, cluster.pod(f"rolling-{number}"), old.socket, event) for number, event in enumerate(ready)
        ]
        try:
            assert all(event.wait(20) for event in ready)
            with with_state(cluster, tmp_path, socket=old.socket) as new:
                old.terminate()
                eventually(lambda: pods_of(new) == pods_of(old), "the new daemon has mounted for each pod")
                over.set()
                outcomes = [future.result() for future in running]
        finally:
            over.set()
    for first, *again in outcomes:
        assert again
        assert all(outcome.files == first.files for outcome in again)
    assert (cluster.issued("rolling"), cluster.logins("rolling")) == (PODS, PODS)
    assert len(cluster.users("rolling")) == PODS


def test_mounts_wait_for_a_key_that_comes_late(cluster: Cluster, tmp_path: Path) -> None:
    """After a restart the key's Secret is slow in coming: the re-mount waits for it, and goes on with its session."""
    cluster.role("latekey")
    with with_state(cluster, tmp_path, key_file=False) as daemon, Driver(daemon.socket) as driver:
        mounted = cluster.mount(driver, cluster.pod("latekey"), class_of("latekey", *DATABASE))
        daemon.kill()
        cluster.kube.stall(KEY_DELAY, path=cluster.kube.hmac_secret)
        try:
            daemon.start()
            again = driver.remount(mounted)
        finally:
            cluster.kube.heal()
        assert again.files == mounted.files
        assert again.versions == mounted.versions
    assert (cluster.issued("latekey"), cluster.logins("latekey")) == (1, 1)


def test_no_file_is_touched_without_the_key(cluster: Cluster, tmp_path: Path) -> None:
    """Where the key is not to be had, mounts go on, and the sealed sessions stay as they are for when it is."""
    cluster.role("nokey")
    with with_state(cluster, tmp_path, key_file=False) as daemon, Driver(daemon.socket) as driver:
        kept = cluster.mount(driver, cluster.pod("nokey-1"), class_of("nokey", *DATABASE))
        daemon.kill()
        sealed = {path.name: path.read_bytes() for path in (tmp_path / "state").iterdir()}
        cluster.kube.fail(503, path=cluster.kube.hmac_secret)
        try:
            daemon.start()
            other = cluster.mount(driver, cluster.pod("nokey-2"), class_of("nokey", *DATABASE))
            assert cluster.postgres.can_login(*credential(other))
            assert {path.name: path.read_bytes() for path in (tmp_path / "state").iterdir()} == sealed
            daemon.kill()
        finally:
            cluster.kube.heal()
        daemon.start()
        assert driver.remount(kept).files == kept.files
    assert cluster.issued("nokey") == 2


def test_renewal_goes_on_after_a_restart(cluster: Cluster, renewed_after_restart: Future[bool]) -> None:
    """Without a re-mount, the daemon that was started again renews what it finds: the credential outlives its TTL."""
    assert renewed_after_restart.result()
    assert (cluster.issued("goeson"), cluster.logins("goeson")) == (1, 1)
