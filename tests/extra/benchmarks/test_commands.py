"""Speed and scale, run small as their user would, and the example."""

import json
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from scipy import stats  # type: ignore[import-untyped]

from benchmarks import gpu, harness, scale, speed, steps
from benchmarks.__main__ import main
from benchmarks.losses import LOSSES
from examples import digits
from separate_loss._triton import backend
from separate_loss._triton import step as triton_step

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


def test_speed_resumes_and_refuses_other_settings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = ("SeparateLoss, simplex", "center loss", "textbook", "cross-entropy head")
    monkeypatch.setattr(speed, "LOSSES", {name: LOSSES[name] for name in few})
    monkeypatch.setattr(speed, "REPEATS", 2)
    options = ["--quick", "--sizes", "8,4,3", "--threads", "1", "--output", str(tmp_path)]
    monkeypatch.setattr(speed, "BATCH_SIZE", 2)
    main(["speed", *options, "--images", "32"])
    edit(tmp_path / "speed.json", "(8, 4, 3) center loss", "(8, 4, 3) textbook")
    main(["speed", *options, "--images", "32"])
    page = (tmp_path / "speed.md").read_text()
    assert f"torch {torch.__version__}" in page
    assert "| center loss | 123 s |" in page
    assert re.search(r"\| textbook \| [\d.]+ (us|ms) \|", page)
    assert re.search(r"alone: [\d.]+ (us|ms), [\d.]+% of it", page)
    with pytest.raises(SystemExit, match=r"holds results for images 32, .* --fresh"):
        main(["speed", *options, "--images", "48"])


def test_scale_resumes_and_leaves_out_what_does_not_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scale, "CLASSES", 20)
    few = ("simplex", "textbook")
    monkeypatch.setattr(scale, "FORMS", {name: scale.FORMS[name] for name in few})
    monkeypatch.setattr(scale, "ProcessPoolExecutor", lambda *_: ThreadPoolExecutor(1))
    monkeypatch.setattr(scale, "_draw", lambda *_: Figure())  # drawn in the next test
    # Enough for pairs of 20 classes, not of 30.
    monkeypatch.setattr(steps, "free_memory", lambda: 6_000)
    options = ["--quick", "--classes", "10", "30", "--samples", "8", "--threads", "1"]
    main(["scale", *options, "--output", str(tmp_path)])
    edit(tmp_path / "scale.json", "(256, 128, 10) textbook", "(8, 128, 20) simplex")
    main(["scale", *options, "--output", str(tmp_path)])
    page = (tmp_path / "scale.md").read_text()
    assert "| 123 s |" in page
    assert "| does not fit |" in page


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_gpu_says_that_it_needs_one() -> None:
    with pytest.raises(SystemExit, match="needs a CUDA GPU"):
        main(["gpu"])


def test_gpu_on_a_cpu_measures_what_it_can_and_writes_its_section(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Kernels fail without the interpreter, which leaves the other rows."""
    monkeypatch.setattr(triton_step, "INTERPRETED", False)
    monkeypatch.setattr(gpu, "STEPS", 2)
    monkeypatch.setattr(gpu, "SIZES", ((8, 4, 3),))
    monkeypatch.setattr(gpu, "OURS", [one for one in gpu.OURS if "compiled" not in one])
    page, output = tmp_path / "cost.md", ["--output", str(tmp_path)]
    page.write_text(f"Before.\n\n{gpu.BEGIN}\nold\n{gpu.END}\n\nAfter.\n")
    monkeypatch.setattr(gpu, "PAGE", page)
    main(["gpu", "--device", "cpu", "--quick", "--threads", "1", *output])
    assert "Before.\n\n" in page.read_text()
    assert "old" in page.read_text()  # which only a full run on a GPU changes
    assert backend.BACKEND == "auto"
    found = json.loads((tmp_path / "gpu.json").read_text())
    training, losses = found["measured"].values()
    cannot = {name for name, row in (training | losses).items() if "failed" in row}
    assert cannot == {name for name in gpu.OURS if name.endswith(gpu.KERNELS)}
    for row in (row for row in losses.values() if "failed" not in row):
        low, median, high = row["host"]
        assert 0 < low <= median <= high
        assert row["steps"] == 2 * gpu.STEPS
        assert row["launches"] > 0
    found["environment"]["gpu"], found["settings"]["turns"] = "A card", gpu.TURNS
    (tmp_path / "gpu.json").write_text(json.dumps(found))
    capsys.readouterr()
    main(["gpu", "--redraw", *output])
    section = capsys.readouterr().out.split("\n(8, 4, 3)\n")[1]
    assert page.read_text() == f"Before.\n\n{gpu.BEGIN}\n\n{section}\n{gpu.END}\n\nAfter.\n"
    assert re.search(
        r"torch .*; A card; \d+-\d+-\d+\.\n\n\| ResNet-18, 4 x 3 x 32 x 32 \|", section
    )
    assert re.search(
        r"\| center loss by gather \|( [\d.]+ .s \([^|]*\) \|){2} [\d.]+ .s \| \d+ \|", section
    )
    assert "| SeparateLoss, simplex, kernels | - | - | - | - |" in section


def test_gpu_runs_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the interpreter."""
    monkeypatch.setattr(gpu, "STEPS", 1)
    monkeypatch.setattr(gpu, "OURS", [one for one in gpu.OURS if one.endswith(gpu.KERNELS)])
    found = gpu._measure(partial(gpu._losses, steps.Size(8, 4, 3)), "cpu", 2)
    assert [name for name, row in found.items() if "failed" in row] == []
    assert backend.BACKEND == "auto"


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
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "pictures" / "digits.png"
    digits.main(["--seeds", "2", "--epochs", "3", "--output", str(path)])
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
