"""A sharded teacher: its losses are those of the whole one, and no process holds it whole."""

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from accelerate.state import AcceleratorState
from conftest import record
from running import finish, free_port, run, start
from safetensors.torch import save_file
from torch import nn
from torch.distributed.fsdp import FSDPModule

from probe_kd.engine import sharding
from probe_kd.engine.models import build_on_meta
from probe_kd.engine.sharding import units
from probe_kd.engine.tracing import trace
from probe_kd.errors import RecipeError
from probe_kd.methods.teachers import FrozenTeacher, TeacherFeatures
from probe_kd.recipe.planner import plan
from probe_kd.recipe.reading import parse
from probe_kd.tables import teacher_lines
from probe_kd.training import models
from probe_kd.training.models import describe_sharding

TEACHERS = """\
student:
  model: vit_tiny_patch16_224
  model_kwargs: {img_size: 16, patch_size: 4, embed_dim: 16, depth: 2, num_heads: 2}
teachers:
  convolutions: {model: resnet10t, checkpoint: FILE, shard: SHARD}
  tokens:
    model: vit_tiny_patch16_224
    model_kwargs: {img_size: 16, patch_size: 4, embed_dim: 32, depth: 3, num_heads: 2}
    train: {epochs: 1}
    shard: SHARD
data: {dataset: sklearn/digits, input_size: [3, 16, 16], fraction: 0.1, batch_size: 16, hflip: 0.0}
pairs:
  blocks.0: [convolutions:layer2, tokens:blocks.0]
  blocks.1: [convolutions:layer3.0.conv1, tokens:blocks.1.attn]
stages:
  - name: ends early
    epochs: 1
    losses: {hint: {loss: hint, normalize: layer}}
  - name: reads the outputs
    epochs: 2
    losses:
      task: {loss: cross_entropy}
      soft: {loss: soft_targets}
evaluate:
  knn: {dataset: sklearn/digits, fraction: 0.2, holdout: 0.1, every: 0}
"""


def both(text: str, folder: Path, second_port: int) -> None:
    """Train with whole and with sharded teachers, and write what this process held of the latter."""
    shares, gathered = [], set()
    shard, features = sharding.shard, FrozenTeacher.features

    def watched_shard(model: nn.Module, *arguments: Any) -> None:
        whole = sum(parameter.numel() for parameter in model.parameters())
        shard(model, *arguments)
        shares.append(sum(parameter.to_local().numel() for parameter in model.parameters()) / whole)  # type: ignore[operator]

    def watched_features(teacher: FrozenTeacher, *arguments: Any) -> TeacherFeatures:
        result = features(teacher, *arguments)
        gathered.add(_gathered(teacher.probe.model))
        return result

    run(text.replace("SHARD", "false"), folder / "whole")
    AcceleratorState._reset_state(reset_partial_state=True)  # the end of a run has left the other process
    os.environ["MASTER_PORT"] = str(second_port)  # at the first, one process may still meet the store of the first run
    models.shard, FrozenTeacher.features = watched_shard, watched_features  # type: ignore[attr-defined, method-assign, assignment]
    run(text.replace("SHARD", "true"), folder / "sharded")
    (folder / f"held-{os.environ['RANK']}.json").write_text(json.dumps({"shares": shares, "gathered": [*gathered]}))


def _gathered(model: Any) -> int:
    """The bytes that a sharded model holds of what it gathered from other processes."""
    states = [module._get_fsdp_state() for module in model.modules() if sharding.is_sharded(module)]
    parameters = [
        parameter for state in states for group in state._fsdp_param_groups for parameter in group.fsdp_params
    ]
    return sum(output.untyped_storage().size() for parameter in parameters for output in parameter.all_gather_outputs)


def test_sharded_teachers_give_the_losses_of_whole_ones(tmp_path: Path) -> None:
    torch.manual_seed(1)
    save_file(timm.create_model("resnet10t", num_classes=10).state_dict(), tmp_path / "teacher.safetensors")
    text = TEACHERS.replace("FILE", str(tmp_path / "teacher.safetensors"))
    assert finish(*start(both, text, tmp_path, free_port())) == ["done", "done"]
    whole, divided = record(tmp_path / "whole"), record(tmp_path / "sharded")
    assert [row["role"] for row in divided] == [row["role"] for row in whole]
    for ours, theirs in zip(divided, whole, strict=True):
        for name in ("hint", "task", "soft", "loss", "accuracy", "agreement"):
            if theirs.get(name):
                assert float(ours[name]) == pytest.approx(float(theirs[name]), rel=1e-5, abs=1e-6), (
                    theirs["stage"],
                    name,
                )
    knn = [
        [result["measures"] for result in json.loads((tmp_path / name / "summary.json").read_text())["results"]]
        for name in ("whole", "sharded")
    ]
    assert knn[0] == knn[1]
    for rank in (0, 1):
        held = json.loads((tmp_path / f"held-{rank}.json").read_text())
        assert len(held["shares"]) == 4  # of two teachers in the trial and in the run
        assert all(0.49 < share < 0.51 for share in held["shares"])
        assert held["gathered"] == [0]  # after every step, also of those that ended early


ONE = """\
student: {model: resnet10t}
teacher: {model: resnet18, train: {epochs: 1}, shard: true}
data: {dataset: sklearn/digits, input_size: [3, 16, 16]}
pairs: auto
stages:
  - epochs: 1
    losses:
      soft: {loss: soft_targets}
      hint: {loss: hint}
"""


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("shard:", "cache: rows, shard:", "each has other images in the cache; leave one out"),
        ("pairs:", "torchcompile: {}\npairs:", "give `torchcompile: {target: student}`"),
        ("loss: hint", "loss: srrl", "leave one of the two out"),
        (
            "train: {epochs: 1}, shard: true}",
            "shard: true}\nshare: {form: none}",
            "`shard`: with `share` the teacher trains too, and only a frozen one can be divided",
        ),
    ],
    ids=["cache", "compiled", "a copied classifier", "joint training"],
)
def test_what_cannot_be_sharded_is_refused_once(old: str, new: str, says: str) -> None:
    text = ONE.replace(old, new)
    if "share:" in new:
        text += "      task: {loss: cross_entropy}\n      own: {loss: cross_entropy, of: teacher}\n"
    with pytest.raises(RecipeError, match=re.escape(says)) as refusal:
        plan(parse(text))
    assert len(refusal.value.problems) == 1


def test_a_single_process_tells_that_its_teacher_is_whole() -> None:
    text = plan(parse(ONE))
    assert describe_sharding(text, 1) == [
        "the teacher is whole in the only process of this run, where `shard` has no effect"
    ]
    assert describe_sharding(text, 2) == ["the teacher is sharded: 2 processes hold its 11.2 M parameters together"]
    assert any("a single process all of them" in line for line in teacher_lines(text))


def test_units_are_called_and_bound_what_is_gathered_at_once() -> None:
    """Over shapes of models: no unit in another, none too large unless it is one layer, and none that is not called."""
    for name in ("resnet18", "vit_tiny_patch16_224", "convnext_atto", "vgg11", "efficientnet_b0", "mixer_s32_224"):
        model = build_on_meta(name, {})
        traced = trace(model, (3, 224, 224))
        names = units(model, traced)
        assert not any(one.startswith(f"{other}.") for one in names for other in names), name
        for unit in names:
            module = traced.modules[unit]
            is_layer = not any(traced.modules[child].parameters for child in module.children)
            assert module.calls, (name, unit)
            assert is_layer or module.parameters <= traced.parameters / 8, (name, unit)
        rest = traced.parameters - sum(traced.modules[unit].parameters for unit in names)
        assert rest < traced.parameters / 8, (name, rest)


def test_a_torch_that_cannot_leave_a_sharded_forward_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(FSDPModule, "reset_iter_state")
    with pytest.raises(RecipeError, match=r"`shard`: torch .* upgrade to torch 2\.14"):
        plan(parse(ONE))
