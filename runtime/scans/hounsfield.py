"""Whether intensities look like Hounsfield units, whatever format they were read from."""

from __future__ import annotations

import numpy as np

from fseft_edge.runtime.errors import NotACtError
from fseft_edge.runtime.scans.volume import Volume

HU_RANGE = (-32768.0, 65535.0)
"""What 16 bits can hold, signed or unsigned; a rescaled CT beyond it has a wrong slope or intercept."""

AIR_BELOW_HU = -200.0
TISSUE_ABOVE_HU = 0.0


def check_hounsfield(volume: Volume) -> None:
    """Read a scan's intensities through once and make sure that they look like HU.

    Finite, not constant, inside ``HU_RANGE``, with something below ``AIR_BELOW_HU`` (air, lung) and something above
    ``TISSUE_ABOVE_HU``. This refuses MRI, images scaled to 0..1 and CTs that lost their intercept.

    Raises:
        NotACtError: they do not.
    """
    lowest, highest = np.inf, -np.inf
    for chunk in volume.chunks():
        low, high = float(chunk.min()), float(chunk.max())
        if not (np.isfinite(low) and np.isfinite(high)):
            raise NotACtError(
                f"{volume.source} holds values that are not finite.", remedy="Export the scan again, padded with air."
            )
        bounds = (low * volume.slope + volume.intercept, high * volume.slope + volume.intercept)
        lowest, highest = min(lowest, *bounds), max(highest, *bounds)
    found = f"its values reach from {lowest:g} to {highest:g}"
    if lowest == highest:
        raise NotACtError(f"{volume.source} is constant: every voxel is {lowest:g}.", remedy="Export the scan again.")
    if lowest < HU_RANGE[0] or highest > HU_RANGE[1]:
        raise NotACtError(
            f"{volume.source} does not hold HU: {found}.", remedy="Check the rescale slope and intercept."
        )
    if lowest >= AIR_BELOW_HU or highest <= TISSUE_ABOVE_HU:
        raise NotACtError(
            f"{volume.source} does not look like a CT in HU: {found}, but a CT shows both air (below {AIR_BELOW_HU:g}) "
            f"and tissue (above {TISSUE_ABOVE_HU:g}).",
            remedy="Give the CT in HU, neither windowed nor scaled; MRI and other images are not supported.",
        )
