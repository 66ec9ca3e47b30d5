"""All sessions of the node: found by identity, bounded in number, renewed in the background, kept across restarts."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import math
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Mapping, Sequence
from typing import Any, Final

from provider.clock import Clock
from provider.sessions.model import Fetched, Identity, LogIn, Read
from provider.sessions.session import Session, Surroundings
from provider.sessions.shared import SharedReads
from provider.sessions.snapshot import load
from provider.settings import Settings
from provider.spc import MountSpec
from provider.state import StateDir, StateUnusable
from provider.telemetry.events import SessionView, Telemetry
from provider.turns import Turns
from provider.vault import EngineMount, Memory, Room, VaultSecret, VaultServers

_log = logging.getLogger(__name__)

# The longest sleep between two looks at what is due. Timers of the event loop do not count the time that the machine
# was suspended, so after a long night renewals are late by this at most.
LONGEST_SLEEP_SECONDS: Final = 5.0
# Renewals that are due about together go out together.
SHORTEST_SLEEP_SECONDS: Final = 0.1
# The first mounts wait for the HMAC key, under which sessions of an earlier process are sealed, for this part of
# their time at most; when it did not come, later ones do not wait, and take up the files once it is there.
KEY_WAIT_PART: Final = 0.4
KEY_POLL_SECONDS: Final = 1.0
# How often files are looked for that another daemon wrote since: in a rolling update the old one still mounts pods
# for a while, which may not be mounted again for hours.
LOOK_FOR_FILES_SECONDS: Final = 30.0
# Pods that end together, a drained node's, are revoked so many at a time, Vault by Vault: one may not answer.
MAX_REVOKING: Final = 16
# A session that holds nothing any more is dropped after this much time without a mount.
EMPTY_SESSION_SECONDS: Final = 600.0

KeySource = Callable[[], Awaitable[bytes | None]]


class Sessions:
    """The sessions of the pods of this node, at most ``cache_size`` of them between mounts.

    ``key`` gives the HMAC key, or None while it is not to be had.
    """

    def __init__(
        self, servers: VaultServers, settings: Settings, *, clock: Clock, key: KeySource, telemetry: Telemetry
    ) -> None:
        self._servers = servers
        self._settings = settings
        self._clock = clock
        self._key = key
        self._state: StateDir | None = None
        self._state_opening: asyncio.Task[None] | None = None
        self._key_awaited_until: float | None = None
        self._unusable = ""
        self._looked_for_files_at = -math.inf
        self._shared = SharedReads(clock, telemetry, enabled=settings.share_reads)
        self._memory = Memory()
        self._around = Surroundings(
            clock,
            self._shared,
            settings.renew_percent,
            itertools.count(),
            lambda: self._state,
            Turns(MAX_REVOKING),
            telemetry,
            self._memory,
        )
        self._sessions: OrderedDict[Identity, Session] = OrderedDict()
        self._by_pod: dict[str, list[Session]] = {}
        self._mounting: dict[Identity, int] = {}
        self._busy: set[Identity] = set()
        self._ending: dict[Identity, asyncio.Task[None]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._next_look_at = math.inf
        self._hurried = asyncio.Event()
        self._rotates = False
        self.sweeping = False
        """Whether pods that are gone are found and revoked; where they are not, sessions must idle out."""

    # -- mounts ----------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def mounting(self, spec: MountSpec) -> Iterator[Room]:
        """A mount is under way: its session stays, whatever ``cache_size`` says, until the context ends.

        Its answers are counted in the room that this gives, for as long.
        """
        identity = identity_of(spec)
        self._mounting[identity] = self._mounting.get(identity, 0) + 1
        room = self._memory.room(spec.pod.namespace)
        try:
            yield room
        finally:
            room.close()
            self._mounting[identity] -= 1
            if not self._mounting[identity]:
                del self._mounting[identity]
                session = self._sessions.get(identity)
                if session is not None and session.is_blank():
                    # Who cannot log in takes no place from who can, in memory or on disk. A file is another daemon's.
                    self._finish(session, session.file.remove(lock_alone=True))
            self._shrink()

    async def fetch(
        self, spec: MountSpec, reads: Sequence[Read], log_in: LogIn, deadline: float, room: Room
    ) -> Fetched:
        """The answer, or the error, to each of ``reads``. ``deadline`` is in the event loop's time."""
        await self._await_state(deadline)
        identity = identity_of(spec)
        session = self._sessions.get(identity)
        if session is None:
            vault = self._servers.get(spec.server, spec.pod.uid)
            session = self._add(Session(identity, spec.pod, vault, self._around))
        self._sessions.move_to_end(identity)
        session.class_name = spec.class_name
        return await session.fetch(spec.target_path, reads, log_in, deadline, spec.objects, room)

    def settle(self, spec: MountSpec, answers: Mapping[Read, VaultSecret], made: object = None) -> None:
        """The mount succeeded: its volume now asks for these reads and nothing else, under this identity alone.

        ``made`` is what was made of the answers. While the next mounts are given the very same ones, they have it too.
        """
        identity = identity_of(spec)
        for other in self.of_pod(spec.pod.uid):
            if other.identity == identity:
                self._rotates |= other.settle(spec.target_path, answers, made)
                self._hurry(other)
            else:
                other.forget(spec.target_path)
            if other.file.changed:
                self._spawn(other.file.flush())

    async def engine_of(self, spec: MountSpec, path: str, deadline: float) -> EngineMount | None:
        """The secrets engine that serves ``path``, where this pod's token may know it; it is not worth a failure."""
        session = self._sessions.get(identity_of(spec))
        return await session.engine_of(path, deadline) if session is not None else None

    # -- the background --------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Take up the sessions of an earlier process, then renew what is due, until cancelled."""
        while True:
            now = self._clock.now()
            next_at = min(map(self._due_at, self._sessions.values()), default=math.inf)
            if self._settings.state_dir and now >= self._looked_for_files_at + LOOK_FOR_FILES_SECONDS:
                if self._state is None:
                    self._open_state()
                else:
                    await self._take_up(self._state)
            wait = min(LONGEST_SLEEP_SECONDS, max(SHORTEST_SLEEP_SECONDS, next_at - now))
            self._next_look_at = now + wait
            self._hurried.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(wait):
                    await self._hurried.wait()
            self.renew_due()

    def renew_due(self) -> None:
        """Start the renewal of every session that has something due, and drop those that hold nothing any more."""
        now = self._clock.now()
        for identity, session in list(self._sessions.items()):
            idle = now - session.mounted_at
            unused = identity not in self._busy and identity not in self._mounting
            if unused and idle > EMPTY_SESSION_SECONDS and session.holds_nothing():
                self._finish(session, session.file.remove())
            elif self._due_at(session) <= now:
                self._busy.add(identity)
                self._spawn(self._renew(identity, session))

    def _due_at(self, session: Session) -> float:
        """When to renew what a session holds, in the clock's time; infinite where it is not to be, or is just now."""
        if session.identity in self._busy or self._idles_out(session, self._clock.now() - session.mounted_at):
            return math.inf
        return session.next_renewal()

    def _hurry(self, session: Session) -> None:
        """The session changed: wake the renewals, if it has something due before they would wake by themselves."""
        if self._due_at(session) < self._next_look_at:
            self._hurried.set()

    def of_pod(self, uid: str) -> list[Session]:
        """The sessions of one pod."""
        return list(self._by_pod.get(uid, ()))

    def all(self) -> list[Session]:
        """All sessions, the least recently mounted first."""
        return list(self._sessions.values())

    def views(self) -> list[SessionView]:
        """All sessions as they are now."""
        now = self._clock.now()
        return [session.view(idle=self._idles_out(session, now - session.mounted_at)) for session in self.all()]

    def end(self, uid: str) -> None:
        """The pod is gone: drop its sessions, and revoke what they held, in the background."""
        for session in self.of_pod(uid):
            self._finish(session, session.revoke())

    def may_sweep(self) -> bool:
        """Whether this process may sweep: of several on one state directory only the holder of its lock.

        Where that directory cannot be used, or there is no key for it, each sweeps what it has in memory.
        """
        if not self._settings.state_dir:
            return True
        if self._state is None:
            until = self._key_awaited_until
            return until is not None and asyncio.get_running_loop().time() >= until
        try:
            return self._state.hold()
        except StateUnusable:
            return False

    async def close(self) -> None:
        """End all that is under way. Nothing is revoked: the pods live on."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.gather(*(session.close() for session in self._sessions.values()))
        await self._shared.close()
        if self._state is not None:
            self._state.close()

    def _idles_out(self, session: Session, idle: float) -> bool:
        """Whether to leave a session to its TTL: its pod is likely gone, and nobody can say so.

        Where rotation is on, as one volume has shown, a pod that lives is mounted again within minutes.
        """
        return not self.sweeping and self._rotates and idle > max(EMPTY_SESSION_SECONDS, session.token_ttl())

    async def _renew(self, identity: Identity, session: Session) -> None:
        try:
            await session.renew()
        finally:
            self._busy.discard(identity)
            self._hurry(session)

    def _shrink(self) -> None:
        while len(self._sessions) > self._settings.cache_size:
            idle = [session for identity, session in self._sessions.items() if identity not in self._mounting]
            if not idle:
                return
            # The least recently mounted one of the pod that has most: identities cost a tenant nothing.
            most = max(idle, key=lambda session: len(self._by_pod[session.identity.pod_uid]))
            self._finish(most, most.let_go())

    def _add(self, session: Session) -> Session:
        self._sessions[session.identity] = session
        self._by_pod.setdefault(session.identity.pod_uid, []).append(session)
        return session

    def _remove(self, session: Session) -> None:
        del self._sessions[session.identity]
        uid = session.identity.pod_uid
        self._by_pod[uid].remove(session)
        if not self._by_pod[uid]:
            del self._by_pod[uid]

    def _finish(self, session: Session, work: Coroutine[Any, Any, None]) -> None:
        """Drop the session; ``work`` ends it in the background."""
        self._remove(session)
        identity = session.identity
        task = self._ending[identity] = self._spawn(work)
        task.add_done_callback(lambda done: self._ending.get(identity) is done and self._ending.pop(identity))

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    # -- state -----------------------------------------------------------------------------------------------------

    async def _await_state(self, deadline: float) -> None:
        """Let the first mounts wait for the HMAC key; what is sealed under it may be theirs."""
        if not self._settings.state_dir or self._state is not None:
            return
        now = asyncio.get_running_loop().time()
        if self._key_awaited_until is None:
            self._key_awaited_until = now + (deadline - now) * KEY_WAIT_PART
        if now < self._key_awaited_until:
            await asyncio.wait([self._open_state()], timeout=self._key_awaited_until - now)

    def _open_state(self) -> asyncio.Task[None]:
        if self._state_opening is None or self._state_opening.done():
            self._state_opening = self._spawn(self._open())
        return self._state_opening

    async def _open(self) -> None:
        """Open the state directory as soon as the key is there, and take up what is in it."""
        while (key := await self._key()) is None:  # noqa: ASYNC110  # it comes from elsewhere, and tells nobody
            await asyncio.sleep(KEY_POLL_SECONDS)
        try:
            state = await asyncio.to_thread(StateDir, self._settings.state_dir, key)
        except StateUnusable as error:
            if str(error) != self._unusable:
                self._unusable = str(error)
                _log.warning("%s; sessions are kept in memory only", error)
            # Tried again when files are next looked for; no mount waits for it meanwhile.
            self._looked_for_files_at = self._clock.now()
            self._key_awaited_until = -math.inf
            return
        await self._take_up(state)
        self._state = state

    async def _take_up(self, state: StateDir) -> None:
        """Take up the sessions whose files another process wrote and that are not known here."""
        self._looked_for_files_at = self._clock.now()
        known = {identity.key for identity in (*self._sessions, *self._ending)}
        taken = 0
        for name in await asyncio.to_thread(state.keys):
            entry = await state.load(name) if name not in known else None
            if entry is None:
                continue
            try:
                snapshot = load(entry.payload, self._clock)
            except ValueError as error:
                state.set_aside(name, str(error))
                continue
            if snapshot.identity not in self._sessions and snapshot.identity not in self._ending:
                vault = self._servers.get(snapshot.identity.server, snapshot.identity.pod_uid)
                session = Session(snapshot.identity, snapshot.pod, vault, self._around)
                session.adopt(snapshot)
                session.mounted_at = self._clock.now()  # at the latest: its pod may live, and be mounted again
                session.file.generation = entry.generation
                self._add(session)
                self._sessions.move_to_end(snapshot.identity, last=False)
                taken += 1
        if taken:
            _log.info("took up sessions of another process", extra={"sessions": taken})
            # Some may be due at once: their renewals waited for this process to be there.
            self._hurried.set()


def identity_of(spec: MountSpec) -> Identity:
    """Who mounts."""
    return Identity(spec.server, spec.login, spec.pod.uid)
