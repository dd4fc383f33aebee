"""Starting values and rates of the centers: which follow the class means and push them apart.

python -m benchmarks.centers

Trains the demo's classifier under every choice and prints Markdown tables, each figure a mean over
seeds with its standard deviation. Takes about 10 minutes on two cores.
"""

import argparse
import math
import platform
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from datetime import date
from itertools import product
from statistics import fmean, stdev
from typing import Literal

import torch

from benchmarks.digits import (
    FEATURE_DIM,
    NUM_CLASSES,
    DigitClassifier,
    FeatureKind,
    Figures,
    evaluate,
    load_split,
    train,
)
from separate_loss import SeparateLoss

Init = Literal["features", "sphere", "normal", "uniform"]


@dataclass(frozen=True)
class Trial:
    """One way to train; `center_init` None is softmax loss alone."""

    kind: FeatureKind
    center_init: Init | None
    center_lr: float | None = 0.0
    batch_size: int = 32
    feature_scale: float = 1.0

    def run(self, seed: int, epochs: int) -> Figures:
        """Trains once, on one thread."""
        torch.set_num_threads(1)
        training, test = load_split(seed)
        torch.manual_seed(seed)
        model = DigitClassifier(self.kind, self.feature_scale)
        criterion = None
        if self.center_init is not None:
            criterion = SeparateLoss(
                NUM_CLASSES,
                FEATURE_DIM,
                center_init=self.center_init,
                center_lr=self.center_lr,
            )
        for _ in train(
            model,
            training,
            criterion,
            separate_weight=0.9,
            epochs=epochs,
            batch_size=self.batch_size,
            seed=seed,
        ):
            pass
        return evaluate(model, test, criterion).figures


KINDS: tuple[FeatureKind, ...] = ("signed", "non-negative")
INITS: tuple[Init, ...] = ("features", "sphere", "normal", "uniform")
SOFTMAX_AND_TEN: tuple[tuple[Init | None, float], ...] = ((None, 0), ("features", 10))
SOFTMAX_AND_RATES: tuple[tuple[Init | None, float | None], ...] = (
    SOFTMAX_AND_TEN[0],
    ("features", 1),
    ("features", 10),
    ("features", 100),
    ("features", None),
)


def trials() -> dict[str, list[Trial]]:
    """The trials of each table."""
    tables: dict[str, list[Trial]] = {}
    for kind in KINDS:
        tables[f"Starting values and rate, {kind} features"] = [
            Trial(kind, None),
            *(Trial(kind, init, rate) for init, rate in product(INITS, (0.01, 0.1, 1, 10, 100))),
        ]
    for kind in KINDS:
        tables[f"Batch size, {kind} features"] = [
            Trial(kind, init, rate, batch_size=size)
            for size in (16, 64, 256)
            for init, rate in SOFTMAX_AND_RATES
        ]
    for kind in KINDS:
        tables[f"Norm of the features, {kind} features"] = [
            Trial(kind, init, rate, feature_scale=scale)
            for scale in (0.01, 0.1, 10.0, 100.0)
            for init, rate in SOFTMAX_AND_TEN
        ]
    return tables


def row(trial: Trial, runs: Sequence[Figures]) -> str:
    """A line of a Markdown table."""
    rate = "None" if trial.center_lr is None else f"{trial.center_lr:g}"
    cells: list[str] = [
        trial.center_init or "softmax alone",
        rate if trial.center_init else "-",
        str(trial.batch_size),
        f"{trial.feature_scale:g}",
    ]
    for name, digits in zip(Figures._fields, (1, 3, 3, 3), strict=True):
        values = [getattr(figures, name) for figures in runs]
        if math.isnan(values[0]):
            cells.append("-")
        else:
            cells.append(f"{fmean(values):.{digits}f} ± {stdev(values):.{digits}f}")
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Parses the command line and prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    if options.seeds < 2:
        parser.error("--seeds must be at least 2, for a deviation")

    print(
        f"torch {torch.__version__}, {platform.machine()}, {date.today()}, digits, "
        f"{options.epochs} epochs, mean ± deviation of {options.seeds} seeds"
    )
    head = "init | rate | batch | scale | accuracy, % | intra | inter | agreement"
    with ProcessPoolExecutor(options.workers) as pool:
        for title, choices in trials().items():
            print(f"\n### {title}\n\n| {head} |\n|{' --- |' * 8}", flush=True)
            futures = [
                [pool.submit(trial.run, seed, options.epochs) for seed in range(options.seeds)]
                for trial in choices
            ]
            for trial, running in zip(choices, futures, strict=True):
                print(row(trial, [future.result() for future in running]), flush=True)


if __name__ == "__main__":
    main()
