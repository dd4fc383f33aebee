"""Speed and scale, run small as their user would, and the example."""

import json
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats  # type: ignore[import-untyped]

from benchmarks import gpu, harness, speed
from benchmarks.__main__ import main
from benchmarks.losses import LOSSES, PAIRS
from benchmarks.steps import ONCE
from examples import digits
from separate_loss._triton import backend

SHOWN = Path(__file__).parents[3] / "docs" / "benchmarks"


@pytest.fixture(autouse=True)
def keep_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def edit(path: Path, kept: str, lost: str) -> None:
    """Makes one result absurd, and takes another away."""
    found = json.loads(path.read_text())
    found["measured"][kept]["median"] = 123.0
    del found["measured"][lost]
    path.write_text(json.dumps(found))


@pytest.fixture
def one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "ProcessPoolExecutor", lambda *_: ThreadPoolExecutor(1))


@pytest.mark.usefixtures("one_process")
def test_speed_resumes_and_refuses_other_settings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = ("SeparateLoss, simplex form", "center loss", PAIRS, "cross-entropy head")
    monkeypatch.setattr(speed, "LOSSES", {name: LOSSES[name] for name in few})
    monkeypatch.setattr(speed, "SIZES", [(8, 4, 3)])
    monkeypatch.setattr(speed, "BATCH_SIZE", 2)
    monkeypatch.setattr(speed, "IMAGES", 32)
    options = ["speed", "--quick", "--output", str(tmp_path)]
    main(options)
    edit(tmp_path / "speed.json", "(8, 4, 3) center loss", f"(8, 4, 3) {PAIRS}")
    main(options)
    page = (tmp_path / "speed.md").read_text()
    assert f"torch {torch.__version__}" in page
    assert "| center loss | 123 s |" in page
    for name in (few[0], PAIRS, ONCE):
        assert re.search(rf"\| {name} \| [\d.]+ (us|ms) \|", page)
    assert re.search(r"form, for 7 classes, takes [\d.]+ (us|ms), [\d.]+% of it", page)
    monkeypatch.setattr(speed, "SIZES", [(8, 4, 4)])
    with pytest.raises(SystemExit, match=r"holds results for sizes .* --fresh"):
        main(options)


@pytest.mark.usefixtures("one_process")
def test_scale_resumes_and_leaves_out_what_does_not_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(speed, "GROWING", ["SeparateLoss, simplex form"])
    monkeypatch.setattr(speed, "GROWTH", [(8, 4, 10), (8, 4, 30)])
    monkeypatch.setattr(speed, "MOST_PAIRED", 20)
    options = ["scale", "--quick", "--output", str(tmp_path)]
    main(options)
    kept, lost = f"(8, 4, 10) {PAIRS}", "(8, 4, 30) SeparateLoss, simplex form"
    edit(tmp_path / "scale.json", kept, lost)
    main(options)
    assert f"| {PAIRS} | 123 s | - |" in (tmp_path / "scale.md").read_text()
    assert lost in json.loads((tmp_path / "scale.json").read_text())["measured"]
    drawn = (tmp_path / "cost.svg").read_text()
    assert all(name in drawn for name in (PAIRS, ONCE, "SeparateLoss, simplex form"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_gpu_says_that_it_needs_one() -> None:
    with pytest.raises(SystemExit, match="needs a CUDA GPU"):
        main(["gpu"])


def test_gpu_on_a_cpu_measures_everything_and_writes_its_section(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Kernels run in the interpreter."""
    monkeypatch.setattr(backend, "BACKEND", "auto")
    monkeypatch.setattr(gpu, "DEVICE", "cpu")
    monkeypatch.setattr(gpu, "STEPS", 1)
    monkeypatch.setattr(gpu, "IMAGES", ((32, 4),))
    monkeypatch.setattr(gpu, "SIZES", ((8, 4, 3),))
    monkeypatch.setattr(gpu, "OURS", [one for one in gpu.OURS if "compiled" not in one])
    page, output = tmp_path / "cost.md", ["--output", str(tmp_path)]
    page.write_text(f"Before.\n\n{gpu.BEGIN}\nold\n{gpu.END}\n\nAfter.\n")
    monkeypatch.setattr(gpu, "PAGE", page)
    main(["gpu", "--quick", *output])
    assert "Before.\n\n" in page.read_text()
    assert "old" in page.read_text()  # which only a full run on a GPU changes
    found = json.loads((tmp_path / "gpu.json").read_text())
    training, losses = found["measured"].values()
    assert set(training) == set(gpu.TRAININGS)
    assert set(losses) > {*gpu.OURS, *gpu.PEERS}
    for row in losses.values():
        low, median, high = row["host"]
        assert 0 < low <= median <= high
        assert row["steps"] == 2
        assert row["launches"] > 0
    found["environment"]["gpu"], found["settings"]["turns"] = "A card", gpu.TURNS
    (tmp_path / "gpu.json").write_text(json.dumps(found))
    capsys.readouterr()
    main(["gpu", "--redraw", *output])
    section = capsys.readouterr().out.strip()
    assert page.read_text() == f"Before.\n\n{gpu.BEGIN}\n\n{section}\n\n{gpu.END}\n\nAfter.\n"
    assert re.search(
        r"torch .*; A card; \d+-\d+-\d+\.\n\n\| ResNet-18, 4 x 3 x 32 x 32 \|", section
    )
    spread = r"( [\d.]+ [mu]?s \([^|]*\) \|){2} [\d.]+ [mu]?s \| \d+ \|"
    for name in ("center loss by gather", "SeparateLoss, simplex form, kernels"):
        assert re.search(rf"\| {name} \|{spread}", section)


@pytest.mark.parametrize("name", ["speed", "scale"])
def test_pages_in_the_documents_are_redrawn_equally(name: str, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="nothing to redraw"):
        main([name, "--redraw", "--output", str(tmp_path)])
    copy = tmp_path / f"{name}.json"
    copy.write_text((SHOWN / copy.name).read_text())
    main([name, "--redraw", "--output", str(tmp_path)])
    for path in tmp_path.iterdir():
        assert path.read_text() == (SHOWN / path.name).read_text(), path.name


def test_the_section_on_gpus_shows_measured_figures_or_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page, stored = tmp_path / "cost.md", SHOWN / "gpu.json"
    text = (SHOWN.parent / "cost.md").read_text()
    if not stored.exists():
        assert "**Not measured since the rewrite.**" in text.split(gpu.BEGIN)[1].split(gpu.END)[0]
        return
    monkeypatch.setattr(gpu, "PAGE", page)
    for path, copied in ((page, text), (tmp_path / stored.name, stored.read_text())):
        path.write_text(copied)
    main(["gpu", "--redraw", "--output", str(tmp_path)])
    assert page.read_text() == text


def options(path: Path, **changes: bool) -> Any:
    return type("Options", (), {"output": path, "fresh": False, "redraw": False, **changes})


def test_results_survive_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = harness.Results(options(tmp_path), "results", {"seeds": (1, 2)}, "cpu")
    assert first.once("one", lambda: {"value": 1}) == {"value": 1}
    with pytest.raises(ZeroDivisionError):
        first.once("two", lambda: 1 / 0)
    with pytest.raises(ValueError, match="not JSON compliant"):
        first.once("two", lambda: float("nan"))
    second = harness.Results(options(tmp_path), "results", {"seeds": (1, 2)}, "cpu")
    assert second.once("one", lambda: pytest.fail("measured twice")) == {"value": 1}
    assert second.once("two", lambda: (1, 2)) == [1, 2]
    assert [one.name for one in tmp_path.iterdir()] == ["results.json"]
    fresh = harness.Results(options(tmp_path, fresh=True), "results", {"seeds": (3,)}, "cpu")
    assert fresh.measured == {}
    monkeypatch.setattr(harness, "_source_digest", lambda: "other")
    with pytest.raises(SystemExit, match=r"results for separate_loss '.*, sources [0-9a-f]{12}'"):
        harness.Results(options(tmp_path), "results", {"seeds": (1, 2)}, "cpu")


def test_the_interval_is_that_of_the_paired_t_test() -> None:
    first, second = np.random.default_rng(0).normal(size=(2, 7))
    expected = stats.ttest_rel(first, second).confidence_interval(0.95)
    found = harness.paired_interval(first.tolist(), second.tolist())
    np.testing.assert_allclose(found[1:], [expected.low, expected.high])


def test_unknown_commands_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["sped"])
    assert "invalid choice: 'sped'" in capsys.readouterr().err


def test_the_example_prints_a_table_and_draws_a_small_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "pictures" / "digits.png"
    monkeypatch.setattr(digits, "EPOCHS", (0, 1, 3))
    digits.main(["--seeds", "2", "--output", str(path)])
    output = capsys.readouterr().out
    number = r"-?\d+\.\d+ ± \d+\.\d+"
    assert re.search(rf"\| softmax loss \|( {number} \|){{4}} - \|", output)
    assert re.search(rf"\| .* paper's form \|( {number} \|){{5}}", output)
    assert re.search(rf"\| .* simplex form \|( {number} \|){{5}}", output)
    assert path.read_bytes().startswith(b"\x89PNG")
    assert path.stat().st_size < 120_000


def test_in_the_example_centers_follow_class_means_and_push_them_apart() -> None:
    softmax, simplex = ([*digits.train([*digits.ROWS][row], 0, 12)][-1].figures for row in (0, 2))
    assert simplex[0] > 90
    assert simplex[2] < softmax[2] - 0.05
    assert simplex[3] < softmax[3] - 0.2
    assert simplex[4] >= 0.9
