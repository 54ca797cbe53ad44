"""What both models see: how images are normalised and sized for each, and what is refused of a step's inputs."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from probe_kd.engine.spec import InputSpec, Tap, Trace
from probe_kd.engine.tracing import trace
from probe_kd.errors import LossError, TraceError
from probe_kd.methods.adapters import ImageView


def resolve_inputs(
    student: nn.Module, teacher: nn.Module | None, given: InputSpec, wanted: InputSpec | None
) -> tuple[InputSpec, InputSpec | None]:
    """How images are normalised for both: as was said, or as timm's config on the model says.

    Raises LossError where one of them says it and the other does not: what the teacher then saw would be a guess.
    """
    student_input = given.filled(student)
    teacher_input = (wanted or InputSpec(given.size)).filled(teacher)
    if teacher is not None and student_input.complete != teacher_input.complete:
        side, model = ("student", student) if teacher_input.complete else ("teacher", teacher)
        raise LossError(
            f"nothing says how images are normalised for the {side}, {type(model).__name__}, which has no timm config, "
            f"and for the other model it is known; give {side}_input=InputSpec({given.size}, mean, std), with 0.0 and "
            "1.0 for images in [0, 1]"
        )
    return student_input.or_plain(), wanted and teacher_input.or_plain()


def own_input(teacher: nn.Module, given: InputSpec, known: Trace) -> InputSpec:
    own = InputSpec(known.input_size).filled(teacher)
    return own if own.complete else InputSpec(known.input_size, given.mean, given.std)


def trace_teacher(teacher: nn.Module, wanted: InputSpec | None, given: InputSpec, *, training: bool) -> Trace:
    if wanted is not None:
        return trace(teacher, wanted.size, training=training)
    try:
        return trace(teacher, given.size[1:], training=training)
    except TraceError:
        return trace(teacher, training=training)  # built for one size, which is not the student's


def view_of_teacher(given: InputSpec, wanted: InputSpec, *, one_image: bool) -> ImageView:
    """How the teacher sees images that are `given`; LossError where both must see `one_image` and do not."""
    if one_image and (wanted.mean, wanted.std, wanted.size) != (given.mean, given.std, given.size):
        raise LossError(
            f"a shared trunk sees one image: the student expects {given} and the teacher {wanted}; give both the "
            "same size, mean and std"
        )
    return ImageView(given, wanted)


class AsTraced(nn.Module):
    """Images of the size that the student was traced at, and no other: the teacher's view would not be the same."""

    def __init__(self, size: tuple[int, int, int]) -> None:
        super().__init__()
        self.size = size

    def forward(self, images: Tensor) -> Tensor:
        if tuple(images.shape[1:]) != self.size:
            raise LossError(
                f"the images are {'x'.join(map(str, images.shape[1:]))}, and the student was traced at "
                f"{'x'.join(map(str, self.size))}; give student_input=InputSpec({tuple(images.shape[1:])}, mean, std)"
            )
        return images


def check_images(images: Tensor, channels: int) -> None:
    """LossError for what is no batch of normalised images of so many channels."""
    if not isinstance(images, Tensor):
        raise LossError(
            f"the images are a {type(images).__name__}; expected a torch.Tensor (torch.from_numpy(...).float())"
        )
    if not images.is_floating_point():
        raise LossError(
            f"the images are {images.dtype}; expected floats, normalised: `((images / 255) - mean) / std` of pixels"
        )
    if images.ndim != 4 or images.shape[1] != channels or not images.numel():
        raise LossError(
            f"the images are {'x'.join(map(str, images.shape))}; expected batch x {channels} x height x width. Grey "
            "images are not taken as three channels: give `images.expand(-1, 3, -1, -1)`, or a student_input of one"
        )


def check_type(images: Tensor, side: str, model: nn.Module) -> None:
    """LossError for floats that no parameter of the model has, unless autocast brings them together."""
    if any(parameter.dtype == images.dtype for parameter in model.parameters()):
        return
    found = next((p.dtype for p in model.parameters() if p.is_floating_point()), images.dtype)
    if found != images.dtype and (
        torch.float64 in (found, images.dtype) or not torch.is_autocast_enabled(images.device.type)
    ):
        mend = {torch.float32: "images.float()", torch.float64: "images.double()"}.get(found, f"images.to({found})")
        raise LossError(
            f"the images are {images.dtype}, and the {side} is not, but {found}; give `{mend}`"
            + (f", or bring both models to one type (`distiller.to({images.dtype})`)" if side == "teacher" else "")
            + (f", under `torch.autocast` to compute in {images.dtype}" if images.dtype.itemsize == 2 else "")
        )


def check_finite_images(images: Tensor) -> None:
    """LossError for images that hold NaN or infinity. A GPU has to be waited for to read it."""
    wrong = ~images.isfinite()
    if wrong.any():
        row = int(wrong.flatten(1).any(1).nonzero()[0])
        raise LossError(
            f"image {row} of the batch holds {images[wrong][0].item()}, and every loss of it would be no number; "
            "expected finite numbers. Look at how it is read and normalised (a std of 0, say)"
        )


def check_gradients(features: Mapping[Tap, Tensor], student: nn.Module) -> None:
    """LossError for features of the student that no gradient can pass, though some of the student trains."""
    lost = [str(tap) or "output" for tap, feature in features.items() if not feature.requires_grad]
    if lost and any(parameter.requires_grad for parameter in student.parameters()):
        raise LossError(
            f"no gradient reaches the student through {', '.join(map(repr, lost))}: all before it is frozen, or it "
            "was computed without gradients (reentrant checkpointing: `use_reentrant=False`; `no_grad`; `detach`). "
            "Train what leads to it, or tap another layer; with all of the student frozen, adapters alone learn"
        )


@contextmanager
def explaining_one_image() -> Iterator[None]:
    """Turn torch's error of a norm whose map is 1x1, where one image is alone, into a LossError."""
    try:
        yield
    except ValueError as refusal:
        if "more than 1 value per channel" not in str(refusal):
            raise
        raise LossError(
            "the images are a batch of one, and a batch norm in training has one value for each channel of it, "
            "whose variance is 0: give batches of 2 at least (`batch_size`, or `DataLoader(..., "
            "drop_last=True)`), larger images, or call eval() on the norm"
        ) from None
