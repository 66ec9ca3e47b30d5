"""When Vaults that seem to be away are looked at: rarely, however many names classes make up for one."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Hashable
from typing import TypeAlias
from weakref import WeakValueDictionary

from provider.vault.breaker import PROBE_SECONDS

Begin: TypeAlias = Callable[[], bool]
"""Begins a look, unless nobody wants it any more; whether it did."""


class Looks:
    """All of them: ``limit`` at one time and in PROBE_SECONDS, besides those at the daemon's own Vault."""

    def __init__(self, limit: int) -> None:
        self._free = limit
        self._queues: WeakValueDictionary[Hashable, LookQueue] = WeakValueDictionary()

    def at(self, place: Hashable) -> LookQueue:
        """The queue of all who want to look at the server at ``place``."""
        queue = self._queues.get(place)
        if queue is None:
            queue = self._queues[place] = LookQueue(self)
        return queue

    @property
    def full(self) -> bool:
        """Whether there are so many that another has to wait."""
        return self._free <= 0

    def began(self) -> Callable[[], None]:
        """One begins; what is given back is to be called at its end."""
        loop = asyncio.get_running_loop()
        self._free -= 1
        until = loop.time() + PROBE_SECONDS
        return lambda: self._release(until)

    def _release(self, until: float) -> None:
        loop = asyncio.get_running_loop()
        if loop.time() < until:
            loop.call_at(until, self._release, -math.inf)
        else:
            self._free += 1


class LookQueue:
    """Those at one server, by whoever has other TLS settings or another path there: one in PROBE_SECONDS, in turn.

    The daemon's own settings have every other turn, however many others there are.
    """

    def __init__(self, looks: Looks) -> None:
        self._looks = looks
        self._waiting: dict[Begin, bool] = {}  # and whether it is the daemon's own
        self._timer: asyncio.TimerHandle | None = None
        self._last = -math.inf
        self._own_was_last = False
        self._all_after = -math.inf

    def ask(self, begin: Begin, *, own: bool) -> None:
        """Call ``begin`` when it is its turn, which may be now."""
        self._waiting[begin] = own
        self._serve()

    def leave(self, begin: Begin) -> None:
        """It is wanted no more."""
        self._waiting.pop(begin, None)

    def found(self) -> None:
        """One that was away is back: so may be the others. As many looks as wait are as many seconds' worth."""
        now = asyncio.get_running_loop().time()
        if now >= self._all_after:
            waiting, self._waiting = self._waiting, {}
            self._all_after = now + len(waiting) * PROBE_SECONDS
            for begin in waiting:
                begin()

    def _serve(self) -> None:
        loop = asyncio.get_running_loop()
        while self._waiting and self._timer is None:
            chosen = self._choose() if loop.time() >= self._last + PROBE_SECONDS else None
            if chosen is None:
                now, due = loop.time(), self._last + PROBE_SECONDS
                self._timer = loop.call_at(due if now < due else now + PROBE_SECONDS, self._on_time)
                return
            self._own_was_last = self._waiting.pop(chosen)
            if chosen():
                self._last = loop.time()

    def _choose(self) -> Begin | None:
        """Who is next; None for nobody just now."""
        own = next((begin for begin, is_own in self._waiting.items() if is_own), None)
        other = next((begin for begin, is_own in self._waiting.items() if not is_own), None)
        if self._looks.full or (own and not self._own_was_last):
            return own
        return other or own

    def _on_time(self) -> None:
        self._timer = None
        self._serve()
