"""What aiohttp leaves unbounded, bounded: the look-up of a name, informational messages, the frame around an answer."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import socket
import threading
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any, Final

import aiohttp
from aiohttp.abc import AbstractResolver, ResolveResult
from aiohttp.client_proto import ResponseHandler
from aiohttp.http import HttpProcessingError, RawResponseMessage

from provider.settings import MAX_POOLS

# The system's resolver may try for half a minute; a mount has better uses for its time, and kubelet tries again.
LOOKUP_SECONDS: Final = 5.0
# Names that are looked up at one time and were never found before. Classes make them up, and one that hangs holds a
# thread until the system's resolver gives up.
MAX_LOOKUPS: Final = 32
# How long the addresses of a name are used again: what a failover by DNS takes anyway.
DNS_CACHE_SECONDS: Final = 30
# Vault sends no 1xx at all, a proxy perhaps one or two before an answer.
MAX_INFORMATIONAL: Final = 10
# What an answer may have besides its body: headers, and what marks its chunks, which Go's servers make of 2 KiB and
# more. Bodies in chunks of a byte, or chunks with long extensions, cost a hundred times the CPU of what they carry.
# More than twice what one read of a socket brings, which may wait to be parsed.
MAX_FRAME_BYTES: Final = 768 * 1024

_Name = tuple[str, socket.AddressFamily]
_NUMERIC: Final = socket.AI_NUMERICHOST | socket.AI_NUMERICSERV


@dataclass(frozen=True, slots=True)
class _Found:
    """An address of a name."""

    address: str
    family: int
    protocol: int


class Lookups:
    """Names asked of the system's resolver, each once at a time.

    A name that was found before is looked up at once, whatever others hang, and keeps its addresses while the resolver
    is in trouble: a Vault in use does not go away with a name server. Other names wait for one of MAX_LOOKUPS places.
    """

    def __init__(self) -> None:
        self._known: OrderedDict[_Name, list[_Found]] = OrderedDict()
        self._asking: dict[_Name, asyncio.Task[list[_Found]]] = {}
        self._places = asyncio.Semaphore(MAX_LOOKUPS)

    async def find(self, host: str, port: int, family: socket.AddressFamily) -> list[ResolveResult]:
        """The addresses of ``host``, within LOOKUP_SECONDS. Raises OSError, in our words where time was up."""
        name = (host, family)
        try:
            async with asyncio.timeout(LOOKUP_SECONDS):
                # Whoever asks may go away; the thread stays, and so does its place.
                found = await asyncio.shield(self._asking.get(name) or self._begin(name))
        except TimeoutError as error:
            found = self._known.get(name, [])
            if not found:
                raise socket.gaierror(socket.EAI_AGAIN, f"no answer in {LOOKUP_SECONDS:g} s") from error
        except socket.gaierror as error:
            found = self._known.get(name, []) if error.errno == socket.EAI_AGAIN else []
            if not found:
                raise
        except UnicodeError as error:
            raise socket.gaierror(socket.EAI_NONAME, "it is no host name") from error
        return [
            ResolveResult(
                hostname=host, host=one.address, port=port, family=one.family, proto=one.protocol, flags=_NUMERIC
            )
            for one in found
        ]

    def _begin(self, name: _Name) -> asyncio.Task[list[_Found]]:
        task = self._asking[name] = asyncio.create_task(self._ask(name))
        task.add_done_callback(lambda done: self._ended(name, done))
        return task

    def _ended(self, name: _Name, task: asyncio.Task[list[_Found]]) -> None:
        del self._asking[name]
        if task.cancelled() or task.exception() is not None:
            return
        self._known[name] = task.result()
        self._known.move_to_end(name)
        if len(self._known) > MAX_POOLS:
            self._known.popitem(last=False)

    async def _ask(self, name: _Name) -> list[_Found]:
        if name in self._known:
            return await _in_thread(name)
        async with self._places:
            return await _in_thread(name)


class BoundedResolver(AbstractResolver):
    """aiohttp's way to ``lookups``."""

    def __init__(self, lookups: Lookups) -> None:
        self._lookups = lookups

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        """The addresses of ``host``."""
        return await self._lookups.find(host, port, family)

    async def close(self) -> None:
        """There is nothing to close: the look-ups are others' too."""


async def _in_thread(name: _Name) -> list[_Found]:
    """Ask the system, in a thread of its own: one that hangs holds up neither others' work nor the process's end."""
    loop = asyncio.get_running_loop()
    answer: asyncio.Future[list[_Found]] = loop.create_future()

    def tell(found: list[_Found], error: Exception | None) -> None:
        if answer.done():
            return  # the loop is about to end
        if error is None:
            answer.set_result(found)
        else:
            answer.set_exception(error)

    def ask() -> None:
        found: list[_Found] = []
        failure: Exception | None = None
        try:
            found = _ask_system(*name)
        except (OSError, UnicodeError) as error:
            failure = error
        with contextlib.suppress(RuntimeError):  # the loop has ended
            loop.call_soon_threadsafe(tell, found, failure)

    threading.Thread(target=ask, name=f"lookup-{name[0][:60]}", daemon=True).start()
    return await answer


def _ask_system(host: str, family: socket.AddressFamily) -> list[_Found]:
    found = []
    infos = socket.getaddrinfo(host, None, family=family, type=socket.SOCK_STREAM, flags=socket.AI_ADDRCONFIG)
    for kind, _, protocol, _, place in infos:
        address = str(place[0])
        if kind == socket.AF_INET6 and len(place) == 4 and place[3]:
            # The interface of a link-local address is part of it.
            address, _ = socket.getnameinfo(place, socket.NI_NUMERICHOST | socket.NI_NUMERICSERV)
        found.append(_Found(address, kind, protocol))
    return found


def bound(connector: aiohttp.BaseConnector) -> None:
    """Make each new connection of ``connector`` one that bounds what comes besides the bodies of answers.

    aiohttp reads on until an answer comes, and does nothing else while more messages have arrived already.
    There is no public way to give a connector its protocol; tests flood one, so that a release that renames this
    attribute is noticed.
    """
    connector._factory = functools.partial(_make_handler, loop=asyncio.get_running_loop())


def _make_handler(loop: asyncio.AbstractEventLoop) -> ResponseHandler:
    return _BoundedHandler(loop)


class _BoundedHandler(ResponseHandler):
    """Fails after MAX_INFORMATIONAL informational messages, or MAX_FRAME_BYTES of one answer that are not its body."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(loop)
        self._taken = 0

    def set_response_params(self, **params: Any) -> None:
        """A request is about to go out."""
        self._taken = 0
        super().set_response_params(**params)

    def data_received(self, data: bytes) -> None:
        """Bytes of an answer came."""
        super().data_received(data)
        self._taken += len(data)
        payload = self._payload
        body = payload.total_bytes if payload is not None else 0
        if self._taken - body > MAX_FRAME_BYTES and self.transport is not None:
            if payload is not None:
                payload.set_exception(aiohttp.ClientPayloadError("more frame than body"))
            self.set_exception(HttpProcessingError(message="more frame than body"))
            self.transport.abort()

    async def read(self) -> tuple[RawResponseMessage, aiohttp.StreamReader]:
        """The next answer's head, and its body as it comes."""
        for _ in range(MAX_INFORMATIONAL + 1):
            message, payload = await super().read()
            if not 100 <= message.code < 200 or message.code == 101:
                return message, payload
        raise HttpProcessingError(message="too many informational messages")
