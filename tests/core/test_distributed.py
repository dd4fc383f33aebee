"""Several processes with a part of the batch each, against one process with the whole batch."""

import copy
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from separate_loss import SeparateLoss, SoftmaxSeparateLoss, metrics
from separate_loss._torch import RELEASE
from tests.helpers.processes import run_in
from tests.helpers.releases import COMPILES_UPDATES, needs_sharding_on_cpu

NUM_CLASSES, FEATURE_DIM, INPUT_DIM, BATCH = 5, 4, 6, 12
STEPS = 20
SIZES = [2, 3]


def batches(kind: str, steps: int = STEPS) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(7)
    drawn = []
    for _ in range(steps):
        inputs = torch.randn(BATCH, INPUT_DIM, generator=generator, dtype=torch.float64)
        target = torch.randint(NUM_CLASSES, (BATCH,), generator=generator)
        if kind == "probabilities":
            logits = torch.rand(BATCH, NUM_CLASSES, generator=generator, dtype=torch.float64)
            target = logits.softmax(-1)
        drawn.append((inputs, target))
    return drawn


def build_model() -> nn.Sequential:
    torch.manual_seed(0)
    layers = nn.Linear(INPUT_DIM, 8), nn.Tanh(), nn.Linear(8, FEATURE_DIM)
    return nn.Sequential(*layers, nn.Linear(FEATURE_DIM, NUM_CLASSES)).double()


def train(rank: int, size: int, options: dict[str, Any]) -> dict[str, Any]:
    """Trains on equal parts of each batch; returns mean losses and the centers."""
    options = dict(options)
    kind, wrap = options.pop("kind", "indices"), options.pop("wrap", "ddp")
    model = build_model()
    torch.manual_seed(rank)  # Random centers differ before the first step.
    criterion = SoftmaxSeparateLoss(model[-1], dtype=torch.float64, **options)
    call: Any = model
    criterion_call: Any = criterion
    if size > 1 and wrap == "fsdp":
        fully_shard(model[0], mesh=init_device_mesh("cpu", (size,)))
        fully_shard(model[-1], mesh=init_device_mesh("cpu", (size,)))
        fully_shard(model, mesh=init_device_mesh("cpu", (size,)))
    elif size > 1:
        call = DistributedDataParallel(model)
        if wrap == "both":
            criterion_call = DistributedDataParallel(criterion)
    parameters = [*model.parameters(), *criterion.parameters()]
    optimizer = torch.optim.SGD(parameters, lr=0.1, momentum=0.9)
    losses = []
    for inputs, target in batches(kind):
        part = slice(rank * BATCH // size, (rank + 1) * BATCH // size)
        loss = criterion_call(call(inputs[part]), target[part])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    mean = torch.stack(losses)
    if size > 1:
        dist.all_reduce(mean)
    return {"losses": mean / size, "centers": criterion.separate.centers.detach().clone()}


SETTINGS: dict[str, dict[str, Any]] = {
    "random centers": {"center_init": "sphere", "center_lr": 1.0},
    "centers from features": {},
    "probabilities": {"kind": "probabilities", "center_init": "sphere"},
    "label smoothing": {"label_smoothing": 0.1},
    "paper": {"form": "paper", "center_lr": 3.0},
    "gradient": {"center_update": "gradient"},
    "gradient, loss in DDP": {"center_update": "gradient", "wrap": "both"},
    "fully sharded model": {"wrap": "fsdp"},
    "fully sharded model, gradient": {"wrap": "fsdp", "center_update": "gradient"},
}


def train_in_all_settings(rank: int, size: int) -> dict[str, dict[str, Any]]:
    return {
        name: train(rank, size, options)
        for name, options in SETTINGS.items()
        if "sharded" not in name or RELEASE >= (2, 7)
    }


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    "setting",
    [pytest.param(name, marks=[needs_sharding_on_cpu] * ("sharded" in name)) for name in SETTINGS],
)
def test_many_processes_train_as_one(size: int, setting: str) -> None:
    alone = results(1, train_in_all_settings)[0][setting]
    parts = [result[setting] for result in results(size, train_in_all_settings)]
    for part in parts:
        torch.testing.assert_close(part["losses"], alone["losses"], rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(part["centers"], alone["centers"], rtol=1e-6, atol=1e-6)
        assert torch.equal(part["centers"], parts[0]["centers"])


def learn_in_evaluation(rank: int, _: int) -> tuple[Tensor, str]:
    """An optimizer moves the centers while the loss is in evaluation mode."""
    criterion = SeparateLoss(NUM_CLASSES, FEATURE_DIM, center_update="gradient").eval()
    optimizer = torch.optim.SGD(criterion.parameters(), lr=1.0)
    torch.manual_seed(rank)
    for _ in range(3):
        features, target = torch.randn(8, FEATURE_DIM), torch.arange(8) % NUM_CLASSES
        optimizer.zero_grad()
        criterion(features, target).backward()
        optimizer.step()
    loss = criterion(features, target)
    with pytest.raises(RuntimeError) as error:
        torch.autograd.grad(loss, criterion.centers, create_graph=True)
    return criterion.centers.detach(), str(error.value)


def test_learned_centers_stay_equal_in_evaluation_mode() -> None:
    (one, message), (other, _) = results(2, learn_in_evaluation)
    assert torch.equal(one, other)
    assert "no second derivatives" in message


def load_and_copy(rank: int, _: int) -> list[Tensor]:
    """Loads a different checkpoint in each process after the first step, and copies the loss."""
    criterion = SeparateLoss(NUM_CLASSES, FEATURE_DIM)
    batch = torch.randn(8, FEATURE_DIM, requires_grad=True), torch.arange(8) % NUM_CLASSES
    criterion(*batch)
    torch.manual_seed(rank)
    criterion.load_state_dict({"centers": torch.randn(NUM_CLASSES, FEATURE_DIM)})
    twin = copy.deepcopy(criterion)
    results = []
    for each in (criterion, twin):
        each(*batch)
        results.append(each.centers)
    return results


def test_centers_are_synchronised_again_after_loading_and_copying() -> None:
    for one, other in zip(*results(2, load_and_copy), strict=True):
        assert torch.equal(one, other)


PART_SIZES = {2: [5, 0], 3: [5, 3, 0]}


def train_on_uneven_parts(rank: int, size: int) -> Tensor:
    """Uneven and empty parts; some steps have a NaN or an ignored sample."""
    criterion = SeparateLoss(NUM_CLASSES, FEATURE_DIM, dtype=torch.float64)
    generator = torch.Generator().manual_seed(3)
    for step in range(20):
        sizes = PART_SIZES[3 if size == 1 else size]
        count = sum(sizes)
        features = torch.randn(count, FEATURE_DIM, generator=generator, dtype=torch.float64)
        target = torch.randint(NUM_CLASSES, (count,), generator=generator)
        if step % 5 == 1:
            features[0, 0] = torch.nan
        if step % 5 == 2:
            target[1] = -100
        if size > 1:
            features, target = features.split(sizes)[rank], target.split(sizes)[rank]
        criterion(features.requires_grad_(), target).sum().backward()
    return criterion.centers


@pytest.mark.parametrize("size", SIZES)
def test_uneven_and_empty_parts_give_the_centers_of_one_process(size: int) -> None:
    parts = results(size, train_on_uneven_parts)
    assert all(torch.equal(part, parts[0]) for part in parts)
    assert parts[0].isfinite().all()
    if size == 3:
        torch.testing.assert_close(parts[0], train_on_uneven_parts(0, 1), rtol=1e-10, atol=1e-10)


def step_in_groups(rank: int, size: int) -> list[Tensor]:
    """Centers after a step with different samples, for each choice of the group."""
    torch.manual_seed(rank)
    centers = []
    alone: Any = [dist.new_group([other]) for other in range(size)][rank]
    choices: list[dict[str, Any]] = [
        {"sync_centers": False},
        {"process_group": alone},
        {"process_group": dist.group.WORLD},
        {},
    ]
    for options in choices:
        criterion = SeparateLoss(NUM_CLASSES, FEATURE_DIM, **options)
        criterion(torch.randn(8, FEATURE_DIM, requires_grad=True), torch.arange(8) % NUM_CLASSES)
        centers.append(criterion.centers)
    return centers


def test_centers_are_equal_within_the_process_group_only() -> None:
    expected = [False, False, True, True]
    for equal, one, other in zip(expected, *results(2, step_in_groups), strict=True):
        assert torch.equal(one, other) == equal


def compiled_step(rank: int, size: int) -> list[Tensor]:
    torch.manual_seed(0)
    results = []
    for compiling in (False, True):
        criterion = SeparateLoss(NUM_CLASSES, FEATURE_DIM)
        call: Any = criterion
        if compiling:
            call = torch.compile(criterion, fullgraph=COMPILES_UPDATES, backend="aot_eager")
        for inputs, target in batches("indices", 5):
            part = slice(rank * BATCH // size, (rank + 1) * BATCH // size)
            features = inputs[part, :FEATURE_DIM].float().requires_grad_()
            call(features, target[part]).backward()
        results.append(criterion.centers)
    return results


def test_compiled_steps_synchronise_the_centers() -> None:
    for plain, compiled in results(2, compiled_step):
        torch.testing.assert_close(plain, compiled)


def call_with_dtensor(_: int, size: int) -> str:
    mesh = init_device_mesh("cpu", (size,))
    features = DTensor.from_local(torch.randn(3, FEATURE_DIM), mesh)
    criterion = SeparateLoss(NUM_CLASSES, FEATURE_DIM)
    before = copy.deepcopy(criterion.centers)
    with pytest.raises(TypeError) as error:
        criterion(features, torch.arange(3))
    assert torch.equal(before, criterion.centers)
    return str(error.value)


def test_dtensors_are_refused() -> None:
    for message in results(2, call_with_dtensor):
        assert "features must be a plain tensor, got a DTensor; pass its full_tensor()" in message


def call_with_mismatches(rank: int, _: int) -> list[str]:
    """Types of centers, sizes of centers, and types of features that differ between processes."""
    types = [torch.float32, torch.float64]
    messages = []
    for classes, of_centers, of_features in (
        (5, types[rank], torch.float32),
        (5 + rank, torch.float32, torch.float32),
        (5, torch.float32, types[rank]),
    ):
        criterion = SeparateLoss(classes, FEATURE_DIM, dtype=of_centers)
        before = criterion.centers.clone()
        with pytest.raises(ValueError) as error:  # noqa: PT011
            criterion(torch.randn(3, FEATURE_DIM, dtype=of_features), torch.arange(3))
        assert torch.equal(criterion.centers, before)
        messages.append(str(error.value))
    return messages


def test_types_and_sizes_that_differ_are_refused_in_all_processes() -> None:
    for messages in results(2, call_with_mismatches):
        types, sizes, features = messages
        assert "(5, 4) of torch.float32 in the group's process 0 and (5, 4) of torch.f" in types
        assert "process 0 and (6, 4) of torch.float32 in process 1" in sizes
        assert "1 of 2 compute in torch.float64, the others in torch.float32" in features


def sum_statistics(rank: int, size: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(7)
    features = torch.randn(BATCH, FEATURE_DIM, generator=generator)
    target = torch.randint(NUM_CLASSES - 1, (BATCH,), generator=generator)
    part = slice(0, BATCH // 3) if rank == 0 else slice(BATCH // 3, BATCH)
    part = part if size > 1 else slice(0, BATCH)
    own = metrics.ClassStatistics(NUM_CLASSES, FEATURE_DIM).update(features[part], target[part])
    alone, total = own.class_centers(), own.all_reduce()
    torch.testing.assert_close(own.class_centers(), alone, rtol=0, atol=0, equal_nan=True)
    again = own.all_reduce().update(features, target)
    return {
        "centers": total.class_centers(),
        "intra": total.intra_class_similarity(),
        "counts": again.counts,
    }


def test_statistics_of_many_processes_equal_those_of_one() -> None:
    (alone,) = results(1, sum_statistics)
    assert alone["counts"].sum() == 2 * BATCH
    for found in results(2, sum_statistics):
        torch.testing.assert_close(found, alone, equal_nan=True)


def sum_unlike_statistics(rank: int, _: int) -> str:
    with pytest.raises(ValueError) as error:  # noqa: PT011
        metrics.ClassStatistics(5 + rank, FEATURE_DIM).all_reduce()
    return str(error.value)


def test_statistics_of_unlike_sizes_are_refused_in_all_processes() -> None:
    for message in results(2, sum_unlike_statistics):
        assert message.startswith("num_classes and feature_dim must be the same in all processes")
        assert "got (5, 4) in the group's process 0 and (6, 4) in process 1" in message


def test_bad_arguments_are_refused() -> None:
    with pytest.raises(TypeError, match=r"process_group must be None or a .* got str"):
        SeparateLoss(3, 4, process_group="all")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="sync_centers must be a bool, got int"):
        SeparateLoss(3, 4, sync_centers=1)  # type: ignore[arg-type]


def test_a_group_without_synchronisation_is_refused(tmp_path: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        with pytest.raises(ValueError, match="process_group must be None for sync_centers=False"):
            SeparateLoss(3, 4, process_group=dist.group.WORLD, sync_centers=False)
    finally:
        dist.destroy_process_group()


# The functions that run in the processes of a group, which are started once for all of them.
TASKS: dict[int, list[Callable[[int, int], Any]]] = {
    1: [train_in_all_settings, sum_statistics],
    2: [
        train_in_all_settings,
        learn_in_evaluation,
        load_and_copy,
        train_on_uneven_parts,
        step_in_groups,
        compiled_step,
        call_with_dtensor,
        call_with_mismatches,
        sum_statistics,
        sum_unlike_statistics,
    ],
    3: [train_in_all_settings, train_on_uneven_parts],
}


def run_tasks(rank: int, size: int) -> dict[str, Any]:
    return {task.__name__: task(rank, size) for task in TASKS[size]}


@functools.cache
def all_results(size: int) -> list[dict[str, Any]]:
    return run_in(size, run_tasks)


def results(size: int, task: Callable[[int, int], Any]) -> list[Any]:
    """The result of a task in each process."""
    return [result[task.__name__] for result in all_results(size)]
