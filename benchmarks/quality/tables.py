"""The page of the study."""

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from benchmarks.data import FeatureKind
from benchmarks.harness import format_interval, format_spread, provenance, table
from benchmarks.quality.data import BALANCED, FIXED, LONG, ONE, PAPER, PEERS, SOFTMAX, THREE, Row
from benchmarks.quality.study import Study, default_weight

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
closest; agreement of learned centers or proxies with class means, and the lowest of any class.
Nearest: accuracy of the nearest of these by cosine. Norm: of the features."""
SHORT = ("banking", "clinc", "digits", "code", "rare-banking", "cifar10")
Line = tuple[Study, FeatureKind]
Table = tuple[list[str], list[list[object]]]  # header and rows


def page(studies: Sequence[Study], environments: Mapping[str, Mapping[str, Any]]) -> str:
    """The summary, and all tables of each data set."""
    parts = [INTRODUCTION]
    lines = [(study, kind) for study in studies for kind in study.data.rows]
    for title, draw in (
        ("In one table", _short),
        ("In short", _summary), ("A neck", _neck), ("Where it harms", _harm),
    ):  # fmt: skip
        header, rows = draw(lines)
        if rows:
            parts += [f"## {title}", table(header, rows)]
    if any((kind, "simplex") in study.tried for study, kind in lines):
        parts += ["## The default weight", default_weight(studies)[1]]
    for study in studies:
        data = study.data
        parts += [
            f"## {data.title[0].upper()}{data.title[1:]}",
            f"{study.epochs} epochs, batches of {data.batch_size}, {study.seeds} seeds, "
            f"{study.tuning_seeds} to tune on. {provenance(environments[study.name])}",
        ]
        for kind in data.rows:
            parts += [f"### {study.name}, {kind}", _rows(study, kind), _tuning(study, kind)]
    return "\n\n".join(parts) + "\n"


def _has(line: Line, *rows: Row) -> bool:
    return {*rows} <= {*line[0].data.rows[line[1]]}


def _best_peer(line: Line) -> str:
    """What the best peer adds on the reported part, which favours it."""
    study, kind = line
    peers = [row for row in PEERS if _has(line, row)]
    best = max(peers, key=lambda row: fmean(study.values(kind, row)))
    return f"{_interval(line, best)} ({best.title.removeprefix('+ ')})"


def _summary(lines: Sequence[Line]) -> Table:
    """What the best peer and each form add to softmax loss, in points of accuracy."""
    rows = [
        [*_start(line), _best_peer(line), *(_interval(line, row) for row in (PAPER, ONE, THREE))]
        for line in lines
        if _has(line, SOFTMAX, PEERS[0], ONE)
    ]
    titles = ["+ best peer", "+ paper's form, 0.9", "+ simplex form, 1", "+ simplex form, 3"]
    return ["data", "features", "softmax loss", *titles], rows


def _short(lines: Sequence[Line]) -> Table:
    """A line for each data set, as README shows it."""
    first = {line[0].name: line for line in reversed(lines) if _has(line, SOFTMAX, PEERS[0], ONE)}
    rows = [
        [title, softmax, _best_peer(line), _interval(line, ONE)]
        for line in reversed(first.values())
        for title, _, softmax in [_start(line)]
        if line[0].name in SHORT
    ]
    return ["data", "softmax loss", "+ best peer", "+ simplex form, 1"], rows


def _start(line: Line, row: Row = SOFTMAX, figure: str = "accuracy") -> list[object]:
    study, kind = line
    return [study.data.title, kind, format_spread(study.values(kind, row, figure), 1)]


def _interval(line: Line, row: Row, other: Row = SOFTMAX, figure: str = "accuracy") -> str:
    study, kind = line
    return format_interval(study.difference(kind, row, other, figure) if _has(line, row) else None)


def _neck(lines: Sequence[Line]) -> Table:
    """Absolute accuracies of each kind of features."""
    rows = [
        [*_start(line), *(_start(line, row)[-1] for row in (ONE, THREE))]
        for line in lines
        if "neck" in line[0].data.rows
    ]
    return ["data", "features", "softmax loss", "+ simplex form, 1", "+ simplex form, 3"], rows


def _harm(lines: Sequence[Line]) -> Table:
    """Mean recall in the settings that are known to be hard, as differences from softmax loss."""
    rows = []
    for line in lines:
        balanced = _has(line, *BALANCED)
        for shown, setting, (softmax, *others) in (
            (balanced or line[0].name == "sgd", "", FIXED),
            (balanced, ", class weights", BALANCED),
            (_has(line, *LONG), ", features times 100", LONG),
        ):
            if shown:
                title, *start = _start(line, softmax, "recall")
                cells = [_interval(line, row, softmax, "recall") for row in others]
                rows.append([f"{title}{setting}", *start, *cells, *["-"] * (2 - len(cells))])
    return ["data", "features", "mean recall, softmax loss", "at 1", "at 3"], rows


def _rows(study: Study, kind: FeatureKind) -> str:
    lines = []
    fixed = {(row.method, row.weight) for row in study.data.rows[kind]}
    for row in study.data.rows[kind]:
        best = study.weights.get((kind, row.method))
        if row.tuned and (row.method, best) in fixed:
            continue
        weight = best if row.tuned else row.weight
        shown = "-" if weight is None else f"{weight:g}{', tuned' if weight == best else ''}"
        difference = "-" if row == SOFTMAX else _interval((study, kind), row)
        accuracy = format_spread(study.values(kind, row), 1)
        found = study.figures(kind, row)
        others = (
            format_spread([figures[name] for figures in found], digits, deviation=False)
            for name, (_, digits) in COLUMNS.items()
        )
        lines.append([row.title, shown, accuracy, difference, *others])
    titles = (title for title, _ in COLUMNS.values())
    return table(["loss", "weight", "accuracy", "- softmax", *titles], lines)


def _tuning(study: Study, kind: FeatureKind) -> str:
    """The accuracies on the tuning part."""
    listed = [
        f"{method} " + ", ".join(f"{value:g} {mean:.1f}" for value, mean in sorted(scores.items()))
        for (other, method), scores in study.tried.items()
        if other == kind
    ]
    tuned = f" On the tuning part: {'; '.join(listed)}." if listed else ""
    return f"Rate {study.rates[kind]:g}.{tuned}"
