"""Data as text of one kind: keys sorted, each value quoted so that the format's own parser gives it back. Pure.

Strings are themselves. Where a format knows only strings (dotenv, properties), any other value is compact JSON. What a
format cannot hold is an error that names the key, never the value.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final

from provider.redact import one_line
from provider.sandbox.quoting import (
    Unwritable,
    compact,
    property_key,
    property_value,
    quoted,
    shell_word,
    text_of,
    yaml_scalar,
)
from provider.spc.model import Format

_SHELL_NAME: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
# Variables that a shell (dash, bash) refuses, or that read otherwise than they were written.
_SHELL_OWN: Final = frozenset(
    {"_", "OPTIND", "PPID", "LINENO", "UID", "EUID", "GROUPS", "RANDOM", "SRANDOM", "SECONDS", "EPOCHSECONDS"}
    | {"EPOCHREALTIME", "HISTCMD", "DIRSTACK", "FUNCNAME", "SHELLOPTS", "BASHOPTS", "BASHPID", "BASH_ARGC"}
    | {
        "BASH_COMPAT",
        "BASH_XTRACEFD",
        "PIPESTATUS",
        "BASH_ARGV",
        "BASH_COMMAND",
        "BASH_LINENO",
        "BASH_SOURCE",
        "BASH_SUBSHELL",
        "BASH_VERSINFO",
    }
)
_BARE_TOML_KEY: Final = re.compile(r"[A-Za-z0-9_-]+")
# YAML's longest key on one line is of 1024 characters; longer ones take a question mark.
_LONG_KEY: Final = 1000


def write(form: Format, data: object) -> str:
    """``data`` in a format, with a newline at its end unless it is JSON or empty; always Unicode. Raises Unwritable."""
    text, problem = _attempt(form, data)
    if not problem:
        return text
    key = ""
    if isinstance(data, Mapping):
        # One by one: each is a map that the format can hold or not.
        key = next((key for key in sorted(data) if _attempt(form, {key: data[key]})[1]), "")
    raise Unwritable(problem, key)


def _attempt(form: Format, data: object) -> tuple[str, str]:
    """``data`` in a format, or what is wrong with it. Raises Unwritable where that is known with its key."""
    try:
        text = _WRITERS[form](data)
        text.encode()
    except RecursionError:
        return "", "is nested too deeply"
    except UnicodeEncodeError:
        return "", "holds a character that is no Unicode text"
    except ValueError:  # of JSON's
        return "", "holds a number that is not finite"
    return text, ""


def describe(unwritable: Unwritable, form: Format) -> str:
    """What is wrong, for a person: the key if there is one, and the format."""
    subject = f'key "{one_line(unwritable.key, 80)}"' if unwritable.key else "the data"
    return f"{subject} cannot be written as {form.value}: it {unwritable.problem}"


def _json(data: object) -> str:
    return json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False, sort_keys=True)


def _items(data: object) -> Iterator[tuple[str, Any]]:
    if not isinstance(data, Mapping):
        raise Unwritable("is not a map of keys")
    yield from sorted(data.items())


# -- strings alone -------------------------------------------------------------------------------------------------


def _dotenv(data: object) -> str:
    return "".join(f"{_shell_name(key)}={shell_word(text_of(value), key)}\n" for key, value in _items(data))


def _shell_name(key: str) -> str:
    if not _SHELL_NAME.fullmatch(key):
        raise Unwritable("is no variable's name for a shell: letters, digits and _, no digit first", key)
    if key in _SHELL_OWN:
        raise Unwritable("is a variable that shells keep for themselves", key)
    return key


def _properties(data: object) -> str:
    return "".join(f"{property_key(key)}={property_value(text_of(value))}\n" for key, value in _items(data))


# -- TOML ----------------------------------------------------------------------------------------------------------


def _toml(data: object) -> str:
    return "".join(f"{_toml_key(key)} = {_toml_value(value, key)}\n" for key, value in _items(data))


def _toml_key(key: str) -> str:
    return key if _BARE_TOML_KEY.fullmatch(key) else quoted(key)


def _toml_value(value: object, key: str) -> str:
    if isinstance(value, str):
        return quoted(value)
    if isinstance(value, Mapping):
        # Maps inside of maps are inline tables, so that keys stay sorted however they nest.
        return "{" + ", ".join(f"{_toml_key(name)} = {_toml_value(inner, name)}" for name, inner in _items(value)) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(_toml_value(inner, key) for inner in value) + "]"
    if value is None:
        raise Unwritable("is null, which TOML has not", key)
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise Unwritable("is an integer of more than 64 bits, which TOML has not", key)
    return compact(value)


# -- YAML ----------------------------------------------------------------------------------------------------------


def _yaml(data: object) -> str:
    if isinstance(data, Mapping | list) and data:
        return "\n".join(_yaml_lines(data)) + "\n"
    return yaml_scalar(data) + "\n"


def _yaml_lines(data: Mapping[str, Any] | list[Any]) -> Iterator[str]:
    if isinstance(data, list):
        for inner in data:
            yield from _yaml_entry("-", inner)
    else:
        for key, inner in _items(data):
            name = quoted(key)
            if len(name) > _LONG_KEY:
                yield f"? {name}"
                name = ""
            yield from _yaml_entry(f"{name}:", inner)


def _yaml_entry(head: str, inner: object) -> Iterator[str]:
    if isinstance(inner, Mapping | list) and inner:
        yield head
        for line in _yaml_lines(inner):
            yield f"  {line}"
    else:
        yield f"{head} {yaml_scalar(inner)}"


_WRITERS: Final[Mapping[Format, Callable[[object], str]]] = {
    Format.JSON: _json,
    Format.YAML: _yaml,
    Format.DOTENV: _dotenv,
    Format.PROPERTIES: _properties,
    Format.TOML: _toml,
}
