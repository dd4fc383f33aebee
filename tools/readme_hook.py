"""Makes README's relative links absolute in the metadata of wheel and sdist; hatchling calls it."""

import re
from pathlib import Path
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface

LINK = re.compile(r"(!?)\[([^\]]*)\]\((?!https?:|#)([^)\s]+)\)")


class ReadmeHook(MetadataHookInterface):
    """Links lead to the release's tag below `Repository` of `[project.urls]`."""

    def update(self, metadata: dict[str, Any]) -> None:
        """Adds the readme to the project's metadata."""
        base, version = metadata["urls"]["Repository"], metadata["version"]

        def absolute(found: re.Match[str]) -> str:
            mark, text, path = found.groups()
            return f"{mark}[{text}]({base}/{'raw' if mark else 'blob'}/v{version}/{path})"

        text = (Path(self.root) / "README.md").read_text(encoding="utf-8")
        text = LINK.sub(absolute, re.sub(r"<!-- .*? -->\n", "", text))
        metadata["readme"] = {"content-type": "text/markdown", "text": text}
