"""What the documents show runs, and every public name shows how it is used."""

import doctest
import inspect
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.image import imread
from torch import Tensor

import separate_loss
from tests.helpers.public_api import public_names

ROOT = Path(__file__).parent.parent
BLOCK = re.compile(r"^([ \t]*)```(\w*)[^\n]*\n(.*?)^\1```", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"(!?)\[([^\]]*)\]\((?!https?:)([^)#\s]*)(?:#([^)\s]+))?\)")
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


def blocks(document: Path) -> Iterator[tuple[str, str]]:
    """Language and code of each fenced block, the code on the line where it stands."""
    text = document.read_text()
    for found in BLOCK.finditer(text):
        line = text[: found.start(3)].count("\n")
        yield found[2], "\n" * line + textwrap.dedent(found[3])


def programs(document: Path) -> list[str]:
    return [code for language, code in blocks(document) if language == "python"]


@pytest.mark.parametrize(
    "document",
    [pytest.param(path, id=str(path.relative_to(ROOT))) for path in DOCUMENTS if programs(path)],
)
def test_code_runs(document: Path) -> None:
    """The blocks of a document, one after the other, as a reader would run them."""
    namespace: dict[str, object] = {}
    for code in programs(document):
        exec(compile(code, document, "exec"), namespace)


def test_no_python_hides_under_another_name() -> None:
    """In a block without a language there are commands, or what they print."""
    languages = {language for path in DOCUMENTS for language, _ in blocks(path)}
    assert languages <= {"", "python"}
    assert {path.name for path in DOCUMENTS if programs(path)} >= {"README.md", "maths.md"}


def links(document: Path) -> Iterator[tuple[bool, str, Path, str | None]]:
    """Whether it is a picture, text, target and anchor of each link, outside of code."""
    text = re.sub(r"`[^`\n]+`", "code", BLOCK.sub("", document.read_text()))
    for picture, label, path, anchor in LINK.findall(text):
        yield bool(picture), label, (document.parent / path if path else document), anchor or None


def headings(document: Path) -> set[str]:
    """Anchors of a page, as they are made where it is shown."""
    found = re.findall(r"^#+ (.*)$", BLOCK.sub("", document.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in found}


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"])
def test_links_of_what_the_site_does_not_check(name: str) -> None:
    """`make docs` fails at a broken link of the pages in docs/."""
    for _, _, target, anchor in links(ROOT / name):
        assert target.exists(), target
        assert anchor is None or anchor in headings(target), f"{target}#{anchor}"


def pictures() -> Iterator[tuple[Path, str]]:
    for document in DOCUMENTS:
        yield from ((path.resolve(), text) for shown, text, path, _ in links(document) if shown)


def test_pictures_have_a_text_in_their_place() -> None:
    found = list(pictures())
    assert {"course.png", "cost.svg"} <= {path.name for path, _ in found}
    for path, text in found:
        assert path.exists(), path
        assert len(text.split()) >= 5, f"{path}: {text!r}"


@pytest.mark.parametrize(
    "path", sorted({path for path, _ in pictures()}), ids=lambda path: path.name
)
def test_pictures_stand_on_white(path: Path) -> None:
    """Black on transparent would be lost in a dark page."""
    if path.suffix == ".svg":
        background = re.search(r'<g id="patch_1">.*?</g>', path.read_text(), re.DOTALL)
        assert background
        assert "fill: #ffffff" in background[0]
    else:
        corners = imread(path)[[0, 0, -1, -1], [0, -1, 0, -1]]
        assert (corners == 1).all()


def test_every_public_name_has_an_example() -> None:
    without = [
        name
        for name, value in public_names().items()
        if not doctest.DocTestParser().get_examples(inspect.getdoc(value) or "")
    ]
    assert not without


def test_documents_name_the_version() -> None:
    version = separate_loss.__version__
    citation = (ROOT / "CITATION.cff").read_text()
    assert f"\nversion: {version}\n" in citation
    (released,) = re.findall(r"\ndate-released: (.*)\n", citation)
    assert f"\n## [{version}] - {released}\n" in (ROOT / "CHANGELOG.md").read_text()


def test_features_given_by_hand_are_those_of_their_labels() -> None:
    """In each block of the recipes, every row is that of a sample with the label beside it."""
    (setting, *ways) = [
        code for code in programs(ROOT / "docs" / "recipes.md") if "segment" not in code
    ]
    namespace: dict[str, Any] = {}
    exec(setting, namespace)
    criterion, model = namespace["criterion"], namespace["model"]
    inputs, labels = namespace["inputs"], namespace["labels"]
    checked = []

    class Spy:
        def __call__(
            self, logits: Tensor, target: Tensor, features: Tensor | None = None
        ) -> Tensor:
            seen, known = logits, model(inputs)
            if features is not None:
                seen, known = features, model[0](inputs)
            distance, sample = (seen[:, None] - known).norm(dim=-1).min(1)
            assert distance.max() < 1e-5
            counted = target != -100
            assert torch.equal(target[counted], labels[sample][counted])
            checked.append(features is not None)
            loss: Tensor = criterion(logits, target, features=features)
            return loss

        def eval(self) -> "Spy":
            criterion.eval()
            return self

        def __getattr__(self, name: str) -> Any:
            return getattr(criterion, name)

    namespace["criterion"] = Spy()
    for code in ways:
        exec(code, namespace)
    assert len(checked) == 8
    assert sum(checked) == 5
