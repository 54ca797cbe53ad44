"""`evaluate`: labelled sets beside the run's images, and the vectors by which their images are classified."""

from collections.abc import Sequence
from dataclasses import replace

from probe_kd.data.datasets import Datasets, open_datasets
from probe_kd.data.options import DataOptions
from probe_kd.data.overlap import shared_with_training
from probe_kd.engine.embedding import embedding_spec
from probe_kd.engine.models import build_on_meta
from probe_kd.engine.spec import Trace
from probe_kd.engine.tracing import trace_named
from probe_kd.errors import DataError
from probe_kd.measures import MEASURES, OF_PAIRS
from probe_kd.methods.adapters import pooled
from probe_kd.methods.objectives import Objective
from probe_kd.recipe.keys import ModelOptions, Recipe
from probe_kd.recipe.loss_names import loss_of, losses_in
from probe_kd.recipe.sections.mistakes import Mistake, noting, of_teacher
from probe_kd.recipe.sections.models import Models


def check_evaluation(
    recipe: Recipe,
    datasets: Datasets | None,
    models: Models,
    objectives: Sequence[Sequence[Objective]],
    *,
    classifies: bool,
) -> tuple[dict[str, Datasets], list[Mistake]]:
    """Open the labelled sets, and check all that depends on them and on the measures that the run takes.

    `classifies` says whether the accuracy of the student means something.
    """
    sets, mistakes = open_labelled_sets(recipe, datasets)
    mistakes += check_embedding("student", recipe.student, models.student, used=bool(recipe.probes))
    for name, options in recipe.teachers_by_name.items():
        of_one = check_embedding("teacher", options, models.teachers.get(name), used=bool(recipe.probes))
        mistakes += of_teacher(name, of_one)
    of_pairs = OF_PAIRS * measures_pairs(recipe, objectives, classifies=classifies)
    mistakes += check_choice(recipe, sets) + check_loss_names(recipe, (*recipe.probes, *of_pairs))
    return sets, mistakes + _check_pairs(recipe)


def _check_pairs(recipe: Recipe) -> list[Mistake]:
    """Check that there are pairs to measure, if the recipe asks for it."""
    losses = [loss_of(options) for _, options in losses_in(recipe)]
    if not (recipe.evaluate and recipe.evaluate.pairs) or any(
        loss is None or loss.predicts_features for loss in losses
    ):
        return []
    message = "`pairs: true` measures what losses of features compare (`hint`, `token_match`), and there are none"
    return [(("evaluate", "pairs"), f"{message}; leave it out, or add one")]


def open_labelled_sets(recipe: Recipe, trained_on: Datasets | None) -> tuple[dict[str, Datasets], list[Mistake]]:
    """Open the labelled set of every probe, by the name of its measure. Equal sets are opened once."""
    opened: list[tuple[DataOptions, Datasets]] = []
    sets: dict[str, Datasets] = {}
    mistakes: list[Mistake] = []
    for name, probe in recipe.probes.items():
        if not probe.is_named:
            mistakes.append((("evaluate", name), "name its labelled images, by `dataset` or `root`"))
            continue
        options = probe.data(recipe.data)
        try:
            datasets = next((there for other, there in opened if other == options), None) or _opened(
                options, trained_on
            )
        except DataError as refusal:
            key = refusal.key or ("dataset" if probe.dataset else "root")
            mistakes.append((("evaluate", name, key), str(refusal)))
            continue
        opened.append((options, datasets))
        sets[name] = datasets
    return sets, mistakes


def _opened(options: DataOptions, trained_on: Datasets | None) -> Datasets:
    """A labelled set, with a note if the run trains on images that it is measured on. Raises DataError."""
    labelled = open_datasets(options)
    if trained_on is None:
        return labelled
    train = trained_on.whole[0]
    measured = [split for split in labelled.whole if split.key != "train_split"] or list(labelled.whole)
    shared = next(filter(None, (shared_with_training(split, train) for split in measured)), "")
    if not shared:
        return labelled
    note = f"{shared}, so the figures say less about images that it has not seen"
    return replace(labelled, notes=(*labelled.notes, note))


def check_embedding(side: str, options: ModelOptions | None, traced: Trace | None, *, used: bool) -> list[Mistake]:
    """Check that the layer whose vectors are classified exists in eval mode, and holds one feature per image."""
    mistakes: list[Mistake] = []
    if options is None or traced is None or not used:
        if options is not None and options.embedding is not None and not used:
            mistakes.append(
                ((side, "embedding"), "nothing reads it; give `evaluate` a `knn` or `linear`, or leave it out")
            )
        return mistakes
    with noting(mistakes, side, "model" if options.embedding is None else "embedding"):
        model = build_on_meta(traced.model, traced.model_kwargs)
        in_eval = trace_named(traced.model, traced.input_size, model_kwargs=dict(traced.model_kwargs))
        pooled(embedding_spec(model, in_eval, tap=options.embedding, output=options.output))
    return mistakes


def check_choice(recipe: Recipe, sets: dict[str, Datasets]) -> list[Mistake]:
    """Check what `keep: best` chooses by without labels: the k-NN or the probe, on images of no final figure."""
    stages = [index for index, stage in enumerate(recipe.stages) if stage.keep == "best"]
    name = next(iter(recipe.probes), "")
    if recipe.data.labels != "none" or not stages or name not in sets:
        return []
    title, place = MEASURES[name].title, ("evaluate", name)
    if sets[name].to_choose_by is None:
        message = (
            f"`keep: best` chooses by the {title}, on images that give no final figure; give `holdout: 0.1`, or both "
            "`val_split` and `test_split`"
        )
        return [(place, message)]
    if recipe.probes[name].every == 0:
        message = f"`keep: best` chooses by the {title}, which is measured only at the end; leave `every` out"
        return [((*place, "every"), message)]
    return []


def check_loss_names(recipe: Recipe, taken: Sequence[str]) -> list[Mistake]:
    """Check that no loss is called like a measure that the run takes, which has a column of that name."""
    return [
        (("stages", index, "losses", name), f"a loss cannot be called `{name}`: the metrics have a column of that name")
        for index, stage in enumerate(recipe.stages)
        for name in stage.losses
        if name in taken
    ]


def measures_pairs(recipe: Recipe, objectives: Sequence[Sequence[Objective]], *, classifies: bool) -> bool:
    """Whether the explained variance and the cosine of the pairs are measured while the student trains."""
    pairs = recipe.evaluate.pairs if recipe.evaluate else None
    compares = any(objective.resolved.predicts_features for stage in objectives for objective in stage)
    return compares and (not classifies if pairs is None else pairs)
