"""A study from a recipe to an outcome: teachers, trials, the comparison by seeds, the tuned recipe. Reads downwards."""

import multiprocessing
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from rich.console import Console

from probe_kd.console import size
from probe_kd.data.datasets import Datasets
from probe_kd.errors import ProbeKDError, Problem, RecipeError, RunError, Stopped
from probe_kd.files.run_folder import Claim, claim
from probe_kd.measures import MEASURES, OF_PAIRS
from probe_kd.recipe.planner import Plan, plan
from probe_kd.recipe.reading import Source
from probe_kd.recipe.sections.outputs import role_of_teacher
from probe_kd.recipe.yaml_tree import KeyPath
from probe_kd.training.progress import Progress
from probe_kd.training.run import train
from probe_kd.training.state import weights_name
from probe_kd.tuning.budget import (
    cache_bytes,
    epochs_of,
    other_images,
    scored_on_held_out,
    trained_teachers,
    trial_epochs,
    why_no_cache,
)
from probe_kd.tuning.folder import (
    CACHE,
    FULL,
    OTHER_TEACHER,
    SUMMARY,
    TEACHER,
    check_folder,
    measured_before,
    open_folder,
    settings_of,
)
from probe_kd.tuning.outcome import (
    TUNED,
    Outcome,
    TrialSummary,
    best_of,
    summaries,
    verdict_of,
    what_mattered,
    write_json,
    write_tuned,
)
from probe_kd.tuning.paired import FullRun, FullRuns, Paired, paired, run_full, value_of
from probe_kd.tuning.remarks import near_ends, on_chance, on_failures
from probe_kd.tuning.space import Parameter, Planner, lines_of, space_of, usual_space, with_all_problems
from probe_kd.tuning.trials import CACHE_LIMIT, JOURNAL, Trials, counted, import_optuna, open_study, revive, work
from probe_kd.tuning.usual import usual_options

_OF_FEATURES = ("normalize", "projector", "policy", "tokens", "grid", "activation", "pairs")


@dataclass(frozen=True)
class Budget:
    """How much a study may cost: `trials` of `epochs` epochs (None: a quarter of the recipe's), in `jobs` processes.

    No trial begins after `timeout` seconds. `seeds` are the seeds with which the best is compared at the full budget.
    """

    trials: int = 20
    epochs: int | None = None
    timeout: float | None = None
    jobs: int = 1
    seeds: int = 3


def tune(
    source: Source,
    folder: Path,
    progress: Progress,
    *,
    budget: Budget,
    allow_import: Sequence[str] = (),
    resume: bool = False,
    overwrite: bool = False,
) -> Outcome:
    """Run a study of a recipe in a folder, and write `tuned.yaml` and `summary.json` there.

    `resume` goes on with the study in the folder, also beside other processes that do. `overwrite` deletes it first.

    Raises RecipeError for a recipe or a `tune` that cannot run, RunError where Optuna is not installed, the folder
    holds something else or was begun with another recipe, or no trial trained to its end. Raises Stopped, or
    KeyboardInterrupt, after a signal; what was done until then is kept.
    """
    import_optuna()
    check_folder(folder, resume=resume, overwrite=overwrite)
    started = time.time()
    held_out = replace(source, recipe=_with_tune(scored_on_held_out(source.recipe), source))
    progress.tell("planning the recipe, and each value that may be drawn")
    try:
        planned = plan(held_out, allow_import=allow_import)
    except RecipeError as refusal:
        raise with_all_problems(source, refusal, allow_import, scored_on_held_out) from None
    measured = measured_before(source, folder) if resume else None
    planner = Planner(source, planned, tuple(allow_import), scored_on_held_out, measured, progress.tell)
    parameters = parameters_of(planner)
    epochs = trial_epochs(source.recipe, budget.epochs)
    trials = Trials(
        source=source,
        parameters=parameters,
        folder=folder,
        epochs=epochs,
        count=budget.trials,
        seed=source.recipe.seed,
        measure=planned.headline,
        allow_import=tuple(allow_import),
        deadline=None if budget.timeout is None else started + budget.timeout,
    )
    settings = settings_of(source, parameters, epochs=epochs)
    goes_on = open_folder(folder, settings, planned.datasets, overwrite=overwrite)
    study = _Study(trials, planned, progress, budget)
    study.tell_plan(goes_on)
    return study.run()


def _with_tune(recipe: Any, source: Source) -> Any:
    """The recipe with its `tune`, so that its plan checks that section too."""
    return recipe.model_copy(update={"tune": source.recipe.tune})


def parameters_of(planner: Planner) -> tuple[Parameter, ...]:
    """What a study of this recipe varies: what its `tune` names, or what is usual.

    Raises RecipeError where nothing can be varied, or scored.
    """
    planned, source = planner.planned, planner.source
    if not planned.headline:
        message = "nothing of this recipe is measured, so that no trial is better; give `evaluate: {knn: ...}`"
        raise RecipeError(source.name, [Problem(message)])
    if source.recipe.tune is None:
        parameters = usual_space(planner, usual_options(planned))
        if not parameters:
            message = "there is nothing that is usually varied; say in `tune` what may be"
            raise RecipeError(source.name, [Problem(message)])
        return parameters
    of_features = [path for path in source.recipe.tune if path.rpartition(".")[2] in _OF_FEATURES]
    if planned.headline in OF_PAIRS and of_features:
        message = (
            f"the trials would be scored by the {MEASURES[planned.headline].title} of their pairs, of which "
            f"`{of_features[0]}` changes the meaning; leave it out, or "
            "give `evaluate: {knn: ...}` to be scored by"
        )
        raise source.error([source.problem(("tune", of_features[0]), message)])
    return space_of(planner)


class _Study:
    """The steps of a study. Each is skipped where it was done before the study was stopped."""

    def __init__(self, trials: Trials, planned: Plan, progress: Progress, budget: Budget) -> None:
        self.trials, self.planned, self.progress, self.budget = trials, planned, progress, budget
        self.folder = trials.folder
        self.notes: list[str] = []

    @property
    def trains_teacher(self) -> bool:
        """Whether a teacher is trained once, before the trials; with `share` it trains in each of them."""
        options = [teacher.options.train for teacher in self.planned.teachers.values()]
        return any(train is not None for train in options) and self.trials.source.recipe.share is None

    def tell_plan(self, goes_on: bool) -> None:
        trials, tell = self.trials, self.progress.tell
        images = len(self.planned.datasets.held_out)  # type: ignore[arg-type]
        verb = "goes on in" if goes_on else "in"
        tell(f"study {verb} {self.folder}: {trials.count} trials, scored on {images} held-out training images")
        recipe_epochs = epochs_of(trials.source.recipe)
        tell(f"a trial has {trials.epochs} of the recipe's {recipe_epochs} epochs; of those that are behind at epoch "
             f"{trials.rung} of the last stage, two thirds are stopped")  # fmt: skip
        tell("varied:")
        for line in lines_of(trials.parameters):
            tell(line)

    def run(self) -> Outcome:
        """Run all steps. After a signal, raises Stopped, which says how many trials are done."""
        try:
            with _interrupted_by_sigterm():
                return self._run()
        except (Stopped, KeyboardInterrupt) as stop:
            is_begun = (self.folder / JOURNAL).is_file()
            done = len(summaries(open_study(self.trials))) if is_begun else 0
            why = str(stop) or "stopped"
            raise Stopped(f"{why}; {done} of {self.trials.count} trials are done") from None

    def _run(self) -> Outcome:
        self._train_teachers(TEACHER, self.planned.datasets, "training the teacher, once for all trials")
        trials = replace(self.trials, teachers=self._teachers(TEACHER, self._cache()))
        self.trials = trials
        _run_trials(trials, self.progress, self.budget.jobs, self.planned.datasets)
        study = open_study(trials)
        best, values = best_of(study, trials)
        with self._claim_results():
            comparison = self._compare(best, values) if values and self.budget.seeds else None
            shutil.rmtree(self.folder / CACHE, ignore_errors=True)
            outcome = self._outcome(study, best, comparison)
            header = self._header(outcome)
            write_tuned(trials.source, values if outcome.uses_tuned else {}, header, self.folder / TUNED)
            write_json(outcome, self.folder / SUMMARY)
        return outcome

    def _claim_results(self) -> Claim:
        """Claim the right to compare and to write the results. Raises RunError if another process has it."""
        try:
            return claim(self.folder / FULL, self.progress.say)
        except RunError as refusal:
            raise RunError(
                f"the trials are done, and another process of the study compares the best with the recipe: {refusal}"
            ) from None

    def _train_teachers(self, name: str, images: Datasets, what: str) -> None:
        """Train the teachers that have no weights yet, and say so by `what`. Raises RunError, or Stopped."""
        folder = self.folder / name
        trained = [name for name, teacher in self.planned.teachers.items() if teacher.options.train is not None]
        weights = [folder / weights_name(role_of_teacher(name)) for name in trained]
        is_done = (folder / SUMMARY).is_file() and all(file.is_file() for file in weights)
        if not self.trains_teacher or is_done:
            return
        self.progress.tell(what)
        recipe = scored_on_held_out(self.trials.source.recipe)
        planned = plan(
            replace(self.trials.source, recipe=recipe), allow_import=self.trials.allow_import, datasets=images
        )
        finished = (folder / SUMMARY).is_file()  # and its weights are gone
        options: dict[str, Any] = {"overwrite": True} if finished else {"resume": folder.is_dir()}
        train(planned, folder, self.progress, teachers_only=True, **options)

    def _teachers(self, name: str, cache: Path | None) -> dict[str, Any]:
        return trained_teachers(self.planned, self.folder / name if self.trains_teacher else None, cache)

    def _cache(self) -> Path | None:
        """The folder of the teacher's cache for all trials; None where it cannot be, or would be too large."""
        why = why_no_cache(self.trials.source.recipe)
        if not self.planned.teachers:
            return None
        if why:
            self.progress.tell(f"the teacher is asked anew in every trial: {why}")
            return None
        self.progress.tell("planning what the teacher's cache of all trials holds")
        needed = self._cache_bytes()
        free = shutil.disk_usage(self.folder).free / 2
        if needed > min(CACHE_LIMIT, free):
            self.progress.tell(
                f"the teacher is asked anew in every trial: what it says would take {size(needed)} of the disk "
                f"(at most {size(min(CACHE_LIMIT, free))}); `data.views` or `cache_top_k` make that less"
            )
            return None
        self.progress.tell(f"the teacher's cache for all trials takes up to {size(needed)}; it is deleted at the end")
        return self.folder / CACHE / "trials"

    def _cache_bytes(self) -> float:
        """About what the cache of all trials takes: of the recipe as it stands, and of each value by itself."""
        plans = []
        images = self.planned.datasets
        for values in (
            {},
            *(parameter.values(label) for parameter in self.trials.parameters for label, _ in parameter.choices),
        ):
            try:
                plans.append(self.trials.plan(values, images))
            except ProbeKDError:  # it is found again when its trial is planned
                continue
        return cache_bytes(plans)

    def _compare(self, best: int, values: Mapping[KeyPath, Any]) -> Paired:
        """Run both recipes with the same seeds, at the full budget."""
        recipe, trials = scored_on_held_out(self.trials.source.recipe), self.trials
        images = other_images(recipe.data)
        if images is None:
            self.notes.append("the runs at the full budget are measured on the images that the trials were scored on")
            images = self.planned.datasets
        where = "other" if images is not self.planned.datasets else "the same"
        self.progress.tell(
            f"comparing trial {best} with the recipe as it stands, {epochs_of(trials.source.recipe)} epochs, "
            f"seeds: {self.budget.seeds}, {where} held-out images"
        )
        what = "training the teacher anew" + ", without the other held-out images" * (where == "other")
        self._train_teachers(OTHER_TEACHER, images, what)
        default, tuned, failed = dict[int, float](), dict[int, float](), list[str]()
        for seed in range(trials.source.recipe.seed, trials.source.recipe.seed + self.budget.seeds):
            cache = self.folder / CACHE / f"seed-{seed}"
            common = FullRuns(
                trials.source,
                self._teachers(OTHER_TEACHER, self._full_cache(cache)),
                trials.measure,
                trials.allow_import,
            )
            for name, side, side_values in (("default", default, {}), (f"trial-{best}", tuned, values)):
                run = FullRun(self.folder / FULL / f"{name}-seed-{seed}", seed, side_values)
                run_full(common, run, images, _Titled(self.progress, f"{name}, seed {seed}"))
                value = value_of(run.folder, trials.measure)
                if isinstance(value, str):
                    failed.append(f"{name} with seed {seed}: {value}")
                else:
                    side[seed] = value
                    self.progress.tell(f"{name} with seed {seed}: {MEASURES[trials.measure].text(value)}")
            shutil.rmtree(cache, ignore_errors=True)
        return paired(default, tuned, failed)

    def _full_cache(self, cache: Path) -> Path | None:
        """The cache of the two runs of one seed, where what it holds is small enough."""
        if why_no_cache(self.trials.source.recipe):
            return None
        needed = 2 * cache_bytes([self.planned])
        return cache if needed < min(CACHE_LIMIT, shutil.disk_usage(self.folder).free / 2) else None

    def _outcome(self, study: Any, best: int, comparison: Paired | None) -> Outcome:
        rows, note = what_mattered(study, self.trials, best)
        all_trials = summaries(study)
        baseline = next((trial.number for trial in all_trials if trial.is_baseline and trial.outcome == "done"), None)
        is_baseline = baseline == best
        outcome = Outcome(
            recipe=self.trials.source.name,
            measure=self.trials.measure,
            epochs=self.trials.epochs,
            trials=all_trials,
            best=best,
            baseline=baseline,
            mattered=rows,
            importance_note=note,
            comparison=comparison,
            uses_tuned=not is_baseline and (comparison is None or comparison.mean is None or comparison.is_better),
            notes=(*self.notes, *self._notes(all_trials, best)),
        )
        return replace(outcome, verdict=verdict_of(outcome))

    def _notes(self, all_trials: Sequence[TrialSummary], best: int) -> list[str]:
        """What a reader should know beside the figures."""
        trials = self.trials
        (summary,) = (trial for trial in all_trials if trial.number == best)
        assert summary.value is not None
        can_lengthen = trials.epochs < epochs_of(trials.source.recipe)
        notes = on_chance(summary.value, self.planned, can_lengthen=can_lengthen)
        return [*notes, *near_ends(trials.parameters, summary.values, self._can), *on_failures(all_trials)]

    def _can(self, values: Mapping[KeyPath, Any]) -> bool:
        """Whether a trial can run with these values."""
        try:
            self.trials.plan(values, self.planned.datasets)
        except ProbeKDError:
            return False
        return True

    def _header(self, outcome: Outcome) -> list[str]:
        """The comment at the head of the tuned recipe."""
        what = f"trial {outcome.best}" if outcome.uses_tuned else "the recipe as it stands"
        lines = [f"Written by probe-kd tune from {outcome.recipe}: {what} of {len(outcome.trials)} trials."]
        trial = outcome.trial(outcome.best)
        changes = [
            f"  {row.path}: {row.best} (was {row.default})" for row in outcome.mattered if row.best != row.default
        ]
        assert trial is not None
        return [outcome.verdict, *lines, *(changes if outcome.uses_tuned else [])]


class _Titled(Progress):
    """The progress of a run of a study, under a title of its own."""

    def __init__(self, progress: Progress, title: str) -> None:
        super().__init__(progress.console, quiet=progress.quiet)
        self.name = title

    def begin(self, title: str, *arguments: Any, **options: Any) -> None:
        super().begin(f"{self.name}: {title}", *arguments, **options)

    def tell(self, text: str) -> None:
        """What a run says of itself is not about the study."""


def _run_trials(trials: Trials, progress: Progress, jobs: int, datasets: Datasets) -> None:
    """Run trials in this process or in several, until there are enough; trials of killed processes are run again."""
    study = open_study(trials)
    if counted(study) < trials.count:
        processes = f" in {jobs} processes, after the first" if jobs > 1 else ""
        progress.tell(f"running trials{processes}; {len(summaries(study))} of {trials.count} are done")
    is_waiting = False
    while True:
        alive = revive(trials, study)
        is_late = trials.deadline is not None and time.time() > trials.deadline
        if counted(study) >= trials.count or (is_late and counted(study)):
            if not alive:
                return
            if not is_waiting:
                progress.tell("waiting for another process of the study, which is at its last trials")
            is_waiting = True
            time.sleep(1.0)
            continue
        if jobs == 1 or not counted(study):
            # The recipe as it stands comes first and alone, so that its process fills the cache.
            work(trials, progress, datasets, most=None if jobs == 1 else 1)
        else:
            _run_in_processes(trials, progress, jobs)


def _run_in_processes(trials: Trials, progress: Progress, jobs: int) -> None:
    """Run trials in several processes. Raises Stopped after a signal, and RunError if one of them fails."""
    context = multiprocessing.get_context("spawn")
    threads = max(1, torch.get_num_threads() // jobs)
    processes = [
        context.Process(target=_work_apart, args=(trials, number, threads, progress.quiet))
        for number in range(1, jobs + 1)
    ]
    try:
        for process in processes:
            process.start()
        for process in processes:
            process.join()
    except BaseException:
        begun = [process for process in processes if process.pid is not None]
        for process in begun:
            process.terminate()
        for process in begun:
            process.join()
        raise
    codes = [process.exitcode for process in processes]
    if 128 + signal.SIGINT in codes:
        raise Stopped("stopped by a signal")
    if any(codes):
        raise RunError(
            f"a process of the study ended with status {next(filter(None, codes))}; what was done is kept, --resume "
            "goes on"
        )


@contextmanager
def _interrupted_by_sigterm() -> Iterator[None]:
    """Raise KeyboardInterrupt on SIGTERM, which would else end this process without a word, and leave its workers.

    It is no Exception, so that nothing takes it for the failure of a trial. A run that trains has its own handler.
    """

    def on_signal(number: int, _: FrameType | None) -> None:
        raise KeyboardInterrupt(f"stopped by {signal.Signals(number).name}")

    if threading.current_thread() is not threading.main_thread():  # only there may handlers be set
        yield
        return
    former = signal.signal(signal.SIGTERM, on_signal)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, former)


def _work_apart(trials: Trials, process: int, threads: int, quiet: bool) -> None:
    """What one of several processes does."""
    from probe_kd.console import PlainConsole

    torch.set_num_threads(threads)
    console: Console = PlainConsole(width=None if sys.stdout.isatty() else 160)
    try:
        work(trials, Progress(console, quiet=quiet), trials.open_images(), process=process)
    except (Stopped, KeyboardInterrupt):
        sys.exit(128 + signal.SIGINT)
    except ProbeKDError as refusal:
        print(f"error: {refusal}", file=sys.stderr)
        sys.exit(2)
