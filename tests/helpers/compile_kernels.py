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

from separate_loss._triton import step as triton_step

CASES: list[tuple[list[torch.dtype], tuple[int, int, int], list[int]]] = [
    ([torch.float32, torch.float32, torch.int64], (128, 512, 7), [80, 90]),
    ([torch.bfloat16, torch.float32, torch.int64], (1, 1, 2), [80]),
    ([torch.float16, torch.float64, torch.uint8], (3, 100, 5000), [90]),
]
"""Types of features, centers and target, sizes, and the compute capabilities to compile for."""

Launch = tuple[Any, tuple[Any, ...], dict[str, Any]]


def launches() -> Iterator[tuple[Launch, list[int]]]:
    """Records what each case would launch, with its capabilities; the kernels do not run."""
    recorded: list[tuple[Launch, list[int]]] = []
    capabilities: list[int] = []

    def record(kernel: Any, _: int, *arguments: Any, **constants: Any) -> None:
        recorded.append(((kernel, arguments, constants), capabilities))

    setattr(triton_step, "_launch", record)  # noqa: B010
    for types, (num_samples, d, num_classes), capabilities in CASES:  # noqa: B007
        features = torch.zeros(num_samples, d, dtype=types[0])
        centers = torch.zeros(num_classes, d, dtype=types[1])
        target = torch.zeros(num_samples, dtype=types[2])
        loss, *left = triton_step._read(features, target, centers, -100)
        numbers, rows, samples, classes, total = left
        triton_step._features_gradient(loss, features, target, numbers, rows, samples, -100)
        others = numbers, samples, classes, total, -100
        triton_step._centers_gradient(loss, features, target, centers, *others)
        rate = 0.5 if num_classes == 7 else None
        triton_step._move_centers(centers, features, target, *others, rate, start=num_classes == 7)
    yield from recorded


def compiled(
    kernel: Any, arguments: tuple[Any, ...], constants: dict[str, Any], capability: int
) -> Any:
    options = {name: constants[name] for name in constants if name not in kernel.arg_names}
    values = dict(zip(kernel.arg_names, arguments, strict=False))
    fixed = {name: constants[name] for name in kernel.arg_names if name in constants}
    fixed |= {name: 1 for name, value in values.items() if isinstance(value, int) and value == 1}
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
        if isinstance(values.get(name), Tensor)
        or (isinstance(values.get(name), int) and values[name] % 16 == 0)
    }
    source = ASTSource(kernel, signature, fixed, aligned)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def main() -> None:
    done = set()
    for (kernel, arguments, constants), capabilities in launches():
        for capability in capabilities:
            binary = compiled(kernel, arguments, constants, capability)
            assert len(binary.asm["cubin"]) > 0
            done.add((kernel.__name__, capability))
            print(kernel.__name__, capability, constants["WIDTH"], file=sys.stderr)
    print(*sorted(done))


if __name__ == "__main__":
    main()
