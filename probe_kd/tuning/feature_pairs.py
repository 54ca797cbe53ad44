"""Pairs of layers, and how their targets are normalised, by the features of the recipe's models on its own images."""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from probe_kd.data.datasets import open_datasets
from probe_kd.errors import MatchError
from probe_kd.methods.feature_figures import FeatureFigures
from probe_kd.methods.feature_matching import match_features
from probe_kd.recipe.feature_measuring import ImageSource, measure_built
from probe_kd.recipe.keys import Recipe
from probe_kd.recipe.planner import Plan
from probe_kd.training.models import build_weighted
from probe_kd.tuning.budget import scored_on_held_out


def why_no_features(planned: Plan) -> str:
    """Why the features of the teacher cannot be measured before a study, and what to do; empty if they can."""
    if len(planned.teachers) != 1:
        return (
            f"`from: features` reads the layers of one teacher, and the recipe has {len(planned.teachers)}; take "
            "`from: match`, or list pairs in `values`"
        )
    if planned.recipe.share is not None:
        return "`from: features` reads the teacher's weights, which `share` trains in every trial; take `from: match`"
    if any(teacher.options.train is not None for teacher in planned.teachers.values()):
        return (
            "`from: features` reads a teacher with weights, and this one is still to be trained; `probe-kd train` "
            "writes them as `teacher.safetensors`: give that file as `checkpoint` instead of `train`, or take "
            "`from: match`"
        )
    return ""


def measure_planned(recipe: Recipe, planned: Plan) -> FeatureFigures:
    """Measure the models with which a trial begins, on 512 of the images that trials train on.

    These are the same images in `check` and in a study. Raises the errors of models, weights and images.
    """
    (teacher,) = planned.teachers.values()
    data = scored_on_held_out(recipe).data
    student_model = build_weighted(recipe.student, planned.student, recipe.seed)
    teacher_model = build_weighted(teacher.options, teacher.trace, recipe.seed)
    return measure_built(
        (student_model, teacher_model),
        (planned.student, teacher.trace),
        ImageSource(data.dataset, data, open_datasets(data)),
        inputs=(planned.student_input, teacher.input),
        seed=recipe.seed,
    )


def pairs_by_features(recipe: Recipe, planned: Plan, numbers: Iterable[int]) -> list[dict[str, Any]]:
    """Return the pairs with their `normalize`, as in a recipe, for each number of pairs for which there are layers.

    Raises MatchError if that is none of them, and the errors of `measure_planned`.
    """
    figures = measure_planned(recipe, planned)
    (name,) = planned.teachers
    written: list[dict[str, Any]] = []
    refusals: list[MatchError] = []
    for number in numbers:
        try:
            pairs = match_features(figures, num_pairs=number)
        except MatchError as refusal:
            refusals.append(refusal)
            continue
        written.append(
            {str(pair.student): {"teacher": str(replace(pair.teacher, model=name)), **pair.adapter} for pair in pairs}
        )
    if not written:
        raise refusals[0]
    return written
