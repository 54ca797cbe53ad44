"""Recipes that `match -o` and `init` write are recipes that `check` takes."""

from pathlib import Path

import pytest

from probe_kd.engine.matching import match
from probe_kd.engine.tracing import trace
from probe_kd.errors import RecipeError
from probe_kd.recipe.planner import plan
from probe_kd.recipe.reading import load
from probe_kd.recipe.scaffold import write_recipe

MODELS = (
    "resnet10t",
    "vit_tiny_patch16_224",
    "mobilenetv3_small_050",
    "convnext_atto",
    "vit_small_patch16_dinov3",
    "lcnet_050",
)
WITHOUT = {"num_classes": 0}


@pytest.mark.parametrize("kwargs", [({"num_classes": 7}, WITHOUT), (WITHOUT, {})])
@pytest.mark.parametrize("index", range(0, len(MODELS), 2))
def test_what_match_writes_of_models_with_and_without_classifiers_is_a_plan(
    index: int, kwargs: tuple[dict[str, int], dict[str, int]], tmp_path: Path
) -> None:
    names, file = (MODELS[index], MODELS[index + 1]), tmp_path / "r.yaml"
    sides = [trace(name, 32, training=not side, model_kwargs=kwargs[side]) for side, name in enumerate(names)]
    write_recipe(sides[0], sides[1], match(*sides), file)
    made = plan(load(file))
    assert made.classifies("student")
    assert made.classifies("teacher") == (kwargs[1] != WITHOUT)  # which keeps its weights, and teaches by its features
    losses = {objective.name for stage in made.objectives for objective in stage}
    assert losses == {"task", "hint", *["soft"] * made.classifies("teacher")}


def test_what_gives_no_classes_is_not_written_for_a_method_that_reads_them(tmp_path: Path) -> None:
    maps = trace("vit_tiny_patch16_224", 32, training=True, model_kwargs={"num_classes": 0, "global_pool": ""})
    backbone = trace("resnet10t", 32, model_kwargs=WITHOUT)
    file = tmp_path / "r.yaml"
    with pytest.raises(RecipeError, match=r"reads classes of the student, and the student's output is 5 x 11 an image"):
        write_recipe(maps, backbone, match(maps, backbone), file)
    with pytest.raises(RecipeError, match=r"has no classifier.*take `features` or `fitnets_joint`"):
        write_recipe(backbone, backbone, [], file, method="soft_targets")
    assert not file.exists()
    unknown = trace("lcnet_035", 32, model_kwargs=WITHOUT)  # of which timm has no weights
    student = trace("resnet10t", 32, training=True)
    write_recipe(student, unknown, match(student, unknown), file)
    assert plan(load(file)).classifies("teacher")
