"""Reads that pods may share while they are in flight, and what must be known for it: which engine serves a path.

Only pods that Vault cannot tell apart share (one server, one entity, one set of policies), and only a GET on a mount
that is known to be ``kv``: nothing else answers all tokens of one principal alike (docs/contract.md section 3).
"""

from __future__ import annotations

import asyncio
from typing import Final

from provider.clock import Clock
from provider.errors import VaultUnavailable
from provider.redact import Sensitive
from provider.spc import SecretRequest, VaultServer
from provider.telemetry.events import ReadShared, Telemetry
from provider.vault import Auth, EngineMount, Room, Vault, VaultSecret, VaultUnreachable

# A mount that is disabled and enabled again as another engine is a rare event; this bounds how long it is missed.
KNOWN_FOR_SECONDS: Final = 600.0
# Engines that are known of all Vaults; past it, which only a Vault of somebody else's has, they are learnt anew.
MAX_ENGINES: Final = 1000
# Paths whose engines are asked for at one time; others' wait for a later read. A node's pods use a few engines.
MAX_ASKING: Final = 32
# Where a token may not ask which engine it reads from, it is not asked again for a while.
UNTOLD_FOR_SECONDS: Final = 60.0
# Such paths' first elements that are remembered; past it they are asked for anew.
MAX_UNTOLD: Final = 1000
# Asking for the engine is never in the way of a mount, so it need not wait long either.
ASK_SECONDS: Final = 5.0
# Never on a secrets engine that pods could share, whatever is mounted.
_NEVER: Final = ("auth/", "sys/", "cubbyhole/", "identity/")


class SharedReads:
    """Reads in flight and known engines of all Vaults in use. ``enabled`` False sends each read by itself."""

    def __init__(self, clock: Clock, telemetry: Telemetry, *, enabled: bool = True) -> None:
        self._clock = clock
        self._telemetry = telemetry
        self._enabled = enabled
        self._engines: dict[VaultServer, dict[str, tuple[EngineMount, float]]] = {}
        self._untold: dict[tuple[VaultServer, str], float] = {}
        self._reads: dict[object, asyncio.Future[VaultSecret | VaultUnreachable | None]] = {}
        self._asking: dict[tuple[VaultServer, str], asyncio.Task[None]] = {}

    async def read(
        self, vault: Vault, request: SecretRequest, auth: Auth, deadline: float, room: Room | None = None
    ) -> VaultSecret:
        """The answer to ``request``: one in flight where it may be shared, else one of our own, for this ``room``.

        Raises what ``Vault.read`` raises.
        """
        if request.method != "GET" or request.body is not None:
            return await vault.read(request, auth.token, deadline, room=room)
        engine = self._known(vault.server, request.path)
        if engine is None:
            secret = await vault.read(request, auth.token, deadline, room=room)
            if not auth.num_uses:  # it may be used up by now
                self._learn(vault, request.path, auth.token)
            return secret
        # What kv answers it can be asked again, where asking costs no use of the token.
        again = engine.kind == "kv" and not auth.num_uses

        if not self._enabled or engine.kind != "kv" or not auth.entity_id:
            return await vault.read(request, auth.token, deadline, mount=engine.path, resend=again, room=room)
        key = (vault.server, auth.entity_id, auth.policies, request)
        leader = self._reads.get(key)
        if leader is not None:
            shared = await asyncio.shield(leader)
            if isinstance(shared, VaultUnreachable):
                raise VaultUnreachable(shared.what, shared.advice)  # who waited for it has no time to wait once more
            if shared is not None:
                self._telemetry.record(ReadShared())
                return shared
            # It failed, but under another pod's token, within another mount's time and room.
            return await vault.read(request, auth.token, deadline, mount=engine.path, resend=again, room=room)
        # Whoever asks for the same meanwhile has the answer too.
        future = self._reads[key] = asyncio.get_running_loop().create_future()
        result: VaultSecret | VaultUnreachable | None = None
        try:
            result = secret = await vault.read(
                request, auth.token, deadline, mount=engine.path, resend=again, room=room
            )
        except VaultUnreachable as error:
            result = error
            raise
        finally:
            del self._reads[key]
            future.set_result(result)
        return secret

    def reads_kv(self, vault: Vault, request: SecretRequest) -> bool:
        """Whether ``request`` is known to do no more than read from ``kv``."""
        engine = self._known(vault.server, request.path)
        return engine is not None and engine.kind == "kv" and request.method == "GET" and request.body is None

    async def engine(self, vault: Vault, path: str, token: Sensitive[str], deadline: float) -> EngineMount | None:
        """The engine that serves ``path``, asking Vault where it is not known; None where Vault does not tell.

        Raises VaultUnavailable where there is no answer.
        """
        engine = self._known(vault.server, path)
        if engine is None:
            engine = await vault.engine_of(path, token, deadline)
            if engine is not None:
                if sum(map(len, self._engines.values())) >= MAX_ENGINES:
                    self._engines.clear()
                until = self._clock.now() + KNOWN_FOR_SECONDS
                self._engines.setdefault(vault.server, {})[engine.path] = (engine, until)
        return engine

    async def close(self) -> None:
        """End what is under way."""
        tasks = list(self._asking.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _known(self, server: VaultServer, path: str) -> EngineMount | None:
        for prefix, (engine, until) in self._engines.get(server, {}).items():
            if path.startswith(prefix) and self._clock.now() < until:
                return engine
        return None

    def _learn(self, vault: Vault, path: str, token: Sensitive[str]) -> None:
        """Ask for the engine of ``path`` in the background, once for all who read below the same first element."""
        key = (vault.server, path.split("/", 1)[0])
        if path.startswith(_NEVER) or key in self._asking or self._clock.now() < self._untold.get(key, 0.0):
            return
        if len(self._asking) >= MAX_ASKING:
            return
        task = self._asking[key] = asyncio.create_task(self._ask(vault, path, token, key))
        task.add_done_callback(lambda _: self._asking.pop(key))

    async def _ask(self, vault: Vault, path: str, token: Sensitive[str], key: tuple[VaultServer, str]) -> None:
        deadline = asyncio.get_running_loop().time() + ASK_SECONDS
        engine = None
        try:
            async with asyncio.timeout_at(deadline):
                engine = await self.engine(vault, path, token, deadline)
        except (TimeoutError, VaultUnavailable):
            pass
        if engine is None:
            now = self._clock.now()
            self._untold = {key: until for key, until in self._untold.items() if now < until}
            if len(self._untold) >= MAX_UNTOLD:
                self._untold.clear()
            self._untold[key] = now + UNTOLD_FOR_SECONDS
