"""The status: what the daemon answers to whom, and what the command prints of it."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import math
import os
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import grpc
import pytest

from provider.cli import status as command
from provider.cli.command import StatusQuery
from provider.errors import Code
from provider.settings import TlsSettings
from provider.spc import Login, MountSpec, Pod, VaultServer
from provider.telemetry import status
from provider.telemetry.events import Kind, LeaseView, Mounted, MountedObject, MountRefused, SessionView, Supply, Who
from provider.telemetry.http import Answer, Request
from provider.telemetry.status import Status
from provider.telemetry.volumes import Volumes
from tests.live import CERTIFICATE, DATABASE, STATIC, Cluster, Daemon, class_of, credential
from tests.stand.driver import Driver
from tests.stand.process import free_port
from tests.tools import ROOT

PAGE = (ROOT / "docs" / "status.md").read_text()
SERVER = VaultServer("https://vault.example:8200", "team-a", TlsSettings())
LEASE = "database/creds/web/9dGx"
EVIL = "x\x1b[31m\n\u202e"


class Hand:
    """A clock that is set by hand."""

    def __init__(self) -> None:
        self.time = 1000.0

    def now(self) -> float:
        return self.time

    def epoch(self) -> str:
        return "boot"

    def wall(self) -> float:
        return self.time


def session(name: str = "web-0", *leases: LeaseView, token_left: float = 3600.0, ago: float = 12.4) -> SessionView:
    who = Who(Pod("shop", name, f"uid-{name}", "web"), Login("kubernetes", "web-role", None), SERVER, "web-secrets")
    return SessionView(who, "accessor-canary", token_left, True, ago, leases, idle=False)


def lease(left: float = 60.0, path: str = "database/creds/web") -> LeaseView:
    return LeaseView(path, Kind.LEASED, LEASE, left, False)


class Told:
    """A status over what a test says there is."""

    def __init__(self, *views: SessionView) -> None:
        self.clock = Hand()
        self.volumes = Volumes(self.clock)
        self._status = Status(lambda: views, self.volumes, self.clock, node="node-1")

    def mount(self, name: str = "web-0") -> None:
        spec = MountSpec(
            Pod("shop", name, f"uid-{name}", "web"), "web-secrets", "/t", SERVER, Login("k", "r", None), ()
        )
        objects = [MountedObject("a", (), "", (), (), Kind.STATIC, Supply.READ)]
        self.volumes.take(Mounted(spec, 0.1, 1, 1, {"a": "1"}, True, "", 1, 0, 0, lambda: objects))

    def refuse(self, name: str = "web-0", message: str = "denied") -> None:
        pod = Pod("shop", name, f"uid-{name}", "web")
        self.volumes.take(MountRefused(Code.NOT_FOUND.name, message, 0.1, pod, "web-secrets", "/t", None))

    def answer(self, peer: str = "127.0.0.1") -> Answer:
        (page,) = self._status.pages.values()

        async def ask() -> Answer:
            return await page(Request("/status", {}, peer))

        return asyncio.run(ask())

    def json(self) -> dict[str, Any]:
        told: dict[str, Any] = json.loads(self.answer().body)
        return told

    def text(self) -> str:
        return "\n".join(command.table(self.json()))


# --- what is answered -------------------------------------------------------------------------------------


def test_sessions_leases_mounts_and_errors() -> None:
    """The answer has each, with what is left of tokens and leases and how long ago the rest was."""
    told = Told(session("web-0", lease()), session("api-0", token_left=0.0, ago=math.inf))
    told.mount()
    told.clock.time += 5
    told.refuse()
    told.clock.time += 2
    pod = {"namespace": "shop", "pod": "web-0"}
    answer = told.json()
    assert answer["leases"] == [
        {
            **pod,
            "role": "web-role",
            "path": "database/creds/web",
            "kind": "leased",
            "lease_sha256": hashlib.sha256(LEASE.encode()).hexdigest(),
            "seconds_left": 60,
            "renewed": False,
        }
    ]
    volume = {**pod, "class": "web-secrets", "target_path": "/t"}
    assert answer["mounts"] == [{**volume, "seconds_ago": 7, "mounts": 1, "objects": 1}]
    error = {"failures": 1, "failing": True, "mounted_since": False, "code": "NOT_FOUND", "message": "denied"}
    assert answer["errors"] == [{**volume, "seconds_ago": 2, **error}]
    without, with_token = answer["sessions"]
    assert (without["pod"], without["token"], without["mounted_seconds_ago"]) == ("api-0", None, None)
    assert with_token == {
        **pod,
        "pod_uid": "uid-web-0",
        "service_account": "web",
        "class": "web-secrets",
        "role": "web-role",
        "auth_mount": "kubernetes",
        "vault_address": "https://vault.example:8200",
        "vault_namespace": "team-a",
        "token": {"seconds_left": 3600, "renewed": True},
        "mounted_seconds_ago": 12,
    }
    assert (answer["node"], answer["uptime_seconds"]) == ("node-1", 7)
    assert "accessor-canary" not in json.dumps(answer)
    assert LEASE not in json.dumps(answer)


def test_mounted_again_is_no_longer_failing() -> None:
    """After a success the error stays, as one that is over."""
    told = Told()
    told.refuse()
    assert told.json()["failing"] == 1
    told.mount()
    answer = told.json()
    (error,) = answer["errors"]
    assert (error["failing"], error["mounted_since"], error["failures"], answer["failing"]) == (False, True, 1, 0)
    assert re.search(r"ago +mounted$", told.text(), re.MULTILINE)


def test_pod_that_is_gone_is_not_failing() -> None:
    """A volume that nobody tried again long after it failed counts as failing no more, nor as mounted."""
    told = Told()
    told.refuse()
    told.clock.time += 3600
    answer = told.json()
    (error,) = answer["errors"]
    assert (error["failing"], error["mounted_since"], answer["failing"]) == (False, False, 0)
    assert re.search(r"ago +not tried again$", told.text(), re.MULTILINE)


def test_node_with_many_failing_pods_shows_how_many() -> None:
    """Of 60 pods that fail and 5 that failed later and were mounted again, all are counted, and failing ones shown."""
    told = Told()
    for number in range(60):
        told.refuse(f"failing-{number}")
    told.clock.time += 1
    for number in range(5):
        told.refuse(f"mounted-{number}")
        told.mount(f"mounted-{number}")
    answer, text = told.json(), told.text()
    assert (answer["failing"], len(answer["errors"]), answer["errors_left_out"]) == (60, 20, 45)
    assert all(error["failing"] for error in answer["errors"])
    assert text.splitlines()[1].startswith("60 volumes are failing")
    assert "LAST ERRORS: 65\n" in text
    assert text.endswith("  and 45 more")


@pytest.mark.parametrize(
    ("count", "says"), [(0, "no volume is failing"), (1, "1 volume is failing"), (2, "2 volumes are failing")]
)
def test_second_line_says_how_many_volumes_fail(count: int, says: str) -> None:
    """The first thing to be seen after which daemon it is."""
    told = Told()
    for number in range(count):
        told.refuse(f"web-{number}")
    assert told.text().splitlines()[1].split(":")[0] == says


@pytest.mark.parametrize("peer", ["127.0.0.1", "127.8.9.1", "::1", "::ffff:127.0.0.1"])
def test_this_host_is_answered(peer: str) -> None:
    """Whoever comes by the loopback interface is answered, whichever family of addresses the socket has."""
    assert Told().answer(peer).status == 200


@pytest.mark.parametrize("peer", ["10.0.0.7", "::ffff:10.0.0.7", "fe80::1%eth0", "2001:db8::1", "", "unknown"])
def test_others_are_not(peer: str) -> None:
    """Whoever comes from elsewhere, or from nobody knows where, is told nothing."""
    answer = Told(session()).answer(peer)
    assert answer.status == 403
    assert b"web-0" not in answer.body


def test_answer_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a long list the rest is counted: leases that end last, sessions by their pods' names."""
    monkeypatch.setattr(status, "MAX_LISTED", 3)
    monkeypatch.setattr(status, "MAX_RECENT", 2)
    told = Told(*[session(f"web-{number}", lease(left=100.0 - number)) for number in range(9)])
    for number in range(9):
        told.mount(f"web-{number}")
        told.refuse(f"web-{number}")
    answer = told.json()
    assert [found["pod"] for found in answer["sessions"]] == ["web-0", "web-1", "web-2"]
    assert [found["pod"] for found in answer["leases"]] == ["web-8", "web-7", "web-6"]
    assert (answer["sessions_left_out"], answer["leases_left_out"]) == (6, 6)
    assert (len(answer["mounts"]), len(answer["errors"])) == (2, 2)
    assert (answer["mounts_left_out"], answer["errors_left_out"]) == (7, 7)
    assert (told.text().count("  and 6 more"), told.text().count("  and 7 more")) == (2, 2)
    for title in ("SESSIONS", "LEASES", "LAST MOUNTS", "LAST ERRORS"):
        assert f"\n{title}: 9\n" in told.text()


def test_nothing_moves_a_terminal() -> None:
    """What tenants and Vault name is escaped in the daemon's answer."""
    told = Told(session(EVIL, lease(path=EVIL)))
    told.refuse(EVIL, message=EVIL)
    for text in (json.dumps(told.json(), ensure_ascii=False), told.text()):
        assert not re.search("[\x00-\x09\x0b-\x1f\u202e]", text)


def test_page_has_the_fields_and_the_limits() -> None:
    """The page names each field that there is, no other in its tables, and the limits."""
    told = Told(session("web-0", lease()))
    told.mount()
    told.refuse()
    answer = told.json()
    fields = set(answer)
    for entries in ("sessions", "leases", "mounts", "errors"):
        fields |= set(answer[entries][0])
    fields |= {"token", *answer["sessions"][0]["token"]}
    named = set(re.findall(r"`([a-z_0-9]+)`", PAGE.split("## As JSON")[1]))
    assert fields - named == set()
    assert named - fields == {"leased", "issued"}
    assert f"at most {status.MAX_LISTED:,};" in PAGE
    assert f"the latest {status.MAX_RECENT} volumes" in PAGE
    assert (command.PATH, command.SHAPE) == (status.PATH, status.SHAPE)


# --- what is printed --------------------------------------------------------------------------------------


def test_table_is_for_people() -> None:
    """The text has a table each, with times as people write them, and the message below its error."""
    told = Told(session("web-0", lease(3725.0)), session("old-0", token_left=math.inf))
    told.mount()
    told.clock.time += 90
    told.refuse(message="Vault is sealed: unseal it")
    text = told.text()
    assert text.splitlines()[0].endswith(" on node-1, up 1m30s")
    rows = [re.split(r"  +", line.strip()) for line in text.splitlines()]
    vault = "https://vault.example:8200 (team-a)"
    assert ["shop/web-0", "web-secrets", "web-role", vault, "1h0m, renewed", "12s ago"] in rows
    assert ["shop/old-0", "web-secrets", "web-role", vault, "no end, renewed", "12s ago"] in rows
    assert ["shop/web-0", "database/creds/web", "leased", "1h2m", "replaced by a re-mount"] in rows
    assert ["shop/web-0", "web-secrets", "1", "1", "1m30s ago"] in rows
    error = rows.index(["shop/web-0", "web-secrets", "NOT_FOUND", "1", "0s ago", "failing"])
    assert rows[error + 1] == ["Vault is sealed: unseal it"]


@pytest.mark.parametrize(
    ("seconds", "told"),
    [
        (0, "0s"),
        (59, "59s"),
        (60, "1m0s"),
        (3599, "59m59s"),
        (7260, "2h1m"),
        (90000, "1d1h"),
        (None, "no end"),
        (-1, "0s"),
    ],
)
def test_durations_have_two_units(seconds: int | None, told: str) -> None:
    """As much as anybody reads."""
    text = Told(session("web-0", lease())).json()
    text["leases"][0]["seconds_left"] = seconds
    assert f" {told} " in "\n".join(command.table(text))


def test_empty_daemon_has_nothing_to_tell() -> None:
    """Each list says that there is none."""
    assert re.findall(r"^([A-Z ]+): none$", Told().text(), re.MULTILINE) == [
        "SESSIONS", "LEASES", "LAST MOUNTS", "LAST ERRORS",
    ]  # fmt: skip


@contextlib.contextmanager
def answering(status_code: int, body: bytes) -> Iterator[tuple[str, int]]:
    """A stranger at a port of the loopback interface, who answers everything so."""

    class Stranger(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status_code)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Stranger) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield "127.0.0.1", server.server_port
        finally:
            server.shutdown()
            thread.join()


@pytest.mark.parametrize(
    ("status_code", "body", "says"),
    [
        (403, b"no", "to its own host alone"),
        (404, b"no", "has no status to tell (HTTP 404)"),
        (200, b"<html>", "is not understood"),
        (200, b"[]", "of another version"),
        (200, b'{"shape": 2}', "of another version"),
        (200, b'{"shape": 1}', "is not what vault-csi-provider says"),
        (200, b'{"shape": 1, "version": "\\u001b[31m", "node": 5}', "is not what vault-csi-provider says"),
        (200, b'{"shape": 1, "version": "", "node": "", "uptime_seconds": Infinity}', "is not what vault-csi-provider"),
    ],
)
def test_strange_answer_is_one_line_and_exit_1(
    status_code: int, body: bytes, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whatever answers in the daemon's place, the command ends in a sentence."""
    with answering(status_code, body) as address:
        assert command.run(StatusQuery(address, "text")) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert len(err.splitlines()) == 1
    assert says in err
    assert "\x1b" not in err


def test_endless_answer_is_cut(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """No more is read than a status can have."""
    monkeypatch.setattr(command, "MAX_ANSWER_BYTES", 1000)
    with answering(200, b'{"shape": 1' + b" " * 2000 + b"}") as address:
        assert command.run(StatusQuery(address, "json")) == 1
    assert "has no status to tell" in capsys.readouterr().err


def test_stranger_moves_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    """What another program answers is escaped by the command too, in both formats."""
    told = Told(session("web-0", lease())).json()
    told["sessions"][0]["pod"] = told["leases"][0]["path"] = told["node"] = EVIL
    with answering(200, json.dumps(told).encode()) as address:
        for style in ("text", "json"):
            assert command.run(StatusQuery(address, style)) == 0
            assert not re.search("[\x00-\x09\x0b-\x1f\u202e]", capsys.readouterr().out)


# --- the program ------------------------------------------------------------------------------------------


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """`vault-csi-provider status` as a process."""
    return subprocess.run(
        [sys.executable, "-m", "provider.cli", "status", *arguments], cwd=ROOT, capture_output=True, text=True
    )


def test_nobody_there_is_one_line_and_exit_1() -> None:
    """Where no daemon runs the command says so, and what to look at."""
    done = run(f"--health-addr=127.0.0.1:{free_port()}")
    assert (done.returncode, done.stdout) == (1, "")
    assert re.fullmatch(
        r"vault-csi-provider: no daemon answers at 127\.0\.0\.1:\d+ \(Connection refused\): .*--health-addr.*\n",
        done.stderr,
    )


def test_reader_that_has_seen_enough_is_no_error() -> None:
    """`status | head` ends without a word."""
    with answering(200, Told(session("web-0", lease())).answer().body) as (host, port):
        command_line = [sys.executable, "-m", "provider.cli", "status", f"--health-addr={host}:{port}"]
        reader, writer = os.pipe()
        os.close(reader)
        try:
            done = subprocess.run(command_line, cwd=ROOT, stdout=writer, stderr=subprocess.PIPE, text=True)
        finally:
            os.close(writer)
    assert (done.returncode, done.stderr) == (0, "")


def test_command_starts_without_the_daemons_parts() -> None:
    """gRPC, HTTP's servers and Vault's client are not loaded for a look."""
    script = (
        "import sys\n"
        "from provider.cli import main\n"
        f"code = main(['status', '--health-addr=127.0.0.1:{free_port()}'])\n"
        "heavy = {'grpc', 'httptools', 'uvloop', 'hvac', 'cryptography', 'prometheus_client'}\n"
        "print(code, sorted(heavy & sys.modules.keys()))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "1 []\n"


def other_address() -> str:
    """An address of this machine besides the loopback interface's, or "" where it has none."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # sends nothing, but chooses an address
        except OSError:
            return ""
        address: str = probe.getsockname()[0]
        return address


def test_daemon_tells_its_leases_and_its_errors(tmp_path: Path) -> None:
    """A daemon with leases, while Vault answers and while it is down: both are told, without a secret."""
    port = free_port()
    where = f"--health-addr=127.0.0.1:{port}"
    with (
        Cluster(tmp_path, storage="raft") as cluster,
        Daemon(cluster, f"--health-addr=:{port}", "--node-name=node-1", "--mount-timeout=3s") as daemon,
        Driver(daemon.socket) as driver,
    ):
        cluster.role("seen")
        pod = cluster.pod("seen")
        tokens = cluster.tokens(pod)
        mounted = driver.mount(pod, class_of("seen", *DATABASE, *STATIC, *CERTIFICATE), tokens=tokens)
        (lease_id,) = cluster.bao.leases("database/creds/seen")
        accessor = cluster.bao.requests("database/creds/seen")[0].accessor
        done = run(where, "--output=json")
        assert (done.returncode, done.stderr) == (0, "")
        told = json.loads(done.stdout)
        (one,) = told["sessions"]
        assert (one["pod"], one["pod_uid"], one["class"], one["role"]) == ("seen", pod.uid, "secrets", "seen")
        assert 0 < one["token"]["seconds_left"] <= 3600
        assert sorted((found["path"], found["kind"], found["renewed"]) for found in told["leases"]) == [
            ("database/creds/seen", "leased", True),
            ("pki/issue/web", "issued", False),
        ]
        assert hashlib.sha256(lease_id.encode()).hexdigest() in {found["lease_sha256"] for found in told["leases"]}
        assert [(found["pod"], found["objects"]) for found in told["mounts"]] == [("seen", 5)]
        assert told["errors"] == []
        canaries = {*credential(mounted), mounted.text("tls.key"), "key-1", accessor, lease_id, *tokens.values()}
        cluster.bao.stop()
        with pytest.raises(grpc.RpcError):
            driver.remount(mounted)
        text = run(where).stdout
        (failed,) = json.loads(run(where, "--output=json").stdout)["errors"]
        outside = other_address()
        if outside:
            with contextlib.closing(socket.create_connection((outside, port), timeout=30)) as caller:
                caller.sendall(b"GET /status HTTP/1.1\r\nHost: x\r\n\r\n")
                assert b"403" in caller.recv(100)
    assert (failed["code"], failed["failing"]) == ("FAILED_PRECONDITION", True)
    assert text.splitlines()[1].startswith("1 volume is failing")
    assert re.search(r"shop/seen +secrets +FAILED_PRECONDITION +1 +\d+s ago +failing", text)
    assert failed["message"][:100] in text
    assert [canary for canary in canaries if canary in done.stdout + text] == []
