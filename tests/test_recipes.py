"""The programs in docs/recipes run unchanged."""

import json
import math
import os
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

RECIPES = Path(__file__).parent.parent / "docs" / "recipes"
# These use libraries that set global state, so that each runs in a process of its own.
OTHER_LIBRARIES = {
    "lightning_module.py", "metric_learning.py", "neck.py", "timm_model.py",
    "transformers_trainer.py",
}  # fmt: skip
PROGRAMS = sorted({path.name for path in RECIPES.glob("*.py")} - {"data.py"} - OTHER_LIBRARIES)


@pytest.fixture(autouse=True)
def recipes_on_path(monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_mixed_precision_skips_only_the_overflow() -> None:
    end = run("mixed_precision.py")
    assert [step for step, loss in enumerate(end["losses"]) if not math.isfinite(loss)] == [50]
    assert end["centers_finite"]


def test_plain_loop_separates_the_classes(capsys: pytest.CaptureFixture[str]) -> None:
    end = run("plain_loop.py")
    assert end["accuracy"] > 0.95
    assert end["agreement"] > 0.9
    assert end["apart"] < 0
    assert "center agreement" in capsys.readouterr().out


def run_in_process(program: str, folder: Path, *names: str) -> dict[str, Any]:
    """Runs a program, which must write no file, and returns variables by name."""
    paths = os.pathsep.join(map(str, (RECIPES.parent.parent, RECIPES)))
    ended = subprocess.run(
        [sys.executable, "-m", "tests.helpers.run_recipe", RECIPES / program, *names],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": paths, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    assert not list(folder.iterdir())
    end: dict[str, Any] = json.loads(ended.stdout.splitlines()[-1])
    return end


def check_learning(losses: list[float]) -> None:
    # Softmax loss of 7 classes, 1.95, and 0.9 x 1 while centers are zero; then as above.
    assert 2 < losses[0] < 4
    assert sum(losses[-5:]) / 5 < 0.9


@pytest.mark.parametrize("program", ["timm_model.py", "neck.py"])
def test_timm_models_train(program: str, tmp_path: Path) -> None:
    check_learning(run_in_process(program, tmp_path, "losses")["losses"])


@pytest.mark.parametrize("program", ["lightning_module.py", "transformers_trainer.py"])
def test_trainers_save_the_centers_and_evaluate_without_an_update(
    program: str, tmp_path: Path
) -> None:
    names = "losses", "unseen_loss", "resumed_alike", "evaluation_moves"
    end = run_in_process(program, tmp_path, *names)
    check_learning(end["losses"])
    assert end["unseen_loss"] < 0.9
    assert end["resumed_alike"]
    assert not end["evaluation_moves"]


def test_centers_classify_with_a_triplet_loss(tmp_path: Path) -> None:
    end = run_in_process("metric_learning.py", tmp_path, "losses", "mined", "accuracy")
    assert end["accuracy"] > 0.95
    assert end["mined"][-1] < end["mined"][0]
    assert sum(end["losses"][-5:]) / 5 < end["losses"][0] / 2
