"""A backbone on its way into the world: exported without the classifier that nothing trained, described, uploaded."""

import json
from pathlib import Path
from typing import Any, ClassVar

import huggingface_hub
import pytest
import timm
import torch
from conftest import Command
from huggingface_hub.errors import LocalTokenNotFoundError
from PIL import Image
from ruamel.yaml import YAML
from torch import nn

from probe_kd.engine.weights import save_weights
from probe_kd.results.export import export

# name, its arguments, those of another backbone by timm itself
STUDENTS: dict[str, dict[str, Any]] = {
    "resnet10t": {"channels": [8, 16, 32, 32]},
    "vit_tiny_patch16_224": {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2},
    "deit_tiny_distilled_patch16_224": {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 2},
    "mobilenetv4_conv_small": {},
    "convnext_atto": {"depths": [1, 1, 1, 1], "dims": [8, 8, 16, 16]},
}


def write_run(
    folder: Path, name: str, *, teacher: str = "resnet10t", loss: str = "hint", layer: str = "layer4"
) -> nn.Module:
    """A finished run without labels, of hints alone."""
    kwargs = STUDENTS[name]
    folder.mkdir(parents=True)
    (folder.parent / "images").mkdir(exist_ok=True)
    for number in range(10):
        Image.effect_noise((30, 40), 20 * number + 20).convert("RGB").save(folder.parent / "images" / f"{number}.png")
    (folder / "recipe.yaml").write_text(f"""\
student: {{model: {name}, model_kwargs: {json.dumps(kwargs)}}}
teacher: {{model: '{teacher}', pretrained: true}}
data: {{root: {folder.parent / "images"}, labels: none, holdout: 0.5, input_size: [3, 32, 32]}}
pairs: {{{json.dumps(layer) if name == "resnet10t" else "x"}: layer4}}
stages: [{{epochs: 1, losses: {{it: {{loss: {loss}}}}}}}]
""")
    torch.manual_seed(0)
    model = timm.create_model(name, **kwargs)
    save_weights(model, folder / "student.safetensors", {"model": name, "model_kwargs": kwargs})
    return model.eval()


@pytest.mark.parametrize("name", STUDENTS)
def test_a_classifier_that_nothing_trained_is_left_out(name: str, tmp_path: Path) -> None:
    model = write_run(tmp_path / "run", name)
    done = export(tmp_path / "run", tmp_path / "out")
    assert (done.outputs, done.difference) == ("features", 0.0)
    images = torch.randn(2, 3, 32, 32)
    backbone = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    model.reset_classifier(0)  # type: ignore[operator]
    assert torch.equal(backbone(images), model(images))
    assert backbone.pretrained_cfg["num_classes"] == 0
    tuned = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True, num_classes=7).eval()
    assert tuned(images).shape == (2, 7)
    assert all(torch.equal(tensor, tuned.state_dict()[key]) for key, tensor in backbone.state_dict().items())
    assert timm.data.resolve_model_data_config(tuned)["input_size"] == (3, 32, 32)


@pytest.mark.parametrize(
    ("loss", "layer"),
    [("soft_targets", "layer4"), ("hint", "fc"), ("hint", ""), ("hint, pairs: {fc: layer4}", "layer4")],
)
def test_a_classifier_that_a_loss_trains_without_labels_stays(tmp_path: Path, loss: str, layer: str) -> None:
    model = write_run(tmp_path / "run", "resnet10t", loss=loss, layer=layer)
    done = export(tmp_path / "run", tmp_path / "out")
    images = torch.randn(2, 3, 32, 32)
    assert done.outputs == "logits"
    assert torch.equal(
        timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()(images), model(images)
    )


def test_the_card_of_a_backbone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stated = timm.get_pretrained_cfg("vit_small_patch16_dinov3.lvd1689m").license
    cases = {
        "vit_small_patch16_dinov3.lvd1689m": stated,
        "vit_small_patch16_dinov3": stated,  # timm's default weights
        f"local-dir:{tmp_path / 'secret' / 'teacher'}": "not stated",
        f"transformers:{tmp_path / 'secret' / 'teacher'}": "not stated",
    }
    assert stated
    for number, (teacher, licence) in enumerate(cases.items()):
        write_run(tmp_path / str(number) / "run", "resnet10t", teacher=teacher)
        export(tmp_path / str(number) / "run", tmp_path / str(number) / "out")
        card = (tmp_path / str(number) / "out" / "README.md").read_text()
        shown = teacher.replace(str(tmp_path / "secret") + "/", "")
        assert f"- Distilled from `{shown}` (licence of the weights: {licence})" in card
        assert str(tmp_path) not in card
        assert "classif" not in card.split("## The recipe")[0].replace(
            "no loss has trained its classifier", ""
        ).replace("gives it a new classifier", "")
        front = YAML(typ="safe").load(card.split("---")[1])
        assert front["pipeline_tag"] == "image-feature-extraction"
    Image.new("RGB", (30, 30)).save(tmp_path / "0" / "out" / "image.png")
    monkeypatch.chdir(tmp_path / "0" / "out")
    names: dict[str, Any] = {}
    exec(card.split("```python")[1].split("```")[0], names)
    assert names["features"].shape == (1, 32)


class Hub:
    """What `HfApi` does, on nothing but lists."""

    calls: ClassVar[list[tuple[Any, ...]]] = []
    existing: ClassVar[set[str]] = set()
    fails: ClassVar[dict[str, Exception]] = {}

    def whoami(self) -> dict[str, str]:
        self._do("whoami")
        return {"name": "me"}

    def repo_exists(self, repo_id: str) -> bool:
        self._do("repo_exists", repo_id)
        return repo_id in self.existing

    def create_repo(self, repo_id: str, *, private: bool, exist_ok: bool) -> str:
        self._do("create_repo", repo_id, private, exist_ok)
        return f"https://hub/{repo_id}"

    def upload_folder(self, *, repo_id: str, folder_path: Path, commit_message: str) -> None:
        self._do("upload_folder", repo_id, sorted(file.name for file in Path(folder_path).iterdir()))

    def _do(self, *call: Any) -> None:
        self.calls.append(call)
        if call[0] in self.fails:
            raise self.fails[call[0]]


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> type[Hub]:
    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    Hub.calls, Hub.existing, Hub.fails = [], set(), {}
    return Hub


def test_the_hub_is_asked_only_where_it_was_named(hub: type[Hub], command: Command, tmp_path: Path) -> None:
    write_run(tmp_path / "run", "resnet10t")
    assert command("export", "run", "-o", "out").returncode == 0
    assert hub.calls == []
    files = ["README.md", "config.json", "model.safetensors"]
    done = command("export", "run", "--push-to-hub", "me/small")
    assert "uploaded to https://hub/me/small" in done.stdout
    asked = [("whoami",), ("repo_exists", "me/small")]
    assert hub.calls == [*asked, ("create_repo", "me/small", True, True), ("upload_folder", "me/small", files)]
    assert (tmp_path / "small" / "config.json").exists()
    hub.calls.clear()
    done = command("export", "run", "--push-to-hub", "me/small", "--public", "-o", "other", "--json")
    assert json.loads(done.stdout)["hub"] == "https://hub/me/small"
    assert hub.calls[2] == ("create_repo", "me/small", False, True)


@pytest.mark.parametrize(
    ("step", "failure", "says"),
    [
        (
            "whoami",
            LocalTokenNotFoundError("none"),
            "there is no token of the Hugging Face hub; log in by `hf auth login`",
        ),
        ("whoami", ConnectionError("no route"), "the Hugging Face hub is not reached (no route)"),
        ("upload_folder", OSError("pipe is broken"), "the export is in small, and cannot be uploaded to me/small"),
    ],
)
def test_a_hub_that_cannot_be_had_is_one_message(
    hub: type[Hub], command: Command, tmp_path: Path, step: str, failure: Exception, says: str
) -> None:
    write_run(tmp_path / "run", "resnet10t")
    hub.fails = {step: failure}
    done = command("export", "run", "--push-to-hub", "me/small")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert says in done.stderr
    assert (tmp_path / "small").exists() == (step == "upload_folder")


def test_what_is_there_is_not_replaced_unasked(hub: type[Hub], command: Command, tmp_path: Path) -> None:
    write_run(tmp_path / "run", "resnet10t")
    hub.existing = {"me/small"}
    assert (
        "me/small exists on the hub; --overwrite adds a commit"
        in command("export", "run", "--push-to-hub", "me/small").stderr
    )
    assert command("export", "run", "--push-to-hub", "me/small", "--overwrite").returncode == 0
    assert "expected ORG/NAME" in command("export", "run", "--push-to-hub", "small").stderr
    assert "-o FOLDER" in command("export", "run").stderr
    assert "give --push-to-hub" in command("export", "run", "-o", "x", "--public").stderr
