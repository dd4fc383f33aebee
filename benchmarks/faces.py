"""FER-2013: faces with one of seven expressions, read from where a person has put them."""

import csv
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

from benchmarks.samples import FeatureKind, Split

SIZE = 48
CSV_CLASSES = ("angry", "disgust", "fear", "happy", "sad", "surprise", "neutral")
CSV_SPLITS = {"Training": "train", "PublicTest": "validation", "PrivateTest": "test"}
PICTURES = {".png", ".jpg", ".jpeg"}
HOW_TO_GET = (
    "FER-2013 (Goodfellow et al., 2013) is free for research: fer2013.csv comes with Kaggle's "
    '"Challenges in Representation Learning: Facial Expression Recognition Challenge", and copies '
    "of it come as a folder of pictures per class. --data takes that csv, such a folder (or one of "
    "train/, validation/ and test/ with a folder per class in each), or an npz with images "
    "(N, 48, 48) uint8, labels (N,), split (N,) and class_names (C,)"
)


class Faces(NamedTuple):
    images: NDArray[np.uint8]  # (N, 48, 48)
    labels: NDArray[np.int64]  # (N,)
    split: NDArray[np.str_]  # (N,), "train", "validation" or "test"
    class_names: list[str]


class Parts(NamedTuple):
    """What is trained on, what losses' weights are tuned on, what is reported."""

    training: Split
    tuning: Split
    test: Split
    class_names: list[str]


def load(path: Path) -> Faces:
    """Reads FER-2013 from an npz, the csv of the original, or a folder per class.

    Raises:
        FileNotFoundError: nothing is there.
        ValueError: what is there is not such data.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing. {HOW_TO_GET}")
    if path.is_dir():
        faces = _from_folder(path)
    elif path.suffix == ".npz":
        faces = _from_npz(path)
    elif path.suffix == ".csv":
        faces = _from_csv(path)
    else:
        raise ValueError(f"{path} is neither a folder nor .npz nor .csv. {HOW_TO_GET}")
    shapes = faces.images.shape, faces.labels.shape, faces.split.shape
    count = len(faces.labels)
    if shapes != ((count, SIZE, SIZE), (count,), (count,)):
        raise ValueError(f"{path}: shapes of images, labels and split do not fit: {shapes}")
    classes = len(faces.class_names)
    if count == 0 or faces.labels.min() < 0 or faces.labels.max() >= classes:
        raise ValueError(f"{path} must hold labels in [0, {classes})")
    return faces


def _from_npz(path: Path) -> Faces:
    with np.load(path) as arrays:
        missing = {"images", "labels", "split", "class_names"} - set(arrays.files)
        if missing:
            raise ValueError(f"{path} lacks {', '.join(sorted(missing))}. {HOW_TO_GET}")
        return Faces(
            arrays["images"].astype(np.uint8),
            arrays["labels"].astype(np.int64),
            arrays["split"].astype(np.str_),
            arrays["class_names"].tolist(),
        )


def _from_csv(path: Path) -> Faces:
    with path.open(newline="") as lines:
        rows = csv.DictReader(lines)
        missing = {"emotion", "pixels", "Usage"} - set(rows.fieldnames or ())
        if missing:
            raise ValueError(f"{path} lacks the columns {', '.join(sorted(missing))}. {HOW_TO_GET}")
        found = [
            (np.array(row["pixels"].split(), np.uint8), int(row["emotion"]), row["Usage"])
            for row in rows
        ]
    images, labels, usage = zip(*found, strict=True) if found else ((), (), ())
    return Faces(
        np.stack(images).reshape(-1, SIZE, SIZE) if found else np.empty((0, SIZE, SIZE), np.uint8),
        np.array(labels, np.int64),
        np.array([CSV_SPLITS[use] for use in usage], np.str_),
        list(CSV_CLASSES),
    )


def _from_folder(path: Path) -> Faces:
    homes = {split: path / split for split in ("train", "validation", "test")}
    homes = {split: home for split, home in homes.items() if home.is_dir()} or {"": path}
    class_names = sorted({f.name for home in homes.values() for f in home.iterdir() if f.is_dir()})
    found = [
        (picture, label, split)
        for split, home in homes.items()
        for label, name in enumerate(class_names)
        for picture in sorted((home / name).glob("*"))
        if picture.suffix.lower() in PICTURES
    ]
    if not found:
        raise ValueError(f"{path} has no pictures in a folder per class. {HOW_TO_GET}")
    images = [_picture(picture) for picture, _, _ in found]
    labels = np.array([label for _, label, _ in found], np.int64)
    split = np.array([split or "train" for _, _, split in found], dtype="<U10")
    if "" in homes:
        _, held_out = _divide(np.arange(len(labels)), labels, 0.2)
        split[held_out] = "validation"
    return Faces(np.stack(images), labels, split, class_names)


def _picture(path: Path) -> NDArray[np.uint8]:
    with Image.open(path) as picture:
        return np.asarray(picture.convert("L").resize((SIZE, SIZE), Image.Resampling.BILINEAR))


def parts(faces: Faces, most: int) -> Parts:
    """Divides the faces, with at most `most` to train on; always in the same way.

    Weights are tuned on the validation split where there is a test split to report, and otherwise
    on a fifth of the train split, held out, while the validation split is reported.
    """
    index = {name: np.flatnonzero(faces.split == name) for name in ("train", "validation", "test")}
    train, reported = index["train"], index["test"] if len(index["test"]) else index["validation"]
    if not len(train) or not len(reported):
        raise ValueError("the data need a train split, and one called validation or test")
    if len(index["test"]) and len(index["validation"]):
        tuning = index["validation"]
    else:
        train, tuning = _divide(train, faces.labels, 0.2)
    if len(train) > most:
        train, _ = _divide(train, faces.labels, 1 - most / len(train))
    return Parts(
        training=_split(faces, train),
        tuning=_split(faces, tuning),
        test=_split(faces, reported),
        class_names=faces.class_names,
    )


def _divide(
    index: NDArray[np.int64], labels: NDArray[np.int64], share: float
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    first, second = train_test_split(index, test_size=share, random_state=0, stratify=labels[index])
    return first, second


def _split(faces: Faces, index: NDArray[np.int64]) -> Split:
    images = torch.tensor(faces.images[index], dtype=torch.float32).unsqueeze(1)
    return Split((images - 128) / 64, torch.tensor(faces.labels[index]))


def mirrored(images: Tensor, generator: torch.Generator) -> Tensor:
    """Half of the faces, drawn anew each time, left to right."""
    chosen = torch.rand(len(images), 1, 1, 1, generator=generator) < 0.5
    return torch.where(chosen.to(images.device), images.flip(-1), images)


class FaceClassifier(nn.Module):
    """Three convolutions with batch normalisation on faces at half their size, small for a CPU.

    Features are signed (average pooling, then a linear embedding) or non-negative (a convolution
    of one pixel, ReLU, then average pooling, as in the paper's ResNet); a neck puts BatchNorm1d
    behind those.
    """

    def __init__(self, kind: FeatureKind, feature_dim: int, num_classes: int) -> None:
        super().__init__()
        widths = (1, 16, 32, 64)
        layers: list[nn.Module] = [nn.AvgPool2d(2)]
        for inputs, outputs in pairwise(widths):
            convolution = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
            layers += [convolution, nn.BatchNorm2d(outputs), nn.MaxPool2d(2), nn.ReLU()]
        pool = [nn.AdaptiveAvgPool2d(1), nn.Flatten()]
        if kind == "signed":
            layers += [*pool, nn.Linear(widths[-1], feature_dim)]
        else:
            pixelwise = nn.Conv2d(widths[-1], feature_dim, 1, bias=False)
            layers += [pixelwise, nn.BatchNorm2d(feature_dim), nn.ReLU(), *pool]
        if kind == "neck":
            layers.append(nn.BatchNorm1d(feature_dim))
        self.extractor = nn.Sequential(*layers)
        self.classifier: nn.Module = nn.Linear(feature_dim, num_classes)
        nn.utils.convert_conv2d_weight_memory_format(self, torch.channels_last)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        features = self.extractor(images)
        return features, self.classifier(features)
