"""The connections to one server: a bounded number, opened when they are needed, kept for the next request."""

from __future__ import annotations

import asyncio
import contextlib
import re
import socket
import ssl
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final
from urllib.parse import quote

import aiohappyeyeballs

from provider import __version__
from provider.http.allowance import Allowance
from provider.http.connection import Connection, Response
from provider.http.failures import (
    ConnectFailed,
    ExchangeBroken,
    HttpFailure,
    LookupFailed,
    NotConnected,
    ProxyFailed,
    TlsFailed,
    reason,
)
from provider.http.lookups import Lookups

# Idle connections are ours to close, before a load balancer does it (60 s is the common least) in the middle of a
# request. Shorter than kubelet's cadence, longer than a burst.
KEEPALIVE_SECONDS: Final = 30.0
# How long one of a host's addresses is tried before the next is tried beside it (RFC 8305 section 8).
NEXT_ADDRESS_SECONDS: Final = 0.25
# A peer that went away without a word, as behind a load balancer that forgot the connection, is found within 25 s by
# the kernel; one that takes its time to answer acknowledges what it was sent, and is left alone (tcp(7)).
_FIND_SILENCE: Final = (
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 10),
    (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 5),
    (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3),
    (socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 25_000),  # milliseconds
)
# A proxy answers a request for a tunnel with little more than a status.
MAX_PROXY_ANSWER: Final = 64 * 1024

_EVERY_REQUEST: Final = {"User-Agent": f"vault-csi-provider/{__version__}", "Accept-Encoding": "identity"}
# Methods without a body have no length to tell. LIST is Vault's own.
_BODILESS: Final = frozenset({"GET", "LIST"})
_BREAK: Final = re.compile(r"[\r\n\0]")
_ILLEGAL: Final = re.compile(r"[\x00-\x20\x7f]")


@dataclass(frozen=True, slots=True)
class Proxy:
    """A proxy. ``tls`` is None where it is reached without; ``authorization`` is "" or a whole header's value."""

    host: str
    port: int
    tls: ssl.SSLContext | None = None
    authorization: str = field(default="", repr=False)


@dataclass(frozen=True, slots=True)
class Origin:
    """A server. ``tls`` is None for plain HTTP; ``server_name`` is whom its certificate must be for, "" for the host.

    With a ``socket_path`` it listens there, and ``host`` is only what it is called.
    """

    host: str
    port: int
    tls: ssl.SSLContext | None = None
    server_name: str = ""
    socket_path: str = ""
    proxy: Proxy | None = None

    @property
    def authority(self) -> str:
        """Host and port, for a Host header; the port only where it is not the scheme's own."""
        return _authority(self.host, self.port, default=443 if self.tls else 80)


class Pool:
    """At most ``limit`` connections to ``origin``; whoever finds none free waits, first come, first served.

    ``connect_seconds`` bound how long one connection may take to come about, TLS and a proxy's tunnel included;
    ``headers`` go with every request. An ``allowance`` is shared with other pools. For one event loop.
    """

    def __init__(
        self,
        origin: Origin,
        *,
        lookups: Lookups,
        limit: int,
        connect_seconds: float,
        headers: Mapping[str, str] | None = None,
        allowance: Allowance | None = None,
    ) -> None:
        self._origin = origin
        self._lookups = lookups
        self._limit = limit
        self._allowance = allowance or Allowance(limit)
        self._connect_seconds = connect_seconds
        fixed = {"Host": origin.authority}
        self._before_path = ""
        proxy = origin.proxy
        if proxy is not None and origin.tls is None:
            # RFC 9112 section 3.2.2: a proxy is told the whole URL.
            self._before_path = f"http://{origin.authority}"
            fixed |= _authorization(proxy)
        self._fixed = _lines({**fixed, **_EVERY_REQUEST, **(headers or {})})
        self._idle: deque[Connection] = deque()  # in the order in which they came to rest
        self._waiting: deque[asyncio.Future[Connection | None]] = deque()
        self._live: set[Connection] = set()
        self._open = 0  # those, and those that are about to be
        self._expected = 0
        self._arriving = 0  # connections that are opened for requests to come
        self._tasks: set[asyncio.Task[None]] = set()
        self._closed = False
        self._reaping: asyncio.TimerHandle | None = None

    async def request(
        self, method: str, path: str, headers: Mapping[str, str], body: bytes | None = None, *, limit: int
    ) -> Response:
        """Send a request, once, and read its answer until it is whole or its body is larger than ``limit`` bytes.

        ``path`` begins with a slash and is percent-encoded, query included. A body is JSON.

        Raises HttpFailure; ValueError where a header or the path cannot be sent as it is.
        """
        request = self._head(method, path, headers, body)
        connection = await self._take()
        if self._expected:
            self._open_ahead()
        return await connection.exchange(request + body if body else request, limit)

    def expect(self, requests: int) -> None:
        """So many requests will follow the next one's answer: have connections for them by then.

        They are opened while that request is under way, and so only to a server that has just taken a connection.
        """
        self._expected = max(self._expected, requests)

    def close(self) -> None:
        """Let go of the connections: idle ones now, each other one with its answer. A later request opens new ones."""
        self._closed = True
        if self._reaping is not None:
            self._reaping.cancel()
            self._reaping = None
        while self._idle:
            self._idle.pop().abort()

    def _head(self, method: str, path: str, headers: Mapping[str, str], body: bytes | None) -> bytes:
        """The request, up to its body."""
        if _ILLEGAL.search(method + path):
            raise ValueError("a method or a path has a line break or a space")
        head = f"{method} {self._before_path}{path} HTTP/1.1\r\n{self._fixed}{_lines(headers)}"
        if body is not None:
            head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n"
        elif method not in _BODILESS:
            head += "Content-Length: 0\r\n"  # RFC 9110 section 8.6
        return f"{head}\r\n".encode()

    # -- connections -----------------------------------------------------------------------------------------------

    async def _take(self) -> Connection:
        """A connection at rest, or a new one."""
        while True:
            while self._idle:
                connection = self._idle.pop()  # the last that came to rest; the others may have rested long enough
                self._allowance.taken(connection)
                if connection.usable:
                    return connection
            if self._open < self._limit and self._arriving <= len(self._waiting):
                self._take_place()
                return await self._connect()
            handed = await self._turn()
            if handed is None:
                return await self._connect()
            if handed.usable:
                return handed

    def _open_ahead(self) -> None:
        """Open what is expected to be needed besides the connection that is in use now."""
        needed, self._expected = self._expected - 1 - len(self._idle) - self._arriving, 0
        for _ in range(min(needed, self._limit - self._open, self._allowance.spare)):
            self._take_place()
            self._arriving += 1
            task = asyncio.create_task(self._arrive())
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _arrive(self) -> None:
        try:
            connection = await self._connect()
        except HttpFailure:
            return  # whoever needs it connects by itself, and is told why not
        finally:
            self._arriving -= 1
        self._at_rest(connection)

    async def _turn(self) -> Connection | None:
        """Wait for a connection that comes to rest, or None: for the place of one that is gone."""
        turn: asyncio.Future[Connection | None] = asyncio.get_running_loop().create_future()
        self._waiting.append(turn)
        try:
            return await turn
        except asyncio.CancelledError:
            if turn.cancelled():
                with contextlib.suppress(ValueError):  # passed over already
                    self._waiting.remove(turn)
            else:  # it had its turn already
                self._pass_on(turn.result())
            raise

    def _pass_on(self, handed: Connection | None) -> None:
        if handed is None:
            self._place_free()
        elif handed.usable:
            self._at_rest(handed)

    def _at_rest(self, connection: Connection) -> None:
        """An answer has come whole: whoever waits has the connection next."""
        turn = self._next_turn()
        if turn is not None:
            turn.set_result(connection)
        elif self._closed:
            connection.abort()
        else:
            loop = asyncio.get_running_loop()
            connection.rested_at = loop.time()
            self._idle.append(connection)
            self._allowance.rests(connection)
            if self._reaping is None:
                self._reaping = loop.call_later(KEEPALIVE_SECONDS, self._reap)

    def _lost(self, connection: Connection) -> None:
        if connection not in self._live:
            return  # it never came about, or not whole
        self._live.remove(connection)
        self._allowance.taken(connection)
        with contextlib.suppress(ValueError):
            self._idle.remove(connection)
        self._place_free()

    def _take_place(self) -> None:
        """A connection is about to be opened."""
        self._open += 1
        self._allowance.opened()

    def _place_free(self) -> None:
        """A connection is gone: whoever waits may open one."""
        turn = self._next_turn()
        if turn is not None:
            turn.set_result(None)
        else:
            self._open -= 1
            self._allowance.closed()

    def _next_turn(self) -> asyncio.Future[Connection | None] | None:
        while self._waiting:
            turn = self._waiting.popleft()
            if not turn.done():
                return turn
        return None

    def _reap(self) -> None:
        """Close what has rested for long enough."""
        loop = asyncio.get_running_loop()
        self._reaping = None
        while self._idle and self._idle[0].rested_at + KEEPALIVE_SECONDS <= loop.time():
            self._idle.popleft().abort()
        if self._idle:
            self._reaping = loop.call_at(self._idle[0].rested_at + KEEPALIVE_SECONDS, self._reap)

    async def _connect(self) -> Connection:
        """A new connection, for which a place is held."""
        limit = asyncio.timeout(self._connect_seconds)
        try:
            async with limit:
                connection = await self._open_connection()
            if not connection.usable:
                raise ConnectFailed("the connection was closed")
        except BaseException as error:
            self._place_free()
            if isinstance(error, TimeoutError) and limit.expired():
                late = ProxyFailed if self._origin.proxy else ConnectFailed
                raise late(f"no connection in {self._connect_seconds:g} s") from error
            raise
        self._live.add(connection)
        return connection

    async def _open_connection(self) -> Connection:
        origin, loop = self._origin, asyncio.get_running_loop()
        connection = Connection(self._at_rest, self._lost)
        if origin.socket_path:
            try:
                await loop.create_unix_connection(lambda: connection, origin.socket_path)
            except (OSError, ValueError) as error:  # a path that is none
                raise ConnectFailed(reason(error)) from error
            return connection
        server_name = origin.server_name or origin.host
        if origin.tls is not None:
            try:
                # Before there is a connection: what the event loops make of such a name is not the same.
                origin.tls.wrap_bio(ssl.MemoryBIO(), ssl.MemoryBIO(), server_hostname=server_name)
            except (ValueError, ssl.SSLError) as error:
                raise TlsFailed("no certificate can be for its name") from error
        proxy = origin.proxy
        if proxy is None:
            await self._connect_to(connection, origin.host, origin.port, origin.tls, server_name)
            return connection
        hop = connection if origin.tls is None else Connection(_nobody, _nobody)
        try:
            await self._connect_to(hop, proxy.host, proxy.port, proxy.tls, proxy.host)
            if origin.tls is None:
                return connection
            await self._tunnel(hop, proxy)
        except (NotConnected, ExchangeBroken) as error:
            hop.abort()
            raise ProxyFailed(str(error)) from error
        except TlsFailed as error:
            raise TlsFailed(f"at the proxy: {error}") from error
        try:
            tls = await loop.start_tls(hop.detach(), connection, origin.tls, server_hostname=server_name)
        except OSError as error:
            raise _not_connected(error) from error
        if tls is None:
            raise ConnectFailed("the connection was closed")
        connection.connection_made(tls)
        return connection

    async def _connect_to(
        self, connection: Connection, host: str, port: int, tls: ssl.SSLContext | None, server_name: str
    ) -> None:
        try:
            addresses = await self._lookups.find(host, port)
        except OSError as error:
            raise LookupFailed(reason(error)) from error
        try:
            opened = await aiohappyeyeballs.start_connection(addresses, happy_eyeballs_delay=NEXT_ADDRESS_SECONDS)
        except OSError as error:
            raise ConnectFailed(reason(error)) from error
        try:
            opened.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            for level, option, value in _FIND_SILENCE:
                opened.setsockopt(level, option, value)
            await asyncio.get_running_loop().create_connection(
                lambda: connection, sock=opened, ssl=tls, server_hostname=server_name if tls else None
            )
        except OSError as error:
            raise _not_connected(error) from error

    async def _tunnel(self, hop: Connection, proxy: Proxy) -> None:
        """Have the proxy lead on to the server (RFC 9110 section 9.3.6)."""
        to = _authority(self._origin.host, self._origin.port)
        request = f"CONNECT {to} HTTP/1.1\r\n{_lines({'Host': to, **_authorization(proxy)})}\r\n".encode()
        response = await hop.exchange(request, MAX_PROXY_ANSWER, tunnel=True)
        if not 200 <= response.status < 300:
            raise ProxyFailed(f"it answered {response.status}")


def _lines(headers: Mapping[str, str]) -> str:
    """Headers as they are sent. Raises ValueError for a line break in one: it would be another header, or more."""
    lines = ""
    for name, value in headers.items():
        line = f"{name}: {value}"
        if _BREAK.search(line):
            raise ValueError(f"the header {name!r} has a line break")
        lines += f"{line}\r\n"
    return lines


def _not_connected(error: OSError) -> HttpFailure:
    return TlsFailed(reason(error)) if isinstance(error, ssl.SSLError) else ConnectFailed(reason(error))


def _authority(host: str, port: int, *, default: int | None = None) -> str:
    named = f"[{host}]" if ":" in host else host if host.isascii() else _in_ascii(host)
    return named if port == default else f"{named}:{port}"


def _in_ascii(host: str) -> str:
    try:
        return host.encode("idna").decode()
    except UnicodeError:
        return quote(host, errors="replace")  # no name that can be looked up, which is told then


def _authorization(proxy: Proxy) -> dict[str, str]:
    return {"Proxy-Authorization": proxy.authorization} if proxy.authorization else {}


def _nobody(_: Connection) -> None:
    """Nobody waits for a connection that a tunnel goes through."""
