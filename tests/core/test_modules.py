"""SeparateLoss: when its centers move and where they start; copies, checkpoints and types."""

import copy
import io
import pickle
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from separate_loss import SeparateLoss, separate_loss
from separate_loss import functional as F
from separate_loss._checks import Reduction
from tests.helpers.properties import REDUCTIONS, Problem, problems, property_test

NUM_CLASSES, FEATURE_DIM = 5, 4


def batch(size: int = 8) -> tuple[Tensor, Tensor]:
    features = torch.randn(size, FEATURE_DIM, requires_grad=True)
    return features, torch.randint(NUM_CLASSES, (size,))


@property_test(problem=problems(max_exponent=3), reduction=REDUCTIONS)
def test_the_loss_uses_the_centers_before_the_update(
    problem: Problem, reduction: Reduction
) -> None:
    criterion = SeparateLoss(
        *problem.centers.shape,
        center_init=problem.centers,
        center_lr=0.5,
        weight=problem.weight,
        ignore_index=problem.ignore_index,
        reduction=reduction,
        dtype=torch.float64,
    )
    options = {
        "weight": problem.weight,
        "ignore_index": problem.ignore_index,
        "reduction": reduction,
    }
    features, _ = problem.requiring_grad()
    other, _ = problem.requiring_grad()
    centers = criterion.centers.clone()
    loss = criterion(features, problem.target)
    expected = separate_loss(other, problem.target, centers, **options)  # type: ignore[arg-type]
    assert torch.equal(loss, expected)
    loss.sum().backward()
    expected.sum().backward()
    assert features.grad is not None
    assert other.grad is not None
    assert torch.equal(features.grad, other.grad)
    moved = F.update_centers(
        problem.features,
        problem.target,
        centers,
        center_lr=0.5,
        ignore_index=problem.ignore_index,
    )
    # The module starts zero centers; Eq. 8 keeps them.
    nonzero = centers.any(-1)
    assert torch.equal(criterion.centers[nonzero], moved[nonzero])


@property_test(problem=problems(max_exponent=3, weighted=True), reduction=REDUCTIONS)
def test_last_terms_are_both_terms_without_a_graph(problem: Problem, reduction: Reduction) -> None:
    criterion = SeparateLoss(
        *problem.centers.shape,
        center_init=problem.centers,
        weight=problem.weight,
        ignore_index=problem.ignore_index,
        reduction=reduction,
        dtype=torch.float64,
    )
    assert criterion.last_terms is None
    criterion(problem.requiring_grad()[0], problem.target)
    assert criterion.last_terms is not None
    intra, inter, num_centers = criterion.last_terms
    assert num_centers == problem.centers.any(-1).sum()
    assert not intra.requires_grad
    assert not inter.requires_grad
    torch.testing.assert_close(
        intra,
        F.intra_class_loss(
            problem.features,
            problem.target,
            problem.centers,
            weight=problem.weight,
            ignore_index=problem.ignore_index,
        ),
    )
    torch.testing.assert_close(inter, F.inter_class_loss(problem.centers))


def test_centers_move_only_in_training_with_gradients_on() -> None:
    criterion = SeparateLoss(NUM_CLASSES, FEATURE_DIM)
    criterion(*batch())
    for mode in ("eval", "no_grad", "inference_mode"):
        before = criterion.centers.clone()
        criterion.train(mode != "eval")
        with (
            torch.inference_mode(mode == "inference_mode"),
            torch.set_grad_enabled(mode not in ("no_grad", "inference_mode")),
        ):
            criterion(*batch())
        assert torch.equal(criterion.centers, before), mode
    criterion.train()
    criterion(*batch())
    assert not torch.equal(criterion.centers, before)


def test_backward_uses_the_centers_of_its_own_forward_pass() -> None:
    """Two forward passes and one backward give the gradients of two separate steps."""
    criterion = SeparateLoss(NUM_CLASSES, FEATURE_DIM, center_init="sphere", dtype=torch.float64)
    for kind in ("indices", "probabilities", "learned"):
        features = [torch.randn(8, FEATURE_DIM, dtype=torch.float64).requires_grad_() for _ in "ab"]
        target = torch.randint(NUM_CLASSES, (8,))
        if kind != "indices":
            target = torch.rand(8, NUM_CLASSES, dtype=torch.float64).softmax(-1)
            target.requires_grad_(kind == "learned")
        centers, losses = [], []
        for part in features:
            centers.append(criterion.centers.clone())
            losses.append(criterion(part, target))
        (losses[0] + losses[1]).backward()
        for part, held in zip(features, centers, strict=True):
            expected = torch.autograd.grad(separate_loss(part, target, held), part)[0]
            assert part.grad is not None
            torch.testing.assert_close(part.grad, expected)


def test_with_gradient_update_the_optimizer_moves_the_centers() -> None:
    criterion = SeparateLoss(NUM_CLASSES, FEATURE_DIM, center_update="gradient")
    assert [name for name, _ in criterion.named_parameters()] == ["centers"]
    optimizer = torch.optim.SGD(criterion.parameters(), lr=0.5)
    features, target = batch(32)
    before = criterion.centers.detach().clone()
    losses: list[float] = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = criterion(features, target)
        assert torch.equal(criterion.centers, before) or losses
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert all(later < earlier for earlier, later in pairwise(losses))


def test_with_update_none_the_centers_do_not_move() -> None:
    criterion = SeparateLoss(NUM_CLASSES, FEATURE_DIM, center_update="none")
    before = criterion.centers.clone()
    criterion(*batch()).backward()
    assert torch.equal(criterion.centers, before)
    assert not list(criterion.parameters())


@pytest.mark.parametrize("update", ["forward", "gradient", "none"])
def test_centers_are_saved_under_one_name(update: str) -> None:
    criterion = SeparateLoss(NUM_CLASSES, FEATURE_DIM, center_update=update)  # type: ignore[arg-type]
    other = SeparateLoss(NUM_CLASSES, FEATURE_DIM, center_init="sphere")
    other.load_state_dict(criterion.state_dict())
    assert list(criterion.state_dict()) == ["centers"]
    assert torch.equal(other.centers, criterion.centers)


class TestCenterInit:
    def test_features_starts_a_center_at_the_mean_direction_of_its_first_samples(self) -> None:
        criterion = SeparateLoss(NUM_CLASSES, FEATURE_DIM)
        assert torch.equal(criterion.centers, torch.zeros(NUM_CLASSES, FEATURE_DIM))
        features = torch.randn(6, FEATURE_DIM, requires_grad=True)
        target = torch.tensor([0, 0, 0, 3, 3, -100])
        loss = criterion(features, target)
        # Zero centers have cosine 0 with everything, and are apart from none.
        assert loss == 0.5
        units = nn.functional.normalize(features.detach(), dim=-1)
        for label, rows in ((0, units[:3]), (3, units[3:5])):
            mean = nn.functional.normalize(rows.mean(0), dim=0)
            torch.testing.assert_close(criterion.centers[label], mean)
        assert torch.equal(criterion.centers[[1, 2, 4]], torch.zeros(3, FEATURE_DIM))

        started = criterion.centers.clone()
        features = torch.randn(2, FEATURE_DIM, requires_grad=True)
        criterion(features, torch.tensor([1, 0]))
        torch.testing.assert_close(
            criterion.centers[1], nn.functional.normalize(features.detach()[0], dim=0)
        )
        expected = F.update_centers(features, torch.tensor([1, 0]), started, center_lr=None)
        torch.testing.assert_close(criterion.centers[[0, 2, 3, 4]], expected[[0, 2, 3, 4]])

    def test_rows_of_zeros_start_as_with_features(self) -> None:
        """As after new classes are added to a checkpoint."""
        given = torch.cat([torch.randn(3, FEATURE_DIM), torch.zeros(2, FEATURE_DIM)])
        features, target = torch.randn(6, FEATURE_DIM), torch.tensor([0, 3, 3, 4, 4, 4])
        fresh = SeparateLoss(NUM_CLASSES, FEATURE_DIM)
        fresh(features, target)
        loaded = SeparateLoss(NUM_CLASSES, FEATURE_DIM, center_init="sphere")
        loaded.load_state_dict({"centers": given})
        for criterion in (SeparateLoss(NUM_CLASSES, FEATURE_DIM, center_init=given), loaded):
            criterion(features, target)
            torch.testing.assert_close(criterion.centers[3:], fresh.centers[3:])
            second = features.clone().requires_grad_()
            criterion(second, target).backward()
            assert second.grad is not None
            assert second.grad[1:].any(-1).all()
        with pytest.raises(ValueError, match=r"no row of zeros .* got one for class 3"):
            SeparateLoss(NUM_CLASSES, FEATURE_DIM, center_update="gradient", center_init=given)

    @pytest.mark.parametrize("form", ["simplex", "paper"])
    def test_a_class_starts_at_the_samples_that_it_is_the_most_probable_class_of(
        self, form: Any
    ) -> None:
        criterion = SeparateLoss(4, FEATURE_DIM, form=form)
        features = torch.randn(4, FEATURE_DIM)
        target = torch.tensor(
            [[0.7, 0.2, 0.1, 0.0], [0.6, 0.0, 0.4, 0.0], [0.0, 0.5, 0.5, 0.0], [0.0, 0.0, 0.0, 0.0]]
        )
        criterion(features, target)
        units = nn.functional.normalize(features, dim=-1)
        expected = torch.stack(
            [0.7 * units[0] + 0.6 * units[1], units[2], units[2], torch.zeros(FEATURE_DIM)]
        )
        torch.testing.assert_close(criterion.centers, nn.functional.normalize(expected, dim=-1))

    def test_label_smoothing_starts_no_class(self) -> None:
        for target in (torch.tensor([0, 1, 0]), torch.eye(3)[[0, 1, 0]]):
            criterion = SeparateLoss(3, FEATURE_DIM, label_smoothing=0.1)
            criterion(torch.randn(3, FEATURE_DIM), target)
            assert criterion.centers.any(-1).tolist() == [True, True, False]

    def test_samples_that_are_not_finite_start_no_center(self) -> None:
        criterion = SeparateLoss(NUM_CLASSES, FEATURE_DIM)
        features = torch.randn(3, FEATURE_DIM)
        features[0, 0] = torch.nan
        criterion(features.requires_grad_(), torch.tensor([0, 1, 1]))
        assert torch.equal(criterion.centers[0], torch.zeros(FEATURE_DIM))
        assert criterion.centers[1].norm() > 0.99

    @pytest.mark.parametrize("update", ["forward", "gradient", "none"])
    def test_random_centers_have_the_stated_distribution(self, update: str) -> None:
        options = {"center_update": update}
        sphere = SeparateLoss(1000, 64, center_init="sphere", **options).centers.detach()  # type: ignore[arg-type]
        torch.testing.assert_close(sphere.norm(dim=-1), torch.ones(1000))
        assert abs(float(sphere.mean())) < 0.01

    def test_the_seed_determines_random_centers(self) -> None:
        runs = []
        for _ in range(2):
            torch.manual_seed(7)
            runs.append(SeparateLoss(NUM_CLASSES, FEATURE_DIM, center_init="sphere").centers)
        assert torch.equal(*runs)


class TestModuleInterface:
    def test_centers_have_the_given_device_and_dtype(self) -> None:
        meta = SeparateLoss(NUM_CLASSES, FEATURE_DIM, device="meta", dtype=torch.float64)
        assert meta.centers.device.type == "meta"
        assert meta.centers.dtype == torch.float64
        criterion = SeparateLoss(NUM_CLASSES, FEATURE_DIM, dtype=torch.bfloat16)
        assert criterion.centers.dtype == torch.bfloat16
        assert criterion.to(torch.float64).centers.dtype == torch.float64
        assert criterion.to("meta").centers.device.type == "meta"

    @pytest.mark.parametrize("update", ["forward", "gradient", "none"])
    def test_half_precision_modules_train(self, update: str) -> None:
        criterion = SeparateLoss(
            NUM_CLASSES,
            FEATURE_DIM,
            center_update=update,  # type: ignore[arg-type]
            center_init="sphere",
            weight=torch.rand(NUM_CLASSES),
        ).half()
        assert criterion.centers.dtype == torch.float16
        before = criterion.centers.detach().clone()
        features, target = batch()
        loss = criterion(features.half(), target)
        loss.backward()
        assert features.grad is not None
        assert features.grad.isfinite().all()
        assert criterion.centers.dtype == torch.float16
        assert torch.equal(criterion.centers, before) == (update != "forward")

    def test_copies_and_pickles_continue_identically(self) -> None:
        criterion = SeparateLoss(NUM_CLASSES, FEATURE_DIM, weight=torch.rand(NUM_CLASSES))
        criterion(*batch())
        twins = [copy.deepcopy(criterion), pickle.loads(pickle.dumps(criterion))]
        features, target = batch()
        expected = criterion(features, target)
        for twin in twins:
            assert torch.equal(twin(features, target), expected)
            assert torch.equal(twin.centers, criterion.centers)
            assert repr(twin) == repr(criterion)

    def test_repr_shows_the_arguments(self) -> None:
        assert repr(SeparateLoss(7, 512)) == (
            "SeparateLoss(num_classes=7, feature_dim=512, form='simplex', center_update='forward', "
            "center_lr=None, center_init='features', reduction='mean')"
        )
        criterion = SeparateLoss(
            7, 2, center_update="none", center_init=torch.rand(7, 2), ignore_index=3,
            form="paper", weight=torch.ones(7), reduction="sum", label_smoothing=0.1,
        )  # fmt: skip
        assert repr(criterion) == (
            "SeparateLoss(num_classes=7, feature_dim=2, form='paper', center_update='none', "
            "center_init='tensor', reduction='sum', label_smoothing=0.1, ignore_index=3, "
            "weight=...)"
        )

    def test_last_terms_do_not_keep_the_graph(self) -> None:
        criterion = SeparateLoss(NUM_CLASSES, FEATURE_DIM)
        loss = criterion(*batch())
        assert loss.grad_fn is not None
        assert all(not value.requires_grad for value in criterion.last_terms or ())


def test_training_resumes_bit_identically() -> None:
    def start() -> tuple[nn.Linear, SeparateLoss, torch.optim.Adam]:
        torch.manual_seed(1)
        model = nn.Linear(6, FEATURE_DIM)
        criterion = SeparateLoss(NUM_CLASSES, FEATURE_DIM)
        return model, criterion, torch.optim.Adam(model.parameters())

    def steps(
        seed: int, model: nn.Linear, criterion: SeparateLoss, optimizer: torch.optim.Optimizer
    ) -> list[Tensor]:
        torch.manual_seed(seed)
        losses = []
        for _ in range(10):
            images, target = torch.randn(8, 6), torch.randint(NUM_CLASSES - 1, (8,))
            loss = criterion(model(images), target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        return losses

    first: tuple[Any, ...] = start()
    steps(2, *first)
    buffer = io.BytesIO()
    torch.save([part.state_dict() for part in first], buffer)
    expected = steps(3, *first)

    second: tuple[Any, ...] = start()
    buffer.seek(0)
    for part, state in zip(second, torch.load(buffer, weights_only=True), strict=True):
        part.load_state_dict(state)
    continued = steps(3, *second)
    assert all(torch.equal(a, b) for a, b in zip(expected, continued, strict=True))
    assert torch.equal(first[1].centers, second[1].centers)


class TestReset:
    @pytest.mark.parametrize("given", ["features", "sphere", "tensor"])
    def test_reset_parameters_restores_initial_values(self, given: Any) -> None:
        init = torch.randn(NUM_CLASSES, FEATURE_DIM) if given == "tensor" else given
        weight = torch.rand(NUM_CLASSES)
        criterion = SeparateLoss(NUM_CLASSES, FEATURE_DIM, center_init=init, weight=weight.clone())
        start = criterion.centers.clone()
        features, target = torch.randn(6, FEATURE_DIM), torch.arange(6) % NUM_CLASSES
        criterion(features, target)
        assert not torch.equal(criterion.centers, start)
        criterion.to_empty(device="cpu")
        criterion.reset_parameters()
        if given == "sphere":
            torch.testing.assert_close(criterion.centers.norm(dim=-1), start.norm(dim=-1))
        else:
            assert torch.equal(criterion.centers, start)
        assert criterion.weight is not None
        assert torch.equal(criterion.weight, weight)


@pytest.mark.parametrize("form", ["simplex", "paper"])
@pytest.mark.parametrize("num_classes", [2, 7, 300])
@pytest.mark.parametrize("size", [3, 40, 1000])
def test_the_default_center_lr_depends_on_the_batch_size(
    form: Any, num_classes: int, size: int
) -> None:
    """0.1 times the number of samples that are not ignored, at most 4 (C - 1)."""
    features = torch.randn(size, FEATURE_DIM)
    target = torch.arange(size) % num_classes
    target[::3] = -100
    counted = size - len(target[::3])
    start = torch.randn(num_classes, FEATURE_DIM)
    options: dict[str, Any] = {"center_init": start, "form": form}
    default = SeparateLoss(num_classes, FEATURE_DIM, **options)
    rate = min(counted / 10, 4.0 * (num_classes - 1))
    same = SeparateLoss(num_classes, FEATURE_DIM, center_lr=rate, **options)
    for criterion in (default, same):
        criterion(features, target)
    torch.testing.assert_close(default.centers, same.centers)


def test_the_number_of_centers_is_exact_under_every_default_type() -> None:
    criterion = SeparateLoss(1001, 4, center_init="sphere", dtype=torch.float32)
    torch.set_default_dtype(torch.bfloat16)
    try:
        criterion(torch.randn(4, 4), torch.arange(4))
    finally:
        torch.set_default_dtype(torch.float32)
    assert criterion.last_terms is not None
    assert criterion.last_terms.num_centers == 1001
