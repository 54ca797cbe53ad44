"""What each loss costs beside the same loss written plainly by hand: forward and backward, time and peak of memory.

python benchmarks/losses.py [--quick] [--device cuda] [--only hint soft_targets]

The plain forms take float32, as one would write them after a `.float()`. Where the features were captured in bfloat16,
both arms get them so, and the plain form converts them first.
"""

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any

import measure
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from probe_kd.engine.spec import FeatureSpec, Layout, Tap
from probe_kd.methods.losses.calling import call_loss
from probe_kd.methods.losses.checks import flat
from probe_kd.methods.losses.table import LOSSES, Loss
from probe_kd.methods.projectors import FlowMatrix

Plain = Callable[..., Tensor]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Size:
    """The tensors that losses compare: maps (batch, channels, side, side), outputs, and vectors of a batch."""

    maps: tuple[int, int, int, int] = (32, 256, 28, 28)
    outputs: tuple[int, int] = (128, 1000)
    vectors: tuple[int, int] = (256, 2048)


RESNET50 = Size()
QUICK = Size(maps=(3, 8, 4, 4), outputs=(4, 10), vectors=(5, 16))


def soft_targets(student: Tensor, teacher: Tensor, temperature: float = 4.0) -> Tensor:
    log_p, log_q = F.log_softmax(student / temperature, 1), F.log_softmax(teacher / temperature, 1)
    return temperature**2 * F.kl_div(log_p, log_q, reduction="batchmean", log_target=True)


def multilabel_soft_targets(student: Tensor, teacher: Tensor) -> Tensor:
    target = teacher.sigmoid()
    divergence = F.binary_cross_entropy_with_logits(student, target)
    return divergence - F.binary_cross_entropy_with_logits(teacher, target)


def dist(student: Tensor, teacher: Tensor) -> Tensor:
    p, q = student.softmax(1), teacher.softmax(1)
    return sum(((1 - _pearson(a, b)).mean() for a, b in ((p, q), (p.T, q.T))), start=student.new_zeros(()))


def _pearson(first: Tensor, second: Tensor) -> Tensor:
    return F.cosine_similarity(first - first.mean(1, keepdim=True), second - second.mean(1, keepdim=True), dim=1)


def dkd(student: Tensor, teacher: Tensor, labels: Tensor, temperature: float = 4.0) -> Tensor:
    """As in the authors' code."""
    of_label = F.one_hot(labels, student.shape[1]).bool()
    p, q = (side.div(temperature).softmax(1) for side in (student, teacher))
    both = [torch.stack([(x * of_label).sum(1), (x * ~of_label).sum(1)], 1) for x in (p, q)]
    target_part = F.kl_div(both[0].log(), both[1], reduction="batchmean")
    others = [F.log_softmax(side / temperature - 1000.0 * of_label, 1) for side in (student, teacher)]
    return temperature**2 * (target_part + 8 * F.kl_div(others[0], others[1].exp(), reduction="batchmean"))


def nkd(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    """As in the authors' code."""
    index, mask = labels[:, None], F.one_hot(labels, student.shape[1]) == 0
    of_label = -(teacher.softmax(1).gather(1, index) * F.log_softmax(student, 1).gather(1, index)).mean()
    own, other = (side[mask].reshape(len(side), -1) for side in (student, teacher))
    return of_label - 1.5 * (other.softmax(1) * F.log_softmax(own, 1)).sum(1).mean()


def ofa(student: Tensor, teacher: Tensor, labels: Tensor, eps: float = 1.5) -> Tensor:
    mask = F.one_hot(labels, student.shape[1])
    shares = (teacher.softmax(1) + mask) ** eps - mask
    return -(shares * F.log_softmax(student, 1)).sum(1).mean()


def attention(student: Tensor, teacher: Tensor) -> Tensor:
    own, other = (F.normalize(side.pow(2).mean(1).flatten(1)) for side in (student, teacher))
    return (own - other).norm(dim=1).mean()


def token_match(student: Tensor, teacher: Tensor) -> Tensor:
    cosine = F.cosine_similarity(student, teacher, dim=1)
    return 0.9 * (1 - cosine).mean() + 0.1 * F.smooth_l1_loss(student, teacher)


def patch_similarity(student: Tensor, teacher: Tensor, temperature: float = 0.07) -> Tensor:
    rows = [F.normalize(side.flatten(2), dim=1) for side in (student, teacher)]
    log_p, log_q = (F.log_softmax((side.mT @ side / temperature).flatten(0, 1), 1) for side in rows)
    return F.kl_div(log_p, log_q, reduction="batchmean", log_target=True)


def pkd(student: Tensor, teacher: Tensor) -> Tensor:
    own, other = (
        (side - side.mean((0, 2, 3), keepdim=True)) / (side.std((0, 2, 3), correction=0, keepdim=True) + 1e-6)
        for side in (student, teacher)
    )
    return F.mse_loss(own, other) / 2


def cwd(student: Tensor, teacher: Tensor, temperature: float = 4.0) -> Tensor:
    log_p, log_q = (F.log_softmax(side.flatten(2).flatten(0, 1) / temperature, 1) for side in (student, teacher))
    return temperature**2 * F.kl_div(log_p, log_q, reduction="batchmean", log_target=True)


def ickd(student: Tensor, teacher: Tensor) -> Tensor:
    own, other = (F.normalize(side.flatten(2) @ side.flatten(2).mT, dim=2) for side in (student, teacher))
    return (own - other).square().sum(2).mean()


def nst(student: Tensor, teacher: Tensor) -> Tensor:
    own, other = (F.normalize(side.flatten(2), dim=2) for side in (student, teacher))
    within = [(side @ side.mT).square().mean() for side in (own, other)]
    return within[0] + within[1] - 2 * (own @ other.mT).square().mean()


def gram_tokens(student: Tensor, teacher: Tensor) -> Tensor:
    own, other = (F.normalize(side.flatten(2), dim=1) for side in (student, teacher))
    return F.mse_loss(own.mT @ own, other.mT @ other)


def matrices(map_: Tensor) -> Tensor:
    """The matrix of one map, as `fsp` and `gram` compare them."""
    rows = map_.flatten(2)
    return rows @ rows.mT / rows.shape[2]


def rkd(student: Tensor, teacher: Tensor) -> Tensor:
    """By inner products. As in the authors' code, by all n^2 differences of vectors, it takes gigabytes."""
    images = len(student)
    distances, cosines = [], []
    for side in (student, teacher):
        products, distance = side @ side.T, torch.cdist(side, side)
        distances.append(distance / (distance.sum() / (images * (images - 1))))
        between = products - products[:, :, None] - products[:, None] + products.diagonal()[:, None, None]
        lengths = distance.masked_fill(torch.eye(images, device=side.device) > 0, 1.0)
        cosines.append(between / (lengths[:, :, None] * lengths[:, None]))
    return F.smooth_l1_loss(*distances) + 2 * F.smooth_l1_loss(*cosines)


def sp(student: Tensor, teacher: Tensor) -> Tensor:
    return F.mse_loss(*(F.normalize(side @ side.T, dim=1) for side in (student, teacher)))


def pkt(student: Tensor, teacher: Tensor) -> Tensor:
    images = len(student)
    others = ~torch.eye(images, dtype=torch.bool, device=student.device)
    kernels = [(F.normalize(side) @ F.normalize(side).T + 1) / 2 for side in (student, teacher)]
    p, q = (kernel[others].view(images, -1) for kernel in kernels)
    p, q = p / p.sum(1, keepdim=True), q / q.sum(1, keepdim=True)
    return (q * (q / p).log()).sum(1).mean()


def cc(student: Tensor, teacher: Tensor) -> Tensor:
    cosines = [F.normalize(side) @ F.normalize(side).T for side in (student, teacher)]
    scale = torch.tensor(-0.8, dtype=torch.float64).exp().item()
    own, other = (scale * (1 + 0.8 * cosine + 0.32 * cosine**2) for cosine in cosines)
    return F.mse_loss(own, other)


def vid(module: Any, student: Tensor, teacher: Tensor) -> Tensor:
    variance = (F.softplus(module.alpha) + module.eps)[:, None, None]
    return 0.5 * ((student - teacher) ** 2 / variance + variance.log()).mean()


def mgd(module: Any, student: Tensor, teacher: Tensor) -> Tensor:
    """In evaluation mode, in which the module draws the same channels each time."""
    generator = torch.Generator().manual_seed(0)
    visible = (
        torch.rand(student.shape[0], student.shape[1], 1, 1, generator=generator).to(student.device) >= module.ratio
    )
    return F.mse_loss(module.generator(student * visible), teacher)


def srrl(module: Any, student: Tensor, teacher: Tensor) -> Tensor:
    own = F.relu(module.norm(student.flatten(2))).mean(2)
    other = teacher.flatten(2).mean(2)
    return F.mse_loss(own, other) + F.mse_loss(module.classifier(own), module.classifier(other))


def rsd(module: Any, student: Tensor, teacher: Tensor) -> Tensor:
    """As in the authors' code, with the mean over the channels."""
    own, other = (
        (side - side.mean(0)) / (side.std(0, correction=0) + 1e-5) for side in (module.head(student), teacher)
    )
    correlations = other.T @ own / len(own)
    eye = torch.eye(len(correlations), device=own.device)
    return ((correlations - eye).square() * torch.where(eye > 0, 1.0, module.kappa)).sum() / len(eye)


def ofa_exits(module: Any, student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    return ofa(module.exit(student), teacher, labels)


def patch_similarity_queue(module: Any, student: Tensor, teacher: Tensor) -> Tensor:
    """In evaluation mode, in which the queue stays as it is."""
    own, other = (F.normalize(side.permute(0, 2, 3, 1).flatten(0, 2), dim=1) for side in (student, teacher))
    size, stride = len(module.queue), -(-len(other) // len(module.queue))
    queue = torch.cat([other[::stride], module.queue])[:size]
    log_p, log_q = (F.log_softmax(side @ queue.T / module.temperature, dim=1) for side in (own, other))
    return F.kl_div(log_p, log_q, reduction="batchmean", log_target=True)


def review(module: Any, student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """Of two pairs, of which the second is the deeper."""
    deep, shallow = module.fusions
    first = deep.reduce(student[1])
    fused = shallow.reduce(student[0])
    residual = F.interpolate(first, fused.shape[2:])
    weights = shallow.attention(torch.cat([fused, residual], dim=1))
    fused = weights[:, :1] * fused + weights[:, 1:] * residual
    sides = (deep.expand(first), teacher[1]), (shallow.expand(fused), teacher[0])
    return sum((_pyramid(*side) for side in sides), start=student[0].new_zeros(()))


def _pyramid(student: Tensor, teacher: Tensor) -> Tensor:
    """As in the authors' code."""
    value, weight, total = F.mse_loss(student, teacher), 1.0, 1.0
    for side in (4, 2, 1):
        if side >= student.shape[2]:
            continue
        weight /= 2
        pooled = (F.adaptive_avg_pool2d(map_, (side, side)) for map_ in (student, teacher))
        value, total = value + weight * F.mse_loss(*pooled), total + weight
    return value / total


def crd(module: Any, student: Tensor, teacher: Tensor, index: Tensor) -> Tensor:
    """In evaluation mode, in which an image is compared with its own embedding, and Z is that of the batch."""
    own, other = F.normalize(module.embed_student(student)), F.normalize(module.embed_teacher(teacher))
    generator = torch.Generator().manual_seed(0)
    images = module.memories.shape[1]
    negatives = torch.randint(images, (module.negatives,), generator=generator).to(index.device)
    value = student.new_zeros(())
    for anchors, positives, memory in ((own, other, module.memories[1]), (other, own, module.memories[0])):
        near = (anchors * positives.detach()).sum(1, keepdim=True) / module.temperature
        rest = anchors @ memory[negatives].T / module.temperature
        scale = len(negatives) * torch.cat([near, rest], 1).detach().exp().mean()
        near, rest = near.exp(), rest.exp()
        value = value - ((near / (near + scale)).log().sum() + (scale / (rest + scale)).log().sum()) / len(anchors)
    return value


PLAIN: Mapping[str, Plain] = {
    "cross_entropy": F.cross_entropy,
    "binary_cross_entropy": F.binary_cross_entropy_with_logits,
    "soft_targets": soft_targets,
    "hard_labels": lambda student, teacher: F.cross_entropy(student, teacher.argmax(1)),
    "multilabel_soft_targets": multilabel_soft_targets,
    "logits": F.mse_loss,
    "dist": dist,
    "dkd": dkd,
    "nkd": nkd,
    "ofa": ofa,
    "hint": F.mse_loss,
    "fsp": lambda student, teacher: F.mse_loss(matrices(student), matrices(teacher), reduction="sum") / len(student),
    "gram": lambda student, teacher: F.mse_loss(matrices(student), matrices(teacher)),
    "attention": attention,
    "token_match": token_match,
    "patch_similarity": patch_similarity,
    "smooth_l1": F.smooth_l1_loss,
    "pkd": pkd,
    "cwd": cwd,
    "ickd": ickd,
    "nst": nst,
    "gram_tokens": gram_tokens,
    "rkd": rkd,
    "sp": sp,
    "pkt": pkt,
    "cc": cc,
}
# Of losses with parameters: the plain form takes the module first.
PLAIN_MODULES: Mapping[str, Plain] = {
    "vid": vid,
    "mgd": mgd,
    "srrl": srrl,
    "rsd": rsd,
    "ofa_exits": ofa_exits,
    "patch_similarity_queue": patch_similarity_queue,
    "review": review,
    "crd": crd,
}


DRAWN = {"mgd", "patch_similarity_queue", "crd"}  # they draw or remember, and repeat themselves in evaluation mode
DAMPED = {"dist"}  # its gradient is not that of the equation where probabilities are nearly equal
OPTIONS: Mapping[str, Mapping[str, Any]] = {"patch_similarity_queue": {"size": 1024}}
IMAGES = 50_000  # of CRD's memory
FEW = {"mgd", "review", "rkd", "patch_similarity"}  # which take seconds


def inputs_of(loss: Loss, size: Size, dtype: torch.dtype, device: str) -> list[Any]:
    """The student's side, the teacher's, and labels or the numbers of the images where the loss reads them."""
    generator = torch.Generator().manual_seed(0)

    def numbers(shape: Sequence[int]) -> Tensor:
        scale = 4.0 if loss.reads in ("labels", "outputs") else 1.0  # as large as logits are
        return (scale * torch.randn(shape, generator=generator)).to(device, dtype)

    batch, channels, side, _ = size.maps
    if loss.reads == "all_pairs":
        shapes = size.maps, (batch, 2 * channels, side // 2, side // 2)
        return [tuple(map(numbers, shapes)) for _ in range(2)]
    shape: Sequence[int] = {"labels": size.outputs, "outputs": size.outputs, "vectors": size.vectors}.get(
        loss.reads, size.maps
    )
    labels = torch.randint(0, shape[1], shape[:1], generator=generator).to(device)
    if loss.reads == "labels":
        return [numbers(shape), (numbers(shape) > 0).float() if loss.multilabel else labels]
    return [numbers(shape), numbers(shape), *([labels] if loss.also else [])]


def spec(tensor: Tensor, order: int = 0) -> FeatureSpec:
    layout, grid = (Layout.NC, None) if tensor.ndim == 2 else (Layout.NCHW, (tensor.shape[2], tensor.shape[3]))
    shape = tuple(tensor.shape)
    return FeatureSpec(Tap("layer"), layout, shape, shape[1], grid, order=order, activation="relu")


def specs_of(side: Any) -> Any:
    return tuple(spec(tensor, order) for order, tensor in enumerate(side)) if isinstance(side, tuple) else spec(side)


def module_of(name: str, inputs: Sequence[Any], size: Size) -> nn.Module:
    loss = LOSSES[name]
    needed = {"classifier": nn.Linear(size.maps[1], size.outputs[1]).requires_grad_(False), "num_images": IMAGES}
    torch.manual_seed(0)
    module: nn.Module = loss.function(
        *map(specs_of, inputs[:2]), **OPTIONS.get(name, {}), **{key: needed[key] for key in loss.needs}
    )
    module.to(flat(inputs[0])[0].device)
    if name == "patch_similarity_queue":  # full, as after the first steps
        for _ in range(-(-len(module.queue) // inputs[0][:, 0].numel()) + 1):  # type: ignore[arg-type]
            module(*(side.float() for side in inputs[:2]))
    return module.train(name not in DRAWN)


def both_of(name: str, inputs: Sequence[Any], size: Size) -> tuple[Plain, Plain, list[nn.Parameter]]:
    """The loss by hand, the loss of probe-kd, and the parameters that it trains."""
    loss = LOSSES[name]
    if loss.builds_module:
        module = module_of(name, inputs, size)
        trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
        return partial(PLAIN_MODULES[name], module), partial(call_loss, module, name), trained
    if loss.reads_matrices:
        matrix = FlowMatrix()
        return PLAIN[name], lambda *sides: loss.function(*(matrix([side]) for side in sides)), []
    return PLAIN[name], loss.function, []


def in_float(plain: Plain) -> Plain:
    """The plain form, of tensors that were captured in half precision."""

    def as_float(side: Any) -> Any:
        if isinstance(side, tuple):
            return tuple(map(as_float, side))
        return side.float() if side.is_floating_point() else side

    return lambda *sides: plain(*map(as_float, sides))


def arm_of(function: Plain, inputs: Sequence[Any], trained: Sequence[nn.Parameter]) -> Callable[[], list[Tensor]]:
    """The value, and the gradient of the student's side and of all parameters."""
    leaves = [*(tensor.requires_grad_() for tensor in flat(inputs[0])), *trained]

    def run() -> list[Tensor]:
        value = function(*inputs)
        return [value.detach(), *torch.autograd.grad(value, leaves, allow_unused=True, materialize_grads=True)]

    return run


def arms_of(name: str, size: Size, dtype: torch.dtype, device: str = "cpu") -> dict[str, measure.Arm]:
    """Both arms of one loss. AssertionError unless they compute the same."""
    inputs = inputs_of(LOSSES[name], size, dtype, device)
    by_hand, own, trained = both_of(name, inputs, size)
    arms = {"by hand": arm_of(in_float(by_hand), inputs, trained), "probe-kd": arm_of(own, inputs, trained)}
    expected, results = (arm() for arm in arms.values())
    torch.testing.assert_close(results[0], expected[0], rtol=1e-3, atol=1e-5)
    tolerance = 2e-3 if dtype == torch.float32 else 2e-2
    gradients = [] if name in DAMPED else zip(results[1:], expected[1:], strict=True)
    for gradient, reference in gradients:
        assert (gradient - reference).norm() <= tolerance * reference.norm() + 1e-6, (name, tuple(gradient.shape))
    return dict(arms)


def repeated(arm: measure.Arm, calls: int) -> measure.Arm:
    def run() -> None:
        for _ in range(calls):
            arm()

    return run


def row(name: str, precision: str, size: Size, rounds: int, device: str, least: float) -> tuple[object, ...]:
    """One row of the table. An arm is called until it takes `least` seconds: a single short call is mostly noise."""
    arms = arms_of(name, size, DTYPES[precision], device)
    clock = time.process_time if device == "cpu" else time.perf_counter
    single = measure.interleaved(arms, 3, warmup=1, device=device, clock=clock).milliseconds("by hand") / 1000
    calls = max(1, round(least / max(single, 1e-6)))
    many = {arm: repeated(function, calls) for arm, function in arms.items()}
    samples = measure.interleaved(many, rounds, warmup=1, device=device, clock=clock)
    base, peak = (measure.peak_bytes(arms[arm], device) for arm in ("by hand", "probe-kd"))
    times = f"{samples.milliseconds('by hand') / calls:.2f}", samples.ratio("probe-kd", to="by hand")
    return name, precision, *times, f"{base / 2**20:.1f}", f"{peak / base:.3f}"


def main() -> None:
    parser = measure.options(__doc__)
    parser.add_argument(
        "--only", nargs="*", choices=[*PLAIN, *PLAIN_MODULES], metavar="LOSS", help="names of losses, such as `hint`"
    )
    wishes = parser.parse_args()
    size, rounds, least = (QUICK, 3, 0.0) if wishes.quick else (RESNET50, 15, 0.05)
    rows = []
    for name, precision in product(wishes.only or LOSSES, DTYPES):
        count = wishes.rounds or (5 if name in FEW else rounds)
        rows.append(row(name, precision, size, count, wishes.device, least))
        print(*rows[-1], file=sys.stderr, flush=True)  # it takes 15 minutes
    meaning = (
        f"One loss, forward and backward to the student's side: maps {size.maps}, outputs {size.outputs}, vectors "
        f"{size.vectors}. On a CPU, milliseconds are those of the process, whatever else runs. MiB are the tensors at "
        "the peak beyond what both models gave."
    )
    header = ("loss", "given", "ms by hand", "time", "MiB by hand", "memory")
    print(measure.section("A loss alone", measure.command(), meaning, header, rows))


if __name__ == "__main__":
    main()
