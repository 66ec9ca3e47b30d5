"""One hierarchy of errors: each knows its gRPC code, says what is wrong and where, and what to do about it.

The message is read by a person in ``kubectl describe pod``. It holds no secret value, no token and no JWT.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Sequence
from typing import ClassVar, Final, Self

from provider.redact import one_line

# docs/contract.md section 1: over about 8 KiB of gRPC metadata the driver itself raises one of the five forbidden
# codes, so a message stays within 4 KiB as gRPC percent-encodes it.
MAX_MESSAGE_BYTES: Final = 4096


class Code(enum.Enum):
    """The gRPC codes that may leave Mount (docs/contract.md section 1), by their names in gRPC."""

    INVALID_ARGUMENT = "INVALID_ARGUMENT"
    NOT_FOUND = "NOT_FOUND"
    PERMISSION_DENIED = "PERMISSION_DENIED"
    FAILED_PRECONDITION = "FAILED_PRECONDITION"
    INTERNAL = "INTERNAL"


class ProviderError(Exception):
    """The base of all errors that cross a room's wall.

    ``what`` says what is wrong and where; ``advice`` says what to do, and may be empty.
    """

    code: ClassVar[Code] = Code.INTERNAL

    def __init__(self, what: str, advice: str = "") -> None:
        super().__init__(what, advice)
        self.what = what
        self.advice = advice

    def __str__(self) -> str:
        return f"{self.what}: {self.advice}" if self.advice else self.what

    def alone(self) -> Self:
        """It itself, without the frames and errors that it came of: for who keeps it beyond the ``except``.

        They hold what a mount read. Where one of them also holds the error they are a cycle, in which all of it stays
        until the garbage collector looks.
        """
        self.__cause__ = self.__context__ = None
        return self.with_traceback(None)


class InvalidClass(ProviderError):
    """The SecretProviderClass, or what the driver sent with it, has faults; all of them at once."""

    code = Code.INVALID_ARGUMENT

    def __init__(self, faults: Sequence[str]) -> None:
        super().__init__(join_within("SecretProviderClass", faults))
        self.faults = tuple(faults)


class InvalidSetting(ProviderError):
    """A flag or an environment variable of the daemon is wrong; the daemon does not start."""

    code = Code.INVALID_ARGUMENT


class LoginDenied(ProviderError):
    """Vault refused the login."""

    code = Code.PERMISSION_DENIED


class AccessDenied(ProviderError):
    """Vault refused the read: the token's policies do not allow it."""

    code = Code.PERMISSION_DENIED


class SecretNotFound(ProviderError):
    """There is nothing at the path, or the response lacks the key."""

    code = Code.NOT_FOUND


class BadSecret(ProviderError):
    """What Vault holds cannot become the file that the class asks for (encoding, size)."""

    code = Code.FAILED_PRECONDITION


class RequestRefused(ProviderError):
    """Vault answered the request with an error of its own (400, 405 and the like)."""

    code = Code.FAILED_PRECONDITION


class VaultUnavailable(ProviderError):
    """Vault is unreachable, sealed, throttling, or answers with something that is not Vault's."""

    code = Code.FAILED_PRECONDITION


class AnswerLost(VaultUnavailable):
    """The request went out and no answer came: it may or may not have been carried out."""


class OutOfTime(ProviderError):
    """The mount's budget of time is spent."""

    code = Code.FAILED_PRECONDITION


class KubernetesUnavailable(ProviderError):
    """The Kubernetes API refused or did not answer what the mount needs of it."""

    code = Code.FAILED_PRECONDITION


class KubernetesDenied(KubernetesUnavailable):
    """The Kubernetes API refused for want of permission (401 or 403)."""


class MountFailed(ProviderError):
    """One or more objects failed; the code is the first one's (docs/contract.md section 1)."""

    def __init__(self, failures: Sequence[ProviderError]) -> None:
        super().__init__(join_within("", [str(failure) for failure in failures]))
        self.failures = tuple(failures)
        self.code = failures[0].code  # type: ignore[misc]  # the first object's code, decided per instance


def encoded_size(text: str) -> int:
    """Bytes of ``text`` once gRPC has percent-encoded it: three for each byte that is not printable ASCII, or %."""
    raw = text.encode("utf-8", "replace")
    return len(raw) + 2 * sum(byte < 0x20 or byte > 0x7E or byte == 0x25 for byte in raw)


def join_within(prefix: str, parts: Iterable[str], limit: int = MAX_MESSAGE_BYTES - 256) -> str:
    """``parts`` joined by "; " as far as they fit into ``limit`` encoded bytes, then "and N more".

    Each part is made one safe line. The room left under MAX_MESSAGE_BYTES is for what callers put around it.
    """
    head = f"{prefix}: " if prefix else ""
    size = encoded_size(head)
    # One part that fills the message, as text in another script may, must not cut off how many follow.
    lines = list(dict.fromkeys(fit(one_line(part, 1200), limit - size) for part in parts))
    kept: list[str] = []
    for line in lines:
        cost = encoded_size(line) + 2
        if kept and size + cost > limit:
            break
        kept.append(line)
        size += cost
    text = head + "; ".join(kept)
    left = len(lines) - len(kept)
    return fit(f"{text}; and {left} more" if left else text, limit + 32)


def fit(text: str, limit: int = MAX_MESSAGE_BYTES) -> str:
    """``text`` cut to ``limit`` bytes as gRPC encodes them, with an ellipsis where something was cut."""
    if encoded_size(text) <= limit:
        return text
    low, high = 0, len(text)
    while low < high:
        middle = (low + high + 1) // 2
        if encoded_size(text[:middle]) + 9 <= limit:
            low = middle
        else:
            high = middle - 1
    return text[:low] + "…"
