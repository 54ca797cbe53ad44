"""The models that a run trains, in which order and in which phases. Each is built when its turn comes."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar
from zlib import crc32

from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import nn

from probe_kd.console import amount
from probe_kd.engine.models import build_model, checkpoint_gradients
from probe_kd.engine.sharding import is_sharded, shard
from probe_kd.engine.spec import InputSpec, Tap, Trace
from probe_kd.engine.weights import load_weights, renew_classifier
from probe_kd.methods.adapters import ImageView
from probe_kd.methods.distiller import Distiller
from probe_kd.methods.ensembles import Ensemble, MeanOfTeachers
from probe_kd.methods.objectives import Objective
from probe_kd.methods.sharing import Sharing
from probe_kd.methods.steps import Classes
from probe_kd.recipe.keys import ModelOptions, classifier_of
from probe_kd.recipe.planner import Plan
from probe_kd.recipe.sections.outputs import role_of_teacher
from probe_kd.recipe.sections.sharing import join
from probe_kd.training.devices import memory_format
from probe_kd.training.phase import Phase

TEACHER_BASELINE, BASELINE, ENSEMBLE = "teacher baseline", "baseline", "teachers"
UNTRAINED = "untrained student"  # the student as it is before training
T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class TrainedModel:
    """A model to train, and its phases. `partner` is the teacher that trains with it, `sharing` what the two share."""

    role: str
    model: nn.Module
    trace: Trace
    input: InputSpec
    phases: tuple[Phase, ...]
    output: Tap  # on which it is measured
    partner: "TrainedModel | None" = None
    sharing: Sharing | None = None
    name: str = ""  # of one of several teachers

    @property
    def is_teacher(self) -> bool:
        """Whether this is a teacher, alone or trained with the student."""
        return self.role.startswith("teacher")

    @property
    def side(self) -> str:
        """The role by which the plan knows whether the model classifies: `student`, `teacher` or `teacher NAME`."""
        return role_of_teacher(self.name) if self.is_teacher else "student"

    @property
    def learns_from_teacher(self) -> bool:
        return self.role == "student"


@dataclass
class Models:
    """The models of one run on their device.

    `teachers` are the models that the others learn from, by name, once they are built; a single one has an empty name.
    """

    plan: Plan
    accelerator: Accelerator
    teachers: dict[str, TrainedModel] = field(default_factory=dict)

    @property
    def teacher(self) -> TrainedModel | None:
        """The single teacher."""
        return self.teachers.get("")

    @property
    def reference(self) -> TrainedModel | None:
        """The model with which students are compared: the teacher, or the mean of the teachers that classify."""
        if not self.plan.recipe.teachers:
            return self.teacher
        classifying = [teacher for teacher in self.teachers.values() if self.plan.classifies(teacher.side)]
        if self.plan.agrees_without_labels:
            classifying = [teacher for teacher in self.teachers.values() if teacher.name in self.plan.compared_outputs]
        return classifying[0] if len(classifying) == 1 else self._ensemble(classifying) if classifying else None

    def _ensemble(self, teachers: Sequence[TrainedModel]) -> TrainedModel:
        """The mean of several teachers as one model, which sees the images of the largest."""
        images = self.plan.student_input
        for teacher in teachers:
            images = images.covering(teacher.input)
        weights = {name: options.weight for name, options in (self.plan.recipe.teachers or {}).items()}
        maps = [self.plan.class_maps.get(teacher.name) for teacher in teachers]
        selections = [nn.Identity() if indices is None else Classes(indices) for indices in maps]
        multilabel = self.plan.datasets.labels == "multilabel"
        mean = MeanOfTeachers(selections, [weights[teacher.name] for teacher in teachers], multilabel=multilabel)
        views = [ImageView(images, teacher.input) for teacher in teachers]
        outputs = [teacher.output for teacher in teachers]
        ensemble = Ensemble([teacher.model for teacher in teachers], views, outputs, mean)
        ensemble = ensemble.to(self.accelerator.device)
        return TrainedModel(ENSEMBLE, ensemble, teachers[0].trace, images, (), Tap(""))

    def add_teacher(self, trained: TrainedModel) -> None:
        """Let the next models learn from this one, which no longer trains."""
        if self._shards(trained.name) and not is_sharded(trained.model):
            shard(trained.model, trained.trace, self.accelerator.device)
        self.teachers[trained.name] = trained

    def _shards(self, name: str) -> bool:
        return self.accelerator.num_processes > 1 and self.plan.recipe.teachers_by_name[name].shard

    def in_turn(self) -> Iterator[TrainedModel]:
        """Yield the models in the order of training. Each is built when its turn comes."""
        plan, recipe = self.plan, self.plan.recipe
        for name in plan.teachers:
            yield self._teacher(name, TEACHER_BASELINE if recipe.share else role_of_teacher(name))
        if recipe.baseline:
            model = self._build(recipe.student, plan.student, recipe.seed)
            phases = self._stages(alone="student")
            output = plan.output_of("student")
            yield TrainedModel(BASELINE, model, plan.student, self._input_alone(), phases, output)
        model, partner, sharing = self._build(recipe.student, plan.student, recipe.seed), None, None
        if recipe.share and plan.teacher:
            self.teachers[""] = partner = self._teacher("", "teacher")
            set_seed(recipe.seed)  # of a graft's adapter
            model, sharing = join(recipe.share, model, partner.model, plan.student, plan.teacher)
            self._to_device(model)
        phases, output = self._stages(), plan.trained_output
        yield TrainedModel("student", model, plan.trained, plan.student_input, phases, output, partner, sharing)

    def distiller(self, trained: TrainedModel, phase: Phase) -> Distiller:
        needed = trained.partner or any(objective.needs_teacher for objective in phase.objectives)
        teachers = self.teachers if needed else {}
        class_maps = {name: indices for name, indices in self.plan.class_maps.items() if name in teachers}
        share = self.plan.recipe.share
        set_seed(self.plan.recipe.seed)  # of the adapters
        distiller = Distiller(
            trained.model,
            _alone({name: teacher.model for name, teacher in teachers.items()}),
            phase.objectives,
            student_input=trained.input,
            teacher_input=_alone({name: teacher.input for name, teacher in teachers.items()}),
            student_trace=trained.trace if trained.trace.training else None,
            teacher_trace=_alone({name: teacher.trace for name, teacher in teachers.items()}),
            class_map=class_maps or None,
            teacher_dropping=phase.teacher_dropping,
            seed=self.plan.recipe.seed,
            block=share.block if share and trained.partner else None,
            sharing=trained.sharing,
            freeze=phase.freeze,
            num_images=len(self.plan.datasets.train),  # type: ignore[arg-type]
        )
        return distiller.to(self.accelerator.device)

    def images_for(self, trained: TrainedModel) -> InputSpec:
        """The images for training a model: its normalisation, and the larger size of model and teacher.

        Each model converts them to its own size.
        """
        images = trained.input
        for teacher in () if trained.is_teacher else self.teachers.values():
            images = images.covering(teacher.input)
        return images

    def options_of(self, trained: TrainedModel) -> ModelOptions:
        """What the recipe says of a model."""
        return self.plan.recipe.teachers_by_name[trained.name] if trained.is_teacher else self.plan.recipe.student

    def _teacher(self, name: str, role: str) -> TrainedModel:
        plan, planned = self.plan, self.plan.teachers[name]
        options = planned.options
        phases: tuple[Phase, ...] = ()
        if options.train is not None:
            train_options = options.train
            smoothing = {"label_smoothing": train_options.label_smoothing}
            several = plan.datasets.labels == "multilabel"
            loss = "binary_cross_entropy" if several else "cross_entropy"
            labels = Objective(loss, "task", options=smoothing, student=options.output)
            phases = (
                Phase("train", train_options.epochs, (labels,), train_options.optimizer, train_options.scheduler),
            )
        elif role == TEACHER_BASELINE and not (options.pretrained or options.checkpoint):
            phases = self._stages(alone="teacher")
        seed = plan.recipe.seed if options.same_init else teacher_seed(plan.recipe.seed, name)
        model, output = build_weighted(options, planned.trace, seed), plan.output_of(role_of_teacher(name))
        if self._shards(name) and not phases:  # a device may not hold the whole
            shard(model, planned.trace, self.accelerator.device)
        else:
            model = self._to_device(model)
        return TrainedModel(role, model, planned.trace, planned.input, phases, output, name=name)

    def _input_alone(self) -> InputSpec:
        """The input of the baseline: the size in the recipe, even if a graft has the size of the teacher."""
        return replace(self.plan.student_input, size=self.plan.student.input_size)

    def _stages(self, alone: str = "") -> tuple[Phase, ...]:
        """The phases of the recipe's stages; for a model alone, only the objectives on labels."""
        phases, age = [], 0
        stages = zip(self.plan.recipe.stages, self.plan.objectives, self.plan.frozen, strict=True)
        for stage, objectives, frozen in stages:
            own_objectives = _labels_only(objectives, alone, self.plan.body) if alone else objectives
            phase = Phase(
                name=stage.name,
                epochs=stage.epochs,
                objectives=own_objectives,
                optimizer=stage.optimizer.model_copy(update={"lr_scale": {}}) if alone else stage.optimizer,
                scheduler=stage.scheduler,
                clip_grad=stage.clip_grad,
                grad_accum_steps=stage.grad_accum_steps,
                keep=stage.keep,
                freeze=frozen.layers,
                teacher_dropping=(not alone and stage.teacher_dropping) or 0.0,
                age=age,
            )
            phases += [phase] * bool(own_objectives)
            age += stage.epochs
        return tuple(phases)

    def _build(self, options: ModelOptions, trace_: Trace, seed: int) -> nn.Module:
        return self._to_device(build_weighted(options, trace_, seed))

    def _to_device(self, model: nn.Module) -> nn.Module:
        model = model.to(self.accelerator.device)
        return model.to(memory_format=memory_format(self.plan.recipe, self.accelerator.device))


def describe_sharding(plan: Plan, processes: int) -> list[str]:
    """What `shard` does in a run of so many processes, a line for each teacher that has it."""
    lines = []
    for teacher in plan.teachers.values():
        if teacher.options.shard and processes == 1:
            lines.append(f"the {teacher.role} is whole in the only process of this run, where `shard` has no effect")
        elif teacher.options.shard:
            count = amount(teacher.trace.parameters)
            lines.append(f"the {teacher.role} is sharded: {processes} processes hold its {count} parameters together")
    return lines


def _alone(values: Mapping[str, T]) -> T | Mapping[str, T] | None:
    """The value of a single teacher, the values of several by name, or None without a teacher."""
    return values.get("", values) if values else None


def teacher_seed(seed: int, name: str = "") -> int:
    """The seed of a teacher's initial weights, far from the seeds of students, which are small numbers.

    Each of several teachers has its own, which does not depend on the others.

    With the same seed, a teacher and a student of one architecture would have the same initial weights, and their
    agreement would be no evidence.
    """
    return (seed + 2**31 + crc32(name.encode())) % 2**32


def _labels_only(objectives: Sequence[Objective], side: str, body: str) -> tuple[Objective, ...]:
    """The objectives on labels of one model. A single one gets weight 1: less would only lower the learning rate.

    `body` is the prefix of the student's layers in a graft, which the student alone does not have.
    """
    labels = [
        replace(objective, of="student", student=_own_output(objective, body), teacher="")
        for objective in objectives
        if objective.resolved.reads == "labels" and objective.of == side
    ]
    return (replace(labels[0], weight=1.0),) if len(labels) == 1 else tuple(labels)


def _own_output(objective: Objective, body: str) -> Tap:
    """The tap of the labelled output in the plain model."""
    tap = objective.outputs.student if objective.of == "student" else objective.outputs.teacher
    return replace(tap, module=tap.module.removeprefix(body)) if objective.of == "student" else tap


def build_weighted(options: ModelOptions, trace_: Trace, seed: int) -> nn.Module:
    """Build a model of a recipe with the weights with which it begins: its own, or those that the seed draws."""
    set_seed(seed)
    model = build_model(trace_.model, trace_.model_kwargs, pretrained=options.pretrained)
    if options.pretrained and options.new_classifier:
        set_seed(seed)
        renew_classifier(model, build_model(trace_.model, trace_.model_kwargs))
    if options.grad_checkpointing:
        checkpoint_gradients(model, trace_.model)
    if options.checkpoint:
        load_weights(model, options.checkpoint, classifier_of(options))
    return model
