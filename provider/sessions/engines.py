"""Which secrets engine serves a path: learnt from ``sys/internal/ui/mounts/`` when first needed, once a mount."""

from __future__ import annotations

from typing import Final

from provider.clock import Clock
from provider.errors import VaultUnavailable
from provider.redact import Sensitive
from provider.spc import VaultServer
from provider.vault import EngineMount, Vault

# A mount that is disabled and enabled again as another engine is a rare event; this bounds how long it is missed.
KNOWN_FOR_SECONDS: Final = 600.0


class Engines:
    """The engines of all Vaults in use, as far as they are known."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._known: dict[VaultServer, dict[str, tuple[EngineMount, float]]] = {}

    def known(self, server: VaultServer, path: str) -> EngineMount | None:
        """The engine of ``path`` without asking anybody; None where it is not known."""
        for prefix, (engine, until) in self._known.get(server, {}).items():
            if path.startswith(prefix) and self._clock.now() < until:
                return engine
        return None

    async def find(self, vault: Vault, path: str, token: Sensitive[str], deadline: float) -> EngineMount | None:
        """The engine of ``path``, asking Vault where it is not known; None where Vault does not tell."""
        engine = self.known(vault.server, path)
        if engine is None:
            try:
                engine = await vault.engine_of(path, token, deadline)
            except VaultUnavailable:
                return None
            if engine is not None:
                until = self._clock.now() + KNOWN_FOR_SECONDS
                self._known.setdefault(vault.server, {})[engine.path] = (engine, until)
        return engine
