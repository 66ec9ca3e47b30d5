"""All sessions of the node: found by identity, bounded in number, renewed in the background."""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections import OrderedDict
from collections.abc import Sequence

from provider.clock import Clock
from provider.sessions.engines import Engines
from provider.sessions.model import Identity, LogIn, Read
from provider.sessions.session import Answers, Session
from provider.spc import MountSpec
from provider.vault import EngineMount, VaultServers

_log = logging.getLogger(__name__)

# The longest sleep between two looks at what is due. Timers of the event loop do not count the time that the machine
# was suspended, so after a long night renewals are late by this at most.
LONGEST_SLEEP_SECONDS = 5.0
# An idle node wakes no more often than this.
SHORTEST_SLEEP_SECONDS = 1.0
RENEW_PERCENT = 67.0


class Sessions:
    """The sessions of the pods of this node, at most ``cache_size`` of them between mounts."""

    def __init__(
        self, servers: VaultServers, *, clock: Clock, cache_size: int, renew_percent: float = RENEW_PERCENT
    ) -> None:
        self._servers = servers
        self._clock = clock
        self._cache_size = cache_size
        self._renew_percent = renew_percent
        self._engines = Engines(clock)
        self._serials = itertools.count()
        self._sessions: OrderedDict[Identity, Session] = OrderedDict()
        self._mounting: dict[Identity, int] = {}
        self._renewing: set[Identity] = set()
        self._tasks: set[asyncio.Task[None]] = set()

    async def fetch(self, spec: MountSpec, reads: Sequence[Read], log_in: LogIn, deadline: float) -> Answers:
        """The answer, or the error, to each of ``reads``. ``deadline`` is in the event loop's time."""
        identity = identity_of(spec)
        session = self._sessions.get(identity)
        if session is None:
            session = self._sessions[identity] = Session(
                identity,
                spec.pod,
                self._servers.get(spec.server),
                self._engines,
                clock=self._clock,
                renew_percent=self._renew_percent,
                serials=self._serials,
            )
        self._sessions.move_to_end(identity)
        self._mounting[identity] = self._mounting.get(identity, 0) + 1
        try:
            return await session.fetch(spec.target_path, reads, log_in, deadline)
        finally:
            self._mounting[identity] -= 1
            if not self._mounting[identity]:
                del self._mounting[identity]
            self._shrink()

    def settle(self, spec: MountSpec, reads: Sequence[Read]) -> None:
        """The mount succeeded: its volume now asks for ``reads`` and nothing else, under this identity alone."""
        identity = identity_of(spec)
        for other, session in self._sessions.items():
            if other.pod_uid == identity.pod_uid:
                if other == identity:
                    session.settle(spec.target_path, reads)
                else:
                    session.forget(spec.target_path)

    async def engine_of(self, spec: MountSpec, path: str, deadline: float) -> EngineMount | None:
        """The secrets engine that serves ``path``, where this pod's token may know it; it is not worth a failure."""
        session = self._sessions.get(identity_of(spec))
        return await session.engine_of(path, deadline) if session is not None else None

    async def run(self) -> None:
        """Renew what is due, until cancelled."""
        while True:
            now = self._clock.now()
            next_at = min((session.next_renewal() for session in self._sessions.values()), default=float("inf"))
            await asyncio.sleep(min(LONGEST_SLEEP_SECONDS, max(SHORTEST_SLEEP_SECONDS, next_at - now)))
            self.renew_due()

    def renew_due(self) -> None:
        """Start the renewal of every session that has something due and is not at it already."""
        now = self._clock.now()
        for identity, session in self._sessions.items():
            if identity not in self._renewing and session.next_renewal() <= now:
                self._renewing.add(identity)
                task = asyncio.create_task(self._renew(identity, session))
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)

    async def close(self) -> None:
        """End all that is under way. Nothing is revoked: the pods live on."""
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for session in self._sessions.values():
            await session.close()

    async def _renew(self, identity: Identity, session: Session) -> None:
        try:
            await session.renew()
        finally:
            self._renewing.discard(identity)

    def _shrink(self) -> None:
        for identity in list(self._sessions):
            if len(self._sessions) <= self._cache_size:
                break
            if identity not in self._mounting:
                del self._sessions[identity]


def identity_of(spec: MountSpec) -> Identity:
    """Who mounts."""
    return Identity(spec.server, spec.login, spec.pod.uid)
