"""Durations and booleans as Go writes them, which is how flags and classes write them."""

from __future__ import annotations

import re
from typing import Final

_UNITS: Final = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "μs": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}
_PART: Final = re.compile(r"([0-9]{1,18}(?:\.[0-9]{0,18})?|\.[0-9]{1,18})(ns|us|µs|μs|ms|s|m|h)")

# Those that strconv.ParseBool reads (docs/contract.md section 2).
BOOLEANS: Final = {
    **dict.fromkeys(("1", "t", "T", "true", "TRUE", "True"), True),
    **dict.fromkeys(("0", "f", "F", "false", "FALSE", "False"), False),
}


def read_duration(text: str) -> float:
    """Seconds of a duration as Go writes them: ``90s``, ``2m``, ``1h30m``, ``300ms``, ``0``; never negative.

    Raises ValueError with a sentence of what is allowed.
    """
    if text == "0":
        return 0.0
    parts = list(_PART.finditer(text))
    if not parts or "".join(part[0] for part in parts) != text:
        raise ValueError("a duration like 90s, 2m, 1h30m or 300ms")
    return sum(float(part[1]) * _UNITS[part[2]] for part in parts)
