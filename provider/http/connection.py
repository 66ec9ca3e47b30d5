"""One connection, which sends a request and reads its answer, one after the other, in bounds."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Callable
from typing import Final, cast

import httptools

from provider.http.failures import ConnectFailed, ExchangeBroken, HttpFailure, TlsFailed, reason

# A server sends no 1xx unasked, a proxy perhaps one or two before an answer.
MAX_INFORMATIONAL: Final = 10
# What an answer may have besides its body: headers, and what marks its chunks, which Go's servers make of 2 KiB and
# more. Bodies in chunks of a byte, or chunks with long extensions, cost a hundred times the CPU of what they carry.
# More than twice what one read of a socket brings, which is parsed as a whole.
MAX_FRAME_BYTES: Final = 768 * 1024
# Of headers alone, which are held for as long as the body takes: Go's servers send no more than a tenth of it.
MAX_HEAD_BYTES: Final = 64 * 1024
# Vault and the Kubernetes API send some twenty. Each is three objects of Python's, forty times the bytes it came in.
MAX_HEADERS: Final = 256

_LARGE_HEAD: Final = f"its headers are larger than {MAX_HEAD_BYTES // 1024} KiB"
_DELIMITED: Final = frozenset({b"content-length", b"transfer-encoding"})


class Response:
    """What was answered. ``body`` is all of it if ``whole``, else what came until it was too much."""

    __slots__ = ("_connection", "body", "headers", "status", "whole")

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self.status = 0
        self.headers: list[tuple[bytes, bytes]] = []
        self.body = bytearray()
        self.whole = False

    def header(self, name: str) -> str | None:
        """The first header of this name, in whatever case; None where there is none."""
        wanted = name.lower().encode()
        for key, value in self.headers:
            if key.lower() == wanted:
                return value.decode("latin-1")
        return None

    async def read_on(self, limit: int) -> None:
        """Read until it is whole, or its body is larger than ``limit`` bytes. Raises HttpFailure."""
        if not self.whole:
            await self._connection.read_on(self, limit)

    def close(self) -> None:
        """Do without the rest, if there is any; the connection cannot be used again then."""
        if not self.whole:
            self._connection.abort()


class Connection(asyncio.Protocol):
    """``at_rest`` is called when an answer has come and another request may be sent; ``lost``, once, at its end."""

    def __init__(self, at_rest: Callable[[Connection], None], lost: Callable[[Connection], None]) -> None:
        self._at_rest = at_rest
        self._lost = lost
        self._transport: asyncio.Transport | None = None
        self._parser: httptools.HttpResponseParser | None = None  # it refers to us, so only for as long as it is used
        self._aborted = False
        # Of the request that is under way:
        self._response: Response | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._failure: HttpFailure | None = None
        self._limit = 0
        self._taken = self._head = 0
        self._informational = 0
        self._tunnel = self._headed = self._complete = self._reusable = False
        self._fault = ""
        self.rested_at = 0.0
        """When it was last given back, in the event loop's time."""

    @property
    def usable(self) -> bool:
        """Whether another request can be sent on it, as far as is known."""
        return self._transport is not None and not self._transport.is_closing()

    async def exchange(self, request: bytes, limit: int, *, tunnel: bool = False) -> Response:
        """Send ``request`` and read its answer, to the end or until its body is larger than ``limit`` bytes.

        The answer to a request for a ``tunnel`` ends with its headers, if it is one of success.

        Raises HttpFailure. Cancelled, or failed, it closes the connection.
        """
        transport = self._transport
        if transport is None or transport.is_closing():
            raise ConnectFailed("the connection was closed")
        response = self._response = Response(self)
        self._tunnel, self._headed, self._complete, self._reusable = tunnel, False, False, False
        self._taken = self._informational = self._head = 0
        transport.write(request)
        await self._wait(response, limit)
        return response

    async def read_on(self, response: Response, limit: int) -> None:
        """Read on where ``exchange`` or this came to its limit. Raises HttpFailure."""
        transport = self._transport
        if transport is None or self._response is not response:
            raise self._failure or ExchangeBroken("the connection was closed")
        if len(response.body) <= limit:
            transport.resume_reading()
            await self._wait(response, limit)

    def detach(self) -> asyncio.Transport:
        """The transport, for another protocol, after the answer to a request for a tunnel."""
        transport, self._transport = self._transport, None
        self._parser = None
        if transport is None:
            raise ExchangeBroken("the connection was closed")
        return transport

    def abort(self) -> None:
        """Close it at once, or as soon as it is there. Nobody may wait for an answer."""
        self._aborted = True
        self._response = None
        if self._transport is not None:
            self._transport.abort()

    async def _wait(self, response: Response, limit: int) -> None:
        self._limit = limit
        # In no variable of this frame: a failure refers to the frame, and the future to the failure.
        self._waiter = asyncio.get_running_loop().create_future()
        try:
            await self._waiter
        except BaseException:
            if self._response is response:  # else the answer had come, and the connection may be another's by now
                self.abort()
            raise

    # -- what the event loop tells ---------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """It is there."""
        self._transport = cast("asyncio.Transport", transport)  # uvloop's are none of its subclasses
        self._parser = httptools.HttpResponseParser(self)
        if self._aborted:
            self._transport.abort()

    def data_received(self, data: bytes) -> None:
        """Bytes came."""
        response, parser = self._response, self._parser
        if response is None or parser is None:
            self.abort()  # nobody asked
            return
        try:
            parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            self._fail(ExchangeBroken("it answered in another protocol"))
            return
        except httptools.HttpParserError:
            # Its text quotes what came, and that may quote us.
            self._fail(ExchangeBroken("what it sent is not HTTP"))
            return
        self._taken += len(data)
        if self._fault:
            self._fail(ExchangeBroken(self._fault))
        elif not self._headed and self._taken > 2 * MAX_HEAD_BYTES:
            self._fail(ExchangeBroken(_LARGE_HEAD))
        elif self._taken - len(response.body) > MAX_FRAME_BYTES:
            self._fail(ExchangeBroken("its answer has more frame than body"))
        elif self._complete:
            self._finish(response)
        elif len(response.body) > self._limit and self._transport is not None:
            self._transport.pause_reading()
            self._resolve()

    def connection_lost(self, error: Exception | None) -> None:
        """It is no more."""
        response = self._response
        self._transport = None
        if response is not None:
            # RFC 9112 section 6.3: its end is the connection's. A refusal's words may be cut: its status says enough.
            if self._headed and not _is_delimited(response) and (error is None or response.status >= 400):
                self._finish(response)
            elif self._headed:
                self._fail(ExchangeBroken("its answer broke off"))
            elif isinstance(error, ssl.SSLError):
                self._fail(TlsFailed(reason(error)))
            else:
                self._fail(ExchangeBroken(reason(error) if error else "it closed the connection"))
        self._parser = None
        self._lost(self)

    # -- what the parser tells -------------------------------------------------------------------------------------

    def on_message_begin(self) -> None:
        """An answer begins."""
        if self._complete:
            self._fault = "it answered more than it was asked"

    def on_header(self, name: bytes, value: bytes) -> None:
        """A header; or a trailer, which is no header (RFC 9110 section 6.5.1)."""
        response = self._response
        if response is None or self._headed:
            return
        self._head += len(name) + len(value)
        if len(response.headers) >= MAX_HEADERS:
            self._fault = f"it sent more than {MAX_HEADERS} headers"
        elif self._head > MAX_HEAD_BYTES:
            self._fault = _LARGE_HEAD
        else:
            response.headers.append((name, value))

    def on_headers_complete(self) -> None:
        """The headers are there."""
        response, parser = self._response, self._parser
        if response is None or parser is None or self._headed:
            return
        response.status = parser.get_status_code()
        if response.status >= 200:
            self._headed = True
            self._complete = self._tunnel and response.status < 300

    def on_body(self, data: bytes) -> None:
        """A part of the body."""
        response = self._response
        if self._complete:
            self._fault = "it answered more than it was asked"
        elif response is not None:
            response.body += data

    def on_message_complete(self) -> None:
        """The end of an answer, or of an informational message before it."""
        response = self._response
        if response is None:
            return
        if self._headed:
            self._complete = True
            self._reusable = self._parser is not None and self._parser.should_keep_alive()
        else:
            response.headers.clear()
            self._informational += 1
            if self._informational > MAX_INFORMATIONAL:
                self._fault = "it sent too many informational messages"

    # -- its end ---------------------------------------------------------------------------------------------------

    def _finish(self, response: Response) -> None:
        response.whole = True
        self._response = None
        self._resolve()
        # Where the request is not gone yet, what is behind it would pile up at a server that answers and never reads.
        if self._reusable and self.usable and self._transport and not self._transport.get_write_buffer_size():
            self._at_rest(self)
        elif not self._tunnel:
            self.abort()

    def _fail(self, failure: HttpFailure) -> None:
        waiter, self._waiter = self._waiter, None
        if waiter is None:
            self._failure = failure  # for whoever reads on
        elif not waiter.done():
            waiter.set_exception(failure)
        self.abort()

    def _resolve(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
        self._waiter = None


def _is_delimited(response: Response) -> bool:
    """Whether the headers tell where the body ends."""
    return any(name.lower() in _DELIMITED for name, _ in response.headers)
