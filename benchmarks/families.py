"""One model of every family of timm: the one with the fewest parameters, so that all of them can be run.

python benchmarks/families.py > benchmarks/families.txt
"""

from pathlib import Path

import torch


def families() -> list[str]:
    """The names in families.txt, sorted."""
    return Path(__file__).with_name("families.txt").read_text(encoding="utf-8").split()


def find() -> list[str]:
    """Build every model of timm on the meta device and keep the smallest of each of timm's source files."""
    import timm
    from timm.models import _registry

    smallest: dict[str, tuple[int, str]] = {}
    for name in timm.list_models(exclude_filters="test_*"):  # timm's own fixtures, of no model that anybody uses
        with torch.device("meta"):
            model = timm.create_model(name)
        size = sum(parameter.numel() for parameter in model.parameters())
        family = _registry._model_to_module[name]
        smallest[family] = min(smallest.get(family, (size, name)), (size, name))
    return sorted(name for _, name in smallest.values())


if __name__ == "__main__":
    print("\n".join(find()))
