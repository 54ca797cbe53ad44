"""The names of data sets and of their splits."""

from probe_kd.data.options import DataOptions
from probe_kd.errors import DataError, nearest

IN_MEMORY = ("cifar10", "cifar100", "mnist", "kmnist", "fashion_mnist", "qmnist")
OF_TWO_PARTS = ("sklearn/digits", *(f"torch/{name}" for name in IN_MEMORY))
FOLDERS = ("image_folder", "folder")
_TORCHVISION = (*IN_MEMORY, "inaturalist", "inat", "places365", "imagenet", *FOLDERS)
_KINDS = ("sklearn", "torch", "hfds", "wds", "csv")
CSV = ".csv"
NAMES = ("sklearn/digits", *(f"torch/{name}" for name in _TORCHVISION))  # that are known without a look at the hub
TRAINED = ("train", "training")
EVALUATED = ("val", "valid", "validation", "eval", "evaluation")  # of folders, in the order that timm looks for them
_TEST_WORDS = (*EVALUATED, "test", "testing")


def check_name(name: str, root: str | None = None) -> None:
    """Raise DataError if no data set has this name. Does not look for images."""
    kind, slash, inner = name.partition("/")
    if not name:
        return
    if kind.lower() in ("tfds", "hfids"):
        raise DataError(
            f"dataset {name!r} is a stream, in which images have no number, so that no epoch could be gone on with in "
            "its middle and no view be cached; give the images as a folder, as tar shards in a folder (`wds/`), or by "
            "`hfds/` or `torch/`",
            "dataset",
        )
    if kind.lower() == "torch" and inner.lower() not in _TORCHVISION:
        near = nearest(name.lower(), NAMES)
        raise DataError(
            f"there is no dataset {name!r}; timm reads {', '.join(_TORCHVISION)} of torchvision{near}", "dataset"
        )
    if kind == "sklearn" and name != "sklearn/digits":
        raise DataError(f"there is no dataset {name!r}; from scikit-learn there is 'sklearn/digits'", "dataset")
    if not slash or kind.lower() not in _KINDS:
        near = nearest(name, NAMES)
        raise DataError(
            f"there is no dataset {name!r}{near or ';'} a folder of folders is given as `root`, without `dataset`, and "
            "other names begin with `torch/`, `hfds/`, `wds/` or `csv/`, or are `sklearn/digits`",
            "dataset",
        )


def is_folder(options: DataOptions) -> bool:
    """Whether the images are files in the folder `root`."""
    kind, _, name = options.dataset.lower().partition("/")
    return not is_csv(options) and (not kind or (kind == "torch" and name in FOLDERS))


def is_csv(options: DataOptions) -> bool:
    """Whether the images are listed in CSV files."""
    if options.dataset:
        return options.dataset.lower().startswith("csv/")
    return any(name.lower().endswith(CSV) for name in (options.root or "", options.train_split))


def train_or_test(options: DataOptions, key: str, split: str) -> str:
    """Which part of a data set of two parts a split names: `train` or `validation`."""
    for part, words in (("train", TRAINED), ("validation", _TEST_WORDS)):
        if split.lower() in words:
            return part
    near = nearest(split, [*TRAINED, *_TEST_WORDS])
    raise DataError(f"{options.dataset} has no split {split!r}; it has 'train' and 'test'{near}", key)
