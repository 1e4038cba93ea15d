"""Backend torch: always available, and the reference for the other backends."""

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
from fseft_edge.runtime.encoder.networks.rolling import RollingResidualUNet
from fseft_edge.runtime.encoder.networks.slabwise import SlabwiseResidualUNet

_MAX_BATCH_CPU = 1  # larger batches need more memory and are not measurably faster
_FORMATS: dict[Precision, torch.dtype] = {
    "float32": torch.float32,
    "mixed": torch.float16,
    "bfloat16": torch.bfloat16,
}
_MAX_BATCH_CUDA = 2  # the attention of SwinUNETR-48 takes 1.5 GB per window of 96^3 voxels


class TorchSession(EncoderSession):
    """Session that computes features with PyTorch, in float32 or, on a GPU, also in mixed precision.

    An encoder that computes whole scans also computes in bfloat16 on a CPU.

    On a GPU, an open session keeps TF32 off, and results are reproducible.
    """

    backend: ClassVar[str] = "torch"

    def __init__(
        self, bundle: EncoderBundle, device: torch.device, threads: int, precision: Precision = "float32"
    ) -> None:
        on_cpu = device.type == "cpu"
        super().__init__(bundle, device, _MAX_BATCH_CPU if on_cpu else _MAX_BATCH_CUDA, precision)
        self._threads = threads
        self._order = torch.contiguous_format
        self._network: nn.Module | None
        network = inference_network(bundle.network(), whole_scan=self.whole_scan is not None)
        if self.whole_scan is not None and isinstance(network, ResidualUNet):
            self._network = self.rolling = RollingResidualUNet(network, _FORMATS[precision]).to(device)
            return
        if precision == "mixed":
            network = MixedPrecision(network)
        if on_cpu and isinstance(network, ResidualUNet):
            network = SlabwiseResidualUNet(network)
        if on_cpu and torch.backends.mkldnn.is_available() and not _normalises_each_window(network):
            _use_onednn(network)
            self._order = torch.channels_last_3d
        self._network = network.to(device)

    def _encode_batch(self, windows: Tensor) -> list[Tensor]:
        assert self._network is not None  # noqa: S101 - encode() refuses a closed session
        with self.computing():
            pyramid: list[Tensor] = self._network(windows.to(self.device).to(memory_format=self._order))
            return pyramid

    @contextlib.contextmanager
    def computing(self) -> Iterator[None]:
        """Compute with the session's number of threads inside a ``with`` block."""
        with _threads(self._threads):
            yield

    def close(self) -> None:
        """Free the network. The session cannot be used after this call."""
        super().close()
        self._network = self.rolling = None


@runtime_checkable
class _Foldable(Protocol):
    def folded(self) -> FeatureNetwork: ...


def inference_network(network: FeatureNetwork, *, whole_scan: bool) -> FeatureNetwork:
    """Return a network that computes the encoder's features, in evaluation mode and with batch normalisations folded.

    Args:
        network: network of the encoder.
        whole_scan: whether the encoder computes whole scans, which are surrounded by air
            (:meth:`ResidualUNet.in_air`).
    """
    if whole_scan:
        assert isinstance(network, ResidualUNet)  # noqa: S101 - no other network computes whole scans
        return network.in_air()
    return (network.folded() if isinstance(network, _Foldable) else network).eval()


class _OneDnnConvolution(nn.Module):
    """A convolution that always runs in oneDNN.

    For a single window with few channels or few voxels in plane, PyTorch uses its own im2col (ATen's
    ``ConvParams::use_mkldnn``). In the compact encoder, the first and the deepest convolutions would use im2col, and
    the whole network would take a third longer.
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
    """Return whether a network has instance normalisations, which copy channels-last features to another order."""
    return any(isinstance(module, nn.InstanceNorm3d) for module in network.modules())


def _use_onednn(module: nn.Module) -> None:
    """Make all convolutions of a module run in oneDNN on channels-last features, in place."""
    for name, child in module.named_children():
        if isinstance(child, nn.Conv3d | nn.ConvTranspose3d):
            child.weight.data = child.weight.data.to(memory_format=torch.channels_last_3d)
        if isinstance(child, nn.Conv3d):
            setattr(module, name, _OneDnnConvolution(child))
        else:
            _use_onednn(child)


@contextlib.contextmanager
def _threads(count: int) -> Iterator[None]:
    """Set PyTorch's number of threads inside a ``with`` block, if it is another one.

    The number belongs to the process: a session with its own number must be the only computation of the process.
    """
    before = torch.get_num_threads()
    if count == before:
        yield
        return
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
