"""The page of the study, from its figures."""

from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean, stdev
from typing import Any

from benchmarks.quality.methods import PAPER_WEIGHT, STARTS
from benchmarks.quality.statistics import show_interval, show_spread
from benchmarks.quality.study import (
    CENTER,
    FREE,
    PAPER,
    SOFTMAX,
    SQUARE,
    SWEEP_ROWS,
    Row,
    Study,
    Verdict,
    default_weight,
    judge,
)
from benchmarks.report import provenance, table
from benchmarks.samples import FeatureKind

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
    """The summary, what the rules for the defaults found, and every table."""
    parts = [INTRODUCTION, "## In short", summary(studies), "## Defaults", *_defaults(studies)]
    for study in studies:
        data, environment = study.data, environments[study.name]
        parts.append(f"## {data.title[0].upper()}{data.title[1:]}")
        parts.append(
            f"{study.epochs} epochs, batches of {data.batch_size}, {study.seeds} seeds, "
            f"{study.tuning_seeds} to tune on. {provenance(environment)}"
        )
        for kind in study.kinds:
            parts += [f"### {study.name}, {kind}", _rows(study, kind), _tuning(study, kind)]
        if study.sweep_places():
            parts += ["### Size of the features and of the batches", _sweep(study)]
    return "\n\n".join(parts) + "\n"


def summary(studies: Sequence[Study]) -> str:
    """What each loss adds to softmax loss, in points of accuracy."""
    free, square = _chosen(studies)
    rows = (CENTER, PAPER, free, square)
    titles = (
        "center loss",
        f"separate, paper's form at {PAPER_WEIGHT}",
        f"`scale_free` at {free.weight:g}",
        f'`scale_free` and `"square"` at {square.weight:g}',
    )
    lines = []
    for study in studies:
        for kind in study.kinds:
            softmax = study.figures(kind, SOFTMAX).values()
            line = [study.data.title, kind, show_spread(_values(softmax, "accuracy"), 1)]
            for row in rows:
                found = study.difference(kind, row, SOFTMAX)
                line.append("-" if found is None else show_interval(found, 1))
            lines.append(line)
    return table(["data", "features", "softmax loss", *(f"+ {title}" for title in titles)], lines)


def _chosen(studies: Sequence[Study]) -> tuple[Row, Row]:
    """Both forms at the one weight that their tuning parts chose."""
    weight = default_weight(studies)
    return FREE[STARTS.index(weight)], SQUARE[STARTS.index(weight)]


def _defaults(studies: Sequence[Study]) -> list[str]:
    free, square = _chosen(studies)
    rule = (
        "Fixed before the runs: a form becomes the default of the modules if nowhere the interval "
        "beside the lesser form is below zero, if that beside softmax loss is above zero in two "
        "places or more, and if in no cell of the sweep below it falls two deviations below "
        "softmax loss. The weight is the one of "
        f"{', '.join(f'{weight:g}' for weight in STARTS)} with the best mean accuracy of both "
        f"forms on the tuning parts: **{free.weight:g}**."
    )
    lines = [
        _verdict(f"`scale_free` beside the paper's form at {PAPER_WEIGHT}", free, PAPER, studies),
        _verdict('`"square"` beside `"mean"`, both `scale_free`', square, free, studies),
        _verdict("both (no rule) beside the paper's form", square, PAPER, studies),
        _verdict("both (no rule) beside center loss", square, CENTER, studies),
    ]
    return [rule, table(["form", "worse in", "above softmax in", "fallen in", "rule"], lines)]


def _verdict(title: str, row: Row, lesser: Row, studies: Sequence[Study]) -> list[str]:
    found: Verdict = judge(studies, row, lesser)
    places = ("; ".join(places) or "none" for places in (found.worse, found.better, found.fallen))
    return [title, *places, "**holds**" if found.holds else "**fails**"]


def _rows(study: Study, kind: FeatureKind) -> str:
    lines = []
    fixed = {(row.method, row.weight) for row in study.rows}
    for row in study.rows:
        found = study.figures(kind, row)
        best = study.weights.get((kind, row.method))
        if len(found) < 2 or (row.tuned and (row.method, best) in fixed):
            continue
        weight = best if row.tuned else row.weight
        title = row.title + (f" ({len(found)} seeds)" if len(found) < study.seeds else "")
        lines.append(
            [
                title,
                "-" if weight is None else f"{weight:g}{', tuned' if weight == best else ''}",
                show_spread(_values(found.values(), "accuracy"), 1),
                *(
                    "-" if row == other or difference is None else show_interval(difference, 1)
                    for other in (SOFTMAX, PAPER)
                    for difference in [study.difference(kind, row, other)]
                ),
                *(
                    _mean(_values(found.values(), name), digits)
                    for name, (_, digits) in COLUMNS.items()
                ),
            ]
        )
    titles = (title for title, _ in COLUMNS.values())
    header = ["loss", "weight", "accuracy", "- softmax", "- paper's form", *titles]
    return table(header, lines)


def _values(found: Iterable[Mapping[str, float | None]], name: str) -> list[float | None]:
    return [figures[name] for figures in found]


def _mean(values: Sequence[float | None], digits: int) -> str:
    known = [value for value in values if value is not None]
    return f"{fmean(known):.{digits}f}" if known else "-"


def _tuning(study: Study, kind: FeatureKind) -> str:
    """What the weights gave on the tuning part, in a sentence for each method."""
    said = []
    for (other, method), scores in study.tried.items():
        if other == kind:
            listed = ", ".join(f"{weight:g} {score:.1f}" for weight, score in scores.items())
            said.append(f"{method} {listed}")
    return f"Rate {study.rates[kind]:g}. On the tuning part: {'; '.join(said)}."


def _sweep(study: Study) -> str:
    lines = []
    cells = dict.fromkeys((kind, scale, size) for kind, scale, size, _ in study.sweep_places())
    for kind, scale, size in cells:
        accuracies = [study.sweep(kind, scale, size, row) for row in SWEEP_ROWS]
        lines.append(
            [
                f"{kind}, times {scale:g}, batches of {size}",
                *(f"{fmean(found):.1f} ± {stdev(found):.1f}" for found in accuracies),
            ]
        )
    titles = (row.title + ("" if row.weight is None else f", {row.weight:g}") for row in SWEEP_ROWS)
    return table(["features", *titles], lines)
