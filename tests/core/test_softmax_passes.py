"""Several forward passes of one head: each loss uses the features of its own logits."""

import threading
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from separate_loss import SoftmaxSeparateLoss, separate_loss
from tests.helpers.heads import (
    CENTERS,
    FEATURE_DIM,
    INPUT_DIM,
    MODES,
    NUM_CLASSES,
    TARGET,
    in_mode,
    inputs_of,
    intra_of,
    model_and_loss,
)
from tests.helpers.properties import property_test


@property_test(
    mode=st.sampled_from(MODES[:3]),
    order=st.permutations(range(4)),
    views=st.booleans(),
    repeated=st.booleans(),
)
def test_each_output_is_matched_with_its_own_pass(
    mode: str, order: list[int], views: bool, repeated: bool
) -> None:
    check_passes(mode, order, views, repeated)


@pytest.mark.parametrize("mode", MODES[3:])
@pytest.mark.parametrize("views", [False, True])
def test_each_compiled_output_is_matched_with_its_own_pass(mode: str, views: bool) -> None:
    check_passes(mode, [3, 1, 0, 2], views, repeated=True)


def check_passes(mode: str, order: list[int], views: bool, repeated: bool) -> None:
    torch.manual_seed(0)
    model, criterion = model_and_loss(center_update="none")
    call, context = in_mode(mode, model)
    batches = inputs_of(len(order), 6)
    with context:
        outputs = [call(batch) for batch in batches]
        for number in order * (1 + repeated):
            logits = outputs[number].view(2, 3, NUM_CLASSES) if views else outputs[number]
            criterion(logits, TARGET.reshape(logits.shape[:-1]))
            assert criterion.last_terms is not None
            expected = intra_of(model[0](batches[number]), TARGET)
            torch.testing.assert_close(criterion.last_terms.intra, expected)


@pytest.mark.parametrize("mode", MODES)
def test_logits_of_two_passes_in_one_tensor_are_refused(mode: str) -> None:
    model, criterion = model_and_loss()
    call, context = in_mode(mode, model)
    first, second = inputs_of(2, 6)
    joins: list[Any] = [
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
            criterion(join(call(first), call(second)), TARGET)
    assert torch.equal(criterion.separate.centers, CENTERS)


def test_a_dropped_output_does_not_disturb_earlier_passes() -> None:
    """Also after a cast and a copy of the logits."""
    model, criterion = model_and_loss(center_lr=0.0)
    batches = inputs_of(2, 6)
    outputs = [model(batch) for batch in batches]
    with torch.no_grad():
        model(inputs_of())
    for batch, output in zip(batches, outputs, strict=True):
        separate = separate_loss(model[0](batch), TARGET, CENTERS)
        expected = F.cross_entropy(output, TARGET) + separate
        torch.testing.assert_close(criterion(output.double().float().clone(), TARGET), expected)


def test_two_models_do_not_mix() -> None:
    pairs = [model_and_loss() for _ in range(2)]
    batches = inputs_of(2, 6)
    outputs = [model(batch) for (model, _), batch in zip(pairs, batches, strict=True)]
    for (model, criterion), batch, output in reversed([*zip(pairs, batches, outputs, strict=True)]):
        separate = separate_loss(model[0](batch), TARGET, CENTERS)
        expected = F.cross_entropy(output, TARGET) + separate
        torch.testing.assert_close(criterion(output, TARGET), expected)


def test_a_head_may_return_a_dictionary() -> None:
    class ToDictionary(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(FEATURE_DIM, NUM_CLASSES)

        def forward(self, features: Tensor) -> dict[str, Tensor]:
            return {"logits": self.layer(features)}

    head = ToDictionary()
    batches = torch.randn(2, 6, FEATURE_DIM, requires_grad=True)
    criterion = SoftmaxSeparateLoss(head, center_init=CENTERS, center_lr=0.0)
    outputs = [head(batch)["logits"] for batch in batches]
    for batch, output in zip(batches, outputs, strict=True):
        criterion(output, TARGET)
        assert criterion.last_terms is not None
        torch.testing.assert_close(criterion.last_terms.intra, intra_of(batch, TARGET))


@pytest.mark.parametrize("mode", MODES)
def test_one_pass_serves_two_calls_and_moves_the_centers_once(mode: str) -> None:
    """As mixup calls a loss, once for each target."""
    model, criterion = model_and_loss()
    call, context = in_mode(mode, model)
    first, second, share = TARGET, TARGET.roll(1), 0.3
    with context:
        logits = call(inputs_of())
        criterion(logits, first)
        moved = criterion.separate.centers.clone()
        assert torch.equal(moved, CENTERS) == (mode not in {"graph", "compiled"})
        criterion(logits, second)
        assert torch.equal(criterion.separate.centers, moved)
        soft = share * F.one_hot(first, NUM_CLASSES) + (1 - share) * F.one_hot(second, NUM_CLASSES)
        torch.testing.assert_close(
            share * criterion(logits, first) + (1 - share) * criterion(logits, second),
            criterion(logits, soft),
        )


@pytest.mark.parametrize("mode", ["graph", "compiled"])
def test_a_pass_can_be_used_until_backward_frees_its_graph(mode: str) -> None:
    model, criterion = model_and_loss()
    call, _ = in_mode(mode, model)
    logits = call(inputs_of())
    criterion(logits, TARGET).backward(retain_graph=True)
    criterion(logits, TARGET).backward()
    with pytest.raises(RuntimeError, match="backward has freed the graph of the pass"):
        criterion(logits, TARGET)


def test_a_refused_call_does_not_use_up_the_pass() -> None:
    model, criterion = model_and_loss()
    logits = model(inputs_of())
    with pytest.raises(IndexError):
        criterion(logits, TARGET + 1)
    with pytest.raises(ValueError, match="target of class indices must have shape"):
        criterion(logits, TARGET[:5])
    assert torch.equal(criterion.separate.centers, CENTERS)
    criterion(logits, TARGET).backward()
    assert not torch.equal(criterion.separate.centers, CENTERS)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_checkpointed_head_counts_as_one_pass(use_reentrant: bool) -> None:
    """The backward pass runs a checkpointed region again."""
    model, criterion = model_and_loss(center_lr=0.0)
    batch = inputs_of().requires_grad_()
    logits = checkpoint(model, batch, use_reentrant=use_reentrant)
    if use_reentrant:
        with pytest.raises(RuntimeError, match="use_reentrant=False"):
            criterion(logits, TARGET)
        return
    criterion(logits, TARGET).backward()
    with pytest.raises(RuntimeError, match="backward has freed the graph"):
        criterion(logits, TARGET)
    assert batch.grad is not None
    (expected,) = torch.autograd.grad(criterion(model(batch), TARGET), batch)
    torch.testing.assert_close(batch.grad, expected)


def test_threads_that_train_and_evaluate_do_not_mix() -> None:
    model, criterion = model_and_loss(center_update="none")
    problems: list[str] = []

    def run(training: bool, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for _ in range(100):
            inputs = torch.randn(6, INPUT_DIM, generator=generator)
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
            if not torch.allclose(loss, F.cross_entropy(logits, target) + separate):
                problems.append("features of another pass")

    arguments: list[Any] = [(bool(number % 2), number) for number in range(4)]
    threads = [threading.Thread(target=run, args=pair) for pair in arguments]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not problems
