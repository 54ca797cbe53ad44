"""Check a recipe: open its data, trace and pair its models, make its adapters, and train nothing.

The functions in `sections/` check one section of the recipe each. `plan` calls them in the order of their dependencies,
and raises one RecipeError with all problems, each with its line.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from probe_kd.data.datasets import Datasets
from probe_kd.data.record import DataRecord
from probe_kd.engine.spec import InputSpec, Pair, Tap, Trace
from probe_kd.measures import OF_LABELLED_SET, OF_PAIRS, headline_of
from probe_kd.methods.objectives import Objective
from probe_kd.methods.sharing import Sharing
from probe_kd.recipe.keys import PairOptions, Recipe
from probe_kd.recipe.reading import Source
from probe_kd.recipe.sections.evaluation import check_evaluation, measures_pairs
from probe_kd.recipe.sections.execution import check_execution
from probe_kd.recipe.sections.freezing import Frozen, find_frozen
from probe_kd.recipe.sections.images import check_transforms, open_data
from probe_kd.recipe.sections.labels import check_label_losses, softmax_remarks
from probe_kd.recipe.sections.losses import Planned, check_baseline, check_sides, find_adapters, make_objectives
from probe_kd.recipe.sections.mistakes import Mistake
from probe_kd.recipe.sections.models import (
    Models,
    Side,
    check_inputs,
    check_name,
    check_teacher,
    check_weights,
    in_body,
    input_of_teacher,
    read_class_map,
    trace_models,
)
from probe_kd.recipe.sections.outputs import check_outputs, sides_that_classify
from probe_kd.recipe.sections.pairs import Expansion, Paired, check_use, expansions, find_pairs
from probe_kd.recipe.sections.sharing import check_trunk_inputs, input_of_trained, try_sharing
from probe_kd.recipe.sections.stages import check_stages, check_warmup
from probe_kd.recipe.yaml_tree import KeyPath


@dataclass(frozen=True)
class Plan:
    """A recipe that was checked against its models and data, and everything that training needs from them."""

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
    grown: Trace | None = None  # the student as it is trained, if it is a graft
    expansions: tuple[Expansion, ...] = ()
    new_classifiers: tuple[str, ...] = ()  # one sentence for each model with weights
    frozen: tuple[Frozen, ...] = ()  # of each stage
    classifying: Mapping[Side, Tap] = field(default_factory=dict)  # the outputs on which accuracy is measured
    labelled_sets: Mapping[str, Datasets] = field(default_factory=dict)  # by the measure that is taken on it

    def classifies(self, side: Side) -> bool:
        """Whether the accuracy of this side means something: what no loss reads is not measured.

        With several labels an image, this is the mean average precision.
        """
        return side in self.classifying

    @property
    def trained(self) -> Trace:
        """The student as it is trained."""
        return self.grown or self.student

    @property
    def body(self) -> str:
        """The prefix of the student's layers in the student as it is trained, if that is a graft."""
        return "body." if self.grown else ""

    def output_of(self, side: Side) -> Tap:
        """The tap on which a model is measured, in eval mode."""
        options = self.recipe.teacher if side == "teacher" else self.recipe.student
        return self.classifying.get(side) or Tap.parse(options.output if options else "")

    @property
    def trained_output(self) -> Tap:
        """The tap on which the student is measured, in the student as it is trained."""
        return in_body(self.output_of("student"), self.body)

    @property
    def measures_pairs(self) -> bool:
        """Whether the explained variance and the cosine of the pairs are measured while the student trains."""
        return measures_pairs(self.recipe, self.objectives, classifies=self.classifies("student"))

    @property
    def measures(self) -> tuple[str, ...]:
        """The measures of the student, by their names in `MEASURES`."""
        of_labels = "map" if self.datasets.labels == "multilabel" else "accuracy"
        classified = (of_labels,) * self.classifies("student")
        agreement = ("agreement",) * (self.agrees_without_labels or len(self.classifying) == 2)
        return (*classified, *self.labelled_sets, *OF_PAIRS * self.measures_pairs, *agreement)

    @property
    def headline(self) -> str:
        """The measure that the run is about; empty if it takes none."""
        return headline_of(self.measures)

    @property
    def chosen_by(self) -> str:
        """The measure by which `keep: best` chooses an epoch; empty if it chooses by the loss, as with labels."""
        if self.recipe.data.labels != "none" or self.headline not in (*OF_LABELLED_SET, *OF_PAIRS):
            return ""
        return self.headline

    @property
    def agrees_without_labels(self) -> bool:
        """Whether, without labels, a loss compares the outputs of both models, so that their answers may agree."""
        return self.recipe.data.labels == "none" and any(
            objective.resolved.reads == "outputs" for stage in self.objectives for objective in stage
        )

    @property
    def remarks(self) -> list[str]:
        """Warnings: the recipe can run, but is probably not what was meant."""
        uses_teacher = self.recipe.share or any(
            objective.needs_teacher for stage in self.objectives for objective in stage
        )
        remarks = softmax_remarks(self.recipe)
        if self.teacher is None or uses_teacher:
            return remarks
        action = "is trained" if self.recipe.teacher and self.recipe.teacher.train else "is loaded"
        return [
            f"no loss reads the teacher: it {action} and compared with, and teaches nothing; add "
            "`soft: {loss: soft_targets}`, say, or leave `teacher` out",
            *remarks,
        ]

    @property
    def resolved(self) -> Recipe:
        """The recipe with explicit pairs, and with the arguments that the models are built with."""
        recipe = self.recipe
        student = recipe.student.model_copy(update={"model_kwargs": dict(self.student.model_kwargs)})
        sections: dict[str, Any] = {"student": student}
        if recipe.teacher is not None and self.teacher is not None:
            kwargs = dict(self.teacher.model_kwargs)
            sections["teacher"] = recipe.teacher.model_copy(update={"model_kwargs": kwargs})
        sections |= self._normalisation_of_folders(sections)
        if self.pairs:
            body = "body." if self.grown else ""
            sections["pairs"] = {str(pair.student).removeprefix(body): _pair_as_written(pair) for pair in self.pairs}
        return recipe.model_copy(update=sections)

    def _normalisation_of_folders(self, sections: Mapping[str, Any]) -> dict[str, Any]:
        """The sections with the mean and std from the config of a `local-dir:` model, because its folder may vanish."""
        sides = [("data", self.recipe.student, None if self.grown else self.student_input)]
        if self.recipe.teacher is not None:
            sides.append(("teacher", self.recipe.teacher, self.teacher_input))
        return {
            key: sections.get(key, getattr(self.recipe, key)).model_copy(
                update={"mean": input_spec.mean, "std": input_spec.std}
            )
            for key, options, input_spec in sides
            if input_spec is not None and options.model.startswith("local-dir:")
        }


def _pair_as_written(pair: Pair) -> str | PairOptions:
    plain = pair.weight == 1 and not pair.adapter
    long = {"teacher": str(pair.teacher), "weight": pair.weight, **pair.adapter}
    return str(pair.teacher) if plain else PairOptions.model_validate(long)


class _Sections(NamedTuple):
    """The results of checking all sections; None for what could not be made."""

    datasets: Datasets | None
    models: Models
    new_classifiers: list[str]
    class_map: tuple[int, ...] | None
    grown: Trace | None
    sharing: Sharing | None
    paired: Paired
    objectives: list[list[Objective]]
    comparisons: list[Planned]
    frozen: list[Frozen]
    classifying: Mapping[Side, Tap]
    labelled_sets: dict[str, Datasets]


def plan(source: Source, *, allow_import: Sequence[str] = (), record: DataRecord | None = None) -> Plan:
    """Check a recipe against its models and data.

    Your own functions, which a recipe may name as models, are imported and called only if `allow_import` names their
    package or module. With the `record` of a former run, classes have the same numbers as in that run.

    Raises RecipeError with the errors of form in `source`, and all other problems that do not follow from another.
    """
    recipe = source.recipe
    if source.form:
        _raise(source, _check_despite_form(source, allow_import, record))
    sections, mistakes = _check_sections(recipe, allow_import, record)
    _raise(source, mistakes)
    _raise(source, check_trunk_inputs(recipe, sections.models))
    student, teacher = sections.models.student, sections.models.teacher
    assert sections.datasets is not None
    assert student is not None
    return Plan(
        recipe=recipe,
        datasets=sections.datasets,
        student=student,
        teacher=teacher,
        student_input=input_of_trained(recipe, student, teacher),
        teacher_input=input_of_teacher(recipe, teacher) if teacher else None,
        pairs=sections.paired.pairs or (),
        objectives=tuple(tuple(stage) for stage in sections.objectives),
        comparisons=tuple(sections.comparisons),
        class_map=sections.class_map,
        sharing=sections.sharing,
        grown=sections.grown,
        expansions=tuple(expansions(recipe, sections.paired)),
        new_classifiers=tuple(sections.new_classifiers),
        frozen=tuple(sections.frozen),
        classifying=sections.classifying,
        labelled_sets=sections.labelled_sets,
    )


def _raise(source: Source, mistakes: Sequence[Mistake]) -> None:
    problems = [*source.form, *(source.problem(place, message) for place, message in mistakes)]
    if problems:
        raise source.error(problems)


def _check_sections(
    recipe: Recipe, allow_import: Sequence[str], record: DataRecord | None
) -> tuple[_Sections, list[Mistake]]:
    datasets, mistakes = open_data(recipe.data, record)
    models, more = trace_models(recipe, datasets.num_classes if datasets else None, allow_import)
    mistakes += more + check_teacher(recipe)
    new_classifiers, more = _check_weights(recipe, models, record)
    mistakes += more + check_baseline(recipe) + check_execution(recipe, models) + check_stages(recipe, models.student)
    mistakes += check_warmup(recipe, datasets) + check_transforms(recipe.data) + check_inputs(recipe, models)
    class_map, more = read_class_map(recipe, models)
    mistakes += more
    (grown, sharing), more = try_sharing(recipe, models)
    mistakes += more
    paired, objectives, comparisons, more = _plan_losses(recipe, models, grown, class_map, datasets)
    mistakes += more
    frozen, more = find_frozen(recipe, models.student, objectives)
    classifying = sides_that_classify(recipe, models, grown, objectives, class_map)
    labelled_sets, more = check_evaluation(recipe, models, objectives, classifies="student" in classifying)
    mistakes += more
    plans = class_map, grown, sharing, paired, objectives, comparisons, frozen, classifying, labelled_sets
    sections = _Sections(datasets, models, new_classifiers, *plans)
    return sections, mistakes + more


def _check_despite_form(source: Source, allow_import: Sequence[str], record: DataRecord | None) -> list[Mistake]:
    """The mistakes of a recipe with errors of form, without those at broken places or that may follow from them."""
    recipe, broken = source.recipe, source.broken
    if any(map(_hides_others, broken)):
        mistakes = _check_names(recipe, allow_import)
        if not any(broken_place[:1] == ("data",) for broken_place in broken):
            mistakes += open_data(recipe.data, record)[1]
    else:
        _, mistakes = _check_sections(recipe, allow_import, record)
    # Whether a schedule fits its epochs, say, is checked again when the numbers are legal.
    of_numbers = {"scheduler", "epochs", "batch_size"}
    return [
        (place, message)
        for place, message in mistakes
        if not any(place[: len(broken_place)] == broken_place for broken_place in broken) and not of_numbers & {*place}
    ]


def _hides_others(place: KeyPath) -> bool:
    """Whether models, data, pairs or losses change without the value at this place."""
    section, key, *rest = (*place, "", "")
    if section == "stages":
        return "losses" in rest and (len(place) < 5 or place[4] in ("loss", "of", "between", "student", "teacher"))
    if section == "data":
        return key in _DATA_ITSELF
    return section in ("student", "pairs", "share") or (section == "teacher" and key != "train")


_DATA_ITSELF = {
    *("dataset", "root", "train_split", "val_split", "test_split", "num_classes", "input_size", "holdout", "fraction"),
    "labels",
}


def _check_names(recipe: Recipe, allow_import: Sequence[str]) -> list[Mistake]:
    """Check names of models, losses, optimizers and trackers, which needs neither models nor data."""
    mistakes = check_name("student", recipe.student, allow_import)
    if recipe.teacher is not None:
        mistakes += check_name("teacher", recipe.teacher, allow_import)
    for index in range(len(recipe.stages)):
        mistakes += make_objectives(recipe, index, None, "")[1]
    unknown = Models(None, None, None)
    return mistakes + check_execution(recipe, unknown) + check_stages(recipe, None)


def _check_weights(recipe: Recipe, models: Models, record: DataRecord | None) -> tuple[list[str], list[Mistake]]:
    # Without data the number of classes is unknown, and not fitting the default of 1000 is no mistake.
    checkable = models if models.classes is not None else Models(None, None, None)
    new_of_student, mistakes = check_weights(recipe, "student", checkable.student, record)
    new_of_teacher, more = check_weights(recipe, "teacher", checkable.teacher, record)
    return new_of_student + new_of_teacher, mistakes + more


def _plan_losses(
    recipe: Recipe, models: Models, grown: Trace | None, class_map: Sequence[int] | None, datasets: Datasets | None
) -> tuple[Paired, list[list[Objective]], list[Planned], list[Mistake]]:
    """The pairs, the objectives of each stage, and what each of them compares."""
    paired, mistakes = find_pairs(recipe, models, grown)
    objectives: list[list[Objective]] = []
    for index in range(len(recipe.stages)):
        of_stage, more = make_objectives(recipe, index, paired.compared, "body." if grown else "", datasets)
        objectives.append(of_stage)
        mistakes += more + check_sides(recipe, index, of_stage)
        mistakes += check_label_losses(recipe, index, of_stage, models.classes)
    mistakes += check_use(recipe, paired, objectives)
    traces = grown or models.student, models.teacher
    objectives = _expanded(objectives, *traces)
    of_outputs = check_outputs(recipe, models, grown, objectives)
    mistakes += of_outputs
    # Outputs are compared only where they can be read, and the number of classes is known.
    of_layers = [[objective for objective in stage if objective.resolved.reads != "outputs"] for stage in objectives]
    compared = of_layers if of_outputs or models.classes is None else objectives
    comparisons, more = find_adapters(recipe, compared, traces, paired, class_map)
    return paired, objectives, comparisons, mistakes + more


def _expanded(stages: list[list[Objective]], student: Trace | None, teacher: Trace | None) -> list[list[Objective]]:
    """The objectives with a pair for each part of `tokens: all`, if both models could be traced."""
    if student is None or teacher is None:
        return stages
    return [[objective.expanded(student, teacher) for objective in stage] for stage in stages]
