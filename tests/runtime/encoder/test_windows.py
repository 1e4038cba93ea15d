"""The window layout and the importance of a window's voxels, against MONAI."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
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
def test_origins_are_those_of_monai_where_the_lattice_allows_its_interval(
    count: int, extra: int, overlap: float
) -> None:
    window = 32 * count
    layout = WindowLayout.plan((window + extra,) * 3, (window,) * 3, 8, overlap)
    interval = int(window * (1 - overlap))
    theirs = dense_patch_slices(layout.padded_shape[:1], (window,), (interval,))
    assert layout.origins[0] == tuple(part[0].start for part in theirs)


def test_a_window_off_the_lattice_is_the_bundles_fault() -> None:
    with pytest.raises(EncoderBundleError, match="multiple of its coarsest stride 32"):
        WindowLayout.plan((100, 100, 100), (96, 96, 80), 32)


@pytest.mark.parametrize("overlap", [-0.1, 1.0])
def test_an_impossible_overlap_is_wrong_use(overlap: float) -> None:
    with pytest.raises(UsageError):
        WindowLayout.plan((100, 100, 100), (96, 96, 96), 32, overlap)
