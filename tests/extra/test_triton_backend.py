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
from separate_loss._triton import backend
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


def test_auto_takes_the_kernels_for_small_batches_on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    class OnCuda(Tensor):
        """A tensor on the CPU that says it is on CUDA."""

        is_cuda = True

    def takes(num_samples: int, on_cuda: bool = True, **options: Any) -> bool:
        problem = random_problem(num_samples, 3, 5)
        centers = problem.centers.as_subclass(OnCuda) if on_cuda else problem.centers
        found = backend.kernels_for(problem.features, problem.target, centers, Options(**options))
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


def test_auto_warns_once_if_kernels_cannot_be_built(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU and the interpreter take the place of a GPU."""
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
    assert not triton_step.works_on(cpu)  # Cached: warns once only.
    capability[0] = 7
    assert not works()
    triton_step.works_on.cache_clear()


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
