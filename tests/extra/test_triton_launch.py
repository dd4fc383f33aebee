"""The Triton kernels as operators of PyTorch: registration, torch.compile, launches, GPUs."""

import copy
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from separate_loss import SeparateLoss, separate_loss
from separate_loss._triton import step as triton_step
from tests.helpers.triton_steps import random_problem, run_step

pytestmark = [
    pytest.mark.usefixtures("triton_backend"),
    # NumPy, which runs the interpreter's operations, warns where a GPU does not.
    pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning"),
]


def test_operators_pass_opcheck() -> None:
    """Schema, autograd registration, fake tensors, and ahead-of-time dispatch."""
    problem = random_problem(5, 3, 4)
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


@pytest.mark.parametrize("center_update", ["forward", "gradient"])
def test_compiled_steps_have_one_graph_for_all_batch_sizes(center_update: Any) -> None:
    torch._dynamo.reset()
    plain = SeparateLoss(4, 3, center_update=center_update)
    twin = copy.deepcopy(plain)
    counter = torch._dynamo.testing.CompileCounterWithBackend("inductor")
    fast = torch.compile(twin, fullgraph=True, dynamic=True, backend=counter)
    for size in (8, 5, 13):
        problem = random_problem(size, 3, 4)
        results = []
        for criterion, call in ((plain, plain), (twin, fast)):
            leaf, _ = problem.requiring_grad()
            with torch._dynamo.config.patch(error_on_recompile=True):
                loss = call(leaf, problem.target)
            loss.backward()
            results.append((loss, leaf.grad, criterion.centers.grad, criterion.centers.detach()))
        torch.testing.assert_close(*results)
    assert "separate_loss.read" in counter.graphs[-1].code


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
FREE = {"detach", "select", "view", "empty", "new_empty", "empty_like", "promote_types"}
IMPLEMENTATIONS: dict[str, Any] = {
    "read": triton_step._read,
    "features_gradient": triton_step._features_gradient,
    "centers_gradient": triton_step._centers_gradient,
    "move_": triton_step._move_centers,
}


class Launches(TorchDispatchMode):
    """Records Triton kernels and those operators of PyTorch that launch a kernel on a GPU."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = func.overloadpacket.__name__
        if func.namespace == "separate_loss":
            with self:  # operators that the implementation calls
                return IMPLEMENTATIONS[name](*args, **(kwargs or {}))
        if name not in FREE:
            self.names.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("center_update", ["forward", "gradient"])
def test_a_step_has_at_most_6_launches(center_update: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward, backward, and the update or the gradient of the centers."""
    problem = random_problem(16, 64, 7)
    features, _ = problem.requiring_grad()
    criterion = SeparateLoss(7, 64, center_update=center_update)
    criterion(features.detach(), problem.target)  # The first call validates the centers.
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
    assert len(launches.names) <= 6, launches.names


def test_kernels_compile_for_gpus(tmp_path: Path) -> None:
    """Ahead of time, in a process without the interpreter."""
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    program = [sys.executable, "-m", "tests.helpers.compile_kernels"]
    found = subprocess.run(program, env=environment, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
    names = ("features_gradient", "finish", "move", "read")
    assert found.stdout.split("\n")[0] == " ".join(
        str((name, capability)) for name in names for capability in (80, 90)
    )
