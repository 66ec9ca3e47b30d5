"""Lines that a thread of its own writes, so that whoever has something to tell never waits for a pipe or a disk."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Final

# Lines that wait, and the bytes that they may come to; what comes on top is refused, since a full pipe or a full disk
# must not stop mounts, nor fill the memory: a line may tell of a thousand objects.
MAX_WAITING: Final = 2000
MAX_WAITING_BYTES: Final = 8 * 1024 * 1024
# Seconds that the end of the process waits for the rest to be written.
FLUSH_SECONDS: Final = 2.0


class LineWriter:
    """Hands lines to ``write`` in a thread, in order, as many at a time as have come together.

    ``write`` gets each line with its end. It may take as long as it likes, and raises nothing. ``gather`` seconds pass
    between two writes, in which lines come together: to wake a thread for each costs more than to write it, but whoever
    kills the process takes with it what has gathered.
    """

    def __init__(
        self,
        name: str,
        write: Callable[[Sequence[bytes]], None],
        *,
        capacity: int = MAX_WAITING,
        room: int = MAX_WAITING_BYTES,
        gather: float = 0.0,
    ) -> None:
        self._write = write
        self._gather = gather
        self._capacity = capacity
        self._room = room
        self._waiting: list[bytes] = []
        self._size = 0
        self._closing = threading.Event()
        # Its lock may be taken twice by one thread: a finalizer that runs inside ``put`` may have something to log.
        self._changed = threading.Condition(threading.RLock())
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self.taken = 0
        """How many lines found room, ever."""
        self.refused = 0
        """How many found none."""

    def start(self) -> None:
        """Begin to write."""
        self._thread.start()

    def put(self, line: str, *, last: bool = False) -> bool:
        """Whether there was room for ``line``, which has no end of its own; without, it is never written.

        There always is for the ``last``, after which no more come.
        """
        data = line.encode("utf-8", "backslashreplace") + b"\n"
        with self._changed:
            if not last and (len(self._waiting) >= self._capacity or self._size + len(data) > self._room):
                self.refused += 1
                return False
            self.taken += 1
            self._waiting.append(data)
            self._size += len(data)
            self._changed.notify()
        return True

    def close(self) -> bool:
        """Write what is waiting, and end; False where that takes longer than FLUSH_SECONDS, and is given up."""
        self._closing.set()
        with self._changed:
            self._changed.notify()
        self._thread.join(FLUSH_SECONDS)
        with self._changed:
            self._waiting.clear()
        return not self._thread.is_alive()

    def _run(self) -> None:
        while lines := self._take():
            self._write(lines)
            if self._gather:
                self._closing.wait(self._gather)

    def _take(self) -> list[bytes]:
        """All lines that wait, at least one; none at the end."""
        with self._changed:
            while not self._waiting and not self._closing.is_set():
                self._changed.wait()
            lines, self._waiting, self._size = self._waiting, [], 0
            return lines
