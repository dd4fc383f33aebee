"""Centers sharded over several processes, against all centers in one process."""

import functools
import tempfile
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from separate_loss import SeparateLoss
from separate_loss.functional import separate_loss
from separate_loss.sharded import ShardedSeparateLoss
from tests.helpers.processes import run_in

FEATURE_DIM, STEPS = 4, 12
SIZES = [2, 3]
# 2 and 3 divide 6 classes. Of 3 processes, the last has one of 7 centers, and none of 4.
CASES = [
    ("features", 4, "simplex"),
    ("features", 7, "simplex"),
    ("tensor", 6, "simplex"),
    ("tensor", 7, "simplex"),
    ("tensor", 4, "paper"),
    ("tensor", 7, "paper"),
]
OPTIONS: dict[str, dict[str, Any]] = {
    "simplex": {},
    "paper": {"form": "paper", "center_lr": 2.0},
}

Case = tuple[str, int, str]
"""The start of the centers, the number of classes, and the name of the options."""

Parts = list[tuple[Tensor, Tensor]]


def center_init_of(init: str, num_classes: int) -> Any:
    generator = torch.Generator().manual_seed(5)
    values = torch.randn(num_classes, FEATURE_DIM, generator=generator, dtype=torch.float64)
    values[1] = 0
    return values if init == "tensor" else init


def steps(size: int, num_classes: int) -> Iterator[Parts]:
    """Uneven parts, some of them empty or ignored; some steps have a NaN or an ignored label."""
    generator = torch.Generator().manual_seed(7)
    for step in range(STEPS):
        parts = []
        for rank in range(size):
            count = (3 * step + 5 * rank) % 7
            features = torch.randn(count, FEATURE_DIM, generator=generator, dtype=torch.float64)
            target = torch.randint(num_classes, (count,), generator=generator)
            if step % 4 == 1:
                target[:1] = -100
            if step == 6:
                target[:] = -100
            if step == 9 and rank == 0:
                features[:1, 0] = torch.nan
            parts.append((features.requires_grad_(), target))
        yield parts


Run = tuple[list[Tensor], list[Tensor], Tensor]
"""Losses and gradients of the features of each step, and the centers at the end."""


def options_of(init: str, num_classes: int, options: str) -> dict[str, Any]:
    center_init = center_init_of(init, num_classes)
    return {"center_init": center_init, "dtype": torch.float64, **OPTIONS[options]}


def run_sharded(rank: int, size: int, case: Case) -> Run:
    num_classes = case[1]
    criterion = ShardedSeparateLoss(num_classes, FEATURE_DIM, **options_of(*case))
    losses, gradients = [], []
    for parts in steps(size, num_classes):
        features, target = parts[rank]
        loss = criterion(features, target)
        (gradient,) = torch.autograd.grad(loss, features)
        losses.append(loss.detach())
        gradients.append(gradient)
    return losses, gradients, criterion.centers.full_tensor()


def run_alone(size: int, case: Case) -> list[Run]:
    """The same steps in one process: a run for each part."""
    num_classes = case[1]
    criterion = SeparateLoss(num_classes, FEATURE_DIM, **options_of(*case))
    runs: list[Run] = [([], [], criterion.centers) for _ in range(size)]
    for parts in steps(size, num_classes):
        for (features, target), (losses, gradients, _) in zip(parts, runs, strict=True):
            loss = separate_loss(features, target, criterion.centers.clone(), form=criterion.form)
            (gradient,) = torch.autograd.grad(loss, features)
            losses.append(loss.detach())
            gradients.append(gradient)
        features, target = (torch.cat(kind) for kind in zip(*parts, strict=True))
        criterion(features, target)
    return runs


def train(rank: int, size: int) -> list[Tensor]:
    """Trains a model on equal parts; returns its parameters and the centers."""
    torch.manual_seed(0)
    model: Any = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, FEATURE_DIM)).double()
    criterion: Any = SeparateLoss(7, FEATURE_DIM, dtype=torch.float64)
    if size > 1:
        model = DistributedDataParallel(model)
        criterion = ShardedSeparateLoss(7, FEATURE_DIM, dtype=torch.float64)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
    for _ in range(STEPS):
        inputs, target = torch.randn(12, 6, dtype=torch.float64), torch.randint(7, (12,))
        part = slice(rank * 12 // size, (rank + 1) * 12 // size)
        features = model(inputs[part])
        loss = 0.9 * criterion(features, target[part]) + features.square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    centers = criterion.centers
    whole = centers.full_tensor() if isinstance(centers, DTensor) else centers
    return [*(parameter.detach() for parameter in model.parameters()), whole]


class Traffic(TorchDispatchMode):
    """Records the inputs of collectives, and the size of the largest result of any operator."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.sent: list[tuple[str, int]] = []
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            # The input comes after the output.
            *_, given = (value for value in tree_iter(args) if isinstance(value, Tensor))
            self.sent.append((func.overloadpacket.__name__, given.numel() * given.itemsize))
        result = func(*args, **(kwargs or {}))
        sizes = (value.numel() for value in tree_iter(result) if isinstance(value, Tensor))
        self.largest = max(self.largest, *sizes, 0)
        return result


def measure_traffic(size: int) -> tuple[list[tuple[str, int]], int]:
    """Each process has samples of the same classes, equally many from each shard."""
    num_classes, samples = 300 * size, 5 * size
    with Traffic() as traffic:
        criterion = ShardedSeparateLoss(num_classes, FEATURE_DIM)
        construction = len(traffic.sent)
        target = torch.arange(samples) * (num_classes // samples)
        criterion(torch.randn(samples, FEATURE_DIM, requires_grad=True), target).backward()
    return traffic.sent[construction:], traffic.largest


def compare_reductions(rank: int) -> dict[str, Any]:
    """Pairs of results of the sharded and the plain module, computed in one process."""
    torch.manual_seed(rank)
    start = center_init_of("tensor", 7)
    features, target = torch.randn(2, 3, FEATURE_DIM), torch.randint(7, (2, 3))
    pairs = {}
    for reduction in ("none", "sum"):
        for training in (True, False):
            options: Any = {"center_init": start, "reduction": reduction, "dtype": torch.bfloat16}
            sharded = ShardedSeparateLoss(7, FEATURE_DIM, **options).train(training)
            whole = SeparateLoss(7, FEATURE_DIM, **options).train(training)
            losses = sharded(features, target), whole(features, target)
            centers = sharded.centers.full_tensor(), whole.centers
            terms = [tuple(one.last_terms or ()) for one in (sharded, whole)]
            pairs[f"{reduction}, {training}"] = [losses, centers, terms]
    return pairs


def draw_centers() -> dict[str, Tensor]:
    torch.manual_seed(0)
    criterion = ShardedSeparateLoss(40, 8, center_init="sphere")
    drawn = {"sphere": criterion.centers.full_tensor().clone()}
    criterion.reset_parameters()
    drawn["sphere again"] = criterion.centers.full_tensor()
    assert not torch.equal(drawn["sphere"], drawn["sphere again"])
    given = ShardedSeparateLoss(40, 8, center_init=drawn["sphere"])
    given.centers.to_local().zero_()
    given.reset_parameters()
    assert torch.equal(given.centers.full_tensor(), drawn["sphere"])
    return drawn


def make_bad_calls(rank: int, size: int) -> list[str]:
    criterion = ShardedSeparateLoss(7, FEATURE_DIM)
    features = torch.randn(3, FEATURE_DIM)
    mesh = init_device_mesh("cpu", (1, size))
    calls: list[Any] = [
        lambda: criterion(features, torch.rand(3, 7)),
        lambda: criterion(features, torch.tensor([0, 7, 1])),
        lambda: criterion(features[:, 1:], torch.arange(3)),
        lambda: ShardedSeparateLoss(7, FEATURE_DIM, center_init=torch.ones(2, FEATURE_DIM)),
        lambda: ShardedSeparateLoss(7, FEATURE_DIM, mesh=mesh),
        lambda: criterion(features.double() if rank == 0 else features, torch.arange(3)),
    ]
    messages = []
    for call in calls:
        with pytest.raises((TypeError, ValueError, IndexError)) as error:
            call()
        messages.append(str(error.value))
    return messages


def save(folder: str) -> Tensor:
    criterion = ShardedSeparateLoss(7, FEATURE_DIM, center_init="sphere")
    state_dict_saver.save({"criterion": criterion.state_dict()}, checkpoint_id=folder)
    return criterion.centers.full_tensor()


def load(folder: str) -> Tensor:
    criterion = ShardedSeparateLoss(7, FEATURE_DIM)
    state = {"criterion": criterion.state_dict()}
    state_dict_loader.load(state, checkpoint_id=folder)
    criterion.load_state_dict(state["criterion"])
    return criterion.centers.full_tensor()


def run_all(rank: int, size: int, folder: str) -> dict[str, Any]:
    """Runs all tasks in one group of processes, since their start takes longest."""
    return {
        **{str(case): run_sharded(rank, size, case) for case in CASES},
        "train": train(rank, size),
        "traffic": measure_traffic(size),
        "reductions": compare_reductions(rank),
        "random centers": draw_centers(),
        "bad calls": make_bad_calls(rank, size),
        "saved by 3": (save if size == 3 else load)(folder),
    }


@pytest.fixture(scope="module")
def results() -> Iterator[dict[int, list[dict[str, Any]]]]:
    with tempfile.TemporaryDirectory() as folder:
        run = functools.partial(run_all, folder=folder)
        by_size: dict[int, Any] = {size: run_in(size, run) for size in (3, 2)}
        alone = SeparateLoss(7, FEATURE_DIM)
        state = {"criterion": alone.state_dict()}
        with pytest.warns(UserWarning, match="assuming the intent is to load in a single process"):
            state_dict_loader.load(state, checkpoint_id=folder)
        alone.load_state_dict(state["criterion"])
        yield {**by_size, 1: [{"saved by 3": alone.centers}]}


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("case", CASES)
def test_sharded_steps_equal_those_of_one_process(results: Any, size: int, case: Case) -> None:
    expected = run_alone(size, case)
    for part, whole in zip(results[size], expected, strict=True):
        torch.testing.assert_close(part[str(case)], whole, rtol=1e-10, atol=1e-10, equal_nan=True)


@pytest.mark.parametrize("size", SIZES)
def test_a_model_trains_as_with_one_process(results: Any, size: int) -> None:
    expected = train(0, 1)
    for part in results[size]:
        torch.testing.assert_close(part["train"], expected, rtol=1e-10, atol=1e-10)


def collectives(samples: int, size: int) -> list[tuple[str, int]]:
    """Operators and bytes of a step, as docs/benchmarks/sharded.md counts them."""
    return [
        ("alltoall_base_", 8 * 2 * size),  # how many classes go where, and the float type
        ("alltoall_base_", 8 * samples),  # classes
        ("alltoall_base_", 4 * samples * FEATURE_DIM),  # their unit centers
        # the sum of unit centers, their Gram matrix, and two counts
        ("allreduce_", 4 * (FEATURE_DIM + FEATURE_DIM**2 + 2)),
        ("alltoall_base_", 4 * samples * (FEATURE_DIM + 1)),  # sums and counts
    ]


@pytest.mark.parametrize("size", SIZES)
def test_collectives_are_those_that_the_page_counts(results: Any, size: int) -> None:
    for part in results[size]:
        sent, largest = part["traffic"]
        assert sorted(sent) == sorted(collectives(5 * size, size))
        assert largest <= 300 * FEATURE_DIM


@pytest.mark.parametrize("size", SIZES)
def test_reductions_and_modes_equal_those_of_the_plain_module(results: Any, size: int) -> None:
    for part in results[size]:
        for pairs in part["reductions"].values():
            for sharded, whole in pairs:
                torch.testing.assert_close(sharded, whole)


@pytest.mark.parametrize("size", SIZES)
def test_random_centers_differ_between_shards(results: Any, size: int) -> None:
    for part in results[size]:
        for centers in part["random centers"].values():
            assert centers.unique(dim=0).shape == (40, 8)


def test_checkpoints_load_on_other_numbers_of_processes(results: Any) -> None:
    saved = results[3][0]["saved by 3"]
    assert saved.count_nonzero() == saved.numel()
    for size in (1, 2, 3):
        for part in results[size]:
            assert torch.equal(part["saved by 3"], saved)


MESSAGES = [
    # As the calls in make_bad_calls.
    "target must hold class indices (an integer type) where centers are sharded, got torch.float32",
    "target must hold class indices in [0, 7) or ignore_index (-100), got 7",
    "features must have 4 values in the last dimension, as centers have, got shape (3, 3)",
    "center_init must have shape (7, 4), got (2, 4)",
    "mesh must have one dimension of cpu devices, got ",
    "features must have one type in all processes, got such that 1 of ",
]


@pytest.mark.parametrize("size", SIZES)
def test_bad_calls_are_refused(results: Any, size: int) -> None:
    for part in results[size]:
        for message, expected in zip(part["bad calls"], MESSAGES, strict=True):
            assert message.startswith(expected)


def test_a_process_group_must_be_initialised() -> None:
    assert not dist.is_initialized()
    with pytest.raises(RuntimeError, match=r"call torch.distributed.init_process_group before"):
        ShardedSeparateLoss(3, 4)
