"""Streaming blend: comparison with MONAI and with a dense blend, windows of air, and lack of memory."""

from __future__ import annotations

import itertools
import logging
from typing import Any

import numpy as np
import pytest
import torch
from doubles.errors import refused
from doubles.session import FakeSession, joined, padded, scan, streamed
from doubles.storages import LiveStorage
from monai.data.utils import compute_importance_map
from monai.inferers import sliding_window_inference
from numpy.typing import NDArray
from torch import Tensor, nn

from fseft_edge.runtime.encoder.streaming import stream_features
from fseft_edge.runtime.encoder.windows import WindowLayout
from fseft_edge.runtime.errors import OutOfMemoryError, OutOfSpaceError


def dense_blend(image: NDArray[np.float32], layout: WindowLayout, session: FakeSession, level: int) -> NDArray[Any]:
    """Return ``Σ w f / Σ w`` computed over the whole grid at once, in float64."""
    stride, channels = session.levels[level].stride, session.levels[level].channels
    x, y, z = (size // stride for size in layout.window)
    importance = compute_importance_map(layout.window, mode="gaussian", sigma_scale=0.125).double().numpy()
    importance = importance.reshape(x, stride, y, stride, z, stride).mean(axis=(1, 3, 5))
    total = np.zeros((channels, *(size // stride for size in layout.padded_shape)))
    weight = np.zeros(total.shape[1:])
    source = padded(image, layout)
    for corner in itertools.product(*layout.origins):
        box = tuple(slice(origin, origin + size) for origin, size in zip(corner, layout.window, strict=True))
        target = tuple(slice(part.start // stride, part.stop // stride) for part in box)
        total[:, *target] += importance * session.encode(source[box][None, None])[level][0].double().numpy()
        weight[target] += importance
    return total / weight


@pytest.mark.parametrize("overlap", [0.0, 0.25, 0.5, 0.75])
@pytest.mark.parametrize("shape", [(50, 33, 71), (20, 10, 9)])
def test_a_linear_head_on_blended_features_equals_monai_sliding_window_logits(
    shape: tuple[int, int, int], overlap: float
) -> None:
    session, image = FakeSession(), scan(shape)
    session.window = (32, 32, 32)
    layout = WindowLayout.plan(shape, session.window, 8, overlap)
    head = nn.Conv3d(3, 2, 1)
    logits = head(joined(streamed(image, layout, session))[0])
    expected = sliding_window_inference(
        padded(image, layout)[None, None],
        session.window,
        sw_batch_size=2,
        predictor=lambda windows: head(session.encode(windows)[0].clone()),
        overlap=overlap,
        mode="gaussian",
    )
    assert torch.allclose(logits, expected[0], atol=1e-5, rtol=0)


@pytest.mark.parametrize(("shape", "overlap"), [((50, 40, 71), 0.25), ((33, 16, 24), 0.5), ((40, 24, 130), 0.9)])
def test_every_level_equals_a_dense_blend(shape: tuple[int, int, int], overlap: float) -> None:
    session, image = FakeSession(), scan(shape)
    layout = WindowLayout.plan(shape, session.window, 8, overlap)
    for level, features in enumerate(joined(streamed(image, layout, session))):
        np.testing.assert_allclose(features.numpy(), dense_blend(image, layout, session, level), atol=1e-5)


def test_sections_tile_the_padded_grid_in_order() -> None:
    session, image = FakeSession(), scan((40, 20, 131))
    layout = WindowLayout.plan((40, 20, 131), session.window, 8)
    sections = streamed(image, layout, session)
    assert [section.z0 for section in sections] == [0, *(section.z1 for section in sections[:-1])]
    assert sections[-1].z1 == layout.padded_shape[2] == 136
    for section in sections:
        assert section.z0 % 8 == section.z1 % 8 == 0
        for level, features in zip(session.levels, section.levels, strict=True):
            width, height, depth = (
                size // level.stride for size in (*layout.padded_shape[:2], section.z1 - section.z0)
            )
            assert features.shape == (level.channels, width, height, depth)
            assert features.dtype == torch.float32
            assert features.is_contiguous()


def test_a_blend_of_constant_features_is_constant() -> None:
    class Constant(FakeSession):
        def encode(self, windows: Tensor) -> list[Tensor]:
            return [
                torch.full((len(windows), level.channels, *(size // level.stride for size in self.window)), 2.5)
                for level in self.levels
            ]

    layout = WindowLayout.plan((60, 50, 90), Constant.window, 8)
    for features in joined(streamed(scan((60, 50, 90)), layout, Constant())):
        assert torch.allclose(features, torch.tensor(2.5), rtol=1e-6)


def test_the_same_scan_gives_the_same_bits() -> None:
    image, layout = scan((40, 30, 90)), WindowLayout.plan((40, 30, 90), FakeSession.window, 8)
    once, again = (joined(streamed(image, layout, FakeSession())) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))


def test_every_slice_is_read_once_and_in_order() -> None:
    image, read = scan((20, 20, 100)), []

    def read_section(z0: int, z1: int) -> NDArray[np.float32]:
        read.extend(range(z0, z1))
        return image[:, :, z0:z1]

    layout = WindowLayout.plan((20, 20, 100), FakeSession.window, 8)
    list(stream_features(read_section, layout, FakeSession()))
    assert read == list(range(100))


def test_memory_does_not_grow_with_the_scans_length() -> None:
    def peak(length: int) -> int:
        image, session = scan((48, 32, length)), FakeSession()
        layout = WindowLayout.plan((48, 32, length), session.window, 8)
        with LiveStorage() as live:
            # A copy is passed, because the storage of a view counts as the whole image.
            for _section in stream_features(lambda z0, z1: image[:, :, z0:z1].copy(), layout, session):
                pass
        return live.peak

    blend = 4 * 48 * 32 * 24 * (3 + 4 / 8 + 5 / 512)  # bytes of Σ w f of one window depth
    assert blend < peak(120) == peak(240)


class CountingSession(FakeSession):
    """A session that records the sizes of the batches."""

    def __init__(self, max_batch: int = 3) -> None:
        super().__init__(max_batch)
        self.batches: list[int] = []

    def encode(self, windows: Tensor) -> list[Tensor]:
        self.batches.append(len(windows))
        return super().encode(windows)


def scan_in_air(shape: tuple[int, int, int]) -> NDArray[np.float32]:
    """Return a scan with an object in the middle and air around it."""
    image = np.zeros(shape, np.float32)
    image[40:70, 20:30, 30:60] = scan((30, 10, 30))
    return image


@pytest.mark.parametrize("max_batch", [1, 3])
def test_windows_of_air_are_encoded_once_and_change_no_bit(max_batch: int, caplog: pytest.LogCaptureFixture) -> None:
    shape = (110, 50, 100)
    image, layout = scan_in_air(shape), WindowLayout.plan(shape, FakeSession.window, 8)
    session = CountingSession(max_batch)
    with caplog.at_level(logging.INFO):
        features = joined(streamed(image, layout, session))
    corners = list(itertools.product(*layout.origins))
    source = padded(image, layout)
    filled = [
        bool(source[tuple(slice(o, o + size) for o, size in zip(corner, layout.window, strict=True))].any())
        for corner in corners
    ]
    assert 0 < sum(filled) < len(corners) / 2
    assert f"{len(corners) - sum(filled)} of {len(corners)} windows" in caplog.text
    assert sum(session.batches) == sum(filled) + max_batch  # and one batch of air
    # With the smallest positive number, a window is not air, but the number has no effect in sums.
    almost = joined(streamed(np.maximum(image, np.float32(1e-45)), layout, FakeSession(max_batch)))
    for found, expected in zip(features, almost, strict=True):
        if max_batch == 1:
            assert torch.equal(found, expected)
        else:  # batches of other sizes may give other rounding errors
            torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("place", ["memory", "disk"])
@pytest.mark.parametrize("section_slices", [16, 8, 1])
def test_place_of_the_sums_and_thickness_of_sections_change_no_bit(place: Any, section_slices: int) -> None:
    image = scan((60, 40, 90))
    layout = WindowLayout.plan(image.shape, FakeSession.window, 8)
    expected = joined(streamed(image, layout, FakeSession()))
    sections = streamed(image, layout, FakeSession(), place=place, section_slices=section_slices)
    assert max(section.z1 - section.z0 for section in sections) == max(section_slices, 8)
    for found, reference in zip(joined(sections), expected, strict=True):
        assert torch.equal(found, reference)


class LimitedSession(FakeSession):
    """A session that runs out of memory for more than ``fits`` windows, and in the first ``failing_calls`` calls."""

    def __init__(self, error: Exception, fits: int, failing_calls: int = 0, max_batch: int = 4) -> None:
        super().__init__(max_batch)
        self._error, self._fits, self._failing_calls, self._calls = error, fits, failing_calls, 0

    def encode(self, windows: Tensor) -> list[Tensor]:
        self._calls += 1
        if len(windows) > self._fits or self._calls <= self._failing_calls:
            raise self._error
        return super().encode(windows)


ERRORS = {
    "numpy": MemoryError("Unable to allocate 4.00 GiB"),
    "a GPU": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.50 GiB."),
    "PyTorch on a CPU": RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory"),
    "oneDNN": RuntimeError("std::bad_alloc"),
    "ONNX Runtime": RuntimeError("bfc_arena.cc:376 Failed to allocate memory for requested buffer of size 1"),
}


@pytest.mark.parametrize("error", ERRORS.values(), ids=ERRORS.keys())
def test_fewer_windows_are_encoded_at_a_time_if_memory_runs_out(
    error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    image = scan((60, 40, 90))
    layout = WindowLayout.plan(image.shape, FakeSession.window, 8)
    features = joined(streamed(image, layout, LimitedSession(error, fits=1)))
    for found, expected in zip(features, joined(streamed(image, layout, FakeSession(1))), strict=True):
        assert torch.equal(found, expected)
    (warning,) = (record for record in caplog.records if record.levelno == logging.WARNING)
    assert "1 window at a time" in warning.getMessage()


def test_the_sums_move_to_disk_if_memory_runs_out_for_one_window(caplog: pytest.LogCaptureFixture) -> None:
    image = scan((60, 40, 90))
    layout = WindowLayout.plan(image.shape, FakeSession.window, 8)
    session = LimitedSession(MemoryError(), fits=1, failing_calls=1, max_batch=1)
    features = joined(streamed(image, layout, session))
    for found, expected in zip(features, joined(streamed(image, layout, FakeSession(1))), strict=True):
        assert torch.equal(found, expected)
    (warning,) = (record for record in caplog.records if record.levelno == logging.WARNING)
    assert "in a temporary file" in warning.getMessage()


def test_running_out_of_memory_is_an_error_if_the_work_cannot_be_reduced() -> None:
    image = scan((60, 40, 90))
    layout = WindowLayout.plan(image.shape, FakeSession.window, 8)
    with refused(OutOfMemoryError):
        streamed(image, layout, LimitedSession(MemoryError(), fits=0))


def test_other_errors_are_not_treated_as_a_lack_of_memory() -> None:
    image = scan((60, 40, 90))
    layout = WindowLayout.plan(image.shape, FakeSession.window, 8)
    with pytest.raises(RuntimeError, match="illegal instruction"):
        streamed(image, layout, LimitedSession(RuntimeError("illegal instruction"), fits=0))


def test_sums_that_do_not_fit_in_memory_start_on_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    image = scan((60, 40, 90))
    layout = WindowLayout.plan(image.shape, FakeSession.window, 8)
    expected = joined(streamed(image, layout, FakeSession()))
    zeros, refusals = torch.zeros, []

    def full(*size: Any, **options: Any) -> Tensor:
        if len(size) == 1 and len(size[0]) == 4:  # the sums of a level
            refusals.append(size)
            raise RuntimeError("can't allocate memory")
        return zeros(*size, **options)

    monkeypatch.setattr(torch, "zeros", full)
    features = joined(streamed(image, layout, FakeSession()))
    assert len(refusals) == 1
    for found, reference in zip(features, expected, strict=True):
        assert torch.equal(found, reference)


def test_a_full_disk_is_an_error_with_a_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", full)
    layout = WindowLayout.plan((60, 40, 90), FakeSession.window, 8)
    with refused(OutOfSpaceError) as caught:
        streamed(scan((60, 40, 90)), layout, FakeSession(), place="disk")
    assert "TMPDIR" in caught.value.remedy
