"""What is found wrong in a class: collected, so that its author sees every fault at once."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Sequence
from typing import Final, TypeVar

from provider.errors import InvalidClass
from provider.redact import one_line

_T = TypeVar("_T")

# Findings of one kind that are kept; a message holds 4 KiB, and a hostile class could have ten thousands.
MAX_FINDINGS: Final = 100
# Names that classes written for the Go providers may have, and that those ignore since their first release.
# Source: https://github.com/hashicorp/vault-csi-provider/blob/main/CHANGELOG.md
MEANINGLESS: Final = frozenset({"kubernetesServiceAccountPath", "objectVersion", "vaultCAPem"})
# Longer names are no typing errors, and comparing one of a megabyte takes a hundred.
_MAX_TYPO: Final = 64


class Refused(Exception):
    """A value is not allowed: what the problem is, and what to write instead. Neither repeats the value."""

    def __init__(self, problem: str, remedy: str) -> None:
        super().__init__(problem, remedy)
        self.problem = problem
        self.remedy = remedy


class _Bounded:
    """The first MAX_FINDINGS sentences, and how many came after them."""

    def __init__(self, kind: str) -> None:
        self._kind = kind
        self._kept: list[str] = []
        self._more = 0

    @property
    def full(self) -> bool:
        return len(self._kept) >= MAX_FINDINGS

    def add(self, sentence: str) -> None:
        if self.full:
            self._more += 1
        else:
            self._kept.append(one_line(sentence))

    def extend(self, other: _Bounded) -> None:
        for sentence in other._kept:
            self.add(sentence)
        self._more += other._more

    def all(self) -> tuple[str, ...]:
        return (*self._kept, f"and {self._more} more {self._kind}") if self._more else tuple(self._kept)


class Findings:
    """Faults, which refuse the class, and warnings, which do not; one sentence each, and safe to show.

    ``strict`` is whether names that nobody knows are faults.
    """

    def __init__(self, *, strict: bool = False) -> None:
        self._strict = strict
        self._faults = _Bounded("faults")
        self._warnings = _Bounded("warnings")

    def fault(self, where: str, problem: str, remedy: str) -> None:
        """Note a fault: where it is (object, field, value), what it is, and what to do about it."""
        self._faults.add(f"{where}: {problem} ({remedy})")

    def warn(self, where: str, problem: str) -> None:
        """Note a warning."""
        self._warnings.add(f"{where}: {problem}")

    def unknown(self, where: str, kind: str, names: Iterable[str], known: Sequence[str]) -> None:
        """Note each of ``names`` that is not ``known`` with the nearest known one: a fault if strict, or a warning."""
        kept = self._faults if self._strict else self._warnings
        for name in names:
            if name in MEANINGLESS:
                self.warn(where, f"{kind} {show(name)} has no meaning: remove it")
            elif name not in known:
                # Comparing is what costs, so it is not done for what is only counted.
                near = None if kept.full else nearest(name, known)
                hint = f", did you mean {near}?" if near else ""
                if self._strict:
                    # Taken away, a field that was only misspelt would leave the application another file.
                    remedy = f"rename it to {near}, or remove it" if near else "remove it"
                    remedy += "; the daemon's --unknown-fields=warn would ignore it"
                    self.fault(where, f"unknown {kind} {show(name)}{hint}", remedy)
                else:
                    self.warn(where, f"unknown {kind} {show(name)} is ignored{hint}")

    def attempt(self, where: str, read: Callable[[str], _T], text: str, default: _T) -> _T:
        """``read(text)``; where that is Refused, ``default``, and a fault is noted."""
        try:
            return read(text)
        except Refused as refused:
            self.fault(where, refused.problem, refused.remedy)
            return default

    def include(self, other: Findings) -> None:
        """Take over what ``other`` holds, after what is here."""
        self._faults.extend(other._faults)
        self._warnings.extend(other._warnings)

    @property
    def warnings(self) -> tuple[str, ...]:
        """The warnings, sentences for the log."""
        return self._warnings.all()

    @property
    def faults(self) -> tuple[str, ...]:
        """The faults, sentences for the author of the class."""
        return self._faults.all()

    def check(self) -> None:
        """Raise InvalidClass with every fault, if there is any; and with the warnings, which may tell why."""
        if self.faults:
            raise InvalidClass([*self.faults, *self.warnings])


def show(text: str) -> str:
    """``text`` in quotes as a message shows it: one line, short, credentials masked."""
    return f'"{one_line(text, 80)}"'


def nearest(name: str, known: Sequence[str]) -> str | None:
    """The one of ``known`` that ``name`` most likely was meant to be, whatever its case; None if none is near."""
    if len(name) > _MAX_TYPO:
        return None
    by_lower = {candidate.lower(): candidate for candidate in known}
    found = difflib.get_close_matches(name.lower(), by_lower, n=1)
    return by_lower[found[0]] if found else None
