"""Runs jobs in worker processes, keeping each result as soon as it is there."""

import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from typing import Any

from benchmarks.report import Results

Job = Callable[[], Any]


def execute(jobs: Mapping[str, Job], results: Results, workers: int) -> None:
    """Does those jobs that `results` lacks, and says how far it is; 1 worker is this process."""
    missing = {name: job for name, job in jobs.items() if name not in results.measured}
    if missing:
        print(f"{len(missing)} of {len(jobs)} runs to do", flush=True)
    began = time.perf_counter()

    def keep(name: str, done: int, result: Any) -> None:
        results.once(name, lambda: result)
        each = (time.perf_counter() - began) / done
        print(
            f"[{done}/{len(missing)}, {each * (len(missing) - done) / 60:.1f} min left] {name}"
            + (f": {result['accuracy']:.1f} %" if "accuracy" in result else ""),
            flush=True,
        )

    if workers == 1:
        for done, (name, job) in enumerate(missing.items(), 1):
            keep(name, done, job())
        return
    pool = ProcessPoolExecutor(workers)
    try:
        futures: dict[Future[Any], str] = {pool.submit(job): name for name, job in missing.items()}
        for done, future in enumerate(as_completed(futures), 1):
            keep(futures[future], done, future.result())
    finally:
        pool.shutdown(cancel_futures=True)
