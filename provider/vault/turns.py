"""Turns at a number of places, shared fairly between owners: pure bookkeeping of who may go, and who waits."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Hashable
from typing import Final

# Large, so that a class of fifty objects is still read at once; not larger, so that one whose reads all hang leaves
# others more than a place or two.
SHARE: Final = 7
# Who has more than so many waiting gets no more than so many places at a time. A class of a hundred objects is still
# read at once; one of a thousand, which keeps a core busy for a second at any speed, leaves most of it to others.
BULK: Final = 64
BULK_PLACES: Final = 2


class Dismissed(Exception):
    """Who waited for a turn is to ask again whether there is one to wait for."""


class Turns:
    """``places`` at which as many may be at one time; who must wait is let in owner by owner.

    An owner takes a place only while it holds at most SHARE times as many as then stay free, or if it holds none. So a
    single owner holds seven eighths at most; whoever comes while others never give back gets up to seven eighths of
    what is left; and where owners are many, every place is used. Whoever has more than BULK waiting is let in to
    BULK_PLACES alone until they are fewer.

    For one event loop; it is not safe between threads.
    """

    def __init__(self, places: int) -> None:
        self.free = places
        """How many places nobody holds."""
        self._held: dict[Hashable, int] = {}
        # By owner, in the order in which they are asked: who was let in last is asked last.
        self._waiting: dict[Hashable, deque[asyncio.Future[None]]] = {}

    async def take(self, owner: Hashable) -> None:
        """Hold a place, at once or when it is ``owner``'s turn; whoever took one must ``give`` it back.

        Cancelled while it waits, it holds none. Raises Dismissed, holding none either.
        """
        if self._may(owner):
            self._enter(owner)
            return
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(owner, deque()).append(turn)
        try:
            await turn
        except asyncio.CancelledError:
            if turn.cancelled():
                self._leave(owner, turn)
            else:
                self.give(owner)  # it was let in, and cancelled before it could go
            raise

    def give(self, owner: Hashable) -> None:
        """Give a place of ``owner``'s back, and let in who may go now."""
        self.free += 1
        self._held[owner] -= 1
        if not self._held[owner]:
            del self._held[owner]
        while self.free and self._let_in():
            pass

    def dismiss(self) -> None:
        """Have all who wait go."""
        waiting, self._waiting = self._waiting, {}
        for queue in waiting.values():
            for turn in queue:
                if not turn.done():
                    turn.set_exception(Dismissed())

    def _may(self, owner: Hashable) -> bool:
        held = self._held.get(owner, 0)
        if held >= BULK_PLACES and len(self._waiting.get(owner, ())) > BULK:
            return False
        return self.free > 0 and (held == 0 or held + 1 <= SHARE * (self.free - 1))

    def _enter(self, owner: Hashable) -> None:
        self.free -= 1
        self._held[owner] = self._held.get(owner, 0) + 1

    def _let_in(self) -> bool:
        """Let one in, of the first owner that may have a place; whether there was one."""
        owner = next((waiting for waiting in self._waiting if self._may(waiting)), None)
        if owner is None:
            return False
        queue = self._waiting.pop(owner)
        turn = queue.popleft()
        if queue:
            self._waiting[owner] = queue
        if not turn.done():  # else cancelled just now: its own task has yet to learn of it
            self._enter(owner)
            turn.set_result(None)
        return True

    def _leave(self, owner: Hashable, turn: asyncio.Future[None]) -> None:
        queue = self._waiting.get(owner)
        if queue is not None and turn in queue:
            queue.remove(turn)
            if not queue:
                del self._waiting[owner]
