"""The public names and signatures as text; run as a program, it writes the snapshot."""

import importlib
import inspect
import pkgutil
import types
from pathlib import Path
from typing import Any, ForwardRef, Union, Unpack, get_args, get_origin

import separate_loss

SNAPSHOT = Path(__file__).with_suffix(".txt")
COMMAND = "python -m tests.helpers.public_api"


def public_names() -> dict[str, Any]:
    """Public functions and classes by their full name."""
    names = sorted(found.name for found in pkgutil.iter_modules(separate_loss.__path__))
    public = [separate_loss]
    public += [importlib.import_module(f"separate_loss.{name}") for name in names if name[0] != "_"]
    return {
        f"{module.__name__}.{name}": getattr(module, name)
        for module in public
        for name in sorted(getattr(module, "__all__", ()))
        if not inspect.ismodule(getattr(module, name))
    }


def describe() -> str:
    """Each name with its signature, one line for each argument; classes with their methods."""
    return "\n".join(
        line for name, value in public_names().items() for line in _describe(name, value)
    )


def _describe(name: str, value: Any) -> list[str]:
    kind = "class" if inspect.isclass(value) else "def"
    lines = [f"{kind} {name}", *_arguments(value)]
    if inspect.isclass(value):
        for method, function in sorted(vars(value).items()):
            if method[0] != "_" and inspect.isfunction(function):
                lines += [f"def {name}.{method}", *_arguments(function)]
    return lines


def _arguments(function: Any) -> list[str]:
    signature = inspect.signature(function)
    lines = []
    for name, argument in signature.parameters.items():
        if get_origin(argument.annotation) is Unpack:
            (options,) = get_args(argument.annotation)
            for option, annotation in options.__annotations__.items():
                lines.append(f"    {option}: {_type(annotation)} (keyword-only)")
            continue
        line = f"    {name}"
        if argument.annotation is not inspect.Parameter.empty:
            line += f": {_type(argument.annotation)}"
        if argument.default is not inspect.Parameter.empty:
            line += f" = {argument.default!r}"
        lines.append(line + f" ({argument.kind.description})")
    if signature.return_annotation is not inspect.Signature.empty:
        lines.append(f"    -> {_type(signature.return_annotation)}")
    return lines


def _type(annotation: Any) -> str:
    """The name of a type, the same in every version of Python and torch."""
    if isinstance(annotation, str):
        return annotation
    if isinstance(annotation, ForwardRef):
        return annotation.__forward_arg__
    if annotation in (None, types.NoneType):
        return "None"
    if get_origin(annotation) in (Union, types.UnionType):
        return " | ".join(map(_type, get_args(annotation)))
    if inspect.isclass(annotation) and not get_args(annotation):
        return annotation.__qualname__
    return str(annotation).replace("typing.", "").replace("collections.abc.", "")


if __name__ == "__main__":
    SNAPSHOT.write_text(describe() + "\n")
