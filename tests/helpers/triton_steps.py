"""A step by the Triton kernels, compared with the same step by PyTorch operators."""

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from separate_loss import _step
from separate_loss._batch import Options
from separate_loss._triton import backend
from separate_loss._triton import step as triton_step
from tests.helpers.properties import Problem, assert_equal

CENTER_LR = 0.5


class Outcome(NamedTuple):
    loss: Tensor
    intra: Tensor
    inter: Tensor
    features_grad: Tensor
    centers_grad: Tensor
    new_centers: Tensor

    def rescaled(self, problem: Problem, form: str) -> "Outcome":
        """In float64 and of order 1.

        Gradients are multiplied by norms where they are in inverse proportion to these, new centers
        divided by the norm or by the size of the update, whichever is larger.
        """
        features, centers = (
            vectors.double().norm(dim=-1, keepdim=True).nan_to_num(0, 0, 0)
            for vectors in (problem.features, problem.centers)
        )
        directed = (centers > 1e-19) & (centers < 1e19)
        size = torch.where(directed, centers.maximum(CENTER_LR / centers), 1)
        features = features if form == "paper" else torch.ones(())
        factors = 1, 1, 1, features, centers, 1 / size
        return Outcome(*(one.detach().double() * by for one, by in zip(self, factors, strict=True)))


def uses_kernels(loss: Tensor) -> bool:
    return type(getattr(loss.grad_fn, "work", None)).__name__ == "KernelWork"


def shrink_constants(patch: pytest.MonkeyPatch) -> None:
    """As with thousands of classes: programs of several centers, several blocks and tiles."""
    for name, value in (
        ("PROGRAMS", 2), ("VALUES", 16), ("TILE", 16), ("SQUARES", 8), ("BLOCK_SIZE", 16)
    ):  # fmt: skip
        patch.setattr(triton_step, name, value)
    patch.setattr(triton_step, "plan", triton_step.Plan)  # keeps none


def run_step(
    problem: Problem,
    backend_name: str = "triton",
    *,
    form: Any = "simplex",
    label_smoothing: float = 0.0,
    start: bool = False,
    center_lr: float | None = CENTER_LR,
) -> Outcome:
    """Runs a step, the gradients and the update; with `start`, zero centers start."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backend, "BACKEND", backend_name)
        features, centers = problem.requiring_grad()
        options = Options(form, problem.weight, problem.ignore_index, "mean", label_smoothing)
        step = _step.run_step(features, problem.target, centers, options)
        assert uses_kernels(step.loss) == (backend_name == "triton")
        by_features, by_centers = torch.autograd.grad(step.loss, (features, centers))
        moved = centers.detach().clone()
        step.update_(moved, center_lr, start_zeros=start)
        return Outcome(step.loss, step.intra, step.inter, by_features, by_centers, moved)


def assert_backends_agree(problem: Problem, **options: Any) -> None:
    """Compares both backends, each tensor with the tolerance of its type."""
    form = options.get("form", "simplex")
    found, expected = run_step(problem, **options), run_step(problem, "torch", **options)
    assert [one.dtype for one in found] == [one.dtype for one in expected]
    pairs = zip(found.rescaled(problem, form), expected.rescaled(problem, form), strict=True)
    for original, (one, other) in zip(found, pairs, strict=True):
        assert_equal(one, other.numpy(), original.dtype)


def random_problem(
    num_samples: int, feature_dim: int, num_classes: int, dtype: torch.dtype = torch.float32
) -> Problem:
    target = torch.randint(num_classes, (num_samples,))
    features = torch.randn(num_samples, feature_dim, dtype=dtype)
    return Problem(features, target, torch.randn(num_classes, feature_dim, dtype=dtype), None)
