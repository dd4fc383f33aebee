"""The recipes in docs/recipes, run as they stand."""

import math
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch

RECIPES = Path(__file__).parent.parent / "docs" / "recipes"
PROGRAMS = sorted(path.name for path in RECIPES.glob("*.py") if path.name != "data.py")


@pytest.fixture(autouse=True)
def beside_their_data(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(RECIPES)
    torch._dynamo.reset()


def run(program: str) -> dict[str, Any]:
    return runpy.run_path(str(RECIPES / program), run_name="__main__")


@pytest.mark.parametrize("program", [name for name in PROGRAMS if name != "plain_loop.py"])
def test_training_lowers_the_loss(program: str) -> None:
    losses = run(program)["losses"]
    finite = [loss for loss in losses if math.isfinite(loss)]
    assert len(finite) >= len(losses) - 1
    # Softmax loss to about 0; separate loss to L_intra near 0 and the least L_inter, 0.417.
    assert finite[0] > 2
    assert sum(finite[-5:]) / 5 < 0.9


def test_mixed_precision_leaves_out_the_overflow_alone() -> None:
    end = run("mixed_precision.py")
    assert [step for step, loss in enumerate(end["losses"]) if not math.isfinite(loss)] == [50]
    assert end["centers_finite"]


def test_plain_loop_reaches_what_it_prints(capsys: pytest.CaptureFixture[str]) -> None:
    end = run("plain_loop.py")
    assert end["accuracy"] > 0.95
    assert end["agreement"] > 0.9
    assert end["apart"] < 0
    assert "center agreement" in capsys.readouterr().out
