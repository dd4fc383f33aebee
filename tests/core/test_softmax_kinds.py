"""Heads, treatments of their output and modes: the features are right, or the call is refused."""

import dataclasses
import itertools
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from separate_loss import SoftmaxSeparateLoss, _torch
from tests.helpers.heads import (
    CENTERS,
    FEATURE_DIM,
    INPUT_DIM,
    NUM_CLASSES,
    TARGET,
    inputs_of,
    intra_of,
    model_and_loss,
)
from tests.helpers.properties import property_test
from tests.helpers.releases import COMPILES_UPDATES


class InPlace(nn.Module):
    """A head that changes its input by a method that no attribute shows."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(FEATURE_DIM, NUM_CLASSES)

    def forward(self, features: Tensor) -> Tensor:
        logits: Tensor = self.layer(features.mul_(0.5).add_(1))
        return logits


@dataclasses.dataclass
class Output:
    """What some libraries return."""

    logits: Tensor
    label: str = ""


class ToDataclass(nn.Module):
    """A head that returns a dataclass."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(FEATURE_DIM, NUM_CLASSES)

    def forward(self, features: Tensor) -> Output:
        return Output(self.layer(features))


def linear() -> nn.Linear:
    return nn.Linear(FEATURE_DIM, NUM_CLASSES)


HEADS: dict[str, Callable[[], nn.Module]] = {
    "linear": linear,
    "neck": lambda: nn.Sequential(nn.BatchNorm1d(FEATURE_DIM), linear()),
    "in-place activation": lambda: nn.Sequential(nn.ReLU(inplace=True), linear()),
    "in-place dropout": lambda: nn.Sequential(nn.Dropout(0.5, inplace=True), linear()),
    "in-place method": InPlace,
    "dataclass": ToDataclass,
}


def swap(logits: Tensor) -> Tensor:
    """Swaps rows in place, unseen by autograd."""
    if logits.is_inference():
        return logits.copy_(logits.flip(0).clone())
    with torch.no_grad():
        logits.copy_(logits.flip(0).clone())
    return logits


# Whether the rows stay in order, and what is done to the head's output.
TREATMENTS: dict[str, tuple[bool, Callable[[Tensor], Tensor]]] = {
    "as it is": (True, lambda t: t),
    "double": (True, lambda t: t.double()),
    "bfloat16": (True, lambda t: t.to(torch.bfloat16)),
    "view": (True, lambda t: t.view(2, 3, NUM_CLASSES)),
    "transposed and cast": (True, lambda t: t.view(2, 3, NUM_CLASSES).transpose(1, 2).double()),
    "scaled": (True, lambda t: t / 2),
    "detached": (True, lambda t: t.detach()),
    "flipped": (False, lambda t: t.flip(0)),
    "flipped and cast": (False, lambda t: t.flip(0).double()),
    "swapped in place": (False, swap),
    "swapped in place and cast": (False, lambda t: swap(t).double()),
    "random": (False, torch.randn_like),
    "copied": (True, lambda t: torch.empty_like(t).copy_(t)),
}
CONTEXTS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "graph": torch.enable_grad,
    "no_grad": torch.no_grad,
    "inference": torch.inference_mode,
}
# Besides casts and views, which are right everywhere.
ALSO_RIGHT = {("scaled", "graph", False), ("copied", "no_grad", False)}


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("mode", CONTEXTS)
@pytest.mark.parametrize("kind", HEADS)
def test_features_are_right_or_refused(kind: str, mode: str, compiled: bool) -> None:
    head = HEADS[kind]()
    body = nn.Linear(INPUT_DIM, FEATURE_DIM)
    model = nn.Sequential(body, head).train(mode == "graph")
    criterion = SoftmaxSeparateLoss(head, center_init=CENTERS, center_update="none").eval()
    call: Any = torch.compile(model, backend="aot_eager") if compiled else model
    for name, (in_order, treat) in TREATMENTS.items():
        inputs = inputs_of()
        with CONTEXTS[mode]():
            output = call(inputs)
            output = getattr(output, "logits", output)
            logits = treat(output)
            target = TARGET.view(2, 3) if logits.ndim == 3 else TARGET
            try:
                criterion(logits, target)
            except RuntimeError as refusal:
                message = str(refusal)
                right = name in {"as it is", "double", "bfloat16", "view", "transposed and cast"}
                right = right or (name, mode, compiled) in ALSO_RIGHT
                assert kind == "in-place method" or not (right and in_order), (name, message)
                continue
            expected = intra_of(body(inputs), TARGET)
        assert in_order, name
        assert criterion.last_terms is not None
        torch.testing.assert_close(criterion.last_terms.intra, expected, msg=name)


@property_test(
    kinds=st.lists(st.sampled_from(["graph", "no_grad", "inference"]), min_size=1, max_size=5),
    order=st.randoms(use_true_random=False),
    head_kind=st.sampled_from([*HEADS]),
    treatments=st.lists(st.sampled_from([*TREATMENTS]), min_size=5, max_size=5),
)
def test_random_orders_of_passes_and_calls(
    kinds: list[str], order: Any, head_kind: str, treatments: list[str]
) -> None:
    """Passes in several modes run before the calls, which come in any order, some twice."""
    torch.manual_seed(0)
    head, body = HEADS[head_kind](), nn.Linear(INPUT_DIM, FEATURE_DIM)
    criterion = SoftmaxSeparateLoss(head, center_init=CENTERS, center_update="none").eval()
    passes = []
    for kind, name in zip(kinds, treatments, strict=False):
        inputs = inputs_of()
        with CONTEXTS[kind]():
            output = head(body(inputs))
            passes.append((kind, name, inputs, getattr(output, "logits", output)))
    calls = passes * 2
    order.shuffle(calls)
    for kind, name, inputs, output in calls:
        with CONTEXTS[kind]():
            logits = TREATMENTS[name][1](output)
            try:
                criterion(logits, TARGET.view(2, 3) if logits.ndim == 3 else TARGET)
            except RuntimeError:
                continue
            expected = intra_of(body(inputs), TARGET)
        if not name.startswith("swapped"):  # Twice in the same place.
            assert TREATMENTS[name][0], name
            assert criterion.last_terms is not None
            torch.testing.assert_close(criterion.last_terms.intra, expected, msg=name)


@pytest.mark.parametrize("mode", ["graph", "no_grad", "compiled"])
def test_outputs_that_are_alike_are_not_told_apart_by_guess(mode: str) -> None:
    """A head of zeros returns the same row for every sample."""
    head, body = linear(), nn.Linear(INPUT_DIM, FEATURE_DIM)
    nn.init.zeros_(head.weight)
    criterion = SoftmaxSeparateLoss(head, center_init=CENTERS, center_update="none")
    model: Any = nn.Sequential(body, head)
    call = torch.compile(model, backend="aot_eager") if mode == "compiled" else model
    inputs = inputs_of(2, 6)
    with torch.set_grad_enabled(mode == "graph"):
        first, second = map(call, inputs)
        for logits, batch in ((first, inputs[0]), (second, inputs[1])):
            criterion(logits, TARGET)
            assert criterion.last_terms is not None
            expected = intra_of(body(batch), TARGET)
            torch.testing.assert_close(criterion.last_terms.intra, expected)
            if mode != "graph":
                with pytest.raises(RuntimeError, match="same values for several samples"):
                    criterion(logits.flip(0).double(), TARGET)


@pytest.mark.parametrize("where", ["model", "head", "everywhere"])
@pytest.mark.parametrize("kind", ["linear", "neck"])  # PyTorch refuses heads that work in place.
def test_full_backward_hooks_are_passed_through(where: str, kind: str) -> None:
    head, body = HEADS[kind](), nn.Linear(INPUT_DIM, FEATURE_DIM)
    model = nn.Sequential(body, head)
    results = []
    for hooked in (False, True):
        if hooked and where == "everywhere":
            handle = nn.modules.module.register_module_full_backward_hook(lambda *_: None)
        elif hooked:
            module = model if where == "model" else head
            handle = module.register_full_backward_hook(lambda *_: None)
        criterion = SoftmaxSeparateLoss(head, center_init=CENTERS)
        torch.manual_seed(0)
        try:
            loss = criterion(model(inputs_of().requires_grad_()), TARGET)
        finally:
            if hooked and where == "everywhere":
                handle.remove()
        gradients = torch.autograd.grad(loss, [*model.parameters()])
        results.append((loss, gradients, criterion.separate.centers))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("kind", ["linear", "neck", "in-place activation", "in-place method"])
@pytest.mark.parametrize("mode", [*CONTEXTS, "compiled"])
def test_hooks_that_exchange_the_input(kind: str, mode: str) -> None:
    head, body = HEADS[kind](), nn.Sequential(nn.Linear(INPUT_DIM, FEATURE_DIM), nn.ReLU(True))
    criterion = SoftmaxSeparateLoss(head, center_init=CENTERS, center_update="none")
    head.register_forward_pre_hook(lambda _, inputs: (inputs[0] * 0.5 - 1,))
    model: Any = nn.Sequential(body, head)
    call = torch.compile(model, backend="aot_eager") if mode == "compiled" else model
    inputs = inputs_of()
    with CONTEXTS.get(mode, torch.enable_grad)():
        logits = call(inputs)
        try:
            criterion(logits, TARGET)
        except RuntimeError as refusal:
            message = str(refusal)
            assert "changed in place" in message
            assert kind.startswith("in-place") or (
                kind == "neck" and mode not in ("graph", "no_grad")
            )
            return
        expected = intra_of(body(inputs) * 0.5 - 1, TARGET)
    assert criterion.last_terms is not None
    torch.testing.assert_close(criterion.last_terms.intra, expected)


def test_detached_logits_give_the_value_alone() -> None:
    model, criterion = model_and_loss()
    logits = model(inputs_of())
    for detached in (logits.detach(), logits.detach().requires_grad_()):
        loss = criterion(detached, TARGET)
        assert torch.equal(criterion.separate.centers, CENTERS)
        assert not loss.requires_grad or loss.grad_fn is not None
    with torch.no_grad():
        expected = criterion(logits, TARGET)
    torch.testing.assert_close(criterion(logits.detach(), TARGET), expected)
    criterion(logits, TARGET)
    assert not torch.equal(criterion.separate.centers, CENTERS)


@pytest.mark.parametrize("shape", [(6,), (6, 1), (6, NUM_CLASSES + 1)])
def test_float_labels_get_the_message_of_the_separate_loss(shape: tuple[int, ...]) -> None:
    model, criterion = model_and_loss()
    with pytest.raises(ValueError, match=r"target of class probabilities must have shape \(6, 4\)"):
        criterion(model(inputs_of()), torch.zeros(shape))


def test_a_head_and_its_layer_are_watched_by_two_losses() -> None:
    head = nn.Sequential(nn.Tanh(), linear())
    outer, inner = (SoftmaxSeparateLoss(one, center_init=CENTERS) for one in (head, head[1]))
    features = torch.randn(6, FEATURE_DIM, requires_grad=True)
    logits = head(features)
    for criterion, expected in ((outer, features), (inner, features.tanh())):
        criterion(logits, TARGET)
        assert criterion.last_terms is not None
        torch.testing.assert_close(criterion.last_terms.intra, intra_of(expected, TARGET))


def test_logits_of_another_watched_head_are_refused() -> None:
    body, heads = nn.Linear(INPUT_DIM, FEATURE_DIM), [linear(), linear()]
    first, _ = (SoftmaxSeparateLoss(head) for head in heads)
    features = body(inputs_of())
    logits = [head(features) for head in heads]
    with pytest.raises(RuntimeError, match="another head has led to logits"):
        first(logits[1], TARGET)
    with pytest.raises(RuntimeError, match="another head has led to logits"):
        first(logits[1] + 0, TARGET)
    first.watch(heads[1])
    first(heads[1](features), TARGET)
    first(logits[0], TARGET)


@pytest.mark.parametrize("operators", [50, 200])
def test_the_walk_visits_each_operator_once(
    operators: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, criterion = model_and_loss(center_update="none")
    logits = model(inputs_of())
    branch = nn.Parameter(torch.ones(6, NUM_CLASSES)).exp()
    visits: list[Any] = []
    notes_of = _torch.notes_of
    monkeypatch.setattr(_torch, "notes_of", lambda node: visits.append(node) or notes_of(node))  # type: ignore[func-returns-value]
    for _ in range(operators):
        logits = logits + branch
    with pytest.warns(UserWarning, match="operator 'add' changed"):
        criterion(logits, TARGET)
    assert operators < len(visits) < 3 * operators + 20


@pytest.mark.parametrize("how", ["model", "in place", "step"])
@pytest.mark.parametrize("same", [False, True])
def test_a_compiled_run_without_the_loss_may_come_before(how: str, same: bool) -> None:
    def new() -> nn.Sequential:
        return nn.Sequential(nn.Linear(INPUT_DIM, FEATURE_DIM), nn.Sequential(nn.ReLU(), linear()))

    def compiled(model: nn.Module) -> Any:
        if how == "in place":
            model.compile(backend="aot_eager")
            return model
        if how == "step":
            return lambda inputs: step(model, inputs)
        return torch.compile(model, backend="aot_eager")

    step = torch.compile(lambda model, inputs: model(inputs), backend="aot_eager")
    model = new()
    call = compiled(model)
    F.cross_entropy(call(inputs_of()), TARGET).backward()
    if not same:
        model = new()
        call = compiled(model)
    criterion = SoftmaxSeparateLoss(model[-1], center_init=CENTERS)
    for _ in range(2):
        inputs = inputs_of()
        criterion(call(inputs), TARGET).backward()
    criterion.unwatch()
    call(inputs_of())
    assert not model[-1]._forward_hooks


def test_casts_inside_a_compiled_model_are_recognised() -> None:
    """As Hugging Face models do under mixed precision."""

    class Casting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = nn.Linear(INPUT_DIM, FEATURE_DIM), linear()

        def forward(self, inputs: Tensor) -> Tensor:
            logits: Tensor = self.head(self.body(inputs))
            return logits.double()

    model = Casting()
    criterion = SoftmaxSeparateLoss(model.head, center_init=CENTERS, center_update="none")
    call = torch.compile(model, backend="aot_eager")
    for graph, _ in itertools.product((True, False), range(2)):
        with torch.set_grad_enabled(graph):
            batches = inputs_of(2, 6)
            outputs = [call(batch) for batch in batches]
            for batch, output in zip(batches, outputs, strict=True):
                for _ in range(2):
                    loss = criterion(output, TARGET)
                assert criterion.last_terms is not None
                expected = intra_of(model.body(batch), TARGET)
                torch.testing.assert_close(criterion.last_terms.intra, expected)
                assert loss.requires_grad == graph


@pytest.mark.parametrize("fullgraph", [False, True])
def test_a_compiled_step_is_right_on_every_release(fullgraph: bool) -> None:
    model, criterion = model_and_loss()
    twin, twin_criterion = model_and_loss()
    twin.load_state_dict(model.state_dict())

    def joint_loss(inputs: Tensor) -> Tensor:
        loss: Tensor = criterion(model(inputs), TARGET)
        return loss

    step = torch.compile(joint_loss, fullgraph=fullgraph, backend="aot_eager")
    if fullgraph and not COMPILES_UPDATES:
        with pytest.raises(Exception, match="run_uncompiled"):
            step(inputs_of())
        return
    for _ in range(2):
        inputs = inputs_of()
        torch.testing.assert_close(step(inputs), twin_criterion(twin(inputs), TARGET))
    torch.testing.assert_close(criterion.separate.centers, twin_criterion.separate.centers)
