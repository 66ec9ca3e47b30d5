"""What a volume holds, counted as it is made, so that nothing is made that the driver will not take. Pure."""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Final, TypeAlias

from provider.errors import BadSecret
from provider.redact import one_line
from provider.settings import MAX_MOUNT_BYTES, MIB

# Files of a volume: a directory of more is of no use to anybody, and each costs the driver several system calls at
# every change of one of them.
MAX_FILES: Final = 10_000
# Bytes that a file takes in the driver's answer besides its path and contents, at least about.
_FILE_BYTES: Final = 16
# Files that a refusal names, the largest first, and the characters of each.
_MAX_NAMED: Final = 3
_MAX_NAME: Final = 60
_ADVICE: Final = "split the SecretProviderClass, or mount less of each secret with secretKey"


@dataclass(frozen=True, slots=True)
class RenderedFile:
    """A file of the volume; ``mode`` is 0 to 0o777."""

    path: str
    mode: int
    contents: bytes = field(repr=False)

    @property
    def weight(self) -> int:
        """Bytes of what the volume holds: an empty file is not nothing."""
        return len(self.contents) + len(self.path.encode()) + _FILE_BYTES


Files: TypeAlias = tuple[RenderedFile, ...]


class Contents:
    """The files of a volume by their object, as far as they are made; ``objects`` are how many there will be."""

    def __init__(self, objects: int) -> None:
        self.made: dict[str, Files] = {}
        self._objects = objects
        self._count = 0
        self._size = 0
        self._error: BadSecret | None = None

    @property
    def full(self) -> bool:
        """Whether it holds more than the driver takes."""
        return self._size > MAX_MOUNT_BYTES or self._count > MAX_FILES

    def add(self, name: str, files: Files) -> None:
        """The files of the object ``name``. Raises BadSecret where they are too much, with what was there before."""
        self.made[name] = files
        self._count += len(files)
        for file in files:
            self._size += file.weight
        if self.full:
            raise self.too_much()

    def too_much(self) -> BadSecret:
        """The error of a volume that is full, the same each time."""
        if self._error is None:
            begun = f"{len(self.made)} of its {self._objects} objects come to"
            if self._size > MAX_MOUNT_BYTES:
                self._error = too_large(begun, self._size, [file for files in self.made.values() for file in files])
            else:
                self._error = BadSecret(
                    f"the volume is too large: {begun} {self._count:,} files, and it may have {MAX_FILES:,}",
                    "name the keys that are needed by includes or secretKey, or split the SecretProviderClass",
                )
        return self._error


def too_large(begun: str, size: int, files: Iterable[RenderedFile]) -> BadSecret:
    """The error of a volume of ``size`` bytes; ``begun`` is the sentence up to its size."""
    largest = heapq.nlargest(_MAX_NAMED, files, key=lambda file: len(file.contents))
    named = ", ".join(f"{one_line(file.path, _MAX_NAME)} ({_mib(len(file.contents))})" for file in largest)
    return BadSecret(
        f"the volume is too large: {begun} {_mib(size)}, and the driver takes at most {_mib(MAX_MOUNT_BYTES)}; "
        f"the largest: {named}",
        _ADVICE,
    )


def _mib(size: int) -> str:
    """Rounded up, so that what is too large does not look as if it fitted."""
    return f"{math.ceil(size / MIB * 100) / 100:.2f} MiB"
