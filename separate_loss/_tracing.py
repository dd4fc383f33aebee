"""What depends on how code runs: eagerly, in the compiler, or under a transform of torch.func."""

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn import Parameter

from separate_loss._torch import in_compiled_transform, in_transform, under_vmap


def has_values(tensor: Tensor) -> bool:
    """Whether Python can read the values at once: on the CPU, outside of tracing and vmap."""
    plain = tensor.is_cpu and type(tensor) in (Tensor, Parameter)
    return plain and not torch.compiler.is_compiling() and not under_vmap(tensor)


def closed_form(rules: type[Function]) -> Callable[..., Any]:
    """Makes a function of the derivative rules in a class, with the fastest form that serves.

    The class itself, with `setup_context` and `jvp`, serves torch.func and forward mode. The
    compiler accepts no `jvp`. Eagerly, the classic form without `setup_context` costs half as much
    a call.

    The rules save inputs and outputs alone. Autograd takes any other saved tensor for a constant,
    and second derivatives would be wrong.
    """

    def forward(ctx: Any, *inputs: Any) -> Any:
        output = rules.forward(*inputs)
        rules.setup_context(ctx, inputs, output)
        return output

    def subclass(**members: Any) -> Any:
        return type(rules.__name__, (Function,), {**members, "backward": vars(rules)["backward"]})

    without_jvp = ("forward", "setup_context", "generate_vmap_rule")
    compiled = subclass(**{name: vars(rules)[name] for name in without_jvp})
    classic = subclass(forward=staticmethod(forward))

    @wraps(rules.forward)
    def apply(*inputs: Any) -> Any:
        if torch.compiler.is_compiling():
            # The compiler gives a Function no rule for vmap.
            form = rules.forward if in_compiled_transform() else compiled.apply
            return form(*inputs)
        return (rules if in_transform() else classic).apply(*inputs)

    return apply
