"""A session's file in the state directory: held while the session issues, read again when another daemon wrote it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from typing import Final, TypeVar

from provider.clock import Clock
from provider.sessions.holdings import Holdings
from provider.sessions.model import Identity
from provider.sessions.snapshot import Snapshot, dump, load
from provider.spc import Pod
from provider.state import Entry, StateDir, StateUnusable

_T = TypeVar("_T")

# A session that has no more is written in a millisecond: usually one token, and a few credentials of some KiB. Tokens
# and the names of their policies may have 24 KiB each.
FEW_TOKENS: Final = 4
SMALL_BYTES: Final = 64 * 1024


class SessionFile:
    """The file of the session of ``identity`` and ``pod``, or nothing at all while ``state`` gives no directory.

    ``holdings`` adopt what another daemon wrote, and are written once they changed.
    """

    def __init__(
        self,
        identity: Identity,
        pod: Pod,
        state: Callable[[], StateDir | None],
        clock: Clock,
        holdings: Holdings,
    ) -> None:
        self.generation = 0
        """The generation that was last read or written; 0 before the first."""
        self.key = identity.key
        """The session's name, in files and logs."""
        self._identity = identity
        self._pod = pod
        self._state = state
        self._clock = clock
        self._holdings = holdings
        self._ended = False
        self._gate = asyncio.Lock()
        self._holders = 0
        self._lock = contextlib.AsyncExitStack()

    @property
    def changed(self) -> bool:
        """Whether it lacks something that the session has."""
        return self._holdings.changed

    @property
    def in_use(self) -> bool:
        """Whether there is a state directory."""
        return self._state() is not None

    def is_behind(self) -> bool:
        """Whether another daemon wrote it since it was last read. One that was lost is to be written anew."""
        store = self._state()
        if store is None:
            return False
        found = store.generation(self.key)
        self._holdings.changed |= found is None and self.generation > 0
        return found not in (None, self.generation)

    async def hold(self, work: Callable[[], Awaitable[_T]]) -> _T:
        """Do ``work`` while the file is held against another daemon, knowing what that one wrote.

        Tasks of this process hold it together: the first takes the lock, the last writes and lets go.
        """
        if self._holders > 0 and not self._gate.locked():
            self._holders += 1  # as most of a mount's reads do
        else:
            await self._enter()
        try:
            return await work()
        finally:
            if self._holders > 1 and not self._gate.locked():
                self._holders -= 1
            else:
                # Whoever goes away while it waits here must let go all the same.
                await asyncio.shield(self._leave())

    async def _enter(self) -> None:
        async with self._gate:
            if not self._holders:
                await self._take()
            self._holders += 1

    async def _leave(self) -> None:
        async with self._gate:
            self._holders -= 1
            if not self._holders:
                self._holdings.forget_tokens()  # no read of this process is under way under one of them
                try:
                    await self._write()
                finally:
                    await self._lock.aclose()

    async def catch_up(self) -> None:
        """Have the holdings know what another daemon wrote."""
        await self._enter()
        await asyncio.shield(self._leave())

    async def save(self) -> None:
        """Write what changed while it is held: what a crash would take before its last holder lets go."""
        async with self._gate:
            if self._holders:
                await self._write()

    async def flush(self) -> None:
        """Write what changed, if anything did, also while others hold the file: their reads may take long."""
        if self._holdings.changed and not self._ended:
            await self.hold(self.save)

    def end(self) -> None:
        """The session ends: nothing is written any more."""
        self._ended = True

    async def remove(self, *, lock_alone: bool = False) -> None:
        """Remove the file and its lock, if they are there; with ``lock_alone`` only where there is no file."""
        store = self._state()
        if store is not None:
            with contextlib.suppress(StateUnusable):
                async with store.lock(self.key):
                    if not lock_alone or store.generation(self.key) is None:
                        store.remove(self.key)

    async def _take(self) -> None:
        store = self._state()
        if store is None:
            return
        try:
            await self._lock.enter_async_context(store.lock(self.key))
        except StateUnusable:
            return  # without the lock, as without the directory
        try:
            await self._catch_up(store)
        except BaseException:
            await self._lock.aclose()  # nobody holds it: whoever was to, went away meanwhile
            raise

    async def _catch_up(self, store: StateDir) -> None:
        entry = await store.load(self.key) if self.is_behind() else None
        if entry is not None:
            try:
                self._holdings.adopt(load(entry.payload, self._clock))
            except ValueError as error:
                store.set_aside(self.key, str(error))
            else:
                self.generation = entry.generation

    async def _write(self) -> None:
        store = self._state()
        if store is None or not self._holdings.changed or self._ended:
            return
        self._holdings.changed = False
        snapshot = Snapshot(self._identity, self._pod, self._holdings.tokens, list(self._holdings.kept.values()))
        written = False
        try:
            small = len(snapshot.tokens) <= FEW_TOKENS and sum([kept.size for kept in snapshot.kept]) <= SMALL_BYTES
            await store.save(self.key, Entry(self.generation + 1, dump(snapshot, self._clock)), small=small)
            written = True
        except StateUnusable:
            pass  # the log has it
        finally:
            if written:
                self.generation += 1
            else:
                self._holdings.changed = True  # tried again after the next mount or renewal
