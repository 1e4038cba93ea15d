"""Convolutions whose gradients PyTorch gets wrong on a CPU in bfloat16."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn


@contextlib.contextmanager
def short_inputs_in_float32(network: nn.Module) -> Iterator[None]:
    """Within, convolutions whose kernel is longer than what they see compute in float32 on a CPU, also under autocast.

    PyTorch 2.13 in bfloat16, one thread: where a kernel is longer along an axis than what a 3D convolution sees, the
    gradient of its weight is what was in memory before. Seen by filling freed memory (``MALLOC_PERTURB_``) for kernels
    of 3 and 5 over 1 to 4 voxels, dense and depthwise. Such inputs are small, so this costs nothing.

    Args:
        network: to be trained.
    """
    convolutions = [module for module in network.modules() if isinstance(module, nn.Conv3d)]
    for convolution in convolutions:
        forward = functools.partial(_convolved, convolution, convolution.forward)
        convolution.forward = forward  # type: ignore[method-assign]  # of this object alone, for a while
    try:
        yield
    finally:
        for convolution in convolutions:
            del convolution.forward


def _convolved(convolution: nn.Conv3d, forward: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    if x.device.type != "cpu":
        return forward(x)
    if all(kernel <= size for kernel, size in zip(convolution.kernel_size, x.shape[2:], strict=True)):
        return forward(x)
    with torch.autocast("cpu", enabled=False):
        return forward(x.float())
