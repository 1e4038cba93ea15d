"""EncoderSession: CT windows in, feature pyramids out, whatever engine computes them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from functools import cached_property
from types import TracebackType
from typing import ClassVar, Self

import torch
from torch import Tensor

from fseft_edge.runtime.encoder.bundle import EncoderBundle, Precision
from fseft_edge.runtime.encoder.networks.base import FeatureLevel
from fseft_edge.runtime.system.memory import resident_bytes


class EncoderSession(ABC):
    """An encoder that is loaded and ready. A context manager; closing it frees what the engine holds.

    Attributes:
        backend: the engine's name.
        device: where features are returned.
        max_batch: windows that are encoded at once.
        precision: what features are computed in; they are returned in float32.
        window: ``[X, Y, Z]`` voxels of a window.
        levels: the feature pyramid, finest first.
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
        self._open = True

    @cached_property
    def held_before(self) -> int:
        """Bytes that the process held when this was first asked for: plans ask before the first window.

        Engines and allocators keep memory of earlier windows and use it again, so later it would count twice.
        """
        return resident_bytes()

    def encode(self, windows: Tensor) -> list[Tensor]:
        """Return the feature pyramid of any number of windows.

        Args:
            windows: float32 ``[n, 1, X, Y, Z]`` on any device, n at least 1, scaled to 0..1 by the grid.

        Returns:
            Per level, finest first, float32 ``[n, C_l, X / s_l, Y / s_l, Z / s_l]`` on the session's device; any memory
            order.

        Raises:
            ValueError: when the windows have another shape or type.
            RuntimeError: when the session is closed.
        """
        if not self._open:
            raise RuntimeError("the encoder session is closed")
        if windows.shape[0] == 0 or windows.shape[1:] != (1, *self.window) or windows.dtype != torch.float32:
            expected = ["n", 1, *self.window]
            raise ValueError(f"windows are {windows.dtype} {list(windows.shape)}, not torch.float32 {expected}")
        with torch.no_grad():
            batches = [self._encode_batch(batch) for batch in windows.split(self.max_batch)]
            return batches[0] if len(batches) == 1 else [torch.cat(level) for level in zip(*batches, strict=True)]

    @abstractmethod
    def _encode_batch(self, windows: Tensor) -> list[Tensor]:
        """Return the pyramid of at most ``max_batch`` windows."""

    def close(self) -> None:
        """Free the engine; the session cannot be used any more."""
        self._open = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()
