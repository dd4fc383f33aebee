"""Softmax and separate loss on the head of a model that returns logits only."""

import copy
import gc
import io
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from separate_loss import SeparateLoss, SoftmaxSeparateLoss, separate_loss
from tests.helpers.releases import COMPILES_UPDATES

NUM_CLASSES = 5


class Residual(nn.Module):
    """Convolutions with a shortcut, average pooling, `fc`."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.block = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU())
        self.fc = nn.Linear(8, NUM_CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        maps = self.stem(images)
        logits: Tensor = self.fc((maps + self.block(maps)).mean((2, 3)))
        return logits


class Attention(nn.Module):
    """Patches, a class token, one transformer layer, `head`."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 8, 4, stride=4)
        self.token = nn.Parameter(torch.randn(1, 1, 8))
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.head = nn.Linear(8, NUM_CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        patches = self.patches(images).flatten(2).mT
        tokens = torch.cat([self.token.expand(len(images), 1, 8), patches], 1)
        logits: Tensor = self.head(self.layer(tokens)[:, 0])
        return logits


def convolutional() -> nn.Sequential:
    convolutions = nn.Conv2d(3, 8, 3, stride=2), nn.ReLU(), nn.Flatten()
    return nn.Sequential(*convolutions, nn.Linear(72, 16), nn.ReLU(), nn.Linear(16, NUM_CLASSES))


def perceptron() -> nn.Sequential:
    return nn.Sequential(nn.Flatten(), nn.Linear(192, 16), nn.Tanh(), nn.Linear(16, NUM_CLASSES))


MODELS: list[tuple[Callable[[], Any], Callable[[Any], nn.Linear]]] = [
    (Residual, lambda model: model.fc),
    (Attention, lambda model: model.head),
    (convolutional, lambda model: model[-1]),
    (perceptron, lambda model: model[-1]),
]


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def images(size: int = 6) -> Tensor:
    return torch.randn(size, 3, 8, 8)


def labels(size: int = 6) -> Tensor:
    return torch.arange(size) % NUM_CLASSES


def run_by_hand(model: nn.Module, head: nn.Linear, batch: Tensor) -> tuple[Tensor, Tensor]:
    """Features and logits, as a model would return them that was written to."""
    entered: list[Tensor] = []
    handle = head.register_forward_hook(lambda _, inputs, __: entered.append(inputs[0]))
    logits = model(batch)
    handle.remove()
    return entered[0], logits


@pytest.mark.parametrize(("build", "head_of"), MODELS)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("kind", ["indices", "ignoring", "smooth", "probabilities"])
def test_gradients_are_those_of_a_hand_written_loop(
    build: Callable[[], Any], head_of: Callable[[Any], nn.Linear], kind: str, reduction: Any
) -> None:
    model = build().double()
    head = head_of(model)
    batch, target = images().double(), labels()
    smoothing, soft = 0.0, target
    if kind == "ignoring":
        target[2] = -100
    elif kind == "probabilities":
        target = soft = torch.rand(6, NUM_CLASSES).double().softmax(-1)
    elif kind == "smooth":
        smoothing = 0.1
        soft = F.one_hot(target, NUM_CLASSES).double() * 0.9 + 0.1 / NUM_CLASSES
    weight = torch.rand(NUM_CLASSES, dtype=torch.float64)
    centers = torch.randn(NUM_CLASSES, head.in_features, dtype=torch.float64)

    features, logits = run_by_hand(model, head, batch)
    softmax = F.cross_entropy(
        logits, target, weight=weight, label_smoothing=smoothing, reduction=reduction
    )
    separate = separate_loss(features, soft, centers, weight=weight, reduction=reduction)
    expected = softmax + 0.9 * separate
    expected_grads = torch.autograd.grad(expected.sum(), list(model.parameters()))

    criterion = SoftmaxSeparateLoss(
        head,
        center_init=centers,
        label_smoothing=smoothing,
        weight=weight,
        reduction=reduction,
        dtype=torch.float64,
    )
    loss = criterion(model(batch), target)
    torch.testing.assert_close(loss, expected)
    grads = torch.autograd.grad(loss.sum(), list(model.parameters()))
    torch.testing.assert_close(grads, expected_grads)

    other = SeparateLoss(*centers.shape, center_init=centers, dtype=torch.float64)
    other(features, soft)
    torch.testing.assert_close(criterion.separate.centers, other.centers)


def test_logits_that_never_left_the_head_are_refused() -> None:
    model = perceptron()
    criterion = SoftmaxSeparateLoss(model[-1], center_init="sphere")
    before = criterion.separate.centers.clone()
    with pytest.raises(RuntimeError, match="The watched head has had no forward pass"):
        criterion(torch.randn(6, NUM_CLASSES), labels())
    model(images())
    for logits in (torch.randn(6, NUM_CLASSES), torch.randn(6, NUM_CLASSES).requires_grad_() * 2):
        with pytest.raises(RuntimeError, match="one forward pass of the watched head"):
            criterion(logits, labels())
    assert torch.equal(criterion.separate.centers, before)


def test_the_model_stays_as_it_was() -> None:
    model = perceptron()
    names = list(model.state_dict())
    plain = pickle.dumps(model.state_dict())
    criterion = SoftmaxSeparateLoss(model[-1])
    assert pickle.dumps(model.state_dict()) == plain
    assert list(model.state_dict()) == names
    assert list(criterion.state_dict()) == ["separate.centers"]
    assert not list(criterion.parameters())

    pickled = pickle.dumps(model)
    assert b"separate_loss" not in pickled
    batch = images()
    for twin in (copy.deepcopy(model), pickle.loads(pickled)):
        assert torch.equal(twin(batch), model(batch))
        criterion(model(batch), labels())
        # The copy was run last, and is not watched.
        with pytest.raises(RuntimeError, match="no forward pass of the watched head has led"):
            criterion(twin(batch), labels())
    assert torch.export.export(model, (batch,)).module()(batch).shape == (6, NUM_CLASSES)


def test_copies_of_the_loss_watch_nothing_until_told() -> None:
    model = perceptron()
    criterion = SoftmaxSeparateLoss(model[-1])
    criterion(model(images()), labels())
    before = criterion.separate.centers.clone()
    for twin in (copy.deepcopy(criterion), pickle.loads(pickle.dumps(criterion))):
        with pytest.raises(RuntimeError, match=r"copied or unpickled loss needs\s+that"):
            twin(model(images()), labels())
        assert torch.equal(twin.separate.centers, before)
        twin.watch(model[-1])
        assert twin(model(images()), labels()).isfinite()
        # Both watch the head now, each for itself.
        assert criterion(model(images()), labels()).isfinite()
        twin.unwatch()


def test_the_hook_goes_with_the_loss() -> None:
    model = perceptron()
    criterion = SoftmaxSeparateLoss(model[-1])
    assert len(model[-1]._forward_hooks) == 1
    criterion.unwatch()
    assert not model[-1]._forward_hooks
    criterion.watch(model[-1])
    del criterion
    gc.collect()
    assert not model[-1]._forward_hooks


def test_two_models_and_two_heads_do_not_mix() -> None:
    first, second = perceptron(), perceptron()
    criteria = [SoftmaxSeparateLoss(model[-1], center_init="sphere") for model in (first, second)]
    batches = images(), images()
    logits = first(batches[0]), second(batches[1])
    expected = [
        F.cross_entropy(out, labels())
        + 0.9 * separate_loss(model[:-1](batch), labels(), criterion.separate.centers.clone())
        for out, model, batch, criterion in zip(
            logits, (first, second), batches, criteria, strict=True
        )
    ]
    for criterion, out, value in reversed(list(zip(criteria, logits, expected, strict=True))):
        torch.testing.assert_close(criterion(out, labels()), value)


def test_two_passes_before_two_calls_do_not_mix() -> None:
    """Two views of one batch: each loss is that of the features of its own logits."""
    model = perceptron()
    criterion = SoftmaxSeparateLoss(model[-1], center_init="sphere", center_lr=0.0)
    views = images(), images()
    ways: list[Callable[[Tensor], Tensor]] = [
        lambda out: out,
        lambda out: out.view(2, 3, NUM_CLASSES).flatten(0, 1),
        lambda out: out.double().float().clone(),
    ]
    for way in ways:
        outputs = [model(view) for view in views]
        with torch.no_grad():
            model(images())  # A look at something else, whose output is dropped.
        for view, output in zip(views, outputs, strict=True):
            features = model[:-1](view)
            expected = F.cross_entropy(output, labels()) + 0.9 * separate_loss(
                features, labels(), criterion.separate.centers
            )
            torch.testing.assert_close(criterion(way(output), labels()), expected)


def test_two_compiled_passes_before_two_calls_do_not_mix() -> None:
    torch._dynamo.reset()
    model = perceptron()
    criterion = SoftmaxSeparateLoss(model[-1], center_init="sphere", center_update="none")
    compiled = torch.compile(model, fullgraph=True)
    views = images(), images()
    expected = [criterion(model(view), labels()) for view in views]

    def both(*views: Tensor) -> list[Tensor]:
        outputs = [model(view) for view in views]
        return [criterion(output, labels()) for output in outputs]

    outputs = [compiled(view) for view in views]
    losses = [criterion(output, labels()) for output in outputs]
    torch.testing.assert_close(losses, expected)
    torch.testing.assert_close(torch.compile(both, fullgraph=True)(*views), expected)


class ToDictionary(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(16, NUM_CLASSES)

    def forward(self, features: Tensor) -> dict[str, Tensor]:
        return {"logits": self.layer(features)}


def test_a_head_that_returns_more_than_logits() -> None:
    head = ToDictionary()
    batches = torch.randn(2, 6, 16, requires_grad=True)
    criterion = SoftmaxSeparateLoss(head, center_init="sphere", center_lr=0.0)
    expected = [criterion(head(batch)["logits"], labels()) for batch in batches]
    outputs = [head(batch)["logits"] for batch in batches]
    losses = [criterion(output, labels()) for output in outputs]
    torch.testing.assert_close(losses, expected)


def test_logits_of_another_model_are_refused() -> None:
    model = perceptron()
    teacher = copy.deepcopy(model)
    criterion = SoftmaxSeparateLoss(model[-1])
    batch = images()
    student = model(batch)
    with pytest.raises(RuntimeError, match="no forward pass of the watched head has led to logits"):
        criterion(teacher(batch), labels())
    assert criterion(student, labels()).isfinite()


def test_features_changed_in_place_are_refused() -> None:
    heads = nn.Sequential(nn.ReLU(inplace=True), nn.Linear(16, NUM_CLASSES)), nn.Linear(16, 5)
    for head in heads:
        criterion = SoftmaxSeparateLoss(head, num_classes=NUM_CLASSES, feature_dim=16)
        features = torch.randn(6, 16, requires_grad=True) * 1
        with torch.no_grad():
            logits = head(features)
            features.relu_()
        with pytest.raises(RuntimeError, match="changed in place"):
            criterion(logits, labels())


def test_centers_stay_where_only_the_model_ran_without_gradients() -> None:
    model = perceptron()
    criterion = SoftmaxSeparateLoss(model[-1], center_init="sphere")
    before = criterion.separate.centers.clone()
    with torch.no_grad():
        logits = model(images())
    criterion(logits, labels())
    assert torch.equal(criterion.separate.centers, before)


def test_what_nobody_asked_for_is_let_go() -> None:
    """Outputs that are kept, as for a metric at the end of an epoch, keep few features alive."""
    model = perceptron()
    criterion = SoftmaxSeparateLoss(model[-1])
    seen: list[weakref.ref[Tensor]] = []
    model[-1].register_forward_pre_hook(lambda _, inputs: seen.append(weakref.ref(inputs[0])))
    with torch.no_grad():
        kept = [model(images()) for _ in range(20)]
        assert [reference() is None for reference in seen] == [True] * 12 + [False] * 8
        kept.clear()
        model(images())
        assert [reference() is None for reference in seen] == [True] * 20 + [False]
    seen.clear()
    for _ in range(3):
        kept.append(model(images()))
        criterion(kept[-1], labels()).backward()
        gc.collect()
        assert all(reference() is None for reference in seen)
    model(images())
    gc.collect()
    assert all(reference() is None for reference in seen)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_head_in_a_checkpointed_region(use_reentrant: bool) -> None:
    """The region runs again in the backward pass, which must count for nothing."""
    model = perceptron()
    criterion = SoftmaxSeparateLoss(model[-1], center_init="sphere", center_lr=0.0)
    batch = images().requires_grad_()
    logits = checkpoint(model, batch, use_reentrant=use_reentrant)
    if use_reentrant:
        with pytest.raises(RuntimeError, match="ran without recording gradients"):
            criterion(logits, labels())
        return
    criterion(logits, labels()).backward()
    with pytest.raises(RuntimeError, match="backward has freed the graph"):
        criterion(logits, labels())
    assert batch.grad is not None
    (expected,) = torch.autograd.grad(criterion(model(batch), labels()), batch)
    torch.testing.assert_close(batch.grad, expected)


class Named(nn.Module):
    """A head that tells no sizes and takes its features by name."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Identity(), nn.Linear(16, NUM_CLASSES))

    def forward(self, *, features: Tensor) -> Tensor:
        logits: Tensor = self.layers(features)
        return logits


class Bare(nn.Module):
    """A head without a layer that tells sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(NUM_CLASSES, 16))

    def forward(self, features: Tensor) -> Tensor:
        return F.linear(features, self.weight)


@pytest.mark.parametrize(
    ("head", "num_classes", "feature_dim"),
    [
        (nn.Linear(16, 5), 5, 16),
        (nn.Sequential(nn.Dropout(), nn.Linear(16, 5)), 5, 16),
        (nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 5)), 5, 16),
        (nn.Conv2d(16, 5, 1), 5, 16),
        (nn.Sequential(nn.BatchNorm1d(16), Named()), 5, 16),
    ],
)
def test_sizes_are_those_of_the_layers_of_the_head(
    head: nn.Module, num_classes: int, feature_dim: int
) -> None:
    criterion = SoftmaxSeparateLoss(head)
    assert criterion.separate.centers.shape == (num_classes, feature_dim)


@pytest.mark.parametrize("center_update", ["paper", "gradient", "none"])
def test_heads_that_tell_no_sizes_need_them_at_once(center_update: Any) -> None:
    """Centers that came later would be missed by optimizers, averages of weights and `to`."""
    for head, missing in ((Bare(), "num_classes"), (nn.LazyLinear(NUM_CLASSES), "feature_dim")):
        with pytest.raises(ValueError, match=f"{missing} must be given, as head does not tell it"):
            SoftmaxSeparateLoss(head, center_update=center_update)
        criterion = SoftmaxSeparateLoss(head, num_classes=5, feature_dim=16)
        features = torch.randn(6, 16, requires_grad=True)
        assert criterion(head(features), labels()).isfinite()


def test_a_compiled_loss_can_be_copied() -> None:
    torch._dynamo.reset()
    model = perceptron()
    criterion = SoftmaxSeparateLoss(model[-1])
    criterion.compile()
    criterion(model(images()), labels())
    assert torch.equal(
        pickle.loads(pickle.dumps(criterion)).separate.centers, criterion.separate.centers
    )


def test_parameters_that_no_optimizer_got_still_move() -> None:
    """In the default mode there are none to hand over, and the centers move all the same."""
    model = perceptron()
    criterion = SoftmaxSeparateLoss(model[-1])
    assert not list(criterion.parameters())
    before = criterion.separate.centers.clone()
    criterion(model(images()), labels()).backward()
    assert not torch.equal(criterion.separate.centers, before)


def test_resuming_with_the_model_goes_on_bit_identically() -> None:
    def start() -> tuple[nn.Sequential, SoftmaxSeparateLoss, torch.optim.Optimizer]:
        torch.manual_seed(1)
        model = perceptron()
        criterion = SoftmaxSeparateLoss(model[-1], label_smoothing=0.1)
        return model, criterion, torch.optim.AdamW(model.parameters())

    def steps(seed: int, parts: tuple[Any, ...]) -> list[float]:
        torch.manual_seed(seed)
        model, criterion, optimizer = parts
        losses = []
        for _ in range(10):
            loss = criterion(model(images()), labels())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses

    first: tuple[Any, ...] = start()
    second: tuple[Any, ...] = start()
    steps(2, first)
    buffer = io.BytesIO()
    torch.save([part.state_dict() for part in first], buffer)
    buffer.seek(0)
    for part, state in zip(second, torch.load(buffer, weights_only=True), strict=True):
        part.load_state_dict(state)
    assert steps(3, first) == steps(3, second)
    assert torch.equal(first[1].separate.centers, second[1].separate.centers)


def test_features_die_with_the_step() -> None:
    model = perceptron()
    criterion = SoftmaxSeparateLoss(model[-1])
    seen: list[weakref.ref[Tensor]] = []
    model[-1].register_forward_pre_hook(lambda _, inputs: seen.append(weakref.ref(inputs[0])))
    for _ in range(5):
        loss = criterion(model(images()), labels())
        loss.backward()
        del loss
        assert seen[-1]() is None


def test_memory_does_not_grow() -> None:
    """No more tensors are alive after 1,000 steps than after 10."""
    model = perceptron()
    criterion = SoftmaxSeparateLoss(model[-1])
    optimizer = torch.optim.Adam(model.parameters())

    def alive_after(steps: int) -> int:
        for _ in range(steps):
            loss = criterion(model(images()), labels())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        del loss
        gc.collect()
        return sum(issubclass(type(thing), Tensor) for thing in gc.get_objects())

    few = alive_after(10)
    assert alive_after(1000) <= few


@pytest.mark.parametrize("saved_as", ["paper", "gradient", "none"])
@pytest.mark.parametrize("loaded_as", ["paper", "gradient", "none"])
def test_checkpoints_load_in_every_mode(saved_as: Any, loaded_as: Any) -> None:
    head = nn.Linear(16, NUM_CLASSES)
    saved = SoftmaxSeparateLoss(head, center_update=saved_as, center_init="sphere")
    loaded = SoftmaxSeparateLoss(head, center_update=loaded_as, center_init="sphere")
    buffer = io.BytesIO()
    torch.save(saved.state_dict(), buffer)
    buffer.seek(0)
    loaded.load_state_dict(torch.load(buffer, weights_only=True))
    assert torch.equal(saved.separate.centers, loaded.separate.centers)
    other = SoftmaxSeparateLoss(nn.Linear(16, NUM_CLASSES + 1))
    with pytest.raises(RuntimeError, match=r"size mismatch for separate.centers"):
        other.load_state_dict(saved.state_dict())


def test_both_terms_can_be_logged() -> None:
    model = perceptron()
    for reduction in ("mean", "sum", "none"):
        criterion = SoftmaxSeparateLoss(model[-1], reduction=reduction)
        assert criterion.last_terms is None
        loss = criterion(model(images()), labels())
        terms = criterion.last_terms
        assert terms is not None
        assert not any(term.requires_grad for term in terms)
        total = terms.softmax + 0.9 * (terms.intra + terms.inter)
        if reduction != "sum":
            torch.testing.assert_close(total, loss.detach().mean())


def test_centers_stay_in_validation() -> None:
    model = perceptron()
    criterion = SoftmaxSeparateLoss(model[-1])
    criterion(model(images()), labels()).backward()
    before = criterion.separate.centers.clone()
    with torch.no_grad():
        criterion(model(images()), labels())
    criterion.eval()(model(images()), labels())
    assert torch.equal(criterion.separate.centers, before)


def test_frozen_backbone_half_precision_and_small_integers() -> None:
    model = perceptron()
    model[:-1].requires_grad_(False)
    criterion = SoftmaxSeparateLoss(model[-1])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(images())
        with pytest.warns(UserWarning, match="the features require no gradient"):
            loss = criterion(logits, labels().int())
    loss.backward()
    assert loss.dtype == torch.float32
    assert model[-1].weight.grad is not None
    assert criterion.separate.centers.dtype == torch.float32
    assert criterion.separate.centers.norm(dim=-1).gt(0.9).all()


def test_sequences_of_tokens() -> None:
    head = nn.Sequential(nn.Identity(), nn.Linear(16, NUM_CLASSES))
    criterion = SoftmaxSeparateLoss(head, num_classes=NUM_CLASSES, feature_dim=16)
    target = torch.randint(NUM_CLASSES, (4, 7))
    target[0, 3:] = -100
    tokens = torch.randn(4, 7, 16, requires_grad=True)
    loss = criterion(head(tokens), target)
    flat = criterion.eval()(head(tokens).view(-1, NUM_CLASSES), target.view(-1))
    loss.backward()
    assert tokens.grad is not None
    assert not tokens.grad[0, 3:].any()
    assert flat.isfinite()


@pytest.mark.parametrize(
    ("logits_shape", "target", "error", "message"),
    [
        ((6, 4), labels(), RuntimeError, r"^operator 'slice'"),
        ((3, 5), labels(3), RuntimeError, r"(?s)^operator 'slice'.*labels to ignore_index"),
        ((6, 5), labels()[:, None], ValueError, r"target of class indices must have shape \(6,\)"),
        ((6, 5), labels() + 1, IndexError, r"target must hold class indices in \[0, 5\).* got 5"),
        ((6, 5), labels().bool(), TypeError, "target must hold class indices"),
    ],
)
def test_bad_calls(logits_shape: Any, target: Tensor, error: Any, message: str) -> None:
    model = perceptron()
    criterion = SoftmaxSeparateLoss(model[-1], center_init="sphere")
    before = criterion.separate.centers.clone()
    samples, classes = logits_shape
    logits = model(images())
    if logits.shape != logits_shape:
        logits = logits[:samples, :classes]
    with pytest.raises(error, match=message):
        criterion(logits, target)
    assert torch.equal(criterion.separate.centers, before)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"head": "fc"}, TypeError, "head must be a torch.nn.Module, got str"),
        ({"num_classes": 4}, ValueError, "num_classes must be 5, as the head has it, or None"),
        ({"feature_dim": 4}, ValueError, "feature_dim must be 16, as the head has it, or None"),
        ({"head": Named(), "reduction": "some"}, ValueError, "reduction must be one of"),
        ({"head": Named(), "center_lr": -1.0}, ValueError, "center_lr must be finite"),
        ({"separate_weight": -1.0}, ValueError, "separate_weight must be finite and not negative"),
        ({"label_smoothing": 1.5}, ValueError, r"label_smoothing must be in \[0, 1\], got 1.5"),
        ({"head": nn.Linear(16, 1)}, ValueError, "num_classes must be at least 2"),
        ({"class_dim": 0}, ValueError, "class_dim must be one of 1, -1, got 0"),
        ({"center_update": "sgd"}, ValueError, "center_update must be one of"),
        ({"weight": [1.0] * 5}, TypeError, "weight must be a tensor, got list"),
    ],
)
def test_bad_options(options: dict[str, Any], error: Any, message: str) -> None:
    head = nn.Linear(16, NUM_CLASSES)
    with pytest.raises(error, match=message):
        SoftmaxSeparateLoss(**({"head": head} | options))
    assert not head._forward_hooks


@pytest.mark.parametrize(("build", "head_of"), MODELS)
def test_compiled_models_train_as_eager_ones(
    build: Callable[[], Any], head_of: Callable[[Any], nn.Linear]
) -> None:
    torch._dynamo.reset()
    eager = build()
    other = copy.deepcopy(eager)
    losses: list[list[float]] = []
    for model, compiled in ((eager, False), (other, True)):
        criterion = SoftmaxSeparateLoss(head_of(model))
        call = torch.compile(model, fullgraph=True) if compiled else model
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        torch.manual_seed(1)
        losses.append([])
        for _ in range(20):
            loss = criterion(call(images()), labels())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.item())
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-4, atol=1e-5)


def test_the_whole_step_compiles() -> None:
    """Model, watching and loss in one graph, over batches of changing size."""
    torch._dynamo.reset()
    eager, other = perceptron(), perceptron()
    other.load_state_dict(eager.state_dict())
    losses: list[list[float]] = []
    centers: list[Tensor] = []
    for model, compiled in ((eager, False), (other, True)):
        criterion = SoftmaxSeparateLoss(model[-1])

        def step(
            batch: Tensor, target: Tensor, model: Any = model, criterion: Any = criterion
        ) -> Any:
            return criterion(model(batch), target)

        call = torch.compile(step, fullgraph=COMPILES_UPDATES) if compiled else step
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        torch.manual_seed(1)
        losses.append([])
        for number in range(20):
            size = 6 + number % 3
            loss = call(images(size), labels(size))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.item())
        centers.append(criterion.separate.centers)
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(*centers, rtol=1e-4, atol=1e-5)
