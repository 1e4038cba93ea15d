"""Compute the features of a whole grid in chunks along z, with an engine that does not stream plane by plane.

Each chunk is computed together with the surrounding planes on which its features depend. The features of a chunk
therefore equal those of the whole grid, except for rounding. The chunks follow from the shape of the grid alone, so
that a memory budget has no effect on the features.

Surrounding planes are computed in addition: up to two contexts for each chunk. Most scans of one region of the body are
a single chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from fseft_edge.runtime.encoder.backends.base import EncoderSession
from fseft_edge.runtime.encoder.encoding_plan import engine_factor
from fseft_edge.runtime.encoder.networks.base import WholeScan
from fseft_edge.runtime.encoder.networks.peak_memory import activation_bytes

CORE = 192
"""Largest number of planes of a chunk, without the surrounding planes."""

# Measured for a head and neck in one chunk; the factors of a window are smaller. ONNX Runtime copies upsampled features
# to cut them. OpenVINO keeps the memory of all tensors, and copies the features.
_ENGINE_FACTOR = {"onnxruntime": 1.65, "openvino": 1.55}
# Part of this memory that an open session keeps, measured.
_KEPT_BY_ENGINE = {"openvino": 0.75}

Range = tuple[int, int]


def encoded_in_chunks(
    session: EncoderSession,
    read: Callable[[int, int], Tensor],
    shape: tuple[int, int, int],
    *,
    section: int,
) -> Iterator[tuple[Range, list[Tensor]]]:
    """Compute the features of a grid.

    The planes are read and the features are yielded as by
    :meth:`fseft_edge.runtime.encoder.networks.rolling.RollingResidualUNet.features`.

    Args:
        session: open session of an encoder that computes whole scans.
        read: function that returns the planes ``z0:z1`` of the grid, ``[X, Y, z1 - z0]``, for ``(z0, z1)``. It is
            called once for each plane, in order.
        shape: shape of the grid.
        section: number of planes of a result, a multiple of the stride of the coarsest level.

    Yields:
        A range of planes, and their final features, float32 ``[C_l, X / s, Y / s, n / s]`` for each level, finest
        first, with sizes rounded up.
    """
    assert session.whole_scan is not None  # noqa: S101 - narrows the type for the checker
    planes, first, arrived = torch.empty(*shape[:2], 0), 0, 0
    for core, around in chunks_of(shape[2], session.whole_scan):
        planes = torch.cat([planes[..., around[0] - first :], read(arrived, around[1])], -1)
        first, arrived = around[0], around[1]
        pyramid = session.encode(planes[None, None])
        for start in range(*core, section):
            stop = min(start + section, core[1])
            yield (
                (start, stop),
                [
                    features[0, ..., (start - first) // level.stride : -(-(stop - first) // level.stride)].contiguous()
                    for level, features in zip(session.levels, pyramid, strict=True)
                ],
            )
        del pyramid  # before the next chunk is computed


def chunks_of(planes: int, whole_scan: WholeScan) -> list[tuple[Range, Range]]:
    """Return the ranges of planes of each chunk: those of the chunk, and those of the chunk with its surroundings.

    The chunks have nearly the same length. They begin at multiples of ``whole_scan.multiple``.

    Args:
        planes: number of planes of the grid.
        whole_scan: how the encoder computes a whole scan.
    """
    multiple, context = whole_scan.multiple, whole_scan.context
    largest = max(CORE // multiple, 1)
    multiples = -(-planes // multiple)
    core = multiple * -(-multiples // -(-multiples // largest))
    cores = [(start, min(start + core, planes)) for start in range(0, planes, core)]
    return [((start, stop), (max(start - context, 0), min(stop + context, planes))) for start, stop in cores]


def chunk_bytes(session: EncoderSession, shape: tuple[int, int, int]) -> int:
    """Return the predicted bytes that an engine takes for the largest chunk of a grid, including its features.

    Args:
        session: open session of an encoder that computes whole scans.
        shape: shape of the grid.
    """
    assert session.whole_scan is not None  # noqa: S101 - narrows the type for the checker
    longest = max(stop - start for _, (start, stop) in chunks_of(shape[2], session.whole_scan))
    widths = [level.channels for level in session.levels]
    # The width of the deepest stage is not known here; with so few voxels, it has no effect.
    settings = {"channels": [*widths, widths[-1]]}
    chunk = (shape[0], shape[1], longest)
    factor = _ENGINE_FACTOR.get(session.backend, engine_factor(session))
    return int(factor * activation_bytes("residual_unet", settings, chunk, slabwise=False))


def kept_after_chunks(session: EncoderSession, shape: tuple[int, int, int]) -> int:
    """Return the bytes that an open session keeps after it has encoded a grid (arguments: :func:`chunk_bytes`)."""
    kept = 0 if session.device.type == "cuda" else _KEPT_BY_ENGINE.get(session.backend, 0.0)
    return int(kept * chunk_bytes(session, shape)) if kept else 0
