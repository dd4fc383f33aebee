"""The page of the study."""

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.data import FeatureKind
from benchmarks.harness import format_interval, format_spread, provenance, table
from benchmarks.quality.study import CENTER, PAPER, SOFTMAX, Study, chosen_row
from benchmarks.training import PAPER_WEIGHT, STARTS

# Title and digits of each figure beside the accuracy.
COLUMNS = {
    "recall": ("recall", 1),
    "calibration": ("ECE", 1),
    "train_accuracy": ("train", 1),
    "intra": ("intra", 2),
    "inter": ("inter", 2),
    "closest": ("closest", 2),
    "agreement": ("agreement", 2),
    "agreement_lowest": ("lowest", 2),
    "nearest": ("nearest", 1),
    "norm": ("norm", 1),
}
INTRODUCTION = """# Does it help? All figures

Written by `python -m benchmarks quality`. Mean ± standard deviation over seeds; in brackets the
95 % interval of the mean difference in accuracy, paired by seed (Student's t). Weights marked with
"tuned" were chosen on the tuning part by accuracy. Recall: mean over the classes, %. ECE: expected
calibration error, 15 bins, %. Train: accuracy on what was trained on. Mean cosines on the reported
part: intra of features to their class means, inter between class means, closest of the two that are
closest; agreement of learned centers with class means, and the lowest of any class. Nearest:
accuracy of the nearest learned center by cosine. Norm: of the features."""


def page(studies: Sequence[Study], environments: Mapping[str, Mapping[str, Any]]) -> str:
    """The summary, and all tables of each data set."""
    parts = [INTRODUCTION, "## In short", *_summary(studies)]
    for study in studies:
        data = study.data
        parts.append(f"## {data.title[0].upper()}{data.title[1:]}")
        parts.append(
            f"{study.epochs} epochs, batches of {data.batch_size}, {study.seeds} seeds, "
            f"{study.tuning_seeds} to tune on. {provenance(environments[study.name])}"
        )
        for kind in study.kinds:
            parts += [f"### {study.name}, {kind}", _rows(study, kind), _tuning(study, kind)]
        if study.sweep:
            parts += ["### Size of the features and of the batches", _sweep(study)]
    return "\n\n".join(parts) + "\n"


def _summary(studies: Sequence[Study]) -> tuple[str, str]:
    """What each loss adds to softmax loss, in points of accuracy, and the weight."""
    simplex = chosen_row(studies)
    columns = {
        "center loss": CENTER,
        f"separate, paper's form at {PAPER_WEIGHT}": PAPER,
        f"separate, simplex form at {simplex.weight:g}": simplex,
    }
    lines = [
        [
            study.data.title,
            kind,
            format_spread(study.accuracies(kind, SOFTMAX), 1),
            *(format_interval(study.difference(kind, row, SOFTMAX)) for row in columns.values()),
        ]
        for study in studies
        for kind in study.kinds
    ]
    header = ["data", "features", "softmax loss", *(f"+ {title}" for title in columns)]
    rule = (
        f"The weight of the simplex form is the one of {', '.join(f'{one:g}' for one in STARTS)} "
        f"with the best mean accuracy on the tuning parts: **{simplex.weight:g}**."
    )
    return table(header, lines), rule


def _rows(study: Study, kind: FeatureKind) -> str:
    lines = []
    fixed = {(row.method, row.weight) for row in study.rows}
    for row in study.rows:
        found = study.figures(kind, row)
        best = study.weights.get((kind, row.method))
        if len(found) < 2 or (row.tuned and (row.method, best) in fixed):
            continue
        weight = best if row.tuned else row.weight
        shown = "-" if weight is None else f"{weight:g}{', tuned' if weight == best else ''}"
        seeds = f" ({len(found)} seeds)" if len(found) < study.seeds else ""
        differences = (
            "-" if row == other else format_interval(study.difference(kind, row, other))
            for other in (SOFTMAX, PAPER)
        )
        accuracy = format_spread(study.accuracies(kind, row), 1)
        others = (
            format_spread([figures[name] for figures in found.values()], digits, deviation=False)
            for name, (_, digits) in COLUMNS.items()
        )
        lines.append([row.title + seeds, shown, accuracy, *differences, *others])
    titles = (title for title, _ in COLUMNS.values())
    header = ["loss", "weight", "accuracy", "- softmax", "- paper's form", *titles]
    return table(header, lines)


def _tuning(study: Study, kind: FeatureKind) -> str:
    """The accuracies by weight on the tuning part."""
    methods = []
    for (other, method), scores in study.tried.items():
        if other == kind:
            listed = ", ".join(f"{weight:g} {score:.1f}" for weight, score in scores.items())
            methods.append(f"{method} {listed}")
    return f"Rate {study.rates[kind]:g}. On the tuning part: {'; '.join(methods)}."


def _sweep(study: Study) -> str:
    lines = [
        [
            f"{kind}, times {line[0].scale:g}, batches of {line[0].batch_size}",
            *(format_spread(study.accuracies(kind, row), 1) for row in line),
        ]
        for kind, line in study.sweep
    ]
    rows = study.sweep[0][1]
    titles = (row.title + ("" if row.weight is None else f", {row.weight:g}") for row in rows)
    return table(["features", *titles], lines)
