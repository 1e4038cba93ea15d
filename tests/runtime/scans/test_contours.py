"""Contours become exact shares of voxels. Areas are checked against closed forms and a supersampled even-odd rule."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import permutations, product

import numpy as np
import pytest
from doubles.errors import refused
from doubles.structure_sets import circle, keyhole, rectangle
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from fseft_edge.runtime.errors import GeometryError
from fseft_edge.runtime.scans.contours import Contour, extent_of, share_of
from fseft_edge.runtime.scans.polygons import Region
from fseft_edge.runtime.scans.structures import Lattice

Points = NDArray[np.float64]
LATTICE = Lattice((60, 50, 20), np.diag([1.0, 1.0, 3.0, 1.0]))
CENTRE = (30.3, 25.2)


def contours(
    section: Callable[[float], Sequence[Points]], slices: Sequence[int], *, exclusive: bool = False
) -> list[Contour]:
    """Return the contours of a shape on some slices of ``LATTICE``."""
    return [Contour(points, exclusive) for index in slices for points in section(3.0 * index)]


def volume(found: Sequence[Contour], *, interpolate: bool = True) -> float:
    """Return the volume in mm^3 on ``LATTICE``, for contours that need no warning."""
    share, warnings = share_of(found, LATTICE, interpolate=interpolate)
    assert warnings == ()
    return share.voxels * LATTICE.voxel_volume_mm3


def supersampled(region: Region, shape: tuple[int, int], points: int) -> NDArray[np.float64]:
    """Return the shares of pixels from points in each of them, by the even-odd rule of every polygon."""
    first, second = (((np.arange(size * points) + 0.5) / points - 0.5) for size in shape)
    x, y = np.meshgrid(first, second, indexing="ij")
    inside = np.zeros(x.shape, bool)
    for group in set(region.groups):
        united = np.zeros(x.shape, bool)
        for polygon, owner in zip(region.polygons, region.groups, strict=True):
            if owner == group:
                odd = np.zeros(x.shape, bool)
                for (x0, y0), (x1, y1) in zip(polygon, np.roll(polygon, -1, axis=0), strict=True):
                    crosses = (y0 <= y) != (y1 <= y)
                    if y0 != y1:
                        odd ^= crosses & (x < x0 + (y - y0) / (y1 - y0) * (x1 - x0))
                united |= odd
        inside ^= united
    return inside.reshape(shape[0], points, shape[1], points).mean(axis=(1, 3))


VERTICES = st.lists(st.tuples(*[st.floats(-3, 11, width=32)] * 2), min_size=3, max_size=7)


@settings(max_examples=60)
@given(st.lists(st.tuples(VERTICES, st.integers(0, 1)), min_size=1, max_size=3))
def test_the_share_of_a_pixel_is_exact_for_any_polygons(drawn: list[tuple[list[tuple[float, float]], int]]) -> None:
    """Polygons may cross themselves and one another, and reach beyond the pixels."""
    region = Region(tuple(np.array(polygon) for polygon, _ in drawn), tuple(group for _, group in drawn))
    part, (u, v) = region.shares((9, 8))
    shares = np.zeros((9, 8))
    shares[u : u + part.shape[0], v : v + part.shape[1]] = part
    expected = supersampled(region, (9, 8), 24)
    assert np.abs(shares - expected).max() < 0.12  # a polygon with many edges in a pixel is sampled roughly
    assert np.abs(shares - expected).mean() < 0.006
    if max(np.abs(polygon).max() for polygon in region.polygons) < 7.5 and region.bounds[0].min() > -0.5:
        assert shares.sum() == pytest.approx(region.area(), abs=1e-9)


@pytest.mark.parametrize("radius", [20.0, 3.0, 1.5])
def test_a_disc_has_its_volume(radius: float) -> None:
    found = volume(contours(lambda height: [circle(CENTRE, radius, height)], range(3, 9)))
    assert found == pytest.approx(np.pi * radius**2 * 18, rel=1e-3)


def ring(height: float) -> list[Points]:
    return [circle(CENTRE, 20, height), circle((33.1, 24.0), 10, height)[::-1]]


def test_a_ring_is_a_ring_in_every_form() -> None:
    slices = range(3, 9)
    expected = np.pi * 300 * 18
    assert volume(contours(ring, slices)) == pytest.approx(expected, rel=1e-3)
    assert volume(contours(ring, slices, exclusive=True)) == pytest.approx(expected, rel=1e-3)
    as_keyhole = share_of(contours(lambda height: [keyhole(*ring(height))], slices), LATTICE)[0]
    as_two = share_of(contours(ring, slices), LATTICE)[0]
    np.testing.assert_allclose(as_keyhole.whole(), as_two.whole(), atol=1e-6)


def test_contours_in_contours_alternate_and_separate_ones_add_up() -> None:
    def nested(height: float) -> list[Points]:
        return [circle(CENTRE, radius, height) for radius in (4, 20, 10)]

    def apart(height: float) -> list[Points]:
        return [rectangle((2, 3), (6, 5), height), rectangle((6, 3), (8, 5), height)]  # they share a part of an edge

    assert volume(contours(nested, [4, 5])) == pytest.approx(np.pi * (400 - 100 + 16) * 6, rel=1e-3)
    assert volume(contours(apart, [4, 5])) == pytest.approx(12 * 6)


def test_a_hole_that_touches_its_outline_is_a_hole() -> None:
    """In a point, along a part of an edge, and protruding by the rounding of its coordinates."""

    def touching(height: float) -> list[Points]:
        hole = np.array([[2, 4, height], [5, 6, height], [5, 2, height]], float)
        return [rectangle((2, 1), (12, 9), height), hole, rectangle((8, 1), (10, 4), height)]

    def protruding(height: float) -> list[Points]:
        return [rectangle((2, 1), (12, 9), height), rectangle((4, 0.98), (8, 4), height)]

    assert volume(contours(touching, [4, 5])) == pytest.approx((80 - 6 - 6) * 6)
    assert volume(contours(protruding, [4, 5])) == pytest.approx((80 - 12) * 6, rel=0.003)


def test_overlapping_contours_are_united_and_copies_count_once_with_a_warning() -> None:
    def overlapping(height: float) -> list[Points]:
        return [rectangle((2, 2), (8, 8), height), rectangle((5, 5), (11, 11), height)]

    share, warnings = share_of(contours(overlapping, [4, 5]), LATTICE, "ROI 3")
    assert share.voxels == pytest.approx(2 * (36 + 36 - 9))
    assert warnings == ("ROI 3 has contours that partly overlap on 2 slices: they were united.",)
    share, warnings = share_of(contours(lambda height: [circle(CENTRE, 9, height)] * 2, [4]), LATTICE, "ROI 3")
    assert share.voxels == pytest.approx(np.pi * 81, rel=1e-3)
    assert warnings == ("ROI 3 has 1 contour that repeat another one, which were left out.",)


def test_a_contour_that_crosses_itself_follows_the_even_odd_rule() -> None:
    turn = np.arange(5) * 2 * np.pi * 2 / 5
    star = np.stack([30 + 20 * np.cos(turn), 25 + 20 * np.sin(turn), np.full(5, 12.0)], axis=1)
    inner = 20 * np.cos(2 * np.pi / 5) / np.cos(np.pi / 5)
    points = 5 * 20 * inner * np.sin(np.pi / 5)  # area of the star with its inner pentagon
    pentagon = 5 / 2 * inner**2 * np.sin(2 * np.pi / 5)
    assert volume([Contour(star)]) == pytest.approx((points - pentagon) * 3, rel=1e-4)


def test_direction_start_and_repeated_points_do_not_matter() -> None:
    points = circle(CENTRE, 7, 12.0, points=31)
    expected = share_of([Contour(points)], LATTICE)[0].whole()
    repeated = np.concatenate([points, points[:1]])
    doubled = np.repeat(points, 2, axis=0)
    for other in (points[::-1], np.roll(points, 5, axis=0), repeated, doubled):
        np.testing.assert_allclose(share_of([Contour(other)], LATTICE)[0].whole(), expected, atol=1e-6)


def test_contours_without_area_are_left_out_with_a_warning() -> None:
    flat = [[5, 5, 12], [9, 5, 12], [7, 5, 12]]
    there_and_back = [[5, 5, 12], [9, 5, 12], [9, 9, 12], [9, 5, 12]]
    nothing = [Contour(np.array(points, float)) for points in (flat, there_and_back, flat[:2], flat[:1])]
    share, warnings = share_of([*nothing, Contour(circle(CENTRE, 5, 12.0))], LATTICE, "ROI 3")
    assert share.voxels == pytest.approx(np.pi * 25, rel=1e-3)
    assert warnings == ("ROI 3 has 4 contours of fewer than three points or on a line, without area.",)
    share, _ = share_of(nothing, LATTICE)
    assert share.voxels == 0
    assert not share.whole().any()
    assert not share.mask().inside.any()


def test_a_contour_that_runs_along_its_course_twice_encloses_nothing_and_says_so() -> None:
    points = circle(CENTRE, 5, 12.0)
    share, warnings = share_of([Contour(np.concatenate([points, points]))], LATTICE, "ROI 3")
    assert share.voxels == 0
    assert "ROI 3 encloses nothing" in warnings[0]


def stored(axes: tuple[int, int, int], flips: Sequence[bool], lattice: Lattice) -> Lattice:
    """Return a lattice with its axes in another order and direction."""
    change = np.zeros((4, 4))
    change[3, 3] = 1
    shape = [lattice.shape[axis] for axis in axes]
    for new, (old, flipped) in enumerate(zip(axes, flips, strict=True)):
        change[old, new] = -1 if flipped else 1
        change[old, 3] = shape[new] - 1 if flipped else 0
    return Lattice((shape[0], shape[1], shape[2]), lattice.affine @ change)


TURNED = np.linalg.qr(np.random.default_rng(1).normal(size=(3, 3)))[0]


def test_every_way_to_store_an_oblique_scan_gives_the_same_shares() -> None:
    affine = np.eye(4)
    affine[:3, :3] = TURNED @ np.diag([0.7, 1.3, 3.0])
    affine[:3, 3] = [-40.0, 17.5, 230.0]
    oblique = Lattice((40, 36, 9), affine)
    drawn = [circle((21.3, 17.2), 11, float(index)) for index in (2, 3, 4)]
    drawn += [circle((23.0, 16.0), 3, float(index)) for index in (2, 3)]
    placed = [Contour(points @ affine[:3, :3].T + affine[:3, 3]) for points in drawn]
    expected = share_of(placed, oblique)[0].whole()
    assert expected.sum() == pytest.approx(np.pi * (3 * 121 - 2 * 9), rel=1e-3)
    for axes, flips in product(permutations(range(3)), product((False, True), repeat=3)):
        found = share_of(placed, stored((axes[0], axes[1], axes[2]), flips, oblique))[0].whole()
        turned = np.flip(expected.transpose(axes), [axis for axis in range(3) if flips[axis]])
        np.testing.assert_allclose(found, turned, atol=1e-6)


def test_a_plane_off_the_slices_is_refused_with_its_distance() -> None:
    def discs(shift: float) -> list[Contour]:
        return contours(lambda height: [circle(CENTRE, 5, height + shift)], [4, 5])

    nearly, off = discs(0.29), discs(0.45)
    assert share_of(nearly, LATTICE)[0].voxels == pytest.approx(50 * np.pi, rel=1e-3)
    with pytest.raises(GeometryError, match=r"ROI 3 has a contour that is 0\.45 mm from the nearest slice"):
        share_of(off, LATTICE, "ROI 3")
    tilted = [Contour(points.points + np.outer(points.points[:, 0], [0, 0, 0.2])) for points in nearly]
    with pytest.raises(GeometryError, match="not parallel to the slices"):
        share_of(tilted, LATTICE)


def test_contours_beyond_the_scan_are_left_out_or_refused_with_their_distance() -> None:
    def at(x: float) -> Callable[[float], list[Points]]:
        return lambda height: [rectangle((x, 10), (x + 10, 20), height)]

    share, warnings = share_of(contours(at(-5.5), [4, 5]), LATTICE, "ROI 3")
    assert share.voxels == pytest.approx(100)
    assert warnings == ("ROI 3 is only partly within the slices: 50 % of its area were left out.",)
    share, warnings = share_of(contours(at(5), [18, 19, 20, 21]), LATTICE, "ROI 3")
    assert share.voxels == pytest.approx(200)
    assert warnings == ("ROI 3 has 2 contours above or below the scan, which were left out.",)
    with pytest.raises(GeometryError, match=r"outside the scan: its contours are at least 20 mm beyond the border"):
        share_of(contours(at(-30.5), [4, 5]), LATTICE)
    with pytest.raises(GeometryError, match=r"outside the scan: its nearest contour is 9 mm beyond the last slice"):
        share_of(contours(at(5), [22, 23]), LATTICE)


def sphere(height: float) -> list[Points]:
    return [circle(CENTRE, float(np.sqrt(20**2 - (height - 30) ** 2)), height)]


@pytest.mark.parametrize("every", [2, 3])
def test_slices_between_contours_are_interpolated_with_a_warning(every: int) -> None:
    slices = range(4, 17, every)
    share, warnings = share_of(contours(sphere, slices), LATTICE, "ROI 3")
    complete = volume(contours(sphere, range(4, 17)))
    assert share.voxels * 3 == pytest.approx(complete, rel=0.01)
    between = 13 - len(slices)
    assert warnings[0].startswith(f"ROI 3 has contours on every {'second' if every == 2 else 'third'} slice only: ")
    assert f"{between} slices between them were interpolated" in warnings[0]
    share, warnings = share_of(contours(sphere, slices), LATTICE, interpolate=False)
    assert share.voxels * 3 < 0.6 * complete
    assert "stay empty" in warnings[0]


@pytest.mark.parametrize("slope", [0.3, 1.0])
def test_a_tilted_tube_keeps_its_cross_section_between_contours(slope: float) -> None:
    def tube(height: float) -> list[Points]:
        return [circle((20 + slope * (height - 12), 25.2), 4, height)]

    share, _ = share_of(contours(tube, [4, 6, 8]), LATTICE)
    slices = share.whole().sum(axis=(0, 1))[4:9]
    np.testing.assert_allclose(slices, np.pi * 16, rtol=0.02)
    middle = share.whole()[:, :, 5].sum(axis=1)
    assert middle @ np.arange(60) / middle.sum() == pytest.approx(20 + slope * 3, abs=0.05)


def test_a_structure_of_two_pieces_is_not_filled_between_them() -> None:
    pieces = contours(lambda height: [circle(CENTRE, 6, height)], [2, 3, 4, 12, 13])
    share, warnings = share_of(pieces, LATTICE, "ROI 3")
    assert share.voxels == pytest.approx(5 * np.pi * 36, rel=1e-3)
    assert warnings == (
        "ROI 3 consists of pieces: the 7 slices between the slices 5 and 13 have no contours and stay empty.",
    )
    on_every_second = contours(lambda height: [circle(CENTRE, 6, height)], [1, 3, 5, 15, 17])
    share, warnings = share_of(on_every_second, LATTICE)
    assert share.voxels == pytest.approx(8 * np.pi * 36, rel=1e-3)
    assert len(warnings) == 2
    share, warnings = share_of(contours(lambda height: [circle(CENTRE, 6, height)], [2, 13]), LATTICE)
    assert share.voxels == pytest.approx(2 * np.pi * 36, rel=1e-3)


@pytest.mark.parametrize("slices", [[2, 3, 5, 6], [2, 3, 4, 7, 8], [2, 4, 6, 9], [2, 4, 6, 7]])
def test_missing_contours_are_refused(slices: list[int]) -> None:
    with pytest.raises(GeometryError, match="irregular distances"):
        share_of(contours(lambda height: [circle(CENTRE, 6, height)], slices), LATTICE)


def test_a_part_that_is_missing_on_single_slices_is_noticed() -> None:
    """One of two organs in a ROI lacks contours, which the contoured slices do not show."""
    left, right = ([Contour(circle((x, 25), 8, 3.0 * index)) for index in range(2, 11)] for x in (15, 42))
    for lacking, count in (([*left, *right[:4], *right[5:]], 1), ([*left[::2], *right[1::2]], 7)):
        share, warnings = share_of(lacking, LATTICE, "ROI 3")
        assert share.voxels == pytest.approx(len(lacking) * np.pi * 64, rel=1e-3)
        assert warnings[0].startswith(f"ROI 3 lacks contours of a part on {count} slice")
    assert share_of([*left, *right], LATTICE)[1] == ()


def test_a_contour_on_one_slice_fills_this_slice() -> None:
    share, warnings = share_of(contours(lambda height: [circle(CENTRE, 6, height)], [7]), LATTICE)
    assert share.voxels == pytest.approx(np.pi * 36, rel=1e-3)
    assert share.box[2] == slice(7, 8)
    assert warnings == ()


def test_the_extent_needs_no_lattice() -> None:
    placed = [Contour(one.points @ TURNED.T + 40) for one in contours(ring, range(3, 9))]
    extent = extent_of(placed)
    assert extent.planes == 6
    assert extent.spacing_mm == pytest.approx(3)
    assert extent.volume_ml == pytest.approx(np.pi * 300 * 18 / 1000, rel=1e-3)
    assert extent_of(placed[:2]).volume_ml is None
    assert extent_of([]).planes == 0


def test_both_closed_types_on_a_slice_are_combined_by_exclusive_or_with_a_warning() -> None:
    two = [Contour(rectangle((2, 2), (8, 8), 12.0)), Contour(rectangle((5, 5), (11, 11), 12.0), exclusive=True)]
    share, warnings = share_of(two, LATTICE, "ROI 3")
    assert share.voxels == pytest.approx(36 + 36 - 18)
    assert warnings == ("ROI 3 has contours of both closed types on 1 slice, which were combined by exclusive or.",)


def test_contours_that_cross_all_over_are_refused_before_they_fill_the_memory() -> None:
    scribble = np.random.default_rng(0).uniform(0, 50, (20_000, 3))
    scribble[:, 2] = 12
    with pytest.raises(GeometryError, match="cross themselves or one another far too often"):
        share_of([Contour(scribble)], LATTICE)


def test_nothing_is_invented_between_contours_that_do_not_overlap() -> None:
    def node(height: float) -> list[Points]:
        return [circle((30, 30) if height == 18 else (10, 10), 3, height)]

    share, warnings = share_of(contours(node, [4, 6, 8]), LATTICE)
    filled = np.flatnonzero(share.whole().any(axis=(0, 1)))
    assert len(filled) == 3
    assert any("do not overlap" in warning for warning in warnings)


def test_a_gap_on_a_single_slice_stays_empty_without_interpolation() -> None:
    def disc(height: float) -> list[Points]:
        return [circle((20, 20), 5, height)]

    slices = [2, 3, 4, 6, 7]
    with refused(GeometryError, "irregular"):
        share_of(contours(disc, slices), LATTICE)
    share, warnings = share_of(contours(disc, slices), LATTICE, interpolate=False)
    assert np.flatnonzero(share.whole().any(axis=(0, 1))).tolist() == slices
    assert any("stay" in warning for warning in warnings)


def test_larger_distances_between_contours_are_remarked_without_a_ct() -> None:
    def disc(height: float) -> list[Points]:
        return [circle((20, 20), 5, height)]

    (remark,) = extent_of(contours(disc, [2, 3, 4, 6, 7])).warnings
    assert "3 mm apart, but 1 distance of up to 6 mm" in remark
    assert extent_of(contours(disc, [2, 3, 4])).warnings == ()
