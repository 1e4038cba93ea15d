"""Predict from shapes the memory that encoding a scan takes, and choose the plan that fits a budget.

The formulas below add the largest amounts: the memory of the process before encoding (measured), the blend over the
depth of one window, the network's tensors for one batch of windows
(:mod:`fseft_edge.runtime.encoder.networks.peak_memory`), and the section of the feature map that is being written.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from fseft_edge.runtime.encoder.backends.base import EncoderSession
from fseft_edge.runtime.encoder.blend import PLACES, Place
from fseft_edge.runtime.encoder.bundle import EncoderBundle
from fseft_edge.runtime.encoder.networks.peak_memory import activation_bytes
from fseft_edge.runtime.encoder.streaming import SECTION_SLICES
from fseft_edge.runtime.encoder.windows import WindowLayout
from fseft_edge.runtime.system.memory import Budget, Footprint, first_that_fits

_MIB = 1 << 20
_FLOAT = 4

# Code of PyTorch, oneDNN and Blosc2 that is loaded into memory at its first use. This value and the factors below are
# measured.
FIRST_USE = 40 * _MIB
# Bytes that an engine takes per byte of the network's tensors: ONNX Runtime's memory pool keeps parts of earlier
# windows, and OpenVINO keeps all memory that a compiled graph needs.
_ENGINE_FACTOR = {"torch": 1.0, "onnxruntime": 1.36, "openvino": 1.1}
_OTHER_ENGINES = 2.0
_KEPT_BY_ENGINE = {"onnxruntime": 0.6, "openvino": 1.1}
# Convolutions on a GPU need additional workspace. This factor is an estimate; it has not been measured.
_GPU_WORKSPACE_FACTOR = 1.25
# A section's frame is built in pieces that are then joined, so the compressed data exist twice.
FRAME_FACTOR = 1.5


@dataclass(frozen=True)
class EncodingPlan:
    """Settings for encoding a scan, with the predicted memory.

    Attributes:
        batch: number of windows that are encoded at a time.
        place: place of the blend's sums.
        section_slices: number of slices of a section.
        footprint: predicted peak memory.
    """

    batch: int
    place: Place
    section_slices: int
    footprint: Footprint


@dataclass(frozen=True)
class Encoding:
    """Quantities that determine the memory for encoding a scan; created by :func:`encoding_of`.

    Attributes:
        layout: positions of the windows.
        levels: stride and channels of each level, finest first.
        activations: bytes that the engine takes for one window, including its features.
        max_batch: number of windows that are encoded at a time if memory is sufficient.
        on_gpu: whether the engine computes on a GPU.
        stored: bytes of one stored feature value.
        held_ram: main memory of the process before encoding, in bytes.
        held_vram: GPU memory of the process before encoding, in bytes.
    """

    layout: WindowLayout
    levels: tuple[tuple[int, int], ...]
    activations: int
    max_batch: int
    on_gpu: bool
    stored: int
    held_ram: int
    held_vram: int

    def plans(self) -> Iterator[EncodingPlan]:
        """Yield all plans with their predicted memory, the fastest first."""
        batches = sorted({max(self.max_batch >> halved, 1) for halved in range(8)}, reverse=True)
        for place in PLACES if self.on_gpu else PLACES[1:]:
            for section_slices in (SECTION_SLICES, 1):
                for batch in batches:
                    yield EncodingPlan(batch, place, section_slices, self._footprint(batch, place, section_slices))

    def _footprint(self, batch: int, place: Place, section_slices: int) -> Footprint:
        x, y, _ = self.layout.padded_shape
        depth = self.layout.window[2]
        image = _FLOAT * x * y * depth
        windows = _FLOAT * batch * math.prod(self.layout.window)
        sums = self._features((x, y, depth))
        pyramid = self._features(self.layout.window)
        thickness = max(section_slices // self.layout.lattice, 1) * self.layout.lattice
        section = self._features((x, y, thickness))
        stored = int(FRAME_FACTOR * self.stored * self._features((x, y, thickness), finest_only=True) / _FLOAT)
        # The blend's weights for one level of a section.
        section += _FLOAT * x * y * thickness
        encoding, handing_on = windows + batch * self.activations, section + stored
        ram = self.held_ram + image
        if not self.on_gpu:
            beside = {"device": sums, "memory": sums, "disk": 0}[place]
            touched = pyramid if place == "disk" else 0
            return Footprint(ram + beside + max(encoding + touched, handing_on))
        if place == "device":
            return Footprint(
                ram + windows + max(pyramid, stored), self.held_vram + sums + max(encoding, section + section // 2)
            )
        beside, touched = (sums, 0) if place == "memory" else (0, pyramid)
        return Footprint(ram + beside + windows + max(pyramid + touched, handing_on), self.held_vram + encoding)

    def plans_on_demand(self) -> Iterator[EncodingPlan]:
        """Yield the plans for encoding single windows, the fastest first; their features are kept on the disk."""
        x, y, depth = self.layout.padded_shape[0], self.layout.padded_shape[1], self.layout.window[2]
        image = _FLOAT * x * y * depth
        pyramid = self._features(self.layout.window)
        thickness = max(SECTION_SLICES // self.layout.lattice, 1) * self.layout.lattice
        part = (*self.layout.window[:2], min(thickness, depth))
        # The sums of a part of a cell, its features and weights, and its frame.
        blending = 2 * self._features(part) + 2 * _FLOAT * math.prod(part)
        stored = int(FRAME_FACTOR * self.stored * self._features(part, finest_only=True) / _FLOAT)
        for halved in range(8):
            batch = max(self.max_batch >> halved, 1)
            windows = _FLOAT * batch * math.prod(self.layout.window)
            encoding = windows + batch * self.activations
            if self.on_gpu:
                ram, vram = windows + max(pyramid, stored), self.held_vram + max(encoding, blending)
            else:
                ram, vram = max(encoding + pyramid, pyramid + blending + stored), 0
            footprint = Footprint(self.held_ram + image + ram, vram)
            yield EncodingPlan(batch, "disk", SECTION_SLICES, footprint)
            if batch == 1:
                return

    def _features(self, shape: tuple[int, int, int], *, finest_only: bool = False) -> int:
        """Return the bytes of float32 features over a part of the grid."""
        levels = self.levels[:1] if finest_only else self.levels
        return _FLOAT * sum(channels * math.prod(shape) // stride**3 for stride, channels in levels)


def plan_encoding(
    layout: WindowLayout, bundle: EncoderBundle, session: EncoderSession, budget: Budget, *, stored_bytes: int = 2
) -> EncodingPlan:
    """Return the fastest plan within a memory budget.

    Args:
        layout: positions of the windows of the scan.
        bundle: encoder bundle.
        session: open session of the same encoder.
        budget: memory that may be used.
        stored_bytes: bytes of one stored feature value.

    Raises:
        OutOfMemoryError: the budget is too small; the message contains the smallest sufficient budget.
    """
    plans = list(encoding_of(layout, bundle, session, stored_bytes=stored_bytes).plans())
    return first_that_fits(plans, budget, session.device, "encoding this scan")


def plan_on_demand(
    layout: WindowLayout, bundle: EncoderBundle, session: EncoderSession, budget: Budget, *, stored_bytes: int = 2
) -> EncodingPlan:
    """Return the fastest plan for encoding single windows within a memory budget (arguments: :func:`plan_encoding`).

    Raises:
        OutOfMemoryError: the budget is too small; the message contains the smallest sufficient budget.
    """
    plans = list(encoding_of(layout, bundle, session, stored_bytes=stored_bytes).plans_on_demand())
    return first_that_fits(plans, budget, session.device, "encoding windows of this scan")


def encoding_of(
    layout: WindowLayout, bundle: EncoderBundle, session: EncoderSession, *, stored_bytes: int = 2
) -> Encoding:
    """Return the quantities that determine the memory for encoding a scan.

    The memory of the process before encoding is measured when this function is called.
    """
    on_gpu = session.device.type == "cuda"
    return Encoding(
        layout=layout,
        levels=tuple((level.stride, level.channels) for level in session.levels),
        activations=int(engine_factor(session) * _activations(bundle, session)),
        max_batch=session.max_batch,
        on_gpu=on_gpu,
        stored=stored_bytes,
        held_ram=session.held_before + FIRST_USE,
        held_vram=torch.cuda.memory_allocated(session.device) if on_gpu else 0,
    )


def engine_factor(session: EncoderSession) -> float:
    """Return the bytes that an engine takes per byte of the network's tensors."""
    on_gpu = session.device.type == "cuda"
    return _ENGINE_FACTOR.get(session.backend, _OTHER_ENGINES) * (_GPU_WORKSPACE_FACTOR if on_gpu else 1.0)


def kept_after_windows(bundle: EncoderBundle, session: EncoderSession) -> int:
    """Return the bytes that an open session keeps after it has encoded windows."""
    kept = 0 if session.device.type == "cuda" else _KEPT_BY_ENGINE.get(session.backend, 0.0)
    return int(kept * _activations(bundle, session))


def _activations(bundle: EncoderBundle, session: EncoderSession) -> int:
    slabwise = session.backend == "torch" and session.device.type != "cuda"
    manifest = bundle.manifest
    return activation_bytes(manifest.architecture, manifest.settings, bundle.window, slabwise=slabwise)
