"""Largest components and filled holes, on masks with a known number of voxels."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from fseft_edge.adapters.file import PostProcessing
from fseft_edge.masks.post_processing import ALL, post_process
from fseft_edge.runtime.scans.components import bounding_box, largest_component

LARGEST = PostProcessing(largest_component=True)
FILLED = PostProcessing(fill_holes=True)


@pytest.fixture
def labels() -> NDArray[np.uint8]:
    """Organ 1 is a hollow cube plus a single voxel; organ 2 is a voxel inside the hollow plus a pair of voxels."""
    labels = np.zeros((12, 12, 12), np.uint8)
    labels[1:8, 1:8, 1:8] = 1
    labels[3:6, 3:6, 3:6] = 0
    labels[4, 4, 4] = 2
    labels[10, 10, 10] = 1
    labels[10, 1, 1:3] = 2
    return labels


def test_without_steps_nothing_changes_and_the_input_is_never_changed(labels: NDArray[np.uint8]) -> None:
    before = labels.copy()
    assert np.array_equal(post_process(labels, [ALL[0], ALL[0]]), before)
    post_process(labels, [ALL[-1], ALL[-1]])
    assert np.array_equal(labels, before)


def test_the_largest_component_of_each_organ_is_kept(labels: NDArray[np.uint8]) -> None:
    done = post_process(labels, [LARGEST, ALL[0]])
    assert (done == 1).sum() == 7**3 - 3**3
    assert (done == 2).sum() == 3
    done = post_process(labels, [ALL[0], LARGEST])
    assert (done == 1).sum() == 7**3 - 3**3 + 1
    assert np.array_equal(np.argwhere(done == 2), [[10, 1, 1], [10, 1, 2]])


def test_voxels_that_touch_at_a_corner_belong_to_one_component() -> None:
    mask = np.zeros((4, 4, 4), bool)
    mask[0, 0, 0] = mask[1, 1, 1] = mask[3, 3, 3] = True
    assert np.argwhere(largest_component(mask)).tolist() == [[0, 0, 0], [1, 1, 1]]
    assert bounding_box(mask) == (slice(0, 4),) * 3


def test_a_hole_is_filled_around_another_organ_inside_it(labels: NDArray[np.uint8]) -> None:
    done = post_process(labels, [FILLED, ALL[0]])
    assert done[4, 4, 4] == 2
    assert (done == 1).sum() == 7**3 - 1 + 1
    assert (done == 2).sum() == 3


def test_a_small_component_in_a_hole_is_removed_before_the_hole_is_filled(labels: NDArray[np.uint8]) -> None:
    done = post_process(labels, [FILLED, LARGEST])
    assert done[4, 4, 4] == 1
    assert (done == 1).sum() == 7**3 + 1


def test_a_hollow_with_an_opening_is_not_filled(labels: NDArray[np.uint8]) -> None:
    labels[1, 4, 4] = labels[2, 4, 4] = 0
    assert np.array_equal(post_process(labels, [FILLED, ALL[0]]), labels)


def test_an_empty_mask_stays_empty() -> None:
    empty = np.zeros((3, 3, 3), np.uint16)
    done = post_process(empty, [ALL[-1]])
    assert done.dtype == np.uint16
    assert not done.any()
