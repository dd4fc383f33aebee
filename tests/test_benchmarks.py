"""Speed and scale, run small as their user would: files appear, and a second run goes on."""

import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import pytest
import torch

from benchmarks import contenders, gpu, rate, report, resnet, retrieval, scale
from benchmarks.__main__ import main
from benchmarks.contenders import CONTENDERS, Contender, Problem, Size

EAGER = [one for one in CONTENDERS if not one.compiled]


@pytest.fixture(autouse=True)
def keep_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def read(directory: Path, name: str) -> dict[str, Any]:
    """The JSON file, after a look at the two others."""
    assert ET.parse(directory / f"{name}.svg").getroot().tag.endswith("svg")
    page = (directory / f"{name}.md").read_text()
    assert f"torch {torch.__version__}" in page
    assert page.count("met**") + page.count("not measured") > 0
    found: dict[str, Any] = json.loads((directory / f"{name}.json").read_text())
    assert {"python", "torch", "numpy", "cpu", "threads", "date"} <= set(found["environment"])
    return found


def goes_on(directory: Path, name: str, run: Callable[[], None], kept: str, lost: str) -> None:
    """A second run measures what is lost and leaves what it finds, however absurd."""
    run()
    found = read(directory, name)
    found["measured"][kept]["median"] = 123.0
    del found["measured"][lost]
    (directory / f"{name}.json").write_text(json.dumps(found))
    run()
    again = read(directory, name)["measured"]
    assert again[kept]["median"] == 123.0
    assert again[lost]["median"] > 0
    assert "123 s" in (directory / f"{name}.md").read_text()


def test_speed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resnet, "TURNS", 2)
    options = ["--quick", "--sizes", "8,4,3", "--images", "32", "--threads", "1"]

    def run() -> None:
        main(["speed", *options, "--output", str(tmp_path)])

    goes_on(tmp_path, "speed", run, "(8, 4, 3) center loss", "(8, 4, 3) textbook")
    assert f"[{len(EAGER)}/{len(EAGER)}]" in capsys.readouterr().out
    measured = json.loads((tmp_path / "speed.json").read_text())["measured"]
    page = (tmp_path / "speed.md").read_text()
    for contender in EAGER:
        found = measured[f"(8, 4, 3) {contender.name}"]
        assert found["floor"] > 0
        assert found["runs"] > 0
        assert re.search(rf"\| {re.escape(contender.name)} \| [\d.]+ (us|ms|s) \|", page)
    assert re.search(r"The loss alone takes \d+\.\d+% of the step", page)

    with pytest.raises(SystemExit, match=r"holds figures for images 32, .* --fresh"):
        main(["speed", *options, "--images", "48", "--output", str(tmp_path)])


def test_gpu_script_says_that_it_needs_one(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as stopped:
        main(["gpu"])
    assert stopped.value.code == 2
    assert "need a CUDA GPU, and torch finds none here" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
def test_gpu_script_on_small_sizes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All but the compiler and the count of launches, on the CPU in Triton's interpreter."""
    small, large = Size(6, 4, 3), Size(4, 3, 9)
    monkeypatch.setattr(resnet, "TURNS", 1)
    monkeypatch.setattr(gpu, "SMALL", small)
    monkeypatch.setattr(gpu, "BETWEEN", (Size(5, 3, 4),))
    monkeypatch.setattr(gpu, "LARGE", large)
    monkeypatch.setattr(gpu, "IMAGES", 32)
    monkeypatch.setattr(gpu, "BATCH_SIZE", 2)
    monkeypatch.setattr(gpu, "SECONDS", 0.02)
    monkeypatch.setattr(torch, "compile", lambda module, **_: module)
    main(["gpu", "--device", "cpu", "--threads", "1", "--output", str(tmp_path)])
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert {"torch", "gpu", "date"} <= set(found["environment"])
    assert found["measured"]["triton"] == version("triton")
    page = (tmp_path / "gpu.md").read_text()
    assert f"| {small} paper: launches | at most 6 | 0 | not measured |" in page
    for form in gpu.FORMS:
        assert f"| {large} gradient {form} |" in page


def test_scale(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scale, "CLASSES", 20)
    monkeypatch.setattr(scale, "FORMS", {name: scale.FORMS[name] for name in ("paper", "textbook")})
    # Enough for pairs of 20 classes, not of 30.
    monkeypatch.setattr(contenders, "available", lambda _: 6_000)
    options = ["--quick", "--classes", "10", "30", "--samples", "8", "--threads", "1"]

    def run() -> None:
        main(["scale", *options, "--output", str(tmp_path)])

    goes_on(tmp_path, "scale", run, "(256, 128, 10) textbook", "(8, 128, 20) paper")
    measured = json.loads((tmp_path / "scale.json").read_text())["measured"]
    assert "not attempted" in measured["(256, 128, 30) textbook"]["skipped"]
    assert measured["(256, 128, 10) textbook"]["floor"] > 0
    assert "floor" in (tmp_path / "cost.svg").read_text()
    page = (tmp_path / "scale.md").read_text()
    assert "it fits up to about 24 classes; 30, which" in page
    assert re.search(r"Slope, paper: time -?\d+\.\d\d", page)


@pytest.mark.parametrize("name", ["speed", "scale"])
def test_the_pages_shown_are_those_of_the_figures(name: str, tmp_path: Path) -> None:
    shown = Path(__file__).parent.parent / "docs" / "benchmarks"
    with pytest.raises(SystemExit, match="nothing to redraw"):
        main([name, "--redraw", "--output", str(tmp_path)])
    copy = tmp_path / f"{name}.json"
    copy.write_text((shown / copy.name).read_text())
    main([name, "--redraw", "--output", str(tmp_path)])
    for path in tmp_path.iterdir():
        assert path.read_text() == (shown / path.name).read_text(), path.name

    figures = json.loads(copy.read_text())
    figures["measured"].popitem()
    copy.write_text(json.dumps(figures))
    with pytest.raises(SystemExit, match="has no figures for"):
        main([name, "--redraw", "--output", str(tmp_path)])


@pytest.mark.parametrize("contender", EAGER, ids=lambda one: one.name)
def test_each_step_reaches_the_features_and_its_parameters(contender: Contender) -> None:
    torch.manual_seed(0)
    problem = Problem.draw(Size(24, 5, 4), "cpu")
    step = contender.step(problem)
    grad = problem.features.grad
    assert grad is not None
    assert bool(grad.any())
    # The next step starts from no gradient instead of adding to the last.
    for _ in range(3):
        step()
    assert problem.features.grad is not grad
    assert problem.features.grad is not None
    assert problem.features.grad.norm() < 2 * grad.norm()


def test_steps_without_a_gradient_are_refused() -> None:
    contender = Contender("idle", "rival", lambda *_: lambda: None)
    with pytest.raises(RuntimeError, match="idle: no finite gradient reached the features"):
        contender.step(Problem.draw(Size(8, 5, 4), "cpu"))


def test_the_same_sizes_need_what_they_hold() -> None:
    textbook = next(one for one in CONTENDERS if one.name == "textbook")
    assert textbook.needs(Size(1, 1, 100_000)) == 80_000_000_000
    assert CONTENDERS[0].needs(Size(1, 1, 100_000)) == 0


def test_results_keep_what_was_measured_before_a_failure(tmp_path: Path) -> None:
    path = tmp_path / "new" / "results.json"
    first = report.Results(path, {"seeds": (1, 2)})
    assert first.once("one", lambda: {"value": 1}) == {"value": 1}
    with pytest.raises(ZeroDivisionError):
        first.once("two", lambda: 1 / 0)
    with pytest.raises(ValueError, match="not JSON compliant"):
        first.once("two", lambda: float("nan"))
    second = report.Results(path, {"seeds": (1, 2)})
    assert second.once("one", lambda: pytest.fail("measured twice")) == {"value": 1}
    assert second.once("two", lambda: (1, 2)) == [1, 2]
    assert [one.name for one in path.parent.iterdir()] == ["results.json"]
    assert report.Results(path, {"seeds": (3,)}, fresh=True).measured == {}


def test_results_do_not_mix_with_those_of_other_sources(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "results.json"
    report.Results(path, {}).once("one", lambda: 1)
    monkeypatch.setattr(report, "_digest", lambda: "other")
    with pytest.raises(SystemExit, match=r"figures for separate_loss '.*, sources [0-9a-f]{12}'"):
        report.Results(path, {})


def test_rate(tmp_path: Path) -> None:
    output = tmp_path / "rate.md"
    main(
        [
            "rate",
            "--classes",
            "3",
            "40",
            "--batches",
            "8",
            "--most-steps",
            "5",
            f"--output={output}",
        ]
    )
    rows = output.read_text().splitlines()[2:4]
    assert [row.split(" | ")[:2] for row in rows] == [["| 3", "8"], ["| 40", "8"]]
    assert all(row.count(" after 5") == 2 for row in rows)


def test_rate_tells_when_centers_agree() -> None:
    fast, slow = (rate.follow(20, 32, center_lr, 100) for center_lr in (30.0, 0.01))
    assert int(fast) < 100
    assert slow.endswith(" after 100")


def test_heads(tmp_path: Path) -> None:
    """In a process of its own, as it completes torchvision and brings timm."""
    output = tmp_path / "heads.md"
    command = [sys.executable, "-m", "benchmarks", "heads", f"--output={output}", "--modules"]
    modules = ["vision_transformer", "crossvit"]
    subprocess.run([*command, *modules], check=True, capture_output=True)
    page = output.read_text()
    assert "Of 2: 1 right, 1 refused." in page
    assert "| vision_transformer | test_vit | 0.31 | Linear | right |" in page
    assert "| crossvit | crossvit_tiny_240 | 6.73 | ModuleList | refused: no forward pass" in page


def test_retrieval(tmp_path: Path) -> None:
    output = tmp_path / "retrieval.md"
    main(["retrieval", "--splits=2", "--epochs=1", f"--output={output}"])
    rows = output.read_text().splitlines()[2 : 2 + len(retrieval.METHODS)]
    assert [row.count(" ± ") for row in rows] == [0, *[2] * (len(rows) - 1)]


@pytest.mark.parametrize("seed", range(5))
def test_map_at_r_is_that_of_loops(seed: int) -> None:
    torch.manual_seed(seed)
    features, labels = torch.randn(12, 3), torch.arange(12) % 3
    cosines = torch.nn.functional.normalize(features, dim=-1)
    total = 0.0
    for i in range(12):
        others = sorted(set(range(12)) - {i}, key=lambda j: -float(cosines[i] @ cosines[j]))
        right = [bool(labels[j] == labels[i]) for j in others]
        most = sum(right)
        total += sum(sum(right[: k + 1]) / (k + 1) for k in range(most) if right[k]) / most
    assert retrieval.map_at_r(features, labels) == pytest.approx(total / 12)


def test_table() -> None:
    assert report.table(["", "a"], [["x", 1]]) == "|  | a |\n| --- | ---: |\n| x | 1 |"
    assert report.duration(1.5) == "1.5 s"
    assert report.duration(0.01234) == "12.3 ms"
    assert report.duration(0.000009) == "9 us"


def test_unknown_commands_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["sped"])
    assert "invalid choice: 'sped'" in capsys.readouterr().err
