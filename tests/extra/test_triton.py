"""The Triton kernels, in Triton's interpreter, against PyTorch's operators."""

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
from tests.helpers.properties import Problem, problems, property_test
from tests.helpers.triton_steps import (
    CENTER_LR,
    assert_backends_agree,
    random_problem,
    run_step,
    shrink_constants,
)

pytestmark = [
    pytest.mark.usefixtures("triton_backend"),
    # NumPy, which runs the interpreter's operations, warns where a GPU does not.
    pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning"),
]

DTYPES = st.sampled_from([torch.float64, torch.float32, torch.float16, torch.bfloat16])
FORMS = ["simplex", "paper"]


@settings(max_examples=settings().max_examples // 4)
@property_test(
    problem=problems(kind="indices", min_samples=0, max_sizes=(8, 6, 10), max_exponent=3),
    dtypes=st.tuples(DTYPES, DTYPES),
    form=st.sampled_from(FORMS),
    label_smoothing=st.sampled_from([0.0, 0.1, 1.0]),
    center_lr=st.sampled_from([None, CENTER_LR]),
    shrunken=st.booleans(),
    start=st.booleans(),
)
def test_kernels_equal_operators(
    problem: Problem, dtypes: tuple[torch.dtype, torch.dtype], shrunken: bool, **options: Any
) -> None:
    rounded = problem.to(dtypes[1])
    features = problem.features.to(dtypes[0])
    problem = Problem(
        features, problem.target, rounded.centers, rounded.weight, problem.ignore_index
    )
    with pytest.MonkeyPatch.context() as patch:
        if shrunken:
            shrink_constants(patch)
        assert_backends_agree(problem, **options)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("size", [(0, 3, 2), (1, 1, 2), (1, 130, 3), (66, 17, 2), (6, 5, 66)])
def test_batches_and_features_of_any_size(size: tuple[int, int, int], form: str) -> None:
    assert_backends_agree(random_problem(*size), form=form, start=True)


@pytest.mark.parametrize("num_classes", [2, 600])
def test_a_class_with_samples_in_many_tiles(num_classes: int) -> None:
    """More tiles than a program looks into at a time; it moves one center, or two."""
    problem = random_problem(150, 3, num_classes, torch.float64)
    problem.target[::2] = 1
    assert_backends_agree(problem, start=True)


@pytest.mark.parametrize("integer", [torch.uint8, torch.int16, torch.int32])
def test_labels_of_all_integer_types(integer: torch.dtype) -> None:
    problem = random_problem(6, 5, 3)
    target = problem.target.to(integer)
    assert_backends_agree(Problem(problem.features, target, problem.centers, None))


def test_ignored_batches_and_strided_tensors() -> None:
    problem = random_problem(4, 3, 5)
    ignored = problem.target * 0 + 7
    assert_backends_agree(Problem(problem.features, ignored, problem.centers, None, 7))
    features, centers = torch.randn(5, 4).T, torch.randn(5, 6).T
    weight = torch.rand(12)[::2]
    target = torch.tensor([0, 9, 5, 9, 1, 9, 1, 9])[::2]
    assert_backends_agree(Problem(features, target, centers, weight), start=True)
    sequences = torch.randn(2, 3, 5), torch.randint(4, (2, 3))
    assert_backends_agree(Problem(*sequences, torch.randn(4, 5), None))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("start", [False, True])
def test_vectors_of_extreme_norms(form: str, start: bool) -> None:
    """Zero, without a normal square, with an infinite square."""
    problem = random_problem(9, 5, 7)
    for i, norm in enumerate([0.0, 1e-25, 1e-18, 1e18, 1e25]):
        for vectors in (problem.features[2:], problem.centers):
            vectors[i] *= norm / vectors[i].norm()
    problem.target[:7] = torch.arange(7)
    assert_backends_agree(problem, form=form, start=start)
    problem.centers[5:] = torch.tensor([[torch.nan], [torch.inf]])
    assert_backends_agree(problem, form=form, start=start)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_samples_that_are_not_finite(value: float, form: str) -> None:
    """They make the loss NaN, have NaN gradients, and move no center."""
    problem = random_problem(6, 4, 3)
    problem.features[2, 1] = value
    found, expected = run_step(problem, form=form), run_step(problem, "torch", form=form)
    assert found.loss.isnan()
    assert found.centers_grad.isnan().all()
    for name in ("inter", "features_grad", "new_centers"):
        pair = getattr(found, name), getattr(expected, name)
        torch.testing.assert_close(*pair, equal_nan=True)
    finite = torch.arange(6) != 2
    rest = Problem(problem.features[finite], problem.target[finite], problem.centers, None)
    torch.testing.assert_close(found.new_centers, run_step(rest, form=form).new_centers)
    problem.target[2] = problem.ignore_index
    gradient = run_step(problem, form=form).features_grad
    assert gradient.any(-1).tolist() == finite.tolist()


def test_more_than_2_to_the_31_values_in_the_centers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs the last program alone; only touched pages of the centers take memory."""
    num_classes, d = 2**17 + 1, 2**14
    centers = torch.from_numpy(np.zeros((num_classes, d), np.int16)).view(torch.bfloat16)
    centers[-1, 0] = 4
    classes, samples, partial = torch.zeros(2, num_classes), torch.zeros(2), torch.zeros(5 * d)
    slots, rest = torch.full((64, d), 1 / 128), torch.zeros(d)
    scalars = torch.ones(8)
    features, target = torch.ones(1, d), torch.tensor([num_classes - 1])
    plan = triton_step.Plan(num_classes, d, torch.float32, "paper", False, 0.0, torch.device("cpu"))
    plan.values["ROWS"] = 1
    builder: Any = interpreter.interpreter_builder
    set_index = builder.set_grid_idx

    def run_last(kernel: Any, programs: int, given: dict[str, Any]) -> None:
        every = plan.values | given
        arguments = {name: every[name] for name in kernel.arg_names}
        with monkeypatch.context() as patch:
            patch.setattr(builder, "set_grid_dim", lambda *_: None)
            patch.setattr(builder, "grid_dim", (programs, 1, 1), raising=False)
            patch.setattr(builder, "set_grid_idx", lambda *_: set_index(programs - 1, 0, 0))
            kernel[(1,)](**arguments)

    given = {
        "features": features, "target": target, "centers": centers, "out": centers,
        "weight": target, "units": target, "rows": rest, "total": rest, "cosines": samples,
        "inverses": samples, "of_classes": classes, "partial": partial, "slots": slots,
        "everyone": rest, "product": samples, "grad": scalars, "scalars": scalars,
        "ignore_index": -100, "n": 1, "first_program": 0, "rate": 1.0, "blocks": 2,
        "each": num_classes - 1, "GRADIENT": False, "PER_SAMPLE": False, "START": True,
    }  # fmt: skip
    run_last(kernels.read, 2, given)
    assert classes[0, -1] == 0.25
    assert partial[2 * d + 2] == 1
    classes[:, -1] = torch.tensor([0.0, 1.0])
    run_last(kernels.move, num_classes, given)
    assert centers[-1].unique().tolist() == [1 / 128]
    assert not centers[0].any()


def test_labels_out_of_range_are_refused() -> None:
    problem = random_problem(4, 3, 5)
    for wrong in (-1, 5, 2**40):
        problem.target[1] = wrong
        with pytest.raises(RuntimeError, match=r"target must hold class indices in \[0, 5\)"):
            separate_loss(problem.features, problem.target, problem.centers)
