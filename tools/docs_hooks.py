"""Hooks of the documentation site (mkdocs.yml): the README is the front page, and links to the source become URLs.

The Markdown files keep relative links, so they work in the repository as well. A link to a missing file is an error.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
SOURCE = "https://github.com/finetune-operator/finetune-operator/blob/main/"
LINK = re.compile(r"(?<=\]\()([^)\s#:]+)(?=[)#])")
"""The target of a relative Markdown link, without its anchor."""


def on_files(files: Files, config: Any) -> Files:
    """Add the README as the front page."""
    files.append(File.generated(config, "index.md", content=(ROOT / "README.md").read_text(encoding="utf-8")))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Point links that leave docs/ at the repository."""
    folder = "" if page.file.src_uri == "index.md" else posixpath.join("docs", posixpath.dirname(page.file.src_uri))

    def replace(match: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(folder, match[1]))
        if not (ROOT / target).exists():
            raise PluginError(f"{page.file.src_uri}: the link {match[1]} leads to no file")
        if (ROOT / target).is_dir() and target.startswith("docs/"):
            target += "/README.md"
        if not target.startswith("docs/"):
            return SOURCE + target
        start = posixpath.join("docs", posixpath.dirname(page.file.src_uri))
        return posixpath.relpath(target, start)

    return LINK.sub(replace, markdown)
