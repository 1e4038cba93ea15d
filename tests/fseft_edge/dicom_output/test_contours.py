from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from matplotlib.path import Path as Polygon
from numpy.typing import NDArray
from scipy import ndimage

from fseft_edge.dicom_output.contours import closed_contours

MASKS = hnp.arrays(bool, hnp.array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=14), elements=st.booleans())


def filled(polygon: NDArray[np.float64], shape: tuple[int, int]) -> NDArray[np.bool_]:
    """Return the pixels whose centre is inside a polygon, computed by matplotlib."""
    rows, columns = np.indices(shape)
    centres = np.stack([columns.ravel(), rows.ravel()], axis=1)
    return Polygon(np.vstack([polygon, polygon[:1]])).contains_points(centres).reshape(shape)


def area(polygon: NDArray[np.float64]) -> float:
    x, y = polygon.T
    return float(np.sum(x * np.roll(y, -1) - y * np.roll(x, -1)) / 2)


@given(MASKS)
def test_contours_enclose_exactly_the_mask_by_union_and_by_exclusive_or(mask: NDArray[np.bool_]) -> None:
    united, excluding = np.zeros_like(mask), np.zeros_like(mask)
    for polygon in closed_contours(mask):
        inside = filled(polygon, mask.shape)
        united |= inside
        excluding ^= inside
    np.testing.assert_array_equal(united, mask)
    np.testing.assert_array_equal(excluding, mask)


@given(MASKS)
def test_the_area_is_that_of_the_pixels(mask: NDArray[np.bool_]) -> None:
    labelled, pieces = ndimage.label(mask)
    polygons = list(closed_contours(mask))
    assert len(polygons) == pieces
    assert sorted(map(area, polygons)) == sorted(np.bincount(labelled.ravel())[1:].tolist())


def test_a_ring_is_one_polygon_with_a_channel_through_pixels_of_the_ring() -> None:
    mask = np.zeros((9, 9), bool)
    mask[1:8, 1:8] = True
    mask[3:6, 4:6] = False
    (polygon,) = closed_contours(mask)
    vertices = [tuple(vertex) for vertex in polygon.tolist()]
    twice = {vertex for vertex in vertices if vertices.count(vertex) == 2}
    assert len(twice) == 2  # both ends of the channel
    ends = sorted(twice)
    assert [row for _, row in ends] == [ends[0][1]] * 2
    assert all(mask[int(ends[0][1]), column] for column in range(int(np.ceil(ends[0][0])), int(ends[1][0]) + 1))


def test_a_rectangle_of_any_size_has_four_vertices() -> None:
    (polygon,) = closed_contours(np.ones((200, 300), bool))
    assert sorted(map(tuple, polygon.tolist())) == [(-0.5, -0.5), (-0.5, 199.5), (299.5, -0.5), (299.5, 199.5)]


def test_an_empty_mask_has_no_contour() -> None:
    assert list(closed_contours(np.zeros((4, 5), bool))) == []
