"""What is varied by default: weights or shares, temperatures, how features are compared, pairs, the learning rate."""

from inspect import signature
from typing import Any

from probe_kd.engine.spec import Share
from probe_kd.measures import OF_PAIRS
from probe_kd.methods.objectives import Objective
from probe_kd.recipe.keys import AutoPairs, TuneOptions
from probe_kd.recipe.planner import Plan
from probe_kd.tuning.space import MOST_PAIRS

# The factors by which each is made smaller and larger. What a loss of features weighs depends on layers and widths.
OF_FEATURES, OF_OUTPUTS, SHARE, RATE = 100.0, 10.0, 10.0, 10.0
TEMPERATURES = (1.0, 2.0, 4.0, 8.0)
NORMALIZE = ("none", "layer", "channel")
PROJECTOR = ("linear", "mlp")


def usual_options(planned: Plan) -> dict[str, TuneOptions]:
    """What `tune` would say of this recipe, by path: the values that a method of its kind depends on.

    Where the trials would be scored by the features of the pairs, nothing is varied that changes these.
    """
    options: dict[str, dict[str, Any]] = {}
    for objectives in planned.objectives:
        for objective in objectives:
            if objective.resolved.reads != "labels":
                options |= _of_objective(objective, scored_by_features=planned.headline in OF_PAIRS)
    has_pairs = isinstance(planned.recipe.pairs, AutoPairs) or bool(planned.recipe.pairs)
    if has_pairs and planned.headline not in OF_PAIRS and not planned.recipe.share:
        options["pairs"] = {"source": "match", "num_pairs": (1, MOST_PAIRS)}
    return {path: TuneOptions(**value) for path, value in (options | _rates(planned)).items()}


def _of_objective(objective: Objective, *, scored_by_features: bool) -> dict[str, dict[str, Any]]:
    path, options = f"losses.{objective.name}", dict[str, dict[str, Any]]()
    if isinstance(objective.weight, Share):
        share = objective.weight.share
        options[f"{path}.weight.share"] = {"log": (share / SHARE, share * SHARE)}
    elif isinstance(objective.weight, int | float) and objective.weight > 0:
        factor = OF_OUTPUTS if objective.resolved.reads == "outputs" else OF_FEATURES
        options[f"{path}.weight"] = {"log": (objective.weight / factor, objective.weight * factor)}
    temperature = _temperature(objective)
    if temperature is not None:
        options[f"{path}.temperature"] = {"values": sorted({*TEMPERATURES, float(temperature)})}
    for key, values in {"normalize": NORMALIZE, "projector": PROJECTOR}.items():
        if key in objective.adaptable and not scored_by_features:
            own = getattr(objective, key)
            options[f"{path}.{key}"] = {"values": list(dict.fromkeys([own, *values]))}
    return options


def _temperature(objective: Objective) -> float | None:
    """The temperature of softmaxes over classes, whose usual values are known; None without one, or on a schedule."""
    if objective.resolved.reads != "outputs" or "temperature" not in objective.resolved.options:
        return None
    default = signature(objective.resolved.function).parameters["temperature"].default
    temperature = objective.options.get("temperature", default)
    return temperature if isinstance(temperature, int | float) else None


def _rates(planned: Plan) -> dict[str, dict[str, Any]]:
    """The learning rate, of all stages if they have one."""
    rates = [stage.optimizer.lr for stage in planned.recipe.stages]
    paths = {"optimizer.lr": rates[0]}
    if len(set(rates)) > 1:
        paths = {f"stages.{index}.optimizer.lr": rate for index, rate in enumerate(rates)}
    return {path: {"log": (rate / RATE, rate * RATE)} for path, rate in paths.items()}
