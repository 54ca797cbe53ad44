"""The models that a run trains, in which order and in which phases. Each is built when its turn comes."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import nn

from probe_kd.engine.models import build_model, checkpoint_gradients
from probe_kd.engine.spec import InputSpec, Tap, Trace
from probe_kd.engine.weights import load_weights, renew_classifier
from probe_kd.methods.distiller import Distiller
from probe_kd.methods.objectives import Objective
from probe_kd.methods.sharing import Sharing
from probe_kd.recipe.keys import ModelOptions, classifier_of
from probe_kd.recipe.planner import Plan
from probe_kd.recipe.sections.sharing import join
from probe_kd.training.devices import memory_format
from probe_kd.training.phase import Phase

TEACHER_BASELINE, BASELINE = "teacher baseline", "baseline"
UNTRAINED = "untrained student"  # the student as it is before training


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

    @property
    def is_teacher(self) -> bool:
        """Whether this is the teacher, alone or trained with the student."""
        return self.role in ("teacher", TEACHER_BASELINE)

    @property
    def learns_from_teacher(self) -> bool:
        return self.role == "student"


@dataclass
class Models:
    """The models of one run on their device. `teacher` is the model that the others learn from, once it is built."""

    plan: Plan
    accelerator: Accelerator
    teacher: TrainedModel | None = None

    def in_turn(self) -> Iterator[TrainedModel]:
        """Yield the models in the order of training. Each is built when its turn comes."""
        plan, recipe = self.plan, self.plan.recipe
        if recipe.teacher is not None:
            yield self._teacher(TEACHER_BASELINE if recipe.share else "teacher")
        if recipe.baseline:
            model = self._build(recipe.student, plan.student, recipe.seed)
            phases = self._stages(alone="student")
            output = plan.output_of("student")
            yield TrainedModel(BASELINE, model, plan.student, self._input_alone(), phases, output)
        model, partner, sharing = self._build(recipe.student, plan.student, recipe.seed), None, None
        if recipe.share and plan.teacher:
            self.teacher = partner = self._teacher("teacher")
            set_seed(recipe.seed)  # of a graft's adapter
            model, sharing = join(recipe.share, model, partner.model, plan.student, plan.teacher)
            self._to_device(model)
        phases, output = self._stages(), plan.trained_output
        yield TrainedModel("student", model, plan.trained, plan.student_input, phases, output, partner, sharing)

    def distiller(self, trained: TrainedModel, phase: Phase) -> Distiller:
        needed = trained.partner or any(objective.needs_teacher for objective in phase.objectives)
        teacher = self.teacher if needed else None
        share = self.plan.recipe.share
        set_seed(self.plan.recipe.seed)  # of the adapters
        distiller = Distiller(
            trained.model,
            teacher.model if teacher else None,
            phase.objectives,
            student_input=trained.input,
            teacher_input=teacher.input if teacher else None,
            student_trace=trained.trace if trained.trace.training else None,
            teacher_trace=teacher.trace if teacher else None,
            class_map=self.plan.class_map,
            block=share.block if share and trained.partner else None,
            sharing=trained.sharing,
            freeze=phase.freeze,
        )
        return distiller.to(self.accelerator.device)

    def images_for(self, trained: TrainedModel) -> InputSpec:
        """The images for training a model: its normalisation, and the larger size of model and teacher.

        Each model converts them to its own size.
        """
        other = self.teacher.input if self.teacher and trained.role != "teacher" else trained.input
        return trained.input.covering(other)

    def options_of(self, trained: TrainedModel) -> ModelOptions:
        """What the recipe says of a model."""
        teacher = self.plan.recipe.teacher
        return teacher if trained.is_teacher and teacher is not None else self.plan.recipe.student

    def _teacher(self, role: str) -> TrainedModel:
        plan, options = self.plan, self.plan.recipe.teacher
        assert options is not None
        assert plan.teacher is not None
        assert plan.teacher_input is not None
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
        seed = plan.recipe.seed if options.same_init else teacher_seed(plan.recipe.seed)
        model, output = self._build(options, plan.teacher, seed), plan.output_of("teacher")
        return TrainedModel(role, model, plan.teacher, plan.teacher_input, phases, output)

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
                age=age,
            )
            phases += [phase] * bool(own_objectives)
            age += stage.epochs
        return tuple(phases)

    def _build(self, options: ModelOptions, trace_: Trace, seed: int) -> nn.Module:
        set_seed(seed)
        model = build_model(trace_.model, trace_.model_kwargs, pretrained=options.pretrained)
        if options.pretrained and options.new_classifier:
            set_seed(seed)
            renew_classifier(model, build_model(trace_.model, trace_.model_kwargs))
        if options.grad_checkpointing:
            checkpoint_gradients(model, trace_.model)
        if options.checkpoint:
            load_weights(model, options.checkpoint, classifier_of(options))
        return self._to_device(model)

    def _to_device(self, model: nn.Module) -> nn.Module:
        model = model.to(self.accelerator.device)
        return model.to(memory_format=memory_format(self.plan.recipe, self.accelerator.device))


def teacher_seed(seed: int) -> int:
    """The seed of a teacher's initial weights, far from the seeds of students, which are small numbers.

    With the same seed, a teacher and a student of one architecture would have the same initial weights, and their
    agreement would be no evidence.
    """
    return (seed + 2**31) % 2**32


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
