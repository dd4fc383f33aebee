"""Which data sets a person brought, and the paper's settings for those that are trained on."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from benchmarks import expressions
from benchmarks.expressions import BASIC, COMPOUND, Part

__all__ = ["ACROSS", "TRAINED", "TrainingSet", "add_options", "tested", "trained"]


class TrainingSet(NamedTuple):
    """What is trained on, and the part that is reported; the paper's schedule for it."""

    name: str
    training: Part
    reported: Part
    class_names: Sequence[str]
    epochs: int
    drop_every: int  # epochs after which the rate is divided by 10


# Titles, the paper's epochs and drops, and its accuracies with softmax loss and with both.
TRAINED = {
    "raf_db": ("RAF-DB basic", 60, 20, (85.66, 86.38)),
    "raf_db_compound": ("RAF-DB compound", 60, 20, (56.94, 58.84)),
    "affectnet": ("AffectNet", 20, 5, (58.37, 58.89)),
}
# Accuracy on data sets that were not trained on, by what was.
ACROSS = {
    ("AffectNet", "CK+"): 82.04,
    ("AffectNet", "MMI"): 71.39,
    ("RAF-DB basic", "CK+"): 81.38,
    ("RAF-DB basic", "MMI"): 69.71,
}


def add_options(parser: argparse.ArgumentParser) -> None:
    """Where the data are: at least one set to train on, and any others to test on."""
    for name, (title, *_) in TRAINED.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=Path, help=f"{title}, to train on")
    parser.add_argument("--votes", action="store_true", help="train on RAF-DB's shares of votes")
    parser.add_argument("--ck-plus", type=Path, help="CK+ or CK+48, to test on")
    parser.add_argument("--mmi", type=Path, help="MMI as a folder per class, to test on")
    parser.add_argument("--fer-2013", type=Path, help="csv, npz or folders, to test on")
    parser.add_argument(
        "--folder", nargs="+", default=[], metavar="NAME=DIR", help="a folder per class, to test on"
    )


def trained(options: argparse.Namespace) -> list[TrainingSet]:
    """The sets to train on.

    Raises:
        ValueError: none, or one that is not what it should be.

    """
    readers = {
        "raf_db": lambda home: expressions.raf_db(home, votes=options.votes),
        "raf_db_compound": expressions.raf_db_compound,
        "affectnet": expressions.affectnet,
    }
    found = []
    for name, (title, epochs, drop_every, _) in TRAINED.items():
        home = getattr(options, name)
        if home is None:
            continue
        parts = readers[name](home)
        reported = parts.get("test") or parts.get("validation")
        if "train" not in parts or reported is None:
            raise ValueError(f"{home}: {title} needs a part to train on and one to test on")
        names = COMPOUND if name == "raf_db_compound" else BASIC
        found.append(TrainingSet(title, parts["train"], reported, names, epochs, drop_every))
    if not found:
        given = ", ".join(f"--{name.replace('_', '-')}" for name in TRAINED)
        raise ValueError(f"there is nothing to train on: give one of {given}")
    return found


def tested(options: argparse.Namespace) -> dict[str, Part]:
    """The sets of basic expressions that are only tested on."""
    found = {}
    if options.ck_plus is not None:
        found["CK+"] = expressions.ck_plus(options.ck_plus)["test"]
    if options.mmi is not None:
        found["MMI"] = _last(expressions.folder(options.mmi, "MMI"))
    if options.fer_2013 is not None:
        found["FER-2013"] = _last(expressions.fer_2013(options.fer_2013))
    for given in options.folder:
        name, is_there, home = given.partition("=")
        if not is_there:
            raise ValueError(f"--folder must be NAME=DIR, got {given!r}")
        found[name] = _last(expressions.folder(Path(home), name))
    return found


def _last(parts: expressions.Parts) -> Part:
    return parts.get("test") or parts.get("validation") or parts["train"]
