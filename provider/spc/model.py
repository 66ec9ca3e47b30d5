"""The typed form of one mount: frozen, legal, and free of dicts. Nothing past ``spc`` sees the raw strings."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field

from provider.redact import Sensitive
from provider.settings import TlsSettings


@dataclass(frozen=True, slots=True)
class Pod:
    """The pod whose volume is mounted, as the driver names it (docs/contract.md section 1)."""

    namespace: str
    name: str
    uid: str
    service_account: str

    def __str__(self) -> str:
        return f"{self.namespace}/{self.name}"


@dataclass(frozen=True, slots=True)
class VaultServer:
    """*Where*: a Vault to talk to. Equal values share one pool of connections.

    ``address`` is an ``http://``, ``https://`` or ``unix://`` URL without a trailing slash.
    """

    address: str
    namespace: str
    tls: TlsSettings
    _hash: int = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        # Looked up at each read.
        object.__setattr__(self, "_hash", hash((self.address, self.namespace, self.tls)))

    def __hash__(self) -> int:
        return self._hash


@dataclass(frozen=True, slots=True)
class Login:
    """How a pod logs in: ``POST auth/<mount>/login`` with this role and a token for this audience.

    ``audience`` None means that the class names none (docs/contract.md section 2).
    """

    mount: str
    role: str
    audience: str | None


class Encoding(enum.Enum):
    """How the stored value is to be decoded (docs/contract.md section 2)."""

    UTF8 = "utf-8"
    BASE64 = "base64"
    HEX = "hex"


@dataclass(frozen=True, slots=True)
class SecretRequest:
    """One request to Vault. Equal requests within a mount are one read.

    ``path`` has no ``v1/`` and no leading slash, and is not percent-encoded. ``body`` is canonical JSON (sorted
    keys, compact), or None; it may hold a secret, so it is not shown.
    """

    method: str
    path: str
    query: tuple[tuple[str, str], ...] = ()
    body: Sensitive[str] | None = field(default=None, repr=False)
    _hash: int = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        # Parsed once a class and looked up a dozen times a mount.
        object.__setattr__(self, "_hash", hash((self.method, self.path, self.query, self.body)))

    def __hash__(self) -> int:
        return self._hash

    def __str__(self) -> str:
        return f"{self.method} {self.path}"


@dataclass(frozen=True, slots=True)
class ObjectSpec:
    """One file of the volume. ``key`` None asks for the whole response; ``mode`` is 0 to 0o777.

    ``fresh`` asks for a response that is issued on every mount; ``renew_percent`` is the part of its life after which
    what cannot be renewed is replaced; ``refresh_after``, in seconds, is how old an answer from memory may be.
    """

    name: str
    request: SecretRequest
    key: str | None
    mode: int
    encoding: Encoding
    fresh: bool = False
    renew_percent: float = 67.0
    refresh_after: float = 0.0


@dataclass(frozen=True, slots=True)
class MountSpec:
    """Everything that one Mount asks for. ``tokens`` are the pod's JWTs that the driver handed over, by audience.

    ``warnings`` are sentences for the log: unknown fields and the like.
    """

    pod: Pod
    class_name: str
    target_path: str
    server: VaultServer
    login: Login
    objects: tuple[ObjectSpec, ...]
    tokens: Mapping[str, Sensitive[str]] = field(default_factory=dict, repr=False)
    warnings: tuple[str, ...] = ()
