"""What Prometheus is told."""

from __future__ import annotations

import asyncio
import gzip
import math
import re
import subprocess
import sys
from collections.abc import Sequence
from typing import Any, cast, get_args

import pytest

from provider import __version__
from provider.errors import (
    AccessDenied,
    Code,
    KubernetesUnavailable,
    LoginDenied,
    ProviderError,
    VaultUnavailable,
)
from provider.sessions.registry import EMPTY_SESSION_SECONDS
from provider.settings import TlsSettings
from provider.spc.model import Login, VaultServer
from provider.telemetry import metrics
from provider.telemetry.events import (
    AuditLost,
    AuditOutage,
    BreakerChanged,
    Event,
    Issued,
    Kind,
    LeaseView,
    LoggedIn,
    Looked,
    MountRefused,
    ProgramEnded,
    ReadShared,
    Renewal,
    Renewing,
    Revocation,
    Revoking,
    SessionView,
    Swept,
    Telemetry,
    VaultRequest,
    Who,
)
from provider.telemetry.families import FAMILIES, MAX_FAILING, REQUEST_SECONDS, Family
from provider.telemetry.http import Request
from provider.telemetry.metrics import MAX_PATHS, MAX_SERIES, Metrics
from provider.telemetry.volumes import FAILING_SECONDS, UNSHOWN_SECONDS, Volumes
from tests.scrape import OPENMETRICS, Scrape
from tests.test_volumes import Hand, mounted, pod, refused
from tests.tools import ROOT

ADDRESS = "https://vault.example"
SERVER = VaultServer(ADDRESS, "", TlsSettings())
# After this time without a mount one is late, of a volume that has not shown when it is mounted.
LATE = 2 * UNSHOWN_SECONDS + 1
WHO = Who(pod(), Login("kubernetes", "web", None), SERVER, "secrets")


@pytest.fixture(autouse=True)
def _always_fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "FRESH_SECONDS", -1.0)


class Told:
    """Metrics beside the volumes that they ask, both told of events as in the daemon."""

    def __init__(self) -> None:
        self.clock = Hand()
        self.views: list[SessionView] = []
        self.lost = 0
        self._telemetry = Telemetry()
        volumes = Volumes(self.clock)
        self.metrics = Metrics(
            volumes, lambda: self.views, lambda: self.lost, self.clock, address=ADDRESS, auth_mount="kubernetes"
        )
        self.metrics.listen(self._telemetry)
        volumes.listen(self._telemetry)

    def tell(self, *events: Event) -> None:
        for event in events:
            self._telemetry.record(event)

    async def scrape(self) -> Scrape:
        answer = await self.metrics.page(Request("/metrics"))
        assert answer.content_type.startswith("text/plain; version=0.0.4")
        return Scrape(answer.body.decode())

    async def over(self) -> float:
        """Seconds to the end of the first lease that nothing is known to follow."""
        return (await self.scrape()).value("vault_csi_lease_earliest_end_seconds", renewal="over")

    async def grown(self, *events: Event) -> dict[tuple[str, ...], float]:
        """What these events add, by name and label values, but for the process' own metrics and durations."""
        before = await self.scrape()
        self.tell(*events)
        grown = (await self.scrape()).differing(before, ("process_", "vault_csi_mount_duration_seconds_"))
        return {(name, *labels): by for (name, labels), by in grown.items()}


def request(status: int = 200, *, mount: str = "secret/", method: str = "GET", seconds: float = 0.02) -> VaultRequest:
    return VaultRequest(method, mount, status, seconds)


def login(error: ProviderError | None, mount: str = "kubernetes") -> LoggedIn:
    spec = mounted({}).spec
    object.__setattr__(spec, "login", Login(mount, "web", None))
    return LoggedIn(spec, "", 0.0, 0.1, error)


def renewal(outcome: Renewing, lease_id: str = "") -> Renewal:
    return Renewal(WHO, "path", "accessor", lease_id, outcome, 60.0, 0.1, "")


COUNTED: list[tuple[Event, dict[tuple[str, ...], float]]] = [
    (
        mounted({"a": "1"}, files=3, size=500, read=4, kept=2, remembered=1),
        {
            ("vault_csi_mounts_total", "OK"): 1,
            ("vault_csi_mounted_files_total",): 3,
            ("vault_csi_mounted_bytes_total",): 500,
            ("vault_csi_answers_total", "read"): 4,
            ("vault_csi_answers_total", "kept"): 2,
            ("vault_csi_answers_total", "remembered"): 1,
        },
    ),
    (
        MountRefused("NOT_FOUND", "no", 0.1, None, "", "", None),
        {("vault_csi_mounts_total", "NOT_FOUND"): 1},
    ),
    (login(None), {("vault_csi_logins_total", "success", "auth/kubernetes/"): 1}),
    (login(LoginDenied("no")), {("vault_csi_logins_total", "denied", "auth/kubernetes/"): 1}),
    (login(VaultUnavailable("no")), {("vault_csi_logins_total", "unanswered", "auth/kubernetes/"): 1}),
    (login(KubernetesUnavailable("no")), {("vault_csi_logins_total", "no_token", "auth/kubernetes/"): 1}),
    (login(AccessDenied("no")), {("vault_csi_logins_total", "failed", "auth/kubernetes/"): 1}),
    (login(None, "jwt"), {("vault_csi_logins_total", "success", "auth/jwt/"): 1}),
    (login(LoginDenied("no"), "jwt"), {("vault_csi_logins_total", "denied", "other"): 1}),
    (
        Issued(WHO, "p", Kind.ISSUED, "a", "", "r", 60.0, again=False, seconds=0.1, objects=tuple),
        {("vault_csi_issued_total", "issued"): 1},
    ),
    (renewal(Renewing.GONE, "lease"), {("vault_csi_renewals_total", "gone", "lease"): 1}),
    (renewal(Renewing.UNANSWERED), {("vault_csi_renewals_total", "unanswered", "token"): 1}),
    (
        Revocation(WHO, "a", Revoking.REFUSED, "pod gone", "", 0.1),
        {("vault_csi_revocations_total", "refused"): 1},
    ),
    (
        Revocation(WHO, "", Revoking.REFUSED, "pod gone", "", 0.1),
        {("vault_csi_revocations_total", "batch"): 1},
    ),
    (ReadShared(), {("vault_csi_shared_reads_total",): 1}),
    (Swept("", 3), {("vault_csi_sweeps_total", "done"): 1, ("vault_csi_pods_gone_total",): 3}),
    (Swept("cut short", 0), {("vault_csi_sweeps_total", "failed"): 1}),
    (ProgramEnded("cpu"), {("vault_csi_template_kills_total", "cpu"): 1}),
    (AuditLost(7), {("vault_csi_audit_lines_lost_total",): 7}),
    (AuditOutage(began=True), {("vault_csi_audit_outage",): 1}),
    (BreakerChanged(SERVER, open=True, answered=False), {("vault_csi_vault_away", ADDRESS, "true"): 1}),
    (Looked(503), {("vault_csi_vault_looks_total", "503"): 1}),
    (Looked(0), {("vault_csi_vault_looks_total", "none"): 1}),
]


@pytest.mark.parametrize(("event", "expected"), COUNTED, ids=lambda value: type(value).__name__)
async def test_event_is_counted(event: Event, expected: dict[tuple[str, ...], float]) -> None:
    """Each event adds to what it is about, and to nothing else."""
    assert await Told().grown(event) == expected


async def test_every_event_is_counted() -> None:
    """There is no kind of event that metrics have no count of, and one that they do not know would disturb nobody."""
    told = Told()
    counted = {type(event) for event, _ in COUNTED} | {VaultRequest}
    assert counted == set(get_args(Event))
    assert await told.grown(cast(Event, object())) == {}


async def test_request_is_counted_and_timed_by_its_mount() -> None:
    """A request counts by method, mount and status; its time falls into a bucket, unless nobody answered."""
    told = Told()
    expected: dict[tuple[str, ...], float] = {
        ("vault_requests_total", "GET", "secret/", "200"): 1,
        ("vault_requests_total", "GET", "secret/", "403"): 1,
        ("vault_requests_total", "GET", "secret/", "none"): 1,
        ("vault_request_duration_seconds_count", "GET", "secret/"): 2,
        ("vault_request_duration_seconds_sum", "GET", "secret/"): 0.04,
        **{
            ("vault_request_duration_seconds_bucket", bound, "GET", "secret/"): 2
            for bound in ("0.025", "0.05", "0.1", "0.25", "0.5", "1.0", "2.5", "10.0", "+Inf")
        },
    }
    assert await told.grown(request(200), request(403), request(0)) == expected


async def test_durations_of_mounts_fall_into_their_buckets() -> None:
    """A mount of 0.5 s and one of 0.1 s are in the buckets up to their outcome's time, bounds included."""
    told = Told()
    told.tell(mounted({}, seconds=0.5), mounted({}, seconds=100.0), refused())
    scrape = await told.scrape()
    name = "vault_csi_mount_duration_seconds"
    assert scrape.value(f"{name}_bucket", outcome="success", le="0.25") == 0
    assert scrape.value(f"{name}_bucket", outcome="success", le="0.5") == 1
    assert scrape.value(f"{name}_bucket", outcome="success", le="60.0") == 1
    assert scrape.value(f"{name}_bucket", outcome="success", le="+Inf") == 2
    assert scrape.value(f"{name}_count", outcome="success") == 2
    assert scrape.value(f"{name}_sum", outcome="success") == 100.5
    assert scrape.value(f"{name}_count", outcome="error") == 1


async def test_rotation_counts_what_a_remount_changed() -> None:
    """A re-mount's changed objects count by their kinds; a first mount and an unchanged one count nothing."""
    told = Told()
    told.tell(mounted({"a": "1", "b": "1", "db": "1"}), mounted({"a": "1", "b": "1", "db": "1"}))
    before = await told.scrape()
    assert before.value("secret_rotation_total", secret_type="leased", status="success") == 0
    grown = await told.grown(mounted({"a": "2", "b": "1", "db": "2"}))
    assert {key: by for key, by in grown.items() if key[0] == "secret_rotation_total"} == {
        ("secret_rotation_total", "static", "success"): 1,
        ("secret_rotation_total", "leased", "success"): 1,
    }


async def test_failed_remount_is_told_apart_from_a_failed_first_mount() -> None:
    """Only a volume that had been mounted has re-mount failures, and errors of rotation of the kinds that it holds."""
    told = Told()
    first = await told.grown(refused())
    assert "vault_csi_remount_failures_total" not in {key[0] for key in first}
    told.tell(mounted({"db": "1"}))
    again = await told.grown(refused(code="PERMISSION_DENIED"))
    assert again[("vault_csi_remount_failures_total", "PERMISSION_DENIED")] == 1
    assert again[("secret_rotation_total", "leased", "error")] == 1
    assert ("secret_rotation_total", "static", "error") not in again


async def test_counts_that_are_known_beforehand_begin_with_zero() -> None:
    """What may be counted is there before it first is, so that Prometheus sees the first one."""
    scrape = await Told().scrape()
    for code in ("OK", *(code.value for code in Code)):
        assert scrape.value("vault_csi_mounts_total", code=code) == 0
    assert len(scrape.labels("secret_rotation_total")) == 6
    assert scrape.value("vault_csi_vault_away", address=ADDRESS) == 0
    assert scrape.value("vault_requests_total", path="auth/kubernetes/", status="none") == 0
    assert scrape.value("vault_csi_logins_total", path="auth/kubernetes/", outcome="denied") == 0
    late = {"vault_request_duration_seconds", "vault_csi_volume_failing_seconds"}
    empty = {family.name for family in FAMILIES if not scrape.values(_any_sample(family))}
    assert empty == late


def _any_sample(family: Family) -> str:
    return f"{family.name}_count" if family.kind == "histogram" else family.sample


async def test_state_is_that_of_the_scrape() -> None:
    """Sessions, leases by kind, the ends that come first and lines lost are as they are when asked."""
    told = Told()
    scrape = await told.scrape()
    assert scrape.value("vault_csi_lease_earliest_end_seconds", renewal="over") == math.inf
    told.lost = 5
    told.clock.time += LATE
    told.views = [
        _view(LeaseView("p", Kind.LEASED, "l", 300.0, renewed=True)),
        _view(
            LeaseView("p", Kind.LEASED, "l", 70.0, renewed=False),
            LeaseView("p", Kind.ISSUED, "", 50.0, renewed=False),
            LeaseView("p", Kind.LEASED, "l", 200.0, renewed=True),
        ),
        _view(
            LeaseView("p", Kind.LEASED, "l", 900.0, renewed=True),
            LeaseView("p", Kind.LEASED, "l", 900.0, renewed=False),
        ),
    ]
    scrape = await told.scrape()
    assert scrape.value("vault_csi_sessions") == 3
    assert scrape.value("vault_csi_leases", secret_type="leased") == 5
    assert scrape.value("vault_csi_leases", secret_type="issued") == 1
    assert scrape.value("vault_csi_lease_earliest_end_seconds", renewal="over") == 50
    assert scrape.value("vault_csi_lease_earliest_end_seconds", renewal="due") == 200
    assert scrape.value("vault_csi_log_lines_lost_total") == 5
    assert scrape.labels("vault_csi_build_info")[0]["version"] == __version__


def _view(*leases: LeaseView, idle: bool = False) -> SessionView:
    return SessionView(WHO, "accessor", 3600.0, token_renewed=True, mounted_ago=60.0, leases=leases, idle=idle)


async def test_leases_of_pods_that_are_likely_gone_do_not_alarm() -> None:
    """The lease of a session that is left to end ends as it should; another's is told."""
    told = Told()
    told.clock.time += LATE
    lease = LeaseView("p", Kind.LEASED, "l", 10.0, renewed=False)
    told.views = [_view(lease)]
    assert await told.over() == 10
    told.views = [_view(lease, idle=True)]
    assert await told.over() == math.inf


async def test_lease_that_the_next_mount_replaces_does_not_alarm() -> None:
    """A lease of a minute and a half, replaced at each re-mount, is nobody's trouble, however little is left of it.

    It is once its mounts fail, are late, or come too rarely.
    """
    told = Told()

    def left(seconds: float) -> None:
        told.views = [_view(LeaseView("p", Kind.LEASED, "l", seconds, renewed=False))]

    for _ in range(3):
        told.clock.time += 60
        told.tell(mounted({"db": "1"}))
        left(88.0)
        scrape = await told.scrape()
        assert scrape.value("vault_csi_lease_earliest_end_seconds", renewal="remount") == 88
        assert scrape.value("vault_csi_lease_earliest_end_seconds", renewal="over") == math.inf
    told.clock.time += 50
    left(38.0)
    assert await told.over() == math.inf
    left(8.0)
    assert await told.over() == 8
    told.clock.time += 71
    left(38.0)
    assert await told.over() == 38
    told.tell(mounted({"db": "2"}))
    left(300.0)
    assert await told.over() == math.inf
    told.tell(refused())
    assert await told.over() == 300


async def test_lease_of_a_pod_that_may_be_gone_does_not_alarm() -> None:
    """Where pods that are gone are found, one that is late is believed to live once it was looked for twice."""
    told = Told()
    told.tell(mounted({"db": "1"}), Swept("", 0))
    told.views = [_view(LeaseView("p", Kind.LEASED, "l", 50.0, renewed=False))]
    told.clock.time += LATE
    assert await told.over() == math.inf
    told.tell(Swept("", 0))
    assert await told.over() == math.inf
    told.clock.time += 60
    told.tell(Swept("", 0))
    assert await told.over() == 50


async def test_new_daemon_waits_for_the_first_mounts() -> None:
    """A daemon that has taken over the sessions of another alarms for no lease before its pods can have come again."""
    told = Told()
    told.views = [_view(LeaseView("p", Kind.LEASED, "l", 50.0, renewed=False))]
    assert await told.over() == math.inf
    told.clock.time += LATE
    assert await told.over() == 50


async def test_pods_whose_mounts_fail_are_named_while_they_do() -> None:
    """A failing pod has a series with the seconds that its failures span, and whether it runs with an older content.

    They grow by a further failure alone, and the series ends with a mount that succeeds.
    """
    told = Told()
    name = "vault_csi_volume_failing_seconds"
    told.tell(refused(name="new"), mounted({"a": "1"}), refused())
    told.clock.time += 60
    told.tell(refused(target="/other"), refused())
    told.clock.time += 30
    told.tell(refused(name="new"))
    told.clock.time += 500
    scrape = await told.scrape()
    assert scrape.value(name, pod_namespace="shop", pod_name="new", mounted="false") == 90
    assert scrape.value(name, pod_name="web-0", mounted="true") == 60
    assert scrape.value(name, pod_name="web-0", mounted="false") == 0
    assert scrape.value("vault_csi_failing_volumes") == 3
    told.tell(mounted({"a": "1"}), mounted({"a": "1"}, target="/other"))
    assert [labels["pod_name"] for labels in (await told.scrape()).labels(name)] == ["new"]


async def test_pods_that_have_been_failing_longest_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where not all can be named, it is those with the volume that has been failing longest."""
    monkeypatch.setattr(metrics, "MAX_FAILING", 1)
    told = Told()
    for name, target in (("old", "/first"), ("new", "/t"), ("old", "/second")):
        told.tell(refused(name=name, target=target))
        told.clock.time += 10
    for name, target in (("old", "/second"), ("old", "/first"), ("new", "/t")):
        told.tell(refused(name=name, target=target))
    scrape = await told.scrape()
    assert scrape.values("vault_csi_volume_failing_seconds", pod_name="old") == [30]
    assert scrape.values("vault_csi_volume_failing_seconds", pod_name="new") == []


async def test_vault_that_answers_again_is_away_no_more() -> None:
    """Another Vault than the daemon's own has a series while it does not answer; its own goes back to 0."""
    told = Told()
    other = VaultServer("https://other.example", "", TlsSettings())
    never = VaultServer("https://slip.example", "", TlsSettings())
    told.tell(*(BreakerChanged(server, True, server != never) for server in (other, SERVER, never)))
    scrape = await told.scrape()
    assert scrape.values("vault_csi_vault_away", known="true") == [1, 1]
    assert scrape.value("vault_csi_vault_away", address=never.address, known="false") == 1
    told.tell(*(BreakerChanged(server, False, True) for server in (other, SERVER, never)))
    scrape = await told.scrape()
    assert scrape.labels("vault_csi_vault_away") == [{"address": ADDRESS, "known": "true"}]
    assert scrape.values("vault_csi_vault_away") == [0]


async def test_series_are_bounded_whatever_tenants_write() -> None:
    """Thousands of mounts, methods, statuses, codes, addresses, pods, roles and limits make some hundred series."""
    told = Told()
    for number in range(5000):
        text = f"tenant-{number}"
        server = VaultServer(f"https://{text}", "", TlsSettings())
        told.tell(
            VaultRequest(text if number % 2 else "GET", f"{text}/", 200, 0.1),
            VaultRequest("PUT", f"{text}/", 100 + number % 500, 0.1),
            VaultRequest("LIST", f"{text}/", 404, 0.1),
            login(None if number % 2 else LoginDenied("no"), text),
            mounted({text: "1"}, name=text),
            refused(name=text, code=text),
            BreakerChanged(server, open=True, answered=number % 2 == 0),
            ProgramEnded(text),
        )
    scrape = await told.scrape()
    by_name = {name: len(scrape.labels(name)) for name in scrape.names}
    assert by_name["vault_csi_volume_failing_seconds"] == MAX_FAILING
    assert by_name["vault_csi_vault_away"] <= metrics.MAX_ADDRESSES + 2
    assert max(by_name["vault_requests_total"], by_name["vault_csi_mounts_total"]) <= MAX_SERIES + 1
    buckets = len(REQUEST_SECONDS.buckets) + 1
    assert by_name["vault_request_duration_seconds_bucket"] <= (metrics.MAX_HISTOGRAMS + 1) * buckets
    assert len({labels["path"] for labels in scrape.labels("vault_requests_total")}) <= MAX_PATHS + 1
    assert len(scrape.samples) < 2500
    # What is over the bound is counted still.
    assert sum(scrape.values("vault_requests_total")) == 15000
    assert sum(scrape.values("vault_request_duration_seconds_count")) == 15000
    assert sum(scrape.values("vault_csi_mounts_total")) == 10000


async def test_paths_that_lead_nowhere_take_no_room() -> None:
    """A mount has a name of its own once it answered; requests to any other are counted together."""
    told = Told()
    for number in range(1000):
        told.tell(request(403, mount=f"guess-{number}/"), request(0, mount=f"guess-{number}/"))
    told.tell(request(200, mount="secret/"), request(200, mount=""))
    scrape = await told.scrape()
    assert {labels["path"] for labels in scrape.labels("vault_requests_total")} == {
        "other",
        "secret/",
        "auth/kubernetes/",
    }
    assert scrape.value("vault_requests_total", path="other", status="403") == 1000


async def test_what_tenants_name_cannot_break_the_page() -> None:
    """Quotes, line breaks, and what is no Unicode in a name stay inside their label, and the page can be read."""
    told = Told()
    name = 'x"} 1\nvault_csi_sessions 99\r\\\ud800'
    told.tell(refused(name=name), request(200, mount=f"{name}/"), request(200, mount="hvs.CAESIJsecretsecretsecret/"))
    told.tell(BreakerChanged(VaultServer(f"https://{name}", "", TlsSettings()), open=True, answered=False))
    scrape = await told.scrape()
    assert scrape.value("vault_csi_sessions") == 0
    assert len(scrape.labels("vault_csi_volume_failing_seconds")) == 1
    assert not any("secretsecret" in value for sample in scrape.samples for value in sample.labels.values())


async def test_openmetrics_for_who_accepts_it() -> None:
    """OpenMetrics, read by a strict parser, says the same as the text; units are in the names; gzip if accepted."""
    told = Told()
    told.tell(mounted({"a": "1"}), request(), refused())
    accept = {"accept": f"{OPENMETRICS};q=0.5,text/plain;q=0.1", "accept-encoding": "br, gzip"}
    answer = await told.metrics.page(Request("/metrics", accept))
    assert answer.content_type.startswith(OPENMETRICS)
    assert answer.headers == {"Content-Encoding": "gzip"}
    scrape = Scrape(gzip.decompress(answer.body).decode(), openmetrics=True)
    text = await told.scrape()

    def told_of(found: Scrape) -> set[tuple[Any, ...]]:
        return {
            (sample.name, tuple(sorted(sample.labels.items())), sample.value)
            for sample in found.samples
            if not sample.name.startswith("process_")
        }

    assert told_of(scrape) == told_of(text)
    units = {family.name: family.unit for family in scrape.families if family.unit}
    assert units == {family.name: family.unit for family in FAMILIES if family.unit}
    for family in FAMILIES:
        ends = [unit for unit in ("seconds", "bytes") if family.name.endswith(unit)]
        assert ends == [family.unit] * len(ends)
        assert bool(ends) == bool(family.unit)


async def test_who_asks_in_a_loop_is_given_the_same_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scrapes within a second are one's work, in each format."""
    monkeypatch.setattr(metrics, "FRESH_SECONDS", 600.0)
    told = Told()
    page = told.metrics.page
    first, second = await asyncio.gather(page(Request("/metrics")), page(Request("/metrics")))
    assert first is second
    other = await page(Request("/metrics", {"accept": OPENMETRICS}))
    assert other is not first
    assert await page(Request("/metrics")) is first


_PROBE = """
import asyncio, ctypes, os, sys
from provider.telemetry.volumes import FAILING_SECONDS, UNSHOWN_SECONDS, Volumes
from provider.telemetry.metrics import Metrics
from provider.telemetry.http import Request
from provider.clock import SystemClock
from provider.cli.process import keep_memory_private
clock = SystemClock()
metrics = Metrics(Volumes(clock), lambda: [], lambda: 0, clock, address="https://v", auth_mount="kubernetes")
assert not any(name.startswith("prometheus_client") for name in sys.modules), "imported before the first scrape"
page = metrics.page(Request("/metrics"))
if os.getuid() == 0:
    asyncio.run(metrics.page(Request("/metrics")))  # while it may still read the modules' files
    os.setgid(65534)
    os.setuid(65534)
keep_memory_private()
try:
    os.open("/proc/self/mem", os.O_RDONLY)
except PermissionError:
    pass
else:
    sys.exit("the process is open to its user")
metrics._written.clear()
sys.stdout.buffer.write(asyncio.run(page).body)
"""


def test_process_is_told_also_where_its_memory_is_private() -> None:
    """Memory, CPU, descriptors and start of the process are there for a daemon that nobody may look into, not root.

    And prometheus_client is imported by the first scrape only, since it takes a good part of the daemon's start.
    """
    done = subprocess.run([sys.executable, "-c", _PROBE], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    scrape = Scrape(done.stdout)
    for name in ("resident_memory_bytes", "cpu_seconds_total", "open_fds", "max_fds", "start_time_seconds"):
        assert scrape.value(f"process_{name}") > 0
    assert not any(name.startswith("python_gc") for name in scrape.names)


def table(families: Sequence[Family] = FAMILIES) -> str:
    """The table of docs/metrics.md."""
    rows = ["| metric | kind | labels | meaning |", "|---|---|---|---|"]
    for family in families:
        labels = ", ".join(f"`{label}`" for label in family.labels)
        rows.append(f"| `{family.sample}` | {family.kind} | {labels} | {family.meaning} |")
    return "\n".join(rows) + "\n"


def test_page_of_metrics_has_the_table_of_the_code() -> None:
    """docs/metrics.md lists every metric as the code has it; `python -m tests.test_metrics` writes the table anew."""
    page = (ROOT / "docs" / "metrics.md").read_text()
    found = re.search(r"<!-- metrics: begin.*?-->\n(.*?)<!-- metrics: end -->", page, re.DOTALL)
    assert found is not None
    assert found[1] == table()


def test_page_of_metrics_names_the_limits() -> None:
    """The bounds that docs/metrics.md speaks of are those of the code."""
    page = (ROOT / "docs" / "metrics.md").read_text()
    for limit in (MAX_PATHS, MAX_SERIES, MAX_FAILING, metrics.MAX_ADDRESSES):
        assert f"**{limit}**" in page
    times = (("seven", 7, 2 * UNSHOWN_SECONDS), ("ten", 10, FAILING_SECONDS), ("ten", 10, EMPTY_SESSION_SECONDS))
    for word, minutes, seconds in times:
        assert f"{word} minutes" in page
        assert seconds == 60 * minutes


if __name__ == "__main__":
    path = ROOT / "docs" / "metrics.md"
    page = path.read_text()
    path.write_text(
        re.sub(
            r"(<!-- metrics: begin.*?-->\n).*?(<!-- metrics: end -->)",
            lambda found: found[1] + table() + found[2],
            page,
            flags=re.DOTALL,
        )
    )
