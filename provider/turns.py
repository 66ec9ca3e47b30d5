"""Turns at a number of places, shared fairly between owners: pure bookkeeping of who may go, and who waits."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Hashable
from typing import Final

# Large, so that a class of fifty objects is still read at once; not larger, so that one whose reads all hang leaves
# others more than a place or two.
SHARE: Final = 7
# Places of one owner that are lent to others while it stays too long in them: a few keep everybody else going, and
# leave some for the next such owner.
LENT_EACH: Final = 2
# Who has more than so many waiting gets no more than so many places at a time. A class of two hundred objects is still
# read at once; one of a thousand, which keeps a core busy for a second at any speed, leaves most of it to others.
BULK: Final = 192
BULK_PLACES: Final = 2


class Dismissed(Exception):
    """Who waited for a turn is to ask again whether there is one to wait for."""


class Turns:
    """``places`` at which as many may be at one time; who must wait is let in owner by owner.

    An owner takes a place only while it holds at most SHARE times as many as then stay free, or if it holds none. So a
    single owner holds seven eighths at most; whoever comes while others never give back gets up to seven eighths of
    what is left; and where owners are many, every place is used. Whoever has more than BULK waiting is let in to
    BULK_PLACES alone until they are fewer.

    Owners that never give back would so hold all of them, a handful together. What stays too long is told by
    ``overdue``: for whoever waits and holds nothing, ``lendable`` places are there besides, LENT_EACH at most for what
    one owner has overdue.

    For one event loop; it is not safe between threads.
    """

    def __init__(self, places: int, lendable: int = 0) -> None:
        self.free = places
        """How many places nobody holds."""
        self.most = max(1, places - -(-places // (SHARE + 1)))
        """How many of them one owner may hold, if nobody else holds any."""
        self._lendable = lendable
        self._held: dict[Hashable, int] = {}
        self._overdue: dict[Hashable, int] = {}
        self._lent: dict[Hashable, int] = {}
        # By owner, in the order in which they are asked: who was let in last is asked last.
        self._waiting: dict[Hashable, deque[asyncio.Future[None]]] = {}
        # Those of them that hold nothing, in the order in which they came to that: while all places are held it is they
        # who get what is given back, and they are not to be looked for among a hundred others each time.
        self._empty_handed: dict[Hashable, None] = {}

    async def take(self, owner: Hashable) -> None:
        """Hold a place, at once or when it is ``owner``'s turn; whoever took one must ``give`` it back.

        Cancelled while it waits, it holds none. Raises Dismissed, holding none either.
        """
        if self.take_now(owner):
            return
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(owner, deque()).append(turn)
        if owner not in self._held:
            self._empty_handed[owner] = None
        self._lend()
        try:
            await turn
        except asyncio.CancelledError:
            if turn.cancelled():
                self._leave(owner, turn)
            elif turn.exception() is None:
                self.give(owner)  # it was let in, and cancelled before it could go
            raise

    def take_now(self, owner: Hashable) -> bool:
        """Hold a place if ``owner`` may at once; whether it may."""
        may = self._may(owner)
        if may:
            self._enter(owner)
        return may

    def give(self, owner: Hashable, *, overdue: bool = False) -> None:
        """Give a place of ``owner``'s back, and let in who may go now. ``overdue`` says that it was told to be so."""
        _subtract(self._held, owner)
        if owner not in self._held and owner in self._waiting:
            self._empty_handed[owner] = None
        if overdue:
            _subtract(self._overdue, owner)
        if self._lent.get(owner, 0) > self._overdue.get(owner, 0):
            _subtract(self._lent, owner)  # another has its place
            self._lendable += 1
        else:
            self.free += 1
        if self._waiting:
            while self.free and self._let_in():
                pass
            self._lend()

    def overdue(self, owner: Hashable) -> None:
        """One of ``owner``'s stays too long."""
        self._overdue[owner] = self._overdue.get(owner, 0) + 1
        self._lend()

    def _lend(self) -> None:
        """Let in who waits and holds nothing, in the places of those who stay too long."""
        for owner, overdue in self._overdue.items():
            while (
                self._lendable
                and not self.free
                and self._lent.get(owner, 0) < min(overdue, LENT_EACH)
                and self._empty_handed
            ):
                self._lendable -= 1
                self._lent[owner] = self._lent.get(owner, 0) + 1
                self.free += 1
                self._let_in()

    def dismiss(self) -> None:
        """Have all who wait go."""
        waiting, self._waiting = self._waiting, {}
        self._empty_handed.clear()
        for queue in waiting.values():
            for turn in queue:
                if not turn.done():
                    turn.set_exception(Dismissed())

    def _may(self, owner: Hashable) -> bool:
        if not self.free:
            return False
        held = self._held.get(owner, 0)
        if held >= BULK_PLACES and len(self._waiting.get(owner, ())) > BULK:
            return False
        return held == 0 or held + 1 <= SHARE * (self.free - 1)

    def _enter(self, owner: Hashable) -> None:
        self.free -= 1
        self._held[owner] = self._held.get(owner, 0) + 1
        self._empty_handed.pop(owner, None)

    def _let_in(self) -> bool:
        """Let one in, of the first owner that may have a place; whether there was one."""
        # The last free place is for nobody who holds one.
        among = self._waiting if self.free > 1 else self._empty_handed
        owner = next((waiting for waiting in among if self._may(waiting)), None)
        if owner is None:
            return False
        queue = self._waiting.pop(owner)
        turn = queue.popleft()
        if queue:
            self._waiting[owner] = queue
        else:
            self._empty_handed.pop(owner, None)
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
                self._empty_handed.pop(owner, None)


def _subtract(counts: dict[Hashable, int], owner: Hashable) -> None:
    counts[owner] -= 1
    if not counts[owner]:
        del counts[owner]
