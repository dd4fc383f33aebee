"""Data sets of facial expressions as they lie on disk, with one order of classes for all.

A reader takes a folder or a file and returns its parts. Labels are mapped by name, or by the code
of the data set's owners, never by the order of folders. Pictures are opened when they are needed.
"""

import csv
import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import repeat
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from benchmarks.data import normalised

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
SPLITS = dict.fromkeys(("train", "train_set", "training"), "train") | {"test": "test"}
SPLITS |= dict.fromkeys(("val", "valid", "validation", "val_set", "valid_set"), "validation")
SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp"}
Codes = Mapping[int, int | None]
Box = tuple[int, int, int, int]  # left, top, right, bottom
Labelled = tuple[Path, int | None, Box | None]  # a picture, its class and its face


class Part(NamedTuple):
    """Pictures that belong together, as training or test pictures do."""

    pictures: Sequence[Path | NDArray[np.uint8]]
    target: Tensor  # class indices (N,) or, from votes, probabilities (N, C)
    boxes: Sequence[Box | None] | None = None

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


def count_identical(part: Part, other: Part) -> int:
    """How many pictures of a part are in another as well, byte by byte and with the same box."""
    sizes = {*map(_size, part.pictures)}  # of the other part, only these are read
    found = {*_contents(other, sizes)}
    return sum(one in found for one in _contents(part, sizes))


def _size(picture: Path | NDArray[np.uint8]) -> int:
    return picture.stat().st_size if isinstance(picture, Path) else picture.nbytes


def _contents(part: Part, sizes: set[int]) -> Iterator[tuple[bytes, Box | None]]:
    for picture, box in zip(part.pictures, part.boxes or repeat(None), strict=False):
        if _size(picture) in sizes:
            content = picture.read_bytes() if isinstance(picture, Path) else picture.tobytes()
            yield hashlib.sha256(content).digest(), box


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
    """Class indices by code."""
    return {code: index_of(name, class_names) for code, name in enumerate(names, first)}


def _unlike(what: str, home: Path, expected: str) -> ValueError:
    names = sorted(path.name for path in home.iterdir())[:8] if home.is_dir() else []
    found = f"it holds {', '.join(names) or 'nothing'}" if home.is_dir() else "it is no folder"
    return ValueError(f"{home} is not {what}: looked for {expected}; {found}")


def _parts(found: Mapping[str, Iterable[Labelled]], what: str, home: Path) -> Parts:
    """Parts of the pictures that have a class, by name."""
    parts = {}
    for split, labelled in found.items():
        kept = [one for one in labelled if one[1] is not None]
        if not kept:
            raise ValueError(f"{home}: {what} has no pictures in its part {split}")
        paths, labels, boxes = zip(*kept, strict=True)
        parts[split] = Part([*paths], torch.tensor(labels), [*boxes])
    return parts


def _splits(home: Path) -> dict[str, Path]:
    """Folders of parts by the name of the part."""
    folders = {path.name.lower(): path for path in sorted(home.glob("*")) if path.is_dir()}
    return {SPLITS[name]: path for name, path in folders.items() if name in SPLITS}


def _pictures_in(home: Path) -> list[Path]:
    return sorted(path for path in home.iterdir() if path.suffix.lower() in SUFFIXES)


def folder(
    home: Path,
    what: str = "a folder per class",
    codes: Codes | None = None,
    class_names: Sequence[str] = BASIC,
) -> Parts:
    """Pictures in a folder per class, named for it or its code, below folders of parts or not."""
    codes = codes or {}
    found: dict[str, list[Labelled]] = {}
    for split, above in (_splits(home) or {"test": home}).items():
        folders = sorted(path for path in above.glob("*") if path.is_dir())
        if not folders:
            numbered = f", or numbered {min(codes)} to {max(codes)}" if codes else ""
            expected = f"a folder of pictures per class, named {', '.join(class_names)}{numbered}"
            raise _unlike(what, above, expected)
        found[split] = []
        for path in folders:
            name, coded = path.name, path.name.isdigit() and int(path.name) in codes
            index = codes[int(name)] if coded else index_of(name, class_names)
            found[split] += [(picture, index, None) for picture in _pictures_in(path)]
    return _parts(found, what, home)


def raf_db(home: Path, class_names: Sequence[str] = BASIC) -> Parts:
    """RAF-DB: `EmoLabel/list_patition_label.txt` and `Image`, or folders, or the folder above.

    `class_names` are in the order of RAF-DB's codes.
    """
    kind = "basic" if class_names is BASIC else "compound"
    home = home / kind if (home / kind).is_dir() else home
    what, listed = f"RAF-DB ({kind})", home / "EmoLabel" / "list_patition_label.txt"
    if listed.is_file():
        return _parts(_raf_db_list(home, listed, len(class_names)), what, home)
    if not {"train", "test"} & {*_splits(home)}:
        expected = "EmoLabel/list_patition_label.txt, or train/ and test/ with a folder per class"
        raise _unlike(what, home, expected)
    codes = _codes(class_names, 1, class_names)
    if class_names is BASIC and (home / "train" / "00").is_dir():  # a copy in AffectNet's order
        codes = _codes(AFFECTNET[:7], 0)
    return folder(home, what, codes, class_names)


def _raf_db_list(home: Path, listed: Path, classes: int) -> dict[str, list[Labelled]]:
    end = "_aligned" if (home / "Image" / "aligned").is_dir() else ""
    images = home / "Image" / (end.removeprefix("_") or "original")
    found: dict[str, list[Labelled]] = {"train": [], "test": []}
    for number, line in enumerate(listed.read_text().strip().splitlines(), 1):
        match = re.fullmatch(r"((train|test)_\w+)(\.\w+) (\d+)\s*", line)
        if match is None or not 1 <= int(match[4]) <= classes:
            raise ValueError(
                f"{listed}, line {number}: expected train_N.jpg or test_N.jpg and a code from 1 to "
                f"{classes}, got {line!r}"
            )
        path = images / f"{match[1]}{end}{match[3]}"
        found[match[2]].append((path, int(match[4]) - 1, None))
    return found


def affectnet(home: Path, order: Sequence[str] | None = None) -> Parts:
    """AffectNet with seven classes: csv lists, annotations as npy, or folders.

    `order` names the classes of numbers 0, 1 and so on; by default it is the owners'. Some copies
    are numbered alphabetically: numbers that do not show their order are refused without `order`.
    """
    what, codes, splits = "AffectNet", _codes(order or AFFECTNET, 0), _splits(home)
    lists = home / "Manually_Annotated_file_lists"
    if lists.is_dir():
        names = {"train": "training.csv", "validation": "validation.csv"}
        listed = {split: _affectnet_csv(home, lists / name, codes) for split, name in names.items()}
        return _parts(listed, what, home)
    if not splits:
        expected = "Manually_Annotated_file_lists/, train_set/ and val_set/, or train/ and val/"
        raise _unlike(what, home, expected)
    numbered = all((path / "annotations").is_dir() for path in splits.values())
    if numbered:
        annotated = {split: _affectnet_npy(path, codes) for split, path in splits.items()}
        parts = _parts(annotated, what, home)
    else:
        parts = folder(home, what, codes)
        numbered = any(path.name.isdigit() for path in home.glob("*/*"))
    if numbered and order is None and "train" in parts:
        counts = parts["train"].counts(BASIC)
        happy = counts.pop("happy", 0)
        if happy < 1.25 * max(counts.values(), default=0):  # its owners' copy: 1.8 times
            own, alphabetical = AFFECTNET[:8], sorted(AFFECTNET[:8])
            raise ValueError(
                f"{home} numbers its classes, and number 1, happy in the owners' order, is not the "
                "most frequent by far. Name the folders, or say the order of the numbers: "
                f"--affectnet-order {' '.join(own)}, or alphabetically {' '.join(alphabetical)}"
            )
    return parts


def _affectnet_csv(home: Path, path: Path, codes: Codes) -> Iterator[Labelled]:
    pictures = home / "Manually_Annotated"
    if (pictures / "Manually_Annotated_Images").is_dir():
        pictures = pictures / "Manually_Annotated_Images"
    with path.open(newline="") as lines:
        for number, row in enumerate(csv.reader(lines), 1):
            if row and row[0] == "subDirectory_filePath":
                continue
            try:
                left, top, width, height = (int(float(value)) for value in row[1:5])
                index = codes[int(row[6])]
            except (IndexError, KeyError, ValueError) as error:
                raise ValueError(
                    f"{path}, line {number}: expected a path, a box of four numbers, landmarks and "
                    f"a code from 0 to {max(codes)}, got {','.join(row)[:80]!r}"
                ) from error
            yield pictures / row[0], index, (left, top, left + width, top + height)


def _affectnet_npy(home: Path, codes: Codes) -> Iterator[Labelled]:
    for path in _pictures_in(home / "images"):
        annotation = home / "annotations" / f"{path.stem}_exp.npy"
        code = int(np.load(annotation))
        if code not in codes:
            raise ValueError(f"{annotation} holds {code}, which is no code from 0 to {max(codes)}")
        yield path, codes[code], None


def ck_plus(home: Path) -> Parts:
    """CK+ to test on: the last frame of a labelled sequence, and its first as neutral; or CK+48."""
    emotion, images = home / "Emotion", home / "cohn-kanade-images"
    if not emotion.is_dir() or not images.is_dir():
        return folder(home / "CK+48" if (home / "CK+48").is_dir() else home, "CK+")
    codes = _codes(CK_PLUS, 0)
    found: list[Labelled] = []
    for label in sorted(emotion.glob("*/*/*_emotion.txt")):
        sequence = images / label.parent.relative_to(emotion)
        frames, code = _pictures_in(sequence), int(float(label.read_text()))
        if not frames or code not in codes:
            raise ValueError(f"{label} holds {code}, and {sequence} {len(frames)} frames")
        found += [(frames[-1], codes[code], None), (frames[0], codes[0], None)]
    return _parts({"test": found}, "CK+", home)
