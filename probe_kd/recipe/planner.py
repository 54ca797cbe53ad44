"""Check a recipe: open its data, trace and pair its models, make its adapters, and train nothing.

The functions in `sections/` check one section of the recipe each. `plan` calls them in the order of their dependencies,
and raises one RecipeError with all problems, each with its line.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from math import prod
from typing import Any, NamedTuple

from probe_kd.data.datasets import Datasets
from probe_kd.data.record import DataRecord
from probe_kd.engine.spec import InputSpec, Pair, Tap, Trace, Traces
from probe_kd.measures import OF_LABELLED_SET, OF_PAIRS, headline_of
from probe_kd.methods.adapters import Target
from probe_kd.methods.objectives import Objective
from probe_kd.methods.sharing import Sharing
from probe_kd.methods.targets import expanded, make_adapters, targets_of
from probe_kd.recipe.keys import PairOptions, Recipe, StageOptions, TeacherOptions
from probe_kd.recipe.loss_names import import_losses
from probe_kd.recipe.reading import Source, mended
from probe_kd.recipe.sections.evaluation import check_evaluation, measures_pairs
from probe_kd.recipe.sections.execution import check_execution
from probe_kd.recipe.sections.freezing import Frozen, find_frozen
from probe_kd.recipe.sections.images import check_transforms, open_data
from probe_kd.recipe.sections.labels import check_label_losses, softmax_remarks
from probe_kd.recipe.sections.losses import (
    Planned,
    check_baseline,
    check_dropping,
    check_shares,
    check_sides,
    find_adapters,
    make_objectives,
    resolve_teachers,
)
from probe_kd.recipe.sections.mistakes import Mistake, naming, of_teacher, teacher_place
from probe_kd.recipe.sections.models import (
    Models,
    check_all_weights,
    check_inputs,
    check_name,
    check_teachers,
    in_body,
    input_of_teacher,
    read_class_maps,
    trace_models,
)
from probe_kd.recipe.sections.outputs import check_outputs, role_of_teacher, roles_that_classify
from probe_kd.recipe.sections.pairs import AllPaired, Expansion, check_use, expansions, find_all_pairs, pair_remarks
from probe_kd.recipe.sections.sharing import check_trunk_inputs, input_of_trained, try_sharing
from probe_kd.recipe.sections.stages import check_stages, check_warmup
from probe_kd.recipe.sections.tune import check_tune
from probe_kd.recipe.yaml_tree import KeyPath


@dataclass(frozen=True)
class PlannedTeacher:
    """A teacher of the recipe. `name` is empty if it is the only one, and `class_map` None if it needs none."""

    name: str
    options: TeacherOptions
    trace: Trace
    input: InputSpec
    class_map: tuple[int, ...] | None

    @property
    def role(self) -> str:
        return role_of_teacher(self.name)


@dataclass(frozen=True)
class Plan:
    """A recipe that was checked against its models and data, and everything that training needs from them."""

    recipe: Recipe
    datasets: Datasets
    student: Trace
    student_input: InputSpec
    teachers: Mapping[str, PlannedTeacher]  # a single one has an empty name
    pairs: tuple[Pair, ...]  # of the recipe
    objectives: tuple[tuple[Objective, ...], ...]  # of each stage
    comparisons: tuple[Planned, ...]
    sharing: Sharing | None = None
    grown: Trace | None = None  # the student as it is trained, if it is a graft
    expansions: tuple[Expansion, ...] = ()
    new_classifiers: tuple[str, ...] = ()  # one sentence for each model with weights
    frozen: tuple[Frozen, ...] = ()  # of each stage
    classifying: Mapping[str, Tap] = field(default_factory=dict)  # the outputs on which accuracy is measured
    labelled_sets: Mapping[str, Datasets] = field(default_factory=dict)  # by the measure that is taken on it
    # The pairs of the losses that have `pairs`, by the number of the stage and the name of the loss.
    own_pairs: Mapping[tuple[int, str], tuple[Pair, ...]] = field(default_factory=dict)

    def classifies(self, role: str) -> bool:
        """Whether the accuracy of the `student`, the `teacher` or one of several (`teacher dino`) means something.

        What no loss reads is not measured. With several labels an image, this is the mean average precision.
        """
        return role in self.classifying

    @property
    def teacher(self) -> Trace | None:
        """The trace of a single teacher; of several, see `teachers`."""
        return self.teachers[""].trace if "" in self.teachers else None

    @property
    def teacher_input(self) -> InputSpec | None:
        return self.teachers[""].input if "" in self.teachers else None

    @property
    def class_map(self) -> tuple[int, ...] | None:
        return self.teachers[""].class_map if "" in self.teachers else None

    @property
    def traces(self) -> Traces | None:
        """The traces of the teachers, which find a tap by the name of its teacher. None without a teacher."""
        return Traces({name: teacher.trace for name, teacher in self.teachers.items()}) if self.teachers else None

    @property
    def class_maps(self) -> dict[str, tuple[int, ...]]:
        """The class maps by the name of the teacher."""
        maps = {name: teacher.class_map for name, teacher in self.teachers.items()}
        return {name: class_map for name, class_map in maps.items() if class_map is not None}

    @property
    def trained(self) -> Trace:
        """The student as it is trained."""
        return self.grown or self.student

    @property
    def body(self) -> str:
        """The prefix of the student's layers in the student as it is trained, if that is a graft."""
        return "body." if self.grown else ""

    def output_of(self, role: str) -> Tap:
        """The tap on which the student, or the teacher with this role, is measured, in eval mode."""
        options = {teacher.role: teacher.options.output for teacher in self.teachers.values()}
        return self.classifying.get(role) or Tap.parse(options.get(role, self.recipe.student.output))

    @property
    def trained_output(self) -> Tap:
        """The tap on which the student is measured, in the student as it is trained."""
        return in_body(self.output_of("student"), self.body)

    @property
    def every_pair(self) -> tuple[Pair, ...]:
        """The pairs of the recipe and of its losses. Two layers are paired once: with a weight, if any has one."""
        by_layers: dict[tuple[Tap, Tap], Pair] = {}
        for pair in chain(self.pairs, *self.own_pairs.values()):
            layers = pair.student, pair.teacher
            if layers not in by_layers or (pair.weight and not by_layers[layers].weight):
                by_layers[layers] = pair
        return tuple(by_layers.values())

    @property
    def measures_pairs(self) -> bool:
        """Whether the explained variance and the cosine of the pairs are measured while the student trains."""
        return measures_pairs(self.recipe, self.objectives, classifies=self.classifies("student"))

    @property
    def measures(self) -> tuple[str, ...]:
        """The measures of the student, by their names in `MEASURES`."""
        of_labels = "map" if self.datasets.labels == "multilabel" else "accuracy"
        classified = (of_labels,) * self.classifies("student")
        agreement = ("agreement",) * (self.agrees_without_labels or {"student"} < self.classifying.keys())
        return (*classified, *self.labelled_sets, *OF_PAIRS * self.measures_pairs, *agreement)

    @property
    def notes(self) -> tuple[str, ...]:
        """What a user should know of the run's images, and of the labelled sets."""
        notes = [note for datasets in self.distinct_sets.values() for note in datasets.notes]
        return (*self.datasets.notes, *(f"labelled set: {note}" for note in notes))

    @property
    def distinct_sets(self) -> dict[str, Datasets]:
        """The labelled sets, each once, by the name of a measure that is taken on it."""
        names = {id(datasets): name for name, datasets in self.labelled_sets.items()}
        return {name: self.labelled_sets[name] for name in names.values()}

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

    def stored_targets(self, teacher: PlannedTeacher) -> list[tuple[str, int, int]]:
        """What a teacher's cache will hold: each target's name, its numbers for a view of an image, its views."""
        assert self.traces is not None
        views: dict[Target, set[int]] = {}
        losses = [objective for objectives in self.objectives for objective in objectives]
        comparing = [objective for objective in losses if objective.resolved.reads == "outputs"]
        taps = [tap for objective in comparing for tap in objective.teacher_taps]
        outputs = {str(tap.local) for tap in taps if tap.model == teacher.name}
        age = 0
        for stage, objectives in zip(self.recipe.stages, self.objectives, strict=True):
            of_stage = {epoch % (self.recipe.data.num_views or epoch + 1) for epoch in range(age, age + stage.epochs)}
            adapters = make_adapters(objectives, self.trained, self.traces, self.class_maps)
            for target in targets_of(objectives, adapters, self.traces).values():
                if target.teacher == teacher.name:
                    views.setdefault(target, set()).update(of_stage)
            age += stage.epochs
        top_k = teacher.options.cache_top_k
        numbers = {
            target: 2 * top_k + 1 if top_k and target.name in outputs else prod(target.shape) for target in views
        }
        return [(target.name, numbers[target], len(target_views)) for target, target_views in views.items()]

    @property
    def compared_outputs(self) -> set[str]:
        """The names of the teachers whose outputs losses compare."""
        objectives = [objective for stage in self.objectives for objective in stage]
        comparing = [objective for objective in objectives if objective.resolved.reads == "outputs"]
        return {tap.model for objective in comparing for tap in objective.teacher_taps}

    @property
    def remarks(self) -> list[str]:
        """Warnings: the recipe can run, but is probably not what was meant."""
        remarks = softmax_remarks(self.recipe)
        if self.recipe.share:
            return remarks
        objectives = [objective for stage in self.objectives for objective in stage]
        read = {tap.model for objective in objectives for tap in objective.taps[1]}
        unread = [_remark_on_unread(teacher) for name, teacher in self.teachers.items() if name not in read]
        pairs = dict.fromkeys([*self.pairs, *(pair for own in self.own_pairs.values() for pair in own)])
        traces = {name: teacher.trace for name, teacher in self.teachers.items()}
        return unread + remarks + pair_remarks(list(pairs), self.student, traces)

    @property
    def resolved(self) -> Recipe:
        """The recipe with explicit pairs, with the arguments that the models are built with, and without `tune`."""
        recipe = self.recipe
        student = recipe.student.model_copy(update={"model_kwargs": dict(self.student.model_kwargs)})
        sections: dict[str, Any] = {"student": student, "tune": None}
        if recipe.student.model.startswith("local-dir:") and not self.grown:
            sections["data"] = recipe.data.model_copy(update=_normalisation(self.student_input))
        teachers = {name: _resolved_teacher(teacher) for name, teacher in self.teachers.items()}
        if recipe.teachers:
            sections["teachers"] = teachers
        elif teachers:
            sections["teacher"] = teachers[""]
        if self.pairs:
            sections["pairs"] = _pairs_as_written(self.pairs, self.body)
        if self.own_pairs:
            sections["stages"] = [self._with_own_pairs(index, stage) for index, stage in enumerate(recipe.stages)]
        return recipe.model_copy(update=sections)

    def _with_own_pairs(self, index: int, stage: StageOptions) -> StageOptions:
        """A stage with explicit pairs in each loss that has its own, or with the layers of those that it selects."""
        losses = dict(stage.losses)
        for name, options in losses.items():
            if options.pairs is not None:
                written = _pairs_as_written(self.own_pairs[index, name], self.body)
                explicit = list(written) if isinstance(options.pairs, list) else written
                losses[name] = options.model_copy(update={"pairs": explicit})
        return stage.model_copy(update={"losses": losses})


def _remark_on_unread(teacher: PlannedTeacher) -> str:
    action = "is trained" if teacher.options.train else "is loaded"
    return naming(
        teacher.name,
        f"no loss reads the teacher: it {action} and compared with, and teaches nothing; add "
        f"`soft: {{loss: soft_targets}}`, say, or leave `{'.'.join(map(str, teacher_place(teacher.name)))}` out",
    )


def _resolved_teacher(teacher: PlannedTeacher) -> TeacherOptions:
    update: dict[str, Any] = {"model_kwargs": dict(teacher.trace.model_kwargs)}
    if teacher.options.model.startswith("local-dir:"):
        update |= _normalisation(teacher.input)
    return teacher.options.model_copy(update=update)


def _normalisation(input_spec: InputSpec) -> dict[str, Any]:
    """The mean and std from the config of a `local-dir:` model, because its folder may vanish."""
    return {"mean": input_spec.mean, "std": input_spec.std}


def _pairs_as_written(pairs: Sequence[Pair], body: str) -> dict[str, Any]:
    """The pairs by the student's layer; a list where one learns from several layers."""
    by_student: dict[str, list[str | PairOptions]] = {}
    for pair in pairs:
        by_student.setdefault(str(pair.student).removeprefix(body), []).append(_pair_as_written(pair))
    return {name: written[0] if len(written) == 1 else written for name, written in by_student.items()}


def _pair_as_written(pair: Pair) -> str | PairOptions:
    plain = pair.weight == 1 and not pair.adapter
    long = {"teacher": str(pair.teacher), "weight": pair.weight, **pair.adapter}
    return str(pair.teacher) if plain else PairOptions.model_validate(long)


class _Sections(NamedTuple):
    """The results of checking all sections; None for what could not be made."""

    datasets: Datasets | None
    models: Models
    new_classifiers: list[str]
    class_maps: dict[str, tuple[int, ...]]
    grown: Trace | None
    sharing: Sharing | None
    paired: AllPaired
    objectives: list[list[Objective]]
    comparisons: list[Planned]
    frozen: list[Frozen]
    classifying: Mapping[str, Tap]
    labelled_sets: dict[str, Datasets]


def plan(
    source: Source,
    *,
    allow_import: Sequence[str] = (),
    record: DataRecord | None = None,
    datasets: Datasets | None = None,
) -> Plan:
    """Check a recipe against its models and data.

    Your own functions, which a recipe may name as models, are imported and called only if `allow_import` names their
    package or module. With the `record` of a former run, classes have the same numbers as in that run. `datasets` are
    those of the recipe, if the caller has opened them already.

    Raises RecipeError with the errors of form in `source`, and all other problems that do not follow from another.
    """
    recipe = source.recipe
    if source.form:
        _raise(source, _check_despite_form(source, allow_import, record))
    sections, mistakes = _check_sections(recipe, allow_import, record, datasets)
    _raise(source, mistakes + check_tune(source))
    _raise(source, check_trunk_inputs(recipe, sections.models))
    student = sections.models.student
    assert sections.datasets is not None
    assert student is not None
    return Plan(
        recipe=recipe,
        datasets=sections.datasets,
        student=student,
        student_input=input_of_trained(recipe, student, sections.models.teacher),
        teachers=_planned_teachers(recipe, sections),
        pairs=sections.paired.shared.pairs or (),
        own_pairs={place: paired.pairs or () for place, paired in sections.paired.own.items()},
        objectives=tuple(tuple(stage) for stage in sections.objectives),
        comparisons=tuple(sections.comparisons),
        sharing=sections.sharing,
        grown=sections.grown,
        expansions=tuple(expansions(recipe, sections.paired)),
        new_classifiers=tuple(sections.new_classifiers),
        frozen=tuple(sections.frozen),
        classifying=sections.classifying,
        labelled_sets=sections.labelled_sets,
    )


def _planned_teachers(recipe: Recipe, sections: _Sections) -> dict[str, PlannedTeacher]:
    teachers: dict[str, PlannedTeacher] = {}
    for name, options in recipe.teachers_by_name.items():
        trace_ = sections.models.teachers[name]
        assert trace_ is not None
        own_input = input_of_teacher(recipe.with_only(name), trace_)
        teachers[name] = PlannedTeacher(name, options, trace_, own_input, sections.class_maps.get(name))
    return teachers


def _raise(source: Source, mistakes: Sequence[Mistake]) -> None:
    problems = [*source.form, *(source.problem(place, message) for place, message in mistakes)]
    if problems:
        raise source.error(problems)


def _check_sections(
    recipe: Recipe, allow_import: Sequence[str], record: DataRecord | None, datasets: Datasets | None = None
) -> tuple[_Sections, list[Mistake]]:
    datasets, mistakes = (datasets, []) if datasets is not None else open_data(recipe.data, record)
    mistakes += import_losses(recipe, allow_import)
    models, more = trace_models(recipe, datasets.num_classes if datasets else None, allow_import)
    mistakes += more + check_teachers(recipe)
    new_classifiers, more = _check_weights(recipe, models, record)
    mistakes += more + check_baseline(recipe) + check_execution(recipe, models) + check_stages(recipe, models.student)
    mistakes += check_warmup(recipe, datasets) + check_transforms(recipe.data) + check_inputs(recipe, models)
    class_maps, more = read_class_maps(recipe, models)
    mistakes += more
    (grown, sharing), more = try_sharing(recipe, models)
    mistakes += more
    paired, objectives, comparisons, more = _plan_losses(recipe, models, grown, class_maps, datasets)
    mistakes += more
    frozen, more = find_frozen(recipe, models.student, objectives)
    mistakes += more
    classifying = roles_that_classify(recipe, models, grown, objectives, class_maps)
    labelled_sets, more = check_evaluation(recipe, datasets, models, objectives, classifies="student" in classifying)
    mistakes += more
    plans = class_maps, grown, sharing, paired, objectives, comparisons, frozen, classifying, labelled_sets
    sections = _Sections(datasets, models, new_classifiers, *plans)
    return sections, mistakes


def _check_despite_form(source: Source, allow_import: Sequence[str], record: DataRecord | None) -> list[Mistake]:
    """The mistakes of a recipe with errors of form, without those at broken places or that may follow from them."""
    recipe, broken = source.recipe, source.broken
    if any(map(_hides_others, broken)):
        mistakes = _check_names(recipe, allow_import)
        if not any(broken_place[:1] == ("data",) for broken_place in broken):
            mistakes += open_data(recipe.data, record)[1]
    else:
        _, mistakes = _check_sections(recipe, allow_import, record)
        mistakes += check_tune(mended(source))
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
        return "losses" in rest and (len(place) < 5 or place[4] in _LOSS_ITSELF)
    if section == "data":
        return key in _DATA_ITSELF
    if section == "teachers":
        return "train" not in rest
    return section in ("student", "pairs", "share") or (section == "teacher" and key != "train")


_LOSS_ITSELF = {"loss", "of", "pairs", "between", "student", "teacher"}
_DATA_ITSELF = {
    *("dataset", "root", "train_split", "val_split", "test_split", "num_classes", "input_size", "holdout", "fraction"),
    "labels",
}


def _check_names(recipe: Recipe, allow_import: Sequence[str]) -> list[Mistake]:
    """Check names of models, losses, optimizers and trackers, which needs neither models nor data."""
    mistakes = import_losses(recipe, allow_import) + check_name("student", recipe.student, allow_import)
    for name, options in recipe.teachers_by_name.items():
        mistakes += of_teacher(name, check_name("teacher", options, allow_import))
    for index in range(len(recipe.stages)):
        mistakes += make_objectives(recipe, index, None, "")[1]
    unknown = Models()
    return mistakes + check_execution(recipe, unknown) + check_stages(recipe, None)


def _check_weights(recipe: Recipe, models: Models, record: DataRecord | None) -> tuple[list[str], list[Mistake]]:
    # Without data the number of classes is unknown, and not fitting the default of 1000 is no mistake.
    return check_all_weights(recipe, models if models.classes is not None else Models(), record)


def _plan_losses(
    recipe: Recipe,
    models: Models,
    grown: Trace | None,
    class_maps: Mapping[str, Sequence[int]],
    datasets: Datasets | None,
) -> tuple[AllPaired, list[list[Objective]], list[Planned], list[Mistake]]:
    """The pairs, the objectives of each stage, and what each of them compares."""
    paired, mistakes = find_all_pairs(recipe, models, grown)
    objectives: list[list[Objective]] = []
    for index in range(len(recipe.stages)):
        of_stage, more = make_objectives(recipe, index, paired, "body." if grown else "", datasets)
        objectives.append(of_stage)
        mistakes += more + check_sides(recipe, index, of_stage) + check_shares(recipe, index, of_stage)
        mistakes += check_label_losses(recipe, index, of_stage, models.classes)
    mistakes += check_use(recipe, paired, objectives)
    traces = grown or models.student, models.traces if paired.is_known else None
    objectives, more = _resolve_all_teachers(recipe, objectives, traces, class_maps)
    mistakes += more
    objectives = _expanded(objectives, *traces)
    of_outputs = check_outputs(recipe, models, grown, objectives)
    mistakes += of_outputs
    # Outputs are compared only where they can be read, and the number of classes is known.
    of_layers = [[objective for objective in stage if objective.resolved.reads != "outputs"] for stage in objectives]
    compared = of_layers if of_outputs or models.classes is None else objectives
    comparisons, more = find_adapters(recipe, compared, traces, paired, class_maps)
    return paired, objectives, comparisons, mistakes + more


def _expanded(stages: list[list[Objective]], student: Trace | None, teachers: Traces | None) -> list[list[Objective]]:
    """The objectives with a pair for each part of `tokens: all`, if both models could be traced."""
    if student is None or teachers is None:
        return stages
    return [[expanded(objective, student, teachers) for objective in stage] for stage in stages]


def _resolve_all_teachers(
    recipe: Recipe,
    stages: Sequence[Sequence[Objective]],
    traces: tuple[Trace | None, Traces | None],
    class_maps: Mapping[str, Sequence[int]],
) -> tuple[list[list[Objective]], list[Mistake]]:
    """The objectives of all stages, with the names of the teachers whose outputs they read."""
    objectives: list[list[Objective]] = []
    mistakes: list[Mistake] = []
    for index, of_stage in enumerate(stages):
        resolved, more = resolve_teachers(recipe, index, of_stage, traces, class_maps)
        objectives.append(resolved)
        mistakes += more + check_dropping(recipe, index, resolved)
    return objectives, mistakes
