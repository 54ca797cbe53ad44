"""Matching: stage ends a person would choose, legal pairs for all families, and reasons."""

import dataclasses
import re

import pytest
from families import families
from match_zoo import SILENT, Score, check_plan, check_step, judge, judged, rings, truths

from probe_kd import Trace, match, trace
from probe_kd.engine.matching import blocks, stages
from probe_kd.errors import MatchError

# What a person who reads the model's source would write down.
STAGES = {
    "resnet18": "act1 layer1 layer2 layer3 layer4",
    "convnext_atto": "stages.0 stages.1 stages.2 stages.3",
    "swin_tiny_patch4_window7_224": "layers.0 layers.1 layers.2 layers.3",
    "vit_tiny_patch16_224": "blocks.2 blocks.5 blocks.8 blocks.11",
    "mixer_s16_224": "blocks.1 blocks.3 blocks.5 blocks.7",
    "efficientnet_b0": "blocks.0 blocks.1 blocks.2 blocks.4 blocks.6",
    "mobilenetv3_small_050": "bn1 blocks.0 blocks.1 blocks.3 blocks.5",
    "vgg11": "features.1 features.4 features.9 features.14 features.19",
    "hiera_tiny_224": "blocks.0 blocks.2 blocks.9 blocks.11",
    "cait_xxs24_224": "blocks.5 blocks.11 blocks.17 blocks.23",
}
PAIRS = {
    ("resnet18", "convnext_atto"): "layer1 <- stages.0, layer2 <- stages.1, layer3 <- stages.2, layer4 <- stages.3",
    (
        "vit_tiny_patch16_224",
        "resnet18",
    ): "blocks.2 <- layer1, blocks.5 <- layer2, blocks.8 <- layer3, blocks.11 <- layer4",
    ("convnext_atto", "deit_tiny_patch16_224"): (
        "stages.0 <- blocks.1, stages.1 <- blocks.3, stages.2 <- blocks.9, stages.3 <- blocks.11"
    ),
    ("beit_base_patch16_224", "mixer_s16_224"): (
        "blocks.2 <- blocks.1, blocks.5 <- blocks.3, blocks.8 <- blocks.5, blocks.11 <- blocks.7"
    ),
}


@pytest.fixture(scope="module")
def some() -> dict[str, tuple[Trace, Trace]]:
    """Every seventh family, as a student (every other one in training mode) and as a teacher."""
    teachers = {name: trace(name) for name in families()[::7]}
    learning = list(teachers)[::2]
    return {
        name: (trace(name, training=True) if name in learning else traced, traced) for name, traced in teachers.items()
    }


@pytest.mark.parametrize("name", STAGES)
def test_stage_ends_are_those_a_person_would_choose(name: str) -> None:
    assert " ".join(str(spec.tap) for spec in stages(trace(name))) == STAGES[name]


def test_blocks_are_the_repeated_modules() -> None:
    counts = {"resnet18": 8, "vit_tiny_patch16_224": 12, "convnext_atto": 12, "efficientnet_b0": 16}
    assert {name: len(blocks(trace(name))) for name in counts} == counts
    assert [str(spec.tap) for spec in blocks(trace("resnet18"))][:3] == ["layer1.0", "layer1.1", "layer2.0"]


@pytest.mark.parametrize(("student", "teacher"), PAIRS)
def test_pairs_by_stride_or_by_depth_student_first_with_a_reason(student: str, teacher: str) -> None:
    pairs = match(trace(student), trace(teacher))
    assert ", ".join(map(str, pairs)) == PAIRS[student, teacher]
    assert all(re.search(r"stride|depth", pair.reason) for pair in pairs)


def test_most_stage_ends_agree_with_feature_info(some: dict[str, tuple[Trace, Trace]]) -> None:
    """The figure over all families is in docs/matching.md."""
    total = Score()
    for name, (_, traced) in some.items():
        total.add(traced, truths(name))
    assert total.recall.layers >= 40
    assert total.recall.alike / total.recall.layers >= 0.95, str(total.recall)
    assert total.precision.alike / total.precision.layers >= 0.95, str(total.precision)


@pytest.mark.filterwarnings("ignore::probe_kd.MatchWarning")
def test_pairs_of_families_have_a_legal_plan(some: dict[str, tuple[Trace, Trace]]) -> None:
    """Each as a student and as a teacher of five others; all pairs of all families are in docs/matching.md."""
    for (student, _), (_, teacher) in rings(list(some.values()), list(some.values()), (0, 1, 4, 6, 11)):
        assert check_plan(student, teacher) >= 2, (student.model, teacher.model)


@pytest.mark.parametrize("name", ["ghostnet_050", "nf_regnet_b0", "inception_v4", "mobilevit_xxs", "xception41p"])
def test_a_layer_that_its_author_does_not_name_is_told_or_named_elsewhere(name: str) -> None:
    """All pairs of families are in docs/matching.md; these are the ones whose layers were wrong in silence."""
    other = judged("resnet18", trace("resnet18"), truths("resnet18"))
    model = judged(name, trace(name), truths(name))
    for student, teacher in ((model, other), (other, model)):
        mistakes, verdict = judge(student, teacher, match(student.traced, teacher.traced), doubted=False)
        assert verdict != SILENT, mistakes


@pytest.mark.parametrize(
    ("student", "teacher"),
    [
        ("test_vit", "test_convnext"),
        ("test_convnext", "test_vit_relpos"),
        ("test_byobnet", "test_coatnet"),
        ("swiftformer_xs", "test_efficientnet"),
        ("test_resnet", "starnet_s050"),
    ],
)
def test_a_step_of_training_reaches_the_student(student: str, teacher: str) -> None:
    check_step(student, teacher)


@pytest.mark.parametrize("size", [16, 32, 33, (48, 64)])
def test_small_and_odd_images_still_match(size: int | tuple[int, int]) -> None:
    student = trace("vit_tiny_patch16_224", size, model_kwargs={"img_size": size, "patch_size": 4})
    pairs = match(student, trace("resnet18", size))
    assert str(pairs[-1]) == "blocks.11 <- layer4" or size == 16
    assert len(pairs) >= 3


def test_block_level_pairs_more_and_keeps_the_stage_ends() -> None:
    student, teacher = trace("resnet18"), trace("convnext_atto")
    ends, fine = match(student, teacher), match(student, teacher, level="block")
    assert set(ends) < set(fine)
    assert len(fine) == 8
    orders = [(student[pair.student].order, teacher[pair.teacher].order) for pair in fine]
    assert orders == sorted(orders)


def test_num_pairs_thins_evenly_and_keeps_the_deepest() -> None:
    student, teacher = trace("resnet18"), trace("convnext_atto")
    assert [str(pair) for pair in match(student, teacher, num_pairs=1)] == ["layer4 <- stages.3"]
    assert [str(pair) for pair in match(student, teacher, num_pairs=2)] == ["layer2 <- stages.1", "layer4 <- stages.3"]
    with pytest.raises(MatchError, match=r"num_pairs 5: .* make 4 pairs of stages; level 'block'"):
        match(student, teacher, num_pairs=5)
    with pytest.raises(MatchError, match="num_pairs 0"):
        match(student, teacher, num_pairs=0)


def test_a_model_without_features_is_refused_by_name() -> None:
    traced = trace("resnet18")
    bare = dataclasses.replace(traced, specs=tuple(spec for spec in traced.specs if spec.grid is None))
    with pytest.raises(MatchError, match="resnet18 at 3x224x224 yields no feature map"):
        match(traced, bare)
    with pytest.raises(MatchError, match="expected 'stage' or 'block'"):
        match(traced, traced, level="layer")  # type: ignore[arg-type]
