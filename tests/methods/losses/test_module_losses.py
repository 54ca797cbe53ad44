"""Losses with parameters and buffers, against their equations in float64: value, and gradient of everything trained."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from math import ceil
from threading import Barrier, local
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from probe_kd.engine.spec import FeatureSpec, Layout, Tap
from probe_kd.errors import LossError
from probe_kd.methods.losses.calling import call_loss
from probe_kd.methods.losses.checks import check_finite
from probe_kd.methods.losses.learned import MGD, RSD, SRRL, VID
from probe_kd.methods.losses.memories import CRD, PatchSimilarityQueue
from probe_kd.methods.losses.review import ReviewKD

Shape = tuple[int, ...]


def spec(shape: Shape, order: int = 0, activation: str = "") -> FeatureSpec:
    layout, grid = (Layout.NCHW, (shape[2], shape[3])) if len(shape) == 4 else (Layout.NC, None)
    return FeatureSpec(Tap("layer"), layout, shape, shape[1], grid, order=order, activation=activation)


def numbers(shape: Shape, seed: int, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(shape, generator=generator, dtype=torch.float64)


def with_random_parameters(module: nn.Module, seed: int = 7) -> nn.Module:
    for place, parameter in enumerate(module.parameters()):
        start = 1.0 if "norm" in type(module).__name__.lower() else 0.0
        parameter.data = start + numbers(tuple(parameter.shape), seed + place, 0.3)
    return module.double().train()


def relative(ours: Tensor, reference: Tensor) -> float:
    difference, size = (ours - reference).detach().double().norm(), reference.detach().double().norm()
    return float(difference / size) if size else float(difference)


def assert_agree(module: nn.Module, reference: Callable[..., Tensor], inputs: Sequence[Any], first: int = 1) -> None:
    """Compare value and gradient in float64 and in float32. The first inputs get a gradient, the others are targets."""
    leaves = [tensor.requires_grad_() for tensor in inputs[:first]]
    state = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 2e-4)):
        values, gradients = [], []
        for function, kind in ((module, dtype), (reference, torch.float64)):
            module.load_state_dict(state)
            module.to(kind)
            torch.manual_seed(3)
            cast = [tensor.to(kind) if tensor.is_floating_point() else tensor for tensor in inputs]
            value = function(*cast)
            trained = [leaf for leaf in (*leaves, *module.parameters()) if leaf.requires_grad]
            gradients.append(torch.autograd.grad(value, trained, allow_unused=True, materialize_grads=True))
            values.append(value.detach())
        assert relative(values[0], values[1]) < tolerance
        for name, ours, expected in zip(["inputs"] * first + list(state), *gradients, strict=False):
            scale = max(float(gradient.double().norm()) for gradient in gradients[1])
            assert float((ours.double() - expected).norm()) < tolerance * scale, name
    module.double().load_state_dict(state)


def vid_reference(module: VID) -> Callable[..., Tensor]:
    def value(student: Tensor, teacher: Tensor) -> Tensor:
        total = student.new_zeros(())
        for channel, alpha in enumerate(module.alpha):
            variance = torch.log(1 + torch.exp(alpha)) + module.eps
            distance = (teacher[:, channel] - student[:, channel]) ** 2
            total = total + (torch.log(variance.sqrt()) + distance / (2 * variance)).sum()
        return total / (student.numel() if module.reduction == "mean" else len(student))

    return value


def mgd_reference(module: MGD) -> Callable[..., Tensor]:
    def value(student: Tensor, teacher: Tensor) -> Tensor:
        if student.ndim == 2:
            student, teacher = student[:, :, None, None], teacher[:, :, None, None]
        batch, channels, height, width = student.shape
        if module.mask == "tokens":
            places = height * width
            noise = torch.rand(batch, 1, height, width).view(batch, places)
            shown = noise.topk(int(places * (1 - module.ratio)), largest=False).indices
            visible = torch.zeros(batch, places).scatter(1, shown, 1.0).view(batch, 1, height, width)
        else:
            shape = (batch, channels, 1, 1) if module.mask == "channels" else (batch, 1, height, width)
            visible = (torch.rand(shape) >= module.ratio).double()
        first, second = module.generator[0], module.generator[2]
        feature = student * visible + (0 if module.token is None else module.token * (1 - visible))
        for layer, last in ((first, False), (second, True)):
            pad = layer.weight.shape[-1] // 2
            columns = F.unfold(feature, layer.weight.shape[-2:], padding=pad)
            product = layer.weight.flatten(1) @ columns + layer.bias[:, None]
            feature = product.view(batch, channels, height, width)
            feature = feature if last else feature.clamp_min(0)
        error = (feature - teacher) ** 2
        if module.mask == "tokens":
            error = error * (1 - visible)
            count = (1 - visible).sum() * channels
        else:
            count = torch.tensor(error.numel())
        return error.sum() / (count if module.reduction == "mean" else batch)

    return value


def standardised(rows: Tensor, norm: nn.Module, axes: Sequence[int]) -> Tensor:
    mean = rows.mean(tuple(axes), keepdim=True)
    variance = ((rows - mean) ** 2).mean(tuple(axes), keepdim=True)
    shape = mean.shape
    return (rows - mean) / (variance + norm.eps).sqrt() * norm.weight.view(shape) + norm.bias.view(shape)


def srrl_reference(module: SRRL, relu: bool) -> Callable[..., Tensor]:
    def value(student: Tensor, teacher: Tensor) -> Tensor:
        rows = standardised(student, module.norm, [0, *range(2, student.ndim)])
        rows = rows.clamp_min(0) if relu else rows
        v_s, v_t = (side.mean(tuple(range(2, side.ndim))) if side.ndim > 2 else side for side in (rows, teacher))
        weight, bias = module.classifier.weight, module.classifier.bias
        logits = [side @ weight.T + bias for side in (v_s, v_t)]
        between_logits = ((logits[0] - logits[1]) ** 2).sum() / logits[0].numel()
        return module.features * ((v_s - v_t) ** 2).sum() / v_s.numel() + module.logits * between_logits

    return value


def rsd_reference(module: RSD) -> Callable[..., Tensor]:
    def value(student: Tensor, teacher: Tensor) -> Tensor:
        first, norm, _, last = module.head
        hidden = standardised(student @ first.weight.T, norm, [0])
        head = (hidden * (1 + torch.erf(hidden / 2**0.5)) / 2) @ last.weight.T
        z_t = (teacher - teacher.mean(0)) / teacher.std(0, correction=0)
        z_s = (head - head.mean(0)) / (head.std(0, correction=0) + 1e-5)
        total = student.new_zeros(())
        for i in range(z_t.shape[1]):
            for j in range(z_s.shape[1]):
                r = (z_t[:, i] * z_s[:, j]).mean()
                total = total + ((1 - r) ** 2 if i == j else module.kappa * r**2)
        return total / (z_t.shape[1] if module.reduction == "mean" else 1)

    return value


def averaged(map_: Tensor, grid: Sequence[int]) -> Tensor:
    """Each place of the new grid is the mean of the places that it covers, wholly or in part."""
    rows = []
    for y in range(grid[0]):
        top, bottom = y * map_.shape[2] // grid[0], ceil((y + 1) * map_.shape[2] / grid[0])
        row = []
        for x in range(grid[1]):
            left, right = x * map_.shape[3] // grid[1], ceil((x + 1) * map_.shape[3] / grid[1])
            row.append(map_[:, :, top:bottom, left:right].mean((2, 3)))
        rows.append(torch.stack(row, -1))
    return torch.stack(rows, -2)


def review_reference(module: ReviewKD, count: int) -> Callable[..., Tensor]:
    def value(*features: Tensor) -> Tensor:
        maps = [side if side.ndim == 4 else side[:, :, None, None] for side in features]
        student, teacher, residual, total = maps[:count], maps[count:], None, torch.zeros((), dtype=torch.float64)
        for place, fusion in zip(module.order, module.fusions, strict=True):
            fused = torch.einsum("oc,bchw->bohw", fusion.reduce[0].weight[:, :, 0, 0], student[place])
            fused = standardised(fused, fusion.reduce[1], [0, 2, 3])
            if residual is not None:
                residual = averaged(residual, fused.shape[2:])
                layer = fusion.attention[0]
                both = torch.einsum("oc,bchw->bohw", layer.weight[:, :, 0, 0], torch.cat([fused, residual], 1))
                shares = 1 / (1 + torch.exp(-(both + layer.bias[:, None, None])))
                fused = shares[:, :1] * fused + shares[:, 1:] * residual
            residual = fused
            layer, norm = fusion.expand
            resized = averaged(fused, teacher[place].shape[2:])
            output = standardised(F.conv2d(resized, layer.weight, padding=layer.weight.shape[-1] // 2), norm, [0, 2, 3])
            side, weights, errors = min(output.shape[2:]), [1.0], [((output - teacher[place]) ** 2).mean()]
            for level in [level for level in (4, 2, 1) if level < side]:
                weights.append(weights[-1] / 2)
                pooled = [averaged(map_, (level, level)) for map_ in (output, teacher[place])]
                errors.append(((pooled[0] - pooled[1]) ** 2).mean())
            total = total + sum(w * e for w, e in zip(weights, errors, strict=True)) / sum(weights)
        return total

    return value


def of_all_pairs(module: ReviewKD, count: int) -> nn.Module:
    """The module with its two tuples as one row of arguments."""

    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = module

        def forward(self, *features: Tensor) -> Tensor:
            value: Tensor = module(features[:count], features[count:])
            return value

    return Flat()


def queue_reference(module: PatchSimilarityQueue, held: Tensor) -> Callable[..., Tensor]:
    def value(student: Tensor, teacher: Tensor) -> Tensor:
        v_s, v_t = (side.flatten(2).mT.flatten(0, 1) if side.ndim > 2 else side for side in (student, teacher))
        v_s, v_t = (side / (side**2).sum(1, keepdim=True).sqrt() for side in (v_s, v_t))
        size = len(module.queue)
        entering = v_t[:: ceil(len(v_t) / size)]
        bank = torch.cat([entering, held])[:size].detach()
        kernels = [torch.exp(side @ bank.T / module.temperature) for side in (v_s, v_t)]
        p_s, p_t = (kernel / kernel.sum(1, keepdim=True) for kernel in kernels)
        return (p_t * torch.log(p_t / p_s)).sum(1).mean()

    return value


def crd_reference(module: CRD, scales: Tensor | None) -> Callable[..., Tensor]:
    def value(student: Tensor, teacher: Tensor, index: Tensor) -> Tensor:
        images = module.memories.shape[1]
        negatives = torch.randint(images, (module.negatives,))
        embedded = []
        for layer, side in ((module.embed_student, student), (module.embed_teacher, teacher)):
            row = side @ layer.weight.T + layer.bias
            embedded.append(row / (row**2).sum(1, keepdim=True).sqrt())
        total = student.new_zeros(())
        for side, anchors in enumerate(embedded):
            memory = module.memories[1 - side].clone()
            e = {
                (image, place): torch.exp(anchors[image] @ memory[place] / module.temperature)
                for image in range(len(anchors))
                for place in {*negatives.tolist(), int(index[image])}
            }
            row = [
                [e[image, int(index[image])], *(e[image, n] for n in negatives.tolist())]
                for image in range(len(anchors))
            ]
            mean = torch.stack([torch.stack(one) for one in row]).mean().item()
            z = mean * images if scales is None else float(scales[side].exp()) * images / module.negatives
            for positive, *others in row:
                ratio = module.negatives / images
                total = total - torch.log(positive / z / (positive / z + ratio))
                total = total - sum(torch.log(ratio / (other / z + ratio)) for other in others)
        return total / len(student)

    return value


FEATURES: list[Shape] = [(4, 6, 5, 3), (3, 5), (2, 7, 8, 8), (5, 3, 1, 1)]


@pytest.mark.parametrize("shape", FEATURES)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_vid(shape: Shape, reduction: Any) -> None:
    module = VID(spec(shape), spec(shape), reduction=reduction)
    torch.testing.assert_close(F.softplus(module.alpha) + module.eps, torch.full((shape[1],), 5.0))
    with_random_parameters(module)
    assert_agree(module, vid_reference(module), [numbers(shape, 0), numbers(shape, 1)])


@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ((4, 6, 5, 3), {}),
        ((3, 5), {"ratio": 0.5, "reduction": "sum"}),
        ((2, 7, 8, 8), {"mask": "positions", "ratio": 0.65}),
        ((2, 4, 4, 5), {"mask": "tokens", "ratio": 0.5}),
        ((3, 4, 3, 3), {"mask": "tokens", "ratio": 0.3, "reduction": "sum"}),
    ],
)
def test_mgd(shape: Shape, options: dict[str, Any]) -> None:
    module = with_random_parameters(MGD(spec(shape), spec(shape), **options))
    assert isinstance(module, MGD)
    assert_agree(module, mgd_reference(module), [numbers(shape, 0), numbers(shape, 1)])


@pytest.mark.parametrize("shape", FEATURES)
@pytest.mark.parametrize(("activation", "options"), [("relu", {}), ("", {"features": 0.0, "logits": 2.0})])
def test_srrl(shape: Shape, activation: str, options: dict[str, float]) -> None:
    classifier = nn.Linear(shape[1], 9).double().requires_grad_(False)
    module = SRRL(spec(shape), spec(shape, activation=activation), classifier=classifier, **options)
    assert with_random_parameters(module).training
    assert not classifier.training
    assert_agree(module, srrl_reference(module, activation == "relu"), [numbers(shape, 0), numbers(shape, 1).abs()])


@pytest.mark.parametrize(("batch", "c1", "c2"), [(8, 4, 6), (16, 5, 3)])
@pytest.mark.parametrize("options", [{}, {"kappa": 0.5, "reduction": "sum", "expansion": 1}])
def test_rsd(batch: int, c1: int, c2: int, options: dict[str, Any]) -> None:
    module = RSD(spec((batch, c1)), spec((batch, c2)), **options)
    with_random_parameters(module)
    assert_agree(module, rsd_reference(module), [numbers((batch, c1), 0), numbers((batch, c2), 1)])


@pytest.mark.parametrize(
    ("student", "teacher"),
    [
        ([(2, 3, 8, 8), (2, 5, 4, 4), (2, 6, 2, 2)], [(2, 4, 8, 8), (2, 7, 4, 4), (2, 8, 2, 2)]),
        ([(2, 3, 8, 8), (2, 6, 2, 2), (2, 6)], [(2, 4, 4, 4), (2, 7, 4, 4), (2, 7)]),  # of unlike models
        ([(3, 3, 7, 5), (3, 4, 4, 3)], [(3, 4, 3, 9), (3, 5)]),
        ([(4, 3)], [(4, 4)]),
    ],
)
def test_review(student: list[Shape], teacher: list[Shape]) -> None:
    sides = [[spec(shape, order) for order, shape in enumerate(side)] for side in (student, teacher)]
    module = ReviewKD(sides[0], sides[1], width=4)
    with_random_parameters(module)
    flat = of_all_pairs(module, len(student))
    inputs = [numbers(shape, seed) for seed, shape in enumerate(student + teacher)]
    assert_agree(flat, review_reference(module, len(student)), inputs, first=len(student))
    # The order of the pairs does not matter, since the layers know theirs.
    turned = ReviewKD(sides[0][::-1], sides[1][::-1], width=4).double()
    turned.fusions.load_state_dict(module.fusions.state_dict())
    value = turned(inputs[: len(student)][::-1], inputs[len(student) :][::-1])
    torch.testing.assert_close(value, module(inputs[: len(student)], inputs[len(student) :]))


@pytest.mark.parametrize("shape", [(4, 6), (3, 5, 2, 2)])
def test_patch_similarity_queue(shape: Shape) -> None:
    """In the first step, when it is full, and of a batch that is larger than the queue."""
    for size in (3, 16, 64):
        module = PatchSimilarityQueue(spec(shape), spec(shape), size=size).double().train()
        held = torch.zeros(0, shape[1], dtype=torch.float64)
        for step in range(4):
            assert_agree(module, queue_reference(module, held), [numbers(shape, step), numbers(shape, 50 + step)])
            rows = numbers(shape, 50 + step)
            rows = F.normalize(rows.flatten(2).mT.flatten(0, 1) if rows.ndim > 2 else rows)
            held = torch.cat([rows[:: ceil(len(rows) / size)], held])[:size]
            state = module.state_dict()
            module(numbers(shape, step), numbers(shape, 50 + step))
            assert int(state["filled"]) == len(held)
            torch.testing.assert_close(module.queue[: len(held)], held)


def test_crd() -> None:
    """In the first batch, which sets Z, in later ones, and in evaluation."""
    shapes = [(4, 5), (4, 3)]
    module = CRD(spec(shapes[0]), spec(shapes[1]), num_images=11, negatives=7, width=6)
    with_random_parameters(module)
    scales = None
    for step in range(3):
        index = torch.randperm(11, generator=torch.Generator().manual_seed(step))[:4]
        inputs = [numbers(shapes[0], step), numbers(shapes[1], 50 + step), index]
        assert_agree(module, crd_reference(module, scales), inputs)
        before, others = module.memories.clone(), torch.ones(11).index_fill(0, index, 0).bool()
        module(*inputs)
        scales = module.scales.clone() if scales is None else scales
        assert torch.equal(module.scales, scales)
        assert torch.equal(module.memories[:, others], before[:, others])
        for side, layer in enumerate((module.embed_student, module.embed_teacher)):
            mean = (before[side][index] + F.normalize(layer(inputs[side]))) / 2
            torch.testing.assert_close(module.memories[side][index], F.normalize(mean))
    assert int(module.steps) == 3


MAP, ROWS, WIDER = (8, 6, 4, 4), (8, 5), (8, 7)


def modules() -> dict[str, tuple[nn.Module, list[Shape], list[Shape]]]:
    """One module of each loss, with the shapes of its student's and its teacher's features."""
    map_, relu, rows, wider = spec(MAP), spec(MAP, activation="relu"), spec(ROWS, 1), spec(WIDER, 1)
    review = of_all_pairs(ReviewKD([map_, rows], [map_, wider], width=6), 2)
    crd = CRD(rows, wider, num_images=20, negatives=5)
    return {
        "vid": (VID(map_, map_), [MAP], [MAP]),
        "mgd": (MGD(map_, map_), [MAP], [MAP]),
        "mgd, tokens": (MGD(map_, map_, mask="tokens", ratio=0.5), [MAP], [MAP]),
        "srrl": (SRRL(map_, relu, classifier=nn.Linear(6, 9).requires_grad_(False)), [MAP], [MAP]),
        "rsd": (RSD(rows, wider), [ROWS], [WIDER]),
        "queue": (PatchSimilarityQueue(map_, map_, size=32), [MAP], [MAP]),
        "crd": (with_index(crd), [ROWS], [WIDER]),
        "review": (review, [MAP, ROWS], [MAP, WIDER]),
    }


def with_index(module: CRD) -> nn.Module:
    class Indexed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = module

        def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
            value: Tensor = module(student, teacher, torch.arange(len(student)))
            return value

    return Indexed()


LOSS_NAMES = ["vid", "mgd", "mgd, tokens", "srrl", "rsd", "queue", "crd", "review"]


@pytest.mark.parametrize("name", LOSS_NAMES)
@pytest.mark.parametrize("student_scale", [0, 1e-30, 1e-6, 1, 1e6, 1e15, 1e30])
@pytest.mark.parametrize("teacher_scale", [0, 1e-30, 1, 1e15, 1e30])
def test_finite_at_extremes_or_refused(name: str, student_scale: float, teacher_scale: float) -> None:
    torch.manual_seed(0)
    module, students, teachers = modules()[name]
    sides = [[numbers(shape, seed).float() for seed, shape in enumerate(side)] for side in (students, teachers)]
    leaves = [(student_scale * feature).requires_grad_() for feature in sides[0]]
    targets = [teacher_scale * feature for feature in sides[1]]
    try:
        value = module(*leaves, *targets)
        for leaf, target in zip(leaves, targets, strict=True):
            check_finite(name, value, leaf, target)
    except LossError:
        assert max(student_scale, teacher_scale) >= 1e15
        return
    trained = [*leaves, *module.parameters()]
    gradients = torch.autograd.grad(value, [leaf for leaf in trained if leaf.requires_grad], materialize_grads=True)
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert all(buffer.isfinite().all() for buffer in module.buffers())


@pytest.mark.parametrize("name", LOSS_NAMES)
def test_evaluation_is_repeatable_and_changes_nothing(name: str) -> None:
    module, students, teachers = modules()[name]
    inputs = [numbers(shape, seed).float() for seed, shape in enumerate(students + teachers)]
    module(*inputs)
    module.eval()
    state, random = {key: value.clone() for key, value in module.state_dict().items()}, torch.get_rng_state()
    values = [module(*inputs).item() for _ in range(2)]
    assert values[0] == values[1]
    assert all(torch.equal(value, state[key]) for key, value in module.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)


@pytest.mark.parametrize("name", LOSS_NAMES)
def test_a_copy_goes_on_with_the_same_bits(name: str) -> None:
    module, students, teachers = modules()[name]
    inputs = [numbers(shape, seed).float() for seed, shape in enumerate(students + teachers)]
    module(*inputs)
    torch.manual_seed(1)
    copied = modules()[name][0]
    copied.load_state_dict(module.state_dict())
    for _ in range(2):
        values = []
        for one in (module, copied):
            torch.manual_seed(2)
            values.append(one(*inputs).item())
        assert values[0] == values[1]


def test_compiled_they_are_as_they_were() -> None:
    """In one graph with what calls them, with the numbers that they draw and the buffers that they write."""
    made, copied = [entry[0] for entry in modules().values()], [entry[0] for entry in modules().values()]
    inputs = [
        tuple(numbers(shape, seed).float() for seed, shape in enumerate(students + teachers))
        for _, students, teachers in modules().values()
    ]

    def step(called: list[nn.Module]) -> list[Tensor]:
        return [call_loss(module, "loss", *given) for module, given in zip(called, inputs, strict=True)]

    for module, other in zip(made, copied, strict=True):
        other.load_state_dict(module.state_dict())
    for seed in range(2):
        torch.manual_seed(seed)
        values = torch.compile(step, backend="eager", fullgraph=True)(made)
        torch.manual_seed(seed)
        assert values == step(copied)
    for module, other in zip(made, copied, strict=True):
        torch.testing.assert_close(module.state_dict(), other.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: VID(spec(MAP), spec(MAP), initial_variance=0.0), "initial_variance 0.0"),
        (lambda: MGD(spec(MAP), spec(MAP), ratio=1.0), "ratio 1.0"),
        (lambda: MGD(spec(ROWS), spec(ROWS), mask="tokens"), "at one position"),
        (lambda: SRRL(spec(MAP), spec(MAP), classifier=nn.Linear(5, 9)), "does not take vectors of 6"),
        (lambda: SRRL(spec(MAP), spec(MAP), classifier=nn.Linear(6, 9), logits=0.0), "logits 0.0"),
        (lambda: RSD(spec(ROWS), spec(WIDER))(numbers((1, 5), 0), numbers((1, 7), 1)), "larger batches"),
        (lambda: ReviewKD([spec(ROWS)], [spec(ROWS)])([numbers((1, 5), 0)], [numbers((1, 5), 0)]), "larger batches"),
        (lambda: PatchSimilarityQueue(spec(MAP), spec(MAP), size=1), "size 1"),
        (lambda: CRD(spec(ROWS), spec(WIDER), num_images=9, momentum=1.0), "momentum 1.0"),
        (
            lambda: CRD(spec(ROWS), spec(WIDER), num_images=9)(
                numbers(ROWS, 0), numbers(WIDER, 1), torch.arange(2, 10)
            ),
            "to 9",
        ),
        (
            lambda: CRD(spec(ROWS), spec(WIDER), num_images=9)(numbers(ROWS, 0), numbers(WIDER, 1), torch.arange(2)),
            "each of 8",
        ),
        (lambda: VID(spec(MAP), spec(MAP))(numbers(MAP, 0), numbers((8, 6, 2, 2), 0)), r"\(8, 6, 2, 2\)"),
    ],
)
def test_what_cannot_be_computed_is_refused(make: Callable[[], Any], said: str) -> None:
    with pytest.raises(LossError, match=said):
        make()


def memories() -> list[nn.Module]:
    torch.manual_seed(0)
    queue = PatchSimilarityQueue(spec(ROWS), spec(ROWS), size=20)
    return [queue.double(), CRD(spec(ROWS), spec(WIDER), num_images=20, negatives=5).double()]


class Processes:
    """Two threads in place of two processes, with the part of torch.distributed that the losses use."""

    def __init__(self) -> None:
        self.barrier, self.parts, self.own = Barrier(2), [torch.empty(0)] * 2, local()

    def is_available(self) -> bool:
        return True

    def is_initialized(self) -> bool:
        return True

    def get_world_size(self) -> int:
        return 2

    def all_gather(self, parts: list[Tensor], own: Tensor) -> None:
        self.parts[self.own.rank] = own
        self.barrier.wait(10)
        for place, part in enumerate(self.parts):
            parts[place].copy_(part)
        self.barrier.wait(10)


def test_two_processes_remember_what_one_does(monkeypatch: pytest.MonkeyPatch) -> None:
    queue, crd = memories()
    for step in range(3):
        queue(numbers(ROWS, step), numbers(ROWS, 9 + step))
        crd(numbers(ROWS, step), numbers(WIDER, 9 + step), torch.arange(8) + step)
    processes, of_ranks = Processes(), [memories(), memories()]
    monkeypatch.setattr("probe_kd.methods.losses.state.distributed", processes)

    def train(rank: int) -> None:
        processes.own.rank = rank
        for step in range(3):
            images = slice(4 * rank, 4 * rank + 4)
            of_ranks[rank][0](numbers(ROWS, step)[images], numbers(ROWS, 9 + step)[images])
            index = torch.arange(8)[images] + step
            of_ranks[rank][1](numbers(ROWS, step)[images], numbers(WIDER, 9 + step)[images], index)

    with ThreadPoolExecutor(2) as threads:
        list(threads.map(train, range(2)))
    for held, remembered in of_ranks:
        torch.testing.assert_close(held.state_dict(), queue.state_dict())
        torch.testing.assert_close(remembered.memories, crd.memories)
    torch.testing.assert_close(of_ranks[0][1].state_dict(), of_ranks[1][1].state_dict(), rtol=0, atol=0)
