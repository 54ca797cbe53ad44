"""Teacher dropping: from which of several teachers a step learns."""

from collections.abc import Mapping, Sequence
from math import isfinite
from random import Random

import torch
from torch import Tensor

from probe_kd.errors import LossError


class TeacherDropping:
    """Keep the teacher with the greatest loss in a step, and drop each other with a probability.

    UNIC, Sariyildiz et al. 2024 (arXiv 2408.05088), sec. 3: so that no easy teacher takes over. A teacher's loss is the
    weighted sum of all terms that compare with it alone; terms that read no teacher, or the mean of several, are never
    dropped. The authors' code decides for every image, and divides by the number of images and teachers that it keeps.
    Here one decision holds for a step, because a loss may compare the images of its batch, and nothing is divided: the
    dropped terms are left out of the sum. With several processes, the loss of a teacher is that of all their images.

    The draws follow `seed` and the epoch that `begin` gets. A run that resumes in the middle of an epoch draws as it
    would have, and all processes draw alike. Nothing waits for a device.
    """

    def __init__(self, teachers: Sequence[str], probability: float, seed: int) -> None:
        check_probability(probability)
        if len(teachers) < 2:
            listed = f"objectives compare with {teachers[0]!r} alone" if teachers else "no objective compares with one"
            raise LossError(f"teacher_dropping chooses between teachers, and {listed}; leave it out")
        self.teachers, self.probability, self.seed = tuple(teachers), probability, seed
        self.begin(0.0, torch.device("cpu"))

    def begin(self, epoch: float, device: torch.device) -> None:
        """Seed the draws of the steps from here on, and draw for the next step."""
        self._random = Random(f"teacher dropping {self.seed} {epoch!r}")
        self.draw(device)

    def draw(self, device: torch.device) -> None:
        """Draw which teachers the next step keeps, whatever their losses."""
        kept = [float(self._random.random() >= self.probability) for _ in self.teachers]
        self.kept = torch.tensor(kept, device="cpu").to(device, non_blocking=True)

    def factors(self, losses: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return 1 for each teacher whose terms count in this step, and 0 for each that is dropped."""
        stacked = torch.stack([losses[name].detach().float() for name in self.teachers])
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(stacked)
        factors = torch.maximum(self.kept.to(stacked.device), (stacked >= stacked.max()).to(stacked.dtype))
        return dict(zip(self.teachers, factors.unbind(), strict=True))


def check_probability(probability: float) -> None:
    """Raise LossError for anything but a probability."""
    fits = isinstance(probability, int | float) and not isinstance(probability, bool) and isfinite(probability)
    if not fits or not 0 < probability <= 1:
        raise LossError(f"teacher_dropping {probability!r}: expected a probability above 0 and up to 1, as in 0.5")
