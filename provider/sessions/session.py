"""One pod under one identity: its tokens, what is kept for it, and the requests that are under way.

State is changed between two awaits only, by this class alone. What issues something (a login, a read that may give a
lease) runs in a task of the session: a caller who goes away orphans nothing, and who asks again joins what is under
way instead of sending it twice.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import random
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeVar

from provider.clock import Clock
from provider.errors import AccessDenied, AnswerLost, ProviderError, VaultUnavailable
from provider.sessions.engines import Engines
from provider.sessions.lifetime import Lifetime, must_replace
from provider.sessions.model import HeldToken, Identity, Kept, LogIn, Read, Volume
from provider.spc import Pod, SecretRequest
from provider.vault import EngineMount, LeaseGone, RenewalRefused, Vault, VaultSecret

_log = logging.getLogger(__name__)
_T = TypeVar("_T")

# docs/contract.md section 3: a dead token and a policy denial look alike. Where the token lives, a new login may
# still help (policies of groups are looked up then), but not at each of kubelet's retries.
POLICY_LOGIN_SECONDS: Final = 300.0
# What was sent is waited for beyond its mount's own time, since its answer may hold a credential that is ours.
ANSWER_SECONDS: Final = 300.0

Answers = dict[SecretRequest, VaultSecret | ProviderError]


@dataclass(frozen=True, slots=True)
class _Mount:
    """One call of Mount, as a session sees it."""

    volume: str
    began: int  # serial of the newest token when the mount began: newer ones are fresh
    interval: float
    log_in: LogIn
    deadline: float


class Session:
    """The session of one Identity. ``pod`` is for logs; ``serials`` numbers logins across the process."""

    def __init__(
        self,
        identity: Identity,
        pod: Pod,
        vault: Vault,
        engines: Engines,
        *,
        clock: Clock,
        renew_percent: float,
        serials: itertools.count[int],
    ) -> None:
        self.identity = identity
        self.pod = pod
        self._vault = vault
        self._engines = engines
        self._clock = clock
        self._percent = renew_percent
        self._serials = serials
        self._tokens: list[HeldToken] = []
        self._kept: dict[SecretRequest, Kept] = {}
        self._volumes: dict[str, Volume] = {}
        self._under_way: dict[object, asyncio.Task[Any]] = {}
        self._policy_login_at = float("-inf")

    # -- mounts ----------------------------------------------------------------------------------------------------

    async def fetch(self, volume: str, reads: Sequence[Read], log_in: LogIn, deadline: float) -> Answers:
        """The answer to each of ``reads``, or the error that it failed with.

        ``log_in`` is called when a new token is needed. ``deadline`` is in the event loop's time.

        Where the login fails, all of them have the one error object in common.
        """
        now = self._clock.now()
        shown = self._volumes.get(volume) or Volume()
        newest = self._tokens[-1].serial if self._tokens else -1
        mount = _Mount(volume, newest, shown.interval(now), log_in, deadline)
        answers = await self._all(reads, mount)
        # A read beside it may have shown that the token, and so a kept credential, is dead since it was handed out.
        void = [read for read in reads if self._void(answers[read.request])]
        if void:
            answers |= await self._all(void, mount)
        return answers

    async def engine_of(self, path: str, deadline: float) -> EngineMount | None:
        """The secrets engine that serves ``path``, or None where that cannot be learnt by the deadline."""
        if not self._tokens:
            return None
        try:
            async with asyncio.timeout_at(deadline):
                return await self._engines.find(self._vault, path, self._tokens[-1].auth.token, deadline)
        except TimeoutError:
            return None

    def settle(self, volume: str, reads: Sequence[Read]) -> None:
        """The mount of ``volume`` succeeded with ``reads``: what it does not ask for any more is let go."""
        self._volumes.setdefault(volume, Volume()).mounted(self._clock.now())
        wanted = {read.request for read in reads}
        for request, kept in list(self._kept.items()):
            if request in wanted:
                kept.volumes.add(volume)
            else:
                self._let_go(kept, volume)

    def forget(self, volume: str) -> None:
        """Another session mounts ``volume`` now: nothing here is kept for it any more."""
        if self._volumes.pop(volume, None) is not None:
            for kept in list(self._kept.values()):
                self._let_go(kept, volume)

    def _let_go(self, kept: Kept, volume: str) -> None:
        kept.volumes.discard(volume)
        if not kept.volumes and self._kept.get(kept.request) is kept:
            del self._kept[kept.request]

    async def _all(self, reads: Sequence[Read], mount: _Mount) -> Answers:
        async def one(read: Read) -> VaultSecret | ProviderError:
            try:
                return await self._one(read, mount)
            except ProviderError as error:
                return error

        return dict(zip((read.request for read in reads), await asyncio.gather(*map(one, reads)), strict=True))

    async def _one(self, read: Read, mount: _Mount) -> VaultSecret:
        kept = self._wanted(read.request, mount)
        if kept is not None:
            kept.volumes.add(mount.volume)
            return kept.secret
        return await self._join(read.request, lambda: self._obtain(read, mount))

    def _wanted(self, request: SecretRequest, mount: _Mount) -> Kept | None:
        """What is kept for ``request``, unless this mount must bring a fresh one."""
        kept = self._kept.get(request)
        now = self._clock.now()
        if kept is None or not kept.lives(now):
            return None
        if (
            must_replace(kept.life, kept.carrier, now, mount.interval, kept.percent)
            and kept.token.serial <= mount.began
        ):
            return None
        return kept

    def _void(self, answer: VaultSecret | ProviderError) -> bool:
        if isinstance(answer, ProviderError) or not answer.leased:
            return False
        return not any(kept.secret is answer and kept.lives(self._clock.now()) for kept in self._kept.values())

    async def _obtain(self, read: Read, mount: _Mount) -> VaultSecret:
        """Read from Vault, and keep what is leased or issued."""
        request = read.request
        old = self._kept.get(request)
        try:
            token = await self._token(mount, for_lease=old is not None)
            secret, token = await self._read(request, token, mount)
        except VaultUnavailable as error:
            if old is None or not old.lives(self._clock.now()):
                raise
            _log.warning("kept the old credential of %s: %s", request.path, error, extra=self._about())
            return old.secret
        await self._keep(request, secret, token, mount)
        return secret

    async def _read(self, request: SecretRequest, token: HeldToken, mount: _Mount) -> tuple[VaultSecret, HeldToken]:
        try:
            return await self._send(request, token, mount), token
        except AccessDenied:
            if token.serial > mount.began:
                raise
            fresh = await self._join(("denied", token.serial), lambda: self._after_denial(token, mount))
            if fresh is None:
                raise
        secret = await self._send(request, fresh, mount)
        if not token.dead and "default" not in token.auth.policies:
            # Without the default policy a token may not look itself up, so that alone proved nothing; this does.
            self._bury(token)
        return secret, fresh

    async def _send(self, request: SecretRequest, token: HeldToken, mount: _Mount) -> VaultSecret:
        token.spend()
        return await self._vault.read(request, token.auth.token, mount.deadline)

    async def _after_denial(self, token: HeldToken, mount: _Mount) -> HeldToken | None:
        """A token to try once more with after a 403, or None where the policies deny the read."""
        if self._tokens and self._tokens[-1] is not token and self._tokens[-1].serial > mount.began:
            return self._tokens[-1]
        lives = await self._vault.token_lives(token.auth.token, mount.deadline)
        sure = lives or "default" in token.auth.policies
        if lives or not sure:
            now = self._clock.now()
            if now < self._policy_login_at + POLICY_LOGIN_SECONDS:
                return None
            self._policy_login_at = now
        else:
            self._bury(token)
        return await self._join("login", lambda: self._log_in(mount))

    def _bury(self, token: HeldToken) -> None:
        token.dead = True
        _log.warning("Vault does not know the pod's token any more; logging in anew", extra=self._about())

    async def _keep(self, request: SecretRequest, secret: VaultSecret, token: HeldToken, mount: _Mount) -> None:
        end = secret.certificate_end
        if secret.leased:
            ttl, renewable = secret.lease_duration, secret.renewable
            token.bears_leases = True
        elif end is not None and await self._issued(request, token, mount):
            ttl, renewable = max(1.0, end - self._clock.wall()), False
        else:
            self._kept.pop(request, None)
            return
        now = self._clock.now()
        life = Lifetime.start(now, ttl, renewable=renewable, percent=self._percent, luck=random.random())
        old = self._kept.get(request)
        volumes = {mount.volume} | (old.volumes if old else set())
        kept = self._kept[request] = Kept(request, secret, life, token, volumes, self._percent)
        _log.info(
            "%s a credential",
            "issued" if old is None else "re-issued",
            extra=self._about() | {"path": request.path},
        )
        self._warn_if_short(kept, mount.interval)

    def _warn_if_short(self, kept: Kept, interval: float) -> None:
        left = kept.final_end - self._clock.now()
        if left <= interval:
            _log.warning(
                "a credential ends before its volume is mounted again: raise its TTL or maximum TTL, or those of the "
                "auth role's tokens",
                extra=self._about()
                | {
                    "path": kept.request.path,
                    "seconds_left": round(left),
                    "interval_seconds": round(interval),
                },
            )

    async def _issued(self, request: SecretRequest, token: HeldToken, mount: _Mount) -> bool:
        """Whether a certificate was issued, not stored: a user of ``kv`` may call keys as they like."""
        engine = await self._engines.find(self._vault, request.path, token.auth.token, mount.deadline)
        return engine is None or engine.kind != "kv"

    # -- tokens ----------------------------------------------------------------------------------------------------

    async def _token(self, mount: _Mount, *, for_lease: bool = False) -> HeldToken:
        """A token that a read can go out under; for a new lease, one that will outlive the next re-mounts."""
        now = self._clock.now()
        token = self._tokens[-1] if self._tokens else None
        if token is not None and token.usable(now):
            if not for_lease or token.serial > mount.began:
                return token
            if not must_replace(token.life, None, now, mount.interval, 100):
                return token
        return await self._join("login", lambda: self._log_in(mount))

    async def _log_in(self, mount: _Mount) -> HeldToken:
        auth = await mount.log_in(mount.deadline)
        life = Lifetime.start(
            self._clock.now(),
            auth.ttl,
            renewable=auth.renewable and not auth.num_uses,
            percent=self._percent,
            luck=random.random(),
        )
        token = HeldToken(auth, life, next(self._serials), auth.num_uses or None)
        self._tokens.append(token)
        _log.info("logged in", extra=self._about() | {"accessor": auth.accessor, "ttl_seconds": auth.ttl})
        return token

    # -- renewal ---------------------------------------------------------------------------------------------------

    def next_renewal(self) -> float:
        """When ``renew`` has something to do, in the clock's time; infinite for never."""
        return min((life.renew_at for life, _ in self._renewals()), default=float("inf"))

    async def renew(self) -> None:
        """Renew what is due, tokens first: a lease lives at most as long as its token."""
        for life, ask in list(self._renewals()):
            if life.renew_at > self._clock.now():
                continue
            deadline = asyncio.get_running_loop().time() + max(1.0, min(30.0, life.expires_at - self._clock.now()))
            life.renew_at = float("inf")  # under way; what follows sets it anew
            luck = random.random()
            try:
                async with asyncio.timeout_at(deadline):
                    ttl = await ask(deadline)
            except LeaseGone as gone:
                life.gone(self._clock.now())
                _log.warning("renewal: %s; the next re-mount brings a new one", gone, extra=self._about())
            except RenewalRefused as refused:
                life.refused()
                _log.info("renewal refused: %s; the next re-mount brings a new one", refused, extra=self._about())
            except (ProviderError, TimeoutError) as error:
                life.unanswered(self._clock.now(), luck)
                _log.warning("renewal unanswered, trying again: %s", error, extra=self._about())
            else:
                life.renewed(self._clock.now(), ttl, percent=self._percent, luck=luck)
                for kept in self._kept.values():
                    if life.ended and life in (kept.life, kept.carrier):
                        self._warn_if_short(kept, self._longest_interval(kept))

    def _longest_interval(self, kept: Kept) -> float:
        now = self._clock.now()
        return max((self._volumes[name].interval(now) for name in kept.volumes if name in self._volumes), default=0.0)

    def _renewals(self) -> Sequence[tuple[Lifetime, Callable[[float], Coroutine[Any, Any, float]]]]:
        now = self._clock.now()
        self._tokens = [token for token in self._tokens if token.usable(now) or token is self._tokens[-1]]
        needed = {id(kept.token) for kept in self._kept.values() if kept.secret.leased}

        def of_token(token: HeldToken) -> Callable[[float], Coroutine[Any, Any, float]]:
            return lambda deadline: self._vault.renew_token(token.auth.token, token.life.granted, deadline)

        def of_lease(kept: Kept) -> Callable[[float], Coroutine[Any, Any, float]]:
            return lambda deadline: self._vault.renew_lease(
                kept.token.auth.token, kept.secret.lease_id, kept.life.granted, deadline
            )

        tokens = [
            (token.life, of_token(token))
            for token in self._tokens
            if not token.dead and (token is self._tokens[-1] or id(token) in needed)
        ]
        leases = [(kept.life, of_lease(kept)) for kept in self._kept.values() if kept.secret.leased and kept.lives(now)]
        return tokens + leases

    # -- tasks -----------------------------------------------------------------------------------------------------

    async def _join(self, key: object, start: Callable[[], Coroutine[Any, Any, _T]]) -> _T:
        """The result of the task for ``key``, started here unless it is under way; whoever waits may go away."""
        task = self._under_way.get(key)
        if task is None:
            task = self._under_way[key] = asyncio.create_task(_bounded(start()))
            task.add_done_callback(lambda done: self._done(key, done))
        result: _T = await asyncio.shield(task)
        return result

    def _done(self, key: object, task: asyncio.Task[Any]) -> None:
        del self._under_way[key]
        if not task.cancelled():
            task.exception()  # seen: who waited may be gone, and Python would complain of an exception never read

    async def close(self) -> None:
        """Wait for nothing more: the process ends, or the session is let go."""
        for task in list(self._under_way.values()):
            task.cancel()
        await asyncio.gather(*self._under_way.values(), return_exceptions=True)

    def _about(self) -> dict[str, object]:
        return {"pod": str(self.pod), "role": self.identity.login.role, "session": self.identity.key}


async def _bounded(work: Coroutine[Any, Any, _T]) -> _T:
    try:
        async with asyncio.timeout(ANSWER_SECONDS):
            return await work
    except TimeoutError as error:
        raise AnswerLost(
            f"Vault did not answer within {ANSWER_SECONDS:.0f} s", "check Vault's load and the network to it"
        ) from error
