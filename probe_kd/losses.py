"""The losses: pure functions of (student, teacher), each with its paper and equation.

One reduction for all: the *event* of one image (its classes, its channels and positions, its Gram matrix) is summed
or averaged, as `reduction` says, and the batch is averaged. There is no factor 1/2 and no other constant: where a
paper has one, it belongs to the weight. So `reduction="mean"` of a squared error is `F.mse_loss`, and `reduction="sum"`
is the paper's norm.

Every loss is computed in float32 at least (float64 stays) and outside autocast: bfloat16 captures lose the small
differences that a loss is made of, and a float16 Gram matrix overflows. The teacher is a target: no gradient flows
into it, except where a call says `block_gradient=False`, which every loss takes: where both models train together, the
gradient block of Rocket Launching (Zhou et al. 2018, arXiv 1708.04106, sec. 3.3) is a choice.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import wraps
from inspect import Parameter, signature
from math import isfinite
from types import MappingProxyType
from typing import Any, Literal, ParamSpec, get_args, get_origin

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from probe_kd.errors import LossError, nearest, nearest_truth

Reduction = Literal["sum", "mean"]
P = ParamSpec("P")


def _in_float32(function: Callable[P, Tensor]) -> Callable[P, Tensor]:
    """Promote every tensor argument to float32 at least, and leave autocast.

    The tensors are positional only: one given by keyword would pass by here, and keep its type and its gradient.
    """

    @wraps(function)
    def computed(*args: P.args, **kwargs: P.kwargs) -> Tensor:
        device: str = args[0].device.type  # type: ignore[attr-defined]
        # Where there is none to leave, the context is left out: entering one takes longer than a small kernel.
        outside = torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()
        with outside:
            return function(*map(_promote, args), **kwargs)

    return computed


def _promote(value: Any) -> Any:
    if value.dtype == torch.float32 or not value.is_floating_point():
        return value
    return value.to(torch.promote_types(value.dtype, torch.float32))


def _check_reduction(reduction: Reduction) -> None:
    if reduction not in ("sum", "mean"):
        raise LossError(
            f"reduction {reduction!r}: expected 'sum' or 'mean' (over one image's event; the batch is averaged)"
        )


def _squared_error(student: Tensor, teacher: Tensor, reduction: Reduction) -> Tensor:
    """The squared differences of one image's event, summed or averaged; then the mean over the batch.

    torch's own kernel, since a difference, a square and two means written out hold five tensors of a feature's size at
    once on the way back, where it holds one, and take twice its time.
    """
    _check_reduction(reduction)
    if reduction == "mean":  # events of one batch are of one size, so the mean of their means is that of all
        return F.mse_loss(student, teacher).clone()  # the number that torch gives still holds the squares' memory
    return F.mse_loss(student, teacher, reduction="sum") / len(student)


def _loss(function: Callable[P, Tensor]) -> Callable[P, Tensor]:
    """A loss in float32 that detaches all but its first argument, the student, unless `block_gradient` is False."""
    computed = _in_float32(function)

    @wraps(function)
    def blocked(student: Tensor, *targets: Tensor, block_gradient: bool = True, **options: Any) -> Tensor:
        given = [target.detach() for target in targets] if block_gradient else targets
        return computed(student, *given, **options)  # type: ignore[arg-type]

    return blocked  # type: ignore[return-value]


def _same_shape(student: Tensor, teacher: Tensor, what: str) -> None:
    if student.shape != teacher.shape:
        raise LossError(
            f"{what}: student {tuple(student.shape)} and teacher {tuple(teacher.shape)} differ in shape; "
            "bring them together with probe_kd.adapt(student_spec, teacher_spec)"
        )


@_loss
def cross_entropy(
    student: Float[Tensor, "batch classes"],
    target: Int[Tensor, " batch"] | Float[Tensor, "batch classes"],
    /,
    *,
    label_smoothing: float = 0.0,
) -> Float[Tensor, ""]:
    """-sum_i y_i log softmax(z)_i, summed over the classes and averaged over the batch.

    `target` is class indices, or one distribution per image as Mixup and CutMix make them. `label_smoothing` mixes in
    the uniform distribution (Szegedy et al. 2016, sec. 7).
    """
    soft = target.is_floating_point()
    if (soft and target.shape != student.shape) or (not soft and target.shape != student.shape[:1]):
        raise LossError(
            f"cross_entropy: logits {tuple(student.shape)} with a target {tuple(target.shape)}; expected "
            f"{tuple(student.shape[:1])} class indices or {tuple(student.shape)} probabilities"
        )
    return F.cross_entropy(student, target, label_smoothing=label_smoothing)


@_loss
def soft_targets(
    student: Float[Tensor, "batch classes"],
    teacher: Float[Tensor, "batch classes"],
    /,
    *,
    temperature: float = 4.0,
    standardize: bool = False,
) -> Float[Tensor, ""]:
    """T^2 KL(softmax(v/T) || softmax(z/T)), summed over the classes and averaged over the batch.

    Hinton, Vinyals and Dean 2015 (arXiv 1503.02531), sec. 2; z are the student's logits, v the teacher's. The KL
    divergence stands for the paper's cross entropy, from which it differs by a constant, so that it is 0 at equality.
    T^2 keeps the gradient's size when T changes. There is no `reduction`: a mean over the classes, which many
    implementations take, divides the paper's loss by their number once too often.

    `standardize` takes the z-score of each image's logits first, so that a student need not reach the teacher's scale
    (Sun et al. 2024, arXiv 2403.01427, with a temperature of about 2 and a weight of about 9).
    """
    _same_shape(student, teacher, "soft_targets")
    _check_temperature("soft_targets", temperature)
    if standardize:
        student, teacher = _standardize(student), _standardize(teacher)
    log_p = F.log_softmax(student / temperature, dim=1)
    log_q = F.log_softmax(teacher / temperature, dim=1)
    return temperature**2 * F.kl_div(log_p, log_q, reduction="batchmean", log_target=True)


@_loss
def logits(
    student: Float[Tensor, "batch classes"],
    teacher: Float[Tensor, "batch classes"],
    /,
    *,
    center: bool = False,
    standardize: bool = False,
    reduction: Reduction = "mean",
) -> Float[Tensor, ""]:
    """||z - v||^2 of the pre-softmax logits.

    Ba and Caruana 2014 (arXiv 1312.6184), eq. 1, which has 1/2 before the sum: weight 0.5 with `reduction="sum"`.
    `center` takes the mean over the classes from both, to which a softmax is blind; then 1/(2 C) of the sum over C
    classes is the limit of `soft_targets` for a high temperature (Hinton et al. 2015, sec. 2.1; Kim et al. 2021, arXiv
    2105.08919). `standardize` also divides by the standard deviation over the classes (Sun et al. 2024).
    """
    _same_shape(student, teacher, "logits")
    if standardize:
        student, teacher = _standardize(student), _standardize(teacher)
    elif center:
        student, teacher = student - student.mean(1, keepdim=True), teacher - teacher.mean(1, keepdim=True)
    return _squared_error(student, teacher, reduction)


@_loss
def hint(
    student: Float[Tensor, "batch ..."],
    teacher: Float[Tensor, "batch ..."],
    /,
    *,
    reduction: Reduction = "mean",
) -> Float[Tensor, ""]:
    """||u_h - r(v_g)||^2 between a teacher's hint and the student's guided feature after its regressor.

    FitNets, Romero et al. 2015 (arXiv 1412.6550), eq. 3, which has 1/2 before the sum: weight 0.5 with
    `reduction="sum"`. The mean is the default, since the sum grows with the size of the map.
    """
    _same_shape(student, teacher, "hint")
    return _squared_error(student, teacher, reduction)


def _check_temperature(loss: str, temperature: float) -> None:
    if temperature <= 0:
        raise LossError(f"{loss}: temperature {temperature}; it has to be positive")


def _standardize(logits: Float[Tensor, "batch classes"], eps: float = 1e-7) -> Float[Tensor, "batch classes"]:
    deviation, mean = torch.std_mean(logits, 1, keepdim=True)
    return (logits - mean) / (deviation + eps)


@_loss
def dist(
    student: Float[Tensor, "batch classes"],
    teacher: Float[Tensor, "batch classes"],
    /,
    *,
    temperature: float = 1.0,
    inter: float = 1.0,
    intra: float = 1.0,
) -> Float[Tensor, ""]:
    """T^2 times inter (1 - r over an image's classes) + intra (1 - r over a class's images); r is Pearson's.

    DIST, Huang et al. 2022 (arXiv 2205.10536), eq. 6 to 10, on probabilities at temperature T; `inter` and `intra` are
    its beta and gamma. A strong teacher's order of the classes is asked for, and not its numbers. The second part
    compares the images of a batch with each other, so it needs two at least.
    """
    _same_shape(student, teacher, "dist")
    _check_temperature("dist", temperature)
    p, q = (student / temperature).softmax(1), (teacher / temperature).softmax(1)
    return temperature**2 * (inter * (1 - _pearson(p, q)).mean() + intra * (1 - _pearson(p.T, q.T)).mean())


def _pearson(a: Float[Tensor, "rows n"], b: Float[Tensor, "rows n"], eps: float = 1e-8) -> Float[Tensor, " rows"]:
    return F.cosine_similarity(a - a.mean(1, keepdim=True), b - b.mean(1, keepdim=True), dim=1, eps=eps)


@_loss
def fsp(
    student: Float[Tensor, "batch m n"],
    teacher: Float[Tensor, "batch m n"],
    /,
    *,
    relative: bool = False,
    reduction: Reduction = "sum",
) -> Float[Tensor, ""]:
    """||G(student) - G(teacher)||_F^2 of two FSP matrices, as `flow_matrix` makes them.

    FSP, Yim et al. 2017 (CVPR), eq. 2. `relative` divides by the variance of the teacher's matrices over the batch,
    sum over the matrix of Var(G_ij): then 1 is the loss of a student that knows the mean matrix and nothing else, and
    1 minus the loss is the share of the variance that is explained. The paper's form grows with the fourth power of the
    activations, and the matrix after a ReLU is for the most part constant. `relative` needs two images at least.
    """
    return _matrices("fsp", student, teacher, relative, reduction)


@_loss
def gram(
    student: Float[Tensor, "batch channels channels"],
    teacher: Float[Tensor, "batch channels channels"],
    /,
    *,
    relative: bool = False,
    reduction: Reduction = "mean",
) -> Float[Tensor, ""]:
    """||G(student) - G(teacher)||_F^2 of the Gram matrices of a map with itself.

    The style loss of Gatys et al. 2016 (CVPR), eq. 4, between two networks: theirs has 1/4 before the mean. `relative`
    is that of `fsp`.
    """
    return _matrices("gram", student, teacher, relative, reduction)


def _matrices(loss: str, student: Tensor, teacher: Tensor, relative: bool, reduction: Reduction) -> Tensor:
    _same_shape(student, teacher, loss)
    if not relative:
        return _squared_error(student, teacher, reduction)
    _check_reduction(reduction)  # a share of the variance is the same in either
    if relative is not True:
        raise LossError(f"{loss}: relative {relative!r}: expected true or false")
    if len(teacher) < 2:
        raise LossError(f"{loss}: `relative` divides by the variance over a batch, and this one has a single image")
    error = _squared_error(student, teacher, "sum")
    return error / teacher.var(0).sum().clamp_min(torch.finfo(teacher.dtype).tiny)


@_in_float32
def flow_matrix(
    first: Float[Tensor, "batch m h1 w1"], second: Float[Tensor, "batch n h2 w2"], /
) -> Float[Tensor, "batch m n"]:
    """G = sum over positions of F1 F2^T / (h w): the FSP matrix of two maps (Yim et al. 2017, eq. 1).

    Where the grids differ, as in a block that downsamples, the larger is max-pooled to the smaller, as in the paper.
    """
    if not first.ndim == second.ndim == 4 or len(first) != len(second):
        raise LossError(
            "flow_matrix: expected two maps (batch, channels, height, width) of one batch, the input and the output of "
            f"a block, got {tuple(first.shape)} and {tuple(second.shape)}"
        )
    first, second = (positions(map_) for map_ in to_one_grid(first, second))
    return (first.transpose(1, 2) @ second).div_(first.shape[1])  # in place: no second matrix


def to_one_grid(*maps: Float[Tensor, "batch _ _ _"]) -> list[Tensor]:
    """Each map max-pooled to the least height and width among them."""
    size = tuple(min(map_.shape[axis] for map_ in maps) for axis in (2, 3))
    return [map_ if tuple(map_.shape[2:]) == size else F.adaptive_max_pool2d(map_, size) for map_ in maps]


def positions(map_: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch positions channels"]:
    """The map as rows of channels, which is a view of it.

    Where channels come last in memory they do so in the gradient: a product of matrices would give the other order, and
    each layer on the way back then pays for the conversion.
    """
    rows = map_.permute(0, 2, 3, 1).flatten(1, 2)
    if not rows.is_contiguous():
        return rows
    # To one matrix and back: two views, but a gradient in another order has to be copied to be viewed so.
    return rows.flatten(0, 1).view(rows.shape)


@_loss
def attention(
    student: Float[Tensor, "batch c1 height width"],
    teacher: Float[Tensor, "batch c2 height width"],
    /,
    *,
    form: Literal["paper", "code"] = "paper",
) -> Float[Tensor, ""]:
    """The distance of two attention maps Q = sum over channels of A^2, each divided by its norm.

    Zagoruyko and Komodakis 2017 (arXiv 1612.03928), eq. 2. `paper`: ||Q_S - Q_T||_2, the norm itself, whose weight is
    beta/2. `code`: the authors' published code, the mean over positions of the squared difference, whose weight is beta
    (1000 with its defaults). The two networks' channels need not agree, their grids must.
    """
    if student.ndim != 4 or (len(student), *student.shape[2:]) != (len(teacher), *teacher.shape[2:]):
        raise LossError(
            f"attention: expected two maps (batch, channels, height, width) of one batch and grid, got student "
            f"{tuple(student.shape)} and teacher {tuple(teacher.shape)}"
        )
    ours, theirs = (F.normalize(map_.square().mean(1).flatten(1), dim=1) for map_ in (student, teacher))
    if form == "code":
        return (ours - theirs).square().mean()
    if form != "paper":
        raise LossError(f"attention: form {form!r}; expected 'paper' or 'code'")
    distance: Tensor = torch.linalg.vector_norm(ours - theirs, dim=1)
    return distance.mean()


Reads = Literal["labels", "outputs", "features", "maps", "grams", "flows"]


@dataclass(frozen=True)
class Loss:
    """A loss and what it reads.

    `labels`: logits and the target; `outputs`: both models' logits. Of every pair of layers, `features`: both features
    in one shape; `maps`: both at one grid, each with its own channels; `grams`: the matrix of each feature with itself;
    `flows`: the matrix between the input and the output of the two modules.
    """

    function: Callable[..., Tensor]
    reads: Reads

    @property
    def reads_layers(self) -> bool:
        """Whether it compares pairs of layers."""
        return self.reads not in ("labels", "outputs")

    @property
    def reads_matrices(self) -> bool:
        """Whether it compares matrices, which are made of the maps at both ends of a flow."""
        return self.reads in ("flows", "grams")

    @property
    def options(self) -> tuple[str, ...]:
        """The names of its options."""
        parameters = signature(self.function).parameters.items()
        return tuple(name for name, value in parameters if value.kind is Parameter.KEYWORD_ONLY)

    def check_options(self, name: str, options: Mapping[str, Any], beside: Sequence[str] = ()) -> None:
        """LossError for options that the function does not have, with the nearest that it has, or that stand beside."""
        known = f"; it has {', '.join(self.options)}" if self.options else "; it has none"
        wrong = [option for option in options if option not in self.options]
        if wrong:
            hints = [f"{option!r}{nearest(option, (*self.options, *beside))}" for option in wrong]
            raise LossError(f"loss {name!r} has no option {'; and none '.join(hints)}{known}")

    def check_values(self, name: str, options: Mapping[str, Any]) -> None:
        """LossError for a value that is not of the option's type."""
        for option, value in options.items():
            expected = self.refusal(option, value)
            if expected:
                raise LossError(f"{name!r}: {option} is {value!r}; expected {expected}")

    def refusal(self, option: str, value: Any) -> str:
        """What is expected instead of the value: a truth, a number, one of a few words; empty where it will do.

        Other types are the function's own matter. A word where a truth is expected would do as a truth, and silently.
        """
        known = signature(self.function).parameters
        return _refusal(value, known[option].annotation) if option in known else ""


def _refusal(value: Any, annotation: Any) -> str:
    if get_origin(annotation) is Literal:
        words = get_args(annotation)
        near = nearest(value, words) if isinstance(value, str) else ""
        return "" if value in words else f"{' or '.join(map(repr, words))}{near}"
    if annotation is bool:
        return "" if isinstance(value, bool) else f"true or false{nearest_truth(value)}"
    if annotation in (int, float):
        kinds = (int,) if annotation is int else (int, float)
        fits = isinstance(value, kinds) and not isinstance(value, bool) and isfinite(value)
        return "" if fits else "a whole number" if annotation is int else "a finite number"
    return ""


LOSSES: Mapping[str, Loss] = MappingProxyType(
    {
        "cross_entropy": Loss(cross_entropy, "labels"),
        "soft_targets": Loss(soft_targets, "outputs"),
        "logits": Loss(logits, "outputs"),
        "dist": Loss(dist, "outputs"),
        "hint": Loss(hint, "features"),
        "fsp": Loss(fsp, "flows"),
        "gram": Loss(gram, "grams"),
        "attention": Loss(attention, "maps"),
    }
)
