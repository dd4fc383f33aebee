"""How soon centers follow classes whose means have changed: `python -m benchmarks rate`.

Centers stand at the old class means, random directions; samples come from new ones, as many of each
class on average. Under the paper's update, with a fixed alpha and with a tenth of the batch: steps
until the mean cosine between centers and new class means is 0.9.
"""

import argparse
from itertools import product
from pathlib import Path

import torch
from torch.nn import functional as F

from benchmarks.report import environment, progress, provenance, table, write
from separate_loss import SeparateLoss, metrics

__all__ = ["main"]

FEATURE_DIM = 64
REACHED = 0.9
# Of samples to their class mean.
COSINE = 0.7
CLASSES, BATCHES = (7, 1_000, 100_000), (32, 256, 4_096)
RATES: tuple[float | None, ...] = (10.0, None)


def main(arguments: list[str] | None = None) -> None:
    """Parses the command line, follows the centers and writes the table."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks rate", description=(__doc__ or "").split(":")[0]
    )
    parser.add_argument("--classes", type=int, nargs="+", default=CLASSES)
    parser.add_argument("--batches", type=int, nargs="+", default=BATCHES)
    parser.add_argument("--most-steps", type=int, default=3_000)
    parser.add_argument("--output", type=Path, default=Path("build/rate.md"))
    options = parser.parse_args(arguments)
    cells = list(product(options.classes, options.batches))
    rows = []
    for number, (num_classes, batch_size) in enumerate(cells, 1):
        found = [follow(num_classes, batch_size, rate, options.most_steps) for rate in RATES]
        rows.append([f"{num_classes:,}", f"{batch_size:,}", *found])
        progress(number, len(cells), ", ".join(rows[-1]))
    header = ["classes", "batch", "`center_lr=10`", "`center_lr=None`"]
    write(options.output, f"{table(header, rows)}\n\n{provenance(environment())}\n")
    print(options.output.read_text())


def follow(num_classes: int, batch_size: int, rate: float | None, most_steps: int) -> str:
    """Steps until the centers agree with new class means, or how far they came."""
    torch.manual_seed(0)
    old, new = F.normalize(torch.randn(2, num_classes, FEATURE_DIM), dim=-1)
    criterion = SeparateLoss(num_classes, FEATURE_DIM, center_init=old, center_lr=rate)
    # Noise of this size gives samples the cosine that they are to have.
    noise = (1 / COSINE**2 - 1) ** 0.5 / FEATURE_DIM**0.5
    agreement = 0.0
    for step in range(1, most_steps + 1):
        target = torch.randint(num_classes, (batch_size,))
        criterion(new[target] + noise * torch.randn(batch_size, FEATURE_DIM), target)
        # Looking costs as much as a step where there are many classes.
        if step % max(1, step // 50) == 0 or step == most_steps:
            agreement = metrics.center_agreement(criterion.centers, new).item()
            if agreement >= REACHED:
                return f"{step:,}"
    return f"{agreement:.2f} after {most_steps:,}"
