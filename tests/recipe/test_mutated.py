"""Whole recipes in which something is dropped, doubled, swapped, renamed or replaced: refused in words, or planned."""

import copy
import json
import resource
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ruamel.yaml import YAML
from small_recipes import SMALL, small_recipe

from probe_kd.errors import RecipeError
from probe_kd.recipe.planner import plan
from probe_kd.recipe.reading import parse

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))
SECONDS, MEGABYTES = 30, 2000  # that one recipe may take of a process, and add to it

WORDS = [
    *("auto", "none", "hint", "fsp", "soft_targets", "layer1", "blocks.0", "layer1@input", "layer2#0", "[logits]", ""),
    *("glob:*", "glob:layer?", "re:(.*)*x", "re:(", "resnet10t", "local-dir:.", "hf-hub:", "os:system", "x.y:z", "a.b"),
    *(
        "backbone",
        "balanced",
        "multilabel",
        "fitted",
        "phi_s",
        "all",
        "head_dist",
        "[0]",
        "dino:blocks.0",
        "dino:",
        "mean",
    ),
    *("/dev/zero", "/", "..", "~", "<<", "2001-01-01", "true", "no", "-1", "=1+1", "[red]", "\x1b[31m", "\ud800", "‮"),
]
scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 40),
    st.sampled_from([2**31, 2**53, 2**63, 2**64, -(2**53), 10**30, 10**400, 65537, 1000]),
    st.floats(),
    st.sampled_from([0.5, 1e-300, 1e300, -1.0]),
    st.text(max_size=6),
    st.sampled_from(WORDS),
)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4) | scalars, inner, max_size=3),
    max_leaves=6,
)


def small(text: str) -> dict[str, Any]:
    """A recipe with models that are traced in a moment, and images that are there."""
    tree: dict[str, Any] = YAML(typ="safe").load(text)
    channels, square = [8, 8, 16, 16], {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2}
    for side in ("student", "teacher"):
        if side in tree:
            cnn = tree[side]["model"].startswith("resnet")
            name = "resnet10t" if cnn else "vit_tiny_patch16_224"
            tree[side] |= {"model": name, "model_kwargs": {"channels": channels} if cnn else square}
    tree["data"] |= {"dataset": "sklearn/digits", "root": None, "download": False, "input_size": [3, 32, 32]}
    return tree


def places(node: Any, where: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    inner = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    return [where, *(place for key, value in inner for place in places(value, (*where, key)))]


def at(tree: Any, way: tuple[Any, ...]) -> Any:
    for step in way:
        tree = tree[step]
    return tree


@st.composite
def mutated(draw: st.DrawFn) -> Any:
    """A tree of the project's own recipes or of `SMALL`, changed in one to four places."""
    recipe = draw(st.sampled_from([*RECIPES, *SMALL]))
    tree = small(recipe.read_text()) if isinstance(recipe, Path) else small_recipe(recipe)
    for _ in range(draw(st.integers(1, 4))):
        inner = places(tree)[1:]
        if not inner:
            break
        here, there = draw(st.sampled_from(inner)), draw(st.sampled_from(inner))
        holder, last, value = at(tree, here[:-1]), here[-1], copy.deepcopy(at(tree, here))
        other = copy.deepcopy(at(tree, there))
        nested = here[: len(there)] == there or there[: len(here)] == here
        match draw(st.sampled_from(["drop", "double", "swap", "rename", "replace", "replace", "retype", "copy"])):
            case "drop":
                del holder[last]
            case "double" if isinstance(holder, list):
                holder.append(value)
            case "double":
                holder[draw(st.text(max_size=4))] = value
            case "swap" if not nested:
                holder[last], at(tree, there[:-1])[there[-1]] = other, value
            case "rename" if isinstance(holder, dict):
                names = [str(key) for *_, key in inner]
                holder[draw(st.text(max_size=4) | st.sampled_from(names))] = holder.pop(last)
            case "retype":
                holder[last] = draw(st.sampled_from([[value], {"a": value}, str(value), not value, [value] * 3]))
            case "copy":
                holder[last] = other
            case _:
                holder[last] = draw(values)
    return tree


def told_or_planned(tree: Any) -> bool:
    """Whether it could be planned. Fails where it took too long or too much, or raised what is none of ours."""
    begun, before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refused: RecipeError | None = None
    try:
        # JSON is YAML, but for NaN and Infinity, which are text there.
        plan(parse(json.dumps(tree), "r.yaml", tolerant=True))
    except RecipeError as refusal:
        refused = refusal
    if refused is not None:
        str(refused).encode()
        assert refused.problems
        assert all(problem.message.strip() for problem in refused.problems)
        assert not {*"\x1b\u202e\x07"} & {*str(refused)}
    assert time.process_time() - begun < SECONDS
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < MEGABYTES * 1000
    return refused is None


SLOW = list(HealthCheck)


@settings(max_examples=40, deadline=None, suppress_health_check=SLOW, derandomize=True)
@given(mutated())
def test_no_changed_recipe_makes_reading_or_planning_fail(tree: Any) -> None:
    told_or_planned(tree)


@pytest.mark.zoo
@pytest.mark.parametrize("part", range(10))
def test_none_of_ten_thousand_changed_recipes_makes_reading_or_planning_fail(part: int) -> None:
    @settings(max_examples=1000, deadline=None, suppress_health_check=SLOW, derandomize=False, database=None)
    @given(mutated())
    def run(tree: Any) -> None:
        told_or_planned(tree)

    run()


@settings(max_examples=150, deadline=None, suppress_health_check=SLOW, derandomize=True)
@given(
    st.sampled_from(RECIPES), st.sampled_from(["stages.0", "stages", "data", "teacher.train", "x.y", "pairs"]), values
)
def test_no_value_that_is_set_makes_reading_fail(recipe: Path, key: str, value: Any) -> None:
    text = json.dumps(small(recipe.read_text()))
    for option in (f"{key}={json.dumps(value)}", f"{key}.{json.dumps(value)[:9]}={value}", f"{key}={{<<: {{a: 1}}}}"):
        with suppress(RecipeError):
            parse(text, "r.yaml", [option])
