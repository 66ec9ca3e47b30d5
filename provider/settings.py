"""The daemon's frozen settings, and the limits that it keeps, each named and with its reason.

Pure: ``cli`` makes a Settings of flags and environment; everything else only reads it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, NamedTuple

MIB: Final = 1024 * 1024

# etcd refuses objects over 1.5 MiB, so no class is larger; pod metadata and tokens come on top.
MAX_ATTRIBUTES_BYTES: Final = 2 * MIB
# A class of 1,000 objects is a mistake: the driver's answer holds 4 MiB, and each object is a read of Vault.
MAX_OBJECTS: Final = 1000
# Nodes of the `objects` YAML after its aliases are followed: what a class of MAX_OBJECTS rich objects needs,
# and far below what could fill memory or a second of CPU.
MAX_YAML_NODES: Final = 50_000
# Deeper nesting than any request body needs; parsers that recurse stay far from their limit.
MAX_YAML_DEPTH: Final = 64
# docs/contract.md section 1: the driver receives at most 4 MiB; the frame around files and versions is counted too.
MAX_MOUNT_BYTES: Final = 4 * MIB
# One response of Vault, envelope and base64 included: more than a mount can hold is not read to its end.
MAX_RESPONSE_BYTES: Final = 8 * MIB
# docs/contract.md section 1: a file's path in the volume.
MAX_PATH_BYTES: Final = 4096
MAX_PATH_ELEMENT_BYTES: Final = 255
# Connections to one Vault unless the operator says otherwise: enough to keep a node's boot busy, few enough for a
# thousand nodes.
MAX_CONNECTIONS: Final = 64
# Vault servers (address, namespace, TLS) whose connections are kept while nobody uses them; classes name them, so it is
# bounded.
MAX_POOLS: Final = 64
# What one pod may ask for in a minute unless the operator says otherwise: several times what ten volumes of a hundred
# objects need while each of their mounts fails and kubelet tries again.
MAX_POD_MOUNTS: Final = 600
MAX_POD_OBJECTS: Final = 10_000
MAX_POD_MIB: Final = 256


class TlsSettings(NamedTuple):
    """How to verify Vault, and how to prove ourselves to it. Paths are as the provider's container sees them.

    ``ca_root`` and ``client_root`` are where the CA files, or the client's certificate and key, have to lie once
    symlinks are followed; "" for anywhere.
    """

    ca_cert: str = ""
    ca_directory: str = ""
    server_name: str = ""
    client_cert: str = ""
    client_key: str = ""
    skip_verify: bool = False
    ca_root: str = ""
    client_root: str = ""


_NO_TLS_SETTINGS: Final = TlsSettings()


@dataclass(frozen=True, slots=True)
class Settings:
    """What the operator chose, by flag or environment. Durations are in seconds."""

    endpoint: str = "/tmp/vault.sock"  # noqa: S108  # the Go provider's default
    log_level: str = "info"
    log_format: str = "json"
    health_addr: str = ":8080"
    # "" for the health address, "off" for none.
    metrics_addr: str = ""
    # "off", "stderr", or a file's path.
    audit_log: str = "off"
    # Both as ``spc`` reads a class's own.
    vault_addr: str = "https://127.0.0.1:8200"
    vault_mount: str = "kubernetes"
    vault_namespace: str = ""
    tls: TlsSettings = _NO_TLS_SETTINGS
    vault_proxy_addr: str = ""
    max_connections: int = MAX_CONNECTIONS
    hmac_secret_name: str = "vault-csi-provider-hmac-key"  # noqa: S105  # a name
    hmac_key_file: str = ""
    cache_size: int = 1000
    kubeconfig: str = ""
    mount_timeout: float = 60.0
    renew_percent: float = 67.0
    refresh_after: float = 0.0
    share_reads: bool = True
    state_dir: str = ""
    sweep_interval: float = 60.0
    node_name: str = ""
    pod_name: str = ""
    pod_namespace: str = ""
    revoke: bool = True
    templates: bool = True
    # Close to tenants all that the fields below can open, each of which opens one thing.
    hardened: bool = False
    # Patterns as provider.spc.addresses reads them. None of them: any address, or the daemon's own alone if hardened.
    allowed_vault_addresses: tuple[str, ...] = ()
    # None: as ``hardened`` has it.
    allow_skip_tls_verify: bool | None = None
    # Where the files lie that a class may name. "": anywhere, or nowhere if hardened.
    tls_root: str = ""
    # Whether fields and parameters that nobody knows are faults. None: as ``hardened`` has it.
    unknown_fields_fail: bool | None = None
    # What one pod may ask for in a minute; 0 for no limit.
    max_pod_mounts: int = MAX_POD_MOUNTS
    max_pod_objects: int = MAX_POD_OBJECTS
    max_pod_mib: int = MAX_POD_MIB

    @property
    def skipping_tls_verify_allowed(self) -> bool:
        """Whether a class may ask not to verify Vault."""
        return not self.hardened if self.allow_skip_tls_verify is None else self.allow_skip_tls_verify

    @property
    def unknown_fields_are_faults(self) -> bool:
        """Whether what nobody knows in a class refuses it."""
        return self.hardened if self.unknown_fields_fail is None else self.unknown_fields_fail
