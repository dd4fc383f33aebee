"""The differentiable `normalize` against the plain formula, and the Gram matrix by blocks."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor
from torch.func import hessian, jacfwd, jacrev, jvp, vmap

from separate_loss import _ops
from separate_loss._centers import read_centers, read_push
from separate_loss._ops import tangent
from separate_loss._terms import normalize
from tests.helpers.properties import Problem, assert_equal, problems, property_test


def doubles(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def plain(vectors: Tensor) -> tuple[Tensor, Tensor]:
    norms = vectors.square().sum(-1).sqrt()
    return vectors / norms.unsqueeze(-1), norms


def nonlinear(function: Callable[[Tensor], tuple[Tensor, Tensor]]) -> Callable[[Tensor], Tensor]:
    """A scalar function of both outputs, whose second derivatives are not zero."""

    def scalar(vectors: Tensor) -> Tensor:
        units, norms = function(vectors)
        return units.pow(3).sum() + 2 * norms.pow(3).sum()

    return scalar


def test_values_and_derivatives_equal_the_plain_formula() -> None:
    vectors, tangents = doubles(5, 3), doubles(5, 3)
    torch.testing.assert_close(normalize(vectors), plain(vectors))
    for derivative in (jacrev, jacfwd):
        torch.testing.assert_close(derivative(normalize)(vectors), derivative(plain)(vectors))
    torch.testing.assert_close(
        jvp(normalize, (vectors,), (tangents,)), jvp(plain, (vectors,), (tangents,))
    )
    found, expected = nonlinear(normalize), nonlinear(plain)
    for second in (hessian, lambda of: jacrev(jacrev(of)), lambda of: jacrev(jacfwd(of))):
        torch.testing.assert_close(second(found)(vectors), second(expected)(vectors))
        torch.testing.assert_close(
            vmap(second(found))(vectors.expand(2, 5, 3)),
            second(expected)(vectors).expand(2, 5, 3, 5, 3),
        )


def test_zero_vectors_have_zero_units_and_derivatives() -> None:
    leaf = doubles(5, 3)
    leaf[2] = 0
    leaf.requires_grad_()
    units, norms = normalize(leaf)
    assert norms[2] == torch.inf
    (first,) = torch.autograd.grad(units.pow(3).sum(), leaf, create_graph=True)
    (second,) = torch.autograd.grad(first.pow(3).sum(), leaf)
    for part in (first, second):
        assert part.isfinite().all()
        assert not part[2].any()


@property_test(problem=problems(max_exponent=3), block=st.sampled_from([1, 64, 2**21]))
def test_blocks_and_both_gram_matrices_give_the_same_push(problem: Problem, block: int) -> None:
    units, _ = normalize(problem.centers)
    whole = read_centers(problem.centers, "simplex")
    expected = tangent(read_push(whole, 1.0).of(units), units).numpy()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_ops, "BLOCK_SIZE", block)
        for by_class in (False, True):
            if not by_class or len(units) != units.shape[1]:
                found = read_centers(problem.centers, "simplex", by_class=by_class)
                assert found.num_centers == whole.num_centers
                assert_equal(found.center_sum, whole.center_sum.numpy(), torch.float64, len(units))
                push = tangent(read_push(found, 1.0).of(units), units)
                assert_equal(push, expected, torch.float64, len(units))
