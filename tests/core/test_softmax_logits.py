"""Logits after the head: sample-wise operators are accepted, operators that mix samples refused."""

from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
from hypothesis import example
from hypothesis import strategies as st
from torch import Tensor, nn

from separate_loss import SoftmaxSeparateLoss
from separate_loss.functional import intra_class_loss
from tests.helpers.heads import (
    CENTERS,
    FEATURE_DIM,
    NUM_CLASSES,
    TARGET,
    in_mode,
    inputs_of,
    intra_of,
    model_and_loss,
)
from tests.helpers.properties import property_test

# Operators between the head and the loss. The first group changes values alone, the second shapes.
# Whether the second keeps the order of samples and classes depends on the sizes.
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
# Operators that may mix or drop samples, by the name in the error message.
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


def mixing(name: str) -> Callable[[Tensor], Tensor]:
    return lambda t: MIXING[name](t) if t.ndim == 2 else t.flip(-1)


def sample_numbers(samples: Tensor, classes: Tensor) -> Tensor | None:
    """The sample number at each place, if the last dimension or dimension 1 holds the classes."""
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
def test_accepted_logits_are_matched_with_their_own_features(
    sizes: list[int], names: list[str], graph: bool, seed: int
) -> None:
    """Sample and class numbers go through the same operators as the logits."""
    torch.manual_seed(seed)
    model, criterion = model_and_loss(center_update="none")
    criterion.eval()  # Some of these operators cause a warning in training.
    features = torch.randn(*sizes, FEATURE_DIM, requires_grad=graph)
    target = torch.randint(NUM_CLASSES, sizes)
    in_order = torch.arange(target.numel())
    samples = in_order.reshape(*sizes, 1).expand(*sizes, NUM_CLASSES).float()
    classes = torch.arange(NUM_CLASSES).expand(*sizes, NUM_CLASSES).float()
    order = sample_numbers(samples, classes)
    ordered = True
    with torch.set_grad_enabled(graph):
        output = logits = model[-1](features)
        for name in names:
            if name in VALUES:
                logits = VALUES[name](logits)
                continue
            operator = SHAPES[name] if name in SHAPES else mixing(name)
            samples, classes, logits = operator(samples), operator(classes), operator(logits)
            order = sample_numbers(samples, classes)
            ordered = ordered and name in SHAPES
            ordered = ordered and order is not None and torch.equal(order.flatten(), in_order)
        try:
            criterion(logits, target if order is None else target.flatten()[order])
        except (RuntimeError, ValueError):
            assert not (ordered and (graph or logits.data_ptr() == output.data_ptr()))
            return
    assert order is not None
    assert criterion.last_terms is not None
    order = order.flatten()
    expected = intra_of(features.reshape(-1, FEATURE_DIM)[order], target.flatten()[order])
    torch.testing.assert_close(criterion.last_terms.intra, expected)


@pytest.mark.parametrize("name", VALUES)
def test_operators_on_values_are_accepted(name: str) -> None:
    model, criterion = model_and_loss()
    inputs = inputs_of()
    unchanged = name in {"cast", "clone", "contiguous"}
    with nullcontext() if unchanged else pytest.warns(UserWarning, match="changed the output of"):
        criterion(VALUES[name](model(inputs)), TARGET).backward()
    criterion(VALUES[name](model(inputs)), TARGET).backward()  # warns once only
    criterion.eval()
    criterion(VALUES[name](model(inputs)), TARGET)
    assert criterion.last_terms is not None
    centers = criterion.separate.centers
    expected = intra_class_loss(model[0](inputs), TARGET, centers).detach()
    torch.testing.assert_close(criterion.last_terms.intra, expected)


@pytest.mark.parametrize("name", MIXING)
def test_operators_that_mix_samples_are_refused_by_name(name: str) -> None:
    model, criterion = model_and_loss()
    inputs = inputs_of()
    with pytest.raises(RuntimeError, match=r"(?s)operator '\w+' .*features=features") as refusal:
        criterion(MIXING[name](model(inputs)), TARGET)
    assert f"'{'slice' if name == 'cat' else name}'" in str(refusal.value)
    assert torch.equal(criterion.separate.centers, CENTERS)
    selects = name in {"index", "index_select", "slice", "select", "cat"}
    assert ("ignore_index" in str(refusal.value)) == selects


@pytest.mark.parametrize("mode", ["no_grad", "inference", "compiled without a graph"])
def test_copied_logits_without_a_graph_are_known_by_their_values(mode: str) -> None:
    model, criterion = model_and_loss()
    call, context = in_mode(mode, model)
    with context:
        batches = inputs_of(3, 6)
        outputs = [call(batch) for batch in batches]
        for batch, output in zip(batches[1:], outputs[1:], strict=True):
            criterion(output.double(), TARGET)
            assert criterion.last_terms is not None
            expected = intra_of(model[0](batch), TARGET)
            torch.testing.assert_close(criterion.last_terms.intra, expected)
        for other in (outputs[0].double(), outputs[2].flip(0), outputs[2] * 2):
            with pytest.raises(RuntimeError, match="without a graph must be a recent"):
                criterion(other, TARGET)
        outputs[2].copy_(outputs[2].flip(0))
        with pytest.raises(RuntimeError, match="changed in place"):
            criterion(outputs[2], TARGET)


def test_a_cast_of_one_sample_is_known_by_its_values() -> None:
    model, criterion = model_and_loss()
    features = torch.randn(FEATURE_DIM)
    with torch.no_grad():
        loss = criterion(model[-1](features), TARGET[0])
        torch.testing.assert_close(criterion(model[-1](features).double(), TARGET[0]).float(), loss)


def test_the_latest_of_equal_passes_is_taken() -> None:
    model, criterion = model_and_loss()
    inputs = inputs_of()
    model.requires_grad_(False)
    for _ in range(3):  # each pass moves the centers once
        before = criterion.separate.centers.clone()
        criterion(model(inputs).double(), TARGET)
        assert not torch.equal(criterion.separate.centers, before)


def test_the_target_tells_which_dimension_holds_the_classes_beside_given_features() -> None:
    head = nn.Conv2d(FEATURE_DIM, 3, 1)
    features = torch.randn(2, FEATURE_DIM, 5, 3, requires_grad=True)
    target = torch.arange(30).view(2, 5, 3) % 3
    losses = [
        SoftmaxSeparateLoss(head, center_init=torch.eye(3, FEATURE_DIM), class_dim=class_dim)(
            head(features), target, features=features
        )
        for class_dim in (None, 1)
    ]
    assert torch.equal(*losses)


def test_operators_on_compiled_outputs_are_checked() -> None:
    model, criterion = model_and_loss(center_update="none")
    call, _ = in_mode("compiled", model)
    batches = inputs_of(2, 6)
    outputs = [call(batch) for batch in batches]
    for number, (output, batch) in enumerate(zip(outputs, batches, strict=True)):
        with pytest.warns(UserWarning, match="'div' changed") if number == 0 else nullcontext():
            criterion((output.double() / 2).view(6, 1, NUM_CLASSES), TARGET[:, None])
        assert criterion.last_terms is not None
        torch.testing.assert_close(criterion.last_terms.intra, intra_of(model[0](batch), TARGET))
    with pytest.raises(RuntimeError, match="operator 'flip'"):
        criterion(call(batches[0]).flip(0), TARGET)


def test_logits_of_no_forward_pass_of_the_head_are_refused() -> None:
    model, criterion = model_and_loss()
    logits = torch.randn(6, NUM_CLASSES)
    with pytest.raises(RuntimeError, match="no forward pass of the watched head has led"):
        criterion(logits, TARGET)
    model(inputs_of())
    for other in (logits, logits.clone().requires_grad_() * 2):
        with pytest.raises(RuntimeError, match="one forward pass of the watched head"):
            criterion(other, TARGET)
    assert torch.equal(criterion.separate.centers, CENTERS)


def test_features_changed_in_place_are_refused() -> None:
    linear = nn.Linear(16, NUM_CLASSES)
    criterion = SoftmaxSeparateLoss(linear)
    features = torch.randn(6, 16, requires_grad=True) * 1
    with torch.no_grad():
        logits = linear(features)
        features.relu_()
    with pytest.raises(RuntimeError, match="changed in place"):
        criterion(logits, TARGET)


def test_outputs_of_data_parallel_replicas_are_refused() -> None:
    class Gather(torch.autograd.Function):
        """The last operator of DataParallel, which needs CUDA."""

        @staticmethod
        def forward(ctx: object, *parts: Tensor) -> Tensor:  # noqa: ARG004
            return torch.cat(parts)

        @staticmethod
        def backward(ctx: object, grad: Tensor) -> tuple[Tensor, ...]:  # noqa: ARG004
            return grad.chunk(2)

    model, criterion = model_and_loss()
    logits: Tensor = Gather.apply(*(model(inputs_of(3)) for _ in range(2)))  # type: ignore[no-untyped-call]
    with pytest.raises(RuntimeError, match=r"DataParallel.*DistributedDataParallel"):
        criterion(logits, TARGET)


class TestGivenFeatures:
    """`features=` serves logits that the loss refuses."""

    def test_the_loss_uses_the_given_features(self) -> None:
        model, criterion = model_and_loss()
        order = torch.randperm(6)
        features = model[0](inputs_of())
        found = criterion(model[1](features), TARGET)
        criterion.load_state_dict({"separate.centers": CENTERS})
        logits = model[1](features[order])[order.argsort()]
        given = criterion(logits, TARGET, features=features)
        torch.testing.assert_close(given, found)
        grads = [
            torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
            for loss in (found, given)
        ]
        torch.testing.assert_close(*grads)
        assert not torch.equal(criterion.separate.centers, CENTERS)

    def test_features_of_another_shape_are_refused(self) -> None:
        model, criterion = model_and_loss()
        logits = model(inputs_of())
        for features in (torch.randn(5, FEATURE_DIM), torch.randn(6, 5), torch.randn(6)):
            with pytest.raises(ValueError, match="features must hold 6 values for each of the sam"):
                criterion(logits, TARGET, features=features)
        assert torch.equal(criterion.separate.centers, CENTERS)

    def test_centers_do_not_move_while_the_head_is_in_evaluation(self) -> None:
        model, criterion = model_and_loss()
        features = torch.randn(6, FEATURE_DIM)
        model.eval()
        with pytest.warns(UserWarning, match="the features require no gradient"):
            criterion(model[1](features), TARGET, features=features)
        assert torch.equal(criterion.separate.centers, CENTERS)
        model.train()
        criterion(model[1](features), TARGET, features=features)
        assert not torch.equal(criterion.separate.centers, CENTERS)
