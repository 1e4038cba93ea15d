"""The locator: learned from few scans, tuned to miss nothing, and honest about what it missed."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import cast

import numpy as np
import pytest
import torch
from doubles.encoder import write_tiny_encoder
from doubles.features import MemoryFeatures
from doubles.scans import SHAPE, ball, scan_with_organ

from fseft_edge.adaptation import locator as under_test
from fseft_edge.adaptation.block_sampling import SupportScan
from fseft_edge.adaptation.locator import (
    CoarseScan,
    TrainedLocator,
    is_worthwhile,
    locate,
    on_grid,
    train_locator,
    windows_over,
)
from fseft_edge.adaptation.soft_labels import Occupancy
from fseft_edge.adaptation.training import TrainingSettings
from fseft_edge.adapters.blocks import Box
from fseft_edge.adapters.file import LocatorDescription
from fseft_edge.masks.region import clipped
from fseft_edge.runtime.encoder.bundle import EncoderBundle, WholeScan
from fseft_edge.runtime.encoder.encoding import EncodedScan
from fseft_edge.runtime.encoder.windows import WindowLayout
from fseft_edge.runtime.scans.grid import Grid
from fseft_edge.runtime.scans.preprocessing import Preprocessing
from fseft_edge.runtime.scans.volume import Volume

SPACING = 4.0
TRAINING = TrainingSettings(seed=3, linear_blocks=6)


def grid_of(spacing: float, axcodes: str = "RAS") -> Grid:
    """Return a grid of the scan that the double's feature maps belong to."""
    volume = Volume(np.zeros(SHAPE, np.int16), np.diag([SPACING, SPACING, SPACING, 1.0]))
    return Grid.of(volume, Preprocessing(axcodes=axcodes, spacing=(spacing,) * 3))


def coarse_scan(seed: int, **changes: object) -> CoarseScan:
    scan = replace(scan_with_organ(seed), grid=grid_of(SPACING), **changes)  # type: ignore[arg-type]  # any field
    fine = grid_of(2.0)
    return CoarseScan(scan, fine, WindowLayout.plan(fine.shape, (32, 32, 32), 8))


@pytest.fixture(scope="module")
def coarse(tmp_path_factory: pytest.TempPathFactory) -> EncoderBundle:
    return write_tiny_encoder(tmp_path_factory.mktemp("coarse") / "coarse.encoder")


def trained(coarse: EncoderBundle, scans: list[CoarseScan], groups: list[int] | None = None) -> TrainedLocator | None:
    organs = len(scans[0].scan.annotated)
    return train_locator(
        scans,
        ["ball", "other"][:organs],
        [None] * organs,
        coarse=coarse,
        reach=lambda box: box,
        groups=groups or list(range(len(scans))),
        training=TRAINING,
    )


@pytest.fixture(scope="module")
def four(coarse: EncoderBundle) -> TrainedLocator:
    found = trained(coarse, [coarse_scan(seed) for seed in range(4)])
    assert found is not None
    return found


def contains(boxes: tuple[Box, ...], seed: int) -> bool:
    """Return whether boxes of the fine grid contain the ball of a scan."""
    x, y, z = (2 * along for along in np.nonzero(ball(seed)))
    return any(
        all(
            low <= along.min() and along.max() + 1 < high
            for along, (low, high) in zip((x, y, z), box.ranges, strict=True)
        )
        for box in boxes
    )


def test_a_new_scan_is_located_without_most_of_the_scan(four: TrainedLocator) -> None:
    new = coarse_scan(9)
    assert new.scan.grid is not None
    found = locate(four.locator, EncodedScan(new.scan.grid, new.scan.features), new.grid)
    assert found.missing == ()
    assert contains(found.boxes, 9)
    assert sum(np.prod(box.shape) for box in found.boxes) < 0.4 * np.prod(new.grid.shape)


def test_the_description_states_recall_and_share_of_the_left_out_scans(
    four: TrainedLocator, coarse: EncoderBundle
) -> None:
    described: LocatorDescription = four.locator.description
    assert described.encoder_id == coarse.encoder_id
    assert [organ.name for organ in described.organs] == ["ball"]
    assert described.organs[0].recall == (1.0,) * 4
    assert described.organs[0].margin_mm >= 6.0
    assert len(described.selected) == 4
    for index, (boxes, share) in enumerate(zip(four.left_out, described.selected, strict=True)):
        assert boxes is not None
        assert contains(boxes, index)
        layout = coarse_scan(index).layout
        assert share == round(windows_over(layout, boxes) / layout.windows, 4)


def test_the_same_scans_give_the_same_locator(four: TrainedLocator, coarse: EncoderBundle) -> None:
    again = trained(coarse, [coarse_scan(seed) for seed in range(4)])
    assert again is not None
    assert again.locator.description == four.locator.description
    assert again.left_out == four.left_out
    for one, other in zip(again.locator.adapter.parameters(), four.locator.adapter.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_locator_that_misses_an_organ_in_a_left_out_scan_is_not_used(
    coarse: EncoderBundle, caplog: pytest.LogCaptureFixture
) -> None:
    """The annotation of one scan lies elsewhere than the organ that its features show."""
    wrong = coarse_scan(3, occupancy=Occupancy([np.roll(ball(3), (-18, -12, 20), (0, 1, 2))]))
    with caplog.at_level(logging.WARNING):
        assert trained(coarse, [*(coarse_scan(seed) for seed in range(3)), wrong]) is None
    assert "ball" in caplog.text
    assert "wrong place" in caplog.text


def test_an_organ_without_a_place_is_named(four: TrainedLocator) -> None:
    new = coarse_scan(9)
    assert new.scan.grid is not None
    levels = cast("MemoryFeatures", new.scan.features).tensors
    nothing = MemoryFeatures(tuple(torch.full_like(level, -5.0) for level in levels))
    found = locate(four.locator, EncodedScan(new.scan.grid, cast("SupportScan", nothing)), new.grid)  # type: ignore[arg-type]  # a double
    assert found.missing == ("ball",)
    assert found.boxes == ()


def test_a_locator_that_selects_nearly_all_windows_is_dropped(
    coarse: EncoderBundle, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(under_test, "_MOST_SELECTED", 0.01)
    with caplog.at_level(logging.WARNING):
        assert trained(coarse, [coarse_scan(seed) for seed in range(2)]) is None
    assert "of the windows" in caplog.text


def test_a_locator_needs_two_groups_for_each_organ(coarse: EncoderBundle, caplog: pytest.LogCaptureFixture) -> None:
    scans = [coarse_scan(seed) for seed in range(3)]
    with caplog.at_level(logging.WARNING):
        assert trained(coarse, scans, groups=[0, 0, 0]) is None
    assert "two patients" in caplog.text
    two = [
        replace(
            one, scan=replace(one.scan, occupancy=Occupancy([ball(k), ball(k)]), annotated=np.array([True, k == 0]))
        )
        for k, one in enumerate(scans)
    ]
    assert trained(coarse, two) is None


@pytest.mark.parametrize("axcodes", ["RAS", "LPS", "SAR"])
@pytest.mark.parametrize("spacing", [1.5, 2.0, 7.0])
def test_a_place_on_another_grid_contains_the_same_part_of_the_scan(spacing: float, axcodes: str) -> None:
    coarse_grid, grid = grid_of(SPACING), grid_of(spacing, axcodes)
    place = Box((5, 9), (20, 22), (40, 48))
    box = on_grid(place, coarse_grid, grid, 10.0)
    assert box == clipped(box, Box(*((0, length) for length in grid.shape)))
    points = np.stack(np.meshgrid(*(np.arange(low, high) for low, high in place.ranges), indexing="ij"), -1).reshape(
        -1, 3
    )
    world = np.c_[points, np.ones(len(points))] @ coarse_grid.affine.T
    around = np.concatenate(
        [world + np.array([*offset, 0]) for offset in 9.0 * np.array([[1, 0, 0], [0, -1, 0], [0, 0, 1]])]
    )
    at = np.round((around @ np.linalg.inv(grid.affine).T)[:, :3]).astype(int)
    at = np.clip(at, 0, np.array(grid.shape) - 1)
    low, high = np.array(box.ranges).T
    assert (at >= low).all()
    assert (at < high).all()
    assert np.prod(box.shape) * spacing**3 < (16 + 20 + 16) * (8 + 20 + 16) * (32 + 20 + 16)


def test_only_an_encoder_with_costly_windows_gets_a_locator(
    coarse: EncoderBundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not is_worthwhile(coarse, 1000)
    monkeypatch.setattr(under_test, "_COARSE_COST", 1.0)
    assert is_worthwhile(coarse, 3)
    assert not is_worthwhile(coarse, 2)
    manifest = coarse.manifest.model_copy(update={"whole_scan": WholeScan(multiple=16, context=32)})
    assert not is_worthwhile(EncoderBundle(tmp_path, manifest), 1000)


def test_windows_are_counted_once() -> None:
    layout = WindowLayout.plan((80, 32, 32), (32, 32, 32), 8)
    assert layout.origins[0] == (0, 24, 48)
    box = Box((0, 8), (0, 8), (0, 8))
    assert windows_over(layout, [box]) == 1
    assert windows_over(layout, [box, Box((-4, 25), (0, 40), (-8, 8))]) == 2
    assert windows_over(layout, [Box((0, 80), (0, 1), (0, 1)), box]) == 3
