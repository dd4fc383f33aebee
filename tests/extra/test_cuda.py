"""The package on a CUDA GPU, with compiled Triton kernels: `make test-cuda`."""

import copy
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch._dynamo
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor, nn

from separate_loss import SeparateLoss, SoftmaxSeparateLoss, metrics, separate_loss
from separate_loss._triton import backend
from separate_loss.functional import update_centers
from tests.helpers.properties import REDUCTIONS, Problem, assert_equal, problems, property_test

if not torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") != "0":
    pytest.skip(
        "needs a CUDA GPU and kernels that are compiled for it: make test-cuda",
        allow_module_level=True,
    )

DEVICE = "cuda"
# PyTorch demands it for products with deterministic algorithms.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
DTYPES = st.sampled_from([torch.float64, torch.float32, torch.float16, torch.bfloat16])
FORMS = st.sampled_from(["simplex", "paper"])
BACKENDS = ["torch", "triton"]
if not backend.HAS_TRITON:
    BACKENDS.remove("triton")
CENTER_LR = 0.5


pytestmark = [
    # Of torch itself: the mode of a test below, choices of the compiler, and the precision of
    # products, which its releases set by different names.
    pytest.mark.filterwarnings(r"ignore:[\s\S]*debug mode is a prototype:UserWarning"),
    pytest.mark.filterwarnings(r"ignore:\s*Online\s+softmax:UserWarning"),
    pytest.mark.filterwarnings(r"ignore:Unable to hit fast path of CUDAGraphs:UserWarning"),
    pytest.mark.filterwarnings(r"ignore:\s*TensorFloat32 tensor cores:UserWarning"),
    pytest.mark.filterwarnings(r"ignore:[\s\S]*control TF32:UserWarning"),
]


@pytest.fixture(autouse=True)
def _fresh_modes() -> Iterator[None]:
    """No test leaves a mode set for the next, also where it fails."""
    before = backend.BACKEND
    yield
    backend.BACKEND = before
    torch.cuda.set_sync_debug_mode("default")
    torch.use_deterministic_algorithms(False)
    torch.cuda.synchronize()


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    before, backend.BACKEND = backend.BACKEND, name
    try:
        yield
    finally:
        backend.BACKEND = before


def on_gpu(problem: Problem) -> Problem:
    weight = None if problem.weight is None else problem.weight.to(DEVICE)
    vectors = problem.features.to(DEVICE), problem.target.to(DEVICE), problem.centers.to(DEVICE)
    return Problem(*vectors, weight, problem.ignore_index)


def outcome(problem: Problem, center_lr: float | None, **options: Any) -> list[Tensor]:
    """Loss, gradients and new centers, rescaled to order one."""
    features, centers = problem.requiring_grad()
    shared: Any = {"ignore_index": problem.ignore_index, "form": options.get("form", "simplex")}
    loss = separate_loss(
        features, problem.target, centers, weight=problem.weight, **(options | shared)
    )
    gradients = torch.autograd.grad(loss.sum(), (features, centers))
    moved = update_centers(features, problem.target, problem.centers, center_lr=center_lr, **shared)
    sizes = [vectors.double().norm(dim=-1, keepdim=True) for vectors in (problem.features, centers)]
    step = sizes[1].maximum(CENTER_LR / sizes[1]).where(sizes[1] > 0, 1)
    # Only in the paper's form the gradient is in inverse proportion to the norm.
    of_features = gradients[0] * (sizes[0] if shared["form"] == "paper" else 1)
    found = loss, of_features, gradients[1] * sizes[1], moved / step
    return [one.detach().double().cpu() for one in found]


def assert_equals_cpu(
    problem: Problem, dtype: torch.dtype, backend_name: str, center_lr: float | None, **options: Any
) -> None:
    problem = problem.to(dtype)
    expected = outcome(problem, center_lr, **options)
    with use_backend(backend_name):
        found = outcome(on_gpu(problem), center_lr, **options)
    for one, other in zip(found, expected, strict=True):
        assert_equal(one, other.numpy(), dtype)


@property_test(
    problem=problems(max_exponent=3, min_samples=0),
    dtype=DTYPES,
    reduction=REDUCTIONS,
    form=FORMS,
    label_smoothing=st.sampled_from([0.0, 0.1]),
)
def test_pytorch_operators_equal_those_of_a_cpu(
    problem: Problem, dtype: torch.dtype, **options: Any
) -> None:
    assert_equals_cpu(problem, dtype, "torch", CENTER_LR, **options)


@pytest.mark.skipif("triton" not in BACKENDS, reason="needs Triton")
@settings(max_examples=settings().max_examples // 3)  # each size needs a compilation
@property_test(
    problem=problems(kind="indices", min_samples=0, max_sizes=(64, 80, 300), max_exponent=3),
    dtype=DTYPES,
    form=FORMS,
    label_smoothing=st.sampled_from([0.0, 0.1]),
    center_lr=st.sampled_from([None, CENTER_LR]),
)
def test_triton_kernels_equal_operators_of_a_cpu(
    problem: Problem, dtype: torch.dtype, center_lr: float | None, **options: Any
) -> None:
    assert_equals_cpu(problem, dtype, "triton", center_lr, **options)


@pytest.mark.skipif("triton" not in BACKENDS, reason="needs Triton")
@pytest.mark.parametrize("form", ["simplex", "paper"])
def test_auto_takes_the_kernels_once_a_trial_equals_operators(
    form: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from separate_loss._triton import step  # noqa: PLC0415 - needs Triton
    from tests.helpers.triton_steps import uses_kernels  # noqa: PLC0415

    monkeypatch.setattr(step, "direct", True)
    monkeypatch.setattr(backend, "works", {})
    criterion = SeparateLoss(3, 4, form=form, device=DEVICE)
    features = torch.randn(6, 4, device=DEVICE, requires_grad=True)
    with use_backend("auto"):
        loss = criterion(features, torch.arange(6, device=DEVICE) % 3)
    assert backend.works == {torch.device(DEVICE, 0): True}
    assert uses_kernels(loss)
    assert step.direct  # otherwise the usual launches passed, which take longer


@pytest.mark.skipif("triton" not in BACKENDS, reason="needs Triton")
def test_blocks_of_centers_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    from separate_loss._triton import step  # noqa: PLC0415 - needs Triton

    monkeypatch.setattr(step, "BLOCK_SIZE", 2**17)
    monkeypatch.setattr(step, "plan", step.Plan)
    problem = Problem(
        torch.randn(70, 33), torch.randint(9_000, (70,)), torch.randn(9_000, 33), None
    )
    assert_equals_cpu(problem, torch.float32, "triton", CENTER_LR)


@pytest.mark.parametrize("backend_name", BACKENDS)
@pytest.mark.parametrize("size", [(0, 3, 2), (1, 1, 2), (7, 4_099, 3), (3_000, 100, 5_001)])
def test_batches_and_features_of_any_size(size: tuple[int, int, int], backend_name: str) -> None:
    num_samples, feature_dim, num_classes = size
    problem = Problem(
        torch.randn(num_samples, feature_dim),
        torch.randint(num_classes, (num_samples,)),
        torch.randn(num_classes, feature_dim),
        None,
    )
    assert_equals_cpu(problem, torch.float32, backend_name, CENTER_LR)


class Trained:
    """A small classifier in float64, its criterion and four batches."""

    def __init__(self, device: str, **options: Any) -> None:
        torch.manual_seed(1)
        self.model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5)).double().to(device)
        self.criterion = SoftmaxSeparateLoss(self.model[2], **options)
        self.optimizer = torch.optim.SGD(
            [*self.model.parameters(), *self.criterion.parameters()], lr=0.1, momentum=0.9
        )
        self.batches = [
            (torch.randn(16, 6).double().to(device), torch.randint(5, (16,)).to(device))
            for _ in range(4)
        ]

    def loss(self, features: Tensor, target: Tensor) -> Tensor:
        loss: Tensor = self.criterion(self.model(features), target)
        return loss

    def step(self, features: Tensor, target: Tensor) -> Tensor:
        loss = self.loss(features, target)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return loss.detach().clone()  # the next step may take its memory

    def run(self, step: Callable[[Tensor, Tensor], Tensor] | None = None) -> list[Tensor]:
        losses = torch.stack([(step or self.step)(*batch) for batch in self.batches])
        state = [*self.model.parameters(), self.criterion.separate.centers]
        return [losses.cpu(), *(one.detach().cpu() for one in state)]


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("backend_name", BACKENDS)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"center_update": "gradient", "center_init": torch.eye(5, 8).double()},
        {"center_lr": 3.0},
        {"form": "paper"},
        {"weight": torch.tensor([1.0, 2, 3, 4, 5]).double(), "label_smoothing": 0.1},
    ],
)
def test_training_equals_that_on_a_cpu(
    options: dict[str, Any], backend_name: str, compiled: bool
) -> None:
    expected = Trained("cpu", **options).run()
    with use_backend(backend_name):
        moved = {
            name: value.to(DEVICE) if isinstance(value, Tensor) else value
            for name, value in options.items()
        }
        trained = Trained(DEVICE, **moved)
        if compiled:
            trained.criterion.compile()
        found = trained.run()
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("compiled", ["model", "criterion", "both"])
def test_steps_reduced_to_cuda_graphs_equal_plain_ones(compiled: str) -> None:
    """The outputs of compiled code lie in memory that the next step takes."""
    plain, trained = Trained(DEVICE), Trained(DEVICE)
    expected = [plain.run() for _ in range(2)]
    if compiled == "model":
        trained.model.compile(mode="reduce-overhead")
    elif compiled == "criterion":
        trained.criterion.compile(mode="reduce-overhead")
    else:
        trained.loss = torch.compile(trained.loss, mode="reduce-overhead")  # type: ignore[method-assign]

    def step(features: Tensor, target: Tensor) -> Tensor:
        torch.compiler.cudagraph_mark_step_begin()
        return trained.step(features, target)

    found = [trained.run(step) for _ in range(2)]
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    if compiled != "model":
        return
    plain.criterion.eval()
    trained.criterion.eval()
    for inputs, target in [*trained.batches, *trained.batches]:
        with torch.no_grad():
            value = trained.criterion(trained.model(inputs).float(), target)
            torch.testing.assert_close(value, plain.criterion(plain.model(inputs).float(), target))


@pytest.mark.parametrize("form", ["simplex", "paper"])
@pytest.mark.parametrize("center_update", ["forward", "gradient"])
def test_a_compiled_loss_reduced_to_cuda_graphs_equals_a_plain_one(
    center_update: Any, form: Any
) -> None:
    options: Any = {"center_update": center_update, "form": form, "dtype": torch.float64}
    plain = SeparateLoss(5, 8, device=DEVICE, **options)
    graphed = copy.deepcopy(plain)
    graphed.compile(mode="reduce-overhead")
    target = torch.arange(16, device=DEVICE) % 5
    for _ in range(5):  # the first runs warm up and record
        features = torch.randn(16, 8, device=DEVICE, dtype=torch.float64)
        found = []
        for criterion in (plain, graphed):
            torch.compiler.cudagraph_mark_step_begin()
            leaf = features.clone().requires_grad_()
            criterion.zero_grad()
            loss = criterion(leaf, target)
            loss.backward()
            gradients = leaf.grad, criterion.centers.grad
            held = [loss, criterion.centers, *(one for one in gradients if one is not None)]
            found.append([one.detach().clone() for one in held])
        torch.testing.assert_close(*found, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("backend_name", BACKENDS)
def test_a_step_never_waits_for_the_device(backend_name: str) -> None:
    with use_backend(backend_name):
        trained = Trained(DEVICE)
        trained.run()
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        for batch in trained.batches:
            trained.step(*batch)
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("backend_name", BACKENDS)
def test_replayed_cuda_graphs_equal_plain_steps(backend_name: str) -> None:
    """The first steps are not captured: they validate centers and create the optimizer's state."""
    with use_backend(backend_name):
        plain, trained = Trained(DEVICE), Trained(DEVICE)
        inputs = [one.clone() for one in trained.batches[0]]
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for batch in trained.batches[:2]:
                trained.step(*batch)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        trained.optimizer.zero_grad()
        with torch.cuda.graph(graph):
            captured = trained.step(*inputs)

        def replay(*batch: Tensor) -> Tensor:
            for held, value in zip(inputs, batch, strict=True):
                held.copy_(value)
            graph.replay()
            return captured.clone()

        found = trained.run(replay)
        for batch in plain.batches[:2]:
            plain.step(*batch)
        expected = plain.run()
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend_name", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_with_a_scaler_trains_as_float64(dtype: torch.dtype, backend_name: str) -> None:
    with use_backend(backend_name):
        trained = Trained(DEVICE)
        trained.model.float()
        scaler = torch.amp.GradScaler(DEVICE, enabled=dtype == torch.float16)
        expected = Trained(DEVICE).run()[0]
        losses = []
        for features, target in trained.batches:
            with torch.autocast(DEVICE, dtype):
                loss = trained.criterion(trained.model(features.float()), target)
            trained.optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.step(trained.optimizer)
            scaler.update()
            losses.append(loss.detach().cpu().double())
    torch.testing.assert_close(torch.stack(losses), expected, rtol=0.05, atol=0.02)


@pytest.mark.parametrize("backend_name", BACKENDS)
def test_runs_repeat_to_the_last_bit(backend_name: str) -> None:
    """The kernels always; PyTorch operators with deterministic algorithms."""
    features, target = torch.randn(500, 64, device=DEVICE), torch.randint(3, (500,), device=DEVICE)

    def run() -> list[Tensor]:
        criterion = SeparateLoss(3, 64, device=DEVICE)
        leaf = features.clone().requires_grad_()
        loss = sum((criterion(leaf, target) for _ in range(3)), torch.zeros((), device=DEVICE))
        loss.backward()
        assert leaf.grad is not None
        return [loss.detach(), leaf.grad, criterion.centers]

    torch.use_deterministic_algorithms(backend_name == "torch")
    with use_backend(backend_name):
        torch.testing.assert_close(run(), run(), rtol=0, atol=0)


def test_tensors_on_different_devices_are_refused() -> None:
    features, target = torch.randn(4, 3, device=DEVICE), torch.tensor([0, 1, 2, 0], device=DEVICE)
    with pytest.raises(ValueError, match="features must be on cpu, as centers is, got cuda:0"):
        SeparateLoss(3, 3)(features, target)
    with pytest.raises(ValueError, match="target must be on cuda:0, as features is, got cpu"):
        SeparateLoss(3, 3, device=DEVICE)(features, target.cpu())


def test_state_moves_between_devices() -> None:
    trained = Trained(DEVICE)
    trained.run()
    other = Trained("cpu")
    other.model.load_state_dict(trained.model.state_dict())
    other.criterion.load_state_dict(trained.criterion.state_dict())
    features, target = (one.cpu() for one in trained.batches[0])
    found = other.criterion.to(DEVICE)(other.model.to(DEVICE)(features.to(DEVICE)), target.cuda())
    torch.testing.assert_close(
        found, trained.criterion(trained.model(features.cuda()), target.cuda())
    )


@property_test(problem=problems(kind="indices", max_exponent=3))
def test_metrics_equal_those_of_a_cpu(problem: Problem) -> None:
    def measured(problem: Problem) -> list[Tensor]:
        features, target, centers = problem.features, problem.target, problem.centers
        ignoring: Any = {"ignore_index": problem.ignore_index}
        own = metrics.class_centers(features, target, len(centers), **ignoring)
        statistics = metrics.ClassStatistics(*centers.shape, **ignoring, device=features.device)
        statistics.update(features, target)
        found = [
            own,
            statistics.class_centers(),
            statistics.intra_class_similarity(reduction="none"),
            metrics.center_agreement(centers, own, reduction="none"),
            metrics.inter_class_similarity(centers, reduction="none"),
            metrics.intra_class_similarity(features, target, centers, **ignoring),
        ]
        return [one.double().cpu() for one in found]

    expected, found = measured(problem), measured(on_gpu(problem))
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9, equal_nan=True)


def run_python(program: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize("backend_name", BACKENDS)
@pytest.mark.parametrize("label", [-1, 3])
def test_labels_out_of_range_fail_on_the_device(label: int, backend_name: str) -> None:
    """In a process of its own, since the assertion makes the device unusable."""
    found = run_python(
        "import torch, separate_loss\n"
        "from separate_loss._triton import backend\n"
        f"backend.BACKEND = {backend_name!r}\n"
        "features = torch.randn(4, 5, device='cuda', requires_grad=True)\n"
        f"target = torch.tensor([0, 1, 2, {label}], device='cuda')\n"
        "criterion = separate_loss.SeparateLoss(3, 5, device='cuda')\n"
        "criterion(features, target).backward()\n"
        "torch.cuda.synchronize()\n"
    )
    assert found.returncode != 0
    assert "assert" in found.stderr.lower()


@pytest.mark.parametrize("backend_name", BACKENDS)
def test_plain_and_sharded_modules_agree_in_an_nccl_group(backend_name: str) -> None:
    """With one process."""
    with tempfile.TemporaryDirectory() as folder:
        found = run_python(
            "import os, torch, torch.distributed as dist\n"
            "from separate_loss import SeparateLoss\n"
            "from separate_loss._triton import backend\n"
            "from separate_loss.sharded import ShardedSeparateLoss\n"
            f"backend.BACKEND = {backend_name!r}\n"
            "torch.cuda.set_device(0)\n"
            f"dist.init_process_group('nccl', init_method='file://{folder}/store', rank=0,\n"
            "    world_size=1)\n"
            "features = torch.randn(64, 16, device='cuda')\n"
            "target = torch.randint(10, (64,), device='cuda')\n"
            "centers = torch.randn(10, 16, device='cuda')\n"
            "losses = []\n"
            "for make in (SeparateLoss, ShardedSeparateLoss):\n"
            "    criterion = make(10, 16, center_init=centers, device='cuda')\n"
            "    leaf = features.clone().requires_grad_()\n"
            "    loss = sum(criterion(leaf, target) for _ in range(3))\n"
            "    loss.backward()\n"
            "    held = criterion.centers\n"
            "    held = held.full_tensor() if hasattr(held, 'full_tensor') else held\n"
            "    losses.append((loss.detach(), leaf.grad, held.detach()))\n"
            "torch.testing.assert_close(*losses)\n"
            "print('equal', flush=True)\n"
            "os._exit(0)\n"
        )
    assert found.stdout.strip() == "equal", found.stderr
