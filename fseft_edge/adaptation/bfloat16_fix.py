"""Workaround for convolutions for which PyTorch computes wrong gradients in bfloat16 on a CPU."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn


@contextlib.contextmanager
def short_inputs_in_float32(network: nn.Module) -> Iterator[None]:
    """In this context, convolutions whose kernel is longer than their input compute in float32 on a CPU.

    This also applies under autocast. Reason: in PyTorch 2.13 with bfloat16 and one thread, if the kernel of a 3D
    convolution is longer along an axis than the input, the gradient of the weight contains values of uninitialised
    memory. The error was observed with filled freed memory (``MALLOC_PERTURB_``), for kernels of 3 and 5 voxels over
    inputs of 1 to 4 voxels, dense and depthwise. Such inputs are small, so that float32 costs almost no time.

    Args:
        network: network to be trained.
    """
    convolutions = [module for module in network.modules() if isinstance(module, nn.Conv3d)]
    for convolution in convolutions:
        forward = functools.partial(_convolved, convolution, convolution.forward)
        convolution.forward = forward  # type: ignore[method-assign]  # only of this object, only in this context
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
