"""Encoding of whole scans in one pass: the same features under every plan, and lack of memory."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from doubles.encoder import scan, write_tiny_encoder
from doubles.errors import refused

from fseft_edge.runtime.encoder.backends.pytorch import inference_network
from fseft_edge.runtime.encoder.bundle import EncoderBundle
from fseft_edge.runtime.encoder.encoding import encode_scan, planned_encoding
from fseft_edge.runtime.encoder.feature_map import Features
from fseft_edge.runtime.encoder.feature_store import FeatureStore
from fseft_edge.runtime.encoder.networks import rolling
from fseft_edge.runtime.encoder.session import open_session
from fseft_edge.runtime.encoder.whole_scan import WholeScanPlan, stream_whole_scan, whole_scan_plans
from fseft_edge.runtime.errors import OutOfMemoryError, OutOfSpaceError
from fseft_edge.runtime.scans.grid import Grid
from fseft_edge.runtime.system.memory import AS_MUCH_AS_IS_FREE, GB, Budget, Footprint


@pytest.fixture
def bundle(tmp_path: Path) -> EncoderBundle:
    return write_tiny_encoder(tmp_path / "tiny.encoder", whole_scan=True)


def encoded(bundle: EncoderBundle, store: Path, budget: Budget = AS_MUCH_AS_IS_FREE) -> Features:
    with open_session(bundle, device="cpu", backend="torch") as session:
        return encode_scan(
            scan(1).volume, bundle=bundle, session=session, store=FeatureStore(store), budget=budget
        ).features


def everything(features: Features) -> Iterator[torch.Tensor]:
    """Yield all features of each level."""
    for level in range(len(features.levels)):
        x, y, z = ((0, size) for size in features.meta.level_shape(level))
        yield features.read(level, x, y, z)


def assert_same(first: Features, second: Features) -> None:
    for a, b in zip(everything(first), everything(second), strict=True):
        assert torch.equal(a, b)


def test_features_are_those_of_the_network_on_the_grid(bundle: EncoderBundle, tmp_path: Path) -> None:
    volume = scan(1).volume
    grid = Grid.of(volume, bundle.preprocessing)
    features = encoded(bundle, tmp_path / "store")
    assert features.padded_shape == features.shape == grid.shape
    image = torch.from_numpy(grid.section(volume, 0, grid.shape[2]))
    with torch.no_grad():
        expected = inference_network(bundle.network(), whole_scan=True)(image[None, None])
    for level, found in zip(expected, everything(features), strict=True):
        np.testing.assert_allclose(found.numpy(), level[0].numpy(), rtol=2e-3, atol=1e-3)


def test_every_plan_gives_the_same_map_bit_for_bit(bundle: EncoderBundle, tmp_path: Path) -> None:
    ample = encoded(bundle, tmp_path / "ample")
    with open_session(bundle, device="cpu", backend="torch") as session:
        plans = list(whole_scan_plans(ample.shape, session))
    assert {plan.on_disk for plan in plans} == {False, True}
    for number, plan in enumerate(plans):
        budget = Budget(ram=plan.footprint.ram + GB // 50)
        assert_same(encoded(bundle, tmp_path / str(number), budget), ample)


def test_a_budget_that_is_too_small_states_what_is_needed(bundle: EncoderBundle) -> None:
    grid = Grid.of(scan(1).volume, bundle.preprocessing)
    with open_session(bundle, device="cpu", backend="torch") as session:
        with refused(OutOfMemoryError, "encoding this scan") as caught:
            planned_encoding(grid, bundle, session, Budget(ram=1))
        assert "--memory" in caught.value.remedy
        enough = Budget(ram=caught.value.least)
        planned_encoding(grid, bundle, session, enough)


def test_cached_features_from_windows_are_not_used_and_this_is_said(
    bundle: EncoderBundle, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    windowed = write_tiny_encoder(tmp_path / "windows.encoder")
    assert bundle.id_with_windows == windowed.encoder_id != bundle.encoder_id
    store = tmp_path / "store"
    encoded(windowed, store)
    with caplog.at_level(logging.WARNING):
        encoded(bundle, store)
        assert "from windows" in caplog.text
        caplog.clear()
        encoded(bundle, store)
        encoded(windowed, store)
    assert caplog.text == ""
    assert len(list(store.glob("*/entry"))) == 2


def failing_convolution(monkeypatch: pytest.MonkeyPatch, error: Exception, times: int) -> None:
    """Make the last convolutions of a pass fail."""
    convolution, left = rolling._PlaneConvolution.forward, [60, times]

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        left[0] -= 1
        if left[0] < 0 < left[1]:
            left[:] = [60, left[1] - 1]
            raise error
        return convolution(self, x)

    monkeypatch.setattr(rolling._PlaneConvolution, "forward", forward)


def test_the_pass_begins_again_with_temporary_files_if_memory_runs_out(
    bundle: EncoderBundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    expected = encoded(bundle, tmp_path / "ample")
    failing_convolution(monkeypatch, MemoryError(), 1)
    with caplog.at_level(logging.WARNING):
        assert_same(encoded(bundle, tmp_path / "again"), expected)
    assert "temporary files" in caplog.text


def test_running_out_of_memory_with_temporary_files_is_an_error(
    bundle: EncoderBundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing_convolution(monkeypatch, MemoryError(), 2)
    with refused(OutOfMemoryError):
        encoded(bundle, tmp_path / "store")
    assert not list((tmp_path / "store").glob("*/entry"))


def test_other_errors_are_not_treated_as_a_lack_of_memory(
    bundle: EncoderBundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing_convolution(monkeypatch, ValueError("another reason"), 1)
    with pytest.raises(ValueError, match="another reason"):
        encoded(bundle, tmp_path / "store")


def test_a_full_disk_is_an_error_with_a_remedy(bundle: EncoderBundle, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", full)
    plan = WholeScanPlan(on_disk=True, section_slices=8, footprint=Footprint(0))
    with open_session(bundle, device="cpu", backend="torch") as session, refused(OutOfSpaceError, "temporary folder"):
        next(
            stream_whole_scan(lambda start, stop: np.zeros((8, 8, stop - start), np.float32), (8, 8, 8), session, plan)
        )
