"""Who runs next: places that owners take in turn, and what is known of programs. Pure but for the event loop's futures.

An owner is whoever answers for a program, the pod's namespace: many programs of one owner keep no other one waiting.
"""

from __future__ import annotations

import asyncio
import enum
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Final

# Programs of which it is known how they ran; those forgotten count as new.
MAX_KNOWN: Final = 5000


class Pace(enum.IntEnum):
    """How a program ran when it last did: the larger, the later it comes."""

    QUICK = 0
    NEW = 1  # it never ran
    LONG = 2  # it ended, and took more than the small allowance
    OVER = 3  # it took more than the small allowance, and whether it ends is open
    ENDLESS = 4  # it took all of the large one


@dataclass(slots=True, eq=False)
class _Caller:
    owner: str
    proven: Callable[[], bool]
    stranger: bool
    granted: asyncio.Future[None]


class Lane:
    """``places`` for programs to run at one time: as many take proven ones, ``strangers`` others, and of these
    ``suspects`` those of owners that ``suspect`` is true of.

    An owner has one place at most for what is not proven. Where several owners wait, suspects come last, and before
    that whose turn is longest ago comes first.
    """

    def __init__(
        self, places: int, *, strangers: int, suspects: int = 0, suspect: Callable[[str], bool] = lambda _: False
    ) -> None:
        self._places = places
        self._strangers = strangers
        self._suspects = suspects
        self._suspect = suspect
        self._running: list[_Caller] = []
        self._waiting: list[_Caller] = []
        # The number of the turn that each owner had last, as long as it runs or waits.
        self._turns: dict[str, int] = {}
        self._turn = 0

    @property
    def idle(self) -> bool:
        """Whether nobody runs or waits."""
        return not self._running and not self._waiting

    @asynccontextmanager
    async def place(
        self, owner: str, proven: Callable[[], bool], *, seconds: float | None = None
    ) -> AsyncIterator[bool]:
        """A place, once there is one; False, and none, where that takes more than ``seconds``.

        ``proven`` is asked whenever a place is given away, since others' runs may tell.
        """
        caller = _Caller(owner, proven, True, asyncio.get_running_loop().create_future())
        self._waiting.append(caller)
        self._fill()
        try:
            await asyncio.wait([caller.granted], timeout=seconds)
            yield caller.granted.done()
        finally:
            (self._running if caller.granted.done() else self._waiting).remove(caller)
            self._fill()
            if not any(other.owner == owner for other in (*self._running, *self._waiting)):
                self._turns.pop(owner, None)

    def _fill(self) -> None:
        while len(self._running) < self._places:
            ready = [(self._rank(caller), caller) for caller in self._waiting if self._admits(caller)]
            if not ready:
                return
            # Of equals the first that came.
            _, chosen = min(ready, key=lambda pair: pair[0])
            chosen.stranger = not chosen.proven()
            self._waiting.remove(chosen)
            self._running.append(chosen)
            self._turns[chosen.owner] = self._turn
            self._turn += 1
            chosen.granted.set_result(None)

    def _admits(self, caller: _Caller) -> bool:
        if caller.proven():
            return True
        strangers = [running.owner for running in self._running if running.stranger]
        if len(strangers) >= self._strangers or caller.owner in strangers:
            return False
        return not self._suspect(caller.owner) or sum(map(self._suspect, strangers)) < self._suspects

    def _rank(self, caller: _Caller) -> tuple[bool, int]:
        return not caller.proven() and self._suspect(caller.owner), self._turns.get(caller.owner, -1)


class Paces:
    """How programs ran, and when, by owner and a digest of their text, so that nobody gives another's a bad name.

    The least recently run are forgotten beyond MAX_KNOWN.
    """

    def __init__(self) -> None:
        self._known: OrderedDict[tuple[str, bytes], tuple[Pace, float]] = OrderedDict()

    def worst(self, owner: str, texts: Sequence[bytes]) -> Pace:
        """The pace of programs that run together."""
        return max((self._known.get((owner, text), (Pace.NEW, 0.0))[0] for text in texts), default=Pace.QUICK)

    def endless_since(self, owner: str, texts: Sequence[bytes]) -> float:
        """When one of the programs last took all of the large allowance; minus infinity for none."""
        known = [self._known.get((owner, text), (Pace.NEW, 0.0)) for text in texts]
        return max((when for pace, when in known if pace is Pace.ENDLESS), default=float("-inf"))

    def note(self, owner: str, text: bytes, pace: Pace, now: float) -> None:
        """Remember how a program ran."""
        self._known[owner, text] = (pace, now)
        self._known.move_to_end((owner, text))
        while len(self._known) > MAX_KNOWN:
            self._known.popitem(last=False)
