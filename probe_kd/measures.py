"""The measures of a model: how each is named in files, how tables show it, and which of them a run is about."""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Measure:
    """One measure of a model on images.

    `name` is its key in JSON and its column in `metrics.csv`, `title` what tables call it, and `meaning` a sentence for
    a report. A measure with the unit `%` is a share in 0..1, which tables show in percent. One without a unit is shown
    as it is. All measures are better the larger they are.
    """

    name: str
    title: str
    meaning: str
    unit: Literal["%", ""] = "%"

    @property
    def heading(self) -> str:
        """The title at the head of a column or a line: `Accuracy`, `mAP`."""
        return self.title.capitalize() if self.title.islower() else self.title

    @property
    def factor(self) -> float:
        """What a value is multiplied by where the unit is written beside it."""
        return 100.0 if self.unit else 1.0

    def brief(self, value: float) -> str:
        """The value for a line of progress: `93.4%` or `0.812`."""
        return f"{value:.1%}" if self.unit else f"{value:.3f}"

    def text(self, value: float | None) -> str:
        """The value for a cell of a table: `93.42%` or `0.8123`, and `-` where the measure means nothing."""
        return "-" if value is None else f"{value:.2%}" if self.unit else f"{value:.4f}"


# In the order in which a run is about them: the first that it measures.
MEASURES: Mapping[str, Measure] = {
    measure.name: measure
    for measure in (
        Measure("accuracy", "accuracy", "the share of the test images that are answered rightly"),
        Measure("map", "mAP", "the mean over the classes of the average precision"),
        Measure(
            "knn", "k-NN", "the share of a labelled set's test images that their nearest neighbours classify right"
        ),
        Measure(
            "linear", "linear probe", "the share of a labelled set's test images that a linear probe classifies right"
        ),
        Measure(
            "explained_variance",
            "explained variance",
            "the share of the variance of the teacher's features that the student's explain, the mean over the pairs",
            unit="",
        ),
        Measure("cosine", "cosine", "the cosine of both models' features, the mean over the pairs", unit=""),
        Measure("agreement", "agreement", "with the teacher's answers"),
    )
}
# Measures that a result and a table have always had, also where their value is null.
ALWAYS = ("accuracy", "agreement")
OF_LABELLED_SET = ("knn", "linear")  # of the images that `evaluate` names, and not of the run's
OF_PAIRS = ("explained_variance", "cosine")
# Columns of metrics.csv that hold neither a measure nor a loss.
PLACES = ("role", "stage", "epoch", "images_per_second", "lr")


def headline_of(measured: Collection[str]) -> str:
    """The measure that a run is about, of those that it takes; empty if it takes none."""
    return next((name for name in MEASURES if name in measured), "")


def not_losses(losses: Iterable[str]) -> set[str]:
    """The columns of metrics.csv that hold no loss, in a run with these losses.

    A loss may be called like a measure that its run does not take.
    """
    return {*PLACES, "ema_accuracy", *ALWAYS, *(MEASURES.keys() - set(losses))}
