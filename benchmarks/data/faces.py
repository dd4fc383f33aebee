"""FER-2013: faces of 48 x 48 pixels with one of seven expressions."""

import csv
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

SIZE = 48
SUFFIXES = (".npz", ".csv")
CSV_CLASSES = ("angry", "disgust", "fear", "happy", "sad", "surprise", "neutral")
CSV_SPLITS = {"Training": "train", "PublicTest": "validation", "PrivateTest": "test"}
LAYOUTS = (
    "expected fer2013.csv of Kaggle's challenge, or an npz with images (N, 48, 48) uint8, labels "
    "(N,), split (N,) and class_names (C,)"
)


class Faces(NamedTuple):
    images: NDArray[np.uint8]  # (N, 48, 48)
    labels: NDArray[np.int64]  # (N,)
    split: NDArray[np.str_]  # (N,), "train", "validation" or "test"
    class_names: list[str]  # in the order of the file


def load(path: Path) -> Faces:
    """Reads FER-2013 from a csv or an npz, and refuses anything else with a ValueError."""
    if path.suffix not in SUFFIXES:
        raise ValueError(f"{path} is not FER-2013: {LAYOUTS}")
    faces = (_load_npz if path.suffix == ".npz" else _load_csv)(path)
    count, labels = len(faces.labels), set(faces.labels.tolist())
    if faces.images.shape != (count, SIZE, SIZE) or faces.split.shape != (count,):
        raise ValueError(f"{path}: images {faces.images.shape} do not fit {count} labels")
    if not labels or not labels <= set(range(len(faces.class_names))):
        raise ValueError(f"{path} must hold labels in [0, {len(faces.class_names)})")
    return faces


def _load_npz(path: Path) -> Faces:
    with np.load(path) as arrays:
        missing = {"images", "labels", "split", "class_names"} - set(arrays.files)
        if missing:
            raise ValueError(f"{path} lacks {', '.join(sorted(missing))}: {LAYOUTS}")
        images, labels = arrays["images"].astype(np.uint8), arrays["labels"].astype(np.int64)
        split = arrays["split"].astype(np.str_)
        return Faces(images, labels, split, arrays["class_names"].tolist())


def _load_csv(path: Path) -> Faces:
    with path.open(newline="") as lines:
        rows = csv.DictReader(lines, skipinitialspace=True)
        missing = {"emotion", "pixels", "Usage"} - set(rows.fieldnames or ())
        found = [] if missing else list(rows)
    if not found:
        raise ValueError(f"{path} lacks {', '.join(sorted(missing)) or 'rows'}: {LAYOUTS}")
    images = np.stack([np.array(row["pixels"].split(), np.uint8) for row in found])
    labels = np.array([int(row["emotion"]) for row in found], np.int64)
    split = np.array([CSV_SPLITS[row["Usage"]] for row in found], np.str_)
    return Faces(images.reshape(-1, SIZE, SIZE), labels, split, list(CSV_CLASSES))
