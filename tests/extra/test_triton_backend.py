"""SEPARATE_LOSS_BACKEND: when the Triton kernels run, and the errors if they cannot."""

import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from separate_loss import separate_loss
from separate_loss._batch import Options
from separate_loss._step import run_step
from separate_loss._triton import backend, kernels
from separate_loss._triton import step as triton_step
from tests.helpers.triton_steps import random_problem

pytestmark = [
    pytest.mark.usefixtures("triton_backend"),
    # NumPy, which runs the interpreter's operations, warns where a GPU does not.
    pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning"),
]


def test_auto_does_not_import_triton_on_a_cpu() -> None:
    program = (
        "import sys, torch, separate_loss\n"
        "separate_loss.separate_loss(torch.ones(2, 2), torch.arange(2), torch.eye(2))\n"
        "assert 'triton' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_auto_takes_the_kernels_on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    class OnCuda(Tensor):
        """A tensor on the CPU that says it is on CUDA."""

        is_cuda = True

    def takes(num_samples: int = 4, on_cuda: bool = True, **options: Any) -> bool:
        problem = random_problem(num_samples, 1, 5)
        centers = problem.centers.as_subclass(OnCuda) if on_cuda else problem.centers
        arguments = problem.features, problem.target, centers, Options(**options)
        return backend.kernels_for(*arguments, run_step) is triton_step

    monkeypatch.setattr(backend, "BACKEND", "auto")
    monkeypatch.setattr(backend, "PLAIN_TYPES", (Tensor, OnCuda))
    monkeypatch.setattr(backend, "works_on", lambda *_: True)
    assert takes()
    assert takes(form="paper", label_smoothing=0.1, weight=torch.ones(5))
    assert takes(backend.MAX_SAMPLES)
    assert not takes(backend.MAX_SAMPLES + 1)
    assert not takes(on_cuda=False)
    assert not takes(reduction="none")
    assert not takes(weight=torch.ones(5, requires_grad=True))
    assert not takes(weight=torch.ones(5).to(torch.float8_e5m2))
    with monkeypatch.context() as patch:
        patch.setattr(backend, "in_eager", lambda: False)
        assert not takes()
    with monkeypatch.context() as patch:
        patch.setattr(backend, "PLAIN_TYPES", ())
        assert not takes()
    with monkeypatch.context() as patch:
        patch.setattr(backend, "works_on", lambda *_: False)
        assert not takes()


@pytest.fixture
def capability(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The CPU and the interpreter take the place of a GPU."""
    capability = [8, 0]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: tuple(capability))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(backend, "works", {})
    monkeypatch.setattr(triton_step, "direct", True)
    return capability


CPU = torch.device("cpu")


def test_a_trial_passes_on_a_device_that_runs_the_kernels(capability: list[int]) -> None:
    with torch.inference_mode():
        assert backend.works_on(CPU, run_step)
    assert triton_step.direct
    capability[0] = 7
    assert backend.works_on(CPU, run_step)  # Known.
    backend.works.clear()
    assert not backend.works_on(CPU, run_step)


@pytest.mark.usefixtures("capability")
def test_no_trial_while_a_cuda_graph_is_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert not backend.works_on(CPU, run_step)
    assert not backend.works


@pytest.mark.usefixtures("capability")
@pytest.mark.parametrize(
    ("kernel", "wrong"),
    [
        ("read", "cosines"),
        ("sums", "slots"),
        ("finish", "loss"),
        ("move", "out"),
        ("gradient", "out"),
    ],
)
def test_wrong_results_of_a_kernel_turn_all_off(
    kernel: str, wrong: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    launch = triton_step.Plan.launch

    def broken(plan: Any, called: Any, programs: int, given: Any) -> None:
        launch(plan, called, programs, given)
        if called.__name__ == kernel:
            given[wrong].mul_(1.5)

    monkeypatch.setattr(triton_step.Plan, "launch", broken)
    with pytest.warns(UserWarning, match="runs without its Triton kernels, which fail here: "):
        assert not backend.works_on(CPU, run_step)
    assert not backend.works_on(CPU, run_step)  # Warns once only.


@pytest.mark.usefixtures("capability")
def test_errors_of_a_compiler_turn_the_kernels_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "gradient", None)
    with pytest.warns(UserWarning, match=r"without its Triton kernels, .*NoneType"):
        assert not backend.works_on(CPU, run_step)


@pytest.mark.usefixtures("capability")
def test_wrong_direct_launches_leave_the_usual_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    launch = triton_step.Plan.launch

    def broken(plan: Any, called: Any, *arguments: Any) -> None:
        if triton_step.direct and called is kernels.move:
            raise TypeError("function takes exactly 11 arguments (40 given)")
        launch(plan, called, *arguments)

    monkeypatch.setattr(triton_step.Plan, "launch", broken)
    assert backend.works_on(CPU, run_step)
    assert not triton_step.direct


def test_triton_raises_the_reason_if_it_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = random_problem(4, 3, 5)

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


def test_unknown_values_are_refused() -> None:
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
