"""Sealed state across restarts: one file a session, in a directory that ends with the node.

A file is ``VCSP``, a format byte, a generation (8 bytes, big endian), a nonce (12 bytes) and JSON sealed with
AES-256-GCM under a key derived (HKDF-SHA256) from the HMAC key. The head and the file's name are its associated data,
so that a file which was renamed, or whose generation was changed, does not open.

It knows nothing of sessions: it stores JSON objects by key.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import json
import logging
import os
import re
import secrets
import stat
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from provider.errors import ProviderError

_log = logging.getLogger(__name__)

MAGIC: Final = b"VCSP"
FORMAT: Final = 1
_HEAD: Final = len(MAGIC) + 1 + 8
_NONCE: Final = 12
# A session of a thousand objects' leases is smaller. The directory is memory of the node: a larger one is not written.
MAX_FILE_BYTES: Final = 4 * 1024 * 1024
# What a daemon left that died between writing a file and renaming it; a younger one may be at it.
LEFTOVER_SECONDS: Final = 60.0
# What was set aside is for whoever looks into it: the directory is memory of the node.
ASIDE_SECONDS: Final = 7 * 86400.0
_NAME: Final = re.compile(r"[0-9a-f]{32}\.session")
_OUR_NAMES: Final = re.compile(r"[0-9a-f]{32}\.(?:session|lock)|directory\.lock")
# Whatever stands in a file's place, opening it follows no link, and waits for nobody at the other end of a pipe.
_GUARDED: Final = os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
# Two daemons overlap for seconds; a lock is held while one of them logs in or reads a credential.
_LOCK_POLL_SECONDS: Final = 0.02
# Tries, of five seconds, after which it is told: a daemon that hangs may hold it, and mounts that wait can only say
# that time ran out.
_LOCK_TRIES_TOLD: Final = 250
_NO_FILE: Final = "it is no regular file"


class StateUnusable(ProviderError):
    """The state directory cannot be used as it is; the daemon goes on without, and has been told why."""


@dataclass(frozen=True, slots=True)
class Entry:
    """What a file held."""

    generation: int
    payload: dict[str, Any] = field(repr=False)


class StateDir:
    """The state directory. Every method but ``lock`` is short; those that touch the disk run in a thread.

    What keeps it from being written to is logged once, however many sessions meet it, and so is the end of that.
    """

    def __init__(self, directory: str, key: bytes) -> None:
        """Make or check the directory. Raises StateUnusable."""
        # Loaded here, so that a daemon without --state-dir does not pay for it.
        from cryptography.hazmat.primitives.ciphers.aead import AESGCM
        from cryptography.hazmat.primitives.hashes import SHA256
        from cryptography.hazmat.primitives.kdf.hkdf import HKDF

        derived = HKDF(SHA256(), length=32, salt=None, info=b"vault-csi-provider session state v1").derive(key)
        self._cipher = AESGCM(derived)
        self._path = Path(directory)
        self._holding: int | None = None
        self._failing = False
        self._too_large: set[str] = set()
        self._in_memory = False
        self._make()
        self._clear()

    def keys(self) -> list[str]:
        """The keys of all entries, readable or not."""
        try:
            return sorted(path.stem for path in self._path.iterdir() if _NAME.fullmatch(path.name))
        except OSError:
            return []

    def generation(self, key: str) -> int | None:
        """The generation of an entry without opening it; None where there is none. It is not yet proven."""
        # Asked at each mount, and so without what makes a path and a file comfortable.
        try:
            descriptor = os.open(f"{self._path}/{key}.session", os.O_RDONLY | _GUARDED)
        except OSError:
            return None
        try:
            head = os.read(descriptor, _HEAD)
        except OSError:
            return None
        finally:
            os.close(descriptor)
        return int.from_bytes(head[len(MAGIC) + 1 :], "big") if len(head) == _HEAD else 0

    async def load(self, key: str) -> Entry | None:
        """The entry, or None where there is none, or none that opens: that one is set aside with a warning."""
        return await asyncio.to_thread(self._load, key)

    async def save(self, key: str, entry: Entry, *, small: bool = False) -> None:
        """Write an entry in place of the old one, whole or not at all. Raises StateUnusable.

        One that is ``small``, which takes a millisecond, or some at the very worst, is written at once where the
        directory is in memory: that waits for nothing, and costs less than a thread beside a busy event loop.
        """
        if small and self._in_memory:
            self._save(key, entry)
        else:
            await asyncio.to_thread(self._save, key, entry)

    def remove(self, key: str) -> None:
        """Remove an entry and its lock; the caller holds the lock."""
        self._too_large.discard(key)
        for path in (self._file(key), self._lock_file(key)):
            with contextlib.suppress(OSError):
                path.unlink()

    @contextlib.asynccontextmanager
    async def lock(self, key: str) -> AsyncIterator[None]:
        """Hold the entry's own lock against other processes. Raises StateUnusable."""
        path = self._lock_file(key)
        while True:
            descriptor = self._open_lock(path)
            try:
                tries = 0
                while not _try_lock(descriptor):  # another process lets go, and tells nobody
                    tries += 1
                    if tries == _LOCK_TRIES_TOLD:
                        _log.warning("another process holds %s: mounts of its pod wait for it", path.name)
                    await asyncio.sleep(_LOCK_POLL_SECONDS)
                # Its holder may have removed the entry, and the lock with it, while we waited.
                if _same_file(descriptor, path):
                    yield
                    return
            finally:
                os.close(descriptor)

    def hold(self) -> bool:
        """Take the directory's own lock, for as long as this process lives; False where another has it.

        Raises StateUnusable.
        """
        path = self._path / "directory.lock"
        if self._holding is not None and not _same_file(self._holding, path):
            self.close()  # the directory was emptied, and another daemon may have made this lock anew
        if self._holding is None:
            descriptor = self._open_lock(path)
            if not _try_lock(descriptor):
                os.close(descriptor)
                return False
            self._holding = descriptor
        return True

    def close(self) -> None:
        """Let go of the directory's lock."""
        if self._holding is not None:
            os.close(self._holding)
            self._holding = None

    def _file(self, key: str) -> Path:
        return self._path / f"{key}.session"

    def _lock_file(self, key: str) -> Path:
        return self._path / f"{key}.lock"

    def _make(self) -> None:
        """Make the directory, or check that it is ours, and that our names in it are files of ours."""
        try:
            self._path.mkdir(mode=0o700, parents=True, exist_ok=True)
            found = self._path.lstat()
            if not stat.S_ISDIR(found.st_mode):
                raise StateUnusable(f"the state directory {self._path} is no directory", "remove it")
            if found.st_uid != os.geteuid():
                raise StateUnusable(f"the state directory {self._path} belongs to another user", "remove it")
            mode = stat.S_IMODE(found.st_mode)
            if mode != 0o700:
                self._path.chmod(0o700)
                told = "the state directory %s had mode %04o and is its user's alone from now on"
                if mode & 0o022:
                    told += ": others may have removed sessions from it"
                _log.log(logging.WARNING if mode & 0o022 else logging.INFO, told, self._path, mode)
            # Those that could write to it until now may have put there what makes us wait, or write elsewhere.
            for name in filter(_OUR_NAMES.fullmatch, os.listdir(self._path)):
                with contextlib.suppress(FileNotFoundError):  # another daemon's session has ended
                    found = (self._path / name).lstat()
                    if not stat.S_ISREG(found.st_mode):
                        self._rename_aside(name, _NO_FILE)
                    elif found.st_uid != os.geteuid():
                        self._rename_aside(name, "it belongs to another user")
        except OSError as error:
            raise StateUnusable(f"cannot use the state directory {self._path}: {error.strerror}") from error
        self._in_memory = _is_in_memory(self._path)

    def _clear(self) -> None:
        """Remove what is of no use any more, if that can be: on a disk that is read-only it is in nobody's way."""
        for pattern, seconds in (("*.session.*.new", LEFTOVER_SECONDS), ("*.aside", ASIDE_SECONDS)):
            for left in self._path.glob(pattern):
                with contextlib.suppress(OSError):
                    if time.time() - left.lstat().st_mtime > seconds:
                        left.unlink()
        for lock in self._path.glob("*.lock"):
            entry = self._file(lock.stem)
            if not _NAME.fullmatch(entry.name) or entry.exists():
                continue
            with contextlib.suppress(OSError):
                descriptor = _open_file(lock, os.O_RDWR)
                try:
                    # Who holds it is about to write the entry, or has just removed both.
                    if _try_lock(descriptor) and _same_file(descriptor, lock) and not entry.exists():
                        lock.unlink()
                finally:
                    os.close(descriptor)

    def _open_lock(self, path: Path) -> int:
        try:
            try:
                return _open_file(path, os.O_RDWR | os.O_CREAT)
            except FileNotFoundError:  # whoever removed the files took the directory too
                self._make()
                return _open_file(path, os.O_RDWR | os.O_CREAT)
        except OSError as error:
            raise self._failed("lock in", error) from error

    def _failed(self, what: str, error: OSError) -> StateUnusable:
        """The error to raise where the directory cannot be used; told of, unless it is known already."""
        fault = StateUnusable(
            f"cannot {what} the state directory {self._path}: {error.strerror}",
            "sessions are kept in memory only until it is writable",
        )
        if not self._failing:
            self._failing = True
            _log.warning("%s", fault)
        return fault

    def _load(self, key: str) -> Entry | None:
        path = self._file(key)
        try:
            with open(_open_file(path, os.O_RDONLY), "rb") as file:
                raw = file.read(MAX_FILE_BYTES + 1)
        except FileNotFoundError:
            return None
        except _NoFile as error:
            self.set_aside(key, error.strerror)
            return None
        except OSError as error:
            _log.warning("cannot read the session state %s: %s", path.name, error.strerror)
            return None
        fault = ""
        head, nonce, sealed = raw[:_HEAD], raw[_HEAD : _HEAD + _NONCE], raw[_HEAD + _NONCE :]
        if not head.startswith(MAGIC) or len(raw) > MAX_FILE_BYTES or len(nonce) < _NONCE:
            fault = "it is damaged"
        elif head[len(MAGIC)] != FORMAT:
            fault = f"its format {head[len(MAGIC)]} is not known here"
        else:
            from cryptography.exceptions import InvalidTag

            try:
                payload = json.loads(self._cipher.decrypt(nonce, sealed, head + path.name.encode()))
            except InvalidTag:
                fault = "it is damaged, renamed or sealed with another key"
            except ValueError:
                fault = "it is damaged"
            else:
                if isinstance(payload, dict):
                    return Entry(int.from_bytes(head[len(MAGIC) + 1 :], "big"), payload)
                fault = "it is damaged"
        self.set_aside(key, fault)
        return None

    def set_aside(self, key: str, fault: str) -> None:
        """Rename an entry so that it is not looked at again, and say why."""
        self._rename_aside(self._file(key).name, fault)

    def _rename_aside(self, name: str, fault: str) -> None:
        try:
            (self._path / name).replace(self._path / f"{name}.aside")
        except OSError as error:
            _log.warning("the session state %s cannot be set aside (%s): %s", name, error.strerror, fault)
        else:
            _log.warning("the session state %s is set aside as %s.aside: %s", name, name, fault)

    def _save(self, key: str, entry: Entry) -> None:
        path = self._file(key)
        head = MAGIC + bytes([FORMAT]) + entry.generation.to_bytes(8, "big")
        nonce = secrets.token_bytes(_NONCE)
        plain = json.dumps(entry.payload, separators=(",", ":")).encode()
        if len(plain) > MAX_FILE_BYTES - 1024:
            fault = StateUnusable(
                f"the session state {path.name} would have {len(plain)} bytes, more than {MAX_FILE_BYTES}",
                "its pod's credentials are not kept across a restart: name smaller secrets",
            )
            if key not in self._too_large:
                self._too_large.add(key)
                _log.warning("%s", fault)
            raise fault
        self._too_large.discard(key)
        raw = head + nonce + self._cipher.encrypt(nonce, plain, head + path.name.encode())
        fresh = path.with_name(f"{path.name}.{os.getpid()}.new")
        try:
            with open(_create(fresh), "wb") as file:
                file.write(raw)
                if not self._in_memory:
                    file.flush()
                    os.fsync(file.fileno())
            fresh.replace(path)
            if not self._in_memory:
                self._sync_directory()
        except OSError as error:
            with contextlib.suppress(OSError):
                fresh.unlink()
            raise self._failed("write to", error) from error
        if self._failing:
            self._failing = False
            _log.info("the state directory %s is written to again", self._path)

    def _sync_directory(self) -> None:
        descriptor = os.open(self._path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _is_in_memory(path: Path) -> bool:
    """Whether a directory is on a tmpfs, as far as the kernel tells (proc_pid_mountinfo(5))."""
    try:
        device = path.stat().st_dev
        # Bytes: a path may be any. Only what a line is parted at is escaped in it.
        mounts = Path("/proc/self/mountinfo").read_bytes().split(b"\n")
    except OSError:
        return False
    number = f"{os.major(device)}:{os.minor(device)}".encode()
    kinds = [mount.partition(b" - ")[2].split(b" ")[0] for mount in mounts if mount.split(b" ")[2:3] == [number]]
    return kinds[:1] == [b"tmpfs"]


class _NoFile(OSError):
    """Where a file of ours should be is something else."""

    strerror: str


def _open_file(path: Path, flags: int) -> int:
    """The descriptor of a regular file. Raises _NoFile where it is none, and OSError."""
    fault = _NoFile(errno.EINVAL, _NO_FILE)
    try:
        descriptor = os.open(path, flags | _GUARDED, 0o600)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENXIO, errno.EISDIR):  # a link, a socket, a directory
            raise fault from error
        raise
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise fault
    return descriptor


def _create(path: Path) -> int:
    """The descriptor of a new file, in place of whatever has its name. Raises OSError."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | _GUARDED
    try:
        return os.open(path, flags, 0o600)
    except FileExistsError:  # most often of a daemon of our process ID, which is the same in each container
        path.unlink()
        return os.open(path, flags, 0o600)


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _same_file(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.lstat())
    except OSError:
        return False
