"""The audit log: what its lines say, and how its file is kept."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import logging
import os
import re
import resource
import stat
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from provider.cli import parts
from provider.clock import SystemClock
from provider.errors import LoginDenied, VaultUnavailable
from provider.settings import MIB, Settings, TlsSettings
from provider.spc import Login, MountSpec, Pod, SecretRequest, VaultServer
from provider.telemetry import audit, lines
from provider.telemetry.audit import Audit, AuditFile
from provider.telemetry.events import (
    AuditLost,
    AuditOutage,
    Event,
    Issued,
    Kind,
    LoggedIn,
    Mounted,
    MountedObject,
    MountRefused,
    ReadShared,
    Renewal,
    Renewing,
    Revocation,
    Revoking,
    Supply,
    Telemetry,
    VaultRequest,
    Who,
)
from provider.telemetry.lines import MAX_WAITING, MAX_WAITING_BYTES, LineWriter
from provider.telemetry.volumes import MARK_BYTES, MAX_MARKS_BYTES, MAX_VOLUMES, Volumes
from tests.spc_classes import plain
from tests.stand.waiting import eventually
from tests.tools import ROOT, logrotate

PAGE = (ROOT / "docs" / "audit.md").read_text()
LEASE = "database/creds/web/9dGx"
LEASE_SHA256 = hashlib.sha256(LEASE.encode()).hexdigest()
TOKEN = "hvs.CAESIJcanarycanarycanary"
POD = Pod("shop", "web-0", "uid-1", "web")
SERVER = VaultServer("https://vault.example:8200", "team-a", TlsSettings())
LOGIN = Login("kubernetes", "web-role", None)
WHO = Who(POD, LOGIN, SERVER, "web-secrets")
IDENTITY = {
    "node": "node-1",
    "namespace": "shop",
    "pod": "web-0",
    "pod_uid": "uid-1",
    "service_account": "web",
    "class": "web-secrets",
    "role": "web-role",
    "auth_mount": "kubernetes",
    "vault_address": "https://vault.example:8200",
    "vault_namespace": "team-a",
}


class Listener:
    """An audit log in memory, among the listeners that it has in the daemon. `room` False takes no line."""

    def __init__(self) -> None:
        self.texts: list[str] = []
        self.recorded: list[Event] = []
        self.room = True
        self._telemetry = Telemetry()
        volumes = Volumes(SystemClock())
        self.audit = Audit(self._put, volumes, self.recorded.append, node="node-1")
        self.audit.listen(self._telemetry)
        volumes.listen(self._telemetry)

    def _put(self, line: str, *, last: bool = False) -> bool:
        if self.room or last:
            self.texts.append(line)
        return self.room or last

    def __call__(self, event: Event) -> list[dict[str, Any]]:
        """The lines that come of `event`, without their times."""
        before = len(self.texts)
        self._telemetry.record(event)
        lines: list[dict[str, Any]] = [json.loads(text) for text in self.texts[before:]]
        for line in lines:
            assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", line.pop("time"))
        return lines

    def one(self, event: Event) -> dict[str, Any]:
        """The one line that comes of `event`."""
        (line,) = self(event)
        return line


@pytest.fixture
def listener() -> Listener:
    return Listener()


def made(name: str = "password", **fields: Any) -> MountedObject:
    given: dict[str, Any] = {
        "paths": ("secret/data/web",),
        "version": "v1",
        "request_ids": ("request-1",),
        "lease_ids": (),
        "kind": Kind.STATIC,
        "supply": Supply.READ,
    }
    return MountedObject(name, **(given | fields))


def mounted(
    *objects: MountedObject, pod: Pod = POD, class_name: str = "web-secrets", login: Login = LOGIN, keyed: bool = True
) -> Mounted:
    found = objects or (made(),)
    spec = MountSpec(pod, class_name, "/pods/web-0/mount", SERVER, login, ())
    return Mounted(
        spec=spec,
        seconds=0.0123,
        files=len(found),
        size=10,
        marks={each.name: each.version for each in found},
        keyed=keyed,
        accessor="accessor-1",
        read=1,
        kept=0,
        remembered=0,
        objects=lambda: found,
    )


# --- lines ------------------------------------------------------------------------------------------------


def test_mount_tells_who_got_which_object(listener: Listener) -> None:
    """A mount's line has who, whom, how long, and each object with what its bytes came of."""
    leased = made(
        "user", paths=("database/creds/web",), lease_ids=(LEASE,), kind=Kind.LEASED, supply=Supply.KEPT, version="v7"
    )
    assert listener.one(mounted(made(), leased)) == {
        **IDENTITY,
        "event": "mount",
        "outcome": "ok",
        "milliseconds": 12.3,
        "target_path": "/pods/web-0/mount",
        "accessor": "accessor-1",
        "objects_left_out": 0,
        "objects": [
            {
                "object": "password",
                "paths": ["secret/data/web"],
                "version": "v1",
                "kind": "static",
                "supply": "read",
                "request_ids": ["request-1"],
                "lease_sha256": [],
            },
            {
                "object": "user",
                "paths": ["database/creds/web"],
                "version": "v7",
                "kind": "leased",
                "supply": "kept",
                "request_ids": ["request-1"],
                "lease_sha256": [LEASE_SHA256],
            },
        ],
    }


def test_remount_is_told_where_something_changed(listener: Listener) -> None:
    """A re-mount of the same files has no line; one that brought others names them."""
    listener(mounted(made("a"), made("b")))
    assert listener(mounted(made("a", request_ids=("request-2",)), made("b"))) == []
    line = listener.one(mounted(made("a"), made("b", version="v2")))
    assert (line["event"], line["changed"]) == ("remount", ["b"])
    assert listener(mounted(made("a"), made("b", version="v2"))) == []


def test_remount_is_told_where_nobody_knows_what_changed(listener: Listener) -> None:
    """When the HMAC key comes between two mounts, the second has a line, as its files may be others."""
    listener(mounted(keyed=False))
    line = listener.one(mounted(made(version="v2")))
    assert (line["event"], line["changed"]) == ("remount", [])
    assert listener(mounted(made(version="v2"))) == []


def test_refusal_has_code_reason_and_what_was_asked_for(listener: Listener) -> None:
    """A mount that failed is told with its code and message, and the objects of its class."""
    wanted = plain("password", SecretRequest("GET", "secret/data/web"), "password")
    spec = MountSpec(POD, "web-secrets", "/pods/web-0/mount", SERVER, LOGIN, (wanted,))
    event = MountRefused("PERMISSION_DENIED", "denied: widen it", 0.5, POD, "web-secrets", "/pods/web-0/mount", spec)
    assert listener.one(event) == {
        **IDENTITY,
        "event": "refusal",
        "outcome": "refused",
        "milliseconds": 500.0,
        "target_path": "/pods/web-0/mount",
        "code": "PERMISSION_DENIED",
        "reason": "denied: widen it",
        "objects": [{"object": "password", "paths": ["secret/data/web"]}],
        "objects_left_out": 0,
    }


def test_refusal_of_what_cannot_be_read_says_what_is_known(listener: Listener) -> None:
    """A class that cannot be read is refused by name; of a request that says nothing the same fields are empty."""
    faulty = listener.one(MountRefused("INVALID_ARGUMENT", "faults", 0.1, POD, "web-secrets", "/t", None))
    assert (faulty["pod"], faulty["class"], faulty["role"], faulty["objects"]) == ("web-0", "web-secrets", "", [])
    unknown = listener.one(MountRefused("INVALID_ARGUMENT", "no message", 0.1, None, "", "", None))
    assert unknown.keys() == faulty.keys()
    assert (unknown["pod"], unknown["pod_uid"], unknown["node"]) == ("", "", "node-1")


def test_login_and_its_refusal(listener: Listener) -> None:
    """A login has the token's accessor and life; one that came to nothing code and reason, and whether Vault spoke."""
    spec = MountSpec(POD, "web-secrets", "/t", SERVER, LOGIN, ())
    ok = listener.one(LoggedIn(spec, "accessor-1", 3600.0, 0.1, None, "request-1"))
    assert ok == {
        **IDENTITY,
        "event": "login",
        "outcome": "ok",
        "milliseconds": 100.0,
        "request_id": "request-1",
        "accessor": "accessor-1",
        "ttl_seconds": 3600,
    }
    away = listener.one(LoggedIn(spec, "", 0.0, 0.1, VaultUnavailable("no connection", "look")))
    assert (away["outcome"], away["code"]) == ("unanswered", "FAILED_PRECONDITION")
    refused = listener.one(LoggedIn(spec, "", 0.0, 0.1, LoginDenied("no such role", "make it")))
    assert (refused["outcome"], refused["code"]) == ("refused", "PERMISSION_DENIED")
    assert (refused["reason"], refused["request_id"]) == ("no such role: make it", "")


@pytest.mark.parametrize(("again", "event"), [(False, "issue"), (True, "reissue")])
def test_issue_and_reissue(listener: Listener, again: bool, event: str) -> None:
    """A lease that Vault gave is told with the request that it answers, what it is for, and its id as a hash."""
    wanted = [plain(name, SecretRequest("GET", "database/creds/web"), name) for name in ("username", "password")]
    issued = Issued(
        WHO, "database/creds/web", Kind.LEASED, "accessor-1", LEASE, "request-1", 60.0, again, 0.0123, lambda: wanted
    )
    assert listener.one(issued) == {
        **IDENTITY,
        "event": event,
        "outcome": "ok",
        "milliseconds": 12.3,
        "path": "database/creds/web",
        "objects": [{"object": name, "paths": ["database/creds/web"]} for name in ("username", "password")],
        "objects_left_out": 0,
        "kind": "leased",
        "request_id": "request-1",
        "lease_sha256": LEASE_SHA256,
        "accessor": "accessor-1",
        "ttl_seconds": 60,
    }


def test_lease_id_that_is_no_unicode_is_told(listener: Listener) -> None:
    """JSON can name half of a surrogate pair, which UTF-8 has not: what was issued is told all the same."""
    issued = Issued(WHO, "x", Kind.LEASED, "accessor-1", "x\ud800", "request-1", 60.0, False, 0.1, lambda: [])
    assert len(listener.one(issued)["lease_sha256"]) == 64


@pytest.mark.parametrize("outcome", Renewing)
def test_renewal(listener: Listener, outcome: Renewing) -> None:
    """A renewal is told with what became of it; Vault's words do not bring the lease's id in."""
    reason = "" if outcome is Renewing.RENEWED else f"no renewal of {LEASE}"
    event = Renewal(WHO, "database/creds/web", "accessor-1", LEASE, outcome, 60.0, 0.01, reason, "request-1")
    line = listener.one(event)
    assert {**line, "reason": ""} == {
        **IDENTITY,
        "event": "renewal",
        "outcome": "ok" if outcome is Renewing.RENEWED else outcome.value,
        "milliseconds": 10.0,
        "path": "database/creds/web",
        "request_id": "request-1",
        "lease_sha256": LEASE_SHA256,
        "accessor": "accessor-1",
        "ttl_seconds": 60,
        "reason": "",
    }
    assert line.get("reason", "") == reason.replace(LEASE, LEASE_SHA256)


@pytest.mark.parametrize("outcome", Revoking)
def test_revocation(listener: Listener, outcome: Revoking) -> None:
    """A revocation is told with its cause and what became of it."""
    reason = "" if outcome is Revoking.REVOKED else "Vault answered 400"
    line = listener.one(Revocation(WHO, "accessor-1", outcome, "pod gone", reason, 0.01))
    assert {**line, "reason": line.get("reason", "")} == {
        **IDENTITY,
        "event": "revocation",
        "outcome": "ok" if outcome is Revoking.REVOKED else outcome.value,
        "milliseconds": 10.0,
        "accessor": "accessor-1",
        "why": "pod gone",
        "reason": reason,
    }


def test_other_events_are_none_of_its(listener: Listener) -> None:
    """Requests to Vault and reads that are shared have no line: each mount has that of what it got."""
    assert listener(VaultRequest("GET", "secret/", 200, 0.1)) == []
    assert listener(ReadShared()) == []


def test_nobody_starts_a_line_nor_brings_a_token_in(listener: Listener) -> None:
    """Control characters in any name or reason are escaped, even once the JSON is decoded, and tokens are masked."""
    evil = 'x\n{"event":"mount"}\r\x1b[31m\u2028\u202e\x85'
    object_ = made(evil, paths=(evil,), request_ids=(evil,))
    for event in (
        mounted(object_, class_name=evil, login=Login(evil, TOKEN, None), pod=Pod(evil, evil, evil, evil)),
        MountRefused("INTERNAL", f"{evil} {TOKEN}", 0.1, POD, evil, evil, None),
        Issued(
            WHO,
            evil,
            Kind.ISSUED,
            TOKEN,
            "",
            evil,
            1.0,
            again=False,
            seconds=0.1,
            objects=lambda: [plain(evil, SecretRequest("GET", TOKEN), evil)],
        ),
        Renewal(WHO, evil, evil, "", Renewing.REFUSED, 1.0, 0.1, f"{evil} {TOKEN}", evil),
        Revocation(WHO, evil, Revoking.REFUSED, evil, f"{evil} {TOKEN}", 0.1),
        LoggedIn(MountSpec(POD, evil, "/t", SERVER, LOGIN, ()), TOKEN, 1.0, 0.1, LoginDenied(f"{evil} {TOKEN}"), evil),
    ):
        text = json.dumps(listener.one(event), ensure_ascii=False)
        assert not re.search(r"[\x00-\x1f\x7f-\x9f\u2028\u202e]|\\[nr]", text.replace("\\\\", ""))
        assert TOKEN not in text
    assert all(len(text.splitlines()) == 1 for text in listener.texts)


def test_line_is_bounded_and_says_what_it_leaves_out(listener: Listener, monkeypatch: pytest.MonkeyPatch) -> None:
    """Objects beyond what a line may come to are counted."""
    monkeypatch.setattr(audit, "MAX_OBJECTS_TEXT", 1000)
    line = listener.one(mounted(*[made(f"{number:050}") for number in range(100)]))
    assert 0 < len(line["objects"]) < 30
    assert len(line["objects"]) + line["objects_left_out"] == 100


def test_line_that_finds_no_room_is_counted_and_the_gap_told(listener: Listener) -> None:
    """A lost line is an event for metrics; the first line that finds room again comes after one that counts them."""
    listener.room = False
    for _ in range(3):
        assert listener(Revocation(WHO, "a", Revoking.REVOKED, "pod gone", "", 0.1)) == []
    assert listener.recorded == [AuditLost(1)] * 3
    listener.room = True
    gap, line = listener(Revocation(WHO, "a", Revoking.REVOKED, "pod gone", "", 0.1))
    assert gap == {"event": "lost", "outcome": "ok", "node": "node-1", "lines": 3}
    assert line["event"] == "revocation"
    assert len(listener(Revocation(WHO, "a", Revoking.REVOKED, "pod gone", "", 0.1))) == 1


def test_gap_before_the_end_is_told(listener: Listener) -> None:
    """Lines that found no room before the daemon ended are counted in its last line, for which there is room."""
    listener.audit.end()
    assert listener.texts == []
    listener.room = False
    for _ in range(3):
        listener(Revocation(WHO, "a", Revoking.REVOKED, "pod gone", "", 0.1))
    listener.audit.end()
    (told,) = map(json.loads, listener.texts)
    assert (told["event"], told["lines"]) == ("lost", 3)


def test_daemon_that_ends_tells_its_gap() -> None:
    """As the daemon's parts end, lines that found no room are counted in a line that has its place in spite of that."""
    written: list[bytes] = []
    stderr = LineWriter("stderr", written.extend, capacity=2)

    async def live() -> None:
        settings = Settings(audit_log="stderr", kubeconfig="/none", metrics_addr="off")
        async with parts.build(settings, stderr=stderr) as built:
            for _ in range(5):
                built.telemetry.record(Revocation(WHO, "a", Revoking.REVOKED, "pod gone", "", 0.1))

    asyncio.run(live())
    stderr.start()
    assert stderr.close()
    told = [(line["event"], line.get("lines")) for line in map(json.loads, written)]
    assert told == [("start", None), ("revocation", None), ("lost", 4)]


def test_page_has_the_limits() -> None:
    """What the page says of bounds is what holds."""
    assert f"cut at {audit.MAX_TEXT:,} characters" in PAGE
    assert f"come to {audit.MAX_OBJECTS_TEXT // MIB} MiB" in PAGE
    objects = MAX_MARKS_BYTES // MARK_BYTES // 1000 * 1000
    assert f"the last {MAX_VOLUMES:,} volumes, or those of some {objects:,} objects" in PAGE
    assert f"Up to {MAX_WAITING:,} lines or {MAX_WAITING_BYTES // MIB} MiB wait" in PAGE
    assert f"does not take within\n{lines.FLUSH_SECONDS:g} s is lost" in PAGE


# --- the file ---------------------------------------------------------------------------------------------


class Kept:
    """An audit file that is open, and what it records."""

    def __init__(self, path: Path, **options: Any) -> None:
        self.path = path
        self.recorded: list[Event] = []
        self.file = AuditFile(str(path), self.recorded.append, **options)

    def put(self, *lines: str) -> None:
        """Have lines written, and return when they are."""
        for line in lines:
            assert self.file.put(line)
        eventually(lambda: self.lines()[-len(lines) :] == list(lines), f"{self.path} has {lines}")

    def lines(self) -> list[str]:
        return self.path.read_text().splitlines() if self.path.exists() else []


@contextlib.contextmanager
def kept(path: Path, **options: Any) -> Iterator[Kept]:
    keeping = Kept(path, **options)
    with keeping.file:
        yield keeping


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Try again sooner than a daemon does."""
    monkeypatch.setattr(audit, "RETRY_SECONDS", 0.02)
    monkeypatch.setattr(audit, "CREATE_SECONDS", 0.1)


def test_file_is_the_daemons_alone_and_grows(tmp_path: Path) -> None:
    """A new file is for its owner alone; what it held before stays."""
    path = tmp_path / "audit.log"
    with kept(path) as keeping:
        keeping.put("one")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    with kept(path) as keeping:
        keeping.put("two")
    assert path.read_text() == "one\ntwo\n"


def test_two_daemons_write_one_file(tmp_path: Path) -> None:
    """In a rolling update two daemons have the file open: lines of both are whole, and none is empty."""
    path = tmp_path / "audit.log"
    with kept(path) as one, kept(path) as other:
        for number in range(1500):
            assert one.file.put(f"one-{number}-{'x' * 3000}-end")
            assert other.file.put(f"other-{number}-{'y' * 3000}-end")
    lines = path.read_text().splitlines()
    assert len(lines) == 3000
    assert all(re.fullmatch(r"(one|other)-\d+-(x{3000}|y{3000})-end", line) for line in lines)


def rename_and_create(path: Path) -> None:
    path.rename(path.with_suffix(".1"))
    path.touch(0o640)


def rename_alone(path: Path) -> None:
    path.rename(path.with_suffix(".1"))


def copy_and_truncate(path: Path) -> None:
    path.with_suffix(".1").write_bytes(path.read_bytes())
    os.truncate(path, 0)


@pytest.mark.parametrize("rotate", [rename_and_create, rename_alone, copy_and_truncate])
def test_rotation_loses_no_line(tmp_path: Path, rotate: Callable[[Path], None]) -> None:
    """However the file is rotated, later lines are in the new one, from its start, and earlier ones in the old."""
    path = tmp_path / "audit.log"
    with kept(path) as keeping:
        keeping.put("one")
        rotate(path)
        keeping.put("two")
        rotated = path.with_suffix(".1")
        assert (rotated.read_text(), path.read_text()) == ("one\n", "two\n")
    assert keeping.recorded == []


def test_file_that_is_about_to_be_created_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between logrotate's renaming and its creating no file is made in its way."""
    monkeypatch.setattr(audit, "CREATE_SECONDS", 60.0)
    path, created = tmp_path / "audit.log", tmp_path / "created"
    with kept(path) as keeping:
        keeping.put("one")
        path.rename(tmp_path / "audit.log.1")
        assert keeping.file.put("two")
        time.sleep(0.2)
        assert not path.exists()
        created.touch(0o640)
        created.rename(path)
        inode = path.stat().st_ino
    assert (path.stat().st_ino, path.read_text()) == (inode, "two\n")


# What the page advises.
ADVISED = re.findall(r"^/var/log/vault-csi-provider/audit\.log \{\n(.*?)^\}", PAGE, re.MULTILINE | re.DOTALL)[0]


@pytest.mark.parametrize("how", [ADVISED, "create 0600", "nocreate", "copytruncate", "create 0600\ncompress"])
def test_logrotate_loses_no_line(tmp_path: Path, how: str) -> None:
    """With the real logrotate, in each way of its, every line is in one of the files once, in order."""
    directory = tmp_path / "log"
    directory.mkdir(0o700)
    path = directory / "audit.log"
    config = tmp_path / "logrotate.conf"
    config.write_text(f"{path} {{\nrotate 10\n{how}\n}}\n")
    config.chmod(0o644)
    with kept(path) as keeping:
        for number in range(3):
            keeping.put(*[f"{number}-{line}" for line in range(10)])
            subprocess.run(
                [logrotate(), "--force", "--state", tmp_path / "state", config], check=True, capture_output=True
            )
        keeping.put("last")
    texts = [path.read_text()]
    for number in range(1, 4):
        rotated = directory / f"audit.log.{number}"
        packed = rotated.with_name(f"{rotated.name}.gz")
        text = (
            subprocess.run(["gzip", "-dc", packed], check=True, capture_output=True).stdout if packed.exists() else None
        )
        texts.insert(0, (text if text is not None else rotated.read_bytes()).decode())
    assert [len(text.splitlines()) for text in texts] == [10, 10, 10, 1]
    assert "".join(texts).splitlines() == [f"{a}-{b}" for a in range(3) for b in range(10)] + ["last"]
    assert {file.name.split(".gz")[0] for file in directory.iterdir()} == {
        "audit.log",
        *(f"audit.log.{n}" for n in (1, 2, 3)),
    }


def test_outage_is_told_once_and_its_end(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """While the directory is gone lines wait; the log and an event say so once, and again when it is back."""
    path = tmp_path / "gone" / "audit.log"
    with kept(path) as keeping:
        assert keeping.file.put("one")
        eventually(lambda: keeping.recorded == [AuditOutage(True)], "the outage is recorded")
        assert keeping.file.put("two")
        path.parent.mkdir()
        eventually(lambda: keeping.lines() == ["one", "two"], "what waited is written")
        eventually(lambda: keeping.recorded == [AuditOutage(True), AuditOutage(False)], "its end is recorded")
    failed, back = caplog.records
    assert failed.message.startswith("the audit log cannot be written; mounts go on")
    assert (failed.levelno, failed.__dict__["error"]) == (logging.ERROR, "No such file or directory")
    assert (back.message, back.__dict__["lines_lost"]) == ("the audit log is written again", 0)


def test_lines_beyond_the_room_are_lost_and_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """In a long outage so many lines wait, and the rest is refused; how many is told when it is over."""
    path = tmp_path / "gone" / "audit.log"
    with kept(path, capacity=5) as keeping:
        taken = [keeping.file.put(str(number)) for number in range(50)]
        assert taken.count(False) >= 40
        path.parent.mkdir()
        eventually(lambda: AuditOutage(False) in keeping.recorded, "the outage ends")
    assert keeping.recorded == [AuditOutage(True), AuditOutage(False)]
    assert keeping.lines() == [str(number) for number, found in enumerate(taken) if found]
    assert caplog.records[-1].__dict__["lines_lost"] == taken.count(False)


@contextlib.contextmanager
def no_file_larger_than(size: int) -> Iterator[None]:
    """Let the kernel refuse what makes a file larger, as it does on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_line_that_was_cut_off_is_written_anew(tmp_path: Path) -> None:
    """On a disk that fills within a line, the line comes again, whole and on a line of its own, once there is room."""
    path = tmp_path / "audit.log"
    with kept(path) as keeping:
        keeping.put("one")
        with no_file_larger_than(10):
            assert keeping.file.put("two-is-too-long")
            eventually(lambda: AuditOutage(True) in keeping.recorded, "the disk is full")
            assert path.read_text() == "one\ntwo-is"
        eventually(lambda: AuditOutage(False) in keeping.recorded, "there is room again")
        keeping.put("three")
    assert keeping.lines() == ["one", "two-is", "two-is-too-long", "three"]


TORN = '{"event":"remount","torn'


def test_line_after_one_that_another_daemon_left_torn_is_whole(tmp_path: Path) -> None:
    """A file that ends within a line, as a kill or a power loss leaves it, is gone on with on a line of its own."""
    path = tmp_path / "audit.log"
    path.write_text(f"one\n{TORN}")
    with kept(path) as keeping:
        keeping.put("two")
        keeping.put("three")
        # A daemon beside this one is killed, and what it had begun stays.
        with path.open("a") as other:
            other.write(TORN)
        keeping.put("four")
    assert path.read_text() == f"one\n{TORN}\ntwo\nthree\n{TORN}\nfour\n"


@pytest.mark.parametrize("rotate", [rename_and_create, rename_alone, copy_and_truncate])
def test_rotation_of_a_torn_file(tmp_path: Path, rotate: Callable[[Path], None]) -> None:
    """What a rotated file ends with is no concern of the next one, whose first line is at its start."""
    path = tmp_path / "audit.log"
    with kept(path) as keeping:
        keeping.put("one")
        with no_file_larger_than(10):
            assert keeping.file.put("two-is-too-long")
            eventually(lambda: AuditOutage(True) in keeping.recorded, "the disk is full")
            rotate(path)
        eventually(lambda: AuditOutage(False) in keeping.recorded, "there is room again")
        rotated = path.with_suffix(".1")
        assert (rotated.read_text(), path.read_text()) == ("one\ntwo-is", "two-is-too-long\n")


def test_torn_file_that_is_rotated_in(tmp_path: Path) -> None:
    """A file that comes to the path while the daemon runs is looked at as one that was there when it started."""
    path, torn = tmp_path / "audit.log", tmp_path / "torn"
    torn.write_text(TORN)
    with kept(path) as keeping:
        keeping.put("one")
        torn.rename(path)
        keeping.put("two")
    assert path.read_text() == f"{TORN}\ntwo\n"


@pytest.mark.parametrize("kind", ["link", "pipe", "directory"])
def test_only_a_regular_file_is_written(tmp_path: Path, kind: str) -> None:
    """A link, a pipe or a directory in the file's place is an outage: nobody else chooses what is written."""
    path, elsewhere = tmp_path / "audit.log", tmp_path / "elsewhere"
    elsewhere.write_text("precious\n")
    with contextlib.ExitStack() as opened:
        if kind == "link":
            path.symlink_to(elsewhere)
        elif kind == "pipe":
            os.mkfifo(path)
            # Somebody reads it, or the kernel would refuse by itself.
            opened.callback(os.close, os.open(path, os.O_RDONLY | os.O_NONBLOCK))
        else:
            path.mkdir()
        with kept(path) as keeping:
            assert keeping.file.put("one")
            eventually(lambda: keeping.recorded == [AuditOutage(True)], "it is not written")
    assert elsewhere.read_text() == "precious\n"


def told_lost(caplog: pytest.LogCaptureFixture) -> list[int]:
    """How many lines the log says are lost at the end."""
    return [
        record.__dict__["lines"]
        for record in caplog.records
        if record.message == "the daemon ends, and lines of the audit log are lost"
    ]


def test_what_cannot_be_written_at_the_end_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A daemon that ends while its audit log cannot be written ends all the same; the log says how many lines are lost.

    Those are the ones that waited and the ones for which there was no room, and not the line that tells of these.
    """
    with kept(tmp_path / "gone" / "audit.log", capacity=5) as keeping:
        assert keeping.file.put("0")
        eventually(lambda: AuditOutage(True) in keeping.recorded, "it is not written")
        assert [keeping.file.put(str(number)) for number in range(1, 9)].count(False) == 3
        assert keeping.file.put("so many are lost", last=True)
    assert told_lost(caplog) == [9]


def test_what_waits_at_the_end_is_tried_once_more(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the file can be written again by the end, all that waited is written, and last how many lines are lost."""
    monkeypatch.setattr(audit, "RETRY_SECONDS", 3600.0)
    path = tmp_path / "gone" / "audit.log"
    with kept(path, capacity=5) as keeping:
        assert keeping.file.put("0")
        eventually(lambda: AuditOutage(True) in keeping.recorded, "it is not written")
        assert [keeping.file.put(str(number)) for number in range(1, 9)].count(False) == 3
        assert keeping.file.put("so many are lost", last=True)
        path.parent.mkdir()
    assert keeping.lines() == [*"012345", "so many are lost"]
    assert told_lost(caplog) == []
    assert caplog.records[-1].__dict__["lines_lost"] == 3


def test_disk_that_fills_at_the_end(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Of lines of which the disk takes some, the log counts those that it did not take whole."""
    path = tmp_path / "audit.log"
    path.write_text("one\n")
    with no_file_larger_than(11), kept(path) as keeping:
        for line in ("two", "three", "four"):
            assert keeping.file.put(line)
    assert path.read_text() == "one\ntwo\nthr"
    assert told_lost(caplog) == [2]


def test_disk_that_hangs_at_the_end(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A write that does not come back holds up no daemon's end; its lines and those that wait are told to be lost."""
    monkeypatch.setattr(lines, "FLUSH_SECONDS", 0.1)
    hung, go_on, write = threading.Event(), threading.Event(), os.write
    path = tmp_path / "audit.log"

    def hang(descriptor: int, data: bytes) -> int:
        if os.path.samestat(os.fstat(descriptor), path.stat()):
            hung.set()
            go_on.wait(60)
        return write(descriptor, data)

    monkeypatch.setattr(os, "write", hang)
    try:
        with kept(path) as keeping:
            assert keeping.file.put("one")
            assert hung.wait(60)
            assert keeping.file.put("two")
        assert told_lost(caplog) == [2]
    finally:
        go_on.set()


def test_waiting_lines_are_bounded_in_bytes() -> None:
    """A writer that is held up takes lines until they come to so many bytes, and refuses the next."""
    held, go_on = threading.Event(), threading.Event()
    written: list[bytes] = []

    def write(lines: Sequence[bytes]) -> None:
        held.set()
        go_on.wait(60)
        written.extend(lines)

    writer = LineWriter("held", write, room=100)
    writer.start()
    assert writer.put("first")
    assert held.wait(60)
    assert [writer.put("x" * 39) for _ in range(4)] == [True, True, False, False]
    assert writer.put("y" * 19)
    assert writer.refused == 2
    go_on.set()
    assert writer.close()
    assert b"".join(written) == b"first\n" + (b"x" * 39 + b"\n") * 2 + b"y" * 19 + b"\n"


def test_lines_of_a_moment_are_written_together() -> None:
    """A log gathers what comes within a moment, so that a thread is not woken for each; its end waits for nothing."""
    written: list[int] = []
    writer = LineWriter("gathers", lambda together: written.append(len(together)), gather=60)
    writer.start()
    writer.put("first")
    eventually(lambda: written == [1], "the first is written at once")
    for number in range(10):
        writer.put(str(number))
        time.sleep(0.01)  # in which the thread could write it
    assert writer.close()
    assert written == [1, 10]
