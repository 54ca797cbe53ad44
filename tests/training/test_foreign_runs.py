"""Runs with teachers of transformers and open_clip: in one line of a recipe, with and without labels."""

from pathlib import Path

import foreign_models
import pytest
import torch
from conftest import Command, record
from running import planned, run

from probe_kd.errors import RecipeError
from probe_kd.training.models import Models
from probe_kd.training.processes import accelerating

TEXT = """\
student: {{model: resnet10t, model_kwargs: {{channels: [8, 16, 24, 32]}}}}
teacher: {{model: "{teacher}", pretrained: true}}
data: {{dataset: sklearn/digits, input_size: [3, 32, 32], batch_size: 64, hflip: 0.0, fraction: 0.1, holdout: 0.2}}
pairs: auto
stages:
  - epochs: 1
    losses: {{hint: {{loss: hint, normalize: layer}}}}
"""


@pytest.mark.parametrize("kind", ["dino", "siglip", "clip"])
def test_a_student_learns_from_its_features(kind: str, tmp_path: Path, command: Command) -> None:
    name = getattr(foreign_models, kind)(tmp_path / kind)
    text = TEXT.format(teacher=name).replace("holdout", "labels: none, holdout")
    run(text, tmp_path / "run")
    (row,) = record(tmp_path / "run")
    assert 0 < float(row["hint"]) < 10
    plan = planned(text)
    assert plan.teacher_input.mean == (0.1, 0.2, 0.3)
    with accelerating(plan.recipe, tmp_path) as accelerator:
        teacher = next(Models(plan, accelerator).in_turn()).model
    library = foreign_models.transformers if kind != "clip" else foreign_models.open_clip
    if kind == "clip":
        expected = library.create_model(f"local-dir:{tmp_path / kind}").visual
    else:
        whole = library.AutoModel.from_pretrained(tmp_path / kind)
        expected = getattr(whole, "vision_model", whole)
    weights = expected.state_dict()
    assert all(torch.equal(tensor, weights[key]) for key, tensor in teacher.state_dict().items())
    arguments = ["--student", "resnet10t", "--teacher", name, "--input-size", "32"]
    assert command("match", *arguments, "-o", "matched.yaml").returncode == 0
    assert command("check", "matched.yaml", "--no-batch").returncode == 0
    done = command("init", *arguments, "--method", "soft_targets", "-o", "soft.yaml")
    assert "has no classifier, and this method reads its classes" in done.stderr


def test_the_outputs_of_transformers_are_read_by_name(tmp_path: Path, command: Command) -> None:
    model = foreign_models.transformers.ViTForImageClassification(
        foreign_models.transformers.ViTConfig(**foreign_models.SMALL, num_labels=10)
    )
    name = foreign_models.save_transformers(tmp_path / "vit", model, **foreign_models.NUMBERS)
    soft = "losses: {soft: {loss: soft_targets, teacher: '[logits]'}, "
    text = TEXT.format(teacher=name).replace("losses: {", soft)
    run(text, tmp_path / "run")
    (row,) = record(tmp_path / "run")
    assert float(row["soft"]) > 0
    pooled = text.replace("pairs: auto", "pairs: {global_pool: '[pooler_output]'}").replace(soft, "losses: {")
    dino = foreign_models.dino(tmp_path / "dino")
    pooled = pooled.replace(name, dino).replace("holdout", "labels: none, holdout")
    run(pooled, tmp_path / "pooled")
    assert "global_pool     [pooler_output]   hint" in command("compare", "pooled").stdout  # and no markup


def test_what_a_recipe_cannot_know_is_asked_for(tmp_path: Path) -> None:
    model = foreign_models.transformers.ViTModel(foreign_models.transformers.ViTConfig(**foreign_models.SMALL))
    name = foreign_models.save_transformers(tmp_path, model)
    with pytest.raises(RecipeError, match=r"has no preprocessor_config\.json, which says how images are normalised"):
        planned(TEXT.format(teacher=name))
    planned(TEXT.format(teacher=name).replace("pretrained: true", "pretrained: true, mean: [0.5], std: [0.5]"))
