"""A program that prints gradients of convolutions in bfloat16, for runs with filled memory (``MALLOC_PERTURB_``)."""

from __future__ import annotations

import sys

import torch
from torch import nn

from fseft_edge.adaptation.bfloat16_fix import short_inputs_in_float32


def gradients(*, guarded: bool, precision: torch.dtype = torch.bfloat16) -> list[float]:
    """Return the largest weight gradient for kernels of 3 and 5 voxels, over shorter inputs and over equal inputs."""
    torch.manual_seed(0)
    largest = []
    for kernel, size in ((3, 2), (3, 3), (5, 4), (5, 5)):
        network = nn.Sequential(nn.Conv3d(8, 8, kernel, padding=kernel // 2))
        network.to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]  # the stubs contain 2D only
        x = torch.rand(1, 8, size, size, size).contiguous(memory_format=torch.channels_last_3d)
        with torch.autocast("cpu", torch.bfloat16, enabled=precision != torch.float32):
            if guarded:
                with short_inputs_in_float32(network):
                    y = network(x)
            else:
                y = network(x)
        y.float().sum().backward()
        weight = network[0].weight
        assert isinstance(weight, nn.Parameter)
        assert weight.grad is not None
        largest.append(float(weight.grad.abs().max()))
    return largest


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.stdout.write(" ".join(map(str, gradients(guarded=sys.argv[1] == "guarded"))))
