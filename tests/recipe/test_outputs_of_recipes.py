"""Recipes whose losses read other taps than what a model returns, or none: what is refused, and what counts."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import record
from running import Quiet, run

from probe_kd.errors import RecipeError
from probe_kd.recipe.planner import Plan, plan
from probe_kd.recipe.reading import parse
from probe_kd.results.evaluation import evaluate
from probe_kd.training.processes import accelerating
from probe_kd.training.trial import check_student

VIT = "img_size: 16, patch_size: 4, embed_dim: 24, depth: 1, num_heads: 2"
DEIT = f"{{model: deit_tiny_distilled_patch16_224, model_kwargs: {{{VIT}}}}}"
RESNET = "{model: resnet10t, model_kwargs: {channels: [8, 8, 8, 16]}}"
BACKBONE = "{model: resnet10t, model_kwargs: {channels: [8, 8, 8, 16], num_classes: 0}}"
TRAINED = "{model: resnet10t, model_kwargs: {channels: [8, 8, 8, 24]}, train: {epochs: 1}}"
HEADLESS = f"{{model: vit_tiny_patch16_224, pretrained: true, model_kwargs: {{{VIT}, num_classes: 0}}}}"
MAPS = HEADLESS.replace("num_classes: 0", "num_classes: 0, global_pool: ''")
OTHER = HEADLESS.replace("num_classes: 0", "num_classes: 7")
FOREIGN = "{{model: 'models_of_test:{0}', model_kwargs: {{width: 24}}{1}}}"

MODELS = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, form, width=24, num_classes=10, in_chans=3):
        super().__init__()
        self.conv, self.head, self.aux = nn.Conv2d(3, width, 4, 4), nn.Linear(width, num_classes), nn.Linear(width, 10)
        self.form = form

    def forward(self, images):
        embedding = torch.relu(self.conv(images)).mean((2, 3))
        logits = self.head(embedding)
        if self.form == "aux":
            return (logits, self.aux(embedding)) if self.training else logits
        return {"logits": logits, "embedding": embedding}

def several(**kwargs):
    return Net("dict", **kwargs)

def auxiliary(**kwargs):
    return Net("aux", **kwargs)
"""


@pytest.fixture(autouse=True)
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    (tmp_path / "models_of_test.py").write_text(MODELS)
    monkeypatch.syspath_prepend(tmp_path)
    yield
    sys.modules.pop("models_of_test", None)


def recipe(student: str, teacher: str, *losses: str, pairs: str = "", data: str = "") -> str:
    names = [loss.removeprefix("{loss: ").partition(",")[0].strip("}") for loss in losses]
    terms = ", ".join(f"{name}_{index}: {loss}" for index, (name, loss) in enumerate(zip(names, losses, strict=True)))
    return "\n".join(
        [
            f"student: {student}",
            f"teacher: {teacher}",
            "data: {dataset: sklearn/digits, input_size: [3, 16, 16], batch_size: 32, fraction: 0.1, hflip: 0.0}",
            *([f"pairs: {pairs}"] if pairs else []),
            f"stages: [{{epochs: 1, losses: {{{terms}}}}}]",
        ]
    )


def planned(text: str) -> Plan:
    return plan(parse(text, "r.yaml"), allow_import=["models_of_test"])


CE, SOFT, HARD, HINT = (f"{{loss: {name}}}" for name in ("cross_entropy", "soft_targets", "hard_labels", "hint"))
LAST = "{layer4: blocks.0}"


def at(loss: str, **taps: str) -> str:
    return loss[:-1] + "".join(f", {side}: '{tap}'" for side, tap in taps.items()) + "}"


def with_keys(model: str, keys: str) -> str:
    return model.replace(", model_kwargs", f", {keys}, model_kwargs")


CLASSIFYING = {  # the recipe, and whether the accuracy of the student and of the teacher mean something
    "two heads": (recipe(DEIT, TRAINED, at(CE, student="head"), at(HARD, student="head_dist")), "st"),
    "a headless teacher": (recipe(RESNET, HEADLESS, CE, HINT, pairs=LAST), "s"),
    "a teacher of maps": (recipe(RESNET, MAPS, CE, HINT, pairs=LAST), "s"),
    "a teacher of other classes": (recipe(RESNET, OTHER, CE, HINT, pairs=LAST), "s"),
    "a headless student": (recipe(BACKBONE, TRAINED, HINT, pairs="{layer4: layer4}"), "t"),
    "hints alone": (recipe(RESNET, TRAINED, HINT, pairs="{layer4: layer4}"), "t"),
    "two backbones": (recipe(BACKBONE, HEADLESS, HINT, pairs=LAST), ""),
    "embeddings": (recipe(BACKBONE.replace("16]", "24]"), HEADLESS, "{loss: logits}"), ""),
    "an embedding of a teacher that classifies": (
        recipe(BACKBONE.replace("16]", "24]"), TRAINED, "{loss: logits, teacher: global_pool}"),
        "t",
    ),
    "a classifier that learns features": (recipe(RESNET, HEADLESS, HINT, pairs='{fc: ""}'), ""),
    "the output as the layer of a pair": (recipe(RESNET, TRAINED, HINT, pairs="{fc: fc}"), "st"),
    "soft targets alone": (recipe(RESNET, TRAINED, SOFT), "st"),
    "items": (
        recipe(
            FOREIGN.format("several", ", output: '[logits]'"),
            FOREIGN.format("several", ", output: '[logits]', train: {epochs: 1}"),
            *(CE, SOFT, at("{loss: logits}", student="[embedding]", teacher="[embedding]")),
        ),
        "st",
    ),
    "a tuple in training alone": (
        recipe(FOREIGN.format("auxiliary", ""), TRAINED, at(CE, student="[0]"), at(SOFT, student="[1]")),
        "st",
    ),
    "several outputs, measured on the first": (
        recipe(FOREIGN.format("several", ""), TRAINED, at(CE, student="[logits]")),
        "st",
    ),
    "other classes by a map": (
        recipe(RESNET, with_keys(OTHER, "class_map: [0, 1, 2, 3, 4, 5, 6, 0, 1, 2]"), CE, SOFT),
        "st",
    ),
}


@pytest.mark.parametrize(("text", "sides"), CLASSIFYING.values(), ids=CLASSIFYING)
def test_accuracy_means_something_where_a_loss_reads_classes_and_a_step_does_what_the_plan_allows(
    text: str, sides: str
) -> None:
    made = planned(text)
    assert {side[0] for side in ("student", "teacher") if made.classifies(side)} == {*sides}  # type: ignore[arg-type]
    if "pretrained" not in text:  # whose weights are on no disk here
        with accelerating(made.recipe) as accelerator:
            check_student(made, accelerator, Quiet())


CACHED = "cache: x, cache_top_k: {0}"
REFUSED = {
    "labels of a backbone": (
        recipe(BACKBONE, TRAINED, CE),
        "1:29: the student has no classifier, and loss `cross_entropy_0` reads 10",
    ),
    "soft targets of a backbone": (
        recipe(RESNET, HEADLESS, CE, SOFT),
        "the teacher has no classifier, and loss `soft_targets_1` reads 10",
    ),
    "a backbone trained on labels": (
        recipe(RESNET, TRAINED.replace("24]", "24], num_classes: 0"), CE, HINT, pairs="{layer4: layer4}"),
        "the teacher has no classifier, and `train` reads 10 classes where it yields 24",
    ),
    "maps": (recipe(RESNET, MAPS, CE, SOFT), "the teacher's output is 17 x 24 an image"),
    "a layer that is a map": (recipe(RESNET, TRAINED, at(CE, student="layer4")), "'global_pool' (16)"),
    "another width": (recipe(RESNET, TRAINED, at(CE, student="global_pool")), "'global_pool' yields 16 numbers"),
    "an output of another width": (
        recipe(with_keys(RESNET, "output: global_pool"), TRAINED, CE),
        "1:29: the student's tap 'global_pool' yields 16 numbers",
    ),
    "a layer that is not there": (recipe(RESNET, TRAINED, at(HARD, teacher="head")), "has no module 'head'"),
    "a layer that never runs": (
        recipe(DEIT.replace("{model", "{output: blocks.0.attn.attn_drop, model"), TRAINED, CE),
        "'blocks.0.attn.attn_drop' never fires",
    ),
    "no tap": (recipe(RESNET, TRAINED, at(CE, student="fc[")), "'fc[' is not a tap"),
    "a teacher's tap beside labels": (recipe(RESNET, TRAINED, at(CE, teacher="fc")), "`teacher` means nothing"),
    "an output of a loss of layers": (
        recipe(RESNET, TRAINED, CE, at(HINT, student="fc"), pairs="{layer4: layer4}"),
        "name fc in `pairs`",
    ),
    "several outputs": (
        recipe(FOREIGN.format("several", ""), TRAINED, CE),
        "gives several tensors ([logits], [embedding]), and a loss reads one; the nearest taps that yield a vector: "
        "'[logits]' (10)",
    ),
    "an item in training alone": (
        recipe(FOREIGN.format("auxiliary", ", output: '[0]'"), TRAINED, CE),
        "yields no tensor at '[0]'; its taps there: '@input', ''",
    ),
    "more logits than there are": (
        recipe(RESNET, with_keys(TRAINED, CACHED.format(11)), at(SOFT, teacher="fc")),
        "the teacher has 10 logits, got 11",
    ),
    "a layer of which only logits are kept": (
        recipe(RESNET, with_keys(TRAINED, CACHED.format(2)), HARD, HINT, pairs="{fc: ''}"),
        "loss `hint_1` (hint) needs all logits; only soft_targets and hard_labels do not",
    ),
    "a map of classes that are not there": (
        recipe(RESNET, with_keys(HEADLESS, "class_map: [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]"), CE, HINT, pairs=LAST),
        "has no classifier; leave `class_map` out",
    ),
    "a new classifier of a backbone": (
        recipe(with_keys(BACKBONE, "pretrained: true, new_classifier: true"), HEADLESS, HINT, pairs=LAST),
        "`new_classifier`: the model has none",
    ),
}


@pytest.mark.parametrize(("text", "says"), REFUSED.values(), ids=REFUSED)
def test_an_output_that_a_loss_cannot_read_is_refused_in_one_sentence(text: str, says: str) -> None:
    with pytest.raises(RecipeError) as caught:
        planned(text)
    assert says in str(caught.value)
    assert len(caught.value.problems) == 1


def test_a_run_is_measured_on_the_output_that_it_names_and_a_cache_keeps_what_is_read_of_the_teacher(
    tmp_path: Path,
) -> None:
    student = DEIT.replace("}}", "}, output: head}")
    teacher = TRAINED.replace("train:", f"output: fc, cache: {tmp_path / 'cache'}, cache_top_k: 1, train:")
    text = recipe(student, teacher, CE, HARD[:-1] + ", student: head_dist}") + "\nbaseline: true\n"
    text = text.replace("hflip: 0.0", "no_aug: true, hflip: 0.0")
    run(text, tmp_path / "run")
    plain = text.replace(f"cache: {tmp_path / 'cache'}, cache_top_k: 1, ", "")
    run(plain, tmp_path / "plain")
    rows = [[row["loss"] for row in record(tmp_path / name)] for name in ("run", "plain")]
    assert rows[0] == pytest.approx(rows[1])
    scores = {score.role: score.top1 for score in evaluate(tmp_path / "run", device="cpu").scores}
    results = json.loads((tmp_path / "run/summary.json").read_text())["results"]
    assert scores == {result["role"]: result["accuracy"] for result in results}
