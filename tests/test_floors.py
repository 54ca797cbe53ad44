"""The layout: files import only from those above them in one list, hooks are in one file, and imports are light."""

import ast
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

import probe_kd

PACKAGE = Path(probe_kd.__file__).parent
ROOT = PACKAGE.parent
LISTED = re.findall(r"^\| `([\w/]+)\.py` \|", (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8"), re.MULTILINE)
FILES = sorted(
    str(path.relative_to(PACKAGE).with_suffix("")) for path in PACKAGE.rglob("*.py") if path.stem != "__init__"
)


def imported(tree: ast.AST) -> set[str]:
    """The files of the package that a file imports, inside functions too."""
    names = set[str]()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute, so that this test can read them"
            names |= {str(node.module)} | {f"{node.module}.{alias.name}" for alias in node.names}
    paths = {name.removeprefix("probe_kd.").replace(".", "/") for name in names if name.startswith("probe_kd.")}
    return paths & set(FILES)


def test_the_list_names_every_file_once_and_keeps_folders_together() -> None:
    assert sorted(LISTED) == FILES, "a new file belongs into the list in ARCHITECTURE.md, under all that it imports"
    folders = [Path(file).parts[0] for file in LISTED if "/" in file]
    assert len(set(folders)) == sum(one != other for one, other in zip(["", *folders], folders, strict=False))


@pytest.mark.parametrize("file", FILES)
def test_a_file_imports_only_from_files_above_it_in_the_list(file: str) -> None:
    others = imported(ast.parse((PACKAGE / f"{file}.py").read_text(encoding="utf-8")))
    assert others - set(LISTED[: LISTED.index(file)]) == set()


def test_results_read_what_a_run_wrote_and_nothing_of_how_it_trained() -> None:
    read = set[str]()
    for file in FILES:
        if file.startswith("results/"):
            read |= imported(ast.parse((PACKAGE / f"{file}.py").read_text(encoding="utf-8")))
    reached = {name for name in read if name.startswith("training/")}
    assert reached == {f"training/{name}" for name in ("state", "checkpoints", "devices", "processes")}


def test_no_file_imports_names_from_a_folder() -> None:
    """A folder loads its public names from files: a file that took them from the folder would hide what it imports."""
    folders = {str(path.parent.relative_to(ROOT)).replace("/", ".") for path in PACKAGE.rglob("__init__.py")}
    for file in FILES:
        tree = ast.parse((PACKAGE / f"{file}.py").read_text(encoding="utf-8"))
        nodes = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module in folders]
        names = {f"{node.module}.{alias.name}".replace(".", "/") for node in nodes for alias in node.names}
        assert names <= {f"probe_kd/{other}" for other in FILES}, file


def test_only_the_probe_registers_hooks() -> None:
    registering = {
        path.stem
        for path in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute) and node.attr.startswith("register_") and "hook" in node.attr
    }
    assert registering == {"probe"}


def test_every_public_name_is_listed_once_and_resolves() -> None:
    assert sorted(probe_kd.__all__) == sorted([*probe_kd._HOME, "__version__"])
    assert dir(probe_kd) == sorted(probe_kd.__all__)
    for name, home in probe_kd._HOME.items():
        value = getattr(probe_kd, name)
        assert getattr(value, "__module__", f"probe_kd.{home}") == f"probe_kd.{home}"
    with pytest.raises(AttributeError, match=r"no attribute 'Prob'.*Probe"):
        _ = probe_kd.Prob


@pytest.mark.parametrize("package", ["data", "recipe", "methods.losses"])
def test_a_folder_gives_the_names_that_are_used_outside(package: str) -> None:
    module = importlib.import_module(f"probe_kd.{package}")
    for name, home in module._HOME.items():
        assert getattr(module, name) is getattr(importlib.import_module(f"probe_kd.{package}.{home}"), name)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = module.nothing
    assert probe_kd.losses.fsp is probe_kd.LOSSES["fsp"].function


RUNS = "from probe_kd.training import run; from probe_kd.results import comparison, html"


@pytest.mark.parametrize(
    ("statement", "heavy"),
    [
        ("import probe_kd", {"torch", "timm", "numpy", "accelerate"}),
        ("from probe_kd import Tap, Pair", {"torch", "timm", "numpy", "accelerate"}),
        ("import probe_kd.cli", {"torch", "timm", "numpy", "accelerate"}),
        (RUNS, {"torchmetrics", "transformers", "sklearn", "scipy"}),
    ],
)
def test_imports_are_light(statement: str, heavy: set[str]) -> None:
    """torch and timm take seconds to import, torchmetrics more: a typing error in a recipe is told before them."""
    loaded = f"{statement}; import sys; print(*sorted({heavy} & set(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", loaded], capture_output=True, text=True, check=True)
    assert run.stdout.split() == []
