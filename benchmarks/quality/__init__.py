"""Does the separate loss help? `python -m benchmarks quality`."""

from benchmarks.quality.command import main

__all__ = ["main"]
