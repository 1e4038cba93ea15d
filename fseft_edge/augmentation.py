"""Other patients made of one: the scan of a larger and of a smaller body, to be encoded and learned from.

Features cannot be stretched after the fact, but the scan can be before it is encoded, once, and the features are cached
like any others.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TypeVar

from fseft_edge.runtime.volume import LabelMap, Volume

_Lattice = TypeVar("_Lattice", Volume, LabelMap)


@dataclass(frozen=True)
class Variation:
    """How a scan is changed: every length of the patient times ``zoom``."""

    zoom: float

    def of(self, lattice: _Lattice) -> _Lattice:
        """Return the changed scan, or its annotation; no voxel is touched."""
        affine = lattice.affine.copy()
        affine[:3, :3] *= self.zoom
        return replace(lattice, affine=affine)


VARIATIONS = (Variation(0.88), Variation(1.13))
"""What a support scan is encoded as beside itself."""
