"""The mean of several classifiers' probabilities, as one teacher's output."""

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from probe_kd.engine.probe import reader
from probe_kd.engine.spec import FeatureSpec, Tap
from probe_kd.methods.adapters import Adapter, adapt_outputs


class MeanOfTeachers(nn.Module):
    """The logarithm of the weighted mean of several classifiers' probabilities, as logits for a loss of outputs.

    `log sum_i w_i softmax(z_i) / sum_i w_i`, in float32 at least: the ensemble of Hinton, Vinyals and Dean 2015 (arXiv
    1503.02531), by its arithmetic mean. `selections` are modules that bring the logits of each teacher to the student's
    classes before the softmax. A class that one teacher masks (-inf) has its share of the others, and -inf if all do. A
    loss with a temperature T raises the mean to the power 1/T, not the probabilities of each teacher.

    With `multilabel`, or a single output, each class has a probability of its own, the sigmoid of its logit. The result
    is then the logit of the mean of these.
    """

    def __init__(self, selections: Sequence[nn.Module], weights: Sequence[float], *, multilabel: bool = False) -> None:
        super().__init__()
        self.multilabel = multilabel
        self.selections = nn.ModuleList(selections)
        shares = torch.tensor(weights, dtype=torch.float64, device="cpu")
        self.register_buffer("log_shares", (shares / shares.sum()).log(), persistent=False)
        self.log_shares: Tensor

    def forward(self, outputs: Sequence[Float[Tensor, "batch _"]]) -> Float[Tensor, "batch classes"]:
        with torch.autocast(outputs[0].device.type, enabled=False):
            logits = [select(output) for select, output in zip(self.selections, outputs, strict=True)]
            wide = torch.promote_types(logits[0].dtype, torch.float32)
            stacked = torch.stack([of_teacher.to(wide) for of_teacher in logits])
            log_shares = self.log_shares.to(stacked)[:, None, None]
            if not self.multilabel and stacked.shape[2] > 1:
                return torch.logsumexp(torch.log_softmax(stacked, dim=2) + log_shares, dim=0)
            yes, no = (torch.logsumexp(logsigmoid(sign * stacked) + log_shares, dim=0) for sign in (1, -1))
            return yes - no


def adapt_mean(
    student: FeatureSpec,
    teachers: Sequence[FeatureSpec],
    weights: Sequence[float],
    class_maps: Mapping[str, Sequence[int]],
    *,
    multilabel: bool = False,
) -> Adapter:
    """Return the adapter that compares the student's logits with the mean of several teachers' probabilities.

    `class_maps[name][i]` is the index of the student's class i in the teacher `name`. Raises AdapterError as
    `adapt_outputs` does for each teacher.
    """
    adapters = [adapt_outputs(student, teacher, class_maps.get(teacher.tap.model)) for teacher in teachers]
    shares = [f"{weight / sum(weights):.3g} {spec.tap.label}" for weight, spec in zip(weights, teachers, strict=True)]
    mean = MeanOfTeachers([adapter.teacher_steps for adapter in adapters], weights, multilabel=multilabel)
    return Adapter(nn.Sequential(), mean, f"{student.describe()} | teacher log of the mean: {' + '.join(shares)}")


class Ensemble(nn.Module):
    """Several classifiers as one model: `ensemble(images)` is the mean of their probabilities, as `MeanOfTeachers`.

    `views` bring the images to what each of the models sees, and `outputs` are the taps of their logits.
    """

    def __init__(
        self, models: Sequence[nn.Module], views: Sequence[nn.Module], outputs: Sequence[Tap], mean: MeanOfTeachers
    ) -> None:
        super().__init__()
        self.models, self.views, self.outputs, self.mean = nn.ModuleList(models), nn.ModuleList(views), outputs, mean

    def forward(self, images: Tensor) -> Tensor:
        parts = zip(self.models, self.views, self.outputs, strict=True)
        mean: Tensor = self.mean([reader(model, output)(view(images)) for model, view, output in parts])
        return mean
