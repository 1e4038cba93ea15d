"""The way from probabilities on the grid to labels, compared with the plain way: interpolate and compare everything."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from fseft_edge.adapters.network import Adapter, AdapterSettings
from fseft_edge.masks.prediction import DecidedScan, decide_sections
from fseft_edge.runtime.encoder.networks.base import FeatureLevel
from fseft_edge.runtime.scans.axis_map import interpolate_first_axis
from fseft_edge.runtime.scans.grid import Grid
from fseft_edge.runtime.scans.preprocessing import Preprocessing
from fseft_edge.runtime.scans.source_pieces import SourcePiece
from fseft_edge.runtime.scans.volume import Volume

Probabilities = NDArray[np.float32]
ORIENTATIONS = list(itertools.product(itertools.permutations(range(3)), itertools.product([1, -1], repeat=3)))


def adapters_of(kinds: Sequence[tuple[str, int]]) -> list[Adapter]:
    level = (FeatureLevel(1, 2),)
    return [Adapter(AdapterSettings("linear", "finest", kind), level, organs) for kind, organs in kinds]  # type: ignore[arg-type]  # drawn literals


def grid_of(shape: Sequence[int], spacing: Sequence[float], orientation: Any, *, crop: bool, seed: int) -> Grid:
    """Return the grid of a scan with permuted and flipped axes; with ``crop``, it covers only the brightest voxels."""
    permutation, signs = orientation
    affine = np.eye(4)
    affine[:3, :3] = (np.diag(spacing) * signs)[:, list(permutation)]
    values = np.random.default_rng(seed).integers(-1000, 1000, shape).astype(np.int16)
    preprocessing = Preprocessing(spacing=(3.0, 3.0, 3.0), crop_below_hu=990.0 if crop else None)
    return Grid.of(Volume(values, affine), preprocessing)


def plainly(grid: Grid, probabilities: Probabilities) -> Probabilities:
    """Return the probabilities ``[K, X, Y, Z]`` of all voxels of the scan: along z, then x, then y."""
    along_x, along_y, along_z = (axis.to_source() for axis in grid.axes)
    planes = interpolate_first_axis(along_z, probabilities.transpose(3, 1, 2, 0))  # [z, X, Y, K]
    on_x = interpolate_first_axis(along_x, planes.transpose(1, 2, 0, 3))  # [x, Y, z, K]
    on_y = interpolate_first_axis(along_y, on_x.transpose(1, 0, 2, 3))  # [y, x, z, K]
    found = on_y.transpose(3, 1, 0, 2)
    found = np.flip(found, [1 + index for index, axis in enumerate(grid.axes) if axis.flipped])
    return found.transpose(0, *(1 + np.argsort([axis.source_axis for axis in grid.axes])))


def decided_plainly(probabilities: Probabilities, adapters: Sequence[Adapter]) -> tuple[NDArray[Any], Probabilities]:
    """Return the label of every voxel, organ by organ, and its probability."""
    labels = np.zeros(probabilities.shape[1:], np.uint8)
    best = np.zeros(probabilities.shape[1:], np.float32)
    rest = iter(probabilities)
    label = 0
    for adapter in adapters:
        threshold: Any = next(rest) if adapter.backgrounds else 0.5
        for _ in range(adapter.classes - adapter.backgrounds):
            label += 1
            organ = next(rest)
            wins = (organ > threshold) & (organ > best)
            labels[wins], best[wins] = label, organ[wins]
    return labels, best


def sections_of(probabilities: Probabilities, depth: int) -> Iterator[tuple[int, Probabilities]]:
    return ((z, probabilities[..., z : z + depth]) for z in range(0, probabilities.shape[3], depth))


def check(grid: Grid, probabilities: Probabilities, adapters: Sequence[Adapter], depth: int) -> DecidedScan:
    """Compare labels, confidence and kept probabilities with the plain way, and return what was decided."""
    everywhere = plainly(grid, probabilities)
    labels, best = decided_plainly(everywhere, adapters)
    kept = np.full(everywhere.shape, np.nan, np.float32)

    def keep(piece: SourcePiece) -> None:
        where = [slice(None)] * 4
        where[1 + piece.axis] = slice(piece.start, piece.stop)
        kept[tuple(where)] = piece.probabilities

    for found in (
        decide_sections(grid, sections_of(probabilities, depth), adapters),
        decide_sections(grid, sections_of(probabilities, depth), adapters, keep),
    ):
        assert found.labels.shape == grid.source_shape
        assert np.array_equal(found.labels, labels)
        for label, confidence in enumerate(found.confidence, start=1):
            mask = labels == label
            mean = best[mask].astype(np.float64).mean() if mask.any() else None
            assert confidence == (pytest.approx(mean, rel=1e-12) if mask.any() else None)
    assert np.array_equal(kept, everywhere)
    return found


kinds = st.lists(st.tuples(st.sampled_from(["sigmoid", "softmax"]), st.integers(1, 3)), min_size=1, max_size=2)


@settings(max_examples=60, deadline=None)
@given(
    shape=st.tuples(*[st.integers(2, 12)] * 3),
    spacing=st.tuples(*[st.sampled_from([0.7, 1.0, 1.5, 3.0, 4.7])] * 3),
    orientation=st.sampled_from(ORIENTATIONS),
    crop=st.booleans(),
    kinds=kinds,
    values=st.sampled_from(["blobs", "halves", "noise"]),
    depth=st.integers(1, 7),
    seed=st.integers(0, 2**16),
)
def test_labels_confidence_and_probabilities_equal_those_of_interpolating_everything(
    shape: tuple[int, int, int],
    spacing: tuple[float, float, float],
    orientation: Any,
    crop: bool,
    kinds: list[tuple[str, int]],
    values: str,
    depth: int,
    seed: int,
) -> None:
    grid = grid_of(shape, spacing, orientation, crop=crop, seed=seed)
    adapters = adapters_of(kinds)
    random = np.random.default_rng(seed)
    size = (sum(adapter.classes for adapter in adapters), *grid.shape)
    if values == "halves":  # many values at the threshold, and many organs with the same value
        probabilities = random.choice(np.array([0.0, 0.25, 0.5, 0.5, np.nextafter(0.5, 1), 1.0], np.float32), size)
    elif values == "noise":
        probabilities = random.random(size, np.float32)
    else:
        probabilities = np.zeros(size, np.float32)
        for channel in probabilities:
            low = [random.integers(0, length) for length in grid.shape]
            channel[tuple(slice(start, start + random.integers(1, 4)) for start in low)] = random.random()
    check(grid, probabilities.astype(np.float32), adapters, depth)


@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_every_orientation_of_a_scan_has_the_labels_of_interpolating_everything(orientation: Any) -> None:
    grid = grid_of((9, 14, 11), (1.2, 3.4, 2.0), orientation, crop=False, seed=1)
    probabilities = np.random.default_rng(2).random((2, *grid.shape), np.float32)
    found = check(grid, probabilities, adapters_of([("sigmoid", 2)]), depth=3)
    assert len(np.unique(found.labels)) == 3


def test_a_probability_of_exactly_one_half_is_background_and_the_next_larger_number_is_not() -> None:
    grid = grid_of((4, 4, 4), (3.0, 3.0, 3.0), ORIENTATIONS[0], crop=False, seed=0)
    adapters = adapters_of([("sigmoid", 1)])
    for value, organ in ((0.5, 0), (np.nextafter(np.float32(0.5), np.float32(1)), 1)):
        found = decide_sections(grid, iter([(0, np.full((1, *grid.shape), value, np.float32))]), adapters)
        assert set(np.unique(found.labels)) == {organ}


def test_of_organs_with_the_same_probability_the_first_has_the_voxel() -> None:
    grid = grid_of((4, 5, 6), (1.0, 1.0, 1.0), ORIENTATIONS[0], crop=False, seed=0)
    for kind in ("sigmoid", "softmax"):
        adapters = adapters_of([(kind, 2), (kind, 1)])
        probabilities = np.full((sum(adapter.classes for adapter in adapters), *grid.shape), 0.75, np.float32)
        if kind == "softmax":
            probabilities[[0, 3]] = 0.25
        found = decide_sections(grid, iter([(0, probabilities)]), adapters)
        assert (found.labels == 1).all()
        assert found.confidence == (0.75, None, None)


def test_only_rectangles_around_an_organ_are_interpolated() -> None:
    grid = grid_of((60, 60, 20), (1.0, 1.0, 3.0), ORIENTATIONS[0], crop=False, seed=0)
    probabilities = np.full((1, *grid.shape), 0.4, np.float32)
    probabilities[0, 5:8, 9:12, 3:5] = 0.9
    pieces = list(grid.to_source(iter([(0, probabilities)]), lambda section: list(section > 0.5), complete=False))
    parts = [part for piece in pieces for part in piece.parts]
    assert {piece.start for piece in pieces if piece.parts} == {3, 4}
    assert max(part.probabilities.size for part in parts) <= (3 + 2) ** 2 * 3**2
