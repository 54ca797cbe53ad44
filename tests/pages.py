"""The README and the docs, as tests read them."""

import importlib.util
import re
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).parents[1]
STORIES = {"tutorial.md", "howto.md", "custom_losses.md"}  # tests/test_pages.py runs these whole
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md")), ROOT / "ARCHITECTURE.md", ROOT / "CONTRIBUTING.md"]


def blocks(language: str) -> list[tuple[str, str]]:
    """(page and number, text) of every fenced block of a language."""
    fence = re.compile(rf"^```{language}\n(.*?)^```$", re.MULTILINE | re.DOTALL)
    found = [(page.name, fence.findall(page.read_text(encoding="utf-8"))) for page in PAGES if page.name not in STORIES]
    return [(f"{name} {number}", text) for name, texts in found for number, text in enumerate(texts)]


def commands(verb: str) -> list[str]:
    texts = [text.replace("\\\n", " ") for _, text in blocks("sh")]
    lines = [line.partition("   #")[0].strip() for text in texts for line in text.splitlines()]
    return [line for line in lines if line.startswith(f"probe-kd {verb} ")]


def script_of(page: str) -> ModuleType:
    """The script in docs/ that writes a page of the same name."""
    spec = importlib.util.spec_from_file_location(page, ROOT / "docs" / f"{page}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
