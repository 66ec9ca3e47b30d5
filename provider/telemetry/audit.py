"""The audit log: a line of JSON for whoever got which secret when, and for whoever was refused.

What the lines say is in docs/audit.md. No value, token or JWT is in them, and a lease's id only as its SHA-256.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import stat
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, Final, Protocol, TypeVar

from provider import __version__
from provider.errors import LoginDenied
from provider.redact import one_line
from provider.spc.model import Login, ObjectSpec, Pod, VaultServer
from provider.telemetry.events import (
    AuditLost,
    AuditOutage,
    Event,
    Issued,
    LoggedIn,
    Mounted,
    MountedObject,
    MountRefused,
    Renewal,
    Renewing,
    Revocation,
    Revoking,
    Telemetry,
    Who,
    lease_sha256,
)
from provider.telemetry.lines import MAX_WAITING, LineWriter
from provider.telemetry.volumes import Volumes

_log = logging.getLogger(__name__)
_T = TypeVar("_T")

# A name or a reason: as long as an error message may be, and a path of Vault's.
MAX_TEXT: Final = 4096
# What the names and paths of one line's objects may come to: far more than a class of 1,000 plain ones has. One that
# repeats long paths by YAML aliases could have gigabytes.
MAX_OBJECTS_TEXT: Final = 1024 * 1024
# Seconds between two attempts at a file that cannot be written.
RETRY_SECONDS: Final = 1.0
# Seconds that a file which is gone has to come back: logrotate moves it away before it creates the next one, and would
# take one that is there already out of its way.
CREATE_SECONDS: Final = 0.5
# Seconds after which a line that has not grown is no longer being written: a write copies megabytes in milliseconds.
SETTLE_SECONDS: Final = 0.05

OK: Final = "ok"
REFUSED: Final = "refused"
UNANSWERED: Final = "unanswered"


class Put(Protocol):
    """What takes a line to be written: LineWriter's ``put``, or an AuditFile's."""

    def __call__(self, line: str, *, last: bool = False) -> bool:
        """Whether there was room for ``line``; there always is for the ``last``."""
        ...


class Audit:
    """Tells of events in lines that it hands to ``put``.

    ``volumes`` must listen after this. ``record`` is told of lines that are lost.
    """

    def __init__(self, put: Put, volumes: Volumes, record: Callable[[Event], None], *, node: str) -> None:
        self._put = put
        self._volumes = volumes
        self._record = record
        self._node = _safe(node)
        self._lost = 0
        self._tellers: Mapping[type[Event], Callable[[Any], dict[str, Any] | None]] = {
            Mounted: self._mounted,
            MountRefused: self._refused,
            LoggedIn: self._logged_in,
            Issued: self._issued,
            Renewal: self._renewal,
            Revocation: self._revocation,
        }

    def begin(self) -> None:
        """Tell that the daemon has started, and so will tell of every volume's next mount."""
        self._write(self._line("start", OK, None) | {"daemon_version": __version__})

    def end(self) -> None:
        """The daemon ends: lines that are missing are told of, since none comes after them."""
        if self._lost:
            self._write(self._gap(), last=True)

    def listen(self, telemetry: Telemetry) -> None:
        """Write lines from now on of events that are for the audit log."""
        telemetry.listen(self._take, *self._tellers)

    def _take(self, event: Event) -> None:
        told = self._tellers[type(event)](event)
        if told is None:
            return
        if self._lost and self._write(self._gap()):
            self._lost = 0
        if not self._write(told):
            self._lost += 1
            self._record(AuditLost(1))

    def _gap(self) -> dict[str, Any]:
        return self._line("lost", OK, None) | {"lines": self._lost}

    def _write(self, told: dict[str, Any], *, last: bool = False) -> bool:
        return self._put(json.dumps(told, ensure_ascii=False, separators=(",", ":")), last=last)

    def _mounted(self, event: Mounted) -> dict[str, Any] | None:
        spec, change = event.spec, self._volumes.change(event)
        if change.remount and not change.changed:
            volume = self._volumes.find(spec.pod.uid, spec.target_path)
            if volume is not None and volume.keyed == event.keyed:
                return None
            # The key has come or gone since the mount before: told, since nobody can say that nothing changed.
        told = self._line("remount" if change.remount else "mount", OK, event.seconds)
        told |= _who(spec.pod, spec.class_name, spec.login, spec.server)
        told |= {"target_path": _safe(spec.target_path), "accessor": _safe(event.accessor)}
        if change.remount:
            told["changed"] = sorted(map(_safe, change.changed))
        return told | _objects(event.objects(), _made)

    def _refused(self, event: MountRefused) -> dict[str, Any]:
        told = self._line("refusal", REFUSED, event.seconds)
        spec = event.spec
        told |= _who(event.pod, event.class_name, spec.login if spec else None, spec.server if spec else None)
        told |= {"target_path": _safe(event.target_path), "code": event.code, "reason": _safe(event.message)}
        return told | _objects(spec.objects if spec else (), _wanted)

    def _logged_in(self, event: LoggedIn) -> dict[str, Any]:
        spec, error = event.spec, event.error
        outcome = OK if error is None else REFUSED if isinstance(error, LoginDenied) else UNANSWERED
        told = self._line("login", outcome, event.seconds)
        told |= _who(spec.pod, spec.class_name, spec.login, spec.server)
        told |= {"request_id": _safe(event.request_id)}
        told |= {"accessor": _safe(event.accessor), "ttl_seconds": round(event.ttl)}
        return told if error is None else told | {"code": error.code.name, "reason": _safe(str(error))}

    def _issued(self, event: Issued) -> dict[str, Any]:
        told = self._of_session("reissue" if event.again else "issue", OK, event.seconds, event.who) | {
            "path": _safe(event.path),
            "kind": event.kind.value,
            "request_id": _safe(event.request_id),
            "lease_sha256": lease_sha256(event.lease_id),
            "accessor": _safe(event.accessor),
            "ttl_seconds": round(event.ttl),
        }
        return told | _objects(event.objects(), _wanted)

    def _renewal(self, event: Renewal) -> dict[str, Any]:
        outcome = OK if event.outcome is Renewing.RENEWED else event.outcome.value
        told = self._of_session("renewal", outcome, event.seconds, event.who) | {
            "path": _safe(event.path),
            "request_id": _safe(event.request_id),
            "lease_sha256": lease_sha256(event.lease_id),
            "accessor": _safe(event.accessor),
            "ttl_seconds": round(event.ttl),
        }
        # Vault's words about a lease may name it.
        reason = event.reason.replace(event.lease_id or "\0", lease_sha256(event.lease_id))
        return told | {"reason": _safe(reason)} if reason else told

    def _revocation(self, event: Revocation) -> dict[str, Any]:
        outcome = OK if event.outcome is Revoking.REVOKED else event.outcome.value
        told = self._of_session("revocation", outcome, event.seconds, event.who)
        told |= {"accessor": _safe(event.accessor), "why": _safe(event.why)}
        return told | {"reason": _safe(event.reason)} if event.reason else told

    def _of_session(self, event: str, outcome: str, seconds: float, who: Who) -> dict[str, Any]:
        return self._line(event, outcome, seconds) | _who(who.pod, who.class_name, who.login, who.server)

    def _line(self, event: str, outcome: str, seconds: float | None) -> dict[str, Any]:
        """What every line begins with; ``seconds`` is None for what took no time of its own."""
        now = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        told = {"time": now, "event": event, "outcome": outcome, "node": self._node}
        return told if seconds is None else told | {"milliseconds": round(seconds * 1000, 1)}


def _who(pod: Pod | None, class_name: str, login: Login | None, server: VaultServer | None) -> dict[str, str]:
    """Who asked, and whom; "" for what is not known."""
    return {
        "namespace": _safe(pod.namespace) if pod else "",
        "pod": _safe(pod.name) if pod else "",
        "pod_uid": _safe(pod.uid) if pod else "",
        "service_account": _safe(pod.service_account) if pod else "",
        "class": _safe(class_name),
        "role": _safe(login.role) if login else "",
        "auth_mount": _safe(login.mount) if login else "",
        "vault_address": _safe(server.address) if server else "",
        "vault_namespace": _safe(server.namespace) if server else "",
    }


def _made(made: MountedObject) -> dict[str, Any]:
    # What is not made safe is ours.
    return {
        "object": _safe(made.name),
        "paths": [_safe(path) for path in made.paths],
        "version": made.version,
        "kind": made.kind.value,
        "supply": made.supply.value,
        "request_ids": [_safe(name) for name in made.request_ids if name],
        "lease_sha256": [lease_sha256(lease_id) for lease_id in made.lease_ids],
    }


def _wanted(wanted: ObjectSpec) -> dict[str, Any]:
    return {"object": _safe(wanted.name), "paths": [_safe(source.request.path) for source in wanted.sources]}


def _objects(objects: Sequence[_T], tell: Callable[[_T], dict[str, Any]]) -> dict[str, Any]:
    """As many objects as there is room for, and how many that leaves out."""
    told: list[dict[str, Any]] = []
    size = 0
    for each in objects:
        if size > MAX_OBJECTS_TEXT:
            break
        told.append(tell(each))
        size += len(told[-1]["object"]) + sum(map(len, told[-1]["paths"]))
    return {"objects": told, "objects_left_out": len(objects) - len(told)}


def _safe(text: str) -> str:
    return one_line(text, MAX_TEXT)


class AuditFile:
    """Appends lines to the file at ``path``, which other daemons may write and logrotate may move away or empty.

    Lines that come together are one write at the file's end. Where that fails it is tried again until it works, and
    lines wait meanwhile; those that find no room any more are lost. ``record`` is called in any thread.
    """

    def __init__(self, path: str, record: Callable[[Event], None], *, capacity: int = MAX_WAITING) -> None:
        self._path = path
        self._record = record
        self._descriptor = -1
        self._inode: tuple[int, int] | None = None
        self._left = b""  # lines that are to be written next
        self._written = 0
        self._has_last = False
        self._failing = False
        self._changing = threading.Lock()
        self._told_refused = 0
        self._closing = threading.Event()
        self._lines = LineWriter("audit", self._write, capacity=capacity)

    def __enter__(self) -> AuditFile:
        self._lines.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Write what waits, and end. What cannot be written now is lost, and the log says how many lines that is."""
        self._closing.set()
        if self._lines.close() and self._descriptor >= 0:
            os.close(self._descriptor)
        unwritten = self._lines.taken - self._written
        if unwritten:
            # The last line tells of those that were refused, and is none of them.
            lost = unwritten - self._has_last + self._lines.refused - self._told_refused
            _log.error(
                "the daemon ends, and lines of the audit log are lost", extra={"path": self._path, "lines": lost}
            )

    def put(self, line: str, *, last: bool = False) -> bool:
        """Have ``line`` written; False where too many wait already, and it is not the ``last``."""
        self._has_last |= last
        if self._lines.put(line, last=last):
            return True
        self._fails("too many lines wait")
        return False

    def _write(self, lines: Sequence[bytes]) -> None:
        self._left += b"".join(lines)
        while self._left:
            try:
                self._follow()
                self._append()
            except OSError as error:
                self._fails(error.strerror or str(error))
                if self._closing.is_set():
                    return  # tried once more where there are others to be written
                self._closing.wait(RETRY_SECONDS)
        self._works()

    def _follow(self) -> None:
        """Have open what is at the path now. Raises OSError."""
        if self._descriptor >= 0:
            there = self._there()
            if there is None:
                self._closing.wait(CREATE_SECONDS)
                there = self._there()
            if there == self._inode:
                return
        # Whoever can put a link or a pipe there must not choose what is written, nor hold the writing up.
        flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
        descriptor = os.open(self._path, flags, 0o600)
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            os.close(descriptor)
            raise OSError(errno.EINVAL, "it is no regular file")
        if self._descriptor >= 0:
            os.close(self._descriptor)
        self._descriptor, self._inode = descriptor, (status.st_dev, status.st_ino)

    def _there(self) -> tuple[int, int] | None:
        try:
            status = os.lstat(self._path)
        except FileNotFoundError:
            return None
        return status.st_dev, status.st_ino

    def _append(self) -> None:
        """Write what is left, and leave the lines of it that are not written to their end. Raises OSError."""
        start = b"\n" if self._torn() else b""
        written = os.write(self._descriptor, start + self._left) - len(start)
        whole = self._left.rfind(b"\n", 0, written) + 1
        self._written += self._left.count(b"\n", 0, whole)
        self._left = self._left[whole:]

    def _torn(self) -> bool:
        """Whether the file ends within a line.

        That is asked of the file each time: a full disk, a kill or a power loss may have ended another daemon's line,
        and logrotate may have emptied the file since. A line that another daemon is writing just now is none of these.
        """
        size = 0
        while (now := os.fstat(self._descriptor).st_size) != size:
            if now == 0 or os.pread(self._descriptor, 1, now - 1) in (b"\n", b""):
                return False
            size = now
            time.sleep(SETTLE_SECONDS)
        return size > 0

    def _fails(self, reason: str) -> None:
        with self._changing:
            if self._failing:
                return
            self._failing = True
        _log.error(
            "the audit log cannot be written; mounts go on, lines wait and then are lost: make room, or see to the "
            "directory and its rights",
            extra={"path": self._path, "error": reason},
        )
        self._record(AuditOutage(True))

    def _works(self) -> None:
        with self._changing:
            if not self._failing:
                return
            self._failing = False
            lost = self._lines.refused - self._told_refused
            self._told_refused += lost
        _log.warning("the audit log is written again", extra={"path": self._path, "lines_lost": lost})
        self._record(AuditOutage(False))
