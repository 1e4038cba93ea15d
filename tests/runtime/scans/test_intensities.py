"""Percentiles of the HU within the mask of an organ, compared with NumPy."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from fseft_edge.runtime.scans.components import BoxedMask
from fseft_edge.runtime.scans.intensities import HuPercentiles, hu_percentiles
from fseft_edge.runtime.scans.volume import Volume

SHAPE = (9, 8, 7)


def percentiles(volume: Volume, mask: NDArray[np.bool_]) -> HuPercentiles:
    found = hu_percentiles(volume, BoxedMask.of(mask))
    assert found is not None
    return found


def ct(array: NDArray[Any], slope: float = 1.0, intercept: float = 0.0) -> Volume:
    return Volume(array, np.eye(4), slope, intercept)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), share=st.floats(0.01, 1.0))
def test_percentiles_equal_those_of_numpy(seed: int, share: float) -> None:
    random = np.random.default_rng(seed)
    array = random.integers(-1024, 3072, SHAPE).astype(np.int16)
    mask = random.random(SHAPE) < share
    if not mask.any():
        assert hu_percentiles(ct(array), BoxedMask.of(mask)) is None
        return
    wanted = np.percentile(array[mask], (1, 50, 99), method="inverted_cdf")
    found = percentiles(ct(array), mask)
    assert (found.low, found.median, found.high) == tuple(wanted)


def test_percentiles_are_hu_and_not_stored_values() -> None:
    array = np.full(SHAPE, 1064, np.uint16)
    assert percentiles(ct(array, intercept=-1024.0), array > 0) == HuPercentiles(40, 40, 40)
    assert percentiles(ct(array, slope=-0.5), array > 0).median == -532


def test_voxels_outside_the_mask_are_ignored() -> None:
    array = np.full(SHAPE, -1000, np.int16)
    array[3:5, 2:4, 1:6] = 55
    assert percentiles(ct(array), array == 55) == HuPercentiles(55, 55, 55)


def test_values_beyond_any_ct_are_clipped() -> None:
    array = np.array([[[-30000, 30000], [-30000, 30000]]] * 2, np.int16)
    found = percentiles(ct(array), np.ones(array.shape, bool))
    assert (found.low, found.high) == (-2048, 8191)


def test_fractions_are_rounded() -> None:
    array = np.full(SHAPE, 40.4, np.float32)
    assert percentiles(ct(array), array > 0).median == 40


def test_an_empty_mask_has_no_percentiles() -> None:
    assert hu_percentiles(ct(np.zeros(SHAPE, np.int16)), BoxedMask.of(np.zeros(SHAPE, bool))) is None
