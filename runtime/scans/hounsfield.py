"""Check that the intensities of a scan are plausible Hounsfield units. The check is independent of the file format."""

from __future__ import annotations

import numpy as np

from fseft_edge.runtime.errors import NotACtError
from fseft_edge.runtime.scans.volume import Volume

HU_RANGE = (-32768.0, 65535.0)
"""Range of signed and unsigned 16-bit integers. HU outside this range mean a wrong rescale slope or intercept."""

AIR_BELOW_HU = -200.0
TISSUE_ABOVE_HU = 0.0


def check_hounsfield(volume: Volume) -> None:
    """Read all intensities of a scan once and check that they are plausible HU.

    The values must be finite, not constant and inside ``HU_RANGE``. At least one value must be below ``AIR_BELOW_HU``
    (air, lung) and at least one above ``TISSUE_ABOVE_HU``. This check rejects MRI, images scaled to 0..1, and CTs
    without their rescale intercept.

    Raises:
        NotACtError: the values are not plausible HU.
    """
    lowest, highest = np.inf, -np.inf
    for chunk in volume.chunks():
        low, high = float(chunk.min()), float(chunk.max())
        if not (np.isfinite(low) and np.isfinite(high)):
            raise NotACtError(
                f"{volume.source} contains values that are not finite.",
                remedy="Export the scan again, with air (-1024 HU) as the padding value.",
            )
        bounds = (low * volume.slope + volume.intercept, high * volume.slope + volume.intercept)
        lowest, highest = min(lowest, *bounds), max(highest, *bounds)
    found = f"its values range from {lowest:g} to {highest:g}"
    if lowest == highest:
        raise NotACtError(
            f"{volume.source} is constant: every voxel has the value {lowest:g}.", remedy="Export the scan again."
        )
    if lowest < HU_RANGE[0] or highest > HU_RANGE[1]:
        raise NotACtError(
            f"{volume.source} is not in HU: {found}, but HU fit into 16 bits.",
            remedy="Check the rescale slope and intercept, and export the scan again.",
        )
    if lowest >= AIR_BELOW_HU or highest <= TISSUE_ABOVE_HU:
        raise NotACtError(
            f"{volume.source} does not look like a CT in HU: {found}, but a CT contains both air (below "
            f"{AIR_BELOW_HU:g} HU) and tissue (above {TISSUE_ABOVE_HU:g} HU).",
            remedy="Give a CT in HU without windowing or scaling; MRI and other modalities are not supported.",
        )
