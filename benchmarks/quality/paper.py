"""The paper's figures beside those measured here."""

from collections.abc import Sequence
from itertools import product
from statistics import fmean

from benchmarks import report
from benchmarks.quality.settings import BATCH_SIZE, FEATURE_DIM, KINDS
from benchmarks.quality.statistics import show_spread
from benchmarks.quality.study import DEFAULTS, SEPARATE, SLOW, SOFTMAX, Record, Study

# RAF-DB, basic expressions: accuracy of the section on accuracy, cosines of its Table 1, and the
# mean of the agreements that it gives for seven classes.
ACCURACY = ("85.66", "86.38")
INTRA = ("0.92", "0.94")
INTER = ("0.89", "0.75")
FIRST_AGREEMENT = "0.48 to 0.78 (by class)"
LAST_AGREEMENTS = {
    "neutral": 0.99,
    "happy": 1.00,
    "sad": 0.99,
    "surprise": 0.96,
    "fear": 0.66,
    "angry": 0.91,
    "disgust": 0.86,
}


def compare(study: Study) -> str:
    """Figures, agreement by class, then what differs."""
    return "\n\n".join(
        (
            _figures(study),
            "Agreement of each class:",
            _agreements(study),
            "What differs:",
            _differences(study),
        )
    )


def _figures(study: Study) -> str:
    places = [(kind, row) for kind in KINDS for row in (SOFTMAX, SLOW, DEFAULTS)]
    header = ["figure", "paper: softmax", "paper: + separate"]
    header += [f"{kind}: {row.title}" for kind, row in places]
    runs = [study.row("faces", kind, row) for kind, row in places]
    agreement = f"{fmean(LAST_AGREEMENTS.values()):.2f}"
    worst = f"{min(LAST_AGREEMENTS.values()):.2f}"

    def line(title: str, printed: Sequence[str], name: str, digits: int) -> list[str]:
        cells = [show_spread([one[name] for one in found], digits) for found in runs]
        return [title, *printed, *cells]

    return report.table(
        header,
        [
            line("accuracy, %", ACCURACY, "accuracy", 2),
            line("intra-class similarity", INTRA, "intra", 2),
            line("inter-class similarity, true means", (INTER[0], "?"), "inter", 2),
            line("inter-class similarity, learned centers", ("-", INTER[1]), "inter_learned", 2),
            ["agreement, first epoch", "-", FIRST_AGREEMENT, *map(_first, runs)],
            line("agreement, last epoch", ("-", agreement), "agreement", 2),
            line("agreement, worst class", ("-", worst), "agreement_lowest", 2),
        ],
    )


def _agreements(study: Study) -> str:
    names = study.class_names["faces"]
    header = ["features", "loss", *names]
    lines = [["paper", "", *(str(LAST_AGREEMENTS.get(name, "-")) for name in names)]]
    for kind, row in product(KINDS, SEPARATE):
        by_class = zip(*(one["agreements"] for one in study.row("faces", kind, row)), strict=True)
        lines.append([kind, row.title, *(show_spread(each, 2) for each in by_class)])
    return report.table(header, lines)


def _first(found: Sequence[Record]) -> str:
    return show_spread([one["course"]["agreement"][0] for one in found], 2)


def _differences(study: Study) -> str:
    faces, epochs = study.scale.faces, study.scale.epochs["faces"]
    rate = ", ".join(f"{study.rates['faces', kind]:g} ({kind})" for kind in KINDS)
    return report.table(
        ("", "paper", "here"),
        [
            ("network", "ResNet-18 from ImageNet weights", "3 or 4 convolutions from scratch"),
            ("data", "RAF-DB, 7 basic expressions", f"FER-2013, 7, at most {faces} trained on"),
            ("pixels", "colour faces, far larger", "48 x 48 grey, halved by the first layer"),
            ("features", "512, after ReLU and pooling", f"{FEATURE_DIM['faces']}, of two kinds"),
            ("batch size", "100", str(BATCH_SIZE["faces"])),
            ("optimizer", "SGD, 0.01, divided by 10 each 20 epochs", f"AdamW, one cycle, {rate}"),
            ("epochs", "60", str(epochs)),
            ("seeds", "not said", str(study.scale.seeds["faces"])),
            ("centers' start and rate", "not said", "as in the columns; defaults: docs/centers.md"),
            ("inter-class similarity", "of true or learned centers: not said", "both"),
        ],
    )
