"""Cache of feature maps: reading and writing, damaged and incomplete entries, several processes, size limit, keys."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
import logging
import multiprocessing
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from doubles.errors import refused
from hypothesis import given
from hypothesis import strategies as st

from fseft_edge.runtime.encoder import feature_map
from fseft_edge.runtime.encoder.feature_map import FeatureMapMeta
from fseft_edge.runtime.encoder.feature_store import FeatureStore
from fseft_edge.runtime.encoder.networks.base import FeatureLevel
from fseft_edge.runtime.encoder.streaming import FeatureSection
from fseft_edge.runtime.errors import EncoderBundleError, OutOfSpaceError
from fseft_edge.runtime.scans.preprocessing import Preprocessing
from fseft_edge.runtime.scans.volume import Volume

META = FeatureMapMeta(
    grid_shape=(39, 24, 45),
    padded_shape=(40, 24, 48),
    levels=(FeatureLevel(1, 3), FeatureLevel(2, 5), FeatureLevel(8, 40)),
    encoder_id="e" * 64,
)
KEY = "a" * 64


def pyramid(meta: FeatureMapMeta = META, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.relu(torch.randn(level.channels, *meta.level_shape(number), generator=generator))
        for number, level in enumerate(meta.levels)
    ]


FEATURES = pyramid()


def sections(features: list[torch.Tensor], bounds: tuple[int, ...] = (0, 32, 40, 48)) -> Iterator[FeatureSection]:
    for z0, z1 in itertools.pairwise(bounds):
        levels = zip(META.levels, features, strict=True)
        yield FeatureSection(z0, z1, [f[..., z0 // level.stride : z1 // level.stride] for level, f in levels])


def whole(shape: tuple[int, int, int]) -> list[tuple[int, int]]:
    return [(0, size) for size in shape]


def fill(store: FeatureStore, key: str = KEY, seed: int = 0) -> None:
    store.build(key, META, sections(pyramid(seed=seed)))


def files(root: Path) -> list[Path]:
    return [path for path in root.rglob("*") if path.is_file() and path.name != "lock"]


def boxes() -> st.SearchStrategy[tuple[int, list[tuple[int, int]]]]:
    def inside(size: int) -> st.SearchStrategy[tuple[int, int]]:
        return st.lists(st.integers(0, size), min_size=2, max_size=2, unique=True).map(lambda ends: tuple(sorted(ends)))

    return st.sampled_from(range(len(META.levels))).flatmap(
        lambda level: st.tuples(st.just(level), st.tuples(*(inside(size) for size in META.level_shape(level))))
    )


@pytest.fixture(scope="module", params=["float16", "float32"])
def stored(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    store = FeatureStore(tmp_path_factory.mktemp("store"))
    return store.build(KEY, META.model_copy(update={"dtype": request.param}), sections(pyramid()))


@given(box=boxes())
def test_any_box_is_read_in_the_stored_number_format(stored: Any, box: tuple[int, list[tuple[int, int]]]) -> None:
    level, (x, y, z) = box
    expected = FEATURES[level][:, slice(*x), slice(*y), slice(*z)].to(getattr(torch, stored.meta.dtype))
    read = stored.read(level, x, y, z)
    assert read.dtype == expected.dtype
    assert torch.equal(read, expected)


def test_metadata_are_read_back(tmp_path: Path) -> None:
    fill(FeatureStore(tmp_path))
    found = FeatureStore(tmp_path).get(KEY)
    assert found is not None
    assert (found.shape, found.padded_shape, found.levels) == ((39, 24, 45), (40, 24, 48), META.levels)
    assert found.meta == META


@pytest.mark.parametrize("box", [[(0, 41), (0, 4), (0, 4)], [(-1, 4), (0, 4), (0, 4)], [(0, 4), (3, 3), (0, 4)]])
def test_a_box_outside_the_level_is_refused(stored: Any, box: list[tuple[int, int]]) -> None:
    with pytest.raises(ValueError, match="not inside level 0"):
        stored.read(0, *box)


def test_threads_may_read_the_same_map(stored: Any) -> None:
    def read(_: int) -> bool:
        return torch.equal(stored.read(0, *whole(META.padded_shape)).float(), expected)

    expected = pyramid()[0].to(getattr(torch, stored.meta.dtype)).float()
    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(read, range(40)))


@pytest.mark.parametrize("bounds", [(0, 32, 40), (8, 48), (0, 8, 16, 48, 56)])
def test_sections_that_do_not_tile_the_grid_leave_no_entry(tmp_path: Path, bounds: tuple[int, ...]) -> None:
    store = FeatureStore(tmp_path)
    with pytest.raises(ValueError, match=r"slice|shape"):
        store.build(KEY, META, sections(pyramid(), bounds))
    assert store.get(KEY) is None
    assert files(tmp_path) == []


@pytest.mark.parametrize("change", [lambda levels: levels[:-1], lambda levels: [*levels, levels[-1]]])
def test_sections_of_another_pyramid_leave_no_entry(
    tmp_path: Path, change: Callable[[list[torch.Tensor]], list[torch.Tensor]]
) -> None:
    wrong = (FeatureSection(s.z0, s.z1, change(s.levels)) for s in sections(pyramid()))
    store = FeatureStore(tmp_path)
    with pytest.raises(ValueError, match="levels instead of"):
        store.build(KEY, META, wrong)
    assert store.get(KEY) is None
    assert files(tmp_path) == []


def test_features_beyond_float16_are_refused_but_can_be_stored_in_float32(tmp_path: Path) -> None:
    store, features = FeatureStore(tmp_path), pyramid()
    features[1][0, 0, 0, 0] = 70_000.0
    with refused(EncoderBundleError, "7e+04", "float16") as caught:
        store.build(KEY, META, sections(features))
    assert "float32" in caught.value.remedy
    found = store.build("b" * 64, META.model_copy(update={"dtype": "float32"}), sections(features))
    assert found.read(1, (0, 1), (0, 1), (0, 1))[0].item() == 70_000.0


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_features_that_are_not_finite_are_refused(tmp_path: Path, value: float) -> None:
    features = pyramid()
    features[2][7, 1, 1, 1] = value
    with refused(EncoderBundleError):
        FeatureStore(tmp_path).build(KEY, META.model_copy(update={"dtype": "float32"}), sections(features))
    assert files(tmp_path) == []


def test_the_store_contains_neither_patient_name_nor_path(tmp_path: Path) -> None:
    store = FeatureStore(tmp_path)
    source = Path("/scans/Doe^John/1970-01-01.nii")
    volume = Volume(np.zeros((5, 6, 7), dtype=np.int16), np.eye(4), source=source)
    fill(store, store.key(volume, Preprocessing(), "e", 0.25))
    assert len(files(tmp_path)) == 6
    for path in files(tmp_path):
        assert b"Doe" not in path.read_bytes()
        assert b"scans" not in path.read_bytes()
        assert "Doe" not in str(path.relative_to(tmp_path))


# --- damage


def reseal(entry: Path) -> None:
    """Write checksums of the files as they are now."""
    names = [path for path in sorted(entry.iterdir()) if path.name not in {"SHA256SUMS", "used"}]
    lines = [f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n" for path in names]
    (entry / "SHA256SUMS").write_text("".join(lines))


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def newer_schema(entry: Path) -> None:
    index = entry / "index.json"
    index.write_text(index.read_text().replace('"schema_version": 1', '"schema_version": 2'))
    reseal(entry)


def no_frames(entry: Path) -> None:
    (entry / "level-1.blosc2").write_bytes(b"\0" * 100_000)
    reseal(entry)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-10])


DAMAGES = {
    "flipped level": lambda entry: flip(entry / "level-1.blosc2"),
    "flipped index": lambda entry: flip(entry / "index.json"),
    "flipped checksums": lambda entry: flip(entry / "SHA256SUMS"),
    "truncated level": lambda entry: truncate(entry / "level-0.blosc2"),
    "empty level": lambda entry: (entry / "level-0.blosc2").write_bytes(b""),
    "missing level": lambda entry: (entry / "level-2.blosc2").unlink(),
    "missing index": lambda entry: (entry / "index.json").unlink(),
    "no checksums": lambda entry: (entry / "SHA256SUMS").write_text(""),
    "newer schema": newer_schema,
    "not Blosc2": no_frames,
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_entry_is_deleted_with_a_warning_and_built_again(
    tmp_path: Path, damage: Any, caplog: pytest.LogCaptureFixture
) -> None:
    store = FeatureStore(tmp_path)
    fill(store)
    damage(tmp_path / KEY / "entry")
    with caplog.at_level(logging.WARNING):
        assert store.get(KEY) is None
    assert str(tmp_path / KEY / "entry") in caplog.text
    assert files(tmp_path) == []
    rebuilt = store.build(KEY, META, sections(pyramid()))
    assert torch.equal(rebuilt.read(0, *whole(META.padded_shape)), pyramid()[0].half())


def test_the_entry_of_another_key_is_not_used(tmp_path: Path) -> None:
    store = FeatureStore(tmp_path)
    fill(store)
    shutil.copytree(tmp_path / KEY, tmp_path / ("b" * 64))
    assert store.get("b" * 64) is None
    assert store.get(KEY) is not None


def test_a_full_disk_is_an_error_and_leaves_no_entry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = FeatureStore(tmp_path)
    monkeypatch.setattr(feature_map, "_level_file", lambda level: "/dev/full")
    with refused(OutOfSpaceError, tmp_path / KEY):
        fill(store)
    monkeypatch.undo()
    assert files(tmp_path) == []
    assert store.get(KEY) is None


def test_a_store_folder_that_cannot_be_created_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with refused(OutOfSpaceError, tmp_path / "file" / "store"):
        FeatureStore(tmp_path / "file" / "store")


# --- interruption and several processes


def test_an_interrupted_build_leaves_no_files(tmp_path: Path) -> None:
    def interrupted() -> Iterator[FeatureSection]:
        yield next(sections(pyramid()))
        raise KeyboardInterrupt

    store = FeatureStore(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        store.build(KEY, META, interrupted())
    assert files(tmp_path) == []
    fill(store)
    assert store.get(KEY) is not None


@contextlib.contextmanager
def other_process(task: Callable[[Connection], None]) -> Iterator[tuple[BaseProcess, Connection]]:
    """Run ``task`` in a forked process with one end of a pipe, and yield the process and the other end."""
    here, there = multiprocessing.Pipe()
    process = multiprocessing.get_context("fork").Process(target=task, args=(there,))
    with here, there:
        process.start()
        try:
            yield process, here
        finally:
            process.kill()
            process.join()


def build_stepwise(root: Path, pipe: Connection) -> None:
    """Build an entry; after each section, send a message and wait for an answer."""

    def stepwise() -> Iterator[FeatureSection]:
        for section in sections(pyramid()):
            yield section
            pipe.send("section")
            pipe.recv()

    torch.set_num_threads(1)
    FeatureStore(root).build(KEY, META, stepwise())


# A forked process of a process with threads must not use these threads, and these tests check exactly that.
forks = pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork.*:DeprecationWarning")


@forks
def test_only_one_of_two_processes_does_the_work(tmp_path: Path) -> None:
    def never() -> Iterator[FeatureSection]:
        raise AssertionError("the other process does the work")
        yield

    def answer() -> None:
        for _ in range(3):
            pipe.send("go on")

    with other_process(functools.partial(build_stepwise, tmp_path)) as (process, pipe):
        assert pipe.recv() == "section"
        store = FeatureStore(tmp_path)  # must not delete the incomplete entry of the other process
        assert store.get(KEY) is None
        assert list(tmp_path.glob("*/.*.partial"))
        release = threading.Timer(0.2, answer)
        release.start()
        found = store.build(KEY, META, never())
        release.join()
        process.join()
        assert process.exitcode == 0
    assert torch.equal(found.read(0, *whole(META.padded_shape)), pyramid()[0].half())


@forks
def test_files_of_a_killed_process_are_deleted_when_the_store_is_opened(tmp_path: Path) -> None:
    with other_process(functools.partial(build_stepwise, tmp_path)) as (process, pipe):
        assert pipe.recv() == "section"
        process.kill()
        process.join()
    assert list(tmp_path.glob("*/.*.partial"))
    assert not (tmp_path / KEY / "entry").exists()
    store = FeatureStore(tmp_path)
    assert files(tmp_path) == []
    fill(store)
    assert store.get(KEY) is not None


@forks
def test_a_forked_process_may_read_an_open_map(tmp_path: Path) -> None:
    found = FeatureStore(tmp_path).build(KEY, META, sections(pyramid()))
    with other_process(lambda pipe: pipe.send(found.read(0, *whole(META.padded_shape)).numpy())) as (_, pipe):
        assert pipe.poll(10)
        np.testing.assert_array_equal(pipe.recv(), pyramid()[0].half().numpy())


# --- size limit


def entries(root: Path) -> set[str]:
    return {path.parent.name[0] for path in root.glob("*/entry")}


def used_at(root: Path, key: str, time: int) -> None:
    os.utime(root / key / "entry" / "used", ns=(time, time))


def test_the_least_recently_used_entry_is_deleted_first(tmp_path: Path) -> None:
    fill(FeatureStore(tmp_path), "a" * 64)
    size = sum(path.stat().st_size for path in files(tmp_path))
    fill(FeatureStore(tmp_path), "b" * 64)
    used_at(tmp_path, "a" * 64, 10)
    used_at(tmp_path, "b" * 64, 20)
    store = FeatureStore(tmp_path, int(2.5 * size))
    assert store.get("a" * 64) is not None  # from now on the most recently used entry
    fill(store, "c" * 64)
    assert entries(tmp_path) == {"a", "c"}


def test_open_entries_are_not_deleted_at_the_size_limit(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = FeatureStore(tmp_path, max_bytes=1)
    first = store.build("a" * 64, META, sections(pyramid()))
    second = store.build("b" * 64, META, sections(pyramid()))
    assert entries(tmp_path) == {"a", "b"}
    assert [record.levelno for record in caplog.records] == [logging.WARNING] * 2
    del first
    third = store.build("c" * 64, META, sections(pyramid()))
    assert entries(tmp_path) == {"b", "c"}
    assert second.meta == third.meta


def test_an_open_map_stays_readable_when_its_entry_is_deleted(tmp_path: Path) -> None:
    found = FeatureStore(tmp_path).build(KEY, META, sections(pyramid()))
    shutil.rmtree(tmp_path)
    assert torch.equal(found.read(0, *whole(META.padded_shape)), pyramid()[0].half())


# --- keys: a key depends on everything that determines the features, and on nothing else


def volume_with(**changes: Any) -> Volume:
    values = np.random.default_rng(0).integers(-1000, 1000, (5, 6, 7)).astype(np.int16)
    return Volume(**({"array": values, "affine": np.diag([1.0, 1.0, 2.0, 1.0])} | changes))


def key_of(tmp_path: Path, volume: Volume | None = None, **changes: Any) -> str:
    arguments = {"preprocessing": Preprocessing(), "encoder_id": "e", "overlap": 0.25, "dtype": "float16"} | changes
    return FeatureStore(tmp_path).key(volume or volume_with(), **arguments)


def test_a_key_depends_on_everything_that_determines_the_features(tmp_path: Path) -> None:
    array = volume_with().array
    changed = array.copy()
    changed[4, 5, 6] += 1
    volumes = [
        volume_with(),
        volume_with(array=changed),
        volume_with(array=array.astype(np.int32)),
        volume_with(array=array.reshape(6, 5, 7)),
        volume_with(affine=np.diag([1.0, 1.0, 2.0000001, 1.0])),
        volume_with(slope=2.0),
        volume_with(intercept=-1024.0),
    ]
    keys = [key_of(tmp_path, volume) for volume in volumes]
    keys += [key_of(tmp_path, preprocessing=Preprocessing(antialias=True)), key_of(tmp_path, encoder_id="f")]
    keys += [key_of(tmp_path, overlap=0.5), key_of(tmp_path, dtype="float32")]
    assert len(set(keys)) == len(keys)
    assert all(len(each) == 64 and set(each) <= set("0123456789abcdef") for each in keys)


def test_a_key_does_not_depend_on_file_name_memory_layout_or_byte_order(tmp_path: Path) -> None:
    array = volume_with().array
    same = [
        volume_with(source=Path("elsewhere.nii")),
        volume_with(array=np.asfortranarray(array)),
        volume_with(array=array.astype(">i2")),
        volume_with(affine=np.diag([1.0, 1.0, 2.0, 1.0]) * 1.0 - 0.0),
    ]
    assert {key_of(tmp_path, volume) for volume in same} == {key_of(tmp_path)}
