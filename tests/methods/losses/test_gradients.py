"""What losses that compute their gradient with their value have to do all the same: compile, and be differentiated."""

from functools import partial
from typing import Any

import pytest
import torch
from equations import draw
from torch import Tensor

from probe_kd.errors import LossError
from probe_kd.methods.losses import relations
from probe_kd.methods.losses.table import LOSSES

OF_LOGITS = [name for name, loss in LOSSES.items() if loss.reads in ("labels", "outputs") and not loss.builds_module]

OF_LAYERS = [
    name for name, loss in LOSSES.items() if loss.reads in ("features", "maps", "vectors") and not loss.builds_module
]

OF_UNIT_VECTORS = {"pkd", "ickd", "nst", "sp", "pkt", "cc", "gram_tokens"}


def sides_of(name: str) -> list[Tensor]:
    """The student's logits, and targets."""
    loss, student, teacher = LOSSES[name], draw(4, 5, seed=0), draw(4, 5, seed=1)
    labels = (teacher > 0).double() if loss.multilabel else torch.tensor([4, 0, 2, 2])
    if loss.reads == "labels":
        return [student, labels]
    return [student, teacher, *([labels] if loss.also else [])]


def gradients(function: Any, sides: list[Tensor]) -> tuple[Tensor | None, ...]:
    leaves = [side.clone().requires_grad_(side.is_floating_point()) for side in sides]
    value = function(*leaves)
    return value, *torch.autograd.grad(value, [leaf for leaf in leaves if leaf.requires_grad], allow_unused=True)


@pytest.mark.parametrize("name", ["cross_entropy", "logits", "soft_targets", "multilabel_soft_targets", "dist"])
def test_a_compiled_loss_of_logits_is_one_graph(name: str) -> None:
    torch._dynamo.reset()
    function = partial(LOSSES[name].function, block_gradient=False)
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(gradients(compiled, sides_of(name)), gradients(function, sides_of(name)))


@pytest.mark.parametrize("name", OF_LOGITS)
def test_a_gradient_can_be_differentiated_or_says_that_it_cannot(name: str) -> None:
    student, *targets = sides_of(name)

    def of_both(own: Tensor, *others: Tensor) -> Tensor:
        value: Tensor = LOSSES[name].function(own, *others, *targets[len(others) :], block_gradient=False)
        return value

    learning = (student, *targets[:1]) if LOSSES[name].reads == "outputs" and name != "hard_labels" else (student,)
    leaves = tuple(side.requires_grad_() for side in learning)
    if name == "dist":
        with pytest.raises(LossError, match="leave out `create_graph`"):
            torch.autograd.grad(of_both(*leaves), leaves, create_graph=True)
        return
    assert torch.autograd.gradcheck(of_both, leaves)
    assert torch.autograd.gradgradcheck(of_both, leaves)


@pytest.mark.parametrize("name", OF_LAYERS)
def test_a_gradient_of_layers_can_be_differentiated_or_says_that_it_cannot(name: str) -> None:
    shape = (3, 4) if LOSSES[name].reads == "vectors" else (2, 3, 2, 2)
    student, teacher = draw(*shape, seed=0).requires_grad_(), draw(*shape, seed=1)

    def check() -> bool:
        passed: bool = torch.autograd.gradgradcheck(lambda own: LOSSES[name].function(own, teacher), student)
        return passed

    if name in OF_UNIT_VECTORS:
        with pytest.raises(LossError, match="leave out `create_graph`"):
            check()
    else:
        assert check()


def test_a_gradient_that_is_known_in_parts_can_be_differentiated(monkeypatch: pytest.MonkeyPatch) -> None:
    original = relations.in_parts
    monkeypatch.setattr(relations, "in_parts", lambda *sides, largest, **given: original(*sides, largest=30, **given))
    student, teacher = draw(4, 3, seed=0).requires_grad_(), draw(4, 5, seed=1)
    assert torch.autograd.gradgradcheck(lambda own: relations.rkd(own, teacher), student)


def test_no_label_counts_as_one_to_ignore_unless_it_is_set() -> None:
    with pytest.raises(LossError, match="label -100 of 5 classes"):
        LOSSES["cross_entropy"].function(draw(2, 5, seed=0), torch.tensor([1, -100]), label_smoothing=0.1)
