"""`data.labels`: which losses can read them, and class weights from the number of images of each class."""

from collections.abc import Mapping, Sequence
from typing import Any

from probe_kd.data.datasets import Datasets
from probe_kd.errors import LossError
from probe_kd.methods.losses.labels import balanced_weights
from probe_kd.methods.objectives import Objective
from probe_kd.recipe.keys import LossOptions, Recipe
from probe_kd.recipe.sections.mistakes import Mistake
from probe_kd.recipe.yaml_tree import KeyPath

BALANCED = "balanced"


def with_class_weights(loss: LossOptions, datasets: Datasets | None) -> Mapping[str, Any]:
    """The options of a loss, with numbers for `class_weights: balanced`.

    Without `datasets`, which could not be opened, the weights are left out. Raises LossError if their labels are not
    known beforehand.
    """
    options = loss.options
    if options.get("class_weights") != BALANCED or loss.loss != "cross_entropy":
        return options
    others = {key: value for key, value in options.items() if key != "class_weights"}
    if datasets is None or datasets.labels != "class":  # the latter is a mistake of its own
        return others
    if datasets.train_counts is None:
        raise LossError(
            "`class_weights: balanced` needs the classes of all training images, which this data set tells only when "
            "an image is read; give a list of weights, in the order of the classes"
        )
    return {**others, "class_weights": balanced_weights(datasets.train_counts)}


def check_label_losses(
    recipe: Recipe, index: int, objectives: Sequence[Objective], classes: int | None
) -> list[Mistake]:
    """Check that the losses of a stage that read labels read such as the data have."""
    mistakes: list[Mistake] = []
    for objective in objectives:
        if not objective.reads_labels:
            continue
        loss = recipe.stages[index].losses[objective.name].loss
        place: KeyPath = ("stages", index, "losses", objective.name)
        if message := _why_unreadable(recipe, objective, classes):
            mistakes.append(((*place, "loss"), f"loss `{objective.name}` ({loss}) {message}"))
        elif message := _why_other_weights(recipe, objective, classes):
            mistakes.append(((*place, "class_weights"), message))
    return mistakes


def _why_unreadable(recipe: Recipe, objective: Objective, classes: int | None) -> str:
    """Why a loss cannot read the labels of the data; empty if it can."""
    labels, multilabel = recipe.data.labels, objective.resolved.multilabel
    per_class = "binary_cross_entropy" if objective.resolved.reads == "labels" else "multilabel_soft_targets"
    if labels == "none":
        return (
            "reads labels, and `data: {labels: none}` has none; take a loss that compares with the teacher (`hint`, "
            "`soft_targets`), or data with labels"
        )
    if labels == "multilabel" and not multilabel:
        return (
            f"reads one class an image, and `data: {{labels: multilabel}}` has any number of them; take `{per_class}`"
        )
    if labels == "class" and multilabel and classes not in (2, None):  # one output tells two classes
        return "reads any number of classes an image, and `data: {labels: class}` has one; take `cross_entropy`"
    return ""


def _why_other_weights(recipe: Recipe, objective: Objective, classes: int | None) -> str:
    for option in ("class_weights", "pos_weight"):
        weights = objective.options.get(option)
        legal = (classes,) if option == "class_weights" else (1,) if recipe.data.labels == "class" else (1, classes)
        if classes and isinstance(weights, list | tuple) and len(weights) not in legal:
            return f"`{option}` of `{objective.name}` has {len(weights)} numbers, and the data have {classes} classes"
    return ""


def softmax_remarks(recipe: Recipe) -> list[str]:
    """A remark on each loss whose softmax makes the classes exclude each other, where images have several."""
    if recipe.data.labels != "multilabel":
        return []
    losses = {name: loss.loss for stage in recipe.stages for name, loss in stage.losses.items()}
    return [
        f"loss `{name}` ({loss}) compares classes that exclude each other, and images have several; "
        "`multilabel_soft_targets` compares each class by itself"
        for name, loss in losses.items()
        if loss in ("soft_targets", "hard_labels", "dist")
    ]
