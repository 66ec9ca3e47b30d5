"""Object versions: an HMAC over what the class asked for and what came of it. Pure but for what it remembers.

The driver shows a version in its SecretProviderClassPodStatus, so it must tell nothing about the content to
those who lack the key, and must change whenever the file or the wish for it changes
(docs/decisions/object-versions.md).
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable, Sequence
from typing import Final

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
_LAYOUT: Final = b"vault-csi-provider object version 1"
_SHAPED_LAYOUT: Final = b"vault-csi-provider object version 2"
# Of an optional object that Vault does not have. It is no secret, so it says so in words.
ABSENT: Final = "absent"
# Objects whose definitions are remembered: those of a node's 110 pods with ten objects each, several times over.
MAX_DEFINITIONS: Final = 5000


class Versions:
    """The versions of a daemon's objects. What an object asks for is written once: classes are parsed once, and mounted
    again and again.
    """

    def __init__(self) -> None:
        self._definitions: dict[ObjectSpec, bytes] = {}

    def of(self, key: bytes | None, spec: ObjectSpec, files: Sequence[tuple[str, bytes]] | None) -> str:
        """The version of an object with these files, each a path and its contents; None for an absent one's."""
        if files is None:
            return ABSENT
        if key is None:
            return ""
        definition = self._definitions.get(spec)
        if definition is None:
            if len(self._definitions) >= MAX_DEFINITIONS:
                self._definitions.clear()
            definition = _definition(spec) if spec.plain else _shaped_definition(spec)
            self._definitions[spec] = definition
        return _version(key, definition, files[0][1]) if spec.plain else _shaped_version(key, definition, files)


def object_version(key: bytes | None, spec: ObjectSpec, contents: bytes) -> str:
    """The version of one plain object: 64 hex digits, or "" when there is no key.

    Equal for an equal definition (path in the volume, request with its body, key, mode, encoding) and equal
    ``contents`` under one key, in every process that has the key; different when any of them differs.
    """
    return "" if key is None else _version(key, _definition(spec), contents)


def shaped_version(key: bytes | None, spec: ObjectSpec, files: Iterable[tuple[str, bytes]]) -> str:
    """The same of an object that is not plain, over its definition and its ``files``, each a path and its contents."""
    return "" if key is None else _shaped_version(key, _shaped_definition(spec), files)


def _version(key: bytes, definition: bytes, contents: bytes) -> str:
    mac = hmac.new(key, definition, hashlib.sha256)
    mac.update(contents)  # last, and the only part without a length: the definition says itself where it ends
    return mac.hexdigest()


def _shaped_version(key: bytes, definition: bytes, files: Iterable[tuple[str, bytes]]) -> str:
    mac = hmac.new(key, definition, hashlib.sha256)
    for path, contents in files:
        mac.update(_text(path) + _sized(contents))
    return mac.hexdigest()


def _definition(spec: ObjectSpec) -> bytes:
    """Every field of a plain object, each behind its length: no two definitions are written alike."""
    shape = spec.shape
    key, encoding = (shape.key, shape.encoding) if isinstance(shape, SingleValue) else (None, Encoding.UTF8)
    return b"".join(
        (
            _sized(_LAYOUT),
            _text(spec.name),
            _request(spec.request),
            _optional(key),
            _text(str(spec.mode)),
            _text(encoding.value),
        )
    )


def _shaped_definition(spec: ObjectSpec) -> bytes:
    sources = b"".join(
        _text(source.alias) + _sized(_request(source.request)) + _optional(source.jmes_path) for source in spec.sources
    )
    return b"".join(
        (_sized(_SHAPED_LAYOUT), _text(spec.name), _text(str(spec.mode)), _sized(sources), _sized(_shape(spec.shape)))
    )


def _shape(shape: Shape) -> bytes:
    """A shape's fields in their order, behind its name."""
    match shape:
        case SingleValue(key, encoding, form):
            return _text("value") + _optional(key) + _text(encoding.value) + _text(form.value)
        case AllKeys(includes, excludes, encoding, form):
            lists = _sized(b"".join(map(_text, includes))) + _sized(b"".join(map(_text, excludes)))
            return _text("keys") + lists + _text(encoding.value) + _text(form.value)
        case Whole(form):
            return _text("whole") + _text(form.value)
        case Pkcs12(alias, password_key, legacy):
            return _text("pkcs12") + _text(alias) + _optional(password_key) + _text(str(legacy))
    return _text("template") + _text(shape.text)


def _request(request: SecretRequest) -> bytes:
    query = b"".join([_text(name) + _text(value) for name, value in request.query])
    body = None if request.body is None else request.body.reveal()
    return _text(request.method) + _text(request.path) + _sized(query) + _optional(body)


def _sized(part: bytes) -> bytes:
    return len(part).to_bytes(8, "big") + part


def _text(part: str) -> bytes:
    # JSON may carry a lone surrogate into a request body; it is written too instead of failing the mount.
    return _sized(part.encode("utf-8", "surrogatepass"))


def _optional(part: str | None) -> bytes:
    """Absent differs from empty."""
    return b"\x00" if part is None else b"\x01" + _text(part)
