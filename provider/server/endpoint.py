"""The socket's path: who may stand there, taking it over from another daemon, and leaving it.

gRPC binds and unlinks paths by itself, without asking whose socket is there by then. So it is given a path of this
process's own, which is renamed over the endpoint once the server answers: whoever dials at any time finds a socket,
the old one or the new one.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import secrets
import socket
import stat
import time
from collections.abc import Iterator
from typing import Final

from provider.errors import InvalidSetting

# unix(7): sun_path holds 108 bytes, the last of them zero.
MAX_SUN_PATH: Final = 107
# A socket that refuses connections may be one that was bound a moment ago and does not listen yet.
LEFTOVER_SECONDS: Final = 10.0
# The lock is held for two system calls; who holds it longer is no daemon of ours.
LOCK_SECONDS: Final = 0.5


class Endpoint:
    """The path where the driver dials, and the path of this process's own beside it.

    ``path`` is what the operator chose, without ``unix://``. ``bind_path`` is where the server is to bind; its
    suffix holds the process id for whoever looks at the directory, and a random part since two daemons in two
    containers share the directory and may share the process id, which is 1 in each.
    """

    def __init__(self, path: str) -> None:
        self.path = os.path.abspath(path)
        self.bind_path = f"{self.path}.{os.getpid()}-{secrets.token_hex(2)}"
        self._ours: tuple[int, int] | None = None

    def check(self) -> None:
        """Raise InvalidSetting where a server cannot be put at the path, saying why and what to do."""
        length = len(os.fsencode(self.bind_path))
        if length > MAX_SUN_PATH:
            raise InvalidSetting(
                f"--endpoint {self.path} is too long: with the suffix for taking over it has {length} bytes, and a"
                f" Unix socket's path has at most {MAX_SUN_PATH}",
                "choose a shorter path",
            )
        parent = os.path.dirname(self.path)
        if not os.path.isdir(parent):
            raise InvalidSetting(
                f"--endpoint {self.path}: there is no directory {parent}",
                "create it, or mount the driver's providers directory there",
            )
        self._check_occupant()

    def _check_occupant(self) -> None:
        """A socket may stand at the path, stale or alive; anything else is not ours to remove."""
        try:
            mode = os.lstat(self.path).st_mode
        except FileNotFoundError:
            return
        if not stat.S_ISSOCK(mode):
            raise InvalidSetting(
                f"--endpoint {self.path} exists and is not a socket",
                "remove it, or choose another path; it is left as it is",
            )

    @contextlib.contextmanager
    def private(self) -> Iterator[None]:
        """Inside, what this process creates is its user's alone: a socket gets mode 0600 as it is bound."""
        before = os.umask(0o177)
        try:
            yield
        finally:
            os.umask(before)

    def clean(self) -> None:
        """Remove what daemons left that died between binding and taking over."""
        mine = re.compile(re.escape(os.path.basename(self.path)) + r"\.[0-9]+-[0-9a-f]{4}")
        with os.scandir(os.path.dirname(self.path)) as entries:
            for entry in entries:
                if mine.fullmatch(entry.name) and entry.path != self.bind_path and _is_dead(entry):
                    with contextlib.suppress(OSError):
                        os.unlink(entry.path)

    def publish(self) -> None:
        """Put the bound socket at the endpoint, in place of whatever socket is there.

        Raises InvalidSetting when something else than a socket has come to stand there, or it cannot be replaced.
        """
        try:
            found = os.lstat(self.bind_path)
            with self._locked():
                self._check_occupant()
                os.rename(self.bind_path, self.path)
        except OSError as error:
            raise InvalidSetting(
                f"--endpoint {self.path} cannot be taken over: {error.strerror}",
                "look at who owns it, and at the directory's permissions",
            ) from error
        self._ours = (found.st_dev, found.st_ino)

    def is_ours(self) -> bool:
        """Whether the socket at the path is this process's: false before it is published, and once withdrawn."""
        try:
            found = os.lstat(self.path)
        except OSError:
            return False
        return (found.st_dev, found.st_ino) == self._ours

    def is_lost(self) -> bool:
        """Whether the socket that this process published is gone, and nobody listens in its place.

        Somebody removed it; or a successor took the path over and ended without a word, as one that is killed.
        """
        if self._ours is None or self.is_ours():
            return False
        if not os.path.lexists(self.path):
            return True
        with os.scandir(os.path.dirname(self.path)) as entries:
            return any(entry.path == self.path and _is_dead(entry) for entry in entries)

    def withdraw(self) -> bool:
        """Remove the socket if it is still this process's; whether it was, and could be removed."""
        ours = False
        # Where the directory is gone, or cannot be written to, calls under way are waited for all the same.
        with contextlib.suppress(OSError), self._locked():
            if self.is_ours():
                os.unlink(self.path)
                ours = True
        self._ours = None
        return ours

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """Keep other daemons from renaming between our look at the path and what we do to it.

        The directory itself is locked, so that no file is left behind. Where it cannot be, the moment between the
        two calls is what remains open.
        """
        directory = os.open(os.path.dirname(self.path), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            until = time.monotonic() + LOCK_SECONDS
            while time.monotonic() < until:
                try:
                    fcntl.flock(directory, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    time.sleep(0.005)
                except OSError:
                    # A file system without locks.
                    break
            yield
        finally:
            os.close(directory)


def _is_dead(entry: os.DirEntry[str]) -> bool:
    """Whether a socket has no listener. Asked by dialling: in another container's namespace, ids say nothing."""
    try:
        found = entry.stat(follow_symlinks=False)
        if not stat.S_ISSOCK(found.st_mode) or time.time() - found.st_mtime < LEFTOVER_SECONDS:
            return False
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as dialler:
            dialler.setblocking(False)
            dialler.connect(entry.path)
    except ConnectionRefusedError:
        return True
    except OSError:
        return False
    return False
