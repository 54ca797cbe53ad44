"""Losses that compare with vectors of earlier batches, which they remember in buffers."""

from collections.abc import Sequence
from math import log

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from probe_kd.engine.spec import FeatureSpec
from probe_kd.errors import LossError
from probe_kd.methods.losses.checks import check_same_shape, has_values
from probe_kd.methods.losses.parts import SMALL, in_parts
from probe_kd.methods.losses.state import before_written, drawn, gathered
from probe_kd.methods.losses.units import power_of_two, unit


class PatchSimilarityQueue(nn.Module):
    """Compute KL(softmax(Q v_t / T) || softmax(Q v_s / T)), where Q are the teacher's last vectors, from many images.

    All vectors have length 1, but a student's counts as no shorter than 1e-4, so that zeros have a bounded gradient.
    It is the first form of LightlyTrain's distillation, with its temperature 0.07. Q are the teacher's vectors of
    this batch and of the batches before, up to `size`: 8192 in LightlyTrain from 20 000 images on, and about half of
    the images below. A new queue fills up over the first steps, and places that are still empty do not count. Of a
    batch with more vectors than the queue, evenly spaced ones enter. All processes enter all vectors. In evaluation
    mode, the queue stays as it is. Time grows with the positions of the batch times `size`; the memory does not, since
    the similarities are computed in parts that are no larger than the features.

    Shapes: two features (batch, channels, ...) of one shape; each position is compared, with the mean over all.
    """

    queue: Float[Tensor, "size channels"]
    filled: Int[Tensor, ""]

    def __init__(
        self, student: FeatureSpec, teacher: FeatureSpec, *, size: int = 8192, temperature: float = 0.07
    ) -> None:
        super().__init__()
        if size < 2 or not 0 < temperature < torch.inf:
            raise LossError(
                f"patch_similarity_queue: size {size}, temperature {temperature}; expected at least 2 vectors, and a "
                "temperature above 0"
            )
        self.temperature = temperature
        self.register_buffer("queue", torch.zeros(size, teacher.channels))
        self.register_buffer("filled", torch.zeros((), dtype=torch.int64))

    def forward(
        self, student: Float[Tensor, "batch channels ..."], teacher: Float[Tensor, "batch channels ..."]
    ) -> Float[Tensor, ""]:
        check_same_shape(student, teacher, "patch_similarity_queue")
        rows, targets = (side.movedim(1, -1).flatten(0, -2) for side in (student, teacher))
        rows, targets = self._bounded_unit(rows), unit(targets)
        size = len(self.queue)
        entering = gathered(targets) if self.training else targets.detach()
        entering = entering[:: -(-len(entering) // size)]
        queue = torch.cat([entering, before_written(self.queue).to(entering.dtype)])[:size]
        filled = (before_written(self.filled) + len(entering)).clamp_max(size)
        if self.training:
            self.queue.copy_(queue)
            self.filled.copy_(filled)
        empty = torch.arange(size, device=filled.device) >= filled

        def part(own: Tensor, other: Tensor) -> Tensor:
            log_p, log_q = (self._log_softmax(side @ queue.mT, empty) for side in (own, other))
            return F.kl_div(log_p, log_q, reduction="sum", log_target=True)

        return in_parts(part, (rows, targets), (), numbers=size, largest=max(rows.numel(), SMALL)) / len(rows)

    @staticmethod
    def _bounded_unit(rows: Float[Tensor, "rows channels"]) -> Float[Tensor, "rows channels"]:
        return F.normalize(rows / power_of_two(rows.abs().amax(1, keepdim=True)).clamp_min(1.0), dim=1, eps=1e-4)

    def _log_softmax(self, similarities: Float[Tensor, "rows size"], empty: Tensor) -> Float[Tensor, "rows size"]:
        # An empty place has the probability exp(-1e4) = 0; minus infinity would make 0 * inf of it.
        return F.log_softmax(torch.where(empty, -1e4, similarities / self.temperature), dim=1)


class CRD(nn.Module):
    """Compute the contrastive loss -log h(a, b) - sum over the negatives of log(1 - h(a, b')), for both models.

    Contrastive representation distillation, Tian et al. 2020 (arXiv 1910.10699), eq. 18 and 19: h(a, b) = e / (e + N/M)
    with e = exp(a b / T) / Z. a is the embedding of a student's (teacher's) vector: a linear layer to `width` numbers,
    scaled to length 1. b and b' are embeddings of the other model that a memory of all M training images holds, of the
    same image and of N random ones. The value is the sum of both directions, averaged over the batch; the weight in
    the authors' code is 0.8. Z is set by the first batch. The memory is updated with `momentum`, after the loss, with
    the embeddings of all processes.

    `negatives` N = 16384, `temperature` T = 0.07, `momentum` 0.5 and `width` 128 are the paper's for CIFAR-100. There
    are no more negatives than images. They are drawn once a step for the whole batch, which has the same expectation as
    draws for each image and takes a batch-th of the memory. An image may be among its own negatives, as in the authors'
    code without labels. In evaluation mode, an image is compared with its own embedding instead of the memory's.

    Shapes: (batch, c1), (batch, c2) and the number (batch,) of each image in the training set. The core fills in
    `num_images`, M.
    """

    memories: Float[Tensor, "2 images width"]
    scales: Float[Tensor, "2"]
    steps: Int[Tensor, ""]

    def __init__(
        self,
        student: FeatureSpec,
        teacher: FeatureSpec,
        *,
        num_images: int,
        negatives: int = 16384,
        temperature: float = 0.07,
        momentum: float = 0.5,
        width: int = 128,
    ) -> None:
        super().__init__()
        if min(negatives, width) < 1 or not (0 < temperature < torch.inf and 0 <= momentum < 1):
            raise LossError(
                f"crd: negatives {negatives}, temperature {temperature}, momentum {momentum}, width {width}; expected "
                "numbers above 0, and a momentum from 0 to below 1"
            )
        self.negatives, self.temperature, self.momentum = min(negatives, num_images), temperature, momentum
        self.embed_student, self.embed_teacher = (nn.Linear(side.channels, width) for side in (student, teacher))
        bound = (3 / width) ** 0.5  # the expected length is 1
        self.register_buffer("memories", torch.empty(2, num_images, width).uniform_(-bound, bound))
        self.register_buffer("scales", torch.zeros(2))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def forward(
        self,
        student: Float[Tensor, "batch c1"],
        teacher: Float[Tensor, "batch c2"],
        index: Int[Tensor, " batch"],
    ) -> Float[Tensor, ""]:
        _check_index(index, len(student), self.memories.shape[1] if self.training else None)
        embeddings = unit(self.embed_student(student)), unit(self.embed_teacher(teacher))
        others = drawn(torch.randint, (self.negatives,), index.device, self.memories.shape[1], training=self.training)
        losses, scales = [], []
        for side, anchors in enumerate(embeddings):
            memory = self.memories[1 - side]
            positives = before_written(memory[index]) if self.training else embeddings[1 - side].detach()
            own = (anchors * positives.to(anchors.dtype)).sum(1, keepdim=True) / self.temperature
            rest = anchors @ before_written(memory[others]).to(anchors.dtype).mT / self.temperature
            scale = self._scale(side, torch.cat([own, rest], dim=1))
            # h = sigmoid(a b / T - log(N Z / M)), and Z / M is the mean of exp(a b / T).
            log_h = F.logsigmoid(own - scale).sum() + F.logsigmoid(scale - rest).sum()
            losses.append(-log_h / len(anchors))
            scales.append(scale)
        if self.training:
            self._remember(embeddings, index, torch.stack(scales))
        return torch.stack(losses).sum()

    def _scale(self, side: int, products: Float[Tensor, "batch n"]) -> Float[Tensor, ""]:
        """log(N Z / M): Z / M is the mean of exp(a b / T) in the first batch."""
        measured = products.detach().flatten().logsumexp(0) + log(self.negatives / products.numel())
        return before_written(torch.where(self.steps > 0, self.scales[side].to(measured.dtype), measured))

    @torch.no_grad()
    def _remember(self, embeddings: Sequence[Tensor], index: Int[Tensor, " batch"], scales: Float[Tensor, "2"]) -> None:
        places = gathered(index)
        for memory, embedding in zip(self.memories, embeddings, strict=True):
            entering = gathered(embedding).to(memory.dtype)
            memory[places] = unit(self.momentum * memory[places] + (1 - self.momentum) * entering)
        self.scales.copy_(gathered(scales[None]).mean(0))
        self.steps.add_(1)


def _check_index(index: Tensor, batch: int, num_images: int | None) -> None:
    """Raise LossError unless there is the number of a training image for each image of the batch."""
    if index.shape != (batch,) or index.is_floating_point():
        raise LossError(
            f"crd: index {tuple(index.shape)} of {index.dtype}; expected the number of each of {batch} images"
        )
    if num_images is not None and has_values(index) and not 0 <= int(index.min()) <= int(index.max()) < num_images:
        raise LossError(
            f"crd: the numbers {int(index.min())} to {int(index.max())} of images; the memory has {num_images} images, "
            f"from 0 to {num_images - 1}"
        )
