"""The torch backend: always there, and the reference that the others are compared with."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from fseft_edge.runtime.encoder.backends.base import EncoderSession
from fseft_edge.runtime.encoder.bundle import EncoderBundle, Precision
from fseft_edge.runtime.encoder.networks.base import FeatureNetwork
from fseft_edge.runtime.encoder.networks.mixed_precision import MixedPrecision
from fseft_edge.runtime.encoder.networks.residual_unet import ResidualUNet
from fseft_edge.runtime.encoder.networks.slabwise import SlabwiseResidualUNet

_MAX_BATCH_CPU = 1  # more windows at once cost memory and gain nothing measurable
_MAX_BATCH_CUDA = 2  # attention of SwinUNETR-48 at 96^3 alone takes 1.5 GB a window


class TorchSession(EncoderSession):
    """Features by PyTorch, in float32 (on a GPU too: TF32 is off, results are reproducible) or, on a GPU, mixed."""

    backend: ClassVar[str] = "torch"

    def __init__(
        self, bundle: EncoderBundle, device: torch.device, threads: int, precision: Precision = "float32"
    ) -> None:
        on_cpu = device.type == "cpu"
        super().__init__(bundle, device, _MAX_BATCH_CPU if on_cpu else _MAX_BATCH_CUDA, precision)
        network = inference_network(bundle.network())
        if precision == "mixed":
            network = MixedPrecision(network)
        if on_cpu and isinstance(network, ResidualUNet):
            network = SlabwiseResidualUNet(network)
        self._order = torch.contiguous_format
        if on_cpu and torch.backends.mkldnn.is_available() and not _normalises_each_window(network):
            _use_onednn(network)
            self._order = torch.channels_last_3d
        self._network: FeatureNetwork | None = network.to(device)
        self._threads = threads

    def _encode_batch(self, windows: Tensor) -> list[Tensor]:
        assert self._network is not None  # noqa: S101 - encode() refuses a closed session
        with _threads(self._threads), torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False):
            pyramid: list[Tensor] = self._network(windows.to(self.device).to(memory_format=self._order))
            return pyramid

    def close(self) -> None:
        """Free the network; the session cannot be used any more."""
        super().close()
        self._network = None


@runtime_checkable
class _Foldable(Protocol):
    def folded(self) -> FeatureNetwork: ...


def inference_network(network: FeatureNetwork) -> FeatureNetwork:
    """Return the same function in its form for inference: evaluation mode, normalisations folded where they can be."""
    return (network.folded() if isinstance(network, _Foldable) else network).eval()


class _OneDnnConvolution(nn.Module):
    """A convolution that always runs in oneDNN.

    PyTorch itself prefers its own im2col for a single window with few channels or voxels in plane (ATen's
    ``ConvParams::use_mkldnn``): for the compact encoder those are the first and the deepest convolutions, and the
    whole network takes a third longer with them.
    """

    def __init__(self, convolution: nn.Conv3d) -> None:
        super().__init__()
        self.weight, self.bias = convolution.weight, convolution.bias
        self._padding, self._stride = list(map(int, convolution.padding)), list(convolution.stride)
        self._dilation, self._groups = list(convolution.dilation), convolution.groups

    def forward(self, x: Tensor) -> Tensor:
        return torch.mkldnn_convolution(
            x, self.weight, self.bias, self._padding, self._stride, self._dilation, self._groups
        )


def _normalises_each_window(network: nn.Module) -> bool:
    """Return whether there are instance normalisations, which copy channels-last features there and back."""
    return any(isinstance(module, nn.InstanceNorm3d) for module in network.modules())


def _use_onednn(module: nn.Module) -> None:
    """Make the convolutions within a module run in oneDNN on channels-last features, in place."""
    for name, child in module.named_children():
        if isinstance(child, nn.Conv3d | nn.ConvTranspose3d):
            child.weight.data = child.weight.data.to(memory_format=torch.channels_last_3d)
        if isinstance(child, nn.Conv3d):
            setattr(module, name, _OneDnnConvolution(child))
        else:
            _use_onednn(child)


@contextlib.contextmanager
def _threads(count: int) -> Iterator[None]:
    """Let PyTorch use this many threads meanwhile; the number is process-wide."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
