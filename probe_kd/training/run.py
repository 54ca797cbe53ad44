"""Training: from a plan to a folder of results. Reads from top to bottom.

A run trains up to three subjects, one after the other: the teacher where it has no weights yet, the student alone where
the recipe asks for a baseline, and the student. The two students begin with the same weights, and see the same images
in the same order in every stage that both go through.
Where a recipe shares (Rocket Launching), the first is the teacher alone, and the last is the student with a teacher
that began as the first did.
"""

import hashlib
import json
import math
import os
import re
import signal
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from itertools import zip_longest
from pathlib import Path
from types import FrameType
from typing import Any, Literal

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, set_seed
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from probe_kd.data.batches import Batches
from probe_kd.data.cache import Stored, TeacherCache, key_of
from probe_kd.data.datasets import RECORD, DataRecord
from probe_kd.data.loading import loader, readable
from probe_kd.engine.models import (
    build_model,
    check_state,
    checkpoint_gradients,
    load_weights,
    own_tensors,
    portable,
    renew_classifier,
    save_weights,
    short,
)
from probe_kd.engine.spec import InputSpec, Trace
from probe_kd.errors import DataError, PeerLost, ProbeKDError, RunError, Stopped, WeightsError, for_all
from probe_kd.files.atomic import MANIFEST, whole_text
from probe_kd.files.run_folder import (
    LOCK,
    RECIPE,
    Claim,
    Manifest,
    changed,
    claim,
    clear,
    damaged,
    digests_of,
    first_changed,
    is_abandoned,
    kind_of,
    record,
    recording,
)
from probe_kd.methods.adapters import ImageView
from probe_kd.methods.distiller import Distiller
from probe_kd.methods.objectives import Objective
from probe_kd.methods.sharing import Sharing
from probe_kd.recipe.options import ModelOptions, Recipe, classifier_of, dump, load, parse, rewritten
from probe_kd.recipe.planner import Plan
from probe_kd.recipe.sections.sharing import join
from probe_kd.training import checkpoints
from probe_kd.training.loop import (
    Loop,
    Phase,
    cuda_settings,
    describe_device,
    memory_format,
    mixed_precision,
    own_accelerator,
)
from probe_kd.training.report import Display, Result, Row, is_measured, write_metrics, write_report, write_timm_summary
from probe_kd.version import __version__

JOURNAL, AVERAGE = "journal.json", "average.safetensors"
BEST, BEST_AVERAGE = "best.safetensors", "best-average.safetensors"
TRACKERS = "trackers"
TABLES = ("metrics.csv", "summary.csv", "curves.png", "summary.json")
TEACHER_ALONE, STUDENT_ALONE = "teacher alone", "student alone"
# What changes no training image.
UNSEEN = {
    *("batch_size", "workers", "views", "download", "root", "num_classes"),
    *("val_split", "test_split", "on_error"),
}
MOST_TRIED = 16  # images of the batch that is tried before training
ASK_EVERY = 20  # updates between which several processes do not ask each other whether to stop


@dataclass(frozen=True, eq=False)
class Subject:
    """A model to be trained, and how. `partner` is the teacher that trains with it, and `sharing` what they share."""

    role: str
    model: nn.Module
    trace: Trace
    input: InputSpec
    phases: tuple[Phase, ...]
    partner: "Subject | None" = None
    sharing: Sharing | None = None

    @property
    def learns_from_teacher(self) -> bool:
        return self.role == "student"


@dataclass
class Journal:
    """All that a run has to remember besides weights: plain values, written with every checkpoint."""

    results: dict[str, Result] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)
    role: str = ""
    phase: int = 0
    epoch: int = 0  # epochs of this phase that are done
    step: int = 0  # batches of the epoch after them that are done
    sums: dict[str, float] = field(default_factory=dict)  # of the losses of these batches
    seconds: float = 0.0  # spent on this subject
    best: float | None = None  # the least held-out loss of this phase, where it keeps the best epoch

    def begin(self, role: str) -> None:
        """A subject begins, unless it is the one that a resumed run stopped at."""
        if self.role != role:
            self.role, self.phase, self.epoch, self.step, self.sums = role, 0, 0, 0, {}
            self.seconds, self.best = 0.0, None

    def begin_phase(self, index: int) -> None:
        if self.phase != index:
            self.phase, self.epoch, self.step, self.sums, self.best = index, 0, 0, {}, None

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self), indent=1), encoding="utf-8")

    @classmethod
    def read(cls, path: Path) -> "Journal":
        try:
            values = json.loads(whole_text(path))
            results = {role: Result(**result) for role, result in values.pop("results").items()}
            return cls(results=results, **values)
        except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as refusal:
            raise RunError(f"{path} is not the journal of a run: {refusal}; start anew with --overwrite") from None


def train(
    plan: Plan,
    folder: Path,
    display: Display,
    *,
    resume: bool = False,
    overwrite: bool = False,
    claimed: Claim | None = None,
) -> Journal:
    """Run the plan and write `folder`: recipe.yaml, metrics.csv, and the weights of every subject that was trained.

    `resume` goes on after the last checkpoint, as if the run had not stopped, and begins where there is none;
    `overwrite` deletes what a former run left. SIGTERM and the first SIGINT end the update that the run is at, write a
    checkpoint and raise Stopped. `claimed` is the folder's lock, where the caller holds it already. Raises RunError
    where a run is in the folder and neither was asked for, where another process writes it, where the recipe to resume
    is another, where the folder vanishes or takes no checkpoint, and where a loss stops being a number; PeerLost where
    another process of the run ended; DataError where images cannot be read; WeightsError where a file that the run
    goes on from is not as it was written. All of them leave the last checkpoint as it was.
    """
    with accelerating(plan.recipe, folder) as accelerator, _listening(display) as signals, ExitStack() as after:
        after.enter_context(_with_peers(accelerator, folder))
        if not resume:
            check_student(plan, accelerator, display)  # before anything is written
        opened: list[Any] = [None]
        if accelerator.is_main_process:
            try:
                if claimed is None:
                    claimed = claim(folder, display.say)
                    after.callback(claimed.release)
                opened = [open_run(plan, folder, display, resume=resume, overwrite=overwrite)]
            except ProbeKDError as refusal:
                opened = [refusal]
        opened = broadcast_object_list(opened)
        if isinstance(opened[0], ProbeKDError):
            raise for_all(opened[0])
        journal: Journal
        journal, checkpoint = opened[0]
        if plan.recipe.trackers:
            accelerator.init_trackers("probe-kd", config={"recipe": dump(plan.resolved)})
        if settings := describe_device(plan.recipe, accelerator):
            display.tell(settings)
        if resume and checkpoint is None and not journal.results:
            check_student(plan, accelerator, display)
        run = Run(plan, folder, display, accelerator, journal, checkpoint, signals, claimed=claimed)
        for subject in run.subjects():
            result = journal.results.get(subject.role)
            if result is None:
                run.train_subject(subject)
            elif result.weights and not subject.learns_from_teacher:
                _load_again(subject.model, folder / result.weights)
            if subject.role in ("teacher", TEACHER_ALONE):
                run.teacher = subject
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            with run.writing():
                write_report(list(journal.results.values()), journal.rows, plan, folder)
                record(folder, TABLES)  # while the run went on, every checkpoint wrote some of them anew
                checkpoints.remove(folder)
        accelerator.end_training()
    return journal


def _load_again(model: nn.Module, path: Path) -> None:
    """The weights of a model that this run trained before it was stopped. Raises WeightsError."""
    if not path.is_file():
        raise WeightsError(
            f"{path} is gone, which the run wrote and goes on from: put it back from a copy, or begin anew by "
            "--overwrite"
        )
    load_weights(model, path)


@contextmanager
def _with_peers(accelerator: Accelerator, folder: Path) -> Iterator[None]:
    """Turn what torch raises where another process of the run has ended into PeerLost.

    The first process says it, or, where that was killed, one of those that are left.
    """
    try:
        yield
    except Exception as refusal:
        if accelerator.num_processes == 1 or not _is_peer_lost(refusal):
            raise
        lost = PeerLost(
            f"another of the {accelerator.num_processes} processes of this run has ended or was killed, so this one "
            f"ends too. The last checkpoint in {folder} is whole; go on by --resume"
        )
        lost.in_all_processes = not accelerator.is_main_process and not is_abandoned(folder)
        raise lost from refusal


def _is_peer_lost(error: BaseException) -> bool:
    """Gloo has no error of its own for it."""
    if isinstance(error, torch.distributed.DistError):
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and any(word in text for word in ("gloo", "Gloo", "Connection closed"))


def check_student(plan: Plan, accelerator: Accelerator, display: Display) -> None:
    """Say and refuse what `probe-kd check` does on a batch, before hours are spent on a teacher. Raises RunError."""
    run = Run(plan, Path(), Display(Console(quiet=True), quiet=True), accelerator, Journal())
    with one_step():
        subject = student_of(run)
        images, target = first_batch(run, subject, most=MOST_TRIED)
        reach = reach_of(run, subject, images, target)
        found = complaints(reach), untrained(run, subject, reach, images, target)
    accelerator.free_memory()
    wrong, remarks = broadcast_object_list([found])[0]  # so that all processes end, or none
    if wrong:
        raise for_all(RunError("; ".join(wrong)))
    if accelerator.is_main_process:
        for remark in remarks:
            display.say(remark)


@contextmanager
def one_step() -> Iterator[None]:
    """Inside, what models and losses raise on real images is told. Raises RunError."""
    try:
        yield
    except (ProbeKDError, torch.OutOfMemoryError):
        raise
    except Exception as refusal:  # models of anybody fail in any way, on a batch of one image say
        raise RunError(f"a step on the first batch of images fails: {short(refusal)}") from refusal


def reach_of(run: "Run", subject: "Subject", images: Tensor, target: Tensor) -> "list[tuple[str, Norms]]":
    """Of each stage, the gradients that its losses give on these images."""
    found = []
    for phase in subject.phases:
        distiller = run.distiller(subject, phase)
        found.append((phase.name, distiller.train().audit(images, target)))
        distiller.close()
    return found


Norms = dict[str, dict[str, float]]  # of the gradient, by loss and parameter


def student_of(run: "Run") -> "Subject":
    """The student before training, beside a teacher as it is before training, which is tried where it is trained."""
    for subject in run.subjects():
        if subject.phases and subject.role in ("teacher", TEACHER_ALONE):
            reach_of(run, subject, *first_batch(run, subject, most=MOST_TRIED))
        if subject.role in ("teacher", TEACHER_ALONE) and not run.plan.recipe.share:
            run.teacher = subject
        if subject.role == "student":
            return subject
    raise AssertionError("every recipe has a student")


def first_batch(run: "Run", subject: "Subject", *, most: int | None = None) -> tuple[Tensor, Tensor]:
    """Images, as the loop gives them to the models, and class indices; the first few of a batch, or all of it.

    Raises DataError.
    """
    data, device = run.plan.recipe.data, run.accelerator.device
    # Without workers, which would read many batches more than this one.
    options = data.model_copy(update={"workers": 0, "batch_size": min(data.batch_size, most or data.batch_size)})
    batches = loader(run.plan.datasets.train, options, run.images_for(subject), training=True)
    placed = batches.on(device, memory_format=memory_format(run.plan.recipe, device))
    images, target, _ = next(readable(placed))
    return images, target


def untrained(
    run: "Run", subject: "Subject", reach: Sequence[tuple[str, Norms]], images: Tensor, target: Tensor
) -> list[str]:
    """A remark on the student's parameters that its answer depends on, and no loss of any stage moves.

    It is no refusal: who trains hints alone means to train what is above them later.
    """
    answer = Distiller(subject.model, None, [Objective("cross_entropy")], student_input=subject.input)
    answer.to(run.accelerator.device)
    used = set(answer.train().audit(images, target)["cross_entropy"])
    answer.close()
    missed = sorted(used - {name for _, norms in reach for loss in norms.values() for name in loss})
    names = ", ".join(missed[:6]) + (f" and {len(missed) - 6} more" if len(missed) > 6 else "")
    says = (
        f"no loss of any stage trains {names}, so its accuracy means nothing; add one that reads the student's answer"
    )
    return [f"{says}, `cross_entropy` say"] * bool(missed)


def complaints(reach: Sequence[tuple[str, Norms]]) -> list[str]:
    """What is wrong with the gradients of a first batch."""
    says = []
    for stage, norms in reach:
        for loss, found in norms.items():
            if not all(map(math.isfinite, found.values())):
                says.append(f"loss `{loss}` of stage `{stage}` has a gradient that is not finite")
            elif not any(found.values()):
                says.append(
                    f"loss `{loss}` of stage `{stage}` moves nothing; leave it out, or compare what can be trained"
                )
    return says


@contextmanager
def accelerating(recipe: Recipe, folder: Path | None = None) -> Iterator[Accelerator]:
    """The accelerator of one run, as its recipe wishes. Raises RunError for what cannot be had."""
    device_type = "cuda" if torch.cuda.is_available() else "cpu"
    wishes: dict[str, Any] = {"mixed_precision": mixed_precision(recipe, device_type)}
    if folder is not None and recipe.trackers:
        wishes |= {"log_with": list(recipe.trackers), "project_dir": str(folder / TRACKERS)}
    with ExitStack() as stack:
        stack.enter_context(cuda_settings(recipe))
        try:
            accelerator = stack.enter_context(own_accelerator(**wishes))
        except (ValueError, ImportError) as refusal:  # fp16 without a GPU, say
            raise RunError(f"accelerate cannot begin with precision {recipe.precision}: {short(refusal)}") from refusal
        kind = str(getattr(accelerator.distributed_type, "value", accelerator.distributed_type))
        if kind in ("FSDP", "DEEPSPEED", "MEGATRON_LM"):
            raise RunError(
                f"accelerate is set to {kind}, which cuts a model's parameters up and gathers them layer by layer; "
                "captured layers, shared weights and a teacher beside the student do not survive that. Run with plain "
                "DDP (`accelerate launch --multi_gpu`, or torchrun), with `grad_checkpointing: true` where memory is "
                "short"
            )
        yield accelerator


@contextmanager
def _listening(display: Display) -> Iterator[list[int]]:
    """The signals that asked the run to stop, as they come in. A second Ctrl-C does not wait for the update to end."""
    asked: list[int] = []

    def ask(number: int, _: FrameType | None) -> None:
        if number == signal.SIGINT and asked:
            raise KeyboardInterrupt
        asked.append(number)
        display.say(f"{signal.Signals(number).name}: stopping after this update, with a checkpoint")

    if threading.current_thread() is not threading.main_thread():  # only there may handlers be set
        yield asked
        return
    former = {number: signal.signal(number, ask) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield asked
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)


def open_run(
    plan: Plan, folder: Path, display: Display, *, resume: bool, overwrite: bool
) -> tuple[Journal, Path | None]:
    """Prepare a claimed folder, or find what to resume: the journal, and the checkpoint that it was in.

    Nothing is touched that no run wrote, and nothing of another run unless it was asked for.
    """
    check_folder(folder, resume=resume, overwrite=overwrite)
    _check_inputs_outside(plan, folder, resume=resume)
    resolved, inputs = dump(plan.resolved), digests_of(_inputs(plan.recipe))
    if resume and (folder / RECIPE).is_file():
        checkpoint = _reopen(folder, resolved, inputs, plan, display)
        if checkpoint is not None:
            known = DataRecord.read(folder)
            if known is not None:
                known.refuse_others(plan.datasets.record, folder)
            journal = Journal.read(checkpoint / JOURNAL)
            batch = f", batch {journal.step}" if journal.step else ""
            display.say(
                f"going on with {folder}: {journal.role or 'the next model'}, epochs done {journal.epoch}{batch}"
            )
            return journal, checkpoint
    if resume:
        weights = [name for name in _contents(folder) if name.endswith(".safetensors")]
        if weights:
            raise RunError(
                f"there is no checkpoint in {folder} to resume, but {weights[0]} is there; --overwrite deletes it and "
                "begins anew"
            )
        display.say(f"there is no checkpoint in {folder} to resume; beginning anew")
    try:
        clear(folder, _contents(folder))
        Manifest({RECIPE: hashlib.sha256(resolved.encode()).hexdigest()}, inputs).write(folder)
        (folder / RECIPE).write_text(resolved, encoding="utf-8")
        with recording(folder, RECORD) as file:
            plan.datasets.record.write(file)
    except OSError as refusal:
        raise RunError(f"cannot write to {folder}: {refusal.strerror}") from None
    return Journal(), None


def check_folder(folder: Path, *, resume: bool, overwrite: bool) -> None:
    """Whether a run may begin in this folder, or go on in it. Raises RunError. Nothing is written."""
    if folder.exists() and not folder.is_dir():
        raise RunError(f"{folder} is {kind_of(folder)}; choose another --out")
    contents = _contents(folder)
    if not contents or (contents == [MANIFEST] and Manifest.read(folder)):  # one that was killed as it began
        return
    foreign = foreign_files(folder, contents)
    if foreign:
        raise RunError(foreign)
    if not (resume or overwrite):
        raise RunError(
            f"{folder} is not empty; go on with it by --resume, replace it by --overwrite, or choose another --out"
        )


def _contents(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir() if entry.name != LOCK) if folder.is_dir() else []


def foreign_files(folder: Path, contents: Sequence[str]) -> str:
    """What in a folder no run wrote, in words; empty where all of it is a run's."""
    manifest = Manifest.read(folder)
    kept = "and will be neither resumed nor overwritten; choose another --out"
    if manifest is None and MANIFEST in contents:
        return f"{folder / MANIFEST} is damaged, or not of a run: what else is there cannot be known, {kept}"
    if manifest is None and RECIPE in contents and not _is_old_run(folder):
        return f"{folder / RECIPE} was written by no run, {kept}"
    if manifest is None and RECIPE not in contents:
        return f"{folder} is not the folder of a run (it has no recipe.yaml), {kept}"
    foreign = [name for name in contents if not _is_of_run(folder / name, manifest)]
    if foreign:
        return f"{folder} holds more than a run writes ({', '.join(foreign[:3])}), {kept}"
    other = next((name for name in contents if name != MANIFEST and changed(folder / name)), "")
    if other == RECIPE:
        return f"{folder / RECIPE} was changed since a run wrote it, {kept}, or put it back"
    return damaged(folder / other) if other else ""


def _is_of_run(file: Path, manifest: Manifest | None) -> bool:
    """Whether a run wrote a file or folder, or `eval -o` and `compare -o` did about it.

    Weights are its own where the manifest names them; the tables and folders have names that nothing else has there.
    """
    if file.is_symlink():
        return False
    if file.is_dir():
        names = [entry.name for entry in file.iterdir()] if file.name == checkpoints.FOLDER else []
        return file.name == TRACKERS or (
            file.name == checkpoints.FOLDER and all(re.match(r"\d{6}", it) for it in names)
        )
    if file.name in ("report.html", "layers.json"):
        return is_measured(file) if file.suffix == ".html" else _is_json(file)
    if file.suffix == ".safetensors":
        named = re.fullmatch(_WEIGHTS, file.stem)
        return bool(named) and (manifest is None or file.name in manifest.files)
    return bool(re.fullmatch(_TABLE_OR_PARTIAL, file.name)) or is_measured(file)


def _is_json(file: Path) -> bool:
    try:
        return isinstance(json.loads(whole_text(file)), dict)
    except (OSError, ValueError, RecursionError):
        return False


_WEIGHTS = r"(student|teacher)(-alone)?(-ema)?|adapters-\d+"
_TABLE_OR_PARTIAL = (
    r"(manifest|data|summary|layers)\.json|recipe\.yaml|(metrics|summary)\.csv|curves\.png|report\.html"
    rf"|({_WEIGHTS}|metrics|summary)\.partial|(manifest\.json|layers\.json|report\.html)\.partial"
)


def _is_old_run(folder: Path) -> bool:
    """Whether a run from before there were manifests wrote the recipe: no line of it is as a person writes it.

    It has every default written out, in the form that ruamel.yaml gives it, and beside it are metrics or a checkpoint.
    """
    beside = (folder / "metrics.csv").is_file() or any(folder.glob(f"{checkpoints.FOLDER}/*/{MANIFEST}"))
    try:
        text = whole_text(folder / RECIPE)
        source = load(folder / RECIPE)
    except (OSError, ValueError, ProbeKDError):
        return False
    written = source.recipe.model_fields_set >= {"student", "data", "pairs", "stages", "baseline", "seed"}
    return beside and written and rewritten(text) == text


def _inputs(recipe: Recipe) -> list[str]:
    """The files that a recipe names and a run reads."""
    teacher = recipe.teacher
    named = [recipe.student.checkpoint, teacher and teacher.checkpoint, teacher and teacher.class_map]
    return [name for name in named if isinstance(name, str)]


def _check_inputs_outside(plan: Plan, folder: Path, *, resume: bool) -> None:
    """Raises RunError where --overwrite would delete what the recipe reads."""
    place = Path(os.path.realpath(folder))
    cache = plan.recipe.teacher.cache if plan.recipe.teacher else None
    if cache and Path(os.path.realpath(cache)).is_relative_to(place):
        raise RunError(
            f"the teacher's cache {cache} lies in the folder of results, {folder}, which a run must have for itself; "
            "give another folder as `teacher.cache`"
        )
    for name in _inputs(plan.recipe):
        if not resume and Path(os.path.realpath(name)).is_relative_to(place):
            raise RunError(
                f"the recipe reads {name}, which lies in the folder of results, {folder}, and would be overwritten; "
                "choose another --out"
            )


def _first_difference(before: str, now: str) -> str:
    """Of two recipes, the first lines that are not the same."""
    for old, new in zip_longest(before.splitlines(), now.splitlines(), fillvalue="nothing"):
        if old != new:
            return f"`{old.strip()}` where there now is `{new.strip()}`"
    return "the same lines, with other ends"


def _reopen(folder: Path, resolved: str, inputs: Mapping[str, str], plan: Plan, display: Display) -> Path | None:
    recipe, manifest = folder / RECIPE, Manifest.read(folder)
    begun_with = _with_root_of(whole_text(recipe), resolved)
    if begun_with != resolved:
        known = DataRecord.read(folder) if _same_data(begun_with, plan.resolved) else None
        if known is not None:  # a class more makes another model
            known.refuse_others(plan.datasets.record, folder)
        raise RunError(
            f"the recipe is not the one that {folder} was begun with ({recipe}); it then had "
            f"{_first_difference(begun_with, resolved)}. Give the same recipe and options "
            "again, or another folder by --out; --overwrite deletes that run and begins anew"
        )
    other = first_changed(manifest.inputs, inputs) if manifest is not None else ""
    if other:
        raise RunError(
            f"{other} is not the file that {folder} was begun with: its contents have changed since. Put the former "
            "file back, or choose another --out; --overwrite deletes that run and begins anew"
        )
    if (folder / "summary.json").exists():
        raise RunError(f"nothing to resume in {folder}: the run is finished")
    return checkpoints.newest(folder, display.say)


def _same_data(begun_with: str, now: Recipe) -> bool:
    try:
        return parse(begun_with).recipe.data == now.data
    except ProbeKDError:  # of another version
        return False


def _with_root_of(begun_with: str, resolved: str) -> str:
    """The recipe that a run was begun with, where its data have moved to: that they are the same, `data.json` tells."""
    try:
        before, now = parse(begun_with).recipe, parse(resolved).recipe
    except ProbeKDError:  # of another version
        return begun_with
    if before.data.root == now.data.root or not (before.data.root and now.data.root):
        return begun_with
    return dump(before.model_copy(update={"data": before.data.model_copy(update={"root": now.data.root})}))


def teacher_seed(seed: int) -> int:
    """What a teacher's first weights follow from: far from the seed of any student, which are small numbers.

    Of one seed, a teacher and a student of one architecture would begin with the same weights, so that their agreement
    would be no evidence.
    """
    return (seed + 2**31) % 2**32


MeasuredSplit = Literal["val", "test"]  # the images of the curves and of the final figures; often the same
_Measured = tuple[float, float | None, dict[str, list[int]]]  # accuracy, agreement, images and right by class


@dataclass
class Run:
    """One run, subject after subject."""

    plan: Plan
    folder: Path
    display: Display
    accelerator: Accelerator
    journal: Journal
    checkpoint: Path | None = None  # to go on from
    signals: list[int] = field(default_factory=list)  # that asked the run to stop
    teacher: Subject | None = None
    teacher_answers: dict[str, Tensor] = field(default_factory=dict)  # by split
    best: dict[str, Tensor] = field(default_factory=dict)
    best_average: dict[str, Tensor] = field(default_factory=dict)  # the moving average of the same epoch
    measured: dict[str, _Measured] = field(default_factory=dict)  # by role, while the weights are still those
    # With the workers that read them.
    test_batches: dict[tuple[InputSpec, MeasuredSplit], Batches] = field(default_factory=dict)
    claimed: Claim | None = None  # in the process that writes

    def subjects(self) -> Iterator[Subject]:
        """Each is built when its turn comes."""
        plan, recipe = self.plan, self.plan.recipe
        if recipe.teacher is not None:
            yield self._teacher(TEACHER_ALONE if recipe.share else "teacher")
        if recipe.baseline:
            model = self._build(recipe.student, plan.student, recipe.seed)
            phases = self._stages(alone="student")
            yield Subject(STUDENT_ALONE, model, plan.student, self._input_alone(), phases)
        model, partner, sharing = self._build(recipe.student, plan.student, recipe.seed), None, None
        if recipe.share and plan.teacher:
            self.teacher = partner = self._teacher("teacher")
            self.teacher_answers = {}
            set_seed(recipe.seed)  # of a graft's adapter
            model, sharing = join(recipe.share, model, partner.model, plan.student, plan.teacher)
            self._to_device(model)
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
        seed = plan.recipe.seed if options.same_init else teacher_seed(plan.recipe.seed)
        return Subject(role, self._build(options, plan.teacher, seed), plan.teacher, plan.teacher_input, phases)

    def _input_alone(self) -> InputSpec:
        """What the plain student sees: the size that the recipe gives, also where a graft sees the teacher's."""
        return replace(self.plan.student_input, size=self.plan.student.input_size)

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

    def _stages(self, alone: str = "") -> tuple[Phase, ...]:
        """The recipe's stages; for a model alone, what of them it can learn from labels."""
        phases, age = [], 0
        for stage, objectives in zip(self.plan.recipe.stages, self.plan.objectives, strict=True):
            kept = _labels_only(objectives, alone) if alone else objectives
            phase = Phase(
                name=stage.name,
                epochs=stage.epochs,
                objectives=kept,
                optimizer=stage.optimizer.model_copy(update={"lr_scale": {}}) if alone else stage.optimizer,
                scheduler=stage.scheduler,
                clip_grad=stage.clip_grad,
                grad_accum_steps=stage.grad_accum_steps,
                keep=stage.keep,
                age=age,
            )
            phases += [phase] * bool(kept)
            age += stage.epochs
        return tuple(phases)

    def train_subject(self, subject: Subject) -> None:
        journal = self.journal
        journal.begin(subject.role)
        average: nn.Module | None = None
        for index in range(journal.phase, len(subject.phases)):
            journal.begin_phase(index)
            average = self._train_phase(subject, subject.phases[index])
        self._finish(subject, average)

    def _train_phase(self, subject: Subject, phase: Phase) -> nn.Module | None:
        """Returns the moving average of the student, where there is one."""
        distiller = self.distiller(subject, phase)
        self.best, self.best_average = {}, {}
        with ExitStack() as after:
            after.callback(self.accelerator.free_memory)
            after.callback(distiller.close)
            # What no loss reaches no optimizer moves, by weight decay say, and DDP does not wait for it.
            after.enter_context(distiller.training_only(self._reached(distiller, subject)))
            cache = self._cache(subject, distiller)
            if cache is not None:
                after.callback(cache.close)
                after.callback(self._tell_of_damage, cache)
            loop = self._loop(subject, phase, distiller, cache)
            after.callback(loop.close)
            if cache is not None:
                loop.check_cache()
            self._restore(loop) if self.checkpoint else self.save(loop)
            after.callback(self.display.end)
            self.display.begin(f"{subject.role}: {phase.name}", phase.epochs, loop.steps, self.journal.epoch)
            for epoch in range(self.journal.epoch, phase.epochs):
                losses = self._train_epoch(loop, epoch)
                if phase.keep == "best":
                    losses["held_out_loss"] = self._keep_if_best(loop, subject)
                self._record(subject, loop, losses)
            if cache is not None:
                counts = f"{loop.asked} images asked of the teacher, {loop.recalled} known from its cache"
                self.display.tell(f"{subject.role}: {phase.name}: {counts} in {cache.folder}")
            self._take_best(loop)
            if subject.role == "student" and self.accelerator.is_main_process and distiller.adapters.state_dict():
                about = {"stage": phase.name, "probe_kd": __version__}
                self._write(distiller.adapters, f"adapters-{self.journal.phase}.safetensors", about)
            return loop.average.module if loop.average else None

    def _take_best(self, loop: Loop) -> None:
        """Go back to the best epoch of a phase that kept it, the moving average too."""
        if not self.best:
            return
        loop.distiller.load_state_dict(self.best)
        if loop.average is not None and self.best_average:
            loop.average.module.load_state_dict(self.best_average)
        self.best, self.best_average = {}, {}
        self.measured.clear()

    def _tell_of_damage(self, cache: TeacherCache) -> None:
        if cache.damaged:
            self.display.say(
                f"{cache.damaged} rows of the teacher's cache in {cache.folder} were damaged, and were computed anew; "
                "look after that disk"
            )

    def _reached(self, distiller: Distiller, subject: Subject) -> set[str]:
        """The parameters that any loss reaches, by name, seen on images of noise."""
        generator = torch.Generator().manual_seed(0)
        images = torch.randn(2, *self.images_for(subject).size, generator=generator).to(self.accelerator.device)
        target = torch.zeros(2, dtype=torch.long, device=self.accelerator.device)
        return {name for found in distiller.train().audit(images, target).values() for name in found}

    @torch.no_grad()
    def _keep_if_best(self, loop: Loop, subject: Subject) -> float:
        """The weighted loss on held-out images; of the epochs of a phase, the weights with the least are kept.

        Without such images it is on the validation images, where the test images are others.
        """
        chosen_by, accelerator = self.plan.datasets.to_choose_by, self.accelerator
        assert chosen_by is not None
        images_held_out = loader(chosen_by, self.plan.recipe.data, self.images_for(subject), training=False)
        losses: list[Tensor] = []
        distiller = loop.distiller.eval()
        distiller.set_epoch(loop.phase.epochs, loop.phase.epochs)  # one measure for all epochs, whatever is scheduled
        for images, target in readable(images_held_out.prepare(accelerator), "held-out"):
            if len(target) > 1 or not losses:  # one image has no variance, which some losses divide by
                with accelerator.autocast():
                    loss = distiller(images, target)["loss"]
                losses.append(accelerator.gather_for_metrics(loss.repeat(len(target))).cpu())
        mean = torch.cat(losses).double().mean().item()
        if self.journal.best is None or not mean >= self.journal.best:  # also after one that is no number
            self.journal.best = mean
            self.best = own_tensors(distiller)
            self.best_average = own_tensors(loop.average.module) if loop.average is not None else {}
        return mean

    def distiller(self, subject: Subject, phase: Phase) -> Distiller:
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

    def _loop(self, subject: Subject, phase: Phase, distiller: Distiller, cache: TeacherCache | None) -> Loop:
        return Loop(
            self.accelerator,
            self.plan.recipe,
            distiller,
            phase,
            images=self.plan.datasets.train,
            given=self.images_for(subject),
            num_classes=self.plan.datasets.num_classes,
            averaged=subject.role in ("student", STUDENT_ALONE),
            cache=cache,
        )

    def _cache(self, subject: Subject, distiller: Distiller) -> TeacherCache | None:
        """Where the recipe wants one, and this phase asks a frozen teacher."""
        options, accelerator = self.plan.recipe.teacher, self.accelerator
        if options is None or options.cache is None or not distiller.answers or self.teacher is None:
            return None
        given = self.images_for(subject)
        with (
            torch.no_grad(),
            accelerator.autocast(),
        ):  # what it gives, of which shape and precision, is seen and not guessed
            features = distiller.ask(torch.zeros(2, *given.size, device=accelerator.device))
        taps = [
            Stored(name, tuple(feature.shape[1:]), feature.dtype, None if name else options.cache_top_k)
            for name, feature in zip(distiller.answers, features, strict=True)
        ]
        found: list[Any] = [None]
        cache = TeacherCache(Path(options.cache), taps, len(self.plan.datasets.train))  # type: ignore[arg-type]
        if accelerator.is_main_process:
            key, depends = key_of(self.teacher.model, self.plan.datasets.train, self._depends_on(given))
            cache.folder = cache.folder / key
            try:
                found = [(cache.folder, cache.lock())]
                (cache.folder / "depends-on.json").write_text(depends, encoding="utf-8")
            except OSError as refusal:
                raise RunError(f"cannot write the teacher's cache {cache.folder}: {refusal.strerror}") from refusal
        cache.folder, cache.writes = broadcast_object_list(found)[0]
        if not cache.writes:
            self.display.say(f"another run writes the teacher's cache in {cache.folder}; this one only reads it")
        return cache

    def _depends_on(self, given: InputSpec) -> dict[str, Any]:
        """What decides what the teacher sees, and how it computes."""
        recipe, teacher = self.plan.recipe, self.teacher
        assert teacher is not None
        data = recipe.data.model_dump(mode="json", exclude=UNSEEN)
        model, kwargs = portable(teacher.trace.model, teacher.trace.model_kwargs)
        return {
            "model": model,
            "model_kwargs": kwargs,
            "seed": None if recipe.data.no_aug else recipe.seed,
            "views": {**data, "given": asdict(given), "teacher": asdict(teacher.input)},
            "precision": str(self.accelerator.mixed_precision),
            "device": self.accelerator.device.type,
        }

    def images_for(self, subject: Subject) -> InputSpec:
        """Normalised for this subject, and as large as the larger model wants: each takes its own view of them."""
        other = self.teacher.input if self.teacher and subject.role != "teacher" else subject.input
        return subject.input.covering(other)

    def _train_epoch(self, loop: Loop, epoch: int) -> Row:
        journal, started = self.journal, time.perf_counter()
        first, before = journal.step, journal.seconds
        if not first:  # else the generators are as the checkpoint found them
            set_seed((self.plan.recipe.seed * 1_000_003 + loop.phase.age + epoch + 1) % 2**31, device_specific=True)
        loop.sums = {name: torch.tensor(value, device=self.accelerator.device) for name, value in journal.sums.items()}
        try:
            for done in loop.run(epoch, first):
                journal.seconds = before + time.perf_counter() - started
                self._after_update(loop, done)
        except torch.OutOfMemoryError as refusal:
            raise RunError(too_large(refusal)) from refusal
        except DataError:
            self._save_what_is_done(loop)
            raise
        seconds = time.perf_counter() - started
        journal.seconds, journal.step, journal.sums = before + seconds, 0, {}
        loop.average_over_processes()
        images = (loop.steps - first) * self.plan.recipe.data.batch_size * self.accelerator.num_processes
        return {"images_per_second": round(images / seconds, 1), "lr": loop.rate, **self._means(loop, loop.steps)}

    def _after_update(self, loop: Loop, done: int) -> None:
        """Show, save and stop, where it is time to."""
        recipe, processes = self.plan.recipe, self.accelerator.num_processes
        if self.display.step(done, recipe.data.batch_size * processes):
            self.display.losses({name: float(total) / done for name, total in sorted(loop.sums.items())})
        update = -(-done // loop.phase.grad_accum_steps)
        asked = bool(self.signals) if processes == 1 else update % ASK_EVERY == 0 and self._any_asked()
        between = done < loop.steps  # the end of an epoch saves by itself, after it is measured
        interval = max(1, recipe.recovery_interval // loop.phase.grad_accum_steps)
        if asked or (between and recipe.recovery_interval and update % interval == 0):
            self._save_what_is_done(loop, together=True)
        if asked:
            raise Stopped(f"stopped by {signal.Signals(self.signals[0] if self.signals else signal.SIGTERM).name}")

    def _any_asked(self) -> bool:
        asked = torch.tensor(float(bool(self.signals)), device=self.accelerator.device)
        return float(self.accelerator.reduce(asked, "sum")) > 0

    def _save_what_is_done(self, loop: Loop, *, together: bool = False) -> None:
        """A checkpoint in the middle of an epoch; of several processes only if all of them are here."""
        if not together and self.accelerator.num_processes > 1:
            return
        if loop.finished is not None:
            self.journal.step, self.journal.sums = loop.finished, self._means(loop, 1)
            self.save(loop)

    def _means(self, loop: Loop, count: int) -> dict[str, float]:
        """The losses of all processes, over so many batches. Raises RunError for one that is no number."""
        totals = {name: self.accelerator.reduce(total, "mean") for name, total in sorted(loop.sums.items())}
        means = {name: float(total) / count for name, total in totals.items()}
        wrong = [name for name, mean in means.items() if not math.isfinite(mean) and name != "loss"]
        if wrong:
            journal = self.journal
            raise RunError(
                f"{', '.join(map(repr, wrong))} of {journal.role} became {means[wrong[0]]} in epoch "
                f"{journal.epoch + 1}; try a smaller `lr`, `clip_grad: 1.0`, `normalize: layer`, or `precision: bf16`"
            )
        return means

    def _record(self, subject: Subject, loop: Loop, losses: Row) -> None:
        """The end of an epoch: measure, write, save, show."""
        journal = self.journal
        journal.epoch += 1
        due = journal.epoch % self.plan.recipe.val_interval == 0 or journal.epoch == loop.phase.epochs
        average = replace(subject, model=loop.average.module) if loop.average is not None else None
        models = [model for model in (subject.partner, subject, average) if model is not None]
        measured = iter(self._measure(models) if due else ())
        for shown in filter(None, (subject.partner if due else None, subject)):
            row: Row = {"subject": shown.role, "stage": loop.phase.name, "epoch": journal.epoch}
            if due:
                self.measured[shown.role] = next(measured)
                row["accuracy"], row["agreement"], _ = self.measured[shown.role]
            if due and shown is subject and average is not None:
                row["ema_accuracy"] = next(measured)[0]
            journal.rows.append(row | (losses if shown is subject else {}))
        self.save(loop)
        self.accelerator.log(
            {f"{subject.role}/{name}": value for name, value in journal.rows[-1].items() if isinstance(value, float)},
            step=loop.phase.age + journal.epoch,
        )
        self.display.epoch(journal.rows[-1])

    def _measure(self, models: Sequence[Subject], split: MeasuredSplit = "val") -> list[_Measured]:
        """(accuracy, agreement with the teacher, `images` and `right` of every class) on images of a split, of each.

        No agreement for the teacher itself. Images are read once for all models that see them alike.
        """
        asked = list(models)
        teacher = self.teacher if split not in self.teacher_answers else None
        if teacher is not None and any(it is not teacher and it.role != "teacher" for it in models):
            asked += [teacher] * (teacher not in asked)
        predicted = self._predict(asked, split)
        if teacher in asked:
            self.teacher_answers[split] = predicted[asked.index(teacher)][0]
        return [self._score(model, *found, split) for model, found in zip(models, predicted, strict=False)]

    def _score(self, subject: Subject, answers: Tensor, targets: Tensor, split: MeasuredSplit) -> _Measured:
        accuracy = (answers == targets).double().mean().item()
        counted = {"images": targets, "right": targets[answers == targets]}
        classes = {name: _per_class(kept, self.plan.datasets.num_classes) for name, kept in counted.items()}
        if subject is self.teacher or subject.role == TEACHER_ALONE:  # while it trains, its answers change
            self.teacher_answers[split] = answers
            return accuracy, None, classes
        if self.teacher is None or split not in self.teacher_answers or subject.role == "teacher":
            return accuracy, None, classes
        return accuracy, (answers == self.teacher_answers[split]).double().mean().item(), classes

    def _predict(self, models: Sequence[Subject], split: MeasuredSplit) -> list[tuple[Tensor, Tensor]]:
        """Of each model (predicted classes, true classes) of all images of a split, in their order."""
        by_input: dict[InputSpec, list[int]] = {}
        for index, model in enumerate(models):
            by_input.setdefault(self.images_for(model), []).append(index)
        found: dict[int, tuple[Tensor, Tensor]] = {}
        for given, indices in by_input.items():
            predicted, targets = self._predict_alike([models[index] for index in indices], given, split)
            found |= {index: (answers, targets) for index, answers in zip(indices, predicted, strict=True)}
        return [found[index] for index in range(len(models))]

    @torch.no_grad()
    def _predict_alike(
        self, models: Sequence[Subject], given: InputSpec, split: MeasuredSplit
    ) -> tuple[list[Tensor], Tensor]:
        """The predicted classes of models that see the images of a split in one form, and the true classes."""
        accelerator = self.accelerator
        if (given, split) not in self.test_batches:
            datasets = self.plan.datasets
            images = datasets.val if split == "val" and datasets.val is not None else datasets.test
            batches = loader(images, self.plan.recipe.data, given, training=False)
            prepared = batches.prepare(accelerator, memory_format(self.plan.recipe, accelerator.device))
            self.test_batches[given, split] = prepared
        views = [ImageView(model.input, model.input).to(accelerator.device) for model in models]
        for model in models:
            model.model.eval()
        rows: list[tuple[Tensor, ...]] = []
        for pixels, target in readable(self.test_batches[given, split], "test"):
            with accelerator.autocast():
                outputs = [model.model(view(pixels)) for model, view in zip(models, views, strict=True)]
            answers = (self._classes(model, output) for model, output in zip(models, outputs, strict=True))
            rows.append(accelerator.gather_for_metrics((*answers, target)))
        *predicted, targets = (torch.cat(column).cpu() for column in zip(*rows, strict=True))
        return predicted, targets

    def _classes(self, subject: Subject, output: Any) -> Tensor:
        logits = _logits(output)
        if self.plan.class_map is not None and subject.role == "teacher":
            logits = logits[:, list(self.plan.class_map)]
        return logits.argmax(1)

    @property
    def _final(self) -> MeasuredSplit:
        """Where the images of the curves are those of the final figures, their batches are kept but once."""
        return "val" if self.plan.datasets.val is None else "test"

    def _finish(self, subject: Subject, average: nn.Module | None = None) -> None:
        if subject.partner is not None or subject is self.teacher:
            self.teacher_answers = {}  # `keep: best` may have gone back to other weights
        if subject.partner is not None:
            self._finish(replace(subject.partner, phases=subject.phases))
        # After the last epoch its weights were measured already, where that was in this process and on these images.
        measured = self.measured.pop(subject.role, None) if self.plan.datasets.val is None else None
        accuracy, agreement, classes = measured or self._measure([subject], self._final)[0]
        averaged = replace(subject, model=average) if average is not None else None
        trace_ = subject.trace
        self.journal.results[subject.role] = Result(
            role=subject.role,
            model=trace_.model,
            model_kwargs=dict(trace_.model_kwargs),
            parameters=trace_.parameters,
            macs=trace_.macs,
            accuracy=accuracy,
            agreement=agreement,
            seconds=round(self.journal.seconds, 2),
            weights=self._write_weights(subject) if subject.phases else "",
            ema_accuracy=self._measure([averaged], self._final)[0][0] if averaged else None,
            ema_weights=self._write_weights(averaged, "-ema") if averaged else "",
            **classes,
        )

    def _write_weights(self, subject: Subject, end: str = "") -> str:
        trace_, name = subject.trace, f"{subject.role.replace(' ', '-')}{end}.safetensors"
        model, kwargs = portable(trace_.model, trace_.model_kwargs)
        about = {"model": model, "model_kwargs": kwargs, "probe_kd": __version__}
        if self.accelerator.is_main_process:
            self._write(subject.model, name, about | self._about_graft(subject))
        return name

    def _write(self, model: nn.Module, name: str, about: Mapping[str, Any]) -> None:
        with self.writing(), recording(self.folder, name) as path:
            save_weights(model, path, about)

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Raises RunError where the folder has vanished, or does not take what is written to it."""
        try:
            if self.claimed is not None:
                self.claimed.check()
            yield
        except OSError as refusal:
            raise RunError(
                f"cannot write to {self.folder}: {refusal.strerror}. Mend that, and go on by --resume from the last "
                "checkpoint"
            ) from refusal

    def _about_graft(self, subject: Subject) -> dict[str, Any]:
        """What `load_student` needs to build a student that is no single model of timm."""
        plan, share = self.plan, self.plan.recipe.share
        if not (share and share.form == "graft" and plan.teacher and subject.role == "student"):
            return {}
        sides = {"student": (plan.student, share.cut[0]), "teacher": (plan.teacher, share.cut[1])}
        named = {side: portable(trace_.model, trace_.model_kwargs) for side, (trace_, _) in sides.items()}
        return {
            "graft": {
                side: {
                    "model": named[side][0],
                    "model_kwargs": named[side][1],
                    "input_size": list(trace_.input_size),
                    "at": str(at),
                }
                for side, (trace_, at) in sides.items()
            }
        }

    def save(self, loop: Loop) -> None:
        """Write a checkpoint. Raises RunError where the disk takes none; the one before it is as it was."""
        accelerator = self.accelerator
        if loop.cache is not None:
            loop.cache.flush()
        try:
            if self.claimed is not None:
                self.claimed.check()
            aside: list[Any] = [checkpoints.begin(self.folder) if accelerator.is_main_process else None]
            broadcast_object_list(aside)
            # Not as safetensors, which would leave out one of two names of a tensor that two models share, and not
            # always the same one. It is read with `weights_only`.
            accelerator.save_state(str(aside[0]), safe_serialization=False)
            accelerator.wait_for_everyone()
            if accelerator.is_main_process:
                self._commit(aside[0], loop)
        except Exception as refusal:  # torch and safetensors have errors of their own for a full disk
            if isinstance(refusal, RunError) or _is_peer_lost(refusal):
                raise
            raise RunError(
                f"cannot write a checkpoint to {self.folder}: {short(refusal)}; the one before it is whole. Make room, "
                "and go on with --resume"
            ) from refusal
        accelerator.wait_for_everyone()

    def _commit(self, aside: Path, loop: Loop) -> None:
        self.journal.write(aside / JOURNAL)
        if self.best:
            save_file(self.best, aside / BEST)
        if self.best_average:
            save_file(self.best_average, aside / BEST_AVERAGE)
        if loop.average is not None:
            save_weights(loop.average.module, aside / AVERAGE, {})
        checkpoints.commit(aside, self.plan.recipe.checkpoint_hist)
        write_metrics(self.journal.rows, self.folder / "metrics.csv")
        write_timm_summary(self.journal.rows, self.folder / "summary.csv")

    def _restore(self, loop: Loop) -> None:
        assert self.checkpoint is not None
        check_state(self.checkpoint)
        former = len(list(self.checkpoint.glob("random_states_*.pkl")))
        self._share_out(loop, former)
        self.best, self.best_average = (
            load_file(self.checkpoint / name) if (self.checkpoint / name).exists() else {}
            for name in (BEST, BEST_AVERAGE)
        )
        if loop.average is not None:
            load_weights(loop.average.module, self.checkpoint / AVERAGE)
        self.accelerator.load_state(str(self.checkpoint))  # last, since it brings the random numbers back
        if former != self.accelerator.num_processes:  # it has none for some of these
            set_seed((self.plan.recipe.seed * 1_000_003 + self.journal.step) % 2**31, device_specific=True)
        self.checkpoint = None

    def _share_out(self, loop: Loop, former: int) -> None:
        """Go on at the same image where there are more or fewer processes than before.

        Raises RunError where the images that were seen of an epoch are no whole number of updates of these processes.
        """
        journal, now = self.journal, self.accelerator.num_processes
        if former == now:
            return
        step, left = divmod(journal.step * former, now)
        if left or step % loop.phase.grad_accum_steps:
            raise for_all(
                RunError(
                    f"{former} processes had done {journal.step} batches each of epoch {journal.epoch + 1}, which "
                    f"{now} cannot go on with at the same image; resume with {former} processes, which may be stopped "
                    "at the end of an epoch"
                )
            )
        scale = step / journal.step if journal.step else 1.0
        journal.step, journal.sums = step, {name: total * scale for name, total in journal.sums.items()}
        if self.accelerator.is_main_process:
            self.display.say(f"going on with {now} processes instead of {former}, at the same image")


def too_large(refusal: Exception) -> str:
    """What to try where a device has no memory left."""
    return (
        f"out of memory: {short(refusal)}. Try a smaller `batch_size` with `grad_accum_steps`, `precision: bf16`, or "
        "`grad_checkpointing: true` of the student"
    )


def _per_class(targets: Tensor, classes: int) -> list[int]:
    """How many images of each class there are. A label that is none, which `eval` refuses, is left out."""
    counts: list[int] = torch.bincount(targets[(targets >= 0) & (targets < classes)], minlength=classes).tolist()
    return counts


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
