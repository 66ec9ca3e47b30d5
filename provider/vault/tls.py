"""TLS contexts from files, made anew when the files change on disk."""

from __future__ import annotations

import contextlib
import itertools
import os
import ssl
import stat
from collections.abc import Iterator
from typing import Final

from provider.errors import VaultUnavailable
from provider.redact import one_line
from provider.settings import MIB, TlsSettings

# The public authorities of the world come to a quarter of this.
MAX_PEM_BYTES: Final = MIB
# A directory of certificates: the system's has some 300 files, which come to 1 MiB. A class names it, and each file is
# opened by a thread that others need.
MAX_CA_FILES: Final = 1000
MAX_CA_BYTES: Final = 4 * MIB

Fingerprint = tuple[tuple[str, int, int, int], ...]


def fingerprint(tls: TlsSettings) -> Fingerprint:
    """What tells whether any file that ``tls`` names has changed: path, inode, size and mtime (ns) of each.

    A file that is missing is left out, so that its coming is a change.
    """
    paths = [path for path in (tls.ca_cert, tls.client_cert, tls.client_key) if path]
    if tls.ca_directory:
        paths.append(tls.ca_directory)
        with contextlib.suppress(_TooMany, OSError):  # which is told when they are to be read
            paths += _files_in(tls.ca_directory)
    marks = []
    for path in paths:
        try:
            found = os.stat(path)
        except OSError:
            continue
        marks.append((path, found.st_ino, found.st_size, found.st_mtime_ns))
    return tuple(marks)


def make_context(tls: TlsSettings) -> ssl.SSLContext:
    """A client context for ``tls``. It reads files and may take 30 ms, so it runs in a thread.

    As Go's clients do: CA files, where any are named, replace the system's; in a directory every file is read.

    Raises:
        VaultUnavailable: a file is missing, unreadable or not what it should be.
    """
    try:
        context = ssl.create_default_context() if not (tls.ca_cert or tls.ca_directory) else _with_cas(tls)
    except (OSError, ValueError) as error:
        raise _unusable("the CA certificates", tls.ca_cert or tls.ca_directory, error) from error
    # Left alone, it is what the system's OpenSSL is configured for.
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    if tls.skip_verify:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    if tls.client_cert:
        try:
            # A password, even an empty one, keeps OpenSSL from asking for one on a terminal.
            with contextlib.ExitStack() as copies:
                cert = copies.enter_context(_copy_of(tls.client_cert, tls.client_root))
                key = copies.enter_context(_copy_of(tls.client_key, tls.client_root)) if tls.client_key else None
                context.load_cert_chain(cert, key, password="")
        except (OSError, ValueError) as error:
            paths = f"{tls.client_cert} with {tls.client_key}" if tls.client_key else tls.client_cert
            raise _unusable("the client certificate and its key", paths, error) from error
    return context


def _with_cas(tls: TlsSettings) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    if tls.ca_cert:
        with _copy_of(tls.ca_cert, tls.ca_root) as copy:
            context.load_verify_locations(cafile=copy)
        return context  # as Vault's own clients: the file wins over the directory
    found, left = False, MAX_CA_BYTES
    for path in _files_in(tls.ca_directory):
        taken = MAX_PEM_BYTES
        try:
            with _copy_of(path, tls.ca_root) as copy:
                taken = os.stat(copy).st_size
                context.load_verify_locations(cafile=copy)
            found = True
        except ssl.SSLError:
            pass  # a README or a CRL among the certificates
        except _NotPem:
            pass  # too large, or no file at all
        left -= taken
        if left < 0:
            raise ValueError(f"its files come to more than {MAX_CA_BYTES // MIB} MiB")
    if not found:
        raise ValueError("no PEM certificate in the directory")
    return context


class _NotPem(ValueError):
    """What a path names cannot be a PEM file, whatever it holds."""


class _TooMany(ValueError):
    """A directory of more than MAX_CA_FILES entries."""


class _Outside(ValueError):
    """A file that a class names does not lie where the operator lets it."""


@contextlib.contextmanager
def _copy_of(path: str, root: str) -> Iterator[str]:
    """The path of a copy in memory of the file, for OpenSSL, which reads to the end of whatever it is told to open.

    A class names the path: it may be a pipe, a device or without end, and nothing of that may hold a thread. With a
    ``root``, what was opened has to lie below it, whichever way it was reached.
    """
    source = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        if root:
            _check_within(root, source)
        if not stat.S_ISREG(os.fstat(source).st_mode):
            raise _NotPem(f"{path} is not a regular file")
        content = b""
        # The file's own word on its size is not taken: those of /proc say 0.
        while len(content) <= MAX_PEM_BYTES and (part := os.read(source, MAX_PEM_BYTES + 1)):
            content += part
    finally:
        os.close(source)
    if len(content) > MAX_PEM_BYTES:
        raise _NotPem(f"{path} is larger than {MAX_PEM_BYTES // MIB} MiB")
    copy = os.memfd_create("pem", os.MFD_CLOEXEC)
    with open(copy, "wb") as file:
        file.write(content)
        file.flush()
        yield f"/proc/self/fd/{copy}"


def _check_within(root: str, opened: int) -> None:
    """Raise _Outside unless the file that is open lies below ``root``: asked of the file, since a link may change."""
    real = os.readlink(f"/proc/self/fd/{opened}")
    if not real.startswith(os.path.join(os.path.realpath(root), "")):
        raise _Outside(
            f"a link leads out of the daemon's --tls-root; --tls-root={os.path.dirname(real)} would allow it"
        )


def _files_in(directory: str) -> list[str]:
    """The files of a directory, in order. Raises OSError where it cannot be read, and _TooMany."""
    with os.scandir(directory) as entries:
        found = list(itertools.islice(entries, MAX_CA_FILES + 1))
        if len(found) > MAX_CA_FILES:
            raise _TooMany(f"it has more than {MAX_CA_FILES} files")
        return sorted(entry.path for entry in found if entry.is_file())


def _unusable(what: str, path: str, error: Exception) -> VaultUnavailable:
    reason = getattr(error, "strerror", None) or str(error)
    return VaultUnavailable(
        f"cannot use {what} at {path}: {one_line(str(reason), 200)}",
        "check that the file is mounted into the provider's container at this path and is PEM",
    )
