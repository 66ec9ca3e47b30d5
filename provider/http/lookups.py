"""Names of hosts, asked of the system's resolver in bounded time and number."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import socket
import threading
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

# The system's resolver may try for half a minute; a mount has better uses for its time, and kubelet tries again.
LOOKUP_SECONDS: Final = 5.0
# Names that are looked up at one time and were never found before. Classes make them up, and one that hangs holds a
# thread until the system's resolver gives up.
MAX_LOOKUPS: Final = 32
# Names that are asked for at one time, those that wait for one of those places included. Who waits behind so many does
# not get there within LOOKUP_SECONDS, unless none of them hangs.
MAX_ASKED: Final = 512
# Names whose addresses are remembered, besides the operator's own.
MAX_NAMES: Final = 256
# How long the addresses of a name are used again: what a failover by DNS takes anyway.
KEPT_SECONDS: Final = 30.0
# Who asks for a name after that waits so long for news of it, if it was found in the last STALE_SECONDS; then the old
# addresses are taken. A name server answers in less, and is back in less than an hour.
REFRESH_SECONDS: Final = 1.0
STALE_SECONDS: Final = 3600.0
# Addresses of a name that are used. Each that is tried and does not answer is a socket, and whoever runs a name server
# names as many as they like; a Vault behind one name has a handful.
MAX_ADDRESSES: Final = 8

Address: TypeAlias = tuple[socket.AddressFamily, socket.SocketKind, int, str, Any]
"""As ``socket.getaddrinfo`` gives it."""


@dataclass(frozen=True, slots=True)
class _Known:
    """What was found, and when, in the event loop's time."""

    found_at: float
    addresses: list[Address]


class _Question:
    """A name that is asked for: by how many, whether the system is asked yet, and whether it keeps them waiting."""

    __slots__ = ("askers", "begun", "slow", "task")

    task: asyncio.Task[list[Address]]

    def __init__(self) -> None:
        self.askers = 0
        self.begun = self.slow = False


class Lookups:
    """Names asked of the system's resolver, each once at a time, and again after KEPT_SECONDS.

    A name that was found before is looked up at once, whatever others hang, and keeps its addresses while the resolver
    is in trouble: a server in use does not go away with a name server. ``own`` names, the operator's, are looked up at
    once too, and never forgotten for others. Each other name waits for one of MAX_LOOKUPS places, for as long as
    anybody waits for it.
    """

    def __init__(self, own: Iterable[str] = ()) -> None:
        self._own = set(own)
        self._known: OrderedDict[str, _Known] = OrderedDict()
        self._asking: dict[str, _Question] = {}
        self._places = asyncio.Semaphore(MAX_LOOKUPS)

    def own(self, host: str) -> None:
        """This name is the operator's too."""
        self._own.add(host)

    async def find(self, host: str, port: int) -> list[Address]:
        """The addresses of ``host``, a name or an address, within LOOKUP_SECONDS; at most MAX_ADDRESSES.

        Raises OSError, in our words where time was up.
        """
        if _is_address(host):
            return _ask_system(host, port, socket.AI_NUMERICHOST)
        known = self._known.get(host)
        if known is not None and asyncio.get_running_loop().time() < known.found_at + KEPT_SECONDS:
            found = known.addresses
        else:
            found = await self._look_up(host, known)
        return [(family, kind, protocol, "", _at(place, port)) for family, kind, protocol, _, place in found]

    async def _look_up(self, host: str, known: _Known | None) -> list[Address]:
        if known is not None and asyncio.get_running_loop().time() >= known.found_at + STALE_SECONDS:
            known = None
        question = self._asking.get(host) or self._begin(host)
        if known is not None and question.slow:
            return known.addresses
        question.askers += 1
        seconds = LOOKUP_SECONDS if known is None else min(REFRESH_SECONDS, LOOKUP_SECONDS)
        try:
            async with asyncio.timeout(seconds):
                # Whoever asks may go away; a thread that has begun stays, and so does its place.
                return await asyncio.shield(question.task)
        except TimeoutError as error:
            question.slow = True
            if known is None:
                raise socket.gaierror(socket.EAI_AGAIN, f"no answer in {LOOKUP_SECONDS:g} s") from error
        except socket.gaierror as error:
            if known is None or error.errno != socket.EAI_AGAIN:
                raise
        except UnicodeError as error:
            raise socket.gaierror(socket.EAI_NONAME, "it is no host name") from error
        finally:
            question.askers -= 1
            if not question.askers and not question.begun:
                self._drop(host, question)
        return known.addresses

    def _begin(self, host: str) -> _Question:
        if len(self._asking) >= MAX_ASKED and host not in self._own and host not in self._known:
            raise socket.gaierror(socket.EAI_AGAIN, "too many other names are being looked up")
        question = self._asking[host] = _Question()
        task = question.task = asyncio.create_task(self._ask(host, question))
        task.add_done_callback(lambda done: self._ended(host, question, done))
        return question

    def _drop(self, host: str, question: _Question) -> None:
        """Nobody waits any more for a name that has waited itself."""
        question.task.cancel()
        if self._asking.get(host) is question:
            del self._asking[host]  # at once: the next to ask asks anew

    def _ended(self, host: str, question: _Question, task: asyncio.Task[list[Address]]) -> None:
        if self._asking.get(host) is question:
            del self._asking[host]
        del question.task  # its failure refers to the question
        if task.cancelled() or task.exception() is not None:
            return
        self._known[host] = _Known(asyncio.get_running_loop().time(), task.result())
        self._known.move_to_end(host)
        others = [name for name in self._known if name not in self._own]
        if len(others) > MAX_NAMES:
            del self._known[others[0]]

    async def _ask(self, host: str, question: _Question) -> list[Address]:
        if host in self._known or host in self._own:
            question.begun = True
            return await _in_thread(host)
        async with self._places:
            question.begun = True
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
    return [*found[:MAX_ADDRESSES]]


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _at(place: Any, port: int) -> Any:
    """A socket address at another port; the interface of a link-local address is part of it, and stays."""
    return (place[0], port, *place[2:])
