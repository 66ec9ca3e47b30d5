"""How a request to Vault can fail before Vault has seen it."""

from __future__ import annotations

from provider.errors import VaultUnavailable


class NotSent(VaultUnavailable):
    """No connection came about, so Vault has not seen the request: it may be sent again."""


class VaultUnreachable(VaultUnavailable):
    """Vault is known to be away, so it was not asked."""
