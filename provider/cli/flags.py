"""The daemon's flags: one table that parsing, ``--help`` and the README's table are made of."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from provider.cli.readers import (
    duration,
    number,
    read_address,
    read_audit_log,
    read_auth_mount,
    read_bool,
    read_endpoint,
    read_format,
    read_level,
    read_listen_address,
    read_metrics_address,
    read_percent,
    read_pod_share,
    read_root,
    read_secret_name,
    read_switch,
    read_text,
    read_vault_addresses,
    word,
)
from provider.notation import read_duration
from provider.settings import MAX_CONNECTIONS, MAX_POD_MIB, MAX_POD_MOUNTS, MAX_POD_OBJECTS

PROGRAM: Final = "vault-csi-provider"

# docs/contract.md section 1: kubelet gives a mount 2 minutes, and a mount has to end well before.
MAX_MOUNT_SECONDS: Final = 110.0
# Below this not even a login over the loopback interface ends in time.
MIN_MOUNT_SECONDS: Final = 0.1
# Far above the pods that a node can hold (110 by default), so a larger number is a slip of the keyboard.
MAX_CACHE_SIZE: Final = 1_000_000
# A thousand nodes of this many would be a million connections; a node's boot gains nothing from more.
MOST_CONNECTIONS: Final = 1024
# More often, the API server would be asked for the pods of a node by each of them all the time.
MIN_SWEEP_SECONDS: Final = 1.0

DEFAULT_HEALTH_ADDRESS: Final = ":8080"

# The one command; without it the program is the daemon.
STATUS: Final = "status"

# What can stand in for "vault" at the start of a flag.
_FLAG_PREFIX, _OTHER_FLAG_PREFIX = "vault-", "openbao-"


@dataclass(frozen=True, slots=True)
class Flag:
    """One flag. ``default`` is written as one would give it; ``variable`` is its environment variable, or "".

    ``read`` turns the text into a value, or raises ValueError with a sentence of what is allowed.
    """

    group: str
    name: str
    placeholder: str
    default: str
    meaning: str
    read: Callable[[str], Any]
    variable: str = ""
    # Whether "-flag=" says something else than leaving the flag out.
    empty_counts: bool = False

    @property
    def boolean(self) -> bool:
        """Whether the flag stands alone, as ``-debug``."""
        return self.read is read_bool

    @property
    def spellings(self) -> tuple[str, ...]:
        """The names that it is known by, the strongest first."""
        if self.name.startswith(_FLAG_PREFIX):
            return (self.name.replace(_FLAG_PREFIX, _OTHER_FLAG_PREFIX, 1), self.name)
        return (self.name,)


_SERVING, _VAULT, _GUARDRAILS, _CREDENTIALS, _KUBERNETES, _TELLING = (
    "Serving",
    "Vault or OpenBao",
    "Guardrails: what a class and a pod may ask for",
    "Sessions and credentials",
    "Kubernetes",
    "Logs, metrics, health and version",
)

FLAGS: Final[tuple[Flag, ...]] = (
    Flag(
        _SERVING, "endpoint", "PATH", "/tmp/vault.sock",  # noqa: S108  # the Go provider's default
        "Unix socket that the driver dials; unix:// in front is allowed.", read_endpoint, empty_counts=True,
    ),
    Flag(
        _SERVING, "mount-timeout", "DURATION", "60s",
        "Time that one mount may take, from 100ms to 110s; kubelet gives up after 2m.",
        duration(
            MIN_MOUNT_SECONDS, MAX_MOUNT_SECONDS, "a duration from 100ms to 110s, since kubelet gives up after 2m"
        ),
    ),
    Flag(
        _SERVING, "cache-size", "NUMBER", "1000",
        "Most sessions (a pod's token and leases) kept between mounts; 0 keeps none.",
        number(0, MAX_CACHE_SIZE, " (keep none)"),
    ),
    Flag(
        _SERVING, "templates", "SWITCH", "on",
        "Whether classes may have templates: on or off.", read_switch,
    ),
    Flag(
        _VAULT, "vault-addr", "URL", "https://127.0.0.1:8200",
        "Server for classes that name none.", read_address, "VAULT_ADDR",
    ),
    Flag(
        _VAULT, "vault-mount", "PATH", "kubernetes",
        "Auth mount for classes that name none.", read_auth_mount,
    ),
    Flag(
        _VAULT, "vault-namespace", "NAME", "",
        "Vault namespace for classes that name none.", read_text, "VAULT_NAMESPACE",
    ),
    Flag(
        _VAULT, "vault-tls-ca-cert", "FILE", "",
        "CA certificates (PEM) that the server's certificate is verified with.", read_text, "VAULT_CACERT",
    ),
    Flag(
        _VAULT, "vault-tls-ca-directory", "DIRECTORY", "",
        "Directory of such files.", read_text, "VAULT_CAPATH",
    ),
    Flag(
        _VAULT, "vault-tls-server-name", "NAME", "",
        "Name that the server's certificate has to be for, if not the address's host.", read_text,
        "VAULT_TLS_SERVER_NAME",
    ),
    Flag(
        _VAULT, "vault-tls-client-cert", "FILE", "",
        "Client certificate (PEM) for the server to verify.", read_text, "VAULT_CLIENT_CERT",
    ),
    Flag(
        _VAULT, "vault-tls-client-key", "FILE", "",
        "Private key (PEM) of the client certificate.", read_text, "VAULT_CLIENT_KEY",
    ),
    Flag(
        _VAULT, "vault-tls-skip-verify", "", "false",
        "Do not verify the server's certificate. Whoever is in between reads the secrets.", read_bool,
        "VAULT_SKIP_VERIFY",
    ),
    Flag(
        _VAULT, "max-connections", "NUMBER", str(MAX_CONNECTIONS),
        "Most connections to one server, for each TLS setting, 1 to 1024.", number(1, MOST_CONNECTIONS),
    ),
    Flag(
        _GUARDRAILS, "hardened", "", "false",
        "Close to classes what the Go providers leave open to them; each flag below opens one thing again.",
        read_bool,
    ),
    Flag(
        _GUARDRAILS, "allowed-vault-addresses", "LIST", "",
        "URLs and hosts (*.example.com) that classes and redirects may name. Empty: any; hardened: --vault-addr alone.",
        read_vault_addresses,
    ),
    Flag(
        _GUARDRAILS, "allow-skip-tls-verify", "", "",
        "Whether a class may ask not to verify the server. Unset: it may; hardened: it may not.", read_bool,
    ),
    Flag(
        _GUARDRAILS, "tls-root", "DIRECTORY", "",
        "Where the CA, certificate and key files lie that a class may name. Empty: anywhere; hardened: nowhere.",
        read_root,
    ),
    Flag(
        _GUARDRAILS, "unknown-fields", "HOW", "",
        "What a field that nobody knows is in a class: warn or error. Unset: warn; hardened: error.",
        word({"": None, "warn": False, "error": True}),
    ),
    Flag(
        _GUARDRAILS, "max-pod-mounts", "NUMBER", str(MAX_POD_MOUNTS),
        "Most mounts of one pod in a minute; 0 for no limit.", read_pod_share,
    ),
    Flag(
        _GUARDRAILS, "max-pod-objects", "NUMBER", str(MAX_POD_OBJECTS),
        "Most objects of one pod's mounts in a minute, each source of a template counted; 0 for no limit.",
        read_pod_share,
    ),
    Flag(
        _GUARDRAILS, "max-pod-mib", "NUMBER", str(MAX_POD_MIB),
        "Most MiB of one pod's files in a minute; 0 for no limit.", read_pod_share,
    ),
    Flag(
        _CREDENTIALS, "renew-percent", "NUMBER", "67",
        "Percent of what remains of a life after which a token or lease is renewed, or a certificate issued anew.",
        read_percent,
    ),
    Flag(
        _CREDENTIALS, "refresh-after", "DURATION", "0",
        "How old a secret from memory may be at a re-mount; 0 reads Vault each time. For classes that say nothing.",
        read_duration,
    ),
    Flag(
        _CREDENTIALS, "share-reads", "SWITCH", "on",
        "Whether pods that Vault cannot tell apart share a read of a KV secret in flight: on or off.", read_switch,
    ),
    Flag(
        _CREDENTIALS, "state-dir", "DIRECTORY", "",
        "Where sessions are kept, sealed, across restarts; empty: in memory only.", read_text,
    ),
    Flag(
        _CREDENTIALS, "revoke", "WHEN", "pod-end",
        "When a pod's tokens, and so its credentials, are revoked: pod-end or never.",
        word({"pod-end": True, "never": False}),
    ),
    Flag(
        _CREDENTIALS, "sweep-interval", "DURATION", "60s",
        "Time between two looks for pods that are gone, 1s or more.",
        duration(MIN_SWEEP_SECONDS, math.inf, "a duration of 1s or more"),
    ),
    Flag(
        _KUBERNETES, "node-name", "NAME", "",
        "The node whose pods are looked for.", read_text, "NODE_NAME",
    ),
    Flag(
        _KUBERNETES, "kubeconfig", "FILE", "",
        "How to reach the Kubernetes API; empty: as a pod does.", read_text,
    ),
    Flag(
        _KUBERNETES, "hmac-secret-name", "NAME", "vault-csi-provider-hmac-key",
        "Secret in the provider's namespace whose key signs object versions.", read_secret_name,
    ),
    Flag(
        _KUBERNETES, "hmac-key-file", "FILE", "",
        "File with that key, in place of the Secret.", read_text,
    ),
    Flag(
        _TELLING, "log-level", "LEVEL", "info",
        "Least level that is logged: trace, debug, info, warn, error, off.", read_level,
    ),
    Flag(_TELLING, "debug", "", "false", "The same as --log-level=debug.", read_bool),
    Flag(
        _TELLING, "log-format", "FORMAT", "json",
        "One line of json an event, or text for people.", read_format,
    ),
    Flag(
        _TELLING, "health-addr", "ADDRESS", DEFAULT_HEALTH_ADDRESS,
        'host:port of /health/live and /health/ready; "" for none.', read_listen_address, empty_counts=True,
    ),
    Flag(
        _TELLING, "metrics-addr", "ADDRESS", "",
        "host:port of /metrics; empty: on the health address; off: none.", read_metrics_address,
    ),
    Flag(
        _TELLING, "audit-log", "WHERE", "off",
        "Who got which secret when, a line of JSON each: off, stderr, or a file's path.", read_audit_log,
    ),
    Flag(_TELLING, "version", "", "false", "Print the version and exit.", read_bool),
    Flag(
        _TELLING, "output", "FORMAT", "text", "How --version and the status command print: text or json.",
        read_format,
    ),
)  # fmt: skip

# A setting without a flag, as Vault's own command line has it.
PROXY_VARIABLE: Final = "VAULT_PROXY_ADDR"


def help_text() -> str:
    """What ``--help`` prints: the flags by group, each with its default and environment variable."""
    heads = [f"--{flag.name} {flag.placeholder}".rstrip() for flag in FLAGS]
    wide = max(map(len, heads))
    wider = max(len(flag.default) for flag in FLAGS)
    lines = [
        f"{PROGRAM} [flags]",
        f"{PROGRAM} {STATUS} [--output FORMAT] [--health-addr ADDRESS]",
        "",
        "Provider of the Secrets Store CSI driver: mounts secrets of HashiCorp Vault and OpenBao into pods.",
        f"{STATUS} asks the daemon that runs here for its sessions, leases, last mounts and last errors.",
        "",
        f"  {'Flag':{wide}}  {'Default':{wider}}  Environment",
    ]
    group = ""
    for flag, head in zip(FLAGS, heads, strict=True):
        if flag.group != group:
            group = flag.group
            lines += ["", group]
        lines.append(f"  {head:{wide}}  {flag.default or '-':{wider}}  {flag.variable or '-'}")
        lines.append(f"      {flag.meaning}")
    lines += [
        "",
        "Flags take one dash or two, and a value after = or as the next argument; booleans only after =.",
        "--openbao-... is another spelling of each --vault-... flag, and BAO_... of each VAULT_... variable; it wins",
        "where both are given. A SecretProviderClass wins over a flag, a flag over the environment; what names a CA",
        "file or a CA directory drops both of what is weaker.",
        f"Proxies: {PROXY_VARIABLE} (for Vault alone), HTTPS_PROXY, HTTP_PROXY and NO_PROXY.",
        "POD_NAMESPACE and POD_NAME say which pod the daemon itself is: a listing without it is not believed.",
    ]
    return "\n".join(lines) + "\n"


def markdown_table() -> str:
    """The flags as the README shows them."""
    lines = ["| flag | default | environment | meaning |", "|---|---|---|---|"]
    for flag in FLAGS:
        names = f"`--{flag.name}{'=' if flag.placeholder else ''}{flag.placeholder}`"
        default = f"`{flag.default}`" if flag.default else ""
        variable = f"`{flag.variable}`" if flag.variable else ""
        lines.append(f"| {names} | {default} | {variable} | {flag.meaning} |")
    return "\n".join(lines) + "\n"
