"""Runs jobs in worker processes, keeping each result as soon as it is there."""

import random
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Executor, as_completed
from functools import partial

from benchmarks.report import Results

Job = Callable[[], list[float | None]]  # of which the first is an accuracy


def execute(jobs: Mapping[str, Job], results: Results, pool: Executor | None = None) -> None:
    """Does those jobs that `results` lacks, and says how far it is; here, without a pool."""
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
        for done, (name, result) in enumerate(_results(missing, pool), 1):
            results.once(name, partial(list, result))
            left = (time.perf_counter() - began) / done * (len(missing) - done) / 60
            print(
                f"[{done}/{len(missing)}, {left:.1f} min left] {name}: {result[0]:.1f} %",
                flush=True,
            )
    except KeyboardInterrupt:
        raise SystemExit(f"Interrupted: the same command goes on from {results.path}") from None


def _results(
    jobs: Mapping[str, Job], pool: Executor | None
) -> Iterator[tuple[str, list[float | None]]]:
    """Each name and result, as soon as it is there."""
    if pool is None:
        yield from ((name, job()) for name, job in jobs.items())
        return
    futures = {pool.submit(job): name for name, job in jobs.items()}
    yield from ((futures[future], future.result()) for future in as_completed(futures))
