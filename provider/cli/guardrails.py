"""What the daemon's flags leave open to classes and pods, told once at the start."""

from __future__ import annotations

import logging

from provider.errors import VaultUnavailable
from provider.settings import Settings
from provider.spc.addresses import AddressPattern
from provider.vault.tls import make_context

_logger = logging.getLogger(__name__)


def tell(settings: Settings) -> None:
    """Log each guardrail with how far it is open, in one line; and warn of what the operator's own flags leave open."""
    listed = ",".join(settings.allowed_vault_addresses)
    hardened = settings.hardened
    _logger.info(
        "guardrails: %s",
        "hardened" if hardened else "open to classes as the Go providers are, but for what a flag closes (--hardened)",
        extra={
            "hardened": hardened,
            "vault_addresses": listed or ("--vault-addr alone" if hardened else "any"),
            "skip_tls_verify": "allowed" if settings.skipping_tls_verify_allowed else "refused",
            "tls_files": f"below {settings.tls_root}" if settings.tls_root else ("none" if hardened else "any"),
            "unknown_fields": "refused" if settings.unknown_fields_are_faults else "warned of",
            "world_writable_files": "refused" if hardened else "warned of",
            "pod_mounts_a_minute": settings.max_pod_mounts or "any",
            "pod_objects_a_minute": settings.max_pod_objects or "any",
            "pod_mib_a_minute": settings.max_pod_mib or "any",
        },
    )
    if not hardened:
        return
    plain = [text for text in settings.allowed_vault_addresses if AddressPattern.read(text).scheme == "http"]
    for flag, address in [
        *([("--vault-addr", settings.vault_addr)] if settings.vault_addr.startswith("http://") else []),
        *(("--allowed-vault-addresses", text) for text in plain),
    ]:
        _logger.warning(
            "%s allows %s without TLS: whoever is in between reads tokens and secrets; use https://", flag, address
        )
    if settings.tls.skip_verify:
        _logger.warning(
            "--vault-tls-skip-verify is on: whoever is in between reads tokens and secrets; give the CA by "
            "--vault-tls-ca-cert"
        )


def try_files(settings: Settings) -> None:
    """Warn of TLS files of the flags that cannot be used: they may come yet, and until then mounts fail for them."""
    tls = settings.tls
    if settings.vault_addr.startswith("https://") and (tls.ca_cert or tls.ca_directory or tls.client_cert):
        try:
            make_context(tls)
        except VaultUnavailable as error:
            _logger.warning(
                "%s (--vault-tls-*, or their variables): mounts fail until it can be used; it is looked for at each",
                error.what,
            )
