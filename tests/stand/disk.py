"""A disk that is full, read-only or emptied while a daemon keeps its state on it.

Who may mount gets a real file system of a few KiB in memory. Who may not, as in most containers, gets a directory on
which the kernel refuses the daemon the same calls: by a limit on the size of files, and by the directory's mode.
"""

from __future__ import annotations

import contextlib
import os
import resource
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Self

from tests.stand.process import Process, StandError

_SIZE = "64k"
"""Enough for a dozen sessions."""
_BLOCK = 4096


class Disk:
    """A disk at `directory`, used as a context manager. A daemon that is to meet its faults is started by `argv`."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.mounted = False
        """Whether it is a file system of its own."""

    def __enter__(self) -> Self:
        self.directory.mkdir()
        options = f"size={_SIZE},mode=0700"
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", str(self.directory)], capture_output=True)
        self.mounted = done.returncode == 0
        return self

    def __exit__(self, *_: object) -> None:
        if self.mounted:
            # Lazily: a daemon that is just being killed may still have a file open.
            subprocess.run(["umount", "--lazy", str(self.directory)], check=True)

    def argv(self, command: Sequence[str]) -> list[str]:
        """The command that `command` is to be run as."""
        if self.mounted:
            return list(command)
        # A limit on the size of files would stop the log too, so that one goes through a pipe.
        capless = "setpriv --bounding-set=-dac_override,-dac_read_search " if os.geteuid() == 0 else ""
        return ["/bin/sh", "-c", f'{capless}"$@" 2>&1 | cat', "sh", *command]

    @contextlib.contextmanager
    def full(self, process: Process) -> Iterator[None]:
        """Nothing can be written to a file until the context ends."""
        if self.mounted:
            filling = self.directory / "filling"
            with contextlib.suppress(OSError), filling.open("wb", buffering=0) as file:
                while True:
                    file.write(b"\0" * _BLOCK)
            try:
                yield
            finally:
                filling.unlink()
        else:
            daemon = _daemon_of(process)
            _, most = resource.prlimit(daemon, resource.RLIMIT_FSIZE)
            resource.prlimit(daemon, resource.RLIMIT_FSIZE, (0, most))
            try:
                yield
            finally:
                resource.prlimit(daemon, resource.RLIMIT_FSIZE, (most, most))

    @contextlib.contextmanager
    def read_only(self) -> Iterator[None]:
        """Nothing can be written, made or removed until the context ends."""
        self._may_write(False)
        try:
            yield
        finally:
            self._may_write(True)

    def empty(self) -> None:
        """Remove all that is on it."""
        for path in self.directory.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    def _may_write(self, allowed: bool) -> None:
        if self.mounted:
            options = f"remount,{'rw' if allowed else 'ro'}"
            subprocess.run(["mount", "-o", options, str(self.directory)], check=True)
            return
        paths = [self.directory, *self.directory.rglob("*")]
        for path in paths:
            path.chmod(path.stat().st_mode | 0o200 if allowed else path.stat().st_mode & ~0o222)


def _daemon_of(process: Process) -> int:
    """The process that the shell of `Disk.argv` runs for the daemon."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    for child in children:
        if b"provider.cli" in Path(f"/proc/{child}/cmdline").read_bytes().split(b"\0"):
            return int(child)
    raise StandError(f"process {process.pid} runs no daemon")
