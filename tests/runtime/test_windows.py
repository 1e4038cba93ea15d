"""The window layout, and the streaming blend against MONAI and against a dense blend."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from monai.data.utils import compute_importance_map, dense_patch_slices
from monai.inferers import sliding_window_inference
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fseft_edge.runtime.errors import EncoderBundleError, UsageError
from fseft_edge.runtime.networks.base import FeatureLevel
from fseft_edge.runtime.windows import FeatureSection, WindowLayout, gaussian_importance, stream_features


class FakeSession:
    """An encoder session around two strided convolutions; zero padding makes its features depend on the window."""

    device = "cpu"
    window = (32, 16, 24)
    levels = (FeatureLevel(1, 3), FeatureLevel(2, 4), FeatureLevel(8, 5))

    def __init__(self, max_batch: int = 3) -> None:
        self.max_batch = max_batch
        with torch.random.fork_rng():
            torch.manual_seed(7)
            self._convolutions = [
                nn.Conv3d(1, level.channels, 2 * level.stride + 1, level.stride, level.stride) for level in self.levels
            ]

    @torch.inference_mode()
    def encode(self, windows: Tensor) -> list[Tensor]:
        assert windows.shape[1:] == (1, *self.window)
        assert len(windows) <= self.max_batch
        return [torch.relu(convolution(windows)) for convolution in self._convolutions]


def scan(shape: tuple[int, int, int], seed: int = 0) -> NDArray[np.float32]:
    return np.random.default_rng(seed).random(shape, dtype=np.float32)


def padded(image: NDArray[np.float32], layout: WindowLayout) -> Tensor:
    result = torch.zeros(layout.padded_shape)
    result[tuple(slice(size) for size in image.shape)] = torch.from_numpy(image)
    return result


def streamed(image: NDArray[np.float32], layout: WindowLayout, session: Any) -> list[FeatureSection]:
    return list(stream_features(lambda z0, z1: image[:, :, z0:z1], layout, session))


def joined(sections: list[FeatureSection]) -> list[Tensor]:
    return [torch.cat(pieces, dim=-1) for pieces in zip(*(section.levels for section in sections), strict=True)]


def dense_blend(image: NDArray[np.float32], layout: WindowLayout, session: FakeSession, level: int) -> NDArray[Any]:
    """``Σ w f / Σ w`` over the whole grid at once, in float64."""
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
    theirs = sliding_window_inference(
        padded(image, layout)[None, None],
        session.window,
        sw_batch_size=2,
        predictor=lambda windows: head(session.encode(windows)[0].clone()),
        overlap=overlap,
        mode="gaussian",
    )
    assert torch.allclose(logits, theirs[0], atol=1e-5, rtol=0)


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


def test_equal_features_stay_what_they_are() -> None:
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


class LiveStorage(TorchDispatchMode):
    """Follows every storage that an operation made, until it is freed; ``peak`` is the most bytes alive at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                self._alive[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self._alive = {key: item for key, item in self._alive.items() if not item[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self._alive.values()))
        return result


def test_memory_does_not_grow_with_the_scans_length() -> None:
    def peak(length: int) -> int:
        image, session = scan((48, 32, length)), FakeSession()
        layout = WindowLayout.plan((48, 32, length), session.window, 8)
        with LiveStorage() as live:
            # A copy: the storage of a view would count as large as the whole image.
            for _section in stream_features(lambda z0, z1: image[:, :, z0:z1].copy(), layout, session):
                pass
        return live.peak

    blend = 4 * 48 * 32 * 24 * (3 + 4 / 8 + 5 / 512)  # bytes of Σ w f of one window depth
    assert blend < peak(120) == peak(240)
