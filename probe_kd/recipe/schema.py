"""The JSON Schema of recipes, for editors that complete and check YAML while it is written.

It says no more than the loader, which has the last word: what depends on models and data only `probe-kd check` knows.
"""

import re
from collections.abc import Iterator, Mapping
from inspect import Parameter, getdoc, signature
from typing import Any, get_type_hints

from pydantic import BaseModel, TypeAdapter
from pydantic.json_schema import GenerateJsonSchema

from probe_kd.methods.losses.table import LOSSES, Loss
from probe_kd.recipe.options import LossOptions, Recipe, Scheduled

Schema = dict[str, Any]

# What an editor shows beside a key, where the docstring of its section does not say it better. A key of one section
# only stands as Section.key.
SAYS = {
    # the recipe
    "student": "The model that learns, and that is handed out.",
    "teacher": "The model that it learns from; none to train on labels alone.",
    "data": "The images and labels, and what is done to images before a model sees them.",
    "pairs": "Student layer: teacher layer, or `auto`. `glob:blocks.[0-3]` and `re:layer[12]` stand for several.",
    "share": "Rocket Launching: teacher and student train together, and have this in common.",
    "stages": "The phases of training, one after the other.",
    "channels_last": "Whether tensors lie channels last in memory. Not given: timm's, but in float32 on a GPU.",
    "matmul_precision": "torch.set_float32_matmul_precision: `highest` is float32, `high` TensorFloat32 on a GPU.",
    "torchcompile": "torch.compile of the step, or of one model.",
    "seed": "What weights, order and views follow from; of two runs with one seed, one is the other.",
    # models
    "model": "A timm name, `hf-hub:...`, `local-dir:...`, or `package.module:function` for your own.",
    "pretrained": "Whether timm's weights are loaded.",
    "checkpoint": "A file with its weights: safetensors, or what torch.save wrote of tensors.",
    "model_kwargs": "Arguments for timm's create_model, or for your own function.",
    "Teacher.train": "How it is trained first, on the labels alone; with weights of its own, fine-tuned at lr 1e-4.",
    "new_classifier": "Whether the classifier of its weights is left out, and a new one begins.",
    "same_init": "Whether its random weights are those of the student's seed: equal, for one architecture.",
    "mean": "The mean that images are normalised with, one value or one a channel; else that of timm's config.",
    "std": "The standard deviation that images are normalised with; else that of timm's config.",
    # stages
    "epochs": "How many passes over the training images.",
    "Schedule.epochs": "After how many epochs `end` is reached; by default at the end of the stage.",
    "Stage.name": "What tables, files and the metrics call it.",
    "losses": "Name: loss. Their weighted sum is minimised.",
    "optimizer": "timm's create_optimizer_v2.",
    "scheduler": "timm's create_scheduler_v2, stepped every update.",
    "clip_grad": "The largest norm of the gradient of one update; none if not given.",
    "label_smoothing": "How much of the label goes evenly to all classes (Szegedy et al. 2016).",
    "opt": "timm's name of an optimizer, such as `adamw`, `sgd`, `lamb`.",
    "lr": "The learning rate, as the optimizer takes it: it is not scaled by the batch size.",
    "weight_decay": "Of all parameters but norms and biases, as timm has it.",
    "momentum": "Of optimizers that have one.",
    "layer_decay": "Multiplies the learning rate once for every layer below the last, as timm has it.",
    "opt_args": "What else this optimizer takes, such as `betas`.",
    "sched": "timm's name of a schedule of the learning rate.",
    "warmup_epochs": "Over how many epochs the learning rate grows from `warmup_lr`.",
    "warmup_lr": "The learning rate that the warm-up begins with.",
    "min_lr": "The least learning rate.",
    "decay_epochs": "For `step`: every how many epochs the learning rate is multiplied by `decay_rate`.",
    "decay_milestones": "For `multistep`: at which epochs the learning rate is multiplied by `decay_rate`.",
    "decay_rate": "For `step`, `multistep` and `poly`.",
    # losses and pairs
    "loss": "Which loss.",
    "weight": "What the loss is multiplied by: a number, or a schedule `{start: 4, end: 1}`.",
    "Pair.weight": "What this pair's share of every loss is multiplied by; with 0 it is measured only.",
    "policy": "Whether the student is projected to the teacher's width by a learned map (`auto`, `always`), is not "
    "(`never`), or the teacher is mapped to the student's by a fixed one (`fixed`).",
    "tokens": "Compare the grids without class tokens (`drop`), the class tokens (`cls`), or the means (`pool`).",
    "normalize": "Standardise the target: each position over its channels (`layer`), or each channel (`channel`).",
    "projector": "A 1x1 convolution (`linear`), or the regressor of FitNets without padding (`valid`).",
    "activation": "What the projector ends in; `tap` is the nonlinearity of the teacher's layer.",
    "of": "Whom a loss that reads labels trains, where both train together.",
    "between": "For `fsp`: two student layers of `pairs` each, the ends of a flow.",
    "start": "The value at the beginning of the stage.",
    "end": "The value at the end of the schedule.",
    "shape": "How it moves from `start` to `end`.",
    "level": "Whether `match` pairs the ends of stages, or blocks.",
    "num_pairs": "So many pairs; the deepest is always kept.",
    "decay": "How much of the average is kept at every update.",
    "warmup": "Whether the average follows faster at the beginning.",
    "target": "What is compiled: the whole step (both models, adapters and losses), or one model.",
    "backend": "torch.compile's.",
    "mode": "torch.compile's.",
    # sharing
    "form": "Convolutions and linear layers in common (`weights`), one `trunk`, a `graft`, or nothing (`none`).",
    "modules": "For `weights`: `interval`, `bottom`, names, or student name: teacher name.",
    "at": "For `trunk` and `graft`: the last layer in common, or student layer: teacher layer.",
    # data
    "root": "The folder of the images.",
    "train_split": "The split, or the folder in `root`, that is trained on.",
    "val_split": "The split, or the folder in `root`, that is measured after every epoch; `none` for none.",
    "test_split": "The split, or the folder in `root`, of the final figures, measured once.",
    "on_error": "Whether an image that cannot be read ends the run with its name, or is left out and counted.",
    "download": "Whether what is not there may be downloaded.",
    "num_classes": "How many classes there are, where the dataset does not say it.",
    "batch_size": "Images in one step, of each process.",
    "workers": "Processes that read images; none for this one. `auto`: the cores beside a GPU, none without.",
    "interpolation": "How images are resized.",
    "crop_pct": "The share of a test image's side that is kept by the central crop.",
    "no_aug": "Whether training images are only resized and cropped, as test images are.",
    "scale": "Random resized crops: least and largest share of the area.",
    "ratio": "Random resized crops: least and largest aspect ratio.",
    "hflip": "Probability of a horizontal flip.",
    "vflip": "Probability of a vertical flip.",
    "color_jitter": "How much brightness, contrast and saturation change.",
    "aa": "timm's automatic augmentation, such as `rand-m9-mstd0.5`.",
    "reprob": "Probability of random erasing.",
    "mixup_prob": "Probability that a batch is mixed at all.",
    "mixup_switch_prob": "Probability of CutMix rather than Mixup, where both are on.",
    "mixup_mode": "Whether one share is drawn for a batch, for a pair of images, or for an image.",
}


def schema() -> Schema:
    """JSON Schema 2020-12 of a recipe: of a whole one, or of one that `extends` another and so may leave keys out."""
    whole = Recipe.model_json_schema(schema_generator=_Generator)
    sections: dict[str, Schema] = whole.pop("$defs")
    sections["Recipe"] = whole
    models: list[type[BaseModel]] = [Recipe, *_sections(Recipe)]
    for model in models:
        _describe(sections[model.__name__], model)
    _of_losses(sections["LossOptions"])
    base = {"type": "string", "title": "extends", "description": "A recipe to begin with, from this one's folder."}
    whole["properties"] = {"extends": base, **whole["properties"]}
    whole["properties"]["pairs"]["anyOf"].insert(0, {"const": "auto"})
    parts = {f"Part{name}": _part(section) for name, section in sections.items()}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "A recipe of probe-kd",
        "type": "object",
        "if": {"required": ["extends"]},
        "then": {"$ref": "#/$defs/PartRecipe"},
        "else": {"$ref": "#/$defs/Recipe"},
        "$defs": {**sections, **_reached("PartRecipe", parts)},
    }


class _Generator(GenerateJsonSchema):
    """A key is its own title: what pydantic makes of it, `Warmup Epochs`, is no word of a recipe."""

    def field_title_should_be_set(self, schema: Any) -> bool:
        return False

    def tagged_union_schema(self, schema: Any) -> Any:
        """`{}` may be of several branches, which `oneOf` would refuse."""
        found: Any = super().tagged_union_schema(schema)
        found["anyOf"] = found.pop("oneOf")
        return found


def _sections(model: type[BaseModel]) -> Iterator[type[BaseModel]]:
    """The models inside a model, each once, all the way down."""
    seen: dict[str, type[BaseModel]] = {}
    waiting: list[Any] = [field.annotation for field in model.model_fields.values()]
    while waiting:
        kind = waiting.pop()
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            if kind.__name__ in seen:
                continue
            seen[kind.__name__] = kind
            waiting += [field.annotation for field in kind.model_fields.values()]
        waiting += getattr(kind, "__args__", ())
    yield from seen.values()


def _describe(section: Schema, model: type[BaseModel]) -> None:
    """Every key with what the section's docstring says of it."""
    section["title"] = model.__name__.removesuffix("Options")
    for key, entry in section["properties"].items():
        entry["title"] = key
        entry["description"] = said_of(key, model)


def said_of(key: str, model: type[BaseModel]) -> str:
    """What there is to say of a key: the table's word, or the sentences of the docstrings that name it."""
    own = f"{model.__name__.removesuffix('Options')}.{key}"
    texts = [" ".join((getdoc(kind) or "").split()) for kind in model.__mro__ if kind.__module__.startswith("probe_kd")]
    sentences = [sentence for text in texts for sentence in re.split(r"(?<=\.) (?=[A-Z`])", text)]
    named = [sentence for sentence in sentences if f"`{key}`" in sentence or f"`{key}:" in sentence]
    return SAYS.get(own) or SAYS.get(key) or " ".join(dict.fromkeys(named))


def _of_losses(section: Schema) -> None:
    """The names of the losses, and for each its own options and no others."""
    common = dict.fromkeys(LossOptions.model_fields, True)
    section["properties"]["loss"] |= {"enum": list(LOSSES)}
    del section["additionalProperties"]
    section["allOf"] = [
        {
            "if": {"properties": {"loss": {"const": name}}, "required": ["loss"]},
            "then": {"properties": {**common, **_options(loss)}, "additionalProperties": False},
        }
        for name, loss in LOSSES.items()
    ]


def _options(loss: Loss) -> Schema:
    """Its keyword-only arguments. A number may be a schedule."""
    hints, found = get_type_hints(loss.function), dict[str, Any]()
    for key, parameter in signature(loss.function).parameters.items():
        if parameter.kind is Parameter.KEYWORD_ONLY:
            kind: Any = Scheduled if hints[key] is float else hints[key]
            about = f"Of this loss; {parameter.default!r} if not given."
            found[key] = {
                "title": key,
                "description": about,
                **_inline(TypeAdapter(kind).json_schema(schema_generator=_Generator)),
            }
    return found


def _inline(found: Schema) -> Schema:
    """Without definitions of its own: those of the recipe have the same names."""
    found.pop("$defs", None)
    return found


def _part(node: Any) -> Any:
    """What a file may say that extends another: mappings are merged, so that no key is needed; a list is replaced."""
    if isinstance(node, list):
        return [_part(item) for item in node]
    if not isinstance(node, Mapping):
        return node
    if node.get("type") == "array" or "if" in node:
        return dict(node)
    found = {key: _part(value) for key, value in node.items() if key != "required"}
    if "$ref" in found:
        found["$ref"] = found["$ref"].replace("#/$defs/", "#/$defs/Part")
    return found


def _reached(name: str, sections: Mapping[str, Schema]) -> dict[str, Schema]:
    """A section and those that it leads to."""
    found: dict[str, Schema] = {}
    waiting = [name]
    while waiting:
        name = waiting.pop()
        if name in sections and name not in found:
            found[name] = sections[name]
            waiting += re.findall(r"'#/\$defs/(\w+)'", repr(found[name]))
    return found
