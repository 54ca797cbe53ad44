"""Losses of both models' outputs and the labels, and of exits from the student's layers."""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from probe_kd.engine.spec import FeatureSpec
from probe_kd.errors import LossError
from probe_kd.methods.losses.calling import loss_function
from probe_kd.methods.losses.checks import check_outputs, check_temperature, has_values, is_number
from probe_kd.methods.losses.distances import divergence, in_float64, softmax_divergence
from probe_kd.methods.losses.labels import check_target, check_values


@loss_function
def dkd(
    student: Float[Tensor, "batch classes"],
    teacher: Float[Tensor, "batch classes"],
    labels: Int[Tensor, " batch"] | Float[Tensor, "batch classes"],
    /,
    *,
    alpha: float = 1.0,
    beta: float = 8.0,
    temperature: float = 4.0,
) -> Float[Tensor, ""]:
    """Compute T^2 (alpha KL of (p_y, 1 - p_y) + beta KL of p over the other classes), averaged over the batch.

    Decoupled knowledge distillation, Zhao et al. 2022 (arXiv 2203.08679), eq. 7. p is the softmax at temperature T, y
    the label, and p over the other classes is divided by its sum. `soft_targets` is alpha = 1 with beta = 1 - p_y of
    the teacher, so that a confident teacher says little about the other classes. The defaults are the paper's for
    CIFAR-100 with ResNets (its ImageNet: 1, 0.5 and T = 1, beside cross entropy), and its first 20 epochs raise the
    weight from 0. Of labels that are a distribution, y is the largest. Classes that the teacher masks by -inf do not
    count. Raises LossError for a single class.
    """
    index = _index("dkd", student, teacher, labels)
    check_temperature("dkd", temperature)
    _check_factors("dkd", alpha=alpha, beta=beta)
    dtype = student.dtype
    student, teacher = (logits / temperature for logits in in_float64(temperature, student, teacher))
    others = [logits.scatter(1, index, -torch.inf) for logits in (student, teacher)]
    of_labels = [logits.gather(1, index) for logits in (student, teacher)]
    of_label = divergence(*map(_label_or_not, of_labels, others))
    of_others = softmax_divergence(others[0], others[1])
    return (temperature**2 * (alpha * of_label + beta * of_others)).to(dtype)


@loss_function
def nkd(
    student: Float[Tensor, "batch classes"],
    teacher: Float[Tensor, "batch classes"],
    labels: Int[Tensor, " batch"] | Float[Tensor, "batch classes"],
    /,
    *,
    gamma: float = 1.5,
    temperature: float = 1.0,
) -> Float[Tensor, ""]:
    """Compute -p_t(y) log p_s(y) - gamma T^2 sum over the other classes of q_t log q_s, averaged over the batch.

    Normalised knowledge distillation, Yang et al. 2023 (arXiv 2303.13005). p is the softmax at T = 1, y the
    label, and q the softmax at temperature T over the other classes. The defaults are the paper's for ImageNet, beside
    cross entropy. It is a cross entropy, and not 0 for equal outputs. Of labels that are a distribution, y is the
    largest. Classes that the teacher masks by -inf do not count. Raises LossError for a single class.
    """
    index = _index("nkd", student, teacher, labels)
    check_temperature("nkd", temperature)
    _check_factors("nkd", gamma=gamma)
    dtype = student.dtype
    student, teacher = in_float64(temperature, student, teacher)
    p_y = teacher.softmax(1).gather(1, index)
    of_label = -(p_y * F.log_softmax(student, dim=1).gather(1, index).masked_fill(p_y == 0, 0.0)).mean()
    log_p, log_q = (_others(logits / temperature, index) for logits in (student, teacher))
    of_others = -(log_q.exp() * log_p.masked_fill(log_q == -torch.inf, 0.0)).sum(1).mean()
    return (of_label + gamma * temperature**2 * of_others).to(dtype)


@loss_function
def ofa(
    student: Float[Tensor, "batch classes"],
    teacher: Float[Tensor, "batch classes"],
    labels: Int[Tensor, " batch"] | Float[Tensor, "batch classes"],
    /,
    *,
    eps: float = 1.5,
    temperature: float = 1.0,
) -> Float[Tensor, ""]:
    """Compute -sum over the classes of ((p_t + m)^eps - m) log p_s, averaged over the batch; m is 1 for the label.

    One-for-all, Hao et al. 2023 (arXiv 2310.19444), for models of unlike architectures; p is the softmax at
    temperature T, and there is no factor T^2. eps = 1 is the cross entropy with the teacher's probabilities; a larger
    one raises the label's share, the more the surer the teacher is. 1.5 is the paper's for ImageNet, where it was best
    of 1 to 2, and 1 for CIFAR-100. It is no divergence, and not 0 for equal outputs. Of labels that are a distribution,
    m is 1 for the largest. Classes that the teacher masks by -inf do not count.
    """
    return _ofa("ofa", student, teacher, labels, eps, temperature)


class OFAExits(nn.Module):
    """Compute the loss `ofa` between a linear classifier on a layer of the student and the teacher's output.

    One-for-all, Hao et al. 2023 (arXiv 2310.19444): early exits bring the features of unlike architectures into one
    space, that of the classes. Each pair is a layer of the student with the output of the teacher, as in
    `pairs: {blocks.2: ""}`, and has an exit of its own. Here an exit is one linear layer on the mean over positions,
    which is what the paper's has for the last stage of a CNN; for other stages it puts convolutions or a transformer
    block before the mean. The classifier begins as there, with a deviation of 0.02. In the paper, the loss has the
    weight 1 beside `ofa` of the outputs and the labels. `eps` and `temperature` are those of `ofa`.

    Shapes: vectors (batch, channels) of the student, logits (batch, classes) of the teacher, class indices (batch,) or
    one distribution an image. Raises LossError if there are labels which are no class of the teacher.
    """

    def __init__(
        self, student: FeatureSpec, teacher: FeatureSpec, *, eps: float = 1.5, temperature: float = 1.0
    ) -> None:
        super().__init__()
        _check_ofa("ofa_exits", eps, temperature)
        self.eps, self.temperature = eps, temperature
        self.exit = nn.Linear(student.channels, teacher.channels)
        nn.init.trunc_normal_(self.exit.weight, std=0.02)
        nn.init.zeros_(self.exit.bias)

    def forward(
        self,
        student: Float[Tensor, "batch channels"],
        teacher: Float[Tensor, "batch classes"],
        labels: Int[Tensor, " batch"] | Float[Tensor, "batch classes"],
    ) -> Float[Tensor, ""]:
        return _ofa("ofa_exits", self.exit(student), teacher, labels, self.eps, self.temperature)


def _check_factors(loss: str, **factors: float) -> None:
    for name, value in factors.items():
        if not is_number(value) or value < 0:
            raise LossError(f"{loss}: {name} {value}; expected a number from 0 on")


def _ofa(loss: str, student: Tensor, teacher: Tensor, labels: Tensor, eps: float, temperature: float) -> Tensor:
    _check_ofa(loss, eps, temperature)
    index = _index(loss, student, teacher, labels, least=1)
    p = (teacher / temperature).softmax(1)
    shares = (p**eps).scatter(1, index, (p.gather(1, index) + 1) ** eps - 1)
    log_p = F.log_softmax(student / temperature, dim=1)
    if not has_values(log_p) or log_p.detach().amin() == -torch.inf:  # classes that the student masks
        log_p = log_p.masked_fill(shares == 0, 0.0)
    return -(shares * log_p).sum(1).mean()


def _check_ofa(loss: str, eps: float, temperature: float) -> None:
    check_temperature(loss, temperature)
    if not is_number(eps) or eps < 1:
        raise LossError(f"{loss}: eps {eps}; expected a number from 1 on")


def _index(loss: str, student: Tensor, teacher: Tensor, labels: Tensor, least: int = 2) -> Int[Tensor, "batch 1"]:
    """The class of each image. Raises LossError for outputs and labels that do not fit, and fewer classes than `least`.

    Of a distribution, as Mixup makes them, it is the class with the largest share.
    """
    check_outputs(loss, student, teacher)
    check_target(loss, student.shape, labels)
    if has_values(labels):
        check_values(student.shape[1], labels, loss=loss)
    if student.shape[1] < least:
        raise LossError(f"{loss}: it compares the classes beside the label, and the logits have a single class")
    return labels.argmax(1, keepdim=True) if labels.is_floating_point() else labels.long()[:, None]


def _label_or_not(
    of_label: Float[Tensor, "batch 1"], others: Float[Tensor, "batch classes"]
) -> Float[Tensor, "batch 2"]:
    """log p_y and log (1 - p_y), by how far y lies above all other classes, so that p_y = 1 does not make it log 0."""
    margin = of_label - others.logsumexp(1, keepdim=True)
    return F.logsigmoid(torch.cat([margin, -margin], dim=1))


def _others(logits: Float[Tensor, "batch classes"], index: Int[Tensor, "batch 1"]) -> Float[Tensor, "batch classes"]:
    """The log of the softmax over the classes beside the label, whose entry is -inf."""
    return F.log_softmax(logits.scatter(1, index, -torch.inf), dim=1)
