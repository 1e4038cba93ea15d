"""Number of floating-point operations of a network, and the rate that a device can reach."""

from __future__ import annotations

from typing import Final

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from fseft_edge.machine.clock import timed
from fseft_edge.runtime.encoder.bundle import Precision

_SIDE: Final = {"cpu": 2048, "cuda": 8192}
_TYPES: Final[dict[Precision, torch.dtype]] = {
    "float32": torch.float32,
    "mixed": torch.float16,
    "bfloat16": torch.bfloat16,
}
_LEAST_SECONDS: Final = 1.0
_LEAST_PRODUCTS: Final = 3


def flop_of(network: nn.Module, window: tuple[int, int, int]) -> int:
    """Return the number of floating-point operations for one window; a multiplication and an addition count as two.

    The counter of PyTorch counts matrix products and convolutions of the plain network, and no element-wise operations
    (normalisation, activation, interpolation). The network runs on the meta device, so nothing is computed.
    """
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network.to("meta")(torch.zeros(1, 1, *window, device="meta"))
    return int(counter.get_total_flops())


def matrix_product_ceiling(device: torch.device, precision: Precision) -> float:
    """Return the floating-point operations per second of a large square matrix product, the best of several.

    Args:
        device: device of the matrix product.
        precision: precision of the encoder; ``mixed`` multiplies in float16, float32 does not use TF32.
    """
    side = _SIDE[device.type]
    a, b = (torch.rand(side, side, device=device).to(_TYPES[precision]) for _ in range(2))
    timed(lambda: a @ b, device)
    seconds: list[float] = []
    while sum(seconds) < _LEAST_SECONDS or len(seconds) < _LEAST_PRODUCTS:
        seconds.append(timed(lambda: a @ b, device))
    return 2 * side**3 / min(seconds)
