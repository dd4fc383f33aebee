"""Twenty lines of Python's standard library, of which the package is to be told.

Text that needs no download. Files, not chunks, are divided, so that no file is on two sides.
"""

import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from sklearn.feature_extraction.text import HashingVectorizer
from torch import Tensor, nn

from benchmarks.samples import FeatureKind, Split

PACKAGES = (
    "asyncio",
    "concurrent",
    "ctypes",
    "email",
    "http",
    "idlelib",
    "importlib",
    "json",
    "multiprocessing",
    "re",
    "turtledemo",
    "unittest",
    "urllib",
    "wsgiref",
)
LINES = 20
HASHED = 2048
SIDES = ("training", "test", "tuning", "training", "test")  # of files, in turn


class Texts(NamedTuple):
    training: Split
    tuning: Split
    test: Split
    class_names: list[str]


def load() -> Texts:
    """Divides always in the same way; packages that this Python lacks are left out."""
    library = Path(sysconfig.get_paths()["stdlib"])
    names = [name for name in PACKAGES if files(library / name)]
    found: dict[str, tuple[list[str], list[int]]] = {side: ([], []) for side in SIDES}
    for label, name in enumerate(names):
        paths = files(library / name)
        order = np.random.default_rng(0).permutation(len(paths))
        for turn, place in enumerate(order):
            texts, labels = found[SIDES[turn % len(SIDES)]]
            here = list(chunks(paths[place]))
            texts += here
            labels += [label] * len(here)
    sides = {
        side: Split(_hashed(texts), torch.tensor(labels)) for side, (texts, labels) in found.items()
    }
    return Texts(**sides, class_names=names)


def files(package: Path) -> list[Path]:
    """Python files of a package, in order, but for its tests."""
    paths = (path.relative_to(package) for path in sorted(package.rglob("*.py")))
    return [package / path for path in paths if "test" not in str(path)]


def chunks(path: Path) -> Iterator[str]:
    """Twenty lines each, without empty ones; a rest that is shorter is left out."""
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    for start in range(0, len(lines) - LINES + 1, LINES):
        yield "\n".join(lines[start : start + LINES])


def _hashed(texts: list[str]) -> Tensor:
    """Counts of two to four characters in a row, hashed, as a vector of norm sqrt(HASHED)."""
    vectorizer = HashingVectorizer(
        analyzer="char", ngram_range=(2, 4), n_features=HASHED, lowercase=False
    )
    vectors = vectorizer.transform(texts).toarray() * HASHED**0.5
    return torch.tensor(vectors, dtype=torch.float32)


class TextClassifier(nn.Module):
    """A hidden layer, then signed features (linear) or non-negative ones (after ReLU).

    A neck puts BatchNorm1d behind those.
    """

    def __init__(self, kind: FeatureKind, feature_dim: int, num_classes: int) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Linear(HASHED, 128), nn.ReLU(), nn.Linear(128, feature_dim)]
        if kind != "signed":
            layers.append(nn.ReLU())
        if kind == "neck":
            layers.append(nn.BatchNorm1d(feature_dim))
        self.extractor = nn.Sequential(*layers)
        self.classifier: nn.Module = nn.Linear(feature_dim, num_classes)

    def forward(self, texts: Tensor) -> tuple[Tensor, Tensor]:
        features = self.extractor(texts)
        return features, self.classifier(features)
