"""What a reader of a study should know beside its figures: failed trials, a score near chance, a value near an end."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from math import log
from typing import Any

from probe_kd.data.datasets import Datasets
from probe_kd.data.label_sets import MultiHotImages
from probe_kd.measures import MEASURES
from probe_kd.recipe.planner import Plan
from probe_kd.recipe.yaml_tree import KeyPath
from probe_kd.tuning.outcome import TrialSummary
from probe_kd.tuning.space import Parameter
from probe_kd.tuning.trials import short_value

MOST = 5  # failed trials that are told one by one
NEAR = 0.1  # of a range, from its end
LEARNED = 0.2  # of the way from chance to a perfect score


def on_failures(trials: Sequence[TrialSummary]) -> list[str]:
    failed = [trial for trial in trials if trial.outcome == "failed"]
    notes = [f"trial {trial.number} failed: {trial.why}" for trial in failed[:MOST]]
    notes += [f"and {len(failed) - MOST} more trials failed"] * (len(failed) > MOST)
    if not any(trial.is_baseline and trial.outcome == "done" for trial in trials):
        notes.append("the recipe as it stands did not train to its end, so there is nothing to compare with")
    return notes


def chance(planned: Plan) -> float | None:
    """The score of guesses, by the measure that trials are scored by; None for measures of features.

    It is one class of all of them. Of mAP, it is the share of images that have a class, the mean over the classes: the
    average precision of a random order.
    """
    if planned.headline == "map":
        images = planned.datasets.test
        if not isinstance(images, MultiHotImages):
            return None
        return len(images.sets.indices) / (len(images.sets) * images.num_classes)
    datasets = _datasets(planned)
    return None if datasets is None else 1 / datasets.num_classes


def most_frequent(planned: Plan) -> float | None:
    """The share of the most frequent class in the training images: its score as the answer for all images like them.

    None where it is unknown, or the score of trials is no share of right answers.
    """
    datasets = _datasets(planned)
    counts = None if datasets is None else datasets.train_counts
    return max(counts) / sum(counts) if counts else None


def _datasets(planned: Plan) -> Datasets | None:
    """The labelled images by which trials are scored, if the score is a share of right answers."""
    return planned.datasets if planned.headline == "accuracy" else planned.labelled_sets.get(planned.headline)


def on_chance(best: float, planned: Plan, *, can_lengthen: bool) -> list[str]:
    """A remark if the best score is less than twice that of guesses, or of the most frequent class for all images.

    Where that is much, as of two classes, it is less than a fifth of the way from there to a perfect score.
    """
    measure = MEASURES[planned.headline]
    more = "more `--epochs`" if can_lengthen else "the recipe more epochs"
    answers = (
        ("guesses have", chance(planned), ""),
        ("the most frequent class as the answer for all images has", most_frequent(planned), " of the training images"),
    )
    for what, score, of_what in answers:
        if score is not None and best < min(2 * score, score + LEARNED * (1 - score)):
            return [
                f"the best trial has {measure.title} {measure.text(best)}, and {what} {measure.text(score)}{of_what}: "
                f"trials that hardly learn are chosen by chance; give {more}, or more images"
            ]
    return []


def near_ends(
    parameters: Sequence[Parameter],
    drawn: Mapping[str, float | str],
    can: Callable[[Mapping[KeyPath, Any]], bool],
) -> Iterator[str]:
    """A remark on each drawn number that is near an end of its range, if the recipe can run with one beyond it."""
    for parameter in parameters:
        value = drawn.get(parameter.path)
        if parameter.choices or not isinstance(value, int | float):
            continue
        beyond = _beyond(parameter, value)
        if beyond is not None and can(dict.fromkeys(parameter.places, beyond)):
            yield (
                f"`{parameter.path}` {short_value(value)} is near the end of its range "
                f"({parameter.low:g} to {parameter.high:g}): widen it in `tune`"
            )


def _beyond(parameter: Parameter, value: float) -> float | None:
    """A number beyond the end that a value is near, by the logarithm if it is drawn so; None if it is near neither."""
    low, high = parameter.low, parameter.high
    place = log(value / low) / log(high / low) if parameter.log else (value - low) / (high - low)
    if NEAR < place < 1 - NEAR:
        return None
    step = 1 if parameter.whole else NEAR * (high - low)
    if place <= NEAR:
        return low * (low / high) ** NEAR if parameter.log else low - step
    return high * (high / low) ** NEAR if parameter.log else high + step
