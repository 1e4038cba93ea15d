"""Label values of the organs in a mask: those of the annotations, unless two adapters use the same value."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fseft_edge.adapters.file import AdapterFile
from fseft_edge.runtime.scans.organs import LARGEST_LABEL

_LOG = logging.getLogger(__name__)


def label_values(files: Sequence[AdapterFile]) -> tuple[int, ...]:
    """Return the label value of every organ in the mask, in the order of the adapters and of their organs.

    Each organ keeps the label value of its annotations. If two organs have the same value, all organs are numbered 1 to
    K instead.
    """
    own = _own_values(files)
    return own if _are_usable(own) else tuple(range(1, len(own) + 1))


def keep_label_values(files: Sequence[AdapterFile]) -> bool:
    """Return True if the organs have the label values of their annotations in the mask.

    The organs of an encoder without an adapter have no annotations.
    """
    return _are_usable(_own_values(files)) and all(file.description.shots for file in files)


def warn_of_new_label_values(files: Sequence[AdapterFile]) -> None:
    """Log that the organs get new label values in the masks of this run, and why, unless they keep their own."""
    own = _own_values(files)
    if _are_usable(own):
        return
    repeated = next((value for value in own if own.count(value) > 1), None)
    reason = (
        f"the label value {repeated} stands for more than one organ in the annotations of the adapters"
        if repeated is not None
        else f"an adapter states a label value that is not between 1 and {LARGEST_LABEL}"
    )
    _LOG.warning("the organs have the new label values 1 to %d in the masks, because %s", len(own), reason)


def with_label_values(
    positions: NDArray[np.uint8] | NDArray[np.uint16], values: Sequence[int]
) -> NDArray[np.uint8] | NDArray[np.uint16]:
    """Return a mask with label values in place of positions; the given array is changed if its type is sufficient.

    Args:
        positions: mask ``[X, Y, Z]`` in which the organ at position ``k`` of ``values`` has the value ``k + 1``.
        values: label value of each organ.
    """
    if tuple(values) == tuple(range(1, len(values) + 1)):
        return positions
    dtype = np.uint8 if max(values) <= np.iinfo(np.uint8).max else np.uint16
    table = np.array([0, *values], dtype)
    mask: NDArray[Any] = positions if positions.dtype == dtype else np.empty_like(positions, dtype)
    slowest = int(np.argmax(positions.strides))
    planes = zip(np.moveaxis(mask, slowest, 0), np.moveaxis(positions, slowest, 0), strict=True)
    for plane, numbers in planes:  # a copy of one plane at a time
        plane[...] = table.take(numbers)
    return mask


def _own_values(files: Sequence[AdapterFile]) -> tuple[int, ...]:
    return tuple(organ.label for file in files for organ in file.description.organs)


def _are_usable(values: Sequence[int]) -> bool:
    return len(set(values)) == len(values) and all(1 <= value <= LARGEST_LABEL for value in values)
