"""Measurements: `python -m benchmarks --help`; before them, `benchmarks.demo` and `.centers`."""
