"""How much of the teacher's features the student's explain, pair by pair, on images that are not trained on."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import fmean

import torch
from accelerate import Accelerator
from torch import Tensor

from probe_kd.data.batches import Batches
from probe_kd.data.loading import readable
from probe_kd.engine.weights import load_weights
from probe_kd.measures import OF_PAIRS
from probe_kd.methods.comparisons import Comparison
from probe_kd.methods.distiller import Distiller
from probe_kd.methods.gradients import not_compiled
from probe_kd.methods.objectives import Objective
from probe_kd.methods.similarity import PairSums
from probe_kd.methods.targets import compared, teacher_side
from probe_kd.training.models import Models, TrainedModel
from probe_kd.training.processes import own_images
from probe_kd.training.state import PairScore


@torch.no_grad()
def score_pairs(distiller: Distiller, batches: Batches, accelerator: Accelerator, stage: str = "") -> list[PairScore]:
    """Score every comparison of layers in a stage, through its adapter as it is now.

    The teacher's features are computed once. A comparison of maps or matrices has no score. In several processes, each
    takes its images, and all return the whole.
    """
    rows = [
        (objective, comparison)
        for objective, comparison, _ in compared(distiller.objectives, distiller.adapters)
        if objective.resolved.reads_layers
    ]
    sums: dict[tuple[str, Comparison], PairSums] = {}
    distiller.eval()
    for images, *_ in readable(batches, "evaluation"):
        count = own_images(accelerator, len(images))
        with accelerator.autocast(), not_compiled():
            sides = list(_sides(distiller, images))
        for objective, comparison, student, teacher in sides:
            sums.setdefault((objective.name, comparison), PairSums()).add(student[:count], teacher[:count])
    return [
        _score(stage, objective, comparison, sums.get((objective.name, comparison), PairSums()), accelerator)
        for objective, comparison in rows
    ]


def _sides(distiller: Distiller, images: Tensor) -> Iterator[tuple[Objective, Comparison, Tensor, Tensor]]:
    """Both sides of every comparison of features, after its adapter, as its loss sees them."""
    student, teacher = distiller.features(images)
    for objective, comparison, adapter in compared(distiller.objectives, distiller.adapters):
        if objective.resolved.predicts_features:
            predicted = adapter.student_steps(comparison.features("student", student, several=False))
            yield objective, comparison, predicted, teacher_side(objective, comparison, adapter, teacher.compared, {})


def _score(
    stage: str, objective: Objective, comparison: Comparison, sums: PairSums, accelerator: Accelerator
) -> PairScore:
    pair = comparison.pairs[-1]
    student, teacher = (str(tap) or "output" for tap in (pair.student, pair.teacher))
    return PairScore(stage, objective.name, student, teacher, *sums.scores(accelerator.reduce))


def score_all_stages(models: Models, trained: TrainedModel, folder: Path, batches: Batches) -> list[PairScore]:
    """Score the trained student on all stages, with the adapters as the end of each stage left them in `folder`."""
    models.accelerator.wait_for_everyone()  # the first process writes these files
    scores: list[PairScore] = []
    for index, phase in enumerate(trained.phases):
        if not any(objective.resolved.reads_layers for objective in phase.objectives):
            continue
        distiller = models.distiller(trained, phase)
        try:
            if distiller.adapters.state_dict():
                load_weights(distiller.adapters, folder / f"adapters-{index}.safetensors")
            scores += score_pairs(distiller, batches, models.accelerator, phase.name)
        finally:
            distiller.close()
    return scores


def means(scores: Sequence[PairScore]) -> dict[str, float]:
    """The mean of each measure over the pairs that have it, by name; empty if none has.

    Of several stages, over the pairs of the last that has any: the student has moved on from the adapters of others.
    """
    stages = [score.stage for score in scores if score.cosine is not None]
    of_stage = [score for score in scores if score.stage == stages[-1]] if stages else []
    values = {name: [value for score in of_stage if (value := getattr(score, name)) is not None] for name in OF_PAIRS}
    return {name: fmean(of_pairs) for name, of_pairs in values.items() if of_pairs}
