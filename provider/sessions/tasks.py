"""What a session has under way: each thing once, by its key, joined by whoever asks for the same.

Who asked may go away; what was sent is waited for all the same (docs/decisions/issuing-tasks.md).
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Collection, Coroutine
from typing import Any, Final, TypeVar

from provider.errors import AnswerLost
from provider.sessions.file import SessionFile

_T = TypeVar("_T")

# What was sent is waited for beyond its mount's own time, since its answer may hold a credential that is ours.
ANSWER_SECONDS: Final = 300.0


class _Bound:
    """When a task began and when it is given up, in the event loop's time; and whether it was."""

    __slots__ = ("began", "over", "until")

    def __init__(self, began: float, until: float) -> None:
        self.began = began
        self.until = until
        self.over = False


class Tasks:
    """The tasks of one session, whose ``file`` those hold that may issue something.

    One timer gives up what is over: a mount of ten objects has as many tasks, and timers of their own took some 4 % of
    a node boot's CPU.
    """

    def __init__(self, file: SessionFile) -> None:
        self._file = file
        self._tasks: dict[object, asyncio.Task[Any]] = {}
        self._bounds: dict[asyncio.Task[Any], _Bound] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._next = math.inf

    @property
    def running(self) -> Collection[asyncio.Task[Any]]:
        """Those that have not ended."""
        return self._tasks.values()

    async def join(self, key: object, start: Callable[[], Coroutine[Any, Any, _T]]) -> _T:
        """The result of the task for ``key``, started here unless it is under way; whoever waits may go away."""
        return await asyncio.shield(self.task(key, start))

    def task(
        self,
        key: object,
        start: Callable[[], Coroutine[Any, Any, _T]],
        *,
        issues: bool = True,
        until: float = math.inf,
    ) -> asyncio.Task[_T]:
        """The task for ``key``, started here unless it is under way.

        ``issues`` says that it may issue something, and so must hold the session's file where there is one. ``until``,
        in the event loop's time, is when it is given up though others may have joined it. It raises AnswerLost then, or
        after ANSWER_SECONDS.
        """
        task: asyncio.Task[_T] | None = self._tasks.get(key)
        if task is not None:
            return task
        return self.start(key, start, held=issues and self._file.in_use, until=until)

    def start(
        self,
        key: object,
        start: Callable[[], Coroutine[Any, Any, _T]],
        *,
        held: bool = False,
        until: float = math.inf,
    ) -> asyncio.Task[_T]:
        """Start a task for ``key``, of which there is none; if ``held``, it holds the session's file."""
        began = asyncio.get_running_loop().time()
        bound = _Bound(began, min(until, began + ANSWER_SECONDS))
        task = self._tasks[key] = asyncio.create_task(self._bounded(start, bound, held=held))
        task.add_done_callback(lambda done: self._done(key, done))
        return task

    async def ended(self) -> None:
        """Wait for all that is under way, however it ends."""
        await asyncio.gather(*self.running, return_exceptions=True)

    async def close(self) -> None:
        """Abandon all that is under way."""
        for task in self.running:
            task.cancel()
        await self.ended()

    def _done(self, key: object, task: asyncio.Task[Any]) -> None:
        del self._tasks[key]
        self._bounds.pop(task, None)
        if not self._tasks:
            self._watch(math.inf)
        seen(task)

    async def _bounded(self, start: Callable[[], Coroutine[Any, Any, _T]], bound: _Bound, *, held: bool) -> _T:
        self._begin(bound)
        try:
            return await (self._file.hold(start) if held else start())
        except asyncio.CancelledError:
            if not bound.over:
                raise
        raise AnswerLost(
            f"Vault did not answer within {bound.until - bound.began:.0f} s", "check Vault's load and the network to it"
        )

    def _begin(self, bound: _Bound) -> None:
        """The current task begins, and is watched from now on: cancelled before its first step it could not say why."""
        # In no variable of the task's own frame: its error refers to the frame, and the task to its error.
        if task := asyncio.current_task():
            self._bounds[task] = bound
            self._watch(bound.until)

    def _watch(self, until: float) -> None:
        """See to it that what is over then is given up; infinite where nothing is under way."""
        if self._timer is not None:
            if self._next <= until < math.inf:
                return
            self._timer.cancel()
        self._next = until
        loop = asyncio.get_running_loop()
        self._timer = loop.call_at(until, self._give_up) if until < math.inf else None

    def _give_up(self) -> None:
        now = asyncio.get_running_loop().time()
        self._timer = None
        for task, bound in self._bounds.items():
            if bound.until <= now and not bound.over:
                bound.over = True
                task.cancel()
        self._watch(min([bound.until for bound in self._bounds.values() if not bound.over], default=math.inf))


def seen(task: asyncio.Task[Any]) -> None:
    """Who waited may be gone, and Python would complain of an exception that nobody read."""
    if not task.cancelled():
        task.exception()
