"""One stage of one model: what it learns from, with which optimizer, for how long."""

from dataclasses import dataclass

from probe_kd.methods.objectives import Objective
from probe_kd.recipe.keys import OptimizerOptions, SchedulerOptions


@dataclass(frozen=True)
class Phase:
    """One stage of one model. `age` counts the epochs of the recipe before it, which decides what images it sees."""

    name: str
    epochs: int
    objectives: tuple[Objective, ...]
    optimizer: OptimizerOptions
    scheduler: SchedulerOptions
    clip_grad: float | None = None
    grad_accum_steps: int = 1
    keep: str = "last"
    teacher_dropping: float = 0.0
    freeze: tuple[str, ...] = ()
    age: int = 0
