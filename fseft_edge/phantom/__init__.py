"""Procedural CTs of the trunk with exact ground truth: for tests, demonstrations and pre-training without patients.

A phantom is plausible, not real. Figures measured on phantoms show that the machinery works and how settings compare;
they never stand in for accuracy on patients.

The anatomy depends on the seed alone: it is a set of analytic shapes in the patient's own frame, evaluated in world
coordinates at every voxel centre. Another lattice, spacing or orientation samples the same anatomy; another
:class:`Site` scans the same anatomy. Only the noise belongs to one lattice.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fseft_edge.phantom.appearance import SITES, ContrastPhase, Site, reconstruct
from fseft_edge.phantom.canvas import Canvas
from fseft_edge.phantom.organs import paint_abdomen
from fseft_edge.phantom.patient import Patient
from fseft_edge.phantom.wall import paint_body, paint_chest, paint_pelvis, paint_ribs, paint_spine, trunk_of
from fseft_edge.runtime.scans.volume import LabelMap, Volume

__all__ = ["ORGANS", "SITES", "ContrastPhase", "Phantom", "Site", "phantom"]

ORGANS: tuple[str, ...] = (
    "liver",
    "spleen",
    "right_kidney",
    "left_kidney",
    "aorta",
    "stomach",
    "gallbladder",
    "pancreas",
    "right_lung",
    "left_lung",
    "spine",
    "ribs",
)
"""Organ k of this tuple has label k + 1. Right and left are the patient's; the gallbladder may be missing."""


@dataclass(frozen=True, eq=False)
class Phantom:
    """A synthetic CT and what is in it.

    Attributes:
        volume: the CT, int16 HU `[X, Y, Z]`.
        labels: ground truth at the voxel centres of the same lattice, uint8; values are places in `ORGANS` plus one.
    """

    volume: Volume
    labels: LabelMap


def phantom(
    seed: int,
    *,
    shape: tuple[int, int, int] = (128, 96, 112),
    spacing: tuple[float, float, float] = (3.0, 3.0, 3.0),
    site: Site = SITES["reference"],
    affine: NDArray[np.float64] | None = None,
) -> Phantom:
    """A patient's CT with its ground truth.

    An average trunk is 350 mm wide and 260 mm deep; it goes on above and below any field of view, and its origin, level
    with the first lumbar vertebra, lies within 12 mm of the world's.

    Structures are painted in this order, the later over the earlier: body and muscle wall, pelvis and psoas, lungs and
    heart, bowel, liver, stomach, spleen, gallbladder, kidneys, pancreas, great vessels, spine, ribs.

    Args:
        seed: the patient, from 0.
        shape: voxels along the lattice's axes.
        spacing: mm per voxel along them; ignored when `affine` is given.
        site: the scanner and its protocol.
        affine: voxel to world, 4x4, RAS+ mm, any orientation; without it the lattice lies along the world's axes with
            the trunk's origin in the middle.
    """
    if affine is None:
        affine = np.diag([*spacing, 1.0])
        affine[:3, 3] = -0.5 * (np.array(shape) - 1) * spacing
    affine = np.asarray(affine, dtype=np.float64)
    label = {organ: index for index, organ in enumerate(ORGANS, start=1)}
    patient = Patient.of(seed)
    tissue = site.tissue_hu(patient.enhancement)
    canvas = Canvas(shape, affine, patient)
    trunk = trunk_of(canvas)
    paint_body(canvas, trunk, tissue)
    paint_pelvis(canvas, trunk, tissue)
    paint_chest(canvas, trunk, tissue, right=label["right_lung"], left=label["left_lung"])
    paint_abdomen(canvas, trunk, tissue, label)
    paint_spine(canvas, trunk, tissue, label=label["spine"])
    paint_ribs(canvas, trunk, tissue, label=label["ribs"])
    array = reconstruct(canvas.hu, canvas.spacing, site, patient.rng("noise"))
    return Phantom(Volume(array, affine), LabelMap(canvas.labels, affine))
