"""When a Vault is not asked any more, what mounts are told meanwhile, and when to look whether it is back.

Pure: it is told what happened and when, ``now`` in seconds of any clock that only grows. ``watch.py`` does it.
"""

from __future__ import annotations

import enum
import math
import random
from collections import OrderedDict
from datetime import UTC, datetime
from typing import Final

from provider.vault.failures import VaultUnreachable

# Between two looks at a Vault, at least; the jitter on top drives apart a thousand nodes that began together.
PROBE_SECONDS: Final = 1.0
PROBE_JITTER_SECONDS: Final = 0.1
# Between the first failure and the look at whether it means anything: a listener that restarts is back by then.
DOUBT_SECONDS: Final = 0.3
# How long a Vault is looked at after the last mount was refused: kubelet asks again every two minutes at the least, so
# after this time nobody does any more.
FORGET_SECONDS: Final = 300.0
# Mounts that were refused last, so that one of many reads counts once; those of one mount come together.
MAX_RECENT: Final = 256


class State(enum.Enum):
    """What is believed of a Vault."""

    THERE = enum.auto()
    DOUBTED = enum.auto()
    """Something failed that may be an outage: it is asked on, and looked at."""
    AWAY = enum.auto()
    """It is not asked, but looked at."""


class Breaker:
    """One Vault's. ``reason`` and ``advice`` say what is wrong with it while it is away, ``refused`` how many mounts
    were refused since."""

    def __init__(self, address: str) -> None:
        self._address = address
        self.state = State.THERE
        self.reason = ""
        self.advice = ""
        self.refused = 0
        self._since = 0.0
        self._probing = False
        self._probed_at = -math.inf
        self._due = math.inf
        self._wanted_at = -math.inf
        self._recent: OrderedDict[int, str] = OrderedDict()

    @property
    def in_question(self) -> bool:
        """Whether a look is under way that decides what becomes of those who ask now."""
        return self.state is State.DOUBTED and self._probing

    def doubt(self, now: float, wall: float, *, at_once: bool = False) -> None:
        """A request failed in a way in which it may have failed alone. ``wall`` is the time of day, in Unix seconds."""
        if self.state is State.THERE:
            self.state = State.DOUBTED
            self._since = wall
            self._due = max(now + (0.0 if at_once else DOUBT_SECONDS), self._probed_at + PROBE_SECONDS)
            self._wanted_at = now

    def lose(self, reason: str, advice: str, now: float, wall: float) -> None:
        """A request, or a look at it, failed as all others would."""
        self.reason, self.advice = reason, advice
        if self.state is State.AWAY:
            return
        if self.state is State.THERE:
            self.doubt(now, wall)
        self.state = State.AWAY
        self._probing = False

    def find(self) -> None:
        """It answered."""
        self.state = State.THERE
        self._probing = False
        self._due = math.inf
        self.refused = 0
        self._recent.clear()

    def next_probe(self) -> float:
        """When to look at it, infinite for not before something else happens."""
        return math.inf if self.in_question else self._due

    def probe(self, now: float) -> bool:
        """Whether to look at it now; else nobody has asked for so long that it is as if nothing were known."""
        if now > self._wanted_at + FORGET_SECONDS:
            self.find()
            return False
        self._probed_at = now
        self._due = now + PROBE_SECONDS + random.uniform(0, PROBE_JITTER_SECONDS)
        self._probing = True
        return True

    def want(self, now: float) -> None:
        """Somebody asks for it."""
        self._wanted_at = now

    def refuse(self, mount: int | None) -> VaultUnreachable:
        """The error for who asks while it is away. ``mount`` tells mounts apart; None is for what is none."""
        told = self._recent.get(mount) if mount is not None else None
        if told is not None:
            return VaultUnreachable(told, self.advice)
        self.refused += mount is not None
        since = datetime.fromtimestamp(self._since, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        counted = f"{self.refused} mount{'' if self.refused == 1 else 's'} refused"
        told = f"Vault at {self._address} is unreachable since {since} ({counted}): {self.reason}"
        if mount is not None:
            self._recent[mount] = told
            if len(self._recent) > MAX_RECENT:
                self._recent.popitem(last=False)
        return VaultUnreachable(told, self.advice)
