"""Custom losses in recipes: mistakes are told by their place before anything is trained, and a run keeps the state."""

import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from running import After, Quiet, same, stop
from safetensors.torch import load_file

from probe_kd.errors import LossError, RecipeError, RunError
from probe_kd.recipe.planner import plan
from probe_kd.recipe.reading import parse
from probe_kd.training.audit import audit
from probe_kd.training.run import train

LOSSES = """
import torch
from torch import nn

def plain(student, teacher, *, scale: float = 1.0, kind: str = "a"):
    return scale * (student - teacher).square().mean()

def one(student):
    return student.mean()

def matrix(student, teacher):
    return (student - teacher).square()

def endless(student, teacher):
    return (student - teacher).square().mean() / 0

def broken(student, teacher):
    return student.nothing

def still(student, teacher):
    return teacher.square().mean()

def needs(student, teacher, *, width: int):
    return (student - teacher).square().mean()

def weighed(student, teacher, *, weight: float = 1.0):
    return weight * (student - teacher).square().mean()

class Counter(nn.Module):
    reads = ["vectors", "labels", "index"]

    def __init__(self, student, teacher, *, num_images: int):
        super().__init__()
        self.layer = nn.Linear(student.channels, teacher.channels)
        self.register_buffer("seen", torch.zeros(num_images))

    def forward(self, student, teacher, labels, index):
        if self.training:
            self.seen[index] += 1
        return (self.layer(student) - teacher).square().mean() + 0 * labels.sum() + 1e-3 * self.seen[index].mean()

not_a_loss = 3
"""
RECIPE = """
student: {{model: resnet10t, model_kwargs: {{channels: [8, 8, 8, 16]}}}}
teacher: {{model: resnet10t, model_kwargs: {{channels: [8, 8, 8, 24]}}, train: {{epochs: 1}}}}
data: {{dataset: sklearn/digits, input_size: [3, 16, 16], batch_size: 32, fraction: 0.1, hflip: 0.0}}
pairs: {{layer3: layer3}}
stages:
  - epochs: 2
    losses:
      task: {{loss: cross_entropy}}
      own: {{{0}}}
"""


@pytest.fixture(autouse=True)
def own_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    (tmp_path / "losses_of_test.py").write_text(LOSSES)
    monkeypatch.syspath_prepend(tmp_path)
    yield
    sys.modules.pop("losses_of_test", None)


@pytest.mark.parametrize(
    ("loss", "place", "message"),
    [
        ("loss: 'losses_of_test:plain'", "loss", "nothing says what the loss 'plain' reads"),
        ("loss: 'losses_of_test:plain', reads: feature", "reads", "did you mean 'features'"),
        ("loss: 'losses_of_test:plain', reads: [outputs, label]", "reads", "cannot also read 'label'"),
        ("loss: 'losses_of_test:plane', reads: features", "loss", "has no function 'plane'; did you mean 'plain'"),
        ("loss: 'losses_of_tests:plain', reads: features", "loss", "losses_of_tests"),
        ("loss: 'losses_of_test:not_a_loss', reads: features", "loss", "a loss is a int"),
        ("loss: 'losses_of_test:plain', reads: features, scal: 1.0", "scal", "did you mean 'scale'"),
        ("loss: 'losses_of_test:plain', reads: features, scale: big", "scale", "expected a finite number"),
        ("loss: 'losses_of_test:needs', reads: features", "loss", "needs a value of its option `width`"),
        ("loss: 'losses_of_test:one', reads: features", "loss", r"called with \(student, teacher\)"),
        ("loss: 'losses_of_test:plain', reads: [outputs, labels]", "loss", r"called with \(student, teacher, labels\)"),
        ("loss: 'losses_of_test:plain', reads: outputs, normalize: layer", "loss", "means nothing"),
        ("loss: 'losses_of_test:Counter', num_images: 3", "num_images", "no option 'num_images'"),
        ("loss: 'losses_of_test:weighed', reads: features, weight: 2.0", "weight", "an option of that name"),
        ("loss: hint, reads: features", "reads", "`reads` is for custom losses"),
        ("loss: hints", "loss", "there is no loss 'hints'; did you mean 'hint'"),
    ],
)
def test_a_mistake_is_told_by_the_plan_at_its_place(loss: str, place: str, message: str) -> None:
    text = RECIPE.format(loss)
    with pytest.raises(RecipeError, match=message) as refused:
        plan(parse(text, "r.yaml"), allow_import=["losses_of_test", "losses_of_tests"])
    (problem,) = refused.value.problems
    line = next(number for number, line in enumerate(text.splitlines(), 1) if line.strip().startswith("own:"))
    assert problem.line == line
    assert text.splitlines()[line - 1][problem.column - 1 :].startswith(
        (f"{place}:", loss.partition(": ")[2][:5], "own:")
    )


def test_nothing_is_imported_that_is_not_allowed() -> None:
    with pytest.raises(RecipeError, match=r"would import 'losses_of_test'.*--allow-import losses_of_test"):
        plan(parse(RECIPE.format("loss: 'losses_of_test:plain', reads: features"), "r.yaml"))
    assert "losses_of_test" not in sys.modules
    with pytest.raises(RecipeError, match="would import 'os'") as refused:  # which is imported already
        plan(parse(RECIPE.format("loss: 'os:system', reads: features"), "r.yaml"))
    assert len(refused.value.problems) == 1


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("matrix", r"returned a tensor \(32, 8, 1, 1\)"),
        ("endless", "own is inf"),
        ("broken", r"AttributeError.*nothing.*losses_of_test.py, line"),
        ("still", "loss `own` of stage `train` moves nothing"),
    ],
)
def test_a_mistake_that_only_a_step_shows_is_told_by_check(name: str, message: str) -> None:
    planned = plan(
        parse(RECIPE.format(f"loss: 'losses_of_test:{name}', reads: features"), "r.yaml"),
        allow_import=["losses_of_test"],
    )
    try:
        wrong = "; ".join(audit(planned).wrong)
    except (LossError, RunError) as error:
        wrong = str(error)
    assert re.search(message, wrong), wrong


def test_a_run_trains_the_module_and_resumes_with_its_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And with its code: a run does not go on with a loss that has become another."""
    monkeypatch.chdir(tmp_path)
    text = RECIPE.format("loss: 'losses_of_test:Counter', weight: 0.5") + "recovery_interval: 1\n"
    planned = plan(parse(text, str(tmp_path / "r.yaml")), allow_import=["losses_of_test"])
    train(planned, tmp_path / "whole", Quiet())
    with pytest.raises(KeyboardInterrupt):
        train(planned, tmp_path / "stopped", After(stop, updates=8))
    source = tmp_path / "losses_of_test.py"
    source.write_text(LOSSES.replace("1e-3", "1e-2"))
    with pytest.raises(RunError, match=r"losses_of_test\.py is not the file .* its contents have changed"):
        train(planned, tmp_path / "stopped", Quiet(), resume=True)
    source.write_text(LOSSES)
    train(planned, tmp_path / "stopped", Quiet(), resume=True)
    same(tmp_path / "whole", tmp_path / "stopped")
    assert not any(name.startswith("losses") for name in load_file(tmp_path / "whole" / "student.safetensors"))
