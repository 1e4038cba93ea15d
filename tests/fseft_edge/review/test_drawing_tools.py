"""The tools of the page on voxels, run in a browser and compared with scipy."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from doubles.reviewed import run_batch
from doubles.reviewer import served
from numpy.typing import NDArray
from scipy import ndimage

pytestmark = pytest.mark.browser

LENGTHS, SPACING = (24, 20, 9), (1.0, 1.5, 3.0)
DRAWING = """
const { Drawing } = await import("/drawing.js");
const drawing = new Drawing(Uint8Array.from(given.voxels), given.lengths, given.spacing);
const found = () => [...drawing.voxels];
"""


class Page:
    """A page of the review, in which scripts use a drawing."""

    def __init__(self, page: Any) -> None:
        self._page = page

    def run(self, script: str, voxels: NDArray[np.uint8], **given: Any) -> Any:
        """Run a script with a drawing of these voxels."""
        given |= {"voxels": voxels.ravel(order="F").tolist(), "lengths": LENGTHS, "spacing": SPACING}
        return self._page.evaluate(f"async (given) => {{ {DRAWING} {script} }}", given)

    def voxels(self, script: str, voxels: NDArray[np.uint8], **given: Any) -> NDArray[np.uint8]:
        """Run a script, and return the voxels of the drawing."""
        found = self.run(f"{script} return found();", voxels, **given)
        return np.array(found, np.uint8).reshape(LENGTHS, order="F")


@pytest.fixture(scope="module")
def page(chromium: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    outbox: Path = run_batch(tmp_path_factory.mktemp("batch"), (1,)).outbox
    context = chromium.new_context()
    with served(outbox) as reviewer:
        opened = context.new_page()
        opened.goto(reviewer.server.address)
        opened.wait_for_selector("#cases button")
        yield Page(opened)
    context.close()


def empty() -> NDArray[np.uint8]:
    return np.zeros(LENGTHS, np.uint8)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_the_brush_is_a_disc_in_mm_in_its_plane(page: Page, axis: int) -> None:
    centre = np.array([3, 9, 4])  # near a border
    drawn = page.voxels(
        "drawing.dot(given.centre, given.axis, 5, 7, () => true);", empty(), centre=[3, 9, 4], axis=axis
    )
    away = (np.indices(LENGTHS).T - centre) * SPACING
    disc = (np.linalg.norm(away, axis=-1) <= 5).T
    disc &= (np.arange(LENGTHS[axis]) == centre[axis]).reshape([-1 if one == axis else 1 for one in range(3)])
    np.testing.assert_array_equal(drawn, disc * 7)
    one = page.voxels("drawing.dot([3, 9, 4], given.axis, 0, 7, () => true);", empty(), axis=axis)
    assert np.argwhere(one).tolist() == [[3, 9, 4]]


def test_a_line_leaves_no_gap(page: Page) -> None:
    drawn = page.voxels("drawing.line([2, 17, 5], [20, 3, 5], 2, 0, 1, () => true);", empty())
    assert ndimage.label(drawn, np.ones((3, 3, 3)))[1] == 1
    assert drawn[2, 17, 5] == drawn[20, 3, 5] == 1
    assert np.count_nonzero(drawn) == 19


def test_growing_takes_connected_background_of_similar_hu_within_reach(page: Page) -> None:
    rng = np.random.default_rng(1)
    hu = np.rint(ndimage.gaussian_filter(rng.normal(size=LENGTHS), 1.5) * 600)
    labels = empty()
    labels[10:14, :9] = 2  # another organ, which loses nothing
    seed = (8, 10, 4)
    hu[7:10, 9:12, 3:6] = 50
    grown = page.voxels(
        """const hu = (x, y, z) => given.hu[x + given.lengths[0] * (y + given.lengths[1] * z)];
        drawing.grow(given.seed, 1, { hu, radius: 9, tolerance: 60 });""",
        labels,
        hu=hu.ravel(order="F").tolist(),
        seed=seed,
    )
    near = (np.linalg.norm((np.indices(LENGTHS).T - seed) * SPACING, axis=-1) <= 9).T
    clusters, _ = ndimage.label(near & (np.abs(hu - 50) <= 60) & (labels == 0))
    wanted = clusters == clusters[seed]
    assert np.count_nonzero(wanted) > 100
    np.testing.assert_array_equal(grown, np.where(wanted, 1, labels))


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_between_slices_the_signed_distance_is_interpolated(page: Page, axis: int) -> None:
    rng = np.random.default_rng(2)
    labels = empty()
    low, high = 1, 7
    blobs = ndimage.gaussian_filter(rng.normal(size=LENGTHS), 2.0) > 0.02
    first, last = (blobs.take(at, axis) for at in (low, high))
    labels[tuple(low if one == axis else slice(None) for one in range(3))] = first * 3
    labels[tuple(high if one == axis else slice(None) for one in range(3))] = last * 3
    labels[11, 9:12, 4] = 2
    found = page.voxels("if (!drawing.interpolate(given.axis, 1, 7, 3)) throw new Error();", labels, axis=axis)
    spacing = [SPACING[one] for one in range(3) if one != axis]

    def signed_distance(mask: NDArray[np.bool_]) -> NDArray[np.float64]:
        outside, inside = (ndimage.distance_transform_edt(one, sampling=spacing) for one in (~mask, mask))
        return np.asarray(outside - inside)

    for at in range(low + 1, high):
        share = (at - low) / (high - low)
        distance = (1 - share) * signed_distance(first) + share * signed_distance(last)
        here, other = found.take(at, axis), labels.take(at, axis) == 2
        decided = np.abs(distance) > 1e-9
        np.testing.assert_array_equal((here == 3)[decided], ((distance < 0) & ~other)[decided])
        np.testing.assert_array_equal(here == 2, other)
    untouched = [at for at in range(LENGTHS[axis]) if not low < at < high]
    np.testing.assert_array_equal(found.take(untouched, axis), labels.take(untouched, axis))
    assert page.run("return drawing.interpolate(given.axis, 0, 7, 3);", empty(), axis=axis) is False


def test_steps_are_undone_and_done_again_and_what_is_saved_is_known(page: Page) -> None:
    told = page.run(
        """
        const told = [];
        const tell = () => told.push([drawing.voxels[5], drawing.unsaved, drawing.canUndo, drawing.canRedo]);
        const step = (value) => { drawing.voxels[5] = value; drawing.record(drawing.voxels); tell(); };
        step(1); step(2);
        drawing.undo(); tell();
        drawing.redo(); tell();
        drawing.snapshot().saved(); tell();
        drawing.undo(); tell();
        drawing.redo(); tell();
        drawing.undo(); step(2);  // the same voxels, but the steps of the saved state are gone
        const later = drawing.snapshot();
        step(3); later.saved(); tell();
        drawing.discard(); tell();
        return told;""",
        empty(),
    )
    assert told == [
        [1, True, True, False],
        [2, True, True, False],
        [1, True, True, True],
        [2, True, True, False],
        [2, False, True, False],
        [1, True, True, True],
        [2, False, True, False],
        [2, True, True, False],
        [3, True, True, False],
        [3, True, True, False],
        [2, False, False, False],
    ]


def test_strokes_are_put_on_another_mask_as_one_step(page: Page) -> None:
    other = empty()
    other[4, 4, 4] = other[1, 1, 1] = 2
    strokes = """
        for (const [at, value] of [[0, 1], [1, 1], [0, 2]]) {
          drawing.voxels[at] = value;
          drawing.record(drawing.voxels);
        }
        const on = drawing.on(Uint8Array.from(given.other));"""
    other_list = other.ravel(order="F").tolist()
    found = page.run(f"{strokes} return [...on.voxels];", empty(), other=other_list)
    wanted = other.copy()
    wanted[0, 0, 0], wanted[1, 0, 0] = 2, 1
    np.testing.assert_array_equal(np.array(found).reshape(LENGTHS, order="F"), wanted)
    undone = page.run(f"{strokes} on.undo(); return [[...on.voxels], on.unsaved];", empty(), other=other_list)
    assert undone == [other_list, False]


def test_a_step_changes_only_the_voxels_that_the_tool_may_change(page: Page) -> None:
    labels = empty()
    labels[0, 0, 0], labels[1, 0, 0] = 1, 2
    script = "drawing.voxels.fill(0, 0, 3); drawing.record(drawing.voxels, (before) => before === 1);"
    assert page.voxels(script, labels)[:3, 0, 0].tolist() == [0, 2, 0]
