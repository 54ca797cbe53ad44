"""Losses that draw numbers, remember and train with the student, in a run that is stopped and resumed."""

from pathlib import Path

import pytest
from running import After, planned, run, same, stop
from safetensors.torch import load_file

from probe_kd.training.audit import audit

TEXT = """\
student: {model: resnet10t, model_kwargs: {channels: [8, 8, 8, 16]}}
teacher: {model: resnet10t, model_kwargs: {channels: [8, 8, 8, 24]}, train: {epochs: 1}}
data: {dataset: sklearn/digits, input_size: [3, 16, 16], batch_size: 32, hflip: 0.0, fraction: 0.1, holdout: 0.02}
recovery_interval: 2
pairs: {layer4: layer4}
stages:
  - epochs: 2
    keep: best
    losses:
      contrast: {loss: crd, negatives: 64, width: 16}
      queue: {loss: patch_similarity_queue, size: 70}
      masked: {loss: mgd}
      head: {loss: srrl}
"""


def test_a_resumed_run_remembers_and_draws_what_a_whole_one_does(tmp_path: Path) -> None:
    run(TEXT, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(TEXT, tmp_path / "parts", After(stop, updates=11))  # 4 of the teacher, and 7 of the student
    run(TEXT, tmp_path / "parts", resume=True)
    same(tmp_path / "parts", tmp_path / "whole")
    exported = load_file(tmp_path / "whole" / "student.safetensors")
    assert not any("losses" in name or "memories" in name for name in exported)


def test_check_prices_what_losses_compute_and_remember() -> None:
    plan = planned(TEXT)
    (cost,) = audit(plan).costs
    assert plan.datasets.train is not None
    memory, queue = 2 * len(plan.datasets.train) * 16, 70 * 24  # type: ignore[arg-type]
    embeddings, generator, head = (16 + 1) * 16 + (24 + 1) * 16, 2 * (24 + 1) * 24, 2 * 24 + (24 + 1) * 10
    assert cost.loss_parameters == embeddings + generator + head
    contrast = 16 * 16 + 24 * 16 + 2 * 64 * 16  # with the negatives, in both directions
    assert cost.loss_macs == contrast + 2 * queue + 2 * 24 * 24 + 2 * 24 * 10
    (plain,) = audit(planned(TEXT.replace("crd, negatives: 64, width: 16", "rkd"))).costs
    assert (
        cost.weights - plain.weights == 4 * (memory + embeddings) + 16
    )  # and Z of both directions, and whether it is set
