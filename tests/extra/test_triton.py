"""The Triton kernels, in Triton's interpreter, against PyTorch operators and the reference."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from triton.runtime import interpreter

from separate_loss import separate_loss
from separate_loss._triton import kernels
from separate_loss._triton import step as triton_step
from tests.helpers import reference
from tests.helpers.properties import Problem, assert_equal, problems, property_test
from tests.helpers.triton_steps import (
    CENTER_LR,
    Outcome,
    assert_backends_agree,
    random_problem,
    run_step,
)

pytestmark = [
    pytest.mark.usefixtures("triton_backend"),
    # NumPy, which runs the interpreter's operations, warns where a GPU does not.
    pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning"),
]

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
PROBLEMS = problems(
    kind="indices", weighted=False, min_samples=0, max_sizes=(12, 9, 20), max_exponent=3
)


@settings(max_examples=settings().max_examples // 3)
@property_test(
    problem=PROBLEMS,
    dtype=st.sampled_from(DTYPES),
    few_programs=st.booleans(),
    start=st.booleans(),
)
def test_kernels_equal_pytorch_operators_and_the_reference(
    problem: Problem, dtype: torch.dtype, few_programs: bool, start: bool
) -> None:
    problem = problem.to(dtype)
    features, probabilities, centers = problem.arrays
    weight = np.ones(len(centers))
    with pytest.MonkeyPatch.context() as patch:
        if few_programs:  # Each program then has several centers, as with thousands of classes.
            patch.setattr(triton_step, "PROGRAMS", 2)
            patch.setattr(triton_step, "BATCH", 4)
        found = assert_backends_agree(problem, dtype, start=start)
    intra = reference.intra_loss(features, probabilities, centers, weight, "mean")
    inter = reference.inter_loss(centers)
    centers_grad = 2 * reference.inter_direction(centers)
    new_centers = centers - CENTER_LR * centers_grad / 2
    features_grad = np.zeros_like(features)
    if probabilities.any():
        features_grad = reference.features_gradient(features, probabilities, centers, weight)
        centers_grad = reference.centers_gradient(features, probabilities, centers)
        new_centers = reference.update_centers(features, probabilities, centers, CENTER_LR)
    values = intra + inter, intra, inter, features_grad, centers_grad, new_centers
    expected = Outcome(*(torch.as_tensor(np.asarray(value)) for value in values))
    expected = expected.rescaled(problem)
    if start:  # The reference keeps zero centers.
        zero = ~problem.centers.any(-1)
        expected.new_centers[zero] = found.new_centers[zero]
    for one, other in zip(found, expected, strict=True):
        assert_equal(one, other.numpy(), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_scale_free_gradients_and_the_default_center_lr(dtype: torch.dtype) -> None:
    problem = random_problem(9, 5, 4).to(dtype)
    problem.target[2] = problem.ignore_index
    assert_backends_agree(problem, dtype, start=True, center_lr=None, scale_free=True)
    none = problem.target * 0 + problem.ignore_index
    assert_backends_agree(replace(problem, target=none), dtype, center_lr=None)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_scale_free_gradients_of_ignored_samples_are_0(value: float) -> None:
    problem = random_problem(3, 4, 3)
    problem.features[1], problem.target[1] = value, problem.ignore_index
    gradient = run_step(problem, scale_free=True).features_grad
    assert gradient.isfinite().all()
    assert gradient.any(-1).tolist() == [True, False, True]


@pytest.mark.parametrize("size", [(0, 3, 2), (1, 1, 2), (1, 130, 3), (40, 33, 2)])
def test_batches_and_features_of_any_size(size: tuple[int, int, int]) -> None:
    num_samples, d, num_classes = size
    assert_backends_agree(random_problem(num_samples, d, num_classes), torch.float32, start=True)


@pytest.mark.parametrize("integer", [torch.uint8, torch.int16, torch.int32])
@pytest.mark.parametrize("types", [(torch.bfloat16, torch.float32), (torch.float32, torch.float64)])
def test_types_are_promoted_as_by_pytorch_operators(
    types: tuple[torch.dtype, torch.dtype], integer: torch.dtype
) -> None:
    problem = random_problem(6, 5, 3)
    problem = Problem(
        problem.features.to(types[0]),
        problem.target.to(integer),
        problem.centers.to(types[1]),
        None,
    )
    assert_backends_agree(problem, types[0])


def test_ignored_batches_and_strided_tensors() -> None:
    problem = random_problem(4, 3, 5)
    assert_backends_agree(
        Problem(problem.features, problem.target * 0 + 7, problem.centers, None, 7), torch.float32
    )
    features, centers = torch.randn(5, 4).T, torch.randn(5, 6).T
    assert_backends_agree(
        Problem(features, torch.tensor([0, 5, 1, 1]), centers, None), torch.float32
    )
    sequences = torch.randn(2, 3, 5), torch.randint(4, (2, 3))
    assert_backends_agree(Problem(*sequences, torch.randn(4, 5), None), torch.float32)


@pytest.mark.parametrize("norm", [0.0, 1e-25, 1e-18, 1e18, 1e25, torch.inf, torch.nan])
@pytest.mark.parametrize("where", ["features", "centers"])
def test_vectors_of_extreme_norms(norm: float, where: str) -> None:
    problem = random_problem(6, 5, 3)
    vectors = getattr(problem, where)
    vectors[0] *= norm / vectors[0].norm()
    assert_backends_agree(problem, torch.float32, start=True)


def test_more_than_2_to_the_31_values_in_the_centers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs the last program alone; only touched pages of the centers take memory."""
    num_classes, d = 2**17 + 1, 2**14
    centers = torch.from_numpy(np.zeros((num_classes, d), np.int16)).view(torch.bfloat16)
    centers[-1, 0] = 4
    classes, samples = torch.zeros(2, num_classes), torch.zeros(2, 1)
    partial, total, numbers = torch.zeros(2 * (d + 1)), torch.zeros(d), torch.ones(5)
    features, target = torch.ones(1, d), torch.tensor([num_classes - 1])
    sizes = 1, num_classes, d, -100
    config = triton_step._rows_config(num_classes, triton_step._config(total, d)) | {"ROWS": 1}
    builder: Any = interpreter.interpreter_builder
    set_index = builder.set_grid_idx

    def run_last(kernel: Any, programs: int, *arguments: Any, **constants: Any) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(builder, "set_grid_dim", lambda *_: None)
            patch.setattr(builder, "grid_dim", (programs, 1, 1), raising=False)
            patch.setattr(builder, "set_grid_idx", lambda *_: set_index(programs - 1, 0, 0))
            kernel[(1,)](*arguments, **constants)

    batch = features, target, centers
    blocks = 2, num_classes - 1
    run_last(kernels.read, 2, *batch, partial, classes, samples, total, *sizes, *blocks, **config)
    assert classes[0, -1] == 0.25
    assert partial[d] == 1
    classes[:, -1] = torch.tensor([0.0, 1.0])
    samples[:] = torch.tensor([[0.5], [1 / 128]])
    outputs = samples, classes, total, numbers
    run_last(
        kernels.move, num_classes, numbers, *batch, *outputs, centers, *sizes, 1.0,
        PER_SAMPLE=False, PAPER=True, START=True, LABELS=32, **config,
    )  # fmt: skip
    assert centers[-1, 1:].unique().tolist() == [1 / 128]
    assert not centers[0].any()


def test_samples_that_are_not_finite_move_no_center() -> None:
    problem = random_problem(6, 4, 3)
    problem.features[2, 1] = torch.inf
    finite = torch.arange(6) != 2
    rest = Problem(problem.features[finite], problem.target[finite], problem.centers, None)
    torch.testing.assert_close(run_step(problem).new_centers, run_step(rest).new_centers)


def test_labels_out_of_range_are_refused() -> None:
    problem = random_problem(4, 3, 5)
    for wrong in (-1, 5, 2**40):
        problem.target[1] = wrong
        with pytest.raises(RuntimeError, match=r"target must hold class indices in \[0, 5\)"):
            separate_loss(problem.features, problem.target, problem.centers)
