"""Models of transformers and open_clip by name: built, traced and normalised as their own libraries do it."""

import json
from pathlib import Path
from typing import Any

import foreign_models
import pytest
import timm
import torch
from foreign_models import SMALL, open_clip, save_transformers, transformers
from torch import nn

from probe_kd import Distiller, InputSpec, Objective, match, trace
from probe_kd.engine.models import build_model, build_on_meta
from probe_kd.engine.weights import load_weights
from probe_kd.errors import TraceError


@pytest.fixture(scope="module")
def dino(tmp_path_factory: pytest.TempPathFactory) -> str:
    return foreign_models.dino(tmp_path_factory.mktemp("dino"))


@pytest.fixture(scope="module")
def siglip(tmp_path_factory: pytest.TempPathFactory) -> str:
    return foreign_models.siglip(tmp_path_factory.mktemp("siglip"))


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> str:
    return foreign_models.clip(tmp_path_factory.mktemp("clip") / "clip")


def loaded(name: str) -> nn.Module:
    return build_model(name, {}, pretrained=True).eval()


@torch.no_grad()
def test_weights_are_those_that_the_library_itself_loads(dino: str, siglip: str, clip: str) -> None:
    images = torch.randn(2, 3, 32, 32)
    for name in (dino, siglip):
        whole = transformers.AutoModel.from_pretrained(name.partition(":")[2]).eval()
        expected = getattr(whole, "vision_model", whole)(images)
        found = loaded(name)(images)
        assert torch.equal(found.last_hidden_state, expected.last_hidden_state)
        assert torch.equal(found.pooler_output, expected.pooler_output)
    whole = open_clip.create_model(f"local-dir:{clip.partition(':')[2]}").eval()
    assert torch.equal(loaded(clip)(images), whole.visual(images))


def test_a_checkpoint_of_images_and_text_gives_the_image_tower_its_weights(clip: str) -> None:
    model = build_model(clip, {})
    load_weights(model, Path(clip.partition(":")[2]) / "open_clip_model.safetensors")
    assert all(torch.equal(value, loaded(clip).state_dict()[name]) for name, value in model.state_dict().items())


def test_taps_of_outputs_have_the_names_of_transformers(dino: str, siglip: str, clip: str) -> None:
    for name, prefix in ((dino, 5), (siglip, 0)):
        traced = trace(name)
        tokens, pooled = traced["[last_hidden_state]"], traced["[pooler_output]"]
        assert (str(tokens.layout), tokens.grid, tokens.prefix_tokens) == ("NLC", (4, 4), prefix)
        assert (str(pooled.layout), pooled.channels) == ("NC", 32)
    assert trace(clip)[""].channels == 24


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("ViTImageProcessor", {"image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.3, 0.4]}),
        ("CLIPImageProcessor", {"crop_size": 24, "do_convert_rgb": False}),
        ("ViTImageProcessor", {"do_normalize": False}),
        ("ViTImageProcessor", {"do_rescale": False, "image_mean": [99.0] * 3, "image_std": [50.0] * 3}),
        ("EfficientNetImageProcessor", {"rescale_factor": 2 / 255, "rescale_offset": True, "include_top": False}),
    ],
)
def test_images_are_normalised_as_their_processor_does(tmp_path: Path, kind: str, options: dict[str, Any]) -> None:
    model = transformers.ViTModel(transformers.ViTConfig(**{**SMALL, "num_hidden_layers": 1}))
    name = save_transformers(tmp_path, model)
    processor = getattr(transformers, kind)(**options, do_resize=False, size=24)
    processor.save_pretrained(tmp_path)
    image = torch.randint(0, 256, (3, 24, 24), dtype=torch.uint8)
    expected = processor(image, return_tensors="pt")["pixel_values"][0]
    built = build_on_meta(name, {})
    given = InputSpec.of(built, (3, 24, 24))
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (given.mean, given.std))
    torch.testing.assert_close((image / 255 - mean) / std, expected, rtol=1e-4, atol=1e-4)
    assert built.pretrained_cfg["input_size"] == (3, 24, 24)


def test_open_clip_s_built_in_names_know_their_numbers_and_their_tags() -> None:
    config = build_on_meta("open_clip:ViT-B-16-SigLIP", {"layers": 1}).pretrained_cfg
    assert (config["input_size"], config["mean"]) == ((3, 224, 224), (0.5, 0.5, 0.5))
    openai = build_on_meta("open_clip:ViT-B-16.openai", {"layers": 1})
    assert openai.pretrained_cfg["mean"][0] == pytest.approx(0.48145466)
    assert "QuickGELU" in str(openai)  # with which these weights were trained, and which the plain name has not
    with pytest.raises(TraceError, match=r"no model 'ViT-B-61'; did you mean 'ViT-B-16'"):
        trace("open_clip:ViT-B-61")
    with pytest.raises(TraceError, match=r"no weights 'open' for ViT-B-16; did you mean 'openai'"):
        trace("open_clip:ViT-B-16.open")


def test_any_of_them_teaches_a_student(dino: str, siglip: str, clip: str) -> None:
    images = torch.randn(2, 3, 32, 32)
    for name in (dino, siglip, clip):
        student, teacher = timm.create_model("resnet10t", num_classes=3), loaded(name)
        pairs = match(trace(student, 32, training=True), trace(teacher, 32), num_pairs=2)
        distiller = Distiller(student, teacher, [Objective("hint", pairs=pairs)], student_input=InputSpec((3, 32, 32)))
        result = distiller(images)
        result["loss"].backward()
        assert result["loss"] > 0
        distiller.close()


def test_nothing_of_a_folder_is_run_and_nothing_is_left_random(tmp_path: Path, dino: str) -> None:
    folder = Path(dino.partition(":")[2])
    config = json.loads((folder / "config.json").read_text())

    def variant(name: str, text: str) -> str:
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(text)
        (tmp_path / name / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
        return f"transformers:{tmp_path / name}"

    own = variant(
        "own", json.dumps({"model_type": "mine", "auto_map": {"AutoModel": "code.M", "AutoConfig": "code.C"}})
    )
    with pytest.raises(TraceError, match="cannot build transformers:"):
        trace(own)
    mapped = variant("mapped", json.dumps({**config, "auto_map": {"AutoModel": "code.M"}}))
    assert trace(mapped).parameters == trace(dino).parameters
    assert not (tmp_path / "ran").exists()
    torch.save({}, tmp_path / "mapped" / "pytorch_model.bin")
    with pytest.raises(TraceError, match="safetensors"):
        build_model(mapped, {}, pretrained=True)
    with pytest.raises(TraceError, match=r"have no model.layer.3"):
        build_model(dino, {"num_hidden_layers": 4}, pretrained=True)
    for argument in ("image_size", "trust_remote_code", "img_size", "dtype", "auto_map"):
        with pytest.raises(TraceError, match=f"`{argument}` is no argument"):
            trace(dino, model_kwargs={argument: 64})
    with pytest.raises(TraceError, match=r"there is no .*expected a folder"):
        trace(f"transformers:{folder}x/")


def test_a_classifier_keeps_its_classes_or_gets_new_ones(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = transformers.ViTForImageClassification(transformers.ViTConfig(**SMALL, num_labels=5))
    name = save_transformers(tmp_path, model)
    assert trace(name)["[logits]"].channels == 5
    new = build_model(name, {"num_classes": 7}, pretrained=True)
    assert new(torch.randn(1, 3, 32, 32)).logits.shape == (1, 7)
    assert all(
        torch.equal(value, new.get_parameter(key))
        for key, value in model.named_parameters()
        if not key.startswith("classifier.")
    )
    with pytest.raises(TraceError, match="add_pooling_layer: false"):
        build_model(name, {"num_classes": 0}, pretrained=True)
    backbone = build_model(name, {"num_classes": 0, "add_pooling_layer": False}, pretrained=True)
    assert backbone(torch.randn(1, 3, 32, 32)).last_hidden_state.shape == (1, 17, 32)
