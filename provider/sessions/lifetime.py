"""Pure rules of what lives for a time at Vault: when it is renewed, when it ends, when it is to be replaced.

A token and a lease obey the same rules. Times are readings of ``Clock.now()`` and durations, both in seconds.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

# Vault rounds a TTL down to whole seconds, and a second may pass between the asking and the granting.
ROUNDING_SECONDS: Final = 1.5
# Renewals are spread over this part of the time until them, earlier, so that leases of one boot do not come at once.
JITTER: Final = 0.1
# The part of what is left before which nothing is renewed.
EARLIEST: Final = 1 / 3
# After a renewal that nobody answered: the next try comes after a tenth of what is left, within these bounds.
RETRY_MIN_SECONDS: Final = 1.0
RETRY_MAX_SECONDS: Final = 30.0


@dataclass(slots=True)
class Lifetime:
    """The life of one token or lease.

    ``granted`` is what it was first given, and what each renewal asks for. ``ended`` says that renewing brings
    nothing more: it was capped, refused, or cannot be renewed at all.
    """

    started_at: float
    granted: float
    expires_at: float
    renewable: bool
    ended: bool
    renew_at: float

    @classmethod
    def start(
        cls, now: float, ttl: float, *, renewable: bool, percent: float, luck: float, notice: float = 0.0
    ) -> Lifetime:
        """A life that begins ``now``. ``ttl`` 0 is without end. ``luck``, 0 to 1, places it within the jitter.

        ``notice`` is how many seconds before its expiry a renewal is wanted, see ``_point``.
        """
        expires_at = now + ttl if ttl > 0 else math.inf
        life = cls(now, ttl, expires_at, renewable, not renewable and ttl > 0, math.inf)
        if renewable and ttl > 0:
            life.renew_at = life._point(now, percent, luck, notice)
        return life

    def renewed(self, now: float, ttl: float, *, percent: float, luck: float, notice: float = 0.0) -> None:
        """A renewal asked for ``granted`` seconds and was given ``ttl``. ``notice`` is as in ``start``.

        A shorter grant is a cap (docs/contract.md section 3). After one, a last renewal is still tried, since not
        every short grant is a maximum TTL; once a renewal brings no later end, there is no other.
        """
        longer = now + ttl > self.expires_at + ROUNDING_SECONDS
        self.expires_at = now + ttl
        capped = ttl < self.granted - ROUNDING_SECONDS
        self.renew_at = self._point(now, percent, luck, notice) if longer or not capped else math.inf
        self.ended = capped

    def refused(self) -> None:
        """Vault will not renew it; it lives on until its expiry."""
        self.ended = True
        self.renew_at = math.inf

    def gone(self, now: float) -> None:
        """Vault does not know it any more."""
        self.refused()
        self.expires_at = min(self.expires_at, now)

    def unanswered(self, now: float, luck: float) -> None:
        """A renewal got no answer: try again while it lives."""
        left = max(0.0, self.expires_at - now)
        wait = min(RETRY_MAX_SECONDS, max(RETRY_MIN_SECONDS, left / 10))
        self.renew_at = now + wait * (1 - JITTER * luck)

    def lives(self, now: float) -> bool:
        """Whether Vault still holds it, by its own dates."""
        return now < self.expires_at

    @property
    def final_end(self) -> float:
        """When it can live no longer; infinite while renewals go on."""
        return self.expires_at if self.ended else math.inf

    def passed(self, now: float, percent: float) -> bool:
        """Whether ``percent`` of the life that it was given has passed."""
        return now >= self.started_at + self.granted * percent / 100 if self.granted > 0 else False

    def _point(self, now: float, percent: float, luck: float, notice: float) -> float:
        """When to renew: after ``percent`` of what is left, or ``notice`` before the end where that is earlier.

        That a life has reached its maximum is learnt from a renewal alone, and what follows from it takes a
        re-mount or two: where TTLs are that short, a renewal at two thirds would tell too late. Never before a
        third, since a TTL below the re-mount interval cannot be helped by asking all the time; nor within a second.
        """
        left = self.expires_at - now
        after = min(left * percent / 100, max(left - notice, left * EARLIEST))
        return now + max(RETRY_MIN_SECONDS, after * (1 - JITTER * luck))


def must_replace(life: Lifetime, carrier: Lifetime | None, now: float, interval: float, percent: float) -> bool:
    """Whether the next mount is to get a fresh credential instead of this one.

    ``carrier`` is the token's life, under which a lease lives; None for what outlives its token (a certificate
    without a lease). ``interval`` is the time between two re-mounts.

    Waiting for two thirds of what is left after a capped renewal would be too late at kubelet's cadence: the file is
    only replaced by a re-mount, so what cannot outlive the re-mount after next is replaced by this one.
    """
    if life.renewable and life.ended:
        return True
    end = life.final_end
    if carrier is not None:
        if carrier.renewable and carrier.ended:
            return True
        end = min(end, carrier.final_end)
    if end <= now + 2 * interval:
        return True
    return not life.renewable and life.passed(now, percent)


def certificate_life(data: Mapping[str, Any], told: float) -> float:
    """Seconds that a certificate lives which was issued just now, ``told`` by its end and the time of day.

    A node whose date is wrong would keep it past its end, or have one issued at every mount: what is new lives no
    longer than it is valid for, and is not over.
    """
    from provider.render.pki import validity  # the first certificate brings its library

    whole = validity(data)
    return max(1.0, told) if whole is None or 0 < told <= whole else whole
