"""What Prometheus is told: counts of events, and the state at the moment of a scrape.

Events are counted in dictionaries (docs/decisions/metrics.md). What is counted is in ``families``, and ``exposition``
writes it down.

Every label has values from a list that is known beforehand, or so many at most: whatever tenants write in their
classes, a daemon has no more series than a server of metrics can bear from each node.
"""

from __future__ import annotations

import asyncio
import math
import platform
import time
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Final

from provider import __version__
from provider.clock import Clock
from provider.errors import Code, KubernetesUnavailable, LoginDenied, VaultUnavailable
from provider.redact import one_line
from provider.spc.model import VaultServer
from provider.telemetry import exposition, families
from provider.telemetry.events import (
    AuditLost,
    AuditOutage,
    BreakerChanged,
    Event,
    Issued,
    Kind,
    LoggedIn,
    Looked,
    Mounted,
    MountRefused,
    ProgramEnded,
    ReadShared,
    Renewal,
    Renewing,
    Revocation,
    Revoking,
    SessionView,
    Supply,
    Swept,
    Telemetry,
    VaultRequest,
)
from provider.telemetry.exposition import Labels, Values
from provider.telemetry.families import MAX_FAILING, Family
from provider.telemetry.http import Answer, Request
from provider.telemetry.volumes import Remount, Volume, Volumes

# What stands for all values of a label that have no room of their own.
OTHER: Final = "other"
# Auth and engine mounts that requests are told apart by. A node's pods use a handful; each has a histogram.
MAX_PATHS: Final = 30
# Series of one family, whatever its labels could make: some 40 of a node that uses a handful of mounts.
MAX_SERIES: Final = 500
# Histograms have a dozen series each.
MAX_HISTOGRAMS: Final = 60
# Vaults that are named since they do not answer. Classes name them.
MAX_ADDRESSES: Final = 20
# Of the texts of tenants that are labels: a pod's name has 253 characters at most, and so has a host's.
MAX_LABEL: Final = 300
# How old an answer may be: who asks in a loop gets one scrape's work done a second.
FRESH_SECONDS: Final = 1.0

METHODS: Final = frozenset({"GET", "LIST", "POST", "PUT", "PATCH", "DELETE", "HEAD", "SCAN"})
# Those that docs/contract.md section 3 speaks of, and what else proxies answer; "none" is no answer at all.
NO_ANSWER: Final = "none"
STATUSES: Final[Mapping[int, str]] = {
    0: NO_ANSWER,
    **{
        status: str(status)
        for status in (200, 202, 204, 301, 302, 307, 308, 400, 401, 403, 404, 405, 408, 412, 413, 429)
    },
    **{status: str(status) for status in (472, 473, 500, 501, 502, 503, 504)},
}
SUCCESSES: Final = frozenset({200, 202, 204})
# What ends a program (provider.sandbox).
LIMITS: Final = ("cpu", "memory", "output", "time")

BATCH: Final = "batch"
_OUTCOMES: Final = ("success", "denied", "no_token", "unanswered", "failed")

OPENMETRICS: Final = "application/openmetrics-text"


class Counter:
    """Counts by label values, at most MAX_SERIES of them. Those in ``known`` are 0 from the start.

    Prometheus takes the first value that it sees for where a count begins, so one that begins with 1 is not seen.
    """

    def __init__(self, family: Family, known: Iterable[Labels] = ()) -> None:
        self.family = family
        self.values: dict[Labels, float] = dict.fromkeys(known if family.labels else ((),), 0)

    def add(self, *labels: str, by: float = 1) -> None:
        """Count ``by`` more for these label values, in the order of the family's labels."""
        try:
            self.values[labels] += by
        except KeyError:
            if len(self.values) >= MAX_SERIES:
                labels = (OTHER,) * len(labels)
            self.values[labels] = self.values.get(labels, 0) + by


class Histogram:
    """Durations, in seconds, by label values, at most MAX_HISTOGRAMS of them."""

    def __init__(self, family: Family, known: Iterable[Labels] = ()) -> None:
        self.family = family
        # For each, how many fell into each bucket and beyond the last, and the sum.
        self.values: dict[Labels, list[float]] = {labels: self._empty() for labels in known}

    def observe(self, seconds: float, *labels: str) -> None:
        """One took ``seconds``."""
        found = self.values.get(labels)
        if found is None:
            if len(self.values) >= MAX_HISTOGRAMS:
                labels = (OTHER,) * len(labels)
            found = self.values.setdefault(labels, self._empty())
        found[bisect_left(self.family.buckets, seconds)] += 1
        found[-1] += seconds

    def _empty(self) -> list[float]:
        return [0.0] * (len(self.family.buckets) + 2)


class Metrics:
    """Counts events, and writes it all down for ``page``.

    ``volumes`` must listen after this. ``views`` gives the sessions, ``lines_lost`` how many
    lines of the log were ever lost. ``address`` and ``auth_mount`` are the daemon's own, which are known before anybody
    used them.
    """

    def __init__(
        self,
        volumes: Volumes,
        views: Callable[[], Sequence[SessionView]],
        lines_lost: Callable[[], int],
        clock: Clock,
        *,
        address: str,
        auth_mount: str,
    ) -> None:
        self._volumes = volumes
        self._views = views
        self._lines_lost = lines_lost
        self._clock = clock
        self._address = _label(address)
        self._paths = {f"auth/{auth_mount}/": _label(f"auth/{auth_mount}/")}
        codes = [(code.value,) for code in Code]
        kinds = [kind.value for kind in Kind]
        login = next(iter(self._paths.values()))
        logins = [("POST", login, status) for status in ("200", "400", "403", "503", NO_ANSWER)]
        self.requests = Counter(families.REQUESTS, logins)
        self.looks = Counter(families.LOOKS, [("503",), (NO_ANSWER,)])
        self.request_seconds = Histogram(families.REQUEST_SECONDS)
        self.rotations = Counter(
            families.ROTATIONS, [(kind, status) for kind in kinds for status in ("success", "error")]
        )
        self.mounts = Counter(families.MOUNTS, [("OK",), *codes])
        self.mount_seconds = Histogram(families.MOUNT_SECONDS, [("success",), ("error",)])
        self.remount_failures = Counter(families.REMOUNT_FAILURES, codes)
        self.objects = Counter(families.OBJECTS)
        self.files = Counter(families.FILES)
        self.bytes = Counter(families.BYTES)
        self.answers = Counter(families.ANSWERS, [(supply.value,) for supply in Supply])
        self.shared = Counter(families.SHARED)
        self.logins = Counter(families.LOGINS, [(login, outcome) for outcome in _OUTCOMES])
        self.issued = Counter(families.ISSUED, [(Kind.LEASED.value,), (Kind.ISSUED.value,)])
        self.renewals = Counter(
            families.RENEWALS, [(what, each.value) for what in ("token", "lease") for each in Renewing]
        )
        self.revocations = Counter(families.REVOCATIONS, [(BATCH,), *((each.value,) for each in Revoking)])
        self.sweeps = Counter(families.SWEEPS, [("done",), ("failed",)])
        self.gone = Counter(families.GONE)
        self.kills = Counter(families.KILLS, [(limit,) for limit in LIMITS])
        self.audit_lost = Counter(families.AUDIT_LOST)
        self._counters = [found for found in vars(self).values() if isinstance(found, Counter)]
        self._histograms = [found for found in vars(self).values() if isinstance(found, Histogram)]
        self._audit_outage = False
        self._away: dict[VaultServer, bool] = {}
        self._sweeping = False
        # When pods that are gone were last looked for; after two such looks a session that is left is a living pod's.
        self._swept_at: deque[float] = deque(maxlen=2)
        self._takers: Mapping[type[Event], Callable[[Any], None]] = {
            VaultRequest: self._requested,
            Looked: lambda event: self.looks.add(_status(event.status)),
            Mounted: self._mounted,
            MountRefused: self._refused,
            LoggedIn: self._logged_in,
            Issued: lambda event: self.issued.add(event.kind.value),
            Renewal: lambda event: self.renewals.add("lease" if event.lease_id else "token", event.outcome.value),
            Revocation: self._revoked,
            ReadShared: lambda _: self.shared.add(),
            Swept: self._swept,
            ProgramEnded: lambda event: self.kills.add(event.limit if event.limit in LIMITS else OTHER),
            BreakerChanged: self._breaker_changed,
            AuditOutage: self._audit_changed,
            AuditLost: lambda event: self.audit_lost.add(by=event.lines),
        }
        self._writing = asyncio.Lock()
        self._written: dict[tuple[bool, bool], tuple[float, Answer]] = {}

    # -- events ----------------------------------------------------------------------------------------------------

    def listen(self, telemetry: Telemetry) -> None:
        """Count what happens from now on."""
        for kind, taker in self._takers.items():
            telemetry.listen(taker, kind)

    def _requested(self, event: VaultRequest) -> None:
        method, mount, status, seconds = event
        if method not in METHODS:
            method = OTHER
        path = self._paths.get(mount)
        if path is None:
            path = self._path(mount, status)
        self.requests.add(method, path, _status(status))
        if status:
            self.request_seconds.observe(seconds, method, path)

    def _path(self, mount: str, status: int) -> str:
        # Only what has answered is known by its name: who writes paths that lead nowhere takes no room from others.
        if status not in SUCCESSES or len(self._paths) >= MAX_PATHS or not mount:
            return OTHER
        path = self._paths[mount] = _label(mount)
        return path

    def _mounted(self, event: Mounted) -> None:
        self.mounts.add("OK")
        self.mount_seconds.observe(event.seconds, "success")
        self.objects.add(by=len(event.spec.objects))
        self.files.add(by=event.files)
        self.bytes.add(by=event.size)
        self.answers.add(Supply.READ.value, by=event.read)
        self.answers.add(Supply.KEPT.value, by=event.kept)
        self.answers.add(Supply.REMEMBERED.value, by=event.remembered)
        change = self._volumes.change(event)
        if change.changed:
            for made in event.objects():
                if made.name in change.changed:
                    self.rotations.add(made.kind.value, "success")

    def _refused(self, event: MountRefused) -> None:
        self.mounts.add(event.code)
        self.mount_seconds.observe(event.seconds, "error")
        volume = None if event.pod is None else self._volumes.find(event.pod.uid, event.target_path)
        if volume is not None and volume.mounted_at is not None:
            self.remount_failures.add(event.code)
            for kind in volume.kinds:
                self.rotations.add(kind.value, "error")

    def _logged_in(self, event: LoggedIn) -> None:
        mount = f"auth/{event.spec.login.mount}/"
        outcome = "success"
        if event.error is not None:
            causes = ((LoginDenied, "denied"), (KubernetesUnavailable, "no_token"), (VaultUnavailable, "unanswered"))
            outcome = next((name for kind, name in causes if isinstance(event.error, kind)), "failed")
        path = self._paths.get(mount)
        if path is None:
            path = self._path(mount, 200 if event.error is None else 0)
        self.logins.add(path, outcome)

    def _revoked(self, event: Revocation) -> None:
        # docs/contract.md section 3: batch tokens alone have no accessor, and to be refused is how it is with them.
        batch = event.outcome is Revoking.REFUSED and not event.accessor
        self.revocations.add(BATCH if batch else event.outcome.value)

    def _swept(self, event: Swept) -> None:
        self.sweeps.add("failed" if event.error else "done")
        self.gone.add(by=event.gone)
        self._sweeping = not event.error
        if self._sweeping:
            self._swept_at.append(self._clock.now())

    def _breaker_changed(self, event: BreakerChanged) -> None:
        if event.open:
            self._away[event.server] = event.answered
        else:
            self._away.pop(event.server, None)

    def _audit_changed(self, event: AuditOutage) -> None:
        self._audit_outage = event.began

    # -- a scrape --------------------------------------------------------------------------------------------------

    async def page(self, request: Request) -> Answer:
        """All metrics, in OpenMetrics for who accepts that, else in Prometheus' text."""
        openmetrics = OPENMETRICS in request.headers.get("accept", "")
        packed = "gzip" in request.headers.get("accept-encoding", "")
        async with self._writing:
            at, answer = self._written.get((openmetrics, packed), (-math.inf, None))
            if answer is None or time.monotonic() > at + FRESH_SECONDS:
                # The state is taken in the loop, where nothing changes meanwhile; writing it down takes longer.
                answer = await asyncio.to_thread(
                    exposition.write, list(self._state()), openmetrics=openmetrics, packed=packed
                )
                self._written[openmetrics, packed] = (time.monotonic(), answer)
            return answer

    def _state(self) -> Iterator[tuple[Family, Values]]:
        for counter in self._counters:
            yield counter.family, dict(counter.values)
        for histogram in self._histograms:
            yield histogram.family, {labels: tuple(found) for labels, found in histogram.values.items()}
        yield _one(families.LOG_LOST, self._lines_lost())
        yield _one(families.AUDIT_OUTAGE, self._audit_outage)
        yield families.AWAY, self._addresses()
        failing = self._volumes.failing()
        yield _one(families.FAILING, len(failing))
        yield families.FAILING_SECONDS, self._longest(failing)
        yield from self._held(self._views())
        yield _one(families.BUILD, 1, __version__, platform.python_version())

    def _held(self, views: Sequence[SessionView]) -> Iterator[tuple[Family, Values]]:
        leases: dict[Labels, float] = {(kind.value,): 0 for kind in (Kind.LEASED, Kind.ISSUED)}
        ends: dict[Labels, float] = {(renewal,): math.inf for renewal in ("due", "remount", "over")}
        remounts = self._volumes.remounts()
        for view in views:
            remount = remounts[view.who.pod.uid]
            for lease in view.leases:
                leases[(lease.kind.value,)] += 1
                if not view.idle:
                    renewal = "due" if lease.renewed else "remount" if self._replaced(lease.left, remount) else "over"
                    ends[(renewal,)] = min(ends[(renewal,)], lease.left)
        yield _one(families.SESSIONS, len(views))
        yield families.LEASES, leases
        yield families.EARLIEST_END, ends

    def _replaced(self, left: float, remount: Remount) -> bool:
        """Whether what has ``left`` seconds is replaced by the pod's next mount, or its pod may be gone by now."""
        now = self._clock.now()
        if now + left < remount.at:
            return False
        late = now > remount.late_at
        # Where pods that are gone are found, one that is late may be such until they were looked for twice.
        return not late or (self._sweeping and (len(self._swept_at) < 2 or self._swept_at[0] <= remount.late_at))

    def _addresses(self) -> dict[Labels, float]:
        own = (self._address, "true")
        away: dict[Labels, float] = {own: 0}
        for server, answered in self._away.items():
            address = _label(server.address)
            labels = (address, "true" if answered or address == self._address else "false")
            away[labels if labels in away or len(away) < MAX_ADDRESSES else (OTHER, labels[1])] = 1
        return away

    def _longest(self, failing: Sequence[Volume]) -> dict[Labels, float]:
        longest: dict[Labels, float] = {}
        # So that of a pod's volumes the one stays that has been failing longest.
        for volume in sorted(failing, key=lambda volume: volume.failing_seconds):
            mounted = "false" if volume.mounted_at is None else "true"
            pod = (_label(volume.pod.namespace), _label(volume.pod.name), mounted)
            longest.pop(pod, None)
            longest[pod] = volume.failing_seconds
        return dict(list(longest.items())[-MAX_FAILING:])


def _status(status: int) -> str:
    return STATUSES.get(status) or f"{status // 100}xx"


def _one(family: Family, value: float, *labels: str) -> tuple[Family, Values]:
    return family, {labels: value}


def _label(text: str) -> str:
    """A tenant's text as a label's value: of one line, and such that it can be encoded."""
    return one_line(text, MAX_LABEL)
