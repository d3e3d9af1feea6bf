"""MkDocs hook: links from a page to files of the repository that are not part of the manual.

In the repository such a link is relative, ``../SECURITY.md``. In the built site pictures are copied
to it, and other links go to the repository.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
OUTSIDE = re.compile(r"\]\(\.\./([^)\s]+)\)")
PICTURES = (".png", ".svg")


def on_files(files: Files, config: Any) -> Files:
    """Add the pictures outside docs/ that pages show."""
    for page in files.documentation_pages():
        for path in OUTSIDE.findall(Path(page.abs_src_path).read_text(encoding="utf-8")):
            copied = f"pictures/{Path(path).name}"
            if path.endswith(PICTURES) and files.get_file_from_path(copied) is None:
                files.append(File.generated(config, copied, abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Point links outside docs/ to the copied pictures, and to the repository."""
    if "/" in page.file.src_uri:  # its "../" is still in docs/
        return markdown

    def pointed(match: re.Match[str]) -> str:
        path = match[1]
        if path.endswith(PICTURES):
            return f"](pictures/{Path(path).name})"
        return f"]({config.repo_url}/blob/main/{path})"

    return OUTSIDE.sub(pointed, markdown)
