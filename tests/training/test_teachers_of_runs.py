"""Recipes with several teachers: what is planned, trained, cached, resumed, measured and refused."""

import json
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from conftest import Command, record
from running import After, Quiet, finish, planned, run, same, start, stop
from safetensors.torch import load_file

from probe_kd.engine.spec import Tap
from probe_kd.errors import RecipeError, RunError
from probe_kd.methods.dropping import TeacherDropping
from probe_kd.recipe.planner import plan
from probe_kd.recipe.reading import parse
from probe_kd.results.comparison import compare
from probe_kd.results.evaluation import evaluate
from probe_kd.results.export import export

# A teacher without a classifier, of another size; one with weights of the data's classes, and one that is trained.
TWO = """\
student: {model: resnet10t, model_kwargs: {channels: [4, 4, 8, 8]}}
teachers:
  dino:
    model: vit_tiny_patch16_224
    model_kwargs: {img_size: 24, patch_size: 8, embed_dim: 16, depth: 2, num_heads: 2, num_classes: 0}
    input_size: [3, 24, 24]
    checkpoint: DINO
    weight: 2.0
    cache: CACHE
  res:
    model: resnet10t
    model_kwargs: {channels: [4, 4, 8, 12]}
    train: {epochs: 1}
data: {dataset: sklearn/digits, input_size: [3, 16, 16], fraction: 0.25, batch_size: 64, hflip: 0.0, views: 1}
pairs:
  layer3: [dino:blocks.1, {teacher: res:layer3, weight: 0.5, normalize: channel}]
  glob:layer[12]: res:glob:layer[12]
baseline: true
stages:
  - epochs: 2
    teacher_dropping: 0.5
    losses:
      task: {loss: cross_entropy}
      soft: {loss: soft_targets, temperature: 2.0}
      hint: {loss: hint, normalize: layer}
recovery_interval: 2
"""
DINO_TAUGHT = "[dino:blocks.1, {teacher: res:layer3, weight: 0.5, normalize: channel}]"


def classifiers(two: str) -> str:
    """The recipe with two teachers that classify."""
    weights = two[two.index("    checkpoint: ") : two.index("    weight: 2.0")]
    return two.replace("num_classes: 0", "num_classes: 10").replace(weights, "    train: {epochs: 1}\n")


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The recipe, with the weights of a teacher as another run would leave them."""
    import timm

    from probe_kd.engine.weights import save_weights

    folder = tmp_path_factory.mktemp("two")
    torch.manual_seed(0)
    small = {"img_size": 24, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2, "num_classes": 0}
    save_weights(timm.create_model("vit_tiny_patch16_224", **small), folder / "dino.safetensors", {})
    return TWO.replace("DINO", str(folder / "dino.safetensors")).replace("CACHE", str(folder / "cache"))


@pytest.fixture(scope="module")
def finished(two: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    run(two, folder)
    return folder


def test_the_plan_says_whose_layers_are_compared_and_with_which_weight(two: str) -> None:
    of_recipe = planned(two)
    lines = [f"{item.comparison}: {item.comparison.weight:g}" for item in of_recipe.comparisons]
    assert lines == [
        "output <- res output: 1",
        "layer3 <- dino:blocks.1: 2",
        "layer3 <- res:layer3: 0.5",
        "layer1 <- res:layer1: 1",
        "layer2 <- res:layer2: 1",
    ]
    assert of_recipe.classifying.keys() == {"student", "teacher res"}
    again = plan(parse(json.dumps(of_recipe.resolved.model_dump(mode="json", exclude_none=True))))
    of_both = ([str(item.comparison) for item in one.comparisons] for one in (again, of_recipe))
    assert len({*map(tuple, of_both)}) == 1
    both = planned(classifiers(two))
    assert both.comparisons[0].adapter.endswith("log of the mean: 0.667 dino output + 0.333 res output")
    automatic = planned(two.replace(two[two.index("pairs:") : two.index("baseline:")], "pairs: auto\n"))
    resolved = plan(parse(json.dumps(automatic.resolved.model_dump(mode="json", exclude_none=True))))
    assert resolved.pairs == automatic.pairs  # in this order, by which adapters are saved
    taught = [(pair.student, pair.teacher.model) for pair in automatic.pairs]
    assert {name for _, name in taught} == {"dino", "res"}
    assert len(taught) == len(set(taught)) > len({student for student, _ in taught})
    without = two.replace(DINO_TAUGHT, "res:layer3").replace("    teacher_dropping: 0.5\n", "")
    unread = planned(without)
    assert len(unread.remarks) == 1
    assert "no loss reads the teacher dino: it is loaded" in unread.remarks[0]
    assert "leave `teachers.dino` out" in unread.remarks[0]


def test_a_run_shows_every_teacher_by_its_name(finished: Path, two: str, command: Command) -> None:
    results = {row["role"]: row for row in json.loads((finished / "summary.json").read_text())["results"]}
    assert list(results) == ["teacher dino", "teacher res", "baseline", "student"]
    assert results["teacher dino"]["accuracy"] is None
    assert results["teacher res"]["weights"] == "teacher-res.safetensors"
    assert results["student"]["agreement"] is not None
    rows = [row for row in record(finished) if row["role"] == "student"]
    weighted = float(rows[0]["task"]) + float(rows[0]["soft"]) + float(rows[0]["hint"])
    assert 0 < float(rows[0]["loss"]) < weighted  # some steps left a teacher out
    scores = {row.role: row for row in evaluate(finished).scores}
    assert scores["teacher dino"].top1 is None
    assert scores["student"].agreement == results["student"]["agreement"]
    (group,) = compare([finished]).groups
    assert [row.role for row in group.summaries] == ["baseline", "student", "teacher dino", "teacher res"]
    for shown in (command("eval", str(finished)), command("compare", str(finished))):
        assert "teacher dino" in shown.stdout
        assert "teacher res" in shown.stdout
    exported = export(finished, finished.parent / "exported", role="teacher-res")
    assert exported.model_kwargs["channels"] == [4, 4, 8, 12]
    with pytest.raises(RunError, match="expected one of student, baseline, teacher-dino, teacher-res; did you mean"):
        export(finished, finished.parent / "none", role="teacher-ress")
    card = (Path(export(finished, finished.parent / "card").folder) / "README.md").read_text()
    assert "(dino, licence" in card
    assert "(res, trained in this run)" in card


def test_two_outputs_are_evaluated_with_their_mean_and_with_each(two: str, tmp_path: Path) -> None:
    run(classifiers(two).replace("baseline: true\n", "").replace("- epochs: 2", "- epochs: 1"), tmp_path)
    student = evaluate(tmp_path).scores[0]
    assert student.agreements.keys() == {"dino", "res"}
    results = json.loads((tmp_path / "summary.json").read_text())["results"]
    assert student.agreement == next(row["agreement"] for row in results if row["role"] == "student")


def test_a_resumed_run_gives_the_same_bits(finished: Path, two: str, tmp_path: Path) -> None:
    """It is stopped in the first epoch of the student, whose steps drop teachers.

    One of two teachers has a cache, which a worker reads.
    """
    text = two.replace("views: 1}", "views: 1, workers: 1}")
    with pytest.raises(KeyboardInterrupt):
        run(text, tmp_path, After(stop, updates=5 * 3 + 3))  # an epoch of the teacher, two of the baseline
    assert not (tmp_path / "student.safetensors").exists()
    display = Quiet()
    run(text, tmp_path, display, resume=True)
    same(finished, tmp_path)
    (told,) = [text for text in display.said if "asked of the teacher dino" in text]
    assert "student: train: 0 images asked" in told


def test_a_cache_is_the_teachers_whatever_its_name(two: str, tmp_path: Path) -> None:
    renamed = two.replace("dino:", "other:").replace("baseline: true\n", "")
    display = Quiet()
    run(renamed, tmp_path, display)
    (told,) = [text for text in display.said if "asked of the teacher other" in text]
    assert ": 0 images asked" in told  # all were in the cache of the other runs
    student = load_file(tmp_path / "student.safetensors")
    assert all(tensor.isfinite().all() for tensor in student.values())


PAIR = f"  layer3: {DINO_TAUGHT}"
SOFT = "soft: {loss: soft_targets,"


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        (PAIR, "  layer3: blocks.1", "'blocks.1' does not say whose layer it is; the teachers: dino, res; write 'dino"),
        (PAIR, "  layer3: dinno:blocks.1", "there is no teacher 'dinno'; did you mean 'dino'?"),
        (PAIR, "  layer3: [dino:blocks.1, dino:blocks.0]", "'layer3' is in two pairs with dino: the same line has it"),
        (PAIR, "  layer3: [dino:blocks.1, dino:blcks.0]", "no module 'blcks.0'; did you mean 'blocks.0'"),
        ("res:glob:layer[12]", "glob:layer[12]", "does not say whose layers; the teachers: dino, res; write 'dino:"),
        (SOFT, f"{SOFT} teacher: 'dino:',", "the teacher dino has no classifier"),
        (SOFT, f"{SOFT} teacher: 'dno:',", "no teacher 'dno'; did you mean 'dino"),
        ("  res:\n", "  mean:\n", "a teacher cannot be called `mean`"),
        ("  res:\n", "  baseline:\n", "a teacher cannot be called `baseline`"),
        ("  res:\n", "  Dino:\n", "the names 'dino' and 'Dino' differ only in case"),
        ("  res:\n", "  glob:\n", "'glob:' begins a pattern"),
        ("    weight: 2.0\n", "    weight: 0\n", "`teachers.dino.weight`: expected a number greater than 0"),
        ("    train: {epochs: 1}\n", "", "the teacher res has random weights"),
        ("baseline: true\n", "share: {form: none}\n", "`share` trains one teacher with the student, and"),
        ("pairs:\n", "teacher: {model: resnet10t, pretrained: true}\npairs:\n", "the recipe has `teachers` too"),
        (PAIR, "  layer3: res:layer3", "teacher_dropping chooses between teachers, and objectives compare with 'res'"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_by_the_name_of_the_teacher(two: str, old: str, new: str, says: str) -> None:
    assert two.count(old) == 1
    with pytest.raises(RecipeError) as refusal:
        plan(parse(two.replace(old, new)))
    assert says in str(refusal.value)


def test_taps_of_losses_are_resolved(two: str) -> None:
    named = planned(two.replace("soft: {loss: soft_targets,", "soft: {loss: soft_targets, teacher: 'res:fc',"))
    assert named.objectives[0][1].outputs.teacher == Tap("fc", model="res")


def drop_by_the_losses_of_all() -> None:
    """In one of two processes: on the images of the second alone, the other teacher would have the greatest loss."""
    second = Accelerator(cpu=True).process_index
    dropping = TeacherDropping(["a", "b"], 1.0, seed=0)
    factors = dropping.factors({"a": torch.tensor(1.0 if second else 3.0), "b": torch.tensor(2.0 if second else 1.0)})
    if [float(factors[name]) for name in "ab"] != [1.0, 0.0]:
        raise RunError(f"{factors}")


def test_all_processes_drop_the_same_teachers() -> None:
    assert finish(*start(drop_by_the_losses_of_all)) == ["done", "done"]
