"""How much memory encoding a scan will take, predicted from shapes, and the plan that fits a budget.

The largest things are, each in its formula below: what the process holds before it starts (measured then), the blend
over one window's depth, what the network's tensors take for one batch of windows
(:mod:`fseft_edge.runtime.encoder.networks.activations`), and one section of the map on its way to disk.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from fseft_edge.runtime.encoder.backends.base import EncoderSession
from fseft_edge.runtime.encoder.blend import PLACES, Place
from fseft_edge.runtime.encoder.bundle import EncoderBundle
from fseft_edge.runtime.encoder.networks.activations import activation_bytes
from fseft_edge.runtime.encoder.streaming import SECTION_SLICES
from fseft_edge.runtime.encoder.windows import WindowLayout
from fseft_edge.runtime.system.memory import Budget, Footprint, first_that_fits

_MIB = 1 << 20
_FLOAT = 4

# Code of PyTorch, oneDNN and Blosc2 that becomes resident when it is first used. Measured, as are the factors below.
_FIRST_USE = 40 * _MIB
# What an engine takes for every byte of the network's tensors: ONNX Runtime's arena keeps pieces of former windows,
# OpenVINO all that a compiled graph needs.
_ENGINE_FACTOR = {"torch": 1.0, "onnxruntime": 1.36, "openvino": 1.1}
_OTHER_ENGINES = 2.0
_KEPT_BY_ENGINE = {"onnxruntime": 0.6, "openvino": 1.1}
# On a GPU convolutions want room to work in besides. Never measured: no GPU was at hand.
_ON_A_GPU = 1.25
# A section's frame is built in pieces and then joined: two times what LZ4 leaves of float16, at least.
_FRAME_FACTOR = 1.5


@dataclass(frozen=True)
class EncodingPlan:
    """How a scan is encoded.

    Attributes:
        batch: windows at a time.
        place: where the blend's sums lie.
        section_slices: slices handed on at a time.
        footprint: the most that encoding is predicted to take.
    """

    batch: int
    place: Place
    section_slices: int
    footprint: Footprint


@dataclass(frozen=True)
class Encoding:
    """What an encoding's memory depends on; made by :func:`encoding_of`.

    Attributes:
        layout: where the windows lie.
        levels: stride and channels of each level, finest first.
        activations: bytes that one window takes in the engine, its features included.
        max_batch: windows at a time where memory does not matter.
        on_gpu: whether the engine computes on a GPU.
        stored: bytes of a stored feature.
        held_ram: what the process holds before.
        held_vram: what it holds of the GPU before.
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
        """Yield every way to encode, the fastest first, each with what it takes."""
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
        stored = int(_FRAME_FACTOR * self.stored * self._features((x, y, thickness), finest_only=True) / _FLOAT)
        # The weights of a level's section, and what of the sums in a file is resident at a time: those under a window.
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

    def _features(self, shape: tuple[int, int, int], *, finest_only: bool = False) -> int:
        """Return the bytes of float32 features over a part of the grid."""
        levels = self.levels[:1] if finest_only else self.levels
        return _FLOAT * sum(channels * math.prod(shape) // stride**3 for stride, channels in levels)


def plan_encoding(
    layout: WindowLayout, bundle: EncoderBundle, session: EncoderSession, budget: Budget, *, stored_bytes: int = 2
) -> EncodingPlan:
    """Return the fastest plan within a budget.

    Args:
        layout: where the windows of the scan lie.
        bundle: the encoder.
        session: the same encoder, opened.
        budget: what may be taken.
        stored_bytes: bytes of a stored feature.

    Raises:
        OutOfMemoryError: the budget is too small; the message says the smallest that works.
    """
    plans = list(encoding_of(layout, bundle, session, stored_bytes=stored_bytes).plans())
    return first_that_fits(plans, budget, session.device, "encoding this scan")


def encoding_of(
    layout: WindowLayout, bundle: EncoderBundle, session: EncoderSession, *, stored_bytes: int = 2
) -> Encoding:
    """Return what the encoding of a scan will depend on, with what the process holds now."""
    on_gpu = session.device.type == "cuda"
    factor = _ENGINE_FACTOR.get(session.backend, _OTHER_ENGINES) * (_ON_A_GPU if on_gpu else 1.0)
    return Encoding(
        layout=layout,
        levels=tuple((level.stride, level.channels) for level in session.levels),
        activations=int(factor * _activations(bundle, session)),
        max_batch=session.max_batch,
        on_gpu=on_gpu,
        stored=stored_bytes,
        held_ram=session.held_before + _FIRST_USE,
        held_vram=torch.cuda.memory_allocated(session.device) if on_gpu else 0,
    )


def held_after_encoding(bundle: EncoderBundle, session: EncoderSession) -> int:
    """Return what the process is predicted to hold once it has encoded a scan, the session still open."""
    kept = 0 if session.device.type == "cuda" else _KEPT_BY_ENGINE.get(session.backend, 0.0)
    return session.held_before + _FIRST_USE + int(kept * _activations(bundle, session))


def _activations(bundle: EncoderBundle, session: EncoderSession) -> int:
    slabwise = session.backend == "torch" and session.device.type != "cuda"
    manifest = bundle.manifest
    return activation_bytes(manifest.architecture, manifest.settings, bundle.window, slabwise=slabwise)
