"""The clock that everything with a lifetime is measured by; a constructor argument wherever time matters."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Protocol


class Clock(Protocol):
    """Two readings of time, in seconds."""

    def now(self) -> float:
        """Seconds that only grow, and go on while the machine is suspended."""
        ...

    def epoch(self) -> str:
        """Names the start from which ``now`` counts: readings of equal epochs compare, also across processes."""
        ...

    def wall(self) -> float:
        """Seconds since the Unix epoch; they may jump. Only for dates that others made, as a certificate's end."""
        ...


class SystemClock:
    """The machine's clock.

    CLOCK_BOOTTIME, since a lease at Vault goes on expiring while this node sleeps, which CLOCK_MONOTONIC does not
    count, and since neither is moved by whoever sets the date.
    """

    _epoch = ""

    def now(self) -> float:
        """Seconds since boot, suspended ones included."""
        return time.clock_gettime(time.CLOCK_BOOTTIME)

    def epoch(self) -> str:
        """The kernel's name for this boot."""
        if not self._epoch:
            self._epoch = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return self._epoch

    def wall(self) -> float:
        """Seconds since the Unix epoch."""
        return time.time()
