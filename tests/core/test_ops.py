"""The operators with closed-form derivatives against the same formulas by autograd."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.func import hessian, jacfwd, jacrev, jvp, vmap

from separate_loss._ops import (
    gather_centers,
    gram_matrix,
    gram_of_centers,
    gram_product,
    normalize,
)
from tests.helpers.properties import Problem, assert_equal, problems, property_test

INDEX = torch.tensor([0, 2, 2, 4])  # class 2 twice, classes 1 and 3 absent
Operator = Callable[[Tensor], tuple[Tensor, ...]]


def plain_normalize(vectors: Tensor) -> tuple[Tensor, Tensor]:
    norms = vectors.square().sum(-1).sqrt()
    return vectors / norms.unsqueeze(-1), norms


def plain_gather_centers(centers: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    units, norms = plain_normalize(centers)
    return units[INDEX], units.sum(0), norms


OPERATORS: list[tuple[Operator, Operator]] = [
    (normalize, plain_normalize),
    (lambda centers: gather_centers(centers, INDEX), plain_gather_centers),
]
CASES = pytest.mark.parametrize(
    ("operator", "plain"), OPERATORS, ids=["normalize", "gather_centers"]
)


def doubles(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def nonlinear(operator: Operator) -> Callable[[Tensor], Tensor]:
    """A scalar function of all outputs, whose second derivatives are not zero."""
    return lambda vectors: sum(
        ((1 + position) * output.pow(3).sum() for position, output in enumerate(operator(vectors))),
        torch.zeros((), dtype=vectors.dtype),
    )


@CASES
def test_values_and_derivatives_equal_autograd(operator: Operator, plain: Operator) -> None:
    vectors = doubles(5, 3)
    torch.testing.assert_close(operator(vectors), plain(vectors))
    for derivative in (jacrev, jacfwd):
        torch.testing.assert_close(derivative(operator)(vectors), derivative(plain)(vectors))
    tangents = doubles(5, 3)
    torch.testing.assert_close(
        jvp(operator, (vectors,), (tangents,)), jvp(plain, (vectors,), (tangents,))
    )
    scalar, expected = nonlinear(operator), nonlinear(plain)
    for second in (hessian, lambda of: jacrev(jacrev(of)), lambda of: jacrev(jacfwd(of))):
        torch.testing.assert_close(second(scalar)(vectors), second(expected)(vectors))


@CASES
def test_gradients_without_transforms_equal_autograd(operator: Operator, plain: Operator) -> None:
    """The form that runs outside of torch.func, by double backward."""
    results = []
    for function in (operator, plain):
        leaf = doubles(5, 3).copy_(torch.linspace(-1, 2, 15).reshape(5, 3)).requires_grad_()
        (first,) = torch.autograd.grad(nonlinear(function)(leaf), leaf, create_graph=True)
        (second,) = torch.autograd.grad(first.pow(3).sum(), leaf)
        results.append((first.detach(), second))
    torch.testing.assert_close(*results)


@CASES
def test_each_output_alone_has_its_gradient(operator: Operator, plain: Operator) -> None:
    """Outputs that are not used have the gradient None in the backward pass."""
    vectors = doubles(5, 3)
    for position in range(len(plain(vectors))):
        gradients = []
        for function in (operator, plain):
            leaf = vectors.clone().requires_grad_()
            function(leaf)[position].pow(3).sum().backward()
            gradients.append(leaf.grad)
        torch.testing.assert_close(*gradients)


@CASES
def test_vmap_equals_a_loop(operator: Operator, plain: Operator) -> None:
    batch = doubles(4, 5, 3)
    for function, expected in (
        (operator, plain),
        (jacrev(operator), jacrev(plain)),
        (hessian(nonlinear(operator)), hessian(nonlinear(plain))),
    ):
        found = torch.utils._pytree.tree_leaves(vmap(function)(batch))
        loop = [torch.utils._pytree.tree_leaves(expected(one)) for one in batch]
        torch.testing.assert_close(found, [torch.stack(each) for each in zip(*loop, strict=True)])


def test_zero_vectors_have_zero_units_and_derivatives() -> None:
    vectors = doubles(5, 3)
    vectors[2] = 0
    for operator, _ in OPERATORS:
        leaf = vectors.clone().requires_grad_()
        units, *_, norms = operator(leaf)
        assert norms[2] == torch.inf
        (first,) = torch.autograd.grad(units.pow(3).sum(), leaf, create_graph=True)
        (second,) = torch.autograd.grad(first.pow(3).sum(), leaf)
        for part in (first, second):
            assert part.isfinite().all()
            assert not part[2].any()


@property_test(problem=problems(max_exponent=3))
def test_gram_products_are_equal_for_classes_and_dimensions(problem: Problem) -> None:
    units, _ = normalize(problem.centers)
    expected = (units @ units.T @ units).numpy()
    if problem.centers.shape[0] != problem.centers.shape[1]:
        for by_class in (False, True):
            gram = gram_of_centers(problem.centers, by_class=by_class)
            assert torch.equal(gram, gram_matrix(units, by_class=by_class))
            assert_equal(gram_product(gram, units), expected, torch.float64, len(units))
