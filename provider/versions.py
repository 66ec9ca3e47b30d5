"""Object versions: an HMAC over what the class asked for and what came of it. Pure.

The driver shows a version in its SecretProviderClassPodStatus, so it must tell nothing about the content to
those who lack the key, and must change whenever the file or the wish for it changes
(docs/decisions/object-versions.md).
"""

from __future__ import annotations

import hashlib
import hmac
from typing import Final

from provider.spc.model import ObjectSpec

# A new layout of the encoding gets a new tag, so that two layouts never agree by accident.
_LAYOUT: Final = b"vault-csi-provider object version 1"


def object_version(key: bytes | None, spec: ObjectSpec, contents: bytes) -> str:
    """The version of one object: 64 hex digits, or "" when there is no key.

    Equal for an equal definition (path in the volume, request with its body, key, mode, encoding) and equal
    ``contents`` under one key, in every process that has the key; different when any of them differs.
    """
    if key is None:
        return ""
    mac = hmac.new(key, _definition(spec), hashlib.sha256)
    mac.update(contents)  # last, and the only part without a length: the definition says itself where it ends
    return mac.hexdigest()


def _definition(spec: ObjectSpec) -> bytes:
    """Every field of the object, each behind its length: no two definitions are written alike."""
    request = spec.request
    query = b"".join(_text(name) + _text(value) for name, value in request.query)
    return b"".join(
        (
            _sized(_LAYOUT),
            _text(spec.name),
            _text(request.method),
            _text(request.path),
            _sized(query),
            _optional(None if request.body is None else request.body.reveal()),
            _optional(spec.key),
            _text(str(spec.mode)),
            _text(spec.encoding.value),
        )
    )


def _sized(part: bytes) -> bytes:
    return len(part).to_bytes(8, "big") + part


def _text(part: str) -> bytes:
    # JSON may carry a lone surrogate into a request body; it is written too instead of failing the mount.
    return _sized(part.encode("utf-8", "surrogatepass"))


def _optional(part: str | None) -> bytes:
    """Absent differs from empty."""
    return b"\x00" if part is None else b"\x01" + _text(part)
