"""CIFAR-10: 60,000 pictures of 32 x 32 in ten classes."""

import io
import pickle
from functools import cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from benchmarks.data import Split, normalised

LAYOUTS = (
    "expected the folder cifar-10-batches-py, or an npz with labels (N,), test (N,) and JPEG "
    "files, of which picture i is bytes[offsets[i] : offsets[i + 1]]"
)


@cache
def load(path: Path) -> dict[str, Split]:
    """The training and the test pictures, uint8 (N, 3, 32, 32); else a ValueError."""
    try:
        return _load_batches(path) if path.is_dir() else _load_npz(path)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{path} is not CIFAR-10 ({error!r}): {LAYOUTS}") from error


def _load_batches(path: Path) -> dict[str, Split]:
    found = {}
    files = {"train": [f"data_batch_{number}" for number in range(1, 6)], "test": ["test_batch"]}
    for name, batches in files.items():
        parts = [pickle.loads((path / batch).read_bytes(), encoding="bytes") for batch in batches]
        pictures = np.concatenate([part[b"data"] for part in parts]).reshape(-1, 3, 32, 32)
        labels = np.concatenate([part[b"labels"] for part in parts])
        found[name] = Split(torch.from_numpy(pictures), torch.from_numpy(labels))
    return found


def _load_npz(path: Path) -> dict[str, Split]:
    with np.load(path) as arrays:
        data, offsets, test = (arrays[name] for name in ("bytes", "offsets", "test"))
        labels = torch.from_numpy(arrays["labels"].astype(np.int64))
    pictures = torch.empty(len(labels), 3, 32, 32, dtype=torch.uint8)
    for picture, start, end in zip(pictures, offsets[:-1], offsets[1:], strict=True):
        decoded = np.array(Image.open(io.BytesIO(data[start:end].tobytes())).convert("RGB"))
        picture[:] = torch.from_numpy(decoded).movedim(-1, 0)
    chosen = torch.from_numpy(test)
    return {
        "train": Split(pictures[~chosen], labels[~chosen]),
        "test": Split(pictures[chosen], labels[chosen]),
    }


def floats(split: Split) -> Split:
    """Pictures as networks take them."""
    return Split(normalised(split.images / 255), split.labels)


def mirrored(images: Tensor, generator: torch.Generator) -> Tensor:
    """A random half of the images, left to right."""
    chosen = torch.rand(len(images), 1, 1, 1, generator=generator) < 0.5
    return torch.where(chosen.to(images.device), images.flip(-1), images)
