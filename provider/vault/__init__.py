"""Vault and OpenBao: connections, TLS, retries, and their answers in our types.

The only importer of hvac.
"""

from provider.vault.client import (
    Auth,
    EngineMount,
    LeaseGone,
    RenewalFailed,
    RenewalRefused,
    Renewed,
    Vault,
    VaultSecret,
    import_calls,
)
from provider.vault.failures import NotSent, VaultUnreachable
from provider.vault.memory import Held, Memory, NoRoom, Room, size_parsed
from provider.vault.servers import VaultServers

__all__ = [
    "Auth",
    "EngineMount",
    "Held",
    "LeaseGone",
    "Memory",
    "NoRoom",
    "NotSent",
    "RenewalFailed",
    "RenewalRefused",
    "Renewed",
    "Room",
    "Vault",
    "VaultSecret",
    "VaultServers",
    "VaultUnreachable",
    "import_calls",
    "size_parsed",
]
