"""Cache of feature maps: each scan is encoded only once, and all adapters use the same feature map.

Layout: ``ROOT/<key>/entry/`` contains a feature map (:mod:`fseft_edge.runtime.encoder.feature_map`) and an empty file
``used``, whose modification time is the time of the last use. While only some cells of a map are encoded,
``ROOT/<key>/parts/`` contains its parts (:mod:`fseft_edge.runtime.encoder.feature_parts`) and the same empty file; the
parts are deleted when the complete map exists. ``ROOT/<key>/lock`` is the lock for all changes. Keys are hashes. An
entry does not contain the patient's identity or the path of the scan.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import secrets
import shutil
import tempfile
import weakref
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from filelock import FileLock, Timeout

from fseft_edge.runtime.encoder.bundle import Precision
from fseft_edge.runtime.encoder.feature_frames import StorageType
from fseft_edge.runtime.encoder.feature_map import (
    SCHEMA_VERSION,
    DamagedFeatureMapError,
    FeatureMap,
    FeatureMapMeta,
    write_feature_map,
)
from fseft_edge.runtime.encoder.feature_parts import CellSection, FeatureParts
from fseft_edge.runtime.errors import EnvironmentProblemError, OutOfSpaceError
from fseft_edge.runtime.system.atomic import atomic_folder

if TYPE_CHECKING:
    from fseft_edge.runtime.encoder.streaming import FeatureSection
    from fseft_edge.runtime.scans.preprocessing import Preprocessing
    from fseft_edge.runtime.scans.volume import Volume

_log = logging.getLogger(__name__)

# Maps that are open in this process, by entry folder. They are verified only once, and this process never deletes them.
_open_maps: weakref.WeakValueDictionary[Path, FeatureMap] = weakref.WeakValueDictionary()

# Parts that are open in this process, by folder.
_open_parts: weakref.WeakValueDictionary[Path, FeatureParts] = weakref.WeakValueDictionary()


@contextlib.contextmanager
def open_store(folder: Path | None, max_gb: float | None = None) -> Iterator[FeatureStore]:
    """Yield the store in a folder, or a temporary store that is deleted at the end.

    Args:
        folder: folder of the cache; None means a temporary store.
        max_gb: size limit of the cache, in units of 1e9 bytes; None means no limit.
    """
    if folder is not None:
        yield FeatureStore(folder, None if max_gb is None else int(max_gb * 1e9))
        return
    with tempfile.TemporaryDirectory(prefix="fseft-edge-") as temporary:
        yield FeatureStore(Path(temporary))


class FeatureStore:
    """Cache of feature maps on disk, safe for several processes and threads.

    If the cache exceeds its size limit, the least recently used entries are deleted.

    Args:
        root: folder of the cache; created if missing. Incomplete entries of interrupted processes are deleted.
        max_bytes: size limit in bytes, enforced after each build; ``None`` means no limit. Entries that are open in
            this process are never deleted. Entries that are open in other processes may be deleted; their maps stay
            readable.
        threads: number of threads for compression and decompression. With more than one thread, do not read in a
            forked process.

    Raises:
        OutOfSpaceError: the folder cannot be created or written.
    """

    def __init__(self, root: Path, max_bytes: int | None = None, *, threads: int = 1) -> None:
        self._root = root.absolute()
        self._max_bytes = max_bytes
        self._threads = threads
        with _writing(self._root):
            self._root.mkdir(parents=True, exist_ok=True)
        self._remove_leftovers()

    def key(
        self,
        volume: Volume,
        preprocessing: Preprocessing,
        encoder_id: str,
        overlap: float,
        dtype: StorageType = "float16",
        *,
        precision: Precision = "float32",
    ) -> str:
        """Return the key of a scan's features: the sha256 of everything that determines the stored features.

        Args:
            volume: the scan; its voxels are hashed piece by piece. The path of the scan is not part of the key.
            preprocessing: conversion of the scan into the grid.
            encoder_id: sha256 of everything in the encoder that determines the features.
            overlap: overlap of the encoder's windows, from 0 to below 1.
            dtype: stored number format.
            precision: precision of the computation.
        """
        header: dict[str, object] = {
            "storage": SCHEMA_VERSION,
            "dtype": dtype,
            "encoder_id": encoder_id,
            "overlap": float(overlap),
            "preprocessing": preprocessing.model_dump_json(),
            "shape": list(volume.shape),
            "voxels": volume.array.dtype.newbyteorder("<").str,
            "rescale": [float(volume.slope), float(volume.intercept)],
            "affine": (np.asarray(volume.affine, dtype=np.float64) + 0.0).tolist(),  # + 0.0 turns -0 into 0
        }
        if precision != "float32":
            header["precision"] = precision
        digest = hashlib.sha256(json.dumps(header, sort_keys=True).encode())
        for chunk in volume.chunks():
            digest.update(chunk.data)
        return digest.hexdigest()

    def is_empty(self) -> bool:
        """Return whether the store contains no complete feature map."""
        return next(self._root.glob("*/entry"), None) is None

    def contains(self, key: str) -> bool:
        """Return whether the store contains a feature map, without opening it."""
        return self._entry(key).exists()

    def get(self, key: str) -> FeatureMap | None:
        """Return the stored feature map, or ``None`` if the store does not contain the key.

        Every file is compared with its checksum when the map is opened. An entry that is damaged, or has another key
        or schema version, is deleted with a warning.
        """
        if not self._entry(key).exists():
            return None
        with self.lock(key):
            return self._opened(key)

    def build(self, key: str, meta: FeatureMapMeta, sections: Iterable[FeatureSection]) -> FeatureMap:
        """Write a feature map section by section, and return the map.

        If several processes build the same key, only one process does the work. The other processes wait, do not
        iterate over their sections, and use the finished entry. An entry appears complete or not at all. After the
        build, the size limit is enforced.

        Args:
            key: key of the map, from :meth:`key`.
            meta: metadata of the map.
            sections: contiguous sections in ascending order, from slice 0 to the end of the padded grid.

        Raises:
            EncoderBundleError: a feature is not finite, or is beyond the range of ``meta.dtype``.
            OutOfSpaceError: the disk is full or not writable.
            EnvironmentProblemError: the written files differ from the data in memory.
        """
        with self.lock(key):
            feature_map = self._opened(key)
            if feature_map is None:
                entry = self._entry(key)
                with atomic_folder(entry) as folder:
                    write_feature_map(folder, key, meta, sections, threads=self._threads)
                feature_map = self._opened(key)
                if feature_map is None:
                    raise EnvironmentProblemError(
                        f"The features that were written to {entry} are different when they are read again.",
                        remedy="Check the disk, or move the cache to another disk.",
                    )
        self._enforce_limit(keep=key)
        return feature_map

    def parts(self, key: str, meta: FeatureMapMeta) -> FeatureParts:
        """Return the parts of a map that is not complete yet; there may be none. The caller has the key's lock.

        Every part is compared with its checksum. A damaged part is deleted with a warning.
        """
        folder = self._parts(key)
        parts = _open_parts.get(folder)
        if parts is None:
            parts = _open_parts[folder] = FeatureParts(folder, key, meta, threads=self._threads)
        parts.refresh()
        if folder.exists():
            _mark_as_used(folder)
        return parts

    def add_part(self, key: str, parts: FeatureParts, cells: Iterable[Iterable[CellSection]]) -> None:
        """Store cells as a new part of a map (:meth:`FeatureParts.add`), and enforce the size limit.

        The caller has the key's lock.

        Raises:
            EncoderBundleError: a feature is not finite, or is beyond the range of the stored number format.
            OutOfSpaceError: the disk is full or not writable.
            EnvironmentProblemError: the written file differs from the data in memory.
        """
        with _writing(self._parts(key)):
            parts.add(cells)
        _mark_as_used(self._parts(key))
        self._enforce_limit(keep=key)

    def _entry(self, key: str) -> Path:
        return self._root / key / "entry"

    def _parts(self, key: str) -> Path:
        return self._root / key / "parts"

    def _opened(self, key: str) -> FeatureMap | None:
        """Open an entry and mark it as used, or delete the entry if it is damaged. The caller has the key's lock."""
        entry = self._entry(key)
        if not entry.exists():
            return None
        feature_map = _open_maps.get(entry)
        if feature_map is None:
            try:
                feature_map = FeatureMap.open(entry, key, threads=self._threads)
            except DamagedFeatureMapError as error:
                _log.warning("The cached features %s are deleted because they are damaged: %s.", entry, error)
                _remove(entry)
                return None
            _open_maps[entry] = feature_map
        _mark_as_used(entry)
        if self._parts(key).exists():
            with contextlib.suppress(OSError):  # the entry can be read even if the disk is not writable
                _remove(self._parts(key))
        return feature_map

    @contextlib.contextmanager
    def lock(self, key: str) -> Iterator[None]:
        """Hold the key's lock; wait if another process holds it. A thread must not take the same lock twice."""
        folder = self._root / key
        with _writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            lock = FileLock(folder / "lock")
            try:
                lock.acquire(blocking=False)
            except Timeout:
                _log.info("Waiting for another process that uses the cached features %s.", folder)
                lock.acquire()
        try:
            yield
        finally:
            lock.release()

    @contextlib.contextmanager
    def _lock_if_free(self, folder: Path) -> Iterator[bool]:
        """Hold a key's lock and yield True, or yield False if another process holds the lock."""
        lock = FileLock(folder / "lock")
        try:
            lock.acquire(blocking=False)
        except Timeout:
            yield False
            return
        try:
            yield True
        finally:
            lock.release()

    def _remove_leftovers(self) -> None:
        """Delete the temporary folders and files of processes that ended while writing."""
        for leftover in list(self._root.glob("*/.*.partial")):
            with self._lock_if_free(leftover.parent) as free:
                if free:
                    shutil.rmtree(leftover, ignore_errors=True)
        for leftover in list(self._root.glob("*/parts/.*.partial.part")):
            with self._lock_if_free(leftover.parent.parent) as free:
                if free:
                    with contextlib.suppress(OSError):  # also an undeletable folder above is passed over
                        leftover.unlink()

    def _enforce_limit(self, *, keep: str) -> None:
        """Delete the least recently used entries until the store is within its size limit."""
        if self._max_bytes is None:
            return
        found = (*self._root.glob("*/entry"), *self._root.glob("*/parts"))
        entries = sorted((_last_use(entry), _size(entry), entry) for entry in found)
        total = sum(size for _, size, _ in entries)
        for _, size, entry in entries:
            if total <= self._max_bytes:
                return
            if entry.parent.name == keep:
                continue
            with self._lock_if_free(entry.parent) as free:
                if free and entry.exists() and entry not in _open_maps and entry not in _open_parts:
                    _remove(entry)
                    total -= size
        if total > self._max_bytes:
            _log.warning(
                "The feature cache takes %d MiB, more than its limit, because its entries are in use.", total >> 20
            )


def _remove(entry: Path) -> None:
    """Rename an entry, so that its name disappears at once, and delete the entry. The caller has the key's lock."""
    doomed = entry.with_name(f".{secrets.token_hex(8)}.partial")
    entry.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def _mark_as_used(entry: Path) -> None:
    with contextlib.suppress(OSError):  # the entry can be read even if the disk is not writable
        (entry / "used").touch()


def _last_use(entry: Path) -> int:
    try:
        return (entry / "used").stat().st_mtime_ns
    except FileNotFoundError:
        return 0


def _size(entry: Path) -> int:
    """Return the bytes of an entry; files that another process deletes meanwhile count as 0."""
    size = 0
    for path in entry.glob("*"):
        with contextlib.suppress(FileNotFoundError):
            size += path.stat().st_size
    return size


@contextlib.contextmanager
def _writing(folder: Path) -> Iterator[None]:
    """Convert an OSError while writing the cache to an error with a remedy."""
    try:
        yield
    except OSError as error:
        raise OutOfSpaceError(
            f"The feature cache {folder} cannot be written: {error.strerror}.",
            remedy="Free disk space, or give another cache folder.",
        ) from error
