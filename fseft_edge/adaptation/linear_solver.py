"""The linear adapter solved to convergence: a classifier on fixed features has no need of an optimiser's schedule.

Voxels are gathered once, each level interpolated to the finest: a quarter of those near an organ and one in fifty of
the others, each standing for as many as were left out. On these the same loss as in adaptation, soft Dice plus
cross-entropy, is minimised by L-BFGS (Liu & Nocedal, Mathematical Programming 45 (1989) 503-528) with a ridge towards
the start: the encoder's head where it knows the organ, zero elsewhere. The ridge does for a linear classifier what
perturbed features do for the others.
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
_NEAR = 3
_NEAR_SHARE = 0.25
_FAR_SHARE = 0.02


@dataclass(frozen=True)
class Voxels:
    """Voxels of a support set.

    Attributes:
        features: float32 ``[N, C]``, what the classifiers see (:meth:`Adapter.penultimate`).
        targets: float32 ``[N, K]``, share of the voxel that the organ fills.
        weight: float32 ``[N, K]``, how many voxels each stands for, 0 where the organ is not annotated.
    """

    features: Tensor
    targets: Tensor
    weight: Tensor

    @classmethod
    def joined(cls, parts: Sequence[Voxels]) -> Voxels:
        """Return the voxels of several sets as one."""
        return cls(
            torch.cat([part.features for part in parts]),
            torch.cat([part.targets for part in parts]),
            torch.cat([part.weight for part in parts]),
        )


def gather_voxels(
    adapter: Adapter, features: Sequence[Tensor], targets: Tensor, annotated: Tensor, generator: torch.Generator
) -> Voxels:
    """Return a quarter of a block's voxels near an organ, and fewer of the others, in the CPU's memory.

    Args:
        adapter: decides what is seen at a voxel.
        features: each level's part ``adapter.boxes(core)`` of one block, ``[1, C_l, ...]``.
        targets: ``[K, X, Y, Z]``.
        annotated: ``[K]``.
        generator: decides which are taken.
    """
    core = Box(*((0, size) for size in targets.shape[1:]))
    at_voxels = adapter.penultimate(features, core)[0].flatten(1).T
    reach = 2 * _NEAR + 1
    near = F.max_pool3d(targets[None].amax(1), reach, stride=1, padding=_NEAR).flatten() > 0
    share = torch.where(near, _NEAR_SHARE, _FAR_SHARE)
    chosen = torch.rand(near.shape, generator=generator).to(share.device) < share
    weight = annotated / share[chosen, None]
    return Voxels(at_voxels[chosen].cpu(), targets.flatten(1).T[chosen].cpu(), weight.cpu())


@dataclass(frozen=True)
class Solution:
    """The linear classifier of least loss.

    Attributes:
        weight: ``[classes, C]``.
        bias: ``[classes]``.
        loss: at the end, without ridge and penalty.
        evaluations: how often the loss was computed.
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
    """Return the linear classifier of least loss.

    Minimises :func:`fseft_edge.adaptation.losses.adaptation_loss` of all voxels at once plus ``ridge / 2 |W - W_0|²``.

    Args:
        voxels: what to learn from.
        start_weight: ``W_0``, ``[classes, C]``; with softmax the background comes first.
        start_bias: ``[classes]``; not held.
        ridge: strength of the pull towards ``W_0``.
        activation: of the adapter.
        dice_weight: weight of the Dice term.
        penalty: of weight and bias, added to what is minimised.
        iterations: of L-BFGS, at most.
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
