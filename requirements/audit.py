"""What can be known about the locks without asking anybody: `python -m requirements.audit`, part of `make check`.

Each line of each lock is one version with hashes, and none is a version that advisories.toml names. It learns of no
new advisory by itself: `python -m requirements.audit --online`, which is `make audit`, asks for those, and whether a
version was yanked (docs/supply-chain.md).
"""

from __future__ import annotations

import subprocess
import sys
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from packaging.specifiers import InvalidSpecifier, SpecifierSet
from packaging.utils import canonicalize_name

from requirements.locks import HERE, Lock, read

ADVISORIES: Final = "advisories.toml"


@dataclass(frozen=True, slots=True)
class Advisory:
    """A published fault of some versions of a distribution; each range is one that is affected."""

    id: str
    package: str
    affected: tuple[SpecifierSet, ...]
    what: str


class WrongList(Exception):
    """advisories.toml is not as it has to be; the message says where."""


def advisories(text: str) -> list[Advisory]:
    """The advisories of a list. Raises WrongList."""
    entries: list[dict[str, Any]] = tomllib.loads(text).get("advisory", [])
    found = []
    for entry in entries:
        name = entry.get("id", "an advisory without id")
        if set(entry) != {"id", "package", "affected", "what"}:
            raise WrongList(f"{name}: has {sorted(entry)}, and not id, package, affected and what")
        try:
            affected = tuple(SpecifierSet(part, prereleases=True) for part in entry["affected"])
        except InvalidSpecifier as error:
            raise WrongList(f"{name}: {error}") from error
        if not affected or any(not part for part in affected):
            raise WrongList(f"{name}: names no versions")
        found.append(Advisory(name, canonicalize_name(entry["package"]), affected, entry["what"]))
    return found


def faults(locks: Mapping[str, Lock], known: Iterable[Advisory]) -> list[str]:
    """What is wrong with these locks, by name, each fault with its remedy."""
    found = [f"{name}: {fault}" for name, lock in locks.items() for fault in lock.faults]
    found += [f"{name}: pins nothing" for name, lock in locks.items() if not lock.pins and not lock.faults]
    pinned = {pin.name for lock in locks.values() for pin in lock.pins}
    for advisory in known:
        if advisory.package not in pinned:
            # A name that is written wrongly would never be found.
            found.append(f"{ADVISORIES}: {advisory.id} is about {advisory.package}, which no lock has: remove it")
        found += [
            f"{name}: {pin.name} {pin.version} has {advisory.id} ({advisory.what}): make upgrade"
            for name, lock in locks.items()
            for pin in lock.pins
            if pin.name == advisory.package and any(pin.version in part for part in advisory.affected)
        ]
    return found


def told_by_others(paths: Sequence[Path]) -> list[str]:
    """What the index and the advisory service say of these locks, each fault a line.

    The index is the one that the machine installs from, the service OSV. Whichever does not answer is a fault too.
    """
    found = []
    for path in paths:
        # Nothing is resolved or installed: each pin is looked up, and uv warns of what its owner took back.
        asked = _run("uv", "pip", "compile", "--no-deps", "--universal", "--python-version", "3.11", str(path))
        found += [line.removeprefix("warning: ") for line in asked.stderr.splitlines() if " is yanked" in line]
        if asked.returncode != 0:
            found.append(f"{path.name}: uv cannot look it up: {asked.stderr.strip()}")
    each = [argument for path in paths for argument in ("-r", str(path))]
    asked = _run("pip-audit", "--require-hashes", "--disable-pip", "--progress-spinner", "off", "-s", "osv", *each)
    if asked.returncode != 0:
        # Where it did not come to an answer, the last line of a traceback says why.
        found += asked.stdout.strip().splitlines() or [f"pip-audit: {asked.stderr.strip().splitlines()[-1]}"]
    return found


def _run(program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    path = Path(sys.executable).with_name(program)
    return subprocess.run([path, *arguments], capture_output=True, text=True, check=False)  # noqa: S603


def main(arguments: Sequence[str]) -> int:
    """Print what is wrong with the locks of a directory, this one unless it is given; 1 where something is.

    With --online others are asked as well.
    """
    online = "--online" in arguments
    (directory,) = [Path(argument) for argument in arguments if argument != "--online"] or [HERE]
    paths = sorted(directory.glob("*.txt"))
    found = faults(
        {path.name: read(path.read_text()) for path in paths}, advisories((directory / ADVISORIES).read_text())
    )
    if online:
        found += told_by_others(paths)
    for fault in found:
        print(fault, file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
