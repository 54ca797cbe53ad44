"""The house: every file imports only from the floors below its own, hooks live in one room, and the door is light."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import probe_kd

HOUSE = Path(probe_kd.__file__).parent
FLOORS = (
    {"errors", "spec", "checkpoints", "run_folder", "arguments", "patterns", "console"},
    {"probe", "surgery", "losses", "models", "plain", "images", "shards", "batches"},
    {"tracing", "adapters", "matching"},
    {"objectives", "sharing", "datasets", "data", "cache"},
    {"distiller"},
    {"recipe", "tasks"},
    {"planner", "report", "schema", "writing"},
    {"loop", "evaluation", "exporting"},
    {"train", "comparing"},
    {"audit", "page"},
    {"cli"},
)
NEIGHBOURS = {  # from, to
    *((room, "errors") for room in ("spec", "checkpoints", "run_folder", "arguments", "patterns", "console")),
    ("run_folder", "checkpoints"),
    ("models", "plain"),
    ("report", "planner"),
    ("evaluation", "loop"),
    ("shards", "images"),
    ("data", "datasets"),
}
ROOMS = sorted(path.stem for path in HOUSE.glob("*.py") if path.stem != "__init__")


def imported(tree: ast.AST) -> set[str]:
    """The rooms that a file imports, inside functions too."""
    names = set[str]()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute, so that this test can read them"
            names |= {str(node.module)} | {f"{node.module}.{alias.name}" for alias in node.names}
    return {name.split(".")[1] for name in names if name.startswith("probe_kd.")} & set(ROOMS)


def floor(room: str) -> int:
    return next(number for number, rooms in enumerate(FLOORS) if room in rooms)


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_only_from_floors_below_its_own(room: str) -> None:
    assert any(room in rooms for rooms in FLOORS), f"{room}.py stands on no floor: give it one, here and in the docs"
    others = imported(ast.parse((HOUSE / f"{room}.py").read_text(encoding="utf-8")))
    assert [other for other in others if floor(other) >= floor(room) and (room, other) not in NEIGHBOURS] == []


def test_only_the_probe_registers_hooks() -> None:
    registering = {
        path.stem
        for path in HOUSE.glob("*.py")
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


@pytest.mark.parametrize("statement", ["import probe_kd", "from probe_kd import Tap, Pair", "import probe_kd.cli"])
def test_the_door_is_light(statement: str) -> None:
    """torch and timm take seconds to import: a typing error in a recipe is told before them."""
    loaded = f"{statement}; import sys; print(*sorted({{'torch', 'timm', 'numpy', 'accelerate'}} & set(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", loaded], capture_output=True, text=True, check=True)
    assert run.stdout.split() == []
