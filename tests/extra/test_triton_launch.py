"""Launches of the Triton kernels: how many, in which modes, for which GPUs."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from triton.compiler import CompiledKernel

from separate_loss import SeparateLoss, separate_loss
from separate_loss._triton import kernels
from separate_loss._triton import step as triton_step
from tests.helpers.triton_steps import random_problem, run_step

pytestmark = [
    pytest.mark.usefixtures("triton_backend"),
    # NumPy, which runs the interpreter's operations, warns where a GPU does not.
    pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning"),
]


def test_compiled_code_runs_operators(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = random_problem(5, 3, 4)
    expected = separate_loss(problem.features, problem.target, problem.centers)
    monkeypatch.setattr(triton_step.Plan, "launch", None)
    compiled = torch.compile(separate_loss, fullgraph=True, backend="eager")
    found = compiled(problem.features, problem.target, problem.centers)
    torch.testing.assert_close(found, expected)


def test_autocast_and_inference_mode_change_nothing() -> None:
    problem = random_problem(6, 4, 3)
    expected = run_step(problem)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = run_step(problem)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)
    with torch.inference_mode():
        loss = separate_loss(problem.features, problem.target, problem.centers)
    assert torch.equal(loss, expected.loss)


def test_steps_repeat_to_the_last_bit() -> None:
    """Also under torch.use_deterministic_algorithms."""
    problem = random_problem(20, 24, 5)
    torch.use_deterministic_algorithms(True)
    try:
        runs = [run_step(problem) for _ in range(2)]
    finally:
        torch.use_deterministic_algorithms(False)
    for one, other in zip(*runs, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


# Operators without a launch.
FREE = {"detach", "select", "view", "empty", "new_empty", "empty_like", "split", "transpose", "t"}
FREE |= {"slice", "permute", "split_with_sizes"}


class Launches(TorchDispatchMode):
    """Records Triton kernels and those operators of PyTorch that launch a kernel on a GPU."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = func.overloadpacket.__name__
        if name not in FREE:
            self.names.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("center_update", ["forward", "gradient"])
@pytest.mark.parametrize(("form", "most"), [("simplex", 8), ("paper", 6)])
@pytest.mark.parametrize("num_classes", [7, 20])
def test_a_step_has_few_launches(
    num_classes: int, form: Any, most: int, center_update: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Forward, backward, and the update or the gradient of the centers."""
    problem = random_problem(6, 9, num_classes)
    features, _ = problem.requiring_grad()
    options: Any = {"form": form, "center_update": center_update, "label_smoothing": 0.1}
    criterion = SeparateLoss(num_classes, 9, **options)
    criterion(features.detach(), problem.target)  # The first call validates the centers.
    launch, launches, one = triton_step.Plan.launch, Launches(), torch.ones(())

    def counting(plan: Any, kernel: Any, *arguments: Any) -> None:
        launches.names.append(kernel.__name__)
        with _disable_current_modes():
            launch(plan, kernel, *arguments)

    monkeypatch.setattr(triton_step.Plan, "launch", counting)
    with launches:
        criterion(features, problem.target).backward(one)
    assert features.grad is not None
    assert {"read", "sums", "finish", "move", "gradient"} <= set(launches.names)
    assert len(launches.names) <= most, launches.names


class Binary(CompiledKernel):  # type: ignore[misc]
    """Counts its launches."""

    module = None

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    def __getitem__(self, grid: tuple[int, int, int]) -> Any:
        return lambda *arguments: self.calls.append((grid, *arguments))


class Kernel:
    """A kernel that compiles a binary for each launch."""

    __name__ = "kernel"
    arg_names = ("vectors", "size", "n", "TILE")

    def __init__(self) -> None:
        self.binaries: list[Binary] = []

    def __getitem__(self, grid: tuple[int]) -> Any:
        def launch(**arguments: Any) -> Binary:
            assert arguments["TILE"] == triton_step.TILE
            self.binaries.append(Binary())
            return self.binaries[-1]

        return launch


def test_binaries_are_launched_again_for_equal_types_alignments_and_integers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    kernel = Kernel()
    plan = triton_step.Plan(4, 3, torch.float32, "paper", False, 0.0, torch.device("cpu"))
    vectors = torch.zeros(33)

    def launch(programs: int, vectors: Tensor, size: int, n: int) -> None:
        plan.launch(kernel, programs, {"vectors": vectors, "size": size, "n": n, "other": None})

    launch(2, vectors, 5, 7)
    launch(3, vectors, 5, 8)
    launch(3, vectors[16:], 5, 1)
    assert [len(one.calls) for one in kernel.binaries] == [2]
    assert kernel.binaries[0].calls[0][0] == (3, 1, 1)
    assert kernel.binaries[0].calls[0][2:] == (5, 8, triton_step.TILE)
    for other in ((vectors[1:], 5), (vectors.double(), 5), (vectors, 16)):
        launch(2, *other, 7)
    assert [len(one.calls) for one in kernel.binaries] == [2, 0, 0, 0]
    monkeypatch.setattr(triton_step, "direct", False)
    launch(2, vectors, 5, 7)
    assert len(kernel.binaries) == 5


@pytest.mark.parametrize("name", ["read", "sums", "finish", "move", "gradient"])
def test_constants_are_the_last_arguments(name: str) -> None:
    """A binary takes its arguments by position, and the constants after them."""
    capital = [argument.isupper() for argument in getattr(kernels, name).arg_names]
    assert capital == sorted(capital)


def test_kernels_compile_for_gpus(tmp_path: Path) -> None:
    """Ahead of time, in a process without the interpreter."""
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    program = [sys.executable, "-m", "tests.helpers.compile_kernels"]
    found = subprocess.run(program, env=environment, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
    names = ("finish", "gradient", "move", "read", "sums")
    assert found.stdout.split("\n")[0] == " ".join(
        str((name, capability)) for name in names for capability in (80, 90)
    )
