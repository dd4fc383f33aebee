"""The demo, run as its user would, and the promise of the module's defaults."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import course, demo

ROOT = Path(__file__).parent.parent


def test_demo_prints_a_table_and_draws_a_picture(tmp_path: Path) -> None:
    path = tmp_path / "pictures" / "demo.png"
    arguments = ["--seeds", "2", "--epochs", "2", "--output", str(path)]
    output = subprocess.run(
        [sys.executable, "-m", "benchmarks.demo", *arguments],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
    ).stdout
    assert "epoch 2/2" in output
    number = r"-?\d+\.\d+ ± \d+\.\d+"
    assert re.search(rf"\| softmax loss \|( {number} \|){{4}} - \|", output)
    assert re.search(
        rf"\| softmax \+ 0.9 x separate loss, paper's form \|( {number} \|){{5}}", output
    )
    assert re.search(rf'\| softmax \+ 1 x .* `"square"` \|( {number} \|){{5}}', output)
    assert path.read_bytes().startswith(b"\x89PNG")
    assert str(path) in output


def test_centers_follow_the_class_means_and_push_them_apart() -> None:
    softmax, paper, square = (
        demo.run(method, seed=0, epochs=15).figures for method in demo.METHODS
    )
    for separate in (paper, square):
        assert (separate["agreement"] or 0) >= 0.9
        assert (separate["inter"] or 0) < (softmax["inter"] or 0) - 0.05
        assert (separate["accuracy"] or 0) > 90
    assert (square["closest"] or 0) < (softmax["closest"] or 0) - 0.2


def test_demo_refuses_nonsense(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        demo.main(["--seeds", "0"])
    assert "--seeds and --epochs must be at least 1" in capsys.readouterr().err


def test_the_course_is_the_same_each_time(tmp_path: Path) -> None:
    paths = [tmp_path / "one" / "course.png", tmp_path / "two" / "course.png"]
    for path in paths:
        course.main(["--epochs", "1", "0", "--output", str(path)])
    one, two = (path.read_bytes() for path in paths)
    assert one.startswith(b"\x89PNG")
    assert one == two


def test_three_classes_as_far_apart_as_can_be_lie_in_the_plane_of_the_course() -> None:
    """Rows that sum to zero, 120 degrees apart, turned into more dimensions."""
    flat = torch.tensor([[0, 1], [3**0.5 / 2, -0.5], [-(3**0.5) / 2, -0.5]], dtype=torch.float64)
    turn = torch.linalg.qr(torch.randn(5, 5, dtype=torch.float64)).Q
    means = flat @ turn[:2]
    torch.testing.assert_close(means @ course._plane(means), flat)
