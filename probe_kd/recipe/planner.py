"""From a recipe to a plan: what it names is opened, traced, paired and adapted, and nothing is trained.

Every section of the recipe is checked by functions of its own (`sections/`). `plan` calls them in the order in which
one needs what another found, and raises one RecipeError with all that is wrong, each problem at its line.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from probe_kd.data.datasets import Datasets
from probe_kd.data.record import DataRecord
from probe_kd.engine.spec import InputSpec, Pair, Trace
from probe_kd.methods.objectives import Objective
from probe_kd.methods.sharing import Sharing
from probe_kd.recipe.keys import PairOptions, Recipe
from probe_kd.recipe.reading import Source
from probe_kd.recipe.sections.execution import check_execution
from probe_kd.recipe.sections.images import check_transforms, open_data
from probe_kd.recipe.sections.losses import Planned, check_baseline, check_sides, find_adapters, make_objectives
from probe_kd.recipe.sections.mistakes import Mistake
from probe_kd.recipe.sections.models import (
    Models,
    check_inputs,
    check_name,
    check_student,
    check_teacher,
    check_weights,
    input_of_teacher,
    read_class_map,
    trace_models,
)
from probe_kd.recipe.sections.pairs import Expansion, Paired, check_use, expansions, find_pairs
from probe_kd.recipe.sections.sharing import check_trunk_inputs, input_of_trained, try_sharing
from probe_kd.recipe.sections.stages import check_stages, check_warmup
from probe_kd.recipe.yaml_tree import Path_


@dataclass(frozen=True)
class Plan:
    """A recipe that has been checked against models and data: all that training needs, and nothing left to guess."""

    recipe: Recipe
    datasets: Datasets
    student: Trace
    teacher: Trace | None
    student_input: InputSpec
    teacher_input: InputSpec | None
    pairs: tuple[Pair, ...]
    objectives: tuple[tuple[Objective, ...], ...]  # of each stage
    comparisons: tuple[Planned, ...]
    class_map: tuple[int, ...] | None = None
    sharing: Sharing | None = None
    grown: Trace | None = None  # of the student as it is trained, where that is a graft
    expansions: tuple[Expansion, ...] = ()
    new_classifiers: tuple[str, ...] = ()  # in a sentence each, of models with weights

    @property
    def trained(self) -> Trace:
        """The student as it is trained."""
        return self.grown or self.student

    @property
    def remarks(self) -> list[str]:
        """What can be run as it stands, and is hardly what was meant."""
        asked = self.recipe.share or any(objective.needs_teacher for stage in self.objectives for objective in stage)
        if self.teacher is None or asked:
            return []
        does = "is trained" if self.recipe.teacher and self.recipe.teacher.train else "is loaded"
        return [
            f"no loss reads the teacher: it {does} and compared with, and teaches nothing; add "
            "`soft: {loss: soft_targets}`, say, or leave `teacher` out"
        ]

    @property
    def resolved(self) -> Recipe:
        """The recipe with what was found written out: the pairs, and the arguments that the models are built with."""
        recipe = self.recipe
        student = recipe.student.model_copy(update={"model_kwargs": dict(self.student.model_kwargs)})
        found: dict[str, Any] = {"student": student}
        if recipe.teacher is not None and self.teacher is not None:
            kwargs = dict(self.teacher.model_kwargs)
            found["teacher"] = recipe.teacher.model_copy(update={"model_kwargs": kwargs})
        found |= self._normalisation_of_folders(found)
        if self.pairs:
            body = "body." if self.grown else ""
            found["pairs"] = {str(pair.student).removeprefix(body): _written(pair) for pair in self.pairs}
        return recipe.model_copy(update=found)

    def _normalisation_of_folders(self, found: Mapping[str, Any]) -> dict[str, Any]:
        """The sections with the mean and std that the config of a `local-dir:` model says, since the folder may go."""
        sides = [("data", self.recipe.student, None if self.grown else self.student_input)]
        if self.recipe.teacher is not None:
            sides.append(("teacher", self.recipe.teacher, self.teacher_input))
        return {
            key: found.get(key, getattr(self.recipe, key)).model_copy(update={"mean": given.mean, "std": given.std})
            for key, options, given in sides
            if given is not None and options.model.startswith("local-dir:")
        }


def _written(pair: Pair) -> str | PairOptions:
    plain = pair.weight == 1 and not pair.adapter
    long = {"teacher": str(pair.teacher), "weight": pair.weight, **pair.adapter}
    return str(pair.teacher) if plain else PairOptions.model_validate(long)


class _Found(NamedTuple):
    """What the sections of a recipe stand for, as far as each could be found."""

    datasets: Datasets | None
    models: Models
    new_classifiers: list[str]
    class_map: tuple[int, ...] | None
    grown: Trace | None
    sharing: Sharing | None
    paired: Paired
    objectives: list[list[Objective]]
    comparisons: list[Planned]


def plan(source: Source, *, allow_import: Sequence[str] = (), record: DataRecord | None = None) -> Plan:
    """Check a recipe against its models and data.

    Functions of your own that it names as models are imported and called only where `allow_import` names their package
    or module. The classes have the numbers that the `record` of a former run says, where one is given. Raises
    RecipeError with all problems that do not hide each other, those of form that `source` has too.
    """
    recipe = source.recipe
    if source.form:
        _raise(source, _beside_form(source, allow_import, record))
    found, mistakes = _find(recipe, allow_import, record)
    _raise(source, mistakes)
    _raise(source, check_trunk_inputs(recipe, found.models))
    student, teacher = found.models.student, found.models.teacher
    assert found.datasets is not None
    assert student is not None
    return Plan(
        recipe=recipe,
        datasets=found.datasets,
        student=student,
        teacher=teacher,
        student_input=input_of_trained(recipe, student, teacher),
        teacher_input=input_of_teacher(recipe, teacher) if teacher else None,
        pairs=found.paired.pairs or (),
        objectives=tuple(tuple(stage) for stage in found.objectives),
        comparisons=tuple(found.comparisons),
        class_map=found.class_map,
        sharing=found.sharing,
        grown=found.grown,
        expansions=tuple(expansions(recipe, found.paired)),
        new_classifiers=tuple(found.new_classifiers),
    )


def _raise(source: Source, mistakes: Sequence[Mistake]) -> None:
    problems = [*source.form, *(source.problem(where, message) for where, message in mistakes)]
    if problems:
        raise source.error(problems)


def _find(recipe: Recipe, allow_import: Sequence[str], record: DataRecord | None) -> tuple[_Found, list[Mistake]]:
    datasets, mistakes = open_data(recipe.data, record)
    models, more = trace_models(recipe, datasets.num_classes if datasets else None, allow_import)
    mistakes += more + check_student(recipe, models) + check_teacher(recipe, models)
    new_classifiers, more = _check_weights(recipe, models, record)
    mistakes += more + check_baseline(recipe) + check_execution(recipe, models) + check_stages(recipe, models.student)
    mistakes += check_warmup(recipe, datasets) + check_transforms(recipe.data) + check_inputs(recipe, models)
    class_map, more = read_class_map(recipe, models)
    mistakes += more
    (grown, sharing), more = try_sharing(recipe, models)
    mistakes += more
    paired, objectives, comparisons, more = _plan_losses(recipe, models, grown, class_map)
    found = _Found(datasets, models, new_classifiers, class_map, grown, sharing, paired, objectives, comparisons)
    return found, mistakes + more


def _beside_form(source: Source, allow_import: Sequence[str], record: DataRecord | None) -> list[Mistake]:
    """What else is wrong, beside the form: nothing of the broken places, and nothing that may follow from them."""
    recipe, broken = source.recipe, source.broken
    if any(map(_hides_others, broken)):
        mistakes = _check_names(recipe, allow_import)
        if not any(place[:1] == ("data",) for place in broken):
            mistakes += open_data(recipe.data, record)[1]
    else:
        _, mistakes = _find(recipe, allow_import, record)
    # Whether a schedule fits its epochs, say, is seen again when all numbers are there.
    of_numbers = {"scheduler", "epochs", "batch_size"}
    return [
        (where, message)
        for where, message in mistakes
        if not any(where[: len(place)] == place for place in broken) and not of_numbers & {*where}
    ]


def _hides_others(place: Path_) -> bool:
    """Whether models, data, pairs or losses are others without the value at this place."""
    section, key, *rest = (*place, "", "")
    if section == "stages":
        return "losses" in rest and (len(place) < 5 or place[4] in ("loss", "of", "between"))
    if section == "data":
        return key in _DATA_ITSELF
    return section in ("student", "pairs", "share") or (section == "teacher" and key != "train")


_DATA_ITSELF = {
    *("dataset", "root", "train_split", "val_split", "test_split", "num_classes", "input_size", "holdout", "fraction"),
}


def _check_names(recipe: Recipe, allow_import: Sequence[str]) -> list[Mistake]:
    """What needs neither models nor data: whether what is named is there."""
    mistakes = check_name("student", recipe.student, allow_import)
    if recipe.teacher is not None:
        mistakes += check_name("teacher", recipe.teacher, allow_import)
    for index in range(len(recipe.stages)):
        mistakes += make_objectives(recipe, index, None, "")[1]
    unknown = Models(None, None, None)
    return mistakes + check_execution(recipe, unknown) + check_stages(recipe, None)


def _check_weights(recipe: Recipe, models: Models, record: DataRecord | None) -> tuple[list[str], list[Mistake]]:
    # Without data nobody knows how many classes there are, and what does not fit 1000 would be no mistake.
    known = models if models.classes is not None else Models(None, None, None)
    told, mistakes = check_weights(recipe, "student", known.student, record)
    of_teacher, more = check_weights(recipe, "teacher", known.teacher, record)
    return told + of_teacher, mistakes + more


def _plan_losses(
    recipe: Recipe, models: Models, grown: Trace | None, class_map: Sequence[int] | None
) -> tuple[Paired, list[list[Objective]], list[Planned], list[Mistake]]:
    """The pairs, the objectives of each stage, and what each of them compares."""
    paired, mistakes = find_pairs(recipe, models, grown)
    objectives: list[list[Objective]] = []
    for index in range(len(recipe.stages)):
        made, more = make_objectives(recipe, index, paired.compared, "body." if grown else "")
        objectives.append(made)
        mistakes += more + check_sides(recipe, index, made)
    mistakes += check_use(recipe, paired, objectives)
    # Outputs are compared only where the number of classes is known.
    of_layers = [[it for it in stage if it.resolved.reads != "outputs"] for stage in objectives]
    compared = of_layers if models.classes is None else objectives
    traces = grown or models.student, models.teacher
    comparisons, more = find_adapters(recipe, compared, traces, paired, class_map)
    return paired, objectives, comparisons, mistakes + more
