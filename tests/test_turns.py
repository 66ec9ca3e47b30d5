"""Turns at a number of places: who goes, who waits, and that no place is ever lost."""

from __future__ import annotations

import asyncio
import contextlib
import random

import pytest

from provider.turns import Dismissed, Turns


class Stage:
    """Owners at turns: each one that gets in is written down, and stays until it is told to go."""

    def __init__(self, places: int, lendable: int = 0) -> None:
        self.turns = Turns(places, lendable)
        self.entered: list[str] = []
        self.tasks: list[tuple[str, asyncio.Task[None]]] = []

    async def come(self, owner: str, count: int = 1) -> None:
        """``count`` of ``owner``'s come, one after the other."""
        for _ in range(count):
            self.tasks.append((owner, asyncio.create_task(self._enter(owner))))
        await asyncio.sleep(0)

    async def _enter(self, owner: str) -> None:
        await self.turns.take(owner)
        self.entered.append(owner)

    async def go(self, owner: str) -> None:
        """One of ``owner``'s that are in goes."""
        self.turns.give(owner)
        await asyncio.sleep(0)

    async def cancel_waiting(self, owner: str) -> None:
        """Everyone of ``owner``'s who still waits goes away."""
        waiting = [task for name, task in self.tasks if name == owner and not task.done()]
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)


async def test_one_owner_holds_seven_eighths() -> None:
    """Whoever never gives a place back leaves an eighth of them to others, who get in at once."""
    stage = Stage(56)
    await stage.come("hung", 200)
    assert stage.entered == ["hung"] * 49
    await stage.come("other")
    assert stage.entered[-1] == "other"


@pytest.mark.parametrize("owners", [1, 2])
async def test_several_who_hang_leave_room(owners: int) -> None:
    """Each gets at most seven eighths of what is left, so after two that give nothing back one still gets in."""
    stage = Stage(56)
    for number in range(owners):
        await stage.come(f"hung-{number}", 64)
    await stage.come("other")
    assert stage.entered[-1] == "other"


@pytest.mark.parametrize("places", [1, 2, 3, 4])
async def test_few_places(places: int) -> None:
    """With one place it is used; with more, one owner leaves at least one to the others."""
    stage = Stage(places)
    await stage.come("one", 10)
    assert len(stage.entered) == max(1, places * 7 // 8)
    assert stage.turns.free == (0 if places == 1 else places - len(stage.entered))


async def hung(owners: int, lendable: int) -> Stage:
    """A stage whose places are all taken by owners that stay too long."""
    stage = Stage(52, lendable)
    for number in range(owners):
        await stage.come(f"hung-{number}", 64)
    assert stage.turns.free == 0
    for owner, _ in [(name, task) for name, task in stage.tasks if task.done()]:
        stage.turns.overdue(owner)
    return stage


async def test_who_waits_gets_places_of_those_who_stay_too_long() -> None:
    """Where a few owners hold all and give nothing back, others go on: two places are lent of each such owner.

    None of them goes to those who stay too long.
    """
    stage = await hung(3, lendable=8)
    before = len(stage.entered)
    for number in range(10):
        await stage.come(f"other-{number}")
    # The third holds one place alone.
    assert stage.entered[before:] == [f"other-{number}" for number in range(5)]
    await stage.go("other-0")
    assert stage.entered[-1] == "other-5"


async def test_one_owner_lends_two_places() -> None:
    """What one owner has overdue leaves places to lend for the next."""
    stage = Stage(1, 8)
    await stage.come("hung")
    stage.turns.overdue("hung")
    await stage.come("other")
    await stage.come("another")
    assert stage.entered == ["hung", "other"]


async def test_nothing_is_lent_before_it_is_too_long() -> None:
    """Whoever takes its usual time keeps its place, and others wait for theirs."""
    stage = Stage(1, 8)
    await stage.come("in")
    await stage.come("other")
    assert stage.entered == ["in"]
    stage.turns.overdue("in")
    await asyncio.sleep(0)
    assert stage.entered == ["in", "other"]


async def test_lent_places_come_back() -> None:
    """When what stayed too long ends, or whoever had its place, there are as many as ever."""
    for first, second in (("in", "other"), ("other", "in")):
        stage = Stage(1, 1)
        await stage.come("in")
        stage.turns.overdue("in")
        await stage.come("other")
        for owner in (first, second):
            stage.turns.give(owner, overdue=owner == "in")
        assert stage.turns.free == 1
        await stage.come("a")
        await stage.come("b")
        assert stage.entered[-1] == "a"
        stage.turns.overdue("a")
        await asyncio.sleep(0)
        assert stage.entered[-1] == "b"


async def test_who_waits_can_be_dismissed() -> None:
    """All who wait are told to ask again, and hold nothing; those who are in stay in."""
    stage = Stage(1)
    await stage.come("in")
    await stage.come("one")
    await stage.come("other")
    stage.turns.dismiss()
    await asyncio.sleep(0)
    assert [type(task.exception()) for name, task in stage.tasks if name != "in"] == [Dismissed, Dismissed]
    await stage.go("in")
    assert stage.turns.free == 1


async def test_every_place_is_used_by_many() -> None:
    """As many owners as there are places fill them, each with one."""
    stage = Stage(56)
    for number in range(110):
        await stage.come(str(number), 10)
    assert stage.turns.free == 0
    assert len(stage.entered) == 56


async def test_owners_take_turns() -> None:
    """Who came with one is not behind all of those who came before with many."""
    stage = Stage(1)
    await stage.come("first")
    await stage.come("many", 3)
    await stage.come("few", 1)
    await stage.come("some", 2)
    for _ in range(6):
        await stage.go(stage.entered[-1])
    assert stage.entered == ["first", "many", "few", "some", "many", "some", "many"]


async def test_one_owner_goes_in_order() -> None:
    """What one owner asks for goes in the order in which it came."""
    turns = Turns(1)
    await turns.take("a")
    seen: list[int] = []

    async def one(number: int) -> None:
        await turns.take("a")
        seen.append(number)
        turns.give("a")

    tasks = [asyncio.create_task(one(number)) for number in range(5)]
    await asyncio.sleep(0)
    turns.give("a")
    await asyncio.gather(*tasks)
    assert seen == [0, 1, 2, 3, 4]


async def test_cancelled_while_waiting() -> None:
    """Who goes away while waiting takes no place, and is no obstacle to those behind."""
    stage = Stage(1)
    await stage.come("in")
    await stage.come("gone", 3)
    await stage.come("behind")
    await stage.cancel_waiting("gone")
    await stage.go("in")
    assert stage.entered == ["in", "behind"]
    await stage.go("behind")
    assert stage.turns.free == 1


async def test_cancelled_in_the_step_in_which_it_is_its_turn() -> None:
    """Who is let in and cancelled before it runs, or cancelled and passed over before it runs, loses no place."""
    for cancel_first in (True, False):
        turns = Turns(1)
        await turns.take("in")
        one, other = (asyncio.create_task(turns.take(owner)) for owner in ("one", "other"))
        await asyncio.sleep(0)
        if cancel_first:
            one.cancel()
        turns.give("in")
        one.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await one
        assert one.cancelled()
        await asyncio.wait_for(other, 10)
        turns.give("other")
        assert turns.free == 1


@pytest.mark.parametrize("holds", [False, True])
async def test_dismissed_and_cancelled_in_one_step(holds: bool) -> None:
    """Vault is gone and the mount's time is up at once: who waited gives back no place, since it had none."""
    turns = Turns(2)
    await turns.take("in")
    await turns.take("waits" if holds else "other")
    waiting = asyncio.create_task(turns.take("waits"))
    await asyncio.sleep(0)
    turns.dismiss()
    waiting.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await waiting
    assert waiting.cancelled()
    assert turns.free == 0
    turns.give("waits" if holds else "other")
    turns.give("in")
    assert turns.free == 2


@pytest.mark.parametrize("seed", range(5))
async def test_no_place_is_lost(seed: int) -> None:
    """After any mix of owners, stays and cancellations all places are free; never were more held than there are."""
    chance = random.Random(seed)  # a reproducible mix
    turns = Turns(7)
    inside = 0

    async def stay(owner: int, steps: int) -> None:
        nonlocal inside
        await turns.take(owner)
        try:
            inside += 1
            assert inside <= 7
            assert inside + turns.free <= 7
            for _ in range(steps):
                await asyncio.sleep(0)
        finally:
            inside -= 1
            turns.give(owner)

    tasks = []
    for _ in range(500):
        tasks.append(asyncio.create_task(stay(chance.randrange(5), chance.randrange(4))))
        if chance.random() < 0.4:
            await asyncio.sleep(0)
        if chance.random() < 0.4:
            chance.choice(tasks).cancel()
    async with asyncio.timeout(20):
        results = await asyncio.gather(*tasks, return_exceptions=True)
    assert {type(result) for result in results} == {type(None), asyncio.CancelledError}
    assert turns.free == 7
