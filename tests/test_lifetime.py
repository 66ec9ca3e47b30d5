"""The pure rules of lifetimes: when to renew, when something ends, when it is to be replaced."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from provider.sessions.lifetime import (
    JITTER,
    RETRY_MAX_SECONDS,
    RETRY_MIN_SECONDS,
    ROUNDING_SECONDS,
    Lifetime,
    must_replace,
)

HOUR = 3600.0
INTERVAL = 75.0

nows = st.floats(0, 1e7)
ttls = st.floats(5, 1e7)
percents = st.floats(1, 99)
lucks = st.floats(0, 1)


def life(ttl: float = HOUR, *, now: float = 0.0, renewable: bool = True) -> Lifetime:
    return Lifetime.start(now, ttl, renewable=renewable, percent=67, luck=0.0)


@given(nows, ttls, percents, lucks)
def test_renewal_is_due_at_the_percentage_of_what_remains(now: float, ttl: float, percent: float, luck: float) -> None:
    """The renewal point lies at the percentage of the life that remains, or up to a tenth of that time earlier.

    It is a second away at least, whatever Vault answers: a life of a third of a second must not keep the daemon busy.
    """
    started = Lifetime.start(now, ttl, renewable=True, percent=percent, luck=luck)
    at_latest = now + max(1.0, ttl * percent / 100)
    assert started.renew_at == pytest.approx(now + max(1.0, ttl * percent / 100 * (1 - JITTER * luck)))
    assert now < started.renew_at <= at_latest + 1e-6
    assert started.expires_at == now + ttl
    assert started.final_end == math.inf


def test_default_point_is_two_thirds() -> None:
    """Of an hour's lease the renewal is due after 67 %: 2412 s, and with the most of luck a tenth of that before."""
    assert life().renew_at == pytest.approx(2412)
    assert Lifetime.start(0, HOUR, renewable=True, percent=67, luck=1.0).renew_at == pytest.approx(2412 * 0.9)


@given(ttls, percents, lucks, st.floats(0, 1000))
def test_notice_brings_a_renewal_forward(ttl: float, percent: float, luck: float, notice: float) -> None:
    """What must be known so long before the end is asked for by then, but not before a third has passed."""
    due = Lifetime.start(0, ttl, renewable=True, percent=percent, luck=0, notice=notice).renew_at
    plain = max(1.0, ttl * percent / 100)
    assert due <= plain + 1e-6
    assert due >= min(plain, ttl / 3) - 1e-6
    if ttl - notice > ttl / 3:
        assert due <= max(1.0, ttl - notice) + 1e-6
    jittered = Lifetime.start(0, ttl, renewable=True, percent=percent, luck=luck, notice=notice).renew_at
    assert due * (1 - JITTER) - 1e-6 <= jittered <= due + 1e-6


def test_notice_holds_for_the_next_renewal_too() -> None:
    """After a renewal the notice counts from the new expiry: with 5 minutes and notice of 150 s, after 150 s."""
    renewed = Lifetime.start(0, 300, renewable=True, percent=67, luck=0, notice=150)
    assert renewed.renew_at == pytest.approx(150)
    renewed.renewed(150, 300, percent=67, luck=0, notice=150)
    assert renewed.renew_at == pytest.approx(300)


@given(st.lists(lucks, min_size=20, max_size=20, unique=True))
def test_jitter_spreads_equal_lives(draws: list[float]) -> None:
    """Leases that were given together are not all renewed at one time."""
    assert len({Lifetime.start(0, HOUR, renewable=True, percent=67, luck=luck).renew_at for luck in draws}) > 1


@given(nows, ttls)
def test_what_cannot_be_renewed_ends_with_its_ttl(now: float, ttl: float) -> None:
    """A life that is not renewable is never due, and its expiry is its final end."""
    started = Lifetime.start(now, ttl, renewable=False, percent=67, luck=0.5)
    assert started.renew_at == math.inf
    assert started.final_end == started.expires_at == now + ttl


@given(nows, st.booleans())
def test_ttl_zero_is_without_end(now: float, renewable: bool) -> None:
    """A token of TTL 0 lives for ever, is never renewed and never replaced (docs/contract.md section 3)."""
    started = Lifetime.start(now, 0, renewable=renewable, percent=67, luck=0.5)
    assert started.lives(now + 1e9)
    assert started.renew_at == started.final_end == math.inf
    assert not must_replace(started, None, now + 1e9, INTERVAL, 67)


@given(nows, ttls, lucks)
def test_full_renewal_goes_on(now: float, ttl: float, luck: float) -> None:
    """A renewal that gives what was asked starts the same wait anew, from the time of the renewal."""
    renewed = life(ttl, now=now)
    then = renewed.renew_at
    renewed.renewed(then, ttl, percent=67, luck=luck)
    assert renewed.expires_at == then + ttl
    assert renewed.renew_at == pytest.approx(then + ttl * 0.67 * (1 - JITTER * luck))
    assert renewed.final_end == math.inf


def test_grant_rounded_to_seconds_is_no_cap() -> None:
    """Vault rounds down to whole seconds: a second less than asked is a renewal like any other."""
    renewed = life()
    renewed.renewed(2000, HOUR - 1, percent=67, luck=0)
    assert renewed.final_end == math.inf
    assert not must_replace(renewed, None, 2000, INTERVAL, 67)


@given(st.floats(1, HOUR - ROUNDING_SECONDS - 0.1))
def test_capped_renewal_ends_for_good(ttl: float) -> None:
    """A shorter grant than asked for is a cap: its expiry is final, and the next mount replaces it at once."""
    capped = life()
    capped.renewed(2412, ttl, percent=67, luck=0)
    assert capped.final_end == 2412 + ttl
    assert capped.lives(2412)
    assert must_replace(capped, None, 2412, 0, 67)


def test_cap_that_still_lengthens_is_tried_again() -> None:
    """A short grant that brought a later end is renewed once more, since not every one is a maximum TTL."""
    capped = life()
    capped.renewed(2412, 1800, percent=67, luck=0)
    assert capped.renew_at == pytest.approx(2412 + 1800 * 0.67)
    capped.renewed(3600, HOUR, percent=67, luck=0)
    assert capped.final_end == math.inf


def test_cap_that_lengthens_nothing_is_not_tried_again() -> None:
    """At the maximum TTL, where renewing moves the end no more, no further request is made."""
    capped = life()
    capped.renewed(2412, 1188, percent=67, luck=0)
    assert capped.expires_at == HOUR
    assert capped.renew_at == math.inf


def test_refused_lives_until_its_expiry() -> None:
    """A refusal takes nothing away: it lives on to the end that it had, is renewed no more, and is replaced."""
    refused = life()
    refused.refused()
    assert refused.lives(HOUR - 1)
    assert not refused.lives(HOUR)
    assert refused.final_end == HOUR
    assert refused.renew_at == math.inf
    assert must_replace(refused, None, 1, INTERVAL, 67)


def test_gone_is_dead_at_once() -> None:
    """What Vault does not know is dead from that time on, not from its former expiry."""
    gone = life()
    gone.gone(100)
    assert not gone.lives(100)
    assert gone.final_end == 100
    assert gone.renew_at == math.inf


def test_gone_after_its_end_does_not_lengthen_it() -> None:
    """Learning late that something is gone does not move its end later."""
    gone = life()
    gone.gone(2 * HOUR)
    assert gone.expires_at == HOUR


@given(st.floats(0, 2 * HOUR), lucks)
def test_unanswered_is_tried_again_within_bounds(now: float, luck: float) -> None:
    """Without an answer the next try comes after a tenth of what is left, at least 1 s and at most 30 s."""
    silent = life()
    silent.unanswered(now, luck)
    wait = silent.renew_at - now
    assert RETRY_MIN_SECONDS * (1 - JITTER) - 1e-6 <= wait <= RETRY_MAX_SECONDS + 1e-6
    assert silent.expires_at == HOUR
    assert silent.final_end == math.inf


def test_unanswered_hurries_near_the_end() -> None:
    """With 50 s left a renewal is tried again after 5 s: more than one try fits into what is left."""
    silent = life()
    silent.unanswered(HOUR - 50, 0)
    assert silent.renew_at == pytest.approx(HOUR - 45)


@given(nows, ttls)
def test_lives_until_its_expiry_exactly(now: float, ttl: float) -> None:
    """It lives before its expiry, and not at it."""
    started = life(ttl, now=now)
    assert started.lives(math.nextafter(started.expires_at, -math.inf))
    assert not started.lives(started.expires_at)


# When a mount replaces ----------------------------------------------------------------------------------------


@given(st.floats(0, HOUR - 1))
def test_nothing_is_replaced_while_renewals_go_on(now: float) -> None:
    """What is renewed in full, under a token that is, is kept, however near its present expiry."""
    assert not must_replace(life(), life(), now, INTERVAL, 67)


def test_lease_under_an_ending_token_is_replaced() -> None:
    """Once its token's renewal was capped or refused, a lease is replaced, though it could be renewed itself."""
    token = life(10 * HOUR)
    token.refused()
    assert must_replace(life(), token, 1, INTERVAL, 67)


@given(st.floats(1, 1000), st.floats(0, 10 * HOUR))
def test_never_past_the_end_of_the_token(interval: float, now: float) -> None:
    """A lease is replaced by two intervals before the final end of a token that cannot be renewed, and not before."""
    token = life(9 * HOUR, renewable=False)
    assert must_replace(life(20 * HOUR), token, now, interval, 67) == (token.expires_at <= now + 2 * interval)


@given(st.floats(1, 400), st.floats(0, HOUR))
def test_unrenewable_is_replaced_before_the_remount_after_next(interval: float, now: float) -> None:
    """What cannot be renewed is replaced once its end comes before the re-mount after next, whatever the percentage."""
    lease = life(renewable=False)
    if lease.expires_at <= now + 2 * interval:
        assert must_replace(lease, life(), now, interval, 99.999)


@given(st.floats(1, 90), st.floats(0, 0.9 * 100 * HOUR))
def test_unrenewable_is_replaced_at_its_percentage(percent: float, now: float) -> None:
    """Far from its end, what cannot be renewed is replaced when the percentage of its life has passed, not before."""
    lease = life(100 * HOUR, renewable=False)
    assert must_replace(lease, None, now, INTERVAL, percent) == (now >= 100 * HOUR * percent / 100)


def test_percentage_is_not_for_what_is_renewed() -> None:
    """A renewable lease that is past the percentage is renewed, not replaced."""
    lease = life()
    assert lease.passed(HOUR * 0.9, 67)
    assert not must_replace(lease, life(), HOUR * 0.9, INTERVAL, 67)


def test_certificate_outlives_its_token() -> None:
    """What has no lease hangs on no token: only its own end counts."""
    assert not must_replace(life(100 * HOUR, renewable=False), None, HOUR, INTERVAL, 67)


@given(ttls, st.lists(st.tuples(st.sampled_from(["full", "cap", "refuse", "silent", "gone"]), lucks), max_size=12))
def test_whatever_happens_a_life_that_ended_stays_known(ttl: float, events: list[tuple[str, float]]) -> None:
    """After any order of answers: no renewal is due after the known final end, and a dead life is always replaced."""
    now, lived = 0.0, life(ttl)
    for event, luck in events:
        now = lived.renew_at if lived.renew_at < math.inf else now + 1
        if not lived.lives(now):
            break
        if event == "full":
            lived.renewed(now, ttl, percent=67, luck=luck)
        elif event == "cap":
            lived.renewed(now, max(1.0, ttl / 3), percent=67, luck=luck)
        elif event == "refuse":
            lived.refused()
        elif event == "gone":
            lived.gone(now)
        else:
            lived.unanswered(now, luck)
    if lived.ended:
        assert lived.final_end == lived.expires_at
        assert must_replace(lived, None, now, INTERVAL, 67)
    else:
        assert lived.final_end == math.inf
        assert lived.renew_at < math.inf
