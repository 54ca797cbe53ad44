"""What a run remembers besides weights: the results so far, the rows of its tables, and its progress."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from probe_kd.errors import RunError
from probe_kd.files.atomic import whole_text

JOURNAL = "journal.json"  # in every checkpoint
Row = dict[str, Any]  # one epoch: measures, and every loss by its name
FORMER_ROLES = {"student alone": "baseline", "teacher alone": "teacher baseline"}  # as earlier versions called them


def current_role(role: str) -> str:
    """The present name of a role, which an earlier version may have named differently."""
    return FORMER_ROLES.get(role, role)


def weights_name(role: str, end: str = "") -> str:
    """The name of the file with the weights of a role. `end` is `-ema` for their moving average."""
    return f"{role.replace(' ', '-')}{end}.safetensors"


def weights_file(folder: Path, role: str, end: str = "") -> Path:
    """The file with the weights of a role in the folder of a run, also under the name of an earlier version."""
    names = [role, *(before for before, now in FORMER_ROLES.items() if now == role)]
    paths = [folder / weights_name(name, end) for name in names]
    return next((path for path in paths if path.is_file()), paths[0])


@dataclass(frozen=True)
class PairScore:
    """How a student's layer relates to the teacher's that it learns from, in one loss of one stage.

    `explained_variance` is the share of the variance of the teacher's side that the student's side explains, and
    `cosine` the mean cosine of both; None where the loss compares no features.
    """

    stage: str
    loss: str
    student: str
    teacher: str
    explained_variance: float | None
    cosine: float | None


@dataclass
class Result:
    """The result of one model of a run.

    `accuracy` and `agreement` (with the teacher's predictions) are shares of the test images, in 0..1, and None where
    they mean nothing. `measures` are the other measures by their names in `MEASURES`, and `pairs` the score of every
    pair. `seconds` is the time of training. `weights` is the file in the run's folder, empty if the model was not
    trained. `ema_accuracy`, `ema_measures` and `ema_weights` are those of the moving average. `images` counts the test
    images of every class, and `right` those that are classified correctly. `measured_weights` are the weights of losses
    that are a share of the task's gradient, by stage and loss, at the end of the stage.
    """

    role: str
    model: str
    model_kwargs: dict[str, Any]
    parameters: int
    macs: int
    accuracy: float | None
    agreement: float | None
    seconds: float
    weights: str
    ema_accuracy: float | None = None
    ema_weights: str = ""
    images: list[int] = field(default_factory=list)
    right: list[int] = field(default_factory=list)
    measures: dict[str, float] = field(default_factory=dict)
    ema_measures: dict[str, float] = field(default_factory=dict)
    pairs: list[PairScore] = field(default_factory=list)
    measured_weights: dict[str, dict[str, float]] = field(default_factory=dict)

    def value(self, measure: str) -> float | None:
        """The value of a measure; None if it was not taken."""
        return {"accuracy": self.accuracy, "agreement": self.agreement, **self.measures}.get(measure)


@dataclass
class TrainState:
    """The state of a run besides weights: plain values that every checkpoint contains."""

    results: dict[str, Result] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)
    role: str = ""
    phase: int = 0
    epoch: int = 0  # epochs of this phase that are done
    step: int = 0  # batches of the epoch after them that are done
    sums: dict[str, float] = field(default_factory=dict)  # of the losses of these batches
    seconds: float = 0.0  # spent on this model
    measured_weights: dict[str, dict[str, float]] = field(default_factory=dict)  # of this model, by stage and loss
    best: float | None = None  # of this phase, if it keeps the best epoch: the lowest held-out loss, or minus a measure

    def begin(self, role: str) -> None:
        """Begin a model, unless it is the one that a resumed run continues with."""
        if self.role != role:
            self.role, self.phase, self.epoch, self.step, self.sums = role, 0, 0, 0, {}
            self.seconds, self.best, self.measured_weights = 0.0, None, {}

    def begin_phase(self, index: int) -> None:
        if self.phase != index:
            self.phase, self.epoch, self.step, self.sums, self.best = index, 0, 0, {}, None

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self), indent=1), encoding="utf-8")

    @classmethod
    def read(cls, path: Path) -> "TrainState":
        try:
            values = json.loads(whole_text(path))
            results = [Result(**result) for result in values.pop("results").values()]
            for result in results:
                result.role = current_role(result.role)
                result.pairs = [PairScore(**dict(pair)) for pair in result.pairs]  # type: ignore[call-overload]
            rows = [_current_row(row) for row in values.pop("rows")]
            role = current_role(values.pop("role"))
            return cls(results={result.role: result for result in results}, rows=rows, role=role, **values)
        except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as refusal:
            raise RunError(f"{path} is not the journal of a run: {refusal}; start anew with --overwrite") from None


def _current_row(row: Row) -> Row:
    role = row.pop("role" if "role" in row else "subject")
    return {"role": current_role(role), **row}
