"""Apple's GPUs have no float64: no loss asks a device for it that has none. The CPU stands in for such a device."""

import ast
from pathlib import Path
from typing import Any

import pytest
import torch
from losses import QUICK, arm_of, both_of, inputs_of
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import probe_kd
from probe_kd import LOSSES
from probe_kd.methods import precision
from probe_kd.methods.normalisation import Moments

PACKAGE = Path(probe_kd.__file__).parent
# Where float64 is on the CPU whatever the device (of answers, vectors and random matrices), or only compared with.
ON_THE_CPU = {
    *("methods/precision", "methods/predictions", "methods/projectors", "methods/ensembles", "methods/inputs"),
    *("methods/normalisation", "methods/rotations", "methods/losses/labels", "training/scoring"),
    "training/frozen_features",
}
HOT = 25.0  # a temperature at which softened outputs are compared in float64


class Float64(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the operations that yield float64."""

    count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        self.count += any(isinstance(one, Tensor) and one.dtype == torch.float64 for one in (result, *args))
        return result


def counted(name: str) -> int:
    """The operations in float64 of a loss of float32, forward and backward."""
    inputs = inputs_of(LOSSES[name], QUICK, torch.float32, "cpu")
    _, loss, trained = both_of(name, inputs, QUICK)
    runs = [arm_of(loss, inputs, trained)]
    if "temperature" in LOSSES[name].options and not LOSSES[name].builds_module:
        runs.append(arm_of(lambda *sides: loss(*sides, temperature=HOT), inputs, trained))
    with Float64() as mode:
        for run in runs:
            run()
    return mode.count


@pytest.mark.parametrize("name", LOSSES)
def test_no_loss_needs_float64(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "has_float64", lambda device: False)
    assert counted(name) == 0


def test_losses_use_float64_where_there_is_some() -> None:
    assert {name for name in ("soft_targets", "dkd", "cwd", "rkd", "pkt") if not counted(name)} == set()


def test_sums_of_features_are_in_float64_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "has_float64", lambda device: device.type == "cpu")
    moments = Moments.empty(3, torch.device("meta"), joint=True)
    moments.add(torch.ones(5, 3))
    assert (moments.total.device.type, moments.total.dtype, moments.total.tolist()) == ("cpu", torch.float64, [5.0] * 3)


def test_float64_stands_where_the_device_is_known() -> None:
    using = set[str]()
    for path in PACKAGE.rglob("*.py"):
        names = {node.attr for node in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(node, ast.Attribute)}
        if names & {"double", "float64"}:
            using.add(str(path.relative_to(PACKAGE).with_suffix("")))
    assert using <= ON_THE_CPU, "use methods/precision.py"
