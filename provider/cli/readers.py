"""What reads the text of a flag: a value, or ValueError with a sentence of what is allowed."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Final, TypeVar

from provider.notation import BOOLEANS, read_duration
from provider.spc import parameters, paths
from provider.spc.addresses import AddressPattern
from provider.spc.findings import Refused
from provider.telemetry import LEVELS

_T = TypeVar("_T")

# Far above what a node can do in a minute, so a larger number is a slip of the keyboard.
MOST_POD_SHARE: Final = 10_000_000

# A Secret's name, as the Kubernetes API checks it.
_SECRET_NAME: Final = re.compile(r"[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?")


def read_text(text: str) -> str:
    """Any text without control characters."""
    if any(ord(character) < 0x20 or ord(character) == 0x7F for character in text):
        raise ValueError("text without control characters")
    return text


def read_bool(text: str) -> bool:
    """A boolean as Go's strconv.ParseBool reads it."""
    if text not in BOOLEANS:
        raise ValueError(", ".join(BOOLEANS))
    return BOOLEANS[text]


def read_address(text: str) -> str:
    """A Vault's address, as a class may name it."""
    allowed = "a URL like https://vault.example:8200, http://127.0.0.1:8200 or unix:///run/vault.sock"
    return _as_in_a_class(parameters.address, text, allowed)


def read_auth_mount(text: str) -> str:
    """The name of an auth mount, as a class may name it."""
    return _as_in_a_class(paths.auth_mount, text, "the path of an auth mount, like kubernetes")


def _as_in_a_class(read: Callable[[str], str], text: str, allowed: str) -> str:
    try:
        return read(text)
    except Refused as refused:
        raise ValueError(f"{allowed}; this {refused.problem}") from None


def read_listen_address(text: str) -> str:
    """``host:port``, ``:port`` for all interfaces, or nothing."""
    split_listen_address(text)
    return text


def split_listen_address(text: str) -> tuple[str, int] | None:
    """Host ("" for all interfaces) and port of a listen address; None for the empty one, which means off."""
    if not text:
        return None
    found = re.fullmatch(r"(?:\[([0-9A-Fa-f:.%]+)\]|([^:\[\]\s/]*)):([0-9]{1,5})", text)
    if found is None or not 1 <= int(found[3]) <= 65535:
        raise ValueError('host:port, :port for all interfaces, or "" for none')
    return found[1] or found[2] or "", int(found[3])


def read_metrics_address(text: str) -> str:
    """A listen address, or "off"."""
    try:
        return text if text == "off" else read_listen_address(text)
    except ValueError:
        raise ValueError('host:port, :port for all interfaces, off, or "" for the health address') from None


def read_audit_log(text: str) -> str:
    """``off``, ``stderr``, or a file's path from /."""
    if text not in ("off", "stderr") and not (text.startswith("/") and read_text(text) and not text.endswith("/")):
        raise ValueError("off, stderr, or a file's path from /")
    return text


def read_endpoint(text: str) -> str:
    """The path of a Unix socket, without unix://."""
    path = text.removeprefix("unix://")
    if not path or path.endswith("/") or "://" in path or read_text(path) != path:
        raise ValueError("the path of a Unix socket, with or without unix://")
    return path


def word(meanings: Mapping[str, _T]) -> Callable[[str], _T]:
    """Reads one of these words, as what it means."""

    def read(text: str) -> _T:
        if text not in meanings:
            raise ValueError(", ".join(filter(None, meanings)))
        return meanings[text]

    return read


def number(least: int, most: int, of_least: str = "") -> Callable[[str], int]:
    """Reads a whole number within these bounds; ``of_least`` says what the least stands for."""

    def read(text: str) -> int:
        if not re.fullmatch(r"[0-9]{1,8}", text) or not least <= int(text) <= most:
            raise ValueError(f"a whole number from {least}{of_least} to {most}")
        return int(text)

    return read


def duration(least: float, most: float, allowed: str) -> Callable[[str], float]:
    """Reads a duration within these bounds, in seconds."""

    def read(text: str) -> float:
        try:
            seconds = read_duration(text)
        except ValueError:
            raise ValueError(allowed) from None
        if not least <= seconds <= most:
            raise ValueError(allowed)
        return seconds

    return read


read_format = word({"json": "json", "text": "text"})
read_pod_share = number(0, MOST_POD_SHARE, " (no limit)")


def read_level(text: str) -> str:
    """A level of the log, in whatever case."""
    level = text.strip().lower()
    if level not in LEVELS:
        raise ValueError(", ".join(LEVELS))
    return level


def read_secret_name(text: str) -> str:
    """A Secret's name."""
    if not _SECRET_NAME.fullmatch(text):
        raise ValueError("a Secret's name: lower-case letters, digits, - and .")
    return text


def read_switch(text: str) -> bool:
    """``on`` or ``off``, or a boolean."""
    if text in ("on", "off"):
        return text == "on"
    try:
        return read_bool(text)
    except ValueError:
        raise ValueError("on, off") from None


def read_vault_addresses(text: str) -> tuple[str, ...]:
    """Patterns of addresses with commas between."""
    patterns = tuple(part.strip(" ") for part in text.split(",")) if text else ()
    for pattern in patterns:
        AddressPattern.read(pattern)
    return patterns


def read_root(text: str) -> str:
    """A directory, from /; "" is none."""
    if text and (not text.startswith("/") or ".." in text.split("/") or read_text(text) != text):
        raise ValueError("a directory's path from /, without ..")
    return text


def read_percent(text: str) -> float:
    """A number from 1 to 99."""
    if not re.fullmatch(r"[0-9]{1,2}(\.[0-9]{1,6})?", text) or not 1 <= float(text) <= 99:
        raise ValueError("a number from 1 to 99")
    return float(text)
