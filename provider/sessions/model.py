"""What the sessions room speaks of: identities, reads, and what is held for a pod."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
from collections import deque
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Final, NamedTuple

from provider.errors import ProviderError
from provider.sessions.lifetime import ROUNDING_SECONDS, Lifetime
from provider.spc import Login, SecretRequest, VaultServer
from provider.telemetry.events import Kind, Supply
from provider.vault import Auth, Held, VaultSecret

# docs/contract.md section 1: kubelet re-mounts about every 60 to 90 s, and the driver may skip one of its own. Until a
# volume has shown its interval, this is taken for it.
DEFAULT_INTERVAL_SECONDS: Final = 210.0
REMEMBERED_GAPS: Final = 3
# What comes sooner after a mount that succeeded is a retry of kubelet's, which has not seen the answer.
RETRY_SECONDS: Final = 30.0
# What a credential that is kept takes besides the texts of its request and of its answer.
KEPT_OVERHEAD_BYTES: Final = 1024

LogIn = Callable[[float], Awaitable[Auth]]
"""Logs the pod in with what its mount brought along, within a deadline of the event loop's time."""


class Identity(NamedTuple):
    """*Who*: one session each. Tokens belong to one pod, so that its end can revoke all that it was given."""

    server: VaultServer
    login: Login
    pod_uid: str

    @property
    def key(self) -> str:
        """A name for files and logs: 32 hexadecimal digits that tell nothing of what they were made of."""
        server, tls, login = self.server, self.server.tls, self.login
        # Field by field, so that a later version that adds one finds the files of this one.
        where = [server.address, server.namespace, tls.ca_cert, tls.ca_directory, tls.server_name, tls.client_cert]
        who = [tls.client_key, tls.skip_verify, login.mount, login.role, login.audience, self.pod_uid]
        # Left out while unset, as in the files of versions that did not know them.
        roots = [tls.ca_root, tls.client_root] if tls.ca_root or tls.client_root else []
        text = json.dumps(where + who + roots)
        return hashlib.sha256(text.encode()).hexdigest()[:32]


class Read(NamedTuple):
    """One distinct read of a mount, as its objects want it.

    ``fresh`` asks for a response that is issued on every mount and never kept. ``renew_percent`` is the part of its
    life after which what cannot be renewed is replaced. ``refresh_after``, in seconds, is how old an answer from
    memory may be; 0 always asks Vault.
    """

    request: SecretRequest
    fresh: bool = False
    renew_percent: float = 67.0
    refresh_after: float = 0.0


Answers = dict[Read, VaultSecret | ProviderError]


@dataclass(frozen=True, slots=True)
class Fetched:
    """The answer, or the error, to each read of a mount.

    ``at_hand`` has those that needed no request to Vault, ``issued`` those that are certificates. ``accessor`` is that
    of the pod's newest token, "" where there is none. ``made`` is what the volume's last mount made of these very
    answers, None where it is not known.
    """

    answers: Answers = field(repr=False)
    at_hand: Mapping[Read, Supply]
    issued: Set[Read]
    accessor: str
    made: object = field(default=None, repr=False)

    def kind(self, read: Read) -> Kind:
        """What the answer to ``read`` is; it must be none of the errors."""
        answer = self.answers[read]
        if isinstance(answer, VaultSecret) and answer.leased:
            return Kind.LEASED
        return Kind.ISSUED if read in self.issued else Kind.STATIC


@dataclass(slots=True)
class HeldToken:
    """A token of the pod. ``serial`` grows with each login of the process; one from an earlier process has -1."""

    auth: Auth
    life: Lifetime
    serial: int
    uses_left: int | None
    dead: bool = False
    bears_leases: bool = False
    expecting: int = field(default=0, compare=False)
    """Requests under way whose answers may be leased."""

    def usable(self, now: float) -> bool:
        """Whether a read can go out under it."""
        return not self.dead and self.life.lives(now) and self.uses_left != 0

    def has_uses(self, *, for_lease: bool) -> bool:
        """Whether a read would leave it enough uses.

        Under its last use Vault gives no lease, and with it revokes those that it gave before.
        """
        return self.uses_left is None or self.uses_left > (for_lease or self.bears_leases or self.expecting > 0)

    def spend(self) -> bool:
        """A request goes out under it; whether it counts (docs/contract.md section 3: ``num_uses`` tokens run out)."""
        counts = bool(self.uses_left)
        if self.uses_left:
            self.uses_left -= 1
        return counts

    def give_back(self) -> None:
        """A request that counted did not go out."""
        if self.uses_left is not None:
            self.uses_left += 1

    @contextlib.contextmanager
    def expecting_lease(self, *, expected: bool = True) -> Iterator[None]:
        """While a request is under way whose answer may be leased nobody takes the last use."""
        self.expecting += expected
        try:
            yield
        finally:
            self.expecting -= expected


@dataclass(slots=True)
class Kept:
    """A leased or issued response that is kept for the pod, and the volumes (target paths) that ask for it."""

    request: SecretRequest
    secret: VaultSecret = field(repr=False)
    life: Lifetime
    token: HeldToken
    volumes: set[str]
    held: Held | None = field(default=None, repr=False, compare=False)
    """What it takes in memory, while it does."""

    @property
    def size(self) -> int:
        """About how many bytes it takes in memory."""
        return self.secret.size + self.request.size + KEPT_OVERHEAD_BYTES

    def lives(self, now: float) -> bool:
        """Whether Vault still holds it: a lease dies with its token, or the last use of it, a certificate does not."""
        if not self.life.lives(now):
            return False
        return not self.secret.leased or self.token.usable(now)

    @property
    def carrier(self) -> Lifetime | None:
        """The life that it cannot outlive."""
        return self.token.life if self.secret.leased else None

    @property
    def ends_with_token(self) -> bool:
        """Whether its token is what ends it: Vault gives under a batch token no longer than that has left."""
        return self.token.life.final_end <= self.life.expires_at + ROUNDING_SECONDS

    @property
    def final_end(self) -> float:
        """When it can live no longer, in the clock's time; infinite while renewals go on."""
        return min(self.life.final_end, self.carrier.final_end if self.carrier else math.inf)


@dataclass(slots=True)
class Volume:
    """What a session knows of one target path: when it was mounted, and what may be answered from memory."""

    mounted_at: float | None = None
    gaps: deque[float] = field(default_factory=lambda: deque(maxlen=REMEMBERED_GAPS))
    answers: dict[SecretRequest, tuple[VaultSecret, float]] = field(default_factory=dict, repr=False)
    held: Held | None = field(default=None, repr=False)
    """What those take in memory."""
    made: tuple[Mapping[Read, VaultSecret], object] | None = field(default=None, repr=False)
    """The answers of the last mount and what it made of them, while all of them may be answered again from memory."""

    def interval(self, now: float) -> float:
        """The time between two re-mounts that it has shown, this one included; in seconds.

        The middle of the last few, so that a night's suspension does not count for much; without those that are
        kubelet's retries, where others are known.
        """
        gaps = list(self.gaps)
        if self.mounted_at is not None:
            gaps.append(now - self.mounted_at)
        gaps = gaps[-REMEMBERED_GAPS:]
        return _middle([gap for gap in gaps if gap >= RETRY_SECONDS] or gaps) if gaps else DEFAULT_INTERVAL_SECONDS

    @property
    def rotates(self) -> bool:
        """Whether it was mounted again and again, by no retry: rotation is on."""
        return len(self.gaps) == REMEMBERED_GAPS and min(self.gaps) >= RETRY_SECONDS

    @property
    def shown_interval(self) -> float:
        """The time between two of its mounts, in seconds; 0 while it had no re-mount."""
        return _middle(self.gaps) if self.gaps else 0.0

    def mounted(self, now: float) -> None:
        """A mount succeeded."""
        if self.mounted_at is not None:
            self.gaps.append(now - self.mounted_at)
        self.mounted_at = now


def _middle(gaps: Sequence[float]) -> float:
    """The median, the higher of two. Not of ``statistics``, which takes longer to import than all of this room."""
    return sorted(gaps)[len(gaps) // 2]
