"""Classify 20-line snippets of Python's standard library by their package: no download needed."""

import sysconfig
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import numpy as np
import torch
from sklearn.feature_extraction.text import HashingVectorizer

from benchmarks.data import Split

PACKAGES = (
    "asyncio", "concurrent", "ctypes", "email", "http", "idlelib", "importlib", "json",
    "multiprocessing", "re", "turtledemo", "unittest", "urllib", "wsgiref",
)  # fmt: skip
LINES = 20
HASHED = 2048
SPLITS = ("training", "test", "tuning", "training", "test")  # of files, in turn


@cache
def load_texts() -> dict[str, Split]:
    """Splits files, not snippets, and always in the same way; leaves out missing packages."""
    library = Path(sysconfig.get_paths()["stdlib"])
    packages = [files for name in PACKAGES if (files := python_files(library / name))]
    found: dict[str, tuple[list[str], list[int]]] = {name: ([], []) for name in SPLITS}
    for label, paths in enumerate(packages):
        order = np.random.default_rng(0).permutation(len(paths))
        for number, index in enumerate(order):
            texts, labels = found[SPLITS[number % len(SPLITS)]]
            new = list(snippets(paths[index]))
            texts += new
            labels += [label] * len(new)
    # Counts of two to four characters in a row, as vectors of norm sqrt(HASHED).
    hasher = HashingVectorizer(
        analyzer="char", ngram_range=(2, 4), n_features=HASHED, lowercase=False
    )
    splits = {}
    for name, (texts, labels) in found.items():
        vectors = hasher.transform(texts).toarray() * HASHED**0.5
        splits[name] = Split(torch.tensor(vectors, dtype=torch.float32), torch.tensor(labels))
    return splits


def python_files(package: Path) -> list[Path]:
    """The Python files of a package in order, without its tests."""
    paths = (path.relative_to(package) for path in sorted(package.rglob("*.py")))
    return [package / path for path in paths if "test" not in str(path)]


def snippets(path: Path) -> Iterator[str]:
    """Twenty lines each, without empty ones; a shorter rest is left out."""
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    for start in range(0, len(lines) - LINES + 1, LINES):
        yield "\n".join(lines[start : start + LINES])
