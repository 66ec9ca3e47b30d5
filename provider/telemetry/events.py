"""What happens in the daemon, each kind of it a type: metrics, the audit log and the status are made of these.

Whoever does a thing records it once, in the words of the other rooms; who listens takes from it what it tells. No
event holds a secret: accessors and lease ids are names, and the values that they are for are not here.

What comes about a dozen times a mount is a NamedTuple, which takes a third of a frozen dataclass's time to make.
"""

from __future__ import annotations

import enum
import hashlib
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeAlias, get_args

from provider.errors import ProviderError
from provider.spc.model import Login, MountSpec, ObjectSpec, Pod, VaultServer

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Who:
    """Whose session it is. ``class_name`` is the SecretProviderClass that last mounted with it, "" while none did."""

    pod: Pod
    login: Login
    server: VaultServer
    class_name: str


class VaultRequest(NamedTuple):
    """One HTTP request to Vault was answered, or failed: ``status`` is 0 where no answer came.

    ``mount`` is the auth or engine mount that it was for, never a secret's path. ``seconds`` counts from when it was
    sent to when its answer was read.
    """

    method: str
    mount: str
    status: int
    seconds: float


class Looked(NamedTuple):
    """A Vault that did not answer was looked at: ``status`` is 0 where it still does not."""

    status: int


class Supply(enum.Enum):
    """Where the bytes of an object came from."""

    __hash__ = object.__hash__  # Enum's own is a function in Python

    READ = "read"  # asked of Vault, alone or together with other pods
    KEPT = "kept"  # a lease or a certificate that the pod has
    REMEMBERED = "remembered"  # younger than refreshAfter


class Kind(enum.Enum):
    """What an object is made of (docs/contract.md section 3)."""

    __hash__ = object.__hash__  # Enum's own is a function in Python

    STATIC = "static"
    LEASED = "leased"
    ISSUED = "issued"


class MountedObject(NamedTuple):
    """One object of a mount that succeeded. ``version`` is "" where there is no HMAC key.

    ``request_ids`` are those of Vault's responses, one of each source.
    """

    name: str
    paths: tuple[str, ...]
    version: str
    request_ids: tuple[str, ...]
    lease_ids: tuple[str, ...]
    kind: Kind
    supply: Supply


@dataclass(frozen=True, slots=True)
class Mounted:
    """A mount succeeded. ``objects`` makes the list of its objects, for who wants to know them.

    ``marks`` has a text for each object's name that changes when its files do; those of a mount that had the HMAC key
    (``keyed``) do not compare with those of one that had not. ``accessor`` is that of the pod's newest token, ``size``
    of the files' contents in bytes. ``read``, ``kept`` and ``remembered`` count its distinct reads by their Supply.
    """

    spec: MountSpec
    seconds: float
    files: int
    size: int
    marks: Mapping[str, str] = field(repr=False)
    keyed: bool
    accessor: str
    read: int
    kept: int
    remembered: int
    objects: Callable[[], Sequence[MountedObject]] = field(repr=False)


@dataclass(frozen=True, slots=True)
class MountRefused:
    """A mount failed: ``code`` and ``message`` are what the driver was answered.

    ``spec`` is None where the class could not be read; ``pod`` is None where not even that could be told.
    """

    code: str
    message: str
    seconds: float
    pod: Pod | None
    class_name: str
    target_path: str
    spec: MountSpec | None


@dataclass(frozen=True, slots=True)
class LoggedIn:
    """A pod logged in to Vault, or tried to: ``error`` says why not. ``ttl`` is in seconds, 0 for no end.

    ``request_id`` is that of Vault's response, which has one where it gave a token.
    """

    spec: MountSpec
    accessor: str
    ttl: float
    seconds: float
    error: ProviderError | None
    request_id: str = ""


@dataclass(frozen=True, slots=True)
class Issued:
    """Vault gave a lease or a certificate to a pod; ``again`` in place of one that could live no longer.

    ``seconds`` is how long Vault took. ``objects`` makes the list of the objects that it is for in the class that asked
    for it, for who wants to know them.
    """

    who: Who
    path: str
    kind: Kind
    accessor: str
    lease_id: str
    request_id: str
    ttl: float
    again: bool
    seconds: float
    objects: Callable[[], Sequence[ObjectSpec]] = field(repr=False)


class Renewing(enum.Enum):
    """What became of a renewal."""

    RENEWED = "renewed"
    REFUSED = "refused"  # Vault renews it no further; it lives to its end
    GONE = "gone"
    UNANSWERED = "unanswered"  # to be tried again


@dataclass(frozen=True, slots=True)
class Renewal:
    """A token (``lease_id`` "") or a lease was to be renewed. ``ttl``, in seconds, is what Vault gave.

    ``request_id`` is that of Vault's response, which has one where it renewed.
    """

    who: Who
    path: str
    accessor: str
    lease_id: str
    outcome: Renewing
    ttl: float
    seconds: float
    reason: str
    request_id: str = ""


class Revoking(enum.Enum):
    """What became of a revocation."""

    REVOKED = "revoked"
    REFUSED = "refused"  # left to expire
    UNANSWERED = "unanswered"  # to be tried again


@dataclass(frozen=True, slots=True)
class Revocation:
    """A token was to be revoked, and all that was given under it. ``why`` says what made it useless."""

    who: Who
    accessor: str
    outcome: Revoking
    why: str
    reason: str
    seconds: float


@dataclass(frozen=True, slots=True)
class ReadShared:
    """A pod got the answer to a read that another one, which Vault cannot tell from it, had sent already."""


@dataclass(frozen=True, slots=True)
class Swept:
    """Pods that are gone were looked for. ``error`` is "" where the listing could be believed; ``gone`` counts pods."""

    error: str
    gone: int


@dataclass(frozen=True, slots=True)
class ProgramEnded:
    """A template or an expression was ended by force; ``limit`` names the bound: "cpu", "memory", "output", "time"."""

    limit: str


@dataclass(frozen=True, slots=True)
class BreakerChanged:
    """A Vault stopped (``open``) or began again to be asked: while it does not answer, mounts are refused at once.

    ``answered`` is whether it ever answered this daemon: what never did may be a slip in a class.
    """

    server: VaultServer
    open: bool
    answered: bool


@dataclass(frozen=True, slots=True)
class AuditOutage:
    """The audit log could not be written any more (``began``), or could again."""

    began: bool


@dataclass(frozen=True, slots=True)
class AuditLost:
    """So many lines of the audit log are not written, and never will be."""

    lines: int


@dataclass(frozen=True, slots=True)
class LeaseView:
    """A lease or a certificate that is held for a pod. ``left`` is in seconds, infinite for no end.

    ``renewed`` says that it is going to be renewed, so that its end is not the end of what the pod has.
    """

    path: str
    kind: Kind
    lease_id: str
    left: float
    renewed: bool


@dataclass(frozen=True, slots=True)
class SessionView:
    """A session as it is now. ``token_left`` is in seconds, 0 without a token, infinite for one without end.

    ``mounted_ago`` is in seconds too, infinite where it was taken up from another process and not mounted since.
    ``idle`` says that its pod is likely gone, and nobody can say so: what it was given is left to end.
    """

    who: Who
    accessor: str
    token_left: float
    token_renewed: bool
    mounted_ago: float
    leases: tuple[LeaseView, ...]
    idle: bool


Event: TypeAlias = (
    VaultRequest
    | Looked
    | Mounted
    | MountRefused
    | LoggedIn
    | Issued
    | Renewal
    | Revocation
    | ReadShared
    | Swept
    | ProgramEnded
    | BreakerChanged
    | AuditOutage
    | AuditLost
)


def lease_sha256(lease_id: str) -> str:
    """How a lease is named to people: the SHA-256 of its id in hexadecimal digits, "" for "".

    Whoever knows the id finds the lease by it; whoever does not is given nothing to revoke or to renew.
    """
    return hashlib.sha256(lease_id.encode("utf-8", "surrogatepass")).hexdigest() if lease_id else ""


class Telemetry:
    """Hands each event to all who listen. One that fails is told in the log, and disturbs nobody."""

    def __init__(self) -> None:
        self._listeners: dict[type[Event], list[Callable[[Any], None]]] = {kind: [] for kind in get_args(Event)}

    def listen(self, listener: Callable[[Any], None], *kinds: type[Event]) -> None:
        """Tell ``listener`` of events of these kinds from now on, of all where none is named.

        It is told after those who listen already.
        """
        for kind in kinds or self._listeners:
            self._listeners[kind].append(listener)

    def record(self, event: Event) -> None:
        """Tell everybody of ``event``, now."""
        for listener in self._listeners.get(type(event), ()):
            try:
                listener(event)
            except Exception:  # noqa: BLE001  # telling must not fail what is told
                _log.exception("an event was not taken", extra={"event": type(event).__name__})
