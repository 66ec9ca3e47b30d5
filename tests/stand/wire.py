"""A raw HTTP server that sends what a test tells it to, a pool that asks it, and the event loops to do so on."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import gc
import inspect
import re
import ssl
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import pytest
import uvloop

from provider.http import Allowance, Lookups, Origin, Pool, Response
from tests.stand.pki import Authority

OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
SECRET = "hvs.canary-of-a-token"  # what must be shown nowhere

Serve = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Coroutine[None, None, None]]
_C = TypeVar("_C", bound=type)
# The daemon's, and the one whose sockets and errors uvloop's only resemble.
_LOOPS = {"asyncio": asyncio.new_event_loop, "uvloop": uvloop.new_event_loop}


def on_loops(test: Callable[..., Coroutine[None, None, None]], *names: str) -> Callable[..., None]:
    """A method that tests, run on these event loops; an exception that nobody retrieved fails it too."""

    @functools.wraps(test)
    def run(self: object, loop_factory: Callable[[], asyncio.AbstractEventLoop], *args: Any, **kwargs: Any) -> None:
        async def whole() -> None:
            asyncio.get_running_loop().set_exception_handler(lambda _, context: told.append(context))
            await test(self, *args, **kwargs)

        told: list[dict[str, Any]] = []
        with asyncio.Runner(loop_factory=loop_factory) as runner:
            runner.run(whole())
            gc.collect(1)  # of what is young; all would take longer than the test
        if told:
            pytest.fail(f"the event loop was told of {told}")

    own = inspect.signature(test)
    itself, *others = own.parameters.values()
    loop = inspect.Parameter("loop_factory", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    run.__signature__ = own.replace(parameters=[itself, loop, *others])  # type: ignore[attr-defined]  # as pytest reads
    factories = [_LOOPS[name] for name in names]
    marked: Callable[..., None] = pytest.mark.parametrize("loop_factory", factories, ids=names)(run)
    return marked


def on_both_loops(test: Callable[..., Coroutine[None, None, None]]) -> Callable[..., None]:
    """The same on all event loops there are."""
    return on_loops(test, *_LOOPS)


def both_loops(tests: _C) -> _C:
    """A class whose coroutines that test run on either event loop."""
    for name, value in [*vars(tests).items()]:
        if name.startswith("test") and inspect.iscoroutinefunction(value):
            setattr(tests, name, on_both_loops(value))
    return tests


@dataclass
class Server:
    """A server; what came to it, connection by connection, and how many requests it had at one time at most."""

    port: int = 0
    accepted: int = 0
    heads: list[str] = field(default_factory=list)
    peak: int = 0
    current: int = 0
    idle: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        self.idle.set()

    async def request(self, reader: asyncio.StreamReader) -> str:
        """The head of the next request; the body, if there is any, is read too."""
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        length = re.search(r"Content-Length: (\d+)", head)
        if length:
            await reader.readexactly(int(length[1]))
        self.heads.append(head)
        return head


@contextlib.asynccontextmanager
async def serving(serve: Serve, server: Server, tls: ssl.SSLContext | None = None) -> AsyncIterator[Server]:
    """A server on a loopback port that does this with each connection, and closes it then."""
    tasks: set[asyncio.Task[None]] = set()

    async def attend(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            with contextlib.suppress(OSError, asyncio.IncompleteReadError):
                await serve(reader, writer)
        finally:
            if not writer.is_closing():
                writer.transport.abort()

    def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        # A task of our own: where asyncio makes it from a coroutine, some releases tell the loop of its cancellation.
        server.accepted += 1
        task = asyncio.create_task(attend(reader, writer))
        tasks.add(task)
        task.add_done_callback(tasks.discard)

    listener = await asyncio.start_server(accept, "127.0.0.1", server.port, ssl=tls)
    server.port = listener.sockets[0].getsockname()[1]
    try:
        yield server
    finally:
        listener.close()
        for task in list(tasks):
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.sleep(0.01)  # what was aborted is closed


@contextlib.asynccontextmanager
async def answering(
    *answers: bytes, end: bool = False, tls: ssl.SSLContext | None = None, port: int = 0
) -> AsyncIterator[Server]:
    """A server that answers its first requests with these bytes and others with OK.

    With ``end`` it closes the connection after each of ``answers``, else it keeps it open.
    """
    server = Server(port)
    left = list(answers)

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            await server.request(reader)
            server.current += 1
            server.idle.clear()
            server.peak = max(server.peak, server.current)
            own = bool(left)
            writer.write(left.pop(0) if own else OK)
            try:
                await writer.drain()
                if own and end:
                    writer.write_eof() if writer.can_write_eof() else writer.close()
                    return
                await asyncio.sleep(0.002)
            finally:
                server.current -= 1
                if not server.current:
                    server.idle.set()

    async with serving(serve, server, tls) as running:
        yield running


def pool_of(
    port: int,
    *,
    limit: int = 1,
    host: str = "127.0.0.1",
    seconds: float = 10,
    allowance: Allowance | None = None,
    **origin: Any,
) -> Pool:
    server = Origin(host, port, **origin)
    return Pool(server, lookups=Lookups(), limit=limit, connect_seconds=seconds, allowance=allowance)


async def get(pool: Pool, path: str = "/x", *, limit: int = 1_000_000) -> Response:
    """Read; one that hangs fails."""
    async with asyncio.timeout(20):
        return await pool.request("GET", path, {"X-Vault-Token": SECRET}, limit=limit)


async def assert_one_place(pool: Pool, server: Server) -> None:
    """The pool of limit 1 has its place, and only that: three that ask at one time are served one after another."""
    async with asyncio.timeout(20):
        await server.idle.wait()
    server.peak = 0
    for response in await asyncio.gather(get(pool), get(pool), get(pool)):
        assert (response.status, bytes(response.body), response.whole) == (200, b"ok", True)
    assert server.peak == 1


async def settle() -> None:
    """Let what is due be done."""
    for _ in range(20):
        await asyncio.sleep(0.001)


def server_tls(authority: Authority, tmp_path: Path, *hosts: str) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*authority.server(hosts or ("127.0.0.1", "localhost")).write(tmp_path, "server"))
    return context


def client_tls(authority: Authority) -> ssl.SSLContext:
    return ssl.create_default_context(cadata=authority.pem.decode())
