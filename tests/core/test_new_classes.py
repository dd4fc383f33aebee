"""New classes beside old ones: old centers without samples drift, unless they are put back."""

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from separate_loss import SeparateLoss

OLD, NEW, FEATURE_DIM = 7, 2, 16


def train(criterion: SeparateLoss, means: Tensor, classes: range, hold: Tensor | None) -> None:
    """300 steps with samples of some of the classes."""
    for _ in range(300):
        target = torch.randint(classes.start, classes.stop, (32,))
        features = means[target] + torch.randn(32, FEATURE_DIM)
        criterion(features.requires_grad_(), target)
        if hold is not None:
            criterion.centers[:OLD] = hold


@pytest.mark.parametrize("seed", range(3))
def test_old_centers_drift_without_samples_and_hold_if_put_back(seed: int) -> None:
    torch.manual_seed(seed)
    means = 3 * torch.randn(OLD + NEW, FEATURE_DIM)
    first = SeparateLoss(OLD, FEATURE_DIM)
    train(first, means, range(OLD), None)
    old = first.centers.clone()
    start = torch.cat([old, old.new_zeros(NEW, FEATURE_DIM)])
    for hold in (None, old):
        wider = SeparateLoss(OLD + NEW, FEATURE_DIM, center_init=start)
        train(wider, means, range(OLD, OLD + NEW), hold)
        now = wider.centers[:OLD]
        if hold is None:
            assert 0.6 < cosine_similarity(now, old).min() < 0.9
        else:
            assert torch.equal(now, old)
        # The new classes have centers, where their samples are.
        assert cosine_similarity(wider.centers[OLD:], means[OLD:]).min() > 0.7


def test_no_center_moves_with_center_update_none() -> None:
    start = torch.randn(OLD + NEW, FEATURE_DIM)
    fixed = SeparateLoss(OLD + NEW, FEATURE_DIM, center_update="none", center_init=start)
    train(fixed, start, range(OLD, OLD + NEW), None)
    assert torch.equal(fixed.centers, start)
