"""The cache of feature maps: a scan is encoded once, whatever is learned on it afterwards.

Layout: ``ROOT/<key>/entry/`` holds a feature map (see :mod:`fseft_edge.runtime.encoder.feature_map`) and an empty file
``used`` whose modification time is that of the last use; ``ROOT/<key>/lock`` serialises everything that changes the
entry. Keys are hashes, and nothing in an entry tells whose scan it is or where it lies.
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
from fseft_edge.runtime.encoder.feature_map import (
    SCHEMA_VERSION,
    DamagedFeatureMapError,
    FeatureMap,
    FeatureMapMeta,
    StorageType,
    write_feature_map,
)
from fseft_edge.runtime.errors import EnvironmentProblemError, OutOfSpaceError
from fseft_edge.runtime.system.atomic import atomic_folder

if TYPE_CHECKING:
    from fseft_edge.runtime.encoder.streaming import FeatureSection
    from fseft_edge.runtime.scans.preprocessing import Preprocessing
    from fseft_edge.runtime.scans.volume import Volume

_log = logging.getLogger(__name__)

# Maps that this process holds open, by entry folder: verified once, and never evicted by this process.
_open_maps: weakref.WeakValueDictionary[Path, FeatureMap] = weakref.WeakValueDictionary()


@contextlib.contextmanager
def open_store(folder: Path | None, max_gb: float | None = None) -> Iterator[FeatureStore]:
    """Yield the store in a folder, or for None one that is removed at the end.

    Args:
        folder: of the cache.
        max_gb: size that a kept cache is held to, in units of 1e9 bytes; None: no limit.
    """
    if folder is not None:
        yield FeatureStore(folder, None if max_gb is None else int(max_gb * 1e9))
        return
    with tempfile.TemporaryDirectory(prefix="fseft-edge-") as passing:
        yield FeatureStore(Path(passing))


class FeatureStore:
    """Feature maps on disk, safe for several processes and threads, least recently used goes first.

    Args:
        root: folder of the cache; made when missing. What interrupted processes left half-written there is removed.
        max_bytes: size to keep to after each build. Entries that this process has open stay even beyond it; those of
            other processes may go, which they do not notice (an open map stays readable). ``None``: no limit.
        threads: threads that compress and decompress. With more than one, do not read in a forked child.

    Raises:
        OutOfSpaceError: the folder cannot be made or written to.
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
        """Return the key of a scan's features: sha256 of all that determines them, and of how they are stored.

        Args:
            volume: the scan; its voxels are hashed piece by piece, its source is not part of the key.
            preprocessing: how it is put on the grid.
            encoder_id: sha256 of what determines an encoder's features.
            overlap: of the encoder's windows, 0 to below 1.
            dtype: stored precision.
            precision: what the features are computed in.
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
            "affine": (np.asarray(volume.affine, dtype=np.float64) + 0.0).tolist(),  # + 0.0: -0 and 0 are one lattice
        }
        if precision != "float32":
            header["precision"] = precision
        digest = hashlib.sha256(json.dumps(header, sort_keys=True).encode())
        for chunk in volume.chunks():
            digest.update(chunk.data)
        return digest.hexdigest()

    def get(self, key: str) -> FeatureMap | None:
        """Return the stored map, or ``None`` where there is none.

        Every file is compared with its checksum, once per process as long as the map stays open. A damaged entry, or
        one of another key or schema, is dropped with a warning.
        """
        if not self._entry(key).exists():
            return None
        with self._lock(key):
            return self._opened(key)

    def build(self, key: str, meta: FeatureMapMeta, sections: Iterable[FeatureSection]) -> FeatureMap:
        """Store a map while its sections arrive, and return it.

        Where several processes build the same key, one does the work; the others wait and use its entry, without
        taking a single section. An entry appears complete or not at all. Afterwards the size limit is enforced.

        Args:
            key: from :meth:`key`.
            meta: what the map is.
            sections: contiguous, ascending, from slice 0 to the end of the padded grid.

        Raises:
            EncoderBundleError: a feature is not finite or beyond the range of ``meta.dtype``.
            OutOfSpaceError: the disk is full or not writable.
            EnvironmentProblemError: what was written reads back differently.
        """
        with self._lock(key):
            feature_map = self._opened(key)
            if feature_map is None:
                entry = self._entry(key)
                with atomic_folder(entry) as folder:
                    write_feature_map(folder, key, meta, sections, threads=self._threads)
                feature_map = self._opened(key)
                if feature_map is None:
                    raise EnvironmentProblemError(
                        f"The features just written to {entry} read back differently.",
                        remedy="Check that disk, or put the cache on another one.",
                    )
        self._enforce_limit(keep=key)
        return feature_map

    def _entry(self, key: str) -> Path:
        return self._root / key / "entry"

    def _opened(self, key: str) -> FeatureMap | None:
        """Open and mark as used, or drop, under the key's lock."""
        entry = self._entry(key)
        if not entry.exists():
            return None
        feature_map = _open_maps.get(entry)
        if feature_map is None:
            try:
                feature_map = FeatureMap.open(entry, key, threads=self._threads)
            except DamagedFeatureMapError as error:
                _log.warning("Dropping the cached features %s: %s.", entry, error)
                _remove(entry)
                return None
            _open_maps[entry] = feature_map
        with contextlib.suppress(OSError):  # a disk that refuses this can still be read from
            (entry / "used").touch()
        return feature_map

    @contextlib.contextmanager
    def _lock(self, key: str) -> Iterator[None]:
        """Hold the key's lock, waiting for it as long as another process builds this entry."""
        folder = self._root / key
        with _writing(folder):
            folder.mkdir(exist_ok=True)
            lock = FileLock(folder / "lock")
            try:
                lock.acquire(blocking=False)
            except Timeout:
                _log.info("Waiting for another process that works on the cached features %s.", folder)
                lock.acquire()
        try:
            yield
        finally:
            lock.release()

    @contextlib.contextmanager
    def _lock_if_free(self, folder: Path) -> Iterator[bool]:
        """Hold a key's lock and say so, or say that another holds it."""
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
        """Remove the temporary folders of processes that died while writing."""
        for leftover in list(self._root.glob("*/.*.partial")):
            with self._lock_if_free(leftover.parent) as free:
                if free:
                    shutil.rmtree(leftover, ignore_errors=True)

    def _enforce_limit(self, *, keep: str) -> None:
        """Remove the least recently used entries until the store keeps to its size limit."""
        if self._max_bytes is None:
            return
        entries = sorted((_last_use(entry), _size(entry), entry) for entry in self._root.glob("*/entry"))
        total = sum(size for _, size, _ in entries)
        for _, size, entry in entries:
            if total <= self._max_bytes:
                return
            if entry == self._entry(keep):
                continue
            with self._lock_if_free(entry.parent) as free:
                if free and entry not in _open_maps:
                    _remove(entry)
                    total -= size
        if total > self._max_bytes:
            _log.warning("The feature cache takes %d MB, more than its limit: its entries are in use.", total >> 20)


def _remove(entry: Path) -> None:
    """Remove an entry so that it is gone under its name at once; under its key's lock."""
    doomed = entry.with_name(f".{secrets.token_hex(8)}.partial")
    entry.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def _last_use(entry: Path) -> int:
    try:
        return (entry / "used").stat().st_mtime_ns
    except FileNotFoundError:
        return 0


def _size(entry: Path) -> int:
    """Bytes of an entry; 0 for what another process removes meanwhile."""
    size = 0
    for path in entry.glob("*"):
        with contextlib.suppress(FileNotFoundError):
            size += path.stat().st_size
    return size


@contextlib.contextmanager
def _writing(folder: Path) -> Iterator[None]:
    """Turn a refusal of the cache's disk into an error with a remedy."""
    try:
        yield
    except OSError as error:
        raise OutOfSpaceError(
            f"The feature cache {folder} cannot be written: {error.strerror}.",
            remedy="Free some space, or name another cache folder.",
        ) from error
