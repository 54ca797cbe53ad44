"""Write a recipe for two models, a method and a data set: complete, commented and ready to run."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from probe_kd.data.names import CSV, EVALUATED, NAMES, TRAINED, check_name
from probe_kd.engine.embedding import embedding_spec
from probe_kd.engine.foreign import library_of
from probe_kd.engine.models import build_on_meta, packages
from probe_kd.engine.spec import Layout, Pair, Side, Tap, Trace
from probe_kd.engine.tracing import trace_named
from probe_kd.errors import AdapterError, DataError, ProbeKDError, Problem, RecipeError, nearest
from probe_kd.files.atomic import reason
from probe_kd.methods.losses.table import LOSSES
from probe_kd.methods.outputs import output_spec
from probe_kd.recipe.reading import parse

_CLASSES = 11  # that a model is tried with
SMALL = 96  # pixels; larger images are treated as photographs


@dataclass(frozen=True)
class Method:
    """The stages of a method in a recipe, and what else the recipe needs.

    `pairs` says which pairs the method reads: `all`, the `middle` one, those of `several` positions, the `vector` of an
    image, this and the `last` one, or none (empty). A method without `labels` needs a teacher that has weights, and
    trains no baseline.
    """

    about: str
    stages: str
    pairs: str = ""
    shares: bool = False
    labels: bool = True


_TASK = "task: {loss: cross_entropy, weight: 1.0}"
_OPTIMIZER = "    optimizer: {opt: adamw, lr: 1.0e-3, weight_decay: 0.05}"
_SCHEDULER = "    scheduler: {sched: cosine, warmup_epochs: 0.5}"


def _stage(name: str, epochs: int, *losses: str) -> str:
    """One stage. A line of `losses` that begins with four spaces is a key of the stage."""
    keys = [line for line in losses if line.startswith("    ")]
    terms = [f"      {line}" for line in losses if not line.startswith("    ")]
    return "\n".join(
        [f"  - name: {name}", f"    epochs: {epochs}", *keys, "    losses:", *terms, _OPTIMIZER, _SCHEDULER]
    )


def _beside_labels(*losses: str) -> str:
    """One stage of ten epochs with the losses beside the labels."""
    return _stage("distil", 10, _TASK, *losses)


FITTED = "fitted"
FEATURES = (
    f"features: {{loss: hint, normalize: {FITTED}}}"  # the mean and deviation of every channel are measured first
)

METHODS = {
    "soft_targets": Method(
        "Soft targets (Hinton et al. 2015): the teacher's answers at a temperature, beside the labels",
        _stage(
            "distil",
            10,
            "task: {loss: cross_entropy, weight: 1.0}   # less in the paper; docs/results.md has both",
            "soft: {loss: soft_targets, temperature: 4.0, weight: 1.0}",
        ),
    ),
    "logits": Method(
        "Pre-softmax regression (Ba and Caruana 2014): the teacher's logits, beside the labels",
        _beside_labels("logits: {loss: logits, center: true, weight: 0.3}"),
    ),
    "dist": Method(
        "DIST (Huang et al. 2022): how the answers correlate, within an image and within a class",
        _beside_labels("dist: {loss: dist, inter: 1.0, intra: 1.0}"),
    ),
    "dkd": Method(
        "DKD (Zhao et al. 2022): the label against the other classes, and these among themselves, beside the labels",
        _beside_labels(
            "dkd: {loss: dkd, alpha: 1.0, beta: 8.0, temperature: 4.0, weight: {start: 0.0, end: 1.0, epochs: 1}}",
        ),
    ),
    "nkd": Method(
        "NKD (Yang et al. 2023): the label, and the other classes normalised, beside the labels",
        _beside_labels("nkd: {loss: nkd, gamma: 1.5, temperature: 1.0}"),
    ),
    "ofa": Method(
        "OFA (Hao et al. 2023), without its exits: the answers, with a larger share for the label, beside the labels",
        _beside_labels("ofa: {loss: ofa, eps: 1.5}   # from 1, as in the paper for 32x32 images"),
    ),
    "fitnets": Method(
        "FitNets (Romero et al. 2015), in two stages: a layer in the middle, then labels and soft targets",
        _stage(
            "hint",
            4,
            "    keep: best                  # by the hint on held-out images; nothing runs above the paired layers",
            "hint: {loss: hint, normalize: layer}",
        )
        + "\n"
        + _beside_labels(
            "soft: {loss: soft_targets, temperature: 3.0, weight: {start: 4.0, end: 1.0}}",
        ),
        pairs="middle",
    ),
    "fitnets_joint": Method(
        "Hints at every pair (after FitNets, Romero et al. 2015) with soft targets, beside the labels",
        _beside_labels(
            "soft: {loss: soft_targets, temperature: 4.0, weight: 1.0}",
            "hint: {loss: hint, normalize: layer, weight: 1.0}   # or channels of large variance rule it",
        ),
        pairs="all",
    ),
    "fsp": Method(
        "FSP (Yim et al. 2017), in two stages: the flow of every block sets the initial weights, then the labels",
        _stage(
            "initialise", 4, "flow: {loss: fsp, relative: true}   # the paper has no `relative`, which takes out scale"
        )
        + "\n"
        + _stage("task", 10, _TASK),
        pairs="all",
    ),
    "fsp_joint": Method(
        "FSP (Yim et al. 2017) beside the labels: matrices between the input and the output of every paired block",
        _beside_labels("flow: {loss: fsp, relative: true, weight: 0.5}"),
        pairs="all",
    ),
    "attention": Method(
        "Attention transfer (Zagoruyko and Komodakis 2017): where the features are large, beside the labels",
        _beside_labels("attention: {loss: attention, form: paper, weight: 1.0}"),
        pairs="several",
    ),
    "vkd": Method(
        "VkD (Miles et al. 2024): the vector of an image through an orthogonal projector, beside the labels",
        _beside_labels(
            "vector: {loss: smooth_l1, tokens: pool, projector: orthogonal, normalize: layer, weight: 1.0}",
        ),
        pairs="vector",
    ),
    "rsd": Method(
        "RSD (Zhang et al. 2025): the channels of the vector of an image by correlation, beside the labels",
        _beside_labels("channels: {loss: rsd, reduction: sum, weight: 0.1}"),
        pairs="vector",
    ),
    "crd": Method(
        "CRD (Tian et al. 2020): the vector of an image against a memory of the training images, beside the labels",
        _beside_labels("contrast: {loss: crd, negatives: 16384, temperature: 0.07, weight: 0.8}"),
        pairs="vector",
    ),
    "review": Method(
        "ReviewKD (Chen et al. 2021): every layer of the teacher with the student's and all deeper ones",
        _beside_labels("review: {loss: review, weight: {start: 0.0, end: 1.0, epochs: 2}}"),
        pairs="all",
    ),
    "rkd": Method(
        "RKD (Park et al. 2019): distances and angles between the images of a batch, beside the labels",
        _beside_labels("relations: {loss: rkd, distance: 1.0, angle: 2.0, weight: 25.0}"),
        pairs="vector",
    ),
    "rocket": Method(
        "Rocket Launching (Zhou et al. 2018): both train together and have layers in common",
        _stage(
            "rocket",
            10,
            "light: {loss: cross_entropy}",
            "booster: {loss: cross_entropy, of: teacher}",
            "hint: {loss: logits, reduction: sum, weight: 0.03}   # as in the authors' code",
        ),
        shares=True,
    ),
    "features": Method(
        "The vectors and the last stage of a foundation model or a backbone, without labels",
        _stage("distil", 10, FEATURES),
        pairs="last",
        labels=False,
    ),
}


def chosen(method: str) -> Method:
    """The method of this name. Raises RecipeError with the nearest name."""
    if method not in METHODS:
        text = f"there is no method {method!r}; expected one of {', '.join(METHODS)}{nearest(method, METHODS)}"
        raise RecipeError("--method", [Problem(text)])
    return METHODS[method]


def write_recipe(
    student: Trace,
    teacher: Trace,
    pairs: Sequence[Pair],
    path: Path,
    *,
    method: str = "fitnets_joint",
    data: str = "sklearn/digits",
    root: str | None = None,
) -> None:
    """Write a complete recipe for these models, with the reason for every pair.

    `data` is a name as in `data: {dataset: ...}`, a folder of folders, or a CSV file. Raises RecipeError, or
    DataError for images that do not exist.
    """
    chosen_method = chosen(method)
    if chosen_method.labels:
        student = _with_classes(student, "student")
        teacher = teacher if _has_no_classifier(teacher) else _with_classes(teacher, "teacher")
    allowed = "".join(f" --allow-import {package}" for package in packages([student.model, teacher.model]))
    labelled = chosen_method.labels
    parts = [
        f"# probe-kd train {path}{allowed}",
        f"# {chosen_method.about}.",
        "student:",
        model_lines(student),
        "teacher:",
        model_lines(teacher) + _teacher_size(student, teacher),
        *_weights_lines(chosen_method, teacher),
        *data_lines(
            data,
            root,
            student.input_size,
            holdout="keep: best" in chosen_method.stages,
            labels=labelled,
        ),
        *_layer_lines(chosen_method, student, teacher, pairs),
        *(["baseline: true                  # also train the student without the teacher, to compare"] * labelled),
        "stages:",
        _stages_for(chosen_method, teacher),
        "seed: 0",
    ]
    write_lines(parts, path)


def write_lines(lines: Sequence[str], path: Path) -> None:
    """Write these lines as a recipe, in a folder that is made for it. Raises RecipeError."""
    text = "\n".join(lines) + "\n"
    parse(text, str(path))  # what is written can be read
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as refusal:
        raise RecipeError(str(path), [Problem(f"cannot write the recipe: {reason(refusal)}")]) from None


def _with_classes(trace_: Trace, side: Side) -> Trace:
    """The trace of a model whose number of classes follows from the data. Raises RecipeError if the model has none."""
    kwargs = {key: value for key, value in trace_.model_kwargs.items() if key != "num_classes"}
    plain = ":" not in trace_.model and any(spec.tap == Tap("") and spec.layout is Layout.NC for spec in trace_.specs)
    try:
        if not plain:
            tried = {**kwargs, "num_classes": _CLASSES}
            seen = trace_named(trace_.model, trace_.input_size, training=trace_.training, model_kwargs=tried)
            if output_spec(seen, Tap(""), side).channels != _CLASSES:
                raise AdapterError(f"the {side} {trace_.model} gives other numbers than `num_classes`")
    except ProbeKDError as refusal:
        text = f"this method reads classes of the {side}, and {refusal}; take `features`, which reads none"
        raise RecipeError("--method", [Problem(text)]) from None
    return replace(trace_, model_kwargs=kwargs)


def _has_no_classifier(teacher: Trace) -> bool:
    """Whether a teacher is known to give no classes: a model of another library, or of timm without its head.

    One without weights can only be trained on the labels, and gets a classifier for that.
    """
    headless = teacher.model_kwargs.get("num_classes") == 0 and has_weights(teacher.model)
    return bool(library_of(teacher.model)) or headless


def has_weights(name: str) -> bool:
    """Whether timm knows weights of a model. Those of a folder, a hub repository or a function are its own affair."""
    from timm.models import get_pretrained_cfg

    config = None if ":" in name else get_pretrained_cfg(name)
    return config is None or bool(config.has_weights)


def _stages_for(method: Method, teacher: Trace) -> str:
    """The stages of a method, without the losses that read classes of the teacher where it has none.

    Raises RecipeError if none is left that learns from the teacher.
    """
    if not _has_no_classifier(teacher):
        return method.stages
    lines = method.stages.splitlines()
    losses = [re.search(r"\{loss: (\w+)", line) for line in lines]
    reads = [LOSSES[loss[1]].reads if loss else "" for loss in losses]
    if method.shares or not {*reads} - {"", "labels", "outputs"}:
        text = (
            f"{teacher.model} has no classifier, and this method reads its classes; take `features` or `fitnets_joint`"
        )
        raise RecipeError("--method", [Problem(text)])
    return "\n".join(line for line, kind in zip(lines, reads, strict=True) if kind != "outputs")


def _weights_lines(method: Method, teacher: Trace) -> list[str]:
    if not method.labels or _has_no_classifier(teacher):
        return ["  pretrained: true              # the weights of its name; or `checkpoint: teacher.safetensors`"]
    return [] if method.shares else [_WEIGHTS]


_WEIGHTS = """\
  # pretrained: true            # timm's weights; with `train`, fine-tuned with a new classifier
  # checkpoint: teacher.safetensors
  train:                        # train the teacher first, on the labels; remove this if it is trained already
    epochs: 5
    optimizer: {opt: adamw, weight_decay: 0.05}   # lr: 1.0e-3, or 1.0e-4 for one that has weights"""


def features_pairs(student: Trace, teacher: Trace, pairs: Sequence[Pair]) -> list[Pair]:
    """Return what a student without labels learns from: the vectors of an image, and the last of these pairs."""
    vectors = [embedding_spec(build_on_meta(it.model, it.model_kwargs), it) for it in (student, teacher)]
    of_image = Pair(vectors[0].tap, vectors[1].tap, reason="the vector of an image, which a classifier reads")
    return [of_image, *(pair for pair in pairs[-1:] if pair.student != of_image.student)]


def model_lines(trace_: Trace) -> str:
    kwargs = json.dumps(dict(trace_.model_kwargs))  # JSON is YAML
    return f"  model: {word(trace_.model)}" + (f"\n  model_kwargs: {kwargs}" if trace_.model_kwargs else "")


def _teacher_size(student: Trace, teacher: Trace) -> str:
    if teacher.input_size == student.input_size:
        return ""
    return f"\n  input_size: {list(teacher.input_size)}  # the teacher sees the same images at its own size"


def _has_train(folder: Path) -> bool:
    return any((folder / name).is_dir() for name in TRAINED)


def data_lines(
    data: str,
    root: str | None,
    size: tuple[int, int, int],
    *,
    holdout: bool = False,
    labels: bool = True,
    batch_size: int = 64,
) -> list[str]:
    """The `data:` section, with settings for small images, and for digits, which must not be mirrored.

    Without `labels`, a folder is read whole, or its folders `train` and `validation` if it has them.

    Raises DataError for images that do not exist, as far as can be told without downloading any.
    """
    source, undivided = _source_lines(data, root, labels=labels)
    lines = ["data:", *source, f"  input_size: {list(size)}", f"  batch_size: {batch_size}"]
    lines += _view_lines(data.rpartition("/")[2], size)
    if holdout or undivided:
        lines += ["  holdout: 0.1                  # of the training images, to choose by"]
    return lines


def _source_lines(data: str, root: str | None, *, labels: bool) -> tuple[list[str], bool]:
    """Where the images are, and whether there are no others than the training images to choose by."""
    path = Path(data)
    if path.is_dir():
        return ([f"  root: {word(data)}", "  labels: none"], False) if not labels else _folder_lines(path, word(data))
    if data.lower().endswith(CSV) and path.is_file():
        lines = [f"  root: {word(data)}           # rows of `path,label`"]
        return [*lines, "  val_split: none               # one file is divided" if labels else "  labels: none"], labels
    if "/" not in data or data.startswith((".", "/", "~")):
        hint = nearest(data, [*NAMES, *(entry.name for entry in Path().iterdir() if entry.is_dir())])
        raise DataError(
            f"there is no folder {data!r}{hint or ','} and --data takes a folder of folders that is there, a CSV file "
            "of `path,label`, or a name such as torch/cifar100"
        )
    check_name(data)
    lines = [f"  dataset: {word(data)}"]
    if data.startswith("torch/"):
        lines += [f"  root: {word(root or 'data')}", "  download: true                # by torchvision, once"]
    elif root:
        lines += [f"  root: {word(root)}"]
    return [*lines, *["  labels: none                  # those of the data set are not read"] * (not labels)], False


def _folder_lines(folder: Path, root: str) -> tuple[list[str], bool]:
    unmeasured = not any((folder / name).is_dir() for name in EVALUATED)
    lines = [f"  root: {root}           # a folder of folders, one for each class in every split"]
    lines += ["  train_split: .                # its folders are the classes"] * (not _has_train(folder))
    return [*lines, *["  val_split: none               # there is no `validation` in it"] * unmeasured], unmeasured


def _view_lines(name: str, size: tuple[int, int, int]) -> list[str]:
    """Settings for small images, and for digits, which must not be mirrored."""
    lines: list[str] = []
    is_known = name in ("digits", "mnist", "kmnist", "qmnist", "fashion_mnist", "cifar10", "cifar100")
    if is_known or max(size[1:]) <= SMALL:
        lines += [
            "  crop_pct: 1.0                 # small images are tested whole",
            "  scale: [0.7, 1.0]             # random resized crops; timm's [0.08, 1.0] are for large photographs",
        ]
    if is_known:
        mirrored = name in ("fashion_mnist", "cifar10", "cifar100")
        lines += [
            f"  hflip: {0.5 if mirrored else '0.0                    # a mirrored digit is no digit'}",
            "  color_jitter: 0.0",
        ]
    return lines


def _layer_lines(method: Method, student: Trace, teacher: Trace, pairs: Sequence[Pair]) -> list[str]:
    if method.shares:
        return _share_lines(student, teacher, pairs)
    if not method.pairs:
        return []
    used = list(pairs)
    if method.pairs == "middle":
        used = [pairs[(len(pairs) - 1) // 2]]
    if method.pairs in ("vector", "last"):
        used = features_pairs(student, teacher, pairs)[: 1 if method.pairs == "vector" else 2]
    if method.pairs == "several":  # attention needs several positions
        used = [pair for pair in pairs if (1, 1) not in (student[pair.student].grid, teacher[pair.teacher].grid)]
    lines = [f"  {quoted(pair.student)}: {quoted(pair.teacher)}  # {pair.reason}" for pair in used]
    why_unused = {
        "several": "one position, and nothing to attend to",
        "last": "not the last",
        "vector": "not the vector of an image",
    }.get(method.pairs, "not in the middle")
    lines += [
        f"  # {quoted(pair.student)}: {quoted(pair.teacher)}  # {why_unused}" for pair in pairs if pair not in used
    ]
    return ["pairs:                          # student layer: teacher layer", *lines]


def _share_lines(student: Trace, teacher: Trace, pairs: Sequence[Pair]) -> list[str]:
    """Share weights if half of the student's layers have the same name and shape in the teacher, else graft."""
    leaves = [module for module in student.modules.values() if module.parameters and not module.children]
    others = {(module.name, module.kind, module.parameters) for module in teacher.modules.values()}
    common = [module for module in leaves if (module.name, module.kind, module.parameters) in others]
    if 2 * len(common) >= len(leaves):
        form = [
            "  form: weights                 # norms are each model's own",
            "  modules: interval             # the first blocks of every stage; or `bottom`, or names",
        ]
    else:
        pair = pairs[0]
        at = f"{{{quoted(pair.student)}: {quoted(pair.teacher)}}}"
        form = ["  form: graft                   # the student's layers up to here are replaced by the teacher's"]
        form += [f"  at: {at}"]
    return ["share:", *form, "  block: output                 # the gradient block; or `params`, `trunk`, `off`"]


def quoted(tap: Tap) -> str:
    return word(str(tap))


def word(text: str) -> str:
    """A YAML scalar that reads as this text."""
    plain = re.fullmatch(r"[A-Za-z][\w./:-]*[\w/]", text) and text.lower() not in ("true", "false", "null")
    return text if plain else json.dumps(text)
