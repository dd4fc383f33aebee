"""Public names, signatures and imports of the package."""

import inspect
import re
import subprocess
import sys
from pathlib import Path

import separate_loss
from separate_loss import functional, metrics, plots

ROOT = Path(__file__).parents[2]


def test_public_names_have_docstrings() -> None:
    assert separate_loss.__all__ == [
        "SeparateLoss",
        "SoftmaxSeparateLoss",
        "SoftmaxSeparateTerms",
        "Terms",
        "functional",
        "metrics",
        "separate_loss",
    ]
    for module in (separate_loss, functional, metrics, plots):
        for name in module.__all__:
            assert inspect.getdoc(getattr(module, name)), name


def test_signatures_follow_torch() -> None:
    """Input first, target second, options by keyword."""
    for function in (functional.separate_loss, functional.intra_class_loss):
        assert str(inspect.signature(function)).startswith(
            "(features: torch.Tensor, target: torch.Tensor, centers: torch.Tensor, *, form:"
        )


def test_import_needs_torch_alone() -> None:
    program = (
        "import sys, torch; before = set(sys.modules); import separate_loss;"
        "print(*sorted({name.split('.')[0] for name in set(sys.modules) - before}))"
    )
    output = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    imported = set(output.stdout.split()) - set(sys.stdlib_module_names)
    assert imported == {"separate_loss"}


def test_imports_go_down_only() -> None:
    order = [
        "_torch",
        "_tracing",
        "_checks",
        "_initial",
        "_watch",
        "_features",
        "_ops",
        "_terms",
        "_centers",
        "_batch",
        "_distributed",
        "_triton",
        "_step",
        "functional",
        "metrics",
        "plots",
        "_modules",
        "_softmax",
        "sharded",
    ]
    found = {path.stem for path in (ROOT / "separate_loss").iterdir() if path.suffix in ("", ".py")}
    assert set(order) == found - {"__init__", "__pycache__", "py"}
    for level, name in enumerate(order):
        path = ROOT / "separate_loss" / name
        files = path.rglob("*.py") if path.is_dir() else [path.with_suffix(".py")]
        for file in files:
            for line in file.read_text().splitlines():
                imported = re.match(r"\s*from separate_loss(?:\.(\w+))? import (\w+)", line)
                if imported:
                    module = imported[1] or imported[2]
                    assert module in order[: level + 1], f"{file}: {line}"
