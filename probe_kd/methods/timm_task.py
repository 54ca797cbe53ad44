"""A Distiller as a `timm.task.TrainingTask`, for timm's own training script and for loops that are written for it."""

from collections.abc import Mapping
from typing import Any, Self, cast

import torch
from torch import Tensor, nn

from probe_kd.errors import LossError, ProbeKDError, demand
from probe_kd.methods.distiller import Distiller

try:
    from timm.task import TrainingTask
    from timm.utils import ModelEmaV3, unwrap_model
except ImportError as absence:
    raise ProbeKDError("timm.task came with timm 1.0.23; `pip install -U timm` brings it") from absence


class DistillationTask(TrainingTask):  # type: ignore[misc]  # timm has no types
    """`task(images, target)` is `distiller(images, target)`; compiling, DDP, averages and checkpoints are timm's.

    A checkpoint's `state_dict` is the bare student's, which plain timm loads; the adapters are its `task_state`. The
    average (`setup_ema`) and the model that is evaluated are the bare student too. Weights and options that are a
    `Schedule` move where the loop calls `task.set_epoch(epoch, epochs)`.

    `ddp_kwargs` of `prepare_distributed` go to DDP: objectives that do not move all of the student, such as hints
    alone, need `find_unused_parameters=True`.

    Raises LossError where `distiller` is none, and where its teacher trains too: the loop would save and evaluate only
    one of two models.
    """

    def __init__(
        self,
        distiller: Distiller,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
        verbose: bool = True,
    ) -> None:
        demand(distiller, Distiller, "the distiller", LossError, "a Distiller")
        if distiller.block is not None:
            raise LossError(
                "the teacher trains too, and a TrainingTask knows one model; train it in a loop of your own"
            )
        super().__init__(device=device, dtype=dtype, verbose=verbose)
        self.trainable_module: nn.Module = distiller.to(device=self.device, dtype=self.dtype)

    @property
    def distiller(self) -> Distiller:
        """The Distiller, without what compiling and DDP put around it."""
        inner = unwrap_model(self.trainable_module)
        assert isinstance(inner, Distiller)
        return inner

    def set_epoch(self, epoch: float, epochs: int) -> None:
        self.distiller.set_epoch(epoch, epochs)

    def forward(self, input: Tensor, target: Tensor) -> dict[str, Tensor]:
        """`{"loss", "output", and each objective by its name}`. Images (B, C, H, W), labels (B) or (B, classes)."""
        result: dict[str, Tensor] = self.trainable_module(input, target)
        return result

    def prepare_distributed(self, device_ids: list[Any] | None = None, **ddp_kwargs: Any) -> Self:
        """DDP around the student and its adapters; the teacher is neither wrapped nor broadcast."""
        from torch.nn.parallel import DistributedDataParallel

        self.trainable_module = DistributedDataParallel(self.trainable_module, device_ids=device_ids, **ddp_kwargs)
        return self

    def compile(self, backend: str = "inductor", mode: str | None = None, **compile_kwargs: Any) -> nn.Module:
        """Compile the whole step, and the student for evaluation."""
        self.eval_model = cast(
            nn.Module, torch.compile(self.distiller.student, backend=backend, mode=mode, **compile_kwargs)
        )
        # In place: a wrapper would put `_orig_mod.` before the names that `no_weight_decay` gives to the optimizer.
        self.trainable_module.compile(backend=backend, mode=mode, **compile_kwargs)
        return self.eval_model

    def setup_ema(
        self, decay: float = 0.9999, use_warmup: bool = False, device: torch.device | None = None, **kwargs: Any
    ) -> nn.Module:
        """timm's average, of the baseline: a copy of the Distiller would hold a second teacher."""
        self.trainable_module_ema: Any = ModelEmaV3(
            self.distiller.student, decay=decay, use_warmup=use_warmup, device=device, **kwargs
        )
        return cast(nn.Module, self.trainable_module_ema)

    def update_ema(self, step: int | None = None) -> None:
        if self.has_ema():
            self.trainable_module_ema.update(self.distiller.student, step=step)

    def get_eval_model(self, module: nn.Module | None = None, ema: bool = False) -> nn.Module | None:
        found: nn.Module | None = super().get_eval_model(module=module, ema=ema)
        inner = None if found is None else unwrap_model(found)
        return inner.student if isinstance(inner, Distiller) else found

    def get_clip_parameters(self, exclude_head: bool = False) -> list[nn.Parameter]:
        """The student's parameters, without the last two where its head is left out, and the adapters'."""
        own = list(self.distiller.student.parameters())
        return [*(own[:-2] if exclude_head else own), *self.distiller.adapters.parameters()]

    def get_task_state(self, module: nn.Module | None = None, ema: bool = False) -> dict[str, Any]:
        state = self.distiller.adapters.state_dict()
        return {"adapters": state} if state and not ema else {}  # an average is of the baseline

    def load_task_state(
        self,
        state: Mapping[str, Any] | None,
        strict: bool = True,
        module: nn.Module | None = None,
        ema: bool = False,
    ) -> None:
        if state and not ema:
            self.distiller.adapters.load_state_dict(state["adapters"], strict=strict)
