"""Quality flags: each flag at its limits, and the description of all flags."""

from __future__ import annotations

import inspect
import re
from typing import Any

import numpy as np
import pytest
from doubles.repository import ROOT
from numpy.typing import NDArray

from fseft_edge.adaptation import transduction
from fseft_edge.adapters.network import Method
from fseft_edge.masks import quality
from fseft_edge.masks.quality import MEANINGS
from fseft_edge.runtime.scans.components import BoxedMask
from fseft_edge.runtime.scans.intensities import HuPercentiles
from fseft_edge.segmentation import segmenter

SHAPE = (12, 10, 8)
Mask = NDArray[np.bool_]


def box(*ranges: tuple[int, int]) -> Mask:
    mask = np.zeros(SHAPE, bool)
    mask[tuple(slice(*part) for part in ranges)] = True
    return mask


def quality_flags(mask: Mask, *volumes: Any, **known: Any) -> tuple[str, ...]:
    return quality.quality_flags(BoxedMask.of(mask), *volumes, **known)


def largest_component_share(mask: Mask) -> float:
    return quality.largest_component_share(BoxedMask.of(mask))


INNER = box((3, 7), (3, 7), (2, 6))
"""A mask of 64 voxels in one component, away from the border."""


def test_a_mask_similar_to_the_support_set_has_no_flag() -> None:
    assert quality_flags(INNER, 64.0, (60.0, 70.0)) == ()


def test_an_empty_mask_has_only_the_flag_empty() -> None:
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
def test_the_volume_is_compared_with_the_range_of_the_support_set_widened_by_30_percent(
    volume_ml: float, flags: tuple[str, ...]
) -> None:
    assert quality_flags(INNER, volume_ml, (150.0, 100.0, 200.0)) == flags


def test_without_support_volumes_the_volume_is_not_flagged() -> None:
    assert quality_flags(INNER, 1e6, ()) == ()


def test_a_mask_can_have_several_flags() -> None:
    mask = INNER | box((0, 1), (0, 2), (0, 8))
    assert quality_flags(mask, 80.0, (10.0, 20.0)) == ("touches_edge", "large", "fragmented")


@pytest.mark.parametrize(("stray", "fragmented"), [(1, False), (7, False), (8, True), (20, True)])
def test_a_mask_is_fragmented_if_its_largest_component_has_less_than_90_percent(stray: int, fragmented: bool) -> None:
    """The shares at the limit are 64 / (64 + 7) = 0.901 and 64 / (64 + 8) = 0.889."""
    mask = INNER.copy()
    line = [(10, y, z) for y in range(1, 9, 2) for z in range(1, 7)][:stray]
    for voxel in line:
        mask[voxel] = True
    assert mask.sum() == 64 + stray
    assert ("fragmented" in quality_flags(mask, 70.0, (70.0,))) == fragmented


def test_a_component_with_exactly_90_percent_is_enough() -> None:
    mask = box((2, 5), (2, 5), (2, 3)) | box((8, 9), (8, 9), (5, 6))
    assert largest_component_share(mask) == pytest.approx(0.9)
    assert "fragmented" not in quality_flags(mask, 10.0, (10.0,))


def test_parts_that_touch_at_a_corner_are_one_component() -> None:
    mask = np.zeros(SHAPE, bool)
    for step in range(6):
        mask[2 + step, 2 + step, 1 + step] = True
    assert largest_component_share(mask) == 1.0


def test_parts_with_a_voxel_between_them_are_two_components() -> None:
    assert largest_component_share(box((2, 4), (2, 4), (2, 4)) | box((5, 7), (2, 4), (2, 4))) == 0.5


@pytest.mark.parametrize("axis", range(3))
def test_components_on_one_line_of_voxels_are_counted(axis: int) -> None:
    """The bounding box is one voxel wide, which cc3d 4.1.1 cannot process."""
    mask = np.zeros(SHAPE, bool)
    for place in (2, 4, 5):
        index = [3, 3, 3]
        index[axis] = place
        mask[tuple(index)] = True
    assert largest_component_share(mask) == pytest.approx(2 / 3)


@pytest.mark.parametrize("mask", [INNER, box((11, 12), (9, 10), (7, 8)), np.ones(SHAPE, bool)])
def test_a_single_component_has_the_share_one_at_every_position(mask: Mask) -> None:
    assert largest_component_share(mask) == 1.0


@pytest.mark.parametrize(("method", "least"), [("linear", 0.75), ("pointwise", 0.84), ("spatial", 0.84)])
def test_the_limit_of_the_confidence_depends_on_the_method(method: Method, least: float) -> None:
    for confidence in (None, 1.0, least):
        assert quality_flags(INNER, 64.0, (60.0, 70.0), confidence=confidence, method=method) == ()
    low = quality_flags(INNER, 64.0, (60.0, 70.0), confidence=least - 0.0001, method=method)
    assert low == ("low_confidence",)


def hu(*medians: int) -> list[HuPercentiles]:
    return [HuPercentiles(median - 500, median, median + 500) for median in medians]


@pytest.mark.parametrize(
    ("support", "inside", "outside"),
    [
        ((30, 20, 60), (-30, 110), (-31, 111)),  # soft tissue: margin of 50 HU at each end
        ((400, 900), (200, 1350), (199, 1351)),  # bone: margin of half the HU of each end
        ((-850, -700), (-1275, -350), (-1276, -349)),  # lung: margin of half the absolute HU of each end
    ],
)
def test_hu_are_implausible_outside_the_range_of_the_support_set_plus_the_margin(
    support: tuple[int, ...], inside: tuple[int, ...], outside: tuple[int, ...]
) -> None:
    for median in inside:
        assert quality_flags(INNER, 64.0, (64.0,), median_hu=median, support_hu=hu(*support)) == ()
    for median in outside:
        flags = quality_flags(INNER, 64.0, (64.0,), median_hu=median, support_hu=hu(*support))
        assert flags == ("implausible_hu",)


def test_without_support_hu_the_hu_are_not_flagged() -> None:
    assert quality_flags(INNER, 64.0, (64.0,), median_hu=-1000) == ()


def test_every_flag_has_a_meaning_and_is_documented() -> None:
    document = (ROOT / "docs" / "segment.md").read_text(encoding="utf-8")
    raised = set(re.findall(r'flags\.append\("(\w+)"\)', inspect.getsource(quality))) | {"empty"}
    for module in (transduction, segmenter):
        raised |= set(re.findall(r'\("(\w+)",\)', inspect.getsource(module)))
    assert {"low_confidence", "implausible_hu", "outside_prior", "absent", "cut_off", "threshold_moved"} <= raised
    assert raised == set(MEANINGS)
    for flag in raised:
        assert f"| `{flag}` |" in document
