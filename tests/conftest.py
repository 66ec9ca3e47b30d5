"""What all tests share. The asyncio mode is set in pyproject.toml."""

from __future__ import annotations

import os

from hypothesis import settings

# No deadlines: how long an example takes is the machine's business, and no test asserts a time.
settings.register_profile("dev", max_examples=50, deadline=None)
settings.register_profile("ci", max_examples=200, deadline=None, print_blob=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci" if "CI" in os.environ else "dev"))
