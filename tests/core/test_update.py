"""`update_centers_`: equal centers for sums over samples, over classes, and over probabilities."""

from typing import Any

import pytest
import torch
from hypothesis import assume
from hypothesis import strategies as st

from separate_loss import SeparateLoss
from separate_loss._batch import Options
from separate_loss._centers import read_centers, update_centers_
from separate_loss._checks import Form
from separate_loss._step import class_sums, probability_sums, run_step
from separate_loss._terms import normalize
from tests.helpers import reference
from tests.helpers.properties import Problem, assert_equal, problems, property_test


@property_test(
    problem=problems(kind="indices", weighted=False, min_samples=0, max_exponent=3),
    zero_classes=st.sets(st.integers(0, 3)),
    form=st.sampled_from(["simplex", "paper"]),
    center_lr=st.sampled_from([None, 0.5]),
    start_zeros=st.booleans(),
)
def test_samples_class_sums_and_one_hot_probabilities_give_the_same_centers(
    problem: Problem,
    zero_classes: set[int],
    form: Form,
    center_lr: float | None,
    start_zeros: bool,
) -> None:
    num_classes = len(problem.centers)
    problem.centers[[label for label in zero_classes if label < num_classes]] = 0
    statistics = read_centers(problem.centers, form)
    norms = statistics.norms.squeeze(-1)

    valid = (problem.target != problem.ignore_index).double()
    units = normalize(problem.features)[0] * valid.unsqueeze(-1)
    index = problem.target.where(valid > 0, 0)
    _, one_hot, _ = problem.arrays
    by_class = class_sums(units, index, valid, num_classes)
    by_probability = probability_sums(units, torch.from_numpy(one_hot), valid, statistics)
    # The direction of a sum that cancels is rounding error.
    starting = norms.isinf() & (by_class[1] > 0)
    sizes = by_class[0][starting].norm(dim=-1)
    assume(not start_zeros or ((sizes == 0) | (sizes > 1e-3)).all())

    results = []
    for sums, counts, rows in ((units, valid, index), (*by_class, None), (*by_probability, None)):
        centers = problem.centers.clone()
        update_centers_(
            centers, statistics, sums, counts, rows, center_lr=center_lr, start_zeros=start_zeros
        )
        results.append(centers)
    if start_zeros:
        lengths = results[0][starting].norm(dim=-1)
        torch.testing.assert_close(lengths, (sizes > 0).to(lengths))  # zero samples start none
    # Relative to the norm, or to the size of a step: alpha / norm.
    alpha = center_lr
    if alpha is None:
        alpha = reference.default_center_lr(one_hot, problem.centers.numpy(), form)
    size = torch.maximum(norms, alpha / norms).masked_fill(norms.isinf(), 1).unsqueeze(-1)
    for other in results[1:]:
        assert_equal(other / size, (results[0] / size).numpy(), torch.float64)


@pytest.mark.parametrize("form", ["simplex", "paper"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_center_that_is_not_finite_starts_anew_and_spoils_no_other(
    form: str, value: float
) -> None:
    """Many classes, so that rows are updated, and few, so that all centers are."""
    for num_classes in (4, 40):
        centers = torch.randn(num_classes, 5, dtype=torch.float64)
        target, features = torch.tensor([0, 1, 1, 0, 2]), torch.randn(5, 5, dtype=torch.float64)
        results = []
        for start in (0.0, value):
            broken = centers.clone()
            broken[1] = start
            moved = broken.clone()
            step = run_step(features, target, broken, Options(form))  # type: ignore[arg-type]
            step.update_(moved, None, start_zeros=True)
            results.append((step.loss, moved))
        torch.testing.assert_close(results[1], results[0])
        assert results[1][1][1].norm() > 0.99


@pytest.mark.parametrize("form", ["simplex", "paper"])
def test_a_zero_sample_starts_no_center(form: Any) -> None:
    criterion = SeparateLoss(2, 3, form=form)
    criterion(torch.zeros(1, 3), torch.tensor([0]))
    assert not criterion.centers.any()
