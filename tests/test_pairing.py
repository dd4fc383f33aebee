"""Which features belong to which logits: the right ones, or a refusal."""

import copy
import gc
import io
import pickle
import threading
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from separate_loss import SeparateLoss, SoftmaxSeparateLoss, separate_loss
from separate_loss.functional import intra_class_loss
from tests.helpers.properties import property_test

NUM_CLASSES, FEATURE_DIM = 4, 6
CENTERS = torch.randn(NUM_CLASSES, FEATURE_DIM, generator=torch.Generator().manual_seed(1))
MODES = ["graph", "no_grad", "inference", "compiled", "compiled without a graph"]


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)
    torch._dynamo.reset()


def model_and_loss(**options: Any) -> tuple[nn.Sequential, SoftmaxSeparateLoss]:
    model = nn.Sequential(nn.Linear(5, FEATURE_DIM), nn.Linear(FEATURE_DIM, NUM_CLASSES))
    return model, SoftmaxSeparateLoss(model[-1], **({"center_init": CENTERS} | options))


def in_mode(mode: str, model: nn.Module) -> tuple[Callable[..., Any], AbstractContextManager[Any]]:
    """The model as it is called in a mode, and the context to call model and loss in."""
    contexts: dict[str, AbstractContextManager[Any]] = {
        "no_grad": torch.no_grad(),
        "inference": torch.inference_mode(),
        "compiled without a graph": torch.no_grad(),
    }
    call: Callable[..., Any] = model
    if "compiled" in mode:
        call = torch.compile(model, backend="aot_eager", fullgraph=True)
    return call, contexts.get(mode, nullcontext())


def intra_of(features: Tensor, target: Tensor) -> Tensor:
    with torch.no_grad():
        return intra_class_loss(features.clone(), target, CENTERS)


# What may happen between the head and the loss. Some of it keeps samples and order, some does not,
# and for some that depends on the sizes.
VALUES: dict[str, Callable[[Tensor], Tensor]] = {
    "scale": lambda t: t * 3,
    "divide": lambda t: t / 0.7,
    "shift": lambda t: t + 1,
    "bias": lambda t: t + torch.arange(float(t.shape[-1])),
    "temperature": lambda t: t * nn.Parameter(torch.zeros(())).exp(),
    "cast": lambda t: t.double(),
    "clone": lambda t: t.clone(),
    "contiguous": lambda t: t.contiguous(),
    "negative": lambda t: -t,
    "in place": lambda t: t.clone().mul_(2),
    "tanh": lambda t: 30 * torch.tanh(t / 30),
    "log_softmax": lambda t: t.log_softmax(-1),
    "masked_fill": lambda t: t.masked_fill(t > 1, 1.0),
}
SHAPES: dict[str, Callable[[Tensor], Tensor]] = {
    "flatten": lambda t: t.flatten(),
    "rows": lambda t: t.reshape(-1, t.shape[-1]),
    "first two": lambda t: t.flatten(0, 1) if t.ndim > 1 else t,
    "halves": lambda t: t.unflatten(0, (-1, 2)) if t.shape[0] % 2 == 0 else t,
    "one more": lambda t: t.unsqueeze(1),
    "squeeze": lambda t: t.squeeze(),
    "transposed": lambda t: t.transpose(-1, -2) if t.ndim > 1 else t,
    "first transposed": lambda t: t.transpose(0, 1) if t.ndim > 1 else t,
    "moved": lambda t: t.movedim(-1, 0),
    "moved back": lambda t: t.movedim(0, -1),
    "classes in 1": lambda t: t.movedim(-1, 1) if t.ndim > 1 else t,
    "as (C, *)": lambda t: t.reshape(NUM_CLASSES, -1) if t.numel() % NUM_CLASSES == 0 else t,
    "as (*, C)": lambda t: t.reshape(-1, NUM_CLASSES) if t.numel() % NUM_CLASSES == 0 else t,
}
MIXING: dict[str, Callable[[Tensor], Tensor]] = {
    "index": lambda t: t[torch.arange(t.shape[0]).flip(0)],
    "index_select": lambda t: t.index_select(0, torch.arange(t.shape[0]).roll(1)),
    "gather": lambda t: t.gather(0, torch.arange(t.shape[0]).flip(0)[:, None].expand_as(t)),
    "flip": lambda t: t.flip(0),
    "roll": lambda t: t.roll(1, 0),
    "sort": lambda t: t.sort(0).values,
    "cat": lambda t: torch.cat([t[1:], t[:1]]),
    "stack": lambda t: torch.stack([t, t]).mean(0),
    "where": lambda t: torch.where(t > 0, t, t.flip(0)),
    "index_put": lambda t: torch.zeros_like(t).index_put((torch.arange(len(t)).flip(0),), t),
    "slice": lambda t: t[1:],
    "select": lambda t: t[0],
    "mean": lambda t: t.mean(0, keepdim=True),
}


def mixes(name: str) -> Callable[[Tensor], Tensor]:
    return lambda t: MIXING[name](t) if t.ndim == 2 else t.flip(-1)


def order_of(samples: Tensor, classes: Tensor) -> Tensor | None:
    """The sample at each place of a tensor, where a dimension has the classes in order."""
    for dim in (classes.ndim - 1, min(1, classes.ndim - 1)):
        moved = classes.movedim(dim, -1)
        if moved.shape[-1] == NUM_CLASSES and (moved == torch.arange(NUM_CLASSES)).all():
            return samples.select(dim, 0).long()
    return None


@property_test(
    sizes=st.lists(st.integers(1, 5), min_size=1, max_size=3),
    names=st.lists(st.sampled_from([*VALUES, *SHAPES, *MIXING]), max_size=6),
    graph=st.booleans(),
    seed=st.integers(0, 2**31),
)
@example(sizes=[4, 4], names=["transposed"], graph=True, seed=0)  # (N, C, T) with T = C
@example(sizes=[4, 4], names=["first transposed"], graph=True, seed=0)
@example(sizes=[2, 4], names=["first transposed", "rows"], graph=True, seed=0)
@example(sizes=[4], names=["as (C, *)", "transposed"], graph=True, seed=0)
@example(sizes=[4, 4], names=["transposed"], graph=False, seed=0)
def test_what_is_accepted_is_right(
    sizes: list[int], names: list[str], graph: bool, seed: int
) -> None:
    """Tags travel the same way as the logits, and tell which sample and class a value is of."""
    torch.manual_seed(seed)
    model, criterion = model_and_loss(center_update="none")
    features = torch.randn(*sizes, FEATURE_DIM, requires_grad=graph)
    target = torch.randint(NUM_CLASSES, sizes)
    in_order = torch.arange(target.numel())
    samples = in_order.reshape(*sizes, 1).expand(*sizes, NUM_CLASSES).float()
    classes = torch.arange(NUM_CLASSES).expand(*sizes, NUM_CLASSES).float()
    order = order_of(samples, classes)
    kept = True
    with torch.set_grad_enabled(graph):
        output = logits = model[-1](features)
        for name in names:
            if name in VALUES:
                logits = VALUES[name](logits)
                continue
            way = SHAPES[name] if name in SHAPES else mixes(name)
            samples, classes, logits = way(samples), way(classes), way(logits)
            order = order_of(samples, classes)
            kept = kept and name in SHAPES
            kept = kept and order is not None and torch.equal(order.flatten(), in_order)
        try:
            criterion(logits, target if order is None else target.flatten()[order])
        except (RuntimeError, ValueError):
            assert not (kept and (graph or logits.data_ptr() == output.data_ptr()))
            return
    assert order is not None
    assert criterion.last_terms is not None
    order = order.flatten()
    expected = intra_of(features.reshape(-1, FEATURE_DIM)[order], target.flatten()[order])
    torch.testing.assert_close(criterion.last_terms.intra, expected)


@pytest.mark.parametrize("way", VALUES)
def test_what_changes_values_alone_is_accepted(way: str) -> None:
    model, criterion = model_and_loss()
    inputs, target = torch.randn(6, 5), torch.arange(6) % NUM_CLASSES
    criterion(VALUES[way](model(inputs)), target).backward()
    assert criterion.last_terms is not None
    torch.testing.assert_close(criterion.last_terms.intra, intra_of(model[0](inputs), target))


@pytest.mark.parametrize("way", MIXING)
def test_what_can_mix_samples_is_refused_by_its_name(way: str) -> None:
    model, criterion = model_and_loss()
    inputs, target = torch.randn(6, 5), torch.arange(6) % NUM_CLASSES
    with pytest.raises(RuntimeError, match=r"(?s)operator '\w+' .*features=features") as refusal:
        criterion(MIXING[way](model(inputs)), target)
    names = {"stack": "mean", "mean": "mean"} | {way: way for way in MIXING if way != "stack"}
    assert f"'{names[way]}'" in str(refusal.value)
    assert torch.equal(criterion.separate.centers, CENTERS)
    selects = way in {"index", "index_select", "slice", "select"}
    assert ("ignore_index" in str(refusal.value)) == selects
    with torch.no_grad(), pytest.raises(RuntimeError, match="without a graph must be a recent"):
        criterion(torch.empty(6, NUM_CLASSES).copy_(model(inputs)), target)


@pytest.mark.parametrize("mode", MODES)
def test_two_passes_in_one_are_refused(mode: str) -> None:
    model, criterion = model_and_loss()
    call, context = in_mode(mode, model)
    inputs, target = torch.randn(2, 6, 5), torch.arange(6) % NUM_CLASSES
    joins: list[Callable[[Tensor, Tensor], Tensor]] = [
        lambda a, b: a + b,
        lambda a, b: (a + b) / 2,
        lambda a, b: torch.stack([a, b]).mean(0),
        lambda a, b: torch.cat([a[:3], b[3:]]),
        lambda a, b: torch.where(torch.arange(6)[:, None] < 3, a, b),
        lambda a, b: torch.lerp(a, b, 0.5),
        torch.maximum,
        lambda a, _: a + a.flip(0),
        lambda a, _: a - a.mean(0),
    ]
    for join in joins:
        with context, pytest.raises(RuntimeError, match="sample by sample in the same order"):
            criterion(join(call(inputs[0]), call(inputs[1])), target)
    assert torch.equal(criterion.separate.centers, CENTERS)


@property_test(
    mode=st.sampled_from(MODES[:3]),
    order=st.permutations(range(4)),
    views=st.booleans(),
    repeated=st.booleans(),
)
def test_each_of_several_passes_is_told_by_its_output(
    mode: str, order: list[int], views: bool, repeated: bool
) -> None:
    check_several_passes(mode, order, views, repeated)


@pytest.mark.parametrize("mode", MODES[3:])
@pytest.mark.parametrize("order", [[0, 1, 2, 3], [3, 1, 0, 2]])
@pytest.mark.parametrize("views", [False, True])
def test_each_of_several_compiled_passes_is_told_by_its_output(
    mode: str, order: list[int], views: bool
) -> None:
    check_several_passes(mode, order, views, repeated=True)


def check_several_passes(mode: str, order: list[int], views: bool, repeated: bool) -> None:
    torch.manual_seed(0)
    model, criterion = model_and_loss(center_update="none")
    call, context = in_mode(mode, model)
    batches, target = torch.randn(len(order), 6, 5), torch.arange(6) % NUM_CLASSES
    with context:
        outputs = [call(batch) for batch in batches]
        for number in order * (1 + repeated):
            logits = outputs[number].view(2, 3, NUM_CLASSES) if views else outputs[number]
            criterion(logits, target.reshape(logits.shape[:-1]))
            assert criterion.last_terms is not None
            expected = intra_of(model[0](batches[number]), target)
            torch.testing.assert_close(criterion.last_terms.intra, expected)


def test_compiled_outputs_are_followed_by_their_graph() -> None:
    """Changed outside of the compiled function, and after other passes whose loss nobody took."""
    model, criterion = model_and_loss(center_update="none")
    call, _ = in_mode("compiled", model)
    batches, target = torch.randn(3, 6, 5), torch.arange(6) % NUM_CLASSES
    outputs = [call(batch) for batch in batches]
    for output, batch in zip(outputs, batches, strict=True):
        criterion((output.double() / 2).view(6, 1, NUM_CLASSES), target[:, None])
        assert criterion.last_terms is not None
        expected = intra_of(model[0](batch), target)
        torch.testing.assert_close(criterion.last_terms.intra, expected)
    with pytest.raises(RuntimeError, match="operator 'flip'"):
        criterion(call(batches[0]).flip(0), target)


@pytest.mark.parametrize("mode", MODES[1:3])
def test_values_replaced_in_place_are_refused(mode: str) -> None:
    model, criterion = model_and_loss()
    call, context = in_mode("no_grad", model)
    with context:
        logits = call(torch.randn(6, 5))
        logits.copy_(logits.flip(0))
        with pytest.raises(RuntimeError, match="without a graph must be a recent"):
            criterion(logits, torch.arange(6) % NUM_CLASSES)
    del mode


class TestFeaturesGiven:
    """`features=` is the way out for what cannot be proved."""

    def test_the_loss_is_that_of_the_given_features(self) -> None:
        model, criterion = model_and_loss()
        inputs, target = torch.randn(6, 5), torch.arange(6) % NUM_CLASSES
        order = torch.randperm(6)
        features = model[0](inputs)
        found = criterion(model[1](features), target)
        criterion.load_state_dict({"separate.centers": CENTERS})
        logits = model[1](features[order])[order.argsort()]
        given = criterion(logits, target, features=features)
        torch.testing.assert_close(given, found)
        grads = [
            torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
            for loss in (found, given)
        ]
        torch.testing.assert_close(*grads)
        assert not torch.equal(criterion.separate.centers, CENTERS)

    def test_features_that_do_not_fit_are_refused(self) -> None:
        model, criterion = model_and_loss()
        logits, target = model(torch.randn(6, 5)), torch.arange(6) % NUM_CLASSES
        for features in (torch.randn(5, FEATURE_DIM), torch.randn(6, 5), torch.randn(6)):
            with pytest.raises(ValueError, match="features must hold 6 values for each of the sam"):
                criterion(logits, target, features=features)
        assert torch.equal(criterion.separate.centers, CENTERS)

    def test_centers_stay_where_the_head_is_in_evaluation(self) -> None:
        model, criterion = model_and_loss()
        features, target = torch.randn(6, FEATURE_DIM), torch.arange(6) % NUM_CLASSES
        model.eval()
        with pytest.warns(UserWarning, match="the features require no gradient"):
            criterion(model[1](features), target, features=features)
        assert torch.equal(criterion.separate.centers, CENTERS)
        model.train()
        criterion(model[1](features), target, features=features)
        assert not torch.equal(criterion.separate.centers, CENTERS)


class TestOnePassSeveralCalls:
    @pytest.mark.parametrize("mode", MODES)
    def test_mixup_in_two_calls(self, mode: str) -> None:
        model, criterion = model_and_loss()
        call, context = in_mode(mode, model)
        inputs, first = torch.randn(6, 5), torch.arange(6) % NUM_CLASSES
        second, share = first.roll(1), 0.3
        with context:
            logits = call(inputs)
            criterion(logits, first)
            moved = criterion.separate.centers.clone()
            assert torch.equal(moved, CENTERS) == (mode not in {"graph", "compiled"})
            criterion(logits, second)
            # The first call of a pass moves the centers, and no other.
            assert torch.equal(criterion.separate.centers, moved)
            soft = share * F.one_hot(first, NUM_CLASSES) + (1 - share) * F.one_hot(
                second, NUM_CLASSES
            )
            torch.testing.assert_close(
                share * criterion(logits, first) + (1 - share) * criterion(logits, second),
                criterion(logits, soft),
            )

    @pytest.mark.parametrize("compiled", [False, True])
    def test_a_pass_can_be_read_while_its_graph_lives(self, compiled: bool) -> None:
        model, criterion = model_and_loss()
        call, _ = in_mode("compiled" if compiled else "graph", model)
        target = torch.arange(6) % NUM_CLASSES
        logits = call(torch.randn(6, 5))
        criterion(logits, target).backward(retain_graph=True)
        criterion(logits, target).backward()
        with pytest.raises(RuntimeError, match="backward has freed the graph of the pass"):
            criterion(logits, target)

    @pytest.mark.parametrize("compiled", [False, True])
    def test_nothing_lives_longer_than_the_graph(self, compiled: bool) -> None:
        model, criterion = model_and_loss()
        call, _ = in_mode("compiled" if compiled else "graph", model)
        target, kept = torch.arange(6) % NUM_CLASSES, []
        for _ in range(3):
            logits = call(torch.randn(6, 5))
            criterion(logits, target)
            (features,) = _recorded_features(criterion, logits)
            criterion(logits, target).backward()
            kept.append(logits)
            gc.collect()
            assert features() is None

    def test_a_refused_call_does_not_use_up_the_pass(self) -> None:
        model, criterion = model_and_loss()
        logits, target = model(torch.randn(6, 5)), torch.arange(6) % NUM_CLASSES
        with pytest.raises(IndexError):
            criterion(logits, target + 1)
        with pytest.raises(ValueError, match="target of class indices must have shape"):
            criterion(logits, target[:5])
        assert torch.equal(criterion.separate.centers, CENTERS)
        criterion(logits, target).backward()
        assert not torch.equal(criterion.separate.centers, CENTERS)


def _recorded_features(criterion: SoftmaxSeparateLoss, logits: Tensor) -> list[weakref.ref[Tensor]]:
    recorder: Any = criterion._recorder
    one, _ = recorder.find(logits, -1)
    return [weakref.ref(one.features)]


class TestModes:
    @pytest.mark.parametrize("compiled", [False, True])
    def test_centers_move_only_if_the_head_trains(self, compiled: bool) -> None:
        """A forgotten `no_grad` or an adversarial attack must not move centers on test data."""
        model, criterion = model_and_loss()
        call, _ = in_mode("compiled" if compiled else "graph", model)
        inputs, target = torch.randn(6, 5), torch.arange(6) % NUM_CLASSES
        model.eval()
        with pytest.warns(UserWarning, match=r"evaluation mode .* head.train\(\)"):
            criterion(call(inputs), target).backward()
        criterion(call(inputs), target).backward()  # once is enough
        assert torch.equal(criterion.separate.centers, CENTERS)
        model[-1].train()
        criterion(call(inputs), target)
        assert not torch.equal(criterion.separate.centers, CENTERS)

    def test_features_without_a_gradient_are_named_once(self) -> None:
        inputs, target = torch.randn(6, 5), torch.arange(6) % NUM_CLASSES
        whole, _ = model_and_loss()
        frozen, _ = model_and_loss()
        frozen[0].requires_grad_(False)
        for head, model in ((whole, whole), (frozen[-1], frozen)):
            criterion = SoftmaxSeparateLoss(head)
            with pytest.warns(UserWarning, match=r"is frozen.*is the whole model"):
                criterion(model(inputs), target).backward()
            criterion(model(inputs), target).backward()  # once is enough

    def test_a_thread_that_evaluates_beside_one_that_trains(self) -> None:
        model, criterion = model_and_loss(center_update="none")
        problems: list[str] = []

        def run(training: bool, seed: int) -> None:
            generator = torch.Generator().manual_seed(seed)
            for _ in range(150):
                inputs = torch.randn(6, 5, generator=generator)
                target = torch.randint(NUM_CLASSES, (6,), generator=generator)
                with torch.set_grad_enabled(training):
                    try:
                        logits = model(inputs)
                        loss = criterion(logits, target)
                        features = model[0](inputs)
                    except RuntimeError as error:
                        problems.append(str(error))
                        return
                separate = separate_loss(features, target, CENTERS)
                expected = F.cross_entropy(logits, target) + 0.9 * separate
                if not torch.allclose(loss, expected):
                    problems.append("features of another pass")

        threads = [
            threading.Thread(target=run, args=(bool(number % 2), number)) for number in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not problems


class Parts(nn.Module):
    """A model with its loss as a part, in either order."""

    def __init__(self, loss_first: bool = False) -> None:
        super().__init__()
        model, criterion = model_and_loss()
        if loss_first:
            self.criterion = criterion
        self.model = model
        if not loss_first:
            self.criterion = criterion

    def forward(self, inputs: Tensor, target: Tensor) -> Tensor:
        loss: Tensor = self.criterion(self.model(inputs), target)
        return loss


def _saved_and_loaded(whole: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(whole, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


COPIES: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda whole: pickle.loads(pickle.dumps(whole)),
    "torch.save": _saved_and_loaded,
    "twice": lambda whole: copy.deepcopy(pickle.loads(pickle.dumps(whole))),
    "thrice": lambda whole: pickle.loads(pickle.dumps(copy.deepcopy(copy.deepcopy(whole)))),
}


class TestCopies:
    @pytest.mark.parametrize("way", COPIES)
    @pytest.mark.parametrize("loss_first", [False, True])
    @pytest.mark.parametrize("compiled", [False, True])
    def test_head_and_loss_copied_together_stay_linked(
        self, way: str, loss_first: bool, compiled: bool
    ) -> None:
        original = Parts(loss_first)
        inputs, target = torch.randn(6, 5), torch.arange(6) % NUM_CLASSES
        twin = COPIES[way](original)
        call = torch.compile(twin, backend="aot_eager") if compiled else twin
        assert torch.equal(call(inputs, target), original(inputs, target))
        torch.testing.assert_close(
            twin.criterion.separate.centers, original.criterion.separate.centers
        )
        # Neither feeds the other.
        for mine, other in ((twin, original), (original, twin)):
            with pytest.raises(RuntimeError, match="no forward pass of the watched head has led"):
                mine.criterion(other.model(inputs), target)
        optimizer = torch.optim.SGD(twin.parameters(), 0.1)
        for _ in range(3):
            call(inputs, target).backward()
            optimizer.step()
        twin.criterion.unwatch()
        with pytest.raises(RuntimeError, match="watches no head"):
            twin(inputs, target)
        original(inputs, target)

    def test_a_pair_in_any_container_stays_linked(self) -> None:
        pair = model_and_loss()
        inputs, target = torch.randn(6, 5), torch.arange(6) % NUM_CLASSES
        for model, criterion in (copy.deepcopy(pair), pickle.loads(pickle.dumps(pair))):
            assert criterion(model(inputs), target).isfinite()

    def test_a_copied_model_alone_needs_nothing_of_the_library(self) -> None:
        model, criterion = model_and_loss()
        twin = copy.deepcopy(pickle.loads(pickle.dumps(model)))
        assert b"separate_loss" not in pickle.dumps(model)
        assert b"separate_loss" not in pickle.dumps(twin)
        inputs = torch.randn(6, 5)
        assert torch.equal(twin(inputs), model(inputs))
        del criterion

    def test_hooks_of_a_copy_can_be_taken_off(self) -> None:
        """TorchScript compiles no module with a hook."""
        model, criterion = model_and_loss()
        twin = copy.deepcopy(model)
        assert twin[-1]._forward_hooks
        criterion.watch(twin[-1])
        criterion.unwatch()
        for module in (model, twin):
            assert not module[-1]._forward_hooks
            assert not module[-1]._forward_pre_hooks
            assert torch.jit.script(module)(torch.zeros(2, 5)).shape == (2, NUM_CLASSES)

    def test_averaged_weights_hold_the_centers_of_their_own_loss(self) -> None:
        """Buffers are paired by their position."""

        class Tasks(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.first = nn.Sequential(nn.Dropout(0.1), nn.Linear(FEATURE_DIM, NUM_CLASSES))
                self.first_loss = SoftmaxSeparateLoss(self.first)
                self.norm = nn.BatchNorm1d(FEATURE_DIM, affine=False)
                self.second = nn.Sequential(nn.Dropout(0.1), nn.Linear(FEATURE_DIM, NUM_CLASSES))
                self.second_loss = SoftmaxSeparateLoss(self.second)

        model = Tasks()
        average: Any = torch.optim.swa_utils.AveragedModel(
            model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.0), use_buffers=True
        )
        features = torch.randn(6, FEATURE_DIM, requires_grad=True)
        for _ in range(3):
            normed = model.norm(features)
            target = torch.randint(NUM_CLASSES, (6,))
            loss = model.first_loss(model.first(normed), target)
            loss = loss + model.second_loss(model.second(normed), target.flip(0))
            loss.backward()
            average.update_parameters(model)
        averaged = average.module.state_dict()
        for name, value in model.state_dict().items():
            torch.testing.assert_close(averaged[name], value, msg=name)

    def test_device_and_type_before_the_first_batch_last(self) -> None:
        head = nn.Sequential(nn.Dropout(0.1), nn.Linear(FEATURE_DIM, NUM_CLASSES)).double()
        criterion = SoftmaxSeparateLoss(head).double()
        features = torch.randn(6, FEATURE_DIM, dtype=torch.float64, requires_grad=True)
        criterion(head(features), torch.arange(6) % NUM_CLASSES)
        assert criterion.separate.centers.dtype == torch.float64
        assert criterion.to("meta").separate.centers.is_meta

    def test_modes_put_back_module_by_module(self) -> None:
        """As Lightning does after its first look at validation data."""
        head = nn.Sequential(nn.Dropout(0.1), nn.Linear(FEATURE_DIM, NUM_CLASSES))
        criterion = SoftmaxSeparateLoss(head)
        model = nn.ModuleDict({"head": head, "criterion": criterion})
        features = torch.randn(6, FEATURE_DIM, requires_grad=True)
        target = torch.arange(6) % NUM_CLASSES
        modes = {name: module.training for name, module in model.named_modules()}
        model.eval()
        with torch.inference_mode():
            criterion(head(features), target)
        for name, module in model.named_modules():
            module.training = modes[name]
        criterion(head(features), target)
        assert criterion.separate.centers.any()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore:Please use quant_min:UserWarning")
def test_quantization_aware_preparation_in_place() -> None:
    """It moves hooks to another module, and calls them with fewer arguments."""
    from torch.ao import quantization  # noqa: PLC0415

    model, _ = model_and_loss()
    model = nn.Sequential(quantization.QuantStub(), *model, quantization.DeQuantStub()).train()
    criterion = SoftmaxSeparateLoss(model[2], center_init=CENTERS)
    model.qconfig = quantization.get_default_qat_qconfig("x86")
    quantization.prepare_qat(model, inplace=True)
    entered: list[Tensor] = []
    model[2].register_forward_pre_hook(lambda _, inputs: entered.append(inputs[0]))
    target = torch.arange(6) % NUM_CLASSES
    criterion(model(torch.randn(6, 5)), target).backward()
    assert criterion.last_terms is not None
    torch.testing.assert_close(criterion.last_terms.intra, intra_of(entered[0], target))
    criterion.unwatch()
    model(torch.randn(6, 5))


def test_replicas_of_data_parallel_are_named() -> None:
    class Gather(torch.autograd.Function):
        """What DataParallel ends with, which needs CUDA."""

        @staticmethod
        def forward(ctx: Any, *parts: Tensor) -> Tensor:  # noqa: ARG004
            return torch.cat(parts)

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Any:  # noqa: ARG004
            return grad.chunk(2)

    model, criterion = model_and_loss()
    logits: Tensor = Gather.apply(*(model(torch.randn(3, 5)) for _ in range(2)))  # type: ignore[no-untyped-call]
    with pytest.raises(RuntimeError, match=r"DataParallel.*DistributedDataParallel"):
        criterion(logits, torch.arange(6) % NUM_CLASSES)


def test_process_groups_are_shared_by_copies_and_refused_by_pickles(tmp_path: Path) -> None:
    dist = torch.distributed
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        group = dist.new_group([0])
        model = nn.Sequential(nn.Linear(5, FEATURE_DIM), nn.Linear(FEATURE_DIM, NUM_CLASSES))
        criterion = SoftmaxSeparateLoss(model[-1], process_group=group)
        twin, twin_loss = copy.deepcopy((model, criterion))
        assert twin_loss.separate.process_group is group
        assert twin_loss(twin(torch.randn(6, 5)), torch.arange(6) % NUM_CLASSES).isfinite()
        with pytest.raises(
            TypeError, match=r"ProcessGroup.*cannot be pickled; save the state_dict"
        ):
            pickle.dumps(criterion)
        assert isinstance(copy.deepcopy(SeparateLoss(3, 2, process_group=group)), SeparateLoss)
    finally:
        dist.destroy_process_group()
