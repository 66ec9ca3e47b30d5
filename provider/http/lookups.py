"""Names of hosts, asked of the system's resolver in bounded time and number."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import socket
import threading
from collections import OrderedDict
from typing import Any, Final, TypeAlias

# The system's resolver may try for half a minute; a mount has better uses for its time, and kubelet tries again.
LOOKUP_SECONDS: Final = 5.0
# Names that are looked up at one time and were never found before. Classes make them up, and one that hangs holds a
# thread until the system's resolver gives up.
MAX_LOOKUPS: Final = 32
# Names whose addresses are remembered.
MAX_NAMES: Final = 256
# How long the addresses of a name are used again: what a failover by DNS takes anyway.
KEPT_SECONDS: Final = 30.0

Address: TypeAlias = tuple[socket.AddressFamily, socket.SocketKind, int, str, Any]
"""As ``socket.getaddrinfo`` gives it."""


class Lookups:
    """Names asked of the system's resolver, each once at a time, and again after KEPT_SECONDS.

    A name that was found before is looked up at once, whatever others hang, and keeps its addresses while the resolver
    is in trouble: a server in use does not go away with a name server. Other names wait for one of MAX_LOOKUPS places.
    """

    def __init__(self) -> None:
        self._known: OrderedDict[str, tuple[float, list[Address]]] = OrderedDict()
        self._asking: dict[str, asyncio.Task[list[Address]]] = {}
        self._places = asyncio.Semaphore(MAX_LOOKUPS)

    async def find(self, host: str, port: int) -> list[Address]:
        """The addresses of ``host``, a name or an address, within LOOKUP_SECONDS.

        Raises OSError, in our words where time was up.
        """
        if _is_address(host):
            return _ask_system(host, port, socket.AI_NUMERICHOST)
        until, known = self._known.get(host, (0.0, []))
        if not known or asyncio.get_running_loop().time() >= until:
            known = await self._look_up(host, known)
        return [(family, kind, protocol, "", _at(place, port)) for family, kind, protocol, _, place in known]

    async def _look_up(self, host: str, known: list[Address]) -> list[Address]:
        try:
            async with asyncio.timeout(LOOKUP_SECONDS):
                # Whoever asks may go away; the thread stays, and so does its place.
                return await asyncio.shield(self._asking.get(host) or self._begin(host))
        except TimeoutError as error:
            if not known:
                raise socket.gaierror(socket.EAI_AGAIN, f"no answer in {LOOKUP_SECONDS:g} s") from error
        except socket.gaierror as error:
            if not known or error.errno != socket.EAI_AGAIN:
                raise
        except UnicodeError as error:
            raise socket.gaierror(socket.EAI_NONAME, "it is no host name") from error
        return known

    def _begin(self, host: str) -> asyncio.Task[list[Address]]:
        task = self._asking[host] = asyncio.create_task(self._ask(host))
        task.add_done_callback(lambda done: self._ended(host, done))
        return task

    def _ended(self, host: str, task: asyncio.Task[list[Address]]) -> None:
        del self._asking[host]
        if task.cancelled() or task.exception() is not None:
            return
        self._known[host] = asyncio.get_running_loop().time() + KEPT_SECONDS, task.result()
        self._known.move_to_end(host)
        if len(self._known) > MAX_NAMES:
            self._known.popitem(last=False)

    async def _ask(self, host: str) -> list[Address]:
        if host in self._known:
            return await _in_thread(host)
        async with self._places:
            return await _in_thread(host)


async def _in_thread(host: str) -> list[Address]:
    """Ask the system, in a thread of its own: one that hangs holds up neither others' work nor the process's end."""
    loop = asyncio.get_running_loop()
    answer: asyncio.Future[list[Address]] = loop.create_future()

    def tell(found: list[Address], error: Exception | None) -> None:
        if answer.done():
            return  # the loop is about to end
        if error is None:
            answer.set_result(found)
        else:
            answer.set_exception(error)

    def ask() -> None:
        found: list[Address] = []
        failure: Exception | None = None
        try:
            found = _ask_system(host, 0, socket.AI_ADDRCONFIG)
        except (OSError, UnicodeError) as error:
            failure = error
        with contextlib.suppress(RuntimeError):  # the loop has ended
            loop.call_soon_threadsafe(tell, found, failure)

    threading.Thread(target=ask, name=f"lookup-{host[:60]}", daemon=True).start()
    return await answer


def _ask_system(host: str, port: int, flags: int) -> list[Address]:
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=flags)
    if not found:
        raise socket.gaierror(socket.EAI_NONAME, "it has no address")
    return [*found]


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _at(place: Any, port: int) -> Any:
    """A socket address at another port; the interface of a link-local address is part of it, and stays."""
    return (place[0], port, *place[2:])
