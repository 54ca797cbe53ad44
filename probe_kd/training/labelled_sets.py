"""k-NN and linear probes of the models of a run, on the labelled sets that the recipe names."""

from collections.abc import Collection
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from torch import nn
from torch.utils.data import Dataset

from probe_kd.data.batches import Batches
from probe_kd.data.loading import loader, readable
from probe_kd.engine.embedding import embedding_spec
from probe_kd.engine.probe import Probe
from probe_kd.engine.sharding import is_sharded
from probe_kd.engine.spec import InputSpec
from probe_kd.engine.tracing import trace
from probe_kd.errors import RunError, for_all
from probe_kd.methods.adapters import ImageView, pooled
from probe_kd.recipe.keys import KnnOptions, LabelledSet, LinearOptions, ModelOptions
from probe_kd.training.devices import memory_format
from probe_kd.training.frozen_features import Vectors, knn_accuracy, linear_accuracy
from probe_kd.training.models import Models, TrainedModel


class LabelledSets:
    """Classifies the images of labelled sets by the vectors of a model. Owns their prepared batches."""

    def __init__(self, models: Models) -> None:
        self.models = models
        self.plan, self.accelerator = models.plan, models.accelerator
        self.batches: dict[tuple[int, InputSpec], Batches] = {}  # with the workers that read them

    def measure(self, trained: TrainedModel, names: Collection[str], *, final: bool) -> dict[str, float]:
        """The share of the images that each of these probes classifies correctly, by the name of its measure.

        `final` classifies the images of the final figures, otherwise those that may be chosen by. The vectors of a set
        are computed once for all its probes. In several processes, all return the same. Raises RunError for vectors
        that are no numbers.
        """
        if not names:
            return {}
        trained.model.eval()
        embedding = _embedding(trained, self.models.options_of(trained))
        embedded: dict[int, tuple[Vectors, Vectors]] = {}
        scores: dict[str, float] = {}
        for name in names:
            datasets, probe = self.plan.labelled_sets[name], self.plan.recipe.probes[name]
            if id(datasets) not in embedded:
                chosen_by = datasets.to_choose_by
                tested = datasets.test if final or chosen_by is None else chosen_by
                train, test = (self._vectors(trained, *embedding, images, probe) for images in (datasets.train, tested))
                embedded[id(datasets)] = train, test
            score: list[float] = [0.0]
            if self.accelerator.is_main_process:
                score = [_score(probe, *embedded[id(datasets)], seed=self.plan.recipe.seed)]
            scores[name] = float(broadcast_object_list(score)[0])
        return scores

    @torch.no_grad()
    def _vectors(
        self, trained: TrainedModel, embed: Probe, pool: nn.Module, images: Dataset[Any], probe: LabelledSet
    ) -> Vectors:
        """One vector of every image, which the model sees as it does when its accuracy is measured."""
        accelerator = self.accelerator
        view = ImageView(trained.input, trained.input).to(accelerator.device)
        rows = []
        for pixels, labels in readable(self._batches_of(images, self.models.images_for(trained), probe), "evaluation"):
            with accelerator.autocast():
                (feature,) = embed(view(pixels)).values()
            rows.append(accelerator.gather_for_metrics((pool(feature).float(), labels)))
        vectors, all_labels = (torch.cat(column) for column in zip(*rows, strict=True))
        if not bool(vectors.isfinite().all()):
            message = f"the vectors of {trained.role} are no numbers; try a smaller `lr`, or `clip_grad: 1.0`"
            raise for_all(RunError(message))
        return Vectors(vectors, all_labels.cpu())

    def _batches_of(self, images: Dataset[Any], image_input: InputSpec, probe: LabelledSet) -> Batches:
        key = id(images), image_input
        if key not in self.batches:
            recipe = self.plan.recipe
            batches = loader(images, probe.data(recipe.data), image_input, training=False)
            self.batches[key] = batches.prepare(self.accelerator, memory_format(recipe, self.accelerator.device))
        return self.batches[key]


def _score(probe: LabelledSet, train: Vectors, test: Vectors, *, seed: int) -> float:
    if isinstance(probe, KnnOptions):
        return knn_accuracy(train, test, k=probe.k, temperature=probe.temperature)
    assert isinstance(probe, LinearOptions)
    return linear_accuracy(train, test, C=None if probe.C == "auto" else probe.C, seed=seed)


def _embedding(trained: TrainedModel, options: ModelOptions) -> tuple[Probe, nn.Module]:
    # A sharded model cannot be copied for a trace.
    traced = trained.trace if is_sharded(trained.model) else trace(trained.model, trained.input.size)
    spec = embedding_spec(trained.model, traced, tap=options.embedding, output=options.output)
    return Probe(trained.model, [spec]), pooled(spec)
