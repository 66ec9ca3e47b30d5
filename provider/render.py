"""From Vault's response to the bytes of a file (docs/contract.md section 2). Pure.

JSON is written compact and in plain UTF-8. Go's encoder would write ``<``, ``>`` and ``&`` as ``\\u003c`` and
so on; that is for JSON inside HTML, any JSON parser reads both alike, and people read this one.
"""

from __future__ import annotations

import base64
import binascii
import json
import string
from collections.abc import Callable, Mapping
from typing import Any, Final

from provider.errors import BadSecret, SecretNotFound
from provider.spc.model import Encoding, ObjectSpec

# The shape of a whole response, with what Vault means by leaving a field out. Others that a server may add
# (``mount_type``) are left out, so that a file does not change with the server's version.
_WHOLE: Final[Mapping[str, Any]] = {
    "request_id": "",
    "lease_id": "",
    "lease_duration": 0,
    "renewable": False,
    "data": None,
    "warnings": None,
    "auth": None,
    "wrap_info": None,
}

_DROP_WHITESPACE: Final = dict.fromkeys(map(ord, string.whitespace))


def render(spec: ObjectSpec, response: Mapping[str, Any]) -> bytes:
    """The file's contents for ``spec``, from ``response``: Vault's whole answer as ``json.loads`` gives it.

    Without a key: the whole response as JSON, with ``request_id`` blank, since it changes on every read while
    the secret does not; ``encoding`` is about a stored value, so it does not apply. With a key: its value in
    ``data``, or in ``data.data`` where that is a map (KV v2); a string as it is, anything else as JSON;
    decoded as ``encoding`` says.

    Integers keep all their digits; other numbers keep their value as a double, not their spelling (``1e3``
    becomes ``1000.0``).

    Raises SecretNotFound where there is no data or no such key, BadSecret where the value cannot be written
    or decoded. Neither names a value, nor a key that the class does not name.
    """
    data = response.get("data")
    if spec.key is None:
        # A login or a wrapped answer has no data and is complete without.
        if data is None and not response.get("auth") and not response.get("wrap_info"):
            raise _no_data(spec)
        whole = {field: response.get(field, absent) for field, absent in _WHOLE.items()}
        whole["request_id"] = ""
        return _written(spec, whole, _utf8)
    if data is None:
        raise _no_data(spec)
    if not isinstance(data, Mapping):
        raise BadSecret(
            f"{_object(spec)}: the data in the answer to {spec.request} is not a map",
            "check that vaultAddress is that of Vault or OpenBao and that secretPath is a secret's",
        )
    inner = data.get("data")
    keys = inner if isinstance(inner, Mapping) else data
    if spec.key not in keys:
        raise _no_key(spec, spec.key, keys)
    return _written(spec, keys[spec.key], _DECODERS[spec.encoding])


def _written(spec: ObjectSpec, value: object, decode: Callable[[str], bytes | None]) -> bytes:
    text = value if isinstance(value, str) else _json(value)
    if text is None:
        raise BadSecret(
            f"{_object(spec)}: the value from {_source(spec)} cannot be written as JSON",
            "a number is too large or the value is nested too deeply; store it as a string",
        )
    contents = decode(text)
    if contents is None:
        raise BadSecret(
            f"{_object(spec)}: the value from {_source(spec)} is not valid {spec.encoding.value}",
            "store it in that encoding, or change the object's encoding",
        )
    return contents


# The four below answer None instead of raising, so that no error is raised while one that quotes the value
# is being handled: Python would keep that one as the context of ours.


def _json(value: object) -> str | None:
    try:
        return json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    except (ValueError, RecursionError):
        return None


def _utf8(text: str) -> bytes | None:
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError:
        return None


def _from_base64(text: str) -> bytes | None:
    try:
        return base64.b64decode(text.translate(_DROP_WHITESPACE), validate=True)
    except (binascii.Error, ValueError):
        return None


def _from_hex(text: str) -> bytes | None:
    try:
        return bytes.fromhex(text.translate(_DROP_WHITESPACE))
    except ValueError:
        return None


_DECODERS: Final[Mapping[Encoding, Callable[[str], bytes | None]]] = {
    Encoding.UTF8: _utf8,
    Encoding.BASE64: _from_base64,
    Encoding.HEX: _from_hex,
}


def _object(spec: ObjectSpec) -> str:
    return f'object "{spec.name}"'


def _source(spec: ObjectSpec) -> str:
    return f"{spec.request}" if spec.key is None else f'key "{spec.key}" of {spec.request}'


def _no_data(spec: ObjectSpec) -> SecretNotFound:
    return SecretNotFound(
        f"{_object(spec)}: the answer to {spec.request} has no data",
        "check secretPath and method; there is no secret at the path, or writing to it answers nothing",
    )


def _no_key(spec: ObjectSpec, key: str, keys: Mapping[str, Any]) -> SecretNotFound:
    count = f"{len(keys)} key" if len(keys) == 1 else f"{len(keys)} keys"
    folded = key.casefold()
    if any(name.casefold() == folded for name in keys):
        advice = "check secretKey; a key that differs only in upper and lower case is there"
    else:
        advice = "check secretKey, or leave it out to mount the whole response"
    return SecretNotFound(f'{_object(spec)}: {spec.request} has no key "{key}" (it has {count})', advice)
