"""A Distiller as a `timm.task.TrainingTask`, for timm's training script and for loops that use its tasks."""

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
    """Wrap a Distiller as a task of timm: `task(images, target)` calls `distiller(images, target)`.

    Compilation, DDP, weight averaging and checkpoints are timm's. A checkpoint's `state_dict` is that of the student
    alone, which plain timm loads. The adapters are its `task_state`. The average (`setup_ema`) and the model for
    evaluation are the student alone, too. Weights and options that are a `Schedule` change when the loop calls
    `task.set_epoch(epoch, epochs)`.

    `prepare_distributed` passes its `ddp_kwargs` to DDP. Objectives that do not train all of the student, such as hints
    alone, need `find_unused_parameters=True`.

    Raises LossError if `distiller` is not a Distiller, and if its teacher trains too: the loop would save and evaluate
    only one of two models.
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
        """The Distiller, without the wrappers of compilation and DDP."""
        inner = unwrap_model(self.trainable_module)
        assert isinstance(inner, Distiller)
        return inner

    def set_epoch(self, epoch: float, epochs: int) -> None:
        self.distiller.set_epoch(epoch, epochs)

    def forward(self, input: Tensor, target: Tensor) -> dict[str, Tensor]:
        """Return `{"loss", "output", and each objective by its name}`.

        `input` is images (batch, channels, height, width), `target` labels (batch) or (batch, classes).
        """
        result: dict[str, Tensor] = self.trainable_module(input, target)
        return result

    def prepare_distributed(self, device_ids: list[Any] | None = None, **ddp_kwargs: Any) -> Self:
        """Wrap the student and its adapters in DDP. The teacher is neither wrapped nor broadcast."""
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
        """Average the student's weights by timm. A copy of the whole Distiller would hold a second teacher."""
        self.trainable_module_ema: Any = ModelEmaV3(
            self.distiller.student, decay=decay, use_warmup=use_warmup, device=device, **kwargs
        )
        return cast(nn.Module, self.trainable_module_ema)

    def update_ema(self, step: int | None = None) -> None:
        if self.has_ema():
            self.trainable_module_ema.update(self.distiller.student, step=step)

    def get_eval_model(self, module: nn.Module | None = None, ema: bool = False) -> nn.Module | None:
        eval_model: nn.Module | None = super().get_eval_model(module=module, ema=ema)
        inner = None if eval_model is None else unwrap_model(eval_model)
        return inner.student if isinstance(inner, Distiller) else eval_model

    def get_clip_parameters(self, exclude_head: bool = False) -> list[nn.Parameter]:
        """All parameters that train; `exclude_head` leaves out the last two of the student."""
        student_parameters = list(self.distiller.student.parameters())
        return [
            *(student_parameters[:-2] if exclude_head else student_parameters),
            *self.distiller.adapters.parameters(),
            *self.distiller.losses.parameters(),
        ]

    def get_task_state(self, module: nn.Module | None = None, ema: bool = False) -> dict[str, Any]:
        if ema:  # the average is of the student alone
            return {}
        states = {name: getattr(self.distiller, name).state_dict() for name in self._state_parts}
        return {name: state for name, state in states.items() if state}

    @property
    def _state_parts(self) -> list[str]:
        """The names of the distiller's parts, beside the student, that have a state."""
        return ["adapters", "losses", *(["shares"] if self.distiller.shares is not None else [])]

    def load_task_state(
        self,
        state: Mapping[str, Any] | None,
        strict: bool = True,
        module: nn.Module | None = None,
        ema: bool = False,
    ) -> None:
        if state and not ema:
            for name in self._state_parts:
                getattr(self.distiller, name).load_state_dict(state.get(name, {}), strict=strict)
