"""Runs jobs in worker processes, keeping each result as soon as it is there."""

import random
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import partial
from typing import Any

from benchmarks.report import Results

Job = Callable[[], dict[str, Any]]


def execute(jobs: Mapping[str, Job], results: Results, workers: int) -> None:
    """Does those jobs that `results` lacks, and says how far it is; 1 worker is this process."""
    names = [name for name in jobs if name not in results.measured]
    # Long and short ones mixed, so that the time left can be told from the start.
    random.Random(0).shuffle(names)
    missing = {name: jobs[name] for name in names}
    if missing and results.redraw:
        raise SystemExit(f"{results.path} has no figures for {names[0]}")
    if missing:
        print(f"{len(missing)} of {len(jobs)} runs to do", flush=True)
    began = time.perf_counter()
    try:
        for done, (name, result) in enumerate(_results(missing, workers), 1):
            results.once(name, partial(dict, result))
            left = (time.perf_counter() - began) / done * (len(missing) - done) / 60
            accuracy = f": {result['accuracy']:.1f} %" if "accuracy" in result else ""
            print(f"[{done}/{len(missing)}, {left:.1f} min left] {name}{accuracy}", flush=True)
    except KeyboardInterrupt:
        raise SystemExit(f"Interrupted: the same command goes on from {results.path}") from None


def _results(jobs: Mapping[str, Job], workers: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each name and result, as soon as it is there."""
    if workers == 1:
        yield from ((name, job()) for name, job in jobs.items())
        return
    pool = ProcessPoolExecutor(workers)
    try:
        futures = {pool.submit(job): name for name, job in jobs.items()}
        yield from ((futures[future], future.result()) for future in as_completed(futures))
    finally:
        pool.shutdown(cancel_futures=True)
