"""The locks of this directory, read strictly: a line that is no pin with hashes is a fault and never skipped."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name
from packaging.version import InvalidVersion, Version

HERE: Final = Path(__file__).resolve().parent
ROOT: Final = HERE.parent
RUNTIME: Final = HERE / "runtime.txt"
DEV: Final = HERE / "dev.txt"

_HASH: Final = re.compile(r"--hash=sha256:([0-9a-f]{64})")
# What the image's Python is, as markers see it, whichever Python looks.
IMAGE: Final = {
    "implementation_name": "cpython",
    "os_name": "posix",
    "platform_python_implementation": "CPython",
    "platform_system": "Linux",
    "python_full_version": "3.11.0",
    "python_version": "3.11",
    "sys_platform": "linux",
}


@dataclass(frozen=True, slots=True)
class Pin:
    """A distribution by its canonical name, its one version, and the SHA-256 of each file that may be installed."""

    name: str
    version: Version
    hashes: tuple[str, ...]
    installed: bool
    """Whether CPython on Linux, and so the image, installs it."""


@dataclass(frozen=True, slots=True)
class Lock:
    """What a lock says, and what is wrong with it: one sentence for each line that is no pin."""

    pins: tuple[Pin, ...]
    faults: tuple[str, ...]


def read(text: str) -> Lock:
    """The content of a lock."""
    pins, faults = [], []
    for line in re.sub(r"\\\n", " ", text).splitlines():
        # A comment begins a line or follows a blank; a URL's fragment does neither.
        written = re.sub(r"(^|\s+)#.*", "", line).strip()
        if not written:
            continue
        found = _pin(written)
        if isinstance(found, Pin):
            pins.append(found)
        else:
            faults.append(f"{written.split()[0]}: {found}")
    return Lock(tuple(pins), tuple(faults))


def _pin(written: str) -> Pin | str:
    """The pin of a line, or what keeps it from being one."""
    hashes = tuple(_HASH.findall(written))
    rest = _HASH.sub("", written).strip()
    try:
        requirement = Requirement(rest)
        specifiers = list(requirement.specifier)
        if requirement.url is not None:
            return "comes from a URL, not from the index that the installing machine chose"
        if [specifier.operator for specifier in specifiers] != ["=="]:
            return "is not pinned to one version with =="
        version = Version(specifiers[0].version)
    except (InvalidRequirement, InvalidVersion):
        return "is no pinned distribution"
    if not hashes:
        return "has no SHA-256, so whatever the index gives would be installed"
    installed = requirement.marker is None or requirement.marker.evaluate(dict(IMAGE))
    return Pin(canonicalize_name(requirement.name), version, hashes, installed)
