"""Every loss of extreme numbers has a finite value and finite gradients, or says why not."""

from collections.abc import Callable
from functools import partial
from typing import Any

import equations
import pytest
import torch
from golden_losses import golden, inputs_of, loss_of, names
from torch import Tensor, nn

from probe_kd.errors import LossError
from probe_kd.methods.losses.calling import call_loss
from probe_kd.methods.losses.table import LOSSES

CONTENTS: dict[str, Callable[[Tensor], Tensor]] = {
    **equations.CONTENTS,
    "tiny": lambda it: 1e-20 * it,
    "large": lambda it: 1e4 * it,
    "huge": lambda it: 1e15 * it,
}
SIDES = [(ours, theirs) for ours in CONTENTS for theirs in CONTENTS]
KINDS = [(torch.float32, SIDES)] + [
    (dtype, [(name, "drawn") for name in CONTENTS] + [(name, name) for name in CONTENTS])
    for dtype in (torch.float16, torch.bfloat16)
]


def filled(given: Any, content: str, dtype: torch.dtype) -> Any:
    if isinstance(given, tuple):
        return tuple(filled(part, content, dtype) for part in given)
    return CONTENTS[content](given).to(dtype) if given.is_floating_point() else given


def parts(given: Any) -> tuple[Tensor, ...]:
    return given if isinstance(given, tuple) else (given,)


def refusal(name: str, case: Any, sides: tuple[str, str], dtype: torch.dtype, batch: int | None = None) -> str | None:
    """Call a loss on these contents, and return why it refuses them, if it does. Values and gradients are finite."""
    given = inputs_of(case)
    if batch is not None:
        given = tuple(tuple(it[:batch] for it in part) if isinstance(part, tuple) else part[:batch] for part in given)
    compared = 1 if LOSSES[name].reads == "labels" else 2
    student, *others = (filled(part, content, dtype) for part, content in zip(given[:compared], sides, strict=False))
    if not all(it.isfinite().all() for it in (*parts(student), *(it for side in others for it in parts(side)))):
        return None  # 1e15 in float16
    leaves = tuple(it.requires_grad_() for it in parts(student))
    loss, parameters = loss_of(name, case), tuple[Tensor, ...]()
    if isinstance(loss, nn.Module):
        parameters = tuple(it for it in loss.float().parameters() if it.requires_grad)
        loss = partial(call_loss, loss, name, block_gradient=True)
    try:
        value = loss(leaves if isinstance(student, tuple) else leaves[0], *others, *given[compared:])
    except LossError as reason:
        return str(reason)
    assert value.isfinite(), (sides, dtype)
    for gradient in torch.autograd.grad(value, (*leaves, *parameters), allow_unused=True):
        # One that is larger than float16 holds is for the loss scale of a step, which skips it.
        assert gradient is None or gradient.isfinite().all() or ("large" in sides and dtype == torch.float16), sides
    return None


@pytest.mark.parametrize("name", names())
def test_every_loss_of_extreme_numbers_is_finite_or_says_why_not(name: str) -> None:
    case = {"seed": 0, **golden(name)["example"]}
    for dtype, contents in KINDS:
        for sides in contents:
            reason = refusal(name, case, sides, dtype)
            is_large = any(side == "huge" or "large" in side for side in sides)
            assert reason is None or ("larger than" in reason and is_large), (sides, dtype, reason)


@pytest.mark.parametrize("name", [name for name in names() if "temperature" in LOSSES[name].options])
@pytest.mark.parametrize("temperature", [0.01, 1000.0])
def test_every_temperature_gives_finite_numbers(name: str, temperature: float) -> None:
    example = golden(name)["example"]
    case = {"seed": 0, **example, "options": {**example.get("options", {}), "temperature": temperature}}
    for content in CONTENTS:
        for sides in ((content, "drawn"), ("drawn", content)):
            reason = refusal(name, case, sides, torch.float32)
            assert reason is None or "larger than" in reason, (sides, reason)


@pytest.mark.parametrize("name", names())
def test_a_batch_of_one_image_has_finite_numbers_or_is_refused_in_words(name: str) -> None:
    reason = refusal(name, {"seed": 0, **golden(name)["example"]}, ("drawn", "drawn"), torch.float32, batch=1)
    assert reason is None or "image" in reason
