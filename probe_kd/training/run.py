"""Training: from a plan to a folder of results. Reads from top to bottom.

A run trains up to three models, one after the other: the teacher if it has no weights yet, the baseline if the recipe
has one, and the student. Baseline and student begin with the same weights, and see the same images in the same order
in every stage that both train in. In joint training (Rocket Launching), the first model is the teacher baseline, and
the last is the student together with a teacher that begins with the same weights as the teacher baseline.
"""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import nn

from probe_kd.data.cache import TeacherCache
from probe_kd.data.cache_keys import DEPENDS_ON
from probe_kd.engine.weights import load_weights
from probe_kd.errors import RunError, WeightsError, for_all, short
from probe_kd.files.run_folder import LOCK, Claim, claim, record
from probe_kd.methods.distiller import Distiller
from probe_kd.methods.gradients import training_only
from probe_kd.recipe.planner import Plan
from probe_kd.recipe.sections.outputs import role_of_teacher
from probe_kd.recipe.writing import dump
from probe_kd.training import checkpoints
from probe_kd.training.devices import describe_device
from probe_kd.training.epochs import Epochs, no_number
from probe_kd.training.fitting import fit_targets
from probe_kd.training.folder import open_run
from probe_kd.training.loop import Loop
from probe_kd.training.machines import check_machines, check_shared
from probe_kd.training.models import BASELINE, UNTRAINED, Models, TrainedModel, describe_sharding
from probe_kd.training.pair_scores import means
from probe_kd.training.phase import Phase
from probe_kd.training.processes import accelerating, by_first, listening, with_peers
from probe_kd.training.progress import Progress
from probe_kd.training.records import TABLES, write_report
from probe_kd.training.saving import Saver
from probe_kd.training.scoring import Score, Scorer
from probe_kd.training.shares import measure_weights
from probe_kd.training.state import Result, Row, TrainState
from probe_kd.training.teacher_cache import open_caches
from probe_kd.training.trial import check_student, reached
from probe_kd.version import __version__


def train(
    plan: Plan,
    folder: Path,
    progress: Progress,
    *,
    resume: bool = False,
    overwrite: bool = False,
    claimed: Claim | None = None,
    teachers_only: bool = False,
) -> TrainState:
    """Train the models of a plan, and write `folder`: recipe.yaml, metrics.csv, and the weights of every trained model.

    `resume` continues from the last checkpoint as if the run had not stopped, or begins if there is none. `overwrite`
    deletes the files of a former run. `claimed` is the folder's lock, if the caller holds it already. After SIGTERM or
    the first SIGINT, the run finishes the current update, writes a checkpoint and raises Stopped. With
    `teachers_only`, the run ends when the teachers are trained.

    Raises RunError if the folder holds a run and neither `resume` nor `overwrite` is set, if another process writes to
    it, if the recipe differs from that of the run to resume, if the folder vanishes or a checkpoint cannot be written,
    if machines do not share what they need, and if a loss is not finite. Raises PeerLost if another process of the run
    ended, DataError if images cannot be read, and WeightsError if a file that the run continues from has changed. The
    last checkpoint stays valid after any of these errors.
    """
    with accelerating(plan.recipe, folder) as accelerator, listening(progress) as signals, ExitStack() as cleanup:
        cleanup.enter_context(with_peers(accelerator, folder))
        check_machines(plan, accelerator)
        if not resume:
            check_student(plan, accelerator, progress)  # before anything is written
        claimed = _claimed(folder, claimed, progress, accelerator, cleanup)
        check_shared(accelerator, folder / LOCK, "the folder of results")
        state, checkpoint = by_first(
            accelerator, lambda: open_run(plan, folder, progress, resume=resume, overwrite=overwrite)
        )
        if plan.recipe.trackers:
            with _tracking():
                accelerator.init_trackers("probe-kd", config={"recipe": dump(plan.resolved)})
        if settings := describe_device(plan.recipe, accelerator):
            progress.tell(settings)
        for line in describe_sharding(plan, accelerator.num_processes):
            progress.tell(line)
        if resume and checkpoint is None and not state.results:
            check_student(plan, accelerator, progress)
        models = Models(plan, accelerator)
        saver = Saver(plan, accelerator, state, progress, folder, checkpoint, claimed)
        Run(models, Scorer(models), saver, progress, Epochs(saver, signals)).train_models(teachers_only=teachers_only)
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            with saver.writing():
                write_report(list(state.results.values()), state.rows, plan, folder, plan.headline)
                record(folder, TABLES)  # while the run went on, every checkpoint wrote some of them anew
                checkpoints.remove(folder)
        accelerator.end_training()
    return state


def _claimed(
    folder: Path, claimed: Claim | None, progress: Progress, accelerator: Accelerator, cleanup: ExitStack
) -> Claim | None:
    """The folder's lock in the first process: the caller's, or one until the end of `cleanup`. None in the others."""
    claims = [claimed] if claimed is not None else []

    def lock() -> None:
        if claims:
            return
        claims.append(claim(folder, progress.say))
        cleanup.callback(claims[0].release)

    by_first(accelerator, lock)
    return claims[0] if claims else None


@contextmanager
def _tracking() -> Iterator[None]:
    """Turn any error of a tracker into a RunError: every tracker has its own exception types."""
    try:
        yield
    except Exception as refusal:
        raise RunError(
            f"a tracker fails: {short(refusal)}. Mend that, and go on by --resume; or begin anew with `trackers: []`"
        ) from refusal


def _load_again(model: nn.Module, path: Path) -> None:
    """Load the weights of a model that this run trained before it was stopped. Raises WeightsError."""
    if not path.is_file():
        raise WeightsError(
            f"{path} is gone, which the run wrote and goes on from: put it back from a copy, or begin anew by "
            "--overwrite"
        )
    load_weights(model, path)


@dataclass
class Run:
    """The order of a run: model after model, phase after phase, epoch after epoch."""

    models: Models
    scorer: Scorer
    saver: Saver
    progress: Progress
    epochs: Epochs

    @property
    def plan(self) -> Plan:
        return self.models.plan

    @property
    def accelerator(self) -> Accelerator:
        return self.models.accelerator

    @property
    def state(self) -> TrainState:
        return self.saver.state

    def train_models(self, *, teachers_only: bool = False) -> None:
        """Train the models in turn, except for those that the run trained before it was stopped."""
        for trained in self.models.in_turn():
            if teachers_only and not trained.is_teacher:
                return
            self.saver.check_inputs()  # a model that is built late reads its file late
            result = self.state.results.get(trained.role)
            if result is None:
                self._train_model(trained)
            elif result.weights and not trained.learns_from_teacher:
                _load_again(trained.model, self.saver.folder / result.weights)
            if trained.is_teacher:
                self.models.add_teacher(trained)

    def _train_model(self, trained: TrainedModel) -> None:
        if trained.partner is not None:
            self.scorer.forget_teacher()  # the teacher was the teacher baseline so far
        state = self.state
        state.begin(trained.role)
        if trained.learns_from_teacher and self.plan.labelled_sets and UNTRAINED not in state.results:
            self._add_result(replace(trained, role=UNTRAINED, phases=(), partner=None), Score())
        average: nn.Module | None = None
        for index in range(state.phase, len(trained.phases)):
            state.begin_phase(index)
            average = self._train_phase(trained, trained.phases[index])
        self._finish(trained, average)

    def _train_phase(self, trained: TrainedModel, phase: Phase) -> nn.Module | None:
        """Train one phase, and return the moving average of the student if there is one."""
        with self._prepared(trained, phase) as loop, ExitStack() as cleanup:
            if self.saver.checkpoint:
                self.saver.restore(loop)
            else:
                set_seed(self.epochs.seed_of(phase.age), device_specific=True)  # to mix images as the epoch will
                measure_weights(loop, trained.role, self.progress)
                self.saver.save(loop)
            cleanup.callback(self.progress.end)
            title, names = f"{trained.role}: {phase.name}", [objective.name for objective in phase.objectives]
            self.progress.begin(title, phase.epochs, loop.steps, self.state.epoch, self.state.step, losses=names)
            for epoch in range(self.state.epoch, phase.epochs):
                losses = self.epochs.train(loop, epoch)
                if phase.keep == "best" and not self.plan.chosen_by:
                    losses["held_out_loss"] = self.scorer.held_out_loss(loop, trained)
                    self.saver.keep_if_best(loop, losses["held_out_loss"])
                self._record(trained, loop, losses)
            self._finish_phase(trained, loop)
            return loop.average.module if loop.average else None

    @contextmanager
    def _prepared(self, trained: TrainedModel, phase: Phase) -> Iterator[Loop]:
        """Prepare the loop of a phase, and release everything that it holds at the end."""
        distiller = self.models.distiller(trained, phase)
        if self.saver.checkpoint is None:  # otherwise the checkpoint has them
            fit_targets(self.models, trained, distiller, self.progress)
        self.saver.best, self.saver.best_average = {}, {}
        with ExitStack() as cleanup:
            cleanup.callback(self.accelerator.free_memory)
            cleanup.callback(distiller.close)
            # The optimizer must not change parameters that no loss reaches, by weight decay say, nor DDP wait for them.
            cleanup.enter_context(training_only(distiller, reached(self.models, trained, distiller)))
            caches = open_caches(self.models, trained, distiller, self.progress, cleanup)
            for cache in caches.values():
                check_shared(self.accelerator, cache.folder / DEPENDS_ON, "the teacher's cache")
            loop = loop_of(self.models, trained, phase, distiller, caches)
            cleanup.callback(loop.close)
            loop.check_caches()
            yield loop

    def _finish_phase(self, trained: TrainedModel, loop: Loop) -> None:
        """Report on the caches, restore the best epoch, and write the student's adapters."""
        for name, cache in loop.caches.items():
            computed, recalled = loop.computed[name], loop.recalled[name]
            counts = f"{computed} images asked of the {role_of_teacher(name)}, {recalled} known from its cache"
            self.progress.tell(f"{trained.role}: {loop.phase.name}: {counts} in {cache.folder}")
        if self.saver.take_best(loop):
            self.scorer.latest.clear()
            self.scorer.forget_teacher()
        if (shares := loop.distiller.shares) is not None:
            self.state.measured_weights[loop.phase.name] = shares.by_name
            if followed := shares.describe(followed=True):
                self.progress.tell(f"{trained.role}: {loop.phase.name}: at the end, {followed}")
        adapters = loop.distiller.adapters
        for name, own in (("adapters", adapters), ("losses", loop.distiller.losses)):
            if not all(bool(tensor.isfinite().all()) for tensor in own.parameters()):
                raise for_all(RunError(no_number(f"the {name} of stage {loop.phase.name!r}", "no numbers")))
        if trained.role == "student" and self.accelerator.is_main_process and adapters.state_dict():
            metadata = {"stage": loop.phase.name, "probe_kd": __version__}
            self.saver.write(adapters, f"adapters-{self.state.phase}.safetensors", metadata)

    def _record(self, trained: TrainedModel, loop: Loop, losses: Row) -> None:
        """End an epoch: measure the models, write a row, save a checkpoint, and show the results."""
        state = self.state
        state.epoch += 1
        is_due = state.epoch % self.plan.recipe.val_interval == 0 or state.epoch == loop.phase.epochs
        average = replace(trained, model=loop.average.module) if loop.average is not None else None
        models = [model for model in (trained.partner, trained, average) if model is not None]
        scores = iter(self.scorer.measure(models) if is_due else ())
        for shown in filter(None, (trained.partner if is_due else None, trained)):
            row: Row = {"role": shown.role, "stage": loop.phase.name, "epoch": state.epoch}
            if is_due:
                self.scorer.latest[shown.role] = next(scores)
                row |= self.scorer.latest[shown.role].row
            if is_due and shown is trained and average is not None:
                row |= {f"ema_{name}": value for name, value in next(scores).row.items() if name == "accuracy"}
            if shown is trained and trained.learns_from_teacher:
                measures = self.scorer.measure_student(trained, loop, state.epoch)
                row |= measures
                self._choose(trained, loop, measures)
            state.rows.append(row | (losses if shown is trained else {}))
        self.saver.save(loop)
        logged = {f"{trained.role}/{name}": value for name, value in state.rows[-1].items() if isinstance(value, float)}
        with _tracking():
            self.accelerator.log(logged, step=loop.phase.age + state.epoch)
        self.progress.epoch(state.rows[-1])

    def _choose(self, trained: TrainedModel, loop: Loop, measures: dict[str, float]) -> None:
        """Without labels, keep the weights of the epoch with the best headline, of those that were measured."""
        if loop.phase.keep == "best" and self.plan.chosen_by:
            value = self.scorer.value_to_choose_by(trained, loop, measures)
            if value is not None:
                self.saver.keep_if_best(loop, -value)

    def _finish(self, trained: TrainedModel, average: nn.Module | None = None) -> None:
        if trained.partner is not None or trained in self.models.teachers.values():
            self.scorer.forget_teacher()  # `keep: best` may have gone back to other weights
        if trained.partner is not None:
            self._finish(replace(trained.partner, phases=trained.phases))
        # After the last epoch its weights were measured already, where that was in this process and on these images.
        score = self.scorer.latest.pop(trained.role, None) if self.plan.datasets.val is None else None
        score = score or self.scorer.measure([trained], self.scorer.final)[0]
        self._add_result(trained, score, average)

    def _add_result(self, trained: TrainedModel, score: Score, average: nn.Module | None = None) -> None:
        """Measure what is left, write the weights, and add the result."""
        averaged = replace(trained, model=average) if average is not None else None
        # Before any weights are written, since outputs that are no numbers end the run.
        ema_score = self.scorer.measure([averaged], self.scorer.final)[0] if averaged else Score()
        measures = self.scorer.final_measures(trained)
        ema_measures = self.scorer.final_measures(averaged) if averaged else {}
        pairs = self.scorer.final_pairs(trained, self.saver.folder) if trained.learns_from_teacher else []
        trace_ = trained.trace
        self.state.results[trained.role] = Result(
            role=trained.role,
            model=trace_.model,
            model_kwargs=dict(trace_.model_kwargs),
            parameters=trace_.parameters,
            macs=trace_.macs,
            accuracy=score.accuracy,
            agreement=score.agreement,
            seconds=round(self.state.seconds, 2),
            weights=self.saver.write_weights(trained) if trained.phases else "",
            ema_accuracy=ema_score.accuracy,
            ema_weights=self.saver.write_weights(averaged, "-ema") if averaged else "",
            measures={**score.measures, **measures, **means(pairs)},
            ema_measures={**ema_score.measures, **ema_measures},
            pairs=pairs,
            measured_weights=self.state.measured_weights,
            **score.classes,
        )


def loop_of(
    models: Models, trained: TrainedModel, phase: Phase, distiller: Distiller, caches: Mapping[str, TeacherCache]
) -> Loop:
    """Make the loop of a phase, over the training images in the form for this model."""
    return Loop(
        models.accelerator,
        models.plan.recipe,
        distiller,
        phase,
        images=models.plan.datasets.train,
        image_input=models.images_for(trained),
        num_classes=models.plan.datasets.num_classes,
        balanced=models.plan.datasets.balanced,
        averaged=trained.role in ("student", BASELINE),
        caches=caches,
    )
