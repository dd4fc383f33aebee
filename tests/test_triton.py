"""The fused kernels in Triton's interpreter, against the eager form and the oracle."""

import copy
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch._dynamo.testing
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.func import grad, jvp, vmap
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from triton.runtime import interpreter

from separate_loss import SeparateLoss, separate_loss
from separate_loss._batch import Options
from separate_loss._triton import backend, kernels
from separate_loss._triton import step as triton_step
from separate_loss.functional import update_centers
from tests.helpers import reference
from tests.helpers.properties import Problem, assert_equal, problems, property_test

# NumPy, in which the interpreter computes, warns of what floats on a GPU do silently.
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
CENTER_LR = 0.5
PROBLEMS = problems(
    kind="indices", weighted=False, min_samples=0, max_sizes=(12, 9, 20), max_exponent=3
)


class Outcome(NamedTuple):
    loss: Tensor
    intra: Tensor
    inter: Tensor
    of_features: Tensor
    of_centers: Tensor
    centers: Tensor  # after a step

    def rescaled(self, problem: Problem) -> "Outcome":
        """In float64; gradients times norms, new centers over norm or step, whichever is more."""
        features, centers = (
            vectors.double().norm(dim=-1, keepdim=True).nan_to_num(0, 0, 0)
            for vectors in (problem.features, problem.centers)
        )
        size = torch.where(centers > 0, centers.maximum(CENTER_LR / centers), 1)
        factors = 1, 1, 1, features, centers, 1 / size
        return Outcome(*(one.detach() * by for one, by in zip(self, factors, strict=True)))


@pytest.fixture(autouse=True)
def forced(monkeypatch: pytest.MonkeyPatch) -> None:
    assert triton_step.INTERPRETED, "tests/conftest.py asks for the interpreter"
    torch.manual_seed(0)
    monkeypatch.setattr(backend, "BACKEND", "triton")


def step(
    problem: Problem,
    choice: str = "triton",
    *,
    start: bool = False,
    center_lr: float | None = CENTER_LR,
    scale_free: bool = False,
) -> Outcome:
    """Loss, gradients, terms and new centers, by way of the public names."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backend, "BACKEND", choice)
        features, centers = problem.requiring_grad()
        ignoring: Any = {"ignore_index": problem.ignore_index}
        loss = separate_loss(features, problem.target, centers, scale_free=scale_free, **ignoring)
        assert takes_kernels(loss) == (choice == "triton")
        gradients = torch.autograd.grad(loss, (features, centers))
        criterion = SeparateLoss(
            *problem.centers.shape, center_lr=center_lr, dtype=problem.centers.dtype, **ignoring
        )
        with torch.no_grad():  # the first call refuses centers that are not finite
            criterion(features, problem.target)
        criterion.centers.copy_(problem.centers)
        torch.testing.assert_close(
            criterion(features, problem.target), loss, rtol=0, atol=0, equal_nan=True
        )
        assert criterion.last_terms is not None
        intra, inter = criterion.last_terms
        moved = criterion.centers
        if not start:
            moved = update_centers(
                features, problem.target, problem.centers, center_lr=center_lr, **ignoring
            ).detach()
        return Outcome(loss, intra, inter, gradients[0], gradients[1], moved)


def takes_kernels(loss: Tensor) -> bool:
    return "separate_loss_read" in str(loss.grad_fn)


def assert_same(problem: Problem, dtype: torch.dtype, **options: Any) -> Outcome:
    """As the eager form within the rounding of `dtype`, and in the same types."""
    ours, eager = step(problem, **options), step(problem, "torch", **options)
    assert [one.dtype for one in ours] == [one.dtype for one in eager]
    found = ours.rescaled(problem)
    for one, other in zip(found, eager.rescaled(problem), strict=True):
        assert_equal(one, other.numpy(), dtype)
    return found


@settings(max_examples=settings().max_examples // 3)
@property_test(problem=PROBLEMS, dtype=st.sampled_from(DTYPES), few=st.booleans())
def test_equals_the_eager_form_and_the_oracle(
    problem: Problem, dtype: torch.dtype, few: bool
) -> None:
    problem = problem.to(dtype)
    features, probabilities, centers = problem.arrays
    weight = np.ones(len(centers))
    with pytest.MonkeyPatch.context() as patch:
        if few:  # programs, as if there were thousands of classes: each has several centers
            patch.setattr(triton_step, "PROGRAMS", 2)
            patch.setattr(triton_step, "BATCH", 4)
        found = assert_same(problem, dtype)
        assert_same(problem, dtype, start=True)
    intra = reference.intra_loss(features, probabilities, centers, weight, "mean")
    inter = reference.inter_loss(centers)
    of_centers = 2 * reference.inter_direction(centers)
    moved = centers - CENTER_LR * of_centers / 2
    of_features = np.zeros_like(features)
    if probabilities.any():
        of_features = reference.features_gradient(features, probabilities, centers, weight)
        of_centers = reference.centers_gradient(features, probabilities, centers)
        moved = reference.update_centers(features, probabilities, centers, CENTER_LR)
    values = intra + inter, intra, inter, of_features, of_centers, moved
    expected = Outcome(*(torch.as_tensor(np.asarray(value)) for value in values))
    for one, other in zip(found, expected.rescaled(problem), strict=True):
        assert_equal(one, other.numpy(), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_scale_free_gradients_and_a_rate_that_fits_the_batch(dtype: torch.dtype) -> None:
    problem = draw(9, 5, 4).to(dtype)
    problem.target[2] = problem.ignore_index
    for start in (False, True):
        assert_same(problem, dtype, start=start, center_lr=None, scale_free=True)
    none = problem.target * 0 + problem.ignore_index
    assert_same(replace(problem, target=none), dtype, center_lr=None)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_scale_free_gradients_of_ignored_samples_are_zero(value: float) -> None:
    problem = draw(3, 4, 3)
    problem.features[1], problem.target[1] = value, problem.ignore_index
    gradient = step(problem, scale_free=True).of_features
    assert gradient.isfinite().all()
    assert gradient.any(-1).tolist() == [True, False, True]


def draw(num_samples: int, d: int, num_classes: int, dtype: torch.dtype = torch.float32) -> Problem:
    target = torch.randint(num_classes, (num_samples,))
    return Problem(
        torch.randn(num_samples, d, dtype=dtype),
        target,
        torch.randn(num_classes, d, dtype=dtype),
        None,
    )


@pytest.mark.parametrize("size", [(0, 3, 2), (1, 1, 2), (1, 130, 3), (40, 33, 2)])
def test_sizes(size: tuple[int, int, int]) -> None:
    num_samples, d, num_classes = size
    assert_same(draw(num_samples, d, num_classes), torch.float32, start=True)


@pytest.mark.parametrize("integer", [torch.uint8, torch.int16, torch.int32])
@pytest.mark.parametrize("types", [(torch.bfloat16, torch.float32), (torch.float32, torch.float64)])
def test_types_are_promoted_as_in_the_eager_form(
    types: tuple[torch.dtype, torch.dtype], integer: torch.dtype
) -> None:
    problem = draw(6, 5, 3)
    problem = Problem(
        problem.features.to(types[0]),
        problem.target.to(integer),
        problem.centers.to(types[1]),
        None,
    )
    assert_same(problem, types[0])


def test_all_ignored_and_strides() -> None:
    problem = draw(4, 3, 5)
    assert_same(
        Problem(problem.features, problem.target * 0 + 7, problem.centers, None, 7), torch.float32
    )
    features, centers = torch.randn(5, 4).T, torch.randn(5, 6).T
    assert_same(Problem(features, torch.tensor([0, 5, 1, 1]), centers, None), torch.float32)
    sequences = torch.randn(2, 3, 5), torch.randint(4, (2, 3))
    assert_same(Problem(*sequences, torch.randn(4, 5), None), torch.float32)


@pytest.mark.parametrize("norm", [0.0, 1e-25, 1e-18, 1e18, 1e25, torch.inf, torch.nan])
@pytest.mark.parametrize("where", ["features", "centers"])
def test_extreme_vectors(norm: float, where: str) -> None:
    problem = draw(6, 5, 3)
    vectors = getattr(problem, where)
    vectors[0] *= norm / vectors[0].norm()
    assert_same(problem, torch.float32, start=True)


def test_centers_beyond_what_32_bits_can_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last of 2**31 values and more; of the memory only what is touched is ever there."""
    num_classes, d = 2**17 + 1, 2**14
    centers = torch.from_numpy(np.zeros((num_classes, d), np.int16)).view(torch.bfloat16)
    centers[-1, 0] = 4
    classes, samples = torch.zeros(2, num_classes), torch.zeros(2, 1)
    partial, total, numbers = torch.zeros(2 * (d + 1)), torch.zeros(d), torch.ones(5)
    features, target = torch.ones(1, d), torch.tensor([num_classes - 1])
    sizes = 1, num_classes, d, -100
    form = triton_step._rows_config(num_classes, triton_step._config(total, d)) | {"ROWS": 1}
    builder: Any = interpreter.interpreter_builder
    set_index = builder.set_grid_idx

    def run_last(kernel: Any, programs: int, *arguments: Any, **constants: Any) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(builder, "set_grid_dim", lambda *_: None)
            patch.setattr(builder, "grid_dim", (programs, 1, 1), raising=False)
            patch.setattr(builder, "set_grid_idx", lambda *_: set_index(programs - 1, 0, 0))
            kernel[(1,)](*arguments, **constants)

    batch = features, target, centers
    blocks = 2, num_classes - 1
    run_last(kernels.read, 2, *batch, partial, classes, samples, total, *sizes, *blocks, **form)
    assert classes[0, -1] == 0.25
    assert partial[d] == 1
    classes[:, -1] = torch.tensor([0.0, 1.0])
    samples[:] = torch.tensor([[0.5], [1 / 128]])
    left = samples, classes, total, numbers
    run_last(
        kernels.move, num_classes, numbers, *batch, *left, centers, *sizes, 1.0,
        PER_SAMPLE=False, PAPER=True, START=True, LABELS=32, **form,
    )  # fmt: skip
    assert centers[-1, 1:].unique().tolist() == [1 / 128]
    assert not centers[0].any()


def test_samples_that_are_not_finite_move_nothing() -> None:
    problem = draw(6, 4, 3)
    problem.features[2, 1] = torch.inf
    finite = torch.arange(6) != 2
    rest = Problem(problem.features[finite], problem.target[finite], problem.centers, None)
    torch.testing.assert_close(step(problem).centers, step(rest).centers)


def test_labels_out_of_range_are_said_clearly() -> None:
    problem = draw(4, 3, 5)
    for wrong in (-1, 5, 2**40):
        problem.target[1] = wrong
        with pytest.raises(RuntimeError, match=r"target must hold class indices in \[0, 5\)"):
            separate_loss(problem.features, problem.target, problem.centers)


def test_derivatives_of_first_and_second_order() -> None:
    problem = draw(3, 2, 3, torch.float64)
    problem.target[1] = -100
    features, centers = problem.requiring_grad()

    def loss(features: Tensor, centers: Tensor) -> Tensor:
        return separate_loss(features, problem.target, centers)

    for leaves in ((features, centers), (features, problem.centers), (problem.features, centers)):
        assert gradcheck(loss, leaves, check_batched_grad=True)
        assert gradgradcheck(loss, leaves)


def test_batches_of_gradients_by_vmap() -> None:
    problem = draw(4, 3, 5)
    features, centers = problem.requiring_grad()
    loss = separate_loss(features, problem.target, centers)
    assert takes_kernels(loss)

    def gradients(by: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(loss, (features, centers), by, retain_graph=True)

    of_features, of_centers = vmap(gradients)(torch.tensor([1.0, 2.0]))
    for i in range(2):
        torch.testing.assert_close(
            (of_features[i], of_centers[i]), gradients(torch.tensor(i + 1.0))
        )


def test_gradients_of_the_features_are_those_of_centers_before_they_move() -> None:
    criterion = SeparateLoss(4, 3, center_init="sphere", dtype=torch.float64)
    problem = draw(5, 3, 4, torch.float64)
    features, _ = problem.requiring_grad()
    before = criterion.centers.clone()
    loss = criterion(features, problem.target)
    assert not torch.equal(criterion.centers, before)
    (first,) = torch.autograd.grad(loss, features, create_graph=True)
    expected = separate_loss(features, problem.target, before)
    (expected_first,) = torch.autograd.grad(expected, features, create_graph=True)
    torch.testing.assert_close(first, expected_first)
    torch.testing.assert_close(
        torch.autograd.grad(first.square().sum(), features),
        torch.autograd.grad(expected_first.square().sum(), features),
    )


def test_the_eager_form_serves_the_rest() -> None:
    problem = draw(4, 3, 5)
    features, target, centers = problem.features, problem.target, problem.centers
    leaf, _ = problem.requiring_grad()
    calls: list[tuple[Tensor, dict[str, Any]]] = [
        (torch.rand(4, 5), {}),
        (target, {"weight": torch.rand(5)}),
        (target, {"reduction": "sum"}),
        (target, {"reduction": "none"}),
    ]
    for one, options in calls:
        loss = separate_loss(leaf, one, centers, **options)
        assert not takes_kernels(loss)

    def loss_of(features: Tensor) -> Tensor:
        return separate_loss(features, target, centers)

    (expected,) = torch.autograd.grad(loss_of(leaf), leaf)
    torch.testing.assert_close(grad(loss_of)(features), expected)
    slope = jvp(loss_of, (features,), (features,))[1]
    torch.testing.assert_close(slope, torch.zeros(()))
    batch = torch.stack([features, features * 2])
    torch.testing.assert_close(vmap(loss_of)(batch), loss_of(features).expand(2))


def test_operators_pass_opcheck() -> None:
    """Schema, autograd registration, fake tensors and ahead-of-time dispatch, each."""
    problem = draw(5, 3, 4)
    features, centers = problem.requiring_grad()
    torch.library.opcheck(triton_step.read_op, (features, problem.target, centers, -100))
    features, target, centers = problem.features.bfloat16(), problem.target, problem.centers
    loss, numbers, rows, *others = triton_step.read_op(features, target, centers, -100)
    batch = loss, features, target
    torch.library.opcheck(
        triton_step.features_gradient_op, (*batch, numbers, rows, others[0], -100)
    )
    others = numbers, *others, -100
    torch.library.opcheck(triton_step.centers_gradient_op, (*batch, centers, *others))
    torch.library.opcheck(triton_step.move_op, (centers, features, target, *others, 0.5, True))


@pytest.mark.parametrize("center_update", ["paper", "gradient"])
def test_compiles_without_a_break_and_for_all_batch_sizes(
    center_update: Any,
) -> None:
    torch._dynamo.reset()
    plain = SeparateLoss(4, 3, center_update=center_update)
    twin = copy.deepcopy(plain)
    counter = torch._dynamo.testing.CompileCounterWithBackend("inductor")
    fast = torch.compile(twin, fullgraph=True, dynamic=True, backend=counter)
    for size in (8, 5, 13):
        problem = draw(size, 3, 4)
        results = []
        for criterion, call in ((plain, plain), (twin, fast)):
            leaf, _ = problem.requiring_grad()
            with torch._dynamo.config.patch(error_on_recompile=True):
                loss = call(leaf, problem.target)
            loss.backward()
            results.append((loss, leaf.grad, criterion.centers.grad, criterion.centers.detach()))
        torch.testing.assert_close(*results)
    assert "separate_loss.read" in counter.graphs[-1].code


def test_autocast_and_inference_mode() -> None:
    problem = draw(6, 4, 3)
    expected = step(problem)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = step(problem)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)
    with torch.inference_mode():
        loss = separate_loss(problem.features, problem.target, problem.centers)
    assert torch.equal(loss, expected.loss)


def test_deterministic() -> None:
    """Under torch's own flag, and to the last bit."""
    problem = draw(64, 24, 5)
    torch.use_deterministic_algorithms(True)
    try:
        runs = [step(problem) for _ in range(2)]
    finally:
        torch.use_deterministic_algorithms(False)
    for one, other in zip(*runs, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


FREE = {"detach", "select", "view", "empty", "new_empty", "empty_like", "promote_types"}
IMPLEMENTATIONS: dict[str, Any] = {
    "read": triton_step._read,
    "features_gradient": triton_step._features_gradient,
    "centers_gradient": triton_step._centers_gradient,
    "move_": triton_step._move_centers,
}


class Launches(TorchDispatchMode):
    """Counts kernels, and operators of torch that compute or fill: each is a kernel on a GPU."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = func.overloadpacket.__name__
        if func.namespace == "separate_loss":
            with self:  # what the operator itself calls
                return IMPLEMENTATIONS[name](*args, **(kwargs or {}))
        if name not in FREE:
            self.names.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("center_update", "most"), [("paper", 6), ("gradient", 6)])
def test_launches_of_a_step(center_update: Any, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward, backward and the centers' update or gradient at (128, 512, 7)."""
    problem = draw(128, 512, 7)
    features, _ = problem.requiring_grad()
    criterion = SeparateLoss(7, 512, center_update=center_update)
    criterion(features.detach(), problem.target)  # the first call looks at the centers
    launch, launches = triton_step._launch, Launches()

    def counting(kernel: Any, *arguments: Any, **constants: Any) -> None:
        launches.names.append(kernel.__name__)
        with _disable_current_modes():
            launch(kernel, *arguments, **constants)

    monkeypatch.setattr(triton_step, "_launch", counting)
    with launches:
        criterion(features, problem.target).backward()
    assert features.grad is not None
    assert "read" in launches.names
    assert len(launches.names) <= most, launches.names


def test_kernels_compile_for_gpus(tmp_path: Path) -> None:
    """Ahead of time, with the assembler that Triton brings; in a process without interpreter."""
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    program = [sys.executable, "-m", "tests.helpers.compile_kernels"]
    found = subprocess.run(program, env=environment, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
    names = ("features_gradient", "finish", "move", "read")
    assert found.stdout.split("\n")[0] == " ".join(
        str((name, capability)) for name in names for capability in (80, 90)
    )


class TestChoice:
    def test_auto_on_a_cpu_leaves_triton_alone(self) -> None:
        program = (
            "import sys, torch, separate_loss\n"
            "separate_loss.separate_loss(torch.ones(2, 2), torch.arange(2), torch.eye(2))\n"
            "assert 'triton' not in sys.modules"
        )
        subprocess.run([sys.executable, "-c", program], check=True)

    def test_auto_takes_the_kernels_for_small_batches_on_cuda(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        class OnCuda(Tensor):
            """A tensor on the CPU that says it is on CUDA."""

            is_cuda = True

        def takes(num_samples: int, on_cuda: bool = True, **options: Any) -> bool:
            problem = draw(num_samples, 3, 5)
            centers = problem.centers.as_subclass(OnCuda) if on_cuda else problem.centers
            found = backend.kernels_for(
                problem.features, problem.target, centers, Options(**options)
            )
            return found is triton_step

        monkeypatch.setattr(backend, "BACKEND", "auto")
        monkeypatch.setattr(backend, "PLAIN_TYPES", (Tensor, OnCuda))
        monkeypatch.setattr(triton_step, "works_on", lambda _: True)
        assert takes(4)
        assert takes(backend.AUTO_MAX_SAMPLES)
        assert not takes(backend.AUTO_MAX_SAMPLES + 1)
        assert not takes(4, on_cuda=False)
        assert not takes(4, reduction="none")
        assert not takes(4, separation="square")
        assert not takes(4, weight=torch.ones(5))
        with monkeypatch.context() as patch:
            patch.setattr(backend, "is_compiling", lambda: True)
            assert not takes(4)
        with monkeypatch.context() as patch:
            patch.setattr(backend, "PLAIN_TYPES", ())
            assert not takes(4)
        with monkeypatch.context() as patch:
            patch.setattr(triton_step, "works_on", lambda _: False)
            assert not takes(4)

    def test_auto_asks_whether_they_can_be_built(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """The CPU stands for a GPU: the interpreter runs what is launched there."""
        capability = [8, 0]
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: tuple(capability))
        cpu = torch.device("cpu")

        def works() -> bool:
            triton_step.works_on.cache_clear()
            return triton_step.works_on(cpu)

        assert works()
        monkeypatch.setattr(triton_step, "_read", None)
        with pytest.warns(UserWarning, match="runs without its Triton kernels, .* not callable"):
            assert not works()
        assert not triton_step.works_on(cpu)  # asked once, and warned of once
        capability[0] = 7
        assert not works()
        triton_step.works_on.cache_clear()

    def test_forced_says_why_it_cannot_run(self, monkeypatch: pytest.MonkeyPatch) -> None:
        problem = draw(4, 3, 5)

        def fails(features: Tensor, reason: str) -> None:
            with pytest.raises(
                RuntimeError, match=f"SEPARATE_LOSS_BACKEND=triton cannot run: {reason}"
            ):
                separate_loss(features, problem.target, problem.centers)

        fails(problem.features.to(torch.float8_e5m2), "a tensor of torch.float8_e5m2; expected")
        with monkeypatch.context() as patch:
            patch.setattr(triton_step, "INTERPRETED", False)
            fails(problem.features, "tensors on cpu, .* TRITON_INTERPRET=1")
        monkeypatch.setattr(backend, "HAS_TRITON", False)
        fails(problem.features, "no Triton")
        monkeypatch.setattr(backend, "BACKEND", "torch")
        separate_loss(problem.features, problem.target, problem.centers)

    def test_unknown_choice(self) -> None:
        found = subprocess.run(
            [sys.executable, "-c", "import separate_loss"],
            env={**os.environ, "SEPARATE_LOSS_BACKEND": "quick"},
            capture_output=True,
            text=True,
            check=False,
        )
        assert (
            "SEPARATE_LOSS_BACKEND must be one of 'auto', 'torch', 'triton', got 'quick'"
            in found.stderr
        )
