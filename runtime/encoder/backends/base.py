"""EncoderSession: common interface of all backends, from CT windows to feature pyramids."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import ExitStack
from functools import cached_property
from types import TracebackType
from typing import TYPE_CHECKING, ClassVar, Self

import torch
from torch import Tensor

from fseft_edge.runtime.encoder.bundle import EncoderBundle, Precision
from fseft_edge.runtime.encoder.networks.base import FeatureLevel, WholeScan
from fseft_edge.runtime.system.gpu_arithmetic import exact_float32
from fseft_edge.runtime.system.memory import resident_bytes

if TYPE_CHECKING:
    from fseft_edge.runtime.encoder.networks.rolling import RollingResidualUNet


class EncoderSession(ABC):
    """A loaded encoder. The session is a context manager; closing the session frees the engine's memory.

    Attributes:
        backend: name of the backend.
        device: device of the returned features.
        max_batch: largest number of windows that are encoded at once.
        precision: precision of the computation; features are always returned in float32.
        window: size of a window, ``[X, Y, Z]`` in voxels.
        levels: levels of the feature pyramid, finest first.
        whole_scan: how the encoder computes a whole scan in one pass; None if it computes a scan in windows.
        rolling: network that computes a whole scan plane by plane; None if the backend has no such network.
    """

    backend: ClassVar[str]

    def __init__(
        self, bundle: EncoderBundle, device: torch.device, max_batch: int, precision: Precision = "float32"
    ) -> None:
        self.device = device
        self.max_batch = max_batch
        self.precision = precision
        self.window: tuple[int, int, int] = bundle.window
        self.levels: tuple[FeatureLevel, ...] = bundle.levels
        self.whole_scan: WholeScan | None = bundle.whole_scan
        self.rolling: RollingResidualUNet | None = None
        self._open = True
        self._arithmetic = ExitStack()

    def keep_arithmetic(self) -> None:
        """Keep the exact arithmetic of :mod:`fseft_edge.runtime.system.gpu_arithmetic` while the session is open.

        It is also that of the adapters, which compute on the device of the session.
        """
        if self.device.type == "cuda":
            self._arithmetic.enter_context(exact_float32())

    @contextlib.contextmanager
    def computing(self) -> Iterator[None]:
        """Compute with the session's number of threads inside a ``with`` block."""
        yield

    @cached_property
    def held_before(self) -> int:
        """Memory of the process in bytes, measured at the first access of this property.

        The first access must be before the first window: engines and allocators keep memory of earlier windows and use
        this memory again, so that a later measurement would count the memory twice.
        """
        return resident_bytes()

    def encode(self, windows: Tensor) -> list[Tensor]:
        """Return the feature pyramid of any number of windows.

        Args:
            windows: CT windows, float32 ``[n, 1, X, Y, Z]`` on any device, n at least 1, scaled to 0..1 by the grid. An
                encoder that computes whole scans accepts any size.

        Returns:
            One tensor per level, finest first, float32 ``[n, C_l, X / s_l, Y / s_l, Z / s_l]``, sizes rounded up, on
            the session's device, in any memory order.

        Raises:
            ValueError: the windows have another shape or number format.
            RuntimeError: the session is closed.
        """
        if not self._open:
            raise RuntimeError("the encoder session is closed")
        if windows.ndim != 5 or 0 in windows.shape or not self._fits(windows) or windows.dtype != torch.float32:
            expected = ["n", 1, *self.window]
            raise ValueError(f"windows are {windows.dtype} {list(windows.shape)}, expected torch.float32 {expected}")
        with torch.no_grad():
            batches = [self._encode_batch(batch) for batch in windows.split(self.max_batch)]
            return batches[0] if len(batches) == 1 else [torch.cat(level) for level in zip(*batches, strict=True)]

    def _fits(self, windows: Tensor) -> bool:
        return windows.shape[1:] == (1, *self.window) or (self.whole_scan is not None and windows.shape[1] == 1)

    @abstractmethod
    def _encode_batch(self, windows: Tensor) -> list[Tensor]:
        """Return the pyramid of at most ``max_batch`` windows."""

    def close(self) -> None:
        """Free the engine. The session cannot be used after this call."""
        self._open = False
        self._arithmetic.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()
