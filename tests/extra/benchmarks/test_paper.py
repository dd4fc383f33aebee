"""The paper's experiment on a few drawn pictures, run as its user would run it."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from benchmarks.data.expressions import BASIC, COMPOUND, Part
from benchmarks.networks import backbone_classifier, complete_torchvision
from benchmarks.paper import command, runs
from benchmarks.paper.runs import Recipe, TrainingSet, run
from tests.extra.benchmarks.test_expressions import (
    affectnet_csv,
    fer_csv,
    ferplus_csv,
    raf_db_list,
)

complete_torchvision()
timm = pytest.importorskip("timm")
ROOT = Path(__file__).parents[3]
SMALL = ["--model", "test_resnet", "--weights", "none", "--size", "32", "--workers", "0"]


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


def test_all_data_sets_presets_and_weights_at_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    homes = {
        "raf-db": raf_db_list(tmp_path / "raf" / "basic").parent,
        "raf-db-compound": raf_db_list(tmp_path / "raf" / "compound", COMPOUND).parent,
        "affectnet": affectnet_csv(tmp_path / "affectnet"),
        "ferplus": ferplus_csv(tmp_path / "fer2013.csv"),
    }
    given = [word for name, home in homes.items() for word in (f"--{name}", str(home))]
    folders(tmp_path / "CK+48", 6, 3)  # the first six classes: no neutral
    mmi = folders(tmp_path / "mmi", 7, 2)
    tested = {"CK+": tmp_path, "MMI": mmi, "FER-2013": fer_csv(tmp_path / "fer.csv"), "own": mmi}
    given += ["--test", *(f"{name}={home}" for name, home in tested.items()), *SMALL]
    output = tmp_path / "out"
    given += ["--preset", "paper", "simplex", "--output", str(output)]
    given += ["--loss-weights", "0.5", "0.9", "--epochs", "1"]
    command.main(given)
    page = (output / "paper.md").read_text()
    assert page in capsys.readouterr().out
    for title in ("RAF-DB basic", "RAF-DB compound", "AffectNet", "FERPlus"):
        assert f"## {title}" in page
    # Not beside compound expressions.
    assert page.count("| accuracy on FER-2013, 7 pictures, % |") == 3
    assert page.count("| accuracy on CK+, 6 pictures, without neutral, % |") == 3
    assert "| both, the paper | 86.38 |" in page
    assert page.count("| both, the paper |") == 3  # nothing of the paper beside FERPlus
    # Each class has one shade here, in training as in test pictures.
    assert re.findall(r"\), of which (\d+) are also trained on;", page) == ["7", "11", "7", "3"]
    assert not {"+ separate", "+ both"} & {line[:10] for line in page.splitlines()}  # no bullets
    measured = json.loads((output / "results.json").read_text())["measured"]
    assert len(measured) == 4 * 5
    drawn = sorted(path.name for path in output.glob("*.png"))
    assert len(drawn) == 4 * 5
    assert all(f"]({name})" in page for name in drawn)
    assert not list((output / "checkpoints").iterdir())

    command.main(given)
    assert "epoch 1/1" not in capsys.readouterr().out
    assert (output / "paper.md").read_text() == page
    with pytest.raises(SystemExit, match="holds results for batch_size 100, and this run has 7"):
        command.main([*given, "--batch-size", "7"])


def test_two_processes(tmp_path: Path) -> None:
    home, output = tmp_path / "raf", tmp_path / "out"
    folders(home / "train", 28, 0), folders(home / "test", 7, 1)
    # What `accelerate launch --cpu` does, too.
    launch = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "-m", "benchmarks", "paper"]
    words = ["--raf-db", home, "--epochs", 1, "--output", output, *SMALL]
    done = subprocess.run(
        [sys.executable, *launch, *map(str, words)],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    stored = json.loads((output / "results.json").read_text())
    assert stored["settings"]["processes"] == 2
    assert [sum(map(sum, one["confusion"])) for one in stored["measured"].values()] == [7, 7]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], "nothing to train on: give one of --raf-db, --raf-db-compound, --affectnet"),
        (["--raf-db", "absent"], "absent is not RAF-DB"),
        (["--raf-db", "raf", "--test", "raf"], "--test must be NAME=PATH, got 'raf'"),
        (["--raf-db", "raf", "--model", "resnet"], "must be a name of timm, got 'resnet'"),
        (["--raf-db", "raf", "--weights", "absent.pth"], "absent.pth is no state dict"),
        (["--raf-db", "raf"], "cannot be downloaded: pass --weights none to start at random, or"),
    ],
)
def test_wrong_arguments_are_refused(
    given: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def create_model(*_: Any, pretrained: bool, **__: Any) -> nn.Module:
        if pretrained:
            raise OSError("no network")
        return nn.Identity()

    monkeypatch.setattr(timm, "create_model", create_model)
    raf_db_list(tmp_path / "raf")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        command.main([*given, "--output", str(tmp_path / "out")])
    assert message in capsys.readouterr().err


def test_an_interrupted_training_resumes_from_its_last_epoch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from accelerate import Accelerator  # noqa: PLC0415

    data = TrainingSet("faces", pictures(35, 0), pictures(14, 1), BASIC, 3, 2)
    recipe = Recipe("test_resnet", "none", "simplex", 1.0, 0, 3, 2, size=32)
    accelerator = Accelerator(cpu=True, step_scheduler_with_optimizer=False)
    expected = run(recipe, data, {}, accelerator, tmp_path / "whole.pt", 0).record
    save = runs._save

    def interrupted(path: Path, state: Any, course: Any) -> None:
        save(path, state, course)
        if len(course) == 2:
            raise KeyboardInterrupt

    path = tmp_path / "parts.pt"
    with monkeypatch.context() as patch:
        patch.setattr(runs, "_save", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(recipe, data, {}, accelerator, path, 0)
    assert run(recipe, data, {}, accelerator, path, 0).record == expected


def test_checkpoints_of_other_settings_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also those of a first training, which left no results."""

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(runs, "_save", interrupted)
    folders(tmp_path / "raf" / "train", 28, 0), folders(tmp_path / "raf" / "test", 7, 1)
    given = ["--raf-db", str(tmp_path / "raf"), "--output", str(tmp_path / "out"), *SMALL]
    with pytest.raises(KeyboardInterrupt):
        command.main([*given, "--epochs", "2"])
    with pytest.raises(
        SystemExit, match="holds results for epochs 2, and this run has 3: pass --f"
    ):
        command.main([*given, "--epochs", "3"])


def test_weights_of_torchvision_are_loaded(tmp_path: Path) -> None:
    complete_torchvision()
    from torchvision import models  # noqa: PLC0415

    model = models.resnet18()
    torch.save(model.state_dict(), tmp_path / "resnet18.pth")
    model.fc = nn.Identity()
    loaded = backbone_classifier("resnet18.tv_in1k", tmp_path / "resnet18.pth", 7)
    inputs = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(loaded.eval()(inputs)[0], model.eval()(inputs))
    torch.save({"fc.bias": torch.zeros(7)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"other.pth lacks 100 of resnet18.tv_in1k, as conv1.weig"):
        backbone_classifier("resnet18.tv_in1k", tmp_path / "other.pth", 7)
