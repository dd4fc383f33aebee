"""Data sets of the study and of the paper's experiment; here scikit-learn's handwritten digits."""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor

# A linear embedding; ReLU and pooling, as in the paper's ResNet; BatchNorm1d behind the latter.
FeatureKind = Literal["signed", "non-negative", "neck"]


class Split(NamedTuple):
    images: Tensor  # or texts, (N, ...)
    labels: Tensor  # (N,)


def all_digits() -> Split:
    """All 1,797 digits, (1, 8, 8) each."""
    digits: Any = load_digits()
    images = torch.tensor(digits.images / 16, dtype=torch.float32).unsqueeze(1)
    return Split(images, torch.tensor(digits.target))


def fingerprint(parts: Mapping[str, Split]) -> str:
    """Tells one data set from another."""
    found = [tensor.numpy().tobytes() for part in parts.values() for tensor in part]
    return hashlib.sha256(b"".join(found)).hexdigest()[:12]


def stratified(data: Split, held_out: float | int, seed: int) -> tuple[Split, Split]:
    """Two parts with the same shares of classes; `held_out` is the size of the second."""
    kept, others = train_test_split(
        torch.arange(len(data.labels)), test_size=held_out, random_state=seed, stratify=data.labels
    )
    return Split(*(part[kept] for part in data)), Split(*(part[others] for part in data))


def drawn(data: Split, counts: Sequence[int], seed: int) -> Split:
    """At random, at most as many samples of each class as `counts` says."""
    order = torch.randperm(len(data.labels), generator=torch.Generator().manual_seed(seed))
    rows = [order[data.labels[order] == label][:most] for label, most in enumerate(counts)]
    return Split(*(part[torch.cat(rows)] for part in data))


def normalised(pictures: Tensor) -> Tensor:
    """Pictures in [0, 1], (..., 3 or 1, H, W), as networks trained on ImageNet take them."""
    mean = pictures.new_tensor((0.485, 0.456, 0.406)).view(3, 1, 1)
    return (pictures - mean) / pictures.new_tensor((0.229, 0.224, 0.225)).view(3, 1, 1)
