"""`speed` on a CUDA GPU, with PyTorch's operators and with the Triton kernels; options as there."""

import os
import subprocess
import sys

import torch


def main(arguments: list[str] | None = None) -> None:
    """Runs each backend in its own process, with results in build/benchmarks/gpu."""
    if not torch.cuda.is_available():
        raise SystemExit("python -m benchmarks gpu needs a CUDA GPU, and torch finds none")
    speed = [sys.executable, "-m", "benchmarks", "speed", "--device", "cuda", *(arguments or [])]
    for backend in ("torch", "triton"):
        environment = {**os.environ, "SEPARATE_LOSS_BACKEND": backend}
        output = f"build/benchmarks/gpu/{backend}"
        subprocess.run([*speed, "--output", output], env=environment, check=True)
