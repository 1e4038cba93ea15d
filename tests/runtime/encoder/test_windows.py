"""Window layout and importance of a window's voxels: comparison with MONAI."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from doubles.errors import refused
from hypothesis import given
from hypothesis import strategies as st
from monai.data.utils import compute_importance_map, dense_patch_slices

from fseft_edge.runtime.encoder.windows import WindowLayout, gaussian_importance
from fseft_edge.runtime.errors import EncoderBundleError, UsageError


@pytest.mark.parametrize("window", [(96, 96, 96), (64, 64, 64), (32, 16, 24), (5, 7, 9)])
def test_importance_equals_monai_to_the_last_bit(window: tuple[int, int, int]) -> None:
    assert torch.equal(gaussian_importance(window), compute_importance_map(window, mode="gaussian", sigma_scale=0.125))


LATTICES = st.sampled_from([1, 2, 4, 8, 16])
AXIS = st.tuples(st.integers(1, 300), st.integers(1, 6))


@given(lattice=LATTICES, axes=st.tuples(AXIS, AXIS, AXIS), overlap=st.floats(0, 0.99))
def test_windows_cover_the_grid_on_the_lattice(lattice: int, axes: tuple[Any, ...], overlap: float) -> None:
    layout = WindowLayout.plan(
        tuple(voxels for voxels, _ in axes), tuple(lattice * count for _, count in axes), lattice, overlap
    )
    for axis, origins in enumerate(layout.origins):
        window, interval, end = layout.window[axis], layout.interval[axis], layout.padded_shape[axis]
        assert end == max(window, math.ceil(layout.grid_shape[axis] / lattice) * lattice)
        assert origins[0] == 0
        assert origins[-1] + window == end
        assert all(origin % lattice == 0 for origin in origins)
        assert all(0 < b - a <= interval for a, b in itertools.pairwise(origins))
        assert lattice <= interval <= max(lattice, window * (1 - overlap))


@given(count=st.integers(1, 12), extra=st.integers(0, 200), overlap=st.sampled_from([0.0, 0.25, 0.5, 0.75]))
def test_origins_equal_monai_if_the_interval_is_a_multiple_of_the_lattice(
    count: int, extra: int, overlap: float
) -> None:
    window = 32 * count
    layout = WindowLayout.plan((window + extra,) * 3, (window,) * 3, 8, overlap)
    interval = int(window * (1 - overlap))
    expected = dense_patch_slices(layout.padded_shape[:1], (window,), (interval,))
    assert layout.origins[0] == tuple(part[0].start for part in expected)


def test_a_window_that_is_not_a_multiple_of_the_lattice_is_refused() -> None:
    with refused(EncoderBundleError, (96, 96, 80), 32):
        WindowLayout.plan((100, 100, 100), (96, 96, 80), 32)


@pytest.mark.parametrize("overlap", [-0.1, 1.0])
def test_an_overlap_outside_the_range_is_a_usage_error(overlap: float) -> None:
    with refused(UsageError, overlap):
        WindowLayout.plan((100, 100, 100), (96, 96, 96), 32, overlap)
