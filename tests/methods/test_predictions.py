"""Average precision against scikit-learn's, and one output as two classes."""

import pytest
import torch
from sklearn.metrics import average_precision_score
from torchmetrics.classification import MultilabelAveragePrecision

from probe_kd.methods.predictions import average_precisions, class_logits, mean_average_precision


@pytest.mark.parametrize("scale", [1.0, 1e3, 1e-6])
def test_average_precisions_are_those_of_scikit_learn_for_logits_of_any_size(scale: float) -> None:
    generator = torch.Generator().manual_seed(0)
    target = (torch.rand(200, 6, generator=generator) < torch.tensor([0.5, 0.1, 0.02, 0.9, 0.3, 0.0])).float()
    target[:, 3] = 1
    logits = target + torch.randn(200, 6, generator=generator)
    logits[:, 4] = logits[:, 4].round()  # of which many are equal
    found = average_precisions(scale * logits, target)
    assert found[5] is None
    expected = [float(average_precision_score(target[:, index], logits[:, index])) for index in range(5)]
    assert found[:5] == pytest.approx(expected, rel=1e-5)
    assert mean_average_precision(found) == pytest.approx(sum(expected) / 5, rel=1e-5)
    assert mean_average_precision([None]) is None


def test_the_mean_is_the_macro_average_of_torchmetrics() -> None:
    generator = torch.Generator().manual_seed(1)
    target = (torch.rand(100, 4, generator=generator) < 0.3).long()
    probabilities = torch.rand(100, 4, generator=generator)
    expected = MultilabelAveragePrecision(num_labels=4)(probabilities, target)
    found = mean_average_precision(average_precisions(probabilities.logit(), target.float()))
    assert found == pytest.approx(float(expected), rel=1e-5)


def test_one_output_is_the_second_of_two_classes() -> None:
    logits = torch.tensor([[-3.0], [0.0], [2.0]])
    assert class_logits(logits).argmax(1).tolist() == [0, 0, 1]
    assert torch.equal(class_logits(logits).softmax(1)[:, 1:], logits.sigmoid())
    assert class_logits(torch.zeros(2, 3)).shape == (2, 3)
