"""How long a step takes, by torch.utils.benchmark."""

import os
import time
from collections.abc import Callable
from typing import TypedDict

import torch
from torch.utils.benchmark import Timer

__all__ = ["Step", "Timing", "measure", "warn_of_load"]

Step = Callable[[], None]


class Timing(TypedDict):
    median: float  # seconds
    iqr: float  # seconds, between the quartiles
    runs: int


def measure(step: Step, *, threads: int, seconds: float) -> Timing:
    """Warms the step up, then runs it for `seconds`; a slow one 5 times, or for 20 times as long.

    Where not even one run is done by then, the figure is that of a single run.
    """
    step()
    _wait()
    began = time.perf_counter()
    step()
    _wait()
    once = time.perf_counter() - began
    timer = Timer("step()", globals={"step": step}, num_threads=threads)
    timed = timer.blocked_autorange(min_run_time=min(max(seconds, 5 * once), 20 * seconds))
    return {
        "median": timed.median,
        "iqr": timed.iqr,
        "runs": timed.number_per_run * len(timed.times),
    }


def warn_of_load() -> None:
    """Says so where other programs use the machine: what is measured then is their doing too."""
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    if load > 0.5:
        print(f"Load average {load:.1f} before the first measurement: the machine is not quiet.")


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
