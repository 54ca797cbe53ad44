"""Exports: what a stranger with plain timm, or with onnxruntime, makes of the folder."""

import json
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from conftest import GRAFT, TINY
from pages import commands
from PIL import Image
from rich.console import Console
from timm.layers import BatchNormAct2d
from timm.models import save_for_hf
from torch import nn

from probe_kd import cli
from probe_kd.data.loading import loader
from probe_kd.engine.models import build_model
from probe_kd.engine.weights import read_header, save_weights
from probe_kd.errors import ProbeKDError, RunError
from probe_kd.recipe.planner import plan
from probe_kd.recipe.reading import load
from probe_kd.results import export as exporting
from probe_kd.results.export import export
from probe_kd.training.progress import Progress
from probe_kd.training.run import train

VIT = {"img_size": 24, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
SWIN = {"img_size": 32, "patch_size": 2, "window_size": 4, "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 2]}
SMALL = {"channels": [8, 16, 24, 32]}
NEXT = {"depths": [1, 1, 1, 1], "dims": [8, 8, 16, 16], "drop_path_rate": 0.5}
COAT = {"img_size": 32, "embed_dims": [16, 16, 16, 16], "serial_depths": [2, 1, 1, 1]}

# What a stranger runs: timm, torch, PIL and numpy, and nothing of ours.
STRANGER = """
import json, sys
import numpy as np, timm, torch
from PIL import Image

folder, pictures, answers = sys.argv[1:]
model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
config = timm.data.resolve_model_data_config(model)
transform = timm.data.create_transform(**config)
mode = "L" if config["input_size"][0] == 1 else "RGB"
images = torch.stack([transform(Image.fromarray(picture).convert(mode)) for picture in np.load(pictures)])
with torch.no_grad():
    np.savez(answers, images=images, logits=model(images))
cfg = model.pretrained_cfg
ours = sorted(name for name in sys.modules if "probe_kd" in name)
print(json.dumps({**config, "labels": cfg.get("label_names"), "ours": ours}))
"""


def write_run(
    folder: Path,
    model: str,
    kwargs: Mapping[str, Any],
    size: tuple[int, int, int],
    data: str = "",
    file: str = "student",
) -> nn.Module:
    """A finished run of a model whose weights, and statistics of batch norms, are as if it had been trained."""
    folder.mkdir(parents=True, exist_ok=True)
    kwargs = {**kwargs, "num_classes": 10, **({"in_chans": size[0]} if size[0] != 3 else {})}
    (folder / "recipe.yaml").write_text(f"""\
student: {{model: '{model}', model_kwargs: {json.dumps(kwargs)}}}
data: {{dataset: sklearn/digits, input_size: {list(size)}{data}}}
stages: [{{epochs: 1, losses: {{task: {{loss: cross_entropy}}}}}}]
""")
    torch.manual_seed(len(model) + len(file))
    module = build_model(model, kwargs)
    for tensor in module.state_dict().values():
        if tensor.is_floating_point():
            tensor.copy_(torch.rand_like(tensor) + 0.5 if bool((tensor == 1).all()) else 0.2 * torch.randn_like(tensor))
    for norm in module.modules():
        if isinstance(norm, nn.BatchNorm2d | BatchNormAct2d):
            norm.running_var.uniform_(0.5, 2.0)  # type: ignore[union-attr]
    save_weights(module, folder / f"{file}.safetensors", {"model": model, "model_kwargs": kwargs})
    return module.eval()


def ask_a_stranger(folder: Path, aside: Path) -> tuple[dict[str, Any], Mapping[str, np.ndarray[Any, Any]]]:
    """What timm alone makes of the folder and of eight pictures, none of them square."""
    pictures = np.random.default_rng(0).integers(0, 256, (8, 40, 52, 3), dtype=np.uint8)
    np.save(aside / "pictures.npy", pictures)
    arguments = [str(folder), str(aside / "pictures.npy"), str(aside / "answers.npz")]
    run = subprocess.run([sys.executable, "-c", STRANGER, *arguments], capture_output=True, text=True, cwd=aside)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout), np.load(aside / "answers.npz")


class Pictures(torch.utils.data.Dataset[Any]):
    """The stranger's pictures, as a dataset of ours."""

    def __init__(self, path: Path) -> None:
        self.images = [Image.fromarray(picture) for picture in np.load(path)]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return self.images[index], 0


@pytest.mark.parametrize(
    ("model", "kwargs", "size", "data"),
    [
        ("resnet10t.c3_in1k", SMALL, (3, 32, 24), ", crop_pct: 0.9, interpolation: bilinear"),
        ("vit_tiny_patch16_224.augreg_in21k", VIT, (3, 24, 24), ""),  # timm's own weights of it are JAX's
        ("swin_tiny_patch4_window7_224", SWIN, (3, 32, 32), ", mean: [0.1, 0.2, 0.3], std: [0.4, 0.5, 0.6]"),
        ("convnext_atto", NEXT, (1, 32, 32), ", crop_pct: 1.0"),
        ("coat_lite_tiny", COAT, (3, 32, 32), ""),  # one tensor under several names
    ],
)
def test_plain_timm_sees_and_answers_as_the_run_did(
    tmp_path: Path, model: str, kwargs: dict[str, Any], size: tuple[int, int, int], data: str
) -> None:
    module = write_run(tmp_path / "run", model, kwargs, size, data)
    done = export(tmp_path / "run", tmp_path / "out")
    assert (done.difference, done.images, done.notes) == (0.0, "16 test images", ())
    config, answers = ask_a_stranger(tmp_path / "out", tmp_path)
    assert config["ours"] == []

    planned = plan(load(tmp_path / "run" / "recipe.yaml"))
    given, options = planned.student_input, planned.recipe.data
    assert tuple(config["input_size"]) == size
    assert config["mean"] == pytest.approx(list(given.mean) * (size[0] // len(given.mean)))
    assert config["std"] == pytest.approx(list(given.std) * (size[0] // len(given.std)))
    images, _ = next(iter(loader(Pictures(tmp_path / "pictures.npy"), options, given, training=False)))
    np.testing.assert_allclose(answers["images"], images, atol=1e-6)
    with torch.no_grad():
        expected = module(images)
    assert expected.std() > 1e-3  # or the comparison would compare nothing
    np.testing.assert_allclose(answers["logits"], expected, rtol=1e-4, atol=1e-5)


def test_what_timm_pushes_to_the_hub_is_the_same_again(tmp_path: Path) -> None:
    """`push_to_hf_hub` of the loaded model uploads what `save_for_hf` writes."""
    write_run(tmp_path / "run", "vit_tiny_patch16_224", VIT, (1, 24, 24), ", mean: [0.3], std: [0.2]")
    export(tmp_path / "run", tmp_path / "out")
    first = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    save_for_hf(first, tmp_path / "pushed", safe_serialization=True)
    second = timm.create_model(f"local-dir:{tmp_path / 'pushed'}", pretrained=True).eval()
    images = torch.randn(2, 1, 24, 24)
    assert torch.equal(first(images), second(images))
    assert timm.data.resolve_model_data_config(first) == timm.data.resolve_model_data_config(second)


def test_what_the_card_shows_runs_in_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = write_run(tmp_path / "run", "resnet10t", SMALL, (1, 32, 32), ", crop_pct: 1.0, mean: [0.5], std: [0.25]")
    export(tmp_path / "run", tmp_path / "out")
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "out" / "image.png")
    monkeypatch.chdir(tmp_path / "out")
    shown: dict[str, Any] = {}
    (block,) = re.findall(r"```python\n(.*?)```", Path("README.md").read_text(), re.DOTALL)
    exec(block, shown)
    grey = np.asarray(Image.fromarray(pixels).convert("L"), dtype=np.float32)
    expected = module(torch.from_numpy((grey / 255 - 0.5) / 0.25)[None, None]).detach()
    np.testing.assert_allclose(shown["logits"], expected, rtol=1e-4, atol=1e-5)


def test_every_subject_of_a_real_run(tmp_path: Path) -> None:
    """Trained by the loop, with a teacher that sees other sizes than the student."""
    teacher = f"resnet10t\n  model_kwargs: {SMALL}\n  input_size: [3, 32, 32]\n  mean: [0.1, 0.2, 0.3]\n"
    (tmp_path / "r.yaml").write_text(TINY.replace("resnet10t\n", teacher))
    train(plan(load(tmp_path / "r.yaml")), tmp_path / "run", Progress(Console(quiet=True)))
    for role, size in (("student", 16), ("baseline", 16), ("teacher", 32)):
        done = export(tmp_path / "run", tmp_path / role, role=role)
        model = timm.create_model(f"local-dir:{tmp_path / role}", pretrained=True)
        weights = timm.models.load_state_dict(str(tmp_path / "run" / f"{role}.safetensors"))
        assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
        assert timm.data.resolve_model_data_config(model)["input_size"] == (3, size, size)
        assert [("resized" in note) for note in done.notes] == [True] * (size == 16)
    assert timm.data.resolve_model_data_config(model)["mean"] == [0.1, 0.2, 0.3]  # of the teacher
    with pytest.raises(RunError, match=r"has no teacher-baseline\.safetensors"):
        export(tmp_path / "run", tmp_path / "x", role="teacher-baseline")


def test_the_moving_average_and_its_accuracy(tmp_path: Path) -> None:
    raw = write_run(tmp_path / "run", "resnet10t", SMALL, (3, 32, 32))
    average = write_run(tmp_path / "run", "resnet10t", SMALL, (3, 32, 32), file="student-ema")
    results = [{"role": "student", "accuracy": 0.25, "ema_accuracy": 0.75}, {"role": "teacher", "accuracy": 0.9}]
    (tmp_path / "run" / "summary.json").write_text(json.dumps({"results": results}))
    images = torch.randn(2, 3, 32, 32)
    for ema, module, accuracy in ((False, raw, "25.00% (student)"), (True, average, "75.00% (student)")):
        export(tmp_path / "run", tmp_path / "out", ema=ema, overwrite=ema)
        model = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
        assert torch.equal(model(images), module(images))
        card = (tmp_path / "out" / "README.md").read_text()
        assert accuracy in card
        assert "90.00% (teacher)" in card
    assert not torch.equal(raw(images), average(images))


def test_class_names_and_no_paths_of_this_machine(tmp_path: Path) -> None:
    for split in ("train", "validation"):
        for index in range(10):
            (tmp_path / "pets" / split / f"{'zyxwvutsrq'[index]}-cat").mkdir(parents=True)
            picture = np.random.default_rng(index + len(split)).integers(0, 256, (20, 30, 3), dtype=np.uint8)
            Image.fromarray(picture).save(tmp_path / "pets" / split / f"{'zyxwvutsrq'[index]}-cat" / "0.png")
    write_run(tmp_path / "run", "resnet10t", SMALL, (3, 32, 32))
    recipe = (tmp_path / "run" / "recipe.yaml").read_text()
    where = f"dataset: '', root: {tmp_path / 'pets'}"
    (tmp_path / "run" / "recipe.yaml").write_text(recipe.replace("dataset: sklearn/digits", where))
    assert export(tmp_path / "run", tmp_path / "out").images == "10 test images"
    config, _ = ask_a_stranger(tmp_path / "out", tmp_path)
    assert config["labels"] == [f"{letter}-cat" for letter in "qrstuvwxyz"]
    assert all(str(tmp_path) not in (tmp_path / "out" / name).read_text() for name in ("README.md", "config.json"))

    (tmp_path / "pets").rename(tmp_path / "moved")
    done = export(tmp_path / "run", tmp_path / "out", overwrite=True)
    assert done.images.startswith("16 random images, since the data of the run were not read")
    assert done.difference == 0.0


def test_reparameterised_where_timm_loads_it(tmp_path: Path) -> None:
    if not timm.is_model("lcnetv2_base"):
        pytest.skip("this timm has no model that loads in its reparameterised form")
    module = write_run(tmp_path / "run", "lcnetv2_base", {}, (3, 64, 64))
    done = export(tmp_path / "run", tmp_path / "out", reparameterize=True)
    assert done.model_kwargs["inference_mode"] is True
    _, answers = ask_a_stranger(tmp_path / "out", tmp_path)
    with torch.no_grad():
        expected = module(torch.from_numpy(answers["images"])).numpy()
    np.testing.assert_allclose(answers["logits"], expected, rtol=1e-3, atol=1e-3 * np.abs(expected).max())
    assert len(read_header(tmp_path / "out" / "model.safetensors")["model_kwargs"]) == 2
    assert len(timm.models.load_state_dict(str(tmp_path / "out" / "model.safetensors"))) < len(module.state_dict())


def test_reparameterised_in_onnx_where_timm_does_not_load_it(tmp_path: Path) -> None:
    onnx, runtime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    module = write_run(tmp_path / "run", "repvgg_a0", {}, (3, 32, 32))
    with pytest.raises(RunError, match=r"does not load it in that form.*or add --onnx"):
        export(tmp_path / "run", tmp_path / "out", reparameterize=True)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["run"]
    done = export(tmp_path / "run", tmp_path / "out", reparameterize=True, onnx=True)
    assert any("model.onnx is reparameterised, and model.safetensors is not" in note for note in done.notes)

    kinds = [node.op_type for node in onnx.load(tmp_path / "out" / "model.onnx").graph.node]
    convolutions = [name for name, part in module.named_modules() if isinstance(part, nn.Conv2d)]
    assert kinds.count("Conv") == len(convolutions) / 2  # of the 3x3 and 1x1 branch of every block, one is left
    session = runtime.InferenceSession(str(tmp_path / "out" / "model.onnx"))
    loaded = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    for count in (1, 7):
        images = torch.randn(count, 3, 32, 32)
        (logits,) = session.run(["logits"], {"images": images.numpy()})
        with torch.no_grad():
            expected = module(images)
            assert torch.equal(loaded(images), expected)
        np.testing.assert_allclose(logits, expected, rtol=1e-3, atol=1e-3 * expected.abs().max().item())


def test_nothing_to_reparameterise_is_said(tmp_path: Path) -> None:
    write_run(tmp_path / "run", "resnet10t", SMALL, (3, 32, 32))
    done = export(tmp_path / "run", tmp_path / "out", reparameterize=True)
    assert done.notes == ("resnet10t has nothing to reparameterise; it is exported as it was trained",)


OWN = """\
from torch import nn
def build(num_classes=10):
    pooled = nn.Conv2d(3, 8, 3, 2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    return nn.Sequential(*pooled, nn.Linear(8, num_classes))
"""


def test_a_model_of_ones_own_goes_to_onnx_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    (tmp_path / "own_model.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    module = write_run(tmp_path / "run", "own_model:build", {}, (3, 32, 32))
    with pytest.raises(RunError, match=r"own_model:build, which timm does not know.*load_student.*--onnx"):
        export(tmp_path / "run", tmp_path / "out", allow_import=["own_model"])
    export(tmp_path / "run", tmp_path / "out", onnx=True, allow_import=["own_model"])
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == ["README.md", "model.onnx"]
    images = torch.randn(3, 3, 32, 32)
    answers = runtime.InferenceSession(str(tmp_path / "out" / "model.onnx")).run(None, {"images": images.numpy()})
    np.testing.assert_allclose(answers[0], module(images).detach(), rtol=1e-4, atol=1e-5)


def test_a_graft_is_refused_and_its_teacher_is_not(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(GRAFT.replace("epochs: 2", "epochs: 1"))
    train(plan(load(tmp_path / "r.yaml")), tmp_path / "run", Progress(Console(quiet=True)))
    with pytest.raises(RunError, match=r"is a graft.*probe_kd.load_student"):
        export(tmp_path / "run", tmp_path / "out", onnx=True)
    assert export(tmp_path / "run", tmp_path / "out", role="teacher-baseline").difference == 0.0


def _of_another_model(run: Path) -> None:
    write_run(run.parent / "other", "resnet18", SMALL, (3, 32, 32))
    (run.parent / "other" / "student.safetensors").replace(run / "student.safetensors")


def _cut_short(run: Path) -> None:
    whole = (run / "student.safetensors").read_bytes()
    (run / "student.safetensors").write_bytes(whole[: len(whole) // 2])


def _unfinished(run: Path) -> None:
    (run / "student.safetensors").unlink()
    (run / "checkpoint").mkdir()


def _untold(run: Path) -> None:
    save_weights(nn.Linear(2, 2), run / "student.safetensors", {})


def _misfit(run: Path) -> None:
    save_weights(nn.Linear(2, 2), run / "student.safetensors", read_header(run / "student.safetensors"))


def _taken(run: Path) -> None:
    (run.parent / "out").mkdir()
    (run.parent / "out" / "README.md").write_text("my thesis")
    (run.parent / "out" / "config.json").write_text("{}")


def _nothing(run: Path) -> None:
    pass


@pytest.mark.parametrize(
    ("spoil", "arguments", "says"),
    [
        (lambda run: (run / "recipe.yaml").unlink(), [], "is not the folder of a run: it has no recipe.yaml"),
        (_unfinished, [], "is not finished"),
        (_of_another_model, [], "is of another model: of resnet18("),
        (_cut_short, [], "cannot read"),
        (_untold, [], "does not tell which model it is of"),
        (_misfit, [], "does not fit ResNet"),
        (_taken, ["--overwrite"], "was not written by an export"),
        (_nothing, ["--ema"], "kept no moving average of the student"),
        (_nothing, ["--role", "teacher"], "has no teacher.safetensors: it has student.safetensors"),
        (_nothing, ["--role", "pupil"], "baseline"),
        (_nothing, ["-o", "run", "--overwrite"], "holds recipe.yaml, student.safetensors"),
        (_nothing, ["-o", "run/recipe.yaml"], "is a file"),
        (_nothing, ["-o", "run/recipe.yaml/in"], "cannot"),
    ],
)
def test_what_cannot_be_exported_is_one_message_and_changes_nothing(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    spoil: Any,
    arguments: list[str],
    says: str,
) -> None:
    write_run(tmp_path / "run", "resnet10t", SMALL, (3, 32, 32))
    spoil(tmp_path / "run")
    before = {path: path.is_file() and path.read_bytes() for path in tmp_path.rglob("*")}
    code, _, said = command(
        tmp_path, monkeypatch, capsys, "run", *(["-o", "out"] * ("-o" not in arguments)), *arguments
    )
    assert (code, "Traceback" in said) == (2, False), said
    assert says in " ".join(said.replace("│", " ").split())
    assert {path: path.is_file() and path.read_bytes() for path in tmp_path.rglob("*")} == before


def command(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str
) -> tuple[int, str, str]:
    """`probe-kd export ...` in a folder: its status, what it prints, and what it complains of."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", ["probe-kd", "export", *arguments])
    monkeypatch.setattr(sys, "path", list(sys.path))
    capsys.readouterr()
    try:
        cli.main()
        code = 0
    except SystemExit as end:
        code = int(end.code or 0)
    return code, *capsys.readouterr()


def test_the_command_prints_the_difference_and_replaces_only_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("onnxscript")
    write_run(tmp_path / "run", "resnet10t", SMALL, (3, 32, 32))
    code, printed, said = command(tmp_path, monkeypatch, capsys, "run", "-o", "out", "--onnx")
    assert (code, said) == (0, "")
    assert "timm answers as the run did" in printed
    assert "onnxruntime answers as the run did" in printed
    assert "timm.create_model('local-dir:out', pretrained=True)" in printed
    code, _, said = command(tmp_path, monkeypatch, capsys, "run", "-o", "out")
    assert (code, "--overwrite replaces it" in said) == (2, True)
    code, printed, _ = command(tmp_path, monkeypatch, capsys, "run", "-o", "out", "--overwrite", "--json")
    assert code == 0
    assert json.loads(printed)["difference"] == 0.0
    # Nothing of the former export is mixed with the new one.
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == [
        "README.md",
        "config.json",
        "model.safetensors",
    ]
    (tmp_path / "out" / "notes.txt").write_text("mine")
    code, _, said = command(tmp_path, monkeypatch, capsys, "run", "-o", "out", "--overwrite")
    assert (code, "holds notes.txt" in said) == (2, True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "run"]


@pytest.mark.parametrize("line", commands("export"))
def test_every_export_that_the_readme_shows_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], line: str
) -> None:
    _, _, run, *options = shlex.split(line)
    write_run(tmp_path / run, "resnet10t", SMALL, (3, 32, 32))
    (tmp_path / run / "student.safetensors").replace(tmp_path / run / "student-ema.safetensors")
    write_run(tmp_path / run, "resnet10t", SMALL, (3, 32, 32))
    code, _, said = command(tmp_path, monkeypatch, capsys, run, *options)
    assert (code, said) == (0, "")


@pytest.mark.parametrize("place", ["weights", "config"])
def test_an_export_that_answers_otherwise_is_not_left_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    write_run(tmp_path / "run", "resnet10t", SMALL, (3, 32, 32))
    export(tmp_path / "run", tmp_path / "out")
    kept = {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()}

    def spoiled(module: nn.Module, path: Path, about: Mapping[str, Any]) -> None:
        wrong = {name: tensor + 0.01 for name, tensor in module.state_dict().items() if tensor.is_floating_point()}
        module.load_state_dict(wrong, strict=False)
        save_weights(module, path, about)

    def miswritten(*arguments: Any) -> None:
        trained = arguments[2]
        write_config(
            *arguments[:2], replace(trained, given=replace(trained.given, mean=(0.9, 0.9, 0.9))), *arguments[3:]
        )

    write_config = exporting._write_config
    if place == "weights":
        monkeypatch.setattr(exporting, "save_weights", spoiled)
    else:
        monkeypatch.setattr(exporting, "_write_config", miswritten)
    with pytest.raises(ProbeKDError, match=r"does not (answer|agree).*differ by up to [0-9.e-]+"):
        export(tmp_path / "run", tmp_path / "out", overwrite=True)
    assert {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()} == kept
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "run"]


def test_missing_packages_are_named_with_what_installs_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exporting, "find_spec", lambda name: None if name == "onnxruntime" else name)
    with pytest.raises(RunError, match=r"--onnx needs onnxruntime: pip install 'probe-kd\[onnx\]'"):
        export(tmp_path / "run", tmp_path / "out", onnx=True)
