"""What a pod has under one identity, and what of it may be used, kept, renewed or forgotten. No request is sent here.

Times are the clock's, in seconds.
"""

from __future__ import annotations

import logging
import math
import random
from collections.abc import Callable, Mapping, Sequence, Set
from typing import Final

from provider.clock import Clock
from provider.errors import ProviderError
from provider.sessions.lifetime import Lifetime, must_replace
from provider.sessions.model import Answers, HeldToken, Kept, Read, Volume
from provider.sessions.snapshot import Snapshot, merge
from provider.settings import MAX_OBJECTS
from provider.spc import SecretRequest
from provider.telemetry.events import Kind, LeaseView, Supply
from provider.vault import Held, VaultSecret

_log = logging.getLogger(__name__)

# What is lent to keep a credential is more than it takes by this part of it: the next one may be some bytes longer.
SLACK_PART: Final = 8
# Requests that are remembered to have given nothing to keep; past it they are learnt anew.
MAX_STATIC: Final = 4 * MAX_OBJECTS


class Holdings:
    """Tokens, the newest last; credentials that are kept; and volumes, by target path, that ask for them.

    ``remember`` lends so many bytes for what volumes remember, and ``keep`` for what is kept, where there are so many.
    """

    def __init__(
        self,
        clock: Clock,
        renew_percent: float,
        *,
        remember: Callable[[int], Held | None],
        keep: Callable[[int], Held | None],
    ) -> None:
        self.tokens: list[HeldToken] = []
        self.kept: dict[SecretRequest, Kept] = {}
        self.changed = False
        """Whether there is something that the session's file does not hold."""
        self.asked = True
        """Whether a volume, as far as is known, mounts under this identity."""
        self._volumes: dict[str, Volume] = {}
        # Requests by their hashes, since one may have a megabyte; where two have the same, a certificate is told as a
        # secret, or a login may come too early.
        self._static: set[int] = set()
        # Those whose last answer on a mount of its own was a certificate.
        self._fresh_certificates: set[int] = set()
        self._lend_to_remember = remember
        self._lend_to_keep = keep
        self._clock = clock
        self._percent = renew_percent
        # Where this session's renewals lie within the jitter. One for all: a token and a lease of one age are renewed
        # together, and so found together to be at their maximum, instead of a lease being replaced once for each.
        self._luck = random.random()

    @property
    def newest(self) -> HeldToken | None:
        """The token that came last, whether it lives or not."""
        return self.tokens[-1] if self.tokens else None

    # -- for a mount -----------------------------------------------------------------------------------------------

    def interval(self, volume: str) -> float:
        """The time between two mounts of ``volume`` that it has shown, the one that begins now included."""
        return (self._volumes.get(volume) or Volume()).interval(self._clock.now())

    def at_hand(
        self, reads: Sequence[Read], volume: str, interval: float, began: int
    ) -> tuple[dict[Read, VaultSecret], dict[Read, Supply]]:
        """The answers that need no request to Vault, and where each comes from.

        ``began`` is the serial of the newest token when the mount began, see ``may_keep``.
        """
        found: dict[Read, VaultSecret] = {}
        supplies: dict[Read, Supply] = {}
        now, shown = self._clock.now(), self._volumes.get(volume)
        remembered = shown.answers if shown is not None else {}
        if not remembered and not self.kept:
            return found, supplies
        for read in reads:
            if read.fresh:
                continue
            kept = self.kept.get(read.request) if self.kept else None
            if kept is not None and self.may_keep(kept, read, volume, interval, began):
                found[read], supplies[read] = kept.secret, Supply.KEPT
                continue
            secret, at = remembered.get(read.request, (None, 0.0))
            if secret is not None and now < at + read.refresh_after:
                found[read], supplies[read] = secret, Supply.REMEMBERED
        return found, supplies

    def may_keep(self, kept: Kept, read: Read, volume: str, interval: float, began: int) -> bool:
        """Whether this mount of ``volume`` may have what is kept, and need bring no fresh one; then it asks for it.

        ``read`` is how it asks now, whatever its class said when the credential was issued. ``began`` is the serial of
        the newest token when the mount began: what came under a later one is fresh.
        """
        now = self._clock.now()
        if not kept.lives(now):
            return False
        if must_replace(kept.life, kept.carrier, now, interval, read.renew_percent) and kept.token.serial <= began:
            return False
        if volume not in kept.volumes:
            kept.volumes.add(volume)
            self.changed = True
        return True

    def is_void(self, read: Read, answer: VaultSecret | ProviderError) -> bool:
        """Whether a lease that was handed out for ``read`` has turned out to be dead since."""
        if isinstance(answer, ProviderError) or not answer.leased or read.fresh:
            return False
        kept = self.kept.get(read.request)
        return kept is None or kept.secret is not answer or not kept.lives(self._clock.now())

    def issued(self, reads: Sequence[Read]) -> Set[Read]:
        """Those of ``reads`` for which there is a certificate, be it kept or issued on every mount."""
        if not self.kept and not self._fresh_certificates:
            return frozenset()
        return {read for read in reads if self._is_issued(read)}

    def _is_issued(self, read: Read) -> bool:
        if read.fresh:
            return hash(read.request) in self._fresh_certificates
        kept = self.kept.get(read.request)
        return kept is not None and not kept.secret.leased

    def note_fresh(self, request: SecretRequest, *, certificate: bool) -> None:
        """Whether ``request``, which is sent on every mount, gave a certificate now."""
        if not certificate:
            self._fresh_certificates.discard(hash(request))
            return
        if len(self._fresh_certificates) >= MAX_STATIC:
            self._fresh_certificates.clear()
        self._fresh_certificates.add(hash(request))

    def is_static(self, request: SecretRequest) -> bool:
        """Whether ``request`` is known to give nothing to keep."""
        return hash(request) in self._static

    def note_static(self, request: SecretRequest) -> None:
        """``request`` gave nothing to keep."""
        if len(self._static) >= MAX_STATIC:
            self._static.clear()
        self._static.add(hash(request))
        if self.kept.pop(request, None) is not None:
            self.changed = True

    def keep(self, kept: Kept) -> bool:
        """Keep it in the place of what was kept for its request; False where it would take too much memory."""
        before = self.kept.get(kept.request)
        if before is not None and before.held is not None:
            # A successor of about its size takes its place, whatever others have taken meanwhile.
            if not before.held.grow(kept.size):
                return False
            kept.held, before.held = before.held, None
        else:
            size = kept.size + kept.size // SLACK_PART
            kept.held = self._lend_to_keep(size) or self._lend_after_the_dead(size)
        if kept.held is None:
            return False
        self.kept[kept.request] = kept
        return True

    def _lend_after_the_dead(self, size: int) -> Held | None:
        """Once more, without what is over: a volume whose mounts fail does not let go of it."""
        now = self._clock.now()
        for request, kept in list(self.kept.items()):
            if not kept.lives(now):
                del self.kept[request]
        return self._lend_to_keep(size)

    def made_of(self, volume: str, answers: Answers) -> object:
        """What the last mount of ``volume`` made of these very answers; None where any of them is another."""
        shown = self._volumes.get(volume)
        if shown is None or shown.made is None:
            return None
        before, made = shown.made
        same = len(before) == len(answers) and all(answers.get(read) is secret for read, secret in before.items())
        return made if same else None

    def settle(self, volume: str, answers: Mapping[Read, VaultSecret], made: object = None) -> bool:
        """A mount of ``volume`` succeeded with ``answers``: what it does not ask for any more is let go.

        ``made`` is what it made of them. Returns whether the volume has shown that rotation is on.
        """
        shown = self._volumes.setdefault(volume, Volume())
        shown.mounted(self._clock.now())
        if shown.made is None or shown.made[0] is not answers:
            self._note(shown, volume, answers, made)
        if self.kept:
            self._drop(volume, keep={read.request for read in answers if not read.fresh})
        return shown.rotates

    def _note(self, shown: Volume, volume: str, answers: Mapping[Read, VaultSecret], made: object) -> None:
        """Note who gave ``answers``: what is kept, and what may be answered from memory for a while."""
        now = self._clock.now()
        remembered, shown.answers = shown.answers, {}
        lasting = True
        for read, secret in answers.items():
            kept = self.kept.get(read.request)
            if kept is not None and not read.fresh:
                kept.volumes.add(volume)
            elif read.refresh_after > 0 and not read.fresh:
                before = remembered.get(read.request)
                shown.answers[read.request] = before if before and before[0] is secret else (secret, now)
            else:
                lasting = False
        # Given back before it is asked for anew.
        shown.held = None
        if shown.answers:
            sizes = [secret.size + request.size for request, (secret, _) in shown.answers.items()]
            shown.held = self._lend_to_remember(sum(sizes))
            if shown.held is None:
                shown.answers, lasting = {}, False  # read once more by the next mount
        # What is read each time is another answer each time, and its files are held no longer than their mount.
        shown.made = (answers, made) if lasting and made is not None else None

    def forget(self, volume: str) -> None:
        """Another session mounts ``volume`` now: nothing here is kept for it any more."""
        self._volumes.pop(volume, None)
        self._drop(volume, keep=frozenset())
        self.asked = bool(self._volumes or self.kept)

    def _drop(self, volume: str, keep: Set[SecretRequest]) -> None:
        for request, kept in list(self.kept.items()):
            if request not in keep and volume in kept.volumes:
                kept.volumes.discard(volume)
                if not kept.volumes:
                    del self.kept[request]
                self.changed = True

    # -- for renewal -----------------------------------------------------------------------------------------------

    def renewable(self) -> tuple[list[HeldToken], list[Kept]]:
        """The tokens and the leases that renewal is about: the current token, and all on which something hangs.

        What no volume asks for is let go, the token of a session that has none left too.
        """
        now = self._clock.now()
        leases = [kept for kept in self.kept.values() if kept.secret.leased and kept.lives(now)]
        needed = {id(kept.token) for kept in leases}
        tokens = [
            token
            for number, token in enumerate(self.tokens, 1)
            if token.usable(now) and (id(token) in needed or (self.asked and number == len(self.tokens)))
        ]
        return tokens, leases

    def next_renewal(self) -> float:
        """When something is to be renewed; infinite for never."""
        tokens, leases = self.renewable()
        lives = [token.life.renew_at for token in tokens] + [kept.life.renew_at for kept in leases]
        return min(lives, default=math.inf)

    def begin(self, asked_at: float, ttl: float, *, renewable: bool) -> Lifetime:
        """The life of what Vault gave for ``ttl`` seconds, which it counts from when it was asked or a little later."""
        return Lifetime.start(
            asked_at,
            ttl,
            renewable=renewable,
            percent=self._percent,
            luck=self._luck,
            notice=self.notice(),
        )

    def renewed(self, life: Lifetime, asked_at: float, ttl: float) -> None:
        """Vault, asked at this time, gave ``life`` another ``ttl`` seconds."""
        life.renewed(asked_at, ttl, percent=self._percent, luck=self._luck, notice=self.notice())

    def notice(self) -> float:
        """How long before an end it must be known that there is no renewal any more: two re-mounts can still come."""
        return 2 * max((volume.shown_interval for volume in self._volumes.values()), default=0.0)

    def longest_interval(self, kept: Kept) -> float:
        """The time between two mounts of that of its volumes which is mounted most rarely."""
        now = self._clock.now()
        return max((self._volumes[name].interval(now) for name in kept.volumes if name in self._volumes), default=0.0)

    # -- as a whole ------------------------------------------------------------------------------------------------

    def empty(self) -> bool:
        """Whether there was never anything."""
        return not (self.tokens or self.kept or self._volumes)

    def over(self) -> bool:
        """Whether nothing of it lives at Vault."""
        now = self._clock.now()
        return not any(token.usable(now) for token in self.tokens) and not any(
            kept.lives(now) for kept in self.kept.values()
        )

    def clear(self) -> None:
        """Forget all but the tokens."""
        self.kept.clear()
        self._volumes.clear()

    def forget_tokens(self) -> None:
        """Forget tokens that are over; no read may be under way under one of them."""
        now = self._clock.now()
        needed = {id(kept.token) for kept in self.kept.values()}
        self.tokens = [token for token in self.tokens if token.usable(now) or id(token) in needed]

    def adopt(self, snapshot: Snapshot) -> None:
        """Take over what a file holds."""
        self.tokens, merged = merge(self.tokens, self.kept, snapshot)
        before, self.kept = self.kept, {request: kept for request, kept in self.kept.items() if request in merged}
        for request, kept in merged.items():
            if before.get(request) is not kept and not self.keep(kept):
                _log.warning(
                    "a credential of another process is left to end: those of namespace %s take all the memory",
                    snapshot.pod.namespace,
                    extra={"pod": str(snapshot.pod), "path": request.path},
                )

    def leases(self, *, idle: bool) -> tuple[LeaseView, ...]:
        """Each credential that is kept and lives, for people and for metrics; ``idle``, none is renewed."""
        now = self._clock.now()
        _, renewable = self.renewable()
        return tuple(
            LeaseView(
                kept.request.path,
                Kind.LEASED if kept.secret.leased else Kind.ISSUED,
                kept.secret.lease_id,
                kept.life.expires_at - now,
                not idle and kept in renewable and math.isfinite(kept.life.renew_at),
            )
            for kept in self.kept.values()
            if kept.lives(now)
        )
