"""What a recipe, a checkpoint or a name from somebody else can do: be refused, at once, with one message."""

import hashlib
import io
import json
import os
import pickle
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from conftest import WHOLE as TINY
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from rich.table import Table
from rich.text import Text
from safetensors.torch import save_file

from probe_kd.cli import main
from probe_kd.console import PlainConsole
from probe_kd.engine.spec import Tap
from probe_kd.engine.weights import check_state, read_weights, save_weights
from probe_kd.errors import Problem, RecipeError, RunError, TapError, TraceError, WeightsError
from probe_kd.files.atomic import MOST_BYTES, MOST_TEXT, whole_text
from probe_kd.methods.sharing import load_student
from probe_kd.recipe.planner import plan
from probe_kd.recipe.reading import load, parse
from probe_kd.recipe.yaml_tree import MAX_LEVELS, MAX_NODES
from probe_kd.results.comparison import compare
from probe_kd.training.progress import Progress
from probe_kd.training.records import write_metrics
from probe_kd.training.run import train


class Canary:
    """Runs code when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.path}",)


@pytest.fixture
def canary(tmp_path: Path) -> Any:
    """A file that appears where something was run; it has to be missing at the end."""
    path = tmp_path / "canary"
    os.system(f"touch {path}")  # the trap works
    assert path.exists()
    path.unlink()
    yield path
    assert not path.exists()


def refusal(text: str) -> str:
    """The message, which has to come soon."""
    start = time.process_time()
    with pytest.raises(RecipeError) as caught:
        parse(text, "r.yaml")
    assert time.process_time() - start < 15
    return str(caught.value)


LAUGHS = "a: &a [x, x]\n" + "".join(
    f"{b}: &{b} [*{a}, *{a}]\n" for a, b in zip("abcdefghijklmn", "bcdefghijklmno", strict=True)
)
CHAIN = "a0: &a0 [x]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}]\n" for n in range(1, 60))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (LAUGHS, f"r.yaml:12:8: more than {MAX_NODES} values"),
        (CHAIN, f"more than {MAX_LEVELS} levels"),
        ("[" * 100_000, f"r.yaml:1:{MAX_LEVELS + 1}: more than {MAX_LEVELS} levels"),
        ("{a: " * 50_000, f"more than {MAX_LEVELS} levels"),
        ("- " * 100_000, f"more than {MAX_LEVELS} levels"),
        ("a: [" + "1," * 100_000 + "]", f"more than {MAX_NODES} values"),
        ("a: &a {b: *a}", "no `&a` ends before it"),
        ("a: *b", "no `&b` ends before it"),
        ("a: &a 1\nb: &a 2", "r.yaml:2:4: `&a` is there twice"),
        ("a: 1\nb: !!python/object/apply:os.system [ls]", "r.yaml:2:4: tag `!!python/object/apply:os.system`"),
        ("a: !mine {b: 1}", "r.yaml:1:4: tag `!mine`"),
        ("a: !!str 1", "tag `!!str`"),
        ("%YAML 1.1\n---\na: yes", "without directives"),
        ("%TAG ! tag:x,2000:\n---\na: !y 1", "without directives"),
        ("--- {a: 1}\n--- {b: 1}", "not YAML"),
        ("a: 1\na: 2", "r.yaml:2:1: not YAML"),
        ("a: 1\nb: \x00", r"r.yaml:2:4: character '\x00'"),
        ("a: \x1b[31m", r"character '\x1b'"),
        ("a: 1\n# \u202e", r"r.yaml:2:3: character '\u202e'"),
        ('b:\n  - "\\0"', "r.yaml:2:5: `b.0`: expected one line of text"),
        ('"a\\e": 1', "`a key`: expected one line of text"),
        ('a: "\\ud800"', "expected one line of text"),
        ("a: |\n  x\n  y\n", "expected one line of text"),
        ("a: {b: [1e400]}", "r.yaml:1:9: `a.b.0`: expected a finite number, got inf"),
        ("a: " + "9" * 30, "this number is too large"),
        ("a: " + "9" * 9999, "not YAML"),
        ("a: 2001-13-45", "not YAML"),
        ("{1: a, '1': b}", "written alike"),
        ("<<: 3", "not YAML"),
        ("x: {<<: {a: 1}}", "unknown key `x`"),
        ("stages: [{<<: {epochs: 0}}]", "r.yaml:1:10: `stages.0.epochs`: expected a number greater"),
    ],
    ids=lambda value: value[:20],
)  # fmt: skip
def test_what_is_no_plain_small_document_is_refused_where_it_stands(text: str, says: str) -> None:
    assert says in refusal(text)


def test_anchors_and_merges_that_stay_small_are_read() -> None:
    text = TINY.replace("  - name: task\n", "    optimizer: &same {lr: 0.5, momentum: 0.5}\n  - name: task\n")
    text += "    optimizer: {<<: *same, lr: 0.25}\n"
    first, second = parse(text).recipe.stages
    assert (first.optimizer.lr, second.optimizer.lr, second.optimizer.momentum) == (0.5, 0.25, 0.5)
    assert "r.yaml:27:28: unknown key `lrr`; did you mean 'lr'" in refusal(text.replace("lr: 0.25", "lrr: 1"))
    merged = refusal(text.replace("momentum: 0.5", "momentum: 2"))
    assert "r.yaml:27:5: `stages.1.optimizer.momentum`: expected a number less than 1, got 2" in merged


# (what to replace in TINY, by what, what the message says): one mistake of form, one problem
FORM = [
    ("hflip: 0.0", "hflip: .nan", "r.yaml:11:3: `data.hflip`: expected a finite number, got nan"),
    ("hflip: 0.0", "hflip: 'inf'", "`data.hflip`: expected a number, got 'inf'"),
    ("hflip: 0.0", "hflip: true", "`data.hflip`: expected a number, got true"),
    ("[3, 16, 16]", "[3, true, 16]", "`data.input_size.1`: expected a whole number, got true"),
    ("[3, 16, 16]", "[3, 16]", "`data.input_size`: a value is missing"),
    ("baseline: true", "baseline: 1", "`baseline`: expected true or false, got 1"),
    ("epochs: 2", "epochs: true", "`stages.1.epochs`: expected a whole number, got true"),
    ("epochs: 2", "epochs: 2.5", "`stages.1.epochs`: expected a whole number, got 2.5"),
    ("weight: 0.5", "weight: -.inf", "25:52: `stages.1.losses.soft.weight`: expected a finite number"),
    ("weight: 0.5", "weight: [1]", "`stages.1.losses.soft.weight`: expected a number, got a list"),
    ("weight: 0.5", "weight: {start: 1, end: x}", "`stages.1.losses.soft.weight.end`: expected a number, got 'x'"),
    ("weight: 0.5", "weight: {strat: 1, end: 2, start: 1}", "unknown key `strat`; did you mean 'start'"),
    ("name: task", "name: '[red]x'", "21:5: `stages.1.name`: expected at most 64 letters"),
    ("name: task", "name: =cmd()", "`stages.1.name`: expected at most 64 letters"),
    ("name: task", "name: ../../x", "`stages.1.name`: expected at most 64 letters"),
    ("name: task", "name: " + "x" * 65, "`stages.1.name`: expected at most 64 letters"),
    ("soft: {", "'=1+1': {", "25:7: `stages.1.losses.=1+1`: expected at most 64 letters"),
    ("soft: {", "'[/]': {", "expected at most 64 letters"),
    ("  train: {epochs: 1}", "  train: 3", "`teacher.train`: expected a mapping, got 3"),
    ("  train: {epochs: 1}", "  class_map: {a: 1}", "`teacher.class_map`: expected text, got a mapping"),
    ("baseline: true", "share: {modules: botom}", "expected 'bottom' or 'interval', got 'botom'; did you"),
    ("baseline: true", "share: {modules: [1]}", "`share.modules.0`: expected text, got 1"),
    ("baseline: true", "share: {form: graft, at: {}}", "`share.at`: expected at least 1, got 0"),
    ("normalize: layer", "policy: 3", "`stages.0.losses.hint.policy`: expected"),
    ("  blocks.1: layer3", "  blocks.1: [[layer3]]", "`pairs.blocks.1.0`: expected text, got a list"),
]  # fmt: skip


@pytest.mark.parametrize(("old", "new", "says"), FORM, ids=lambda value: value[:20])
def test_a_mistake_of_form_is_one_problem_in_the_words_of_a_recipe(old: str, new: str, says: str) -> None:
    assert TINY.count(old) == 1
    message = refusal(TINY.replace(old, new))
    assert says in message
    assert message.count("r.yaml:") == 1
    for leak in ("Options", "dictionary", "nput should", " tag", "union", "schedule", "word", "[key]"):
        assert leak not in message.partition("\n")[0]


def test_only_a_small_text_file_is_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo.yaml")
    (tmp_path / "loop.yaml").symlink_to(tmp_path / "loop.yaml")
    (tmp_path / "folder.yaml").mkdir()
    (tmp_path / "latin.yaml").write_bytes(b"a: 1\nb: \xe9\n")
    (tmp_path / "wide.yaml").write_text(TINY, encoding="utf-16")
    (tmp_path / "large.yaml").write_bytes(b"# large\n" * (MOST_TEXT // 8 + 1))
    with (tmp_path / "huge.yaml").open("wb") as file:
        file.truncate(100_000_000)
    cases = {
        "fifo.yaml": "no regular file",
        "loop.yaml": "symbolic links",
        "folder.yaml": "no regular file",
        "latin.yaml": "its line 2 is not UTF-8 text",
        "wide.yaml": "not UTF-8 text",
        "large.yaml": "larger than 250 kB",
        "huge.yaml": "larger than 250 kB",
        "/dev/zero": "no regular file",
        "nul\0.yaml": "null",
        "long" * 999: "too long",
        "": "no regular file",
    }
    for name, says in cases.items():
        start = time.process_time()
        with pytest.raises(RecipeError, match=says):
            load(tmp_path / name)
        assert time.process_time() - start < 5
    (tmp_path / "mark.yaml").write_text(TINY, encoding="utf-8-sig")
    assert load(tmp_path / "mark.yaml").recipe == parse("\ufeff" + TINY).recipe == parse(TINY).recipe


def test_the_longest_file_that_is_read_is_refused_in_time() -> None:
    """The parser's worst cases, at the limit."""
    for text in (
        "#\n" * (MOST_TEXT // 2),
        "\n" * MOST_TEXT,
        "a: '" + "x\n" * (MOST_TEXT // 2),
        "a: " + "x" * MOST_TEXT,
    ):
        refusal(text[:MOST_TEXT])


OWN = """\
from pathlib import Path
Path(__file__).with_name("canary").touch()
from torch import nn
def build(num_classes=10):
    stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU())
    return nn.Sequential(stem, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, num_classes))
def several(num_classes=10):
    class Several(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = build(num_classes)
        def forward(self, x):
            return {"logits": self.body(x), "more": x.mean()}
    return Several()
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package of somebody's, which leaves a trace when it is imported; the folder it lies in."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "somebodys"]:
        monkeypatch.delitem(sys.modules, name)
    (tmp_path / "somebodys").mkdir()
    (tmp_path / "somebodys" / "__init__.py").touch()
    (tmp_path / "somebodys" / "models.py").write_text(OWN)
    text = TINY.replace("model: resnet10t", "model: somebodys.models:build").partition("pairs:")[0]
    losses = "{task: {loss: cross_entropy}, soft: {loss: soft_targets}}"
    (tmp_path / "r.yaml").write_text(f"{text}stages:\n  - epochs: 1\n    losses: {losses}\n")
    return tmp_path


def command(folder: Path, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", ["probe-kd", *arguments])
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry not in ("", str(folder))])
    try:
        main()
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def test_a_recipe_imports_only_what_the_command_line_allows(
    own: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    imported = own / "somebodys" / "canary"
    for arguments in ([], ["--allow-import", "somebody"], ["--allow-import", "somebodys.models.deeper"]):
        for verb in ("check", "train"):
            assert command(own, monkeypatch, verb, "r.yaml", *arguments) == 2
            message = capsys.readouterr().err
            assert "r.yaml:5:3: 'somebodys.models:build' would import 'somebodys.models'" in message
            assert "add `--allow-import somebodys` to the command" in message
            assert not imported.exists()
    assert "somebodys" not in sys.modules
    assert {file.name for file in own.iterdir()} == {"somebodys", "r.yaml"}
    for package in ("somebodys", "somebodys.models"):
        assert command(own, monkeypatch, "check", "r.yaml", "--allow-import", "x", "--allow-import", package) == 0
    assert imported.exists()
    assert command(own, monkeypatch, "train", "r.yaml", "-q", "--allow-import", "somebodys") == 0
    assert command(own, monkeypatch, "inspect", "somebodys.models:build", "--input-size", "16") == 0
    capsys.readouterr()
    names = ("--student", "somebodys.models:build", "--teacher", "resnet10t", "--input-size", "32", "-o", "new.yaml")
    assert command(own, monkeypatch, "match", *names, "--level", "block") == 0
    assert "probe-kd train new.yaml --allow-import somebodys\n" in capsys.readouterr().out
    assert (own / "new.yaml").read_text().startswith("# probe-kd train new.yaml --allow-import somebodys\n")


def test_a_saved_student_imports_only_what_the_call_allows(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(own)
    model = timm.create_model("resnet10t", num_classes=3)
    side = {"model": "somebodys.models:build", "model_kwargs": {}, "input_size": [3, 16, 16], "at": "0"}
    for name, about in (("plain", side), ("graft", {"model": "", "graft": {"student": side, "teacher": side}})):
        save_weights(model, own / f"{name}.safetensors", about)
        with pytest.raises(TraceError, match=r"would import 'somebodys\.models'.*allow_import=\['somebodys'\]"):
            load_student(own / f"{name}.safetensors")
        assert not (own / "somebodys" / "canary").exists()
    with pytest.raises(WeightsError, match="does not fit"):
        load_student(own / "plain.safetensors", allow_import="somebodys")
    foreign: list[dict[str, Any]] = [
        {},
        {"model": "resnet10t"},
        {"graft": []},
        {"graft": {"student": {}}},
        {"model": 3},
    ]
    for about in foreign:
        save_weights(model, own / "foreign.safetensors", about)
        with pytest.raises(WeightsError, match="not written by probe-kd"):
            load_student(own / "foreign.safetensors")
    for key in ("pretrained", "checkpoint_path", "model_name"):
        save_weights(model, own / "fetches.safetensors", {"model": "resnet10t", "model_kwargs": {key: "x"}})
        with pytest.raises(TraceError, match=f"`{key}` is no argument of the architecture of resnet10t"):
            load_student(own / "fetches.safetensors")


def test_a_module_beside_the_recipe_does_not_take_the_place_of_a_library(
    own: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (own / "sklearn.py").write_text(OWN)
    for name in [name for name in sys.modules if name.partition(".")[0] == "sklearn"]:
        monkeypatch.delitem(sys.modules, name)
    (own / "plain.yaml").write_text(TINY)
    assert command(own, monkeypatch, "check", "plain.yaml") == 0
    assert not (own / "canary").exists()


def test_a_dataset_is_no_command(canary: Path) -> None:
    """webdataset runs what follows `pipe:`, and hands addresses to a shell."""
    pipe, folder = f"pipe:touch {canary} #", canary.parent
    (folder / "_info.json").write_text(json.dumps({"splits": {"train": {"filenames": [pipe]}}}))
    for place in (f"root: '{pipe}'", f"root: {folder}\n  train_split: '{pipe}.tar'", f"root: {folder}"):
        for kind in ("wds/x", "WDS/x"):
            with pytest.raises(RecipeError, match=r"no folder 'pipe:|not there: '.*pipe:touch"):
                plan(parse(TINY.replace("dataset: sklearn/digits", f"dataset: {kind}\n  {place}")))


@pytest.mark.parametrize("kind", ["endless", "fifo", "folder", "huge"])
@pytest.mark.parametrize("name", ["metrics.csv", "summary.json", "layers.json", "manifest.json"])
def test_what_is_no_small_file_in_the_folder_of_a_run_is_not_waited_for(name: str, kind: str, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(TINY)
    file = tmp_path / name
    match kind:
        case "endless":
            file.symlink_to("/dev/zero")
        case "fifo":
            os.mkfifo(file)
        case "folder":
            file.mkdir()
        case _:
            file.touch()
            os.truncate(file, MOST_BYTES + 1)
    begun = time.process_time()
    with suppress(RunError):  # what is damaged may also be told as a remark
        assert compare([tmp_path]).notes
    with pytest.raises(OSError, match=r"regular file|larger than"):
        whole_text(file)
    assert time.process_time() - begun < 5


@pytest.mark.parametrize(
    "name", ["..yaml", "...yaml", ".yaml", "=x.yaml", "a\nb.yaml", "[red]x.yaml", "x" * 120 + ".yaml"]
)
def test_the_folder_of_a_run_is_named_like_a_recipe(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / name).write_text(TINY)
    assert command(tmp_path, monkeypatch, "train", name) == 2
    assert "name it by --out" in capsys.readouterr().err
    assert [file.name for file in tmp_path.iterdir()] == [name]


def test_a_pickle_that_runs_code_is_no_checkpoint(
    canary: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, write in (
        ("zip.pth", lambda path: torch.save({"state_dict": {"fc.weight": Canary(canary)}}, path)),
        ("bare.pth", lambda path: path.write_bytes(pickle.dumps(Canary(canary), protocol=2))),
        ("new.pth", lambda path: path.write_bytes(pickle.dumps(Canary(canary)))),
        ("renamed.safetensors", lambda path: torch.save(Canary(canary), path)),
    ):
        write(tmp_path / name)
        (tmp_path / "r.yaml").write_text(TINY.replace("train: {epochs: 1}", f"checkpoint: {name}"))
        assert command(tmp_path, monkeypatch, "check", "r.yaml") == 2
        message = capsys.readouterr().err
        assert f"r.yaml:6:3: cannot read the checkpoint '{name}'" in message
        assert "set to `False`" not in message
        assert "posix.system" in message or name != "zip.pth"


def test_what_is_no_state_dict_is_no_checkpoint(tmp_path: Path) -> None:
    header = json.dumps({"a": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}).encode()
    files = {
        "huge.safetensors": (2**63).to_bytes(8, "little") + b"{}",
        "long.safetensors": (2**27).to_bytes(8, "little") + b"{" + b" " * 100,
        "beyond.safetensors": len(header).to_bytes(8, "little") + header,
        "empty.pth": b"",
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
        for read in (read_weights, load_student):
            with pytest.raises(WeightsError, match="cannot read"):
                read(tmp_path / name)
    for name, content in (("number.pth", {"state_dict": {"a": 3}}), ("list.pth", {"a": [torch.zeros(1)]})):
        torch.save(content, tmp_path / name)
        with pytest.raises(WeightsError, match=r"'a' in it is a (int|list), and no tensor"):
            read_weights(tmp_path / name)
    save_file({"a": torch.zeros(1)}, tmp_path / "deep.safetensors", {"model": "[" * 100_000})
    with pytest.raises(WeightsError, match="cannot read"):
        load_student(tmp_path / "deep.safetensors")


ALONE = """\
student: {model: resnet10t, model_kwargs: {channels: [8, 8, 8, 8]}}
data: {dataset: sklearn/digits, input_size: [3, 8, 8], batch_size: 1024}
stages: [{epochs: 2, losses: {task: {loss: cross_entropy}}}]
"""


class Stop(Progress):
    def epoch(self, row: dict[str, Any]) -> None:
        raise KeyboardInterrupt


def sign(folder: Path, name: str) -> None:
    """As whoever changes a file of a checkpoint can."""
    manifest = json.loads((folder / "manifest.json").read_text())
    content = (folder / name).read_bytes()
    manifest[name] = [len(content), hashlib.sha256(content).hexdigest()]
    (folder / "manifest.json").write_text(json.dumps(manifest))


def test_a_run_does_not_go_on_from_code(canary: Path, tmp_path: Path) -> None:
    """Into each file that accelerate writes; of random numbers that it cannot read, it would say nothing."""
    (tmp_path / "r.yaml").write_text(ALONE)
    planned = plan(load(tmp_path / "r.yaml"))
    with pytest.raises(KeyboardInterrupt):
        train(planned, tmp_path / "run", Stop(Console(quiet=True)))
    folder = max(file.parent for file in (tmp_path / "run").rglob("optimizer.bin"))
    check_state(folder)  # what accelerate wrote is data
    for name in ("pytorch_model.bin", "optimizer.bin", "random_states_0.pkl"):
        written = (folder / name).read_bytes()
        torch.save({"random_state": Canary(canary)}, folder / name)
        sign(folder, name)
        with pytest.raises(WeightsError, match=f"cannot go on from .*{name}.*posix.system"):
            check_state(folder)
        with pytest.raises(WeightsError, match=f"cannot go on from .*{name}"):
            train(planned, tmp_path / "run", Progress(Console(quiet=True)), resume=True)
        (folder / name).write_bytes(written)
        sign(folder, name)


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("epochs: 2", "epochs: 2\n    optimizer: {opt_args: {betta: 1}}", "optimizer `adamw` does not take betta=1"),
        ("epochs: 2", "epochs: 2\n    optimizer: {opt_args: {betas: [0.9, 3]}}", "does not take betas=[0.9, 3]"),
        ("epochs: 2", "epochs: 2\n    optimizer: {opt_args: {betas: [0.9]}}", "does not take betas=[0.9]"),
        ("epochs: 2", "epochs: 2\n    optimizer: {opt_args: {amsgrad: no}}", "`amsgrad` of optimizer `adamw` is 'no'"),
        (
            "{epochs: 1}",
            "{epochs: 1, optimizer: {opt: lamb, opt_args: {eps: x}}}",
            "6:45: `eps` of optimizer `lamb` is the text 'x'; expected a number",
        ),
        ("{epochs: 1}", "{epochs: 1, optimizer: {opt: lamb, opt_args: {betas: 3}}}", "6:45: optimizer `lamb` does not"),
        ("hflip: 0.0", "aa: nonsense", "r.yaml:11:3: the images cannot be transformed"),
        ("hflip: 0.0", "aa: rand-m9-x5", "the images cannot be transformed"),
        ("hflip: 0.0", "ratio: [0, 1]", "r.yaml:11:3: `data.ratio`: [0, 1]: expected [least, most], both above 0"),
        ("depth: 2", "depth: 2, features_only: true, out_indices: 2", "the student vit_tiny_patch16_224 gives several"),
        ("train: {epochs: 1}", "train: {epochs: 1}\n  class_map: /dev/zero", "leave `class_map` out"),
        ("train: {epochs: 1}", "pretrained: true\n  class_map: /dev/zero", "it is no regular file"),
        ("train: {epochs: 1}", "train: {epochs: 1}\n  cache: /dev/null/x", "7:3: `cache`: '/dev/null' is no folder"),
        ("train: {epochs: 1}", "train: {epochs: 1}\n  cache: " + "x" * 300, "no folder can be called"),
        ("train: {epochs: 1}", "train: {epochs: 1}\n  cache: x\n  cache_top_k: 11", "teacher has 10 logits, got 11"),
        ("hflip: 0.0", "crop_pct: 1.0e-9", "expected a number greater than or equal to 0.1"),
    ],
    ids=lambda value: value[-30:],
)  # fmt: skip
def test_what_training_would_refuse_is_refused_by_the_plan(old: str, new: str, says: str) -> None:
    assert TINY.count(old) == 1
    with pytest.raises(RecipeError) as caught:
        plan(parse(TINY.replace(old, new), "r.yaml"))
    assert says in str(caught.value)


def test_a_model_that_gives_a_dict_is_refused_by_the_plan(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(own)
    text = (own / "r.yaml").read_text().replace("build", "several")
    with pytest.raises(RecipeError, match=r"the teacher somebodys.*gives several tensors \(\[logits\], \[more\]\)"):
        plan(parse(text), allow_import=["somebodys"])


def test_hints_of_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(tmp_path, monkeypatch, "inspect", "mymod.nets.Net") == 2
    assert "a function or class of your own is written `mymod.nets:Net`" in capsys.readouterr().err
    names = ("--student", "resnet10t", "--teacher", "resnet10t")
    assert command(tmp_path, monkeypatch, "match", *names, "-o", str(tmp_path)) == 2
    assert f"is a folder; name the recipe in it, as in {tmp_path}/distil.yaml" in capsys.readouterr().err


pieces = st.lists(
    st.sampled_from([*"[]{}:,-#&*!|>'\"%@`?\n \t", "a", "0", ": ", "- ", "&a ", "*a", "<<: ", "\\x", "!!"])
)


@settings(max_examples=300, deadline=None)
@given(st.text() | pieces.map("".join))
def test_no_text_makes_the_loader_fail(text: str) -> None:
    with pytest.raises(RecipeError):
        parse(text)


@settings(max_examples=60, deadline=None)
@given(st.text() | pieces.map("".join), st.text() | pieces.map("".join))
def test_no_option_makes_the_loader_fail(path: str, value: str) -> None:
    for option in (path, f"stages.0.{path}={value}", f"stages={value}"):
        try:
            parse(TINY, sets=[option])
        except RecipeError as refusal:
            str(refusal).encode()


@pytest.mark.parametrize("pattern", ["(.+)+x", "(?:a|a)*b", r"(.)\1{99}", ".?" * 99 + "Z", "a{9}{9}{9}{9}", "(" * 150])
def test_no_pattern_searches_for_ever(pattern: str) -> None:
    named = "  blocks.0: layer2\n  blocks.1: layer3\n"
    assert TINY.count(named) == 1
    start = time.process_time()
    with pytest.raises(RecipeError, match=r"r.yaml:13:3: .*(no module of vit|is no regular expression of RE2)"):
        plan(parse(TINY.replace(named, f"  're:{pattern}': layer2\n"), "r.yaml"))
    assert time.process_time() - start < 15


SPELLS = "\x1b]0;TITLE\x07\x1b[31m\r\u202e\u2066\x9b31m\x7f\ud800"


def shown_safely(text: str) -> None:
    text.encode()
    assert not {*"\x1b\x07\r\u202e\u2066\x9b\x7f\ud800"} & {*text}


def test_what_is_shown_has_no_control_characters(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "r.yaml").write_bytes(b"student: {model: resnet10t} # \x1b]0;TITLE\x07\n")
    name = os.fsencode(tmp_path) + b"/x\x1b]0;T\x07\xff\n.yaml"
    Path(os.fsdecode(name)).write_text("a: 1")
    for arguments in (["check", "r.yaml"], ["check", os.fsdecode(name)], ["inspect", f"resnet{SPELLS}"]):
        assert command(tmp_path, monkeypatch, *arguments) == 2
        shown_safely(capsys.readouterr().err)
    for kind in (TapError, RecipeError):
        shown_safely(
            str(kind(SPELLS, [Problem(SPELLS, 1, 300, SPELLS)], SPELLS * 99) if kind is RecipeError else kind(SPELLS))
        )
    assert str(TapError("a\x1b[1mb")) == "a␛[1mb"
    stream = io.StringIO()
    table = Table(SPELLS)
    table.add_row(SPELLS)
    for part in (SPELLS, Text(SPELLS), table):
        PlainConsole(file=stream, width=200).print(part, markup=False)
    shown_safely(stream.getvalue())
    PlainConsole(file=stream, force_terminal=True, color_system="standard").print("[red]x", end="")
    assert stream.getvalue().endswith("\x1b[31mx\x1b[0m")  # what rich itself says is left


def test_no_cell_of_a_table_is_a_formula(tmp_path: Path) -> None:
    write_metrics([{"role": "=1+1", "@x": "+1", "a": -1.5, "b": "-1", "c": "a\x1b"}], tmp_path / "m.csv")
    assert (tmp_path / "m.csv").read_text() == "role,'@x,a,b,c\n'=1+1,'+1,-1.5,'-1,a␛\n"


SECRET = "s3cret"


@pytest.mark.parametrize(
    "content",
    [
        "root:x:0:0:s3cret:/root\n",
        "password: s3cret\n",
        "data: {password: s3cret}\nkind: Secret\n",
        "[s3cret]",
        "s3cret",
        "",
        "a: *s3cret\n",
        "stages: [\n s3cret",
        "\0s3cret",
        "3",
    ],
)
def test_of_a_file_that_is_no_recipe_nothing_is_shown(content: str, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text(content)
    (tmp_path / "r.yaml").write_text(f"extends: secret\n{TINY}")
    with pytest.raises(RecipeError, match=r"r.yaml:1:1: `extends`: '.*secret' is no recipe; `probe-kd check") as caught:
        load(tmp_path / "r.yaml")
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize(
    "place", ["/dev/zero", "/dev/stdin", "fifo", ".", "nowhere", "loop", "/proc/self/environ", "x" * 999]
)
def test_what_is_no_small_file_extends_nothing(place: str, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "r.yaml").write_text(f"extends: {place}\n{TINY}")
    with pytest.raises(RecipeError, match=r"r.yaml:1:1: (cannot read|`extends`: .* is no recipe)"):
        load(tmp_path / "r.yaml")


@settings(max_examples=500, deadline=None)
@given(st.text() | st.text("ab.#@[]0123456789 input", max_size=20))
def test_a_tap_is_refused_or_reads_back(text: str) -> None:
    try:
        tap = Tap.parse(text)
    except TapError:
        return
    assert Tap.parse(str(tap)) == tap
