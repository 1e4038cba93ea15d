"""Solver for linear classifiers: a classifier on fixed features is solved to convergence, without a schedule.

Voxels are collected once, with each level interpolated to the finest level: a quarter of the voxels near an organ, and
one in fifty of the other voxels. Each voxel has the reciprocal of its sampling rate as its weight. L-BFGS (Liu &
Nocedal, Mathematical Programming 45 (1989) 503-528) minimises the adaptation loss, soft Dice plus cross-entropy, on
these voxels, plus a ridge that pulls the weights towards their start values: the encoder's head for known organs, zero
for novel organs. The ridge regularises a linear adapter; perturbed features regularise the other adapters.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fseft_edge.adaptation.losses import adaptation_loss
from fseft_edge.adapters.blocks import Box
from fseft_edge.adapters.network import Activation, Adapter

ITERATIONS = 200
_NEAR_VOXELS = 3
_NEAR_SHARE = 0.25
_FAR_SHARE = 0.02


@dataclass(frozen=True)
class Voxels:
    """A sample of voxels of a support set.

    Attributes:
        features: input of the classifiers (:meth:`Adapter.penultimate`), float32 ``[N, C]``.
        targets: share of the voxel that the organ fills, float32 ``[N, K]``.
        weight: number of voxels that the sampled voxel represents; 0 if the organ is not annotated; float32 ``[N, K]``.
    """

    features: Tensor
    targets: Tensor
    weight: Tensor

    @classmethod
    def joined(cls, parts: Sequence[Voxels]) -> Voxels:
        """Return the voxels of several samples as one sample."""
        return cls(
            torch.cat([part.features for part in parts]),
            torch.cat([part.targets for part in parts]),
            torch.cat([part.weight for part in parts]),
        )


def gather_voxels(
    adapter: Adapter, features: Sequence[Tensor], targets: Tensor, annotated: Tensor, generator: torch.Generator
) -> Voxels:
    """Sample a quarter of the voxels of a block that are near an organ, and one in fifty of the others, on the CPU.

    Args:
        adapter: adapter that computes the input of the classifiers.
        features: features of each level of one block, in the boxes ``adapter.boxes(core)``, ``[1, C_l, ...]``.
        targets: share of each voxel that each organ fills, ``[K, X, Y, Z]``.
        annotated: 1 if the organ is annotated in the scan, else 0, ``[K]``.
        generator: generator for the random choice of voxels.
    """
    core = Box(*((0, size) for size in targets.shape[1:]))
    at_voxels = adapter.penultimate(features, core)[0].flatten(1).T
    window = 2 * _NEAR_VOXELS + 1
    near = F.max_pool3d(targets[None].amax(1), window, stride=1, padding=_NEAR_VOXELS).flatten() > 0
    share = torch.where(near, _NEAR_SHARE, _FAR_SHARE)
    chosen = torch.rand(near.shape, generator=generator).to(share.device) < share
    weight = annotated / share[chosen, None]
    return Voxels(at_voxels[chosen].cpu(), targets.flatten(1).T[chosen].cpu(), weight.cpu())


@dataclass(frozen=True)
class Solution:
    """The linear classifier with the smallest loss.

    Attributes:
        weight: ``[classes, C]``.
        bias: ``[classes]``.
        loss: final loss without ridge and penalty.
        evaluations: number of evaluations of the loss.
    """

    weight: Tensor
    bias: Tensor
    loss: float
    evaluations: int


def solve(
    voxels: Voxels,
    start_weight: Tensor,
    start_bias: Tensor,
    *,
    ridge: float,
    activation: Activation,
    dice_weight: float = 1.0,
    penalty: Callable[[Tensor, Tensor], Tensor] | None = None,
    iterations: int = ITERATIONS,
) -> Solution:
    """Return the linear classifier with the smallest loss.

    The function minimises :func:`fseft_edge.adaptation.losses.adaptation_loss` over all voxels together, plus
    ``ridge / 2 |W - W_0|²``, plus the penalty.

    Args:
        voxels: training voxels.
        start_weight: start value ``W_0`` of the weight, ``[classes, C]``; with softmax, class 0 is the background.
        start_bias: start value of the bias, ``[classes]``; the ridge does not apply to the bias.
        ridge: strength of the ridge.
        activation: activation of the adapter.
        dice_weight: weight of the Dice term.
        penalty: function of weight and bias whose value is added to the loss; None adds nothing.
        iterations: maximum number of L-BFGS iterations.
    """
    weight, bias = start_weight.clone().requires_grad_(), start_bias.clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [weight, bias], max_iter=iterations, history_size=20, tolerance_change=1e-7, line_search_fn="strong_wolfe"
    )

    def loss_of_fit() -> Tensor:
        logits, targets = voxels.features @ weight.T + bias, voxels.targets
        as_samples = (..., None, None, None)
        return adaptation_loss(
            logits[as_samples], targets[as_samples], voxels.weight, activation, dice_weight=dice_weight
        )

    evaluations = 0

    def closure() -> Tensor:
        nonlocal evaluations
        evaluations += 1
        optimizer.zero_grad()
        loss = loss_of_fit() + ridge / 2 * (weight - start_weight).square().sum()
        if penalty is not None:
            loss = loss + penalty(weight, bias)
        loss.backward()
        return loss

    optimizer.step(closure)
    with torch.no_grad():
        loss = loss_of_fit()
    return Solution(weight.detach(), bias.detach(), float(loss), evaluations)
