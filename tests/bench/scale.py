"""What a fleet asks of Vault, computed: the formulas of docs/scale.md, and its tables made of them.

`python -m tests.bench.scale` writes the tables into the page. Durations are in seconds, rates per minute.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from tests.bench.scenarios import REMOUNT_SECONDS
from tests.bench.stand import ROOT

PAGE: Final = ROOT / "docs" / "scale.md"
RENEW_PART: Final = 0.67 * 0.95
"""The part of its TTL after which a token or lease is renewed: --renew-percent, less half of the jitter of a tenth."""
MINUTE: Final = 60.0


@dataclass(frozen=True)
class Fleet:
    """`objects` static objects and `credentials` dynamic ones a pod; `rotation_poll` is the driver's."""

    nodes: int = 1000
    pods: int = 110
    objects: int = 10
    credentials: int = 0
    refresh_after: float = 0.0
    rotation_poll: float = 120.0
    token_ttl: float = 3600.0
    lease_ttl: float = 3600.0
    lease_max_ttl: float = 86400.0

    @property
    def all_pods(self) -> int:
        """Pods of the fleet."""
        return self.nodes * self.pods


def remount_interval(fleet: Fleet) -> float:
    """Between two re-mounts that reach the provider: kubelet's, those left out that come before the driver's poll."""
    return REMOUNT_SECONDS * max(1, math.ceil(fleet.rotation_poll / REMOUNT_SECONDS))


def read_interval(fleet: Fleet) -> float:
    """Between two reads of a static object: the first re-mount at which `refreshAfter` has passed."""
    every = remount_interval(fleet)
    return every * max(1, math.ceil(fleet.refresh_after / every))


def reads(fleet: Fleet) -> float:
    """Reads of static objects a minute."""
    return fleet.all_pods * fleet.objects * MINUTE / read_interval(fleet)


def renewals(fleet: Fleet) -> float:
    """Renewals a minute: one token a pod, one lease a credential."""
    tokens = MINUTE / (RENEW_PART * fleet.token_ttl)
    leases = fleet.credentials * MINUTE / (RENEW_PART * fleet.lease_ttl)
    return fleet.all_pods * (tokens + leases)


def issued(fleet: Fleet) -> float:
    """Credentials issued a minute, those of pods' first mounts apart: one at each maximum TTL."""
    return fleet.all_pods * fleet.credentials * MINUTE / fleet.lease_max_ttl


def issued_at_each_remount(fleet: Fleet) -> float:
    """Credentials that would be issued a minute, were they read anew at each re-mount."""
    return fleet.all_pods * fleet.credentials * MINUTE / remount_interval(fleet)


def requests(fleet: Fleet) -> float:
    """Requests a minute, those of pods that come and go apart."""
    return reads(fleet) + renewals(fleet) + issued(fleet)


REFRESH_AFTER: Final = (("0", 0.0), ("2m", 120.0), ("5m", 300.0), ("15m", 900.0))


def tables() -> dict[str, str]:
    """The page's tables by name."""

    def rate(value: float) -> str:
        return f"{value:,.0f}"

    static = [
        (f"`{told}`", f"{read_interval(fleet):g} s", rate(reads(fleet)), rate(renewals(fleet)), rate(requests(fleet)))
        for told, seconds in REFRESH_AFTER
        for fleet in (Fleet(refresh_after=seconds),)
    ]
    dynamic = [
        (
            f"{number}",
            rate(issued(fleet)),
            rate(renewals(fleet)),
            rate(fleet.all_pods * (1 + number)),
            rate(issued_at_each_remount(fleet)),
        )
        for number in (0, 1, 2)
        for fleet in (Fleet(objects=0, credentials=number),)
    ]
    churn = [
        (f"{share:.0%}", rate(started), rate(started), rate(started * Fleet().objects), rate(started))
        for share in (0.01, 0.1, 1.0)
        for started in (Fleet().all_pods * share / MINUTE,)
    ]
    ttl = [
        (told, rate(renewals(Fleet(token_ttl=seconds, credentials=1, lease_ttl=seconds))))
        for told, seconds in (("10m", 600.0), ("1h", 3600.0), ("24h", 86400.0))
    ]
    return {
        "static": _table(("`refreshAfter`", "between two reads", "reads", "renewals", "requests"), static),
        "dynamic": _table(
            ("credentials a pod", "issued", "renewals", "tokens and leases held", "issued if read at each re-mount"),
            dynamic,
        ),
        "churn": _table(("pods replaced in an hour", "pods started", "logins", "first reads", "revocations"), churn),
        "ttl": _table(("TTL of tokens and leases", "renewals"), ttl),
    }


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)]) + "\n"


def filled(page: str) -> str:
    """The page with its tables as the formulas give them."""
    for name, table in tables().items():
        begin, end = f"<!-- {name}: begin, made by tests.bench.scale -->\n", f"<!-- {name}: end -->"
        pattern = re.compile(re.escape(begin) + ".*?" + re.escape(end), re.DOTALL)
        page, found = pattern.subn(lambda _, text=begin + table + end: text, page)  # type: ignore[misc]
        if found != 1:
            raise ValueError(f"{PAGE.name} has {found} places for the table {name}")
    return page


if __name__ == "__main__":
    PAGE.write_text(filled(PAGE.read_text()))
