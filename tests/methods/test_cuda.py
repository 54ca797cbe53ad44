"""On a GPU: what a CPU gives, without making the processor wait. `make gpu` runs them; elsewhere they are skipped."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import yaml
from rich.console import Console

from probe_kd import Distiller, InputSpec, Objective, Pair
from probe_kd.data.loading import DataOptions, loader, open_datasets
from probe_kd.recipe.planner import plan
from probe_kd.recipe.reading import parse
from probe_kd.results.evaluation import evaluate
from probe_kd.training.epochs import Epochs
from probe_kd.training.loop import Loop
from probe_kd.training.progress import Progress
from probe_kd.training.run import train

pytestmark = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")]

SIZE = InputSpec((3, 64, 64), (0.5,) * 3, (0.5,) * 3)
SMALL = {"channels": [16, 32, 48, 64]}
MODELS: dict[str, tuple[str, str, dict[str, str]]] = {
    "cnn": ("resnet18", "resnet50", {"layer2": "layer2", "layer4": "layer4"}),
    "vit": ("vit_tiny_patch16_224", "convnext_atto", {"blocks.5": "stages.2", "blocks.11": "stages.3"}),
}
LOSSES = ("cross_entropy", "soft_targets", "logits", "dist", "hint", "fsp", "gram", "attention")
RECIPE: dict[str, Any] = {
    "student": {"model": "resnet10t", "model_kwargs": SMALL},
    "teacher": {"model": "resnet10t", "model_kwargs": SMALL, "train": {"epochs": 1}},
    "data": {
        "dataset": "sklearn/digits",
        "input_size": [3, 32, 32],
        "batch_size": 64,
        "views": 1,
        "hflip": 0.0,
        "reprob": 0.3,
    },
    "pairs": {"layer2": "layer2"},
    "model_ema": {"decay": 0.9},
    "stages": [
        {
            "epochs": 2,
            "clip_grad": 1.0,
            "grad_accum_steps": 2,
            "losses": {
                "task": {"loss": "cross_entropy"},
                "soft": {"loss": "soft_targets"},
                "hint": {"loss": "hint", "normalize": "layer"},
                "fsp": {"loss": "fsp", "relative": True},
            },
        }
    ],
}


def distiller(models: str, losses: tuple[str, ...]) -> Distiller:
    torch.manual_seed(0)
    *names, layers = MODELS[models]
    made = [timm.create_model(n, num_classes=100, **({"img_size": 64} if "vit" in n else {})) for n in names]
    pairs = [Pair(*names) for names in layers.items()]
    objectives = [
        Objective(loss, pairs=() if loss in LOSSES[:4] else pairs[:1] if loss == "attention" else pairs)
        for loss in losses
    ]
    return Distiller(*made, objectives, student_input=SIZE, teacher_input=SIZE).train()


def batch(device: str) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(4, *SIZE.size, generator=generator)
    return images.to(device), torch.tensor([1, 20, 50, 99]).to(device)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("models", MODELS)
def test_the_loss_and_its_gradients_are_those_of_a_cpu(models: str, loss: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    both = distiller(models, (loss,))
    both.student.eval()  # batch statistics of four images magnify what is rounding
    losses, gradients = [], []
    for device in ("cpu", "cuda"):
        both.to(device).zero_grad()
        value = both(*batch(device))["loss"]
        value.backward()
        losses.append(float(value.detach()))
        gradients.append([p.grad.cpu().clone() for p in both.parameters() if p.grad is not None])
    both.close()
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
    assert len(gradients[0]) == len(gradients[1]) > 0
    apart = sum((one - other).square().sum() for one, other in zip(*gradients, strict=True))
    assert apart.sqrt() <= 1e-2 * sum(one.square().sum() for one in gradients[0]).sqrt()


@pytest.mark.parametrize("training", [True, False])
def test_batches_have_the_bits_that_a_cpu_gives_them(training: bool) -> None:
    options = DataOptions(dataset="sklearn/digits", input_size=(3, 32, 32), batch_size=64, reprob=0.5, workers=2)
    images = open_datasets(options)
    made = loader(images.train if training else images.test, options, InputSpec((3, 32, 32)), training=training)
    expected = list(made)
    for one, other in zip(expected, made.on("cuda"), strict=True):
        assert other[0].is_cuda
        assert all(torch.equal(a, b.cpu()) for a, b in zip(one, other, strict=True))


def run(folder: Path, **changes: Any) -> Any:
    planned = plan(parse(yaml.safe_dump(RECIPE | changes), "gpu.yaml"))
    return train(planned, folder, Progress(Console(quiet=True), quiet=True))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"precision": "fp16"},
        {"precision": "no"},
        {"torchcompile": {"target": "step"}},
        {"torchcompile": {"mode": "reduce-overhead"}, "stages": [{**RECIPE["stages"][0], "grad_accum_steps": 1}]},
    ],
)
def test_a_recipe_trains_and_is_measured(changes: dict[str, Any], tmp_path: Path) -> None:
    journal = run(tmp_path / "run", **changes)
    values = [value for row in journal.rows for value in row.values() if isinstance(value, float)]
    assert all(map(torch.isfinite, map(torch.tensor, values)))
    measured = evaluate(tmp_path / "run")
    for scores in measured.scores:
        trained = journal.results[scores.role].accuracy
        assert scores.top1 == pytest.approx(trained, abs=0.02)  # another batch size takes other kernels


@pytest.mark.parametrize("cached", [False, True])
def test_a_step_of_the_loop_never_waits_for_the_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cached: bool
) -> None:
    """Between two updates, with loader, losses, accumulation, clipping and the moving average. In bf16, the default.

    With a cache, the first epoch writes its rows and the second reads them.
    """
    waits: list[str] = []
    steps = Loop.run

    def watched(self: Loop, epoch: int, first: int = 0) -> Any:
        updates = steps(self, epoch, first)
        for number in range(10_000):
            torch.cuda.set_sync_debug_mode("warn" if number > 1 else "default")  # the first make the optimizer's state
            with warnings.catch_warnings(record=True) as seen:
                warnings.simplefilter("always")
                done = next(updates, None)
            torch.cuda.set_sync_debug_mode("default")
            if done is None:  # the end of an epoch does
                return
            waits.extend(f"{w.filename}:{w.lineno}" for w in seen if "synchroniz" in str(w.message))
            yield done

    monkeypatch.setattr(Loop, "run", watched)
    monkeypatch.setattr(Epochs, "_after_update", lambda *_: None)  # shows losses twice a second, and saves
    cache = {"cache": str(tmp_path / "cache")} if cached else {}
    run(tmp_path / "run", teacher=RECIPE["teacher"] | cache)
    assert waits == []
