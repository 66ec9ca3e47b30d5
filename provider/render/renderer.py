"""The objects of a mount that are not plain, rendered: in a thread, and their programs in the sandbox.

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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from provider.errors import InvalidClass, ProviderError
from provider.redact import one_line
from provider.render.contents import Contents
from provider.render.job import Job, Made, failed_program
from provider.settings import MIB
from provider.spc.model import ObjectSpec, Template
from provider.telemetry.events import ProgramEnded, Telemetry

if TYPE_CHECKING:
    from provider.sandbox.process import Program, Result, Sandbox

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
        self, volume: str, answered: Sequence[Answered], owner: str, contents: Contents
    ) -> list[ProviderError | None]:
        """Add the files of each object to ``contents``; the error of each that failed.

        ``volume`` is whose memory is used, ``owner`` as ``check`` has it.
        """
        jobs = [Job(given.spec, given.responses) for given in answered]
        before = self._remembered[volume][0] if volume in self._remembered else {}
        await asyncio.to_thread(_prepare, jobs)
        made = {job.digest: before[job.digest] for job in jobs if job.digest in before}
        waiting = {job.digest: program for job in jobs if job.digest not in made and (program := job.program())}
        if waiting:
            # One process for the programs of a mount.
            made.update(zip(waiting, await self._run(list(waiting.values()), owner), strict=True))
        results = await asyncio.to_thread(_finish, jobs, made, contents)
        # What may have failed for want of time is tried again.
        final = {digest: kept for digest, kept in made.items() if getattr(kept, "final", True)}
        self._keep(volume, final)
        return results

    async def close(self) -> None:
        """End the sandbox's process."""
        if self._sandbox is not None:
            await self._sandbox.close()

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


def _prepare(jobs: Sequence[Job]) -> None:
    known: dict[int, str] = {}
    for job in jobs:
        job.prepare(known)


def _finish(jobs: Sequence[Job], made: Made, contents: Contents) -> list[ProviderError | None]:
    errors: list[ProviderError | None] = []
    for job in jobs:
        error: ProviderError | None = None
        try:
            if contents.full:
                # A thousand objects of one large secret would be gigabytes before anybody counted them.
                raise contents.too_much()
            contents.add(job.spec.name, job.finish(made))
        except ProviderError as failure:
            error = failure
        errors.append(error)
    return errors
