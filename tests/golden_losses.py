"""Golden numbers of public implementations: the inputs of a case, ours on it, and how far apart both are.

`tests/methods/losses/golden/NAME.json` holds, for the loss NAME, what public code gave for inputs that are drawn from a
seed, so that no code of others is needed to compare. Its keys:

- `example`: `inputs` and `options` of one call, with which the tests also try the extremes
- `implementations`: a list, each with `source` (owner/repository), `commit`, `path`, `function`, `licence`, `cases`,
  and `note`, which says how it differs. `agrees: false` marks one that computes something else, which the note explains
- `none`: why there is no implementation to compare with, where the list is empty

A case has a `seed`, `inputs`, our `options`, and what their code gave: `value` and `student_gradient` (`norm` and the
first eight numbers, `samples`). `factor` is theirs over ours, 1 where it is left out.

`inputs` are drawn one after the other from the seed, in float64. The student's is the first, the teacher's the second:

- `[6, 10]`: normal numbers of this shape; `{"normal": [6, 10], "scale": 3.0, "shift": 1.0}` says how large
- `{"labels": [6], "below": 10}`: whole numbers from 0 on
- `{"multi_hot": [6, 10]}`: zeros and ones
- `{"tuple": [...]}`: several inputs as a tuple: both ends of a flow, or one feature of each pair (`all_pairs`)

A loss with parameters is built for the inputs' shapes. Its parameters are drawn after the inputs, in the order of
`named_parameters`, with a tenth of the scale. `state` sets entries of its `state_dict` by inputs of the same form, and
`construct` gives the keyword arguments that the package fills in: `num_images`, and `classifier: [in, out]`.
`activation` is the nonlinearity that made the teacher's feature. What a loss draws in a step, such as a mask, torch
draws from the case's seed.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from inspect import isclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from probe_kd.engine.spec import FeatureSpec, Layout, Tap
from probe_kd.methods.losses.matrices import flow_matrix
from probe_kd.methods.losses.table import LOSSES

FOLDER = Path(__file__).parent / "methods" / "losses" / "golden"
LAYOUTS = {2: Layout.NC, 3: Layout.NCL, 4: Layout.NCHW}


@dataclass(frozen=True)
class Measured:
    """The value of a loss and its gradient at the student's input, as one row."""

    value: float
    gradient: Tensor


def golden(name: str) -> dict[str, Any]:
    file: dict[str, Any] = json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))
    return file


def names() -> list[str]:
    return sorted(file.stem for file in FOLDER.glob("*.json"))


def stream(seed: int) -> np.random.RandomState:
    """RandomState and not Generator: numpy promises that its numbers never change (NEP 19)."""
    return np.random.RandomState(seed)


def draw(numbers: np.random.RandomState, drawn: Any) -> Any:
    """One input as it is described in a golden file."""
    if isinstance(drawn, list):
        drawn = {"normal": drawn}
    match drawn:
        case {"tuple": parts}:
            return tuple(draw(numbers, part) for part in parts)
        case {"labels": shape, "below": classes}:
            return torch.from_numpy(numbers.randint(0, classes, shape).astype(np.int64))
        case {"multi_hot": shape}:
            return torch.from_numpy(numbers.randint(0, 2, shape).astype(np.float64))
        case {"normal": shape}:
            scaled = drawn.get("scale", 2.0) * numbers.standard_normal(shape) + drawn.get("shift", 0.0)
            return torch.from_numpy(np.asarray(scaled))
    raise ValueError(f"no input is described by {drawn!r}")


def inputs_of(case: Mapping[str, Any]) -> tuple[Any, ...]:
    """The inputs of a case, in float64."""
    numbers = stream(case["seed"])
    return tuple(draw(numbers, drawn) for drawn in case["inputs"])


def spec_of(tensor: Tensor, activation: str = "") -> FeatureSpec:
    grid = (tensor.shape[2], tensor.shape[3]) if tensor.ndim == 4 else None
    layout, shape = LAYOUTS[tensor.ndim], tuple(tensor.shape)
    return FeatureSpec(Tap("x"), layout, shape, tensor.shape[1], grid, activation=activation)


def specs_of(given: Tensor | tuple[Tensor, ...], activation: str = "") -> Any:
    return tuple(map(spec_of, given)) if isinstance(given, tuple) else spec_of(given, activation)


def loss_of(name: str, case: Mapping[str, Any]) -> Callable[..., Tensor]:
    """Our loss with the options of a case: a function, or a module with parameters that are drawn from the seed."""
    loss = LOSSES[name]
    options = case.get("options", {})
    if not isclass(loss.function):
        return lambda *tensors: loss.function(*_read(loss.reads, tensors), **options)
    given = inputs_of(case)
    construct = dict(case.get("construct", {}))
    if "classifier" in construct:
        construct["classifier"] = nn.Linear(*construct["classifier"]).requires_grad_(False)
    specs = specs_of(given[0]), specs_of(given[1], case.get("activation", ""))
    module: nn.Module = loss.function(*specs, **options, **construct)
    return set_state(module.double(), case)


def set_state(module: nn.Module, case: Mapping[str, Any]) -> nn.Module:
    """Draw the parameters of a module, after the inputs of the case, and set what its `state` says."""
    numbers = stream(case["seed"])
    for drawn in case["inputs"]:
        draw(numbers, drawn)
    state = module.state_dict()
    for name, parameter in module.named_parameters():
        state[name].copy_(draw(numbers, {"normal": list(parameter.shape), "scale": 0.2}))
    for name, drawn in case.get("state", {}).items():
        state[name].copy_(draw(numbers, drawn))
    return module


def _read(reads: str, tensors: tuple[Any, ...]) -> tuple[Any, ...]:
    """What the loss gets: the matrices of the maps for those that read matrices."""
    if reads == "flows":
        return tuple(flow_matrix(*ends) for ends in tensors)
    return tuple(flow_matrix(map_, map_) for map_ in tensors) if reads == "grams" else tensors


def measured(loss: Callable[..., Tensor], inputs: tuple[Any, ...]) -> Measured:
    """The value and the gradient of any loss: ours, or somebody's when golden numbers are made."""
    student = inputs[0] if isinstance(inputs[0], tuple) else (inputs[0],)
    leaves = tuple(part.detach().clone().requires_grad_() for part in student)
    value = loss(leaves if isinstance(inputs[0], tuple) else leaves[0], *inputs[1:])
    gradients = torch.autograd.grad(value, leaves, allow_unused=True)
    row = torch.cat(
        [
            (torch.zeros_like(leaf) if gradient is None else gradient).flatten()
            for leaf, gradient in zip(leaves, gradients, strict=True)
        ]
    )
    return Measured(value.item(), row)


def as_numbers(result: Measured) -> dict[str, Any]:
    """A result as it stands in a golden file."""
    samples = result.gradient[:8].tolist()
    return {
        "value": result.value,
        "student_gradient": {"norm": float(torch.linalg.vector_norm(result.gradient)), "samples": samples},
    }


def errors(name: str, case: Mapping[str, Any]) -> tuple[float, float]:
    """The relative errors of value and gradient between ours, times the factor, and theirs."""
    loss = loss_of(name, case)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(case["seed"])
        ours = measured(loss, inputs_of(case))
    factor, theirs = case.get("factor", 1.0), case["student_gradient"]
    row = factor * ours.gradient
    samples = torch.tensor(theirs["samples"], dtype=torch.float64)
    largest = max(float(samples.abs().max()), 1e-300)
    of_samples = float((row[: len(samples)] - samples).abs().max()) / largest
    of_norm = relative(float(torch.linalg.vector_norm(row)), theirs["norm"])
    return relative(factor * ours.value, case["value"]), max(of_samples, of_norm)


def relative(ours: float, theirs: float) -> float:
    return abs(ours - theirs) / max(abs(theirs), 1e-300)


def largest_errors(name: str, implementation: Mapping[str, Any]) -> tuple[float, float]:
    """The largest relative errors of value and gradient over all cases of one implementation."""
    values, gradients = zip(*(errors(name, case) for case in implementation["cases"]), strict=True)
    return max(values), max(gradients)
