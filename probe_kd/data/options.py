"""The `data:` section of a recipe: which images, which splits and which augmentation."""

from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

_Side = Annotated[int, Field(ge=1, le=16384)]


def _in_order(given: tuple[float, float]) -> tuple[float, float]:
    least, most = given
    if not 0 < least <= most:
        expected = f"; did you mean [{most:g}, {least:g}]?" if 0 < most < least else ", both above 0"
        raise ValueError(f"[{least:g}, {most:g}]: expected [least, most]{expected}")
    return given


def _grey_or_colour(size: tuple[int, int, int]) -> tuple[int, int, int]:
    if size[0] not in (1, 3):
        raise ValueError(f"{size[0]} channels: images have 1 (grey) or 3 (colour); expected [channels, height, width]")
    return size


_Range = Annotated[tuple[float, float], AfterValidator(_in_order)]
InputSize = Annotated[tuple[Annotated[int, Field(ge=1)], _Side, _Side], AfterValidator(_grey_or_colour)]


def _none_as_word(value: Any) -> Any:
    """A recipe is written down without what is null, and `val_split` has another default."""
    return "none" if value is None else value


class DataOptions(BaseModel):
    """The `data:` section of a recipe. Names and meanings are those of timm's `create_dataset` and `create_transform`.

    `dataset` is `sklearn/digits`, or what timm's `create_dataset` reads: `torch/cifar100`, `torch/fashion_mnist`,
    `hfds/...`, a folder of folders (empty name), a folder of tar shards (`wds/NAME`); not streams (`tfds/`, `hfids/`).
    `val_split` is measured after every epoch, and may be `none`; `test_split` is measured once, when training is over.
    Where only one of the two is given it serves both; without both, the images of `holdout` do.
    `on_error: skip` leaves out images that cannot be read, which else end the run with their names.
    `input_size` is (channels, height, width). `mean` and `std` are the student's, where they differ from timm's config.
    `holdout` is the share of the training images that is kept from training, for choosing by (`keep: best`), and
    `fraction` the share of the others that is trained on: the same images whatever the seed of a run. `mixup`
    and `cutmix` mix two images, and their labels, before either model sees them (timm's `Mixup`). With `views` every
    image is seen in so many augmented views, in turn, instead of in a new one every epoch; a cache of the teacher then
    holds no more than these.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    dataset: str = ""
    root: str | None = None
    train_split: str = "train"
    val_split: Annotated[str | None, BeforeValidator(_none_as_word)] = "validation"
    test_split: str | None = None
    on_error: Literal["raise", "skip"] = "raise"
    download: bool = False
    num_classes: int | None = Field(default=None, ge=1)
    input_size: InputSize
    batch_size: int = Field(default=128, ge=1)
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
        """How many different views of an image there are; None for a new one every epoch."""
        return 1 if self.no_aug else self.views

    @property
    def mixes(self) -> bool:
        return self.mixup > 0 or self.cutmix > 0

    @property
    def mode(self) -> str:
        """PIL's mode of the images, whatever that of their files is."""
        return "L" if self.input_size[0] == 1 else "RGB"

    @property
    def splits(self) -> dict[str, str]:
        """The splits that are read, by the key that names each."""
        given = {"train_split": self.train_split, "val_split": self.val_split, "test_split": self.test_split}
        return {key: split for key, split in given.items() if split is not None and split.lower() != "none"}

    @model_validator(mode="after")
    def _mixes_in_pairs(self) -> Self:
        if self.mixes and self.batch_size % 2:
            raise ValueError(f"batch_size {self.batch_size} is odd, and mixup and cutmix mix images in pairs")
        return self
