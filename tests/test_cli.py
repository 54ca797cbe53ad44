"""The command line, as in a shell: what it prints, how it refuses, what it leaves alone."""

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from conftest import ROCKET, TINY

from probe_kd.cli import main

USER_MODEL = """\
from torch import nn

class Two(nn.Module):
    def __init__(self, num_classes=10):
        super().__init__()
        self.one = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(inplace=True))
        self.two = nn.Sequential(nn.Conv2d(8, 16, 3, 2, 1), nn.ReLU(inplace=True))
        self.head = nn.Linear(16, num_classes)

    def forward(self, x):
        return self.head(self.two(self.one(x)).mean((2, 3)))

def build(num_classes=10):
    return Two(num_classes)

def broken():
    raise RuntimeError("no weights for you")
"""


@dataclass
class Outcome:
    returncode: int
    stdout: str
    stderr: str


Command = Callable[..., Outcome]


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """`command("inspect", "resnet18")` as in a shell in `tmp_path`, without the seconds of a new process."""

    def call(*arguments: str) -> Outcome:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["probe-kd", *arguments])
        monkeypatch.setattr(sys, "path", list(sys.path))
        try:
            main()
            code = 0
        except SystemExit as end:
            code = int(end.code or 0)
        return Outcome(code, *capsys.readouterr())

    return call


def test_help_answers_at_once_without_torch() -> None:
    """How long it takes, benchmarks/startup.py measures; here, that nothing slow is imported."""
    code = """
import sys
from probe_kd.cli import main
sys.argv = ["probe-kd", "--help"]
try:
    main()
finally:
    print(sorted({"torch", "timm", "pydantic", "numpy"} & set(sys.modules)))
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip().endswith("[]")
    for name in ("inspect", "match", "train"):
        assert name in result.stdout


def test_inspect_lists_what_can_be_matched(command: Command, tmp_path: Path) -> None:
    text = command("inspect", "convnext_atto", "--input-size", "64x96").stdout
    for part in ("3x64x96", "stages.0", "40x16x24", "stages.3", "320x2x3", "NCHW"):
        assert part in text
    rows = json.loads(command("inspect", "convnext_atto", "--json").stdout)
    ends = [row for row in rows if row["mark"] == "stage"]
    assert [(row["tap"], row["shape"], row["reduction"]) for row in ends] == [
        ("stages.0", [40, 56, 56], 4.0),
        ("stages.1", [80, 28, 28], 8.0),
        ("stages.2", [160, 14, 14], 16.0),
        ("stages.3", [320, 7, 7], 32.0),
    ]


def test_inspect_can_show_every_module_and_why_one_is_silent(command: Command, tmp_path: Path) -> None:
    arguments = ("inspect", "vit_tiny_patch16_224", "--all", "--json", "--model-kwargs", "depth=2")
    rows = {row["tap"]: row for row in json.loads(command(*arguments).stdout)}
    assert rows["blocks.1"]["shape"] == [197, 192]
    assert "fused" in rows["blocks.0.attn.attn_drop"]["note"]
    assert "blocks.2" not in rows
    text = command("inspect", "vit_tiny_patch16_224", "--glob", "blocks.?.mlp").stdout
    assert "blocks.9.mlp" in text
    assert "attn" not in text


def test_a_users_own_model_is_inspected_and_matched(command: Command, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(USER_MODEL)
    text = command("inspect", "mine:build", "--input-size", "32", "--all").stdout
    assert "16x8x8" in text
    result = command("match", "--student", "mine:build", "--teacher", "resnet10t", "--input-size", "32")
    assert result.returncode == 0, result.stderr
    assert "two" in result.stdout
    assert "no weights for you" in command("inspect", "mine:broken").stderr


def test_match_writes_a_recipe_that_runs(command: Command, tmp_path: Path) -> None:
    arguments = ("--student", "vit_tiny_patch16_224", "--teacher", "resnet10t", "--input-size", "32", "-o", "r.yaml")
    small = [f"--student-kwargs={argument}" for argument in ("patch_size=8", "embed_dim=32", "depth=2", "num_heads=2")]
    result = command("match", *arguments, *small)
    assert result.returncode == 0, result.stderr
    assert "conv1x1 32->" in result.stdout
    text = (tmp_path / "r.yaml").read_text()
    assert "pairs:" in text
    again = command("match", *arguments, *small)
    assert again.returncode == 2
    assert "--overwrite" in again.stderr
    (tmp_path / "r.yaml").write_text(text.replace("epochs: 5", "epochs: 1").replace("epochs: 10", "epochs: 1"))
    result = command("train", "r.yaml")
    assert result.returncode == 0, result.stderr
    for part in ("teacher", "student alone", "accuracy", "agreement", "parameters", "timm.create_model("):
        assert part in result.stdout
    left = {file.name for file in (tmp_path / "runs" / "r").iterdir()}
    weights = {"teacher.safetensors", "student-alone.safetensors", "student.safetensors"}
    weights |= {"adapters-0.safetensors"}
    told = {"metrics.csv", "summary.csv", "curves.png", "summary.json", "layers.json", "report.html"}
    assert left == weights | told | {"recipe.yaml"}
    line = next(line for line in result.stdout.splitlines() if "timm.create_model(" in line)
    code = f"import timm; print(sum(p.numel() for p in {line.strip()}.parameters()))"
    loaded = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    results = json.loads((tmp_path / "runs" / "r" / "summary.json").read_text())["results"]
    assert loaded.stdout.strip() == str(results[-1]["parameters"]), loaded.stderr


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["inspect", "convnext_tinny"], "did you mean 'convnext_tiny'"),
        (["inspect", "resnet18.a9_in1k"], "timm has no weights 'a9_in1k' for resnet18; did you mean"),
        (["inspect", "resnet18", "--glob", "layr1*"], "did you mean 'layer1'"),
        (["inspect", "resnet18", "--input-size", "big"], "expected `224`"),
        (["inspect", "resnet18", "--model-kwargs", "depth"], "expected KEY=VALUE"),
        (["inspect", "local-dir:nowhere"], "nowhere"),
        (["match", "--student", "resnet10t", "--teacher", "resnet18", "--num-pairs", "99"], "99"),
        (["match", "--student", "resnet10t", "--teacher", "resnet18", "--level", "layer"], "stage"),
        (["train", "nowhere.yaml"], "cannot read the recipe"),
        (["train", "r.yaml", "--resume", "--overwrite"], "one of the two"),
        (["train", "r.yaml", "--out", "full"], "not empty"),
        (["train", "r.yaml", "--out", "r.yaml"], "not empty"),
        (["train", "r.yaml", "--out", "r.yaml/in"], "cannot write"),
        (["trian"], "train"),
    ],
    ids=" ".join,
)
def test_bad_input_is_one_clear_error(command: Command, tmp_path: Path, arguments: list[str], says: str) -> None:
    (tmp_path / "r.yaml").write_text(TINY)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "recipe.yaml").write_text("precious")
    result = command(*arguments)
    assert (result.returncode, "Traceback" in result.stderr) == (2, False), result.stderr
    assert says in " ".join(result.stderr.split())
    assert (tmp_path / "r.yaml").read_text() == TINY
    assert {file.name for file in tmp_path.iterdir()} == {"r.yaml", "full"}
    assert [file.read_text() for file in (tmp_path / "full").iterdir()] == ["precious"]


def test_check_says_what_is_compared_and_what_every_loss_moves(command: Command, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(TINY)
    result = command("check", "r.yaml", "--gradients")
    assert result.returncode == 0, result.stderr
    for part in ("vit_tiny_patch16_224", "conv1x1 32->128", "blocks.1 <- layer3", "student.patch_embed", "adapters"):
        assert part in result.stdout
    rows = json.loads(command("check", "r.yaml", "--gradients", "--json").stdout)["gradients"]
    reached = {row["part"]: (row["reached"], row["parameters"]) for row in rows if row["loss"] == "hint"}
    assert "student.head" not in reached
    assert reached["student.blocks"] == (24, 24)
    assert all(row["norm"] > 0 for row in rows)
    assert {file.name for file in tmp_path.iterdir()} == {"r.yaml"}


@pytest.mark.parametrize(
    ("recipe", "says"),
    [
        (
            TINY.partition("  - name: task")[0].replace("baseline: true\n", ""),
            "no loss of any stage trains student.head.bias",
        ),
        (ROCKET.replace("weights, modules: interval", "graft, at: layer4").replace("light", "l") + "seed: 1\n", ""),
        (TINY.replace("epochs: 2", "epochs: 0"), "greater than or equal to 1"),
    ],
)
def test_check_finds_what_no_loss_reaches(command: Command, tmp_path: Path, recipe: str, says: str) -> None:
    (tmp_path / "r.yaml").write_text(recipe)
    result = command("check", "r.yaml", "--gradients")
    assert (result.returncode, "Traceback" in result.stderr) == (2 if says else 0, False), result.stderr
    assert says in result.stderr
