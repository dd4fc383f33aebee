"""Compiles every kernel of a step for two GPU architectures, on a machine without a GPU.

The compiler gets the same types and constants as in a launch. A test in test_triton_launch.py runs
this program.
"""

import sys
from collections.abc import Iterator
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import mangle_type

from separate_loss._batch import Options
from separate_loss._triton import kernels
from separate_loss._triton import step as triton_step

Case = tuple[list[torch.dtype], tuple[int, int, int], Options]
CASES: list[tuple[Case, list[int]]] = [
    (([torch.float32, torch.float32, torch.int64], (128, 512, 7), Options()), [90]),
    (([torch.bfloat16, torch.float32, torch.int64], (1, 1, 2), Options("paper")), [80]),
    (
        (
            [torch.float16, torch.float64, torch.uint8],
            (3, 24, 5000),
            Options(weight=torch.ones(5000), label_smoothing=0.1),
        ),
        [80],
    ),
]
"""Types of features, centers and target, sizes, options, and compute capabilities."""

KERNELS = "read", "sums", "finish", "move", "gradient"
Launch = tuple[Any, dict[str, Any], dict[str, Any], int]


class Recorder:
    """Takes the place of a kernel and records its launches; the kernel does not run."""

    def __init__(self, kernel: Any, recorded: list[Launch]) -> None:
        self.kernel, self.recorded = kernel, recorded
        self.__name__, self.arg_names = kernel.__name__, kernel.arg_names

    def __getitem__(self, _: tuple[int]) -> Any:
        return self.record

    def record(self, *, num_warps: int, enable_fp_fusion: bool, **arguments: Any) -> None:
        assert enable_fp_fusion
        values = {name: one for name, one in arguments.items() if not name.isupper()}
        constants = {name: one for name, one in arguments.items() if name.isupper()}
        self.recorded.append((self.kernel, values, constants, num_warps))


def launches() -> Iterator[tuple[Launch, list[int]]]:
    """Records what each case would launch, with its capabilities."""
    recorded: list[Launch] = []
    for name in KERNELS:
        setattr(kernels, name, Recorder(getattr(kernels, name), recorded))
    setattr(triton_step, "assert_on_device", lambda *_: None)  # noqa: B010
    for (types, (num_samples, d, num_classes), options), capabilities in CASES:
        features = torch.zeros(num_samples, d, dtype=types[0])
        centers = torch.zeros(num_classes, d, dtype=types[1])
        target = torch.zeros(num_samples, dtype=types[2])
        loss, *_, work = triton_step.read(features, target, centers, options)
        work.features_gradient(loss)
        work.centers_gradient(loss)
        work.update_(centers, 0.5 if num_classes == 7 else None, start_zeros=num_classes == 7)
        yield from ((launch, capabilities) for launch in recorded)
        recorded.clear()


def compiled(
    kernel: Any, values: dict[str, Any], constants: dict[str, Any], warps: int, capability: int
) -> Any:
    """Specialized as by a launch."""
    varying = set(kernel.do_not_specialize)
    whole = {
        name: value
        for name, value in values.items()
        if isinstance(value, int) and name not in varying
    }
    fixed = constants | {name: 1 for name, value in whole.items() if value == 1}
    signature = {
        name: "constexpr"
        if name in fixed
        else "fp64"  # annotated
        if name == "rate"
        else mangle_type(values[name])
        for name in kernel.arg_names
    }
    aligned = {
        (position,): [["tt.divisibility", 16]]
        for position, name in enumerate(kernel.arg_names)
        if (isinstance(values.get(name), Tensor) and name not in varying)
        or whole.get(name, 1) % 16 == 0
    }
    source = ASTSource(kernel, signature, fixed, aligned)
    options = {"num_warps": warps, "enable_fp_fusion": True}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def main() -> None:
    done = set()
    for (kernel, values, constants, warps), capabilities in launches():
        for capability in capabilities:
            binary = compiled(kernel, values, constants, warps, capability)
            assert len(binary.asm["cubin"]) > 0
            done.add((kernel.__name__, capability))
            print(kernel.__name__, capability, constants, file=sys.stderr)
    print(*sorted(done))


if __name__ == "__main__":
    main()
