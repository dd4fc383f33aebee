"""Hypothesis strategies, the decorator of property tests, and comparison with tolerances."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.helpers import reference

num_cases = 0


def property_test(**drawn: st.SearchStrategy[Any]) -> Callable[..., Callable[..., None]]:
    """`given`, with the mark `properties` and a count of the cases drawn."""

    def decorate(check: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(check)
        def counted(**arguments: object) -> None:
            global num_cases  # noqa: PLW0603
            num_cases += 1
            check(**arguments)

        test: Callable[..., None] = pytest.mark.properties(given(**drawn)(counted))
        return test

    return decorate


@dataclass(frozen=True)
class Problem:
    """A batch and centers, as tensors and as NumPy arrays for the reference."""

    features: Tensor
    target: Tensor
    centers: Tensor
    weight: Tensor | None
    ignore_index: int = -100

    @property
    def arrays(self) -> tuple[reference.Array, reference.Array, reference.Array]:
        """Features, class probabilities and centers."""
        if self.target.is_floating_point():
            probabilities = self.target.double().numpy()
        else:
            probabilities = reference.one_hot(
                self.target.numpy(), len(self.centers), self.ignore_index
            )
        return self.features.double().numpy(), probabilities, self.centers.double().numpy()

    @property
    def weights(self) -> reference.Array:
        if self.weight is None:
            return np.ones(len(self.centers))
        return self.weight.double().numpy()

    def to(self, dtype: torch.dtype) -> "Problem":
        target = self.target.to(dtype) if self.target.is_floating_point() else self.target
        weight = None if self.weight is None else self.weight.to(dtype)
        return Problem(
            self.features.to(dtype), target, self.centers.to(dtype), weight, self.ignore_index
        )

    def requiring_grad(self) -> tuple[Tensor, Tensor]:
        """Copies of features and centers that require gradients."""
        return (
            self.features.clone().requires_grad_(),
            self.centers.clone().requires_grad_(),
        )


def _vectors(
    draw: st.DrawFn, rng: np.random.Generator, shape: tuple[int, int], max_exponent: int
) -> Tensor:
    """Rows from N(0, 1); a few are repeated, collinear, opposite, zero, tiny or huge."""
    vectors = rng.normal(size=shape)
    rows = st.integers(0, shape[0] - 1)
    kinds = st.sampled_from(["repeated", "collinear", "opposite", "zero", "scaled"])
    for kind in draw(st.lists(kinds, max_size=3)) if shape[0] else []:
        row, other = draw(rows), draw(rows)
        if kind == "repeated":
            vectors[row] = vectors[other]
        elif kind == "collinear":
            vectors[row] = vectors[other] * 3.0
        elif kind == "opposite":
            vectors[row] = vectors[other] * -0.5
        elif kind == "zero":
            vectors[row] = 0
        else:
            norm = np.linalg.norm(vectors[row])
            if 1e-3 < norm < 1e3:
                vectors[row] *= 10.0 ** draw(st.integers(-max_exponent, max_exponent)) / norm
    return torch.from_numpy(vectors)


@st.composite
def problems(
    draw: st.DrawFn,
    *,
    kind: str | None = None,
    max_exponent: int = 17,
    min_samples: int = 1,
    max_sizes: tuple[int, int, int] = (64, 40, 64),
    weighted: bool | None = None,
    ignoring: bool | None = None,
) -> Problem:
    """A problem in float64, with norms from 10^-max_exponent to 10^max_exponent.

    `max_sizes` bounds the numbers of samples, classes and features. Class indices may hold
    `ignore_index`, and class weights may be given, unless `ignoring` and `weighted` decide.
    """
    num_samples = draw(st.integers(min_samples, max_sizes[0]))
    num_classes = draw(st.integers(2, max_sizes[1]))
    feature_dim = draw(st.integers(1, max_sizes[2]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    centers = _vectors(draw, rng, (num_classes, feature_dim), max_exponent)
    features = _vectors(draw, rng, (num_samples, feature_dim), max_exponent)
    aligned = draw(st.sampled_from(["no", "same", "opposite"]))
    ignore_index = -100
    if (kind or draw(st.sampled_from(["indices", "probabilities"]))) == "indices":
        # Few of the classes, so that some are absent and some have several samples.
        present = draw(st.integers(1, num_classes))
        target = torch.from_numpy(rng.integers(0, present, size=num_samples))
        if ignoring or (ignoring is None and draw(st.booleans())):
            ignore_index = draw(st.sampled_from([-100, 0, num_classes - 1]))
            target[torch.from_numpy(rng.random(num_samples) < 0.3)] = ignore_index
        elif aligned != "no" and num_samples:
            features[0] = centers[target[0]] * (2.0 if aligned == "same" else -2.0)
    else:
        sharpness = draw(st.sampled_from([0.1, 1.0, 30.0]))
        logits = torch.from_numpy(rng.normal(size=(num_samples, num_classes))) * sharpness
        target = logits.softmax(-1)
    weight = None
    if weighted or (weighted is None and draw(st.booleans())):
        weight = torch.from_numpy(rng.random(num_classes))
        weight[rng.integers(num_classes)] = 0
    return Problem(features, target, centers, weight, ignore_index)


REDUCTIONS = st.sampled_from(["none", "mean", "sum"])

# For values of order 1: cosines, and gradients times norms.
TOLERANCE = {
    torch.float64: 1e-12,
    torch.float32: 1e-5,
    torch.float16: 2e-3,
    torch.bfloat16: 1.6e-2,
}


def assert_equal(
    actual: Tensor, expected: reference.Array | float, dtype: torch.dtype, scale: float = 1.0
) -> None:
    """Compares with the tolerance of `dtype`, relative to `scale` or the expected value."""
    torch.testing.assert_close(
        actual.detach().double(),
        torch.as_tensor(np.asarray(expected), dtype=torch.float64),
        rtol=TOLERANCE[dtype],
        atol=TOLERANCE[dtype] * scale,
        equal_nan=True,
    )
