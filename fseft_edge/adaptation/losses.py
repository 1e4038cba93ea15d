"""Loss functions of adaptation and of pre-training, for partially annotated data."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Total = Callable[[Tensor], Tensor]
"""A function that sums a tensor over the processes that share a batch, including gradients."""


def single_process(tensor: Tensor) -> Tensor:
    """Return the tensor unchanged: the sum over one process."""
    return tensor


def soft_dice_loss(probabilities: Tensor, targets: Tensor, *, smoothing: float = 1.0) -> Tensor:
    """Return ``1 - (2 Σ p y + s) / (Σ p + Σ y + s)`` for each sample and organ (Silva-Rodriguez et al., FSEFT).

    Args:
        probabilities: ``p``, ``[n, K, X, Y, Z]`` in 0..1.
        targets: ``y``, ``[n, K, X, Y, Z]`` in 0..1; values between 0 and 1 are allowed.
        smoothing: ``s``; the value in the released code of the paper is 1.

    Returns:
        ``[n, K]``.
    """
    axes = tuple(range(2, probabilities.ndim))
    overlap = (probabilities * targets).sum(axes)
    total = probabilities.sum(axes) + targets.sum(axes)
    return 1 - (2 * overlap + smoothing) / (total + smoothing)


def cross_entropy_per_organ(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the binary cross-entropy of each sample and organ, averaged over voxels: ``[n, K]``.

    Args:
        logits: ``[n, K, X, Y, Z]``.
        targets: ``[n, K, X, Y, Z]`` in 0..1.
    """
    return F.binary_cross_entropy_with_logits(logits, targets, reduction="none").flatten(2).mean(2)


def partial_label_loss(logits: Tensor, targets: Tensor, task_mask: Tensor, *, total: Total = single_process) -> Tensor:
    """Return soft Dice loss plus cross-entropy, averaged over annotated organs only (FSEFT, eq. 1).

    The loss of organ ``k`` in sample ``n`` counts only if the task mask ``w_{n,k}`` is 1. The sum is divided by the sum
    of the task mask. An organ that is not annotated is therefore not treated as foreground or background.

    Args:
        logits: ``[n, K, X, Y, Z]``.
        targets: ``[n, K, X, Y, Z]`` in 0..1; values of organs with task mask 0 are ignored.
        task_mask: ``[n, K]`` of 0 and 1.
        total: function that sums a tensor over all processes that hold samples of the batch.

    Returns:
        A scalar; 0 if the task mask is 0 everywhere.
    """
    annotated = task_mask > 0
    logits, targets = logits[annotated][:, None], targets[annotated][:, None]
    each = soft_dice_loss(torch.sigmoid(logits), targets) + cross_entropy_per_organ(logits, targets)
    sums = total(torch.stack([each.sum(), annotated.sum().to(each.dtype)]))
    return sums[0] / sums[1].clamp_min(1.0)


def adaptation_loss(
    logits: Tensor,
    targets: Tensor,
    annotated: Tensor,
    activation: Literal["sigmoid", "softmax"],
    *,
    dice_weight: float = 1.0,
    total: Total = single_process,
) -> Tensor:
    """Return cross-entropy plus ``dice_weight`` times soft Dice loss over a batch of blocks, or of single voxels.

    A block contains only a part of an organ. Therefore overlap and size are summed over the complete batch before the
    Dice quotient is formed; :func:`soft_dice_loss` forms one quotient per sample. For an organ that no block of the
    batch contains, only the cross-entropy counts, because the Dice term would only favour an empty mask.

    Args:
        logits: ``[n, K, X, Y, Z]``; with softmax ``[n, 1 + K, X, Y, Z]``, with the background as class 0.
        targets: share of the voxel that the organ fills, ``[n, K, X, Y, Z]``.
        annotated: 0 if the organ is not annotated, else the weight of the sample, ``[n, K]``. With softmax, a block
            that is not annotated for all organs is ignored, because its background is not known.
        activation: activation of the adapter.
        dice_weight: weight of the Dice term; 0 means cross-entropy only.
        total: function that sums a tensor over all processes that hold blocks of the batch.
    """
    if activation == "softmax":
        known = annotated.amin(1, keepdim=True)
        background = (1 - targets.sum(1, keepdim=True)).clamp_min(0)
        cross_entropy = F.cross_entropy(logits, torch.cat([background, targets], 1), reduction="none")[:, None]
        probabilities, weight = torch.softmax(logits, 1)[:, 1:], known.expand(-1, targets.shape[1])
        entropy = (cross_entropy.flatten(2).mean(2) * known).sum()
        counted = known.sum()
    else:
        probabilities, weight = torch.sigmoid(logits), annotated
        entropy = (cross_entropy_per_organ(logits, targets) * weight).sum()
        counted = weight.sum()
    axes = (2, 3, 4)
    own = [
        ((probabilities * targets).sum(axes) * weight).sum(0),
        ((probabilities + targets).sum(axes) * weight).sum(0),
        (targets.sum(axes) * weight).sum(0),
    ]
    overlap, filled, shown = total(torch.stack(own)).unbind()
    entropies = total(torch.stack([entropy, counted]))
    seen = (shown > 0).float()
    dice = ((1 - (2 * overlap + 1) / (filled + 1)) * seen).sum() / seen.sum().clamp_min(1.0)
    return dice_weight * dice + entropies[0] / entropies[1].clamp_min(1.0)
