"""Training: from a plan to a folder of results. Reads from top to bottom.

A run trains up to three subjects, one after the other: the teacher where it has no weights yet, the student alone where
the recipe asks for a baseline, and the student. The two students begin with the same weights and see the same images.
"""

import json
import math
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.utils import broadcast_object_list, set_seed
from torch import Tensor, nn
from torch.utils.data import DataLoader

from probe_kd import __version__
from probe_kd.adapters import ImageView
from probe_kd.data import loader
from probe_kd.distiller import Distiller, Objective
from probe_kd.errors import RunError
from probe_kd.models import build_model, load_weights, save_weights
from probe_kd.recipe import ModelOptions, OptimizerOptions, Plan, SchedulerOptions, dump
from probe_kd.report import Display, Result, Row, write_metrics
from probe_kd.spec import InputSpec, Trace

CHECKPOINT = "checkpoint"


@dataclass(frozen=True)
class Phase:
    """One stage of one subject."""

    name: str
    epochs: int
    objectives: tuple[Objective, ...]
    optimizer: OptimizerOptions
    scheduler: SchedulerOptions
    clip_grad: float | None = None


@dataclass(frozen=True)
class Subject:
    """A model to be trained, and how."""

    role: str
    model: nn.Module
    trace: Trace
    input: InputSpec
    phases: tuple[Phase, ...]


@dataclass
class Journal:
    """All that a run has to remember besides weights: plain values, written with every checkpoint."""

    results: dict[str, Result] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)
    role: str = ""
    phase: int = 0
    epoch: int = 0  # epochs of this phase that are done
    seconds: float = 0.0  # spent on this subject

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self), indent=1), encoding="utf-8")

    @classmethod
    def read(cls, path: Path) -> "Journal":
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            results = {role: Result(**result) for role, result in values.pop("results").items()}
            return cls(results=results, **values)
        except (OSError, ValueError, TypeError, KeyError) as refusal:
            raise RunError(f"{path} is not the journal of a run: {refusal}; start anew with --overwrite") from None


def train(plan: Plan, folder: Path, display: Display, *, resume: bool = False, overwrite: bool = False) -> Journal:
    """Run the plan and write `folder`: recipe.yaml, metrics.csv, and the weights of every subject that was trained.

    `resume` goes on after the last epoch that was finished, as if the run had not stopped; `overwrite` deletes what a
    former run left. Raises RunError where a run is in the folder and neither was asked for, where the recipe to resume
    is another, and where a loss stops being a number.
    """
    unused = DistributedDataParallelKwargs(find_unused_parameters=_leaves_layers_out(plan))
    accelerator = Accelerator(mixed_precision=plan.recipe.precision, kwargs_handlers=[unused])
    journals: list[Any] = [None]
    if accelerator.is_main_process:
        journals = [open_run(plan, folder, resume=resume, overwrite=overwrite)]
    journal: Journal = broadcast_object_list(journals)[0]
    run = _Run(plan, folder, display, accelerator, journal, resuming=resume)
    for subject in run.subjects():
        result = journal.results.get(subject.role)
        if result is None:
            run.train_subject(subject)
        elif result.weights:
            load_weights(subject.model, folder / result.weights)
        if subject.role == "teacher":
            run.teacher = subject
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        shutil.rmtree(folder / CHECKPOINT, ignore_errors=True)
    return journal


def _leaves_layers_out(plan: Plan) -> bool:
    """Whether some stage trains on features alone, so that the layers above them get no gradient."""
    reads = [{objective.resolved.reads for objective in objectives} for objectives in plan.objectives]
    return any(not kinds & {"labels", "outputs"} for kinds in reads)


def open_run(plan: Plan, folder: Path, *, resume: bool, overwrite: bool) -> Journal:
    """Make the folder, or find what to resume. Nothing of another run is touched unless it was asked for."""
    resolved = dump(plan.resolved)
    recipe = folder / "recipe.yaml"
    if resume:
        return _reopen(folder, recipe, resolved)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        if not overwrite:
            raise RunError(
                f"{folder} is not empty; go on with it by --resume, replace it by --overwrite, or choose another --out"
            )
        if not recipe.is_file():
            raise RunError(f"{folder} is not the folder of a run (it has no recipe.yaml), and will not be overwritten")
        shutil.rmtree(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        recipe.write_text(resolved, encoding="utf-8")
    except OSError as refusal:
        raise RunError(f"cannot write to {folder}: {refusal.strerror}") from None
    return Journal()


def _reopen(folder: Path, recipe: Path, resolved: str) -> Journal:
    now, old = folder / CHECKPOINT, folder / f"{CHECKPOINT}.old"
    if old.exists() and not now.exists():  # stopped in the middle of `_Run.save`
        old.rename(now)
    if not (now / "journal.json").exists():
        done = (folder / "student.safetensors").exists()
        raise RunError(f"nothing to resume in {folder}: " + ("the run is finished" if done else "it has no checkpoint"))
    if not recipe.is_file() or recipe.read_text(encoding="utf-8") != resolved:
        raise RunError(f"the recipe is not the one that {folder} was begun with ({recipe}); --overwrite begins anew")
    return Journal.read(now / "journal.json")


@dataclass
class _Run:
    plan: Plan
    folder: Path
    display: Display
    accelerator: Accelerator
    journal: Journal
    resuming: bool
    teacher: Subject | None = None
    teacher_answers: Tensor | None = None

    def subjects(self) -> Iterator[Subject]:
        """Each is built when its turn comes, so that no more than two models are in memory."""
        plan, recipe = self.plan, self.plan.recipe
        if recipe.teacher is not None and plan.teacher is not None and plan.teacher_input is not None:
            model = self._build(recipe.teacher, plan.teacher)
            yield Subject("teacher", model, plan.teacher, plan.teacher_input, self._teacher_phases())
        for role in ("student alone", "student") if recipe.baseline else ("student",):
            model = self._build(recipe.student, plan.student)
            phases = self._student_phases(alone=role == "student alone")
            yield Subject(role, model, plan.student, plan.student_input, phases)

    def _build(self, options: ModelOptions, trace_: Trace) -> nn.Module:
        set_seed(self.plan.recipe.seed)
        model = build_model(trace_.model, trace_.model_kwargs, pretrained=options.pretrained)
        if options.checkpoint:
            load_weights(model, options.checkpoint)
        return model.to(self.accelerator.device)

    def _teacher_phases(self) -> tuple[Phase, ...]:
        teacher = self.plan.recipe.teacher
        if teacher is None or teacher.train is None:
            return ()
        wish = teacher.train
        labels = Objective("cross_entropy", "task", options={"label_smoothing": wish.label_smoothing})
        return (Phase("train", wish.epochs, (labels,), wish.optimizer, wish.scheduler),)

    def _student_phases(self, *, alone: bool) -> tuple[Phase, ...]:
        phases = []
        for stage, objectives in zip(self.plan.recipe.stages, self.plan.objectives, strict=True):
            if alone:
                objectives = _labels_only(objectives)
            if objectives:
                phase = Phase(stage.name, stage.epochs, objectives, stage.optimizer, stage.scheduler, stage.clip_grad)
                phases.append(phase)
        return tuple(phases)

    def train_subject(self, subject: Subject) -> None:
        journal = self.journal
        if journal.role != subject.role:
            journal.role, journal.phase, journal.epoch, journal.seconds = subject.role, 0, 0, 0.0
        for index in range(journal.phase, len(subject.phases)):
            if index != journal.phase:
                journal.phase, journal.epoch = index, 0
            self._train_phase(subject, subject.phases[index])
        self._finish(subject)

    def _train_phase(self, subject: Subject, phase: Phase) -> None:
        accelerator, first = self.accelerator, self.journal.epoch
        distiller = self._distiller(subject, phase)
        loop = self._loop(subject, phase, distiller)
        if self.resuming:
            accelerator.load_state(str(self.folder / CHECKPOINT))
            self.resuming = False
        else:
            self.save()
        self.display.begin(f"{subject.role}: {phase.name}", phase.epochs, len(loop.batches), first)
        try:
            for epoch in range(first, phase.epochs):
                set_seed(self._seed(epoch), device_specific=True)
                started = time.perf_counter()
                losses = self._train_epoch(loop, epoch)
                self._record(subject, phase, losses, time.perf_counter() - started)
        finally:
            self.display.end()
            distiller.close()
            accelerator.free_memory()

    def _distiller(self, subject: Subject, phase: Phase) -> Distiller:
        teacher = self.teacher if any(objective.tap_pairs() for objective in phase.objectives) else None
        set_seed(self.plan.recipe.seed)  # of the adapters
        distiller = Distiller(
            subject.model,
            teacher.model if teacher else None,
            phase.objectives,
            student_input=subject.input,
            teacher_input=teacher.input if teacher else None,
            student_trace=subject.trace if subject.trace.training else None,
            teacher_trace=teacher.trace if teacher else None,
        )
        return distiller.to(self.accelerator.device)

    def _loop(self, subject: Subject, phase: Phase, distiller: Distiller) -> "_Loop":
        images = loader(self.plan.datasets.train, self.plan.recipe.data, self._images_for(subject), training=True)
        module, optimizer, batches = self.accelerator.prepare(distiller, _optimizer(distiller, phase.optimizer), images)
        return _Loop(module, optimizer, batches, _scheduler(optimizer, phase, len(batches)), phase.clip_grad)

    def _images_for(self, subject: Subject) -> InputSpec:
        """Normalised for this subject, and as large as the larger model wants: each takes its own view of them."""
        other = self.teacher.input if self.teacher and subject.role != "teacher" else subject.input
        channels, height, width = subject.input.size
        size = channels, max(height, other.size[1]), max(width, other.size[2])
        return replace(subject.input, size=size)

    def _seed(self, epoch: int) -> int:
        """One seed for one epoch, so that what a resumed run sees does not depend on what went before."""
        return (self.plan.recipe.seed * 1_000_003 + self.journal.phase * 10_007 + epoch + 1) % 2**31

    def _train_epoch(self, loop: "_Loop", epoch: int) -> Row:
        accelerator, display = self.accelerator, self.display
        loop.module.train()
        sums: dict[str, Tensor] = {}
        for index, (images, target) in enumerate(loop.batches):
            loop.schedule.step_update(epoch * len(loop.batches) + index)
            result = loop.module(images, target)
            accelerator.backward(result["loss"])
            if loop.clip_grad is not None:
                accelerator.clip_grad_norm_(loop.module.parameters(), loop.clip_grad)
            loop.optimizer.step()
            loop.optimizer.zero_grad()
            for name in result.keys() - {"output"}:
                sums[name] = sums.get(name, 0.0) + result[name].detach()
            if display.step(len(target) * accelerator.num_processes):
                display.losses(self._means(sums, index + 1))
        return {"lr": loop.optimizer.param_groups[0]["lr"], **self._means(sums, len(loop.batches))}

    def _means(self, sums: Mapping[str, Tensor], count: int) -> dict[str, float]:
        means = {name: float(total) / count for name, total in sorted(sums.items())}
        wrong = [name for name, mean in means.items() if not math.isfinite(mean) and name != "loss"]
        if wrong:
            journal = self.journal
            raise RunError(
                f"{', '.join(map(repr, wrong))} of {journal.role} became {means[wrong[0]]} in epoch "
                f"{journal.epoch + 1}; try a smaller `lr`, `clip_grad: 1.0`, `normalize: layer`, or `precision: bf16`"
            )
        return means

    def _record(self, subject: Subject, phase: Phase, losses: Row, seconds: float) -> None:
        """The end of an epoch: measure, write, save, show."""
        journal = self.journal
        journal.epoch += 1
        journal.seconds += seconds
        accuracy, agreement = self._measure(subject)
        place = {"subject": subject.role, "stage": phase.name, "epoch": journal.epoch}
        rate = len(self.plan.datasets.train) / seconds  # type: ignore[arg-type]
        row = {**place, "accuracy": accuracy, "agreement": agreement, "images_per_second": round(rate, 1), **losses}
        journal.rows.append(row)
        self.save()
        self.display.epoch(row)

    def _measure(self, subject: Subject) -> tuple[float, float | None]:
        """(accuracy, agreement with the teacher) on the test images; no agreement for the teacher itself."""
        answers, targets = self._answers(subject)
        accuracy = (answers == targets).double().mean().item()
        if self.teacher is None or subject.role == "teacher":
            return accuracy, None
        if self.teacher_answers is None:
            self.teacher_answers, _ = self._answers(self.teacher)
        return accuracy, (answers == self.teacher_answers).double().mean().item()

    @torch.no_grad()
    def _answers(self, subject: Subject) -> tuple[Tensor, Tensor]:
        """(predicted classes, true classes) of all test images, in their order."""
        accelerator = self.accelerator
        given = self._images_for(subject)
        images_of_test = loader(self.plan.datasets.test, self.plan.recipe.data, given, training=False)
        model, view = subject.model.eval(), ImageView(subject.input, subject.input).to(accelerator.device)
        answers, targets = [], []
        for images, target in accelerator.prepare_data_loader(images_of_test):
            with accelerator.autocast():
                output = model(view(images))
            answer = _logits(output).argmax(1)
            gathered = accelerator.gather_for_metrics((answer, target))
            answers.append(gathered[0].cpu())
            targets.append(gathered[1].cpu())
        return torch.cat(answers), torch.cat(targets)

    def _finish(self, subject: Subject) -> None:
        accuracy, agreement = self._measure(subject)
        weights = f"{subject.role.replace(' ', '-')}.safetensors" if subject.phases else ""
        trace_ = subject.trace
        result = Result(
            role=subject.role,
            model=trace_.model,
            model_kwargs=dict(trace_.model_kwargs),
            parameters=trace_.parameters,
            macs=trace_.macs,
            accuracy=accuracy,
            agreement=agreement,
            seconds=round(self.journal.seconds, 2),
            weights=weights,
        )
        if weights and self.accelerator.is_main_process:
            about = {"model": trace_.model, "model_kwargs": dict(trace_.model_kwargs), "probe_kd": __version__}
            save_weights(subject.model, self.folder / weights, about)
        self.journal.results[subject.role] = result

    def save(self) -> None:
        """Write the checkpoint aside, then put it in the place of the last: whenever we are stopped, one is whole."""
        now, new, old = (self.folder / f"{CHECKPOINT}{end}" for end in ("", ".new", ".old"))
        if self.accelerator.is_main_process:
            shutil.rmtree(new, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self.accelerator.save_state(str(new))
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            self.journal.write(new / "journal.json")
            shutil.rmtree(old, ignore_errors=True)
            if now.exists():
                now.rename(old)
            new.rename(now)
            shutil.rmtree(old, ignore_errors=True)
            write_metrics(self.journal.rows, self.folder / "metrics.csv")
        self.accelerator.wait_for_everyone()


@dataclass(frozen=True)
class _Loop:
    """What one phase runs on, after `accelerator.prepare`."""

    module: nn.Module
    optimizer: torch.optim.Optimizer
    batches: DataLoader[Any]
    schedule: Any
    clip_grad: float | None


def _logits(output: Any) -> Tensor:
    """The model's answer: the first tensor, where it gives several."""
    while not isinstance(output, Tensor):
        output = next(iter(output.values())) if isinstance(output, Mapping) else output[0]
    return output


def _labels_only(objectives: Sequence[Objective]) -> tuple[Objective, ...]:
    """What a student alone can learn from. A single loss weighs 1: less would only be a smaller learning rate."""
    labels = [objective for objective in objectives if objective.resolved.reads == "labels"]
    return (replace(labels[0], weight=1.0),) if len(labels) == 1 else tuple(labels)


def _optimizer(distiller: Distiller, options: OptimizerOptions) -> torch.optim.Optimizer:
    """timm's optimizer over the student and its adapters, without weight decay on biases and norms."""
    from timm.optim import create_optimizer_v2, param_groups_layer_decay, param_groups_weight_decay

    student, decay = distiller.student, options.weight_decay
    exempt: set[str] = getattr(student, "no_weight_decay", set)()  # timm models name them
    if options.layer_decay is None:
        groups = list(param_groups_weight_decay(student, decay, no_weight_decay_list=exempt))
    else:
        layer_decay = options.layer_decay
        groups = list(param_groups_layer_decay(student, decay, no_weight_decay_list=exempt, layer_decay=layer_decay))
    groups += param_groups_weight_decay(distiller.adapters, decay)
    optimizer: torch.optim.Optimizer = create_optimizer_v2(
        [group for group in groups if group["params"]],
        opt=options.opt,
        lr=options.lr,
        weight_decay=decay,
        momentum=options.momentum,
        **options.opt_args,
    )
    return optimizer


def _scheduler(optimizer: torch.optim.Optimizer, phase: Phase, steps: int) -> Any:
    """timm's schedule of the learning rate, set anew for every update from its number alone."""
    from timm.scheduler import create_scheduler_v2

    options = phase.scheduler.model_dump()
    schedule, _ = create_scheduler_v2(
        optimizer, num_epochs=phase.epochs, step_on_epochs=False, updates_per_epoch=steps, **options
    )
    return schedule
