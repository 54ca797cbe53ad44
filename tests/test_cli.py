"""The command line, as in a shell: what it prints, how it refuses, what it leaves alone."""

import contextlib
import json
import logging
import math
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
from conftest import NARROW, ROCKET, TINY, Command
from PIL import Image
from typer.main import get_command

from probe_kd.cli.app import COMMANDS, app
from probe_kd.engine.tracing import trace
from probe_kd.errors import DataError
from probe_kd.recipe.reading import load
from probe_kd.recipe.scaffold import METHODS, write_recipe
from probe_kd.recipe.writing import command_to_go_on

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


ALONE = """\
student: {model: resnet10t, model_kwargs: {channels: [8, 8, 8, 8]}}
data: {dataset: sklearn/digits, input_size: [3, 8, 8], batch_size: 1024}
stages: [{epochs: 2, losses: {task: {loss: cross_entropy}}}]
"""


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


@pytest.mark.parametrize("name", COMMANDS)
def test_the_help_of_a_command_has_every_word_of_it(
    name: str, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such as the extra of `pip install 'probe-kd[tune]'`, which is no markup of rich."""
    monkeypatch.setenv("COLUMNS", "200")
    shown = command(name, "--help").stdout
    helps = [parameter.help or "" for parameter in get_command(app).commands[name].params]  # type: ignore[attr-defined]
    assert set(" ".join([COMMANDS[name].__doc__ or "", *helps]).split()) <= set(shown.split())


def test_inspect_lists_what_can_be_matched(command: Command, tmp_path: Path) -> None:
    text = command("inspect", "convnext_atto", "--input-size", "64x96").stdout
    for part in ("3x64x96", "stages.0", "40x16x24", "stages.3", "320x2x3", "NCHW"):
        assert part in text
    found = json.loads(command("inspect", "convnext_atto", "--json", "--input-size", "224").stdout)
    assert (found["model"], found["input_size"], found["model_kwargs"]) == ("convnext_atto", [3, 224, 224], {})
    assert found["parameters"] == sum(p.numel() for p in timm.create_model("convnext_atto").parameters())
    rows = found["layers"]
    ends = [row for row in rows if row["mark"] == "stage"]
    assert [(row["tap"], row["shape"], row["reduction"]) for row in ends] == [
        ("stages.0", [40, 56, 56], 4.0),
        ("stages.1", [80, 28, 28], 8.0),
        ("stages.2", [160, 14, 14], 16.0),
        ("stages.3", [320, 7, 7], 32.0),
    ]


def test_inspect_can_show_every_module_and_why_one_is_silent(command: Command, tmp_path: Path) -> None:
    arguments = ("inspect", "vit_tiny_patch16_224", "--all", "--json", "--model-kwargs", "depth=2")
    arguments += ("--model-kwargs", "qkv_bias=false")  # as in YAML
    rows = {row["tap"]: row for row in json.loads(command(*arguments).stdout)["layers"]}
    assert rows["blocks.1"]["shape"] == [197, 192]
    assert rows["blocks.1.attn.qkv"]["parameters"] == 3 * 192 * 192
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
    short = ("teacher.train.epochs=1", "stages.0.epochs=1", "data.fraction=0.25")
    result = command("train", "r.yaml", *(f"--set={value}" for value in short))
    assert result.returncode == 0, result.stderr
    for part in ("teacher", "baseline", "accuracy", "agreement", "parameters", "timm.create_model("):
        assert part in result.stdout
    left = {file.name for file in (tmp_path / "runs" / "r").iterdir()}
    weights = {"teacher.safetensors", "baseline.safetensors", "student.safetensors"}
    weights |= {"adapters-0.safetensors"}
    told = {"metrics.csv", "summary.csv", "curves.png", "summary.json", "layers.json", "report.html"}
    assert left == weights | told | {"recipe.yaml", "data.json", "manifest.json"}
    line = next(line for line in result.stdout.splitlines() if "timm.create_model(" in line)
    code = f"import timm; print(sum(p.numel() for p in {line.strip()}.parameters()))"
    loaded = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    results = json.loads((tmp_path / "runs" / "r" / "summary.json").read_text())["results"]
    assert loaded.stdout.strip() == str(results[-1]["parameters"]), loaded.stderr


SMALL_VIT = ["vit_tiny_patch16_224", "img_size=32", "patch_size=8", "embed_dim=32", "depth=2", "num_heads=2"]


@pytest.mark.parametrize(
    ("method", "student"),
    [*((method, SMALL_VIT) for method in METHODS), ("rocket", ["resnet10t"]), ("fitnets", ["resnet10t"])],
    ids=str,
)
def test_init_writes_a_recipe_of_every_method_that_passes_check(
    command: Command, tmp_path: Path, method: str, student: list[str]
) -> None:
    kwargs = [part for text in student[1:] for part in ("--student-kwargs", text)]
    models = ["--student", student[0], *kwargs, "--teacher", "resnet18", "--input-size", "32"]
    done = command("init", *models, "--method", method, "-o", "made/new.yaml")
    assert done.returncode == 0, done.stderr
    assert "probe-kd check made/new.yaml" in done.stdout
    checked = command("check", "made/new.yaml", *["--no-batch"] * (method != "rocket"))  # tests/test_recipes.py audits
    assert checked.returncode == 0, checked.stderr
    assert command("init", *models, "-o", "made/new.yaml").returncode == 2


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ("torch/cifar100", {"dataset": "torch/cifar100", "root": "data", "download": True, "hflip": 0.5}),
        ("hfds/food101", {"dataset": "hfds/food101", "root": None, "hflip": 0.5, "scale": (0.08, 1.0)}),
        ("hfds/tiny", {"dataset": "hfds/tiny", "scale": (0.7, 1.0), "crop_pct": 1.0, "color_jitter": 0.4}),
        ("photos", {"dataset": "", "root": "photos", "val_split": "none", "holdout": 0.1}),
    ],
)
def test_init_names_the_images_as_timm_does(
    command: Command, tmp_path: Path, data: str, expected: dict[str, Any]
) -> None:
    (tmp_path / "photos" / "train").mkdir(parents=True)
    models = ["--student", "resnet10t", "--teacher", "resnet18"]
    models += ["--input-size", "32"] * (data == "hfds/tiny")
    done = command("init", *models, "--method", "soft_targets", "--data", data, "-o", "new.yaml")
    assert done.returncode == 0, done.stderr
    options = load(tmp_path / "new.yaml").recipe.data
    assert {key: getattr(options, key) for key in expected} == expected


@pytest.mark.parametrize(
    ("data", "says"),
    [
        ("photso", "there is no folder 'photso'; did you mean 'photos'?"),
        ("cifar100", "did you mean 'torch/cifar100'"),
        ("torch/cifar101", "there is no dataset 'torch/cifar101'"),
        ("hfd/food101", "begin with `torch/`"),
        ("./nowhere", "a folder of folders that is there"),
        ("tfds/mnist", "is a stream"),
    ],
)
def test_init_refuses_images_that_there_are_not(data: str, says: str, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    traces = [trace("resnet10t", 32), trace("resnet18", 32)]
    with contextlib.chdir(tmp_path), pytest.raises(DataError, match=re.escape(says)):
        write_recipe(*traces, [], tmp_path / "new.yaml", method="soft_targets", data=data)
    assert not (tmp_path / "new.yaml").exists()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["inspect", "convnext_tinny"], "did you mean 'convnext_tiny'"),
        (["inspect", "resnet18.a9_in1k"], "timm has no weights 'a9_in1k' for resnet18; did you mean"),
        (["inspect", "resnet18", "--glob", "layr1*"], "did you mean 'layer1'"),
        (["inspect", "resnet18", "--input-size", "big"], "expected `224`"),
        (["inspect", "resnet18", "--model-kwargs", "depth"], "expected KEY=VALUE"),
        (["inspect", "resnet18", "--model-kwargs", "layers=(1, 1)"], "the value is YAML, `null` for none and `[7, 7]`"),
        (["inspect", "resnet18", "--model-kwargs", "avg_down='no'"], "expected true or false; did you mean false?"),
        (["inspect", "resnet18", "--model-kwargs", "avg_down={a"], "not YAML"),
        (["inspect", "resnet18", "--model-kwargs", "cache_dir=x"], "no argument of the architecture"),
        (["inspect", "local-dir:nowhere"], "nowhere"),
        (["init", "--student", "a", "--teacher", "b", "--method", "fitnet", "-o", "x"], "did you mean 'fitnets'"),
        (["match", "--student", "resnet10t", "--teacher", "resnet18", "--num-pairs", "99"], "99"),
        (["match", "--student", "resnet10t", "--teacher", "resnet18", "--level", "layer"], "stage"),
        (["train", "nowhere.yaml"], "cannot read the recipe"),
        (["train", "r.yaml", "--resume", "--overwrite"], "one of the two"),
        (["train", "r.yaml", "--out", "full"], "was written by no run"),
        (["train", "r.yaml", "--out", "r.yaml"], "it is a file"),
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


def test_verbose_shows_where_an_error_came_from(command: Command, tmp_path: Path) -> None:
    quiet = command("inspect", "resnet19")
    level = logging.getLogger().level
    try:
        logging.getLogger().handlers, kept = [], logging.getLogger().handlers
        told = command("--verbose", "inspect", "resnet19")
    finally:
        logging.getLogger().handlers = kept
        logging.getLogger().setLevel(level)
    assert (quiet.returncode, told.returncode) == (2, 2)
    assert quiet.stderr in told.stderr
    assert ("Traceback" in quiet.stderr, "Traceback" in told.stderr) == (False, True)


def test_a_run_that_options_changed_goes_on_with_the_same_options(command: Command, tmp_path: Path) -> None:
    """And what it leaves needs neither them nor the file that the recipe extends."""
    (tmp_path / "base.yaml").write_text(ALONE)
    (tmp_path / "r.yaml").write_text("extends: base.yaml\nseed: 3\n")
    options = ("--set", "stages.0.losses.task.label_smoothing=0.1", "--set", "stages.0.epochs=1")
    assert command("train", "r.yaml", "-q", *options).returncode == 0
    again = command("train", "r.yaml", "-q", "--resume", *options)
    assert "the run is finished" in again.stderr
    told = shlex.split(command_to_go_on(Path("runs/r")))  # as messages give it, in which the options are already
    assert "the run is finished" in command(*told[1:]).stderr
    for other in ((), options[:2]):
        result = command("train", "r.yaml", "-q", "--resume", *other)
        assert "the recipe is not the one" in result.stderr
    for name in ("base.yaml", "r.yaml"):
        (tmp_path / name).unlink()
    resolved = load(tmp_path / "runs" / "r" / "recipe.yaml").recipe
    assert (resolved.seed, resolved.stages[0].epochs) == (3, 1)
    assert resolved.stages[0].losses["task"].options == {"label_smoothing": 0.1}
    assert command("check", "runs/r/recipe.yaml").returncode == 0
    result = command("check", "runs/r/recipe.yaml", "--set", "stages.0.epoch=1")
    assert (result.returncode, "did you mean 'epochs'" in result.stderr) == (2, True)


def test_the_schema_is_written_where_it_is_asked_for(command: Command, tmp_path: Path) -> None:
    shown = command("schema").stdout
    assert {"student", "stages", "extends"} <= set(json.loads(shown)["$defs"]["Recipe"]["properties"])
    assert command("schema", "-o", "new/recipe.schema.json").returncode == 0
    path = tmp_path / "new" / "recipe.schema.json"
    assert path.read_text() == shown
    path.write_text("precious")
    assert "--overwrite replaces it" in command("schema", "-o", str(path)).stderr
    assert path.read_text() == "precious"


def test_check_shows_what_patterns_stand_for(command: Command, tmp_path: Path) -> None:
    named = "  blocks.0: layer2\n  blocks.1: layer3\n"
    (tmp_path / "r.yaml").write_text(TINY.replace(named, "  glob:blocks.?: re:layer[23]\n"))
    result = command("check", "r.yaml")
    assert result.returncode == 0, result.stderr
    assert "glob:blocks.?: re:layer[23] is blocks.0 <- layer2, blocks.1 <- layer3\n" in result.stdout
    pairs = json.loads(command("check", "r.yaml", "--json").stdout)["pairs"]
    assert pairs == [{"student": f"blocks.{n}", "teacher": f"layer{n + 2}"} for n in (0, 1)]


def test_check_tells_the_losses_and_the_cost_of_a_real_step(command: Command, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(TINY + "    optimizer: {opt: adamw}\nseed: 3\n")
    result = command("check", "r.yaml")
    assert result.returncode == 0, result.stderr
    for part in ("Losses on one batch", "weighted sum", "A step of 64 images"):
        assert part in result.stdout
    hint, task = json.loads(command("check", "r.yaml", "--json").stdout)["steps"]
    ours = timm.create_model(
        "vit_tiny_patch16_224", num_classes=10, img_size=16, patch_size=4, embed_dim=32, depth=2, num_heads=2
    )
    student = sum(parameter.numel() for parameter in ours.parameters())
    teacher = sum(parameter.numel() for parameter in timm.create_model("resnet10t", num_classes=10).parameters())
    adapters = 32 * 128 + 128 + 32 * 256 + 256  # two convolutions of one pixel, with biases
    assert hint["adapter_parameters"] == adapters
    # blocks.0 has 4 x 4 tokens and layer2 2 x 2 positions, layer3 only one
    assert hint["adapter_macs"] == 4 * 32 * 128 + 1 * 32 * 256
    assert hint["weights"] == 4 * (student + teacher + adapters)
    unmoved = sum(p.numel() for name, p in ours.named_parameters() if name.startswith(("norm.", "head.")))
    assert hint["gradients"] == 4 * (student - unmoved + adapters)
    assert task["gradients"] == 4 * student
    assert 0 <= task["optimizer"] - 2 * task["gradients"] < 1000  # two moments of each, and a count of steps
    assert task["activations"] > 64 * 2 * 17 * 32 * 4  # at least one tensor of tokens in each of the two blocks
    assert task["losses"]["loss"] == pytest.approx(task["losses"]["task"] + 0.5 * task["losses"]["soft"], rel=1e-5)
    assert task["losses"]["task"] == pytest.approx(math.log(10), abs=0.7)
    assert (hint["images"], hint["steps"], task["steps"]) == (64, 5, 10)
    dry = json.loads(command("check", "r.yaml", "--json", "--no-batch").stdout)
    assert (dry["steps"], dry["gradients"], len(dry["pairs"])) == ([], [], 2)


def test_check_remarks_on_an_absurd_learning_rate_and_shows_no_table_of_nothing(
    command: Command, tmp_path: Path
) -> None:
    (tmp_path / "r.yaml").write_text(ALONE)
    result = command("check", "r.yaml", "--set", "stages.0.optimizer={opt: sgd, lr: 1.0e+30}")
    assert result.returncode == 0, result.stderr
    assert "after one update at `lr: 1e+30`; try a smaller one" in result.stdout
    assert "What is compared" not in result.stdout
    assert "after one update" not in command("check", "r.yaml").stdout


def test_a_teacher_that_is_worse_is_told_once_at_the_end_of_a_run(command: Command, tmp_path: Path) -> None:
    text = NARROW.replace("train: {epochs: 1}", "train: {epochs: 1, optimizer: {lr: 1.0e-9}}")
    (tmp_path / "r.yaml").write_text(text)
    result = command("train", "r.yaml", "-q", "--set", "stages.1.epochs=6", "--set", "data.batch_size=16")
    assert result.returncode == 0, result.stderr
    assert (result.stdout + result.stderr).count("is worse than the baseline") == 1


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
    wrong = "greater" in says
    assert (result.returncode, "Traceback" in result.stderr) == (2 if wrong else 0, False), result.stderr
    assert says in (result.stderr if wrong else result.stdout)
    assert ("note: no loss" in result.stdout) == (bool(says) and not wrong)


def test_a_folder_whose_folders_are_the_classes_gets_a_recipe_that_plans(command: Command, tmp_path: Path) -> None:
    for name in "ab":
        for index in range(10):
            (tmp_path / "photos" / name).mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8, 8), (index, 0, 0)).save(tmp_path / "photos" / name / f"{index}.png")
    models = ["--student", "resnet10t", "--teacher", "resnet10t", "--input-size", "32"]
    assert command("init", *models, "--data", "photos", "-o", "r.yaml").returncode == 0
    checked = command("check", "r.yaml", "--no-batch")
    assert checked.returncode == 0, checked.stderr


def test_a_second_interrupt_says_that_the_run_was_stopped_and_how_it_goes_on(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("probe_kd.training.run.train", interrupt)
    (tmp_path / "r.yaml").write_text(ALONE)
    result = command("train", "r.yaml")
    assert result.returncode == 130
    assert result.stderr.endswith("stopped; go on with: probe-kd train r.yaml --resume\n")


def test_a_disk_that_is_full_under_what_is_printed_is_told(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("probe_kd.cli.models.make_console", full)
    result = command("inspect", "resnet10t")
    assert (result.returncode, "error: No space left on device; `probe-kd -v" in result.stderr) == (2, True)
