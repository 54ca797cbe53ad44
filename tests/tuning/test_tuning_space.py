"""What `tune` may say, what is varied by default, and the recipes that come of it."""

import re
from dataclasses import replace
from pathlib import Path
from textwrap import indent

import numpy
import pytest
import timm
import torch
from conftest import NARROW, Command
from pages import ROOT
from safetensors.torch import save_file
from scipy.stats import ttest_rel
from sklearn.datasets import load_digits

from probe_kd.data.datasets import open_datasets
from probe_kd.data.options import DataOptions
from probe_kd.errors import ProbeKDError, RecipeError
from probe_kd.recipe.keys import Recipe
from probe_kd.recipe.planner import plan
from probe_kd.recipe.reading import changed, load, parse
from probe_kd.recipe.sections.tune import check_tune, legal_paths, value_at
from probe_kd.tuning.budget import epochs_of, scored_on_held_out, shortened
from probe_kd.tuning.outcome import write_tuned
from probe_kd.tuning.paired import paired
from probe_kd.tuning.space import AS_WRITTEN, Parameter, Planner, all_values, space_of, usual_space
from probe_kd.tuning.trials import first_trials
from probe_kd.tuning.usual import usual_options

RECIPES = sorted({*ROOT.glob("recipes/**/*.yaml")} - {ROOT / "recipes/study/base.yaml"})  # which others extend
LINE = len(NARROW.splitlines()) + 2  # of what stands under `tune:`

# What stands under `tune:`, and parts of the one error that it makes.
WRONG = {
    "losses.hint.weight: {lgo: [0.01, 10]}": "unknown key `lgo`; did you mean 'log'",
    "losses.hint.weight: {log: [10, 0.01]}": "did you mean [0.01, 10]?",
    "losses.hint.weight: {log: [0, 10]}": "a logarithmic range begins above 0; or take `range`",
    "losses.hint.weight: {range: [1, 1]}": "these are equal",
    "losses.hint.weight: {range: [low, 1]}": "expected a number, got 'low'",
    "losses.hint.weight: {range: [0, .inf]}": "expected a finite number",
    "losses.hint.weight: {log: [1]}": "`tune.losses.hint.weight.log",
    "losses.hint.weight: {}": "give one of `log`, `range`, `values` and `from`; here is none",
    "losses.hint.weight: {log: [1, 2], values: [1, 2]}": "here is `log` and `values`",
    "losses.hint.weight: {values: [1]}": "expected at least 2, got 1",
    "losses.hint.weight: {values: [1, 2], num_pairs: [1, 2]}": "`num_pairs` and `level` are of `from: match`",
    "losses.hint.weight: [0.01, 10]": "expected a mapping, got a list",
    "losses.hint.weight: {range: [-1, 1]}": "`losses.hint.weight: -1` makes a recipe that cannot run: "
    "`stages.0.losses.hint.weight`: expected a number greater than or equal to 0",
    "losses.hint.weigth: {log: [0.01, 10]}": "did you mean 'losses.hint.weight'",
    "losses.hnt.weight: {log: [0.01, 10]}": "did you mean 'losses.hint.weight'",
    "losses.hint.temperature: {log: [1, 10]}": "`losses.hint.temperature` cannot be varied; did you mean",
    "losses.soft.weight.share: {log: [0.1, 1]}": "`stages.1.losses.soft.weight` is 0.5, and nothing is under it",
    "losses.hint.weight.share: {log: [0.1, 1]}": "its weight cannot be a share of another",
    "losses.hint.normalize: {values: [none, layers]}": "did you mean 'layer'?",
    "losses.hint.pairs: {from: match}": "`from: match` finds pairs, for the path `pairs`",
    "losses.soft.temperature: {values: [1, hot]}": "`losses.soft.temperature: hot` makes a recipe that cannot run",
    "losses.soft.temperature: {values: [2, 2]}": "has a value twice",
    "pairs: {from: mach}": "expected 'match' or 'features', got 'mach'",
    "pairs: {from: features}": "still to be trained; `probe-kd train` writes them as `teacher.safetensors`",
    "pairs: {from: features, level: [block]}": "`level` is of `from: match`",
    "pairs: {from: match, num_pairs: [3, 1]}": "did you mean [1, 3]?",
    "pairs: {from: match, num_pairs: [0, 1]}": "greater than or equal to 1",
    "pairs: {from: match, num_pairs: [7, 9]}": "num_pairs 7",
    "pairs: {values: [{blocks.0: layer9}, auto]}": "layer9",
    "optimizer.lr: {log: [1.0e-4, 1.0e-2]}\n  stages.0.optimizer.lr: {log: [0.1, 1]}": "both set `stages.0.opt",
    "optimizer.lrate: {log: [1.0e-4, 1.0e-2]}": "did you mean 'optimizer.lr'",
    "scheduler.warmup_epochs: {range: [0, 3]}": "3 epochs of warm-up leave nothing of 1 epochs",
    "stages.7.optimizer.lr: {log: [0.1, 1]}": "`stages.7.optimizer.lr` cannot be varied",
    "stages.0.epochs: {range: [1, 3]}": "`stages.0.epochs` cannot be varied",
    "student.model: {values: [resnet18, resnet34]}": "is the same for all trials",
    "data.val_split: {values: [a, b]}": "is the same for all trials",
    "seed: {range: [0, 5]}": "`seed` cannot be varied; what can:",
}


def varied(text: str) -> None:
    source = parse(f"{NARROW}tune:\n  {text}\n")
    space_of(Planner(source, plan(source)))


@pytest.mark.parametrize("text", WRONG)
def test_every_mistake_in_tune_is_one_error_with_its_line(text: str) -> None:
    with pytest.raises(RecipeError) as refusal:
        varied(text)
    problems = refusal.value.problems
    assert len(problems) == 1, refusal.value
    assert WRONG[text] in problems[0].message
    assert problems[0].line == LINE + text.count("\n")


MANY = """\
tune:
  losses.hint.weight: {vals: [1, 2]}
  losses.hint.weigth: {log: [0.1, 1]}
  losses.soft.temperature: {values: [1, warm]}
  losses.hint.normalize: {values: [none, layers]}
  optimizer.lr: {log: [0.001, 0.01]}
"""
OF_MANY = [
    "unknown key `vals`",
    "did you mean 'losses.hint.weight'",
    "temperature: warm` makes",
    "did you mean 'layer'",
]


def test_mistakes_of_form_and_of_meaning_in_tune_are_told_together(command: Command, tmp_path: Path) -> None:
    """By both commands, each with its line. Values are planned only where nothing is wrong elsewhere."""
    (tmp_path / "recipe.yaml").write_text(NARROW + MANY)
    for verb in ("check", "tune"):
        told = command(verb, "recipe.yaml").stderr
        lines = [line for line in told.splitlines() if "recipe.yaml:" in line]
        for number, (line, message) in enumerate(zip(lines, OF_MANY, strict=True)):
            assert f"recipe.yaml:{LINE + number}:" in line
            assert message in line
    (tmp_path / "recipe.yaml").write_text((NARROW + MANY).replace("hflip: 0.0", "hflip: 0.0\n  vflop: 1"))
    told = command("tune", "recipe.yaml").stderr
    assert all(message in told for message in ("unknown key `vflop`", *OF_MANY[:2]))
    assert OF_MANY[2] not in told


def test_paths_lead_to_every_stage_that_has_them() -> None:
    recipe = parse(NARROW).recipe
    paths = legal_paths(recipe)
    assert paths["losses.soft.temperature"] == [("stages", 1, "losses", "soft", "temperature")]
    assert paths["optimizer.lr"] == [("stages", 0, "optimizer", "lr"), ("stages", 1, "optimizer", "lr")]
    for path, places in paths.items():
        assert all(place[0] in ("stages", "pairs", "data") for place in places), path


@pytest.mark.parametrize("file", RECIPES, ids=lambda file: file.stem)
def test_what_is_written_is_the_recipe_with_the_values_of_a_trial(file: Path, tmp_path: Path) -> None:
    """For every recipe of the repository, and every path that a study may vary, at its own value and at another."""
    source = load(file)
    places = [place for places in legal_paths(source.recipe).values() for place in places]
    own = {place: value for place in places if isinstance(value := value_at(source.recipe, place), int | float)}
    halves = {place: value / 2 for place, value in own.items() if isinstance(value, float)}
    for number, values in enumerate(({}, halves)):
        path = tmp_path / f"{number}.yaml"
        write_tuned(source, values, ["one", "two"], path)
        expected = changed(source, values).recipe.model_copy(update={"tune": None})
        assert load(path).recipe == expected
    text = (tmp_path / "1.yaml").read_text()
    comments = [
        line for line in file.read_text().splitlines() if line.startswith("#") and "extends" not in file.read_text()
    ]
    assert all(line in text for line in ["# one", "# two", *comments])


@pytest.mark.parametrize("share", [0.01, 0.25, 0.99])
@pytest.mark.parametrize("file", RECIPES, ids=lambda file: file.stem)
def test_a_shorter_recipe_is_still_a_recipe(file: Path, share: float) -> None:
    recipe = load(file).recipe
    epochs = max(len(recipe.stages), round(share * epochs_of(recipe)))
    shorter = shortened(scored_on_held_out(recipe), epochs)
    assert epochs_of(shorter) == epochs
    Recipe.model_validate_json(shorter.model_dump_json(exclude_none=True), strict=True)
    for before, after in zip(recipe.stages, shorter.stages, strict=True):
        assert after.scheduler.warmup_epochs / after.epochs == pytest.approx(
            before.scheduler.warmup_epochs / before.epochs
        )


def test_the_images_of_two_folds_are_others_and_the_first_is_that_of_runs() -> None:
    data = DataOptions(dataset="sklearn/digits", input_size=(3, 8, 8), val_split="none", holdout=0.2, fraction=0.4)
    first, second = open_datasets(data), open_datasets(data, fold=1)
    held = [set(part.held_out.indices) for part in (first, second)]  # type: ignore[union-attr]
    trained = [set(part.train.indices) for part in (first, second)]  # type: ignore[attr-defined]
    assert [len(part) for part in held] == [287, 287]
    assert not held[0] & held[1]
    assert not any(one & other for one, other in zip(held, trained, strict=True))
    assert len(trained[0]) == len(trained[1]) == 460


def test_the_held_out_images_come_out_of_what_the_recipe_does_not_train_on() -> None:
    quickstart = load(ROOT / "recipes/quickstart.yaml").recipe
    images = [len(open_datasets(recipe.data).train) for recipe in (quickstart, scored_on_held_out(quickstart))]  # type: ignore[arg-type]
    assert images[0] == images[1]


def test_the_interval_is_that_of_a_paired_t_test() -> None:
    rng = numpy.random.default_rng(0)
    for count in (2, 3, 5, 8):
        before, after = rng.normal(0.8, 0.02, count), rng.normal(0.82, 0.02, count)
        result = paired(dict(enumerate(before)), dict(enumerate(after)))
        expected = ttest_rel(after, before).confidence_interval(0.95)
        assert (result.low, result.high) == pytest.approx((expected.low, expected.high))
        assert result.better == sum(after > before)
    alone = paired({0: 0.5, 1: 0.6}, {1: 0.7}, ["seed 0"])
    assert (alone.seeds, alone.mean, alone.low) == ((1,), pytest.approx(0.1), None)
    assert paired({0: 0.5}, {}).mean is None


USUAL = {
    "losses.hint.weight",
    "losses.hint.normalize",
    "losses.hint.projector",
    "losses.soft.weight",
    "losses.soft.temperature",
    "optimizer.lr",
    "pairs",
}


def test_what_is_varied_by_default_can_run() -> None:
    source = parse(NARROW)
    planner = Planner(source, plan(source))
    parameters = usual_space(planner, usual_options(planner.planned))
    assert {parameter.path for parameter in parameters} == USUAL
    planner.plan(
        all_values(parameters, {item.path: item.choices[-1][0] if item.choices else item.high for item in parameters})
    )
    for parameter in parameters:
        assert parameter.default is not None
        assert parameter.path != "pairs" or parameter.values(AS_WRITTEN) == {}


@pytest.fixture
def measured(tmp_path: Path) -> str:
    """A recipe whose teacher has weights, in which one channel of the last stage holds nearly all of the energy."""
    torch.manual_seed(0)
    teacher = timm.create_model("resnet10t", channels=[8, 16, 24, 32], num_classes=10).train()
    digits = torch.tensor(load_digits().images[:96] / 8 - 1, dtype=torch.float32)[:, None].expand(-1, 3, -1, -1)
    for _ in range(20):  # or all images are one to its batch norms
        teacher(torch.nn.functional.interpolate(digits, 16))
    weights = teacher.state_dict()
    weights["layer4.0.bn2.bias"][3] = 100.0
    save_file(weights, tmp_path / "teacher.safetensors")
    written = f"  model_kwargs: {{channels: [8, 16, 24, 32]}}\n  checkpoint: {tmp_path / 'teacher.safetensors'}\n"
    return NARROW.replace("  model_kwargs: {channels: [8, 16, 24, 32]}\n", "").replace(
        "  train: {epochs: 1}\n", written
    )


def test_pairs_by_features_are_a_choice_with_their_normalize_for_each_number(measured: str) -> None:
    source = parse(f"{measured}tune: {{pairs: {{from: features, num_pairs: [1, 9]}}}}\n")
    held_out = replace(source, recipe=scored_on_held_out(source.recipe))
    (checked,) = space_of(Planner(source, plan(source)))
    (studied,) = space_of(Planner(source, plan(held_out), (), scored_on_held_out))
    assert checked == studied, "`check` shows what a study varies"
    assert checked.default == AS_WRITTEN
    pairs = [value for _, value in checked.choices[1:]]
    assert [len(value) for value in pairs] == [1, 2], "the student has two blocks"
    assert all(value["blocks.1"] == {"teacher": "layer4", "normalize": "fitted"} for value in pairs)
    assert pairs[1]["blocks.0"]["normalize"] == "layer"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("num_pairs: [1, 2]", "num_pairs: [8, 9]", "num_pairs 8: 2 layers of the student"),
        ("teacher:\n", "teachers:\n  b: {model: resnet10t, pretrained: true}\n  a:\n", "the recipe has 2"),
    ],
)
def test_pairs_that_features_cannot_give_are_refused(measured: str, old: str, new: str, message: str) -> None:
    text = f"{measured}tune: {{pairs: {{from: features, num_pairs: [1, 2]}}}}\n".replace(old, new)
    if "teachers" in new:
        text = re.sub(r"(?s)(  a:\n)(.*?)(?=data:)", lambda found: found[1] + indent(found[2], "  "), text)
        text = text.replace("blocks.0: layer", "blocks.0: a:layer").replace("blocks.1: layer", "blocks.1: b:layer")
    source = parse(text)
    with pytest.raises(RecipeError, match=message):
        space_of(Planner(source, plan(source)))


def test_shares_and_several_rates_are_varied_as_they_are_written() -> None:
    text = NARROW.replace("weight: 0.5", "weight: {share: 0.5}").replace(
        "    losses:\n      task", "    optimizer: {lr: 0.01}\n    losses:\n      task"
    )
    source = parse(text)
    paths = {path: value.log for path, value in usual_options(plan(source)).items() if value.log}
    assert paths["losses.soft.weight.share"] == pytest.approx((0.05, 5.0))
    assert {"stages.0.optimizer.lr", "stages.1.optimizer.lr"} <= paths.keys()


def test_train_ignores_the_section() -> None:
    source = parse(f"{NARROW}tune: {{optimizer.lr: {{log: [0.001, 0.1]}}}}\n")
    assert plan(source).resolved == plan(parse(NARROW)).resolved
    assert not check_tune(source)


def test_a_recipe_scored_by_its_features_does_not_vary_them(tmp_path: Path) -> None:
    from probe_kd.tuning.study import parameters_of

    text = NARROW.replace("baseline: true", "").replace("      task: {loss: cross_entropy}\n", "")
    text = text.replace("  hflip: 0.0", "  hflip: 0.0\n  labels: none").replace(
        "  train: {epochs: 1}\n", "  pretrained: true\n"
    )
    text = text.replace(
        "      soft: {loss: soft_targets, temperature: 2.0, weight: 0.5}\n", "      other: {loss: hint}\n"
    )
    wrong = parse(f"{text}tune: {{losses.hint.normalize: {{values: [none, layer]}}}}\n")
    for source, message in ((wrong, "changes the meaning"), (parse(text), "")):
        held_out = replace(source, recipe=scored_on_held_out(source.recipe))
        planner = Planner(source, plan(held_out), (), scored_on_held_out)
        if message:
            with pytest.raises(ProbeKDError, match=message):
                parameters_of(planner)
        else:
            assert {item.path.rpartition(".")[2] for item in parameters_of(planner)} == {"weight", "lr"}


def test_a_study_begins_with_the_recipe_as_it_stands_and_with_other_learning_rates() -> None:
    weight = Parameter("losses.hint.weight", (), 0.01, 100.0, log=True, default=1.0)
    rate = Parameter("optimizer.lr", (), 2e-4, 2e-2, log=True, default=2e-3)
    begun = first_trials((weight, rate), count=20)
    assert [values["losses.hint.weight"] for values in begun] == [1.0] * 4
    assert [round(values["optimizer.lr"], 6) for values in begun] == [0.002, 0.006325, 0.02, 0.000632]
    narrow = replace(rate, low=1e-3, high=3e-3)
    assert [values["optimizer.lr"] for values in first_trials((narrow,), count=20)] == [2e-3, 3e-3, 1e-3]
    later = replace(rate, path="stages.1.optimizer.lr", low=2e-6, high=2e-4, default=2e-5)
    assert {round(values["optimizer.lr"] / values[later.path]) for values in first_trials((rate, later), count=9)} == {
        100
    }
    for parameters, count in (((weight, rate), 4), ((weight,), 20), ((replace(rate, default=None),), 20)):
        assert len(first_trials(parameters, count)) == 1
