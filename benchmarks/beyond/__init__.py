"""Is there a better separation than Eq. 3? `python -m benchmarks beyond`."""

from benchmarks.beyond.command import main

__all__ = ["main"]
