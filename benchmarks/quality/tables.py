"""The pages of the study, from its figures."""

from benchmarks.quality.study import Study
from typing import Any


def page(studies: list[Study], environments: dict[str, Any]) -> str:
    return "todo"
