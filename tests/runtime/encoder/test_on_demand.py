"""Features on demand: equal to the whole scan bit for bit, parts that survive, damage, limits, lack of space.

Most tests use an encoder whose features depend on everything they may depend on: the position in the window, the other
windows of the batch and the size of the batch.
"""

from __future__ import annotations

import functools
import logging
import multiprocessing
import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from doubles.encoder import write_tiny_encoder
from doubles.errors import refused
from torch import Tensor

from fseft_edge.runtime.encoder import on_demand
from fseft_edge.runtime.encoder.backends.base import EncoderSession
from fseft_edge.runtime.encoder.bundle import BundleContents, EncoderBundle
from fseft_edge.runtime.encoder.encoding import encode_scan
from fseft_edge.runtime.encoder.encoding_plan import encoding_of
from fseft_edge.runtime.encoder.feature_frames import StorageType
from fseft_edge.runtime.encoder.feature_map import FeatureMap, Features, Ranges
from fseft_edge.runtime.encoder.feature_store import FeatureStore
from fseft_edge.runtime.encoder.networks import build_network
from fseft_edge.runtime.encoder.on_demand import FeaturesOnDemand, encode_on_demand
from fseft_edge.runtime.encoder.session import open_session
from fseft_edge.runtime.encoder.windows import WindowLayout
from fseft_edge.runtime.errors import EncoderBundleError, OutOfMemoryError, OutOfSpaceError
from fseft_edge.runtime.scans.preprocessing import Preprocessing
from fseft_edge.runtime.scans.volume import Volume
from fseft_edge.runtime.system.memory import Budget

SHAPE = (100, 60, 85)
"""Shape of the scan: 4 x 3 x 4 windows of 32 voxels, which lie 24 voxels apart or less."""

SMALL: Ranges = ((5, 12), (40, 44), (60, 66))
"""A box below few windows, none of which is air."""

EVERYTHING: Ranges = ((0, 1000), (-5, 1000), (0, 1000))


class ShiftySession(EncoderSession):
    """A session without a network, whose features change with the batch and the place of a window in the batch.

    Attributes:
        windows: number of windows that were encoded.
        fits: number of windows for which the memory is sufficient.
    """

    backend: ClassVar[str] = "torch"

    def __init__(self, bundle: EncoderBundle, max_batch: int, fits: int = 8) -> None:
        super().__init__(bundle, torch.device("cpu"), max_batch)
        self.windows = 0
        self.fits = fits

    def _encode_batch(self, windows: Tensor) -> list[Tensor]:
        if len(windows) > self.fits:
            raise MemoryError
        self.windows += len(windows)
        place = 1.0 + 0.01 * torch.arange(len(windows)) + 0.1 * len(windows) + windows.mean(dim=(0, 1, 2, 3, 4))
        ramp = torch.linspace(0.3, 1.7, self.window[0])[:, None, None] * torch.linspace(1.3, 0.6, self.window[2])
        seen = (windows + 0.25) * ramp * place[:, None, None, None, None]
        return [
            F.avg_pool3d(seen, level.stride) * torch.linspace(0.5, 2.0, level.channels)[:, None, None, None]
            for level in self.levels
        ]


class Site:
    """A scan with air in one corner, an encoder, and the map of the whole scan for several sizes of batches."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.bundle = write_tiny_encoder(folder / "tiny.encoder")
        hu = np.random.default_rng(0).integers(-150, 250, SHAPE, dtype=np.int16)
        hu[40:, :36, :60] = -1000
        self.volume = Volume(hu, np.diag([6.0, 6.0, 6.0, 1.0]))

    @functools.cache  # noqa: B019 - one object for all tests of this file
    def whole(self, max_batch: int = 1, storage: StorageType = "float16") -> Features:
        store = FeatureStore(self.folder / f"whole-{max_batch}-{storage}")
        return self.encode(ShiftySession(self.bundle, max_batch), store, storage=storage)

    def encode(self, session: EncoderSession, store: FeatureStore, **more: Any) -> Features:
        return encode_scan(self.volume, bundle=self.bundle, session=session, store=store, **more).features

    def on_demand(self, session: EncoderSession, store: FeatureStore, **more: Any) -> FeaturesOnDemand:
        features = encode_on_demand(self.volume, bundle=self.bundle, session=session, store=store, **more).features
        assert isinstance(features, FeaturesOnDemand)
        return features


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Site:
    return Site(tmp_path_factory.mktemp("site"))


def random_box(random: np.random.Generator, features: Features) -> tuple[int, Ranges]:
    """Return a random level and a random small box of this level."""
    level = int(random.integers(len(features.levels)))
    sides = []
    for size in features.meta.level_shape(level):
        length = int(random.integers(1, max(2, size // 4)))
        start = int(random.integers(0, size - length + 1))
        sides.append((start, start + length))
    return level, (sides[0], sides[1], sides[2])


def at_finest(features: Features, level: int, box: Ranges) -> Ranges:
    stride = features.levels[level].stride
    x, y, z = ((low * stride, high * stride) for low, high in box)
    return x, y, z


def assert_same(found: Features, expected: Features, box: Ranges | None = None) -> None:
    """Compare a box, or everything, at all levels."""
    for level, step in enumerate(expected.levels):
        where = [(0, size) for size in expected.meta.level_shape(level)]
        if box is not None:
            where = [(low // step.stride, -(-high // step.stride)) for low, high in box]
        read, reference = found.read(level, *where), expected.read(level, *where)
        assert read.dtype == reference.dtype
        assert torch.equal(read, reference)


def files(root: Path) -> list[Path]:
    return [path for path in root.rglob("*") if path.is_file() and path.name not in {"lock", "used"}]


def part_files(root: Path) -> list[Path]:
    return sorted(root.glob("*/parts/*.part"))


# --- the same features


@pytest.mark.parametrize(("max_batch", "storage"), [(1, "float16"), (2, "float32"), (3, "float16")])
def test_boxes_in_any_order_equal_the_whole_scan(
    site: Site, tmp_path: Path, max_batch: int, storage: StorageType
) -> None:
    session = ShiftySession(site.bundle, max_batch)
    features = site.on_demand(session, FeatureStore(tmp_path), storage=storage)
    whole = site.whole(max_batch, storage)
    assert (features.meta, features.shape, features.padded_shape) == (whole.meta, whole.shape, whole.padded_shape)
    assert features.windows == 48
    random = np.random.default_rng(max_batch)
    for _ in range(8):
        level, box = random_box(random, features)
        finest, before = at_finest(features, level, box), session.windows
        needed = features.need(finest)
        assert needed == 0 or not features.is_final(finest)
        read = features.read(level, *box)
        assert torch.equal(read, whole.read(level, *box))
        assert read.dtype == getattr(torch, storage)
        assert features.is_final(finest)
        assert features.need(finest) == 0
        if max_batch == 1:
            assert session.windows - before <= needed + 1  # the window of zeros
    assert 0 < features.asked < features.windows
    assert_same(features, whole)
    assert features.asked == features.windows


def test_windows_of_air_are_never_encoded(site: Site, tmp_path: Path) -> None:
    session = ShiftySession(site.bundle, 1)
    features = site.on_demand(session, FeatureStore(tmp_path))
    box: Ranges = ((72, 75), (0, 3), (0, 60))
    assert features.need(box) == 8
    features.encode([box])
    assert session.windows == 1 + 4  # the window of zeros, and the windows that reach beyond the air
    assert_same(features, site.whole(), box)


def test_only_the_slices_under_wanted_windows_are_read_and_each_once(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slices: list[int] = []
    section = on_demand.Grid.section

    def counted(grid: Any, volume: Volume, z0: int, z1: int) -> Any:
        slices.extend(range(z0, z1))
        return section(grid, volume, z0, z1)

    features = site.on_demand(ShiftySession(site.bundle, 1), FeatureStore(tmp_path))
    monkeypatch.setattr(on_demand.Grid, "section", counted)
    features.encode([((0, 4), (0, 4), (0, 30)), ((90, 95), (0, 4), (80, 85))])
    assert sorted(slices) == [*range(56), *range(56, 85)]


@pytest.mark.parametrize(("batch", "halved"), [(1, 0), (2, 1), (4, 2)])
def test_every_plan_gives_the_same_features(site: Site, tmp_path: Path, batch: int, halved: int) -> None:
    """A smaller budget encodes fewer windows at a time, as for the whole scan."""
    session = ShiftySession(site.bundle, batch)
    layout = WindowLayout.plan(SHAPE, site.bundle.window, 4)
    plans = list(encoding_of(layout, site.bundle, session).plans_on_demand())
    assert [plan.batch for plan in plans] == [batch >> number for number in range(halved + 1)]
    assert [plan.footprint.ram for plan in plans] == sorted((plan.footprint.ram for plan in plans), reverse=True)
    for plan in plans:
        store = FeatureStore(tmp_path / str(plan.batch))
        features = site.on_demand(session, store, budget=Budget(ram=plan.footprint.ram))
        features.encode([SMALL])
        assert_same(features, site.whole(plan.batch), SMALL)


def test_a_budget_that_is_too_small_is_refused_before_anything_is_encoded(site: Site, tmp_path: Path) -> None:
    session = ShiftySession(site.bundle, 1)
    features = site.on_demand(session, FeatureStore(tmp_path), budget=Budget(ram=1))
    with refused(OutOfMemoryError, "encoding windows of this scan"):
        features.encode([SMALL])
    assert session.windows == 0
    assert files(tmp_path) == []


def test_encoding_continues_with_fewer_windows_if_memory_runs_out(
    site: Site, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    features = site.on_demand(ShiftySession(site.bundle, 4, fits=1), FeatureStore(tmp_path / "store"))
    features.encode([SMALL])
    assert [record.levelno for record in caplog.records] == [logging.WARNING] * 2
    assert_same(features, site.whole(), SMALL)
    features = site.on_demand(ShiftySession(site.bundle, 1, fits=0), FeatureStore(tmp_path / "other"))
    with refused(OutOfMemoryError):
        features.encode([SMALL])


def real_network(folder: Path, architecture: str) -> EncoderBundle:
    if architecture == "residual_unet":
        return write_tiny_encoder(folder / "tiny.encoder")
    torch.manual_seed(0)
    network = build_network(architecture, feature_size=12).eval()
    contents = BundleContents(
        name="small",
        architecture=architecture,
        settings={"feature_size": 12},
        preprocessing=Preprocessing(spacing=(6.0, 6.0, 6.0)),
        window=(64, 32, 32),
        organs=("liver",),
        checkpoint_sha256="0" * 64,
        tools={},
        parity={},
        network=network,
        head_weight=torch.ones(1, 12),
        head_bias=torch.zeros(1),
        graph=None,
    )
    return EncoderBundle.write(folder / "small.encoder", contents)


def test_the_number_of_windows_that_were_asked_for_does_not_depend_on_earlier_runs(site: Site, tmp_path: Path) -> None:
    other: Ranges = ((60, 70), (40, 50), (60, 70))

    def asked() -> tuple[int, int, int]:
        features = site.on_demand(ShiftySession(site.bundle, 1), FeatureStore(tmp_path))
        features.encode([SMALL])
        return features.asked, features.not_asked(SMALL), features.not_asked(other)

    first = asked()
    assert first[0] > 0
    assert first[1] == 0
    assert first[2] > 0
    assert asked() == first
    site.on_demand(ShiftySession(site.bundle, 1), FeatureStore(tmp_path)).encode([EVERYTHING])
    assert asked() == first


@pytest.mark.parametrize("architecture", ["residual_unet", "swin_unetr"])
def test_networks_compute_on_demand_what_they_compute_for_the_whole_scan(tmp_path: Path, architecture: str) -> None:
    bundle = real_network(tmp_path, architecture)
    hu = np.random.default_rng(1).integers(-400, 400, (70, 30, 30), dtype=np.int16)
    scan: dict[str, Any] = {"volume": Volume(hu, np.diag([-6.0, 6.0, 6.0, 1.0])), "bundle": bundle}
    with open_session(bundle, device="cpu", backend="torch") as session:
        whole = encode_scan(**scan, session=session, store=FeatureStore(tmp_path / "whole")).features
        features = encode_on_demand(**scan, session=session, store=FeatureStore(tmp_path / "parts")).features
        assert isinstance(features, FeaturesOnDemand)
        box: Ranges = ((2, 5), (2, 5), (2, 5))
        features.encode([box])
        assert features.asked < features.windows
        assert_same(features, whole, box)
        assert_same(features, whole)


def test_an_encoder_of_whole_scans_encodes_the_scan_at_once(tmp_path: Path) -> None:
    bundle = write_tiny_encoder(tmp_path / "tiny.encoder")
    whole_scan = bundle.network().whole_scan
    bundle = EncoderBundle(bundle.path, bundle.manifest.model_copy(update={"whole_scan": whole_scan}))
    hu = np.random.default_rng(1).integers(-400, 400, (37, 30, 41), dtype=np.int16)
    scan: dict[str, Any] = {"volume": Volume(hu, np.diag([6.0, 6.0, 6.0, 1.0])), "bundle": bundle}
    with open_session(bundle, device="cpu", backend="torch") as session:
        whole = encode_scan(**scan, session=session, store=FeatureStore(tmp_path / "whole")).features
        features = encode_on_demand(**scan, session=session, store=FeatureStore(tmp_path / "other")).features
    assert isinstance(features, FeaturesOnDemand)
    assert (features.windows, features.need(EVERYTHING)) == (1, 0)
    assert features.final().all()
    assert features.grown(((5, 12), (4, 9), (0, 1))) == tuple((0, size) for size in whole.padded_shape)
    assert_same(features, whole)


# --- which windows, which cells


def test_needed_windows_and_cells_are_those_over_the_box(site: Site, tmp_path: Path) -> None:
    features = site.on_demand(ShiftySession(site.bundle, 1), FeatureStore(tmp_path))
    assert features.edges == (
        (0, 24, 32, 48, 56, 68, 80, 100),
        (0, 24, 28, 32, 56, 60),
        (0, 24, 32, 48, 56, 80, 88),
    )
    assert features.need(((0, 1), (0, 1), (0, 1))) == 1
    assert features.need(((23, 25), (0, 1), (0, 1))) == 2
    assert features.need(((24, 25), (28, 29), (24, 25))) == 2 * 3 * 2
    assert features.need(((0, 1), (0, 1), (0, 1)), ((1, 2), (1, 2), (1, 2)), ((99, 100), (0, 1), (0, 1))) == 2
    assert features.need(EVERYTHING) == features.windows
    assert features.need() == 0
    assert features.grown(((1, 2), (25, 29), (-7, 24))) == ((0, 24), (24, 32), (0, 24))
    assert features.grown(EVERYTHING) == tuple((0, size) for size in features.padded_shape)
    with pytest.raises(ValueError, match="not on the padded grid"):
        features.grown(((200, 201), (0, 1), (0, 1)))
    with pytest.raises(ValueError, match="not inside level 1"):
        features.read(1, (0, 99), (0, 1), (0, 1))
    assert not features.final().any()
    features.encode([((23, 25), (0, 1), (0, 1))])
    final = features.final()
    assert final.shape == tuple(len(cuts) - 1 for cuts in features.edges)
    assert final.sum() == 3  # of two neighbouring windows: what one of them covers, or only both of them cover
    assert final[:3, 0, 0].all()


class Steps:
    """A receiver of progress."""

    def __init__(self) -> None:
        self.done = 0.0

    def advance(self, n: float = 1) -> None:
        self.done += n


@pytest.mark.parametrize("box", [SMALL, ((60, 90), (0, 50), (0, 60)), EVERYTHING])
def test_progress_reaches_the_needed_number_of_windows(site: Site, tmp_path: Path, box: Ranges) -> None:
    features, steps = site.on_demand(ShiftySession(site.bundle, 2), FeatureStore(tmp_path)), Steps()
    needed = features.need(box)
    features.encode([box], steps)
    assert steps.done == needed


# --- parts


def test_parts_are_used_by_later_runs(site: Site, tmp_path: Path) -> None:
    session = ShiftySession(site.bundle, 1)
    site.on_demand(session, FeatureStore(tmp_path)).encode([SMALL])
    before, (part,) = session.windows, part_files(tmp_path)
    features = site.on_demand(session, FeatureStore(tmp_path))
    assert features.need(SMALL) == 0
    assert features.is_final(SMALL)
    assert_same(features, site.whole(), SMALL)
    assert session.windows == before
    assert part_files(tmp_path) == [part]


def test_the_store_contains_only_numbered_parts_until_the_map_is_complete(site: Site, tmp_path: Path) -> None:
    session = ShiftySession(site.bundle, 1)
    features = site.on_demand(session, FeatureStore(tmp_path))
    for box in (SMALL, ((95, 97), (50, 52), (70, 72))):
        features.encode([box])
    assert {path.parent.name for path in files(tmp_path)} == {"parts"}
    features.encode([EVERYTHING])
    assert {path.parent.name for path in files(tmp_path)} == {"entry"}
    assert features.final().all()
    assert_same(features, site.whole())
    again = site.on_demand(session, FeatureStore(tmp_path))
    before = session.windows
    assert again.need(EVERYTHING) == 0
    assert_same(again, site.whole())
    assert session.windows == before


def test_a_whole_map_of_the_store_is_used_and_replaces_the_parts(site: Site, tmp_path: Path) -> None:
    session, store = ShiftySession(site.bundle, 1), FeatureStore(tmp_path)
    features = site.on_demand(session, store)
    features.encode([SMALL])
    assert isinstance(site.encode(session, store), FeatureMap)
    assert part_files(tmp_path) == []
    assert_same(features, site.whole(), SMALL)  # its parts are still open
    before = session.windows
    assert_same(features, site.whole())
    assert session.windows == before


def damage(path: Path, how: str) -> None:
    content = bytearray(path.read_bytes())
    if how == "flipped":
        content[len(content) // 2] ^= 1
    elif how == "truncated":
        del content[-100:]
    elif how == "empty":
        content.clear()
    path.write_bytes(content)


@pytest.mark.parametrize("how", ["flipped", "truncated", "empty"])
def test_a_damaged_part_is_deleted_with_a_warning_and_encoded_again(
    site: Site, tmp_path: Path, caplog: pytest.LogCaptureFixture, how: str
) -> None:
    site.on_demand(ShiftySession(site.bundle, 1), FeatureStore(tmp_path)).encode([SMALL])
    (part,) = part_files(tmp_path)
    damage(part, how)
    with caplog.at_level(logging.WARNING):
        features = site.on_demand(ShiftySession(site.bundle, 1), FeatureStore(tmp_path))
    assert str(part) in caplog.text
    assert files(tmp_path) == []
    assert not features.is_final(SMALL)
    assert_same(features, site.whole(), SMALL)


def test_the_part_of_another_scan_is_not_used(site: Site, tmp_path: Path) -> None:
    site.on_demand(ShiftySession(site.bundle, 1), FeatureStore(tmp_path)).encode([SMALL])
    (part,) = part_files(tmp_path)
    other = Volume(site.volume.array + np.int16(1), site.volume.affine)
    scan: dict[str, Any] = {"volume": other, "bundle": site.bundle, "session": ShiftySession(site.bundle, 1)}
    key = FeatureStore(tmp_path).key(other, site.bundle.preprocessing, site.bundle.encoder_id, 0.25)
    (tmp_path / key / "parts").mkdir(parents=True)
    (tmp_path / key / "parts" / part.name).write_bytes(part.read_bytes())
    features = encode_on_demand(**scan, store=FeatureStore(tmp_path)).features
    assert isinstance(features, FeaturesOnDemand)
    assert not features.final().any()
    assert part_files(tmp_path) == [part]


def test_features_beyond_float16_are_refused_and_leave_no_part(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = ShiftySession(site.bundle, 1)
    encode = session._encode_batch
    monkeypatch.setattr(session, "_encode_batch", lambda windows: [1e6 * level for level in encode(windows)])
    features = site.on_demand(session, FeatureStore(tmp_path))
    with refused(EncoderBundleError, "float16"):
        features.encode([SMALL])
    assert files(tmp_path) == []


# --- space


def test_kept_windows_are_limited_and_encoded_again_when_needed(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    boxes: list[Ranges] = [((x, x + 2), (40, 42), (10, 12)) for x in (2, 90, 26, 50, 70)]
    counts = []
    for limit in (1 << 30, 0):
        monkeypatch.setattr(on_demand, "KEPT_BYTES", limit)
        session = ShiftySession(site.bundle, 1)
        features = site.on_demand(session, FeatureStore(tmp_path / str(limit)))
        for box in boxes:
            assert_same(features, site.whole(), box)
        counts.append(session.windows)
    assert counts[0] < counts[1]


def test_released_windows_are_encoded_again(site: Site, tmp_path: Path) -> None:
    session = ShiftySession(site.bundle, 1)
    features = site.on_demand(session, FeatureStore(tmp_path))
    features.encode([((2, 4), (40, 42), (10, 12))])
    neighbour: Ranges = ((26, 28), (40, 42), (10, 12))
    needed = features.need(neighbour)
    features.release()
    assert features.need(neighbour) > needed
    assert_same(features, site.whole(), neighbour)


def test_a_full_disk_of_temporary_files_is_an_error_and_changes_nothing(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    features = site.on_demand(ShiftySession(site.bundle, 1), FeatureStore(tmp_path))
    with monkeypatch.context() as patched, refused(OutOfSpaceError) as caught:
        patched.setattr(os, "posix_fallocate", full)
        features.encode([SMALL])
    assert "TMPDIR" in caught.value.remedy
    assert files(tmp_path) == []
    assert_same(features, site.whole(), SMALL)


def test_a_full_disk_of_the_cache_is_an_error_and_no_window_is_encoded_twice(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> bytes:
        raise OSError(28, "No space left on device")

    session = ShiftySession(site.bundle, 1)
    features = site.on_demand(session, FeatureStore(tmp_path))
    with monkeypatch.context() as patched, refused(OutOfSpaceError, tmp_path):
        patched.setattr("fseft_edge.runtime.encoder.feature_parts.compressed", full)
        features.encode([((5, 12), (40, 44), (2, 4))])
    assert files(tmp_path) == []
    before = session.windows
    assert_same(features, site.whole(), ((5, 12), (40, 44), (2, 4)))
    assert session.windows == before


def test_parts_count_in_the_size_limit_and_open_parts_are_kept(site: Site, tmp_path: Path) -> None:
    other = Volume(site.volume.array + np.int16(1), site.volume.affine)
    session = ShiftySession(site.bundle, 1)
    site.on_demand(session, FeatureStore(tmp_path)).encode([SMALL])
    (first,) = part_files(tmp_path)
    features = encode_on_demand(other, bundle=site.bundle, session=session, store=FeatureStore(tmp_path, 1)).features
    assert isinstance(features, FeaturesOnDemand)
    features.encode([SMALL])
    assert not first.exists()
    (second,) = part_files(tmp_path)
    third = site.on_demand(session, FeatureStore(tmp_path, 1))
    third.encode([SMALL])
    assert second.exists()
    assert len(part_files(tmp_path)) == 2


# --- threads and processes


def test_threads_may_read(site: Site, tmp_path: Path) -> None:
    features, whole = site.on_demand(ShiftySession(site.bundle, 2), FeatureStore(tmp_path)), site.whole(2)

    def read(seed: int) -> bool:
        level, box = random_box(np.random.default_rng(seed), features)
        return torch.equal(features.read(level, *box), whole.read(level, *box))

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(read, range(12)))


class _Stepwise(ShiftySession):
    """A session that reports every window and waits for an answer."""

    def __init__(self, bundle: EncoderBundle, pipe: Connection) -> None:
        super().__init__(bundle, 1)
        self._pipe = pipe

    def _encode_batch(self, windows: Tensor) -> list[Tensor]:
        self._pipe.send("window")
        self._pipe.recv()
        return super()._encode_batch(windows)


def _encode_stepwise(site: Site, root: Path, pipe: Connection) -> None:
    torch.set_num_threads(1)
    site.on_demand(_Stepwise(site.bundle, pipe), FeatureStore(root)).encode([SMALL])


@pytest.fixture
def other(site: Site, tmp_path: Path) -> Iterator[tuple[Any, Connection]]:
    """Another process that encodes the small box, and the pipe to it; it waits before every window."""
    here, there = multiprocessing.Pipe()
    process = multiprocessing.get_context("fork").Process(target=_encode_stepwise, args=(site, tmp_path, there))
    with here, there:
        process.start()
        try:
            yield process, here
        finally:
            process.kill()
            process.join()


# A forked process of a process with threads must not use these threads, and these tests check exactly that.
forks = pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork.*:DeprecationWarning")


@forks
def test_only_one_of_two_processes_encodes(site: Site, tmp_path: Path, other: tuple[Any, Connection]) -> None:
    process, pipe = other
    assert pipe.recv() == "window"
    session = ShiftySession(site.bundle, 1)
    needed = 4

    def answer() -> None:
        for _ in range(needed):
            pipe.send("go on")

    release = threading.Timer(0.2, answer)
    release.start()
    features = site.on_demand(session, FeatureStore(tmp_path))  # waits for the other process
    release.join()
    process.join()
    assert process.exitcode == 0
    assert_same(features, site.whole(), SMALL)
    assert session.windows == 0


@forks
def test_rows_that_a_killed_process_finished_are_used(
    site: Site, tmp_path: Path, other: tuple[Any, Connection]
) -> None:
    process, pipe = other
    assert pipe.recv() == "window"
    process.kill()
    process.join()
    leftover = tmp_path / next(tmp_path.iterdir()).name / "parts" / ".0123456789abcdef.partial.part"
    leftover.parent.mkdir(exist_ok=True)
    leftover.write_bytes(b"half a part")
    features = site.on_demand(ShiftySession(site.bundle, 1), FeatureStore(tmp_path))
    assert files(tmp_path) == []
    assert_same(features, site.whole(), SMALL)
