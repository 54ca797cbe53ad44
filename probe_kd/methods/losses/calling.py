"""How a loss is called: in float32, outside autocast, with the gradient block, and its errors explained."""

import traceback
from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from math import isfinite
from pathlib import Path
from typing import Any, ParamSpec

import torch
from torch import Tensor

from probe_kd.errors import LossError, ProbeKDError
from probe_kd.methods.losses.checks import PLAIN, Compared, check_finite, check_tensors, flat, has_values

P = ParamSpec("P")


def outside_autocast(function: Callable[P, Tensor]) -> Callable[P, Tensor]:
    """Run a function of tensors outside autocast."""

    @wraps(function)
    def computed(*args: Any, **kwargs: Any) -> Tensor:  # P.args, made in a compiled step, would fail its guards
        device: str = flat(args[0])[0].device.type
        if not torch.is_autocast_enabled(device):  # entering a context takes longer than a small kernel
            return function(*args, **kwargs)
        with torch.autocast(device, enabled=False):
            return function(*args, **kwargs)

    return computed


def promoted(tensor: Tensor) -> Tensor:
    """The tensor in float32 at least; one of whole numbers as it is."""
    return tensor.float() if tensor.is_floating_point() and tensor.itemsize < 4 else tensor


def loss_function(function: Callable[P, Tensor], *, promote: bool = True) -> Callable[P, Tensor]:
    """Decorate a loss: compute it in float32, and detach all tensors but the first, the student's.

    The decorated loss also takes `block_gradient`; False does not detach. A function with `promote=False` gets its
    tensors as they are, and has to compute in float32 itself. A loss of all pairs takes a tuple of tensors for each
    side.
    """
    blocked = wraps(function)(_guarded(function, function.__name__, promote))
    blocked.loss_function = blocked  # type: ignore[attr-defined]  # `wraps` copies it to a function around this one
    return blocked


def call_loss(
    function: Callable[..., Any],
    name: str,
    student: Compared,
    *targets: Compared,
    options: Mapping[str, Any] | None = None,
    block_gradient: bool = True,
) -> Tensor:
    """Call a custom loss, a function or a module, as `loss_function` calls one of ours.

    Raises LossError if it raises, changes a tensor that it is given, or returns anything but one real number.
    """
    options = options or {}
    if getattr(function, "loss_function", None) is function:
        return _scalar(name, function(student, *targets, block_gradient=block_gradient, **options))

    def explained(*args: Any, **kwargs: Any) -> Tensor:
        if torch.compiler.is_compiling():
            return _scalar(name, function(*args, **kwargs))
        versions = _versions(args)
        try:
            value = function(*args, **kwargs)
        except (ProbeKDError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # of code that is not ours, of any type
            given = ", ".join(str(tuple(tensor.shape)) for side in args for tensor in flat(side))
            raise LossError(f"the loss {name!r} of {given} raised {described(error)}") from error
        _check_unchanged(name, args, versions)
        return _scalar(name, value)

    return _guarded(explained, name)(student, *targets, block_gradient=block_gradient, **options)


def _guarded(function: Callable[..., Any], name: str, promote: bool = True) -> Callable[..., Tensor]:
    """The function of checked tensors, in float32 and outside autocast, with a value that is checked too.

    The loss of some logits takes 200 microseconds, of which ten Python calls are a twentieth. So the usual case, single
    tensors on a CPU, goes through one loop and no calls.
    """

    def guarded(student: Any, *targets: Any, block_gradient: bool = True, **options: Any) -> Tensor:
        device, sides = "cpu", [student, *targets]
        for position, side in enumerate(sides):
            if type(side) not in PLAIN or not side.is_cpu:
                check_tensors(name, student, targets)
                device = flat(student)[0].device.type
                sides = [_read(one, number > 0 and block_gradient, promote) for number, one in enumerate(sides)]
                break
            if side.dtype is not torch.float32:
                if not position and not side.is_floating_point():
                    check_tensors(name, student, targets)
                if promote:
                    side = sides[position] = promoted(side)
            if position and block_gradient and side.requires_grad:
                sides[position] = side.detach()
        if torch.is_autocast_enabled(device):  # entering a context takes longer than a small kernel
            with torch.autocast(device, enabled=False):
                value: Tensor = function(*sides, **options)
        else:
            value = function(*sides, **options)
        if has_values(value) and not isfinite(value.item()):  # on the host: a tensor's own takes several kernels
            check_finite(name, value, student, *targets)
        return value

    return guarded


def _read(side: Any, detached: bool, promote: bool) -> Any:
    """One side as a loss reads it: without its graph, and in float32."""
    if isinstance(side, tuple):
        return tuple(_read(tensor, detached, promote) for tensor in side)
    side = side.detach() if detached else side
    return promoted(side) if promote else side


def _scalar(name: str, value: Any) -> Tensor:
    if not isinstance(value, Tensor):
        raise LossError(f"the loss {name!r} returned a {type(value).__name__}; expected one number, as a torch.Tensor")
    if value.ndim or not value.is_floating_point():
        raise LossError(
            f"the loss {name!r} returned a tensor {tuple(value.shape)} of {value.dtype}; expected one real number: the "
            "mean over the batch, as `.mean()` gives"
        )
    return value


def _versions(sides: Sequence[Any]) -> list[int]:
    """How often each tensor was changed in place. A tensor made in inference mode does not count."""
    return [0 if tensor.is_inference() else tensor._version for side in sides for tensor in flat(side)]


def _check_unchanged(name: str, sides: Sequence[Any], versions: Sequence[int]) -> None:
    """Raise LossError if a loss has changed a tensor, which the other losses read too."""
    if _versions(sides) != versions:
        raise LossError(
            f"the loss {name!r} changes a tensor that it is given, which other losses read too; take a function that "
            "returns a new one (`mul` for `mul_`), or change a `.clone()`"
        )


def described(error: Exception) -> str:
    """The error, and the line of the caller's code that caused it."""
    all_frames = traceback.extract_tb(error.__traceback__)
    own_frames = [frame for frame in all_frames if "site-packages" not in frame.filename]  # torch only noticed it
    frames = own_frames or all_frames
    place = f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {' '.join(str(error).split())}{place}"
