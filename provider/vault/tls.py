"""TLS contexts from files, made anew when the files change on disk."""

from __future__ import annotations

import os
import ssl
from pathlib import Path

from provider.errors import VaultUnavailable
from provider.redact import one_line
from provider.settings import TlsSettings

Fingerprint = tuple[tuple[str, int, int, int], ...]


def fingerprint(tls: TlsSettings) -> Fingerprint:
    """What tells whether any file that ``tls`` names has changed: path, inode, size and mtime (ns) of each.

    A file that is missing is left out, so that its coming is a change.
    """
    paths = [path for path in (tls.ca_cert, tls.client_cert, tls.client_key) if path]
    if tls.ca_directory:
        paths.append(tls.ca_directory)
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
            context.load_cert_chain(tls.client_cert, tls.client_key or None, password="")
        except (OSError, ValueError) as error:
            paths = f"{tls.client_cert} with {tls.client_key}" if tls.client_key else tls.client_cert
            raise _unusable("the client certificate and its key", paths, error) from error
    return context


def _with_cas(tls: TlsSettings) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    if tls.ca_cert:
        context.load_verify_locations(cafile=tls.ca_cert)
        return context  # as Vault's own clients: the file wins over the directory
    found = False
    for path in _files_in(tls.ca_directory):
        try:
            context.load_verify_locations(cafile=path)
            found = True
        except ssl.SSLError:
            continue  # a README or a CRL among the certificates
    if not found:
        raise ValueError("no PEM certificate in the directory")
    return context


def _files_in(directory: str) -> list[str]:
    try:
        return sorted(str(path) for path in Path(directory).iterdir() if path.is_file())
    except OSError:
        return []


def _unusable(what: str, path: str, error: Exception) -> VaultUnavailable:
    reason = getattr(error, "strerror", None) or str(error)
    return VaultUnavailable(
        f"cannot use {what} at {path}: {one_line(str(reason), 200)}",
        "check that the file is mounted into the provider's container at this path and is PEM",
    )
