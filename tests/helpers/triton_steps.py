"""A step by the Triton kernels, compared with the same step by PyTorch operators."""

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from separate_loss import SeparateLoss, separate_loss
from separate_loss._triton import backend
from separate_loss.functional import update_centers
from tests.helpers.properties import Problem, assert_equal

CENTER_LR = 0.5


class Outcome(NamedTuple):
    loss: Tensor
    intra: Tensor
    inter: Tensor
    features_grad: Tensor
    centers_grad: Tensor
    new_centers: Tensor

    def rescaled(self, problem: Problem) -> "Outcome":
        """In float64 and of order 1.

        Gradients are multiplied by norms, new centers divided by the norm or by the size of the
        update, whichever is larger.
        """
        features, centers = (
            vectors.double().norm(dim=-1, keepdim=True).nan_to_num(0, 0, 0)
            for vectors in (problem.features, problem.centers)
        )
        size = torch.where(centers > 0, centers.maximum(CENTER_LR / centers), 1)
        factors = 1, 1, 1, features, centers, 1 / size
        return Outcome(*(one.detach() * by for one, by in zip(self, factors, strict=True)))


def uses_kernels(loss: Tensor) -> bool:
    return "separate_loss_read" in str(loss.grad_fn)


def run_step(
    problem: Problem,
    backend_name: str = "triton",
    *,
    start: bool = False,
    center_lr: float | None = CENTER_LR,
    scale_free: bool = False,
) -> Outcome:
    """Runs a step with the public functions; with `start`, the module also starts zero centers."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backend, "BACKEND", backend_name)
        features, centers = problem.requiring_grad()
        target = problem.target
        ignoring: Any = {"ignore_index": problem.ignore_index}
        loss = separate_loss(features, target, centers, scale_free=scale_free, **ignoring)
        assert uses_kernels(loss) == (backend_name == "triton")
        gradients = torch.autograd.grad(loss, (features, centers))
        criterion = SeparateLoss(
            *centers.shape, center_lr=center_lr, dtype=centers.dtype, **ignoring
        ).train(start)
        with torch.no_grad():
            # The first call refuses centers that are not finite.
            criterion(features[:0], target[:0])
            criterion.centers.copy_(centers)
        again = criterion(features, target)
        torch.testing.assert_close(again, loss, rtol=0, atol=0, equal_nan=True)
        assert criterion.last_terms is not None
        new_centers = criterion.centers
        if not start:
            new_centers = update_centers(
                features.detach(), target, centers.detach(), center_lr=center_lr, **ignoring
            )
        intra, inter = criterion.last_terms
        return Outcome(loss, intra, inter, gradients[0], gradients[1], new_centers)


def assert_backends_agree(problem: Problem, dtype: torch.dtype, **options: Any) -> Outcome:
    """Compares both backends with the tolerance of `dtype`; returns the rescaled outcome."""
    found, expected = run_step(problem, **options), run_step(problem, "torch", **options)
    assert [one.dtype for one in found] == [one.dtype for one in expected]
    rescaled = found.rescaled(problem)
    for one, other in zip(rescaled, expected.rescaled(problem), strict=True):
        assert_equal(one, other.numpy(), dtype)
    return rescaled


def random_problem(
    num_samples: int, feature_dim: int, num_classes: int, dtype: torch.dtype = torch.float32
) -> Problem:
    target = torch.randint(num_classes, (num_samples,))
    features = torch.randn(num_samples, feature_dim, dtype=dtype)
    return Problem(features, target, torch.randn(num_classes, feature_dim, dtype=dtype), None)
