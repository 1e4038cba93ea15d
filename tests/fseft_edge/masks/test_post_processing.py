"""Largest components and holes, on masks whose outcome can be counted."""

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
    """Organ 1: a hollow cube with organ 2 in its hollow, and a stray voxel; organ 2 also as a stray pair."""
    labels = np.zeros((12, 12, 12), np.uint8)
    labels[1:8, 1:8, 1:8] = 1
    labels[3:6, 3:6, 3:6] = 0
    labels[4, 4, 4] = 2
    labels[10, 10, 10] = 1
    labels[10, 1, 1:3] = 2
    return labels


def test_nothing_is_done_unasked_and_the_input_is_left_alone(labels: NDArray[np.uint8]) -> None:
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


def test_voxels_that_touch_at_a_corner_are_one_component() -> None:
    mask = np.zeros((4, 4, 4), bool)
    mask[0, 0, 0] = mask[1, 1, 1] = mask[3, 3, 3] = True
    assert np.argwhere(largest_component(mask)).tolist() == [[0, 0, 0], [1, 1, 1]]
    assert bounding_box(mask) == (slice(0, 4),) * 3


def test_holes_are_filled_around_another_organ_that_lies_in_them(labels: NDArray[np.uint8]) -> None:
    done = post_process(labels, [FILLED, ALL[0]])
    assert done[4, 4, 4] == 2
    assert (done == 1).sum() == 7**3 - 1 + 1
    assert (done == 2).sum() == 3


def test_a_stray_piece_in_a_hole_goes_before_the_hole_is_filled(labels: NDArray[np.uint8]) -> None:
    done = post_process(labels, [FILLED, LARGEST])
    assert done[4, 4, 4] == 1
    assert (done == 1).sum() == 7**3 + 1


def test_an_open_hollow_is_no_hole(labels: NDArray[np.uint8]) -> None:
    labels[1, 4, 4] = labels[2, 4, 4] = 0
    assert np.array_equal(post_process(labels, [FILLED, ALL[0]]), labels)


def test_an_organ_that_is_not_there_stays_so() -> None:
    empty = np.zeros((3, 3, 3), np.uint16)
    done = post_process(empty, [ALL[-1]])
    assert done.dtype == np.uint16
    assert not done.any()
