"""Sensitive values whose repr is ``***``, and the scrubbing of text that came from elsewhere.

A leaf: it imports nothing of the provider, so that every room can use it.
"""

from __future__ import annotations

import re
from typing import Final, Generic, NoReturn, TypeVar

_T = TypeVar("_T")

MASK: Final = "***"

# What is never to be repeated, wherever a text came from: JWTs, and tokens of Vault ("hvs.", "hvb.", "hvr.")
# and OpenBao ("s.", "b.", "r."), docs/contract.md section 3. Vault's own words in an error may quote one.
_CREDENTIAL: Final = re.compile(
    r"eyJ[A-Za-z0-9_-]{6,}(?:\.[A-Za-z0-9_-]*){0,4}"
    r"|hv[sbr]\.[A-Za-z0-9_.-]{8,}"
    r"|(?<![A-Za-z0-9.-])[sbr]\.[A-Za-z0-9_-]{20,}(?:\.[A-Za-z0-9_-]+)?"
)

# Unicode's controls, line ends, surrogates and format characters, which show nothing and change how what is around them
# looks: whoever names a file or a role must not be able to start a line of our log, to recolour the terminal of whoever
# reads it, nor to turn the order of its words. Source: categories Cc, Cf, Cs, Zl and Zp of Unicode 15.1
_CONTROL: Final = re.compile(
    "[\x00-\x1f\x7f-\x9f\xad\u0600-\u0605\u061c\u06dd\u070f\u0890-\u0891\u08e2\u180e\u200b-\u200f\u2028-\u202e"
    "\u2060-\u2064\u2066-\u206f\ud800-\udfff\ufeff\ufff9-\ufffb\U000110bd\U000110cd\U00013430-\U0001343f"
    "\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0001\U000e0020-\U000e007f]"
)


class Sensitive(Generic[_T]):
    """A value that shows itself only when asked: ``repr``, ``str`` and ``format`` give ``***``.

    It compares and hashes by its value, and refuses to be pickled.
    """

    __slots__ = ("_value",)

    def __init__(self, value: _T) -> None:
        self._value = value

    def reveal(self) -> _T:
        """The value itself; the call stands where the value is used, and nowhere else."""
        return self._value

    def __repr__(self) -> str:
        return MASK

    __str__ = __repr__

    def __format__(self, spec: str) -> str:
        return MASK

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sensitive) and bool(self._value == other._value)

    def __hash__(self) -> int:
        return hash(self._value)

    def __bool__(self) -> bool:
        return bool(self._value)

    def __reduce__(self) -> NoReturn:
        raise TypeError("a Sensitive value is not to be pickled")


def one_line(text: str, limit: int = 512) -> str:
    """``text`` as a safe part of one line: credentials masked, control characters escaped, ``limit`` characters."""
    # Most texts are names. A credential has a dot or "eyJ" in it, and what is to be escaped is not printable.
    if len(text) <= limit and "." not in text and "eyJ" not in text and text.isprintable():
        return text
    # Cut before the expressions run: the text may be a tenant's, or a load balancer's page of HTML. The margin
    # keeps a credential that straddles the cut recognisable.
    clean = _CREDENTIAL.sub(MASK, text[: limit + 4096])
    if not clean.isprintable():
        clean = _CONTROL.sub(_escape, clean)
    return clean if len(clean) <= limit else clean[: limit - 1] + "…"


def _escape(found: re.Match[str]) -> str:
    number = ord(found[0])
    return f"\\u{number:04x}" if number < 0x10000 else f"\\U{number:08x}"
