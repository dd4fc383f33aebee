"""Sharded centers over gloo on one machine, and the least step of Eq. 7: docs/scaling.md's figures.

python -m benchmarks.sharded

Processes share the machine's cores, so the figures say what moving all class sums costs beside
what sharding moves, and nothing of a cluster. Takes two minutes.
"""

import argparse
import functools
import platform
import time
from datetime import date
from statistics import median
from typing import Any

import torch
import torch.distributed as dist

from separate_loss import SeparateLoss, ops
from separate_loss.sharded import ShardedSeparateLoss
from tests.processes import run_in

FEATURE_DIM, SAMPLES, STEPS = 128, 256, 7


def time_steps(rank: int, size: int, num_classes: int) -> list[float]:
    """Median milliseconds of forward, backward and update: unsharded, sharded."""
    torch.manual_seed(rank)
    results = []
    for build in (SeparateLoss, ShardedSeparateLoss):
        criterion: Any = build(num_classes, FEATURE_DIM, center_init="sphere")
        times = []
        for _ in range(STEPS + 1):
            features = torch.randn(SAMPLES, FEATURE_DIM, requires_grad=True)
            target = torch.randint(num_classes, (SAMPLES,))
            if size > 1:
                dist.barrier()
            start = time.perf_counter()
            criterion(features, target).backward()
            times.append(1e3 * (time.perf_counter() - start))
        results.append(median(times[1:]))
        del criterion
    return results


def arriving(num_classes: int, share: float) -> float:
    """The part of a push (Eq. 7) along a sum of norm share x C that float32 centers take."""
    torch.manual_seed(0)
    centers = torch.nn.functional.normalize(torch.randn(2_000, 512, dtype=torch.float64), dim=-1)
    total = torch.nn.functional.normalize(torch.randn(512, dtype=torch.float64), dim=0)
    steps = []
    for dtype in (torch.float32, torch.float64):
        start = centers.float().to(dtype)
        moved = start.clone()
        push = share * num_classes * total.to(dtype)
        ops.push_apart_(moved, ops.norms_and_total(moved)[0], push, 10.0, num_classes=num_classes)
        steps.append((moved - start).double())
    got, wanted = steps
    return float((got * wanted).sum() / wanted.square().sum())


def main() -> None:
    """Prints Markdown tables."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--classes", type=int, nargs="*", default=[10_000, 100_000])
    parser.add_argument("--processes", type=int, nargs="*", default=[2, 3])
    arguments = parser.parse_args()
    shares = (1, 0.1, 0.01)
    print("| classes |", " | ".join(f"norm of the sum {share} C" for share in shares), "|")
    print("| ---: " * (1 + len(shares)) + "|")
    for num_classes in (10**6, 10**7, 10**8):
        parts = " | ".join(f"{arriving(num_classes, share):.2f}" for share in shares)
        print(f"| {num_classes:,} | {parts} |", flush=True)
    print(
        f"\n{FEATURE_DIM} features, {SAMPLES} samples per process, one thread each, median of "
        f"{STEPS} steps; torch {torch.__version__}, {platform.machine()}, {date.today()}\n"
    )
    print("| classes | processes | unsharded, ms | sharded, ms |\n| ---: | ---: | ---: | ---: |")
    for size in arguments.processes:
        for num_classes in arguments.classes:
            times = run_in(size, functools.partial(time_steps, num_classes=num_classes))
            unsharded, sharded = (max(each) for each in zip(*times, strict=True))
            print(f"| {num_classes:,} | {size} | {unsharded:.3g} | {sharded:.3g} |", flush=True)


if __name__ == "__main__":
    main()
