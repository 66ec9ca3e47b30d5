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
            await self._connection.read_on(limit)

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
        self._parser: httptools.HttpResponseParser | None = httptools.HttpResponseParser(self)
        # Of the request that is under way:
        self._response: Response | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._failure: HttpFailure | None = None
        self._limit = 0
        self._taken = 0
        self._informational = 0
        self._tunnel = self._headed = self._delimited = self._complete = self._excess = self._reusable = False
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
        response = self._response = Response(self)
        self._tunnel, self._headed, self._delimited, self._complete, self._reusable = tunnel, False, False, False, False
        self._taken = self._informational = 0
        if self._transport is None:
            raise ConnectFailed("the connection was closed")
        self._transport.write(request)
        await self._wait(limit)
        return response

    async def read_on(self, limit: int) -> None:
        """Read on where ``exchange`` or this came to its limit. Raises HttpFailure."""
        if self._failure is not None:
            raise self._failure
        if self._transport is not None:
            self._transport.resume_reading()
        await self._wait(limit)

    def detach(self) -> asyncio.Transport:
        """The transport, for another protocol, after the answer to a request for a tunnel."""
        transport, self._transport = self._transport, None
        self._parser = None
        if transport is None:
            raise ExchangeBroken("the connection was closed")
        return transport

    def abort(self) -> None:
        """Close it at once, whatever is under way."""
        if self._transport is not None:
            self._transport.abort()

    async def _wait(self, limit: int) -> None:
        self._limit = limit
        waiter = self._waiter = asyncio.get_running_loop().create_future()
        try:
            await waiter
        except BaseException:
            self.abort()
            raise

    # -- what the event loop tells ---------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """It is there."""
        self._transport = cast("asyncio.Transport", transport)  # uvloop's are none of its subclasses

    def data_received(self, data: bytes) -> None:
        """Bytes came."""
        response = self._response
        if response is None or self._parser is None:
            self.abort()  # nobody asked
            return
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            if not self._complete:
                self._fail(ExchangeBroken("it answered in another protocol"))
                return
        except httptools.HttpParserError:
            # Its text quotes what came, and that may quote us.
            self._fail(ExchangeBroken("what it sent is not HTTP"))
            return
        self._taken += len(data)
        if self._excess:
            self._fail(ExchangeBroken("it answered more than it was asked"))
        elif self._taken - len(response.body) > MAX_FRAME_BYTES:
            self._fail(ExchangeBroken("its answer has more frame than body"))
        elif self._informational > MAX_INFORMATIONAL:
            self._fail(ExchangeBroken("it sent too many informational messages"))
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
            if error is None and self._headed and not self._delimited:
                self._finish(response)  # RFC 9112 section 6.3: its end is the connection's
            elif isinstance(error, ssl.SSLError):
                self._fail(TlsFailed(reason(error)))
            elif self._headed:
                self._fail(ExchangeBroken("its answer broke off"))
            else:
                self._fail(ExchangeBroken(reason(error) if error else "it closed the connection"))
        self._parser = None
        self._lost(self)

    # -- what the parser tells -------------------------------------------------------------------------------------

    def on_message_begin(self) -> None:
        """An answer begins."""
        if self._complete:
            self._excess = True

    def on_header(self, name: bytes, value: bytes) -> None:
        """A header, or a trailer."""
        response = self._response
        if response is not None and not self._complete:
            response.headers.append((name, value))

    def on_headers_complete(self) -> None:
        """The headers are there."""
        response, parser = self._response, self._parser
        if response is None or parser is None or self._complete:
            return
        response.status = parser.get_status_code()
        if response.status >= 200:
            self._headed = True
            self._delimited = any(name.lower() in _DELIMITED for name, _ in response.headers)
            self._complete = self._tunnel and response.status < 300

    def on_body(self, data: bytes) -> None:
        """A part of the body."""
        response = self._response
        if response is not None and not self._complete:
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
            self._informational += 1
            response.headers.clear()

    # -- its end ---------------------------------------------------------------------------------------------------

    def _finish(self, response: Response) -> None:
        response.whole = True
        self._response = None
        self._resolve()
        if self._reusable and self.usable:
            self._at_rest(self)
        elif not self._tunnel:
            self.abort()

    def _fail(self, failure: HttpFailure) -> None:
        self._failure = failure
        self._response = None
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_exception(failure)
        self._waiter = None
        self.abort()

    def _resolve(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
        self._waiter = None
