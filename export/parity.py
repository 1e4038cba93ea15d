"""Parity reports: differences between the features of an exported graph and the features of PyTorch."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
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
from fseft_edge.runtime.encoder.networks.residual_unet import ResidualUNet
from fseft_edge.runtime.encoder.networks.rolling import RollingResidualUNet
from fseft_edge.runtime.scans.grid import Grid
from fseft_edge.runtime.scans.nifti import read_ct
from fseft_edge.runtime.scans.preprocessing import Preprocessing
from fseft_edge.runtime.system.libraries import import_library
from fseft_edge.runtime.system.threads import limit_threads

GATES: dict[Precision, float] = {"float32": 1e-4, "mixed": 5e-3, "bfloat16": 3e-2}
"""Largest relative error that passes, for each precision. Below float32, the masks must also agree
(:data:`LEAST_DSC`), because errors in masks matter more than errors of a few features."""

_WINDOWS_PER_CT = 2
_NOISE_SEED = 0

# For an organ outside the CT, the head may return many probabilities near 0.5, and rounding changes such a mask. An
# organ is only compared if its reference mask has at least this many voxels, and if at least this fraction of the
# voxels has a logit above this limit (a probability above 0.9).
_LEAST_VOXELS = 500
_LEAST_CONFIDENT_FRACTION = 0.75
_CONFIDENT_LOGIT = math.log(0.9 / 0.1)

Classifier = Callable[[Sequence[Tensor]], Tensor]
"""Function that returns logits ``[n, K, X, Y, Z]`` from a feature pyramid with levels ``[n, C_l, ...]``."""

_CPU = torch.device("cpu")


@dataclass(frozen=True)
class Engine:
    """A way to compute an exported graph on this machine.

    Attributes:
        backend: name of the backend.
        precision: precision of the computation.
        version: version of the backend's library.
        load: function that loads the graph and returns a function from windows to their feature pyramid.
    """

    backend: str
    precision: Precision
    version: str
    load: Callable[[], Callable[[Tensor], Sequence[Tensor]]]


def cpu_engines(graph: Path, mixed_graph: Path | None) -> list[Engine]:
    """Return the installed engines that run on a CPU, once for each precision that this CPU supports.

    Args:
        graph: ONNX file in float32.
        mixed_graph: ONNX file in mixed precision, or ``None`` if there is no such file. This graph is slow on a CPU; it
            is compared to measure the accuracy of its arithmetic.
    """
    limit_threads()
    threads = torch.get_num_threads()
    found = []
    if find_spec("onnxruntime") is not None:
        release = str(import_onnxruntime().__version__)
        found.append(Engine("onnxruntime", "float32", release, lambda: GraphRunner(graph, _CPU, threads)))
        if mixed_graph is not None:
            found.append(Engine("onnxruntime", "mixed", release, lambda: GraphRunner(mixed_graph, _CPU, threads)))
    if find_spec("openvino") is not None:
        release = str(import_library("openvino").__version__).partition("-")[0]  # without the build number
        found.append(Engine("openvino", "float32", release, lambda: CompiledGraph(graph, threads, "float32")))
        if has_bfloat16(_CPU):
            found.append(Engine("openvino", "bfloat16", release, lambda: CompiledGraph(graph, threads, "bfloat16")))
    return found


def torch_engines(network: FeatureNetwork, *, whole_scan: bool) -> list[Engine]:
    """Return PyTorch in each lower precision that this machine supports: in bfloat16 on a CPU, mixed on a GPU.

    Only networks that compute whole scans have bfloat16. The code for a GPU has not been run yet.

    Args:
        network: network in evaluation mode.
        whole_scan: whether the encoder computes whole scans in one pass.
    """
    folded = inference_network(network, whole_scan=whole_scan)
    plane_by_plane = folded if whole_scan and isinstance(folded, ResidualUNet) else None

    def on_gpu() -> Callable[[Tensor], list[Tensor]]:
        mixed = MixedPrecision(folded) if plane_by_plane is None else RollingResidualUNet(plane_by_plane, torch.float16)
        mixed.cuda()
        return lambda windows: list(mixed(windows.cuda()))

    found = []
    if plane_by_plane is not None and has_bfloat16(_CPU):
        rolling = RollingResidualUNet(plane_by_plane, torch.bfloat16)
        found.append(Engine("torch", "bfloat16", torch.__version__, lambda: rolling))
    if torch.cuda.is_available():
        found.append(Engine("torch", "mixed", torch.__version__, on_gpu))
    return found


def parity_reports(
    network: FeatureNetwork,
    engines: Sequence[Engine],
    *,
    classify: Classifier,
    window: tuple[int, int, int],
    preprocessing: Preprocessing,
    volumes: Sequence[Path],
    whole_scan: bool = False,
    on_failure: Callable[[Engine, Exception], None] | None = None,
) -> list[ParityReport]:
    """Return one report per engine on the difference from PyTorch's plain forward pass on the CPU.

    Args:
        network: reference network, in evaluation mode.
        engines: engines that compute an exported graph of the network.
        classify: classifier whose masks are compared.
        window: size of the window, ``[X, Y, Z]`` in voxels.
        preprocessing: conversion of a CT into windows.
        volumes: CTs used for the comparison, two windows each. Without CTs, a window of seeded noise is used; on
            noise, masks are not compared.
        whole_scan: whether the engines compute windows of any size. They are then also compared on a larger window of
            noise with sides of different, odd lengths.
        on_failure: is called with an engine that fails on this machine, which then has no report. None raises the
            engine's error instead.

    Raises:
        InputError: a CT cannot be read.
    """

    def works(engine: Engine, attempt: Callable[[], object]) -> bool:
        try:
            attempt()
        except Exception as error:  # libraries of engines raise errors of any class
            if on_failure is None:
                raise
            on_failure(engine, error)
            return False
        return True

    comparisons = [_Comparison(engine, classify, len(network.levels)) for engine in engines]
    comparisons = [one for one in comparisons if works(one.engine, one.load)]

    if whole_scan:
        network = inference_network(network, whole_scan=True)

    def compare(windows: Tensor, *, masks: bool) -> None:
        if not comparisons:
            return
        with torch.no_grad():
            expected = network(windows)
            logits = classify(expected) if masks else None
        comparisons[:] = [one for one in comparisons if works(one.engine, partial(one.add, windows, expected, logits))]

    for windows in _ct_windows(volumes, preprocessing, window) if volumes else [noise_window(window)]:
        compare(windows, masks=bool(volumes))
    if whole_scan:
        compare(noise_window(_odd_size(window)), masks=False)
    return [comparison.report("ct" if volumes else "noise") for comparison in comparisons]


def _odd_size(window: tuple[int, int, int]) -> tuple[int, int, int]:
    """Return a size that is larger than the window, and no multiple of the strides."""
    x, y, z = window
    return x + 5, y + 1, z + 11


class _Comparison:
    """Comparison of one engine with the reference, window by window."""

    def __init__(self, engine: Engine, classify: Classifier, levels: int) -> None:
        self.engine, self._classify = engine, classify
        self._run: Callable[[Tensor], Sequence[Tensor]] | None = None
        self._windows = 0
        self._errors = [0.0] * levels
        # Voxel counts. The first addition broadcasts them to one count per organ.
        self._engine_voxels, self._reference_voxels, self._common_voxels, self._confident_voxels = torch.zeros(
            4, 1, dtype=torch.int64
        )

    def load(self) -> None:
        """Load the graph into the engine."""
        self._run = self.engine.load()

    def add(self, windows: Tensor, expected: Sequence[Tensor], logits: Tensor | None) -> None:
        """Compare the features of windows and, with the logits of the reference, the masks."""
        assert self._run is not None  # noqa: S101 - load() comes first
        with torch.no_grad():
            features = [level.cpu() for level in self._run(windows)]
            self._errors = [max(pair) for pair in zip(self._errors, relative_errors(expected, features), strict=True)]
            self._windows += 1
            if logits is None:
                return
            mask, reference = self._classify(features) > 0, logits > 0
        self._engine_voxels = self._engine_voxels + _voxels(mask)
        self._reference_voxels = self._reference_voxels + _voxels(reference)
        self._common_voxels = self._common_voxels + _voxels(mask & reference)
        self._confident_voxels = self._confident_voxels + _voxels(logits > _CONFIDENT_LOGIT)

    def report(self, source: Literal["ct", "noise"]) -> ParityReport:
        compared = (self._reference_voxels >= _LEAST_VOXELS) & (
            self._confident_voxels >= _LEAST_CONFIDENT_FRACTION * self._reference_voxels
        )
        dsc = 2 * self._common_voxels[compared] / (self._engine_voxels[compared] + self._reference_voxels[compared])
        return ParityReport(
            backend=self.engine.backend,
            precision=self.engine.precision,
            version=self.engine.version,
            source=source,
            windows=self._windows,
            gate=GATES[self.engine.precision],
            relative_error=tuple(self._errors),
            mask_dsc=float(dsc.min()) if source == "ct" and len(dsc) else None,
        )


def head_of(weight: Tensor, bias: Tensor) -> Classifier:
    """Return the classifier of an encoder's head.

    Args:
        weight: weights of the head, ``[K, C_0]``.
        bias: biases of the head, ``[K]``.
    """
    return lambda levels: torch.einsum("kc,ncxyz->nkxyz", weight, levels[0]) + bias[:, None, None, None]


def _voxels(masks: Tensor) -> Tensor:
    """Return the number of voxels of each organ, ``[K]``, in masks ``[n, K, X, Y, Z]``."""
    return masks.sum((0, 2, 3, 4))


def relative_errors(expected: Sequence[Tensor], features: Sequence[Tensor]) -> list[float]:
    """Return ``max|a - b| / max|a|`` for each level; infinity for a level with a feature that is not finite."""
    errors = []
    for a, b in zip(expected, features, strict=True):
        error = float((a - b).abs().max() / a.abs().max().clamp(min=torch.finfo(torch.float32).tiny))
        errors.append(error if np.isfinite(error) else float("inf"))
    return errors


def _ct_windows(
    volumes: Sequence[Path], preprocessing: Preprocessing, window: tuple[int, int, int]
) -> Iterator[Tensor]:
    """Yield windows ``[1, 1, X, Y, Z]`` at one third and two thirds of each scan's length, centred in plane."""
    for path in volumes:
        volume = read_ct(path)
        grid = Grid.of(volume, preprocessing)
        corner_x, corner_y = (max(0, (size - side) // 2) for size, side in zip(grid.shape[:2], window[:2], strict=True))
        for part in range(_WINDOWS_PER_CT):
            centre = grid.shape[2] * (part + 1) // (_WINDOWS_PER_CT + 1)
            start = min(max(0, centre - window[2] // 2), max(0, grid.shape[2] - window[2]))
            section = torch.from_numpy(grid.section(volume, start, min(start + window[2], grid.shape[2])))
            content = section[corner_x : corner_x + window[0], corner_y : corner_y + window[1]]
            missing = [side - size for side, size in zip(window, content.shape, strict=True)]
            yield F.pad(content, (0, missing[2], 0, missing[1], 0, missing[0]))[None, None]


def noise_window(window: tuple[int, int, int]) -> Tensor:
    """Return a window ``[1, 1, X, Y, Z]`` of noise on smooth shapes; as in a CT, half of the voxels are 0, some are 1.

    One window is enough: with another seed, no engine's largest error on the compact encoder changed by a third, and
    the gates are far from all of them.
    """
    generator = torch.Generator().manual_seed(_NOISE_SEED)
    coarse = torch.randn(1, 1, *(max(2, side // 16) for side in window), generator=generator)
    smooth = F.interpolate(coarse, size=window, mode="trilinear", align_corners=False)
    return (smooth + 0.05 * torch.randn(1, 1, *window, generator=generator)).clamp(0.0, 1.0)
