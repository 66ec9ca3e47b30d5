"""What the process asks of the kernel: memory that nobody else on the node sees, and all the descriptors it may have.

Why memory is kept so far and no further, and why nothing is locked: docs/decisions/process-memory.md.
"""

from __future__ import annotations

import ctypes
import os
import resource
import sys
from typing import Final

# linux/prctl.h
_PR_SET_DUMPABLE: Final = 4
# Bytes of a core dump. No file of one byte is a dump, so none is written; and the kernel takes 1 for "give it to no
# program either", where 0 would count for files alone and a node's crash reporter would get all of the memory.
NO_CORE_BYTES: Final = 1


def keep_memory_private() -> None:
    """Dump no core of this process, and keep others of its user out of its memory, environment and descriptors.

    What a template has broken out of its sandbox is such another process. Root's capabilities see all as before.
    Raises OSError where the kernel refuses, so that no daemon holds secrets without.
    """
    _, hard = resource.getrlimit(resource.RLIMIT_CORE)
    limit = 0 if hard == 0 else NO_CORE_BYTES  # one that is lower stays, since only a capability may raise it
    resource.setrlimit(resource.RLIMIT_CORE, (limit, limit))
    control(_PR_SET_DUMPABLE, 0)


def raise_descriptors() -> None:
    """Have as many files and sockets open as the kernel lets this process: the limit to start with is for select()."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def descriptors() -> int:
    """How many files and sockets this process may have open."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return sys.maxsize if soft == resource.RLIM_INFINITY else soft


def control(option: int, value: int) -> None:
    """prctl(2). Raises OSError."""
    if ctypes.CDLL(None, use_errno=True).prctl(option, ctypes.c_ulong(value), 0, 0, 0) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"prctl({option}): {os.strerror(number)}")
