from __future__ import annotations

import inspect
import re

import numpy as np
import pytest
from doubles.repository import ROOT
from numpy.typing import NDArray

from fseft_edge.adaptation import transduction
from fseft_edge.adapters.network import Method
from fseft_edge.masks import quality
from fseft_edge.masks.quality import MEANINGS, largest_component_share, quality_flags
from fseft_edge.runtime.scans.intensities import HuPercentiles

SHAPE = (12, 10, 8)
Mask = NDArray[np.bool_]


def box(*ranges: tuple[int, int]) -> Mask:
    mask = np.zeros(SHAPE, bool)
    mask[tuple(slice(*part) for part in ranges)] = True
    return mask


INNER = box((3, 7), (3, 7), (2, 6))
"""64 voxels, one piece, away from the border."""


def test_a_mask_like_those_of_the_support_set_has_no_flag() -> None:
    assert quality_flags(INNER, 64.0, (60.0, 70.0)) == ()


def test_an_empty_mask_is_empty_and_nothing_else() -> None:
    assert quality_flags(np.zeros(SHAPE, bool), 0.0, (60.0, 70.0)) == ("empty",)


@pytest.mark.parametrize("axis", range(3))
@pytest.mark.parametrize("end", [0, -1])
def test_a_single_voxel_on_any_face_touches_the_edge(axis: int, end: int) -> None:
    index = [5, 5, 4]
    index[axis] = end
    mask = INNER.copy()
    mask[tuple(index)] = True
    assert "touches_edge" in quality_flags(mask, 65.0, (65.0,))
    index[axis] = 1 if end == 0 else -2
    mask = INNER.copy()
    mask[tuple(index)] = True
    assert "touches_edge" not in quality_flags(mask, 65.0, (65.0,))


@pytest.mark.parametrize(
    ("volume_ml", "flags"),
    [
        (69.9, ("small",)),
        (70.0, ()),
        (100.0, ()),
        (260.0, ()),
        (260.1, ("large",)),
    ],
)
def test_size_is_judged_against_the_supports_range_widened_by_30_percent(
    volume_ml: float, flags: tuple[str, ...]
) -> None:
    assert quality_flags(INNER, volume_ml, (150.0, 100.0, 200.0)) == flags


def test_without_support_volumes_no_size_is_wrong() -> None:
    assert quality_flags(INNER, 1e6, ()) == ()


def test_several_flags_come_together() -> None:
    mask = INNER | box((0, 1), (0, 2), (0, 8))
    assert quality_flags(mask, 80.0, (10.0, 20.0)) == ("touches_edge", "large", "fragmented")


@pytest.mark.parametrize(("stray", "fragmented"), [(1, False), (7, False), (8, True), (20, True)])
def test_a_mask_is_fragmented_once_its_largest_piece_holds_less_than_90_percent(stray: int, fragmented: bool) -> None:
    """64 / (64 + 7) is 0.901, 64 / (64 + 8) is 0.889."""
    mask = INNER.copy()
    line = [(10, y, z) for y in range(1, 9, 2) for z in range(1, 7)][:stray]
    for voxel in line:
        mask[voxel] = True
    assert mask.sum() == 64 + stray
    assert ("fragmented" in quality_flags(mask, 70.0, (70.0,))) == fragmented


def test_exactly_90_percent_in_one_piece_is_whole() -> None:
    mask = box((2, 5), (2, 5), (2, 3)) | box((8, 9), (8, 9), (5, 6))
    assert largest_component_share(mask) == pytest.approx(0.9)
    assert "fragmented" not in quality_flags(mask, 10.0, (10.0,))


def test_pieces_that_touch_at_a_corner_are_one() -> None:
    mask = np.zeros(SHAPE, bool)
    for step in range(6):
        mask[2 + step, 2 + step, 1 + step] = True
    assert largest_component_share(mask) == 1.0


def test_pieces_with_a_voxel_between_them_are_two() -> None:
    assert largest_component_share(box((2, 4), (2, 4), (2, 4)) | box((5, 7), (2, 4), (2, 4))) == 0.5


@pytest.mark.parametrize("axis", range(3))
def test_specks_on_one_line_of_voxels_are_counted(axis: int) -> None:
    """Their bounding box is one voxel wide, which cc3d 4.1.1 does not bear."""
    mask = np.zeros(SHAPE, bool)
    for place in (2, 4, 5):
        index = [3, 3, 3]
        index[axis] = place
        mask[tuple(index)] = True
    assert largest_component_share(mask) == pytest.approx(2 / 3)


@pytest.mark.parametrize("mask", [INNER, box((11, 12), (9, 10), (7, 8)), np.ones(SHAPE, bool)])
def test_one_piece_is_whole_wherever_it_lies(mask: Mask) -> None:
    assert largest_component_share(mask) == 1.0


@pytest.mark.parametrize(("method", "least"), [("linear", 0.75), ("pointwise", 0.84), ("spatial", 0.84)])
def test_confidence_is_judged_by_what_is_usual_for_the_method(method: Method, least: float) -> None:
    for confidence in (None, 1.0, least):
        assert quality_flags(INNER, 64.0, (60.0, 70.0), confidence=confidence, method=method) == ()
    low = quality_flags(INNER, 64.0, (60.0, 70.0), confidence=least - 0.0001, method=method)
    assert low == ("low_confidence",)


def hu(*medians: int) -> list[HuPercentiles]:
    return [HuPercentiles(median - 500, median, median + 500) for median in medians]


@pytest.mark.parametrize(
    ("support", "inside", "outside"),
    [
        ((30, 20, 60), (-30, 110), (-31, 111)),  # soft tissue: 50 HU beyond either end
        ((400, 900), (200, 1350), (199, 1351)),  # bone: half of either end
        ((-850, -700), (-1275, -350), (-1276, -349)),  # lung: the same, on the other side of water
    ],
)
def test_hu_are_implausible_beyond_50_or_half_of_the_supports_ends(
    support: tuple[int, ...], inside: tuple[int, ...], outside: tuple[int, ...]
) -> None:
    for median in inside:
        assert quality_flags(INNER, 64.0, (64.0,), median_hu=median, support_hu=hu(*support)) == ()
    for median in outside:
        flags = quality_flags(INNER, 64.0, (64.0,), median_hu=median, support_hu=hu(*support))
        assert flags == ("implausible_hu",)


def test_without_support_hu_no_hu_are_implausible() -> None:
    assert quality_flags(INNER, 64.0, (64.0,), median_hu=-1000) == ()


def test_every_flag_has_words_and_stands_in_the_docs() -> None:
    document = (ROOT / "docs" / "segment.md").read_text(encoding="utf-8")
    raised = set(re.findall(r'flags\.append\("(\w+)"\)', inspect.getsource(quality))) | {"empty"}
    raised |= set(re.findall(r'\("(\w+)",\)', inspect.getsource(transduction)))
    assert {"low_confidence", "implausible_hu", "outside_prior", "absent", "cut_off"} <= raised
    assert raised == set(MEANINGS)
    for flag in raised:
        assert f"| `{flag}` |" in document
