"""`python -m tests.bench [--quick]`: run the benchmark, print its table, write the page."""

from __future__ import annotations

import argparse
import sys
import time

from tests.bench import report
from tests.bench.load import BenchFailed
from tests.bench.results import run
from tests.bench.scenarios import FULL, QUICK
from tests.bench.targets import targets
from tests.stand.process import StandError


def main() -> int:
    """Run it all; 1 where an answer was wrong or a part of the stand failed, 0 otherwise, targets met or not."""
    parser = argparse.ArgumentParser(prog="make bench", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="about a minute, few runs; docs/ stays as it is")
    quick = parser.parse_args().quick
    began = time.monotonic()

    def say(what: str) -> None:
        print(f"{time.monotonic() - began:5.0f} s  {what}", flush=True)

    try:
        results = run(QUICK if quick else FULL, say)
    except (BenchFailed, StandError) as error:
        print(f"make bench stops: {error}", file=sys.stderr)
        return 1
    page = report.write(results, quick=quick)
    print()
    print(report.terminal(targets(results)))
    print(f"A boot by the program that the targets were set by: {report.reference(results)}.")
    print(f"\n{results.took:.0f} s. The page: {page}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
