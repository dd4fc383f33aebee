"""All tables, as Markdown."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import product
from statistics import median
from typing import Any

from benchmarks import report
from benchmarks.quality import paper
from benchmarks.quality.bar import bars
from benchmarks.quality.methods import METHODS
from benchmarks.quality.settings import BATCH_SIZE, FEATURE_DIM, KINDS, RATES, DataName
from benchmarks.quality.statistics import paired, show_interval, show_spread
from benchmarks.quality.study import (
    ROWS,
    SIZE_METHODS,
    SOFTMAX,
    Record,
    Row,
    Study,
)
from benchmarks.training import FeatureKind

FIGURES = {
    "intra": "intra",
    "inter": "inter, true means",
    "inter_learned": "inter, learned centers",
    "agreement": "agreement",
    "agreement_lowest": "of the worst class",
}
TITLES: dict[DataName, str] = {"digits": "Digits, 10 labels per class", "faces": "FER-2013"}


def everything(study: Study, results: report.Results) -> str:
    """The whole page."""
    parts = ["# Does the separate loss help? Tables", _explanation(study, results)]
    for data, kind in product(study.data, KINDS):
        parts += [f"## {TITLES[data]}, {kind} features", _main(study, data, kind)]
    parts += [
        "## The bar",
        "\n\n".join(f"{TITLES[data]}:\n\n{bars(study, data)}" for data in study.data),
    ]
    parts += ["## What was tuned", _tuned(study)]
    parts += ["## Weight of the separate loss", _weights(study)]
    if "faces" in study.data:
        parts += ["## Number of features", _sizes(study)]
        parts += ["## Batch size, and what moves the centers", _batches(study)]
        parts += ["## Beside the paper", paper.compare(study)]
    parts.append(f"{report.provenance(results.environment)}; {_effort(results)}")
    return "\n\n".join(parts) + "\n"


def _explanation(study: Study, results: report.Results) -> str:
    lines = [
        "Written by `python -m benchmarks quality`; what it means is in "
        "[Does it help?](../../quality.md). Mean ± standard deviation over seeds. Cosines on "
        "the reported part: intra of features to their class means, inter between class means or "
        "between learned centers, agreement of learned centers with class means. In brackets: the "
        "95 % interval of the mean difference, paired by seed (Student's t).\n",
    ]
    return "\n".join([*lines, *amounts(study, results, TITLES, BATCH_SIZE, FEATURE_DIM)])


def amounts(
    study: Any,
    results: report.Results,
    titles: Mapping[Any, str],
    batch_sizes: Mapping[Any, int],
    feature_dims: Mapping[Any, int],
) -> Iterator[str]:
    """How much of each data set a study ran, a line each."""
    scale = study.scale
    for data in study.data:
        yield (
            f"- {titles[data]}: {scale.seeds[data]} seeds, {scale.epochs[data]} epochs, batches of "
            f"{batch_sizes[data]}, {feature_dims[data]} features."
        )
    if "faces" in study.data:
        origin = results.settings["faces"]
        yield f"- FER-2013 from: {origin}; at most {scale.faces} to train on."


def _main(study: Study, data: DataName, kind: FeatureKind) -> str:
    softmax = study.row(data, kind, SOFTMAX)
    header = ("loss", "weight", "accuracy, %", "beyond softmax [95 %]", *FIGURES.values())
    return report.table(header, (_row(study, data, kind, row, softmax) for row in ROWS))


def _row(
    study: Study, data: DataName, kind: FeatureKind, row: Row, softmax: Sequence[Record]
) -> list[str]:
    found = study.row(data, kind, row)
    strength = study.row_settings(data, kind, row)[0].strength
    margin = "margin " if METHODS[row.method].is_head else ""
    return [
        row.title,
        f"{margin}{strength:g}" if strength else "-",
        show_spread(values("accuracy", found), 2),
        "-" if row is SOFTMAX else difference("accuracy", found, softmax, 2),
        *_cosines(found),
    ]


def values(name: str, found: Iterable[Record]) -> list[Any]:
    """A figure of each run."""
    return [one[name] for one in found]


def difference(name: str, found: Sequence[Record], other: Sequence[Record], digits: int) -> str:
    """A paired difference with its interval, as a cell."""
    return show_interval(paired(values(name, found), values(name, other)), digits)


def _cosines(found: Sequence[Record]) -> list[str]:
    return [show_spread(values(name, found), 3) for name in FIGURES]


def _tuned(study: Study) -> str:
    seeds = _seeds(study.scale.tuning_seeds)
    lines = []
    for data, kind in product(study.data, KINDS):
        lines.append([data, kind, "softmax", "rate", *_candidates(study, data, kind, "softmax")])
        for name, method in METHODS.items():
            if method.strengths:
                what = "margin" if method.is_head else "weight"
                lines.append([data, kind, name, what, *_candidates(study, data, kind, name)])
    return (
        "Three candidates each, chosen by accuracy on the tuning part, which is neither trained on "
        f"nor reported (seeds: {seeds}). Softmax loss alone chooses the rate of all methods.\n\n"
        + report.table(
            ("data", "features", "loss", "tuned", "accuracy, %, of candidates", "chosen"), lines
        )
    )


def _seeds(of: Mapping[DataName, int]) -> str:
    return ", ".join(f"{count} on {data}" for data, count in of.items())


def _candidates(study: Study, data: DataName, kind: FeatureKind, method: str) -> tuple[str, str]:
    is_rate = method == "softmax"
    candidates = RATES if is_rate else METHODS[method].strengths
    chosen = study.rates[data, kind] if is_rate else study.strengths[data, kind, method]
    cells = []
    for candidate in candidates:
        changes = {"rate" if is_rate else "strength": candidate}
        accuracy = study.accuracy(study.tuning(data, kind, method, **changes))
        cells.append(f"{candidate:g}: {accuracy:.1f}")
    return ", ".join(cells), f"{chosen:g}"


def _weights(study: Study) -> str:
    lines = []
    for data, kind in product(study.data, KINDS):
        seeds = study.scale.sweep_seeds[data]
        softmax = study.records(data, kind, "softmax", seeds)
        lines.append([data, kind, "0 (softmax)", *_accuracy_and_cosines(softmax)])
        for weight in study.scale.weights:
            found = study.records(data, kind, "separate", seeds, strength=weight)
            lines.append([data, kind, f"{weight:g}", *_accuracy_and_cosines(found)])
    header = ("data", "features", "weight", "accuracy, %", *FIGURES.values())
    seeds_of = _seeds(study.scale.sweep_seeds)
    return f"Defaults but for the weight; seeds: {seeds_of}.\n\n{report.table(header, lines)}"


def _accuracy_and_cosines(found: Sequence[Record]) -> list[str]:
    return [show_spread(values("accuracy", found), 2), *_cosines(found)]


def _sizes(study: Study) -> str:
    seeds = study.scale.sweep_seeds["faces"]
    lines = [
        [
            kind,
            dim,
            method,
            *_accuracy_and_cosines(study.records("faces", kind, method, seeds, feature_dim=dim)),
        ]
        for kind, dim, method in product(KINDS, study.scale.feature_dims, SIZE_METHODS)
    ]
    header = ("features", "number", "loss", "accuracy, %", *FIGURES.values())
    return f"FER-2013, defaults; seeds: {seeds}.\n\n{report.table(header, lines)}"


def _batches(study: Study) -> str:
    """Where centers settle, beside what the two pulls on them say."""
    classes = len(study.class_names["faces"])
    lines = [
        _settled(study, kind, method, size, classes)
        for kind, (method, size) in product(KINDS, study.batch_places())
    ]
    header = (
        "features",
        "loss",
        "batch",
        "seeds",
        "balance of the pulls",
        "norm of the sum of unit centers",
        "accuracy, %",
        "intra - softmax's",
        "inter - softmax's",
        "agreement",
        "of the worst class",
    )
    return (
        "FER-2013, weight 0.9, softmax's at the same batch size. Balance: the norm of the sum at "
        "which the largest push of the other centers equals the largest pull of a class; C (C - 1) "
        "/ m for the paper's rule, (C - 1) / 2 for gradients where every class pulls alike.\n\n"
        + report.table(header, lines)
    )


def _settled(study: Study, kind: FeatureKind, method: str, size: int, classes: int) -> list[Any]:
    seeds = study.batch_seeds(method)
    found = study.records("faces", kind, method, seeds, batch_size=size)
    softmax = study.records("faces", kind, "softmax", seeds, batch_size=size)
    balance = (classes - 1) / (2 * METHODS[method].inter_share)
    if method == "separate":
        balance = classes * (classes - 1) / size
    return [
        kind,
        method,
        size,
        seeds,
        "-" if method == "softmax" else f"{balance:.2f}",
        show_spread(values("center_sum", found), 2),
        show_spread(values("accuracy", found), 1),
        *(
            "-" if method == "softmax" else difference(name, found, softmax, 3)
            for name in ("intra", "inter")
        ),
        show_spread(values("agreement", found), 3),
        show_spread(values("agreement_lowest", found), 3),
    ]


def _effort(results: report.Results) -> str:
    """Medians: another program beside may have held up some of the runs."""
    parts = []
    for data in TITLES:
        seconds = [
            one["seconds"]
            for name, one in results.measured.items()
            if name.startswith(f"data {data}") and "seconds" in one
        ]
        if seconds:
            parts.append(f"{len(seconds)} runs on {data} of {median(seconds):.1f} s (median)")
    return f"{', '.join(parts)}, {results.settings['workers']} at a time"
