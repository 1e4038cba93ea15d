"""Other patients made of one: a scan mirrored left to right, or of another body size, to be encoded and learned from.

Features cannot be turned or stretched after the fact, but the scan can be before it is encoded, once, and the features
are cached like any others. Mirroring swaps paired organs (``parotid_left`` and ``parotid_right``); an organ without its
partner says nothing in a mirrored scan, since nobody knows whether it lies as well on the other side.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from fseft_edge.adapters import Activation
from fseft_edge.organs import OrganLabel
from fseft_edge.runtime.volume import LabelMap, Volume

_ZOOMS = (0.88, 1.13)
_SIDES = {"left": "right", "right": "left", "l": "r", "r": "l"}


@dataclass(frozen=True)
class Variation:
    """How a scan is changed.

    Attributes:
        mirrored: left becomes right.
        zoom: factor of every length of the patient.
    """

    mirrored: bool = False
    zoom: float = 1.0

    def of_volume(self, volume: Volume) -> Volume:
        """Return the changed scan; no voxel is copied."""
        array = np.flip(volume.array, _left_right_axis(volume)) if self.mirrored else volume.array
        return replace(volume, array=array, affine=self._affine(volume))

    def of_labels(self, labels: LabelMap) -> LabelMap:
        """Return the annotation of the changed scan, label values as they were (see :meth:`organs`)."""
        array = np.flip(labels.array, _left_right_axis(labels)) if self.mirrored else labels.array
        return replace(labels, array=array, affine=self._affine(labels))

    def organs(self, organs: Sequence[OrganLabel]) -> list[OrganLabel | None]:
        """Return which label shows each organ in the changed annotation; None where it shows nothing of it."""
        if not self.mirrored:
            return list(organs)
        partners = {organ.name: organ for organ in organs}
        return [partners.get(other_side(organ.name) or "") for organ in organs]

    def _affine(self, lattice: Volume | LabelMap) -> NDArray[np.float64]:
        affine = lattice.affine.copy()
        affine[:3, :3] *= self.zoom
        return affine


def variations(organs: Sequence[OrganLabel], activation: Activation) -> list[Variation]:
    """Return how a scan is varied: in size, and mirrored where both organs of a pair are learned.

    With softmax, to which a scan that lacks an organ says nothing, all organs have to be paired for that.
    """
    names = {organ.name for organ in organs}
    paired = [other_side(name) in names for name in names]
    mirrors = (False, True) if (all(paired) if activation == "softmax" else any(paired)) else (False,)
    every = [Variation(mirrored, zoom) for mirrored in mirrors for zoom in (1.0, *_ZOOMS)]
    return every[1:]


def other_side(name: str) -> str | None:
    """Return the name of an organ's partner, such as ``left_lung`` for ``right_lung``; None for an unpaired organ."""
    parts = re.split(r"([_-])", name)
    sides = [index for index, part in enumerate(parts) if part in _SIDES]
    if len(sides) != 1:
        return None
    parts[sides[0]] = _SIDES[parts[sides[0]]]
    return "".join(parts)


def _left_right_axis(lattice: Volume | LabelMap) -> int:
    return int(np.abs(lattice.affine[0, :3]).argmax())
