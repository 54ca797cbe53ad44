"""Outputs are taps: any vector of either side, for one loss or for a whole model."""

from collections import namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from probe_kd import Distiller, Objective, trace
from probe_kd.engine.spec import InputSpec, Tap
from probe_kd.errors import AdapterError, LossError, ProbeKDError, TapError, TraceError
from probe_kd.methods.outputs import output_spec, vectors_near

INPUT = InputSpec((3, 8, 8), 0.0, 1.0)


@dataclass
class Both:
    logits: Tensor
    embedding: Tensor


Pair = namedtuple("Pair", "logits embedding")
FORMS: dict[str, tuple[Callable[[Tensor, Tensor], Any], str, str]] = {
    "tuple": (lambda logits, embedding: (logits, embedding), "[0]", "[1]"),
    "list of a tuple": (lambda logits, embedding: [(embedding, logits)], "[0][1]", "[0][0]"),
    "dict": (lambda logits, embedding: {"logits": logits, "embedding": embedding}, "[logits]", "[embedding]"),
    "dataclass": (Both, "[logits]", "[embedding]"),
    "named tuple": (Pair, "[0]", "[1]"),
    "plain": (lambda logits, embedding: logits, "", "body"),
    "a map": (lambda logits, embedding: embedding[:, :, None, None], "head", "body"),
}


class Net(nn.Module):
    def __init__(self, form: str, width: int = 6, classes: int = 4) -> None:
        super().__init__()
        self.body, self.head, self.other_head = nn.Linear(192, width), nn.Linear(width, classes), nn.Linear(width, 4)
        self.make = FORMS[form][0]

    def forward(self, images: Tensor) -> Any:
        embedding = self.body(images.flatten(1))
        return self.make(self.head(embedding), embedding)


@settings(max_examples=25, deadline=None)
@given(st.sampled_from([*FORMS]), st.sampled_from([*FORMS]), st.booleans())
def test_a_loss_reads_the_tap_that_it_names_whatever_a_model_returns(one: str, two: str, embeddings: bool) -> None:
    student, teacher = Net(one), Net(two)
    taps = {"student": FORMS[one][1 + embeddings], "teacher": FORMS[two][1 + embeddings]}
    labels, both = Objective("cross_entropy", student=FORMS[one][1]), Objective("logits", **taps)
    inputs = {"student_input": INPUT, "teacher_input": INPUT}
    images, target = torch.randn(5, 3, 8, 8), torch.tensor([0, 1, 2, 3, 0])
    distiller = Distiller(student, teacher, [labels, both], output=FORMS[one][1], **inputs)
    result = distiller(images, target)
    cached = distiller(images, target, distiller.teacher_targets(images))
    distiller.close()
    seen, wanted = (net.body(images.flatten(1)) for net in (student, teacher))
    logits = student.head(seen)
    sides = (seen, wanted) if embeddings else (logits, teacher.head(wanted))
    torch.testing.assert_close(result["logits"], F.mse_loss(*sides))
    torch.testing.assert_close(result["cross_entropy"], F.cross_entropy(logits, target))
    torch.testing.assert_close(result["output"], logits)
    torch.testing.assert_close(cached["logits"], result["logits"])


def test_two_heads_of_a_distilled_deit_learn_each_their_own() -> None:
    kwargs = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": 10}
    student = timm.create_model("deit_tiny_distilled_patch16_224", **kwargs)
    teacher = timm.create_model("resnet10t", channels=[8, 8, 8, 16], num_classes=10)
    objectives = [
        Objective("cross_entropy", "task", weight=0.5, student="head"),
        Objective("hard_labels", "distil", weight=0.5, student="head_dist"),
    ]
    images, target = torch.randn(4, 3, 32, 32), torch.arange(4)
    both = InputSpec((3, 32, 32), 0.0, 1.0)
    distiller = Distiller(student, teacher, objectives, student_input=both, teacher_input=both)
    result = distiller.train()(images, target)
    distiller.close()
    assert result["output"] is None  # the mean of both heads, which nothing reads
    result["loss"].backward()
    assert student.head.weight.grad is not None
    student.set_distilled_training(True)
    head, head_dist = student.train()(images)
    with torch.no_grad():
        classes = teacher.eval()(images).argmax(1)
    torch.testing.assert_close(result["task"], F.cross_entropy(head, target))
    torch.testing.assert_close(result["distil"], F.cross_entropy(head_dist, classes))


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"loss": "soft_targets"}, TraceError, r"student Net gives several tensors \(\[0\], \[1\]\).*'\[1\]' \(6\)"),
        ({"loss": "soft_targets", "student": "[1]", "teacher": "body"}, AdapterError, r"6 classes and the teacher 12"),
        ({"loss": "soft_targets", "student": "bodi"}, TapError, "no module 'bodi'; did you mean 'body'"),
        ({"loss": "soft_targets", "student": "other_head"}, TapError, "'other_head' never fires"),
        (
            {"loss": "soft_targets", "student": "[2]"},
            TapError,
            r"no tensor at '\[2\]'; its taps there: '@input', '\[0\]', '\[1\]'",
        ),
        ({"loss": "cross_entropy"}, TraceError, "several tensors"),
        (
            {"loss": "cross_entropy", "teacher": "body"},
            LossError,
            "one output, of the student; `teacher` means nothing",
        ),
        ({"loss": "hint", "pairs": {"body": "body"}, "student": "head"}, LossError, "name head in `pairs`"),
        ({"loss": "soft_targets", "student": "[0"}, TapError, "not a tap"),
    ],
)
def test_a_tap_that_no_loss_can_read_is_refused_when_the_step_is_made(
    options: dict[str, Any], error: type[ProbeKDError], says: str
) -> None:
    inputs = {"student_input": INPUT, "teacher_input": INPUT}
    with pytest.raises(error, match=says):
        Distiller(Net("tuple"), Net("plain", width=12), Objective(**options), **inputs)


def test_what_is_no_vector_is_refused_with_the_nearest_that_are() -> None:
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=2, num_classes=0, global_pool="")
    traced = trace(model, 32)
    with pytest.raises(AdapterError, match=r"the teacher's output is 17 x 192 an image.*no tap of it yields a vector"):
        output_spec(traced, Tap(""), "teacher")
    pooled = trace(timm.create_model("resnet10t", channels=[8, 8, 8, 16]), 32)
    with pytest.raises(AdapterError, match=r"tap 'layer4' is 16 x 1 x 1.*'global_pool' \(16\)"):
        output_spec(pooled, Tap("layer4"), "student")
    assert [str(spec.tap) for spec in vectors_near(pooled, Tap("layer1"))] == ["global_pool", "fc"]
