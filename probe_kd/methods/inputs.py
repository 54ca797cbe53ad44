"""The inputs of both models: how images are normalised and sized for each, and the checks of a step's inputs."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from probe_kd.engine.spec import InputSpec, Tap, Trace, Traces
from probe_kd.engine.tracing import trace
from probe_kd.errors import LossError, TraceError
from probe_kd.methods.adapters import ImageView


def resolve_inputs(
    student: nn.Module,
    teachers: Mapping[str, nn.Module],
    student_input: InputSpec,
    teacher_inputs: Mapping[str, InputSpec],
) -> tuple[InputSpec, dict[str, InputSpec]]:
    """Fill in the normalisation of all inputs from the models' timm configs, where it is not given.

    Raises LossError if the normalisation of only one of the student and a teacher is known: that of the other would be
    a guess.
    """
    filled_student_input = student_input.filled(student)
    filled_teacher_inputs: dict[str, InputSpec] = {}
    for name, teacher in teachers.items():
        filled = (teacher_inputs.get(name) or InputSpec(student_input.size)).filled(teacher)
        if filled_student_input.complete != filled.complete:
            unknown = ("student", student) if filled.complete else (f"teacher {name}".strip(), teacher)
            raise LossError(_unknown_normalisation(*unknown, student_input.size))
        if name in teacher_inputs:
            filled_teacher_inputs[name] = filled.or_plain()
    return filled_student_input.or_plain(), filled_teacher_inputs


def _unknown_normalisation(side: str, model: nn.Module, size: tuple[int, int, int]) -> str:
    kind, _, name = side.partition(" ")
    spec = f"InputSpec({size}, mean, std)"
    argument = f"{kind}_input={f'{{{name!r}: {spec}}}' if name else spec}"
    return (
        f"nothing says how images are normalised for the {side}, {type(model).__name__}, which has no timm config, "
        f"and for the other model it is known; give {argument}, with 0.0 and 1.0 for images in [0, 1]"
    )


def input_of_traced(teacher: nn.Module, student_input: InputSpec, teacher_trace: Trace) -> InputSpec:
    """The input of a teacher for which none is given."""
    own = InputSpec(teacher_trace.input_size).filled(teacher)
    return own if own.complete else InputSpec(teacher_trace.input_size, student_input.mean, student_input.std)


def trace_teachers(
    teachers: Mapping[str, nn.Module],
    inputs: Mapping[str, InputSpec],
    traces: Mapping[str, Trace],
    student_input: InputSpec,
    *,
    training: bool,
) -> Traces:
    """The traces that are given, and those of the other teachers."""
    return Traces(
        {
            name: traces.get(name) or _trace_teacher(teacher, inputs.get(name), student_input, training=training)
            for name, teacher in teachers.items()
        }
    )


def _trace_teacher(
    teacher: nn.Module, teacher_input: InputSpec | None, student_input: InputSpec, *, training: bool
) -> Trace:
    if teacher_input is not None:
        return trace(teacher, teacher_input.size, training=training)
    try:
        return trace(teacher, student_input.size[1:], training=training)
    except TraceError:
        return trace(teacher, training=training)  # built for one size, which is not the student's


def view_of_teacher(student_input: InputSpec, teacher_input: InputSpec, *, one_image: bool) -> ImageView:
    """The view that converts the student's images to the teacher's.

    Raises LossError if both models have to see `one_image`, and their inputs differ.
    """
    if one_image and teacher_input != student_input:
        raise LossError(
            f"a shared trunk sees one image: the student expects {student_input} and the teacher {teacher_input}; give "
            "both the same size, mean and std"
        )
    return ImageView(student_input, teacher_input)


class AsTraced(nn.Module):
    """Pass on images of the size at which the student was traced, and raise LossError for any other size.

    At another size, student and teacher would not see the same view.
    """

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
    """Raise LossError unless `images` is a batch of normalised images with `channels` channels."""
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
    """Raise LossError if the images have another dtype than the model, unless autocast converts them."""
    if any(parameter.dtype == images.dtype for parameter in model.parameters()):
        return
    model_dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), images.dtype)
    if model_dtype != images.dtype and (
        torch.float64 in (model_dtype, images.dtype) or not torch.is_autocast_enabled(images.device.type)
    ):
        conversion = {torch.float32: "images.float()", torch.float64: "images.double()"}.get(
            model_dtype, f"images.to({model_dtype})"
        )
        raise LossError(
            f"the images are {images.dtype}, and the {side} is not, but {model_dtype}; give `{conversion}`"
            + (f", or bring both models to one type (`distiller.to({images.dtype})`)" if side == "teacher" else "")
            + (f", under `torch.autocast` to compute in {images.dtype}" if images.dtype.itemsize == 2 else "")
        )


def check_finite_images(images: Tensor) -> None:
    """Raise LossError for images that hold NaN or infinity. On a GPU, this waits for the values."""
    wrong = ~images.isfinite()
    if wrong.any():
        row = int(wrong.flatten(1).any(1).nonzero()[0])
        raise LossError(
            f"image {row} of the batch holds {images[wrong][0].item()}, and every loss of it would be no number; "
            "expected finite numbers. Look at how it is read and normalised (a std of 0, say)"
        )


def check_gradients(features: Mapping[Tap, Tensor], student: nn.Module) -> None:
    """Raise LossError for features of the student that carry no gradient, if any of its parameters trains."""
    constant = [str(tap) or "output" for tap, feature in features.items() if not feature.requires_grad]
    if constant and any(parameter.requires_grad for parameter in student.parameters()):
        raise LossError(
            f"no gradient reaches the student through {', '.join(map(repr, constant))}: all before it is frozen, or "
            "it was computed without gradients (reentrant checkpointing: `use_reentrant=False`; `no_grad`; `detach`). "
            "Train what leads to it, or tap another layer; with all of the student frozen, adapters alone learn"
        )


@contextmanager
def explaining_one_image() -> Iterator[None]:
    """Turn torch's error for a batch norm of a single image with a 1x1 map into a LossError."""
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
