"""Parity: how far the features of an exported graph are from PyTorch's."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from fseft_edge.runtime.backends.onnxruntime import GraphRunner, import_onnxruntime
from fseft_edge.runtime.bundle import ParityReport
from fseft_edge.runtime.grid import Grid
from fseft_edge.runtime.networks.base import FeatureNetwork
from fseft_edge.runtime.nifti import read_ct
from fseft_edge.runtime.preprocessing import Preprocessing

GATE = 1e-4

_WINDOWS_A_CT = 2
_NOISE_WINDOWS = 2
_NOISE_SEED = 0


def onnxruntime_parity(
    network: FeatureNetwork,
    graph: Path,
    *,
    window: tuple[int, int, int],
    preprocessing: Preprocessing,
    volumes: Sequence[Path],
) -> ParityReport:
    """Return how far ONNX Runtime on the CPU is from PyTorch's plain forward pass.

    Args:
        network: the reference, in evaluation mode.
        graph: its ONNX file.
        window: ``[X, Y, Z]``.
        preprocessing: how a CT becomes windows.
        volumes: CTs to compare on, two windows each; without any, windows of seeded noise are compared.

    Raises:
        MissingBackendError: when onnxruntime is not installed.
        InputError: when a CT cannot be read.
    """
    library = import_onnxruntime()
    runner = GraphRunner(graph, torch.device("cpu"), torch.get_num_threads())
    errors = [0.0] * len(network.levels)
    count = 0
    for windows in _ct_windows(volumes, preprocessing, window) if volumes else noise_windows(window):
        with torch.no_grad():
            expected = network(windows)
        errors = [max(pair) for pair in zip(errors, relative_errors(expected, runner(windows)), strict=True)]
        count += 1
    return ParityReport(
        backend="onnxruntime",
        version=library.__version__,
        source="ct" if volumes else "noise",
        windows=count,
        gate=GATE,
        relative_error=tuple(errors),
    )


def relative_errors(expected: Sequence[Tensor], features: Sequence[Tensor]) -> list[float]:
    """Return per level ``max|a - b| / max|a|``; infinite where a feature is not finite."""
    errors = []
    for a, b in zip(expected, features, strict=True):
        error = float((a - b).abs().max() / a.abs().max().clamp(min=torch.finfo(torch.float32).tiny))
        errors.append(error if np.isfinite(error) else float("inf"))
    return errors


def _ct_windows(
    volumes: Sequence[Path], preprocessing: Preprocessing, window: tuple[int, int, int]
) -> Iterator[Tensor]:
    """Yield windows ``[1, 1, X, Y, Z]`` at a third and two thirds of every scan's length, in its middle in plane."""
    for path in volumes:
        volume = read_ct(path)
        grid = Grid.of(volume, preprocessing)
        corner_x, corner_y = (max(0, (size - side) // 2) for size, side in zip(grid.shape[:2], window[:2], strict=True))
        for part in range(_WINDOWS_A_CT):
            centre = grid.shape[2] * (part + 1) // (_WINDOWS_A_CT + 1)
            start = min(max(0, centre - window[2] // 2), max(0, grid.shape[2] - window[2]))
            section = torch.from_numpy(grid.section(volume, start, min(start + window[2], grid.shape[2])))
            content = section[corner_x : corner_x + window[0], corner_y : corner_y + window[1]]
            missing = [side - size for side, size in zip(window, content.shape, strict=True)]
            yield F.pad(content, (0, missing[2], 0, missing[1], 0, missing[0]))[None, None]


def noise_windows(window: tuple[int, int, int]) -> Iterator[Tensor]:
    """Yield windows ``[1, 1, X, Y, Z]`` of noise on smooth shapes; half is exactly 0 and some is 1, as in a CT."""
    generator = torch.Generator().manual_seed(_NOISE_SEED)
    coarse_size = [max(2, side // 16) for side in window]
    for _ in range(_NOISE_WINDOWS):
        coarse = torch.randn(1, 1, *coarse_size, generator=generator)
        smooth = F.interpolate(coarse, size=window, mode="trilinear", align_corners=False)
        yield (smooth + 0.05 * torch.randn(1, 1, *window, generator=generator)).clamp(0.0, 1.0)
