"""Export a model of a run to a folder that plain timm loads.

The folder is written under a temporary name, loaded back, compared with the trained model, and only then renamed. A
folder in place therefore gives the logits of the trained model.
"""

import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from probe_kd.data.datasets import open_datasets
from probe_kd.data.loading import loader
from probe_kd.data.record import RECORD, DataRecord
from probe_kd.engine.foreign import library_of
from probe_kd.engine.models import build_on_meta, built_by_timm, files_of, packages, portable
from probe_kd.engine.probe import Probe, reader
from probe_kd.engine.spec import InputSpec, Tap
from probe_kd.engine.weights import classifiers, read_header, save_weights
from probe_kd.errors import ProbeKDError, RunError, TapError, TraceError, WeightsError, nearest, short
from probe_kd.files.atomic import whole_bytes
from probe_kd.files.run_folder import RECIPE, check_inputs, check_own, why_no_run
from probe_kd.methods.sharing import load_student
from probe_kd.recipe.keys import ModelOptions, Recipe
from probe_kd.recipe.loss_names import loss_of, losses_in
from probe_kd.recipe.reading import load
from probe_kd.recipe.sections.outputs import role_of_teacher
from probe_kd.recipe.writing import command_to_go_on
from probe_kd.results.card import MARK, Card, card_text
from probe_kd.training.state import weights_file
from probe_kd.version import __version__

ROLES = ("student", "baseline", "teacher", "teacher-baseline")
WEIGHTS, CONFIG, CARD, ONNX = "model.safetensors", "config.json", "README.md", "model.onnx"
FILES = (CONFIG, WEIGHTS, CARD, ONNX, f"{ONNX}.data")  # the last if the model exceeds the size limit of an ONNX file
# The largest differences that count as rounding, relative to the largest value. Loaded weights give the same bits.
# After a change in the order of sums, 10,000 times the precision of float32 is still far below the effect of an error.
SAME, FUSED = 1e-5, 1e-3


@dataclass(frozen=True)
class Exported:
    """The result of `export`: what was written, and how much it differs from the trained model.

    `difference` is the largest absolute difference of logits on `images` between the trained model and the one that
    timm loads from the folder (None if timm cannot load it); `onnx_difference` is the same for onnxruntime (None
    without ONNX). Both are in units of the logits, whose largest absolute value is `largest_logit`. Of a backbone,
    `outputs` are `features` instead of `logits`. `notes` are remarks for the user.
    """

    folder: str
    weights: str
    role: str
    model: str
    model_kwargs: dict[str, Any]
    files: tuple[str, ...]
    images: str
    outputs: str
    largest_logit: float
    difference: float | None
    onnx_difference: float | None
    notes: tuple[str, ...]


@dataclass(frozen=True)
class _Trained:
    """A role of a finished run: its model in eval mode, and the input that it was evaluated with."""

    run: Path
    recipe: Recipe
    role: str
    weights: Path
    about: Mapping[str, Any]
    module: nn.Module
    given: InputSpec
    dropped: str = ""  # why the classifier of the run was left out

    @property
    def kwargs(self) -> dict[str, Any]:
        return {**self.about["model_kwargs"], **({"num_classes": 0} if self.dropped else {})}

    @property
    def outputs(self) -> str:
        return "features" if getattr(self.module, "num_classes", None) == 0 else "logits"

    @property
    def why_not_timm(self) -> str:
        """Why no config of timm can describe this model; empty if one can."""
        name = str(self.about["model"])
        owner = "" if library_of(name) else "your own "
        return "" if built_by_timm(name) else f"is built by {owner}{name}, which timm does not know"

    @property
    def output(self) -> Tap:
        """The tap on which the model was measured."""
        options = self.recipe.teacher if self.role.startswith("teacher") else self.recipe.student
        return Tap.parse(options.output if options and not self.dropped else "")


@dataclass(frozen=True)
class _Sample:
    """Images preprocessed as in the evaluation, the pictures they come from, and the names of the classes."""

    images: Tensor
    description: str
    pictures: Sequence[Image.Image] = ()
    classes: Sequence[str] = ()


@dataclass
class _Written:
    """The contents of the folder so far."""

    module: nn.Module  # written as ONNX
    kwargs: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    difference: float | None = None
    onnx_difference: float | None = None


def export(
    run: str | Path,
    folder: str | Path,
    *,
    role: str = "student",
    ema: bool = False,
    reparameterize: bool = False,
    onnx: bool = False,
    overwrite: bool = False,
    root: str | Path | None = None,
    allow_import: Sequence[str] = (),
) -> Exported:
    """Write a model of a finished run to `folder`, from which `timm.create_model("local-dir:FOLDER", pretrained=True)`
    builds the model with its weights, and `timm.data` its preprocessing.

    A student whose classifier no loss has trained is exported without one, as a backbone (`num_classes=0`). `role` is
    one of `ROLES`. `ema` exports the moving average of the weights. `reparameterize` merges branches and
    batch norms that only training needs (timm's `reparameterize_model`). `onnx` adds `model.onnx`, in float32, from
    normalised images (batch, channels, height, width) to logits (batch, classes). timm has no config for a model from
    your own function; such a model is exported only as ONNX. `overwrite` replaces an earlier export and nothing else.
    `root` is the new place of the run's data, if they have moved: the logits are compared on its test images, or on
    random images if these cannot be read and `root` is not given. `allow_import` lists the packages whose functions may
    be called to build the model.

    Raises RunError if the run is missing, unfinished or without these weights, the folder is not free, or the model
    cannot be exported in this form or has other logits after loading, in which case nothing is written; WeightsError
    for weights that cannot be read or are of another model; DataError if the images of `root` cannot be read;
    RecipeError for an unreadable recipe.
    """
    run, folder = Path(run), Path(folder)
    if onnx:
        _check_onnx()
    try:
        _check_place(folder, overwrite)
    except OSError as refusal:
        raise RunError(f"cannot look into {folder}: {refusal.strerror}") from refusal
    trained = _read(run, role, ema, root, allow_import)
    if trained.why_not_timm and not onnx:
        raise RunError(_why_only_onnx(trained))
    sample = _sample(trained, needed=root is not None)
    with _beside(folder) as aside, torch.no_grad():
        expected = _logits(trained.module, sample.images, trained.output)
        written = _write(trained, sample, expected, aside, reparameterize=reparameterize, onnx=onnx)
        (aside / CARD).write_text(card_text(_card(trained, written, folder.resolve().name)), encoding="utf-8")
        files = tuple(name for name in FILES if (aside / name).exists())
    return Exported(
        folder=str(folder),
        weights=str(trained.weights),
        role=role,
        model=str(trained.about["model"]),
        model_kwargs=written.kwargs,
        files=files,
        images=sample.description,
        outputs=trained.outputs,
        largest_logit=expected.abs().max().item(),
        difference=written.difference,
        onnx_difference=written.onnx_difference,
        notes=tuple(written.notes),
    )


def _why_only_onnx(trained: _Trained) -> str:
    own = packages([str(trained.about["model"])])
    allowed = f", allow_import={own}" if own else ""
    return (
        f"{trained.weights} {trained.why_not_timm}. probe_kd.load_student({str(trained.weights)!r}{allowed}) "
        "builds it; --onnx exports it as ONNX alone, which needs none of these libraries and no code"
    )


def _write(
    trained: _Trained, sample: _Sample, expected: Tensor, aside: Path, *, reparameterize: bool, onnx: bool
) -> _Written:
    """Write the model for timm if timm can load it, and as ONNX if asked for."""
    written = _Written(trained.module, trained.kwargs, [trained.dropped] if trained.dropped else [])
    if reparameterize:
        _fuse(written, trained)
    if not trained.why_not_timm:
        _write_timm(written, trained, sample, expected, aside, onnx=onnx)
    else:
        written.notes.append(f"the model {trained.why_not_timm}: the folder holds ONNX alone")
    if onnx:
        at_tap = _AtTap(written.module, trained.output).eval() if trained.output != Tap("") else written.module
        written.onnx_difference = _write_onnx(at_tap, trained.outputs, sample.images, expected, aside / ONNX)
    return written


def _read(run: Path, role: str, ema: bool, root: str | Path | None, allow_import: Sequence[str]) -> _Trained:
    if not (run / "recipe.yaml").is_file():
        hint = "; give the folder that its run wrote, as runs/NAME" if run.is_file() else ""
        raise RunError(f"{run} is not the folder of a run: {why_no_run(run)}{hint}")
    sets = () if root is None else (f"data.root={json.dumps(str(root))}",)
    recipe = load(run / "recipe.yaml", sets=sets).recipe
    role, own_recipe = _with_role(recipe, role)
    check_own(run, (RECIPE, RECORD))
    models = (recipe.student, *recipe.teachers_by_name.values())
    configs = [file for model in models for file in files_of(model.model, pretrained=False) if file.is_file()]
    check_inputs(run, configs, "What is exported would be read by another: put the former file back")
    weights = weights_file(run, role.replace("-", " ", 1), "-ema" * ema)
    if not weights.is_file():
        raise RunError(_why_missing(run, weights, role, ema))
    about = read_header(weights)
    options = own_recipe.teacher if role.startswith("teacher") else recipe.student
    _check_header(weights, about, options, role)
    if "graft" in about:
        raise RunError(
            f"{weights} is a graft, the last layers of {recipe.student.model} on the first of another model. timm has "
            "no name for it, so no config can say how it is built. Use it by probe_kd.load_student(FILE), or distil it "
            "into a student that timm knows"
        )
    module = load_student(weights, allow_import=allow_import)
    given = _evaluated_on(own_recipe, role, module)
    return _Trained(run, recipe, role, weights, about, module, given, _drop_classifier(module, recipe, role))


def _with_role(recipe: Recipe, role: str) -> tuple[str, Recipe]:
    """The role, and the recipe with the teacher of that role as `teacher`, if it has several.

    Raises RunError for a role that the recipe does not have.
    """
    roles = [role.replace(" ", "-") for role in (*ROLES[:2], *map(role_of_teacher, recipe.teachers or {}))]
    roles = roles if recipe.teachers else list(ROLES)
    role = role.replace(" ", "-")
    if role not in roles:
        raise RunError(f"role {role!r}; expected one of {', '.join(roles)}{nearest(role, roles)}")
    name = role.removeprefix("teacher-")
    return role, recipe.with_only(name) if recipe.teachers and role.startswith("teacher-") else recipe


def _drop_classifier(module: nn.Module, recipe: Recipe, role: str) -> str:
    """Remove a student's classifier that no loss has trained. Returns why, or an empty string if it stays."""
    losses = [loss_of(options) for _, options in losses_in(recipe)]
    read = {"outputs" if loss is None else loss.reads for loss in losses}  # a custom loss may read them
    has_classifier = getattr(module, "num_classes", 0) and hasattr(module, "reset_classifier")
    if role != "student" or read & {"labels", "outputs"} or not has_classifier or _pairs_classifier(module, recipe):
        return ""
    module.reset_classifier(0)  # type: ignore[operator]
    return "no loss has trained its classifier: it is a backbone, which gives features (num_classes=0)"


def _pairs_classifier(module: nn.Module, recipe: Recipe) -> bool:
    """Whether a pair reads what the classifier gives, so that a loss of features may have trained it."""
    taps = map(Tap.parse, recipe.paired_layers)
    names = {"", *classifiers(module)}
    return any(tap.port == "output" and tap.module in names for tap in taps)


def _why_missing(run: Path, weights: Path, role: str, ema: bool) -> str:
    if any(run.glob("checkpoint*")):
        return f"{run} is not finished, and has no {weights.name} yet; go on with it: {command_to_go_on(run)}"
    stems = {file.name: file.stem.removesuffix("-ema") for file in run.glob("*.safetensors")}
    existing = sorted(name for name, stem in stems.items() if stem in ROLES or stem.startswith("teacher-"))
    has = f"it has {', '.join(existing)}" if existing else "it has no weights at all"
    if ema and f"{role}.safetensors" in existing:
        return f"{run} kept no moving average of the {role} ({weights.name}): {has}; leave --ema out"
    untrained = "; a teacher that came with its weights was not trained here" * role.startswith("teacher")
    return f"{run} has no {weights.name}: {has}{untrained}"


def _check_header(weights: Path, about: Mapping[str, Any], options: ModelOptions | None, role: str) -> None:
    if options is None:
        raise WeightsError(f"{weights} is of a {role}, and the recipe of its run has none")
    if "model" not in about:
        raise WeightsError(f"{weights} does not tell which model it is of; it was not written by probe-kd")
    in_recipe = options.model, options.model_kwargs
    in_header = about["model"], about["model_kwargs"]
    if "graft" not in about and in_header != in_recipe and in_header != _portable(options):
        header_call, recipe_call = (_call(name, kwargs) for name, kwargs in (in_header, in_recipe))
        raise WeightsError(
            f"{weights} is of another model: of {header_call}, and the run's recipe.yaml says {recipe_call}"
        )


def _portable(options: ModelOptions) -> tuple[str, dict[str, Any]]:
    """The name and arguments that a run writes for a `local-dir:` model; those of the recipe if the folder is gone."""
    try:
        return portable(options.model, options.model_kwargs)
    except TraceError:
        return options.model, options.model_kwargs


def _call(name: str, kwargs: Mapping[str, Any]) -> str:
    return f"{name}({', '.join(f'{key}={value!r}' for key, value in kwargs.items())})"


def _evaluated_on(recipe: Recipe, role: str, module: nn.Module) -> InputSpec:
    """The input as in the plan: the values of the recipe, or else those of timm's config for the model.

    A run with a graft normalises the images for the teacher, also those of the baseline.
    """
    data, teacher = recipe.data, recipe.teacher
    grafted = recipe.share is not None and recipe.share.form == "graft"
    mean, std, size = data.mean, data.std, data.input_size
    if teacher is not None and (grafted or role.startswith("teacher")):
        mean, std = teacher.mean, teacher.std
        if role.startswith("teacher"):
            size = teacher.input_size or size
        module = build_on_meta(teacher.model, teacher.model_kwargs) if not (mean and std) else module
    own = InputSpec.of(module, size)
    channels = size[0]
    given = InputSpec(size, mean or own.mean, std or own.std)
    return replace(given, mean=(given.mean * channels)[:channels], std=(given.std * channels)[:channels])


def _sample(trained: _Trained, count: int = 16, *, needed: bool = False) -> _Sample:
    """The first test images of the run, or random images if its data cannot be read and are not `needed`."""
    data = trained.recipe.data.model_copy(update={"download": False, "batch_size": count, "workers": 0})
    record = DataRecord.read(trained.run)
    try:
        datasets = open_datasets(data, record)
        batch = next(iter(loader(datasets.test, data, trained.given, training=False)))
        images: Tensor = batch[0]
    except (ProbeKDError, OSError, StopIteration) as refusal:
        if needed:
            raise
        images = torch.randn(count, *trained.given.size, generator=torch.Generator().manual_seed(0))
        moved = "; where they have moved, --root DIR" if trained.recipe.data.root else ""
        description = f"{count} random images, since the data of the run were not read ({short(refusal)}{moved})"
        return _Sample(images, description, classes=record.classes if record else ())
    pictures = [datasets.test[index][0] for index in range(len(images))] if hasattr(datasets.test, "__len__") else []
    difference = datasets.difference(record, "test")  # two forms of one model can be compared on any images
    description = f"{len(images)} test images{f' (not those of the run: {difference})' * bool(difference)}"
    return _Sample(images, description, pictures, datasets.classes)


def _logits(module: nn.Module, images: Tensor, output: Tap) -> Tensor:
    """Run a model and read its output. Raises RunError for an output that is not one tensor."""
    try:
        return reader(module, output)(images)
    except TapError as refusal:
        raise RunError(f"only one tensor can be exported, and {refusal} as `output` of the model") from None


class _AtTap(nn.Module):
    """A model that returns the tensor at one of its taps."""

    def __init__(self, module: nn.Module, tap: Tap) -> None:
        super().__init__()
        self.module, self.tap, self.probe = module, tap, Probe(module, tap).attach()

    def forward(self, images: Tensor) -> Tensor:
        return self.probe(images)[self.tap]


def _difference(expected: Tensor, logits: Tensor, allowed: float, who: str) -> float:
    """The largest absolute difference. Raises RunError if it is more than rounding."""
    if logits.shape != expected.shape:
        raise RunError(f"{who} gives {tuple(logits.shape)} where the run gave {tuple(expected.shape)}; nothing is left")
    difference, largest = (logits - expected).abs().max().item(), expected.abs().max().item()
    if not difference <= allowed * largest:  # also where either is no number
        raise RunError(
            f"{who} does not answer as the model did when it was trained: outputs up to {largest:.3g} differ by up to "
            f"{difference:.3g}, and rounding explains {allowed * largest:.1g}; nothing was exported"
        )
    return difference


def _fuse(written: _Written, trained: _Trained) -> None:
    """Reparameterise the model. Raises RunError if timm fails."""
    from timm.utils.model import reparameterize_model

    name = str(trained.about["model"])
    try:
        fused = reparameterize_model(trained.module).eval()
    except Exception as refusal:  # the code of many models
        raise RunError(f"timm cannot reparameterise {name}: {short(refusal)}; leave --reparameterize out") from refusal
    if _shapes(fused) == _shapes(trained.module):
        written.notes.append(f"{name} has nothing to reparameterise; it is exported as it was trained")
    else:
        written.module = fused


def _shapes(module: nn.Module) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in module.state_dict().items()}


def _write_timm(
    written: _Written, trained: _Trained, sample: _Sample, expected: Tensor, aside: Path, *, onnx: bool
) -> None:
    """Write config and weights, reparameterised if timm can load that form, and load them with timm alone."""
    name, module, allowed = trained.about["model"], trained.module, SAME
    loaded: nn.Module | None = None
    if written.module is not module:
        # Tried instead of looked up: no list of the models that timm builds and loads in this form would stay true.
        kwargs = {**trained.kwargs, "inference_mode": True}
        try:
            loaded = _write_and_load(written.module, kwargs, trained, sample.classes, aside)
        except RunError as refusal:
            if not onnx:
                raise RunError(_why_not_fused(name, refusal)) from refusal
            note = f"{ONNX} is reparameterised, and {WEIGHTS} is not, since timm does not load that form of {name}"
            written.notes.append(note)
        else:
            written.kwargs, allowed = kwargs, FUSED
            written.notes.append("reparameterised, for inference; to train on, export it as it was trained")
    if loaded is None:
        loaded = _write_and_load(module, trained.kwargs, trained, sample.classes, aside)
    written.difference = _difference(
        expected, _logits(loaded, sample.images, trained.output), allowed, f"{name}, as timm loads it,"
    )
    _check_preprocessing(loaded, sample, trained)
    written.notes += _larger_teacher(trained) + _other_output(trained)


def _why_not_fused(name: str, refusal: Exception) -> str:
    return (
        f"timm reparameterises {name}, but does not load it in that form (`inference_mode`): {short(_root(refusal))}. "
        f"Leave --reparameterize out, or add --onnx: then {ONNX} is reparameterised, and {WEIGHTS} is not"
    )


def _write_and_load(
    module: nn.Module, kwargs: Mapping[str, Any], trained: _Trained, classes: Sequence[str], aside: Path
) -> nn.Module:
    """Write config and weights, and return the model that timm loads from them. Raises RunError if it cannot."""
    import timm

    name = str(trained.about["model"])
    try:
        _write_config(module, kwargs, trained, classes, aside / CONFIG)
        save_weights(module, aside / WEIGHTS, {"model": name, "model_kwargs": dict(kwargs), "probe_kd": __version__})
        loaded: nn.Module = timm.create_model(f"local-dir:{aside}", pretrained=True)
    except Exception as refusal:  # timm raises many types
        raise RunError(f"timm does not load {name} from what it wrote: {short(refusal)}; nothing is left") from refusal
    return loaded.eval()


def _write_config(
    module: nn.Module, kwargs: Mapping[str, Any], trained: _Trained, classes: Sequence[str], path: Path
) -> None:
    from timm.data.constants import DEFAULT_CROP_PCT
    from timm.models._hub import save_config_for_hf  # `save_for_hf` fails on weights that have two names, as CoaT's

    data, given = trained.recipe.data, trained.given
    own: Any = module.pretrained_cfg
    # Only the entries that describe the architecture: licence, notes and tag belong to other weights.
    copied = ("architecture", "fixed_input_size", "first_conv", "classifier")
    config = {key: own[key] for key in copied if key in own} | {
        "num_classes": module.num_classes,
        "input_size": given.size,
        "mean": given.mean,
        "std": given.std,
        "interpolation": "bicubic" if data.interpolation == "random" else data.interpolation,
        "crop_pct": data.crop_pct or DEFAULT_CROP_PCT,
        "crop_mode": "center",
        "custom_load": False,  # else timm would read the weights as JAX's, where its own are
    }
    module.pretrained_cfg = config  # type: ignore[assignment]
    about = {"version": __version__, "role": trained.role, "weights": trained.weights.name}
    names = {"label_names": list(classes)} if classes and len(classes) == module.num_classes else {}
    save_config_for_hf(
        module, str(path), model_config={**names, "probe_kd": about}, model_args=_architecture_of(kwargs)
    )


def _architecture_of(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of the architecture: without those that the config has elsewhere, timm's loader's, and dropout."""
    elsewhere = {
        "num_classes",
        "pretrained",
        "pretrained_cfg",
        "pretrained_cfg_overlay",
        "checkpoint_path",
        "cache_dir",
    }
    dropout = ("drop_rate", "drop_path_rate", "drop_block_rate")
    return {key: value for key, value in kwargs.items() if key not in elsewhere and not key.endswith(dropout)}


def _check_preprocessing(loaded: nn.Module, sample: _Sample, trained: _Trained) -> None:
    """Raise RunError if timm's transform, made from the config, gives other images than the evaluation."""
    from timm.data import create_transform, resolve_model_data_config

    if not sample.pictures:
        return
    transform = create_transform(**resolve_model_data_config(loaded))
    mode = "L" if trained.given.size[0] == 1 else "RGB"
    images = torch.stack([transform(picture.convert(mode)) for picture in sample.pictures])
    _difference(sample.images, images, SAME, "timm's transform, made from the config,")


def _larger_teacher(trained: _Trained) -> list[str]:
    """A note for a larger teacher: training makes one view of its size, and resizes it for the student."""
    teachers = trained.recipe.teachers_by_name.values()
    sizes_of_teachers = [teacher.input_size[1:] for teacher in teachers if teacher.input_size is not None]
    if not sizes_of_teachers or trained.role.startswith("teacher"):
        return []
    size = trained.given.size[1:]
    teacher_size = tuple(max(sides) for sides in zip(*sizes_of_teachers, strict=True))
    if teacher_size[0] <= size[0] and teacher_size[1] <= size[1]:
        return []
    sizes = ["x".join(map(str, size)) for size in (teacher_size, size)]
    return [
        f"the run made its images {sizes[0]}, as the teacher wants them, and resized them to {sizes[1]}; timm's "
        "transform makes them so at once, and the outputs may differ a little"
    ]


def _other_output(trained: _Trained) -> list[str]:
    """A note on a model that was measured on another tensor than timm's model returns."""
    if trained.output == Tap("") or trained.output.is_output:
        return []
    return [
        f"the figures are those of the layer {str(trained.output)!r}, and timm's model returns what its own forward "
        f"makes of it; probe_kd.Probe(model, {str(trained.output)!r}) reads the layer"
    ]


def _check_onnx() -> None:
    missing = [name for name in ("onnx", "onnxruntime", "onnxscript") if find_spec(name) is None]
    if missing:
        raise RunError(f"--onnx needs {', '.join(missing)}: pip install 'probe-kd[onnx]'")


def _write_onnx(module: nn.Module, name: str, images: Tensor, expected: Tensor, path: Path) -> float:
    """Write ONNX with a dynamic batch size, and run onnxruntime at two sizes. Returns the largest difference."""
    import onnxruntime

    try:
        program = torch.onnx.export(
            module,
            (images[:2],),
            dynamo=True,
            input_names=["images"],
            output_names=[name],
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            verbose=False,
        )
        assert program is not None
        program.save(path)
        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        outputs = [session.run([name], {"images": batch.numpy()})[0] for batch in (images[:1], images)]
    except Exception as refusal:  # exporter and runtime raise many types
        why = short(_root(refusal))
        raise RunError(f"torch cannot export this model to ONNX: {why}; leave --onnx out") from refusal
    pairs = zip((expected[:1], expected), map(torch.from_numpy, outputs), strict=True)
    return max(_difference(torch_logits, onnx_logits, FUSED, "onnxruntime") for torch_logits, onnx_logits in pairs)


def _root(error: BaseException) -> BaseException:
    """The first cause; the exporter's own text is advice for its developers."""
    return error if error.__cause__ is None else _root(error.__cause__)


def _check_place(folder: Path, overwrite: bool) -> None:
    """Raise RunError unless the folder is empty, or an earlier export and `overwrite` is given."""
    if folder.is_file():
        raise RunError(f"{folder} is a file; give a folder to -o")
    if not folder.exists() or not any(folder.iterdir()):
        return
    foreign = sorted(file.name for file in folder.iterdir() if file.name not in FILES)
    card = folder / CARD
    if foreign or not card.is_file() or MARK not in whole_bytes(card).decode(errors="replace"):
        holds = f"holds {', '.join(foreign[:3])}" if foreign else "was not written by an export"
        raise RunError(f"{folder} is not empty and {holds}; it will not be overwritten, so choose another -o")
    if not overwrite:
        raise RunError(f"{folder} holds a former export; --overwrite replaces it")


@contextmanager
def _beside(folder: Path) -> Iterator[Path]:
    """A temporary folder that replaces `folder` at the end, and is deleted on failure."""
    folder = folder.resolve()
    aside, old = (folder.with_name(f".{folder.name}.{kind}-{os.getpid()}") for kind in ("partial", "old"))
    try:
        try:
            aside.mkdir(parents=True)
            yield aside
            if folder.exists():
                folder.rename(old)
            aside.rename(folder)
        except OSError as refusal:
            raise RunError(f"cannot write to {folder}: {refusal.strerror or refusal}") from refusal
        shutil.rmtree(old, ignore_errors=True)
    finally:
        if old.exists() and not folder.exists():  # stopped between the two
            old.rename(folder)
        shutil.rmtree(aside, ignore_errors=True)


def _card(trained: _Trained, written: _Written, name: str) -> Card:
    return Card(
        name=name,
        run=trained.run,
        recipe=trained.recipe,
        role=trained.role,
        weights=trained.weights,
        about=trained.about,
        given=trained.given,
        outputs=trained.outputs,
        in_timm=not trained.why_not_timm,
        in_onnx=written.onnx_difference is not None,
        notes=tuple(written.notes),
    )
