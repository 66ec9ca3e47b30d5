"""What Vault's answers take in memory once they are parsed: known before, and bounded for all mounts together.

An answer is kept until its mount ends, and a small one on the wire may be large in memory: 4 bytes of JSON can be an
object of 70. So each mount counts its answers. A usual one stays small; one that comes to more needs one of a few
places, by which the daemon's memory is bounded whatever classes ask for.

Nobody waits for such a place while a read of the same mount is under way: others may wait for that read, and they may
be those who hold the places. What finds no place fails instead, and is read once more when there is one.
"""

from __future__ import annotations

import asyncio
from typing import Final

from provider.errors import BadSecret
from provider.settings import MIB
from provider.turns import Turns

# Each of these characters is at most one more object in memory, of about so many bytes.
JSON_MARKS: Final = b",[{:"
JSON_MARK_BYTES: Final = 80
# Python keeps a text with one character beyond Latin-1 in two or four bytes a character.
_WIDEST: Final = 4
# What one mount's answers may take. A volume holds 4 MiB of files, and an answer is that once more in Base64, or four
# times in a script of its own; what is left is for what the answers hold besides.
MAX_ANSWERS_BYTES: Final = 32 * MIB
# What they may take without a place: ten times what those of fifty usual secrets do.
SMALL_ANSWERS_BYTES: Final = 1 * MIB
# The same of all mounts. Of one Kubernetes namespace never more than is left for others.
ALL_SMALL_ANSWERS_BYTES: Final = 48 * MIB
# Mounts whose answers may take more, at one time; of one namespace one less.
LARGE_MOUNTS: Final = 3
# A credential that was issued is never read again for want of room, while it and the mount are no larger than this.
LEASED_BYTES: Final = 64 * 1024
LEASED_ANSWERS_BYTES: Final = 2 * MIB
# What answers may take that are remembered for their volumes' next mounts; of one namespace as above.
REMEMBERED_BYTES: Final = 32 * MIB
# What credentials may take that are kept and renewed, of one namespace as above: ten times what those of a node with
# 110 pods do. Other queries each time give ever other ones, and no mount has to succeed for them to be kept.
KEPT_BYTES: Final = 32 * MIB
# In such steps a mount is lent what all share: the answers of a usual one are two or three.
_STEP: Final = 16 * 1024
# A mount that has waited for a place in vain still has to say so.
_LAST_SECONDS: Final = 1.0


class NoRoom(BadSecret):
    """An answer that would take too much memory, beside those of its mount or those of other mounts.

    ``room`` is the mount's whose read it was; ``passing`` says that there may be room later. ``status`` is the
    answer's, 0 where there was none since the request was not sent.
    """

    room: Room | None = None
    passing = False
    status = 0


class Loans:
    """Bytes that are lent to owners, Kubernetes namespaces: to each no more than is then left for others."""

    def __init__(self, size: int) -> None:
        self.free = size
        self._lent: dict[str, int] = {}

    def lend(self, owner: str, size: int) -> bool:
        """Lend ``size`` bytes more to ``owner``; whether there are so many for it."""
        lent = self._lent.get(owner, 0) + size
        if lent > self.free - size:
            return False
        self.free -= size
        self._lent[owner] = lent
        return True

    def give_back(self, owner: str, size: int) -> None:
        """Take back ``size`` bytes that were lent."""
        if size:
            self.free += size
            self._lent[owner] -= size
            if not self._lent[owner]:
                del self._lent[owner]

    def hold(self, owner: str, size: int) -> Held | None:
        """Lend ``size`` bytes to ``owner`` for as long as anybody has what this gives; None where there are none."""
        return Held(self, owner, size) if self.lend(owner, size) else None


class Held:
    """Bytes that are lent until this is forgotten."""

    def __init__(self, loans: Loans, owner: str, size: int) -> None:
        self._loans, self._owner, self._size = loans, owner, size

    def grow(self, size: int) -> bool:
        """Hold ``size`` bytes at least from now on; False, and nothing changes, where the owner has no more."""
        if size > self._size:
            if not self._loans.lend(self._owner, size - self._size):
                return False
            self._size = size
        return True

    def __del__(self) -> None:
        self._loans.give_back(self._owner, self._size)


class Memory:
    """The memory of all mounts' answers. For one event loop."""

    def __init__(self) -> None:
        self.places = Turns(LARGE_MOUNTS)
        self.small = Loans(ALL_SMALL_ANSWERS_BYTES)
        self.remembered = Loans(REMEMBERED_BYTES)
        self.kept = Loans(KEPT_BYTES)

    def room(self, owner: str) -> Room:
        """The room of one mount of ``owner``'s, a Kubernetes namespace; to be closed when the mount has ended."""
        return Room(self, owner)


class Room:
    """What one mount's answers take. Sizes are ``size_parsed``'s."""

    def __init__(self, memory: Memory, owner: str) -> None:
        self._memory = memory
        self._owner = owner
        self._taken = 0
        self._granted = 0  # what may be taken without asking
        self._lent = 0
        self._placed = False
        self._closed = False
        self._refused: bool | None = None  # and whether there may be room later

    def check(self, size: int = 0) -> None:
        """Raise NoRoom where another answer, of ``size``, is not worth asking for, or parsing."""
        if self._refused is not None:
            raise _no_room(self, passing=self._refused)
        if self._taken + size > self._granted:
            self._grow(size)

    def take(self, size: int, *, leased: bool = False) -> None:
        """Keep an answer of ``size`` until the room is closed. Raises NoRoom; then it is to be let go."""
        if self._taken + size > self._granted:
            self._grow(size, leased=leased)
        self._taken += size

    async def widen(self, deadline: float) -> None:
        """Wait for a place, until a second before ``deadline``; no read of the mount may be under way.

        Raises NoRoom where none came.
        """
        if not self._placed:
            try:
                async with asyncio.timeout_at(deadline - _LAST_SECONDS):
                    await self._memory.places.take(self._owner)
            except TimeoutError:
                raise _no_room(self, passing=True) from None
            self._place()
        self._refused = None

    def close(self) -> None:
        """The mount has ended. What is still under way for it gets a little room more, and no place."""
        self._memory.small.give_back(self._owner, self._lent)
        if self._placed:
            self._memory.places.give(self._owner)
        self._closed, self._placed = True, False
        self._taken = self._lent = 0
        self._granted = SMALL_ANSWERS_BYTES

    def _grow(self, size: int, *, leased: bool = False) -> None:
        needed = self._taken + size
        if needed > MAX_ANSWERS_BYTES:
            self._refuse(passing=False)
        if needed <= SMALL_ANSWERS_BYTES:
            more = -(-(needed - self._lent) // _STEP) * _STEP
            if self._memory.small.lend(self._owner, more):
                self._lent += more
                self._granted = self._lent
                return
        if not self._closed and self._memory.places.take_now(self._owner):
            self._place()
        elif not (leased and size <= LEASED_BYTES and needed <= LEASED_ANSWERS_BYTES):
            self._refuse(passing=True)

    def _place(self) -> None:
        self._memory.small.give_back(self._owner, self._lent)
        self._lent, self._placed, self._granted = 0, True, MAX_ANSWERS_BYTES

    def _refuse(self, *, passing: bool) -> None:
        self._refused = passing
        raise _no_room(self, passing=passing)


def _no_room(room: Room, *, passing: bool) -> NoRoom:
    if passing:
        what = "mounts of large secrets take all the memory that the provider has for them on this node"
        advice = "kubelet tries again by itself; name smaller secrets, or mount them in fewer volumes"
    else:
        what = f"Vault's answers to the volume's reads come to more than {MAX_ANSWERS_BYTES // MIB} MiB in memory"
        advice = "name fewer or smaller secrets, or split the class; a volume holds at most 4 MiB"
    error = NoRoom(what, advice)
    error.room, error.passing = room, passing
    return error


def size_parsed(raw: bytes | bytearray, marks: int | None = None) -> int:
    """About how many bytes JSON takes once it is parsed, or somewhat less; ``marks`` where they are counted already."""
    if marks is None:
        marks = count_marks(raw)
    width = 1 if raw.isascii() and b"\\u" not in raw else _WIDEST
    return len(raw) * width + marks * JSON_MARK_BYTES


def count_marks(raw: bytes | bytearray) -> int:
    """How many characters of JSON_MARKS there are."""
    return len(raw) - len(raw.translate(None, JSON_MARKS))
