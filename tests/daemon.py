"""The daemon as a program, all of it real but for what fetches: a class says how its mount is to go.

`python -m tests.daemon FLAGS` takes the flags of vault-csi-provider. The `secretPath` of a class's first object
scripts the mount: `sleep/SECONDS` answers after that time. Every file holds the process id of the daemon that
answered, so that a test knows which one it was.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
from collections.abc import AsyncIterator, Callable, Sequence

from provider.cli import main
from provider.cli.parts import Parts
from provider.mount import MountResult
from provider.render import RenderedFile
from provider.settings import Settings
from provider.spc import MountSpec, ObjectSpec, Parser
from provider.telemetry.events import Telemetry


class Scripted:
    async def mount(self, spec: MountSpec, spent: Callable[[float], None]) -> MountResult:
        _, seconds = spec.objects[0].request.path.split("/")
        await asyncio.sleep(float(seconds))
        content = str(os.getpid()).encode()
        return MountResult(
            tuple(RenderedFile(wanted.name, wanted.mode, content) for wanted in spec.objects),
            tuple((wanted.name, "1") for wanted in spec.objects),
        )

    async def check(self, templates: Sequence[ObjectSpec], owner: str) -> None:
        raise NotImplementedError


@contextlib.asynccontextmanager
async def build(settings: Settings) -> AsyncIterator[Parts]:
    yield Parts(Parser(settings), Scripted(), Telemetry())


if __name__ == "__main__":
    sys.exit(main(build=build))
