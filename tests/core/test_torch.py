"""Private names of PyTorch are used in `_torch` only, which works without them."""

import ast
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

import separate_loss
from separate_loss import SoftmaxSeparateLoss, _torch

PACKAGE = Path(separate_loss.__file__).parent


def private_names(path: Path) -> set[str]:
    """Private attributes and imports that the package does not define itself."""
    tree = ast.parse(path.read_text())
    own = {
        name
        for file in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text()))
        for name in (
            getattr(node, "name", None),
            getattr(node, "attr", None) if _is_assigned(node) else None,
            node.id if isinstance(node, ast.Name) and _is_assigned(node) else None,
        )
        if name
    }
    used = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    used |= {
        alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and not (node.module or "").startswith("separate_loss")
        for alias in node.names
    }
    return {name for name in used - own if name.startswith("_") and not name.startswith("__")}


def _is_assigned(node: ast.AST) -> bool:
    return isinstance(getattr(node, "ctx", None), ast.Store)


def test_private_names_of_torch_are_used_in_one_module() -> None:
    found = {
        str(path.relative_to(PACKAGE)): private_names(path)
        for path in PACKAGE.rglob("*.py")
        if path.name != "_torch.py"
    }
    # Hooks of torch.nn.Module, and methods of named tuples.
    allowed = {"_load_from_state_dict", "_modules", "_replace", "_asdict"}
    assert {name: names - allowed for name, names in found.items() if names - allowed} == {}
    assert "_assert_async" not in private_names(PACKAGE / "functional.py")
    assert private_names(PACKAGE / "_torch.py") >= {"_C"}


MISSING: list[tuple[Any, str, Callable[[], Any], Any]] = [
    (forward_ad, "_current_level", _torch.in_forward_mode, True),
    (torch._C, "_are_functorch_transforms_active", _torch.in_transform, True),
    (torch._C, "_functorch", lambda: _torch.under_vmap(torch.zeros(2)), False),
    (
        torch,
        "_assert_async",
        lambda: _torch.assert_on_device(torch.tensor(False), "not seen"),
        None,
    ),
    (torch.compiler, "_is_exporting_flag", _torch.is_exporting, False),
    (
        torch._C._autograd,
        "_get_current_graph_task_keep_graph",
        _torch.backward_keeps_graph,
        True,
    ),
]


@pytest.mark.parametrize(
    ("owner", "name", "use", "expected"), MISSING, ids=[case[1] for case in MISSING]
)
def test_each_function_has_a_fallback(
    owner: Any, name: str, use: Callable[[], Any], expected: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(owner, name, raising=False)
    assert use() == expected


class Stub:
    """A tensor, module or node without private attributes."""


def test_objects_without_private_attributes_have_a_fallback() -> None:
    stub: Any = Stub()
    assert _torch.notes_of(stub) == {}
    assert _torch.sizes_of(stub, 0) == ()
    assert _torch.version_of(stub) is None
    assert _torch.memory_of(stub) is None
    assert _torch.hooks_of(stub) == []
    _torch.show_hooks(stub, True)


@pytest.mark.parametrize(
    "missing",
    # torch itself needs the others.
    [
        entry
        for entry in MISSING
        if entry[0] not in (torch._C, torch.compiler) or "graph" in entry[1]
    ],
    ids=lambda entry: entry[1],
)
def test_training_works_without_private_names(
    missing: tuple[Any, str, Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(missing[0], missing[1], raising=False)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 3))
    criterion = SoftmaxSeparateLoss(model[-1])
    for _ in range(2):
        loss = criterion(model(torch.randn(9, 8)), torch.arange(9) % 3)
        loss.backward()
    assert criterion.separate.centers.norm(dim=-1).gt(0.5).all()


def test_each_function_uses_the_private_name() -> None:
    seen: list[bool] = []
    tensor = torch.zeros(2, requires_grad=True)
    doubled = tensor * 2
    doubled.register_hook(lambda _: seen.append(_torch.backward_keeps_graph()))
    doubled.sum().backward(retain_graph=True)
    doubled.sum().backward()
    assert seen == [True, False]

    assert not _torch.in_forward_mode()
    with forward_ad.dual_level():
        assert _torch.in_forward_mode()
    inside: list[tuple[bool, bool]] = []

    def note(value: Tensor) -> Tensor:
        inside.append((_torch.in_transform(), _torch.under_vmap(value)))
        return value.sum()

    torch.func.vmap(note)(torch.zeros(3, 2))
    torch.func.grad(note)(torch.zeros(2))
    note(torch.zeros(2))
    assert inside == [(True, True), (True, False), (False, False)]

    node: Any = doubled.grad_fn
    _torch.notes_of(node)["key"] = 1
    assert _torch.notes_of(doubled.grad_fn) == {"key": 1}
    assert _torch.sizes_of(doubled.view(1, 2).grad_fn, 0) == (1, 2)
    with torch.no_grad():
        before = _torch.version_of(tensor)
        tensor.add_(1)
    assert before is not None
    assert _torch.version_of(tensor) == before + 1
    assert _torch.memory_of(tensor) is _torch.memory_of(tensor.view(1, 2))
    assert _torch.memory_of(tensor) is not _torch.memory_of(tensor.clone())
    with pytest.raises(RuntimeError, match="seen"):
        _torch.assert_on_device(torch.tensor(False), "seen")
