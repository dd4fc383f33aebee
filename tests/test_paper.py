"""The paper's experiment on a few drawn pictures, run as its user would run it."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.expressions import BASIC, COMPOUND, Part
from benchmarks.paper import command as commands
from benchmarks.paper import runs
from benchmarks.paper.runs import Recipe, run
from benchmarks.paper.sets import TrainingSet
from tests.test_expressions import affectnet_csv, fer_csv, raf_db_list

ROOT = Path(__file__).parent.parent


def pictures(count: int, seed: int) -> Part:
    """Noise around a shade for each class, so that there is something to learn."""
    generator = np.random.default_rng(seed)
    labels = np.arange(count) % len(BASIC)
    shades = 30 * labels[:, None, None] + generator.integers(0, 40, (count, 32, 32))
    return Part(list(shades.astype(np.uint8)), torch.from_numpy(labels))


def folders(home: Path, count: int, seed: int) -> Path:
    part = pictures(count, seed)
    for number, (picture, label) in enumerate(zip(part.pictures, part.target, strict=True)):
        assert isinstance(picture, np.ndarray)
        (home / BASIC[int(label)]).mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture).save(home / BASIC[int(label)] / f"{number}.png")
    return home


SMALL = ["--model", "test_resnet", "--weights", "none", "--size", "32", "--workers", "0", "--cpu"]


def command(*arguments: object, launch: tuple[str, ...] = ("-m", "benchmarks")) -> Any:
    words = [sys.executable, *launch, "paper", *map(str, arguments), *SMALL]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        words, capture_output=True, text=True, check=False, cwd=ROOT, env=environment
    )


def test_the_command_writes_a_page_and_goes_on(tmp_path: Path) -> None:
    home, output = tmp_path / "raf", tmp_path / "out"
    folders(home / "train", 35, 0), folders(home / "test", 14, 1)
    folders(tmp_path / "mmi", 7, 2)
    given: tuple[object, ...] = (
        "--raf-db", home, "--mmi", tmp_path / "mmi", "--epochs", 2, "--preset", "paper",
        "recommended", "--output", output,
    )  # fmt: skip
    done = command(*given)
    assert done.returncode == 0, done.stderr
    page = (output / "paper.md").read_text()
    assert page in done.stdout
    for expected in (
        "| softmax loss |",
        "| 85.66 | 1 |",
        "MMI, 7 pictures",
        "| 69.71 |",
        "Confusions",
    ):
        assert expected in page
    measured = json.loads((output / "results.json").read_text())["measured"]
    assert len(measured) == 3
    assert not list((output / "checkpoints").iterdir())
    pictures_ = sorted(path.name for path in output.glob("*.png"))
    assert len(pictures_) == 3
    assert all(f"]({name})" in page for name in pictures_)
    again = command(*given)
    assert "epoch 1/2" not in again.stdout
    assert (output / "paper.md").read_text() == page
    other = command(*given, "--batch-size", 7)
    assert other.returncode != 0
    assert "holds figures for batch_size 100, and this run has 7" in other.stderr


def test_every_set_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """All that can be trained on and tested on, and the sweeps, in this process."""
    monkeypatch.setattr(commands, "SWEPT", {"weights": (0.5,), "features": (16,)})
    homes = {
        "raf-db": raf_db_list(tmp_path / "raf" / "basic").parent,
        "raf-db-compound": raf_db_list(tmp_path / "raf" / "compound", COMPOUND).parent,
        "affectnet": affectnet_csv(tmp_path / "affectnet"),
        "mmi": folders(tmp_path / "mmi", 7, 2),
        "fer-2013": fer_csv(tmp_path / "fer2013.csv"),
    }
    given = [word for name, home in homes.items() for word in (f"--{name}", str(home))]
    folders(tmp_path / "CK+48", 6, 3)  # the first six classes: no neutral
    given += ["--ck-plus", str(tmp_path), "--folder", f"own={tmp_path / 'mmi'}"]
    output = tmp_path / "out"
    given += ["--sweep", "weights", "features", "--epochs", "1", "--neck", "--output", str(output)]
    commands.main([*given, *SMALL])
    page = (output / "paper.md").read_text()
    assert page in capsys.readouterr().out
    for title in ("RAF-DB basic", "RAF-DB compound", "AffectNet"):
        assert f"## {title}" in page
    assert page.count("| FER-2013, 7 pictures |") == 2 * 3  # not beside compound expressions
    assert page.count("CK+, 6 pictures, without neutral") == 2 * 3
    assert page.count(", 16 features |") == 3
    measured = json.loads((output / "results.json").read_text())["measured"]
    assert len(measured) == 3 * 4


def test_two_processes(tmp_path: Path) -> None:
    home, output = tmp_path / "raf", tmp_path / "out"
    folders(home / "train", 28, 0), folders(home / "test", 7, 1)
    # What accelerate launches, too.
    launch = ("-m", "torch.distributed.run", "--nproc_per_node", "2", "-m", "benchmarks")
    done = command("--raf-db", home, "--epochs", 1, "--output", output, launch=launch)
    assert done.returncode == 0, done.stderr[-3000:]
    stored = json.loads((output / "results.json").read_text())
    assert stored["settings"]["processes"] == 2
    assert [sum(map(sum, one["confusion"])) for one in stored["measured"].values()] == [7, 7]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], "nothing to train on: give one of --raf-db, --raf-db-compound, --affectnet"),
        (["--raf-db", "absent"], "absent is not RAF-DB"),
        (["--raf-db", "raf", "--folder", "raf"], "--folder must be NAME=DIR, got 'raf'"),
        (["--raf-db", "raf", "--model", "resnet"], "must be a name of torchvision or timm"),
        (["--raf-db", "raf", "--weights", "absent.pth"], "absent.pth is no state dict"),
    ],
)
def test_nonsense_is_refused(
    given: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folders(tmp_path / "raf" / "train", 7, 0), folders(tmp_path / "raf" / "test", 7, 1)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        commands.main([*given, "--output", str(tmp_path / "out")])
    assert message in capsys.readouterr().err


def test_an_interrupted_training_goes_on_from_its_last_epoch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from accelerate import Accelerator  # noqa: PLC0415

    data = TrainingSet("faces", pictures(35, 0), pictures(14, 1), BASIC, 3, 2)
    recipe = Recipe("test_resnet", "none", "square", 1.0, 0, 3, 2, size=32)
    accelerator = Accelerator(cpu=True, step_scheduler_with_optimizer=False)
    expected, _, _ = run(recipe, data, {}, accelerator, tmp_path / "whole.pt", 0)
    save = runs._State.save

    def interrupted(state: Any, course: Any, epoch: int, accelerator: Any) -> None:
        save(state, course, epoch, accelerator)
        if epoch == 2:
            raise KeyboardInterrupt

    path = tmp_path / "parts.pt"
    with monkeypatch.context() as patch:
        patch.setattr(runs._State, "save", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(recipe, data, {}, accelerator, path, 0)
    assert path.exists()
    with pytest.raises(ValueError, match="pass --fresh to drop it"):
        run(recipe._replace(rate=0.02), data, {}, accelerator, path, 0)
    found, _, _ = run(recipe, data, {}, accelerator, path, 0)
    assert found == expected
