"""Where centers get their values: given ones, missing ones, and those that others wrote."""

import copy
import functools
import io
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.functional import normalize

from separate_loss import SeparateLoss
from separate_loss._torch import RELEASE
from separate_loss.sharded import ShardedSeparateLoss
from tests.helpers.processes import run_in
from tests.helpers.properties import property_test
from tests.helpers.releases import needs_compiled_transforms, needs_sharding_on_cpu

NUM_CLASSES, FEATURE_DIM = 5, 4
SHAPE = NUM_CLASSES, FEATURE_DIM
UPDATES: list[Any] = ["forward", "gradient", "none"]
each_update = pytest.mark.parametrize("update", UPDATES)


def batch() -> tuple[Tensor, Tensor]:
    return torch.randn(10, FEATURE_DIM, requires_grad=True), torch.arange(10) % NUM_CLASSES


def pickled(criterion: nn.Module) -> bytes:
    buffer = io.BytesIO()
    torch.save(criterion, buffer)
    return buffer.getvalue()


def unpickled(data: bytes) -> Any:
    return torch.load(io.BytesIO(data), weights_only=False)


class TestGivenCenters:
    @each_update
    def test_reset_restores_them_whatever_happens_to_the_tensor(self, update: Any) -> None:
        layer = nn.Linear(FEATURE_DIM, NUM_CLASSES)
        criterion = SeparateLoss(*SHAPE, center_update=update, center_init=normalize(layer.weight))
        start = criterion.centers.detach().clone()
        torch.testing.assert_close(start, normalize(layer.weight.detach()))
        criterion(*batch()).backward()
        assert layer.weight.grad is None
        with torch.no_grad():
            layer.weight.fill_(9.0)
            criterion.centers.add_(1.0)
        for twin in (criterion, copy.deepcopy(criterion), unpickled(pickled(criterion))):
            assert not torch.equal(twin.centers, start)
            twin.reset_parameters()
            assert torch.equal(twin.centers, start)
        fresh = unpickled(pickled(criterion))
        fresh(*batch())
        fresh.reset_parameters()
        assert torch.equal(fresh.centers, start)

    def test_class_weights_are_copied(self) -> None:
        weight = torch.ones(NUM_CLASSES, requires_grad=True)
        criterion = SeparateLoss(*SHAPE, weight=weight)
        with torch.no_grad():
            weight.zero_()
        criterion.reset_parameters()
        assert criterion.weight is not None
        assert torch.equal(criterion.weight, torch.ones(NUM_CLASSES))
        assert not criterion.weight.requires_grad

    @each_update
    def test_pickles_store_them_once(self, update: Any) -> None:
        base = torch.randn(3000, 64)
        criterion = SeparateLoss(1000, 64, center_update=update, center_init=base[::3])
        size = 1000 * 64 * 4
        assert len(pickled(criterion)) < 1.1 * size
        with torch.no_grad():
            criterion.centers.add_(1.0)
        assert len(pickled(criterion)) < 2.1 * size

    @property_test(
        exponents=st.lists(st.integers(-36, 37), min_size=NUM_CLASSES, max_size=NUM_CLASSES)
    )
    def test_forward_takes_their_directions(self, exponents: list[int]) -> None:
        units = normalize(torch.randn(SHAPE, dtype=torch.float64))
        given = (units * 10.0 ** torch.tensor(exponents).unsqueeze(-1)).float()
        given[3], given[4, 0] = 0, torch.nan
        criterion = SeparateLoss(*SHAPE, center_init=given)
        expected = normalize(given.double(), eps=0)
        expected[3:] = 0
        torch.testing.assert_close(criterion.centers, expected.float())
        assert torch.equal(
            SeparateLoss(*SHAPE, center_init=criterion.centers).centers, criterion.centers
        )

    @pytest.mark.parametrize("update", ["gradient", "none"])
    def test_other_updates_take_them_as_they_are(self, update: Any) -> None:
        given = torch.randn(SHAPE) * 100
        criterion = SeparateLoss(*SHAPE, center_update=update, center_init=given)
        assert torch.equal(criterion.centers, given)

    def test_numbers_and_arrays_of_numpy_are_taken(self) -> None:
        array: Any = np.random.default_rng(0).normal(size=SHAPE)
        labels = np.array([0, 4, 2])
        int_of_numpy: Any = np.int32(FEATURE_DIM)
        options: dict[str, Any] = {
            "center_init": array,
            "weight": np.ones(NUM_CLASSES),
            "center_lr": np.float32(0.5),
            "ignore_index": np.int64(-1),
            "label_smoothing": np.float32(0.25),
        }
        criterion = SeparateLoss(labels.max() + 1, int_of_numpy, **options)
        with torch.device("meta"):
            elsewhere = SeparateLoss(*SHAPE, center_init=array).to_empty(device="cpu")
        same = SeparateLoss(
            *SHAPE,
            center_init=torch.tensor(array),
            weight=torch.ones(NUM_CLASSES),
            center_lr=0.5,
            ignore_index=-1,
            label_smoothing=0.25,
        )
        assert torch.equal(elsewhere.centers, same.centers)
        features, target = batch()
        assert torch.equal(criterion(features, target), same(features, target))
        assert torch.equal(criterion.centers, same.centers)
        assert repr(criterion) == repr(same)


def start_of(kind: str) -> Any:
    return torch.eye(*SHAPE) + 1 if kind == "tensor" else kind


STARTS = [
    ("forward", "features"),
    ("forward", "sphere"),
    ("gradient", "sphere"),
    *((update, "tensor") for update in UPDATES),
]


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fills what `to_empty` takes with values, as used memory would have."""
    empty_like = torch.empty_like

    def used(*arguments: Any, **options: Any) -> Tensor:
        tensor = empty_like(*arguments, **options)
        if not tensor.is_meta:
            tensor.data.fill_(7)
        return tensor

    monkeypatch.setattr(torch, "empty_like", used)


@pytest.mark.usefixtures("memory")
class TestMissingValues:
    @pytest.mark.parametrize(("update", "start"), STARTS)
    @pytest.mark.parametrize("made", [True, False])
    def test_initial_values_take_the_place_of_memory(
        self, update: Any, start: str, made: bool
    ) -> None:
        options: Any = {"center_update": update, "center_init": start_of(start)}
        options["weight"] = torch.rand(NUM_CLASSES)
        real = SeparateLoss(*SHAPE, **options)
        with torch.device("meta" if made else "cpu"):
            criterion = SeparateLoss(*SHAPE, **options)
        criterion = criterion.to("meta").to_empty(device="cpu")
        if start == "sphere":
            torch.testing.assert_close(criterion.centers.norm(dim=-1), torch.ones(NUM_CLASSES))
        else:
            assert torch.equal(criterion.centers, real.centers)
        assert criterion.weight is not None
        assert torch.equal(criterion.weight, options["weight"])
        assert criterion(*batch()).isfinite()

    @each_update
    @pytest.mark.parametrize("assign", [True, False])
    def test_values_may_come_from_anywhere(self, update: Any, assign: bool) -> None:
        def on_meta() -> SeparateLoss:
            with torch.device("meta"):
                return SeparateLoss(*SHAPE, center_update=update)

        values = torch.randn(SHAPE)
        loaded = on_meta() if assign else on_meta().to_empty(device="cpu")
        loaded.load_state_dict({"centers": values.clone()}, assign=assign)
        written = on_meta().to_empty(device="cpu")
        with torch.no_grad():
            written.centers.copy_(values)
        assigned = on_meta()
        assigned.centers = nn.Parameter(values) if update == "gradient" else values.clone()
        for criterion in (loaded, written, assigned):
            assert torch.equal(criterion.centers, values)
            assert criterion(*batch()).isfinite()

    def test_given_values_without_values_count_as_zero(self) -> None:
        with torch.device("meta"):
            options: Any = {"center_init": torch.eye(*SHAPE)}
            moved, learned, loaded = (
                SeparateLoss(*SHAPE, center_update=update, **options)
                for update in ("forward", "gradient", "gradient")
            )
        moved.to_empty(device="cpu")(*batch())
        torch.testing.assert_close(moved.centers.norm(dim=-1), torch.ones(NUM_CLASSES))
        with pytest.raises(ValueError, match="centers must hold no row of zeros or NaN"):
            learned.to_empty(device="cpu")(*batch())
        loaded.load_state_dict({"centers": torch.eye(*SHAPE) + 1}, assign=True)
        assert loaded(*batch()).isfinite()


def write(criterion: SeparateLoss, values: Tensor, how: str) -> None:
    if how == "load":
        criterion.load_state_dict({"centers": values})
    elif how == "assign":
        criterion.load_state_dict({"centers": values}, assign=True)
    elif how == "copy":
        criterion.centers.detach().copy_(values)
    elif how == "set":
        criterion.centers = values
    else:  # As accelerate does.
        criterion._buffers["centers"] = values


WAYS = ["load", "assign", "copy", "set", "buffer"]


class TestValuesOfOthers:
    @pytest.mark.parametrize("update", ["forward", "none"])
    @pytest.mark.parametrize("how", WAYS)
    @pytest.mark.parametrize("calls", [0, 1])
    def test_a_center_that_is_not_finite_behaves_as_a_zero_center(
        self, update: Any, how: str, calls: int
    ) -> None:
        values = torch.randn(SHAPE)
        values[1, 2], values[3, 0], values[4] = torch.nan, torch.inf, -torch.inf
        zeroed = values.clone()
        zeroed[[1, 3, 4]] = 0
        criterion = SeparateLoss(*SHAPE, center_update=update)
        same = copy.deepcopy(criterion)
        features, target = batch()
        for _ in range(calls):
            criterion(features, target)
            same(features, target)
        write(criterion, values, how)
        write(same, zeroed, how)
        for rows in (slice(2), slice(10)):  # First of two classes, then of all.
            loss = criterion(features[rows], target[rows])
            assert torch.equal(loss, same(features[rows], target[rows]))
            assert torch.equal(criterion.centers, same.centers)
            (gradient,) = torch.autograd.grad(loss, features)
            assert gradient.isfinite().all()

    @pytest.mark.parametrize("value", [0.0, torch.nan, -torch.inf])
    def test_a_parameter_needs_directions(self, value: float) -> None:
        values = torch.randn(SHAPE)
        values[2] = value
        message = "must hold no row of zeros or NaN for .* got one for class 2"
        options: Any = {"center_update": "gradient"}
        with pytest.raises(ValueError, match=f"center_init {message}"):
            SeparateLoss(*SHAPE, center_init=values, **options)
        criterion = SeparateLoss(*SHAPE, **options)
        for assign in (False, True):
            criterion(*batch())
            good = criterion.state_dict()["centers"].clone()
            criterion.load_state_dict({"centers": values.clone()}, assign=assign)
            for _ in range(2):
                with pytest.raises(ValueError, match=f"centers {message}"):
                    criterion(*batch())
            criterion.load_state_dict({"centers": good}, assign=assign)

    @each_update
    def test_wrong_centers_are_refused_when_used(self, update: Any) -> None:
        criterion = SeparateLoss(*SHAPE, center_update=update)
        expected: list[tuple[Tensor | None, str]] = [
            (torch.randn(7, FEATURE_DIM), r"centers must have shape \(5, 4\), got \(7, 4\)"),
            (torch.randn(NUM_CLASSES, 3), r"centers must have shape \(5, 4\), got \(5, 3\)"),
            (torch.ones(SHAPE).long(), "centers must be floating point, got torch.int64"),
            (None, "centers must be a tensor, got NoneType"),
        ]
        for calls in range(2):
            for values, message in expected:
                other = copy.deepcopy(criterion)
                for _ in range(calls):
                    other(*batch())
                given: Any = values
                if update == "gradient" and values is not None:
                    given = nn.Parameter(values, requires_grad=values.is_floating_point())
                other.centers = given
                with pytest.raises((TypeError, ValueError), match=message):
                    other(*batch())

    def test_forward_refuses_a_parameter(self) -> None:
        criterion = SeparateLoss(*SHAPE)
        criterion.centers = nn.Parameter(torch.randn(SHAPE))
        with pytest.raises(TypeError, match="centers must require no gradient for"):
            criterion(*batch())

    def test_centers_in_a_graph_of_the_caller_get_their_gradient(self) -> None:
        criterion = SeparateLoss(*SHAPE, center_update="none")
        own = torch.randn(SHAPE, requires_grad=True)
        criterion.centers = normalize(own)
        criterion(*batch()).backward()
        assert own.grad is not None
        assert own.grad.any(-1).all()


class TestOptions:
    @pytest.mark.parametrize(
        ("update", "options"),
        [
            ("gradient", {"center_lr": 1.0}),
            ("none", {"center_lr": 0.0}),
            ("none", {"sync_centers": False}),
        ],
    )
    def test_options_without_effect_are_refused(self, update: Any, options: Any) -> None:
        (name,) = options
        with pytest.raises(ValueError, match=f"{name} must be .* where it has no effect, got"):
            SeparateLoss(*SHAPE, center_update=update, **options)

    @pytest.mark.parametrize(
        ("name", "value"),
        [
            ("center_lr", -1.0),
            ("center_lr", torch.tensor(1.0)),
            ("form", "square"),
            ("reduction", "max"),
            ("label_smoothing", 1.5),
            ("ignore_index", None),
        ],
    )
    def test_options_assigned_later_are_checked_when_used(self, name: str, value: Any) -> None:
        criterion = SeparateLoss(*SHAPE, center_init="sphere")
        criterion(*batch())
        before = criterion.centers.clone()
        setattr(criterion, name, value)
        with pytest.raises((TypeError, ValueError), match=f"{name} must be"):
            criterion(*batch())
        assert torch.equal(criterion.centers, before)

    def test_a_rate_assigned_later_is_used(self) -> None:
        criterion = SeparateLoss(*SHAPE, center_init="sphere", center_lr=1.0)
        before = criterion.centers.clone()
        criterion.center_lr = 0.0
        criterion(*batch())
        torch.testing.assert_close(criterion.centers, before)


TRANSFORMS: dict[str, Callable[[Callable[[Tensor], Tensor], Tensor], Any]] = {
    "grad": lambda call, x: torch.func.grad(call)(x),
    "vjp": lambda call, x: torch.func.vjp(call, x)[1](torch.tensor(1.0)),
    "jvp": lambda call, x: torch.func.jvp(call, (x,), (x,)),
    "hessian": lambda call, x: torch.func.hessian(call)(x),
    "vmap": lambda call, x: torch.func.vmap(call)(torch.stack([x, x])),
    "compiled": lambda call, x: torch.compile(torch.func.grad(call), backend="aot_eager")(x),
}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=needs_compiled_transforms if name == "compiled" else ())
        for name in TRANSFORMS
    ],
)
def test_last_terms_hold_nothing_of_a_transform(name: str) -> None:
    criterion = SeparateLoss(*SHAPE, center_init="sphere").eval()
    features, target = torch.randn(10, FEATURE_DIM), torch.arange(10) % NUM_CLASSES
    criterion(features, target)
    expected = criterion.last_terms
    TRANSFORMS[name](lambda x: criterion(x, target), features)
    if name in ("vmap", "compiled"):
        assert criterion.last_terms is None
    else:
        torch.testing.assert_close(criterion.last_terms, expected)
    for twin in (copy.deepcopy(criterion), unpickled(pickled(criterion))):
        torch.testing.assert_close(twin.last_terms, criterion.last_terms)


SETTINGS: dict[str, tuple[Any, Any]] = {
    "form": ("simplex", "paper"),
    "center_lr": (None, 0.5),
    "center_update": ("forward", "gradient"),
    "reduction": ("mean", "sum"),
    "label_smoothing": (0.0, 0.1),
    "ignore_index": (-100, -1),
    "num_classes": (NUM_CLASSES, 6),
    "dtype": (torch.float32, torch.float64),
}


def call_with_unlike_settings(rank: int, size: int) -> dict[str, str]:
    """One setting differs in the last process."""
    messages = {}
    for name, values in SETTINGS.items():
        options: dict[str, Any] = {"num_classes": NUM_CLASSES, "feature_dim": FEATURE_DIM}
        options[name] = values[rank == size - 1]
        criterion = SeparateLoss(**options)
        before = criterion.centers.detach().clone()
        features, target = batch()
        with pytest.raises(ValueError) as error:  # noqa: PT011
            criterion(features, target)
        assert torch.equal(criterion.centers, before)
        messages[name] = str(error.value)
    for name in ("form", "center_lr", "reduction", "ignore_index", "dtype"):
        with pytest.raises(ValueError) as error:  # noqa: PT011
            ShardedSeparateLoss(*SHAPE, **{name: SETTINGS[name][rank == size - 1]})
        messages[f"{name} of shards"] = str(error.value)
    return messages


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(6, FEATURE_DIM)
        self.criterion = SeparateLoss(*SHAPE, center_update="gradient")

    def forward(self, inputs: Tensor, target: Tensor) -> Tensor:
        loss: Tensor = self.criterion(self.body(inputs), target)
        return loss


def train_in_fsdp1(rank: int, size: int) -> list[str]:
    del rank, size
    messages = []
    for original in (False, True):
        model = FullyShardedDataParallel(
            Model(), device_id=torch.device("cpu"), use_orig_params=original
        )
        with pytest.raises(RuntimeError) as error:
            model(torch.randn(8, 6), torch.arange(8) % NUM_CLASSES)
        messages.append(str(error.value))
    return messages


def start_sharded_parameters(rank: int, size: int) -> list[Tensor]:
    """Centers that are parameters of a fully sharded model made on the meta device."""
    del rank
    results = []
    for start in ("sphere", "tensor"):
        with torch.device("meta"):
            criterion = SeparateLoss(
                *SHAPE, center_update="gradient", center_init=start_of_shards(start)
            )
        fully_shard(criterion, mesh=init_device_mesh("cpu", (size,)))
        criterion.to_empty(device="cpu")
        criterion(*batch()).backward()
        centers: Any = criterion.centers
        results.append(centers.full_tensor().detach())
    return results


def start_of_shards(kind: str) -> Any:
    return np.eye(*SHAPE) + 1 if kind == "tensor" else kind


def write_to_shards(rank: int, size: int) -> list[tuple[Tensor, Tensor]]:
    """Pairs of centers of a sharded and a whole loss, after others wrote to them."""
    del size
    torch.manual_seed(0)
    values = torch.randn(SHAPE)
    features, target = batch()
    pairs = []
    for how in ("init", "copy", "load", "local", "empty"):
        torch.manual_seed(1)
        start = values.clone()
        start[[0, 4], 1] = torch.nan
        given: Any = start if how == "init" else values
        sharded = ShardedSeparateLoss(*SHAPE, center_init=given)
        whole = SeparateLoss(*SHAPE, center_init=given)
        source = ShardedSeparateLoss(*SHAPE, center_init=values)
        if how != "init":
            sharded(features, target)
            whole(features, target)
        held = source.centers.to_local()
        rows = slice(3 * rank, 3 * rank + len(held))
        held.copy_(start[rows])
        if how == "copy":
            sharded.centers.copy_(source.centers)
        elif how == "load":
            sharded.load_state_dict(source.state_dict())
        elif how == "local":
            sharded.centers.to_local().copy_(held)
        elif how == "empty":
            sharded.to("meta").to_empty(device="cpu")
            whole.reset_parameters()
        if how not in ("init", "empty"):
            whole.centers.copy_(start)
        torch.testing.assert_close(sharded(features, target), whole(features, target))
        pairs.append((sharded.centers.full_tensor(), whole.centers))
    assert sharded._init.untyped_storage().nbytes() == held.numel() * 4  # type: ignore[union-attr]
    return pairs


def use_no_sync_options(rank: int, size: int) -> str:
    del rank, size
    with pytest.raises(ValueError) as error:  # noqa: PT011
        SeparateLoss(*SHAPE, center_update="none", process_group=dist.group.WORLD)
    return str(error.value)


TASKS: list[Callable[[int, int], Any]] = [
    call_with_unlike_settings,
    train_in_fsdp1,
    *([start_sharded_parameters] if RELEASE >= (2, 7) else []),
    write_to_shards,
    use_no_sync_options,
]


def run_tasks(rank: int, size: int) -> dict[str, Any]:
    return {task.__name__: task(rank, size) for task in TASKS}


@functools.cache
def all_results() -> list[dict[str, Any]]:
    return run_in(2, run_tasks)


def results(task: Callable[[int, int], Any]) -> list[Any]:
    return [result[task.__name__] for result in all_results()]


def test_unlike_settings_are_told_in_all_processes() -> None:
    one, other = results(call_with_unlike_settings)
    assert one == other
    for name, message in one.items():
        setting = name.removesuffix(" of shards")
        told = "centers" if setting in ("num_classes", "dtype") else setting
        assert message.startswith(f"{told} must be the same in all processes, got "), message
        for value, place in zip(
            SETTINGS[setting], ("the group's process 0", "process 1"), strict=True
        ):
            assert str(value) in message
            assert place in message


def test_parameters_flattened_with_those_of_a_model_are_refused_in_all_processes() -> None:
    for messages in results(train_in_fsdp1):
        for message in messages:
            assert message.startswith("centers must be a parameter of their own, got a view")


@needs_sharding_on_cpu
def test_sharded_parameters_start_from_initial_values() -> None:
    one, other = results(start_sharded_parameters)
    assert all(torch.equal(*pair) for pair in zip(one, other, strict=True))
    sphere, given = one
    torch.testing.assert_close(sphere.norm(dim=-1), torch.ones(NUM_CLASSES))
    assert sphere.unique(dim=0).shape == SHAPE
    assert torch.equal(given, torch.eye(*SHAPE) + 1)


def test_shards_treat_values_of_others_as_the_whole_loss_does() -> None:
    for pairs in results(write_to_shards):
        for sharded, whole in pairs:
            torch.testing.assert_close(sharded, whole)


def test_a_group_without_effect_is_refused() -> None:
    for message in results(use_no_sync_options):
        assert message.startswith("process_group must be None for center_update='none'")
