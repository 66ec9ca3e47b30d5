"""What a session has under way, on the event loop of the daemon: when it is given up, and that no timer outlives it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any, cast

import pytest
import uvloop

from provider.errors import AnswerLost
from provider.sessions.file import SessionFile
from provider.sessions.tasks import ANSWER_SECONDS, Tasks


class NoFile:
    """The file of a session without a state directory."""

    in_use = False

    async def hold(self, work: Callable[[], Awaitable[Any]]) -> Any:
        """Nothing is held."""
        return await work()


def tasks() -> Tasks:
    """Those of a session that has none yet."""
    return Tasks(cast("SessionFile", NoFile()))


def of_the_daemon(scene: Callable[[], Awaitable[None]]) -> Callable[[], None]:
    """A test that runs as the daemon does, on uvloop, which runs timers before what is ready."""

    async def played() -> None:
        async with asyncio.timeout(30):
            await scene()

    def test() -> None:
        uvloop.run(played())

    test.__name__, test.__doc__ = scene.__name__, scene.__doc__
    return test


async def forever() -> None:
    """Never answer."""
    await asyncio.Event().wait()


@of_the_daemon
async def test_what_is_over_before_it_begins_is_an_answer_lost() -> None:
    """However busy the loop is in the moment in which a task is made, it ends with an error of ours."""
    mine, loop = tasks(), asyncio.get_running_loop()
    for busy in (0.0, 0.003, 0.02):
        for _ in range(5):
            task = mine.task("read", forever, until=loop.time() + 0.001)
            time.sleep(busy)  # noqa: ASYNC251  # that is the point
            with pytest.raises(AnswerLost, match="did not answer within 0 s"):
                await task


@of_the_daemon
async def test_each_has_its_own_end() -> None:
    """One timer gives up each task in its time, the later ones too, and leaves the others alone."""
    mine, loop = tasks(), asyncio.get_running_loop()
    began = loop.time()
    late, soon, lives = (mine.task(key, forever, until=began + end) for key, end in (("a", 0.3), ("b", 0.1), ("c", 60)))
    ends = {}
    for name, task in (("soon", soon), ("late", late)):
        with pytest.raises(AnswerLost):
            await task
        ends[name] = loop.time() - began
    assert 0.1 <= ends["soon"] < 0.3 <= ends["late"] < 5
    assert not lives.done()
    await mine.close()
    assert lives.cancelled()


@of_the_daemon
async def test_no_timer_outlives_what_it_was_for() -> None:
    """When the last task has ended, by an answer or at the session's end, nothing is left of it."""
    mine = tasks()
    assert await mine.task("read", lambda: asyncio.sleep(0, "answer")) == "answer"
    await asyncio.sleep(0)
    assert (mine._timer, mine._bounds, list(mine.running)) == (None, {}, [])
    mine.task("read", forever)
    await asyncio.sleep(0)
    assert mine._next == pytest.approx(asyncio.get_running_loop().time() + ANSWER_SECONDS, abs=5)
    await mine.close()
    assert (mine._timer, mine._bounds, list(mine.running)) == (None, {}, [])


@of_the_daemon
async def test_who_is_cancelled_by_another_is_cancelled() -> None:
    """Only what is over is an answer lost."""
    mine = tasks()
    task = mine.task("read", forever)
    await asyncio.sleep(0)
    task.cancel()
    await asyncio.wait([task])
    assert task.cancelled()
