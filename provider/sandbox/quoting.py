"""Text as one word of a language: what the formats and the filters of templates are made of. Pure, and stdlib alone."""

from __future__ import annotations

import json
import re
from typing import Final

# What YAML (1.1 and 1.2) and TOML do not take as it is, besides what JSON escapes.
_UNPRINTABLE: Final = re.compile("[\x7f-\x9f\u2028\u2029\ufeff\ufffe\uffff]")
_PROPERTY: Final = re.compile(r"[\\:=#!]|[^\x20-\x7e]")
_PROPERTY_NAMES: Final = {"\t": "\\t", "\n": "\\n", "\r": "\\r", "\f": "\\f"}
_PEM_MARK: Final = re.compile(r"-----(BEGIN|END) ([A-Z0-9 ]{1,64})-----")


class Unwritable(Exception):
    """The language cannot hold it: what the problem is, and the key that it is at ("" for none). Never the value."""

    def __init__(self, problem: str, key: str = "") -> None:
        super().__init__(problem, key)
        self.problem = problem
        self.key = key


def compact(value: object) -> str:
    """``value`` as JSON without spaces. Raises ValueError (a number that is not finite) or RecursionError."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)


def text_of(value: object) -> str:
    """A string as it is, anything else as JSON; raises as ``compact``."""
    return value if isinstance(value, str) else compact(value)


def quoted(text: str) -> str:
    """A string in double quotes, as JSON, YAML and TOML alike read it."""
    return _UNPRINTABLE.sub(lambda found: f"\\u{ord(found[0]):04x}", json.dumps(text, ensure_ascii=False))


def yaml_scalar(value: object) -> str:
    """A value in one line of YAML; raises as ``compact``.

    A string is in double quotes always: which words are booleans, numbers or dates differs from reader to reader.
    """
    if isinstance(value, str):
        return quoted(value)
    # YAML 1.1 takes 1e+16 for a string.
    return re.sub("^(-?[0-9]+)e", r"\1.0e", compact(value)) if isinstance(value, float) else _yaml_flow(value)


def _yaml_flow(value: object) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{quoted(key)}: {yaml_scalar(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(yaml_scalar, value)) + "]"
    return compact(value)


def shell_word(text: str, key: str = "") -> str:
    """``text`` as one word of sh. Raises Unwritable for a NUL."""
    if "\0" in text:
        raise Unwritable("holds a NUL character, which a shell has not", key)
    return "'" + text.replace("'", "'\\''") + "'"


def property_value(text: str) -> str:
    """``text`` as the value of a Java property, in ASCII, so that every reader takes it alike."""
    kept = text.lstrip(" ")
    return "\\ " * (len(text) - len(kept)) + _PROPERTY.sub(lambda found: _property_escape(found[0]), kept)


def property_key(text: str) -> str:
    """``text`` as the key of a Java property."""
    return _PROPERTY.sub(lambda found: _property_escape(found[0]), text).replace(" ", "\\ ")


def _property_escape(character: str) -> str:
    if character in "\\:=#!":
        return "\\" + character
    named = _PROPERTY_NAMES.get(character)
    if named:
        return named
    units = character.encode("utf-16-be", "surrogatepass")
    return "".join(f"\\u{units[at]:02x}{units[at + 1]:02x}" for at in range(0, len(units), 2))


def pem_blocks(text: str) -> list[tuple[str, str]]:
    """The PEM blocks of a text in their order: label (``CERTIFICATE``) and block, without a newline at its end.

    One pass: a text that anyone may write must not cost its length again for each block that it begins.
    """
    blocks: list[tuple[str, str]] = []
    label, start = "", 0
    for mark in _PEM_MARK.finditer(text):
        if mark[1] == "BEGIN":
            label, start = mark[2], mark.start()
        elif label and mark[2] == label:
            blocks.append((label, text[start : mark.end()]))
            label = ""
    return blocks
