"""The paper's form, values and gradients, against the reference: Eq. 1 to 8."""

import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from separate_loss import functional as F
from separate_loss import separate_loss
from separate_loss._checks import Form, Reduction
from tests.helpers import reference
from tests.helpers.properties import REDUCTIONS, Problem, assert_equal, problems, property_test

# Types, and exponents of norms that each type can hold together with their gradients.
DTYPES = [
    pytest.param(torch.float64, 60, id="float64"),
    pytest.param(torch.float32, 17, id="float32"),
    pytest.param(torch.float16, 1, id="float16"),
    pytest.param(torch.bfloat16, 17, id="bfloat16"),
]


def drawn(data: st.DataObject, dtype: torch.dtype, max_exponent: int, **options: object) -> Problem:
    return data.draw(problems(max_exponent=max_exponent, **options)).to(dtype)  # type: ignore[arg-type]


def computed_in(dtype: torch.dtype) -> torch.dtype:
    """Half precision is computed in float32."""
    return torch.promote_types(dtype, torch.float32)


@pytest.mark.parametrize(("dtype", "max_exponent"), DTYPES)
@property_test(data=st.data())
def test_similarity_is_eq_1(data: st.DataObject, dtype: torch.dtype, max_exponent: int) -> None:
    problem = drawn(data, dtype, max_exponent)
    a, b = problem.features[0], problem.centers
    features, _, centers = problem.arrays
    expected = [reference.similarity(features[0], center) for center in centers]
    result = F.similarity(a, b)
    assert result.dtype == computed_in(dtype)
    assert_equal(result, np.array(expected), result.dtype)
    assert torch.equal(result, F.similarity(b, a))
    assert ((result >= 0) & (result <= 1)).all()


@pytest.mark.parametrize(("dtype", "max_exponent"), DTYPES)
@property_test(data=st.data(), reduction=REDUCTIONS)
def test_intra_class_loss_is_eq_2(
    data: st.DataObject, reduction: Reduction, dtype: torch.dtype, max_exponent: int
) -> None:
    problem = drawn(data, dtype, max_exponent)
    result = F.intra_class_loss(
        problem.features,
        problem.target,
        problem.centers,
        form="paper",
        weight=problem.weight,
        ignore_index=problem.ignore_index,
        reduction=reduction,
    )
    expected = reference.intra_loss(*problem.arrays, problem.weights, reduction)
    assert_equal(result, expected, computed_in(dtype))


@pytest.mark.parametrize(("dtype", "max_exponent"), DTYPES)
@property_test(data=st.data())
def test_inter_class_loss_is_eq_3(
    data: st.DataObject, dtype: torch.dtype, max_exponent: int
) -> None:
    problem = drawn(data, dtype, max_exponent)
    result = F.inter_class_loss(problem.centers, form="paper")
    assert_equal(result, reference.inter_loss(problem.arrays[2]), computed_in(dtype))


@pytest.mark.parametrize(("dtype", "max_exponent"), DTYPES)
@property_test(data=st.data(), reduction=REDUCTIONS)
def test_separate_loss_is_eq_4(
    data: st.DataObject, reduction: Reduction, dtype: torch.dtype, max_exponent: int
) -> None:
    problem = drawn(data, dtype, max_exponent)
    result = separate_loss(
        problem.features,
        problem.target,
        problem.centers,
        form="paper",
        weight=problem.weight,
        ignore_index=problem.ignore_index,
        reduction=reduction,
    )
    assert result.dtype == computed_in(dtype)
    expected = reference.separate_loss(*problem.arrays, problem.weights, reduction)
    assert_equal(result, expected, result.dtype)


@pytest.mark.parametrize(("dtype", "max_exponent"), DTYPES)
@property_test(data=st.data())
def test_gradient_of_features_is_eq_5(
    data: st.DataObject, dtype: torch.dtype, max_exponent: int
) -> None:
    problem = drawn(data, dtype, max_exponent)
    features, centers = problem.requiring_grad()
    separate_loss(
        features,
        problem.target,
        centers.detach(),
        form="paper",
        weight=problem.weight,
        ignore_index=problem.ignore_index,
    ).backward()
    assert features.grad is not None
    assert features.grad.dtype == dtype
    expected = reference.features_gradient(*problem.arrays, problem.weights)
    assert_equal_times_norms(features.grad, expected, problem.arrays[0], dtype)


@pytest.mark.parametrize(("dtype", "max_exponent"), DTYPES)
@property_test(data=st.data())
def test_gradient_of_centers_is_that_of_eq_4(
    data: st.DataObject, dtype: torch.dtype, max_exponent: int
) -> None:
    problem = drawn(data, dtype, max_exponent, weighted=False)
    features, centers = problem.requiring_grad()
    separate_loss(
        features.detach(),
        problem.target,
        centers,
        form="paper",
        ignore_index=problem.ignore_index,
    ).backward()
    assert centers.grad is not None
    assert centers.grad.dtype == dtype
    expected = reference.centers_gradient(*problem.arrays)
    assert_equal_times_norms(centers.grad, expected, problem.arrays[2], dtype)


@pytest.mark.parametrize(("dtype", "max_exponent"), DTYPES)
@property_test(data=st.data(), center_lr=st.sampled_from([0.0, 0.01, 1.0, 10.0, None]))
def test_update_centers_is_eq_6_to_8(
    data: st.DataObject, center_lr: float | None, dtype: torch.dtype, max_exponent: int
) -> None:
    problem = drawn(data, dtype, max_exponent, weighted=False)
    before = problem.centers.clone()
    result = F.update_centers(
        problem.features,
        problem.target,
        problem.centers,
        form="paper",
        center_lr=center_lr,
        ignore_index=problem.ignore_index,
    )
    assert result.dtype == dtype
    assert torch.equal(before, problem.centers)
    features, probabilities, centers = problem.arrays
    expected = reference.update_centers(features, probabilities, centers, center_lr)
    # A step is of the size center_lr / norm; relative to it and to the center itself.
    size = np.linalg.norm(centers, axis=1)
    alpha = reference.default_center_lr(probabilities, centers) if center_lr is None else center_lr
    step = np.divide(alpha, size, out=np.zeros_like(size), where=size > 0)
    scale = np.where(size > 0, np.maximum(size, step), 1.0)[:, None]
    actual = result.double() / torch.from_numpy(scale)
    # The step of a tiny center may overflow.
    finite = np.abs(expected) < torch.finfo(dtype).max
    assert_equal(actual[torch.from_numpy(finite)], (expected / scale)[finite], dtype)


def assert_equal_times_norms(
    gradient: torch.Tensor, expected: reference.Array, vectors: reference.Array, dtype: torch.dtype
) -> None:
    """Compares gradients times norms, which are of order 1."""
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    assert_equal(gradient.double() * torch.from_numpy(norms), expected * norms, dtype)


def test_update_is_not_a_gradient_step() -> None:
    """Eq. 7 is half of a gradient, and Eq. 6 is a gradient divided by 1 + n_j."""
    torch.manual_seed(0)
    features = torch.randn(6, 5, dtype=torch.float64)
    target = torch.tensor([0, 0, 0, 1, 1, 2])
    centers = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    intra = F.intra_class_loss(features, target, centers)
    inter = F.inter_class_loss(centers, form="paper")
    (of_intra,) = torch.autograd.grad(intra, centers)
    (of_inter,) = torch.autograd.grad(inter, centers)
    step = centers - F.update_centers(features, target, centers, form="paper", center_lr=1.0)
    counts = torch.tensor([3, 2, 1, 0], dtype=torch.float64).unsqueeze(-1)
    torch.testing.assert_close(step, of_intra / (1 + counts) + of_inter / 2)
    assert not torch.allclose(step, of_intra + of_inter, rtol=0.1)


def test_empty_and_ignored_batches_leave_the_inter_class_loss() -> None:
    centers = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    inter = F.inter_class_loss(centers)
    empty = torch.zeros(0, 2), torch.zeros(0, dtype=torch.long)
    ignored = torch.ones(3, 2), torch.full((3,), -100)
    for features, target in (empty, ignored):
        assert separate_loss(features, target, centers) == inter
        assert separate_loss(features, target, centers, reduction="sum") == 0
        each = separate_loss(features, target, centers, reduction="none")
        assert torch.equal(each, torch.zeros(len(features)))
        assert F.intra_class_loss(features, target, centers) == 0


@pytest.mark.parametrize("form", ["simplex", "paper"])
def test_vmap_computes_in_double_precision(form: Form) -> None:
    """Under vmap, as on a GPU, the code cannot read values; counts must stay in float64."""
    torch.manual_seed(0)
    features, centers = torch.randn(3, 4, 5).double(), torch.randn(3, 7, 5).double()
    target = torch.randint(7, (3, 4))

    def loss(features: Tensor, target: Tensor, centers: Tensor) -> Tensor:
        return separate_loss(features, target, centers, form=form)

    each = [loss(*one) for one in zip(features, target, centers, strict=True)]
    found = torch.func.vmap(loss)(features, target, centers)
    torch.testing.assert_close(found, torch.stack(each), rtol=1e-15, atol=1e-15)
