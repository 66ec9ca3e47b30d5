"""The rules for paths: of files in the volume, of requests to Vault, of auth mounts."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Final
from urllib.parse import parse_qsl

from provider.settings import MAX_PATH_BYTES, MAX_PATH_ELEMENT_BYTES
from provider.spc.findings import Refused

CONTROL: Final = re.compile(r"[\x00-\x1f\x7f-\x9f]")
# Far more than any request takes, and few enough to be nothing in memory.
_MAX_QUERY_FIELDS: Final = 1000
_DOTS: Final = re.compile(r"(?:^|[/\\])\.\.?(?:$|[/\\;])")
_HEX: Final = frozenset("0123456789abcdefABCDEF")


def object_name(name: str) -> str:
    """``name`` as a path in the volume (docs/contract.md section 1, Paths). Raises Refused."""
    if "\0" in name:
        raise Refused("holds a NUL character", "remove it")
    if name.startswith("/"):
        raise Refused("is absolute", "write a path relative to the volume")
    elements = name.split("/")
    if ".." in elements or elements[0].startswith(".."):
        raise Refused("has an element .. or begins with ..", "write a path inside the volume")
    if "" in elements or "." in elements:
        raise Refused("is not a clean path", "write it without //, /./ and without a slash at its end")
    size = len(name.encode())
    if size > MAX_PATH_BYTES:
        raise Refused(f"is longer than {MAX_PATH_BYTES} bytes", "shorten it")
    if size > MAX_PATH_ELEMENT_BYTES and any(len(element.encode()) > MAX_PATH_ELEMENT_BYTES for element in elements):
        raise Refused(f"has an element longer than {MAX_PATH_ELEMENT_BYTES} bytes", "shorten it")
    return name


def directory_name(name: str) -> str:
    """``name`` as a directory of the volume: a path, or ``.`` for the volume itself. Raises Refused."""
    return name if name == "." else object_name(name)


def clashes(names: Sequence[str]) -> Iterator[tuple[int, int]]:
    """Pairs of indices whose names are the same, or where the first's is the directory of the second's.

    Each name that clashes is in one pair at least. ``names`` are legal object names.
    """
    # With / below every other character, whatever lies under a name follows it directly.
    keys = [name.replace("/", "\0") for name in names]
    order = sorted(range(len(keys)), key=keys.__getitem__)
    above: list[int] = []  # each the directory of the next
    for index in order:
        while above and keys[index] != keys[above[-1]] and not keys[index].startswith(keys[above[-1]] + "\0"):
            above.pop()
        if above:
            yield above[-1], index
        if not above or keys[index] != keys[above[-1]]:
            above.append(index)


def secret_path(text: str) -> tuple[str, tuple[tuple[str, str], ...]]:
    """The path (no slash at either end, no ``v1/``) and the query of a ``secretPath``. Raises Refused.

    A percent sign is literal text in the path. HTTP clients fold ``.`` and ``..`` into another path, some of them
    after decoding, so such elements are refused however they are spelled (docs/contract.md section 2).
    A slash at the end goes, as Go's clients join paths: Vault answers 500 to a read of ``secret/data/app/``, and a list
    needs none.
    """
    if CONTROL.search(text):
        raise Refused("holds a control character", "remove it")
    if text.startswith(("http://", "https://")):
        raise Refused("is a URL", "write the path alone, for example secret/data/app; the server is vaultAddress")
    before, _, query = text.partition("?")
    path = _fold(before).removeprefix("/").removeprefix("v1/").rstrip("/")
    if not path:
        raise Refused("is empty", "name the API path, for example secret/data/app")
    refuse_dots(path)
    if query.count("&") >= _MAX_QUERY_FIELDS:
        raise Refused(f"has more than {_MAX_QUERY_FIELDS} query fields", "remove some")
    return path, tuple(parse_qsl(query, keep_blank_values=True)) if query else ()


def auth_mount(text: str) -> str:
    """The name of an auth mount: no slashes around it, no leading ``auth/``. Raises Refused."""
    if CONTROL.search(text):
        raise Refused("holds a control character", "remove it")
    mount = _fold(text).strip("/").removeprefix("auth/")
    if not mount:
        raise Refused("is empty", "name the auth mount, for example kubernetes")
    refuse_dots(mount)
    return mount


def refuse_dots(path: str) -> None:
    """Raise Refused if an element of ``path`` is ``.`` or ``..``, as it stands or percent-decoded, to whoever reads it.

    Some servers take a backslash for a slash, and what follows a semicolon in an element for no part of its name.
    """
    if "." not in path and "%" not in path:
        return
    if _DOTS.search(path) or _DOTS.search(_decoded(path)):
        raise Refused("has an element . or ..", "write the path that is meant, without dots")


def _fold(path: str) -> str:
    return re.sub(r"/{2,}", "/", path) if "//" in path else path


def _decoded(text: str) -> str:
    """``text`` percent-decoded until nothing is left to decode, in one pass: ``%252e`` and ``%%32e`` are dots too.

    Escapes never overlap, so decoding each as soon as it is complete gives what repeated passes would.
    """
    if "%" not in text:
        return text
    out: list[str] = []
    for character in text:
        out.append(character)
        while len(out) >= 3 and out[-3] == "%" and out[-2] in _HEX and out[-1] in _HEX:
            out[-3:] = [chr(int(out[-2] + out[-1], 16))]
    return "".join(out)
