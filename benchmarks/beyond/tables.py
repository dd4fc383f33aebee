"""All tables, as Markdown."""

from collections.abc import Sequence
from itertools import product
from statistics import median

from benchmarks import report
from benchmarks.beyond.data import BATCH_SIZE, FEATURE_DIM, DataName
from benchmarks.beyond.methods import METHODS, PAPER, PEERS, SOFTMAX
from benchmarks.beyond.study import GAINS, MERITS, Record, Study
from benchmarks.quality.statistics import show_interval, show_spread
from benchmarks.quality.tables import amounts
from benchmarks.training import FeatureKind

TITLES: dict[DataName, str] = {
    "digits": "Digits, 10 labels per class, 8 and 9 unknown",
    "stdlib": "Standard library, tkinter and xml unknown",
    "faces": "FER-2013",
}
COSINES = {
    "intra": "intra",
    "inter": "inter",
    "closest": "closest two classes",
    "agreement": "agreement",
}
SIGNS = {1: "+", 0: "0", -1: "-"}


def everything(study: Study, results: report.Results) -> str:
    """The whole page."""
    parts = ["# Beyond the paper: tables", _explanation(study, results)]
    for kind in study.kinds:
        parts += [f"## Who wins, {kind} features", _winners(study, kind), _again(study, kind)]
    for kind, data in product(study.kinds, study.data):
        parts += [f"## {TITLES[data]}, {kind} features", _main(study, data, kind)]
        parts.append(_unknown(study, data, kind))
    parts += ["## What was tuned", _tuned(study)]
    parts.append(f"{report.provenance(results.environment)}; {_effort(study)}")
    return "\n\n".join(parts) + "\n"


def title(method: str) -> str:
    """As tables show it."""
    return PEERS.get(method, f"+ {method}")


def _explanation(study: Study, results: report.Results) -> str:
    lines = [
        "Written by `python -m benchmarks beyond`; what it means is in "
        "[Beyond the paper](../../beyond.md). Mean ± standard deviation over seeds; in brackets "
        "the 95 % interval of the mean difference, paired by seed (Student's t), for one "
        "comparison each. Recall: mean over classes. ECE: expected calibration error, 15 bins. "
        "Cosines on the reported part: intra of features to class means, inter between those, and "
        "of the two that are closest; agreement of learned centers with the class means of the "
        "training part. AUROC: the cosine to the nearest class mean of the training part tells "
        "reported samples from those of no class; centred: after the mean of all training features "
        "was taken off.\n",
    ]
    feature_dims = dict.fromkeys(TITLES, FEATURE_DIM)
    return "\n".join([*lines, *amounts(study, results, TITLES, BATCH_SIZE, feature_dims)])


def _winners(study: Study, kind: FeatureKind) -> str:
    """Signs beside softmax loss and beside the paper's form, and the verdict."""
    header = ["loss", *(f"{name}: {data}" for data, name in product(study.data, MERITS))]
    lines = []
    for method in study.candidates(kind):
        cells = []
        for data, name in product(study.data, MERITS):
            signs = [study.clearly(data, kind, method, one, name) for one in (SOFTMAX, PAPER)]
            cells.append(" ".join(SIGNS[sign] for sign in signs))
        lines.append([title(method), *cells, report.verdict(study.wins(kind, method))])
    return (
        f"Beside softmax loss, then beside the paper's form: + clearly better, - clearly worse, 0 "
        f"neither, by paired intervals of {100 * study.level(kind):.1f} % (95 % corrected for "
        f"{len(lines)} candidates). The rule: better than both in {' or in '.join(GAINS)} on two "
        f"data sets, nowhere worse. Chosen for additions, on tuning parts: {study.best[kind]}.\n\n"
        + report.table([*header, "rule"], lines)
    )


def _again(study: Study, kind: FeatureKind) -> str:
    """The nearest candidate on seeds that had no part in calling it so."""
    method = study.nearest(kind)
    lines = []
    for data, other in product(study.data, (SOFTMAX, PAPER)):
        intervals = [study.compare(data, kind, method, other, name, fresh=True) for name in MERITS]
        count = len(study.records(data, kind, method, fresh=True))
        shown = [show_interval(interval, 2) for interval in intervals]
        lines.append([TITLES[data], count, title(other), *shown])
    header = ("data", "seeds", f"{title(method)}, beside", *MERITS)
    return (
        "The candidate nearest to the rule, by signs for it less signs against it, once more on "
        "fresh seeds, with the weights chosen before: differences with 95 % intervals for one "
        f"comparison each.\n\n{report.table(header, lines)}"
    )


def _main(study: Study, data: DataName, kind: FeatureKind) -> str:
    header = (
        "loss",
        "weight",
        "accuracy, %",
        "beyond softmax",
        "beyond the paper's form",
        "recall, %",
        "ECE, %",
        *COSINES.values(),
    )
    return report.table(header, (_row(study, data, kind, one) for one in study.methods(kind)))


def _row(study: Study, data: DataName, kind: FeatureKind, method: str) -> list[str]:
    found = study.records(data, kind, method)
    margin = "margin " if METHODS[method].is_head else ""
    strength = study.strengths[data, kind, method]
    return [
        title(method),
        f"{margin}{strength:g}" if strength else "-",
        _spread(found, "accuracy", 2),
        *(_difference(study, data, kind, method, other, "accuracy") for other in (SOFTMAX, PAPER)),
        _spread(found, "recall", 1),
        _spread(found, "ece", 1),
        *(_spread(found, name, 3) for name in COSINES),
    ]


def _unknown(study: Study, data: DataName, kind: FeatureKind) -> str:
    first = study.records(data, kind, SOFTMAX)[0]
    names = [name for name in first if "auroc " in name]
    header = ["loss", *(name.replace("auroc", "AUROC,") for name in names)]
    header += ["mean beyond softmax", "mean beyond the paper's form"]
    lines = []
    for method in study.methods(kind):
        found = study.records(data, kind, method)
        differences = (
            _difference(study, data, kind, method, other, "auroc") for other in (SOFTMAX, PAPER)
        )
        lines.append([title(method), *(_spread(found, name, 1) for name in names), *differences])
    return report.table(header, lines)


def _spread(found: Sequence[Record], name: str, digits: int) -> str:
    return show_spread([one[name] for one in found], digits)


def _difference(
    study: Study, data: DataName, kind: FeatureKind, method: str, other: str, name: str
) -> str:
    if method == other:
        return "-"
    return show_interval(study.compare(data, kind, method, other, name), 2)


def _tuned(study: Study) -> str:
    lines = []
    for data, kind in product(study.data, study.kinds):
        for method in study.methods(kind):
            tuned = study.tuned(data, kind, method)
            cells = [f"{value:g}: {mean:.1f}" for value, mean in tuned.items()]
            is_rate = method == SOFTMAX
            chosen = study.rates[data, kind] if is_rate else study.strengths[data, kind, method]
            lines.append([data, kind, title(method), ", ".join(cells), f"{chosen:g}"])
    seeds = ", ".join(f"{study.scale.tuning_seeds[data]} on {data}" for data in study.data)
    return (
        "Three candidates each, chosen by accuracy on the tuning part, which is neither trained on "
        f"nor reported (seeds: {seeds}). Softmax loss alone chooses the rate of all methods; the "
        "others choose weights, CosFace its margin.\n\n"
        + report.table(("data", "features", "loss", "accuracy, %, of candidates", "chosen"), lines)
    )


def _effort(study: Study) -> str:
    """Medians: another program beside may have held up some of the runs."""
    parts = []
    for data in study.data:
        seconds = [one["seconds"] for setting, one in study.found.items() if setting.data == data]
        parts.append(f"{len(seconds)} runs on {data} of {median(seconds):.1f} s (median)")
    return ", ".join(parts)
