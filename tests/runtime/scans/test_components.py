"""Connected components of a mask, compared with SciPy."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray
from scipy.ndimage import label

from fseft_edge.runtime.scans.components import components, largest_component

masks = hnp.arrays(
    np.bool_, hnp.array_shapes(min_dims=3, max_dims=3, min_side=1, max_side=6), elements=st.booleans()
).filter(np.any)


@settings(max_examples=60, deadline=None)
@given(mask=masks)
def test_components_and_their_sizes_equal_those_of_scipy(mask: NDArray[np.bool_]) -> None:
    found, sizes = components(mask)
    expected, count = label(mask, np.ones((3, 3, 3)))
    pairs = set(zip(found.ravel().tolist(), expected.ravel().tolist(), strict=True))
    assert len(pairs) == count + (0 in expected)  # the numbers may differ, but each pair of numbers occurs once
    assert {first for first, second in pairs if second == 0} <= {0}
    assert sizes.tolist() == [int((found == number).sum()) for number in range(1, count + 1)]
    largest = largest_component(mask)
    assert largest.sum() == np.bincount(expected.ravel())[1:].max()
    assert len(np.unique(expected[largest])) == 1


def test_a_line_of_voxels_has_components() -> None:
    """cc3d 4.1.1 raises RuntimeError for an unpadded mask of this shape."""
    mask = np.ones((1, 7, 1), bool)
    mask[0, [1, 3, 4], 0] = False
    assert components(mask)[1].tolist() == [1, 1, 2]
