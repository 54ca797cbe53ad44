"""What the training loop costs beside a loop written by hand: the same images, models, losses and updates.

    python benchmarks/loop.py

The models are small, so that what a step costs besides them shows. By hand: a DataLoader over the same transform, both
models, two losses, backward, the optimizer. `train` is what `probe-kd train` does in an epoch: seeded views, wrappers
of accelerate, hooks, the schedule, the sums of the losses, and a progress bar that is drawn.
"""

import copy
import io
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import yaml
from measure import command, interleaved, options, section
from rich.console import Console
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from probe_kd.data.batches import Batches
from probe_kd.data.loading import Views, loader
from probe_kd.training.epochs import Epochs
from probe_kd.training.optimizers import make_optimizer
from probe_kd.training.progress import Progress
from probe_kd.training.run import Run
from probe_kd.training.saving import Saver
from probe_kd.training.scoring import Scorer
from probe_kd.training.state import TrainState
from recipes import Ours, Plain, one_epoch, settle

RECIPE = """\
student:
  model: vit_tiny_patch16_224
  model_kwargs: {img_size: 16, patch_size: 4, embed_dim: 64, depth: 4, num_heads: 2}
teacher: {model: resnet10t, model_kwargs: {channels: [16, 32, 48, 64]}}
data: {dataset: sklearn/digits, input_size: [3, 16, 16], batch_size: 64, scale: [0.7, 1.0], color_jitter: 0.0}
stages:
  - epochs: 100
    losses:
      task: {loss: cross_entropy}
      soft: {loss: soft_targets, temperature: 4.0}
    optimizer: {opt: adamw, lr: 1.0e-3, weight_decay: 0.05}
"""


def by_hand(ours: Ours, device: str, loader: Any = None) -> Callable[[], None]:
    """One epoch of plain PyTorch, over the images of a plain loader or of this one."""
    _, distiller, loop = ours.stages[0]
    assert ours.models.teacher is not None
    student, teacher = copy.deepcopy(distiller.student).train(), copy.deepcopy(ours.models.teacher.model).eval()
    view = copy.deepcopy(distiller._teacher.view)
    batches = loader or plain_loader(ours)
    optimizer = make_optimizer(_Bare(student), loop.phase.optimizer)  # type: ignore[arg-type]

    def epoch() -> None:
        for images, target, *_ in batches:
            images, target = images.to(device), target.to(device)
            with torch.no_grad():
                told = teacher(view(images))
            loss = by_hand_loss(student(images), told, target)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    return epoch


def plain_loader(ours: Ours) -> DataLoader[Any]:
    size = ours.plan.recipe.data.batch_size
    return DataLoader(Plain(ours, ours.stages[0][0]), batch_size=size, shuffle=True, drop_last=True)


def in_memory(ours: Ours) -> Batches:
    """Batches of two views, all of them in memory."""
    data = ours.plan.recipe.data.model_copy(update={"memory": True, "views": 2})
    batches = loader(ours.plan.datasets.train, data, ours.models.images_for(ours.stages[0][0]), training=True)
    assert isinstance(batches.sampler, Views)
    for view in range(2):
        batches.sampler.begin(view)
        for _ in batches:
            pass
    return batches


def by_hand_loss(output: Tensor, told: Tensor, target: Tensor) -> Tensor:
    soft = F.kl_div((output / 4).log_softmax(1), (told / 4).softmax(1), reduction="batchmean")
    return F.cross_entropy(output, target) + 16 * soft


class _Bare(nn.Module):
    """What `make_optimizer` asks a Distiller for."""

    def __init__(self, student: nn.Module) -> None:
        super().__init__()
        self.student, self.teacher = student, None
        self.adapters, self.losses = nn.ModuleDict(), nn.ModuleDict()


def as_train(ours: Ours) -> tuple[Callable[[], None], Progress]:
    """One epoch of `probe-kd train`, with the bar that a terminal would show."""
    loop, models = ours.stages[0][2], ours.models
    progress = Progress(Console(file=io.StringIO(), force_terminal=True, width=120))
    saver = Saver(ours.plan, models.accelerator, TrainState(), progress, ours.folder)
    run = Run(models, Scorer(models), saver, progress, Epochs(saver, []))
    progress.begin("student: stage", loop.phase.epochs, loop.steps, 0)
    return lambda: run.epochs.train(loop, 0) and None, progress


def loader_of(batches: Any) -> Callable[[], None]:
    def epoch() -> None:
        for _ in batches:
            pass

    return epoch


def agree(ours: Ours) -> None:
    """The loss by hand is the Distiller's, and so is its gradient."""
    _, distiller, loop = ours.stages[0]
    assert ours.models.teacher is not None
    images, target, _ = next(iter(loop.batches))
    weights = [parameter for parameter in distiller.student.parameters() if parameter.requires_grad]
    result = distiller.train()(images, target)["loss"]
    with torch.no_grad():
        told = ours.models.teacher.model.eval()(distiller._teacher.view(images))
    expected = by_hand_loss(distiller.student(distiller.student_view(images)), told, target)
    torch.testing.assert_close(result, expected)
    torch.testing.assert_close(torch.autograd.grad(result, weights), torch.autograd.grad(expected, weights))


def main() -> None:
    wishes = options(__doc__).parse_args()
    settle(wishes.device)
    tree = yaml.safe_load(RECIPE)
    tree["data"]["fraction"] = 0.1 if wishes.quick else 1.0
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        parts = []
        for name in ("first", "second", "third"):
            place = Path(folder, name)
            place.mkdir()
            parts.append(Ours(tree, place, stack))
        agree(parts[0])
        device = str(parts[0].models.accelerator.device)
        loop = parts[0].stages[0][2]
        with_bar, progress = as_train(parts[1])
        arms = {
            "by hand": by_hand(parts[2], device),
            "by hand, with probe-kd's loader": by_hand(parts[2], device, parts[2].stages[0][2].batches),
            "`train` without its bar": lambda: one_epoch(loop, 0),
            "`train` with its bar": with_bar,
            "timm's transform in a plain DataLoader": loader_of(plain_loader(parts[2])),
            "probe-kd's loader": loader_of(parts[2].stages[0][2].batches),
            "... with `memory` and two `views`": loader_of(in_memory(parts[2])),
        }
        seen = interleaved(arms, 1 if wishes.quick else wishes.rounds or 15, 1, device)
        progress.end()
    images = loop.steps * 64
    bases = ["by hand"] * 4 + ["timm's transform in a plain DataLoader"] * 3
    rows = [
        [name, f"{images / seen.milliseconds(name) * 1000:,.0f}", "1" if name == base else seen.ratio(name, to=base)]
        for name, base in zip(arms, bases, strict=True)
    ]
    print(
        section(
            "The training loop beside a loop by hand",
            command(),
            "A small vision transformer with a small ResNet for a teacher, 16x16 images, batches of 64: images per "
            "second, and the time of an epoch beside the first of its kind: median (quartiles) of the ratios of each "
            "round. Loss and gradients by hand and of `train` are the same. The last three rows read images and do no "
            "more.",
            ["", "images/s", "time, as a ratio"],
            rows,
        )
    )


if __name__ == "__main__":
    main()
