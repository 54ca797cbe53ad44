"""The JSON Schema of recipes, with which editors complete and check YAML.

The schema allows whatever `reading.py` allows. Only `probe-kd check` sees what depends on models and data.
"""

import re
from collections.abc import Iterator, Mapping
from inspect import getdoc, signature
from typing import Any

from pydantic import BaseModel, TypeAdapter
from pydantic.json_schema import GenerateJsonSchema

from probe_kd.methods.losses.table import LOSSES, Loss
from probe_kd.recipe.keys import LossOptions, Recipe, Scheduled

Schema = dict[str, Any]

# Descriptions of keys in editors and docs/recipe_keys.md. `Section.key` is for one section only.
DESCRIPTIONS = {
    # the recipe
    "student": "The model to train. It is exported without its adapters.",
    "teacher": "The model that the student learns from. Without it, the student is trained on labels alone.",
    "teachers": "Several teachers by name, instead of `teacher`, as in `{dino: {...}, siglip: {...}}`. Pairs and "
    "losses say whose layer they read: `dino:blocks.11`.",
    "data": "The images, their labels and the augmentation.",
    "pairs": "Student layer: teacher layer, or `auto`. `glob:blocks.[0-3]` and `re:layer[12]` match several layers. A "
    "student layer may have a list of layers of several `teachers`.",
    "share": "Train student and teacher jointly (Rocket Launching), and share these layers.",
    "stages": "The phases of training, run one after the other.",
    "baseline": "Also train the student without the teacher, from the same initial weights, on the same images, "
    "with the losses that read only labels.",
    "precision": "Mixed precision, as in accelerate. Not set: accelerate's configuration, else `bf16` on a GPU "
    "that supports it, and `no` elsewhere.",
    "matmul_precision": "`torch.set_float32_matmul_precision`: `highest` is float32, `high` is TensorFloat32 on a "
    "GPU. Not set: `high` on a GPU in bf16 or fp16.",
    "channels_last": "Use the channels-last memory format. Not set: yes if all models are timm's, except in "
    "float32 on a GPU.",
    "torchcompile": "Compile the training step, or one model, with `torch.compile`.",
    "model_ema": "Keep a moving average of the student's weights. It restarts in every stage.",
    "evaluate": "What is measured beside the accuracy: k-NN and a linear probe on a labelled set, and the pairs.",
    "recovery_interval": "Write a checkpoint every so many batches, besides the one after every epoch. 0 for none.",
    "val_interval": "Evaluate every so many epochs, and after the last epoch of a stage.",
    "checkpoint_hist": "How many of the newest checkpoints to keep.",
    "trackers": "Experiment trackers of accelerate, such as `tensorboard` or `wandb`.",
    "tune": "What `probe-kd tune` may vary, as in `{losses.hint.weight: {log: [0.01, 10]}}`. Not set: what is usual. "
    "`train` ignores it.",
    "log": "The least and the greatest number, drawn evenly by the logarithm.",
    "range": "The least and the greatest number. If both are whole, only whole numbers are drawn.",
    "values": "The values that may stand there, in YAML.",
    "from": "For `pairs`: those that `match` or `match --by features` finds, besides those of the recipe.",
    "Tune.num_pairs": "Of `from`: the least and the greatest number of pairs. Not set: 1 to 4.",
    "Tune.level": "Of `from: match`: the levels that are tried. Not set: `stage` alone.",
    "seed": "Seeds the initial weights, the order of the images and the augmentation.",
    # models
    "model": "A timm name, `hf-hub:...`, `local-dir:...`, `transformers:...`, `open_clip:...`, or "
    "`package.module:function` for your own model, which needs `--allow-import package`.",
    "pretrained": "Load the weights that belong to the name. For your own function: it loads its weights itself.",
    "grad_checkpointing": "timm's gradient checkpointing: less memory, more time. Layers inside a checkpointed "
    "container cannot be read.",
    "checkpoint": "A file with the weights: safetensors, or tensors saved by `torch.save`.",
    "model_kwargs": "Arguments of timm's `create_model`, or of your own function.",
    "output": "The tap with the model's output, one vector per image: losses of outputs and labels read it, and "
    "accuracy is measured on it. `[logits]` is an item of a tuple, dict or dataclass. Empty: what the model returns.",
    "Teacher.train": "Train the teacher on the labels first. A teacher with weights is fine-tuned, at a default "
    "learning rate of 1e-4.",
    "new_classifier": "Replace the classifier of the weights by a new one. A teacher with `train` gets a new "
    "classifier where its weights have other classes.",
    "same_init": "Initialise the teacher with the student's seed, so that equal architectures start equal.",
    "mean": "Mean for normalising images, one value or one per channel. Not set: from timm's config.",
    "std": "Standard deviation for normalising images. Not set: from timm's config.",
    "Teacher.input_size": "Input size of the teacher (channels, height, width), if it is not that of the data.",
    "class_map": "The teacher's class index for each class of the data, as a list or a JSON file. For a teacher "
    "with other classes.",
    "cache": "Folder in which the teacher's outputs are stored, so that it does not run twice on the same view of "
    "an image.",
    "cache_top_k": "Cache only the largest so many logits of each image. The rest of the probability is spread evenly.",
    "shard": "Divide the parameters of the frozen teacher among the processes of a run.",
    "NamedTeacher.weight": "Factor on this teacher's pairs in every loss, and its share of the mean of several "
    "classifiers.",
    "embedding": "The tap whose mean over positions is the vector of an image for `evaluate`. Not set: what the "
    "classifier reads, or the output of a model without one.",
    # evaluate
    "knn": "k-NN on a labelled set: student, untrained student, baseline and teacher.",
    "linear": "A linear probe on a labelled set. Without `dataset` and `root`, on that of `knn`.",
    "Evaluate.pairs": "Measure the explained variance and the cosine of every pair. Not set: where the student does "
    "not classify.",
    "k": "How many of the nearest training images vote.",
    "temperature": "Votes have the weight `exp(cosine / temperature)`.",
    "every": "Measure the student every so many epochs. Not set: `val_interval`. 0: only at the end.",
    "C": "Inverse strength of the penalty of scikit-learn's logistic regression. `auto` chooses among five on a fifth "
    "of the training images.",
    # stages
    "epochs": "Number of passes over the training images.",
    "Schedule.epochs": "Number of epochs until `end` is reached. Not set: the whole stage.",
    "Stage.name": "Name of the stage in tables, files and metrics.",
    "losses": "Name: loss. Their weighted sum is minimised.",
    "optimizer": "The optimizer, made by timm's `create_optimizer_v2`.",
    "scheduler": "The learning-rate schedule, made by timm's `create_scheduler_v2` and stepped every update.",
    "clip_grad": "Maximum norm of the gradient of an update. Not set: no clipping.",
    "grad_accum_steps": "Number of batches whose gradients are accumulated for one update.",
    "freeze": "Layers of the student that this stage does not train: a list of names or globs, or `backbone` for all "
    "but the classifier. Batch norms in them keep their statistics.",
    "keep": "Which weights a stage ends with: those of the `last` epoch, or of the epoch with the `best` (lowest) "
    "weighted loss on the images of `data.holdout`.",
    "teacher_dropping": "With several teachers: in each step, keep the one with the greatest loss, and drop each other "
    "with this probability (UNIC). Not set: none is dropped.",
    "label_smoothing": "Share of the label that is spread evenly over all classes (Szegedy et al. 2016).",
    "opt": "timm's name of an optimizer, such as `adamw`, `sgd` or `lamb`.",
    "lr": "Learning rate. It is not scaled by the batch size.",
    "weight_decay": "Weight decay of all parameters except norms and biases, as in timm.",
    "momentum": "Momentum, for optimizers that have one.",
    "layer_decay": "Factor on the learning rate for every layer below the last, as in timm.",
    "lr_scale": "Factors on the learning rate of the student's modules, by name or glob, as in `{layer1: 0.1}`. If "
    "several match, the last one applies.",
    "opt_args": "Other arguments of the optimizer, such as `betas`.",
    "sched": "timm's name of the learning-rate schedule.",
    "warmup_epochs": "Number of epochs over which the learning rate rises from `warmup_lr`.",
    "warmup_lr": "Learning rate at the start of the warm-up.",
    "min_lr": "Lowest learning rate.",
    "decay_epochs": "For `step`: multiply the learning rate by `decay_rate` every so many epochs.",
    "decay_milestones": "For `multistep`: multiply the learning rate by `decay_rate` at these epochs.",
    "decay_rate": "Factor on the learning rate, for `step`, `multistep` and `poly`.",
    # losses and pairs
    "loss": "Name of the loss, or `package.module:name` of a custom one.",
    "weight": "Factor on the loss: a number, a schedule `{start: 4, end: 1}`, or a share of the task's gradient "
    "`{share: 0.3}`.",
    "GradientShare.share": "Norm of the weighted gradient, divided by that of the task's. The weight follows from it.",
    "GradientShare.of": "The loss that is the task. Not set: all losses of labels; without any, the first of outputs.",
    "batches": "How many batches are measured before the first step of the stage.",
    "follow": "Go on measuring one batch in every `batches` during the stage, as an exponential average.",
    "Pair.teacher": "The teacher's layer that this student layer learns from.",
    "Pair.weight": "Factor on this pair's share of every loss. With 0 the pair is measured by `probe-kd eval`, not "
    "trained.",
    "policy": "How unlike widths are matched. `auto` and `always`: a learned projection of the student. `never`: "
    "none. `fixed`: a fixed random projection of the teacher.",
    "tokens": "What of a sequence of tokens is compared: the grid without class tokens (`drop`), the class tokens "
    "(`cls`), the mean (`pool`), or the class tokens and the grid, as two terms (`all`).",
    "normalize": "Standardise the teacher's feature: each position over its channels (`layer`), each channel over the "
    "batch (`channel`), or by statistics of the training images that are fitted once, before the stage: each channel "
    "(`fitted`), or all together by a rotation (`phi_s`).",
    "projector": "A 1x1 convolution (`linear`), the regressor of FitNets, a convolution without padding (`valid`), two "
    "layers (`mlp`), or a matrix that stays orthonormal (`orthogonal`).",
    "grid": "The grid on which two maps are compared: the `smaller` of both, that of the `student`, or that of the "
    "`teacher`.",
    "activation": "Activation after the projector. `tap` is the activation of the teacher's layer.",
    "of": "In joint training: which model a loss on labels trains.",
    "Loss.pairs": "Pairs of this loss, in the forms of the recipe's `pairs`, or a list of student layers that selects "
    "among those. Not set: all pairs of the recipe.",
    "between": "For `fsp`: pairs of student layers (from `pairs`) that form the two ends of each FSP matrix.",
    "Loss.student": "For losses of outputs and labels: the student's tap that is read, such as `head_dist`. Not set: "
    "the student's `output`.",
    "Loss.teacher": "For losses of outputs: the teacher's tap that is read. Not set: the teacher's `output`; of "
    "several, `mean`, the mean of the probabilities of all that classify.",
    "start": "Value at the start of the stage.",
    "end": "Value at the end of the schedule.",
    "shape": "Curve from `start` to `end`.",
    "level": "Pair the ends of stages, or single blocks.",
    "num_pairs": "Keep so many pairs. The deepest pair is always kept.",
    "decay": "Share of the average that is kept at every update.",
    "warmup": "Use a smaller decay in the first updates.",
    "target": "What to compile: the whole step (both models, adapters and losses), or one model.",
    "backend": "Backend of `torch.compile`.",
    "mode": "Mode of `torch.compile`.",
    # sharing
    "form": "What is shared: convolutions and linear layers (`weights`), all layers up to `at` (`trunk`), the "
    "teacher's layers in place of the student's (`graft`), or nothing (`none`).",
    "modules": "For `weights`: `interval`, `bottom`, a list of names, or student name: teacher name.",
    "at": "For `trunk` and `graft`: the last shared layer, or student layer: teacher layer.",
    "block": "The gradient block: which parameters a loss between student and teacher may change.",
    # data
    "dataset": "Name of the dataset: `sklearn/digits`, `torch/NAME` (torchvision), `hfds/NAME` (Hugging Face "
    "datasets), `wds/NAME` (tar shards), `csv/FILE` (rows of `path,label`). Empty: a folder of images at `root`.",
    "root": "Folder of the images.",
    "train_split": "Split, or folder in `root`, to train on.",
    "val_split": "Split, or folder in `root`, that is evaluated after every epoch. `none` for none.",
    "test_split": "Split, or folder in `root`, for the final results. It is evaluated once. Not set: `val_split` "
    "is used.",
    "labels": "What is known of each image: its class (`class`), any number of classes (`multilabel`), or nothing "
    "(`none`), for losses that compare with the teacher. Labels of a labelled data set are then ignored.",
    "sampler": "`balanced` draws the classes equally often. Not set: every image once an epoch.",
    "on_error": "What to do with an image that cannot be read: stop with its name (`raise`), or leave it out and "
    "count it (`skip`).",
    "download": "Download the dataset if it is not there.",
    "num_classes": "Number of classes, if the dataset does not give it.",
    "Data.input_size": "Image size as [channels, height, width].",
    "batch_size": "Images per step and process.",
    "draft": "Decode a JPEG at a half, a quarter or an eighth of its size if both sides keep this many pixels: faster, "
    "with other pixels. Not set: at its size.",
    "memory": "Keep images in memory: transformed where their views repeat, otherwise decoded. Results are the same.",
    "workers": "Processes that load images. 0: none. `auto`: up to one per CPU core beside a GPU, else none.",
    "interpolation": "Interpolation for resizing images.",
    "crop_pct": "Share of a test image's side that the central crop keeps. Not set: from timm's config.",
    "no_aug": "Only resize and crop the training images, like the test images.",
    "scale": "Random resized crops: smallest and largest share of the area.",
    "ratio": "Random resized crops: smallest and largest aspect ratio.",
    "hflip": "Probability of a horizontal flip.",
    "vflip": "Probability of a vertical flip.",
    "color_jitter": "Strength of random brightness, contrast and saturation.",
    "aa": "timm's automatic augmentation, such as `rand-m9-mstd0.5`.",
    "reprob": "Probability of random erasing.",
    "views": "Number of augmented views of each image, used in turn. Not set: a new view every epoch.",
    "holdout": "Share of the training images that is held out, for `keep: best` and `eval --split held_out`. It also "
    "replaces a missing `val_split`.",
    "fraction": "Share of the other training images to train on. It is the same subset for every seed.",
    "mixup": "Mixup alpha. Images are mixed before either model sees them. 0: off.",
    "cutmix": "CutMix alpha. 0: off.",
    "mixup_prob": "Probability that a batch is mixed.",
    "mixup_switch_prob": "Probability of CutMix instead of Mixup, if both are on.",
    "mixup_mode": "Draw the mixing ratio once per batch, per pair of images, or per image.",
}


def schema() -> Schema:
    """JSON Schema 2020-12 of a complete recipe, or of one that `extends` another and may therefore omit keys."""
    whole = Recipe.model_json_schema(schema_generator=_Generator)
    sections: dict[str, Schema] = whole.pop("$defs")
    sections["Recipe"] = whole
    models: list[type[BaseModel]] = [Recipe, *_sections(Recipe)]
    for model in models:
        _describe(sections[model.__name__], model)
    _of_losses(sections["LossOptions"])
    base = {"type": "string", "title": "extends", "description": "A recipe to begin with, from this one's folder."}
    whole["properties"] = {"extends": base, **whole["properties"]}
    for section in (whole, sections["LossOptions"]):
        section["properties"]["pairs"]["anyOf"].insert(0, {"const": "auto"})
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
    """pydantic's generator, without its titles such as `Warmup Epochs`: a key is its own title."""

    def field_title_should_be_set(self, schema: Any) -> bool:
        return False

    def tagged_union_schema(self, schema: Any) -> Any:
        """Use `anyOf`, because `{}` may match several branches, which `oneOf` would refuse."""
        union: Any = super().tagged_union_schema(schema)
        union["anyOf"] = union.pop("oneOf")
        return union


def _sections(model: type[BaseModel]) -> Iterator[type[BaseModel]]:
    """The models nested in a model at any depth, each once."""
    models: dict[str, type[BaseModel]] = {}
    waiting: list[Any] = [field.annotation for field in model.model_fields.values()]
    while waiting:
        kind = waiting.pop()
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            if kind.__name__ in models:
                continue
            models[kind.__name__] = kind
            waiting += [field.annotation for field in kind.model_fields.values()]
        waiting += getattr(kind, "__args__", ())
    yield from models.values()


def _describe(section: Schema, model: type[BaseModel]) -> None:
    """Add a title and a description to every key of a section."""
    section["title"] = model.__name__.removesuffix("Options")
    for key, entry in section["properties"].items():
        entry["title"] = key
        entry["description"] = description_of(key, model)


def description_of(key: str, model: type[BaseModel]) -> str:
    """The description of a key: from DESCRIPTIONS, else the sentences of the docstrings that name it."""
    own = [f"{kind.__name__.removesuffix('Options')}.{key}" for kind in model.__mro__]
    texts = [" ".join((getdoc(kind) or "").split()) for kind in model.__mro__ if kind.__module__.startswith("probe_kd")]
    sentences = [sentence for text in texts for sentence in re.split(r"(?<=\.) (?=[A-Z`])", text)]
    named = [sentence for sentence in sentences if f"`{key}`" in sentence or f"`{key}:" in sentence]
    written = next((DESCRIPTIONS[name] for name in (*own, key) if name in DESCRIPTIONS), "")
    return written or " ".join(dict.fromkeys(named))


def _of_losses(section: Schema) -> None:
    """Allow the names of the losses, and for each loss only its own options."""
    common = dict.fromkeys(LossOptions.model_fields, True)
    custom = {"pattern": r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$"}
    section["properties"]["loss"] |= {"anyOf": [{"enum": list(LOSSES)}, custom]}
    del section["additionalProperties"]
    section["allOf"] = [
        {
            "if": {"properties": {"loss": {"const": name}}, "required": ["loss"]},
            "then": {"properties": {**common, **_options(loss)}, "additionalProperties": False},
        }
        for name, loss in LOSSES.items()
    ]


def _options(loss: Loss) -> Schema:
    """The options of a loss. A number may be a schedule, except for a module, which is built once."""
    parameters, options = signature(loss.function, eval_str=True).parameters, dict[str, Any]()
    for key in loss.options:
        kind: Any = parameters[key].annotation
        kind = Scheduled if kind is float and not loss.builds_module else kind
        about = f"Of this loss; {parameters[key].default!r} if not given."
        options[key] = {
            "title": key,
            "description": about,
            **_inline(TypeAdapter(kind).json_schema(schema_generator=_Generator)),
        }
    return options


def _inline(section: Schema) -> Schema:
    """Remove the definitions of a schema: the recipe's have the same names."""
    section.pop("$defs", None)
    return section


def _part(node: Any) -> Any:
    """The schema of a file that extends another. Mappings are merged, so no key is required; lists are replaced."""
    if isinstance(node, list):
        return [_part(item) for item in node]
    if not isinstance(node, Mapping):
        return node
    if node.get("type") == "array" or "if" in node:
        return dict(node)
    optional = {key: _part(value) for key, value in node.items() if key != "required"}
    if "$ref" in optional:
        optional["$ref"] = optional["$ref"].replace("#/$defs/", "#/$defs/Part")
    return optional


def _reached(name: str, sections: Mapping[str, Schema]) -> dict[str, Schema]:
    """A section and all sections that it refers to."""
    reached: dict[str, Schema] = {}
    waiting = [name]
    while waiting:
        name = waiting.pop()
        if name in sections and name not in reached:
            reached[name] = sections[name]
            waiting += re.findall(r"'#/\$defs/(\w+)'", repr(reached[name]))
    return reached
