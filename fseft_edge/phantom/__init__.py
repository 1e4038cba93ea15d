"""Procedural CTs of the trunk with exact ground truth: for tests, demonstrations and pre-training without patients.

Phantoms are plausible, but not real. Results on phantoms show that the software works and how settings compare. They
are not a measure of the accuracy on patients.

The anatomy depends only on the seed. It consists of analytic shapes in the coordinate system of the patient's trunk,
which are evaluated at every voxel centre in world coordinates. The anatomy is therefore independent of lattice, voxel
spacing, orientation and :class:`Site`. Only the noise depends on the lattice.
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
"""The organs; the organ at index k has the label value k + 1. Right and left are the patient's.

The gallbladder is missing in some patients.
"""


@dataclass(frozen=True, eq=False)
class Phantom:
    """A synthetic CT with its ground truth.

    Attributes:
        volume: the CT, int16 HU `[X, Y, Z]`.
        labels: ground truth at the voxel centres of the CT, uint8 `[X, Y, Z]`; a label value is an index in `ORGANS`
            plus one, 0 is background.
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
    """Return the CT of a synthetic patient with its ground truth.

    An average trunk is 350 mm wide and 260 mm deep, and extends above and below any field of view. The origin of the
    trunk is at the level of the first lumbar vertebra, within 12 mm of the origin of the world coordinates.

    Structures are painted in this order, and a later structure covers an earlier structure: body and muscle wall,
    pelvis and psoas, lungs and heart, bowel, liver, stomach, spleen, gallbladder, kidneys, pancreas, great vessels,
    spine, ribs.

    Args:
        seed: number of the patient, from 0.
        shape: number of voxels along each axis of the lattice.
        spacing: voxel spacing in mm along each axis; ignored if `affine` is given.
        site: scanner and protocol.
        affine: matrix from voxel to world coordinates, 4x4, RAS+ mm, any orientation; None means a lattice along the
            world axes with the origin of the trunk in the middle.
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
