"""The daemon as a program that tells what is inside it: `python -m tests.observed FILE FLAGS`.

At SIGUSR1 it writes to FILE, as JSON, how many tasks its event loop has and how many objects its garbage collector.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import os
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # Before its import, as the daemon does it.

from provider.cli import main, parts

_build = parts.build


@contextlib.asynccontextmanager
async def _observed(*settings: Any, **others: Any) -> AsyncIterator[parts.Parts]:
    file = Path(sys.argv[1])

    def tell() -> None:
        gc.collect()
        told = {"tasks": len(asyncio.all_tasks()), "objects": len(gc.get_objects())}
        fresh = file.with_name(f"{file.name}.new")
        fresh.write_text(json.dumps(told))
        fresh.rename(file)

    asyncio.get_running_loop().add_signal_handler(signal.SIGUSR1, tell)
    async with _build(*settings, **others) as built:
        yield built


if __name__ == "__main__":
    parts.build = _observed
    sys.exit(main(sys.argv[2:]))
