"""The study in small, and its committed tables."""

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest

from benchmarks.__main__ import main
from benchmarks.data import FeatureKind
from benchmarks.quality import command
from benchmarks.quality.data import (
    DATA,
    FIXED,
    LONG,
    ONE,
    PAPER,
    PEERS,
    SOFTMAX,
    THREE,
    TUNED,
    Files,
    Row,
)
from benchmarks.quality.study import Setting, Study, default_weight, run
from benchmarks.training import FIGURES, METHODS, STARTS, WEIGHTS
from tests.extra.benchmarks.test_data import some_intents, some_pictures

SHOWN = Path(__file__).parents[3] / "docs" / "benchmarks" / "quality"
SMALL = ("digits", "sgd")


def test_the_committed_tables_are_redrawn_equally(tmp_path: Path) -> None:
    for path in SHOWN.glob("*.json"):
        (tmp_path / path.name).write_text(path.read_text())
    main(["quality", "--redraw", "--output", str(tmp_path)])
    assert (tmp_path / "tables.md").read_text() == (SHOWN / "tables.md").read_text()


def test_a_committed_training_is_repeated() -> None:
    measured = json.loads((SHOWN / "digits.json").read_text())["measured"]
    (key,) = (key for key in measured if key.startswith("neck: simplex 1, ") and "seed 0" in key)
    rate = float(key.split("rate ")[1].split(",")[0])
    setting = Setting("digits", "neck", "simplex", 1.0, rate, 0, DATA["digits"].epochs)
    assert run(setting, Files()) == pytest.approx(measured[key], abs=1.5, rel=0.05)


@pytest.mark.parametrize("name", DATA)
def test_no_sample_is_reported_and_trained_or_tuned_on(name: str, tmp_path: Path) -> None:
    intents = some_intents(tmp_path / "intents.json", 150 if name == "clinc" else 77)
    files = Files(intents, intents, some_pictures(tmp_path / "pictures.npz"))
    (training, reported), (tuning_training, tuned) = (
        [{image.numpy().tobytes() for image in split.images} for split in splits]
        for splits in (DATA[name].load(files, seed, seed > 99) for seed in (0, 100))
    )
    assert not reported & (training | tuning_training)
    if name != "sgd":  # which draws its samples anew, and tunes nothing
        assert not reported & tuned
    assert not tuned & tuning_training


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_and_repeats(method: str) -> None:
    for kind in get_args(FeatureKind):
        setting = Setting("rare-digits", kind, method, 0.1, 0.01, 0, 1)
        found = dict(zip(FIGURES, run(setting, Files()), strict=True))
        missing = {name for name, value in found.items() if value is None}
        has_centers = method in {"center", "proxy_anchor", "paper", "simplex", "simplex_balanced"}
        assert missing == (set() if has_centers else {"agreement", "agreement_lowest", "nearest"})
    assert run(setting, Files()) == list(found.values())


def imagined(name: str, accuracy: Callable[[Setting], float]) -> Study:
    """A study whose trainings are not run: their accuracies are made up."""
    found: dict[str, list[float | None]] = {}

    def measure(wanted: list[Setting]) -> None:
        for one in wanted:
            found[one.key()] = [accuracy(one), *[0.0] * (0 if one.tuning else 10)]

    study = Study(name, found, measure)
    study.run()
    return study


def test_ranges_are_extended_while_their_best_is_the_first_or_last() -> None:
    def accuracy(setting: Setting) -> float:
        best = {"center": 0.003, "supcon": 0.15, "simplex": 1000.0}.get(setting.method, 0.1)
        away = abs(np.log(max(setting.weight, 1e-9) / best))
        return float(90 - away - 5 * abs(np.log(setting.rate / 0.02)))

    study = imagined("digits", accuracy)
    assert set(study.rates.values()) == {0.02}
    assert study.weights["signed", "center"] == 0.003
    assert min(study.tried["signed", "center"]) == 0.001
    assert set(study.tried["signed", "supcon"]) == {0.03, 0.1, 0.3}
    assert study.weights["signed", "simplex"] == WEIGHTS[-1]
    assert set(study.tried["signed", "simplex"]) > set(STARTS)
    tuned = {one for one in study.found if one.endswith("tuning")}
    reported = {one.seed for one in study.settings("signed", Row("center"))}
    assert not any(f"seed {seed}," in one for seed in reported for one in tuned)


@pytest.mark.parametrize(
    ("at_three", "below_in", "with_sgd", "expected"),
    [(3.0, "", 0.5, 3), (1.0, "", 0.5, 1), (3.0, "rare-banking", 0.5, 1), (3.0, "", -0.5, 1)],
)
def test_the_default_weight_follows_its_rule(
    at_three: float, below_in: str, with_sgd: float, expected: float
) -> None:
    def accuracy(setting: Setting) -> float:
        gain = {1.0: 2.0, 3.0: at_three}.get(setting.weight, 0.0)
        if setting.weight == 3 and setting.data == "sgd":
            gain = with_sgd
        if setting.weight == 3 and setting.data == below_in and not setting.tuning:
            gain = -1 - setting.seed % 2 / 10
        return 90 + gain + setting.seed % 3

    studies = [imagined(name, accuracy) for name in ("banking", "rare-banking", "sgd")]
    weight, text = default_weight(studies)
    assert weight == expected
    assert f"default is {expected}" in text
    assert studies[0].difference("signed", ONE, SOFTMAX) == pytest.approx((2, 2, 2))
    assert {SOFTMAX, ONE, THREE} <= {*DATA["banking"].rows["neck"]}


def test_an_interrupted_study_resumes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in set(DATA) - {*SMALL}:
        monkeypatch.delitem(DATA, name)
    for name in DATA:
        rows: Any = {"signed": (*FIXED, PEERS[0], PAPER, TUNED, *LONG)}
        small = DATA[name]._replace(epochs=1, start=(0.01, 0.02), rows=rows)
        monkeypatch.setitem(DATA, name, small)
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
    for expected in ("## In short", "## Where it harms", "### digits, signed", "## The default"):
        assert expected in text


def test_data_without_files_are_left_out_or_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = ["--output", str(tmp_path)]
    with pytest.raises(SystemExit):
        main(["quality", "--data", "rare-banking", *output])
    assert "--data rare-banking needs --banking77" in capsys.readouterr().err
    for name in Files._fields:
        with pytest.raises(SystemExit):
            main(["quality", f"--{name}", str(tmp_path / "absent"), *output])
        assert f"--{name} {tmp_path / 'absent'}" in capsys.readouterr().err
