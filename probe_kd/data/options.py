"""The `data:` section of a recipe: which images, which splits and which augmentation."""

from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

_Side = Annotated[int, Field(ge=1, le=16384)]


def _ordered(bounds: tuple[float, float]) -> tuple[float, float]:
    low, high = bounds
    if not 0 < low <= high:
        expected = f"; did you mean [{high:g}, {low:g}]?" if 0 < high < low else ", both above 0"
        raise ValueError(f"[{low:g}, {high:g}]: expected [least, most]{expected}")
    return bounds


def _one_or_three_channels(input_size: tuple[int, int, int]) -> tuple[int, int, int]:
    if input_size[0] not in (1, 3):
        raise ValueError(
            f"{input_size[0]} channels: images have 1 (grey) or 3 (colour); expected [channels, height, width]"
        )
    return input_size


Labels = Literal["class", "multilabel", "none"]
_Range = Annotated[tuple[float, float], AfterValidator(_ordered)]
InputSize = Annotated[tuple[Annotated[int, Field(ge=1)], _Side, _Side], AfterValidator(_one_or_three_channels)]


def null_as_none_word(value: Any) -> Any:
    """Null becomes the word `none`, because a stored recipe omits null values and would get the default instead."""
    return "none" if value is None else value


class DataOptions(BaseModel):
    """The `data:` section of a recipe. Names and meanings are those of timm's `create_dataset` and `create_transform`.

    `dataset` is `sklearn/digits`, or what timm's `create_dataset` reads: `torch/cifar100`, `torch/fashion_mnist`,
    `hfds/...`, a folder of folders (empty name), a folder of tar shards (`wds/NAME`), a CSV file `csv/FILE` of
    `path,label[,label...]`; not streams (`tfds/`, `hfids/`).
    `val_split` is measured after every epoch, and may be `none`; `test_split` is measured once, when training is over.
    Where only one of the two is given it serves both; without both, the images of `holdout` do.
    `labels` are `class` (each image has one), `multilabel` (any number, from `csv/` or `hfds/`) or `none`: a folder of
    images, flat or nested, or any data set, whose labels are then not read. Without a folder `train_split`, such a
    folder is read whole, and without a folder `val_split` a tenth of it is held out.
    `sampler: balanced` draws the classes equally often, so that an epoch has as many images as ever, those of rare
    classes several times.
    `on_error: skip` leaves out images that cannot be read, which else end the run with their names.
    `input_size` is (channels, height, width). `mean` and `std` are the student's, where they differ from timm's config.
    `holdout` is the share of the training images that is kept from training, for choosing by (`keep: best`), and
    `fraction` the share of the others that is trained on: the same images whatever the seed of a run. `mixup`
    and `cutmix` mix two images, and their labels, before either model sees them (timm's `Mixup`). With `views` every
    image is seen in so many augmented views, in turn, instead of in a new one every epoch; a cache of the teacher then
    holds no more than these.
    `draft` decodes large JPEGs at a half, a quarter or an eighth of their size, as long as both sides keep at least so
    many pixels. It is faster, and pixels differ.
    `memory` keeps images in memory, with the same results: in each of their `views` as the model sees them, test images
    too, and decoded where every epoch has new views.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    dataset: str = ""
    root: str | None = None
    train_split: str = "train"
    val_split: Annotated[str | None, BeforeValidator(null_as_none_word)] = "validation"
    test_split: str | None = None
    labels: Annotated[Labels, BeforeValidator(null_as_none_word)] = "class"
    on_error: Literal["raise", "skip"] = "raise"
    download: bool = False
    num_classes: int | None = Field(default=None, ge=1)
    sampler: Literal["balanced"] | None = None
    input_size: InputSize
    batch_size: int = Field(default=128, ge=1)
    memory: bool = False
    draft: _Side | None = None
    workers: Literal["auto"] | Annotated[int, Field(ge=0, le=256)] = "auto"
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    interpolation: Literal["bilinear", "bicubic", "random"] = "bicubic"
    crop_pct: float | None = Field(default=None, ge=0.1, le=1)
    no_aug: bool = False
    scale: _Range = (0.08, 1.0)
    ratio: _Range = (0.75, 4 / 3)
    hflip: float = Field(default=0.5, ge=0, le=1)
    vflip: float = Field(default=0.0, ge=0, le=1)
    color_jitter: float | None = Field(default=0.4, ge=0)
    aa: str | None = None
    reprob: float = Field(default=0.0, ge=0, le=1)
    views: int | None = Field(default=None, ge=1)
    holdout: float = Field(default=0.0, ge=0, lt=1)
    fraction: float = Field(default=1.0, gt=0, le=1)
    mixup: float = Field(default=0.0, ge=0)
    cutmix: float = Field(default=0.0, ge=0)
    mixup_prob: float = Field(default=1.0, ge=0, le=1)
    mixup_switch_prob: float = Field(default=0.5, ge=0, le=1)
    mixup_mode: Literal["batch", "pair", "elem"] = "batch"

    @property
    def num_views(self) -> int | None:
        """The number of different views of an image; None if every epoch has a new one."""
        return 1 if self.no_aug else self.views

    @property
    def mixes(self) -> bool:
        return self.mixup > 0 or self.cutmix > 0

    @property
    def mode(self) -> str:
        """PIL's mode that images are converted to: `L` or `RGB`."""
        return "L" if self.input_size[0] == 1 else "RGB"

    @property
    def splits(self) -> dict[str, str]:
        """The names of the splits to read, by the key that names each."""
        split_names = {"train_split": self.train_split, "val_split": self.val_split, "test_split": self.test_split}
        return {key: split for key, split in split_names.items() if split is not None and split.lower() != "none"}

    @model_validator(mode="after")
    def _has_no_classes_without_labels(self) -> Self:
        if self.labels == "none" and self.num_classes is not None:
            raise ValueError(
                "`labels: none` has no classes, so that `num_classes` of the data means nothing; leave it out (how "
                "many numbers the student gives is `student: {model_kwargs: {num_classes: ...}}`)"
            )
        return self

    @model_validator(mode="after")
    def _drafts_no_smaller_than_seen(self) -> Self:
        side = max(self.input_size[1:])
        if self.draft is not None and self.draft < side:
            raise ValueError(
                f"`draft: {self.draft}` would decode images smaller than the {side} pixels that a model sees; take "
                f"{2 * side} or more, so that random crops keep their detail"
            )
        return self

    @model_validator(mode="after")
    def _balances_classes(self) -> Self:
        if self.sampler == "balanced" and self.labels != "class":
            raise ValueError(
                f"`sampler: balanced` draws the classes equally often, and with `labels: {self.labels}` an image has "
                "none of its own; leave it out"
            )
        return self

    @model_validator(mode="after")
    def _mixes_in_pairs(self) -> Self:
        if self.mixes and self.batch_size % 2:
            raise ValueError(f"batch_size {self.batch_size} is odd, and mixup and cutmix mix images in pairs")
        return self
