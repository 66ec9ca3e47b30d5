"""Object versions: an HMAC over what the class asked for and what came of it. Pure but for what it remembers.

The driver shows a version in its SecretProviderClassPodStatus, so it must tell nothing about the content to
those who lack the key, and must change whenever the file or the wish for it changes
(docs/decisions/object-versions.md).
"""

from __future__ import annotations

import functools
import hashlib
import hmac
from collections.abc import Sequence
from typing import Final, TypeAlias

from provider.spc.model import (
    AllKeys,
    Encoding,
    ObjectSpec,
    Pkcs12,
    SecretRequest,
    Shape,
    SingleValue,
    Whole,
)

# A new layout of the encoding gets a new tag, so that two layouts never agree by accident.
_LAYOUT: Final = "vault-csi-provider object version 1"
_SHAPED_LAYOUT: Final = "vault-csi-provider object version 2"
_KEY_LAYOUT: Final = "vault-csi-provider version key 1"
# Of an optional object that Vault does not have. It is no secret, so it says so in words.
ABSENT: Final = "absent"
# Objects whose definitions are remembered: those of a node's 110 pods with ten objects each, several times over.
MAX_DEFINITIONS: Final = 5000
# Bytes of one that is remembered, ten times a usual one's: a request's body may have a megabyte.
MAX_DEFINITION: Final = 2048

_Fields: TypeAlias = "tuple[str | int | _Fields | None, ...]"


class Versions:
    """The versions of a daemon's objects. What an object asks for is written once: classes are parsed once, and mounted
    again and again.
    """

    def __init__(self) -> None:
        self._definitions: dict[ObjectSpec, bytes] = {}

    def of(self, key: bytes | None, spec: ObjectSpec, files: Sequence[tuple[str, bytes]] | None) -> str:
        """The version of an object with these ``files``, each a path and its contents; None for an absent one's.

        64 hex digits, or "" where there is no key. Equal for an equal definition (path in the volume, requests with
        their bodies, key, mode, encoding, shape) and equal files under one key, in every process that has the key;
        different where any of them differs.
        """
        if files is None:
            return ABSENT
        if key is None:
            return ""
        definition = self._definitions.get(spec)
        if definition is None:
            definition = _definition(spec) if spec.plain else _shaped_definition(spec)
            if len(definition) <= MAX_DEFINITION:
                if len(self._definitions) >= MAX_DEFINITIONS:
                    self._definitions.clear()
                self._definitions[spec] = definition
        return _version(key, definition, files[0][1]) if spec.plain else _shaped_version(key, definition, files)


@functools.lru_cache(maxsize=1024)
def key_of(key: bytes, pod_namespace: str, address: str, vault_namespace: str) -> bytes:
    """The key of versions for pods of this Kubernetes namespace that read from this Vault.

    With one key for all, whoever sees another's version could try guesses of its content: a class that asks another
    Vault, or another namespace of it, for an object of the same definition is given the version of what it wrote there.
    """
    return hmac.digest(key, _written((_KEY_LAYOUT, pod_namespace, address, vault_namespace)), "sha256")


def _version(key: bytes, definition: bytes, contents: bytes) -> str:
    mac = _keyed(key).copy()
    mac.update(definition)
    mac.update(contents)  # last, and the only part without a length: the definition says itself where it ends
    return mac.hexdigest()


def _shaped_version(key: bytes, definition: bytes, files: Sequence[tuple[str, bytes]]) -> str:
    mac = _keyed(key).copy()
    mac.update(definition)
    for path, contents in files:
        mac.update(_written((path, len(contents))))
        mac.update(contents)
    return mac.hexdigest()


@functools.lru_cache(maxsize=1024)
def _keyed(key: bytes) -> hmac.HMAC:
    """What each version begins with, to be copied: a daemon has few keys, and to take one in is a third of the work."""
    return hmac.new(key, digestmod=hashlib.sha256)


def _definition(spec: ObjectSpec) -> bytes:
    """Every field of a plain object."""
    shape = spec.shape
    key, encoding = (shape.key, shape.encoding) if isinstance(shape, SingleValue) else (None, Encoding.UTF8)
    return _written((_LAYOUT, spec.name, _request(spec.request), key, spec.mode, encoding.value))


def _shaped_definition(spec: ObjectSpec) -> bytes:
    sources = tuple([(source.alias, _request(source.request), source.jmes_path) for source in spec.sources])
    return _written((_SHAPED_LAYOUT, spec.name, spec.mode, sources, _shape(spec.shape)))


def _shape(shape: Shape) -> _Fields:
    """A shape's fields in their order, behind its name."""
    match shape:
        case SingleValue(key, encoding, form):
            return "value", key, encoding.value, form.value
        case AllKeys(includes, excludes, encoding, form):
            return "keys", includes, excludes, encoding.value, form.value
        case Whole(form):
            return "whole", form.value
        case Pkcs12(alias, password_key, legacy):
            return "pkcs12", alias, password_key, legacy
    return "template", shape.text


def _request(request: SecretRequest) -> _Fields:
    return request.method, request.path, request.query, None if request.body is None else request.body.reveal()


def _written(fields: _Fields) -> bytes:
    """Fields as Python writes them in ASCII: different fields never alike, and no text is the beginning of another."""
    return ascii(fields).encode()
