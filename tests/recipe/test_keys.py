"""Recipes: every problem at once, each with its line and what to write instead."""

import copy
import json
import pickle
import re
from collections.abc import Iterator
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from conftest import GRAFT
from conftest import WHOLE as TINY
from ruamel.yaml import YAML
from safetensors.torch import save_file

from probe_kd.errors import RecipeError
from probe_kd.recipe.planner import plan
from probe_kd.recipe.reading import load, parse
from probe_kd.recipe.schema import DESCRIPTIONS, schema
from probe_kd.recipe.writing import dump

# (what to replace, by what, the line of the problem, what the message has to say)
FORM = [
    ("epochs: 1\n    losses", "epoch: 1\n    losses", 18, "unknown key `epoch`; did you mean 'epochs'"),
    ("epochs: 2", "epochs: 0", 22, "greater than or equal to 1, got 0"),
    ("epochs: 2", "epochs: two", 22, "got 'two'"),
    ("pairs:\n  blocks.0: layer2\n  blocks.1: layer3", "pairs: automatic", 12, "expected `auto`"),
    ("pairs:\n  blocks.0: layer2\n  blocks.1: layer3", "pairs: {level: stages}", 12, "'stage' or 'block'"),
    ("pairs:\n  blocks.0: layer2\n  blocks.1: layer3", "pairs: {level: block, num: 3}", 12, "did you mean 'num_pairs'"),
    ("train: {epochs: 1}", "train: {epochs: 1, lr: 3}", 6, "unknown key `lr`"),
    ("normalize: layer", "normalize: batch", 20, "'channel', 'fitted' or 'phi_s', got 'batch'"),
    ("input_size: [3, 16, 16]", "input_size: 16", 9, "data.input_size"),
    ("stages:", "stage:", 16, "unknown key `stage`; did you mean 'stages'"),
    ("hflip: 0.0", "hflip: [", 13, "not YAML"),
    ("hflip: 0.0", "hflip: 0.0\n  hflip: 0.1", 12, "duplicate key"),
    ("weight: 0.5", "weight: !!python/object/apply:os.system [ls]", 25, "leave it out"),
]
MEANING = [
    ("model: resnet10t", "model: resnet10tt", 5, "timm has no model 'resnet10tt'; did you mean 'resnet10t'"),
    ("model: resnet10t", "model: os:getcwd", 5, "would import 'os'"),
    (
        "depth: 2",
        "depht: 2",
        3,
        "`depht` is no argument of the architecture of vit_tiny_patch16_224; did you mean 'depth'",
    ),
    ("blocks.0: layer2", "blocks.0: layer9", 13, "has no module 'layer9'; did you mean"),
    ("blocks.0: layer2", "blocks.0.attn.attn_drop: layer2", 13, "never fires"),
    ("blocks.0: layer2", "block.0: layer2", 13, "did you mean 'blocks.0'"),
    ("blocks.0: layer2", "blocks.0[: layer2", 13, "is not a tap"),
    ("loss: hint", "loss: hints", 20, "there is no loss 'hints'; did you mean 'hint'"),
    ("temperature: 2.0", "temprature: 2.0", 25, "no option 'temprature'; did you mean 'temperature'"),
    ("dataset: sklearn/digits", "dataset: sklearn/digit", 8, "there is 'sklearn/digits'"),
    ("dataset: sklearn/digits", "dataset: torch/cifar1000", 8, "did you mean 'torch/cifar100'"),
    ("dataset: sklearn/digits", "root: nowhere", 8, "there is no folder 'nowhere'"),
    ("train: {epochs: 1}", "input_size: [3, 16, 16]", 5, "random weights"),
    ("train: {epochs: 1}", "checkpoint: nowhere.pth", 6, "there is no checkpoint 'nowhere.pth'"),
    ("train: {epochs: 1}", "train: {epochs: 1}\n  model_kwargs: {num_classes: 7}", 5, "has 7 classes and the data 10"),
    ("pairs:\n  blocks.0: layer2\n  blocks.1: layer3\n", "", 17, "let match find them"),
    ("task: {loss: cross_entropy}", "task: {loss: logits}", 15, "the baseline has no loss"),
    ("hint: {loss: hint", "loss: {loss: hint", 20, "cannot be named 'loss'"),
    ("hint: {loss: hint", "lr: {loss: hint", 20, "a column of that name"),
    ("temperature: 2.0", "temperature: 0", 25, "has to be positive"),
    ("temperature: 2.0", "temperature: hot", 25, "temperature is 'hot'; expected a finite number"),
    ("temperature: 2.0", "standardize: no", 25, "standardize is 'no'; expected true or false; did you mean false?"),
    ("weight: 0.5", "weight: .nan", 25, "expected a finite number"),
    ("weight: 0.5", "weight: -0.5", 25, "`stages.1.losses.soft.weight`: expected a number greater than or equal to 0"),
    ("weight: 0.5", "weight: {start: 1, end: -2}", 25, "greater than or equal to 0, got -2"),
    ("temperature: 2.0", "wieght: 2.0", 25, "no option 'wieght'; did you mean 'weight'"),
    (
        "{loss: cross_entropy}",
        "{loss: cross_entropy, label_smoothing: 7}",
        24,
        "label_smoothing 7; expected a share between",
    ),
    ("epochs: 2", "epochs: 2\n    optimizer: {opt: adamww}", 23, "no optimizer 'adamww'; did you mean 'adamw"),
    (
        "epochs: 2",
        "epochs: 2\n    scheduler: {warmup_epochs: 2}",
        23,
        "2 epochs of warm-up leave nothing of 2",
    ),
    (
        "epochs: 2",
        "epochs: 2\n    scheduler: {warmup_epochs: 1.9}",
        23,
        "all 10 updates (1437 images, 256 a batch) lie in the warm-up",
    ),
    ("epochs: 2", "epochs: 2\n    scheduler: {sched: step}", 23, "a step every 30 epochs is never taken in 2"),
    (
        "epochs: 2",
        "epochs: 2\n    scheduler: {sched: multistep, decay_milestones: [2, 3]}",
        23,
        "no milestone of [2, 3]",
    ),
    ("weight: 0.5", "weight: {start: 1, end: 0, epochs: 3}", 25, "a schedule of 3 epochs does not end in the 2"),
    ("temperature: 2.0", "temperature: {start: 1, end: 4, epochs: 3}", 25, "a schedule of 3 epochs does not end"),
    ("layer}", "layer, weight: 0}", 19, "every loss of stage `hint` weighs 0, so that it trains nothing"),
    ("layer}", "layer, weight: {start: 0, end: 0}}", 19, "every loss of stage `hint` weighs 0"),
    ("hint: {loss: hint, normalize: layer}", "h: {loss: cross_entropy}", 13, "no loss compares blocks.0 <- layer2"),
    ("hint: {loss: hint, normalize: layer}", "h: {loss: fsp, between: [[blocks.0, blocks.2]]}", 20, "is in no pair"),
    ("blocks.0: layer2", "blocks.1@output: layer2", 14, "'blocks.1' is in two pairs: `blocks.1@output` has it too"),
    (
        "blocks.0: layer2",
        "glob:blocks.?: layer2",
        13,
        "'glob:blocks.?' finds 2: `blocks.0`, `blocks.1`; and 'layer2' finds 1",
    ),
    ("blocks.0: layer2", "glob:block.?: layer2", 13, "matches 'glob:block.?'; did you mean 'blocks."),
    (
        "blocks.0: layer2",
        "glob:*.attn_drop: layer2",
        13,
        "none of them yields a tensor there: 'blocks.0.attn.attn_drop' never",
    ),
    ("blocks.0: layer2", "blocks.0: re:layer2#7", 13, "yields no tensor at 'layer2#7'"),
    ("blocks.0: layer2", "blocks.0: 're:layer('", 13, "is no regular expression"),
    ("blocks.0: layer2", "blocks.0: 're:(?=l)2'", 13, "is no regular expression of RE2"),
    ("blocks.0: layer2", "blocks.0: glob:" + "*" * 1001, 13, "a pattern of 1001 characters"),
    (
        "num_heads: 2",
        "num_heads: 2, qkv_bias: no",
        3,
        "`qkv_bias` of vit_tiny_patch16_224 is 'no'; expected true or false; did you mean false?",
    ),
    (
        "num_heads: 2",
        "num_heads: 2, qkv_bias: [false]",
        3,
        "`qkv_bias` of vit_tiny_patch16_224 is [False]; expected true",
    ),
    ("num_heads: 2", "num_heads: 2, mlp_ratio: 1.0e+9", 3, "expected no number above 10000000"),
    ("blocks.0: layer2", "blocks.0: {teacher: layer2, weight: -1}", 13, "greater than or equal to 0, got -1"),
    ("blocks.0: layer2", "blocks.0: {teacher: layer2, wieght: 1}", 13, "unknown key `wieght`; did you mean 'weight'"),
    ("blocks.0: layer2", "blocks.0: {weight: 2}", 13, "`pairs.blocks.0.teacher` is missing; expected text"),
    (
        "blocks.0: layer2",
        "blocks.0: {teacher: layer2, tokens: none}",
        13,
        "expected 'drop', 'cls', 'pool', 'all' or 'flatten', got 'none'",
    ),
    ("blocks.0: layer2", "patch_embed: {teacher: layer2, tokens: cls}", 13, "neither 'patch_embed' nor 'layer2' has"),
    ("num_heads: 2", "num_heads: 2, num_classes: 7", 3, "the student's classifier has 7 classes and the data 10"),
    ("train: {epochs: 1}", "train: {epochs: 1}\n  class_map: [0]", 7, "leave `class_map` out"),
    ("hflip: 0.0", "hflip: 0.0\n  mean: [0.1, 0.2]", 7, "expected 1 or 3 values"),
]


@pytest.mark.parametrize(("old", "new", "line", "says"), FORM + MEANING, ids=lambda value: str(value)[:30])
def test_each_mistake_is_named_at_its_line(old: str, new: str, line: int, says: str) -> None:
    assert TINY.count(old) == 1 or old == "loss: hint" or old.startswith("model")
    with pytest.raises(RecipeError) as caught:
        plan(parse(TINY.replace(old, new, 1) if not old.startswith("model: res") else TINY.replace(old, new)))
    problems = caught.value.problems
    assert any(problem.line == line and says in problem.message for problem in problems), str(caught.value)


def test_all_mistakes_are_told_at_once_with_the_place_and_a_caret() -> None:
    text = TINY.replace("blocks.0: layer2", "blocks.7: layer2").replace("blocks.1: layer3", "blocks.1: layer33")
    text = text.replace("temperature: 2.0", "temperature: 2.0, reduction: sum").replace(
        "train: {epochs: 1}", "checkpoint: x"
    )
    with pytest.raises(RecipeError) as caught:
        plan(parse(text, "my.yaml"))
    assert [problem.line for problem in caught.value.problems] == [6, 13, 14, 25]
    assert "my.yaml:13:3: " in str(caught.value)
    assert "\n      blocks.7: layer2\n      ^" in str(caught.value)
    again = pickle.loads(pickle.dumps(caught.value))  # as from one process to another
    assert (str(again), again.problems) == (str(caught.value), caught.value.problems)


def test_every_stage_and_every_pair_has_its_mistakes_told_at_once() -> None:
    """Also those that one could hide: the other side of a pair, the other pairs of a loss, adapters."""
    text = TINY.replace("blocks.0: layer2", "blocks.7: layer7").replace(
        "blocks.1: layer3", "blocks.1: {teacher: layer3, policy: never}"
    )
    text = text.replace("pairs:\n", "pairs:\n  patch_embed: {teacher: layer1, tokens: cls}\n").replace(
        "hflip: 0.0", "aa: x"
    )
    text = text.replace("epochs: 1\n    losses", "epochs: 1\n    optimizer: {opt_args: {beta: 1}}\n    losses")
    text = text.replace("temperature: 2.0", "temperature: 0").replace(
        "epochs: 2", "epochs: 2\n    scheduler: {warmup_epochs: 2}"
    )
    with pytest.raises(RecipeError) as caught:
        plan(parse(text))
    lines = [problem.line for problem in caught.value.problems]
    assert lines == [11, 13, 14, 14, 15, 20, 25, 28], str(caught.value)


def test_a_pair_says_how_much_it_weighs_and_how_it_is_brought_together() -> None:
    long = "{teacher: layer2, weight: 3, policy: fixed}"
    text = TINY.replace("blocks.0: layer2", f"blocks.0: {long}").replace("blocks.1: layer3", "blocks.1: layer3@input")
    planned = plan(parse(text))
    (hint,) = planned.objectives[0]
    assert [pair.weight for pair in planned.pairs] == [comparison.weight for comparison in hint.comparisons] == [3, 1]
    assert {row.objective.name for row in planned.comparisons} == {"hint", "soft"}
    adapters = [row.adapter for row in planned.comparisons if row.objective is hint]
    assert "fixed" in adapters[0]
    assert "fixed" not in adapters[1]
    assert "conv1x1 32->128" in adapters[1]  # what layer3 is given is of layer2
    again = plan(parse(dump(planned.resolved)))
    assert (again.pairs, again.comparisons) == (planned.pairs, planned.comparisons)


def test_a_teacher_that_no_loss_reads_is_remarked_on() -> None:
    alone = ["pairs={}", "stages=[{epochs: 1, losses: {task: {loss: cross_entropy}}}]"]
    (remark,) = plan(parse(TINY, sets=alone)).remarks
    assert remark.startswith("no loss reads the teacher: it is trained and compared with")
    assert plan(parse(TINY)).remarks == []


def test_a_pair_that_weighs_nothing_is_measured_only() -> None:
    text = TINY.replace("blocks.0: layer2", "blocks.0: {teacher: layer2, weight: 0}")
    planned = plan(parse(text))
    assert [str(pair.student) for pair in planned.pairs] == ["blocks.0", "blocks.1"]
    assert [str(pair.student) for pair in planned.objectives[0][0].pairs] == ["blocks.1"]
    assert plan(parse(dump(planned.resolved))).pairs == planned.pairs


@pytest.mark.parametrize(
    ("entry", "pairs"),
    [
        ("glob:blocks.?: glob:layer[23]", ["blocks.0 <- layer2", "blocks.1 <- layer3"]),
        ("re:blocks\\.[01]: 're:layer(2|4)'", ["blocks.0 <- layer2", "blocks.1 <- layer4"]),
        (
            "glob:blocks.?@input: glob:layer[12]@input",
            ["blocks.0@input <- layer1@input", "blocks.1@input <- layer2@input"],
        ),
        ("glob:*.1: layer3", ["blocks.1 <- layer3"]),
        ("blocks.1: glob:layer2.*.act1#0", ["blocks.1 <- layer2.0.act1"]),
        (
            "glob:blocks.?.norm1: re:layer[34]\\.0\\.bn2",
            ["blocks.0.norm1 <- layer3.0.bn2", "blocks.1.norm1 <- layer4.0.bn2"],
        ),
    ],
)
def test_patterns_stand_for_the_layers_that_a_loop_by_hand_finds(entry: str, pairs: list[str]) -> None:
    planned = plan(parse(TINY.replace("  blocks.0: layer2\n  blocks.1: layer3", f"  {entry}")))
    assert [str(pair) for pair in planned.pairs] == pairs
    again = plan(parse(dump(planned.resolved)))
    assert (again.pairs, again.expansions) == (planned.pairs, ())


def test_a_pattern_finds_in_a_graft_only_what_is_left_of_the_student() -> None:
    text = GRAFT.replace("stages:", "pairs: {'glob:blocks.?': layer2}\nstages:") + "      more: {loss: hint}\n"
    assert [str(pair) for pair in plan(parse(text)).pairs] == ["body.blocks.1 <- layer2"]
    with pytest.raises(RecipeError, match="the graft puts the teacher's layers in the place"):
        plan(parse(text.replace("'glob:blocks.?'", "patch_embed")))


def test_all_mistakes_of_form_are_told_together_each_once() -> None:
    text = TINY.replace("epochs: 1\n    losses", "epoch: 1\n    losses").replace("hflip: 0.0", "hflip: .nan")
    text = text.replace("  model: resnet10t\n", "").replace("baseline: true", "baseline: 1")
    text = text.replace("epochs: 2", "epochs: '2'")
    with pytest.raises(RecipeError) as caught:
        parse(text, "my.yaml")
    assert str(caught.value).splitlines()[::3] == [
        "my.yaml:4:1: `teacher.model` is missing; expected text",
        "my.yaml:10:3: `data.hflip`: expected a finite number, got nan",
        "my.yaml:14:1: `baseline`: expected true or false, got 1",
        "my.yaml:17:5: unknown key `epoch`; did you mean 'epochs'?",
        "my.yaml:21:5: `stages.1.epochs`: expected a whole number, got '2'",
    ]


def told(text: str) -> list[str]:
    """The problems of a recipe that is read and planned, without their places in the file."""
    with pytest.raises(RecipeError) as caught:
        plan(parse(text, "my.yaml", tolerant=True))
    return [problem.message.partition(";")[0] for problem in caught.value.problems]


FORM_AND_MEANING = {
    "numbers hide nothing": (
        [("batch_size: 256", "batch_size: -3"), ("resnet10t", "resnet10x"), ("loss: hint", "loss: hintt")],
        [
            "timm has no model 'resnet10x'",
            "`data.batch_size`: expected a number greater than or equal to 1, got -3",
            "there is no loss 'hintt'",
        ],
    ),
    "layers are looked for beside a wrong number": (
        [("epochs: 2", "epochs: 0"), ("blocks.1: layer3", "blocks.1: layer7")],
        [
            "resnet10t has no module 'layer7'",
            "`stages.1.epochs`: expected a number greater than or equal to 1, got 0",
        ],
    ),
    "a teacher that is misspelt is not also missing": (
        [("teacher:", "techer:"), ("loss: soft_targets", "loss: soft_target")],
        ["unknown key `techer`", "there is no loss 'soft_target'"],
    ),
    "data that cannot be read are not also without classes": (
        [("dataset: sklearn/digits", "dataset: 3"), ("resnet10t", "resnet10x")],
        ["timm has no model 'resnet10x'", "`data.dataset`: expected text, got 3"],
    ),
    "what is wrong inside of what is wrong goes with it": (
        [("hflip: 0.0", "hflip: 0.0\n  scale: [null]"), ("resnet10t", "resnet10x")],
        [
            "timm has no model 'resnet10x'",
            "`data.scale`: a value is missing",
            "`data.scale.0`: expected a number, got null",
        ],
    ),
    "a schedule is not measured by an epoch count that is wrong": (
        [("epochs: 2", "epochs: -1\n    scheduler: {warmup_epochs: 1}"), ("baseline: true", "trackers: [tensorbord]")],
        [
            "accelerate has no tracker 'tensorbord'",
            "`stages.1.epochs`: expected a number greater than or equal to 1, got -1",
        ],
    ),
}


@pytest.mark.parametrize(("changes", "expected"), FORM_AND_MEANING.values(), ids=FORM_AND_MEANING)
def test_mistakes_of_form_and_of_meaning_are_told_together_without_what_follows_from_them(
    changes: list[tuple[str, str]], expected: list[str]
) -> None:
    text = TINY
    for before, after in changes:
        assert before in text
        text = text.replace(before, after)
    assert told(text) == expected


CHILD = """\
extends: base.yaml
data: {batch_size: 128, hflip: 0.25}
pairs: {blocks.1: layer4}
stages:
  - epochs: 3
    losses: {task: {loss: cross_entropy}, hint: {loss: hint}}
"""


def test_what_a_recipe_extends_is_merged_and_a_list_replaced(tmp_path: Path) -> None:
    (tmp_path / "bases").mkdir()
    (tmp_path / "bases" / "tiny.yaml").write_text(TINY)
    (tmp_path / "base.yaml").write_text("extends: bases/tiny.yaml\nteacher: {train: {epochs: 4}}\nseed: 3\n")
    (tmp_path / "child.yaml").write_text(CHILD)
    by_hand = TINY.replace("batch_size: 256", "batch_size: 128").replace("hflip: 0.0", "hflip: 0.25")
    by_hand = by_hand.replace("train: {epochs: 1}", "train: {epochs: 4}").replace(
        "blocks.1: layer3", "blocks.1: layer4"
    )
    by_hand = by_hand.partition("stages:")[0] + "seed: 3\n" + "\n".join(CHILD.splitlines()[3:])
    assert load(tmp_path / "child.yaml").recipe == parse(by_hand).recipe


def test_a_mistake_is_told_in_the_file_that_made_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    base = TINY.replace("hflip: 0.0", "hflip: 9\n  vflop: 1")
    Path("base.yaml").write_text(base)
    Path("child.yaml").write_text(CHILD.replace("batch_size: 128", "batch_size: 0"))
    with pytest.raises(RecipeError) as caught:
        load("child.yaml", sets=["teacher.train.epochs=0"])
    assert str(caught.value).splitlines() == [
        "child.yaml:2:8: `data.batch_size`: expected a number greater than or equal to 1, got 0",
        "    data: {batch_size: 0, hflip: 0.25}",
        "           ^",
        "--set teacher.train.epochs: `teacher.train.epochs`: expected a number greater than or equal to 1, got 0",
        "    teacher.train.epochs=0",
        "    ^",
        "base.yaml:12:3: unknown key `vflop`; did you mean 'vflip' or 'hflip'?",
        "      vflop: 1",
        "      ^",
    ]
    Path("child.yaml").write_text(CHILD)
    Path("base.yaml").write_text(TINY.replace("blocks.0: layer2", "blocks.9: layer2"))
    with pytest.raises(RecipeError, match=r"base.yaml:13:3: .* no module 'blocks.9'.*\n      blocks.9: layer2\n"):
        plan(load("child.yaml"))


def test_recipes_that_extend_each_other_for_ever_are_refused_with_the_chain(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, base in (("a", "b"), ("b", "./c"), ("c", "b"), ("self", "self"), ("gone", "slef"), ("number", "[x")):
        Path(f"{name}.yaml").write_text(f"seed: 1\nextends: {base}.yaml\n")
    for number in range(12):
        Path(f"{number}.yaml").write_text(f"extends: {number + 1}.yaml\n")
    cases = {
        "a": "c.yaml:2:1: `extends` goes round: a.yaml -> b.yaml -> c.yaml -> b.yaml",
        "self": "self.yaml:2:1: `extends` goes round: self.yaml -> self.yaml",
        "gone": "gone.yaml:2:1: cannot read 'slef.yaml': No such file or directory; did you mean 'self.yaml'",
        "number": "number.yaml:3:1: not YAML",
        "0": "7.yaml:1:1: more than 8 files extend each other: 0.yaml -> 1.yaml -> ",
    }
    for name, says in cases.items():
        with pytest.raises(RecipeError) as caught:
            load(f"{name}.yaml")
        assert says in str(caught.value)
    for value in ("3", "[a.yaml]", "/dev/zero", '"x\\0"'):
        with pytest.raises(RecipeError, match=r"expected the path of a recipe|no regular file|null"):
            parse(f"extends: {value}")


SETS = [
    ("stages.0.epochs=5", "stages", 0, "epochs", 5),
    ("stages.1.optimizer.lr=1e-2", "stages", 1, "optimizer", "lr", 0.01),
    ("stages.1.losses.soft.weight={start: 4, end: 1}", "stages", 1, "losses", "soft", "weight", "start", 4.0),
    ("model_ema.decay=0.5", "model_ema", "decay", 0.5),
    ("data.input_size.0=1", "data", "input_size", 0, 1),
    ('pairs."blocks.0"=layer4', "pairs", "blocks.0", "layer4"),
    ("pairs.blocks.0=layer4", "pairs", "blocks.0", "layer4"),
    ('stages.0.optimizer.lr_scale."blocks.0.attn"=0.5', "stages", 0, "optimizer", "lr_scale", "blocks.0.attn", 0.5),
    ("teacher.checkpoint=a=b.pth", "teacher", "checkpoint", "a=b.pth"),
    ("teacher.train=null", "teacher", "train", None),
]


@pytest.mark.parametrize("case", SETS, ids=lambda case: str(case[0]))
def test_an_option_sets_one_value_and_leaves_the_rest(case: Any) -> None:
    option, *where, last, value = case
    before, after = (json.loads(parse(TINY, sets=sets).recipe.model_dump_json()) for sets in ([], [option]))
    here = after
    for step in where:
        here = here[step]
    assert here.get(last) == value if isinstance(here, dict) else here[last] == value
    for tree in (before, after):  # all else is as it was
        tree.pop(where[0])
    assert before == after


@pytest.mark.parametrize(
    ("option", "says"),
    [
        ("stages.0.epoch=5", "--set stages.0.epoch: there is no `stages.0.epoch`; did you mean 'epochs'?"),
        ("stage.0.epochs=5", "--set stage.0.epochs: there is no `stage`; did you mean 'stages'"),
        ("stages.2.epochs=5", "there is no `stages.2`: `stages` is a list, `stages.0` to `stages.1`"),
        ("stages.hint.epochs=5", "there is no `stages.hint`: `stages` is a list"),
        ("stages.1.losses.sfot.weight=1", "`stages.1.losses.sfot.loss` is missing; did you mean 'soft'?"),
        ("baseline.x=1", "`baseline` is true, and nothing is under it; set it as a whole: `baseline={...}`"),
        ("stages.0.epochs=five", "`stages.0.epochs`: expected a whole number, got 'five'\n    stages.0.epochs=five"),
        ("stages.0.optimizer={opt: sgd, lrr: 1}", "`stages.0.optimizer.lrr`; did you mean 'lr'?"),
        ("data.hflip=.inf", "`data.hflip`: expected a finite number, got inf"),
        ("data.root=!!python/name:os.system", "tag `!!python/name:os.system`"),
        ("data.root=[" * 20, "not YAML"),
        ("data.root=" + "[" * 99, "more than 32 levels"),
        ("stages.0.epochs", "expected KEY=VALUE"),
        ("=3", "expected KEY=VALUE"),
        ("a..b=3", "expected KEY=VALUE"),
        ("extends=x.yaml", "a file says itself what it extends"),
    ],
)
def test_an_option_that_sets_nothing_is_told_with_the_nearest_that_is_there(option: str, says: str) -> None:
    with pytest.raises(RecipeError) as caught:
        parse(TINY, sets=["seed=7", option])
    assert f"--set {option.partition('=')[0]}"[:9] in str(caught.value)
    assert says in str(caught.value)


def test_a_mistyped_file_name_is_told(tmp_path: Path) -> None:
    (tmp_path / "quick.yaml").write_text(TINY)
    with pytest.raises(RecipeError, match=r"cannot read the recipe: No such file.*did you mean 'quick\.yaml'"):
        load(tmp_path / "quik.yaml")


@pytest.mark.parametrize("text", ["", "- a\n- b\n", "3", "student", "\x00", "a: &a [*a]", "? [1, 2]\n: 3"])
def test_what_is_no_recipe_is_refused_as_one(text: str) -> None:
    with pytest.raises(RecipeError):
        parse(text)


def test_a_recipe_without_a_teacher_trains_on_labels_and_refuses_the_rest() -> None:
    text = TINY.replace("teacher:\n  model: resnet10t\n  train: {epochs: 1}\n", "")
    with pytest.raises(RecipeError) as caught:
        plan(parse(text))
    assert "loss `soft` needs a teacher" in str(caught.value)
    assert "there is no `teacher:` with layers to pair" in str(caught.value)
    for gone in (
        "  - name: hint\n    epochs: 1\n    losses:\n      hint: {loss: hint, normalize: layer}\n",
        "      soft: {loss: soft_targets, temperature: 2.0, weight: 0.5}\n",
        "pairs:\n  blocks.0: layer2\n  blocks.1: layer3\n",
    ):
        assert gone in text
        text = text.replace(gone, "")
    assert plan(parse(text)).teacher is None


def test_a_checkpoint_that_does_not_fit_is_told_with_the_difference(tmp_path: Path) -> None:
    """timm would load the rest and leave the classifier random."""
    torch.manual_seed(0)
    save_file(timm.create_model("resnet10t", num_classes=7).state_dict(), tmp_path / "seven.safetensors")
    (tmp_path / "torn.pth").write_bytes(b"PK\x03\x04 not a checkpoint")
    differs = "'fc.weight' is 7x512 in the checkpoint and 10x512 in the model"
    for file, says in (("seven.safetensors", differs), ("torn.pth", "cannot read")):
        with pytest.raises(RecipeError) as caught:
            plan(parse(TINY.replace("train: {epochs: 1}", f"checkpoint: {tmp_path / file}")))
        assert [problem.line for problem in caught.value.problems] == [6]
        assert says in str(caught.value)


def test_the_resolved_recipe_says_everything_and_means_the_same() -> None:
    first = plan(parse(TINY.replace("pairs:\n  blocks.0: layer2\n  blocks.1: layer3", "pairs: auto")))
    second = plan(parse(dump(first.resolved)))
    assert second.pairs == first.pairs != ()
    assert second.resolved == first.resolved
    assert (second.student, second.student_input) == (first.student, first.student_input)
    assert (second.teacher, second.teacher_input) == (first.teacher, first.teacher_input)
    assert second.comparisons == first.comparisons != ()


def refusals(schema: Any, value: Any, root: Any) -> list[str]:
    """What JSON Schema (2020-12) refuses: its rules written out for the keywords that ours has, and for no others."""
    if isinstance(schema, bool):
        return [] if schema else [f"{value!r} may not be here"]
    found = []
    for key, rule in schema.items():
        match key:
            case "title" | "description" | "default" | "$schema" | "$defs" | "then" | "else":
                continue
            case "$ref":
                found += refusals(root["$defs"][rule.removeprefix("#/$defs/")], value, root)
            case "type":
                kinds: Any = {"object": dict, "array": list, "string": str, "null": type(None), "boolean": bool}
                kinds |= {"integer": int, "number": (int, float)}
                wrong = not isinstance(value, kinds[rule]) or (isinstance(value, bool) and rule != "boolean")
                found += [f"{value!r} is no {rule}"] if wrong else []
            case "enum":
                found += [] if value in rule else [f"{value!r} is none of {rule}"]
            case "pattern" if isinstance(value, str):
                found += [] if re.search(rule, value) else [f"{value!r} does not match {rule}"]
            case "const":
                found += [] if value == rule else [f"{value!r} is not {rule!r}"]
            case "anyOf":
                branches = [refusals(branch, value, root) for branch in rule]
                found += [] if [] in branches else [f"{value!r} is of no branch: {branches}"]
            case "allOf":
                found += [it for branch in rule for it in refusals(branch, value, root)]
            case "if":
                branch = "else" if refusals(rule, value, root) else "then"
                found += refusals(schema.get(branch, True), value, root)
            case "required" if isinstance(value, dict):
                found += [f"{name} is missing" for name in rule if name not in value]
            case "properties" if isinstance(value, dict):
                found += [it for name in rule.keys() & value.keys() for it in refusals(rule[name], value[name], root)]
            case "additionalProperties" if isinstance(value, dict):
                others = value.keys() - schema.get("properties", {}).keys()
                found += [f"{name}: {it}" for name in others for it in refusals(rule, value[name], root)]
            case "items" | "prefixItems" if isinstance(value, list):
                rules = rule if key == "prefixItems" else [rule] * len(value)
                found += [it for pair in zip(rules, value, strict=False) for it in refusals(*pair, root)]
            case "minItems" | "maxItems" | "minProperties" | "maxProperties" if isinstance(value, dict | list):
                low = key.startswith("min")
                found += [f"{len(value)} items"] if (len(value) < rule if low else len(value) > rule) else []
            case "minimum" | "maximum" | "exclusiveMinimum" | "exclusiveMaximum" if isinstance(value, int | float):
                fits = {"minimum": value >= rule, "maximum": value <= rule}
                fits |= {"exclusiveMinimum": value > rule, "exclusiveMaximum": value < rule}
                found += [] if fits[key] else [f"{value} against {key} {rule}"]
            case _:
                assert key in KEYWORDS  # they say nothing of a value of this type
    return found


KEYWORDS = {"pattern", "required", "properties", "additionalProperties", "items", "prefixItems"}
KEYWORDS |= {"minItems", "maxItems", "minProperties", "maxProperties"}
KEYWORDS |= {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"}


WHOLE = schema()


def valid(value: Any) -> bool:
    """By jsonschema where it is installed, and by the rules above."""
    ours = not refusals(WHOLE, value, WHOLE)
    if find_spec("jsonschema"):
        validator = import_module("jsonschema").Draft202012Validator
        validator.check_schema(WHOLE)
        assert validator(WHOLE).is_valid(value) == ours
    return ours


def mappings(node: Any, where: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The places of all mappings in a tree."""
    if isinstance(node, dict):
        yield where
    for key, value in node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ():
        yield from mappings(value, (*where, key))


FREE = {"model_kwargs", "opt_args", "lr_scale", "pairs"}  # whose keys are the user's


@pytest.mark.parametrize(
    "path", sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml")), ids=lambda path: path.stem
)
def test_the_schema_takes_every_recipe_and_none_with_a_key_that_there_is_not(path: Path) -> None:
    tree = YAML(typ="safe").load(path)
    assert valid(tree), refusals(WHOLE, tree, WHOLE)
    assert valid(json.loads(parse(dump(load(path).recipe)).recipe.model_dump_json()))
    for where in mappings(tree):
        other = copy.deepcopy(tree)
        node = other
        for step in where:
            node = node[step]
        node["zzz"] = 1.0 if where[-1:] == ("lr_scale",) else "1"
        assert valid(other) == any(step in FREE for step in where), where


@pytest.mark.parametrize(
    ("text", "takes"),
    [
        ("extends: base.yaml\nteacher: {train: {optimizer: {lr: 0.1}}}", True),
        ("extends: base.yaml\nteacher: {train: {optimizer: {lrr: 0.1}}}", False),
        ("extends: base.yaml\nstages: [{losses: {}}]", False),
        ("teacher: {train: {optimizer: {lr: 0.1}}}", False),
        (TINY.replace("epochs: 2", "epochs: two"), False),
        (TINY.replace("temperature: 2.0", "temprature: 2.0"), False),
        (TINY.replace("temperature: 2.0", "temperature: {start: 1, end: 2}"), True),
        (TINY.replace("loss: hint", "loss: hints"), False),
        (TINY.replace("pairs:\n  blocks.0: layer2\n  blocks.1: layer3", "pairs: auto"), True),
        (TINY.replace("pairs:\n  blocks.0: layer2\n  blocks.1: layer3", "pairs: automatic"), False),
        (TINY.replace("blocks.0: layer2", "blocks.0: {teacher: layer2, tokens: cls}"), True),
        (TINY.replace("blocks.0: layer2", "blocks.0: {teacher: layer2, tokens: all}"), True),
        (TINY.replace("blocks.0: layer2", "blocks.0: {teacher: layer2, tokens: any}"), False),
    ],
)
def test_the_schema_knows_whole_recipes_and_those_that_extend_others(text: str, takes: bool) -> None:
    assert valid(YAML(typ="safe").load(text)) == takes


def test_every_key_has_something_said_of_it_and_nothing_is_said_of_no_key() -> None:
    sections = {name: it["properties"] for name, it in WHOLE["$defs"].items() if not name.startswith("Part")}
    assert [(name, key) for name, keys in sections.items() for key in keys if not keys[key]["description"]] == []
    known = {key for keys in sections.values() for key in keys}
    assert {key.rpartition(".")[2] for key in DESCRIPTIONS} - known == set()
    assert {key.partition(".")[0] for key in DESCRIPTIONS if "." in key} <= {
        name.removesuffix("Options") for name in sections
    }


def test_a_pretrained_teacher_keeps_its_classifier_unless_it_is_trained_on() -> None:
    kept = TINY.replace("train: {epochs: 1}", "pretrained: true")
    with pytest.raises(RecipeError, match=r"classifier has 1000 classes and the data 10"):
        plan(parse(kept))
    tuned = plan(parse(kept.replace("pretrained: true", "pretrained: true\n  train: {epochs: 1}")))
    assert tuned.teacher is not None
    assert tuned.teacher.output.channels == 10


def test_a_loss_that_compares_the_images_of_a_batch_is_refused_where_a_batch_is_one() -> None:
    text = TINY.replace("batch_size: 256", "batch_size: 1").replace("soft_targets, temp", "dist, temp")
    with pytest.raises(RecipeError, match="`intra` compares the images of a batch") as caught:
        plan(parse(text))
    assert [problem.line for problem in caught.value.problems] == [25]
