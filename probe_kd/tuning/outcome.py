"""What a study found: the best trial, what mattered, the comparison by seeds, and the recipe that is written."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from textwrap import wrap
from typing import TYPE_CHECKING, Any

from probe_kd.errors import ProbeKDError, RunError
from probe_kd.files.atomic import put, read_text
from probe_kd.measures import MEASURES
from probe_kd.recipe.reading import Source, parse
from probe_kd.recipe.sections.tune import shown, value_at
from probe_kd.recipe.writing import as_yaml, with_values
from probe_kd.recipe.yaml_tree import KeyPath
from probe_kd.tuning.paired import LEVEL, Paired
from probe_kd.tuning.space import all_values
from probe_kd.tuning.trials import BASELINE, SECONDS, STOPPED, VALUES, WHY, Trials, completed, import_optuna

if TYPE_CHECKING:
    import optuna

FEW = 10  # trials, below which an importance is no more than noise
TUNED = "tuned.yaml"


@dataclass(frozen=True)
class TrialSummary:
    """One trial. `value` is the measure at its end, or where it was stopped; `outcome` is done, stopped or failed."""

    number: int
    outcome: str
    value: float | None
    epochs: int
    seconds: float
    values: Mapping[str, float | str]
    is_baseline: bool = False
    why: str = ""


@dataclass(frozen=True)
class Mattered:
    """One parameter: its importance (None where that cannot be told), what the recipe has, and what the best trial."""

    path: str
    importance: float | None
    default: str
    best: str


@dataclass(frozen=True)
class Outcome:
    """The whole of a study. `best` and `baseline` are numbers of trials; None if the recipe as it stands failed."""

    recipe: str
    measure: str
    epochs: int
    trials: tuple[TrialSummary, ...]
    best: int
    baseline: int | None
    mattered: tuple[Mattered, ...]
    importance_note: str
    comparison: Paired | None
    uses_tuned: bool
    notes: tuple[str, ...]
    verdict: str = ""

    @property
    def has_importances(self) -> bool:
        return any(row.importance is not None for row in self.mattered)

    def trial(self, number: int | None) -> TrialSummary | None:
        return next((trial for trial in self.trials if trial.number == number), None)


def summaries(study: "optuna.Study") -> tuple[TrialSummary, ...]:
    """All trials that have ended, without those that were stopped by a signal and begun anew."""
    from optuna.trial import TrialState

    words = {TrialState.COMPLETE: "done", TrialState.PRUNED: "stopped", TrialState.FAIL: "failed"}
    return tuple(
        TrialSummary(
            number=trial.number,
            outcome=words[trial.state],
            value=trial.value if trial.state != TrialState.FAIL else None,
            epochs=max(trial.intermediate_values, default=0),
            seconds=trial.user_attrs.get(SECONDS, 0.0),
            values=trial.user_attrs.get(VALUES, {}),
            is_baseline=bool(trial.user_attrs.get(BASELINE)),
            why=trial.user_attrs.get(WHY, ""),
        )
        for trial in study.get_trials(deepcopy=False, states=tuple(words))
        if STOPPED not in trial.user_attrs
    )


def best_of(study: "optuna.Study", trials: Trials) -> tuple[int, dict[KeyPath, Any]]:
    """The number of the best trial, and what it changes in the recipe; of equals, the recipe itself, or the first.

    Raises RunError if no trial trained to its end.
    """
    ended = completed(study)
    if not ended:
        whys = list(dict.fromkeys(trial.why for trial in summaries(study) if trial.why))
        raise RunError(f"no trial has trained to its end; {whys[0] if whys else 'none was begun'}")
    best = max(ended, key=lambda trial: (trial.value, bool(trial.user_attrs.get(BASELINE)), -trial.number))
    is_baseline = bool(best.user_attrs.get(BASELINE))
    return best.number, {} if is_baseline else all_values(trials.parameters, best.user_attrs[VALUES])


def what_mattered(study: "optuna.Study", trials: Trials, best: int) -> tuple[tuple[Mattered, ...], str]:
    """The parameters by their importance, and a note on how far that can be trusted."""
    importances, note = _importances(study, trials)
    drawn = study.get_trials(deepcopy=False)[best].user_attrs[VALUES]
    rows = []
    for parameter in trials.parameters:
        own = value_at(trials.source.recipe, parameter.places[0])
        text = "as written" if parameter.path == "pairs" else "-" if own is None else shown(own)
        chosen = drawn.get(parameter.path)
        rows.append(
            Mattered(parameter.path, importances.get(parameter.path), text, text if chosen is None else shown(chosen))
        )
    return tuple(sorted(rows, key=lambda row: -(row.importance or 0.0))), note


def _importances(study: "optuna.Study", trials: Trials) -> tuple[dict[str, float], str]:
    """The importance of each parameter for the score at the first rung, which all trials reach (functional ANOVA)."""
    from optuna.trial import TrialState

    optuna = import_optuna()
    paths, rung = [parameter.path for parameter in trials.parameters], trials.rung
    usable = [
        trial
        for trial in study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.PRUNED))
        if rung in trial.intermediate_values and set(paths) <= trial.params.keys()
    ]
    if len(usable) < FEW:
        trials_are = "1 trial is" if len(usable) == 1 else f"{len(usable)} trials are"
        return {}, f"{trials_are} too few to tell what mattered; {FEW} or more do, by --trials and --resume"
    at_rung = optuna.create_study(direction="maximize")
    for trial in usable:
        value = trial.intermediate_values[rung]
        at_rung.add_trial(
            optuna.trial.create_trial(params=trial.params, distributions=trial.distributions, value=value)
        )
    if len({trial.value for trial in at_rung.trials}) < 2:
        return {}, "all trials have the same score, so that nothing mattered"
    evaluator = optuna.importance.FanovaImportanceEvaluator(seed=0)
    shares = optuna.importance.get_param_importances(at_rung, evaluator=evaluator, params=paths)
    epochs = f"{rung} epoch{'s' * (rung > 1)}"
    note = f"of the score after {epochs} of the last stage, which {len(usable)} trials reached; functional ANOVA"
    return dict(shares), note + (", a rough guide with so few trials" if len(usable) < 10 * len(paths) else "")


def verdict_of(outcome: Outcome) -> str:
    """What the study says, in sentences: the paired figure first."""
    measure, comparison = MEASURES[outcome.measure], outcome.comparison
    baseline, best = outcome.trial(outcome.baseline), outcome.trial(outcome.best)
    assert best is not None
    if best.is_baseline:
        return f"No trial was better than the recipe as it stands ({measure.text(best.value)}), which is kept."
    of_trials = (
        f"The best of {len(outcome.trials)} trials, number {best.number}, has {measure.title} "
        f"{measure.text(best.value)} on the held-out images that it was chosen by, which is optimistic"
    )
    if baseline is not None and baseline.value is not None:
        of_trials += f"; the recipe as it stands has {measure.text(baseline.value)} there, with as few epochs"
    if comparison is None:
        return f"{of_trials}. Whether it is better at the full budget was not measured (--seeds 0)."
    if comparison.mean is None:
        return f"The runs at the full budget failed: {'; '.join(comparison.failed)}. {of_trials}."
    return f"{difference_text(comparison, outcome.measure)} {of_trials}."


def difference_text(comparison: Paired, measure: str) -> str:
    """The paired difference as a sentence."""
    assert comparison.mean is not None
    count, unit = len(comparison.seeds), "points" if MEASURES[measure].unit else ""
    factor = MEASURES[measure].factor
    figures = f"{factor * comparison.mean:+.2f} {unit}".strip()
    if comparison.low is not None and comparison.high is not None:
        bounds = f"{factor * comparison.low:+.2f} to {factor * comparison.high:+.2f}"
        figures += f" ({LEVEL:.0%} interval {bounds})"
    seeds = "1 seed" if count == 1 else f"{count} seeds"
    sure = comparison.low is not None and (comparison.low > 0 or (comparison.high or 0) < 0)
    doubt = "" if sure else "; the interval includes 0" if count > 1 else "; one seed gives no interval"
    kept = "" if comparison.is_better else " The recipe as it stands is kept."
    return (
        f"The tuned recipe differs by {figures} from the recipe as it stands, at the full budget with {seeds}, "
        f"better in {comparison.better}{doubt}.{kept}"
    )


def write_json(outcome: Outcome, path: Path) -> None:
    aside = path.with_name(f"{path.name}.partial")
    aside.write_text(json.dumps(asdict(outcome), indent=1) + "\n", encoding="utf-8")
    put(aside, path)


def write_tuned(source: Source, values: Mapping[KeyPath, Any], header: Sequence[str], path: Path) -> None:
    """Write the recipe with other values and without `tune`, in the words of its file where that can be kept.

    Comments are kept unless the recipe extends another, or has options of the command line.
    """
    node_values = {key: value for key, value in source.node.plain.items() if key != "tune"}
    whole = _changed(node_values, values)
    lines = [f"# {part}" for line in header for part in wrap(line, 116, subsequent_indent="  ")]
    try:
        text = with_values(read_text(Path(source.name)), values)
        stands_alone = len(source.texts) == 1
        is_same = stands_alone and parse(text, source.name).recipe == parse(as_yaml(whole), source.name).recipe
    except (OSError, ValueError, LookupError, TypeError, AttributeError, ProbeKDError):
        is_same = False
    body = text if is_same else as_yaml(whole)
    aside = path.with_name(f"{path.name}.partial")
    aside.write_text("\n".join([*lines, body]), encoding="utf-8")
    put(aside, path)


def _changed(tree: Any, values: Mapping[KeyPath, Any]) -> Any:
    """A copy of plain data with other values."""
    copy = json.loads(json.dumps(tree))
    for place, value in values.items():
        inner = copy
        for step in place[:-1]:
            inner = inner[int(step)] if isinstance(inner, list) else inner.setdefault(step, {})
        inner[place[-1]] = value
    return copy
