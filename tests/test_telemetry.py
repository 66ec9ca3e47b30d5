"""The log, and HTTP: the health pages and the server of all pages."""

# ruff: noqa: ASYNC110
# A test looks at files, and for what comes in its own time, between two steps: nobody else waits for its loop.

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import logging
import os
import re
import select
import socket
import sys
import threading
import urllib.error
import urllib.request
import warnings
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from provider.errors import AccessDenied
from provider.telemetry import LEVELS, Log, http
from provider.telemetry.health import Health
from provider.telemetry.http import Answer, HttpServer, Page, Request

CANARY = "canary-hunter2"
TOKEN = "hvs.CAESIJcanarycanarycanary"
JWT = "eyJhbGciOiJSUzI1NiJ9.eyJjYW5hcnkiOnRydWV9.c2lnbmF0dXJl"
LOGGER = logging.getLogger("provider.room")


class Told:
    """What a log wrote, once it is closed."""

    def __init__(self) -> None:
        self.text = ""

    @property
    def events(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.text.splitlines()]

    @property
    def event(self) -> dict[str, Any]:
        (event,) = self.events
        return event


@contextlib.contextmanager
def log(level: str = "info", style: Any = "json") -> Iterator[Told]:
    """A log that is open inside, and read when it ends."""
    told = Told()
    reader, writer = os.pipe()
    with open(reader, "rb") as source:
        try:
            with Log(level, style, descriptor=writer):
                yield told
        finally:
            os.close(writer)
        told.text = source.read().decode()


def test_event_is_one_line_of_json_with_its_details() -> None:
    """An event has time (RFC 3339, UTC, milliseconds), severity, message, logger and what `extra` gave."""
    with log() as told:
        LOGGER.info("mounted %d files", 3, extra={"pod": "shop/web-0", "seconds": 0.25, "again": True, "none": None})
    event = told.event
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", event.pop("time"))
    assert event == {
        "severity": "INFO",
        "message": "mounted 3 files",
        "logger": "provider.room",
        "pod": "shop/web-0",
        "seconds": 0.25,
        "again": True,
        "none": None,
    }


def test_time_is_when_the_event_happened() -> None:
    """Each event has its own time, be it of the same second as the one before, of a later or of an earlier one."""
    noon = 1767268800
    with log() as told:
        for milliseconds in (7, 999, 60_000, 0):
            when = {"created": noon + milliseconds / 1000, "msecs": float(milliseconds % 1000)}
            LOGGER.handle(logging.makeLogRecord({"msg": "event", "levelno": logging.INFO, **when}))
    assert [event["time"] for event in told.events] == [
        "2026-01-01T12:00:00.007Z",
        "2026-01-01T12:00:00.999Z",
        "2026-01-01T12:01:00.000Z",
        "2026-01-01T12:00:00.000Z",
    ]


@pytest.mark.parametrize(
    ("level", "severity"),
    [
        (LEVELS["trace"], "DEBUG"),
        (logging.DEBUG, "DEBUG"),
        (logging.INFO, "INFO"),
        (logging.WARNING, "WARNING"),
        (logging.ERROR, "ERROR"),
        (logging.CRITICAL, "CRITICAL"),
        (LEVELS["off"], "CRITICAL"),
    ],
)
def test_severity_has_the_names_of_gke_and_datadog(level: int, severity: str) -> None:
    """Each level is told by a severity that both collectors know."""
    with log("trace") as told:
        LOGGER.log(level, "event")
    assert told.event["severity"] == severity


@pytest.mark.parametrize(
    ("level", "heard"),
    [("trace", 5), ("debug", 4), ("info", 3), ("warn", 2), ("error", 1), ("off", 0)],
)
def test_level_decides_what_is_heard(level: str, heard: int) -> None:
    """Of events at trace, debug, info, warning and error, those below the level are not told."""
    with log(level) as told:
        for name in ("trace", "debug", "info", "warn", "error"):
            LOGGER.log(LEVELS[name], name)
    assert len(told.events) == heard


def test_libraries_do_not_tell_headers_at_debug() -> None:
    """At debug and trace, libraries are heard from warnings up: their debug logs show tokens in headers."""
    with log("trace") as told:
        library = logging.getLogger("some.http.library")
        library.debug("send_headers X-Vault-Token")
        library.info("request")
        library.warning("retry")
    assert [event["message"] for event in told.events] == ["retry"]


def test_credentials_are_masked_wherever_they_stand() -> None:
    """A token or JWT in a message, a detail, or the text of an error of ours is not written."""
    with log() as told:
        LOGGER.info("token %s", TOKEN, extra={"jwt": JWT, "object": {"nested": TOKEN}})
        try:
            raise AccessDenied(f"denied for {TOKEN}")
        except AccessDenied:
            LOGGER.exception("failed with %s", JWT)
    assert len(told.events) == 2
    assert TOKEN not in told.text
    assert JWT not in told.text
    assert told.text.count("***") == 5


def test_fields_are_bounded() -> None:
    """A message, a detail and the text of an exception are told as far as 4,096 characters, with an ellipsis."""
    with log() as told:
        LOGGER.info("m" * 5000, extra={"role": "r" * 5000, "object": ["o" * 5000]}, exc_info=AccessDenied("e" * 5000))
    event = told.event
    for text in (event["message"], event["role"], event["object"], event["exception"][0]["message"]):
        assert len(text) == 4096
        assert text.endswith("…")


def test_text_from_elsewhere_starts_no_line() -> None:
    """Line breaks and terminal controls in a message or a detail are escaped, so an event stays one line."""
    with log(style="text") as told:
        LOGGER.info("role a\nrole b", extra={"role": 'x\r\n{"severity":"INFO"}\x1b[31m\u2028y'})
    assert len(told.text.splitlines()) == 1
    assert "\x1b" not in told.text


def test_exception_is_told_without_what_it_choked_on() -> None:
    """An exception has type and frames (file, line, function); not its text, which may quote a secret, nor locals."""

    def choke(value: str) -> int:
        return int(value)

    with log() as told:
        try:
            choke(CANARY)
        except ValueError:
            LOGGER.exception("unexpected")
    assert CANARY not in told.text
    (exception,) = told.event["exception"]
    assert exception["type"] == "builtins.ValueError"
    assert "message" not in exception
    assert re.search(r"test_telemetry\.py:\d+ .*choke$", exception["frames"][-1])


def test_exception_that_is_ours_or_the_systems_has_its_text_and_causes() -> None:
    """An error of ours and an OSError keep their text; the causes follow, the outermost error first."""
    with log() as told:
        try:
            try:
                os.stat("/nonexistent/file")
            except OSError as error:
                raise AccessDenied("the policy denies it", "widen it") from error
        except AccessDenied:
            LOGGER.exception("failed")
    outer, cause = told.event["exception"]
    assert outer["message"] == "the policy denies it: widen it"
    assert "No such file" in cause["message"]


def test_loop_of_causes_ends() -> None:
    """Two errors that are each other's cause are told once each."""
    first, second = AccessDenied("first"), AccessDenied("second")
    first.__cause__, second.__cause__ = second, first
    with log() as told:
        LOGGER.error("failed", exc_info=first)
    assert [error["message"] for error in told.event["exception"]] == ["first", "second"]


def test_error_raised_from_none_hides_its_context() -> None:
    """`raise ... from None` is respected: what was being handled is not told."""
    with log() as told:
        try:
            try:
                int("x")
            except ValueError:
                raise AccessDenied("clear") from None
        except AccessDenied:
            LOGGER.exception("failed")
    assert len(told.event["exception"]) == 1


def test_text_for_people_is_one_line_with_the_same_facts() -> None:
    """`--log-format text` writes time, severity, logger, message, details and the exceptions on one line."""
    with log(style="text") as told:
        try:
            raise AccessDenied("denied")
        except AccessDenied:
            LOGGER.warning("failed", extra={"pod": "shop/web-0"}, exc_info=True)
        LOGGER.error("no frames", exc_info=KeyError(CANARY))
    first, second = told.text.splitlines()
    assert re.match(
        r'\S+Z WARNING  provider\.room: failed pod=shop/web-0 \[provider\.errors\.AccessDenied: "denied" at ', first
    )
    assert second.endswith("[builtins.KeyError]")


def parted(line: str) -> tuple[str, dict[str, str], list[str]]:
    """Message, fields and exceptions' texts of an event as text, read as it is said to be written."""
    read = json.JSONDecoder().raw_decode

    def value(rest: str, ends: str) -> tuple[str, str]:
        if rest.startswith('"'):
            text, end = read(rest)
            return text, rest[end:]
        plain = re.split(ends, rest, maxsplit=1)[0]
        return plain, rest[len(plain) :]

    head = re.match(r"\S+Z [A-Z]+ +[\w.]+: ", line)
    assert head is not None
    message, rest = value(line[head.end() :], r" [a-z_]+=| \[")
    fields, errors = {}, []
    while rest:
        if found := re.match(r" ([a-z_]+)=", rest):
            fields[found[1]], rest = value(rest[found.end() :], " ")
        else:
            kind = re.match(r" \[[\w.]+: ", rest)
            assert kind is not None, rest
            text, end = read(rest, kind.end())
            errors.append(text)
            rest = rest[rest.index("]", end) + 1 :]
    return message, fields, errors


# Letters that a field's or an exception's own signs are made of.
LOOKS = st.text('ab="[]:\\ ') | st.sampled_from(
    [" pod=kube-system/victim code=OK", 'x" pod=a', '" [a.B: "c"]', '"', ""]
)


@settings(max_examples=50)
@given(LOOKS, LOOKS, LOOKS)
@example('object "a" pod=kube-system/victim code=OK: no', "shop/web-0", "denied")
@example("a [provider.errors.AccessDenied: denied]", "x] pod=y", "no] pod=kube-system/victim [a.B: c")
def test_no_name_passes_for_a_field_of_the_text(message: str, pod: str, why: str) -> None:
    """In the text form too it is plain where a message ends and a field or an exception begins, whatever is in them."""
    with log(style="text") as told:
        LOGGER.warning("%s", message, extra={"pod": pod}, exc_info=AccessDenied(why))
    assert parted(told.text.rstrip("\n")) == (message, {"pod": pod}, [why])


def test_wrong_format_string_is_still_an_event() -> None:
    """A logging call whose arguments do not fit its text is told by its text, and raises nothing."""
    with log() as told:
        LOGGER.info("%d files of %s", "three")
    assert told.event["message"] == "%d files of %s"


def test_details_cannot_replace_the_events_own_fields() -> None:
    """A detail called like a field of the event does not take its place; odd numbers stay JSON."""
    with log() as told:
        LOGGER.info("real", extra={"severity": "fake", "time": "fake", "logger": "fake", "ratio": float("nan")})
    assert (told.event["severity"], told.event["logger"], told.event["ratio"]) == ("INFO", "provider.room", "nan")


def test_warnings_and_uncaught_exceptions_are_events() -> None:
    """Warnings, and exceptions nobody caught in the main thread, a thread or a finalizer, are events; no plain text."""

    class Finalized:
        def __del__(self) -> None:
            raise ValueError(CANARY)

    def fail() -> None:
        raise ValueError(CANARY)

    with log() as told:
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            warnings.warn("old\nnews", stacklevel=1)
        thread = threading.Thread(target=fail)
        thread.start()
        thread.join()
        Finalized()
        gc.collect()
        try:
            fail()
        except ValueError as error:
            sys.excepthook(ValueError, error, error.__traceback__)
    assert [(event["severity"], event["message"].split(":")[0]) for event in told.events[1:]] == [
        ("ERROR", "uncaught exception in a thread"),
        ("ERROR", "exception in a finalizer"),
        ("CRITICAL", "uncaught exception"),
    ]
    assert "old\\u000anews" in told.events[0]["message"]
    assert CANARY not in told.text


def test_event_loops_complaints_are_events() -> None:
    """An exception of a task that nobody awaited is an event, without the task's repr."""

    async def fail(value: str) -> None:
        raise ValueError(value)

    async def forget() -> None:
        Log.watch(asyncio.get_running_loop())
        task = asyncio.create_task(fail(CANARY), name=CANARY)
        await asyncio.wait([task])
        del task
        gc.collect()
        asyncio.get_running_loop().call_exception_handler({"message": "only a message"})

    with log() as told:
        asyncio.run(forget())
    assert [event["message"] for event in told.events] == ["Task exception was never retrieved", "only a message"]
    assert told.events[0]["exception"][0]["type"] == "builtins.ValueError"
    assert CANARY not in told.text


def test_hooks_and_handlers_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """After the log is closed, logging and the interpreter's hooks are as they were before."""
    switches = ("logThreads", "logProcesses", "logMultiprocessing", "_srcfile")
    for name in switches:
        # Whatever a log before this one left.
        monkeypatch.setattr(logging, name, logging.__file__)

    def state() -> tuple[object, ...]:
        root = logging.getLogger()
        hooks = (sys.excepthook, threading.excepthook, sys.unraisablehook, warnings.showwarning)
        asked = [vars(logging)[name] for name in switches]
        return (*root.handlers, root.level, logging.getLogger("provider").level, *hooks, *asked)

    before = state()
    with log():
        assert state() != before
    assert state() == before


def full_pipe() -> tuple[int, int]:
    """Reader and writer of a pipe that holds nothing but empty lines, and no byte more."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(writer, b"\n")
    os.set_blocking(writer, True)
    return reader, writer


def test_full_pipe_stops_nobody_and_the_loss_is_told() -> None:
    """When nobody reads stderr, logging returns at once; what was lost is counted when the reader is back."""
    reader, writer = full_pipe()
    lines: list[bytes] = []

    def read() -> None:
        with open(reader, "rb") as source:
            lines.extend(source)

    try:
        with Log("info", "json", descriptor=writer, capacity=10):
            # More than the queue holds: a call that waited would wait forever.
            for number in range(200):
                LOGGER.info("%d", number)
            thread = threading.Thread(target=read)
            thread.start()
    finally:
        os.close(writer)
    thread.join()
    events = [json.loads(line) for line in lines if line.strip()]
    lost = sum(event.get("dropped", 0) for event in events)
    assert lost > 0
    assert sum("dropped" not in event for event in events) + lost == 200


def test_stuck_reader_does_not_hold_up_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """When stderr is full and nobody reads it, the log can still be closed."""
    monkeypatch.setattr("provider.telemetry.lines.FLUSH_SECONDS", 0.05)
    reader, writer = full_pipe()
    with Log("info", "json", descriptor=writer, capacity=10):
        for number in range(200):
            LOGGER.info("%d", number)
    (stuck,) = [thread for thread in threading.enumerate() if thread.name == "log"]
    os.close(reader)
    stuck.join()
    os.close(writer)


def test_closed_stderr_stops_nobody() -> None:
    """When stderr is gone, logging goes on without an error."""
    reader, writer = os.pipe()
    os.close(reader)
    with Log("info", "json", descriptor=writer):
        LOGGER.info("into nowhere")
    os.close(writer)


# --- health -----------------------------------------------------------------------------------------------


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port: int = taken.getsockname()[1]
        return port


def get(port: int, path: str) -> int:
    """The status of a GET."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=30) as answer:
            status: int = answer.status
            return status
    except urllib.error.HTTPError as error:
        with error:
            return error.code


async def until(condition: Callable[[], bool]) -> None:
    """Wait for something that happens in its own time; a test that waits in vain is ended by pytest's watchdog."""
    while not condition():
        await asyncio.sleep(0.01)


def listens(port: int) -> bool:
    with socket.socket() as dialler:
        return dialler.connect_ex(("127.0.0.1", port)) == 0


@contextlib.asynccontextmanager
async def serving(pages: Mapping[str, Page], host: str = "127.0.0.1") -> AsyncIterator[int]:
    """These pages at a free port."""
    port = free_port()
    async with HttpServer((host, port), pages, name="health", flag="--health-addr"):
        await until(lambda: listens(port))
        yield port
    assert not listens(port)


async def talk(port: int, sent: bytes) -> bytes:
    """All that is answered to these bytes, over a connection of their own."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(sent)
    try:
        return await reader.read()
    finally:
        writer.close()


def never() -> bool:
    return False


async def status_line(port: int, path: str = "/health/ready") -> bytes:
    """The status line of the answer to a GET."""
    return (await talk(port, f"GET {path} HTTP/1.1\r\nHost: probe\r\n\r\n".encode())).split(b"\r\n")[0]


async def test_probes_are_answered_by_what_ready_says() -> None:
    """/health/ready is 503 or 200 as the server says at that moment; /health/live is 503 for a socket that is gone.

    Other paths are 404.
    """
    ready = lost = False

    async def is_ready() -> bool:
        return ready

    health = Health(is_ready, lambda: lost)
    async with serving(health.pages) as port:
        assert await asyncio.to_thread(get, port, "/health/live") == 200
        assert await asyncio.to_thread(get, port, "/health/ready") == 503
        ready = True
        assert await asyncio.to_thread(get, port, "/health/ready?verbose") == 200
        assert await asyncio.to_thread(get, port, "/") == 404
        lost = True
        assert await asyncio.to_thread(get, port, "/health/live") == 503
    await health.close()


async def test_probes_that_come_together_ask_once() -> None:
    """Ten probes at the same time put one question to the server, and all get its answer."""
    asked = 0
    release = asyncio.Event()

    async def is_ready() -> bool:
        nonlocal asked
        asked += 1
        await release.wait()
        return True

    async with serving(Health(is_ready, never).pages, host="") as port:
        requests = [asyncio.create_task(status_line(port)) for _ in range(10)]
        await until(lambda: asked == 1)
        # All ten have to be with the server before the answer is let go.
        await asyncio.gather(*(status_line(port, "/health/live") for _ in range(10)))
        release.set()
        assert await asyncio.gather(*requests) == [b"HTTP/1.1 200 OK"] * 10
        assert asked == 1


async def test_health_that_is_closed_asks_no_more() -> None:
    """A question that hangs at the end does not outlive the daemon's other parts."""
    asked = asyncio.Event()

    async def hang() -> bool:
        asked.set()
        await asyncio.get_running_loop().create_future()
        return True

    health = Health(hang, never)
    async with serving(health.pages) as port:
        request = asyncio.create_task(status_line(port))
        await asked.wait()
        await asyncio.wait_for(health.close(), 30)
    assert not [task for task in asyncio.all_tasks() if task.get_name() == "ready"]
    assert await request in (b"", b"HTTP/1.1 500 Internal Server Error")


# --- the server of all pages ------------------------------------------------------------------------------


async def echo(request: Request) -> Answer:
    """What was asked, by whom."""
    return Answer(repr((request.path, request.peer, request.headers.get("x-thing"))).encode(), headers={"X-Own": "1"})


async def test_page_is_told_what_was_asked_and_by_whom() -> None:
    """A page gets the path without its query, the headers by lower-case names and the peer's address."""
    async with serving({"/page": echo}) as port:
        answer = await talk(port, b"GET /page?a=b HTTP/1.1\r\nX-Thing:  some  \r\n\r\n")
    head, _, body = answer.partition(b"\r\n\r\n")
    assert body == b"('/page', '127.0.0.1', 'some')"
    assert {line.lower() for line in head.split(b"\r\n")[1:]} >= {
        b"content-length: %d" % len(body),
        b"content-type: text/plain; charset=utf-8",
        b"connection: close",
        b"x-own: 1",
    }


async def test_head_is_answered_without_the_body() -> None:
    """HEAD has the headers of GET, its length among them, and no body."""
    async with serving({"/page": echo}) as port:
        head, _, body = (await talk(port, b"HEAD /page HTTP/1.0\r\n\r\n")).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200 OK\r\n")
    assert b"Content-Length: 28" in head
    assert body == b""


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (b"POST /page HTTP/1.1\r\nContent-Length: 0\r\n\r\n", b"405 Method Not Allowed"),
        (b"GET /fails HTTP/1.1\r\n\r\n", b"500 Internal Server Error"),
        (b"GET /else HTTP/1.1\r\n\r\n", b"404 Not Found"),
        (b"GET /page HTTP/2.0\r\n\r\n", b"400 Bad Request"),
        (b"GET /page\r\n\r\n", b"400 Bad Request"),
        (b"GET /page HTTP/1.1\r\nno header\r\n\r\n", b"400 Bad Request"),
        (b"\x16\x03\x01\x02\x00\r\n\r\n", b"400 Bad Request"),
        (b"GET /page HTTP/1.1\r\nX: " + b"x" * http.MAX_HEAD_BYTES + b"\r\n\r\n", b"431 "),
    ],
)
async def test_what_cannot_be_answered_is_refused_and_disturbs_nobody(
    sent: bytes, status: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    """A wrong method, no HTTP, too much of it, or a page that fails gets its status; the next caller is served."""

    async def fail(request: Request) -> Answer:
        raise ValueError(CANARY)

    async with serving({"/page": echo, "/fails": fail}) as port:
        answer = await talk(port, sent)
        assert answer.startswith(b"HTTP/1.1 " + status)
        assert CANARY.encode() not in answer
        assert await status_line(port, "/page") == b"HTTP/1.1 200 OK"
    assert bool(caplog.records) == (status[:3] == b"500")


async def test_connections_that_say_nothing_keep_nobody_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many connections are held open, a probe is answered: past the bound the oldest are cut off.

    Nor does the log have a word of it, which is a traceback for each of them where asyncio has its way.
    """
    monkeypatch.setattr(http, "CONNECTION_SECONDS", 600.0)
    told: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: told.append(context))
    async with serving({"/page": echo}) as port:
        held = [await asyncio.open_connection("127.0.0.1", port) for _ in range(http.MAX_CONNECTIONS + 10)]
        for _, writer in held:
            writer.write(b"GET /page HTTP/1.1\r\nX-Slow: ")
        assert await status_line(port, "/page") == b"HTTP/1.1 200 OK"
        for reader, _ in held[:10]:
            with contextlib.suppress(ConnectionResetError):
                assert await reader.read() == b""
        # The youngest of them is still waited for.
        reader, writer = held[-1]
        writer.write(b"yes\r\n\r\n")
        assert (await reader.read()).startswith(b"HTTP/1.1 200 OK")
        for _, writer in held:
            writer.close()
    assert told == []


async def test_connections_of_one_moment_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also of those that come before the loop has begun to serve the first, the oldest are cut off."""
    monkeypatch.setattr(http, "CONNECTION_SECONDS", 600.0)
    with contextlib.ExitStack() as stack:
        async with serving({"/page": echo}) as port:
            held = []
            for _ in range(http.MAX_CONNECTIONS + 30):  # the loop sees none of them before all are there
                held.append(stack.enter_context(socket.create_connection(("127.0.0.1", port))))
            await until(lambda: select.select(held[:30], [], [], 0)[0] == held[:30])
            assert select.select(held[30:], [], [], 0)[0] == []


@pytest.mark.parametrize("sent", [b"", b"GET /large HTTP/1.1\r\n", b"GET /large HTTP/1.1\r\n\r\n"])
async def test_connection_ends_whatever_the_caller_does(sent: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """A caller who does not ask, or does not take the answer, is cut off after a time."""
    monkeypatch.setattr(http, "CONNECTION_SECONDS", 0.3)

    async def large(request: Request) -> Answer:
        return Answer(bytes(100_000_000))

    async with serving({"/large": large}) as port:
        with socket.create_connection(("127.0.0.1", port)) as held:
            held.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            held.sendall(sent)
            held.setblocking(False)

            def gone() -> bool:
                # A write to a connection that was cut off fails; until then it is lost on the server.
                try:
                    held.send(b"x")
                except (BrokenPipeError, ConnectionResetError):
                    return True
                except BlockingIOError:
                    pass
                return False

            await until(gone)


async def test_taken_port_is_told_and_tried_again(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A port that another process holds is an error in the log; it is served as soon as it is free."""
    monkeypatch.setattr(http, "RETRY_SECONDS", 0.02)
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port: int = other.getsockname()[1]
        async with HttpServer(("127.0.0.1", port), {"/page": echo}, name="metrics", flag="--metrics-addr"):
            await until(lambda: bool(caplog.records))
            assert caplog.records[0].levelno == logging.ERROR
            assert "--metrics-addr" in caplog.records[0].getMessage()
            assert caplog.records[0].__dict__["address"] == f"127.0.0.1:{port}"
            other.close()
            await until(lambda: listens(port))
            assert await asyncio.to_thread(get, port, "/page") == 200
