"""Whose turn it is: places that owners take one after another, and what is known of programs."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import AsyncExitStack

import pytest

from provider.sandbox import lanes
from provider.sandbox.lanes import Lane, Pace, Paces


class Callers:
    """Callers of a lane, each of which holds its place until it is told to leave."""

    def __init__(self, lane: Lane) -> None:
        self.lane = lane
        self.running: list[str] = []
        self._leave: dict[str, asyncio.Event] = {}
        self._tasks: dict[str, asyncio.Task[bool]] = {}

    async def come(
        self, name: str, owner: str, *, proven: Callable[[], bool] | bool = False, seconds: float | None = None
    ) -> None:
        """``name`` wants a place for ``owner``, and gets it where there is one."""
        self._leave[name] = asyncio.Event()

        async def calling() -> bool:
            known = proven if callable(proven) else lambda: proven is True
            async with self.lane.place(owner, known, seconds=seconds) as granted:
                if granted:
                    self.running.append(name)
                    await self._leave[name].wait()
                    self.running.remove(name)
                return granted

        self._tasks[name] = asyncio.create_task(calling())
        await settled()

    async def go(self, name: str) -> bool:
        """``name`` leaves; whether it had a place."""
        self._leave[name].set()
        granted = await self._tasks[name]
        await settled()
        return granted

    async def cancel(self, name: str) -> None:
        """``name`` gives up, waiting or running."""
        self._tasks[name].cancel()
        await asyncio.gather(self._tasks[name], return_exceptions=True)
        await settled()


async def settled() -> None:
    """Once what is ready has run."""
    for _ in range(5):
        await asyncio.sleep(0)


async def test_an_owner_has_one_place_for_what_is_new() -> None:
    """What is not proven runs one by one for each owner, in the order in which it came; others go past."""
    callers = Callers(Lane(3, strangers=3))
    for name in ("a1", "a2", "a3"):
        await callers.come(name, "a")
    await callers.come("b1", "b")
    assert callers.running == ["a1", "b1"]
    await callers.go("a1")
    assert callers.running == ["b1", "a2"]
    await callers.go("a2")
    assert callers.running == ["b1", "a3"]


async def test_strangers_leave_a_place_to_what_is_known() -> None:
    """However many owners come with new programs, a proven one has a place; proven ones take as many as there are."""
    callers = Callers(Lane(3, strangers=2))
    for owner in "abcd":
        await callers.come(owner, owner)
    assert callers.running == ["a", "b"]
    await callers.come("p1", "p", proven=True)
    assert callers.running == ["a", "b", "p1"]
    await callers.come("p2", "p", proven=True)
    await callers.go("a")
    assert callers.running == ["b", "p1", "c"]
    await callers.go("b")
    assert callers.running == ["p1", "c", "d"]
    await callers.come("e", "e")
    await callers.go("p1")
    assert callers.running == ["c", "d", "p2"]


async def test_owners_take_turns() -> None:
    """Whose turn is longest ago comes first, however many wait for another owner; one that is new comes before all."""
    callers = Callers(Lane(1, strangers=1))
    for name in ("a1", "a2", "a3"):
        await callers.come(name, "a")
    await callers.come("b1", "b")
    await callers.come("b2", "b")
    order = []
    for _ in range(3):
        order += callers.running
        await callers.go(callers.running[0])
    await callers.come("c1", "c")
    while callers.running:
        order += callers.running
        await callers.go(callers.running[0])
    assert order == ["a1", "b1", "a2", "b2", "c1", "a3"]
    assert callers.lane.idle
    assert callers.lane._turns == {}


async def test_suspects_come_last() -> None:
    """Owners under suspicion have fewer places, and wait behind the others, unless what they run is proven."""
    callers = Callers(Lane(3, strangers=3, suspects=1, suspect=lambda owner: owner.startswith("s")))
    await callers.come("s1", "s1")
    await callers.come("s2", "s2")
    assert callers.running == ["s1"]
    for owner in "abc":
        await callers.come(owner, owner)
    assert callers.running == ["s1", "a", "b"]
    await callers.go("s1")
    assert callers.running == ["a", "b", "c"]
    await callers.come("s3", "s3", proven=True)
    await callers.go("a")
    assert callers.running == ["b", "c", "s3"]
    await callers.go("s3")
    assert callers.running == ["b", "c", "s2"]


async def test_what_turns_out_proven_while_it_waits_runs_at_once() -> None:
    """The first of an owner tells for the others, which then take all places that there are."""
    known: list[bool] = []
    callers = Callers(Lane(3, strangers=3))
    for number in range(4):
        await callers.come(f"a{number}", "a", proven=lambda: bool(known))
    assert callers.running == ["a0"]
    known.append(True)
    await callers.go("a0")
    assert callers.running == ["a1", "a2", "a3"]


async def test_waiting_has_an_end() -> None:
    """Who has no place in time is told so, and takes none afterwards; who gives up leaves nothing behind."""
    callers = Callers(Lane(1, strangers=1))
    await callers.come("a", "a")
    await callers.come("late", "b", seconds=0.01)
    await callers.come("gone", "c")
    assert not await callers.go("late")
    await callers.cancel("gone")
    await callers.come("d", "d")
    assert callers.running == ["a"]
    await callers.cancel("a")
    assert callers.running == ["a", "d"]  # cancelled, it had no time to say that it left
    await callers.go("d")
    assert callers.lane.idle


async def test_who_gives_up_as_it_is_granted_a_place_gives_it_back() -> None:
    """A place that is granted to a caller which is cancelled in the same moment goes to the next."""
    lane = Lane(1, strangers=1)
    async with AsyncExitStack() as held:
        await held.enter_async_context(lane.place("a", lambda: False))
        entering = asyncio.create_task(lane.place("b", lambda: False).__aenter__())
        await settled()
        await held.aclose()
        entering.cancel()
        with pytest.raises(asyncio.CancelledError):
            await entering
    assert lane.idle


def test_paces_are_an_owners_own() -> None:
    """Programs that run together are as slow as the slowest; another owner's of the same text are new."""
    paces = Paces()
    paces.note("a", b"1", Pace.QUICK, 1.0)
    paces.note("a", b"2", Pace.ENDLESS, 2.0)
    assert paces.worst("a", []) is Pace.QUICK
    assert paces.worst("a", [b"1"]) is Pace.QUICK
    assert paces.worst("a", [b"1", b"3"]) is Pace.NEW
    assert paces.worst("a", [b"1", b"2", b"3"]) is Pace.ENDLESS
    assert paces.worst("b", [b"2"]) is Pace.NEW
    assert paces.endless_since("a", [b"1", b"2", b"3"]) == 2.0
    assert paces.endless_since("a", [b"1"]) == float("-inf")


def test_what_is_known_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """The least recently run are forgotten, and then count as new."""
    monkeypatch.setattr(lanes, "MAX_KNOWN", 3)
    paces = Paces()
    for text in (b"1", b"2", b"3", b"1", b"4"):
        paces.note("a", text, Pace.LONG, 0.0)
    assert [paces.worst("a", [text]) for text in (b"1", b"2", b"3", b"4")] == [
        Pace.LONG,
        Pace.NEW,
        Pace.LONG,
        Pace.LONG,
    ]
