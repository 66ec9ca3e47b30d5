"""The daemon as a program whose calendar a test moves: `python -m tests.skewed FILE FLAGS`.

FILE holds how many seconds the calendar is ahead of the machine's. What counts from the machine's start stays true,
as it does where somebody sets a node's date.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

from provider.cli import main


def skew(file: Path) -> None:
    """Move what `time.time` says by what the file holds, from now on."""
    true = time.time

    def skewed() -> float:
        return true() + float(file.read_text())

    time.time = skewed


if __name__ == "__main__":
    skew(Path(sys.argv[1]))
    sys.exit(main(sys.argv[2:]))
