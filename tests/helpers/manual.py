"""Pages of the manual: their code, their links and what these may lead to."""

import re
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = sorted((ROOT / "docs").glob("*.md"))
REPOSITORY = "https://github.com/recis-lightning/recis_lightning"

_BLOCK = re.compile(r"(?<!<!-- not run -->\n)^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)
_FENCED = re.compile(r"^```.*?^```$|<!--.*?-->", re.DOTALL | re.MULTILINE)
_LINK = re.compile(r"\]\(([^)\s]+)\)")
_NOT_IN_TESTS = re.compile(r"^(?:import|from) (faiss)\b", re.MULTILINE)


def has_code(page):
    """Return whether a page has Python blocks."""
    return _BLOCK.search(page.read_text(encoding="utf-8")) is not None


def run_page(page):
    """Run the Python blocks of a page, which are one program; return its names.

    A block is left out behind the comment ``<!-- not run -->`` (it needs a GPU), or if it imports a
    package that the tests do without, and that is missing.
    """
    text, names = page.read_text(encoding="utf-8"), {"__name__": page.stem}
    for block in _BLOCK.finditer(text):
        optional = _NOT_IN_TESTS.search(block[1])
        if optional is not None and find_spec(optional[1]) is None:
            continue
        line = text.count("\n", 0, block.start(1))
        exec(compile("\n" * line + block[1], str(page), "exec"), names)
    return names


def blocks(page, language):
    """Return the blocks of a page in a language."""
    text = page.read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


def without_code(page):
    """Return the text of a page without its blocks and comments."""
    return _FENCED.sub("", page.read_text(encoding="utf-8"))


def anchors(page):
    """Return the anchors of a page's headings, as MkDocs and GitHub make them."""
    headings = re.findall(r"^#+ (.+)$", without_code(page), re.MULTILINE)
    kept = [re.sub(r"[^\w\s-]", "", heading.replace("`", "")) for heading in headings]
    return {re.sub(r"\s+", "-", heading.strip().lower()) for heading in kept}


def dead_links(page):
    """Return the links of a page that lead nowhere, without asking a network.

    Those to the project's own repository are looked for here.
    """
    dead = []
    for link in _LINK.findall(without_code(page)):
        path, _, anchor = link.partition("#")
        inside = re.fullmatch(rf"{REPOSITORY}/(?:blob|tree)/main/(.+)", path) or re.fullmatch(
            r"https://raw\.githubusercontent\.com/recis-lightning/recis_lightning/main/(.+)", path
        )
        if inside is None and re.match(r"\w+:", path):
            continue
        target = ROOT / inside[1] if inside else (page.parent / path if path else page)
        if not target.exists() or (
            anchor and target.suffix == ".md" and anchor not in anchors(target)
        ):
            dead.append(link)
    return dead


__all__ = ["PAGES", "REPOSITORY", "ROOT", "anchors", "blocks", "dead_links", "has_code", "run_page"]
