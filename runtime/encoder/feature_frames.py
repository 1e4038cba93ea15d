"""Frames: features of a box, in their stored number format, compressed by Blosc2.

Codec and block shape are chosen from measurements on float16 ReLU features ``[16, 168, 160, 96]`` of an abdominal CT,
on one core. Reading a random box of 36x36x36 voxels takes 1.7 ms with LZ4 and byte shuffle, and 4.2 ms with Zstandard;
the compression ratios are 1.6 and 2.3. A block contains all channels of a small cube, because all readers need all
channels: blocks of one channel are two to three times slower. The chunk size has no measurable effect.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import blosc2  # type: ignore[import-untyped]  # ships no types
import numpy as np
import torch
from numpy.typing import NDArray

from fseft_edge.runtime.errors import EncoderBundleError

StorageType = Literal["float16", "float32"]

_CHUNK_SIDE = 32
# Blosc2 decompresses whole blocks. A block of 64 KiB fits into a core's level-2 cache, and small boxes stay fast.
_BLOCK_SIDES = (8, 4, 2)
_BLOCK_BYTES = 64 << 10


def compressed(features: NDArray[np.floating[Any]], threads: int) -> bytes:
    """Return the frame of features ``[C, X, Y, Z]``."""
    channels, *size = features.shape
    bytes_per_voxel = channels * features.itemsize
    side = next((side for side in _BLOCK_SIDES if bytes_per_voxel * side**3 <= _BLOCK_BYTES), _BLOCK_SIDES[-1])
    frame: bytes = blosc2.asarray(
        features,
        chunks=(channels, *(min(_CHUNK_SIDE, voxels) for voxels in size)),
        blocks=(channels, *(min(side, voxels) for voxels in size)),
        cparams=blosc2.CParams(codec=blosc2.Codec.LZ4, clevel=5, filters=[blosc2.Filter.SHUFFLE], nthreads=threads),
        dparams=blosc2.DParams(nthreads=threads),
    ).to_cframe()
    return frame


def opened(frame: memoryview, threads: int) -> blosc2.NDArray:
    """Return the array of a frame, which is decompressed part by part when it is read.

    Raises:
        RuntimeError: the bytes are not a frame.
    """
    array = blosc2.ndarray_from_cframe(frame)
    array.schunk.dparams = blosc2.DParams(nthreads=threads)
    return array


def stored(features: torch.Tensor, dtype: StorageType) -> NDArray[np.floating[Any]]:
    """Return features in the stored number format, in main memory.

    Raises:
        EncoderBundleError: a feature is not finite, or is beyond the range of ``dtype``.
    """
    precision = {"float16": torch.float16, "float32": torch.float32}[dtype]
    in_memory_order = sorted(range(features.ndim), key=features.stride, reverse=True)  # four times as fast
    lowest, highest = (bound.item() for bound in torch.aminmax(features.permute(in_memory_order)))
    if not (math.isfinite(lowest) and math.isfinite(highest)):
        raise EncoderBundleError(
            "The encoder returned features that are infinite or NaN.",
            remedy="Use --backend torch. If the error remains, the checkpoint is damaged: export the encoder again "
            "from a new copy of the checkpoint.",
        )
    if max(-lowest, highest) > torch.finfo(precision).max:
        raise EncoderBundleError(
            f"The largest feature of the encoder is {max(-lowest, highest):.3g}, beyond the range of {dtype}.",
            remedy="Store the features as float32.",
        )
    return features.to(precision).cpu().contiguous().numpy()
