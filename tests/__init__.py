"""Tests, and the stand that they, the demo and the benchmarks run on."""
