"""Maps of logits: the losses are those of every pixel as a row, and a map by mistake is refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import TINY
from torch import Tensor, nn

from probe_kd import LOSSES, Distiller, InputSpec, Objective
from probe_kd.errors import AdapterError, LossError, RecipeError
from probe_kd.recipe.planner import plan
from probe_kd.recipe.reading import parse

CE = LOSSES["cross_entropy"].function
SIZE = InputSpec((3, 16, 16))


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def as_rows(map_: Tensor) -> Tensor:
    return torch.stack([map_[image, :, y, x] for image in range(2) for y in range(3) for x in range(4)])


@pytest.mark.parametrize(
    "options", [{}, {"label_smoothing": 0.1}, {"class_weights": [1.0, 2.0, 0.5, 0.0, 3.0]}], ids=str
)
def test_cross_entropy_of_a_map_is_the_mean_over_pixels_that_count(options: Any) -> None:
    logits, labels = draw(2, 5, 3, 4).requires_grad_(), torch.randint(5, (2, 3, 4))
    torch.testing.assert_close(CE(logits, labels, **options), CE(as_rows(logits), labels.flatten(), **options))
    labels[0, :2] = 255
    labels[1, 2, 3] = 255
    counted = labels.flatten() != 255
    value = CE(logits, labels, ignore_index=255, **options)
    torch.testing.assert_close(value, CE(as_rows(logits)[counted], labels.flatten()[counted], **options))
    value.backward()
    assert logits.grad is not None
    assert not logits.grad.movedim(1, -1)[labels == 255].any()
    if not options:
        torch.testing.assert_close(value, F.cross_entropy(logits, labels, ignore_index=255))
    assert CE(logits, torch.full_like(labels, 255), ignore_index=255, **options).item() == 0


@pytest.mark.parametrize("name", ["soft_targets", "logits"])
@pytest.mark.parametrize("options", [{}, {"standardize": True}], ids=str)
def test_dense_losses_of_outputs_are_means_over_pixels(name: str, options: Any) -> None:
    student, teacher = draw(2, 5, 3, 4), draw(2, 5, 3, 4, seed=1)
    function = LOSSES[name].function
    dense = function(student, teacher, dense=True, **options)
    torch.testing.assert_close(dense, function(as_rows(student), as_rows(teacher), **options))
    for sides in ((student[:, :, 0], teacher[:, :, 0]), (student[:, :, 0, 0], teacher[:, :, 0, 0])):
        with pytest.raises(LossError, match="`dense` expects"):
            function(*sides, dense=True)
    with pytest.raises(LossError, match="one row of each position first, for maps"):
        function(student, teacher)


@pytest.mark.parametrize(
    ("target", "says"),
    [
        (torch.zeros(2, 6, 8, dtype=torch.long), r"bring the logits to the grid of the labels in the model"),
        (torch.zeros(2, 3, 4), "class indices, one for each position"),
        (torch.full((2, 3, 4), 5), "label 5 of 5 classes"),
        (torch.zeros(2, dtype=torch.long), "one row of each position first, for maps"),
    ],
)
def test_labels_that_do_not_fit_a_map_are_refused(target: Tensor, says: str) -> None:
    with pytest.raises(LossError, match=says):
        CE(draw(2, 5, 3, 4), target)


class Dense(nn.Module):
    """Maps of logits, at the image's size over `stride`."""

    def __init__(self, classes: int, stride: int) -> None:
        super().__init__()
        self.layer = nn.Conv2d(3, classes, stride, stride)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return {"out": self.layer(images)}


@pytest.mark.parametrize(("grid", "size"), [("smaller", 4), ("student", 8), ("teacher", 4)])
def test_grids_and_classes_of_both_models_may_differ(grid: Any, size: int) -> None:
    torch.manual_seed(0)
    student, teacher, images = Dense(3, 2), Dense(5, 4), draw(2, 3, 16, 16)
    objective = Objective("logits", options={"dense": True}, student="[out]", teacher="[out]", grid=grid)
    distiller = Distiller(student, teacher, objective, student_input=SIZE, class_map=[4, 0, 2])
    ours, theirs = student(images)["out"], teacher(images)["out"][:, [4, 0, 2]]
    ours = F.avg_pool2d(ours, 2) if size == 4 else ours
    theirs = F.interpolate(theirs, (8, 8), mode="bilinear") if size == 8 else theirs
    torch.testing.assert_close(distiller(images)["loss"], F.mse_loss(ours, theirs))


def test_a_map_where_rows_are_read_is_refused_with_the_page() -> None:
    outputs = Objective("soft_targets", student="[out]", teacher="[out]")
    with pytest.raises(AdapterError, match=r"logits of every pixel are for the library \(docs/segmentation.md\)"):
        Distiller(Dense(5, 2), Dense(5, 4), outputs, student_input=SIZE)
    dense = Objective("soft_targets", options={"dense": True})
    with pytest.raises(AdapterError, match="leave `dense` out for one row of classes"):
        Distiller(
            nn.Sequential(nn.Flatten(), nn.Linear(768, 5)),
            nn.Sequential(nn.Flatten(), nn.Linear(768, 5)),
            dense,
            student_input=SIZE,
        )


@pytest.mark.parametrize("dense", ["", ", dense: true"])
def test_a_recipe_whose_student_gives_a_map_is_refused_with_the_page(dense: str) -> None:
    text = TINY.replace("soft_targets, ", f"soft_targets{dense}, student: blocks.1, ").replace("baseline: true\n", "")
    text = text.replace("student: blocks.1", "student: patch_embed.proj")
    with pytest.raises(RecipeError, match=r"docs/segmentation.md"):
        plan(parse(text))


def test_the_page_trains_a_step() -> None:
    page = (Path(__file__).parents[2] / "docs" / "segmentation.md").read_text(encoding="utf-8")
    names: dict[str, Any] = {}
    exec(compile(page.split("```python\n")[1].split("```")[0], "segmentation.md", "exec"), names)
    result = names["distiller"](names["images"], names["labels"])
    assert result["loss"].isfinite()
    assert result["output"].shape == (4, 5, 64, 64)
