"""The vector of an image, against timm's own features before the classifier."""

import pytest
import timm
import torch
from torch import nn

from probe_kd.engine.embedding import embedding_spec
from probe_kd.engine.probe import Probe
from probe_kd.engine.tracing import trace
from probe_kd.methods.adapters import pooled

FAMILIES = {
    "resnet10t": {},
    "vit_tiny_patch16_224": {"img_size": 64},
    "vit_tiny_patch16_dinov3": {"img_size": 64},
    "deit_tiny_distilled_patch16_224": {"img_size": 64},
    "convnext_atto": {},
    "mobilenetv4_conv_small": {},
    "efficientnet_b0": {},
    "swin_tiny_patch4_window7_224": {"img_size": 64, "window_size": 4},
    "resnetv2_50": {},
    "mixer_s32_224": {"img_size": 64},
}


def embedding(model: nn.Module, images: torch.Tensor, **options: str) -> torch.Tensor:
    spec = embedding_spec(model, trace(model, tuple(images.shape[1:])), **options)
    with torch.no_grad():
        (feature,) = Probe(model, [spec])(images).values()
        return pooled(spec)(feature)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("classes", [7, 0])
def test_it_is_what_timm_gives_before_the_classifier(name: str, classes: int) -> None:
    try:
        model = timm.create_model(name, num_classes=classes, **FAMILIES[name]).eval()
    except RuntimeError as refusal:  # of an older timm
        pytest.skip(str(refusal))
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        features = model.forward_features(images)
        expected = model.forward_head(features, pre_logits=True)
        if "distilled" in name and classes:  # of two heads, the vector of the first
            expected = features[:, 0]
    torch.testing.assert_close(embedding(model, images), expected.flatten(1), rtol=1e-4, atol=1e-4)


class Custom(nn.Module):
    def __init__(self, last: str) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        setattr(self, last, nn.Linear(4, 6))
        self.last = last

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = getattr(self, self.last)(self.body(images))
        return output


def test_a_custom_model_ends_in_a_classifier_if_its_last_layer_is_called_so() -> None:
    images = torch.randn(2, 3, 16, 16)
    for last, is_classifier in (("fc", True), ("classifier", True), ("head", True), ("projection", False)):
        model = Custom(last).eval()
        with torch.no_grad():
            expected = model.body(images) if is_classifier else model(images)
            before = nn.functional.relu(model.body[0](images)).mean((2, 3))
        torch.testing.assert_close(embedding(model, images), expected)
        torch.testing.assert_close(embedding(model, images, tap="body.1"), before)
