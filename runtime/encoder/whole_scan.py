"""Encode a whole scan in one pass, without windows, and yield its features section by section.

The features of a network whose normalisations are folded depend on the surroundings of a voxel alone. The grid streams
through such a network plane by plane, so that every voxel is computed once
(:mod:`fseft_edge.runtime.encoder.networks.rolling`). Some planes of each level wait for deeper stages. If memory is
scarce, they wait in temporary files, which does not change the features.

Backends without such a network compute large chunks of the grid (:mod:`fseft_edge.runtime.encoder.chunks`).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fseft_edge.runtime.encoder.backends.base import EncoderSession
from fseft_edge.runtime.encoder.chunks import chunk_bytes, encoded_in_chunks
from fseft_edge.runtime.encoder.encoding_plan import FIRST_USE, FRAME_FACTOR
from fseft_edge.runtime.encoder.networks.rolling import STEP, PlaneMemory
from fseft_edge.runtime.encoder.streaming import SECTION_SLICES, FeatureSection
from fseft_edge.runtime.encoder.window_encoder import out_of_memory
from fseft_edge.runtime.system.memory import Budget, Footprint, first_that_fits, is_out_of_memory

_log = logging.getLogger(__name__)

_FLOAT = 4

Shape = tuple[int, int, int]


@dataclass(frozen=True)
class WholeScanPlan:
    """Settings for encoding a whole scan, with the predicted memory.

    Attributes:
        on_disk: whether the planes that wait for deeper stages are in temporary files.
        section_slices: number of slices of a section.
        footprint: predicted peak memory.
    """

    on_disk: bool
    section_slices: int
    footprint: Footprint


def plan_whole_scan(shape: Shape, session: EncoderSession, budget: Budget, *, stored_bytes: int = 2) -> WholeScanPlan:
    """Return the fastest plan within a memory budget.

    Args:
        shape: shape of the grid.
        session: open session of an encoder that computes whole scans.
        budget: memory that may be used.
        stored_bytes: bytes of one stored feature value.

    Raises:
        OutOfMemoryError: the budget is too small; the message contains the smallest sufficient budget.
    """
    plans = list(whole_scan_plans(shape, session, stored_bytes=stored_bytes))
    return first_that_fits(plans, budget, session.device, "encoding this scan")


def whole_scan_plans(shape: Shape, session: EncoderSession, *, stored_bytes: int = 2) -> Iterator[WholeScanPlan]:
    """Yield all plans with their predicted memory, the fastest first (arguments as in :func:`plan_whole_scan`)."""
    on_gpu = session.device.type == "cuda"
    rolling = session.rolling
    memory = PlaneMemory(0, 0, chunk_bytes(session, shape)) if rolling is None else rolling.memory(shape)
    x, y, z = shape
    held = session.held_before + FIRST_USE
    lattice = max(level.stride for level in session.levels)
    image_planes = z if rolling is None else STEP
    for on_disk in (False,) if on_gpu or rolling is None else (False, True):
        for thickness in sorted({SECTION_SLICES, lattice}, reverse=True):
            section = [_FLOAT * level.channels * x * y * thickness // level.stride**3 for level in session.levels]
            # One level of the section in the stored format, in both memory orders, and its compressed data.
            handing_on = sum(section) + int((2 + FRAME_FACTOR) * stored_bytes * section[0] / _FLOAT)
            waiting = 0 if on_disk else memory.waiting
            image = _FLOAT * x * y * min(image_planes, z)
            if on_gpu:
                network = waiting + memory.kept + max(memory.computing, 2 * sum(section))
                vram = torch.cuda.memory_allocated(session.device) + network
                yield WholeScanPlan(on_disk, thickness, Footprint(held + image + handing_on, vram))
            else:
                ram = held + image + waiting + memory.kept + max(memory.computing, handing_on)
                yield WholeScanPlan(on_disk, thickness, Footprint(ram))


def stream_whole_scan(
    read_section: Callable[[int, int], NDArray[np.float32]],
    shape: Shape,
    session: EncoderSession,
    plan: WholeScanPlan,
) -> Iterator[FeatureSection]:
    """Encode a grid in one pass, and yield its features section by section.

    The sections are contiguous, in ascending order, and cover the grid. Every slice of the grid is read once, in order.
    If memory runs out, the pass begins again with the waiting planes in temporary files, and sections that were
    already handed on are not handed on again.

    Args:
        read_section: function that returns the grid's slices ``z0:z1`` for ``(z0, z1)``, float32 ``[X, Y, z1 - z0]``
            scaled to 0..1.
        shape: shape of the grid.
        session: open session of an encoder that computes whole scans.
        plan: plan of :func:`plan_whole_scan`.

    Raises:
        OutOfMemoryError: memory ran out, and the work cannot be reduced further.
        OutOfSpaceError: there is not enough free disk space for a temporary file.
    """
    done = 0
    places = (plan.on_disk,) if plan.on_disk or session.rolling is None else (False, True)
    for on_disk in places:
        sections = _sections(read_section, shape, session, on_disk=on_disk, thickness=plan.section_slices)
        try:
            for section in sections:
                if section.z0 >= done:
                    done = section.z1
                    yield section
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            if on_disk is places[-1]:
                raise out_of_memory() from error
        else:
            if on_disk and not plan.on_disk:
                _log.warning("Memory ran out while encoding. Encoding began again with temporary files.")
            return


def _sections(
    read_section: Callable[[int, int], NDArray[np.float32]],
    shape: Shape,
    session: EncoderSession,
    *,
    on_disk: bool,
    thickness: int,
) -> Iterator[FeatureSection]:
    def read(start: int, stop: int) -> Tensor:
        return torch.from_numpy(read_section(start, stop))

    with session.computing():
        if session.rolling is None:
            features = encoded_in_chunks(session, read, shape, section=thickness)
        else:
            features = session.rolling.features(read, shape, section=thickness, on_disk=on_disk)
        for (start, stop), levels in features:
            yield FeatureSection(start, stop, levels)
