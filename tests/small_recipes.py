"""Small recipes of the kinds that the folder of recipes has none of: without labels, with several, with two heads."""

import atexit
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from PIL import Image
from ruamel.yaml import YAML

_VIT = "model: vit_tiny_patch16_224, model_kwargs: {img_size: 32, patch_size: 8, embed_dim: 16, depth: 2, num_heads: 2"
_RESNET = "model: resnet10t, model_kwargs: {channels: [8, 8, 8, 16]"
_DIGITS = "dataset: sklearn/digits, input_size: [3, 32, 32]"

SMALL = {
    "a flat folder without labels": f"""
student: {{{_RESNET}, num_classes: 0}}, embedding: layer4}}
teacher: {{{_VIT}, num_classes: 0}}, pretrained: true, output: fc_norm, input_size: [3, 32, 32], mean: [0.5]}}
data: {{root: FOLDER/flat, train_split: ., val_split: none, labels: none, holdout: 0.25, input_size: [3, 32, 32]}}
pairs:
  layer1: {{teacher: blocks.0, normalize: phi_s, projector: mlp, grid: teacher, tokens: all}}
  layer3: {{teacher: blocks.1, weight: 0.5, projector: orthogonal, grid: student}}
stages:
  - epochs: 2
    keep: best
    losses:
      match: {{loss: token_match, normalize: fitted, projector: mlp, cosine: 0.9, smooth_l1: 0.1, beta: 1.0}}
      patches: {{loss: patch_similarity, temperature: 0.07, grid: teacher, pairs: [layer3]}}
      own: {{loss: gram, pairs: {{"glob:layer[12]": "glob:blocks.?", layer4: {{teacher: blocks.1, weight: 0.5}}}}}}
      channels: {{loss: cwd, temperature: 2.0, projector: orthogonal}}
evaluate:
  knn: {{dataset: sklearn/digits, holdout: 0.1, k: 20, temperature: 0.07, every: 1}}
  linear: {{C: auto}}
  pairs: true
""",
    "several labels an image": f"""
student: {{{_RESNET}}}}}
teacher: {{{_VIT}}}, train: {{epochs: 1}}}}
data: {{dataset: csv/FOLDER/several.csv, labels: multilabel, val_split: none, holdout: 0.3, input_size: [3, 32, 32]}}
pairs: {{layer4: blocks.1}}
baseline: true
stages:
  - epochs: 1
    losses:
      labels: {{loss: binary_cross_entropy, pos_weight: [1.0, 2.0, 3.0], label_smoothing: 0.1, reduction: mean}}
      soft: {{loss: multilabel_soft_targets, temperature: 2.0, reduction: sum}}
      hint: {{loss: hint, tokens: all}}
""",
    "two heads": f"""
student: {{{_VIT.replace("vit_tiny", "deit_tiny_distilled")}}}, output: head}}
teacher: {{{_RESNET}}}, train: {{epochs: 1}}, output: fc}}
data: {{dataset: csv/FOLDER/one.csv, val_split: val, sampler: balanced, input_size: [3, 32, 32]}}
stages:
  - epochs: 1
    losses:
      labels: {{loss: cross_entropy, student: head, class_weights: balanced}}
      hard: {{loss: hard_labels, student: head_dist, teacher: fc, label_smoothing: 0.1}}
      relations: {{loss: rkd, distance: 25, angle: 50, tokens: cls, pairs: {{blocks.1: layer4}}}}
      kernel: {{loss: cc, gamma: 0.4, order: 2, tokens: flatten, pairs: {{blocks.0: layer2}}}}
      embedding: {{loss: logits, student: "head_drop#0", teacher: global_pool, weight: 0.1}}
""",
    "one output for two classes": f"""
student: {{{_RESNET}, num_classes: 1}}}}
data: {{dataset: csv/FOLDER/one.csv, val_split: val, num_classes: 2, input_size: [3, 32, 32]}}
stages: [{{epochs: 1, losses: {{labels: {{loss: binary_cross_entropy, pos_weight: 2.0}}}}}}]
""",
    "several teachers": f"""
student: {{{_RESNET}}}}}
teachers:
  vit: {{{_VIT}}}, train: {{epochs: 1}}, weight: 2.0}}
  net: {{{_RESNET}}}, train: {{epochs: 1}}, output: fc, input_size: [3, 32, 32], mean: [0.5]}}
data: {{{_DIGITS}}}
pairs:
  layer3: [vit:blocks.0, {{teacher: net:layer3, weight: 0.5, normalize: fitted}}]
  layer4: net:layer4
stages:
  - epochs: 1
    teacher_dropping: 0.5
    losses:
      labels: {{loss: cross_entropy, label_smoothing: 0.1}}
      mean: {{loss: soft_targets, teacher: mean}}
      one: {{loss: soft_targets, teacher: "net:fc"}}
      hint: {{loss: hint, tokens: all}}
""",
    "a linear probe, then fine-tuning": f"""
student: {{{_RESNET}}}, new_classifier: true, pretrained: true}}
teacher: {{{_VIT}}}, train: {{epochs: 1}}}}
data: {{{_DIGITS}, sampler: balanced}}
pairs: {{layer4: {{teacher: blocks.1, grid: student}}}}
stages:
  - {{name: probe, epochs: 1, freeze: backbone, losses: {{labels: {{loss: cross_entropy, class_weights: balanced}}}}}}
  - name: all
    epochs: 2
    freeze: ["glob:layer1.*", conv1]
    losses: {{labels: {{loss: cross_entropy}}, hint: {{loss: hint, normalize: fitted, projector: orthogonal}}}}
    optimizer: {{lr: 1.0e-3, lr_scale: {{layer2: 0.1}}, layer_decay: 0.75}}
evaluate: {{knn: {{{_DIGITS.partition(",")[0]}}}}}
""",
}


@cache
def _folder() -> Path:
    """A folder with images, and CSV files that list them."""
    holder = TemporaryDirectory(prefix="small_recipes_")
    atexit.register(holder.cleanup)
    folder = Path(holder.name)
    (folder / "flat").mkdir()
    names = [f"flat/{index}.png" for index in range(12)]
    for index, name in enumerate(names):
        Image.new("RGB", (32, 32), (20 * index, 0, 255 - 20 * index)).save(folder / name)
    several = ["cat,outdoors", "dog", "", "dog,cat"] * 3
    for file, labels in (("one.csv", ["cat", "dog"] * 6), ("several.csv", several)):
        rows = [f"{name},{label}\n" for name, label in zip(names, labels, strict=True)]
        (folder / file).write_text("path,label\n" + "".join(rows))
    Image.new("RGB", (32, 32)).save(folder / "black.png")
    (folder / "val.csv").write_text("black.png,cat\n")
    return folder


def small_recipe(kind: str) -> dict[str, Any]:
    """One of the recipes in `SMALL`, with paths of images that are there."""
    tree: dict[str, Any] = YAML(typ="safe").load(SMALL[kind].replace("FOLDER", str(_folder())))
    return tree
