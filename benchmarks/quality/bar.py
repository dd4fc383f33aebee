"""What the defaults are to reach, and whether they do."""

from collections.abc import Sequence
from itertools import product

from benchmarks import report
from benchmarks.quality.settings import KINDS, DataName
from benchmarks.quality.statistics import paired, show_interval
from benchmarks.quality.study import SEPARATE, SOFTMAX, Record, Study

AGREEMENT = 0.8


def bars(study: Study, data: DataName) -> str:
    """A table of every form of the separate loss against the bar."""
    header = (
        "features",
        "loss",
        "intra above softmax's",
        "inter below softmax's",
        f"agreement at least {AGREEMENT}",
        "accuracy not below softmax's",
        "all",
    )
    lines = []
    for kind, row in product(KINDS, SEPARATE):
        cells = judge(study.row(data, kind, row), study.row(data, kind, SOFTMAX))
        shown = [f"{figure}: {report.verdict(met)}" for figure, met in cells]
        lines.append([kind, row.title, *shown, report.verdict(all(met for _, met in cells))])
    return report.table(header, lines)


def judge(found: Sequence[Record], softmax: Sequence[Record]) -> list[tuple[str, bool]]:
    """Each part of the bar: the figure, and whether it is met.

    Means over seeds decide; accuracy is below where the whole 95 % interval is.
    """
    differences = {
        name: paired([one[name] for one in found], [one[name] for one in softmax])
        for name in ("intra", "inter", "accuracy")
    }
    agreement = sum(one["agreement"] for one in found) / len(found)
    return [
        (show_interval(differences["intra"], 3), differences["intra"].mean > 0),
        (show_interval(differences["inter"], 3), differences["inter"].mean < 0),
        (f"{agreement:.3f}", agreement >= AGREEMENT),
        (show_interval(differences["accuracy"], 2), differences["accuracy"].high >= 0),
    ]
