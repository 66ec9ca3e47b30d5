"""The program: its flags, the parts it is built of, and its life from start to signal."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from provider.cli.daemon import Build


def main(arguments: Sequence[str] | None = None, build: Build | None = None) -> int:
    """Run the program and return its exit code: 0, 1 when the daemon cannot go on, 2 for a wrong flag.

    ``arguments`` are those of the process where they are None. ``build`` makes the parts that answer mounts.
    """
    # Imports make little garbage and much that stays, which the collector would look through a hundred times: a
    # quarter of a start's CPU. It is let go again once the daemon serves.
    gc.disable()
    try:
        from provider.cli import daemon

        return daemon.main(arguments, build)
    finally:
        gc.enable()


__all__ = ["main"]
