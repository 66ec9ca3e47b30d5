"""A TCP proxy that makes a server far away: a settable round-trip time, and a count of the requests that pass.

`python -m tests.stand.latency DIRECTORY HOST PORT` is the proxy itself, a process of its own so that what it costs
falls on neither side. It speaks HTTP/1.1 only as far as it takes to tell one request from the next.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import ctypes
import heapq
import json
import os
import shutil
import socket
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, cast
from urllib.parse import urlsplit

import uvloop

from tests.stand.process import Process, StandError
from tests.stand.waiting import eventually

_ROOT = Path(__file__).parents[2]
_CONTROL = "control"
_TIMER_NONBLOCK = os.O_NONBLOCK | os.O_CLOEXEC
_ABSOLUTE = 1  # TFD_TIMER_ABSTIME, timerfd_create(2)


@dataclass(frozen=True)
class Passed:
    """What went through the proxy since it was asked to forget.

    `requests` is by (method, path without query); `connections` were opened, at most `most_open` at a time.
    """

    requests: dict[tuple[str, str], int]
    connections: int
    most_open: int

    def under(self, prefix: str) -> int:
        """The requests whose path begins with `/v1/` and `prefix`."""
        return sum(count for (_, path), count in self.requests.items() if path.startswith(f"/v1/{prefix}"))

    @property
    def total(self) -> int:
        """All requests."""
        return sum(self.requests.values())


class LatencyProxy:
    """A proxy process before the server at `address` (`http://host:port`), used as a context manager.

    `round_trip` is in seconds: half of it is added each way, in order, and a whole one before the first bytes of a
    new connection, as its handshake would take. Nothing is added at 0.
    """

    def __init__(self, address: str, *, round_trip: float = 0.0) -> None:
        parts = urlsplit(address)
        if parts.scheme != "http" or parts.hostname is None or parts.port is None:
            raise ValueError(f"the proxy reads requests, so it takes http://host:port and not {address}")
        self._upstream = (parts.hostname, parts.port)
        self._round_trip = round_trip
        self._directory = Path()
        self._process: Process | None = None
        self._control: socket.socket | None = None
        self._port = 0

    def __enter__(self) -> Self:
        self._directory = Path(tempfile.mkdtemp(prefix="stand-latency-"))
        try:
            argv = [sys.executable, "-m", __name__, str(self._directory), self._upstream[0], str(self._upstream[1])]
            process = self._process = Process(argv, log=self._directory / "proxy.log", cwd=_ROOT)
            path = self._directory / _CONTROL
            eventually(lambda: path.exists() or not process.running, "the proxy listens")
            if not process.running:
                raise StandError(f"the proxy ended at its start:\n{process.log_tail()}")
            self._control = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            self._control.settimeout(30)
            self._control.connect(str(path))
            self._port = self._ask("port")
            self.delay(self._round_trip)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if self._control is not None:
            self._control.close()
        if self._process is not None:
            self._process.kill()
        shutil.rmtree(self._directory, ignore_errors=True)

    @property
    def address(self) -> str:
        """`http://127.0.0.1:PORT`, which stands for the server's."""
        return f"http://127.0.0.1:{self._port}"

    def delay(self, round_trip: float) -> None:
        """Add this round-trip time, in seconds, to what comes from now on."""
        self._ask("delay", round_trip)

    def passed(self) -> Passed:
        """What went through since the last `forget`."""
        answer = self._ask("passed")
        requests = {(method, path): count for method, path, count in answer["requests"]}
        return Passed(requests, answer["connections"], answer["most_open"])

    def forget(self) -> None:
        """Begin the count anew; connections that are open now count as opened."""
        self._ask("forget")

    def _ask(self, *question: object) -> Any:
        assert self._control is not None  # Used as a context manager.
        self._control.sendall(json.dumps(question).encode() + b"\n")
        answer = b""
        while not answer.endswith(b"\n"):
            received = self._control.recv(65536)
            if not received:
                raise StandError("the proxy ended")
            answer += received
        return json.loads(answer)


# The process -------------------------------------------------------------------------------------------


class RequestCounter:
    """Tells the requests in one connection's bytes; `count` is called with method and path of each.

    Raises ValueError for what is not HTTP/1.1 with bodies of a stated length, which is all that Vault's clients send.
    """

    def __init__(self, count: collections.Counter[tuple[str, str]]) -> None:
        self._count = count
        self._head = b""
        self._body_left = 0

    def feed(self, data: bytes) -> None:
        """Take the connection's next bytes."""
        while data:
            if self._body_left:
                skipped = min(self._body_left, len(data))
                self._body_left -= skipped
                data = data[skipped:]
                continue
            head, end, data = (self._head + data).partition(b"\r\n\r\n")
            if not end:
                self._head = head
                return
            self._head = b""
            self._read_head(head.decode("latin-1"))

    def _read_head(self, head: str) -> None:
        first, *lines = head.split("\r\n")
        method, target, version = first.split(" ") if first.count(" ") == 2 else ("", "", "no request line")
        fields = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        if version != "HTTP/1.1" or "transfer-encoding" in fields:
            raise ValueError(f"a request that this proxy cannot count: {version}")
        self._body_left = int(fields.get("content-length", "0"))
        self._count[method, target.partition("?")[0]] += 1


class _Delay:
    """Runs calls after a delay, in the order of their times, to some ten microseconds.

    Of a timer of its own, since those of event loops go by milliseconds: a delay of 2.5 ms would come out as 2 or 3.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._timer = self._libc.timerfd_create(time.CLOCK_MONOTONIC, _TIMER_NONBLOCK)
        if self._timer < 0:
            raise OSError(ctypes.get_errno(), "timerfd_create failed")
        self._waiting: list[tuple[float, int, Any, bytes | None]] = []
        self._number = 0
        self._armed = float("inf")
        loop.add_reader(self._timer, self._due)

    def at(self, when: float, end: _End, data: bytes | None) -> None:
        """Pass `data` (None: the end of it) on to `end` at `when`, in time.monotonic()'s seconds."""
        self._number += 1
        heapq.heappush(self._waiting, (when, self._number, end, data))
        if when < self._armed:
            self._arm(when)

    def _arm(self, when: float) -> None:
        self._armed = when
        nanoseconds = max(1, round(when * 1e9))
        # struct itimerspec: no interval, and the absolute time of the first expiry.
        spec = (ctypes.c_long * 4)(0, 0, nanoseconds // 10**9, nanoseconds % 10**9)
        if self._libc.timerfd_settime(self._timer, _ABSOLUTE, spec, None) != 0:
            raise OSError(ctypes.get_errno(), "timerfd_settime failed")

    def _due(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.read(self._timer, 8)
        self._armed = float("inf")
        while self._waiting and self._waiting[0][0] <= time.monotonic():
            _, _, end, data = heapq.heappop(self._waiting)
            end.deliver(data)
        if self._waiting:
            self._arm(self._waiting[0][0])


class _Proxy:
    def __init__(self, loop: asyncio.AbstractEventLoop, upstream: tuple[str, int]) -> None:
        self.loop = loop
        self.upstream = upstream
        self.round_trip = 0.0
        self.later = _Delay(loop)
        self.requests: collections.Counter[tuple[str, str]] = collections.Counter()
        self.open = self.connections = self.most_open = 0

    def opened(self) -> None:
        self.open += 1
        self.connections += 1
        self.most_open = max(self.most_open, self.open)

    def answer(self, question: list[Any]) -> Any:
        if question[0] == "delay":
            self.round_trip = float(question[1])
        elif question[0] == "forget":
            self.requests.clear()
            self.connections = self.most_open = self.open
        elif question[0] == "passed":
            return {
                "requests": [[*key, count] for key, count in self.requests.items()],
                "connections": self.connections,
                "most_open": self.most_open,
            }
        return None


class _End(asyncio.Protocol):
    """One end of a connection through the proxy: what it receives goes to `other`, later."""

    def __init__(self, proxy: _Proxy) -> None:
        self._proxy = proxy
        self._transport: asyncio.Transport | None = None
        self._kept: list[bytes | None] = []
        self._free_at = 0.0
        self.other: _End | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's are of no class of asyncio's
        transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        kept, self._kept = self._kept, []
        for data in kept:
            self.deliver(data)

    def data_received(self, data: bytes) -> None:
        self._pass_on(data)

    def connection_lost(self, exc: Exception | None) -> None:
        self._pass_on(None)

    def _pass_on(self, data: bytes | None) -> None:
        assert self.other is not None
        half = self._proxy.round_trip / 2
        if half <= 0 and self._free_at <= 0:
            self.other.deliver(data)
            return
        # Never before what came before it, whatever the delay was then.
        self._free_at = max(self._free_at, time.monotonic() + half)
        self._proxy.later.at(self._free_at, self.other, data)

    def deliver(self, data: bytes | None) -> None:
        """Send it out at this end; None closes."""
        if self._transport is None:
            self._kept.append(data)
        elif data is None:
            self._transport.close()
        else:
            self._transport.write(data)


class _Client(_End):
    """The end at which the client dialled."""

    def __init__(self, proxy: _Proxy) -> None:
        super().__init__(proxy)
        self._counter = RequestCounter(proxy.requests)
        self._dialling: asyncio.Task[None] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self._proxy.opened()
        self.other = _End(self._proxy)
        self.other.other = self
        if self._proxy.round_trip > 0:
            # The kernel accepts at once; over a network, the first bytes leave a round trip later.
            self._free_at = time.monotonic() + self._proxy.round_trip * 1.5
        self._dialling = self._proxy.loop.create_task(self._dial(self.other))

    async def _dial(self, server: _End) -> None:
        try:
            await self._proxy.loop.create_connection(lambda: server, *self._proxy.upstream)
        except OSError:
            self.deliver(None)

    def data_received(self, data: bytes) -> None:
        try:
            self._counter.feed(data)
        except ValueError as error:
            print(error, file=sys.stderr)
            self.deliver(None)
            return
        super().data_received(data)

    def connection_lost(self, exc: Exception | None) -> None:
        self._proxy.open -= 1
        super().connection_lost(exc)


async def _serve(directory: Path, host: str, port: int) -> None:
    loop = asyncio.get_running_loop()
    proxy = _Proxy(loop, (host, port))
    server = await loop.create_server(lambda: _Client(proxy), "127.0.0.1", 0, backlog=1024)
    own_port = server.sockets[0].getsockname()[1]

    async def control(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while line := await reader.readline():
            question = json.loads(line)
            answer = own_port if question[0] == "port" else proxy.answer(question)
            writer.write(json.dumps(answer).encode() + b"\n")
        writer.close()

    # Renamed into place, so that who finds it can dial it.
    fresh = directory / f"{_CONTROL}.new"
    # Held, since the loop does not: a server that nobody has is closed by the next garbage collection.
    async with await asyncio.start_unix_server(control, fresh):
        fresh.rename(directory / _CONTROL)
        await server.serve_forever()


def main(directory: str, host: str, port: str) -> None:
    """Be the proxy until killed."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_serve(Path(directory), host, int(port)))


if __name__ == "__main__":
    main(*sys.argv[1:])
