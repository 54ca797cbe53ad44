"""Write docs/recipe_keys.md, the reference of all recipe keys, from the recipe schema: `make recipe-keys`.

tests/test_recipe_keys.py fails when the page is not what this script writes.
"""

import json
from collections.abc import Iterator, Mapping
from inspect import signature
from pathlib import Path
from typing import Any

from probe_kd.methods.losses.table import LOSSES
from probe_kd.recipe.schema import Schema, schema

PAGE = Path(__file__).with_suffix(".md")

# The section in the schema, its title on the page, and what is said before its table.
SECTIONS = {
    "Recipe": ("Top level", "The keys of the recipe file itself."),
    "ModelOptions": ("`student`", ""),
    "TeacherOptions": ("`teacher`", "It also has the keys of `student`."),
    "NamedTeacherOptions": (
        "`teachers.NAME`",
        "One of several teachers. It also has the keys of `teacher`, and `train` as there.",
    ),
    "TeacherTraining": (
        "`teacher.train`",
        "Trains the teacher on the labels before distillation.",
    ),
    "DataOptions": (
        "`data`",
        "Names and meanings are those of timm's `create_dataset` and `create_transform`.",
    ),
    "AutoPairs": (
        "`pairs: auto`",
        "`pairs: {level: block, num_pairs: 4}` is `auto` with these arguments.",
    ),
    "PairOptions": (
        "`pairs`: one pair",
        "The short form is `student layer: teacher layer`. The long form is "
        "`student layer: {teacher: LAYER, ...}`; its keys override those of the loss.",
    ),
    "ShareOptions": ("`share`", "Joint training of both models (Rocket Launching)."),
    "StageOptions": ("`stages`", "A list. The stages run one after the other."),
    "LossOptions": ("`stages.N.losses.NAME`", "The keys that every loss has."),
    "ScheduleOptions": (
        "Schedules",
        "`weight`, and any number among the options of a loss, may be a schedule.",
    ),
    "GradientShareOptions": (
        "Shares",
        "`weight` of a loss may be a share: the norm of its gradient, divided by that of the task's.",
    ),
    "OptimizerOptions": ("`optimizer`", "In a stage, and in `teacher.train`."),
    "SchedulerOptions": (
        "`scheduler`",
        "In a stage, and in `teacher.train`. All counts are in epochs.",
    ),
    "EvaluateOptions": (
        "`evaluate`",
        "[Runs without labels](running.md#without-labels) explains what is measured.",
    ),
    "KnnOptions": (
        "`evaluate.knn`",
        "A labelled set, by the keys of `data`, and how its images are classified.",
    ),
    "LinearOptions": ("`evaluate.linear`", "It also has the keys of a labelled set."),
    "CompileOptions": ("`torchcompile`", "Off unless the section is given."),
    "AverageOptions": ("`model_ema`", "Off unless the section is given."),
    "TuneOptions": (
        "`tune`",
        "Maps the path of a value to one of `log`, `range`, `values` and `from`: see [tuning](tuning.md).",
    ),
}
# Keys that two sections have are listed in one of them.
LISTED_ELSEWHERE = {
    "TeacherOptions": "ModelOptions",
    "NamedTeacherOptions": "TeacherOptions",
    "LinearOptions": "KnnOptions",
}

REDUCTION = "`mean`, or `sum` over one image; the batch is averaged either way."
RELATIVE = (
    "Divide by the variance of the teacher's matrices over the batch. Needs two images."
)
LOSS_OPTIONS = {
    "cross_entropy.label_smoothing": "Share of the label that is spread evenly over all classes.",
    "cross_entropy.class_weights": "A weight for each class, as a list, or `balanced`: by how rare a class is.",
    "binary_cross_entropy.pos_weight": "Weight of the classes that an image has: one number, or one a class.",
    "binary_cross_entropy.label_smoothing": "Share by which each label moves towards 1/2.",
    "binary_cross_entropy.reduction": "`mean` over the classes, or `sum`; the batch is averaged either way.",
    "multilabel_soft_targets.temperature": "Temperature T of all sigmoids; the loss is multiplied by T^2.",
    "multilabel_soft_targets.reduction": "`mean` over the classes, or `sum`; the batch is averaged either way.",
    "soft_targets.temperature": "Temperature T of both softmaxes; the loss is multiplied by T^2.",
    "soft_targets.standardize": "Take z-scores of each image's logits first.",
    "hard_labels.label_smoothing": "Share of the teacher's class that is spread evenly over all classes.",
    "logits.center": "Subtract each image's mean logit first.",
    "logits.standardize": "Take z-scores of each image's logits first.",
    "logits.reduction": REDUCTION,
    "dist.temperature": "Temperature of both softmaxes.",
    "dist.inter": "Weight of the correlation over the classes of an image.",
    "dist.intra": "Weight of the correlation over the images of a class in the batch.",
    "dkd.alpha": "Weight of the label against all other classes.",
    "dkd.beta": "Weight of the other classes among themselves.",
    "dkd.temperature": "Temperature T of both softmaxes; the loss is multiplied by T^2.",
    "nkd.gamma": "Weight of the classes other than the label.",
    "nkd.temperature": "Temperature T of the classes other than the label, whose part is multiplied by T^2.",
    "ofa.eps": "Power of the teacher's probabilities, from 1 on; a larger one raises the share of the label.",
    "ofa.temperature": "Temperature of both softmaxes; there is no factor T^2.",
    "ofa_exits.eps": "That of `ofa`.",
    "ofa_exits.temperature": "That of `ofa`.",
    "hint.reduction": REDUCTION,
    "fsp.relative": RELATIVE,
    "fsp.reduction": "`sum` over the matrix, or `mean`; the batch is averaged either way.",
    "gram.relative": RELATIVE,
    "gram.reduction": "`mean` over the matrix, or `sum`; the batch is averaged either way.",
    "attention.form": "`paper`: norm of the difference. `code`: mean squared difference, as the authors' code.",
    "cross_entropy.ignore_index": "Class index that does not count, in the library as of unlabelled pixels.",
    "soft_targets.dense": "In the library: maps of logits, averaged over the positions too (segmentation).",
    "logits.dense": "In the library: maps of logits, averaged over the positions too (segmentation).",
    "token_match.cosine": "Factor on 1 - cosine.",
    "token_match.smooth_l1": "Factor on the smooth L1 distance.",
    "token_match.beta": "Difference up to which the distance is quadratic; above it is linear.",
    "patch_similarity.temperature": "Temperature of the softmax over the similarities of a position.",
    "patch_similarity_queue.size": "Length of the queue: how many of the teacher's last vectors are compared with.",
    "patch_similarity_queue.temperature": "Temperature of the softmax over the similarities to the queue.",
    "vid.initial_variance": "Variance of every channel before the first step.",
    "vid.eps": "Smallest variance.",
    "vid.reduction": "`mean` over channels and positions, or `sum`; the batch is averaged either way.",
    "mgd.mask": "What is hidden: `channels`, `positions`, or `tokens`, as in ViTKD.",
    "mgd.ratio": "Share that is hidden.",
    "mgd.reduction": REDUCTION,
    "srrl.features": "Factor on the difference of the features.",
    "srrl.logits": "Factor on the difference of what the teacher's classifier makes of them.",
    "rsd.kappa": "Factor on the correlations between different channels.",
    "rsd.expansion": "Width of the head's hidden layer, in widths of the student's vector.",
    "rsd.reduction": "`mean` over the channels, or `sum`, as the authors.",
    "crd.negatives": "Images that the images of a step are contrasted with; at most those of the training set.",
    "crd.temperature": "Temperature of the similarities.",
    "crd.momentum": "Share of an embedding in the memory that is kept when its image is seen again.",
    "crd.width": "Width of the embeddings.",
    "review.width": "Channels of the features that are fused; at most those of the student's deepest feature.",
    "rkd.distance": "Factor on the distances of pairs.",
    "rkd.angle": "Factor on the angles of triplets.",
    "pkt.form": "`paper`: of the other images. `code`: with the image itself, as the authors' code.",
    "cc.gamma": "Factor in the exponent of the Gaussian kernel.",
    "cc.order": "Order of the Taylor series of the kernel.",
    "smooth_l1.beta": "Difference up to which the distance is quadratic; above it is linear.",
    "cwd.temperature": "Temperature T of the softmax over the positions of a channel; the loss is multiplied by T^2.",
}


def page() -> str:
    """The whole page. KeyError for a section or an option of a loss that this script says nothing about."""
    sections: Mapping[str, Schema] = {
        name: section
        for name, section in schema()["$defs"].items()
        if not name.startswith("Part")
    }
    lines = [
        "# Recipe keys",
        "",
        "<!-- Written by docs/recipe_keys.py from the recipe schema. Run `make recipe-keys` after a change. -->",
        "",
        "Every key that a recipe may have. A key without a default is required. `not set` means that the behaviour",
        "is the one described, or off. [Writing recipes](recipes.md) explains how recipes extend each other and how",
        "values are set from the command line.",
    ]
    unknown = set(sections) - set(SECTIONS)
    if unknown:
        raise KeyError(f"no title for {sorted(unknown)}")
    for name, (title, about) in SECTIONS.items():
        lines += [
            "",
            f"## {title}",
            "",
            *([about, ""] if about else []),
            *_table(_rows(name, sections)),
        ]
        if name == "LossOptions":
            lines += [line for loss in LOSSES for line in _of_loss(loss)]
    return "\n".join(lines) + "\n"


def _table(rows: Iterator[tuple[str, str, str]]) -> list[str]:
    return [
        "| key | default | meaning |",
        "|---|---|---|",
        *(f"| {' | '.join(map(_cell, row))} |" for row in rows),
    ]


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _rows(name: str, sections: Mapping[str, Schema]) -> Iterator[tuple[str, str, str]]:
    section = sections[name]
    elsewhere = (
        sections[LISTED_ELSEWHERE[name]]["properties"]
        if name in LISTED_ELSEWHERE
        else {}
    )
    for key, entry in section["properties"].items():
        if key in elsewhere and elsewhere[key] == entry:
            continue
        default = (
            "required"
            if key in section.get("required", ())
            else _default(entry.get("default"))
        )
        kind = _kind(entry, sections)
        yield (
            f"`{key}`",
            default,
            entry["description"] + (f" *({kind})*" if kind else ""),
        )


def _of_loss(name: str) -> list[str]:
    parameters = signature(LOSSES[name].function).parameters
    rows = (
        (
            f"`{option}`",
            _default(parameters[option].default),
            LOSS_OPTIONS[f"{name}.{option}"],
        )
        for option in LOSSES[name].options
    )
    return ["", f"### `loss: {name}`", "", *_table(rows)]


def _default(value: Any) -> str:
    if value is None:
        return "not set"
    if isinstance(value, Mapping) and value:
        return "see there"
    if isinstance(value, list | tuple):
        return f"`[{', '.join(_number(item) for item in value)}]`"
    return f"`{value}`" if isinstance(value, str) and value else f"`{_number(value)}`"


def _number(value: Any) -> str:
    return (
        f"{value:.4g}"
        if isinstance(value, float) and value != round(value, 6)
        else json.dumps(value)
    )


def _kind(
    entry: Schema, sections: Mapping[str, Schema], *, one_of_several: bool = False
) -> str:
    """The values that a key takes, in words. Empty where the description says it."""
    if "anyOf" in entry:
        parts = [part for part in entry["anyOf"] if part.get("type") != "null"]
        kinds = dict.fromkeys(
            _kind(part, sections, one_of_several=len(parts) > 1) for part in parts
        )
        return " or ".join(kind for kind in kinds if kind)
    if "enum" in entry:
        return "one of " + ", ".join(f"`{value}`" for value in entry["enum"])
    if "const" in entry:
        return f"`{entry['const']}`"
    if "$ref" in entry:
        return (
            "a schedule"
            if entry["$ref"].endswith("ScheduleOptions")
            else "a share"
            if entry["$ref"].endswith("GradientShareOptions")
            else "a mapping"
            if one_of_several
            else ""
        )
    if entry.get("type") in ("number", "integer"):
        return _bounds(entry, always=one_of_several)
    return (
        {"array": "a list", "object": "a mapping"}.get(entry.get("type", ""), "")
        if one_of_several
        else ""
    )


def _bounds(entry: Schema, *, always: bool) -> str:
    signs = {
        "minimum": ">=",
        "exclusiveMinimum": ">",
        "maximum": "<=",
        "exclusiveMaximum": "<",
    }
    limits = " and ".join(
        f"{sign} {_number(entry[bound])}"
        for bound, sign in signs.items()
        if bound in entry
    )
    kind = "a whole number" if entry["type"] == "integer" else "a number"
    return f"{kind} {limits}".strip() if limits or always else ""


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(f"wrote {PAGE}")
