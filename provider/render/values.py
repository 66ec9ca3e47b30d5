"""From Vault's response to the bytes of a file (docs/contract.md section 2). Pure.

JSON is written compact and in plain UTF-8. Go's encoder would write ``<``, ``>`` and ``&`` as ``\\u003c`` and
so on; that is for JSON inside HTML, any JSON parser reads both alike, and people read this one.
"""

from __future__ import annotations

import base64
import binascii
import string
from collections.abc import Callable, Mapping
from typing import Any, Final

from provider.errors import BadSecret, ProviderError, SecretNotFound
from provider.render import formats
from provider.sandbox.quoting import Unwritable, compact
from provider.spc.model import Encoding, Format, ObjectSpec, SecretRequest, SingleValue

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


def render_plain(spec: ObjectSpec, response: Mapping[str, Any]) -> bytes:
    """The file's contents for a plain ``spec``, from ``response``: Vault's whole answer as ``json.loads`` gives it.

    The whole response is JSON, with ``request_id`` blank, since it changes on every read while the secret does not. A
    single value is that of its key in ``data``, or in ``data.data`` where that is a map (KV v2); a string as it is,
    anything else as JSON; decoded as ``encoding`` says.

    Integers keep all their digits; other numbers keep their value as a double, not their spelling (``1e3``
    becomes ``1000.0``).

    Raises SecretNotFound where there is no data or no such key, BadSecret where the value cannot be written
    or decoded. Neither names a value, nor a key that the class does not name.
    """
    shape = spec.shape
    if isinstance(shape, SingleValue) and shape.key is not None:
        value = value_of(spec, spec.request, response, shape.key)
        if isinstance(value, str) and (contents := _DECODERS[shape.encoding](value)) is not None:
            return contents
        return written(spec, value, shape.encoding, shape.format, f'key "{shape.key}" of {spec.request}')
    data = response.get("data")
    # A login or a wrapped answer has no data and is complete without.
    if data is None and not response.get("auth") and not response.get("wrap_info"):
        raise _no_data(spec, spec.request)
    whole = {field: response.get(field, absent) for field, absent in _WHOLE.items()}
    whole["request_id"] = ""
    return written(spec, whole, Encoding.UTF8, Format.JSON, str(spec.request))


def data_of(spec: ObjectSpec, request: SecretRequest, response: Mapping[str, Any]) -> Mapping[str, Any]:
    """The keys of a secret: the response's data, or the map in it that is called ``data`` (KV v2).

    Raises SecretNotFound where there is none, BadSecret where it is no map.
    """
    data = response.get("data")
    if data is None:
        raise _no_data(spec, request)
    # What JSON calls an object is a dict, and to ask whether it is a Mapping takes ten times as long.
    if not isinstance(data, dict):
        raise BadSecret(
            f"{object_name(spec)}: the data in the answer to {request} is not a map",
            "check that vaultAddress is that of Vault or OpenBao and that secretPath is a secret's",
        )
    inner = data.get("data")
    return inner if isinstance(inner, dict) else data


def value_of(spec: ObjectSpec, request: SecretRequest, response: Mapping[str, Any], key: str) -> Any:
    """The value of one key; raises as ``data_of``, and SecretNotFound where there is no such key."""
    keys = data_of(spec, request, response)
    if key not in keys:
        raise _no_key(spec, request, key, keys)
    return keys[key]


def written(spec: ObjectSpec, value: object, encoding: Encoding, form: Format, source: str) -> bytes:
    """A string decoded, anything else in a format that holds it; ``source`` says in errors where it came from.

    Raises BadSecret.
    """
    if isinstance(value, str):
        contents = _DECODERS[encoding](value)
    else:
        text = _json(value) if form is Format.JSON else formatted(spec, value, form, source)
        if text is None:
            raise BadSecret(
                f"{object_name(spec)}: the value from {source} cannot be written as JSON",
                "a number is too large or the value is nested too deeply; store it as a string",
            )
        # A text of many keys is in no encoding; a number or a boolean may be.
        contents = _DECODERS[encoding if form is Format.JSON else Encoding.UTF8](text)
    if contents is None:
        raise BadSecret(
            f"{object_name(spec)}: the value from {source} is not valid {encoding.value}",
            "store it in that encoding, or change the object's encoding",
        )
    return contents


def formatted(spec: ObjectSpec, data: object, form: Format, source: str) -> str:
    """``data`` as text of a format. Raises BadSecret where the format cannot hold it, naming the key."""
    told = ""
    try:
        return formats.write(form, data)
    except Unwritable as error:
        told = formats.describe(error, form)
    raise BadSecret(f"{object_name(spec)}: {told} (from {source})", "choose another format, or leave the key out")


def missing(spec: ObjectSpec, what: str, advice: str) -> ProviderError:
    """What an object asks for is not there, though its secret is."""
    return SecretNotFound(f"{object_name(spec)}: {what}", advice)


# The four below answer None instead of raising, so that no error is raised while one that quotes the value
# is being handled: Python would keep that one as the context of ours.


def _json(value: object) -> str | None:
    try:
        return compact(value)
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


def object_name(spec: ObjectSpec) -> str:
    """How an error names the object."""
    return f'object "{spec.name}"'


def key_count(keys: Mapping[str, Any]) -> str:
    """How an error tells the keys that are there: their number alone, since the class does not name them."""
    return f"{len(keys)} key" if len(keys) == 1 else f"{len(keys)} keys"


def _no_data(spec: ObjectSpec, request: SecretRequest) -> SecretNotFound:
    return SecretNotFound(
        f"{object_name(spec)}: the answer to {request} has no data",
        "check secretPath and method; there is no secret at the path, or writing to it answers nothing",
    )


def _no_key(spec: ObjectSpec, request: SecretRequest, key: str, keys: Mapping[str, Any]) -> SecretNotFound:
    folded = key.casefold()
    if any(name.casefold() == folded for name in keys):
        advice = "check secretKey; a key that differs only in upper and lower case is there"
    else:
        advice = "check secretKey, or leave it out to mount the whole response"
    return SecretNotFound(f'{object_name(spec)}: {request} has no key "{key}" (it has {key_count(keys)})', advice)
