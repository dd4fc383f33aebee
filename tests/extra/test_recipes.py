"""The programs in docs/recipes run unchanged."""

import json
import math
import os
import runpy
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

RECIPES = Path(__file__).parents[2] / "docs" / "recipes"
# Programs that run in a process of their own, since their libraries set global state, and the
# variables that the tests read.
TRAINER_NAMES = ["losses", "unseen_loss", "resumed_alike", "evaluation_moves"]
OTHER_LIBRARIES = {
    "transformers_trainer.py": TRAINER_NAMES,
    "lightning_module.py": TRAINER_NAMES,
    "timm_model.py": ["losses"],
    "neck.py": ["losses"],
    "metric_learning.py": ["losses", "mined", "accuracy"],
}
PROGRAMS = sorted(
    {path.name for path in RECIPES.glob("*.py")} - {"data.py"} - OTHER_LIBRARIES.keys()
)


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
    # To about 0, as softmax loss, L_intra and L_inter.
    assert finite[0] > 2
    assert sum(finite[-5:]) / 5 < 0.2


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


Results = dict[str, "Future[dict[str, Any]]"]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Results]:
    """Variables of the programs in `OTHER_LIBRARIES`, which run two at a time."""
    with ThreadPoolExecutor(2) as pool:
        yield {
            program: pool.submit(run_in_process, program, tmp_path_factory.mktemp("recipe"), names)
            for program, names in OTHER_LIBRARIES.items()
        }


def run_in_process(program: str, folder: Path, names: list[str]) -> dict[str, Any]:
    """Runs a program, which must write no file, and returns variables by name."""
    paths = os.pathsep.join(map(str, (RECIPES.parent.parent, RECIPES)))
    ended = subprocess.run(
        [sys.executable, "-m", "tests.helpers.run_recipe", RECIPES / program, *names],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": paths, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    assert not list(folder.iterdir())
    end: dict[str, Any] = json.loads(ended.stdout.splitlines()[-1])
    return end


def check_learning(losses: list[float]) -> None:
    # Softmax loss of 7 classes, 1.95, and L_intra of 1/2 while centers are zero. Non-negative
    # features, as of the model of timm, do not reach their centers.
    assert 2 < losses[0] < 4
    assert sum(losses[-5:]) / 5 < 0.6


@pytest.mark.parametrize("program", ["timm_model.py", "neck.py"])
def test_timm_models_train(program: str, results: Results) -> None:
    check_learning(results[program].result()["losses"])


@pytest.mark.parametrize("program", ["lightning_module.py", "transformers_trainer.py"])
def test_trainers_save_the_centers_and_evaluate_without_an_update(
    program: str, results: Results
) -> None:
    end = results[program].result()
    check_learning(end["losses"])
    assert end["unseen_loss"] < 0.2
    assert end["resumed_alike"]
    assert not end["evaluation_moves"]


def test_centers_classify_with_a_triplet_loss(results: Results) -> None:
    end = results["metric_learning.py"].result()
    assert end["accuracy"] > 0.95
    assert end["mined"][-1] < end["mined"][0]
    assert sum(end["losses"][-5:]) / 5 < end["losses"][0] / 2
