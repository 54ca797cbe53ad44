"""Target statistics in a run: of the training images, fitted once, and kept by checkpoints, adapters and `eval`."""

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY
from running import After, Quiet, planned, run, same, stop
from safetensors.torch import load_file

from probe_kd.data.loading import loader
from probe_kd.engine.models import build_model
from probe_kd.engine.weights import load_weights
from probe_kd.results.evaluation import evaluate
from probe_kd.training.audit import audit

FITTED = (
    TINY.replace("fraction: 0.25", "fraction: 0.1")
    .replace("baseline: true\n", "")
    .replace("hint: {loss: hint, normalize: layer}", "hint: {loss: hint, normalize: phi_s}")
    .replace("blocks.0: layer2", "blocks.0: {teacher: layer2, normalize: fitted, tokens: pool}")
    .replace("  - name: hint\n    epochs: 1", "  - name: hint\n    epochs: 2")
)


def test_a_run_fits_statistics_once_and_goes_on_with_them_to_the_same_bits(tmp_path: Path) -> None:
    display = Quiet()
    run(FITTED, tmp_path / "whole", display)
    assert [said for said in display.said if "statistics" in said] == [
        "student: target statistics fitted on 144 training images"
    ]
    with pytest.raises(KeyboardInterrupt):
        run(FITTED, tmp_path / "parts", After(stop, epochs=3))  # of the teacher, and of the student
    display = Quiet()
    run(FITTED, tmp_path / "parts", display, resume=True)
    assert not any("target statistics" in said for said in display.said)
    same(tmp_path / "parts", tmp_path / "whole")

    plan = planned(FITTED)
    teacher = build_model(plan.teacher.model, plan.teacher.model_kwargs)  # type: ignore[union-attr]
    load_weights(teacher, tmp_path / "whole" / "teacher.safetensors")
    features: list[torch.Tensor] = []
    for name in ("layer2", "layer3"):
        teacher.get_submodule(name).register_forward_hook(lambda *call: features.append(call[-1].double()))
    options = plan.recipe.data.model_copy(update={"batch_size": 144})
    assert plan.teacher_input is not None
    ((images, *_),) = loader(plan.datasets.train, options, plan.teacher_input, training=True, seed=plan.recipe.seed)
    with torch.no_grad():
        teacher.eval()(images)
    pooled, map_ = features[0].mean((2, 3)), features[1].movedim(1, -1).flatten(0, -2)
    adapters = load_file(tmp_path / "whole" / "adapters-0.safetensors")
    np.testing.assert_allclose(adapters["hint_.0.fitted_steps.0.mean"], pooled.mean(0), rtol=1e-4, atol=1e-6)
    deviations = pooled.std(0, correction=0)
    deviations = deviations.clamp_min(0.01 * deviations.square().mean().sqrt())  # some channels are dead
    np.testing.assert_allclose(adapters["hint_.0.fitted_steps.0.scale"], 1 / deviations, rtol=1e-3)
    normalised = (map_ - map_.mean(0)) @ adapters["hint_.1.fitted_steps.0.scale"].double().T
    np.testing.assert_allclose(normalised.var(0, correction=0), 1, rtol=1e-3)
    assert int(adapters["hint_.1.fitted_steps.0.count"]) == len(map_)

    rows = {row.teacher: row for row in evaluate(tmp_path / "whole").pairs}
    assert all(row.explained_variance is not None for row in rows.values())


def test_an_audit_shows_losses_of_normalised_targets() -> None:
    cost, *_ = audit(planned(FITTED)).costs
    assert 0.5 < cost.losses["hint"] / 2 < 3  # the targets have variance 1
    assert cost.adapter_macs > 0
