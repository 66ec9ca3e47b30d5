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

# Whoever names a file or a role must not be able to start a line of our log, to recolour the terminal of whoever reads
# it, to turn the order of its words, nor to make one name look like another by what shows nothing. Source, Unicode
# 15.1: categories Cc, Cf, Cs, Zl, Zp, and Zs but for the space (UnicodeData.txt); Default_Ignorable_Code_Point, with
# what is reserved for it (DerivedCoreProperties.txt).
_UNSEEN: Final = (
    "\x00-\x1f\x7f-\xa0\xad\u034f\u0600-\u0605\u061c\u06dd\u070f\u0890-\u0891\u08e2\u115f-\u1160\u1680\u17b4-\u17b5"
    "\u180b-\u180f\u2000-\u200f\u2028-\u202f\u205f-\u206f\u3000\u3164\ud800-\udfff\ufe00-\ufe0f\ufeff\uffa0\ufff0-\ufffb"
    "\U000110bd\U000110cd\U00013430-\U0001343f\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0000-\U000e0fff"
)
# What is blank by its design, and no property of Unicode says so: braille without a dot, a filler (Khitan), a note
# without a head, two blanks of hieroglyphs.
_BLANK: Final = "\u2800\U00016fe4\U0001d159\U00013441\U00013442"
_HIDDEN: Final = re.compile(f"[{_UNSEEN}{_BLANK}]")


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
    """``text`` as a safe part of one line: credentials masked, what shows nothing escaped, ``limit`` characters."""
    # Most texts are names. A credential has a dot or "eyJ" in it, and of ASCII what is to be escaped is not printable.
    if len(text) <= limit and "." not in text and "eyJ" not in text and text.isascii() and text.isprintable():
        return text
    # Cut before the expressions run: the text may be a tenant's, or a load balancer's page of HTML. The margin
    # keeps a credential that straddles the cut recognisable.
    clean = _CREDENTIAL.sub(MASK, text[: limit + 4096])
    if not (clean.isascii() and clean.isprintable()):
        clean = _HIDDEN.sub(_escape, clean)
    return clean if len(clean) <= limit else clean[: limit - 1] + "…"


def _escape(found: re.Match[str]) -> str:
    number = ord(found[0])
    return f"\\u{number:04x}" if number < 0x10000 else f"\\U{number:08x}"
