"""The statistics of a phase's targets, fitted on the training images before its first step."""

import torch

from probe_kd.data.loading import loader, readable
from probe_kd.errors import AdapterError
from probe_kd.methods.distiller import Distiller
from probe_kd.methods.normalisation import fitted_norms
from probe_kd.training.devices import memory_format
from probe_kd.training.models import Models, TrainedModel
from probe_kd.training.progress import Progress

MOST_IMAGES = 2048  # of each of them, the teacher gives a vector for every position


def fit_targets(models: Models, trained: TrainedModel, distiller: Distiller, progress: Progress) -> None:
    """Fit the statistics of `normalize: fitted` and `phi_s`, if a loss has them, on views of training images.

    They are views of the first epoch, because augmentation changes the statistics. Which images they are follows from
    the seed alone, and each process takes a part of them, so they sum up what one process would. A rotation
    of `phi_s` may differ from that of one process where channels have equal variance.
    """
    if not fitted_norms(distiller.adapters):
        return
    accelerator, recipe, images = models.accelerator, models.plan.recipe, models.plan.datasets.train
    generator = torch.Generator().manual_seed(recipe.seed)
    order = torch.randperm(len(images), generator=generator)  # type: ignore[arg-type]
    chosen = order[:MOST_IMAGES].sort().values
    own = chosen[accelerator.process_index :: accelerator.num_processes].tolist()
    batches = loader(images, recipe.data, models.images_for(trained), training=True, seed=recipe.seed, only=own)
    placed = batches.on(accelerator.device, memory_format=memory_format(recipe, accelerator.device))
    with accelerator.autocast():
        distiller.fit_targets(readable(placed), add_up=lambda tensor: accelerator.reduce(tensor, "sum"))
    progress.tell(f"{trained.role}: target statistics fitted on {len(chosen)} training images")


def fit_for_trial(distiller: Distiller, images: torch.Tensor) -> None:
    """Fit the statistics of a distiller that is only tried on these images.

    Without statistics where a teacher that is not trained yet, or a single image, has features that do not vary.
    """
    norms = fitted_norms(distiller.adapters)
    if not norms:
        return
    try:
        distiller.fit_targets([images])
    except AdapterError:
        for norm in norms:
            norm.bypassed = True
