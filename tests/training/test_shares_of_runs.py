"""Weights that are a share of the task's gradient in a run: told, kept by checkpoints, and shown before it."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from conftest import ROCKET
from running import After, Quiet, planned, run, same, stop

from probe_kd.errors import RecipeError, RunError
from probe_kd.recipe.planner import plan
from probe_kd.recipe.reading import parse
from probe_kd.training.audit import audit

SHARED = """\
student:
  model: vit_tiny_patch16_224
  model_kwargs: {img_size: 16, patch_size: 4, embed_dim: 32, depth: 2, num_heads: 2, drop_rate: 0.2}
teacher:
  model: resnet10t
  model_kwargs: {channels: [8, 8, 16, 24]}
  train: {epochs: 1}
data: {dataset: sklearn/digits, input_size: [3, 16, 16], fraction: 0.25, batch_size: 64, hflip: 0.0, mixup: 0.2}
pairs: {blocks.0: layer2, blocks.1: layer3}
stages:
  - name: all
    epochs: 2
    losses:
      task: {loss: cross_entropy}
      soft: {loss: soft_targets, weight: {share: 1.5}}
      hint: {loss: hint, normalize: layer, weight: {share: 0.3, batches: 3}}
"""
FOLLOWED = SHARED.replace("batches: 3", "batches: 3, follow: true") + "recovery_interval: 4\n"
NAMED = re.compile(r"the gradient of `(\w+)` is ([\d.]+) of that of `(\w+)` by a weight of ([\d.]+)")


def weights_of(folder: Path) -> dict[str, Any]:
    results = json.loads((folder / "summary.json").read_text())["results"]
    weights: dict[str, Any] = {row["role"]: row["measured_weights"] for row in results}["student"]
    return weights


def test_a_run_trains_with_the_weights_that_it_tells_as_if_they_were_given(tmp_path: Path) -> None:
    """The measurement changes no bit of the training, with dropout and mixed images."""
    display = Quiet()
    run(SHARED, tmp_path / "shares", display)
    (text,) = [said for said in display.said if "measured in" in said]
    weights = weights_of(tmp_path / "shares")["all"]
    assert {name: (share, of) for name, share, of, _ in NAMED.findall(text)} == {
        "soft": ("1.5", "task"),
        "hint": ("0.3", "task"),
    }
    assert {name: float(weight) for name, *_, weight in NAMED.findall(text)} == pytest.approx(weights, rel=1e-3)
    given = SHARED.replace("{share: 1.5}", repr(weights["soft"])).replace(
        "{share: 0.3, batches: 3}", repr(weights["hint"])
    )
    run(given, tmp_path / "given")
    same(tmp_path / "shares", tmp_path / "given")


def test_a_run_that_is_stopped_goes_on_with_its_weights_to_the_same_bits(tmp_path: Path) -> None:
    run(FOLLOWED, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(FOLLOWED, tmp_path / "parts", After(stop, updates=5 + 5 + 2))  # the teacher's, and in the second epoch
    display = Quiet()
    run(FOLLOWED, tmp_path / "parts", display, resume=True)
    assert not any("measured in" in said for said in display.said)
    (text,) = [said for said in display.said if "at the end" in said]
    assert [name for name, *_ in NAMED.findall(text)] == ["hint"]  # the one that follows
    same(tmp_path / "whole", tmp_path / "parts")
    assert weights_of(tmp_path / "parts") == weights_of(tmp_path / "whole")


def test_a_student_that_trains_with_its_teacher_may_have_shares() -> None:
    (row,) = audit(planned(ROCKET.replace("weight: 0.03", "weight: {share: 0.3}"))).shares
    assert (row.loss, row.of) == ("hint", "light")
    assert row.weight * row.norm == pytest.approx(0.3 * row.task_norm)


def test_a_check_shows_the_weights_on_one_batch() -> None:
    audited = audit(planned(SHARED))
    assert not audited.wrong
    for row, share in zip(audited.shares, (1.5, 0.3), strict=True):
        assert (row.stage, row.of, row.share) == ("all", "task", share)
        assert row.weight * row.norm == pytest.approx(share * row.task_norm)
    losses, weights = audited.costs[0].losses, {row.loss: row.weight for row in audited.shares}
    assert losses["loss"] == pytest.approx(losses["task"] + sum(weights[name] * losses[name] for name in weights))


MISTAKES = {
    "{share: 0}": "weight.share`: expected a number greater than 0, got 0",
    "{share: -0.3}": "weight.share`: expected a number greater than 0, got -0.3",
    "{share: 0.3, start: 1, end: 2}": "a weight is a share or a schedule, not both",
    "{follow: true}": "weight.share` is missing; expected a number",
    "{share: 0.3, off: task}": "unknown key `off`; did you mean 'of'?",
    "{share: 0.3, of: hint}": "'hint' cannot weigh a share of itself; name another loss as `of`: task, soft",
    "{share: 0.3, of: tusk}": "'tusk', which is no loss; did you mean 'task'",
    "{share: 0.3, of: soft}": "whose own weight is a share; name a loss whose weight is a number",
    "{share: 0.3, batches: 0}": "weight.batches`: expected a number greater than or equal to 1, got 0",
}


@pytest.mark.parametrize("weight", MISTAKES)
def test_a_share_that_means_nothing_is_refused_at_its_line(weight: str) -> None:
    with pytest.raises(RecipeError) as refusal:
        plan(parse(SHARED.replace("{share: 0.3, batches: 3}", weight)))
    assert MISTAKES[weight] in str(refusal.value)
    line = next(number for number, text in enumerate(SHARED.splitlines(), 1) if "hint:" in text)
    assert f"recipe:{line}:" in str(refusal.value)


def test_an_epoch_is_not_chosen_by_losses_of_unlike_weights() -> None:
    with pytest.raises(RecipeError, match="`keep: best` would compare losses of unlike weights"):
        plan(parse(FOLLOWED.replace("epochs: 2", "epochs: 2\n    keep: best").replace("mixup", "holdout: 0.2, mixup")))


def test_check_and_train_refuse_losses_that_move_nothing_in_common(tmp_path: Path) -> None:
    """Each of two heads learns from one loss, and the layers below them are frozen."""
    text = re.sub(r"      hint: .*\n|pairs: .*\n", "", SHARED).replace("depth: 2", "depth: 1")
    text = text.replace("vit_tiny_patch16_224", "deit_tiny_distilled_patch16_224")
    text = text.replace("epochs: 2", "epochs: 2\n    freeze: backbone").replace("y}", "y, student: head}")
    text = text.replace("soft_targets,", "soft_targets, student: head_dist,")
    (wrong,) = audit(planned(text)).wrong
    assert "stage `all`: 'soft' and 'task' reach no parameter of the student in common" in wrong
    with pytest.raises(RunError) as refusal:
        run(text, tmp_path / "run")
    assert str(refusal.value) == wrong
