"""Losses with pairs of their own: in all forms, with every mistake at its line, in a plan, a run, and what reads it."""

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import GRAFT
from rich.console import Console
from running import run

from probe_kd.cli.recipes import _pair_lines
from probe_kd.errors import RecipeError
from probe_kd.recipe.planner import Plan, plan
from probe_kd.recipe.reading import parse
from probe_kd.recipe.writing import dump
from probe_kd.results.comparison import compare
from probe_kd.results.evaluation import evaluate
from probe_kd.tables import plan_table

RECIPE = """\
student: {model: resnet10t, model_kwargs: {channels: [8, 16, 24, 32]}}
teacher: {model: resnet10t, model_kwargs: {channels: [8, 16, 24, 48]}, train: {epochs: 1}}
data: {dataset: sklearn/digits, input_size: [3, 16, 16], batch_size: 128, hflip: 0.0, fraction: 0.15}
pairs: {layer2: layer2, layer3: {teacher: layer3, weight: 0.5}, layer4: layer4}
stages:
  - epochs: 1
    losses:
      hint: {loss: hint, pairs: HINT}
      gram: {loss: gram}
"""
FSP = "hint: {loss: fsp, between: [[layer1, layer3]], pairs: {layer1: layer1, layer3: layer4}}"


def text(pairs: str) -> str:
    return RECIPE.replace("HINT", pairs)


def compared(plan: Plan, loss: str = "hint") -> list[str]:
    return [str(row.comparison) for row in plan.comparisons if row.objective.name == loss]


ALL = ["layer2 <- layer2", "layer3 <- layer3", "layer4 <- layer4"]


@pytest.mark.parametrize(
    ("pairs", "expected"),
    [
        ("null", ALL),
        ("[layer3]", ALL[1:2]),
        ("[layer4, layer2@output]", [ALL[0], ALL[2]]),  # in the order of the recipe's
        ("['glob:layer[34]']", ALL[1:]),
        ("auto", ["layer1 <- layer1", *ALL[:1], "layer4 <- layer4"]),
        ("{num_pairs: 2}", ["layer2 <- layer2", "layer4 <- layer4"]),
        ("{layer1: layer4, fc: ''}", ["layer1 <- layer4", "fc <- output"]),
        ("{'glob:layer?': 'glob:layer?.0.bn1'}", [f"layer{n} <- layer{n}.0.bn1" for n in (1, 2, 3, 4)]),
        ("{layer1: {teacher: layer1, weight: 2, projector: mlp}, layer2: {teacher: layer1, weight: 0}}", None),
    ],
)
def test_each_form_gives_the_loss_its_pairs_and_no_other_loss(pairs: str, expected: list[str] | None) -> None:
    """The recipe that a run keeps has them all by name, and plans the same."""
    made = plan(parse(text(pairs)))
    assert compared(made) == (expected or ["layer1 <- layer1"])
    assert compared(made, "gram") == ALL
    assert [str(pair) for pair in made.pairs] == ALL
    again = plan(parse(dump(made.resolved)))
    assert (again.own_pairs, again.comparisons, again.expansions) == (made.own_pairs, made.comparisons, ())
    assert again.resolved == made.resolved
    if expected is None:
        (row,) = [row for row in made.comparisons if row.objective.name == "hint"]
        assert (row.comparison.weight, "mlp" in row.adapter) == (2, True)
        assert "measured only: layer2 <- layer1" in _pair_lines(made)


def test_the_plan_shows_whose_pairs_they_are() -> None:
    made = plan(parse(text("{'glob:layer[34]': 'glob:layer[34]'}")))
    assert _pair_lines(made) == ["hint: glob:layer[34]: glob:layer[34] is layer3 <- layer3, layer4 <- layer4"]
    console = Console(width=200, record=True)
    console.print(plan_table(made))
    rows = [line.split() for line in console.export_text().splitlines()]
    layers = {loss: [" ".join(row[3:6]) for row in rows if loss in row] for loss in ("hint", "gram")}
    assert layers == {"hint": ALL[1:], "gram": ALL}


def test_between_looks_into_the_pairs_of_its_loss() -> None:
    made = plan(parse(RECIPE.replace("hint: {loss: hint, pairs: HINT}", FSP)))
    assert compared(made) == ["layer1 <- layer1 to layer3 <- layer4"]
    with pytest.raises(RecipeError, match=r"8:7: `between` names 'layer1', which is in no pair.*\['layer2', 'layer3'"):
        plan(parse(RECIPE.replace("hint: {loss: hint, pairs: HINT}", FSP.partition(", pairs")[0] + "}")))
    unused = FSP.replace("pairs: {", "pairs: {layer2: layer2, ")
    with pytest.raises(RecipeError, match=r"8:\d+: loss `hint` does not compare layer2 <- layer2; take it out"):
        plan(parse(RECIPE.replace("hint: {loss: hint, pairs: HINT}", unused)))


def test_in_a_graft_the_layers_are_those_of_the_plain_student() -> None:
    pairs = "pairs: {blocks.1: layer2, blocks.1.norm1: layer3}\nstages:"
    losses = "      one: {loss: hint, pairs: [blocks.1]}\n      two: {loss: hint, pairs: ['glob:*.norm1']}\n"
    own = "      own: {loss: hint, pairs: {blocks.1: layer4}}\n"
    made = plan(parse(GRAFT.replace("stages:", pairs) + losses + own))
    names = [compared(made, name) for name in ("one", "two", "own")]
    assert names == [["body.blocks.1 <- layer2"], ["body.blocks.1.norm1 <- layer3"], ["body.blocks.1 <- layer4"]]
    again = plan(parse(dump(made.resolved)))
    assert (again.own_pairs, again.comparisons) == (made.own_pairs, made.comparisons)
    with pytest.raises(RecipeError, match=r"the graft puts the teacher's layers in the place of these"):
        plan(parse(GRAFT + own.replace("blocks.1", "patch_embed")))


def test_of_several_teachers_a_pair_says_whose_layer_it_is() -> None:
    one, pairs = RECIPE.splitlines()[1], RECIPE.splitlines()[3]
    teachers = "\n".join(f"  {name}: {one.partition(': ')[2]}" for name in ("a", "b"))
    two = RECIPE.replace(one, f"teachers:\n{teachers}").replace(pairs, "pairs: {layer2: [a:layer2, b:layer1]}")
    made = plan(parse(two.replace("HINT", "{layer1: [a:layer3, {teacher: b:layer4, weight: 0.5}], layer2: b:layer2}")))
    assert compared(made) == ["layer1 <- a:layer3", "layer1 <- b:layer4", "layer2 <- b:layer2"]
    assert compared(made, "gram") == ["layer2 <- a:layer2", "layer2 <- b:layer1"]
    assert compared(plan(parse(two.replace("HINT", "[layer2]")))) == compared(made, "gram")
    again = plan(parse(dump(made.resolved)))
    assert (again.own_pairs, again.comparisons) == (made.own_pairs, made.comparisons)
    assert len(compared(plan(parse(two.replace("HINT", "auto"))))) == 6  # three with each
    with pytest.raises(RecipeError, match=r"10:\d+: 'layer3' does not say whose layer it is"):
        plan(parse(two.replace("HINT", "{layer1: layer3}")))


# (the pairs of `hint`, what the message says, and what of the line the caret is under)
MISTAKES = [
    ("[layer1]", "'layer1' is the student's layer of no pair; did you mean 'layer4'", "layer1"),
    ("['glob:*.bn1']", "'glob:*.bn1' is the student's layer of no pair; those of the recipe have", "'glob"),
    ("['glob:l*.x']", "no module of resnet10t matches 'glob:l*.x'", "'glob"),
    ("[layer2, 'glob:layer*']", "'glob:layer*' selects what 'layer2' selects already", "'glob"),
    ("[]", "`stages.0.losses.hint.pairs`: expected at least 1", "pairs"),
    ("[3]", "`stages.0.losses.hint.pairs.0`: expected text, got 3", "3"),
    ("automatic", "expected `auto`, a mapping of student layers to teacher layers, or a list of", "pairs"),
    ("{level: stages}", "expected 'stage' or 'block', got 'stages'", "level"),
    ("{num_pairs: 9}", "num_pairs 9: resnet10t and resnet10t make 3 pairs", "pairs"),
    ("{layer9: layer1}", "has no module 'layer9'; did you mean 'layer", "layer9"),
    ("{layer1: layer9}", "has no module 'layer9'; did you mean 'layer", "layer1"),
    ("{'glob:layer?': layer1}", "'glob:layer?' finds 4", "'glob"),
    ("{layer1: layer1, layer1@output: layer2}", "'layer1' is in two pairs: `layer1` has it too", "layer1@output"),
    ("{layer1: {teacher: layer1, wieght: 1}}", "unknown key `wieght`; did you mean 'weight'", "wieght"),
    ("{layer1: {teacher: layer1, weight: 0}}", "every pair of this loss weighs 0", "pairs"),
    ("{layer1: {teacher: layer2, policy: never}}", "policy 'never' for layer1 <- layer2: the widths", "layer1"),
    ("{layer1: {teacher: layer2, tokens: cls}}", "neither 'layer1' nor 'layer2' has", "layer1"),
    ("{layer1: a:layer2}", "'a:layer2' names", "layer1"),
]


@pytest.mark.parametrize(("pairs", "says", "at"), MISTAKES, ids=lambda value: value[:30])
def test_each_mistake_is_named_at_its_place_alone(pairs: str, says: str, at: str) -> None:
    with pytest.raises(RecipeError) as caught:
        plan(parse(text(pairs), tolerant=True))
    (problem,) = caught.value.problems
    line = text(pairs).splitlines()[7]
    assert (problem.line, line[problem.column - 1 :].startswith(at)) == (8, True), str(caught.value)
    assert says in problem.message


def test_pairs_that_mean_nothing_are_told_and_so_are_those_that_no_loss_reads() -> None:
    own = text("{layer1: layer1}").replace("gram: {loss: gram}", "soft: {loss: soft_targets, pairs: [layer2]}")
    with pytest.raises(RecipeError) as caught:
        plan(parse(own))
    says = [(problem.line, problem.message.partition(";")[0]) for problem in caught.value.problems]
    unread = [(4, f"no loss compares {pair}") for pair in ALL]
    assert says == [*unread, (9, "'soft_targets' compares no pairs of layers, so `pairs` means nothing")]
    assert plan(parse(own.replace(", pairs: [layer2]", ""), sets=["pairs={}"])).pairs == ()
    meaningless = text("{layer1: {teacher: layer1, grid: student}}").replace("loss: hint", "loss: fsp")
    with pytest.raises(RecipeError, match=r"8:\d+: `grid` means nothing to the losses that compare this pair \(`hint`"):
        plan(parse(meaningless))


def test_options_set_them() -> None:
    selected = parse(text("null"), sets=["stages.0.losses.hint.pairs=[layer3]"])
    assert compared(plan(selected)) == ["layer3 <- layer3"]
    written = parse(text("{layer1: layer1}"), sets=["stages.0.losses.hint.pairs.layer1={teacher: layer2, weight: 2}"])
    assert compared(plan(written)) == ["layer1 <- layer2"]
    with pytest.raises(RecipeError, match=r"--set stages.0.losses.hint.pairs.layer9: .* has no module 'layer9'"):
        plan(parse(text("{layer1: layer1}"), sets=["stages.0.losses.hint.pairs.layer9=layer2"]))


def test_a_run_scores_shows_and_compares_the_pairs_of_each_loss(tmp_path: Path) -> None:
    two_stages = text("{layer1: {teacher: layer2, weight: 2}, fc: ''}").replace(
        "gram: {loss: gram}", "all: {loss: hint}"
    )
    two_stages += "  - {name: last, epochs: 1, losses: {last: {loss: hint, pairs: [layer4]}}}\n"
    folder = tmp_path / "run"
    run(two_stages + "evaluate: {pairs: true}\n", folder)
    own = [("hint", "layer1", "layer2"), ("hint", "fc", "output")]
    shared = [("all", f"layer{number}", f"layer{number}") for number in (2, 3, 4)]
    results: list[dict[str, Any]] = json.loads((folder / "summary.json").read_text())["results"]
    (student,) = (result for result in results if result["role"] == "student")
    scores = {(pair["loss"], pair["student"], pair["teacher"]): pair["cosine"] for pair in student["pairs"]}
    assert list(scores) == [*own, *shared, ("last", "layer4", "layer4")]
    rows = {(row.loss, row.student, row.teacher): row.cosine for row in evaluate(folder).pairs}
    assert rows == {key: pytest.approx(value, rel=1e-5) for key, value in scores.items()}
    assert student["measures"]["cosine"] == pytest.approx(scores["last", "layer4", "layer4"])
    (group,) = compare([folder]).groups
    assert {("layer1", "layer2"), ("fc", "output"), ("layer2", "layer2")} <= {*group.pairs}
