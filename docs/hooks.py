"""For mkdocs: pages from outside docs/ (README, ARCHITECTURE, recipes) are part of the site, with their links."""

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
PAGES = {"README.md": "index.md"} | {
    name: name for name in ("ARCHITECTURE.md", "CONTRIBUTING.md", "CHANGELOG.md")
}


def on_files(files: Files, config: Any) -> Files:
    for name, page in PAGES.items():
        text = re.sub(r"\]\(docs/", "](", (ROOT / name).read_text(encoding="utf-8"))
        files.append(File.generated(config, page, content=_as_on_the_site(text)))
    for path in (ROOT / "CITATION.cff", *sorted(ROOT.glob("recipes/*.yaml"))):
        name = path.relative_to(ROOT).as_posix()
        files.append(File.generated(config, name, content=path.read_text("utf-8")))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    return _as_on_the_site(re.sub(r"\]\(\.\./", "](", markdown))


def _as_on_the_site(text: str) -> str:
    text = text.replace("](README.md)", "](index.md)")
    return re.sub(r"\[([^\]]+)\]\(recipes/?\)", r"\1", text)  # a folder has no page
