"""The study in small, and its committed tables."""

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.__main__ import main
from benchmarks.data import KINDS, faces
from benchmarks.quality import command
from benchmarks.quality.data import DATA, Files
from benchmarks.quality.study import Row, Setting, Study, chosen_row, run
from benchmarks.training import FIGURES, METHODS, STARTS, WEIGHTS

SHOWN = Path(__file__).parents[3] / "docs" / "benchmarks" / "quality"


def test_the_committed_tables_are_redrawn_equally(tmp_path: Path) -> None:
    for path in SHOWN.glob("*.json"):
        (tmp_path / path.name).write_text(path.read_text())
    main(["quality", "--redraw", "--output", str(tmp_path)])
    assert (tmp_path / "tables.md").read_text() == (SHOWN / "tables.md").read_text()


def test_a_committed_training_is_repeated() -> None:
    setting = Setting("few", "neck", "paper", 0.9, 0.003, 0, 60, 32)
    stored = json.loads((SHOWN / "few.json").read_text())["measured"][setting.key()]
    assert run(setting, Files()) == pytest.approx(stored, abs=1.0, rel=0.05)


def some_faces(with_test: bool) -> faces.Faces:
    labels = np.arange(90) % 3
    images = np.random.default_rng(0).integers(0, 256, (90, 48, 48), np.uint8)
    split = np.where(np.arange(90) < 63, "train", "validation")
    split[-15:] = np.where(with_test, "test", split[-15:])
    return faces.Faces(images, labels, split, ["angry", "happy", "sad"])


@pytest.mark.parametrize("with_test", [False, True])
def test_no_face_is_in_two_parts(with_test: bool) -> None:
    parts = faces.split_faces(some_faces(with_test), most=30)
    assert [len(part.labels) for part in parts] == ([30, 12, 15] if with_test else [30, 13, 27])
    assert len({image.numpy().tobytes() for part in parts for image in part.images}) == sum(
        len(part.labels) for part in parts
    )


@pytest.mark.parametrize("name", ["digits", "few", "text"])
def test_no_sample_is_reported_and_trained_or_tuned_on(name: str) -> None:
    (training, reported), (tuning_training, tuned) = (
        [{image.numpy().tobytes() for image in split.images} for split in splits]
        for splits in (DATA[name].load(Files(), 0, tuning) for tuning in (False, True))
    )
    assert not reported & (training | tuning_training | tuned)
    assert not tuned & tuning_training


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_and_repeats(method: str, tmp_path: Path) -> None:
    path = tmp_path / "faces.npz"
    np.savez(path, **dict(some_faces(False)._asdict()))
    for kind in KINDS:
        setting = Setting("faces", kind, method, 0.1, 0.01, 0, 1, 100)
        found = dict(zip(FIGURES, run(setting, Files(path)), strict=True))
        missing = {name for name, value in found.items() if value is None}
        has_centers = method not in {"softmax", "triplet", "cosface", "norm"}
        assert missing == (set() if has_centers else {"agreement", "agreement_lowest", "nearest"})
    assert run(setting, Files(path)) == list(found.values())


def imagined(name: str, accuracy: Callable[[Setting], float]) -> Study:
    """A study whose trainings are not run: their accuracies are made up."""
    found: dict[str, list[float | None]] = {}

    def measure(wanted: list[Setting]) -> None:
        for one in wanted:
            found[one.key()] = [accuracy(one), *[0.0] * (0 if one.changes() else 10)]

    study = Study(name, found, measure)
    study.run()
    return study


def test_ranges_are_extended_while_their_best_is_the_first_or_last() -> None:
    def accuracy(setting: Setting) -> float:
        best = {"center": 0.003, "balanced": 1.5, "simplex": 1000.0}.get(setting.method, 0.1)
        away = abs(np.log(max(setting.weight, 1e-9) / best))
        return float(90 - away - 5 * (setting.rate != 0.01))

    study = imagined("few", accuracy)
    assert set(study.rates.values()) == {0.01}
    assert study.weights["signed", "center"] == 0.003
    assert min(study.tried["signed", "center"]) == 0.001
    assert list(study.tried["signed", "balanced"]) == list(STARTS)
    assert study.weights["signed", "simplex"] == WEIGHTS[-1]
    tuned = {one for one in study.found if one.endswith("tuning")}
    reported = {one.seed for one in study.settings("signed", Row("center"))}
    assert not any(f"seed {seed}," in one for seed in reported for one in tuned)
    assert chosen_row([study]).weight == 3.0


def test_an_interrupted_study_resumes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    kept = ("softmax", "center", "paper", "simplex")
    left_out = tuple(set(METHODS) - set(kept))
    for name in set(DATA) - {"digits", "few"}:
        monkeypatch.delitem(DATA, name)
    for name in DATA:
        small: dict[str, Any] = {
            "epochs": 1,
            "kinds": KINDS[:2],
            "rates": (0.01,),
            "left_out": left_out,
        }
        monkeypatch.setitem(DATA, name, DATA[name]._replace(**small))
    monkeypatch.setattr(command, "ProcessPoolExecutor", lambda *_: ThreadPoolExecutor(1))
    done = 0

    def counted(*given: Any, **options: Any) -> list[float | None]:
        nonlocal done
        done += 1
        if done == 10:
            raise KeyboardInterrupt
        return run(*given, **options)

    monkeypatch.setattr(command, "run", counted)
    arguments = ["quality", "--output", str(tmp_path)]
    with pytest.raises(SystemExit, match="the same command resumes"):
        main([*arguments, "--quick"])
    before = json.loads((tmp_path / "digits.json").read_text())["measured"]
    main([*arguments, "--quick"])
    after = json.loads((tmp_path / "digits.json").read_text())["measured"]
    assert 0 < len(before) < len(after)
    assert {key: after[key] for key in before} == before
    capsys.readouterr()

    main([*arguments, "--redraw"])
    text = (tmp_path / "tables.md").read_text()
    assert text in capsys.readouterr().out
    for expected in (
        "## In short",
        "best mean accuracy on the tuning parts",
        "### few, signed",
        "batches of 256",
    ):
        assert expected in text


def test_data_without_files_are_left_out_or_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["quality", "--data", "pretrained", "--output", str(tmp_path)])
    assert "--data pretrained needs --faces" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["quality", "--faces", str(tmp_path / "absent.csv"), "--output", str(tmp_path)])
    assert "absent.csv" in capsys.readouterr().err
    faces_path, weights = tmp_path / "faces.npz", tmp_path / "weights.pth"
    np.savez(faces_path, **dict(some_faces(False)._asdict()))
    weights.write_bytes(b"another model")
    with pytest.raises(SystemExit):
        main(["quality", "--faces", str(faces_path), "--weights", str(weights)])
    assert "whose SHA-256 starts with b0353104, got" in capsys.readouterr().err
