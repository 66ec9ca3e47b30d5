"""Which keys of a secret includes and excludes leave: their expressions joined into one, and within bounds. Pure.

RE2 takes linear time, but what it takes for each character can be as much as an expression is large, and both the
expressions and the keys come from anyone.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from typing import Final

from provider.spc.expressions import regex

# Seconds of processor time for the keys of one secret: some hundred times what ten expressions take with 1,000 keys.
MATCH_SECONDS: Final = 0.5
# Characters of a key that expressions are tried on: a file's name has 255 bytes, and the time for a key is not cut.
MAX_KEY: Final = 1024
# Bytes of the joined expression: what is larger is tried one by one.
_MAX_JOINED: Final = 256 * 1024


class TooSlow(Exception):
    """The expressions take more than MATCH_SECONDS with the keys."""


class TooLong(Exception):
    """A key is longer than MAX_KEY."""

    def __init__(self, key: str) -> None:
        super().__init__()
        self.key = key


def wanted(keys: Iterable[str], includes: Sequence[str], excludes: Sequence[str]) -> list[str]:
    """The keys that no exclude is found in and, where there are includes, one of these is.

    Raises TooSlow and TooLong.
    """
    if not includes and not excludes:
        return list(keys)
    included, excluded = found_in(includes), found_in(excludes)
    until = time.thread_time() + MATCH_SECONDS
    kept = []
    for key in keys:
        if len(key) > MAX_KEY:
            raise TooLong(key)
        if time.thread_time() > until:
            raise TooSlow
        # A key that is no Unicode text is no file's name, and no engine could look into it.
        text = key.encode("utf-8", "replace").decode()
        if not excluded(text) and (not includes or included(text)):
            kept.append(key)
    return kept


def found_in(expressions: Sequence[str]) -> Callable[[str], bool]:
    """Whether one of the expressions, which are all legal, is found in a text."""
    # An open \Q would quote those behind it too.
    if len(expressions) > 1 and not any("\\Q" in text for text in expressions):
        import re2

        options = re2.Options()
        options.max_mem = _MAX_JOINED
        options.log_errors = False
        try:
            joined = re2.compile("|".join(f"(?:{text})" for text in expressions), options=options)
        except re2.error:
            pass  # too large
        else:
            return lambda text: joined.search(text) is not None
    each = [regex(text) for text in expressions]
    return lambda text: any(found(text) for found in each)
