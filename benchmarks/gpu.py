"""`speed` on a CUDA GPU, with PyTorch's operators and with the Triton kernels; options as there."""

import os
import subprocess
import sys

import torch


def main(arguments: list[str] | None = None) -> None:
    """Runs each backend in its own process."""
    if not torch.cuda.is_available():
        raise SystemExit("python -m benchmarks gpu needs a CUDA GPU, and torch finds none")
    for backend in ("torch", "triton"):
        command = [sys.executable, "-m", "benchmarks", "speed", "--device", "cuda"]
        command += ["--output", f"build/benchmarks/gpu/{backend}", *(arguments or [])]
        subprocess.run(command, env={**os.environ, "SEPARATE_LOSS_BACKEND": backend}, check=True)
