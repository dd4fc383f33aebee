"""The paper's form of the loss beside the others, on digits: `python -m benchmarks forms`.

The demo's classifier with signed features, with non-negative ones, and with these behind a neck
(BatchNorm1d); in the usual setting, with features at a tenth of their size, and in large batches.
Half of scikit-learn's digits are unseen. Nothing is tuned: the weight is 0.9 throughout.
"""

import argparse
import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, NamedTuple

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
from benchmarks.report import environment, progress, provenance, table, write
from separate_loss import SeparateLoss

__all__ = ["main"]

KINDS: tuple[FeatureKind, ...] = ("signed", "non-negative", "neck")
# Scale of the features and size of the batches.
SETTINGS = {"usual": (1.0, 32), "short features": (0.1, 32), "large batches": (1.0, 256)}
FORMS: dict[str, dict[str, Any] | None] = {
    "softmax": None,
    "paper's form": {},
    "`scale_free`": {"scale_free": True},
    '`scale_free`, `"square"`': {"scale_free": True, "separation": "square"},
}
SEPARATE_WEIGHT = 0.9


class Cell(NamedTuple):
    """One way to train."""

    setting: str
    kind: FeatureKind
    form: str


def main(arguments: list[str] | None = None) -> None:
    """Parses the command line, trains all and writes the page."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks forms", description=(__doc__ or "").split(":")[0]
    )
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--output", type=Path, default=Path("build/forms.md"))
    options = parser.parse_args(arguments)
    if options.seeds < 2:
        parser.error("--seeds must be at least 2, for a deviation")
    cells = [Cell(*cell) for cell in product(SETTINGS, KINDS, FORMS)]
    rows = []
    with ProcessPoolExecutor(options.workers, get_context("spawn")) as pool:
        running = [
            [pool.submit(run, cell, seed, options.epochs) for seed in range(options.seeds)]
            for cell in cells
        ]
        for number, (cell, futures) in enumerate(zip(cells, running, strict=True), 1):
            rows.append([*cell, *_cells([future.result() for future in futures])])
            progress(number, len(cells), " | ".join(rows[-1]))
    header = ["setting", "features", "loss", "accuracy, %", "intra", "inter", "agreement"]
    write(
        options.output,
        f"""# Forms of the loss, on digits

`python -m benchmarks forms`. {(__doc__ or "").split("forms`.")[1].strip()}

Mean ± deviation of {options.seeds} seeds after {options.epochs} epochs. "Intra" is the mean cosine
of test features to their class mean, "inter" that between class means, "agreement" that of learned
centers to class means.

{table(header, rows)}

{provenance(environment())}
""",
    )
    print(f"Page: {options.output}")


def run(cell: Cell, seed: int, epochs: int) -> Figures:
    """Trains once, on one thread."""
    torch.set_num_threads(1)
    feature_scale, batch_size = SETTINGS[cell.setting]
    training, test = load_split(seed)
    torch.manual_seed(seed)
    model = DigitClassifier(cell.kind, feature_scale)
    options = FORMS[cell.form]
    criterion = None if options is None else SeparateLoss(NUM_CLASSES, FEATURE_DIM, **options)
    for _ in train(
        model,
        training,
        criterion,
        separate_weight=SEPARATE_WEIGHT,
        epochs=epochs,
        batch_size=batch_size,
        seed=seed,
    ):
        pass
    return evaluate(model, test, criterion).figures


def _cells(runs: Sequence[Figures]) -> list[str]:
    found = []
    for name, digits in zip(Figures._fields, (1, 3, 3, 3), strict=True):
        values = [getattr(figures, name) for figures in runs]
        missing = any(value != value for value in values)  # noqa: PLR0124 - NaN
        mean = "-" if missing else f"{fmean(values):.{digits}f} ± {stdev(values):.{digits}f}"
        found.append(mean)
    return found
