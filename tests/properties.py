"""A reader of Java's .properties, by the rules of java.util.Properties.load."""

from __future__ import annotations

import re

_NAMES = {"t": "\t", "n": "\n", "r": "\r", "f": "\f"}


def read_properties(text: str) -> dict[str, str]:
    """The properties of a text: natural lines joined, comments left out, escapes undone."""
    found = {}
    for line in _logical_lines(text):
        split = re.match(r"((?:\\.|[^\\:= \t\f])*)[ \t\f]*[:=]?[ \t\f]*(.*)", line, re.DOTALL)
        assert split is not None
        found[_unescaped(split[1])] = _unescaped(split[2])
    return found


def _logical_lines(text: str) -> list[str]:
    lines: list[str] = []
    joined = ""
    for natural in re.split(r"\r\n|\n|\r", text):
        stripped = natural.lstrip(" \t\f")
        if not joined and (not stripped or stripped[0] in "#!"):
            continue
        joined += stripped
        backslashes = len(joined) - len(joined.rstrip("\\"))
        if backslashes % 2:
            joined = joined[:-1]
            continue
        lines.append(joined)
        joined = ""
    return lines + ([joined] if joined else [])


def _unescaped(text: str) -> str:
    def one(escape: re.Match[str]) -> str:
        if escape[1]:
            return chr(int(escape[1], 16))
        return _NAMES.get(escape[2], escape[2])

    units = re.sub(r"\\(?:u([0-9a-fA-F]{4})|(.))", one, text, flags=re.DOTALL)
    # Java's characters are units of UTF-16.
    return units.encode("utf-16-be", "surrogatepass").decode("utf-16-be", "surrogatepass")
