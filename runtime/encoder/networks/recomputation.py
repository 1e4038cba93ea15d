"""Gradient checkpointing: compute tensors of a network again for the gradient instead of keeping them in memory."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import cast

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


def recomputed(part: Callable[..., Tensor], *inputs: Tensor, owner: nn.Module) -> Tensor:
    """Return ``part(*inputs)`` without keeping intermediate tensors; the gradient computes them again.

    Outputs, gradients and the statistics of batch normalisations are equal to those without checkpointing.

    Args:
        part: function that returns one tensor and does not change its inputs.
        inputs: arguments of ``part``.
        owner: module that contains all batch normalisations that ``part`` uses.
    """
    output = checkpoint(
        part,
        *inputs,
        use_reentrant=False,
        context_fn=lambda: (contextlib.nullcontext(), _unchanged_statistics(owner)),
    )
    return cast(Tensor, output)


@contextlib.contextmanager
def _unchanged_statistics(owner: nn.Module) -> Iterator[None]:
    """Prevent the second pass over a batch from changing the running statistics.

    The statistics are not removed from the modules, because the second pass must save the same number of tensors as the
    first pass.
    """
    norms = [module for module in owner.modules() if isinstance(module, nn.BatchNorm3d) and module.training]
    before = [(norm, norm.momentum, cast(Tensor, norm.num_batches_tracked)) for norm in norms]
    for norm in norms:
        norm.momentum = 0.0
        norm.num_batches_tracked = None
    try:
        yield
    finally:
        for norm, momentum, batches in before:
            norm.momentum = momentum
            norm.num_batches_tracked = batches
