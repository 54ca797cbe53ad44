"""The losses: pure functions of (student, teacher), each with its paper and equation.

All losses reduce alike: the *event* of one image (its classes, its channels and positions, its Gram matrix) is summed
or averaged, as `reduction` says, and the batch is averaged. There is no factor 1/2 and no other constant: if a paper
has one, it belongs into the weight. So `reduction="mean"` of a squared error is `F.mse_loss`, and `reduction="sum"`
is the paper's norm.

Every loss is computed in float32 at least (float64 stays) and outside autocast: bfloat16 captures lose the small
differences that a loss depends on, and a float16 Gram matrix overflows. No gradient flows into the teacher, unless a
call passes `block_gradient=False`, which every loss takes: if both models train together, the gradient block of Rocket
Launching (Zhou et al. 2018, arXiv 1708.04106, sec. 3.3) is a choice.

Every loss checks types and shapes at each call, and raises LossError. Checks that need the values (labels out of
range, a target that is not a distribution, a result that is not finite) are made at each call on the CPU. On another
device every step would have to wait for the values, so there the Distiller checks only its first step
(`check_values`).

The names below are loaded when they are first used.
"""

from probe_kd.lazy import getter

_HOME = {
    "attention": "maps",
    "balanced_weights": "labels",
    "binary_cross_entropy": "multilabel",
    "cc": "relations",
    "CRD": "memories",
    "cross_entropy": "labels",
    "cwd": "features",
    "dist": "outputs",
    "dkd": "labelled_outputs",
    "flow_matrix": "matrices",
    "fsp": "matrices",
    "gram": "matrices",
    "gram_tokens": "maps",
    "hard_labels": "outputs",
    "hint": "features",
    "ickd": "features",
    "logits": "outputs",
    "MGD": "learned",
    "multilabel_soft_targets": "multilabel",
    "nkd": "labelled_outputs",
    "nst": "maps",
    "ofa": "labelled_outputs",
    "patch_similarity": "maps",
    "PatchSimilarityQueue": "memories",
    "pkd": "features",
    "pkt": "relations",
    "ReviewKD": "review",
    "rkd": "relations",
    "RSD": "learned",
    "smooth_l1": "features",
    "soft_targets": "outputs",
    "sp": "relations",
    "SRRL": "learned",
    "token_match": "features",
    "VID": "learned",
    "LOSSES": "table",
    "Loss": "table",
}

__getattr__ = getter(__name__, _HOME)
