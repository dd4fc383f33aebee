"""The programs in docs/recipes run unchanged."""

import json
import math
import os
import re
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
TEXT_HEADS = Path(__file__).parents[1] / "helpers" / "text_heads.py"
# Programs that run in a process of their own, since their libraries set global state, and the
# variables that the tests read.
OTHER_LIBRARIES = {
    "transformers_text.py": ["losses", "unseen_loss"],
    "transformers_trainer.py": ["losses"],
    "lightning_module.py": ["losses"],
    "timm_model.py": ["losses"],
    "neck.py": ["losses"],
    "metric_learning.py": ["losses", "mined", "accuracy"],
    "distributed.py": ["losses", "centers_equal"],
    "sharded_centers.py": ["kept"],
    "feature_plot.py": [],
    str(TEXT_HEADS): ["found"],
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


def test_programs_are_short_and_linked() -> None:
    """The site shows each program below its title, in columns that a laptop shows."""
    page = (RECIPES.parent / "recipes.md").read_text()
    for path in RECIPES.glob("*.py"):
        lines = path.read_text().splitlines()
        assert len(lines) <= 60, path
        assert max(map(len, lines)) <= 70, path
        assert re.fullmatch(r'"""[^"]+\.(""")?', lines[0]), path
        assert f"(recipes/{path.name})" in page
    for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL):
        assert max(map(len, block.splitlines())) <= 70, block


@pytest.mark.parametrize("program", [name for name in PROGRAMS if name != "plain_loop.py"])
def test_training_lowers_the_loss(program: str) -> None:
    end = run(program)
    losses = end["losses"]
    finite = [loss for loss in losses if math.isfinite(loss)]
    assert len(finite) >= len(losses) - 1
    # To about 0, as softmax loss, L_intra and L_inter.
    assert finite[0] > 2
    assert sum(finite[-5:]) / 5 < 0.2
    # Of segmentation.py and unknown_samples.py; by chance 1/7 and 0.05.
    assert end.get("accuracy", 1) > 0.95
    assert min(end.get("by_center", 1), end.get("by_softmax", 1)) > 0.4


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
    """Runs a program, which must write no file there, and returns variables by name."""
    temporary = folder.with_name(f"{folder.name}-temporary")
    temporary.mkdir()
    paths = os.pathsep.join(map(str, (RECIPES.parent.parent, RECIPES)))
    ended = subprocess.run(
        [sys.executable, "-m", "tests.helpers.run_recipe", RECIPES / program, *names],
        cwd=folder,
        env={
            **os.environ,
            "PYTHONPATH": paths,
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "GLOO_SOCKET_IFNAME": "lo",
            "MPLBACKEND": "agg",
            "TMPDIR": str(temporary),
        },
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
    assert end.get("loaded_alike", True)
    assert end.get("fresh", True)


def test_text_classifier_learns_with_accumulated_gradients(results: Results) -> None:
    end = results["transformers_text.py"].result()
    check_learning(end["losses"])
    assert end["unseen_loss"] < 0.5


def test_processes_keep_the_same_centers(results: Results) -> None:
    end = results["distributed.py"].result()
    check_learning(end["losses"])
    assert end["centers_equal"]


def test_sharded_centers_resume_where_they_stood(results: Results) -> None:
    assert 0.9 < results["sharded_centers.py"].result()["kept"] < 1


def test_projector_files_hold_each_row_and_its_name(results: Results) -> None:
    end = results["feature_plot.py"].result()
    assert end["sizes"] == [[514, 64], 514]
    assert end["names"][-8:-6] == ["mean 6", "center 0"]
    assert end["files"] == ["features.png", "names.tsv", "projector_config.pbtxt", "vectors.tsv"]


def test_heads_of_text_classifiers_are_those_of_the_table(results: Results) -> None:
    """The table of the recipes' page, tried with small models of each kind."""
    page = (RECIPES.parent / "recipes.md").read_text()
    rows = re.findall(r"^\| (.*) \| (`model\.\w.*) \| (.*) \|$", page, re.MULTILINE)
    kinds = {name: row for row in rows for name in row[0].split(", ")}
    heads = results[str(TEXT_HEADS)].result()["found"]
    assert set(heads) == set(kinds)
    for name, found in heads.items():
        _, head, features = kinds[name]
        assert head.split("`")[1].removesuffix("[-1]") == f"model.{found['head']}"
        assert features.split(",")[0] == ("signed" if found["signed"] else "non-negative")
        assert ("features=" in head) == found["needs_features"]


def test_centers_classify_with_a_triplet_loss(results: Results) -> None:
    end = results["metric_learning.py"].result()
    assert end["accuracy"] > 0.95
    assert end["mined"][-1] < end["mined"][0]
    assert sum(end["losses"][-5:]) / 5 < end["losses"][0] / 2
