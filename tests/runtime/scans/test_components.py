"""Connected components of a mask, compared with SciPy."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray
from scipy.ndimage import label

from fseft_edge.runtime.scans.components import BoxedMask, components, largest_component, masks_of_labels

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


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    shape=st.tuples(*[st.integers(1, 7)] * 3),
    order=st.permutations(range(3)),
    dtype=st.sampled_from([np.uint8, np.uint16]),
)
def test_the_mask_of_each_label_is_the_voxels_with_this_label(
    seed: int, shape: tuple[int, int, int], order: list[int], dtype: type[np.uint8]
) -> None:
    """The label map may be stored in any order of its axes."""
    labels = np.random.default_rng(seed).choice([0, 0, 0, 1, 3, 200], shape).astype(dtype).transpose(order)
    values = [3, 200, 2, 1]
    for value, mask in zip(values, masks_of_labels(labels, values), strict=True):
        expected = BoxedMask.of(labels == value)
        assert mask.box == expected.box
        assert np.array_equal(mask.inside, expected.inside)
        assert mask.voxels == (labels == value).sum()
        assert mask.shape == labels.shape


def test_the_largest_of_equal_components_does_not_depend_on_the_order_in_memory() -> None:
    mask = np.zeros((5, 5, 5), bool)
    mask[0, 4, 4] = mask[4, 0, 0] = True  # the second one is the first in Fortran order
    for stored in (mask, np.asfortranarray(mask)):
        assert np.argwhere(largest_component(stored)).tolist() == [[0, 4, 4]]
