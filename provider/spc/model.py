"""The typed form of one mount: frozen, legal, and free of dicts. Nothing past ``spc`` sees the raw strings."""

from __future__ import annotations

import enum
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final, NamedTuple, TypeAlias

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


class VaultServer(NamedTuple):
    """*Where*: a Vault to talk to, in one of its namespaces. A tuple, as what is looked up at each read.

    ``address`` is an ``http://``, ``https://`` or ``unix://`` URL without a trailing slash.
    """

    address: str
    namespace: str
    tls: TlsSettings


class Login(NamedTuple):
    """How a pod logs in: ``POST auth/<mount>/login`` with this role and a token for this audience.

    ``audience`` None means that the class names none (docs/contract.md section 2).
    """

    mount: str
    role: str
    audience: str | None


class Encoding(enum.Enum):
    """How the stored value is to be decoded (docs/contract.md section 2)."""

    __hash__ = object.__hash__  # Enum's own is a function in Python

    UTF8 = "utf-8"
    BASE64 = "base64"
    HEX = "hex"


class SecretRequest(NamedTuple):
    """One request to Vault. Equal requests within a mount are one read.

    ``path`` has no ``v1/`` and no leading slash, and is not percent-encoded. ``body`` is canonical JSON (sorted
    keys, compact), or None; it may hold a secret.

    A tuple: it is looked up a dozen times a read, and a tuple's hash and comparison are C.
    """

    method: str
    path: str
    query: tuple[tuple[str, str], ...] = ()
    body: Sensitive[str] | None = None

    @property
    def shown(self) -> str:
        """The path as messages show it: of its query the version alone, since the rest may be a secret."""
        versions = [value for name, value in self.query if name == "version" and value.isdecimal()]
        return f"{self.path}?version={versions[0][:20]}" if versions else self.path

    @property
    def size(self) -> int:
        """Bytes that its texts take in memory."""
        query = sum([sys.getsizeof(name) + sys.getsizeof(value) for name, value in self.query])
        body = sys.getsizeof(self.body.reveal()) if self.body is not None else 0
        return sys.getsizeof(self.path) + query + body

    def __str__(self) -> str:
        return f"{self.method} {self.shown}"


# The alias of an object's own secretPath.
OWN_ALIAS: Final = "secret"


@dataclass(frozen=True, slots=True)
class Source:
    """What an object is made of: the answer to ``request``, under the name ``alias``.

    Its value is the data of the answer, or what the JMESPath expression ``jmes_path`` finds in it.
    """

    alias: str
    request: SecretRequest
    jmes_path: str | None = None


class Format(enum.Enum):
    """How data that is no string is written: as text of one of these kinds.

    ENVELOPE is the whole response as JSON (docs/contract.md section 2), PEM a certificate with its key and chain.
    """

    __hash__ = object.__hash__  # Enum's own is a function in Python

    ENVELOPE = "envelope"
    JSON = "json"
    YAML = "yaml"
    DOTENV = "dotenv"
    PROPERTIES = "properties"
    TOML = "toml"
    PEM = "pem"


@dataclass(frozen=True, slots=True)
class SingleValue:
    """One value: that of ``key``, or what the source's expression finds in that, or in the data where there is no key.

    A string is decoded as ``encoding`` says; anything else is written in ``format``.
    """

    key: str | None
    encoding: Encoding = Encoding.UTF8
    format: Format = Format.JSON


@dataclass(frozen=True, slots=True)
class AllKeys:
    """A file for each key that none of ``excludes`` and, where there are any, one of ``includes`` is found in.

    Both are expressions of RE2. Each value is written as a SingleValue is.
    """

    includes: tuple[str, ...] = ()
    excludes: tuple[str, ...] = ()
    encoding: Encoding = Encoding.UTF8
    format: Format = Format.JSON


@dataclass(frozen=True, slots=True)
class Whole:
    """All of the data in one text; with ENVELOPE the whole response."""

    format: Format = Format.ENVELOPE


@dataclass(frozen=True, slots=True)
class Pkcs12:
    """A keystore of a certificate, its key and its chain, under ``alias``.

    The password is the value of ``password_key`` in the second source, or empty where that is None. ``legacy`` asks for
    the encryption that Java before 8u301 reads.
    """

    alias: str
    password_key: str | None = None
    legacy: bool = False


@dataclass(frozen=True, slots=True)
class Template:
    """A text in Jinja2's language over the sources' values."""

    text: str = field(repr=False)


Shape: TypeAlias = SingleValue | AllKeys | Whole | Pkcs12 | Template


@dataclass(frozen=True, slots=True)
class ObjectSpec:
    """One file of the volume, or with AllKeys a directory of files; ``mode`` is 0 to 0o777.

    ``sources`` are the reads that it is made of, one where its shape says nothing else. ``fresh`` asks for responses
    that are issued on every mount; ``renew_percent`` is the part of its life after which what cannot be renewed is
    replaced; ``refresh_after``, in seconds, is how old an answer from memory may be. An ``optional`` object is left out
    where Vault has no such secret or key.

    ``plain`` is whether its contents are one value or the whole response as they came, without a program or a format:
    such objects are rendered at once, and their versions are of the first layout.
    """

    name: str
    sources: tuple[Source, ...]
    shape: Shape
    mode: int
    fresh: bool = False
    renew_percent: float = 67.0
    refresh_after: float = 0.0
    optional: bool = False
    plain: bool = field(init=False, repr=False, compare=False)
    _hash: int = field(init=False, repr=False, compare=False)

    def __hash__(self) -> int:
        return self._hash

    def __post_init__(self) -> None:
        # Looked up at each mount.
        object.__setattr__(self, "_hash", hash((self.name, self.sources, self.shape, self.mode)))
        shape = self.shape
        object.__setattr__(
            self,
            "plain",
            (isinstance(shape, SingleValue) and shape.format is Format.JSON and self.sources[0].jmes_path is None)
            or (isinstance(shape, Whole) and shape.format is Format.ENVELOPE),
        )

    @property
    def request(self) -> SecretRequest:
        """The request of the first source, its own."""
        return self.sources[0].request


@dataclass(frozen=True, slots=True)
class MountSpec:
    """Everything that one Mount asks for. ``tokens`` are the pod's JWTs that the driver handed over, by audience.

    ``warnings`` are sentences for the log: unknown fields and the like. ``large`` says that the objects' texts take too
    much memory to be kept in more places than with the class.
    """

    pod: Pod
    class_name: str
    target_path: str
    server: VaultServer
    login: Login
    objects: tuple[ObjectSpec, ...]
    tokens: Mapping[str, Sensitive[str]] = field(default_factory=dict, repr=False)
    warnings: tuple[str, ...] = ()
    large: bool = False
