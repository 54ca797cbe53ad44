"""Stage ends of models of other libraries: the table, and a sample of it. All of it is in docs/matching.md."""

import collections

import pytest
from foreign_stages import ForeignModel, foreign_models, trace_foreign
from match_zoo import Judged, Score, check_pairs, foreign_truths, judged, wrong_layers

from probe_kd import match

# Small models, unlike each other, of every library: they are built and traced in seconds.
SAMPLE = {
    "torchvision": ("regnet_y_400mf", "vit_b_16", "lraspp_mobilenet_v3_large", "fasterrcnn_resnet50_fpn backbone"),
    "transformers": (
        "DINOv3ViTModel",
        "SwinModel",
        "ResNetForImageClassification",
        "DPTForDepthEstimation",
    ),
    "open_clip": ("RN50",),
    "segmentation_models_pytorch": ("inceptionresnetv2", "Unet of resnet18"),
}


@pytest.fixture(scope="module")
def sample() -> list[ForeignModel]:
    models = [model for model in foreign_models() if model.name in SAMPLE[model.library]]
    if not models:
        pytest.skip("the libraries are in the extra `foreign`")
    return models


@pytest.fixture(scope="module")
def traced(sample: list[ForeignModel]) -> list[Judged]:
    traces = [(model, trace_foreign(model)) for model in sample]
    return [judged(model.label, trace, foreign_truths(model, trace)) for model, trace in traces]


def test_the_table_names_stage_ends_and_their_source_for_unlike_models() -> None:
    models = foreign_models(installed=False)
    counts = collections.Counter(model.library for model in models)
    assert len({model.label for model in models}) == len(models) >= 60
    assert set(counts) == set(SAMPLE)
    assert min(counts.values()) >= 10
    assert all(model.stages and ".py: " in model.source and len(model.input_size) == 3 for model in models)
    assert all(
        name in {model.name for model in models if model.library == library}
        for library in SAMPLE
        for name in SAMPLE[library]
    )


def test_stage_ends_are_those_that_authors_name(sample: list[ForeignModel], traced: list[Judged]) -> None:
    total = Score()
    differences = [
        total.add(side.traced, foreign_truths(model, side.traced)) for model, side in zip(sample, traced, strict=True)
    ]
    assert total.models == len(sample)
    assert total.recall.alike == total.recall.layers, differences
    assert total.precision.alike == total.precision.layers, differences
    assert total.recall.normed / total.recall.layers >= 0.95, differences


def test_pairs_of_libraries_have_a_legal_plan_with_no_wrong_layer(traced: list[Judged]) -> None:
    for student, teacher in zip(traced, [*traced[1:], traced[0]], strict=True):
        for first, second in ((student, teacher), (teacher, student)):
            pairs = match(first.traced, second.traced)
            assert check_pairs(first.traced, second.traced, pairs) >= 3
            assert wrong_layers(first, second, pairs) == []
