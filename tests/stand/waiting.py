"""Waiting for what another process does in its own time."""

from __future__ import annotations

import time
from collections.abc import Callable

from tests.stand.process import StandError

_INTERVAL = 0.01


def eventually(
    condition: Callable[[], bool], what: str, *, seconds: float = 20, instead: Callable[[], object] | None = None
) -> None:
    """Return as soon as `condition()` is true; StandError naming `what` when it is not within `seconds`.

    It also tells what `instead()` returns: how things are then, for whoever reads of a failure that came once.
    """
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise StandError(f"not within {seconds:g} s: {what}" + (f", but {instead()}" if instead else ""))
        time.sleep(_INTERVAL)
