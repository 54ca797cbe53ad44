"""Training: from a plan to a folder of results. Reads from top to bottom.

A run trains up to three subjects, one after the other: the teacher where it has no weights yet, the student alone where
the recipe asks for a baseline, and the student. The two students begin with the same weights, and in a recipe of one
stage see the same images in the same order.
Where a recipe shares (Rocket Launching), the first is the teacher alone, and the last is the student with a teacher
that began as the first did.
"""

import json
import math
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, set_seed
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader

from probe_kd import __version__
from probe_kd.adapters import ImageView
from probe_kd.data import loader, mixer
from probe_kd.distiller import Distiller
from probe_kd.errors import RunError
from probe_kd.models import build_model, load_weights, save_weights
from probe_kd.objectives import Objective
from probe_kd.recipe import ModelOptions, OptimizerOptions, Plan, SchedulerOptions, dump, join
from probe_kd.report import Display, Reach, Result, Row, write_metrics
from probe_kd.sharing import Sharing
from probe_kd.spec import InputSpec, Trace
from probe_kd.surgery import in_pattern

CHECKPOINT = "checkpoint"
BEST = "best.safetensors"
TEACHER_ALONE, STUDENT_ALONE = "teacher alone", "student alone"


@dataclass(frozen=True)
class Phase:
    """One stage of one subject."""

    name: str
    epochs: int
    objectives: tuple[Objective, ...]
    optimizer: OptimizerOptions
    scheduler: SchedulerOptions
    clip_grad: float | None = None
    keep: str = "last"


@dataclass(frozen=True)
class Subject:
    """A model to be trained, and how. `partner` is the teacher that trains with it, and `sharing` what they share."""

    role: str
    model: nn.Module
    trace: Trace
    input: InputSpec
    phases: tuple[Phase, ...]
    partner: "Subject | None" = None
    sharing: Sharing | None = None


@dataclass
class Journal:
    """All that a run has to remember besides weights: plain values, written with every checkpoint."""

    results: dict[str, Result] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)
    role: str = ""
    phase: int = 0
    epoch: int = 0  # epochs of this phase that are done
    seconds: float = 0.0  # spent on this subject
    best: float | None = None  # the least held-out loss of this phase, where it keeps the best epoch

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
    accelerator = Accelerator(mixed_precision=plan.recipe.precision)
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
            if subject.partner:
                load_weights(subject.partner.model, folder / journal.results["teacher"].weights)
        if subject.role in ("teacher", TEACHER_ALONE):
            run.teacher = subject
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        shutil.rmtree(folder / CHECKPOINT, ignore_errors=True)
    return journal


def audit(plan: Plan) -> tuple[list[Reach], list[str]]:
    """The gradient of every loss on one real batch, before anything is trained; and what is wrong with it.

    Wrong are a loss that moves nothing, a gradient that is not finite, and a parameter that no loss of any stage
    reaches although the student's answer depends on it.
    """
    accelerator = Accelerator()
    run = _Run(plan, Path(), Display(Console(quiet=True), quiet=True), accelerator, Journal(), resuming=False)
    found: list[Reach] = []
    missed: set[str] | None = None
    for subject in run.subjects():
        if subject.role in ("teacher", TEACHER_ALONE) and not plan.recipe.share:
            run.teacher = subject
        if subject.role != "student":
            continue
        batches = loader(plan.datasets.train, plan.recipe.data, run._images_for(subject), training=True)
        images, target = next(iter(accelerator.prepare_data_loader(batches)))
        for phase in subject.phases:
            distiller = run._distiller(subject, phase)
            norms = distiller.train().audit(images, target)
            reached = {name for loss in norms.values() for name in loss}
            named = [name for name, _ in distiller.named_parameters() if name.startswith("student.")]
            missed = set(named) - reached if missed is None else missed - reached
            found += [reach for loss in norms for reach in _by_part(phase.name, loss, norms[loss], distiller)]
            distiller.close()
        answer = Distiller(subject.model, None, [Objective("cross_entropy")], student_input=subject.input)
        answer.to(accelerator.device)
        used = set(answer.train().audit(images, target)["cross_entropy"])
        answer.close()
        missed = (missed or set()) & used
    return found, _complaints(found, sorted(missed or ()))


def _by_part(stage: str, loss: str, norms: Mapping[str, float], distiller: Distiller) -> list[Reach]:
    parts: dict[str, list[str]] = {}
    shared = {id(parameter) for parameter in distiller.shared}
    for name, parameter in distiller.named_parameters():
        part = ".".join(name.split(".")[: 1 if name.startswith("adapters") else 2])
        part = part.replace("student.", "shared.") if id(parameter) in shared else part
        parts.setdefault(part, []).append(name)
    rows = [(part, [norms[name] for name in names if name in norms], len(names)) for part, names in parts.items()]
    kept = [row for row in rows if row[1]] or [("nothing", [0.0], 0)]
    return [Reach(stage, loss, part, len(some), total, math.hypot(*some)) for part, some, total in kept]


def _complaints(found: Sequence[Reach], missed: Sequence[str]) -> list[str]:
    says = []
    for stage, loss in dict.fromkeys((reach.stage, reach.loss) for reach in found):
        norms = [reach.norm for reach in found if (reach.stage, reach.loss) == (stage, loss)]
        if not all(map(math.isfinite, norms)):
            says.append(f"loss `{loss}` of stage `{stage}` has a gradient that is not finite")
        elif not any(norms):
            says.append(f"loss `{loss}` of stage `{stage}` moves nothing; leave it out, or compare what can be trained")
    if missed:
        names = ", ".join(missed[:6]) + (f" and {len(missed) - 6} more" if len(missed) > 6 else "")
        says.append(
            f"no loss of any stage trains {names}; add one that reads the student's answer, `cross_entropy` say"
        )
    return says


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
        foreign = [file.name for file in folder.iterdir() if not _is_ours(file)]
        if foreign:
            raise RunError(
                f"{folder} holds more than a run writes ({', '.join(sorted(foreign)[:3])}), and will not be "
                "overwritten; choose another --out"
            )
        shutil.rmtree(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        recipe.write_text(resolved, encoding="utf-8")
    except OSError as refusal:
        raise RunError(f"cannot write to {folder}: {refusal.strerror}") from None
    return Journal()


def _is_ours(file: Path) -> bool:
    """Whether a run writes a file or folder of this name."""
    if file.is_dir():
        return file.name in (CHECKPOINT, f"{CHECKPOINT}.new", f"{CHECKPOINT}.old")
    roles = ("teacher", "student", "teacher-alone", "student-alone")
    tables = ("recipe.yaml", "metrics.csv", "curves.png", "summary.json")
    return file.name in (*tables, *(f"{role}.safetensors" for role in roles)) or file.suffix == ".partial"


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
    best: dict[str, Tensor] = field(default_factory=dict)

    def subjects(self) -> Iterator[Subject]:
        """Each is built when its turn comes."""
        plan, recipe = self.plan, self.plan.recipe
        if recipe.teacher is not None:
            yield self._teacher(TEACHER_ALONE if recipe.share else "teacher")
        if recipe.baseline:
            model, phases = self._build(recipe.student, plan.student), self._stages(alone="student")
            yield Subject(STUDENT_ALONE, model, plan.student, self._input_alone(), phases)
        model, partner, sharing = self._build(recipe.student, plan.student), None, None
        if recipe.share and plan.teacher:
            self.teacher = partner = self._teacher("teacher")
            self.teacher_answers = None
            set_seed(recipe.seed)  # of a graft's adapter
            model, sharing = join(recipe.share, model, partner.model, plan.student, plan.teacher)
            model.to(self.accelerator.device)
        yield Subject("student", model, plan.trained, plan.student_input, self._stages(), partner, sharing)

    def _teacher(self, role: str) -> Subject:
        plan, options = self.plan, self.plan.recipe.teacher
        assert options is not None
        assert plan.teacher is not None
        assert plan.teacher_input is not None
        phases: tuple[Phase, ...] = ()
        if options.train is not None:
            wish = options.train
            labels = Objective("cross_entropy", "task", options={"label_smoothing": wish.label_smoothing})
            phases = (Phase("train", wish.epochs, (labels,), wish.optimizer, wish.scheduler),)
        elif role == TEACHER_ALONE and not (options.pretrained or options.checkpoint):
            phases = self._stages(alone="teacher")
        return Subject(role, self._build(options, plan.teacher), plan.teacher, plan.teacher_input, phases)

    def _input_alone(self) -> InputSpec:
        """What the plain student sees: the size that the recipe gives, also where a graft sees the teacher's."""
        return replace(self.plan.student_input, size=self.plan.student.input_size)

    def _build(self, options: ModelOptions, trace_: Trace) -> nn.Module:
        set_seed(self.plan.recipe.seed)
        model = build_model(trace_.model, trace_.model_kwargs, pretrained=options.pretrained)
        if options.checkpoint:
            load_weights(model, options.checkpoint)
        return model.to(self.accelerator.device)

    def _stages(self, alone: str = "") -> tuple[Phase, ...]:
        """The recipe's stages; for a model alone, what of them it can learn from labels."""
        phases = []
        for stage, objectives in zip(self.plan.recipe.stages, self.plan.objectives, strict=True):
            kept = _labels_only(objectives, alone) if alone else objectives
            options = stage.optimizer if not alone else stage.optimizer.model_copy(update={"lr_scale": {}})
            phase = Phase(stage.name, stage.epochs, kept, options, stage.scheduler, stage.clip_grad, stage.keep)
            phases += [phase] * bool(kept)
        return tuple(phases)

    def train_subject(self, subject: Subject) -> None:
        journal = self.journal
        if journal.role != subject.role:
            journal.role, journal.phase, journal.epoch, journal.seconds = subject.role, 0, 0, 0.0
            journal.best = None
        for index in range(journal.phase, len(subject.phases)):
            if index != journal.phase:
                journal.phase, journal.epoch, journal.best = index, 0, None
            self._train_phase(subject, subject.phases[index])
        self._finish(subject)

    def _train_phase(self, subject: Subject, phase: Phase) -> None:
        accelerator, first = self.accelerator, self.journal.epoch
        distiller = self._distiller(subject, phase)
        resting: list[nn.Parameter] = []
        try:
            resting = self._leave_out_what_no_loss_reaches(distiller, subject)
            loop = self._loop(subject, phase, distiller)
            if self.resuming:
                accelerator.load_state(str(self.folder / CHECKPOINT))
                best = self.folder / CHECKPOINT / BEST
                self.best = load_file(best) if best.exists() else {}
                self.resuming = False
            else:
                self.save()
            self.display.begin(f"{subject.role}: {phase.name}", phase.epochs, len(loop.batches), first)
            for epoch in range(first, phase.epochs):
                set_seed(self._seed(epoch), device_specific=True)
                started = time.perf_counter()
                losses = self._train_epoch(loop, epoch)
                seconds = time.perf_counter() - started
                if phase.keep == "best":
                    losses["held_out_loss"] = self._keep_if_best(loop, subject)
                self._record(subject, phase, losses, seconds)
            if self.best:
                distiller.load_state_dict(self.best)
        finally:
            self.best = {}
            self.display.end()
            distiller.close()
            accelerator.free_memory()
            for parameter in resting:
                parameter.requires_grad_(True)

    def _leave_out_what_no_loss_reaches(self, distiller: Distiller, subject: Subject) -> list[nn.Parameter]:
        """So that no optimizer moves it, by weight decay say, and DDP does not wait for it. Returns what rests."""
        generator = torch.Generator().manual_seed(0)
        images = torch.randn(2, *self._images_for(subject).size, generator=generator).to(self.accelerator.device)
        target = torch.zeros(2, dtype=torch.long, device=self.accelerator.device)
        distiller.train()
        reached = {name for found in distiller.audit(images, target).values() for name in found}
        resting = [p for name, p in distiller.named_parameters() if p.requires_grad and name not in reached]
        for parameter in resting:
            parameter.requires_grad_(False)
        return resting

    @torch.no_grad()
    def _keep_if_best(self, loop: "_Loop", subject: Subject) -> float:
        """The weighted loss on held-out images; of the epochs of a phase, the weights with the least are kept."""
        datasets, accelerator = self.plan.datasets, self.accelerator
        assert datasets.held_out is not None
        images_held_out = loader(datasets.held_out, self.plan.recipe.data, self._images_for(subject), training=False)
        losses: list[Tensor] = []
        distiller = loop.distiller.eval()
        distiller.set_epoch(loop.phase.epochs, loop.phase.epochs)  # one measure for all epochs, whatever is scheduled
        for images, target in accelerator.prepare_data_loader(images_held_out):
            if len(target) > 1 or not losses:  # one image has no variance, which some losses divide by
                with accelerator.autocast():
                    loss = distiller(images, target)["loss"]
                losses.append(accelerator.gather_for_metrics(loss.repeat(len(target))).cpu())
        mean = torch.cat(losses).double().mean().item()
        if self.journal.best is None or not mean >= self.journal.best:  # also after one that is no number
            self.journal.best = mean
            self.best = {name: tensor.detach().cpu().clone() for name, tensor in distiller.state_dict().items()}
        return mean

    def _distiller(self, subject: Subject, phase: Phase) -> Distiller:
        needed = subject.partner or any(objective.needs_teacher for objective in phase.objectives)
        teacher = self.teacher if needed else None
        share = self.plan.recipe.share
        set_seed(self.plan.recipe.seed)  # of the adapters
        distiller = Distiller(
            subject.model,
            teacher.model if teacher else None,
            phase.objectives,
            student_input=subject.input,
            teacher_input=teacher.input if teacher else None,
            student_trace=subject.trace if subject.trace.training else None,
            teacher_trace=teacher.trace if teacher else None,
            class_map=self.plan.class_map,
            block=share.block if share and subject.partner else None,
            sharing=subject.sharing,
        )
        return distiller.to(self.accelerator.device)

    def _loop(self, subject: Subject, phase: Phase, distiller: Distiller) -> "_Loop":
        images = loader(self.plan.datasets.train, self.plan.recipe.data, self._images_for(subject), training=True)
        module, optimizer, batches = self.accelerator.prepare(distiller, _optimizer(distiller, phase.optimizer), images)
        schedule = _scheduler(optimizer, phase, len(batches))
        mix = mixer(self.plan.recipe.data, self.plan.datasets.num_classes)
        return _Loop(distiller, module, optimizer, batches, schedule, phase, mix)

    def _images_for(self, subject: Subject) -> InputSpec:
        """Normalised for this subject, and as large as the larger model wants: each takes its own view of them."""
        other = self.teacher.input if self.teacher and subject.role != "teacher" else subject.input
        return subject.input.covering(other)

    def _seed(self, epoch: int) -> int:
        """One seed for one epoch, so that what a resumed run sees does not depend on what went before."""
        return (self.plan.recipe.seed * 1_000_003 + self.journal.phase * 10_007 + epoch + 1) % 2**31

    def _train_epoch(self, loop: "_Loop", epoch: int) -> Row:
        accelerator, display = self.accelerator, self.display
        loop.module.train()
        sums: dict[str, Tensor] = {}
        for index, (images, target) in enumerate(loop.batches):
            loop.schedule.step_update(epoch * len(loop.batches) + index)
            loop.distiller.set_epoch(epoch + index / len(loop.batches), loop.phase.epochs)
            if loop.mix is not None:
                images, target = loop.mix(images, target)
            result = loop.module(images, target)
            accelerator.backward(result["loss"])
            if loop.phase.clip_grad is not None:
                accelerator.clip_grad_norm_(loop.module.parameters(), loop.phase.clip_grad)
            loop.optimizer.step()
            loop.optimizer.zero_grad()
            for name in result.keys() - {"output"}:
                sums[name] = sums.get(name, 0.0) + result[name].detach()
            if display.step(len(target) * accelerator.num_processes):
                display.losses(self._means(sums, index + 1))
        rate = max(group["lr"] for group in loop.optimizer.param_groups)  # of what is not scaled down
        return {"lr": rate, **self._means(sums, len(loop.batches))}

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
        rate = len(self.plan.datasets.train) / seconds  # type: ignore[arg-type]
        for measured in filter(None, (subject.partner, subject)):
            accuracy, agreement = self._measure(measured)
            row = {"subject": measured.role, "stage": phase.name, "epoch": journal.epoch, "accuracy": accuracy}
            row |= {"agreement": agreement, "images_per_second": round(rate, 1)}
            journal.rows.append(row | losses if measured is subject else row)
        self.save()
        self.display.epoch(journal.rows[-1])

    def _measure(self, subject: Subject) -> tuple[float, float | None]:
        """(accuracy, agreement with the teacher) on the test images; no agreement for the teacher itself."""
        answers, targets = self._answers(subject)
        accuracy = (answers == targets).double().mean().item()
        if subject is self.teacher or subject.role == TEACHER_ALONE:  # while it trains, its answers change
            self.teacher_answers = answers
            return accuracy, None
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
            logits = _logits(output)
            if self.plan.class_map is not None and subject.role == "teacher":
                logits = logits[:, list(self.plan.class_map)]
            answer = logits.argmax(1)
            gathered = accelerator.gather_for_metrics((answer, target))
            answers.append(gathered[0].cpu())
            targets.append(gathered[1].cpu())
        return torch.cat(answers), torch.cat(targets)

    def _finish(self, subject: Subject) -> None:
        if subject.partner is not None or subject is self.teacher:
            self.teacher_answers = None  # `keep: best` may have gone back to other weights
        if subject.partner is not None:
            self._finish(replace(subject.partner, phases=subject.phases))
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
            save_weights(subject.model, self.folder / weights, about | self._about_graft(subject))
        self.journal.results[subject.role] = result

    def _about_graft(self, subject: Subject) -> dict[str, Any]:
        """What `load_student` needs to build a student that is no single model of timm."""
        plan, share = self.plan, self.plan.recipe.share
        if not (share and share.form == "graft" and plan.teacher and subject.role == "student"):
            return {}
        sides = {"student": (plan.student, share.cut[0]), "teacher": (plan.teacher, share.cut[1])}
        return {
            "graft": {
                side: {
                    "model": trace_.model,
                    "model_kwargs": dict(trace_.model_kwargs),
                    "input_size": list(trace_.input_size),
                    "at": str(at),
                }
                for side, (trace_, at) in sides.items()
            }
        }

    def save(self) -> None:
        """Write the checkpoint aside, then put it in the place of the last: whenever we are stopped, one is whole."""
        now, new, old = (self.folder / f"{CHECKPOINT}{end}" for end in ("", ".new", ".old"))
        if self.accelerator.is_main_process:
            shutil.rmtree(new, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        # Not as safetensors, which would leave out one of two names of a tensor that two models share, and not always
        # the same one. It is read with `weights_only`.
        self.accelerator.save_state(str(new), safe_serialization=False)
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            self.journal.write(new / "journal.json")
            if self.best:
                save_file(self.best, new / BEST)
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

    distiller: Distiller
    module: nn.Module  # the distiller, as it is prepared
    optimizer: torch.optim.Optimizer
    batches: DataLoader[Any]
    schedule: Any
    phase: Phase
    mix: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None


def _logits(output: Any) -> Tensor:
    """The model's answer: the first tensor, where it gives several."""
    while not isinstance(output, Tensor):
        output = next(iter(output.values())) if isinstance(output, Mapping) else output[0]
    return output


def _labels_only(objectives: Sequence[Objective], side: str) -> tuple[Objective, ...]:
    """What a model alone can learn from. A single loss weighs 1: less would only be a smaller learning rate."""
    labels = [
        replace(objective, of="student")
        for objective in objectives
        if objective.resolved.reads == "labels" and objective.of == side
    ]
    return (replace(labels[0], weight=1.0),) if len(labels) == 1 else tuple(labels)


def _optimizer(distiller: Distiller, options: OptimizerOptions) -> torch.optim.Optimizer:
    """timm's optimizer over all that trains, without weight decay on biases and norms."""
    from timm.optim import create_optimizer_v2, param_groups_weight_decay

    decay, groups, seen = options.weight_decay, [], set[int]()
    for model in filter(None, (distiller.student, distiller.teacher)):
        for group in _groups(model, options):
            fresh = [parameter for parameter in group["params"] if id(parameter) not in seen]  # shared by both
            seen |= {id(parameter) for parameter in fresh}
            groups += _scaled({**group, "params": fresh}, distiller.student, options.lr_scale)
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


def _groups(model: nn.Module, options: OptimizerOptions) -> list[dict[str, Any]]:
    from timm.optim import param_groups_layer_decay, param_groups_weight_decay

    exempt: set[str] = getattr(model, "no_weight_decay", set)()  # timm models name them
    arguments: dict[str, Any] = {"weight_decay": options.weight_decay, "no_weight_decay_list": exempt}
    if options.layer_decay is None:
        return list(param_groups_weight_decay(model, **arguments))
    return list(param_groups_layer_decay(model, **arguments, layer_decay=options.layer_decay))


def _scaled(group: dict[str, Any], student: nn.Module, scales: Mapping[str, float]) -> list[dict[str, Any]]:
    """The group, divided by how its learning rate is scaled; timm's schedulers read `lr_scale`."""
    # The layers that a graft keeps of the plain student go by the names that they have in it.
    names = {id(parameter): name.removeprefix("body.") for name, parameter in student.named_parameters()}
    parts: dict[float, list[nn.Parameter]] = {}
    for parameter in group["params"]:
        found = [scale for pattern, scale in scales.items() if in_pattern(names.get(id(parameter), ""), pattern)]
        parts.setdefault(found[-1] if found else 1.0, []).append(parameter)
    own = group.get("lr_scale", 1.0)
    return [{**group, "params": part, "lr_scale": own * scale} for scale, part in parts.items()]


def _scheduler(optimizer: torch.optim.Optimizer, phase: Phase, steps: int) -> Any:
    """timm's schedule of the learning rate, set anew for every update from its number alone."""
    from timm.scheduler import create_scheduler_v2

    options = phase.scheduler.model_dump()
    schedule, _ = create_scheduler_v2(
        optimizer, num_epochs=phase.epochs, step_on_epochs=False, updates_per_epoch=steps, **options
    )
    return schedule
