"""HTTP for kubelet's probes, Prometheus and the status command: GET alone, one request a connection, within bounds.

Whoever reaches the node's address reaches this port, so what a caller can hold is little and for a short time
(docs/decisions/http-server.md).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Final

from provider.redact import one_line

# Seconds between attempts at a port that is taken: as long as the daemon that this one replaces still runs.
RETRY_SECONDS: Final = 3.0
# Connections at one time. Kubelet, Prometheus and a person or two have one each, for milliseconds; past it the oldest
# is cut off, so that who holds connections open keeps no probe out.
MAX_CONNECTIONS: Final = 64
# Seconds from the opening of a connection to its end, in which a caller asks and takes the answer. Kubelet and
# Prometheus give up at 10 s unless told otherwise.
CONNECTION_SECONDS: Final = 10.0
# The request line and the headers. Those of Prometheus have some 500 bytes.
MAX_HEAD_BYTES: Final = 8192

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Request:
    """A GET. ``headers`` have lower-case names; ``peer`` is the IP address of who asks, "" where it is not known."""

    path: str
    headers: Mapping[str, str] = field(default_factory=dict)
    peer: str = ""


@dataclass(frozen=True, slots=True)
class Answer:
    """What is answered. ``headers`` come on top of those that say what ``body`` is."""

    body: bytes
    status: int = HTTPStatus.OK
    content_type: str = "text/plain; charset=utf-8"
    headers: Mapping[str, str] = field(default_factory=dict)


Page = Callable[[Request], Awaitable[Answer]]
"""What answers the GETs of one path."""


class HttpServer:
    """Serves ``pages``, by their paths, at ``address`` (host, "" for all interfaces, and port) while it is entered.

    ``name`` is what it is called in the log, ``flag`` what sets its address. A port that is taken is an error in the
    log and tried again every few seconds: mounts do not wait for it, since with the host's network two daemons overlap
    in a rolling update.
    """

    def __init__(self, address: tuple[str, int], pages: Mapping[str, Page], *, name: str, flag: str) -> None:
        self._host, self._port = address
        self._pages = pages
        self._name = name
        self._flag = flag
        # The oldest first.
        self._open: OrderedDict[asyncio.Task[None], None] = OrderedDict()
        self._serving: asyncio.Task[None] | None = None

    async def __aenter__(self) -> HttpServer:
        self._serving = asyncio.create_task(self._serve(), name=self._name)
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._serving is not None:
            self._serving.cancel()
            await asyncio.wait([self._serving])

    async def _serve(self) -> None:
        server = await self._listen()
        try:
            await asyncio.get_running_loop().create_future()
        finally:
            server.close()
            for connection in self._open:
                connection.cancel()
            if self._open:
                await asyncio.wait(list(self._open))

    async def _listen(self) -> asyncio.Server:
        where = f"{self._host}:{self._port}"
        while True:
            try:
                server = await asyncio.start_server(
                    self._connected, self._host or None, self._port, limit=MAX_HEAD_BYTES
                )
            except OSError as error:
                _logger.error(  # noqa: TRY400  # the place of this error is known
                    "the %s port cannot be opened; mounts are served, %s is not: free the port, or choose another with"
                    " %s",
                    self._name,
                    self._name,
                    self._flag,
                    extra={"address": where, "error": error.strerror or str(error)},
                )
                await asyncio.sleep(RETRY_SECONDS)
            else:
                _logger.info("%s is served", self._name, extra={"address": where})
                return server

    def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        def ended(task: asyncio.Task[None]) -> None:
            # Here and not in the coroutine, which never begins if it is cancelled at once.
            self._open.pop(task, None)
            writer.transport.abort()

        # A task of our own: where asyncio makes it of a coroutine, Python 3.11.7 logs a traceback once it is cancelled.
        task = asyncio.create_task(self._attend(reader, writer))
        task.add_done_callback(ended)
        self._open[task] = None
        if len(self._open) > MAX_CONNECTIONS:
            self._open.popitem(last=False)[0].cancel()

    async def _attend(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        # A caller who goes away, or takes too long, is not worth a word.
        with contextlib.suppress(OSError, TimeoutError, asyncio.IncompleteReadError):
            async with asyncio.timeout(CONNECTION_SECONDS):
                await self._exchange(reader, writer)

    async def _exchange(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        method = ""
        try:
            head = await reader.readuntil(b"\r\n\r\n")
            method, request = _parse(head, writer)
        except asyncio.LimitOverrunError:
            answer = _short(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE)
        except ValueError:
            answer = _short(HTTPStatus.BAD_REQUEST)
        else:
            answer = await self._answer(method, request)
        writer.write(_encode(answer, with_body=method != "HEAD"))
        writer.close()
        await writer.wait_closed()

    async def _answer(self, method: str, request: Request) -> Answer:
        page = self._pages.get(request.path)
        if page is None:
            return _short(HTTPStatus.NOT_FOUND)
        if method not in ("GET", "HEAD"):
            return _short(HTTPStatus.METHOD_NOT_ALLOWED, {"Allow": "GET, HEAD"})
        try:
            return await page(request)
        except Exception:
            _logger.exception("a page failed", extra={"path": one_line(request.path)})
            return _short(HTTPStatus.INTERNAL_SERVER_ERROR)


def _parse(head: bytes, writer: asyncio.StreamWriter) -> tuple[str, Request]:
    """Method and request. Raises ValueError where it is no HTTP/1."""
    first, *lines = head.decode("latin-1").removesuffix("\r\n\r\n").split("\r\n")
    method, target, version = first.split(" ")
    if version not in ("HTTP/1.1", "HTTP/1.0"):
        raise ValueError("not HTTP/1")
    headers = {}
    for line in lines:
        name, colon, value = line.partition(":")
        if not colon:
            raise ValueError("a header without a colon")
        headers[name.lower()] = value.strip()
    peer = writer.get_extra_info("peername")
    return method, Request(target.partition("?")[0], headers, str(peer[0]) if isinstance(peer, tuple) else "")


def _short(status: HTTPStatus, headers: Mapping[str, str] | None = None) -> Answer:
    return Answer(f"{status.phrase}\n".encode(), status, headers=headers or {})


def _encode(answer: Answer, *, with_body: bool) -> bytes:
    lines = [
        f"HTTP/1.1 {answer.status} {HTTPStatus(answer.status).phrase}",
        f"Content-Type: {answer.content_type}",
        f"Content-Length: {len(answer.body)}",
        # What tenants have named must not be taken for HTML by somebody's browser.
        "X-Content-Type-Options: nosniff",
        "Connection: close",
        *(f"{name}: {value}" for name, value in answer.headers.items()),
    ]
    head = "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n"
    return head + answer.body if with_body else head
