"""Hypothesis profiles: `ci` draws the same cases in each run, `fuzz` draws many new ones."""

import os
import sys

import pytest
import torch
from hypothesis import HealthCheck, settings

from tests.helpers import properties

# Set before Triton is imported: its kernels then run on the CPU.
os.environ.setdefault("TRITON_INTERPRET", "1")

settings.register_profile("ci", max_examples=60, derandomize=True, deadline=None, print_blob=True)
settings.register_profile(
    "fuzz",
    max_examples=1_300,
    deadline=None,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


@pytest.fixture(autouse=True)
def fresh_state() -> None:
    """Seeds random numbers, and forgets what earlier tests compiled."""
    torch.manual_seed(0)
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()


@pytest.fixture
def triton_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs the Triton kernels, in the interpreter, for each step that they support."""
    from separate_loss._triton import backend, step  # noqa: PLC0415 - needs Triton

    assert step.INTERPRETED
    monkeypatch.setattr(backend, "BACKEND", "triton")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if properties.num_cases:  # in this process
        terminalreporter.write_line(f"{properties.num_cases} cases drawn by Hypothesis")
