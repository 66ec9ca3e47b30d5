"""What fails around a daemon, one at a time: the Kubernetes API, the disk of its state, the node's date.

The provider is a process before real OpenBao and PostgreSQL.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.live import (
    AUDIENCE,
    CERTIFICATE,
    DATABASE,
    NODE,
    STATIC,
    Application,
    Cluster,
    Daemon,
    class_of,
    contents,
    credential,
)
from tests.stand.disk import Disk
from tests.stand.driver import Driver, MountOutcome
from tests.stand.waiting import eventually

SWEEPS = (f"--node-name={NODE}", "--sweep-interval=1s")
# Sweeps that are to revoke nothing: more than the two that a pod's end takes.
LOOKS = 5
# Re-mounts during which one fault is to be told of once.
REMOUNTS = 5
# All in seconds. How far ahead of the truth the node's date is, one after the other.
DAY = 86400.0
AHEAD = (DAY, -2 * DAY, 30.0, -30.0, 3650 * DAY, -3650 * DAY)
# Between two of these, and a mount after each.
PACE = 1.0
# Of the token and the lease that are renewed under a date which jumps; a restart may take ten of them.
TTL = 36
WINDOW = TTL + 6
# A mount that waits for nothing takes far less, and one that waited for the state directory far longer.
AT_ONCE = 15


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """The servers, which all tests share; each has roles of its own."""
    with Cluster(tmp_path_factory.mktemp("adversity")) as cluster:
        yield cluster


# The node's date ------------------------------------------------------------------------------------------------------


@dataclass
class Dated:
    """What came of a pod on a node whose date was set, back and forward, again and again."""

    refused: list[str]
    logins: int
    files: list[dict[str, str]]
    """What the volume held after each mount, the first before the date was moved."""


class Calendar:
    """A daemon whose date jumps, and a pod that is mounted again and again."""

    def __init__(self, cluster: Cluster, directory: Path) -> None:
        self._cluster = cluster
        self._date = directory / "date"
        self._directory = directory
        self.mounted = threading.Event()

    def run(self) -> Dated:
        """Mount under the true date, then under many."""
        cluster, role = self._cluster, "dated"
        cluster.role(role, ttl=f"{TTL}s", token_ttl=f"{TTL}s")
        self._set(0)
        flags = f"--state-dir={self._directory / 'state'}"
        with Skewed(cluster, self._date, flags) as daemon, Driver(daemon.socket) as driver:
            mounted = cluster.mount(driver, cluster.pod(role), class_of(role, *DATABASE, *CERTIFICATE))
            self.mounted.set()
            files, until = [contents(mounted)], time.monotonic() + WINDOW
            with Application(cluster, role, mounted) as application:
                while time.monotonic() < until:
                    self._set(AHEAD[len(files) % len(AHEAD)])
                    if len(files) == len(AHEAD):
                        daemon.kill()
                        daemon.start()
                    driver.remount(mounted)
                    files.append(contents(mounted))
                    time.sleep(PACE)
        return Dated(application.refused, application.logins, files)

    def _set(self, seconds: float) -> None:
        fresh = self._date.with_name("date.new")
        fresh.write_text(str(seconds))
        fresh.rename(self._date)


class Skewed(Daemon):
    """The daemon with a calendar of its own."""

    def __init__(self, cluster: Cluster, date: Path, *flags: str) -> None:
        super().__init__(cluster, *flags)
        module = self._argv.index("provider.cli")
        self._argv[module : module + 1] = ["tests.skewed", str(date)]


@pytest.fixture(scope="module", autouse=True)
def calendar(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Future[Dated]]:
    """What comes of a pod under many dates; beside the other tests, since it takes the longest."""
    calendar = Calendar(cluster, tmp_path_factory.mktemp("dated"))
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(calendar.run)
        # Its login takes the Kubernetes API, which other tests stop.
        eventually(lambda: calendar.mounted.is_set() or running.done(), "the pod of the calendar is mounted")
        yield running


# The Kubernetes API ---------------------------------------------------------------------------------------------------


@pytest.fixture
def without_api(cluster: Cluster) -> Iterator[Cluster]:
    """The servers, whose Kubernetes API a test may stop."""
    try:
        yield cluster
    finally:
        cluster.kube.start()


def jwt_role(cluster: Cluster, name: str) -> None:
    """A role of the jwt method, which asks nobody whether a token is good."""
    cluster.bao.enable_jwt_auth(name, cluster.kube.public_key_pem, cluster.kube.issuer)
    cluster.bao.database_role(name, "1h", "2h", 'GRANT SELECT ON ALL TABLES IN SCHEMA public TO "{{name}}";')
    cluster.bao.write_policy(
        name,
        f'path "database/creds/{name}" {{ capabilities = ["read"] }}\n'
        'path "shop/data/*" { capabilities = ["read"] }\n',
    )
    cluster.bao.role(
        name,
        name,
        role_type="jwt",
        user_claim="sub",
        bound_audiences=[AUDIENCE],
        token_policies=[name],
        token_ttl="1h",
    )


def test_mounts_with_tokens_go_on_without_the_kubernetes_api(without_api: Cluster) -> None:
    """Pods whose token the driver sends are mounted, new ones and known ones, while the API server is away."""
    cluster, role = without_api, "apiaway"
    jwt_role(cluster, role)
    with Daemon(cluster, *SWEEPS, key_file=False) as daemon, Driver(daemon.socket) as driver:
        known = cluster.mount(driver, cluster.pod("apiaway-1"), class_of(role, *DATABASE, *STATIC))
        cluster.kube.stop()
        assert driver.remount(known).files == known.files
        fresh = cluster.mount(driver, cluster.pod("apiaway-2"), class_of(role, *DATABASE, *STATIC))
        assert cluster.postgres.can_login(*credential(fresh))


def test_sweeps_revoke_nothing_without_the_kubernetes_api(without_api: Cluster) -> None:
    """Sweeps stop while the API server is away, though a pod went; once it is back, that pod's end is found."""
    cluster, role = without_api, "nosweep"
    jwt_role(cluster, role)
    with Daemon(cluster, *SWEEPS) as daemon, Driver(daemon.socket) as driver:
        stays = cluster.mount(driver, cluster.pod("nosweep-1"), class_of(role, *DATABASE))
        goes = cluster.mount(driver, cluster.pod("nosweep-2"), class_of(role, *DATABASE))
        cluster.kube.stop()
        cluster.kube.remove_pod(goes.pod)
        eventually(lambda: said(daemon, "this sweep revokes nothing") >= LOOKS, "sweeps that prove nothing", seconds=60)
        assert len(cluster.users(role)) == 2
        cluster.kube.start()
        eventually(lambda: cluster.users(role) == [credential(stays)[0]], "the pod that went is found", seconds=60)
        assert cluster.postgres.can_login(*credential(stays))


def test_hmac_key_is_kept_without_the_kubernetes_api(without_api: Cluster) -> None:
    """The key that was read once signs versions for as long as the daemon runs, whether or not the API is there."""
    cluster, role = without_api, "keykept"
    jwt_role(cluster, role)
    with Daemon(cluster, key_file=False) as daemon, Driver(daemon.socket) as driver:
        before = cluster.mount(driver, cluster.pod("keykept-1"), class_of(role, *STATIC))
        assert all(before.versions.values())
        cluster.kube.stop()
        assert driver.remount(before).versions == before.versions
        other = cluster.mount(driver, cluster.pod("keykept-2"), class_of(role, *STATIC))
        assert other.versions == before.versions
        assert cluster.kube.secret("csi", cluster.kube.hmac_secret) is not None


# The disk of the state ------------------------------------------------------------------------------------------------

CANNOT = ("cannot write to the state directory", "cannot lock in the state directory")


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    """A disk of a test's own."""
    with Disk(tmp_path / "disk") as disk:
        yield disk


class Kept(Daemon):
    """The daemon with its state on a disk."""

    def __init__(self, cluster: Cluster, disk: Disk) -> None:
        super().__init__(cluster, f"--state-dir={disk.directory / 'state'}")
        self._argv = disk.argv(self._argv)


def said(daemon: Daemon, *words: str) -> int:
    """How often a message of the daemon began with any of these words."""
    return sum(event["message"].startswith(words) for event in daemon.events())


def restarted(daemon: Daemon, driver: Driver, *mounts: MountOutcome) -> None:
    """Another daemon goes on with what the volumes hold, which shows what was on the disk."""
    daemon.kill()
    daemon.start()
    for mounted in mounts:
        assert not driver.remount(mounted).rewritten


@pytest.mark.parametrize("fault", ["full", "read-only"])
def test_state_that_cannot_be_written(cluster: Cluster, disk: Disk, fault: str) -> None:
    """Mounts go on while the disk is full or read-only, which is told once; afterwards what was not written is."""
    role = "diskfull" if fault == "full" else "diskro"
    cluster.role(role)
    sealed = disk.directory / "state"
    again = f"the state directory {sealed} is written to again"
    with Kept(cluster, disk) as daemon, Driver(daemon.socket) as driver:
        before = cluster.mount(driver, cluster.pod(f"{role}-1"), class_of(role, *DATABASE))
        with ExitStack() as faults:
            faults.enter_context(disk.full(daemon.process) if fault == "full" else disk.read_only())
            during = [
                cluster.mount(driver, cluster.pod(f"{role}-{number}"), class_of(role, *DATABASE)) for number in (2, 3)
            ]
            for mounted in (before, *during) * REMOUNTS:
                assert driver.remount(mounted).files == mounted.files
                assert cluster.postgres.can_login(*credential(mounted))
            assert said(daemon, *CANNOT) == 1
            assert said(daemon, again) == 0
        for mounted in during:
            driver.remount(mounted)
        eventually(lambda: len(list(sealed.glob("*.session"))) == 3, "all sessions are on the disk")
        eventually(lambda: said(daemon, again) == 1, "the last step of a write, told")
        assert said(daemon, *CANNOT) == 1
        restarted(daemon, driver, before, *during)
    assert (cluster.issued(role), cluster.logins(role)) == (3, 3)


def test_state_that_is_emptied(cluster: Cluster, disk: Disk) -> None:
    """Somebody removes all state, the directory too: the next mount of a pod writes its session again."""
    cluster.role("diskgone")
    with Kept(cluster, disk) as daemon, Driver(daemon.socket) as driver:
        mounts = [
            cluster.mount(driver, cluster.pod(f"diskgone-{number}"), class_of("diskgone", *DATABASE, *CERTIFICATE))
            for number in (1, 2)
        ]
        disk.empty()
        for mounted in mounts:
            assert driver.remount(mounted).files == mounted.files
        sealed = disk.directory / "state"
        eventually(lambda: len(list(sealed.glob("*.session"))) == 2, "both sessions are on the disk again")
        restarted(daemon, driver, *mounts)
    assert (cluster.issued("diskgone"), cluster.logins("diskgone")) == (2, 2)


def test_state_that_cannot_be_used_holds_no_mount_up(cluster: Cluster, tmp_path: Path) -> None:
    """Where the directory cannot be made, the first mount waits for it no longer than others; it is told once."""
    cluster.role("nostate")
    in_the_way = tmp_path / "file"
    in_the_way.touch()
    with (
        Daemon(cluster, f"--state-dir={in_the_way / 'state'}") as daemon,
        Driver(daemon.socket, timeout=AT_ONCE) as driver,
    ):
        mounted = cluster.mount(driver, cluster.pod("nostate"), class_of("nostate", *DATABASE))
        assert driver.remount(mounted).files == mounted.files
        assert said(daemon, "cannot use the state directory") == 1


# The node's date, at the end of its window ----------------------------------------------------------------------------


def test_date_set_back_and_forward_ends_no_credential(calendar: Future[Dated]) -> None:
    """However the date jumps, by seconds or by years, what is in the files logs in, longer than a lease's own TTL."""
    dated = calendar.result()
    assert dated.refused == []
    assert dated.logins > TTL
    assert len(dated.files) > len(AHEAD)


def test_date_set_back_and_forward_replaces_nothing(cluster: Cluster, calendar: Future[Dated]) -> None:
    """Nor is anything replaced for it: one login, one credential and one certificate, over a restart too."""
    dated = calendar.result()
    assert all(files == dated.files[0] for files in dated.files)
    assert (cluster.issued("dated"), cluster.logins("dated")) == (1, 1)
