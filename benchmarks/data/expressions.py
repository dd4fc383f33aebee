"""Data sets of facial expressions as they lie on disk, with one order of classes for all.

A reader takes a folder or a file and returns its parts. Labels are mapped by name, or by the code
of the data set's owners, never by the order of folders. Pictures are opened when they are needed.
"""

import csv
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from benchmarks.data import faces, normalised

# In RAF-DB's order.
BASIC = ("surprise", "fear", "disgust", "happy", "sad", "anger", "neutral")
COMPOUND = (
    "happily surprised", "happily disgusted", "sadly fearful", "sadly angry", "sadly surprised",
    "sadly disgusted", "fearfully angry", "fearfully surprised", "angrily surprised",
    "angrily disgusted", "disgustedly surprised",
)  # fmt: skip
ALIASES = {
    "angry": "anger", "disgusted": "disgust", "fearful": "fear", "happiness": "happy",
    "sadness": "sad", "surprised": "surprise",
}  # fmt: skip
LEFT_OUT = {"contempt", "none", "uncertain", "non-face", "unknown", "nf"}
# In the order of their codes.
AFFECTNET = (
    "neutral", "happy", "sad", "surprise", "fear", "disgust", "anger", "contempt", "none",
    "uncertain", "non-face",
)  # fmt: skip
CK_PLUS = ("neutral", "anger", "contempt", "disgust", "fear", "happy", "sad", "surprise")
# Names of folders of a part.
SPLITS = {
    "train": "train", "train_set": "train", "training": "train",
    "val": "validation", "valid": "validation", "validation": "validation", "val_set": "validation",
    "valid_set": "validation", "test": "test",
}  # fmt: skip
SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff"}
Codes = Mapping[str, int | None]


class Part(NamedTuple):
    """Pictures that belong together, as training or test pictures do."""

    pictures: Sequence[Path | NDArray[np.uint8]]
    target: Tensor  # class indices (N,) or, from votes, probabilities (N, C)
    boxes: Sequence[tuple[int, int, int, int]] | None = None  # left, top, right, bottom

    @property
    def labels(self) -> Tensor:
        """Class indices; of votes, the most frequent."""
        return self.target.argmax(1) if self.target.is_floating_point() else self.target

    def counts(self, class_names: Sequence[str]) -> Counter[str]:
        """The number of pictures of each class."""
        return Counter(class_names[label] for label in self.labels.tolist())


Parts = dict[str, Part]


class Pictures(Dataset[tuple[Tensor, Tensor]]):
    """A part as torch's data loaders take it, in one size, normalised, a half of it mirrored."""

    def __init__(self, part: Part, size: int, *, mirror: bool) -> None:
        self.part, self.size, self.mirror = part, size, mirror

    def __len__(self) -> int:
        return len(self.part.target)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        source = self.part.pictures[index]
        try:
            opened = Image.open(source) if isinstance(source, Path) else Image.fromarray(source)
            with opened:
                picture = opened.convert("RGB")
        except OSError as error:
            raise ValueError(f"{source} cannot be read as a picture: {error}") from error
        if self.part.boxes:
            picture = picture.crop(self.part.boxes[index])
        pixels = np.array(picture.resize((self.size, self.size), Image.Resampling.BILINEAR))
        tensor = torch.from_numpy(pixels).permute(2, 0, 1) / 255
        if self.mirror and torch.rand(()) < 0.5:
            tensor = tensor.flip(-1)
        return normalised(tensor), self.part.target[index]


def index_of(name: str, class_names: Sequence[str] = BASIC) -> int | None:
    """The index of a class by any of its names; None for what is left out."""
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


def _codes(names: Sequence[str], first: int, class_names: Sequence[str] = BASIC) -> Codes:
    """Class indices by code, with leading zeros or without."""
    indices = [index_of(name, class_names) for name in names]
    codes = {f"{code}": index for code, index in enumerate(indices, first)}
    return codes | {f"{code:02}": index for code, index in enumerate(indices, first)}


def _unlike(what: str, home: Path, expected: str) -> ValueError:
    names = sorted(path.name for path in home.iterdir())[:8] if home.is_dir() else []
    found = f"it holds {', '.join(names) or 'nothing'}" if home.is_dir() else "it is no folder"
    return ValueError(f"{home} is not {what}: looked for {expected}; {found}")


def _part(found: Iterable[tuple[Path, int | None]]) -> Part:
    """A part of the pictures that have a class."""
    kept = [(path, label) for path, label in found if label is not None]
    return Part([path for path, _ in kept], torch.tensor([label for _, label in kept]).long())


def _checked(parts: Parts, what: str, home: Path) -> Parts:
    for name, part in parts.items():
        if not len(part.target):
            raise ValueError(f"{home}: {what} has no pictures in its part {name}")
    return parts


def _splits(home: Path) -> dict[str, Path]:
    """Folders of parts by the name of the part."""
    folders = [path for path in sorted(home.glob("*")) if path.is_dir()]
    return {SPLITS[path.name.lower()]: path for path in folders if path.name.lower() in SPLITS}


def _pictures_in(home: Path) -> list[Path]:
    return sorted(path for path in home.iterdir() if path.suffix.lower() in SUFFIXES)


def folder(
    home: Path,
    what: str = "a folder per class",
    codes: Codes | None = None,
    class_names: Sequence[str] = BASIC,
) -> Parts:
    """Pictures in a folder per class, named for it or its code, below folders of parts or not."""
    codes, parts = codes or {}, {}
    for split, above in (_splits(home) or {"test": home}).items():
        folders = sorted(path for path in above.glob("*") if path.is_dir())
        if not folders:
            numbers = [int(code) for code in codes]
            numbered = f", or numbered {min(numbers)} to {max(numbers)}" if numbers else ""
            expected = f"a folder of pictures per class, named {', '.join(class_names)}{numbered}"
            raise _unlike(what, above, expected)
        found: list[tuple[Path, int | None]] = []
        for path in folders:
            name = path.name
            index = codes[name] if name in codes else index_of(name, class_names)
            found += [(picture, index) for picture in _pictures_in(path)]
        parts[split] = _part(found)
    return _checked(parts, what, home)


def raf_db(home: Path, class_names: Sequence[str] = BASIC, *, votes: bool = False) -> Parts:
    """RAF-DB: `EmoLabel/list_patition_label.txt` and `Image`, or folders, or the folder above.

    `class_names` are in the order of RAF-DB's codes. `votes` takes shares of votes from
    `distribution_basic.txt` as the training target.
    """
    kind = "basic" if class_names is BASIC else "compound"
    home = home / kind if (home / kind).is_dir() else home
    what, listed = f"RAF-DB ({kind})", home / "EmoLabel" / "list_patition_label.txt"
    if listed.is_file():
        parts = _checked(_raf_db_list(home, listed, class_names), what, home)
        return _with_votes(parts, listed.with_name("distribution_basic.txt")) if votes else parts
    if not (home / "train").is_dir() and not (home / "test").is_dir():
        expected = "EmoLabel/list_patition_label.txt, or train/ and test/ with a folder per class"
        raise _unlike(what, home, expected)
    codes = _codes(class_names, 1, class_names)
    if class_names is BASIC and (home / "train" / "00").is_dir():  # a copy in AffectNet's order
        codes = _codes(AFFECTNET[:7], 0)
    return folder(home, what, codes, class_names)


def _raf_db_list(home: Path, listed: Path, class_names: Sequence[str]) -> Parts:
    end = "_aligned" if (home / "Image" / "aligned").is_dir() else ""
    images = home / "Image" / ("aligned" if end else "original")
    found: dict[str, list[tuple[Path, int | None]]] = {"train": [], "test": []}
    for number, line in enumerate(listed.read_text().strip().splitlines(), 1):
        match = re.fullmatch(r"((train|test)_\w+)(\.\w+) (\d+)\s*", line)
        if match is None or not 1 <= int(match[4]) <= len(class_names):
            raise ValueError(
                f"{listed}, line {number}: expected train_N.jpg or test_N.jpg and a code from 1 to "
                f"{len(class_names)}, got {line!r}"
            )
        path = images / f"{match[1]}{end}{match[3]}"
        if not path.is_file():
            raise ValueError(f"{path} is missing, which {listed}, line {number}, names")
        found[match[2]].append((path, int(match[4]) - 1))
    return {split: _part(pairs) for split, pairs in found.items()}


def _with_votes(parts: Parts, path: Path) -> Parts:
    lines = [line.split() for line in path.read_text().splitlines()]
    shares = {Path(line[0]).stem: [*map(float, line[1:8])] for line in lines if len(line) >= 8}
    training = parts["train"]
    stems = [Path(str(picture)).stem.removesuffix("_aligned") for picture in training.pictures]
    unknown = [stem for stem in stems if stem not in shares]
    if unknown:
        raise ValueError(f"{path} has no seven shares for {unknown[0]}")
    target = torch.tensor([shares[stem] for stem in stems])
    return parts | {"train": training._replace(target=target / target.sum(1, keepdim=True))}


def affectnet(home: Path) -> Parts:
    """AffectNet with seven classes: csv lists, annotations as npy, or folders."""
    lists, codes = home / "Manually_Annotated_file_lists", _codes(AFFECTNET, 0)
    splits = _splits(home)
    if lists.is_dir():
        names = {"train": "training", "validation": "validation"}
        parts = {
            split: _affectnet_csv(home, lists / f"{name}.csv", codes)
            for split, name in names.items()
        }
    elif not splits:
        expected = "Manually_Annotated_file_lists/, train_set/ and val_set/, or train/ and val/"
        raise _unlike("AffectNet", home, expected)
    elif all((path / "annotations").is_dir() for path in splits.values()):
        parts = {split: _affectnet_npy(path, codes) for split, path in splits.items()}
    else:
        parts = folder(home, "AffectNet", codes)
    # Happy is by far the most frequent in training; in alphabetical copies its code is 4.
    if "train" in parts and parts["train"].counts(BASIC).most_common(1)[0][0] == "fear":
        raise ValueError(
            f"{home} has most pictures under code 4, fear, where AffectNet has them under 1, "
            "happy: this copy seems to number its classes alphabetically. Name its folders for them"
        )
    return _checked(parts, "AffectNet", home)


def _affectnet_csv(home: Path, path: Path, codes: Codes) -> Part:
    pictures = home / "Manually_Annotated"
    if (pictures / "Manually_Annotated_Images").is_dir():
        pictures = pictures / "Manually_Annotated_Images"
    found, labels, boxes = [], [], []
    with path.open(newline="") as lines:
        for number, row in enumerate(csv.reader(lines), 1):
            if row and row[0] == "subDirectory_filePath":
                continue
            try:
                left, top, width, height = (int(float(value)) for value in row[1:5])
                index = codes[row[6].strip()]
            except (IndexError, KeyError, ValueError) as error:
                raise ValueError(
                    f"{path}, line {number}: expected a path, a box of four numbers, landmarks and "
                    f"a code from 0 to 10, got {','.join(row)[:80]!r}"
                ) from error
            if index is not None:
                found.append(pictures / row[0])
                labels.append(index)
                boxes.append((left, top, left + width, top + height))
    return Part(found, torch.tensor(labels).long(), boxes)


def _affectnet_npy(home: Path, codes: Codes) -> Part:
    found = []
    for path in _pictures_in(home / "images"):
        annotation = home / "annotations" / f"{path.stem}_exp.npy"
        code = str(int(np.load(annotation)))
        if code not in codes:
            raise ValueError(f"{annotation} holds {code}, which is no code from 0 to 10")
        found.append((path, codes[code]))
    return _part(found)


def ck_plus(home: Path) -> Parts:
    """CK+ to test on: the last frame of a labelled sequence, and its first as neutral; or CK+48."""
    emotion, images = home / "Emotion", home / "cohn-kanade-images"
    if not emotion.is_dir() or not images.is_dir():
        return folder(home / "CK+48" if (home / "CK+48").is_dir() else home, "CK+")
    codes, found = _codes(CK_PLUS, 0), []
    for label in sorted(emotion.glob("*/*/*_emotion.txt")):
        sequence = images / label.parent.relative_to(emotion)
        frames, code = _pictures_in(sequence), f"{float(label.read_text()):g}"
        if not frames or code not in codes:
            raise ValueError(f"{label} holds {code}, and {sequence} {len(frames)} frames")
        found += [(frames[-1], codes[code]), (frames[0], index_of("neutral"))]
    return _checked({"test": _part(found)}, "CK+", home)


def fer_2013(path: Path) -> Parts:
    """FER-2013 as a folder per class, or as `faces.load` reads it."""
    if path.is_dir():
        files = [str(file) for file in sorted(path.glob("*.*")) if file.suffix in faces.SUFFIXES]
        if files and not any(file.is_dir() for file in path.iterdir()):
            raise ValueError(f"{path} is a folder: give the file of FER-2013, {' or '.join(files)}")
        return folder(path, "FER-2013")
    found = faces.load(path)
    indices = [index_of(name) for name in found.class_names]
    target = np.array([-1 if index is None else index for index in indices])[found.labels]
    parts = {}
    for split in dict.fromkeys(found.split.tolist()):
        rows = np.flatnonzero((found.split == split) & (target >= 0))
        parts[split] = Part(list(found.images[rows]), torch.from_numpy(target[rows]))
    return _checked(parts, "FER-2013", path)
