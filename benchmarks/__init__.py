"""Measurements: `python -m benchmarks.demo` and `python -m benchmarks.centers`."""
