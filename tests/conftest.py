"""What all tests share. The asyncio mode is set in pyproject.toml."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, settings

# No deadlines: how long an example takes is the machine's business, and no test asserts a time. Nor is it a failure
# that examples take long to make, or that by chance some of the first were large.
_HEALTH = [HealthCheck.too_slow, HealthCheck.data_too_large]
settings.register_profile("dev", max_examples=50, deadline=None, suppress_health_check=_HEALTH)
settings.register_profile("ci", max_examples=200, deadline=None, suppress_health_check=_HEALTH, print_blob=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci" if "CI" in os.environ else "dev"))


@pytest.fixture
def collector_off() -> Iterator[None]:
    """Whatever goes meanwhile goes by itself, and what is in a cycle stays."""
    gc.disable()
    yield
    gc.enable()
