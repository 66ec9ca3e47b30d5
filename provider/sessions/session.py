"""One pod under one identity: its tokens, what is kept for it, and the requests that are under way.

State is changed between two awaits only, by this class alone. What issues something (a login, a read that may give a
lease) runs in a task of the session: a caller who goes away orphans nothing, and who asks again joins what is under
way instead of sending it twice. Such a task holds the session's file, where there is a state directory, so that two
daemons that overlap do not issue twice either.
"""

from __future__ import annotations

import asyncio
import functools
import itertools
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final, TypeVar

from provider.clock import Clock
from provider.errors import AccessDenied, BadSecret, ProviderError, VaultUnavailable
from provider.sessions.file import SessionFile
from provider.sessions.holdings import Holdings
from provider.sessions.lifetime import certificate_life, must_replace
from provider.sessions.model import Answers, Fetched, HeldToken, Identity, Kept, LogIn, Read
from provider.sessions.shared import SharedReads
from provider.sessions.snapshot import Snapshot
from provider.sessions.tasks import Tasks, seen
from provider.sessions.upkeep import Upkeep
from provider.spc import ObjectSpec, Pod, SecretRequest
from provider.state import StateDir
from provider.telemetry.events import (
    Issued,
    Kind,
    SessionView,
    Supply,
    Telemetry,
    Who,
)
from provider.turns import Turns
from provider.vault import EngineMount, Memory, NoRoom, NotSent, Room, Vault, VaultSecret, VaultUnreachable

_log = logging.getLogger(__name__)
_T = TypeVar("_T")

# docs/contract.md section 3: a dead token and a policy denial look alike. Where the token lives, a new login may
# still help (policies of groups are looked up then), but not at each of kubelet's retries.
POLICY_LOGIN_SECONDS: Final = 300.0
# How often a mount asks again for what had no room. Once is enough, but where it joins what another mount asks for.
MAX_ROOM_TRIES: Final = 3
# Reads of such a mount at one time: where the first few fill its room, Vault need not answer fifty.
LARGE_AT_ONCE: Final = 8
# The methods that kv gives a user's keys to.
_READING: Final = frozenset({"GET", "LIST"})


class NoPlace(BadSecret):
    """A credential that is to be kept, and for which there is no memory."""


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What all sessions of the daemon have in common. ``state`` gives the state directory once it can be used."""

    clock: Clock
    shared: SharedReads
    renew_percent: float
    serials: itertools.count[int]
    state: Callable[[], StateDir | None]
    revoking: Turns
    telemetry: Telemetry
    memory: Memory


@dataclass(frozen=True, slots=True)
class _Mount:
    """One call of Mount, as a session sees it."""

    volume: str
    began: int  # serial of the newest token when the mount began: newer ones are fresh
    interval: float
    log_in: LogIn
    deadline: float
    class_name: str
    objects: Sequence[ObjectSpec]
    room: Room

    def objects_of(self, read: Read) -> list[ObjectSpec]:
        """The objects that are made of the answer to ``read``."""
        return [
            wanted
            for wanted in self.objects
            if wanted.fresh == read.fresh and any(source.request == read.request for source in wanted.sources)
        ]


class Session:
    """The session of one Identity. ``pod`` is for logs and for the sweep."""

    def __init__(self, identity: Identity, pod: Pod, vault: Vault, around: Surroundings) -> None:
        self.identity = identity
        self.pod = pod
        self.class_name = ""  # of the last mount, for whoever asks what the session is for
        self.mounted_at = float("-inf")  # the clock's time at which a mount last began
        self._vault = vault
        self._around = around
        self._clock = around.clock
        self._has = Holdings(
            around.clock,
            around.renew_percent,
            remember=functools.partial(around.memory.remembered.hold, pod.namespace),
            keep=functools.partial(around.memory.kept.hold, pod.namespace),
        )
        self._crowded = False  # whether an answer to the last mount that asked Vault had no room
        self._policy_login_at = float("-inf")
        self.file = SessionFile(identity, pod, around.state, around.clock, self._has)
        self._tasks = Tasks(self.file)

    # -- mounts ----------------------------------------------------------------------------------------------------

    async def fetch(
        self,
        volume: str,
        reads: Sequence[Read],
        log_in: LogIn,
        deadline: float,
        objects: Sequence[ObjectSpec],
        room: Room,
    ) -> Fetched:
        """The answer to each of ``reads``, or the error that it failed with.

        ``log_in`` is called when a new token is needed. ``deadline`` is in the event loop's time. ``objects`` are what
        the reads are for, and in ``room`` the answers are kept.
        Where the login fails, all of them have the one error object in common.
        """
        self.mounted_at = self._clock.now()
        class_name = self.class_name  # another mount of the pod, of another class, may begin before this is over
        self._has.asked = True
        if self._has.tokens and self.file.is_behind():
            await self.file.catch_up()  # before answering from memory
        began = self._has.newest.serial if self._has.newest else -1
        mount = _Mount(volume, began, self._has.interval(volume), log_in, deadline, class_name, objects, room)
        at_hand: dict[Read, Supply] = {}
        ask = self._few_at_once if self._crowded else self._all
        answers = await ask(reads, mount, at_hand)
        # A read beside it may have shown that the token, and so a kept credential, is dead since it was handed out.
        if len(at_hand) < len(reads):
            answers = await self._with_room(answers, mount, at_hand)
            void = [read for read in reads if self._has.is_void(read, answers[read])]
            if void:
                answers |= await self._all(void, mount, at_hand)
        issued = self._has.issued(reads)
        made = self._has.made_of(volume, answers) if len(at_hand) == len(answers) else None
        accessor = self._has.newest.auth.accessor if self._has.newest else ""
        return Fetched(answers, at_hand, issued, accessor, made)

    def settle(self, volume: str, answers: Mapping[Read, VaultSecret], made: object = None) -> bool:
        """The mount of ``volume`` succeeded, and made this of ``answers``; whether it has shown that rotation is on."""
        rotates = self._has.settle(volume, answers, made)
        if not self._tasks.running:
            self._has.forget_tokens()
        return rotates

    def forget(self, volume: str) -> None:
        """Another session mounts ``volume`` now."""
        self._has.forget(volume)

    async def engine_of(self, path: str, deadline: float) -> EngineMount | None:
        """The secrets engine that serves ``path``, or None where that cannot be learnt by the deadline."""
        newest = self._has.newest
        if newest is None:
            return None
        try:
            async with asyncio.timeout_at(deadline):
                return await self._around.shared.engine(self._vault, path, newest.auth.token, deadline)
        except (TimeoutError, VaultUnavailable):
            return None

    async def _all(self, reads: Sequence[Read], mount: _Mount, at_hand: dict[Read, Supply]) -> Answers:
        found, supplies = self._has.at_hand(reads, mount.volume, mount.interval, mount.began)
        answers: Answers = {**found}
        at_hand.update(supplies)
        if len(found) == len(reads):
            return answers
        asked: dict[Read, asyncio.Task[VaultSecret]] = {}
        others = set(self._tasks.running) if self._tasks.running else ()
        for read in reads:
            if read not in found:
                at_hand.pop(read, None)
                task = self._ask(read, mount, at_hand)
                asked[read] = self._joined(task, mount) if task in others else task
        if self._token_at_hand(mount) is None:
            self._vault.expect(len(asked))
        # It leaves the tasks alone when the caller goes away.
        await asyncio.wait(asked.values())
        for read, task in asked.items():
            error = task.exception()
            if error is not None and not isinstance(error, ProviderError):
                raise error
            answers[read] = task.result() if error is None else error
        return answers

    async def _with_room(self, answers: Answers, mount: _Mount, at_hand: dict[Read, Supply]) -> Answers:
        """Ask once more for what had no room in memory: now, while no read of the mount is under way, it may wait."""
        self._crowded = any(isinstance(answer, NoRoom) for answer in answers.values())
        if not self._crowded:
            return answers
        for _ in range(MAX_ROOM_TRIES):
            crowded = [
                read
                for read, answer in answers.items()
                # What another mount had no room for, and this one joined, says nothing about the room that is here.
                if isinstance(answer, NoRoom) and (answer.passing or answer.room is not mount.room)
            ]
            if not crowded:
                break
            try:
                await mount.room.widen(mount.deadline)
            except NoRoom as error:
                return answers | dict.fromkeys(crowded, error)
            answers |= await self._few_at_once(crowded, mount, at_hand)
        return answers

    async def _few_at_once(self, reads: Sequence[Read], mount: _Mount, at_hand: dict[Read, Supply]) -> Answers:
        answers: Answers = {}
        for first in range(0, len(reads), LARGE_AT_ONCE):
            answers |= await self._all(reads[first : first + LARGE_AT_ONCE], mount, at_hand)
        return answers

    def _ask(self, read: Read, mount: _Mount, at_hand: dict[Read, Supply]) -> asyncio.Task[VaultSecret]:
        """The task that brings the answer, begun here or under way."""
        if read.fresh:
            return self._tasks.task((mount.volume, read.request), lambda: self._obtain_fresh(read, mount))
        newest = self._has.newest
        static = self._has.is_static(read.request)
        known = static and newest is not None and newest.usable(self._clock.now())
        # Nothing that is ours is lost with its answer: the next mount asks anew, and joins nothing that hangs.
        lossless = static or self._around.shared.reads_kv(self._vault, read.request)
        return self._tasks.task(
            read.request,
            lambda: self._obtain(read, mount, at_hand),
            issues=not known,
            until=mount.deadline if lossless else math.inf,
        )

    def _joined(self, task: asyncio.Task[VaultSecret], mount: _Mount) -> asyncio.Task[VaultSecret]:
        """What another mount's task brings; it is kept here too."""

        async def join() -> VaultSecret:
            secret = await asyncio.shield(task)
            mount.room.take(secret.size, leased=secret.leased)
            return secret

        joined = asyncio.create_task(join())
        joined.add_done_callback(seen)
        return joined

    async def _obtain(self, read: Read, mount: _Mount, at_hand: dict[Read, Supply]) -> VaultSecret:
        """Read from Vault, and keep what is leased or issued; or the one that is kept, which ``at_hand`` is told."""
        request = read.request
        old = self._has.kept.get(request)
        if old is not None and self._has.may_keep(old, read, mount.volume, mount.interval, mount.began):
            at_hand[read] = Supply.KEPT
            return old.secret  # another daemon has left it in the state directory
        try:
            # What is not known to be static may be leased: under a token that ends soon it would end as soon.
            for_lease = old is not None or not self._has.is_static(request)
            token = await self._token(mount, for_lease=for_lease, replaced=old)
            with token.expecting_lease(expected=for_lease):
                began = self._clock.now()
                secret, token = await self._read(request, token, mount)
                if secret.leased or secret.certificate_end is not None:
                    await self._keep(read, secret, token, mount, began)
                else:
                    self._has.note_static(request)
        except (VaultUnavailable, NoPlace) as error:
            if old is None or not old.lives(self._clock.now()):
                raise
            _log.warning("kept the old credential of %s: %s", request.path, error, extra=self._about())
            at_hand[read] = Supply.KEPT
            return old.secret
        return secret

    async def _obtain_fresh(self, read: Read, mount: _Mount) -> VaultSecret:
        """Read what is issued on every mount (``lease: fresh``); it is not kept and not renewed."""
        request = read.request
        token = await self._token(mount, for_lease=True)
        with token.expecting_lease():
            began = self._clock.now()
            secret, token = await self._read(request, token, mount)
            seconds = self._clock.now() - began
            token.bears_leases |= secret.leased
        ttl = secret.lease_duration if secret.leased else await self._certificate_ttl(request, secret, token, mount)
        self._has.note_fresh(request, certificate=ttl is not None and not secret.leased)
        if ttl is not None:
            self._record_issue(read, secret, token, mount, ttl, again=False, seconds=seconds)
        return secret

    async def _read(self, request: SecretRequest, token: HeldToken, mount: _Mount) -> tuple[VaultSecret, HeldToken]:
        try:
            return await self._read_under(token, request, mount), token
        except AccessDenied:
            if token.serial > mount.began:
                raise
            fresh = await self._tasks.join(("denied", id(token)), lambda: self._after_denial(token, mount))
            if fresh is None:
                raise
        secret = await self._read_under(fresh, request, mount)
        if not token.dead and "default" not in token.auth.policies:
            # Without the default policy a token may not look itself up, so that alone proved nothing; this does.
            self._bury(token)
        return secret, fresh

    async def _read_under(self, token: HeldToken, request: SecretRequest, mount: _Mount) -> VaultSecret:
        counted = self._spend(token)
        try:
            secret = await self._around.shared.read(self._vault, request, token.auth, mount.deadline, mount.room)
        except (VaultUnreachable, NotSent):
            if counted:
                token.give_back()
            raise
        mount.room.take(secret.size, leased=secret.leased)
        return secret

    async def _after_denial(self, token: HeldToken, mount: _Mount) -> HeldToken | None:
        """A token to try once more with after a 403, or None where the policies deny the read."""
        newest = self._has.newest or token  # a dead one may be forgotten already
        if newest is not token and newest.serial > mount.began:
            return newest
        self._spend(token)
        lives = await self._vault.token_lives(token.auth.token, mount.deadline)
        if not lives and "default" in token.auth.policies:
            self._bury(token)
        else:
            now = self._clock.now()
            if now < self._policy_login_at + POLICY_LOGIN_SECONDS:
                return None
            self._policy_login_at = now
        return await self._tasks.join("login", lambda: self._log_in(mount))

    def _spend(self, token: HeldToken) -> bool:
        # Another process must not believe in uses that are gone.
        self._has.changed |= token.uses_left is not None
        return token.spend()

    def _bury(self, token: HeldToken) -> None:
        token.dead = True
        _log.warning("Vault does not know the pod's token any more; logging in anew", extra=self._about())

    async def _keep(self, read: Read, secret: VaultSecret, token: HeldToken, mount: _Mount, began: float) -> None:
        """Keep what is leased or issued. ``began`` is when Vault was asked. Raises NoPlace."""
        request = read.request
        seconds = self._clock.now() - began
        if secret.leased:
            # A renewal is a use of the token, and its last use revokes what it was given: better replaced than renewed.
            ttl, renewable = secret.lease_duration, secret.renewable and token.uses_left is None
            token.bears_leases = True
        else:
            certificate_ttl = await self._certificate_ttl(request, secret, token, mount)
            if certificate_ttl is None:
                self._has.note_static(request)
                return
            ttl, renewable = certificate_ttl, False
        life = self._has.begin(began, ttl, renewable=renewable)
        old = self._has.kept.get(request)
        volumes = {mount.volume} | (old.volumes if old else set())
        kept = Kept(request, secret, life, token, volumes)
        has_room = self._has.keep(kept)
        self._has.changed = True
        _log.info(
            "%s a credential", "issued" if old is None else "re-issued", extra=self._about() | {"path": request.path}
        )
        self._record_issue(read, secret, token, mount, ttl, again=old is not None, seconds=seconds)
        if not has_room:
            # It would end unrenewed in the pod's hands. Its lease ends with the pod's token.
            raise NoPlace(
                f"the credentials of namespace {self.pod.namespace} take all the memory that the provider has for "
                "them on this node",
                "mount fewer or smaller ones in that namespace; those of a pod that ends make room by themselves",
            )
        self._warn_if_short(kept, mount.interval)

    def _record_issue(
        self,
        read: Read,
        secret: VaultSecret,
        token: HeldToken,
        mount: _Mount,
        ttl: float,
        *,
        again: bool,
        seconds: float,
    ) -> None:
        self._around.telemetry.record(
            Issued(
                replace(self._who(), class_name=mount.class_name),
                read.request.path,
                Kind.LEASED if secret.leased else Kind.ISSUED,
                token.auth.accessor,
                secret.lease_id,
                secret.request_id,
                ttl,
                again,
                seconds,
                functools.partial(mount.objects_of, read),
            )
        )

    async def _certificate_ttl(
        self, request: SecretRequest, secret: VaultSecret, token: HeldToken, mount: _Mount
    ) -> float | None:
        """Seconds that a certificate lives which was issued; None for what is none, or was stored.

        A user of ``kv`` may call keys as they like, and gets them by reading alone.
        """
        end = secret.certificate_end
        # A pod may store anything in its own cubbyhole, which no policy keeps from it.
        if end is None or "cubbyhole" in request.path.split("/"):
            return None
        if request.method in _READING:
            try:
                engine = await self._around.shared.engine(self._vault, request.path, token.auth.token, mount.deadline)
            except VaultUnavailable:
                return None  # not known just now, and what is stored must not be kept; the next read asks again
            if engine is not None and engine.kind == "kv":
                return None
        told = end - self._clock.wall()
        return await asyncio.to_thread(certificate_life, secret.response["data"], told)

    def _warn_if_short(self, kept: Kept, interval: float) -> None:
        left = kept.final_end - self._clock.now()
        if left <= interval:
            _log.warning(
                "a credential ends before its volume is mounted again: raise its TTL or maximum TTL, or those of the "
                "auth role's tokens",
                extra=self._about()
                | {"path": kept.request.path, "seconds_left": round(left), "interval_seconds": round(interval)},
            )

    # -- tokens ----------------------------------------------------------------------------------------------------

    def _token_at_hand(
        self, mount: _Mount, *, for_lease: bool = False, replaced: Kept | None = None
    ) -> HeldToken | None:
        """A token that a read can go out under; for a new lease, one that will outlive the next re-mounts.

        Where a lease is ``replaced`` since it could not outlive its token, the next one would end with it too.
        """
        now = self._clock.now()
        token = self._has.newest
        if token is not None and token.usable(now) and token.has_uses(for_lease=for_lease):
            if not for_lease or token.serial > mount.began:
                return token
            bound = replaced is not None and replaced.token is token and replaced.ends_with_token
            if not bound and not must_replace(token.life, None, now, mount.interval, 100):
                return token
        return None

    async def _token(self, mount: _Mount, *, for_lease: bool, replaced: Kept | None = None) -> HeldToken:
        """The token at hand, or a new one."""
        token = self._token_at_hand(mount, for_lease=for_lease, replaced=replaced)
        while token is None:
            new = await self._tasks.join("login", lambda: self._log_in(mount))
            # Others who waited for it may have used it up. One of a single use serves what it can; and one that lives
            # no longer than its login took is for Vault to refuse, as another would be.
            if new.has_uses(for_lease=for_lease and new.auth.num_uses != 1):
                token = new
        return token

    async def _log_in(self, mount: _Mount) -> HeldToken:
        began = self._clock.now()
        auth = await mount.log_in(mount.deadline)
        life = self._has.begin(began, auth.ttl, renewable=auth.renewable and not auth.num_uses)
        token = HeldToken(auth, life, next(self._around.serials), auth.num_uses or None)
        superseded, self._has.tokens = self._has.tokens, [*self._has.tokens, token]
        self._has.changed = True
        if self.file.in_use:
            # Beside the reads that it is for: a token that nobody remembers after a crash could not be revoked.
            self._tasks.start(("save", id(token)), self.file.save)
        for old in superseded:
            if not old.bears_leases and old.usable(self._clock.now()):
                # Nothing of the pod's hangs on it, so there is no reason to leave it at Vault.
                self._tasks.start(("revoke", id(old)), functools.partial(self._upkeep().revoke_once, old, "superseded"))
        _log.info("logged in", extra=self._about() | {"accessor": auth.accessor, "ttl_seconds": auth.ttl})
        return token

    # -- renewal ---------------------------------------------------------------------------------------------------

    def next_renewal(self) -> float:
        """When ``renew`` has something to do, in the clock's time; infinite for never."""
        return self._has.next_renewal()

    async def renew(self) -> None:
        """Renew what is due, tokens first: a lease lives at most as long as its token."""
        await self.file.hold(self._renew)

    async def _renew(self) -> None:
        upkeep = self._upkeep()
        tokens, _ = self._has.renewable()
        for token in tokens:
            await upkeep.renew_token(token)
        _, leases = self._has.renewable()
        await asyncio.gather(*map(upkeep.renew_lease, leases))
        for kept in leases:
            if kept.life.ended or kept.token.life.ended:
                self._warn_if_short(kept, self._has.longest_interval(kept))

    # -- the end ---------------------------------------------------------------------------------------------------

    def holds_nothing(self) -> bool:
        """Whether all that it ever had at Vault is over, so that it can be dropped without a word."""
        return not self._tasks.running and self._has.over()

    def is_blank(self) -> bool:
        """Whether no login of it has ever succeeded and none is under way: it is not worth a place."""
        return not self._tasks.running and self._has.empty()

    def token_ttl(self) -> float:
        """The life that the current token was given, in seconds; 0 without a token or without an end."""
        return self._has.newest.life.granted if self._has.newest else 0.0

    async def revoke(self) -> None:
        """The pod is gone: revoke all its tokens, and so all that it was given; then remove its file.

        What fails is tried again with backoff until the token's own expiry, a day at most.
        """
        self.file.end()
        await self._tasks.ended()
        # What another daemon was given, or this one before it had its key again, is the pod's too.
        await self.file.catch_up()
        self._has.clear()
        await asyncio.gather(*map(self._upkeep().revoke_surely, self._has.tokens))
        await self.file.remove()

    async def let_go(self) -> None:
        """No room is left for it between mounts: revoke what no credential of the pod hangs on, forget the rest."""
        self.file.end()
        await self._tasks.ended()
        # The file first: a re-mount that comes at once must not take up what is being revoked.
        await self.file.remove()
        for token in self._has.tokens:
            if not token.bears_leases and token.usable(self._clock.now()):
                await self._upkeep().revoke_once(token, "no room")

    async def close(self) -> None:
        """The process ends: nothing is revoked, and what is under way is abandoned."""
        await self._tasks.close()

    # -- what it is ------------------------------------------------------------------------------------------------

    def adopt(self, snapshot: Snapshot) -> None:
        """Take over what a file holds."""
        self._has.adopt(snapshot)

    def view(self, *, idle: bool) -> SessionView:
        """The session as it is now, for people and for metrics. What is ``idle`` is not renewed any more."""
        now = self._clock.now()
        tokens, _ = self._has.renewable()
        token = self._has.newest if self._has.newest and self._has.newest.usable(now) else None
        return SessionView(
            self._who(),
            token.auth.accessor if token else "",
            token.life.expires_at - now if token else 0.0,
            token is not None and not idle and token in tokens and math.isfinite(token.life.renew_at),
            now - self.mounted_at,
            self._has.leases(idle=idle),
            idle,
        )

    def _upkeep(self) -> Upkeep:
        # Made for each use: kept, it and the session would hold each other.
        around = self._around
        return Upkeep(
            self._vault, self._has, around.clock, around.telemetry, around.revoking, self._who(), self._about()
        )

    def _who(self) -> Who:
        return Who(self.pod, self.identity.login, self.identity.server, self.class_name)

    def _about(self) -> dict[str, object]:
        return {"pod": str(self.pod), "role": self.identity.login.role, "session": self.file.key}
