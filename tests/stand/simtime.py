"""Simulated time: an event loop whose clock jumps to the next timer, and clocks that a test can jump, set and reboot.

Hours pass in milliseconds. Sockets and threads are real: time stands still while any of them has something to say.
"""

from __future__ import annotations

import asyncio
import functools
import selectors
from collections.abc import Callable, Coroutine
from concurrent.futures import Executor, ThreadPoolExecutor
from typing import Any, ParamSpec, TypeVar, TypeVarTuple

from tests.stand.process import StandError

_P = ParamSpec("_P")
_T = TypeVar("_T")
_Ts = TypeVarTuple("_Ts")
# How long a thread, or a loop that has no timer left, may keep everything waiting.
_REAL_SECONDS = 10.0


class _Selector(selectors.DefaultSelector):
    """Waits for sockets by letting the loop's time pass instead of the machine's."""

    def __init__(self) -> None:
        super().__init__()
        self.time = 0.0
        self.threads = 0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        ready = super().select(0)
        if ready or timeout == 0:
            return ready
        if self.threads or timeout is None:
            ready = super().select(_REAL_SECONDS)
            if not ready:
                raise StandError("nothing is left that could happen")
            return ready
        self.time += max(0.0, timeout)
        return []


class SimLoop(asyncio.SelectorEventLoop):
    """An event loop on simulated time, which begins at 0.

    Works with Unix sockets between tasks of this loop: what was sent through one is there at once, so that a loop
    with nothing to read and no thread at work has nothing to wait for but its timers.
    """

    def __init__(self) -> None:
        self._simulated = _Selector()
        self._pool = ThreadPoolExecutor(4)
        self.complaints: list[dict[str, Any]] = []
        """What asyncio would only have logged: tasks that failed unheard."""
        super().__init__(self._simulated)
        self.set_default_executor(self._pool)
        self.set_exception_handler(lambda _, context: self.complaints.append(context))

    def time(self) -> float:
        return self._simulated.time

    def run_in_executor(self, executor: Executor | None, func: Callable[[*_Ts], _T], *args: *_Ts) -> asyncio.Future[_T]:
        self._simulated.threads += 1
        future = super().run_in_executor(executor, func, *args)
        future.add_done_callback(self._thread_done)
        return future

    def _thread_done(self, _: object) -> None:
        self._simulated.threads -= 1

    async def shutdown_default_executor(self, timeout: float | None = None) -> None:
        """At once: asyncio's own waits for a thread with a timer, which would not wait here."""
        self._pool.shutdown()


def simulated(test: Callable[_P, Coroutine[Any, Any, None]]) -> Callable[_P, None]:
    """Run a test's coroutine on simulated time; it fails, too, if a task failed that nobody waited for."""

    @functools.wraps(test)
    def run(*args: _P.args, **kwargs: _P.kwargs) -> None:
        loop = SimLoop()
        with asyncio.Runner(loop_factory=lambda: loop) as runner:
            runner.run(test(*args, **kwargs))
        if loop.complaints:
            raise StandError(f"failed unheard: {loop.complaints}")

    return run


class World:
    """The time that passes for everybody: the loop's, and what passes while the node is suspended."""

    def __init__(self) -> None:
        self._suspended = 0.0

    def now(self) -> float:
        """Seconds since the simulation began."""
        return asyncio.get_running_loop().time() + self._suspended

    def suspend(self, seconds: float) -> None:
        """The node sleeps: its timers stand still (CLOCK_MONOTONIC), everybody else's time passes."""
        self._suspended += seconds


class SimClock:
    """A node's clock in a World, with a boot and a calendar of its own."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._booted_at = -1000.0
        self._boots = 1
        self._date = 1_700_000_000.0

    def now(self) -> float:
        return self._world.now() - self._booted_at

    def epoch(self) -> str:
        return f"boot-{self._boots}"

    def wall(self) -> float:
        return self._date + self._world.now()

    def set_date(self, seconds: float) -> None:
        """Somebody moves the calendar by so many seconds."""
        self._date += seconds

    def reboot(self) -> None:
        """Count from the start again; a state directory on a disk would be found so."""
        self._booted_at = self._world.now() - 5.0
        self._boots += 1
