"""How many connections several pools have together: what is open costs a file descriptor, whichever server it is to."""

from __future__ import annotations

from provider.http.connection import Connection


class Allowance:
    """``limit`` connections for all pools that have it, as long as no more requests than that are under way in them.

    One too many closes the one that has been at rest for longest, whichever pool's it is.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._open = 0
        self._resting: dict[Connection, None] = {}  # in the order in which they came to rest

    @property
    def spare(self) -> int:
        """How many more there may be before one that rests is closed for it."""
        return self._limit - self._open

    def opened(self) -> None:
        """One more is there, or about to be."""
        self._open += 1
        if self._open > self._limit and self._resting:
            oldest = next(iter(self._resting))
            del self._resting[oldest]
            oldest.abort()

    def closed(self) -> None:
        """One is gone."""
        self._open -= 1

    def rests(self, connection: Connection) -> None:
        """It is of no use to anybody at the moment."""
        self._resting[connection] = None

    def taken(self, connection: Connection) -> None:
        """It rests no more."""
        self._resting.pop(connection, None)
