"""Parity: how far the features of an exported graph are from PyTorch's."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from fseft_edge.runtime.encoder.backend_choice import has_bfloat16
from fseft_edge.runtime.encoder.backends.onnxruntime import GraphRunner, import_onnxruntime
from fseft_edge.runtime.encoder.backends.openvino import CompiledGraph
from fseft_edge.runtime.encoder.backends.pytorch import inference_network
from fseft_edge.runtime.encoder.bundle import ParityReport, Precision
from fseft_edge.runtime.encoder.networks.base import FeatureNetwork
from fseft_edge.runtime.encoder.networks.mixed_precision import MixedPrecision
from fseft_edge.runtime.scans.grid import Grid
from fseft_edge.runtime.scans.nifti import read_ct
from fseft_edge.runtime.scans.preprocessing import Preprocessing
from fseft_edge.runtime.system.libraries import import_library

GATES: dict[Precision, float] = {"float32": 1e-4, "mixed": 5e-3, "bfloat16": 3e-2}
"""The largest relative error that passes. Below float32 the masks have to agree too (:data:`LEAST_DSC`): an error that
a few features bear counts less than one that the head turns into voxels."""

_WINDOWS_A_CT = 2
_NOISE_WINDOWS = 2
_NOISE_SEED = 0

# An organ that a CT does not show draws a haze of probabilities near one half, whose mask any rounding moves. It counts
# where the reference mask has this many voxels and the head is sure of this share of them.
_SEEN = 500
_SURE_SHARE = 0.75
_SURE = math.log(0.9 / 0.1)

Classifier = Callable[[Sequence[Tensor]], Tensor]
"""Returns logits ``[n, K, X, Y, Z]`` of feature pyramids, ``[n, C_l, ...]`` a level."""

_CPU = torch.device("cpu")


@dataclass(frozen=True)
class Engine:
    """A way to compute an exported graph on this machine.

    Attributes:
        backend: its name.
        precision: what it computes in.
        version: of its library.
        load: returns what computes the pyramid of windows.
    """

    backend: str
    precision: Precision
    version: str
    load: Callable[[], Callable[[Tensor], Sequence[Tensor]]]


def cpu_engines(graph: Path, mixed_graph: Path | None) -> list[Engine]:
    """Return the engines that are installed here and run on a CPU, each with the precisions that this one computes in.

    Args:
        graph: ONNX file in float32.
        mixed_graph: the same in mixed precision; on a CPU it is slow, and says what its arithmetic costs in accuracy.
            ``None`` where there is none.
    """
    threads = torch.get_num_threads()
    found = []
    if find_spec("onnxruntime") is not None:
        release = str(import_onnxruntime().__version__)
        found.append(Engine("onnxruntime", "float32", release, lambda: GraphRunner(graph, _CPU, threads)))
        if mixed_graph is not None:
            found.append(Engine("onnxruntime", "mixed", release, lambda: GraphRunner(mixed_graph, _CPU, threads)))
    if find_spec("openvino") is not None:
        release = str(import_library("openvino").__version__).partition("-")[0]  # the rest names its build
        found.append(Engine("openvino", "float32", release, lambda: CompiledGraph(graph, threads, "float32")))
        if has_bfloat16(_CPU):
            found.append(Engine("openvino", "bfloat16", release, lambda: CompiledGraph(graph, threads, "bfloat16")))
    return found


def gpu_engines(network: FeatureNetwork) -> list[Engine]:
    """Return PyTorch in mixed precision where there is a GPU; it was never run so far, there was none."""
    if not torch.cuda.is_available():
        return []

    def load() -> Callable[[Tensor], list[Tensor]]:
        mixed = MixedPrecision(inference_network(network)).cuda()
        return lambda windows: list(mixed(windows.cuda()))

    return [Engine("torch", "mixed", torch.__version__, load)]


def parity_reports(
    network: FeatureNetwork,
    engines: Sequence[Engine],
    *,
    classify: Classifier,
    window: tuple[int, int, int],
    preprocessing: Preprocessing,
    volumes: Sequence[Path],
) -> list[ParityReport]:
    """Return how far engines are from PyTorch's plain forward pass on the CPU.

    Args:
        network: the reference, in evaluation mode.
        engines: what computes an exported graph of it.
        classify: whose masks are compared.
        window: ``[X, Y, Z]``.
        preprocessing: how a CT becomes windows.
        volumes: CTs to compare on, two windows each; without any, windows of seeded noise are compared, of which masks
            say nothing.

    Raises:
        InputError: when a CT cannot be read.
    """
    comparisons = [_Comparison(engine, engine.load(), classify, len(network.levels)) for engine in engines]
    if not comparisons:
        return []
    for windows in _ct_windows(volumes, preprocessing, window) if volumes else noise_windows(window):
        with torch.no_grad():
            expected = network(windows)
        for comparison in comparisons:
            comparison.add(windows, expected)
    return [comparison.report("ct" if volumes else "noise") for comparison in comparisons]


class _Comparison:
    """One engine against the reference, window by window."""

    def __init__(
        self, engine: Engine, run: Callable[[Tensor], Sequence[Tensor]], classify: Classifier, levels: int
    ) -> None:
        self._engine, self._run, self._classify = engine, run, classify
        self._windows = 0
        self._errors = [0.0] * levels
        # One count an organ from the first windows on, which say how many organs there are.
        self._mine, self._reference, self._both, self._sure = torch.zeros(4, 1, dtype=torch.int64)

    def add(self, windows: Tensor, expected: Sequence[Tensor]) -> None:
        with torch.no_grad():
            features = [level.cpu() for level in self._run(windows)]
            logits, mine = self._classify(expected), self._classify(features) > 0
        self._windows += 1
        self._errors = [max(pair) for pair in zip(self._errors, relative_errors(expected, features), strict=True)]
        reference = logits > 0
        self._mine = self._mine + _voxels(mine)
        self._reference = self._reference + _voxels(reference)
        self._both = self._both + _voxels(mine & reference)
        self._sure = self._sure + _voxels(logits > _SURE)

    def report(self, source: Literal["ct", "noise"]) -> ParityReport:
        seen = (self._reference >= _SEEN) & (self._sure >= _SURE_SHARE * self._reference)
        dsc = 2 * self._both[seen] / (self._mine[seen] + self._reference[seen])
        return ParityReport(
            backend=self._engine.backend,
            precision=self._engine.precision,
            version=self._engine.version,
            source=source,
            windows=self._windows,
            gate=GATES[self._engine.precision],
            relative_error=tuple(self._errors),
            mask_dsc=float(dsc.min()) if source == "ct" and len(dsc) else None,
        )


def head_of(weight: Tensor, bias: Tensor) -> Classifier:
    """Return an encoder's own classifier.

    Args:
        weight: ``[K, C_0]``.
        bias: ``[K]``.
    """
    return lambda levels: torch.einsum("kc,ncxyz->nkxyz", weight, levels[0]) + bias[:, None, None, None]


def _voxels(masks: Tensor) -> Tensor:
    """Return how many voxels masks ``[n, K, X, Y, Z]`` have of each organ, ``[K]``."""
    return masks.sum((0, 2, 3, 4))


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
