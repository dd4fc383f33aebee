"""FER-2013 and FERPlus: faces of 48 x 48 pixels in a csv file, and votes in another beside it."""

import csv
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from benchmarks.data.expressions import Part, Parts, folder, index_of

CLASSES = ("angry", "disgust", "fear", "happy", "sad", "surprise", "neutral")
SPLITS = {"Training": "train", "PublicTest": "validation", "PrivateTest": "test"}
# Columns of votes: those of the classes, in RAF-DB's order, come first.
VOTES = (
    "surprise", "fear", "disgust", "happiness", "sadness", "anger", "neutral", "contempt",
    "unknown", "NF",
)  # fmt: skip


def fer_2013(path: Path) -> Parts:
    """FER-2013 from fer2013.csv or icml_face_data.csv, or from a folder per class."""
    if path.is_dir():
        files = [str(file) for file in sorted(path.glob("*.csv"))]
        if files and not any(file.is_dir() for file in path.iterdir()):
            raise ValueError(f"{path} is a folder: give the file of FER-2013, {' or '.join(files)}")
        return folder(path, "FER-2013")
    rows = _rows(path, ("emotion", "pixels", "Usage"))
    target = [index_of(CLASSES[int(row["emotion"])]) for row in rows]
    return _parts(rows, torch.tensor(target))


def ferplus(path: Path) -> Parts:
    """FERPlus from fer2013.csv and fer2013new.csv beside it: shares of votes to train on.

    By the rule of its authors, single votes do not count, and a face whose most frequent vote is
    none of the classes is left out. The other parts have the most frequent class as their label.
    """
    beside = path.with_name("fer2013new.csv")
    rows, voted = _rows(path, ("pixels", "Usage")), _rows(beside, ("Usage", "Image name", *VOTES))
    if [row["Usage"] for row in rows] != [row["Usage"] for row in voted]:
        raise ValueError(f"{beside} must have the rows of {path}: their Usage differs")
    votes = torch.tensor([[float(row[name]) for name in VOTES] for row in voted])
    votes[votes <= 1] = 0
    shares, most = votes[:, : len(CLASSES)], votes.amax(1)
    named = torch.tensor([bool(row["Image name"]) for row in voted])
    kept = (named & (most > 0) & (shares.amax(1) == most)).nonzero().flatten()
    shares = shares[kept] / shares[kept].sum(1, keepdim=True)
    parts = _parts([rows[index] for index in kept], shares)
    return {
        name: part if name == "train" else part._replace(target=part.labels)
        for name, part in parts.items()
    }


def _rows(path: Path, columns: Sequence[str]) -> list[dict[str, str]]:
    """The rows of a csv file that has these columns; else a ValueError."""
    if path.suffix != ".csv":
        raise ValueError(f"{path} is not FER-2013: expected fer2013.csv of Kaggle's challenge")
    with path.open(newline="") as lines:
        reader = csv.DictReader(lines, skipinitialspace=True)
        missing = [name for name in columns if name not in (reader.fieldnames or ())]
        rows = [] if missing else list(reader)
    if not rows:
        raise ValueError(f"{path} lacks {', '.join(missing) or 'rows'}: expected {columns}")
    return rows


def _parts(rows: Sequence[dict[str, str]], target: torch.Tensor) -> Parts:
    parts = {}
    splits = np.array([SPLITS[row["Usage"]] for row in rows])
    faces = [np.array(row["pixels"].split(), np.uint8).reshape(48, 48) for row in rows]
    for split in dict.fromkeys(splits.tolist()):
        chosen = np.flatnonzero(splits == split)
        parts[split] = Part([faces[index] for index in chosen], target[chosen])
    return parts
