"""Hooks of the site's generator: formulas, pictures and the recipes' programs."""

import re
from html import unescape
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert

RECIPES = Path(__file__).parent.parent / "docs" / "recipes"
FORMULA = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)
PICTURE = re.compile(r'<img [^>]*?src="([^"]+)"[^>]*>')


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Sets each program that the recipes' page links on the page itself."""
    if page.file.src_uri != "recipes.md":
        return markdown
    programs = list(dict.fromkeys(re.findall(r"\(recipes/(\w+)\.py\)", markdown)))
    markdown = re.sub(r"\(recipes/(\w+)\.py\)", r"(#\1)", markdown)
    parts = [markdown, "## Programs"]
    for name in sorted(programs, key="data".__eq__):
        # The docstring's summary is the title, its rest the text above the code.
        source = (RECIPES / f"{name}.py").read_text()
        docstring, code = source.split('"""', 2)[1:]
        title, *text = docstring.strip().split("\n")
        parts.append(f"### {title.rstrip('.')} {{ #{name} }}")
        parts.append("\n".join(text))
        parts.append(f"`{name}.py`:\n\n```python\n{code.strip()}\n```")
    return "\n\n".join(parts)


def on_page_content(html: str, **_: Any) -> str:
    """Formulas as MathML, which browsers draw without a script; pictures open in full size."""
    return PICTURE.sub(r'<a href="\1">\g<0></a>', FORMULA.sub(_formula, html))


def _formula(found: re.Match[str]) -> str:
    latex = unescape(found[2])
    number = re.search(r"\\tag\{(\w+)\}", latex)
    if number:
        latex = latex.replace(number[0], "")
    latex = re.sub(r"_\{([a-z]{3,})\}", r"_{\\text{\1}}", latex)  # words, not products
    latex = re.sub(r"\\\|(.+?)\\\|", r"\\left\\|\1\\right\\|", latex)
    block = found[1] == "div"
    mathml: str = convert(latex, display="block" if block else "inline")
    if not block:
        return mathml
    label = f"<span>({number[1]})</span>" if number else ""
    return f'<div class="formula" tabindex="0">{mathml}{label}</div>'
