"""Two compressed minutes of `make soak`."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.soak import SLOTS, soak

MINUTES = 2


@pytest.mark.alone
def test_nothing_is_lost_and_nothing_is_left(tmp_path: Path) -> None:
    """Pods come and go, secrets rotate, Vault flaps: each mount succeeds at last, each credential logs in; and memory,
    descriptors, tasks, threads, sessions, tokens and leases are back to their start."""
    result = soak(tmp_path, MINUTES)
    print(result.report())
    assert result.faults() == []
    # It was no idle time: several pods in each slot, every kind of outage, and volumes that changed with their secret.
    assert result.pods > 2 * SLOTS
    assert set(result.outages) == {"killed", "frozen", "sealed"}
    assert result.rotations > MINUTES * 30
    assert result.rewritten > result.rotations
