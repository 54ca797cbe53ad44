"""The trials of a study: which values each has, its run, and what becomes of it.

Optuna chooses the values (TPE), stops what is behind (asynchronous successive halving), and stores all of it in one
file that several processes may write. Here a trial is made of a run: its epochs are reported as they end.
"""

import multiprocessing
import os
import shutil
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from probe_kd.data.datasets import Datasets, open_datasets
from probe_kd.errors import ProbeKDError, RecipeError, RunError, Stopped, short
from probe_kd.files.run_folder import Claim, claim, lock_file, unlock_file
from probe_kd.recipe.keys import Recipe, TeacherOptions
from probe_kd.recipe.planner import Plan, plan
from probe_kd.recipe.reading import Source, changed
from probe_kd.recipe.yaml_tree import KeyPath
from probe_kd.training.progress import LOG_EVERY, Progress
from probe_kd.training.run import train
from probe_kd.training.state import Row
from probe_kd.tuning.budget import scored_on_held_out, shortened, with_teachers
from probe_kd.tuning.space import Parameter, all_values

if TYPE_CHECKING:
    import optuna

JOURNAL = "study.log"
TRIALS, BEST = "trials", "best"
KEPT = ("recipe.yaml", "metrics.csv", "summary.json", "curves.png")  # of the best trial
RATE_PATH = "optimizer.lr"
RATE_FACTORS = (10**0.5, 10.0, 10**-0.5)  # of the learning rate, in the trials after the first
LEAST_FOR_RATES = 5  # trials of a study that begins with these
HALVING = 3  # of so many trials, one goes on after a rung
CACHE_LIMIT = 10e9  # bytes
_NEWBORN = 10.0  # seconds in which a trial that was asked for locks its folder
BASELINE, VALUES, WHY, SECONDS, SAID, STOPPED = "baseline", "values", "why", "seconds", "said", "stopped"
WHOLE = "whole"  # a trial that is not stopped early


@dataclass(frozen=True)
class Trials:
    """What all trials of a study have in common. Every process that runs trials has a copy.

    `epochs` are those of a trial, `count` is the number of trials to run, and `deadline` the time after which none
    begins. `teachers` are the teachers as trials see them.
    """

    source: Source
    parameters: tuple[Parameter, ...]
    folder: Path
    epochs: int
    count: int
    seed: int
    measure: str
    teachers: Mapping[str, TeacherOptions] = field(default_factory=dict)
    allow_import: tuple[str, ...] = ()
    deadline: float | None = None

    @property
    def rung(self) -> int:
        """The epoch of the last stage at which a trial is first compared with the others."""
        return ceil(self.of_last_stage / 2)

    @property
    def of_last_stage(self) -> int:
        return shortened(self.source.recipe, self.epochs).stages[-1].epochs

    def recipe(self, recipe: Recipe) -> Recipe:
        """The recipe of a trial with the values of this one."""
        recipe = with_teachers(shortened(scored_on_held_out(recipe), self.epochs), self.teachers)
        return recipe.model_copy(update={"val_interval": self.rung})

    def plan(self, values: Mapping[KeyPath, Any], datasets: Datasets) -> Plan:
        """The plan of a trial. Raises RecipeError for values that do not go together."""
        other = changed(self.source, values, place=("tune",))
        return plan(replace(other, recipe=self.recipe(other.recipe)), allow_import=self.allow_import, datasets=datasets)

    def open_images(self) -> Datasets:
        return open_datasets(self.recipe(self.source.recipe).data)

    def trial_folder(self, number: int) -> Path:
        return self.folder / TRIALS / f"{number:04d}"


def import_optuna() -> Any:
    """Optuna, without its log. Raises RunError if it is not installed."""
    try:
        import optuna
    except ImportError:
        raise RunError("`probe-kd tune` needs Optuna: pip install 'probe-kd[tune]'") from None
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
    return optuna


def open_study(trials: Trials, *, process: int = 0) -> "optuna.Study":
    """The study in the folder, which is made if there is none. Raises RunError if its file cannot be read.

    Every process has a seed of its own; otherwise all would draw the same values.
    """
    optuna = import_optuna()
    file = trials.folder / JOURNAL
    try:
        backend = optuna.storages.journal.JournalFileBackend(str(file), _lock_of(file))
        storage = optuna.storages.JournalStorage(backend)
        study = optuna.create_study(
            storage=storage,
            study_name="tune",
            direction="maximize",
            load_if_exists=True,
            pruner=optuna.pruners.SuccessiveHalvingPruner(min_resource=trials.rung, reduction_factor=HALVING),
        )
    except OSError as refusal:
        raise RunError(f"cannot write {file}: {refusal.strerror}") from None
    except Exception as refusal:  # what Optuna makes of a damaged file
        raise RunError(
            f"{file} is damaged: {short(refusal)}. Put it back from a copy, or begin anew by --overwrite"
        ) from None
    seed = trials.seed + 1_000 * process + len(study.get_trials(deepcopy=False))
    startup = min(10, max(3, trials.count // 3))
    study.sampler = optuna.samplers.TPESampler(seed=seed % 2**32, n_startup_trials=startup)
    if not study.get_trials(deepcopy=False):
        baseline, *rates = first_trials(trials.parameters, trials.count)
        study.enqueue_trial(baseline, user_attrs={BASELINE: True, WHOLE: True})
        for values in rates:
            study.enqueue_trial(values, user_attrs={WHOLE: True})
    return study


def _lock_of(file: Path) -> Any:
    """Optuna's lock for the file: the one for file systems without symbolic links, where there are none."""
    from optuna.storages.journal import JournalFileOpenLock, JournalFileSymlinkLock

    probe = file.with_name(".link")
    try:
        probe.symlink_to(file.name)
        probe.unlink()
    except OSError:
        return JournalFileOpenLock(str(file))
    return JournalFileSymlinkLock(str(file))


def first_trials(parameters: tuple[Parameter, ...], count: int) -> list[dict[str, Any]]:
    """The values of the trials with which a study of `count` trials begins.

    The first is the recipe as it stands. If learning rates vary, the next ones have that recipe with other rates: what
    is best of the other values depends on the rate, and no other value matters as much.
    """
    baseline: dict[str, Any] = {each.path: each.default for each in parameters if each.default is not None}
    rates = {
        parameter: parameter.default
        for parameter in parameters
        if parameter.path.endswith(RATE_PATH) and isinstance(parameter.default, float)
    }
    values = [baseline]
    for factor in RATE_FACTORS if rates and count >= LEAST_FOR_RATES else ():
        scaled = {rate.path: min(max(own * factor, rate.low), rate.high) for rate, own in rates.items()}
        if baseline | scaled not in values:
            values.append(baseline | scaled)
    return values


class _Reporting(Progress):
    """Reports the measure of every epoch of the student's last stage, and keeps what the run says.

    Prints a line every half minute, of all stages together: a short trial has none, and never a bar.
    """

    def __init__(
        self, progress: Progress, title: str, measure: str, stages: int, report: Callable[[int, float], None]
    ) -> None:
        super().__init__(progress.console, quiet=progress.quiet, bars=False)
        self.name, self.shown = title, time.monotonic()
        self.measure, self.stages_left, self.report = measure, stages, report
        self.said: list[str] = []
        self.parent = multiprocessing.parent_process()

    def begin(self, title: str, *arguments: Any, **options: Any) -> None:
        shown = self.shown
        super().begin(f"{self.name}: {title}", *arguments, **options)
        self.shown = shown
        self.stages_left -= title.startswith("student: ")

    def is_shown(self, row: Row) -> bool:
        return time.monotonic() - self.shown > LOG_EVERY

    def step(self, done: int, images: int) -> bool:
        if self.parent is not None and not self.parent.is_alive():
            raise Stopped("stopped, as the command that began this process has ended")
        return super().step(done, images)

    def say(self, text: str) -> None:
        self.said.append(text)

    def tell(self, text: str) -> None:
        self.said.append(text)

    def epoch(self, row: Row) -> None:
        super().epoch(row)
        if row["role"] == "student" and self.stages_left == 0 and row.get(self.measure) is not None:
            self.report(row["epoch"], row[self.measure])


def work(trials: Trials, progress: Progress, datasets: Datasets, *, process: int = 0, most: int | None = None) -> None:
    """Run trials until the study has as many as it should, the time is over, or `most` are done.

    Raises Stopped, or KeyboardInterrupt, after a signal; the trial that was running is begun anew by whoever goes on.
    """
    study, done = open_study(trials, process=process), 0
    while (most is None or done < most) and counted(study) < trials.count:
        if trials.deadline is not None and time.time() > trials.deadline and counted(study):
            return
        _Trial(trials, study, study.ask(), progress).run(datasets)
        done += 1


def counted(study: "optuna.Study") -> int:
    """The trials that were begun, without those that were stopped and are begun anew."""
    from optuna.trial import TrialState

    begun = (trial for trial in study.get_trials(deepcopy=False) if trial.state != TrialState.WAITING)
    return sum(STOPPED not in trial.user_attrs for trial in begun)


@dataclass
class _Trial:
    """One trial, from its values to its end."""

    trials: Trials
    study: "optuna.Study"
    trial: "optuna.Trial"
    progress: Progress

    @property
    def is_baseline(self) -> bool:
        return bool(self.trial.user_attrs.get(BASELINE))

    def run(self, datasets: Datasets) -> None:
        """Run the trial, and tell the study of it. Only a signal to stop is raised."""
        from optuna import TrialPruned
        from optuna.trial import TrialState

        started, folder = time.monotonic(), self.trials.trial_folder(self.trial.number)
        try:
            with claim(folder, self.progress.say) as claimed:
                value = self._value(datasets, folder, claimed)
                self._keep_best(value, folder)
                self._tell(value, started)
        except TrialPruned:
            self._tell(None, started, state=TrialState.PRUNED)
        except (Stopped, KeyboardInterrupt):
            give_back(self.study, self.trial.number)
            raise
        except Exception as refusal:  # models, losses and devices can fail in any way, and the next trial may not
            why = refusal.problems[0].message if isinstance(refusal, RecipeError) else short(refusal)
            kind = "" if isinstance(refusal, ProbeKDError) else f"{type(refusal).__name__}: "
            self.trial.set_user_attr(WHY, f"{kind}{why}")
            self._tell(None, started, state=TrialState.FAIL)
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _value(self, datasets: Datasets, folder: Path, claimed: Claim) -> float:
        """Train the student of the trial, and return its measure on the held-out images."""
        drawn = self._draw()
        values = {} if self.is_baseline else all_values(self.trials.parameters, drawn)
        self.trial.set_user_attr(VALUES, drawn)
        planned = self.trials.plan(values, datasets)
        name, stages = f"trial {self.trial.number}", len(planned.recipe.stages)
        reporting = _Reporting(self.progress, name, self.trials.measure, stages, self._report)
        try:
            state = train(planned, folder, reporting, claimed=claimed)
        finally:
            self.trial.set_user_attr(SAID, reporting.said)
        value = state.results["student"].value(self.trials.measure)
        if value is None:
            raise RunError(f"the run has no {self.trials.measure}")
        return value

    def _draw(self) -> dict[str, Any]:
        """The values of the trial by their paths: of the baseline, those that are also drawn."""
        parameters = self.trials.parameters
        if self.is_baseline:
            parameters = tuple(parameter for parameter in parameters if parameter.default is not None)
        return {parameter.path: _suggest(self.trial, parameter) for parameter in parameters}

    def _report(self, epoch: int, value: float) -> None:
        """Report an epoch, and stop a trial that is behind, unless it is to be measured to its end."""
        from optuna import TrialPruned

        self.trial.report(value, epoch)
        is_last = epoch == self.trials.of_last_stage
        if not self.trial.user_attrs.get(WHOLE) and not is_last and self.trial.should_prune():
            raise TrialPruned

    def _tell(self, value: float | None, started: float, **state: Any) -> None:
        self.trial.set_user_attr(SECONDS, round(time.monotonic() - started, 1))
        frozen = self.study.tell(self.trial, value, **state)
        self.progress.tell(line_of(frozen, self.trials))

    def _keep_best(self, value: float, folder: Path) -> None:
        """Keep the tables of the best trial so far, in place of those of the one before."""
        if any(value <= other.value for other in completed(self.study)):
            return
        place, aside = self.trials.folder / BEST, self.trials.folder / f"{BEST}.partial"
        for path in (aside, place):
            shutil.rmtree(path, ignore_errors=True)
        aside.mkdir()
        for name in KEPT:
            if (folder / name).is_file():
                shutil.copyfile(folder / name, aside / name)
        os.replace(aside, place)


def _suggest(trial: "optuna.Trial", parameter: Parameter) -> float | str:
    """Draw a value. Numbers have three digits, as they are written in the tuned recipe."""
    if parameter.choices:
        label: str = trial.suggest_categorical(parameter.path, [label for label, _ in parameter.choices])
        return label
    if parameter.whole:
        return int(trial.suggest_int(parameter.path, int(parameter.low), int(parameter.high)))
    drawn = trial.suggest_float(parameter.path, parameter.low, parameter.high, log=parameter.log)
    return min(max(float(f"{drawn:.3g}"), parameter.low), parameter.high)


def completed(study: "optuna.Study") -> list[Any]:
    """The trials that trained to their end, in their order."""
    from optuna.trial import TrialState

    return list(study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)))


def give_back(study: "optuna.Study", number: int) -> None:
    """End a trial that was stopped or killed, and put its values first in the queue."""
    from optuna.exceptions import UpdateFinishedTrialError
    from optuna.trial import TrialState

    trial = study.get_trials(deepcopy=False)[number]
    try:
        study._storage.set_trial_user_attr(trial._trial_id, STOPPED, True)
        study.tell(number, state=TrialState.FAIL)
    except (UpdateFinishedTrialError, ValueError):  # another process has just done so
        return
    attributes = {name: True for name in (BASELINE, WHOLE) if trial.user_attrs.get(name)}
    study.enqueue_trial(dict(trial.params) or _queued(trial), user_attrs=attributes)


def _queued(trial: Any) -> dict[str, Any]:
    """The values with which a trial waited in the queue."""
    return dict(trial.system_attrs.get("fixed_params", {}))


def revive(trials: Trials, study: "optuna.Study") -> int:
    """Give back the trials of processes that were killed, and return how many still run in others."""
    from optuna.trial import TrialState

    alive = 0
    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        folder = trials.trial_folder(trial.number)
        age = time.time() - trial.datetime_start.timestamp() if trial.datetime_start else _NEWBORN
        if not folder.exists() and age < _NEWBORN:
            time.sleep(_NEWBORN - age)
        if is_alive(folder):
            alive += 1
            continue
        shutil.rmtree(folder, ignore_errors=True)
        give_back(study, trial.number)
    return alive


def is_alive(folder: Path) -> bool:
    """Whether a process holds the lock of a trial's folder, which ends with that process."""
    if not folder.is_dir():
        return False
    try:
        handle = lock_file(folder / ".lock")
    except OSError:  # of a file system without locks, where this cannot be known
        return True
    if handle is None:
        return True
    unlock_file(handle)
    return False


def line_of(trial: Any, trials: Trials) -> str:
    """One line on a trial that has ended."""
    from optuna.trial import TrialState

    from probe_kd.measures import MEASURES

    drawn = trial.user_attrs.get(VALUES, {})
    values = ", ".join(f"{path} {short_value(value)}" for path, value in drawn.items())
    values = "the recipe as it stands" if trial.user_attrs.get(BASELINE) else values
    seconds = f"{trial.user_attrs.get(SECONDS, 0):.0f} s"
    brief = MEASURES[trials.measure].text
    if trial.state == TrialState.COMPLETE:
        return f"trial {trial.number}: {brief(trial.value)} after {seconds}: {values}"
    if trial.state == TrialState.PRUNED:
        step = max(trial.intermediate_values)
        reached = f"{brief(trial.intermediate_values[step])} at epoch {step} of {trials.of_last_stage}"
        return f"trial {trial.number}: {reached}, stopped as it is behind, after {seconds}: {values}"
    return f"trial {trial.number} failed after {seconds}: {trial.user_attrs.get(WHY, 'stopped')}: {values}"


def short_value(value: float | str) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
