"""Masks that are corrected in a real browser: where drawn voxels arrive, and that no stroke is lost."""

from __future__ import annotations

import contextlib
import errno
import itertools
import multiprocessing
import re
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from doubles.browser import Tab
from doubles.encoder import write_tiny_encoder
from doubles.reviewed import Batch, run_batch, stored
from doubles.reviewer import served
from numpy.typing import NDArray

from fseft_edge.adaptation.adapt import adapt
from fseft_edge.adaptation.training import TrainingSettings
from fseft_edge.adapters.network import AdapterSettings
from fseft_edge.masks.result import SegmentedOrgan
from fseft_edge.outbox.accepted_masks import ReviewedBatch
from fseft_edge.outbox.content_key import content_key
from fseft_edge.outbox.records import CaseState, Decision
from fseft_edge.outbox.store import BatchStore, Outcome, StageSeconds, state_path
from fseft_edge.review.server import open_review
from fseft_edge.runtime.encoder.bundle import sha256_of_file
from fseft_edge.runtime.scans.nifti import read_ct, read_label_map, write_ct, write_label_map
from fseft_edge.runtime.scans.organs import OrganLabel
from fseft_edge.runtime.scans.volume import LabelMap, Volume

pytestmark = pytest.mark.browser

CORRECTED = ".corrected.nii.gz"
SPLEEN, LIVER = 1, 2  # label values
SMALL = {"width": 1200, "height": 420}  # WebGL on a CPU takes its time for every pixel

ORDERS = [
    "".join(directions)
    for axes in itertools.permutations(("RL", "AP", "SI"))
    for directions in itertools.product(*axes)
]
"""The 48 ways to store the voxels of a scan, as nibabel names them."""


def labels_in(path: Path) -> NDArray[np.unsignedinteger]:
    return np.asarray(read_label_map(path).array)


def drag(tab: Tab, *points: tuple[float, float]) -> None:
    """Drag with the left button between points of the canvas, in shares of its width and height."""
    box = tab.page.locator("#canvas").bounding_box()
    places = [(box["x"] + x * box["width"], box["y"] + y * box["height"]) for x, y in points]
    tab.page.mouse.move(*places[0])
    tab.page.mouse.down()
    for place in places[1:]:
        tab.page.mouse.move(*place, steps=3)
    tab.page.mouse.up()


def opened(tab: Tab, address: str, key: str) -> None:
    tab.page.set_viewport_size(SMALL)
    tab.page.goto(address)
    tab.shown(key)


def saved(tab: Tab) -> None:
    """Save with the keyboard, and wait until the server has the correction."""
    tab.page.keyboard.press("s")
    tab.wait("#unsaved:text-is('')")


def one_organ_in_all_orders(root: Path) -> Batch:
    """Write a batch of one tiny scan in all 48 orders. Every voxel has its own HU, which tells which voxel it is."""
    shape = (11, 10, 9)
    hu = np.random.default_rng(0).permutation(np.arange(np.prod(shape), dtype=np.int16) - 400).reshape(shape)
    labels = np.zeros(shape, np.uint8)
    labels[3:8, 4:8, 2:5] = 7
    affine = np.array([[4.0, 0.0, 0.0, -30.0], [0.0, 3.0, 0.0, 12.0], [0.0, 0.0, 5.0, 90.0], [0.0, 0.0, 0.0, 1.0]])
    batch = Batch(root, [])
    with BatchStore(state_path(batch.outbox), create=True) as store:
        for order in ORDERS:
            source = root / "inbox" / f"{order}.nii.gz"
            write_ct(source, Volume(*stored(hu, affine, order)))
            key = content_key(source)
            store.add(source, "", key)
            store.start(key)
            write_label_map(batch.mask(key), LabelMap(*stored(labels, affine, order)), {7: "liver"})
            batch.mask(key, ".json").write_text('{"organs": [{"name": "liver", "label": 7}]}')
            organ = SegmentedOrgan("liver", 7, 3.6, ())
            store.end(key, Outcome(CaseState.DONE, (organ,), StageSeconds(1.0, 2.0, 3.0)))
            batch.keys.append(key)
    return batch


def test_a_drawn_voxel_arrives_at_its_place_in_all_48_orders_of_axes(tmp_path: Path, tab: Tab) -> None:
    """The page shows the HU of the voxel below the pen. Only the voxel with this HU differs in the saved mask."""
    batch = one_organ_in_all_orders(tmp_path)
    assert len(set(batch.keys)) == 48
    with served(batch.outbox) as reviewer:
        opened(tab, reviewer.server.address, batch.keys[0])
        for _ in range(6):
            tab.page.keyboard.press("[")  # the radius becomes 0 mm, which is one voxel
        shown = {}
        for key in batch.keys:
            tab.shown(key)
            tab.page.keyboard.press("b")
            drag(tab, (0.085, 0.3))
            tab.wait("#unsaved:text-is('Strokes are not saved.')")
            shown[key] = int(re.search(r"(-?\d+) HU", tab.text("#position"))[1])
            saved(tab)
            tab.page.keyboard.press("n")
    for order, key in zip(ORDERS, batch.keys, strict=True):
        before, after = read_label_map(batch.mask(key)), read_label_map(batch.mask(key, CORRECTED))
        changed = before.array != after.array
        assert np.asarray(read_ct(batch.source(key)).array)[changed].tolist() == [shown[key]], order
        assert after.array[changed] == 7
        np.testing.assert_array_equal(after.affine, before.affine)
    assert len(set(shown.values())) == 1  # the display is the same for every order
    assert tab.problems == []


@pytest.fixture
def batch(tmp_path: Path) -> Batch:
    return run_batch(tmp_path / "batch", (1,))


def test_a_mask_is_drawn_with_mouse_and_keyboard_saved_accepted_and_learned_from(
    batch: Batch, tab: Tab, tmp_path: Path
) -> None:
    (key,) = batch.keys
    draft, original = labels_in(batch.mask(key)), batch.mask(key).read_bytes()
    with served(batch.outbox, reviewer="Bo Li") as reviewer:
        opened(tab, reviewer.server.address, key)
        assert tab.page.is_disabled("#save")
        tab.page.keyboard.press("b")
        tab.page.keyboard.press("2")  # the liver
        drag(tab, (0.25, 0.3), (0.3, 0.5), (0.35, 0.5))
        tab.wait("#unsaved:text-is('Strokes are not saved.')")
        tab.page.keyboard.press("Control+z")
        assert tab.page.is_disabled("#save")
        tab.page.keyboard.press("y")
        for refuses in ("a", "r", "n"):
            tab.page.keyboard.press(refuses)
            assert "strokes that are not saved" in tab.text("#message")
        saved(tab)
        drawn = labels_in(batch.mask(key, CORRECTED))
        assert np.count_nonzero(drawn != draft) > 5
        assert set(drawn[drawn != draft]) == {LIVER}

        tab.page.keyboard.press("1")
        tab.page.click("#organs button:has-text('liver')")
        assert tab.page.input_value("#pen") == "liver"
        tab.page.keyboard.press("e")  # the eraser takes nothing from the spleen
        drag(tab, (0.1, 0.5), (0.55, 0.5))
        saved(tab)
        erased = labels_in(batch.mask(key, CORRECTED))
        assert np.count_nonzero(erased != drawn) > 10
        assert set(drawn[erased != drawn]) == {LIVER}
        assert set(erased[erased != drawn]) == {0}

        tab.page.keyboard.press("f")  # a filled outline
        drag(tab, (0.2, 0.35), (0.3, 0.35), (0.3, 0.6), (0.2, 0.6), (0.2, 0.35))
        saved(tab)
        filled = labels_in(batch.mask(key, CORRECTED))
        assert np.count_nonzero(filled != erased) > 20
        assert set(filled[filled != erased]) == {LIVER}

        drag(tab, (0.2, 0.2), (0.3, 0.2), (0.3, 0.3))
        tab.wait("#unsaved:text-is('Strokes are not saved.')")
        tab.page.on("dialog", lambda dialog: dialog.accept())
        tab.page.click("#discard")
        tab.wait("#unsaved:text-is('')")

        tab.page.keyboard.press("a")
        tab.wait("#decided:has-text('accepted')")
        what = [line.partition(" ")[0] for line in tab.text("#history").splitlines()]
        assert what == ["accepted", "corrected", "corrected", "corrected"]
        assert "by Bo Li" in tab.text("#history")
        tab.page.reload()
        tab.shown(key)
        assert tab.text("#decided") == "accepted"  # the corrected mask, which is displayed again
        assert "This is the corrected mask." in tab.text("#warnings")
    assert batch.mask(key).read_bytes() == original
    with batch.store() as store:
        case = store.case(key)
    assert (case.review.decision, case.review.mask_sha256) == (
        Decision.ACCEPTED,
        sha256_of_file(batch.mask(key, CORRECTED)),
    )
    assert [one.reviewer for one in case.corrections] == ["Bo Li"] * 3
    made = adapt(
        write_tiny_encoder(tmp_path / "tiny.encoder").path,
        None,
        None,
        [OrganLabel("liver", 6)],
        tmp_path / "liver.adapter",
        reviewed=ReviewedBatch(batch.outbox),
        settings=AdapterSettings(method="linear", levels="finest"),
        training=TrainingSettings(block=16, variations=0, linear_blocks=2),
        validate=False,
        device="cpu",
        backend="torch",
    )
    volume = np.count_nonzero(filled == LIVER) * 6.0**3 / 1000
    assert made.description.organs[0].support_volumes_ml == pytest.approx([volume])
    assert case.corrections[-1].organs[1].volume_ml == pytest.approx(volume)
    assert tab.problems == []


def with_stroke(tab: Tab, address: str, key: str, height: float = 0.4) -> None:
    """Open a case and draw a stroke of the liver that is not saved."""
    opened(tab, address, key)
    tab.page.keyboard.press("b")
    tab.page.keyboard.press("2")
    drag(tab, (0.42, height), (0.55, height))
    tab.wait("#unsaved:text-is('Strokes are not saved.')")


@contextlib.contextmanager
def process_serving(outbox: Path, port: int) -> Iterator[tuple[multiprocessing.Process, str]]:
    """Serve a review in another process; yield the process, which may be killed, and the address."""
    ours, theirs = multiprocessing.Pipe()

    def serve() -> None:
        with open_review(outbox, port=port) as server:
            theirs.send(server.address)
            server.serve_forever()

    process = multiprocessing.get_context("fork").Process(target=serve, daemon=True)
    process.start()
    try:
        yield process, str(ours.recv())
    finally:
        process.kill()
        process.join()


def test_a_killed_server_loses_no_stroke(batch: Batch, tab: Tab) -> None:
    (key,) = batch.keys
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = int(listening.getsockname()[1])
    with process_serving(batch.outbox, port) as (killed, address):
        with_stroke(tab, address, key)
        killed.kill()
        killed.join()
    tab.page.keyboard.press("s")
    tab.wait('#message:has-text("was not saved")')
    assert f"--port {port}" in tab.text("#message")
    assert not batch.mask(key, CORRECTED).exists()
    with process_serving(batch.outbox, port) as (_, address):
        other = tab.page.context.new_page()  # another tab of the same browser
        other.goto(address)
        other.wait_for_selector("#cases button")
        saved(tab)
        assert not tab.page.is_visible("#message")
        tab.page.keyboard.press("a")
        tab.wait("#decided:has-text('accepted')")
    assert np.count_nonzero(labels_in(batch.mask(key, CORRECTED)) != labels_in(batch.mask(key))) > 5


def test_a_full_disk_loses_no_stroke(batch: Batch, tab: Tab, monkeypatch: pytest.MonkeyPatch) -> None:
    (key,) = batch.keys
    files = sorted(batch.mask(key).parent.iterdir())

    def full(path: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    with served(batch.outbox) as reviewer:
        with_stroke(tab, reviewer.server.address, key)
        with monkeypatch.context() as disk:
            disk.setattr("fseft_edge.runtime.system.atomic._flush", full)
            tab.page.keyboard.press("s")
            tab.wait('#message:has-text("the disk is full")')
        assert "Your strokes are still in this page." in tab.text("#message")
        assert sorted(batch.mask(key).parent.iterdir()) == files
        saved(tab)
    with batch.store() as store:
        assert len(store.case(key).corrections) == 1
    assert np.count_nonzero(labels_in(batch.mask(key, CORRECTED)) != labels_in(batch.mask(key))) > 5


def test_two_browsers_lose_no_stroke_and_a_page_with_strokes_warns_before_it_closes(
    batch: Batch, new_tab: Callable[[], Tab]
) -> None:
    (key,) = batch.keys
    first, second = new_tab(), new_tab()
    with served(batch.outbox, reviewer="Bo Li") as reviewer:
        with_stroke(first, reviewer.server.address, key, 0.4)
        with_stroke(second, reviewer.server.address, key, 0.6)
        saved(first)
        one = labels_in(batch.mask(key, CORRECTED))
        second.page.keyboard.press("s")
        second.wait('#message:has-text("has changed")')
        assert "Bo Li saved another correction" in second.text("#message")
        np.testing.assert_array_equal(labels_in(batch.mask(key, CORRECTED)), one)
        asked: list[str] = []
        second.page.on("dialog", lambda dialog: (asked.append(dialog.type), dialog.dismiss()))
        second.page.close(run_before_unload=True)
        second.page.wait_for_timeout(300)
        assert asked == ["beforeunload"]
        second.page.click("#redraw")
        second.wait('#message:has-text("Your strokes are on the changed mask now.")')
        saved(second)
    both, draft = labels_in(batch.mask(key, CORRECTED)), labels_in(batch.mask(key))
    changed = one != draft
    np.testing.assert_array_equal(both[changed], one[changed])
    assert np.count_nonzero(both != one) > 5


def test_a_mask_with_more_than_255_organs_is_not_drawn_on(batch: Batch, tab: Tab) -> None:
    (key,) = batch.keys
    many = tuple(SegmentedOrgan(f"organ_{label}", label, 1.0, ()) for label in range(1, 257))
    with batch.store() as store:
        store.end(key, Outcome(CaseState.DONE, many))
    with served(batch.outbox) as reviewer:
        opened(tab, reviewer.server.address, key)
        assert not tab.page.is_visible("#correct")
        assert "at most 255" in tab.text("#warnings")
        tab.page.keyboard.press("b")
        drag(tab, (0.3, 0.4), (0.35, 0.4))
        assert tab.text("#unsaved") == ""


def test_a_mask_with_voxels_of_no_organ_is_not_drawn_on(batch: Batch, tab: Tab) -> None:
    (key,) = batch.keys
    with batch.store() as store:
        store.end(key, Outcome(CaseState.DONE, store.case(key).organs[:1]))
    with served(batch.outbox) as reviewer:
        opened(tab, reviewer.server.address, key)
        tab.page.keyboard.press("b")
        tab.wait('#message:has-text("label value 2, which is no organ")')
        drag(tab, (0.3, 0.4), (0.35, 0.4))
        assert tab.text("#unsaved") == ""
        assert tab.problems == []
