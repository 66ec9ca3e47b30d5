"""The objects of a mount that are not plain, or large: rendered in a thread, and their programs in the sandbox.

What came of a program or a keystore is remembered for the volume, by a digest of all that went into it: a re-mount runs
again only what changed. Their engines are loaded by the first class that needs them.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import sys
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, TypeVar

from provider.errors import BadSecret, InvalidClass, ProviderError
from provider.redact import one_line
from provider.render.contents import Contents
from provider.render.job import Job, Made, failed_program
from provider.settings import MIB
from provider.spc.model import ObjectSpec, Template
from provider.telemetry.events import ProgramEnded, Telemetry
from provider.turns import Turns

if TYPE_CHECKING:
    from provider.sandbox.process import Program, Result, Sandbox

_T = TypeVar("_T")

# Seconds of processor time for a mount's objects, besides their programs', and at most one object over it: keystores,
# keys that expressions are tried on, and texts that are quoted may be a thousand, of a megabyte each. A usual mount
# takes some milliseconds, and twenty keystores for old Java half a second.
MAX_SECONDS: Final = 2.0
# Bytes of what is remembered of all volumes, and the volumes: beyond, the least recently mounted is rendered anew.
MAX_REMEMBERED: Final = 32 * MIB
MAX_VOLUMES: Final = 1000
# Seconds after which a volume that was not mounted again is forgotten: it has gone, and its secrets with it.
MAX_AGE: Final = 3600.0
# Templates whose text is known to be one.
MAX_CHECKED: Final = 1000
# Objects with one template that are named where it is at fault.
MAX_NAMED: Final = 5


@dataclass(frozen=True, slots=True)
class Answered:
    """An object, and Vault's whole answer to each of its sources, as ``json.loads`` gives it."""

    spec: ObjectSpec
    responses: Sequence[Mapping[str, Any]] = field(repr=False)


class Renderer:
    """Renders for a daemon. ``close`` ends the process that programs run in, if there is one."""

    def __init__(self, telemetry: Telemetry) -> None:
        self._telemetry = telemetry
        self._sandbox: Sandbox | None = None
        self._checked: OrderedDict[bytes, None] = OrderedDict()
        # By volume, the latest mounted last: what was made, its bytes, and when.
        self._remembered: OrderedDict[str, tuple[Made, int, float]] = OrderedDict()
        self._size = 0
        # One thread, of its own, so that what tenants have rendered takes neither more than one of the node's cores nor
        # the threads that Vault's answers, TLS files and sealed sessions wait for.
        self._thread = ThreadPoolExecutor(1, "render")
        self._turns = Turns(1)
        self._rendering: set[asyncio.Task[Any]] = set()

    async def check(self, objects: Sequence[ObjectSpec], owner: str) -> None:
        """Raise InvalidClass where a template among the objects is none, before anything is read for it.

        ``owner`` is who answers for the programs of the objects, the pod's namespace: it takes its turns with others.
        Raises another ProviderError where there was no time to tell.
        """
        unknown: dict[bytes, list[ObjectSpec]] = {}
        for spec in objects:
            if isinstance(spec.shape, Template):
                names = json.dumps([spec.shape.text, sorted(source.alias for source in spec.sources)])
                unknown.setdefault(hashlib.sha256(names.encode("utf-8", "surrogatepass")).digest(), []).append(spec)
        for digest in unknown.keys() & self._checked.keys():
            del unknown[digest]
        if not unknown:
            return
        from provider.sandbox.process import Check, Failure

        checks = [
            Check(spec.shape.text, tuple(source.alias for source in spec.sources))
            for spec, *_ in unknown.values()
            if isinstance(spec.shape, Template)
        ]
        results = await self._run(checks, owner)
        faults: list[str] = []
        untold: ProviderError | None = None
        for (digest, alike), result in zip(unknown.items(), results, strict=True):
            if isinstance(result, Failure) and not result.final:
                untold = untold or failed_program(alike[0], result)
            elif isinstance(result, Failure):
                named = ", ".join(one_line(spec.name, 80) for spec in alike[:MAX_NAMED])
                more = f" and {len(alike) - MAX_NAMED} more" if len(alike) > MAX_NAMED else ""
                faults.append(f"objects ({named}{more}) template: {result.what} ({result.advice})")
            else:
                self._checked[digest] = None
        while len(self._checked) > MAX_CHECKED:
            self._checked.popitem(last=False)
        if faults:
            raise InvalidClass(faults)
        if untold is not None:
            raise untold

    async def render(
        self,
        volume: str,
        answered: Sequence[Answered],
        owner: str,
        contents: Contents,
        *,
        spent: Callable[[float], None] = lambda _: None,
    ) -> list[ProviderError | None]:
        """Add the files of each object to ``contents``; the error of each that failed.

        ``volume`` is whose memory is used, ``owner`` as ``check`` has it. ``spent`` is told the seconds of processor
        time that the thread took, also where the caller has gone meanwhile.
        """
        jobs = [Job(given.spec, given.responses) for given in answered]
        before = self._remembered[volume][0] if volume in self._remembered else {}
        budget = _Budget(len(jobs))
        await self._in_thread(owner, spent, lambda: _prepare(jobs, budget))
        made = {job.digest: before[job.digest] for job in jobs if job.digest in before}
        waiting = {job.digest: program for job in jobs if job.digest not in made and (program := job.program())}
        if waiting:
            # One process for the programs of a mount.
            made.update(zip(waiting, await self._run(list(waiting.values()), owner), strict=True))
        results = await self._in_thread(owner, spent, lambda: _finish(jobs, made, contents, budget))
        # What may have failed for want of time is tried again.
        final = {digest: kept for digest, kept in made.items() if getattr(kept, "final", True)}
        self._keep(volume, final)
        return results

    async def close(self) -> None:
        """End the sandbox's process, and let go of the thread."""
        self._thread.shutdown(wait=False, cancel_futures=True)
        if self._sandbox is not None:
            await self._sandbox.close()

    async def _in_thread(self, owner: str, spent: Callable[[float], None], work: Callable[[], _T]) -> _T:
        """Do ``work`` in the thread when it is ``owner``'s turn, which ends with it and not with who waits here."""

        def timed() -> tuple[_T, float]:
            began = time.thread_time()
            return work(), time.thread_time() - began

        async def turn() -> _T:
            try:
                result, seconds = await asyncio.get_running_loop().run_in_executor(self._thread, timed)
            finally:
                self._turns.give(owner)
            spent(seconds)
            return result

        await self._turns.take(owner)
        task = asyncio.create_task(turn())
        self._rendering.add(task)
        task.add_done_callback(self._ended)
        return await asyncio.shield(task)

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._rendering.discard(task)
        if not task.cancelled():
            task.exception()  # seen, should its caller have gone

    async def _run(self, programs: Sequence[Program], owner: str) -> list[Result]:
        from provider.sandbox.process import Failure, Sandbox

        if self._sandbox is None:
            self._sandbox = Sandbox()
        results = await self._sandbox.run(programs, owner)
        for result in results:
            if isinstance(result, Failure) and result.limit:
                self._telemetry.record(ProgramEnded(result.limit))
        return results

    def _keep(self, volume: str, memory: Made) -> None:
        texts = [kept if isinstance(kept, bytes) else getattr(kept, "text", "") for kept in memory.values()]
        size = sum(map(sys.getsizeof, texts))
        now = time.monotonic()
        before = self._remembered.pop(volume, ({}, 0, now))  # another mount of it may have been as fast
        self._size += size - before[1]
        self._remembered[volume] = (memory, size, now)
        while self._remembered and (
            self._size > MAX_REMEMBERED
            or len(self._remembered) > MAX_VOLUMES
            or now - next(iter(self._remembered.values()))[2] > MAX_AGE
        ):
            self._size -= self._remembered.popitem(last=False)[1][1]


class _Budget:
    """What is left of MAX_SECONDS for the objects of a mount, which are ``objects``. Of the thread that counts it."""

    def __init__(self, objects: int) -> None:
        self._objects = objects
        self._left = MAX_SECONDS
        self._error: BadSecret | None = None

    def each(self, jobs: Sequence[Job]) -> Iterator[tuple[Job, BadSecret | None]]:
        """The jobs, and the error of those for which nothing is left, the same for all of them."""
        began = time.thread_time()
        for done, job in enumerate(jobs):
            if self._error is None and time.thread_time() - began > self._left:
                self._error = BadSecret(
                    f"to render the volume takes more than {MAX_SECONDS:g} s of processor time: no more than {done} of "
                    f"{self._objects} objects are done",
                    "mount fewer keystores, includes and formats of large secrets, or split the SecretProviderClass",
                )
            yield job, self._error
        self._left -= time.thread_time() - began


def _prepare(jobs: Sequence[Job], budget: _Budget) -> None:
    known: dict[int, str] = {}
    for job, error in budget.each(jobs):
        if error is None:
            job.prepare(known)
        else:
            job.refuse(error)


def _finish(jobs: Sequence[Job], made: Made, contents: Contents, budget: _Budget) -> list[ProviderError | None]:
    errors: list[ProviderError | None] = []
    for job, late in budget.each(jobs):
        error: ProviderError | None = late
        try:
            if contents.full:
                # A thousand objects of one large secret would be gigabytes before anybody counted them.
                raise contents.too_much()
            if error is None:
                contents.add(job.spec.name, job.finish(made))
        except ProviderError as failure:
            error = failure
        errors.append(error)
    return errors
