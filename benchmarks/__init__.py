"""Measurements: `python -m benchmarks --help`, and the first two, `benchmarks.demo` and `.centers`."""
