"""The gRPC server: what each failure becomes, what may leave Mount, and whose socket stands at the endpoint."""

# ruff: noqa: ASYNC110, ASYNC240
# A test looks at files, and for what comes in its own time, between two steps: nobody else waits for its loop.

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import gc
import json
import logging
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import grpc
import grpc.aio
import pytest
from hypothesis import given
from hypothesis import strategies as st

from provider import __version__, errors
from provider.errors import MAX_MESSAGE_BYTES, AccessDenied, Code, InvalidSetting, ProviderError, encoded_size
from provider.mount import MountResult
from provider.render import RenderedFile, Renderer
from provider.server import Endpoint, Server, endpoint
from provider.server.server import CONNECTION_AGE, SERVE_ON_FACTOR
from provider.settings import MAX_MOUNT_BYTES, MIB, Settings
from provider.spc import MountSpec, ObjectSpec, Parser
from provider.telemetry.events import Event, MountRefused, Telemetry
from provider.v1alpha1 import service_pb2 as pb
from provider.v1alpha1 import service_pb2_grpc

ALLOWED = {grpc.StatusCode[code.value] for code in Code}
TOKEN = "hvs.CAESIJcanarycanarycanary"
CANARY = "canary-hunter2"
METHOD = "/v1alpha1.CSIDriverProvider/Mount"
# A stop waits for connections to age; a test's need not age for long.
AGE = 0.2


def attributes(secret_path: str = "secret/data/app", **more: str) -> str:
    """The attributes of a class with one object, as the driver sends them."""
    return json.dumps(
        {
            "roleName": "shop",
            "objects": f"- objectName: password\n  secretPath: {secret_path}\n  secretKey: password",
            "csi.storage.k8s.io/pod.name": "web-0",
            "csi.storage.k8s.io/pod.namespace": "shop",
            "csi.storage.k8s.io/pod.uid": "7c1f6f5e-0000-4000-8000-000000000000",
            "csi.storage.k8s.io/serviceAccount.name": "web",
            "secretProviderClass": "shop-secrets",
            **more,
        }
    )


REQUEST = pb.MountRequest(attributes=attributes(), secrets="null", target_path="/volume", permission="420")


def result(*files: RenderedFile) -> MountResult:
    return MountResult(files, tuple((file.path, "v1") for file in files))


PASSWORD = result(RenderedFile("password", 0o600, b"swordfish"))


class Mounting:
    """Mounts that end as the test says: with an answer, an error, or whatever a coroutine function does."""

    def __init__(self, outcome: MountResult | BaseException | Callable[[MountSpec], Awaitable[MountResult]]) -> None:
        self.outcome = outcome
        self.rendering = 0.0
        """Seconds of processor time that each says it took."""

    async def mount(self, spec: MountSpec, spent: Callable[[float], None]) -> MountResult:
        spent(self.rendering)
        if isinstance(self.outcome, MountResult):
            return self.outcome
        if isinstance(self.outcome, BaseException):
            raise self.outcome
        return await self.outcome(spec)

    async def check(self, templates: Sequence[ObjectSpec], owner: str) -> None:
        renderer = Renderer(Telemetry())
        try:
            await renderer.check(templates, owner)
        finally:
            await renderer.close()


@contextlib.asynccontextmanager
async def dialled(path: str | Path, *, patient: bool = True) -> AsyncIterator[grpc.aio.Channel]:
    """A connection of its own, as the driver makes one: patient, it waits for the socket and tries again."""
    retries = {
        "maxAttempts": 3,
        "initialBackoff": "0.01s",
        "maxBackoff": "0.01s",
        "backoffMultiplier": 1,
        "retryableStatusCodes": ["UNAVAILABLE"],
    }
    config = {"methodConfig": [{"name": [{}], "waitForReady": True, "retryPolicy": retries}]}
    options = [
        ("grpc.use_local_subchannel_pool", 1),
        ("grpc.default_authority", "localhost"),
        ("grpc.max_receive_message_length", MAX_MOUNT_BYTES),
        ("grpc.service_config", json.dumps(config if patient else {})),
    ]
    async with grpc.aio.insecure_channel(f"unix:{quote(str(path))}", options) as channel:
        yield channel


@contextlib.asynccontextmanager
async def serving(
    path: str | Path,
    mounts: Mounting,
    *,
    mount_timeout: float = 30,
    parser: Parser | None = None,
    listener: Callable[[Event], None] | None = None,
) -> AsyncIterator[service_pb2_grpc.CSIDriverProviderAsyncStub]:
    """A server at ``path``, and a client of it; ``listener`` is told of its events."""
    telemetry = Telemetry()
    if listener is not None:
        telemetry.listen(listener)
    server = Server(str(path), parser or Parser(Settings()), mounts, mount_timeout, telemetry, connection_age=AGE)
    await server.start()
    try:
        async with dialled(path) as channel:
            yield service_pb2_grpc.CSIDriverProviderStub(channel)
    finally:
        await server.stop()


async def refusal(call: Awaitable[Any]) -> tuple[grpc.StatusCode, str]:
    """Code and message of a call that fails."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return caught.value.code(), caught.value.details() or ""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "vault.sock"


# --- calls ------------------------------------------------------------------------------------------------


async def test_version_names_protocol_and_program(path: Path) -> None:
    """Version answers v1alpha1, our name and our semantic version, whatever version the driver says it speaks."""
    async with serving(path, Mounting(PASSWORD)) as stub:
        for asked in ("v1alpha1", "", "v9"):
            answer = await stub.Version(pb.VersionRequest(version=asked))
            assert (answer.version, answer.runtime_name) == ("v1alpha1", "vault-csi-provider")
            assert answer.runtime_version == __version__


async def test_mount_answers_with_files_modes_and_versions(path: Path) -> None:
    """A mount that succeeds answers each file with path, mode and contents, and each object's version."""
    files = (RenderedFile("a/b", 0o400, b"\x00\xff"), RenderedFile("c", 0o644, b""))
    async with serving(path, Mounting(result(*files))) as stub:
        answer = await stub.Mount(REQUEST)
    assert [(file.path, file.mode, file.contents) for file in answer.files] == [
        ("a/b", 0o400, b"\x00\xff"),
        ("c", 0o644, b""),
    ]
    assert [(version.id, version.version) for version in answer.object_version] == [("a/b", "v1"), ("c", "v1")]
    assert not answer.error.code


async def test_mount_is_given_what_the_request_says(path: Path) -> None:
    """The four strings of the request reach the mount as one typed spec."""
    seen: list[MountSpec] = []

    async def look(spec: MountSpec) -> MountResult:
        seen.append(spec)
        return PASSWORD

    async with serving(path, Mounting(look)) as stub:
        await stub.Mount(REQUEST)
    (spec,) = seen
    assert (str(spec.pod), spec.class_name, spec.target_path) == ("shop/web-0", "shop-secrets", "/volume")
    assert spec.objects[0].mode == 0o644


EACH = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, ProviderError)]


@pytest.mark.parametrize("kind", EACH, ids=lambda kind: kind.__name__)
async def test_each_error_keeps_its_code_and_message(path: Path, kind: type[ProviderError]) -> None:
    """Every class of error leaves Mount with its own code, one of the five, and with what it says."""
    if kind is errors.InvalidClass:
        error: ProviderError = errors.InvalidClass(["what is wrong: what to do"])
    elif kind is errors.MountFailed:
        error = errors.MountFailed([AccessDenied("what is wrong", "what to do")])
    else:
        error = kind("what is wrong", "what to do")
    async with serving(path, Mounting(error)) as stub:
        code, message = await refusal(stub.Mount(REQUEST))
    assert code is grpc.StatusCode[error.code.value]
    assert code in ALLOWED
    assert "what is wrong: what to do" in message


@pytest.mark.usefixtures("collector_off")
async def test_a_call_that_fails_leaves_nothing_to_the_garbage_collector(path: Path) -> None:
    """Its error is gone with it, and so whatever the call's frames held: the request, which may be large."""

    class Own(AccessDenied):
        """Told from those of other tests of this process."""

    async def fail(spec: MountSpec) -> MountResult:
        raise Own("what is wrong", "what to do")

    async with serving(path, Mounting(fail)) as stub:
        for _ in range(3):
            await refusal(stub.Mount(REQUEST))
        assert not any(type(found) is Own for found in gc.get_objects())


async def test_faults_of_templates_are_told_with_the_others(path: Path) -> None:
    """A class that is wrong elsewhere is told what is wrong with its templates too, each object that has it."""
    objects = """
    - {objectName: a, secretPath: secret/data/a, filePermission: 9999}
    - {objectName: b, secretPath: secret/data/a, template: "{{ nosuch }}{{ nor }}", jmesPath: "["}
    - {objectName: c, secretPath: secret/data/a, template: "{{ nosuch }}{{ nor }}"}
    - {objectName: d, secretPath: secret/data/a, template: "{{ secret.a }}"}
    """
    request = pb.MountRequest(attributes=attributes(objects=objects), target_path="/volume", permission="420")
    async with serving(path, Mounting(PASSWORD)) as stub:
        code, message = await refusal(stub.Mount(request))
        assert code is grpc.StatusCode.INVALID_ARGUMENT
        assert "objects[0] (a) filePermission" in message
        assert "objects[1] (b) jmesPath" in message
        assert 'objects (b, c) template: line 1 speaks of "nor", "nosuch", which is no source of it' in message
        assert "(d)" not in message
        # From the cache alike; and where sources are at fault too, names are not.
        assert await refusal(stub.Mount(request)) == (code, message)
        wrong = objects.replace('"["', '"a", sources: {b-c: {secretPath: d}}')
        request.attributes = attributes(objects=wrong)
        _, message = await refusal(stub.Mount(request))
        assert "sources" in message
        assert "nosuch" not in message


async def test_message_is_one_safe_line_that_fits(path: Path) -> None:
    """A message holds no token and no line break, and at most 4 KiB as gRPC encodes it."""
    async with serving(path, Mounting(AccessDenied(f"{TOKEN}\n" + "ä" * 10_000, "remedy"))) as stub:
        code, message = await refusal(stub.Mount(REQUEST))
    assert code is grpc.StatusCode.PERMISSION_DENIED
    assert message.startswith("***\\u000aää")
    assert encoded_size(message) <= MAX_MESSAGE_BYTES


async def test_failure_is_logged_with_who_and_why(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A failed mount is told in the log, since the driver hides that of a re-mount: pod, class, code, message."""
    async with serving(path, Mounting(AccessDenied("the policy denies it"))) as stub:
        await refusal(stub.Mount(REQUEST))
    (record,) = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert record.getMessage() == "mount failed: the policy denies it"
    fields = record.__dict__
    assert (fields["pod"], fields["secret_provider_class"], fields["code"]) == (
        "shop/web-0",
        "shop-secrets",
        "PERMISSION_DENIED",
    )


async def test_bug_is_internal_with_an_id_that_the_log_has(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """An exception nobody thought of is INTERNAL with an id; its text, which may quote a secret, stays here."""
    async with serving(path, Mounting(ValueError(CANARY))) as stub:
        code, message = await refusal(stub.Mount(REQUEST))
    assert code is grpc.StatusCode.INTERNAL
    assert CANARY not in message
    assert "ValueError" not in message
    (record,) = [record for record in caplog.records if record.exc_info]
    assert record.__dict__["incident"] in message
    assert record.exc_info is not None
    assert record.exc_info[0] is ValueError
    assert CANARY not in record.getMessage()


async def test_cancelled_part_is_internal_and_leaves_no_caller_waiting(path: Path) -> None:
    """A CancelledError that leaks from a part is INTERNAL; left to gRPC, the caller would wait for minutes."""
    async with serving(path, Mounting(asyncio.CancelledError())) as stub:
        code, message = await refusal(stub.Mount(REQUEST, timeout=60))
    assert code is grpc.StatusCode.INTERNAL
    assert "internal error" in message


@pytest.mark.parametrize("leaks", [True, False], ids=["raised by a part", "never returns"])
async def test_time_that_is_up_is_a_failed_precondition(path: Path, leaks: bool) -> None:
    """A TimeoutError, or a mount that never ends by itself, is FAILED_PRECONDITION and not DEADLINE_EXCEEDED."""

    async def hang(spec: MountSpec) -> MountResult:
        if leaks:
            raise TimeoutError
        await asyncio.get_running_loop().create_future()
        raise AssertionError

    async with serving(path, Mounting(hang), mount_timeout=0.1) as stub:
        code, message = await refusal(stub.Mount(REQUEST, timeout=60))
    assert code is grpc.StatusCode.FAILED_PRECONDITION
    assert "--mount-timeout" in message


@pytest.mark.parametrize(
    "data", [b"\xff\xff\xff", b"\x0a\x02\xff\xfe", b"\x0a\x7fshort"], ids=["no message", "no UTF-8", "cut short"]
)
async def test_bytes_that_are_no_request_are_an_invalid_argument(path: Path, data: bytes) -> None:
    """Bytes that cannot be decoded are INVALID_ARGUMENT; gRPC by itself would answer UNKNOWN."""
    async with serving(path, Mounting(PASSWORD)), dialled(path) as channel:
        code, _ = await refusal(channel.unary_unary(METHOD, bytes, bytes)(data))
    assert code is grpc.StatusCode.INVALID_ARGUMENT


async def test_class_with_faults_is_an_invalid_argument_and_is_not_fetched(path: Path) -> None:
    """A class that cannot be read is INVALID_ARGUMENT, and nothing is fetched for it."""
    mounts = Mounting(AssertionError("fetched"))
    async with serving(path, mounts) as stub:
        code, message = await refusal(stub.Mount(pb.MountRequest(attributes="{}", permission="420")))
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert "roleName" in message


async def test_refusal_names_the_volume_whose_class_cannot_be_read(path: Path) -> None:
    """Of a class with faults the refusal has pod, class and volume, so that a re-mount that fails since its class was
    changed is known as one: who watches has to learn which volume it is."""
    told: list[Event] = []
    request = pb.MountRequest(attributes=attributes(objects=""), target_path="/volume", permission="420")
    async with serving(path, Mounting(PASSWORD), listener=told.append) as stub:
        await refusal(stub.Mount(request))
    (event,) = told
    assert isinstance(event, MountRefused)
    assert event.code == "INVALID_ARGUMENT"
    assert (str(event.pod), event.class_name, event.target_path) == ("shop/web-0", "shop-secrets", "/volume")


async def test_request_over_grpcs_own_limit_is_an_invalid_argument(path: Path) -> None:
    """A request over gRPC's default of 4 MiB is refused by us, not with gRPC's RESOURCE_EXHAUSTED."""
    request = pb.MountRequest(attributes=attributes(padding="x" * 5 * MIB), permission="420")
    async with serving(path, Mounting(PASSWORD)) as stub:
        code, _ = await refusal(stub.Mount(request))
    assert code is grpc.StatusCode.INVALID_ARGUMENT


def volume_of(size: int) -> MountResult:
    """A mount of two files whose response has ``size`` bytes in all."""
    small = RenderedFile("small", 0o644, b"x" * 100_000)
    empty = pb.MountResponse(
        files=[pb.File(path=file.path, mode=file.mode, contents=file.contents) for file in (small,)],
        object_version=[pb.ObjectVersion(id=name, version="v1") for name in ("small", "large")],
    )
    for contents in range(size - empty.ByteSize() - 40, size):
        file = pb.File(path="large", mode=0o644, contents=bytes(contents))
        if pb.MountResponse(files=[file]).ByteSize() + empty.ByteSize() == size:
            return result(small, RenderedFile("large", 0o644, file.contents))
    raise AssertionError(size)


async def test_largest_answer_that_the_driver_takes_is_sent(path: Path) -> None:
    """A response of exactly 4 MiB arrives at a client with the driver's limit."""
    async with serving(path, Mounting(volume_of(MAX_MOUNT_BYTES))) as stub:
        answer = await stub.Mount(REQUEST)
    assert answer.ByteSize() == MAX_MOUNT_BYTES


@pytest.mark.parametrize("size", [MAX_MOUNT_BYTES + 1, 3 * MAX_MOUNT_BYTES])
async def test_answer_that_is_too_large_is_refused_first(path: Path, size: int) -> None:
    """One byte over 4 MiB, frame included, is FAILED_PRECONDITION with sizes in MiB and the largest objects first."""
    async with serving(path, Mounting(volume_of(size))) as stub:
        code, message = await refusal(stub.Mount(REQUEST))
    assert code is grpc.StatusCode.FAILED_PRECONDITION
    assert "at most 4.00 MiB" in message
    assert ("4.01 MiB" in message) == (size == MAX_MOUNT_BYTES + 1)
    assert message.index("large (") < message.index("small (0.10 MiB)")


@pytest.mark.parametrize("empty", [MountResult((), (("a", "1"),)), MountResult(PASSWORD.files, ())])
async def test_mount_of_nothing_is_an_error(path: Path, empty: MountResult) -> None:
    """No file, or no version, is INTERNAL: the driver would keep the old files and call it a success."""
    async with serving(path, Mounting(empty)) as stub:
        code, _ = await refusal(stub.Mount(REQUEST))
    assert code is grpc.StatusCode.INTERNAL


async def test_caller_that_gives_up_cancels_the_call(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """When the caller ends the call, it ends here too, and is told in the log; the next is answered."""
    started, ended = asyncio.Event(), asyncio.Event()
    outcome: list[type[BaseException]] = []

    async def wait(spec: MountSpec) -> MountResult:
        started.set()
        try:
            await asyncio.get_running_loop().create_future()
        except BaseException as error:
            outcome.append(type(error))
            ended.set()
            raise
        raise AssertionError

    mounts = Mounting(wait)
    async with serving(path, mounts) as stub:
        call = stub.Mount(REQUEST)
        await started.wait()
        call.cancel()
        await ended.wait()
        mounts.outcome = PASSWORD
        await stub.Mount(REQUEST)
    assert outcome == [asyncio.CancelledError]
    assert "the caller gave the mount up" in caplog.messages


async def test_mounts_run_side_by_side(path: Path) -> None:
    """Twenty mounts are under way at once: none waits for another."""
    arrived = asyncio.Barrier(20)

    async def meet(spec: MountSpec) -> MountResult:
        await arrived.wait()
        return PASSWORD

    async with serving(path, Mounting(meet)) as stub:
        answers = await asyncio.gather(*(stub.Mount(REQUEST) for _ in range(20)))
    assert len(answers) == 20


class StuckParser(Parser):
    """A parser that holds on to a class until it is let go, as a class of a megabyte does."""

    def __init__(self) -> None:
        super().__init__(Settings())
        self.reading = threading.Event()
        self.release = threading.Event()

    def parse(self, *request: str) -> MountSpec:
        self.reading.set()
        self.release.wait()
        return super().parse(*request)


async def test_large_class_holds_up_no_other_call(path: Path) -> None:
    """While a class is being read, the event loop answers other calls."""
    parser = StuckParser()
    async with serving(path, Mounting(PASSWORD), parser=parser) as stub:
        mount = asyncio.ensure_future(stub.Mount(REQUEST))
        try:
            await asyncio.to_thread(parser.reading.wait)
            await stub.Version(pb.VersionRequest(), timeout=60)
            assert not mount.done()
        finally:
            parser.release.set()
        assert (await mount).files


# --- any bytes --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mounting(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[bytes], grpc.StatusCode]]:
    """The code that a daemon, a process of its own, answers to the bytes of a Mount."""
    path = tmp_path_factory.mktemp("daemon") / "vault.sock"
    argv = [sys.executable, "-m", "tests.daemon", f"--endpoint={path}", "--health-addr="]
    process = subprocess.Popen(argv, stderr=subprocess.DEVNULL)
    try:
        with grpc.insecure_channel(f"unix:{path}") as channel:
            call = channel.unary_unary(METHOD, bytes, bytes)

            def mount(data: bytes) -> grpc.StatusCode:
                try:
                    call(data, wait_for_ready=True, timeout=60)
                except grpc.RpcError as error:
                    code: grpc.StatusCode = error.code()
                    return code
                return grpc.StatusCode.OK

            yield mount
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()


def field(number: int, data: bytes) -> bytes:
    """A string field on the wire, whatever its bytes."""
    length, wire = len(data), b""
    while length > 0x7F:
        wire += bytes([length & 0x7F | 0x80])
        length >>= 7
    return bytes([number << 3 | 2]) + wire + bytes([length]) + data


@given(st.binary(max_size=200), st.one_of(st.just(b"420"), st.binary(max_size=8)), st.booleans())
def test_any_bytes_are_a_mount_or_an_invalid_argument(
    mounting: Callable[[bytes], grpc.StatusCode], attributes_bytes: bytes, permission: bytes, whole: bool
) -> None:
    """Whatever bytes stand in attributes and permission, or make up the request: INVALID_ARGUMENT, if not a mount."""
    data = attributes_bytes if whole else field(1, attributes_bytes) + field(3, b"/volume") + field(4, permission)
    assert mounting(data) in {grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.OK}


def test_bytes_of_a_good_request_are_a_mount(mounting: Callable[[bytes], grpc.StatusCode]) -> None:
    """The wire format that the test above writes is the real one: good strings in it are a mount."""
    good = field(1, attributes("sleep/0").encode()) + field(2, b"null") + field(3, b"/volume") + field(4, b"420")
    assert mounting(good) is grpc.StatusCode.OK


# --- the socket -------------------------------------------------------------------------------------------


async def start_and_stop(path: str | Path) -> None:
    async with serving(path, Mounting(PASSWORD)) as stub:
        await stub.Version(pb.VersionRequest(), timeout=60)


def stale(path: Path, *, age: float = 0) -> None:
    """A socket file that nobody listens at, as a killed daemon leaves it."""
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(path))
    os.utime(path, (time.time() - age,) * 2)


async def test_socket_is_the_users_alone_and_the_umask_comes_back(path: Path) -> None:
    """The socket has mode 0600; files made afterwards have the modes they had before."""
    before = os.umask(0o022)
    try:
        async with serving(path, Mounting(PASSWORD)):
            mode = path.stat().st_mode
            (path.parent / "later").touch()
        assert stat.S_ISSOCK(mode)
        assert stat.S_IMODE(mode) == 0o600
        assert stat.S_IMODE((path.parent / "later").stat().st_mode) == 0o644
    finally:
        os.umask(before)


async def test_socket_is_gone_afterwards_and_nothing_is_left(path: Path) -> None:
    """A server that stops leaves its directory empty."""
    await start_and_stop(path)
    assert list(path.parent.iterdir()) == []


async def test_stale_socket_is_taken_over(path: Path) -> None:
    """A socket that a killed daemon left is no obstacle."""
    stale(path)
    await start_and_stop(path)


@pytest.mark.parametrize("occupant", ["file", "directory", "link"])
async def test_what_is_no_socket_is_left_alone(path: Path, occupant: str) -> None:
    """A file, a directory or a symbolic link at the endpoint is refused, and stays as it was."""
    if occupant == "file":
        path.write_text("precious")
    elif occupant == "directory":
        path.mkdir()
    else:
        (path.parent / "target").write_text("precious")
        path.symlink_to(path.parent / "target")
    before = {entry.name: entry.lstat().st_ino for entry in path.parent.iterdir()}
    with pytest.raises(InvalidSetting, match="exists and is not a socket"):
        await start_and_stop(path)
    assert {entry.name: entry.lstat().st_ino for entry in path.parent.iterdir()} == before


async def test_file_that_comes_between_check_and_takeover_is_left_alone(path: Path) -> None:
    """A file that appears while the server starts is not overwritten, and the server's own socket goes."""
    server = Server(str(path), Parser(Settings()), Mounting(PASSWORD), 30, Telemetry(), connection_age=AGE)
    original = Endpoint.clean

    def clean(self: Endpoint) -> None:
        original(self)
        path.write_text("precious")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Endpoint, "clean", clean)
        with pytest.raises(InvalidSetting, match="exists and is not a socket"):
            await server.start()
    assert [entry.name for entry in path.parent.iterdir()] == ["vault.sock"]
    assert path.read_text() == "precious"
    await server.stop()
    assert path.read_text() == "precious"


def test_socket_that_vanished_before_the_takeover_is_told(path: Path) -> None:
    """Where the bound socket is gone, the endpoint is not touched and the error says what the system said."""
    stale(path)
    with pytest.raises(InvalidSetting, match="cannot be taken over: No such file or directory"):
        Endpoint(str(path)).publish()
    assert path.is_socket()


async def test_missing_directory_is_told(tmp_path: Path) -> None:
    """An endpoint in a directory that does not exist is refused by the directory's name."""
    with pytest.raises(InvalidSetting, match=f"there is no directory {tmp_path}/nowhere: create it"):
        await start_and_stop(tmp_path / "nowhere" / "vault.sock")


async def test_longest_path_of_a_socket(tmp_path: Path) -> None:
    """With the suffix that it is bound under, a path of 107 bytes is served; one of 108 is refused with the numbers."""
    suffix = len(Endpoint(str(tmp_path / "x")).bind_path) - len(str(tmp_path / "x"))
    longest = tmp_path / ("x" * (107 - suffix - len(str(tmp_path)) - 1))
    assert len(longest.name) > 5
    await start_and_stop(longest)
    with pytest.raises(InvalidSetting, match="it has 108 bytes, and a Unix socket's path has at most 107"):
        await start_and_stop(f"{longest}y")


async def test_path_that_cannot_be_bound_is_told() -> None:
    """Where the system refuses the socket, the error names the path, and not gRPC's environment variables."""
    with pytest.raises(InvalidSetting, match=r"no socket can be bound at /proc/vault\.sock") as caught:
        await start_and_stop("/proc/vault.sock")
    assert "GRPC" not in str(caught.value)


async def test_path_with_characters_of_a_uri(tmp_path: Path) -> None:
    """Spaces, percent signs, # and ? in the path are themselves; gRPC reads a URI."""
    await start_and_stop(tmp_path / "a b%41#c?d=é.sock")


async def test_relative_path_is_served(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A relative endpoint is one in the working directory."""
    monkeypatch.chdir(path.parent)
    async with serving("vault.sock", Mounting(PASSWORD)), dialled(path) as channel:
        await service_pb2_grpc.CSIDriverProviderStub(channel).Version(pb.VersionRequest(), timeout=60)


async def test_leftovers_of_dead_daemons_are_removed(path: Path) -> None:
    """A socket of a daemon that died before taking over goes; those alive, fresh, or of other names stay."""
    old = endpoint.LEFTOVER_SECONDS * 2
    stale(path.with_name("vault.sock.77-0a1b"), age=old)
    stale(path.with_name("vault.sock.78-0a1b"))
    stale(path.with_name("vault.sock.backup"), age=old)
    stale(path.with_name("other.sock.79-0a1b"), age=old)
    path.with_name("vault.sock.80-0a1b").write_text("no socket")
    os.utime(path.with_name("vault.sock.80-0a1b"), (0, 0))
    with socket.socket(socket.AF_UNIX) as alive:
        alive.bind(str(path.with_name("vault.sock.81-0a1b")))
        alive.listen()
        os.utime(path.with_name("vault.sock.81-0a1b"), (0, 0))
        with socket.socket(socket.AF_UNIX) as busy, socket.socket(socket.AF_UNIX) as waiting:
            # One that dials waits in its queue of one, which is then full.
            busy.bind(str(path.with_name("vault.sock.82-0a1b")))
            busy.listen(0)
            waiting.connect(str(path.with_name("vault.sock.82-0a1b")))
            os.utime(path.with_name("vault.sock.82-0a1b"), (0, 0))
            await start_and_stop(path)
    left = {entry.name.removeprefix("vault.sock.") for entry in path.parent.iterdir()}
    assert left == {"78-0a1b", "backup", "other.sock.79-0a1b", "80-0a1b", "81-0a1b", "82-0a1b"}


async def test_two_daemons_with_one_process_id_bind_apart(path: Path) -> None:
    """Two daemons of one process id (both are 1 in their containers) do not share the path that they bind."""
    assert len({Endpoint(str(path)).bind_path for _ in range(50)}) > 1


def test_successor_that_was_killed_leaves_nobody_there(path: Path) -> None:
    """Its socket stands at the path, and refuses whoever dials: whoever had it before has lost it, and is restarted."""

    def published() -> tuple[Endpoint, socket.socket]:
        found, listener = Endpoint(str(path)), socket.socket(socket.AF_UNIX)
        listener.bind(found.bind_path)
        listener.listen()
        found.publish()
        return found, listener

    (first, one), (second, two) = published(), published()
    with one, two:
        os.utime(path, (0, 0))
        assert not first.is_lost()
        two.close()
        assert first.is_lost()
        os.utime(path)
        assert not first.is_lost()  # one that has just bound it may be about to listen
        assert not second.is_lost()


async def test_successors_socket_is_not_removed(path: Path) -> None:
    """A server that was taken over leaves the endpoint to its successor when it stops."""
    async with serving(path, Mounting(PASSWORD)) as stub:
        async with serving(path, Mounting(PASSWORD)):
            pass
        assert not path.exists()
    first = Server(str(path), Parser(Settings()), Mounting(PASSWORD), 30, Telemetry(), connection_age=AGE)
    second = Server(str(path), Parser(Settings()), Mounting(PASSWORD), 30, Telemetry(), connection_age=AGE)
    await first.start()
    await second.start()
    taken = path.stat().st_ino
    await first.stop()
    assert path.stat().st_ino == taken
    async with dialled(path) as channel:
        stub = service_pb2_grpc.CSIDriverProviderStub(channel)
        assert (await stub.Mount(REQUEST, timeout=60)).files
    await second.stop()
    assert not path.exists()


async def test_lock_that_another_holds_does_not_stop_a_takeover(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever locks the providers directory for good keeps no daemon from serving."""
    monkeypatch.setattr(endpoint, "LOCK_SECONDS", 0.05)
    held = os.open(path.parent, os.O_RDONLY)
    try:
        fcntl.flock(held, fcntl.LOCK_EX)
        await start_and_stop(path)
    finally:
        os.close(held)


async def test_file_system_without_locks_is_served(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the directory cannot be locked at all, the endpoint is taken over and left all the same."""
    asked: list[int] = []

    def flock(descriptor: int, operation: int) -> None:
        asked.append(operation)
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("fcntl.flock", flock)
    await start_and_stop(path)
    assert len(asked) == 2


# --- ready and stop ---------------------------------------------------------------------------------------


async def test_ready_follows_the_socket(path: Path) -> None:
    """Ready is false before the start, true while a dialler is answered, false once the path is not ours."""
    server = Server(str(path), Parser(Settings()), Mounting(PASSWORD), 30, Telemetry(), connection_age=AGE)
    assert not await server.answers()
    await server.start()
    assert await server.answers()
    path.rename(path.with_name("moved"))
    assert not await server.answers()
    stale(path)
    assert not await server.answers()
    path.unlink()
    path.with_name("moved").rename(path)
    assert await server.answers()
    stopping = asyncio.ensure_future(server.stop())
    await asyncio.sleep(0)
    assert not await server.answers()
    await stopping


async def test_ready_is_false_when_the_socket_is_ours_and_dead(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ready asks over the socket: a path that is ours with no server behind it is not ready."""
    monkeypatch.setattr("provider.server.server.ANSWER_SECONDS", 0.2)
    server = Server(str(path), Parser(Settings()), Mounting(PASSWORD), 30, Telemetry(), connection_age=AGE)
    await server.start()
    monkeypatch.setattr(Endpoint, "is_ours", lambda self: True)
    path.unlink()
    stale(path)
    assert not await server.answers()
    monkeypatch.undo()
    await server.stop()


@pytest.mark.parametrize("gone", ["socket", "directory"])
async def test_stop_waits_for_mounts_and_answers_what_arrives(path: Path, gone: str) -> None:
    """While it stops, a server answers calls that arrive over its connections, and ends after the last mount.

    Also where the directory that it is to leave is there no more.
    """
    release = asyncio.Event()
    started = asyncio.Event()

    async def wait(spec: MountSpec) -> MountResult:
        started.set()
        await release.wait()
        return PASSWORD

    server = Server(str(path), Parser(Settings()), Mounting(wait), 30, Telemetry(), connection_age=2)
    await server.start()
    async with dialled(path, patient=False) as channel:
        stub = service_pb2_grpc.CSIDriverProviderStub(channel)
        first = asyncio.ensure_future(stub.Mount(REQUEST))
        await started.wait()
        if gone == "directory":
            shutil.rmtree(path.parent)
        stopping = asyncio.ensure_future(server.stop())
        await asyncio.sleep(0)
        assert not path.exists()
        second = asyncio.ensure_future(stub.Mount(REQUEST))
        await stub.Version(pb.VersionRequest(), timeout=60)
        # Past the time that it serves on: it is gRPC that waits now.
        await asyncio.sleep(2 * SERVE_ON_FACTOR + 0.2)
        assert not stopping.done()
        release.set()
        assert (await first).files
        assert (await second).files
    await stopping


def test_idle_stop_is_shorter_than_five_seconds() -> None:
    """The time that an idle server serves on leaves more than a second of the five that a stop may take."""
    assert CONNECTION_AGE * SERVE_ON_FACTOR < 4


async def test_connections_are_told_to_go(path: Path) -> None:
    """A client's connection is replaced as it ages, so a client follows the socket to whoever took it over."""
    async with serving(path, Mounting(result(RenderedFile("who", 0o600, b"first")))) as stub:
        assert (await stub.Mount(REQUEST)).files[0].contents == b"first"
        async with serving(path, Mounting(result(RenderedFile("who", 0o600, b"second")))):
            while (await stub.Mount(REQUEST, wait_for_ready=True)).files[0].contents == b"first":
                await asyncio.sleep(0.01)


@pytest.mark.parametrize("outcome", [PASSWORD, AccessDenied("no")], ids=["mounted", "failed"])
async def test_rendering_counts_in_the_pods_share(path: Path, outcome: MountResult | ProviderError) -> None:
    """Whether or not the mount succeeds: who took much of it is told so at the next one."""
    mounts = Mounting(outcome)
    async with serving(path, mounts) as stub:
        for _ in range(2):
            with contextlib.suppress(grpc.aio.AioRpcError):
                await stub.Mount(REQUEST, timeout=60)
        mounts.rendering = 60.0
        with contextlib.suppress(grpc.aio.AioRpcError):
            await stub.Mount(REQUEST, timeout=60)
        with pytest.raises(grpc.aio.AioRpcError, match="seconds of rendering its files"):
            await stub.Mount(REQUEST, timeout=60)
