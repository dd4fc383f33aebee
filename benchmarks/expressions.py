"""Data sets of facial expressions as they lie on disk, with one order of classes for all.

A reader takes a folder or a file and returns its parts. Labels are mapped by name, or by the code
that the data set's owners give a name; never by the order of folders. Pictures are opened when they
are asked for, so that a data set of any size is a list of paths.
"""

import csv
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import Dataset

__all__ = [
    "BASIC",
    "COMPOUND",
    "Part",
    "Pictures",
    "affectnet",
    "ck_plus",
    "fer_2013",
    "folder",
    "raf_db",
    "raf_db_compound",
]

# In RAF-DB's order.
BASIC = ("surprise", "fear", "disgust", "happy", "sad", "anger", "neutral")
COMPOUND = (
    "happily surprised",
    "happily disgusted",
    "sadly fearful",
    "sadly angry",
    "sadly surprised",
    "sadly disgusted",
    "fearfully angry",
    "fearfully surprised",
    "angrily surprised",
    "angrily disgusted",
    "disgustedly surprised",
)
ALIASES = {
    "angry": "anger",
    "disgusted": "disgust",
    "fearful": "fear",
    "happiness": "happy",
    "sadness": "sad",
    "surprised": "surprise",
}
# What these data sets have besides, and what is left out.
LEFT_OUT = {"contempt", "none", "uncertain", "non-face", "unknown", "nf"}
AFFECTNET = (
    "neutral", "happy", "sad", "surprise", "fear", "disgust", "anger", "contempt", "none",
    "uncertain", "non-face",
)  # fmt: skip
FER_2013 = ("anger", "disgust", "fear", "happy", "sad", "surprise", "neutral")
FER_SPLITS = {"Training": "train", "PublicTest": "validation", "PrivateTest": "test"}
FER_PLUS = (
    "neutral", "happy", "surprise", "sad", "anger", "disgust", "fear", "contempt", "unknown", "NF",
)  # fmt: skip
CK_PLUS = ("neutral", "anger", "contempt", "disgust", "fear", "happy", "sad", "surprise")
SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff"}
SPLITS = {
    "train": "train", "train_set": "train", "training": "train",
    "val": "validation", "valid": "validation", "validation": "validation", "val_set": "validation",
    "valid_set": "validation", "test": "test",
}  # fmt: skip


class Part(NamedTuple):
    """Pictures that belong together, as training or test pictures do."""

    pictures: Sequence[Path | NDArray[np.uint8]]
    target: Tensor  # class indices (N,) or, from votes, probabilities (N, C)
    boxes: Sequence[tuple[int, int, int, int] | None] | None = None  # left, top, right, bottom


Parts = dict[str, Part]


class Pictures(Dataset[tuple[Tensor, Tensor]]):
    """A part as torch's data loaders take it.

    Args:
        part: what is read.
        transform: of an RGB picture, to a tensor.

    """

    def __init__(self, part: Part, transform: Callable[[Image.Image], Tensor]) -> None:
        self.part, self.transform = part, transform

    def __len__(self) -> int:
        return len(self.part.target)

    def __getitem__(self, place: int) -> tuple[Tensor, Tensor]:
        source = self.part.pictures[place]
        if isinstance(source, np.ndarray):
            picture = Image.fromarray(source)
        else:
            try:
                with Image.open(source) as opened:
                    picture = opened.convert("RGB")
            except (OSError, UnidentifiedImageError) as error:
                raise ValueError(f"{source} cannot be read as a picture: {error}") from error
        box = self.part.boxes[place] if self.part.boxes else None
        if box is not None:
            picture = picture.crop(box)
        return self.transform(picture.convert("RGB")), self.part.target[place]


def index_of(name: str, class_names: Sequence[str] = BASIC) -> int | None:
    """The place of a class by any of its names; None for what is left out."""
    plain = name.strip().lower().replace("_", " ")
    plain = ALIASES.get(plain, plain)
    if plain in LEFT_OUT:
        return None
    if plain not in class_names:
        raise ValueError(
            f"{name!r} is none of the classes {', '.join(class_names)} (or {', '.join(ALIASES)}), "
            f"nor of what is left out ({', '.join(sorted(LEFT_OUT))})"
        )
    return class_names.index(plain)


def _missing(what: str, home: Path, looked_for: Iterable[str]) -> ValueError:
    there = sorted(path.name for path in home.iterdir())[:8] if home.is_dir() else []
    found = f"it holds {', '.join(there) or 'nothing'}" if home.is_dir() else "it is no folder"
    return ValueError(f"{home} is not {what}: looked for {' or '.join(looked_for)}; {found}")


def _part(found: Iterable[tuple[Path, int | None]]) -> Part:
    """Of pictures with a class each, without those that have none."""
    kept = [(path, label) for path, label in found if label is not None]
    return Part([path for path, _ in kept], torch.tensor([label for _, label in kept]).long())


def _checked(parts: Parts, what: str, home: Path) -> Parts:
    empty = [name for name, part in parts.items() if not len(part.target)]
    if empty or not parts:
        raise ValueError(
            f"{home}: {what} has no pictures in its part {', '.join(empty) or 'train'}"
        )
    return parts


def _pictures_in(home: Path) -> list[Path]:
    return sorted(path for path in home.iterdir() if path.suffix.lower() in SUFFIXES)


def _by_code(names: Sequence[str], first: int, class_names: Sequence[str]) -> dict[str, int | None]:
    """Places by the text of a code, with leading zeros or without."""
    places = [index_of(name, class_names) for name in names]
    codes = {str(code): place for code, place in enumerate(places, first)}
    return codes | {f"{code:02}": place for code, place in enumerate(places, first)}


def _folders(home: Path, codes: Mapping[str, int | None], class_names: Sequence[str]) -> Part:
    """A folder per class, named for it or for its code."""
    found = []
    for folder_ in sorted(path for path in home.iterdir() if path.is_dir()):
        by_code = folder_.name in codes
        place = codes[folder_.name] if by_code else index_of(folder_.name, class_names)
        found += [(path, place) for path in _pictures_in(folder_)]
    return _part(found)


def _split_folders(
    home: Path, codes: Mapping[str, int | None], class_names: Sequence[str] = BASIC
) -> Parts:
    """Parts in folders of their own, each with a folder per class."""
    return {
        SPLITS[path.name.lower()]: _folders(path, codes, class_names)
        for path in sorted(home.iterdir())
        if path.is_dir() and path.name.lower() in SPLITS
    }


def raf_db(home: Path, class_names: Sequence[str] = BASIC, *, votes: bool = False) -> Parts:
    """RAF-DB: `EmoLabel/list_patition_label.txt` and `Image`, or folders.

    Args:
        home: that folder, or the one above `basic`.
        class_names: in the order of RAF-DB's codes.
        votes: takes shares of votes from `distribution_basic.txt` as the training target.

    """
    inner = home / ("basic" if class_names is BASIC else "compound")
    home = inner if inner.is_dir() else home
    listed = home / "EmoLabel" / "list_patition_label.txt"
    what = f"RAF-DB ({'basic' if class_names is BASIC else 'compound'})"
    if listed.is_file():
        parts = _raf_db_list(home, listed, class_names)
        return _with_votes(parts, listed.parent / "distribution_basic.txt") if votes else parts
    if not home.is_dir() or not any(path.name in ("train", "test") for path in home.iterdir()):
        raise _missing(what, home, ["EmoLabel/list_patition_label.txt", "train/ and test/"])
    codes = _by_code(class_names, 1, class_names)
    if class_names is BASIC and any((home / "train").glob("00")):  # a copy in AffectNet's order
        codes = _by_code(AFFECTNET[:7], 0, BASIC)
    return _checked(_split_folders(home, codes, class_names), what, home)


def raf_db_compound(home: Path) -> Parts:
    """RAF-DB's compound expressions, in the layouts of `raf_db`."""
    return raf_db(home, COMPOUND)


def _raf_db_list(home: Path, listed: Path, class_names: Sequence[str]) -> Parts:
    found: dict[str, list[tuple[Path, int | None]]] = {"train": [], "test": []}
    kinds = [("aligned", "_aligned"), ("original", "")]
    kind = next(((name, end) for name, end in kinds if (home / "Image" / name).is_dir()), None)
    if kind is None:
        raise _missing("RAF-DB", home, ["Image/aligned", "Image/original"])
    for number, line in enumerate(listed.read_text().splitlines(), 1):
        name, _, code = line.strip().partition(" ")
        side = name.split("_")[0]
        if not line.strip():
            continue
        if side not in found or not code.isdigit() or not 1 <= int(code) <= len(class_names):
            raise ValueError(
                f"{listed}, line {number}: expected train_N.jpg or test_N.jpg and a code from 1 to "
                f"{len(class_names)}, got {line!r}"
            )
        stem, _, suffix = name.rpartition(".")
        path = home / "Image" / kind[0] / f"{stem}{kind[1]}.{suffix}"
        if not path.is_file():
            raise ValueError(f"{path} is missing, which {listed}, line {number}, names")
        found[side].append((path, int(code) - 1))
    return _checked({side: _part(pairs) for side, pairs in found.items()}, "RAF-DB", home)


def _with_votes(parts: Parts, path: Path) -> Parts:
    if not path.is_file():
        raise ValueError(f"{path} is missing: RAF-DB's shares of votes are read from there")
    shares = {}
    for line in path.read_text().split("\n"):
        name, *values = line.split()[:8] or [""]
        if len(values) == len(BASIC):
            shares[name.rpartition(".")[0]] = [float(value) for value in values]
    stems = [_stem(picture).removesuffix("_aligned") for picture in parts["train"].pictures]
    unknown = [stem for stem in stems if stem not in shares]
    if unknown:
        raise ValueError(f"{path} has no seven shares for {unknown[0]}")
    target = torch.tensor([shares[stem] for stem in stems])
    return {**parts, "train": parts["train"]._replace(target=target / target.sum(1, keepdim=True))}


def _stem(picture: Path | NDArray[np.uint8]) -> str:
    return picture.stem if isinstance(picture, Path) else ""


def affectnet(home: Path) -> Parts:
    """AffectNet with seven classes: csv lists, annotations as npy, or folders."""
    lists = home / "Manually_Annotated_file_lists"
    what = "AffectNet"
    if lists.is_dir():
        parts = {
            SPLITS[name]: _affectnet_csv(home, lists / f"{name}.csv")
            for name in ("training", "validation")
        }
    else:
        sides = [path for path in sorted(home.glob("*")) if path.name.lower() in SPLITS]
        if not sides:
            looked = [
                "Manually_Annotated_file_lists/",
                "train_set/ and val_set/",
                "train/ and val/",
            ]
            raise _missing(what, home, looked)
        codes = _by_code(AFFECTNET, 0, BASIC)
        annotated = (sides[0] / "annotations").is_dir()
        parts = {
            SPLITS[side.name.lower()]: _affectnet_npy(side, codes)
            if annotated
            else _folders(side, codes, BASIC)
            for side in sides
        }
    _refuse_alphabetical(parts, home)
    return _checked(parts, what, home)


def _refuse_alphabetical(parts: Parts, home: Path) -> None:
    """Happy is by far the most frequent in training; in alphabetical copies its code is 4."""
    target = parts["train"].target if "train" in parts else torch.zeros(0)
    if len(target) and BASIC[int(target.bincount().argmax())] == "fear":
        raise ValueError(
            f"{home} has most pictures under code 4, fear, where AffectNet has them under 1, "
            "happy: this copy seems to number its classes alphabetically. Name its folders for them"
        )


def _affectnet_csv(home: Path, path: Path) -> Part:
    if not path.is_file():
        raise ValueError(f"{path} is missing")
    homes = [home / "Manually_Annotated" / "Manually_Annotated_Images", home / "Manually_Annotated"]
    pictures = next((one for one in homes if one.is_dir()), homes[-1])
    codes = _by_code(AFFECTNET, 0, BASIC)
    found, labels, boxes = [], [], []
    with path.open(newline="") as lines:
        for number, row in enumerate(csv.reader(lines), 1):
            if row and row[0] == "subDirectory_filePath":
                continue
            try:
                left, top, width, height = (int(float(value)) for value in row[1:5])
                place = codes[row[6].strip()]
            except (IndexError, KeyError, ValueError) as error:
                raise ValueError(
                    f"{path}, line {number}: expected a path, a box of four numbers, landmarks and "
                    f"a code from 0 to 10, got {','.join(row)[:80]!r}"
                ) from error
            if place is not None:
                found.append(pictures / row[0])
                labels.append(place)
                boxes.append((left, top, left + width, top + height))
    return Part(found, torch.tensor(labels).long(), boxes)


def _affectnet_npy(home: Path, codes: Mapping[str, int | None]) -> Part:
    found = []
    for path in _pictures_in(home / "images"):
        annotation = home / "annotations" / f"{path.stem}_exp.npy"
        if not annotation.is_file():
            raise ValueError(f"{annotation} is missing, beside {path}")
        code = str(int(np.load(annotation)))
        if code not in codes:
            raise ValueError(f"{annotation} holds {code}, which is no code from 0 to 10")
        found.append((path, codes[code]))
    return _part(found)


def ck_plus(home: Path) -> Parts:
    """CK+ to test on: the last frame of a labelled sequence, and its first as neutral; or CK+48."""
    emotion, images = home / "Emotion", home / "cohn-kanade-images"
    if not emotion.is_dir() or not images.is_dir():
        inner = home / "CK+48"
        return folder(inner if inner.is_dir() else home, "CK+")
    found: list[tuple[Path, int | None]] = []
    for label in sorted(emotion.glob("*/*/*_emotion.txt")):
        frames = _pictures_in(images / label.parent.relative_to(emotion))
        if not frames:
            raise ValueError(f"{images / label.parent.relative_to(emotion)} has no frames")
        code = int(float(label.read_text()))
        if not 0 <= code < len(CK_PLUS):
            raise ValueError(f"{label} holds {code}, which is no code from 0 to {len(CK_PLUS) - 1}")
        place = index_of(CK_PLUS[code])
        found += [(frames[-1], place), (frames[0], index_of("neutral"))]
    return _checked({"test": _part(found)}, "CK+", home)


def folder(home: Path, what: str = "a folder per class") -> Parts:
    """Any pictures in folders that are named for their classes, with parts above them or not."""
    if not home.is_dir():
        raise _missing(what, home, ["a folder per class"])
    parts = _split_folders(home, {}) or {"test": _folders(home, {}, BASIC)}
    return _checked(parts, what, home)


def fer_2013(path: Path, *, votes: bool = False) -> Parts:
    """FER-2013: its csv, a folder per class, or arrays (npz).

    Args:
        path: of fer2013.csv or icml_face_data.csv, of a folder, or of an npz with images, labels,
            split and class_names.
        votes: takes the votes of `fer2013new.csv` (FERPlus), which lies beside, as target.

    """
    if path.is_dir():
        return folder(path, "FER-2013")
    if not path.is_file() or path.suffix not in (".csv", ".npz"):
        raise ValueError(f"{path} is not FER-2013: expected a csv, an npz or a folder per class")
    if path.suffix == ".npz":
        images, places, splits = _fer_npz(path)
    else:
        images, places, splits = _fer_csv(path)
    target = torch.tensor([-1 if place is None else place for place in places])
    shares = _fer_plus(path.parent / "fer2013new.csv", len(splits)) if votes else None
    parts = {}
    for split in dict.fromkeys(splits):
        chosen = np.array(splits) == split
        chosen &= (shares.sum(1) > 0).numpy() if shares is not None else target.numpy() >= 0
        rows = torch.from_numpy(np.flatnonzero(chosen))
        values = target if shares is None else shares
        parts[split] = Part(list(images[rows.numpy()]), values[rows])
    return _checked(parts, "FER-2013", path)


def _fer_npz(path: Path) -> tuple[NDArray[np.uint8], list[int | None], list[str]]:
    with np.load(path) as arrays:
        missing = {"images", "labels", "split", "class_names"} - set(arrays.files)
        if missing:
            raise ValueError(f"{path} lacks {', '.join(sorted(missing))}")
        places = [index_of(name) for name in arrays["class_names"].tolist()]
        labels = [places[label] for label in arrays["labels"]]
        return arrays["images"].astype(np.uint8), labels, arrays["split"].tolist()


def _fer_csv(path: Path) -> tuple[NDArray[np.uint8], list[int | None], list[str]]:
    with path.open(newline="") as lines:
        rows = csv.DictReader(lines, skipinitialspace=True)
        missing = {"emotion", "pixels", "Usage"} - set(rows.fieldnames or ())
        if missing:
            raise ValueError(f"{path} lacks the columns {', '.join(sorted(missing))}")
        images, places, splits = [], [], []
        for row in rows:
            images.append(np.array(row["pixels"].split(), np.uint8).reshape(48, 48))
            places.append(index_of(FER_2013[int(row["emotion"])]))
            splits.append(FER_SPLITS[row["Usage"]])
    return np.stack(images), places, splits


def _fer_plus(path: Path, count: int) -> Tensor:
    """Shares of votes by FERPlus's rule, zeros for what it drops."""
    if not path.is_file():
        raise ValueError(f"{path} is missing: the votes of FERPlus are read from there")
    with path.open(newline="") as lines:
        rows = list(csv.reader(lines))[1:]
    if len(rows) != count:
        raise ValueError(f"{path} must have a line for each of {count} faces, got {len(rows)}")
    votes = torch.tensor([[float(value) for value in row[2:12]] for row in rows])
    votes[votes <= 1] = 0
    face = torch.tensor([bool(row[1].strip()) for row in rows]) & (votes.argmax(1) < 8)
    places = [index_of(name) for name in FER_PLUS]
    shares = torch.zeros(count, len(BASIC))
    for column, place in enumerate(places):
        if place is not None:
            shares[:, place] = votes[:, column]
    shares[~face] = 0
    return shares / shares.sum(1, keepdim=True).clamp(min=1e-9)


def counts(part: Part, class_names: Sequence[str] = BASIC) -> Counter[str]:
    """How many pictures each class has; of votes, by the most of them."""
    labels = part.target.argmax(1) if part.target.is_floating_point() else part.target
    return Counter(class_names[label] for label in labels.tolist())
