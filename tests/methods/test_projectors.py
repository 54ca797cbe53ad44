"""Projectors, grids and parts of tokens: by the equations, in every layout, and with everything that moves modules."""

import copy
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_adapters import KINDS, Kind, feature
from torch import Tensor, nn

from probe_kd import Distiller, FeatureSpec, InputSpec, Layout, Objective, Tap, adapt, trace
from probe_kd.errors import AdapterError, LossError
from probe_kd.methods.adapters import adapt_maps
from probe_kd.methods.projectors import Mlp, OrthogonalProjection
from probe_kd.methods.targets import expanded

SPATIAL = [kind for kind in KINDS if kind[0] is not Layout.NC]


@pytest.mark.parametrize("widths", [(6, 10), (10, 6), (8, 8)], ids=str)
def test_an_orthogonal_projector_is_orthonormal_whatever_its_weight_and_learns(widths: tuple[int, int]) -> None:
    torch.manual_seed(0)
    projector = OrthogonalProjection(*widths)
    width, target = widths
    inputs, aim = torch.randn(64, width), torch.linalg.qr(torch.randn(64, 64)).Q[:, :target] * 3
    optimizer = torch.optim.AdamW(projector.parameters(), lr=0.05, weight_decay=0.1)
    losses = []
    for _ in range(30):
        loss = F.mse_loss(projector(inputs), aim)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        matrix = projector.matrix.detach().double().numpy()
        assert matrix.shape == (target, width)
        fewer = matrix @ matrix.T if target <= width else matrix.T @ matrix
        np.testing.assert_allclose(fewer, np.eye(min(widths)), atol=1e-5)
    assert losses[-1] < 0.98 * losses[0]
    before = projector.matrix
    with torch.no_grad():
        projector.weight *= 0.3  # what weight decay does
    torch.testing.assert_close(projector.matrix, before)


def test_the_gradient_of_an_orthogonal_projector_is_that_of_its_equation() -> None:
    torch.manual_seed(0)
    projector = OrthogonalProjection(3, 5).double()
    inputs = torch.randn(4, 3, 2, dtype=torch.float64)

    def projected(weight: Tensor) -> Tensor:
        out: Tensor = torch.func.functional_call(projector, {"weight": weight}, (inputs,))
        return out

    assert torch.autograd.gradcheck(projected, (projector.weight.detach().requires_grad_(),))


def test_an_mlp_is_two_layers_at_every_position() -> None:
    torch.manual_seed(0)
    projector = Mlp(4, 7)
    map_ = torch.randn(2, 4, 3, 5)
    first, norm, _, last = projector.layers
    rows = map_.permute(0, 2, 3, 1)
    hidden = F.gelu(F.layer_norm(rows @ first.weight.T + first.bias, (7,), norm.weight, norm.bias))
    torch.testing.assert_close(projector(map_), (hidden @ last.weight.T + last.bias).permute(0, 3, 1, 2))


@pytest.mark.parametrize("projector", ["mlp", "orthogonal"])
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_projectors_take_every_layout_and_say_what_they_are(kind: Kind, projector: Any) -> None:
    spec, student, *_ = feature(kind, (4, 6), 6, 1)
    other, teacher, *_ = feature((Layout.NLC, 1), (4, 6), 9, 2)
    adapter = adapt(spec, other, projector=projector)
    projected, target = adapter(student, teacher)
    assert projected.shape == target.shape
    assert {"mlp": "mlp 6->9->9", "orthogonal": "orthogonal 6->9"}[projector] in str(adapter)
    projected.square().sum().backward()
    assert all(parameter.grad is not None for parameter in adapter.parameters())
    loaded = adapt(spec, other, projector=projector)
    loaded.load_state_dict(adapter.state_dict())
    for copied in (loaded, copy.deepcopy(adapter)):
        assert torch.equal(copied(student, teacher)[0], projected)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(adapter(student, teacher)[0].float(), projected, atol=0.1, rtol=0.1)


@pytest.mark.parametrize("projector", ["mlp", "orthogonal"])
def test_projectors_are_compiled(projector: Any) -> None:
    spec, student, *_ = feature((Layout.NCHW, 0), (4, 6), 6, 1)
    adapter = adapt(spec, feature((Layout.NCHW, 0), (4, 6), 9, 2)[0], projector=projector)
    target = torch.randn(3, 9, 4, 6)

    def loss(feature: Tensor) -> Tensor:
        return F.mse_loss(adapter.student_steps(feature), target)

    torch.compiler.reset()
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)(student)
    torch.testing.assert_close(compiled, loss(student))
    compiled.backward()  # torch's fails where the two orders of axes differ


@pytest.mark.parametrize("grid", ["smaller", "student", "teacher"])
@pytest.mark.parametrize("grids", [((4, 6), (8, 12)), ((7, 5), (3, 4)), ((6, 4), (4, 6)), ((5, 5), (5, 5))], ids=str)
@pytest.mark.parametrize("projector", ["linear", "mlp", "orthogonal"])
def test_both_sides_come_to_the_grid_that_is_named(projector: Any, grids: Any, grid: Any) -> None:
    """Raised by torch's own interpolation; the student's after its projector."""
    common = {"smaller": tuple(map(min, *grids)), "student": grids[0], "teacher": grids[1]}[grid]
    for kind in SPATIAL:
        spec, student, value, _ = feature(kind, grids[0], 6, 1)
        other, teacher, other_value, _ = feature(SPATIAL[-1], grids[1], 9, 2)
        adapter = adapt(spec, other, grid=grid, projector=projector)
        projected, target = adapter(student, teacher)
        assert projected.shape == target.shape == (3, 9, *common)
        if all(size >= own for size, own in zip(common, grids[1], strict=True)):
            expected = F.interpolate(torch.from_numpy(other_value), common, mode="bilinear")
            torch.testing.assert_close(target, expected)
        if all(size >= own for size, own in zip(common, grids[0], strict=True)):
            layer = next(step for step in adapter.student_steps if step.state_dict())
            raised = F.interpolate(layer(torch.from_numpy(value)), common, mode="bilinear")
            torch.testing.assert_close(projected, raised)
        maps = adapt_maps(spec, other, grid=grid)(student, teacher)
        assert [tuple(map_.shape[2:]) for map_ in maps] == [common, common]


def test_a_grid_has_no_meaning_for_the_regressor_of_fitnets() -> None:
    specs = [feature((Layout.NCHW, 0), grid, 6, 1)[0] for grid in ((8, 8), (4, 4))]
    with pytest.raises(AdapterError, match="grid 'teacher' means nothing; leave it out, or use projector 'linear'"):
        adapt(specs[0], specs[1], projector="valid", grid="teacher")
    with pytest.raises(AdapterError, match="grid 'larger': expected one of 'smaller', 'student', 'teacher'"):
        adapt(specs[0], specs[1], grid="larger")  # type: ignore[arg-type]


class Tokens(nn.Module):
    """A layer of tokens with so many class tokens on a 4x4 grid, and its mean."""

    def __init__(self, width: int, prefix: int) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, width, 7, stride=7)
        self.prefix = nn.Parameter(torch.randn(1, prefix, width))
        self.layer = nn.Linear(width, width)
        self.head = nn.Linear(width, 3)

    def forward(self, images: Tensor) -> Tensor:
        patches = self.patch(images).flatten(2).transpose(1, 2)
        tokens = self.layer(torch.cat([self.prefix.expand(len(images), -1, -1), patches], 1))
        logits: Tensor = self.head(tokens.mean(1))
        return logits


IMAGES = torch.randn(5, 3, 28, 28, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("prefixes", [(1, 1), (1, 2), (0, 1), (0, 0)], ids=str)
def test_all_tokens_are_two_terms_with_an_adapter_each(prefixes: tuple[int, int]) -> None:
    torch.manual_seed(0)
    student, teacher = (Tokens(width, prefix) for width, prefix in zip((6, 8), prefixes, strict=True))
    size = InputSpec((3, 28, 28))
    objective = Objective("hint", pairs={"layer": "layer", "head": "head"}, tokens="all", normalize="layer")
    distiller = Distiller(student, teacher, objective, student_input=size)
    vector = "class token" if any(prefixes) else "mean"
    assert [str(comparison) for _, comparison, _ in distiller.plan] == [
        f"layer <- layer, {vector}",
        "layer <- layer, grid",
        "head <- head",
    ]
    parts = []
    for tokens in ("cls" if any(prefixes) else "pool", "drop"):
        one = Objective("hint", pairs={"layer": "layer"}, tokens=tokens, normalize="layer")  # type: ignore[arg-type]
        alone = Distiller(student, teacher, one, student_input=size)
        alone.adapters["hint_"][0].load_state_dict(distiller.adapters["hint_"][len(parts)].state_dict())  # type: ignore[index]
        parts.append(alone(IMAGES)["loss"])
        alone.close()
    head = Distiller(student, teacher, Objective("hint", pairs={"head": "head"}, normalize="layer"), student_input=size)
    head.adapters["hint_"][0].load_state_dict(distiller.adapters["hint_"][2].state_dict())  # type: ignore[index]
    parts.append(head(IMAGES)["loss"])
    torch.testing.assert_close(distiller(IMAGES)["loss"], sum(parts))


def test_all_tokens_of_one_pair_and_where_they_mean_nothing() -> None:
    traces = [trace(Tokens(width, 1), (3, 28, 28)) for width in (6, 8)]
    objective = expanded(Objective("hint", pairs={"layer": "layer"}, tokens="all"), *traces)
    assert expanded(objective, *traces) is objective
    with pytest.raises(LossError, match="`tokens` means nothing for 'attention', which compares maps"):
        Objective("attention", pairs={"layer": "layer"}, tokens="all")
    spec = FeatureSpec(Tap("x"), Layout.NC, (2, 4), 4)
    with pytest.raises(AdapterError, match="needs an adapter for class tokens and one for grids"):
        adapt(spec, spec, tokens="all")
