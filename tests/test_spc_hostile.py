"""Hostile classes cost at most a second of CPU and 64 MiB, however their 2 MiB are spent."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from provider.errors import MAX_MESSAGE_BYTES
from tests.spc_hostile import CHECKS, CLASSES


@pytest.fixture(scope="module")
def outcomes() -> dict[str, tuple[str, int]]:
    """What came of each class that was parsed to its end within the limits."""
    # Measuring coverage costs memory and time of its own.
    environment = {key: value for key, value in os.environ.items() if not key.startswith("COV")}
    run = subprocess.run(
        [sys.executable, "-m", "tests.spc_hostile"], capture_output=True, text=True, check=True, env=environment
    )
    lines = [json.loads(line) for line in run.stdout.splitlines()]
    return {name: (result, size) for name, result, size in lines}


@pytest.mark.parametrize("name", CLASSES)
def test_a_hostile_class_stays_within_its_limits(name: str, outcomes: dict[str, tuple[str, int]]) -> None:
    """Parsing it comes to an end within 64 MiB and a second of CPU, with a message that gRPC can carry."""
    result, size = outcomes[name]
    assert result in ("parsed", "refused")
    assert size <= MAX_MESSAGE_BYTES


@pytest.mark.parametrize("name", CHECKS)
def test_the_limits_are_real(name: str, outcomes: dict[str, tuple[str, int]]) -> None:
    """What takes more memory or CPU than that does not come to an end there."""
    assert name not in outcomes
