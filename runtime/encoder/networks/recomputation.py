"""Gradient checkpointing: parts of a network that are computed again for the gradient rather than kept in memory."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import cast

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


def recomputed(part: Callable[..., Tensor], *inputs: Tensor, owner: nn.Module) -> Tensor:
    """Return ``part(*inputs)``; what lies between inputs and output is not kept but computed again when it is needed.

    Outputs, gradients and the statistics of batch normalisations are those of ``part(*inputs)`` itself.

    Args:
        part: computes one tensor; must not change its inputs.
        inputs: its arguments.
        owner: the module whose batch normalisations ``part`` may use.
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
    """Let a second pass over the same batch not count as a second batch.

    The running statistics stay where they are rather than being taken away: the second pass has to save as many tensors
    as the first.
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
