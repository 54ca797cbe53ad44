"""Whole recipes beside torchdistill: the same models, losses, images and updates; and what each saving buys.

    python benchmarks/recipes.py [--compile]

Inside the clock are the training epochs of all stages: loader, augmentation, both models, losses, backward, optimizer,
and with a cache its key, its writing and its reading. Outside are building the models and measuring accuracy. On a CPU,
the clock is that of the process: by a wall clock on a shared machine, two rounds of one arm differed by 15 %.
"""

import copy
import logging
import os
import tempfile
import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import yaml
from measure import Arm, Samples, command, interleaved, options, section
from rich.console import Console
from torch import Tensor, nn

from probe_kd.data.cache import TeacherCache
from probe_kd.data.loading import _transform
from probe_kd.engine.models import build_model
from probe_kd.engine.weights import save_weights
from probe_kd.methods.distiller import Distiller
from probe_kd.methods.gradients import training_only
from probe_kd.recipe.planner import Plan, plan
from probe_kd.recipe.reading import parse
from probe_kd.training.loop import Loop, row_readers
from probe_kd.training.models import Models, TrainedModel
from probe_kd.training.phase import Phase
from probe_kd.training.processes import accelerating
from probe_kd.training.progress import Progress
from probe_kd.training.run import loop_of
from probe_kd.training.teacher_cache import open_cache
from probe_kd.training.trial import reached

HERE = Path(__file__).parents[1] / "recipes"
Tree = dict[str, Any]

SOFT_TARGETS = """\
student: {model: resnet18, model_kwargs: {channels: [16, 32, 64, 128]}}
teacher: {model: resnet34, model_kwargs: {channels: [40, 80, 160, 320]}}  # 11.6 times the student's parameters
data: {dataset: sklearn/digits, input_size: [3, 32, 32], batch_size: 64, scale: [0.7, 1.0], color_jitter: 0.0}
stages:
  - epochs: 10
    losses:
      task: {loss: cross_entropy}
      soft: {loss: soft_targets, temperature: 4.0}
    optimizer: {opt: adamw, lr: 1.0e-3, weight_decay: 0.05}
"""


def shipped(name: str) -> Tree:
    """A recipe of recipes/, whose teacher is taken as it was initialised: its answers cost the same."""
    tree: Tree = yaml.safe_load((HERE / f"{name}.yaml").read_text(encoding="utf-8"))
    tree["teacher"].pop("train", None)
    tree["data"].pop("holdout", None)
    for stage in tree["stages"]:
        stage.pop("keep", None)
        stage["optimizer"].pop("lr_scale", None)
    return tree | {"baseline": False}


def settle(device: str) -> None:
    """One thread, and the device that was asked for: accelerate takes a GPU wherever there is one."""
    torch.set_num_threads(1)
    os.environ["ACCELERATE_USE_CPU"] = str(device == "cpu").lower()


class Ours:
    """The stages of a recipe as `probe-kd train` runs them, each ready to be run again and again."""

    def __init__(self, tree: Tree, folder: Path, stack: ExitStack, *, stops: bool = True) -> None:
        self.plan = _plan(tree, folder)
        self.folder, self.times = folder, 0
        self.models = Models(self.plan, stack.enter_context(accelerating(self.plan.recipe)))
        self.stages: list[tuple[TrainedModel, Distiller, Loop]] = []
        for index in range(len(self.plan.recipe.stages)):
            models = {trained.role: trained for trained in self.models.in_turn()}
            self.models.teachers |= {"": models["teacher"]} if "teacher" in models else {}
            student = models["student"]
            self.stages.append(self._stage(student, student.phases[index], stops, stack))

    def _stage(
        self, trained: TrainedModel, phase: Phase, stops: bool, stack: ExitStack
    ) -> tuple[TrainedModel, Distiller, Loop]:
        distiller = self.models.distiller(trained, phase)
        for probe in filter(None, (distiller._student_probe, getattr(distiller._teacher, "probe", None))):
            probe.stop_early = stops
        stack.enter_context(training_only(distiller, reached(self.models, trained, distiller)))
        return trained, distiller, loop_of(self.models, trained, phase, distiller, {})

    def __call__(self) -> None:
        """All epochs of all stages; a cache begins empty."""
        self.times += 1
        for trained, distiller, loop in self.stages:
            with ExitStack() as stack:
                self.read_from(loop, self.caches(trained, distiller))
                for cache in loop.caches.values():
                    stack.callback(cache.close)
                for epoch in range(loop.phase.epochs):
                    one_epoch(loop, epoch)

    def read_from(self, loop: Loop, caches: dict[str, TeacherCache]) -> None:
        """As if the loop were made with these caches; before its workers begin."""
        loop.caches = caches
        images: Any = loop.batches.loader.dataset
        images.rows = row_readers(caches, self.plan.recipe, loop.phase)

    def caches(self, trained: TrainedModel, distiller: Distiller) -> dict[str, TeacherCache]:
        wish = self.plan.recipe.teacher
        if wish is None or wish.cache is None:
            return {}
        fresh = wish.model_copy(update={"cache": str(self.folder / f"cache-{self.times}")})
        recipe = self.plan.recipe.model_copy(update={"teacher": fresh})
        models = replace(self.models, plan=replace(self.plan, recipe=recipe))
        cache = open_cache(models, "", trained, distiller, Progress(Console(), quiet=True))
        return {} if cache is None else {"": cache}


def one_epoch(loop: Loop, epoch: int) -> None:
    """As `Epochs.train` does, with what it leaves to the checkpoint: the cache is brought to the disk."""
    loop.sums = {}
    for _ in loop.run(epoch):
        pass
    for cache in loop.caches.values():
        cache.flush()


def _plan(tree: Tree, folder: Path) -> Plan:
    tree = copy.deepcopy(tree)
    if "teacher" in tree and "checkpoint" not in tree["teacher"]:
        teacher = tree["teacher"]
        classes = {"num_classes": 10, **teacher.get("model_kwargs", {})}
        torch.manual_seed(1)
        weights = folder / "teacher.safetensors"
        save_weights(build_model(teacher["model"], classes), weights, {})
        teacher["checkpoint"] = str(weights)
    return plan(parse(yaml.safe_dump(tree, sort_keys=False)))


class Theirs:
    """The same stages in torchdistill's boxes, driven as its examples do it.

    With `cut`, the models end at the layers that are compared, by names that a person wrote for these models, and a
    stage of labels alone has its empty teacher.
    """

    def __init__(self, ours: Ours, *, cut: bool) -> None:
        import torchdistill.core.distillation as peer

        self.boxes: list[tuple[Any, int]] = []
        for trained, distiller, loop in ours.stages:
            assert ours.models.teacher is not None
            models = copy.deepcopy(distiller.student), copy.deepcopy(ours.models.teacher.model)
            for model in models:  # copies carry hooks that do nothing
                for part in model.modules():
                    part._forward_hooks.clear()
                    part._forward_pre_hooks.clear()
                model.requires_grad_(True)
            student, teacher = models
            config = _config(distiller, loop, cut)
            images = {"train": Plain(ours, trained)}
            device = ours.models.accelerator.device
            box = peer.get_distillation_box(teacher.eval(), student, images, config, device, None, False, 1.0)
            self.boxes.append((box, loop.phase.epochs))

    def __call__(self) -> None:
        for box, epochs in self.boxes:
            for epoch in range(epochs):
                box.pre_epoch_process(epoch=epoch)
                for images, target, supplement in box.train_data_loader:
                    images, target = images.to(box.device), target.to(box.device)
                    box.pre_forward_process()
                    loss = box.forward_process(images, target, supplement)
                    box.post_forward_process(loss=loss)
                box.post_epoch_process()


class Plain(torch.utils.data.Dataset[Any]):
    """Images through timm's transform, one by one, as timm's own datasets do it."""

    def __init__(self, ours: Ours, trained: TrainedModel) -> None:
        self.images = ours.plan.datasets.train
        self.transform = _transform(ours.plan.recipe.data, ours.models.images_for(trained), True)

    def __len__(self) -> int:
        return len(self.images)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image, target = self.images[index]
        return self.transform(image), target


STEM = ["conv1", "bn1", "act1", "maxpool"]
LAYERS = ["layer1", "layer2", "layer3", "layer4"]


def _config(distiller: Distiller, loop: Loop, cut: bool) -> Tree:
    """A stage as torchdistill's YAML would give it."""
    names = [objective.loss for objective in distiller.objectives]
    forward = {"forward_proc": "forward_batch_only"}
    sides: Tree = {"student": {**forward}, "teacher": {**forward, "requires_grad": False}}
    if "hint" in names:
        terms = _hint(sides, distiller, cut)
    elif "fsp" in names:
        terms = _fsp(sides, cut)
    elif "soft_targets" in names:
        index = names.index("soft_targets")
        weight, temperature = distiller._terms.weights[index], distiller._terms.options[index].get("temperature", 1.0)
        terms = soft_term(temperature, weight)
    else:
        terms = labels_term()
        if cut:  # its own sample of FSP lets the teacher run here for nothing
            sides["teacher"] |= {"auxiliary_model_wrapper": {"key": "EmptyModule", "kwargs": {}}}
    size, group = loop.batches.loader.total_batch_size, loop.phase.optimizer
    return sides | {
        "num_epochs": loop.phase.epochs,
        "train_data_loader": {
            "dataset_id": "train",
            "sampler": {"class_or_func": torch.utils.data.RandomSampler, "kwargs": {}},
            "kwargs": {"batch_size": size, "drop_last": True},
        },
        "optimizer": {"key": "AdamW", "kwargs": {"lr": group.lr, "weight_decay": group.weight_decay}},
        "criterion": {"key": "WeightedSumLoss", "kwargs": {"sub_terms": terms}},
    }


def _hint(sides: Tree, distiller: Distiller, cut: bool) -> Tree:
    from torchdistill.models.registry import register_adaptation_module, register_auxiliary_model_wrapper
    from torchdistill.models.wrapper import AuxiliaryModelWrapper

    regressor = copy.deepcopy(next(iter(distiller.adapters["hint_"].children())).student_steps)

    @register_adaptation_module(key="regressor")
    def make(**_: Any) -> nn.Module:
        return regressor

    @register_auxiliary_model_wrapper(key="with_regressor")
    class WithRegressor(AuxiliaryModelWrapper):
        def __init__(self, student_model: nn.Module, **_: Any) -> None:
            super().__init__()
            self.student_model, self.regressor = student_model, regressor

        def forward(self, *args: Any) -> Any:
            return self.student_model(*args)

        def secondary_forward(self, io_dict: Tree) -> None:
            self.regressor(io_dict["student_model.layer2"]["output"])

    sides["teacher"] |= {"forward_hook": {"output": ["layer2"]}}
    if cut:
        kept = [*STEM, "layer1", "layer2"]
        sides["teacher"] |= {"sequential": kept}
        sides["student"] |= {"sequential": [*kept, "+regressor"], "adaptations": {"regressor": {"key": "regressor"}}}
        sides["student"]["adaptations"]["regressor"]["kwargs"] = {}
        sides["student"]["forward_hook"] = {"output": ["+regressor"]}
        place = "+regressor"
    else:
        sides["student"] |= {"auxiliary_model_wrapper": {"key": "with_regressor", "kwargs": {}}}
        sides["student"]["forward_hook"] = {"output": ["student_model.layer2", "regressor"]}
        place = "regressor"
    student, teacher = at(place), at("layer2", from_teacher=True)
    return {"hint": term("MSELoss", wrapped={"input": student, "target": teacher})}


def _fsp(sides: Tree, cut: bool) -> Tree:
    from torchdistill.losses.mid_level import FSPLoss

    class Squared(FSPLoss):  # type: ignore[misc]
        """Eq. 2 of the paper, as ours: torchdistill's own adds up norms that are not squared."""

        def forward(self, student: Tree, teacher: Tree, *_: Any) -> Tensor:
            total: Tensor | float = 0.0
            for layer in LAYERS:
                ours, theirs = (self.compute_fsp_matrix(*side[layer].values()) for side in (student, teacher))
                total = total + (ours - theirs).square().sum((1, 2)).mean()
            assert isinstance(total, Tensor)
            return total

    for side in ("student", "teacher"):
        sides[side] |= {"forward_hook": {"input": LAYERS, "output": LAYERS}}
        if cut:
            sides[side] |= {"sequential": [*STEM, *LAYERS]}
    return {"flow": {"criterion": Squared({}), "weight": 1.0}}


def at(path: str, *, from_teacher: bool = False) -> Tree:
    """The output of a module, as torchdistill names it; `.` is the model."""
    return {"module_path": path, "io": "output", "is_from_teacher": from_teacher}


def term(key: str, given: Tree | None = None, weight: float = 1.0, *, wrapped: Tree | None = None) -> Tree:
    """One loss in torchdistill's form; `wrapped` are the tensors of one that is torch's own."""
    found: Tree = {"criterion": {"key": key, "kwargs": given or {}}, "weight": weight}
    if wrapped is not None:
        found["criterion_wrapper"] = {"key": "SimpleLossWrapper", "kwargs": wrapped}
    return found


def soft_term(temperature: float, weight: float) -> Tree:
    """Soft targets, and the labels' loss with a weight of 1, which torchdistill's holds too."""
    outputs = {
        f"{side}_module_{key}": value
        for side in ("student", "teacher")
        for key, value in (("path", "."), ("io", "output"))
    }
    return {"soft": term("KDLoss", {**outputs, "temperature": temperature, "alpha": 1.0, "beta": weight})}


def labels_term() -> Tree:
    return {"task": term("CrossEntropyLoss", wrapped={"input": at("."), "target": {"uses_label": True}})}


def agree(ours: Ours, theirs: Theirs) -> None:
    """The first losses and gradients of every stage, on one batch, from the same weights."""
    for (_, distiller, loop), (box, _) in zip(ours.stages, theirs.boxes, strict=True):
        images, target, _ = next(iter(loop.batches))
        distiller.train().set_epoch(0, loop.phase.epochs)
        box.pre_epoch_process(epoch=0)
        mine = distiller(images, target)["loss"]
        other = box.forward_process(images, target, {})
        torch.testing.assert_close(mine, other)
        mine.backward()
        other.backward()
        gradients = [_gradients(distiller), _gradients(box.student_model)]
        torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-6)
        distiller.zero_grad()
        box.optimizer.zero_grad()


def _gradients(model: nn.Module) -> list[Tensor]:
    """Sorted by norm, since the same parameter has two names."""
    found = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    return sorted(found, key=lambda gradient: (float(gradient.double().norm()), tuple(gradient.shape)))


def savings(tree: Tree, compiled: bool) -> dict[str, tuple[Tree, bool]]:
    """One after another: the recipe with each, and whether a forward ends at the last layer that is compared."""
    loops = _with_opt_args(tree, {"fused": False})
    plain = loops | {"channels_last": False}
    viewed = tree | {"data": tree["data"] | {"views": 1}, "teacher": tree["teacher"] | {"cache": "cache"}}
    found = {
        "probe-kd, nothing saved": (plain, False),
        "+ a forward ends at its last tap": (plain, True),
        "+ channels last": (loops, True),
        "+ a fused optimizer: the defaults": (tree, True),
        "+ `cache`, `views: 1`": (viewed, True),
    }
    if compiled:
        found["+ `torchcompile`"] = (viewed | {"torchcompile": {"target": "student"}}, True)
    return found


def _with_opt_args(tree: Tree, arguments: Tree) -> Tree:
    stages = [
        stage | {"optimizer": stage["optimizer"] | {"opt_args": stage["optimizer"].get("opt_args", {}) | arguments}}
        for stage in tree["stages"]
    ]
    return tree | {"stages": stages}


def measure(tree: Tree, wishes: Any) -> tuple[Samples, int]:
    """The seconds of every arm, and how many images were trained on in each."""
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        arms: dict[str, Arm] = {}
        for number, (name, (changed, stops)) in enumerate(savings(tree, wishes.compile).items()):
            place = Path(folder, str(number))
            place.mkdir()
            arms[name] = Ours(changed, place, stack, stops=stops)
        ours = next(arm for arm in arms.values() if isinstance(arm, Ours))
        peers: dict[str, Arm] = {
            "torchdistill, whole models": Theirs(ours, cut=False),
            "torchdistill, cut by hand": Theirs(ours, cut=True),
        }
        for peer in peers.values():
            assert isinstance(peer, Theirs)
            agree(ours, peer)
        device = str(ours.models.accelerator.device)
        images = sum(
            loop.phase.epochs * loop.steps * loop.batches.loader.total_batch_size for _, _, loop in ours.stages
        )
        rounds, clock = (
            1 if wishes.quick else wishes.rounds or 5,
            time.process_time if device == "cpu" else time.perf_counter,
        )
        seen = interleaved(peers | arms, rounds, 0 if wishes.quick else 1, device, clock=clock)
    return seen, images


def table(name: str, tree: Tree, seen: Samples, images: int) -> str:
    whole, cut = "torchdistill, whole models", "torchdistill, cut by hand"
    rows = [
        [
            arm,
            f"{images / seen.milliseconds(arm) * 1000:,.0f}",
            "1" if arm == whole else seen.ratio(arm, to=whole),
            "1" if arm == cut else seen.ratio(arm, to=cut),
        ]
        for arm in seen.seconds
    ]
    stages = " and then ".join(f"{stage['epochs']} epochs of {', '.join(stage['losses'])}" for stage in tree["stages"])
    return section(
        f"A whole recipe beside torchdistill: {name}",
        command(),
        f"{tree['student']['model']} from {tree['teacher']['model']}, {stages}. Images per second of training, and "
        "time as a ratio to torchdistill's, median (quartiles). Each saving comes on top of those above it. Losses and "
        "gradients of both libraries were the same on one batch of every stage. `cut by hand`: torchdistill's "
        "`sequential` names every layer that is to run, and a stage of labels alone has its `EmptyModule` for teacher.",
        ["", "images/s", "to whole models", "to cut models"],
        rows,
    )


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--compile", action="store_true", help="also torch.compile, which takes minutes to warm up")
    parser.add_argument("--only", help="one recipe: fitnets, fsp or soft_targets")
    wishes = parser.parse_args()
    settle(wishes.device)
    logging.disable(logging.INFO)  # torchdistill tells its configuration
    trees = {"fitnets": shipped("fitnets"), "fsp": shipped("fsp"), "soft_targets": yaml.safe_load(SOFT_TARGETS)}
    for name, tree in trees.items():
        if wishes.only not in (None, name):
            continue
        # 128 images. Of 143, each epoch would leave out 15, for which a cache runs the teacher on whole batches later.
        tree["data"] |= {"fraction": 0.0892, "batch_size": 64}
        if wishes.quick:
            tree["data"] |= {"input_size": [3, 32, 32], "batch_size": 16, "fraction": 0.03}
            for stage in tree["stages"]:
                stage["epochs"] = 1
        print(table(name, tree, *measure(tree, wishes)))


if __name__ == "__main__":
    main()
