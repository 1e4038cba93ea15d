"""Features on demand: a feature map whose windows are encoded when a box that needs them is read.

The blend ``F = Σ w f / Σ w`` of a voxel is final as soon as all windows over the voxel are encoded. Therefore what is
read is bit for bit what the map of the whole scan contains: windows are encoded in the same batches, and their features
are added in the same order.

The padded grid is cut along each axis at all origins and ends of windows. A *cell* lies between neighbouring cuts of
each axis. The same windows lie over all of its voxels, so a cell is final or not as a whole. Final cells are stored in
the feature store, and later runs continue from there. The features of a window that unfinished cells need are kept in
an unnamed temporary file. If such files take too much space, the oldest are deleted, and their windows are encoded
again when they are needed, with the same result.
"""

from __future__ import annotations

import itertools
import logging
import math
import threading
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fseft_edge.runtime.encoder.backends.base import EncoderSession
from fseft_edge.runtime.encoder.blend import CellBlend, shift_down
from fseft_edge.runtime.encoder.bundle import EncoderBundle
from fseft_edge.runtime.encoder.encoding import OVERLAP, EncodedScan, encode_scan, layout_of
from fseft_edge.runtime.encoder.encoding_plan import plan_on_demand
from fseft_edge.runtime.encoder.feature_frames import StorageType
from fseft_edge.runtime.encoder.feature_map import FeatureMapMeta, Features, Range, Ranges
from fseft_edge.runtime.encoder.feature_parts import CellSection, FeatureParts
from fseft_edge.runtime.encoder.feature_store import FeatureStore
from fseft_edge.runtime.encoder.file_tensor import FileTensor
from fseft_edge.runtime.encoder.networks.base import FeatureLevel
from fseft_edge.runtime.encoder.streaming import SECTION_SLICES, FeatureSection
from fseft_edge.runtime.encoder.window_encoder import WindowEncoder, first_batch, row_of_windows
from fseft_edge.runtime.encoder.windows import WindowLayout
from fseft_edge.runtime.scans.grid import Grid
from fseft_edge.runtime.scans.volume import Volume
from fseft_edge.runtime.system.memory import AS_MUCH_AS_IS_FREE, GB, Budget, memory_explained
from fseft_edge.runtime.system.progress import ProgressTask

_log = logging.getLogger(__name__)

KEPT_BYTES: Final = 4 << 30
"""Largest size of the temporary files with features of windows, apart from windows that the current call needs."""

_WHOLE_SHARE: Final = 0.9
"""If more than this share of the windows is needed, the scan is encoded as a whole, which takes less disk space."""

_NO_MEMORY: Final = "Memory ran out while windows of a scan were encoded."

_Index = tuple[int, int, int]
"""Position of a window or of a cell along x, y and z."""


@dataclass(frozen=True, eq=False)
class _Scan:
    """What is needed to encode windows of one scan."""

    volume: Volume
    grid: Grid
    layout: WindowLayout
    bundle: EncoderBundle
    session: EncoderSession
    store: FeatureStore
    budget: Budget
    meta: FeatureMapMeta
    key: str


class FeaturesOnDemand:
    """A feature map that encodes windows when they are needed; created by :func:`encode_on_demand`.

    All boxes are half-open ranges ``(x, y, z)`` in voxels of level 0. What lies outside the padded grid is ignored; a
    box of which nothing lies inside is a :class:`ValueError`. Several threads may use the object; their calls run one
    after the other. A forked process must not encode windows.

    Attributes:
        meta: metadata of the map, equal to those of the map of the whole scan.
        edges: cuts between the cells along x, y and z, in voxels, from 0 to the end of the padded grid.
    """

    def __init__(self, scan: _Scan, whole: Features | None) -> None:
        self.meta = scan.meta
        self._scan = scan
        self._whole = whole
        cuts = [
            tuple(sorted({*origins, *(origin + size for origin in origins)}))
            for origins, size in zip(scan.layout.origins, scan.layout.window, strict=True)
        ]
        self.edges: tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]] = (cuts[0], cuts[1], cuts[2])
        self._cover = _Cover(scan.layout, self.edges)
        self._final = np.full([len(along) - 1 for along in self.edges], whole is not None)
        self._asked = np.zeros_like(self._final)
        self._parts: FeatureParts | None = None
        self._kept: dict[_Index, _KeptWindow] = {}
        self._air: set[_Index] = set()
        self._encoder: WindowEncoder | None = None
        self._lock = threading.RLock()
        if whole is None:
            with scan.store.lock(scan.key):
                self._find_parts()

    @property
    def shape(self) -> tuple[int, int, int]:
        """Shape of the encoded grid, in voxels."""
        return self.meta.grid_shape

    @property
    def padded_shape(self) -> tuple[int, int, int]:
        """Shape of the padded grid, which level 0 covers, in voxels."""
        return self.meta.padded_shape

    @property
    def levels(self) -> tuple[FeatureLevel, ...]:
        """Levels of the feature pyramid, finest first."""
        return self.meta.levels

    @property
    def windows(self) -> int:
        """Number of windows of the whole scan."""
        return self._scan.layout.windows

    @property
    def asked(self) -> int:
        """Number of windows over all boxes that were read or encoded so far, whatever earlier runs have stored."""
        with self._lock:
            return int(self._cover.windows_over(self._asked).sum())

    def not_asked(self, box: Ranges) -> int:
        """Return the number of windows over a box that :attr:`asked` does not count yet."""
        with self._lock:
            asked = self._cover.windows_over(self._asked)
            return int((self._cover.windows_over(self._cells([box])) & ~asked).sum())

    def read(self, level: int, x: Range, y: Range, z: Range) -> torch.Tensor:
        """Return the features of a box of a level; encode the windows that are missing.

        Args:
            level: index into ``levels``.
            x: first voxel and one past the last along x, in the level's own voxels.
            y: first voxel and one past the last along y, in the level's own voxels.
            z: first voxel and one past the last along z, in the level's own voxels.

        Returns:
            ``[C_l, x1 - x0, y1 - y0, z1 - z0]`` in the stored number format, as :meth:`FeatureMap.read` of the whole
            scan's map returns it.

        Raises:
            ValueError: the box is empty or not inside the level.
            FseftEdgeError: an error of :meth:`encode`.
        """
        self.meta.check_box(level, x, y, z)
        stride = self.levels[level].stride
        with self._lock:
            self.encode([_scaled((x, y, z), stride)])
            if self._whole is not None:
                return self._whole.read(level, x, y, z)
            shape = (self.levels[level].channels, *(high - low for low, high in (x, y, z)))
            box: NDArray[np.floating] = np.empty(shape, dtype=self.meta.dtype)
            assert self._parts is not None  # noqa: S101 - either the whole map or its parts are open
            self._parts.read_into(box, level, (x, y, z))
            return torch.from_numpy(box)

    def need(self, *boxes: Ranges) -> int:
        """Return the number of windows that reading boxes would still encode.

        Windows that contain only air count until the slices under them were read.
        """
        with self._lock:
            return int((self._cover.windows_over(self._cells(boxes) & ~self._final) & ~self._available()).sum())

    def is_final(self, box: Ranges) -> bool:
        """Return whether a box can be read without encoding a window."""
        with self._lock:
            return not bool((self._cells([box]) & ~self._final).any())

    def final(self) -> NDArray[np.bool_]:
        """Return which cells are final, bool ``[number of cells along x, y, z]``; see :attr:`edges`."""
        with self._lock:
            return self._final.copy()

    def grown(self, box: Ranges) -> Ranges:
        """Return the smallest box of whole cells that contains the part of a box inside the padded grid.

        Raises:
            ValueError: no voxel of the box is inside the padded grid.
        """
        x, y, z = self._cell_range(box)
        return (
            (self.edges[0][x.start], self.edges[0][x.stop]),
            (self.edges[1][y.start], self.edges[1][y.stop]),
            (self.edges[2][z.start], self.edges[2][z.stop]),
        )

    def encode(self, boxes: Sequence[Ranges], progress: ProgressTask | None = None) -> None:
        """Encode all windows over boxes that are not encoded yet, and store the cells that become final.

        Other processes that encode the same scan wait meanwhile.

        Args:
            boxes: the boxes.
            progress: receives one step for each encoded window; :meth:`need` is the expected number.

        Raises:
            EncoderBundleError: a feature is not finite, or is beyond the range of the stored number format.
            OutOfMemoryError: the budget is too small, or memory ran out although one window was encoded at a time.
            OutOfSpaceError: the feature cache or a temporary file cannot be written.
        """
        with self._lock:
            wanted = self._cells(boxes)
            self._asked |= wanted
            if not (wanted & ~self._final).any():
                return
            scan = self._scan
            self._use_whole(scan.store.get(scan.key))
            needed = self.need(*boxes)
            if self._whole is None and needed > _WHOLE_SHARE * self.windows:
                self._use_whole(_encoded_whole(scan))
                if progress is not None:
                    progress.advance(needed)
            if self._whole is not None:
                return
            with scan.store.lock(scan.key):
                self._find_parts()
                missing = wanted & ~self._final
                if missing.any():
                    with memory_explained(_NO_MEMORY, remedy="Give a smaller --memory, or close other programs."):
                        self._encode_windows(missing, progress)
            if self._final.all():
                _log.info("all windows of the scan are encoded, and its parts are joined")
                self._use_whole(scan.store.build(scan.key, self.meta, self._sections()))

    def release(self) -> None:
        """Delete the temporary files with features of windows, which only serve boxes that are read later.

        If a later box needs such a window, the window is encoded again, with the same result.
        """
        with self._lock:
            self._kept.clear()
            self._encoder = None

    def _cells(self, boxes: Iterable[Ranges]) -> NDArray[np.bool_]:
        """Return which cells boxes need, bool like :meth:`final`."""
        cells = np.zeros_like(self._final)
        for box in boxes:
            cells[self._cell_range(box)] = True
        return cells

    def _cell_range(self, box: Ranges) -> tuple[slice, slice, slice]:
        ranges = []
        for (low, high), cuts in zip(box, self.edges, strict=True):
            start, stop = max(low, 0), min(high, cuts[-1])
            if start >= stop:
                raise ValueError(f"the box {box} is not on the padded grid {self.padded_shape}")
            ranges.append(slice(bisect_right(cuts, start) - 1, bisect_left(cuts, stop)))
        return ranges[0], ranges[1], ranges[2]

    def _available(self) -> NDArray[np.bool_]:
        """Return which windows need not be encoded, because their features are kept or they are air."""
        available = np.zeros(self._cover.shape, dtype=bool)
        for index in (*self._kept, *self._air):
            available[index] = True
        return available

    def _use_whole(self, whole: Features | None) -> None:
        """Use the complete map, if there is one, instead of parts."""
        if whole is not None:
            self._whole = whole
            self._parts = None
            self._final[:] = True
            self.release()

    def _find_parts(self) -> None:
        """Note the cells that are stored. The key's lock is held."""
        self._parts = self._scan.store.parts(self._scan.key, self.meta)
        for cell in self._parts.cells():
            self._final[self._cell_range(cell)] = True

    def _encode_windows(self, missing: NDArray[np.bool_], progress: ProgressTask | None) -> None:
        """Encode the windows over missing cells, row by row, and store final cells. The key's lock is held."""
        scan = self._scan
        if self._encoder is None:
            plan = plan_on_demand(
                scan.layout, scan.bundle, scan.session, scan.budget, stored_bytes=np.dtype(self.meta.dtype).itemsize
            )
            self._encoder = WindowEncoder(scan.layout, scan.session, plan.batch)
            _log.info(
                "encoding windows on demand, at most %d at a time, predicted memory: %.2f GB",
                plan.batch,
                plan.footprint.ram / GB,
            )
        wanted = self._cover.windows_over(missing)
        image = _RowImage(scan)
        for row in range(self._cover.shape[2]):
            if (wanted & ~self._available())[:, :, row].any():
                self._encode_row(row, image.read(row), wanted, self._encoder, progress)
            if wanted[:, :, row].any():
                self._store_cells(missing, self._encoder)
            self._forget(missing)

    def _encode_row(
        self,
        row: int,
        image: Tensor,
        wanted: NDArray[np.bool_],
        encoder: WindowEncoder,
        progress: ProgressTask | None,
    ) -> None:
        """Encode the wanted windows of a row, in the batches of the whole scan, and keep their features."""
        indices = [(x, y, row) for x in range(self._cover.shape[0]) for y in range(self._cover.shape[1])]
        windows = list(zip(indices, row_of_windows(image, self._scan.layout), strict=True))
        air = {index for index, window in windows if window.is_air}
        if progress is not None:
            progress.advance(sum(bool(wanted[index]) for index in air - self._air))
        self._air |= air
        available = self._available()
        while windows:
            first = windows[: len(first_batch([window for _, window in windows], encoder.batch))]
            full = [(index, window) for index, window in first if not window.is_air]
            new = [index for index, _ in full if wanted[index] and not available[index]]
            if new:
                pyramids = encoder.encode_within_memory([window for _, window in full])
                if pyramids is None:
                    continue
                for (index, _), pyramid in zip(full, pyramids, strict=True):
                    if index not in self._kept:
                        self._kept[index] = _KeptWindow(pyramid)
                del pyramids, pyramid  # freed before the next windows are encoded, because memory peaks there
                if progress is not None:
                    progress.advance(len(new))
            del windows[: len(first)]

    def _store_cells(self, missing: NDArray[np.bool_], encoder: WindowEncoder) -> None:
        """Store the cells whose windows are all available: those that are missing, and others if this costs little."""
        available = self._available()
        complete = self._cover.complete(available) & ~self._final
        kept = available.copy()
        for index in self._air:
            kept[index] = False
        encoded_over = self._cover.cells_under(kept)
        if not encoder.knows_air:
            encoded_over &= self._cover.complete(kept)
        cells = np.argwhere(complete & (missing | encoded_over))
        if not len(cells):
            return
        assert self._parts is not None  # noqa: S101 - the caller found the parts
        blend = CellBlend(self.levels, self._scan.layout, torch.device(self._scan.session.device))
        found = [(int(x), int(y), int(z)) for x, y, z in cells]
        if any(self._air.intersection(self._cover.windows_over_cell(cell)) for cell in found):
            encoder.air_within_memory()  # computed before a part is begun
        self._scan.store.add_part(
            self._scan.key, self._parts, (self._cell_sections(cell, blend, encoder) for cell in found)
        )
        for cell in found:
            self._final[cell] = True

    def _cell_sections(self, cell: _Index, blend: CellBlend, encoder: WindowEncoder) -> Iterator[CellSection]:
        """Yield the final features of a cell, in sections along z."""
        x, y, z = ((cuts[number], cuts[number + 1]) for number, cuts in zip(cell, self.edges, strict=True))
        windows = []
        for index in self._cover.windows_over_cell(cell):
            pyramid = encoder.air_within_memory() if index in self._air else self._kept[index].pyramid
            windows.append((self._origin(index), pyramid))
        for start, stop in _section_bounds(z, self._scan.layout.lattice):
            box = (x, y, (start, stop))
            yield CellSection(box, blend.blended(box, windows))
            encoder.release()
            for index in self._kept.keys() & set(self._cover.windows_over_cell(cell)):
                self._kept[index].release()

    def _origin(self, window: _Index) -> tuple[int, int, int]:
        x, y, z = (origins[number] for number, origins in zip(window, self._scan.layout.origins, strict=True))
        return x, y, z

    def _forget(self, missing: NDArray[np.bool_]) -> None:
        """Delete kept windows that no cell needs any more, and the oldest others if they take too much space."""
        unfinished = self._cover.windows_over(~self._final)
        needed_now = self._cover.windows_over(missing & ~self._final)
        size = sum(window.bytes for window in self._kept.values())
        for index in list(self._kept):
            if not unfinished[index] or (size > KEPT_BYTES and not needed_now[index]):
                size -= self._kept.pop(index).bytes

    def _sections(self) -> Iterator[FeatureSection]:
        """Yield all features, from the parts, as sections of the whole map."""
        assert self._parts is not None  # noqa: S101 - the whole map is not there yet
        x, y, depth = self.padded_shape
        for start, stop in _section_bounds((0, depth), self._scan.layout.lattice):
            levels = []
            for number, level in enumerate(self.levels):
                where = _divided(((0, x), (0, y), (start, stop)), level.stride)
                shape = (level.channels, *(high - low for low, high in where))
                section: NDArray[np.floating] = np.empty(shape, dtype=self.meta.dtype)
                self._parts.read_into(section, number, where)
                levels.append(torch.from_numpy(section))
            yield FeatureSection(start, stop, levels)


class _KeptWindow:
    """Features of a window in a temporary file.

    Attributes:
        pyramid: features of each level, float32 ``[C_l, X, Y, Z]``.
        bytes: size of the file.
    """

    def __init__(self, pyramid: Sequence[Tensor]) -> None:
        # Channels last, because the engines for CPUs return features in this order.
        last = [features.movedim(0, -1) for features in pyramid]
        self._file = FileTensor([sum(features.numel() for features in last)])
        self.bytes = 4 * self._file.tensor.numel()
        self.pyramid: list[Tensor] = []
        start = 0
        for features in last:
            stored = self._file.tensor[start : start + features.numel()].view(features.shape)
            stored.copy_(features)
            self.release()
            self.pyramid.append(stored.movedim(-1, 0))
            start += features.numel()

    def release(self) -> None:
        """Release the memory of the file; the values are read again when they are needed."""
        self._file.release()


class _Cover:
    """Which windows lie over which cells.

    Attributes:
        shape: number of windows along x, y, z.
    """

    def __init__(self, layout: WindowLayout, edges: Sequence[Sequence[int]]) -> None:
        self.shape = tuple(len(origins) for origins in layout.origins)
        self._along: list[NDArray[np.int64]] = []
        for origins, size, cuts in zip(layout.origins, layout.window, edges, strict=True):
            low, high = np.array(cuts[:-1]), np.array(cuts[1:])
            first = np.array(origins)[:, None]
            self._along.append(((first <= low) & (high <= first + size)).astype(np.int64))
        self._total = self._count(np.ones(self.shape, dtype=bool))

    def windows_over(self, cells: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """Return the windows that lie over any of the cells, bool of the shape of the windows."""
        found: NDArray[np.bool_] = np.einsum("abc,xa,yb,zc->xyz", cells.astype(np.int64), *self._along) > 0
        return found

    def cells_under(self, windows: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """Return the cells that lie under any of the windows, bool of the shape of the cells."""
        found: NDArray[np.bool_] = self._count(windows) > 0
        return found

    def complete(self, windows: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """Return the cells over which no other windows lie than the given ones, bool of the shape of the cells."""
        found: NDArray[np.bool_] = self._count(windows) == self._total
        return found

    def windows_over_cell(self, cell: _Index) -> list[_Index]:
        """Return the windows over a cell, in the order of encoding."""
        x, y, z = (np.flatnonzero(along[:, number]) for number, along in zip(cell, self._along, strict=True))
        return [(int(first), int(second), int(third)) for third, first, second in itertools.product(z, x, y)]

    def _count(self, windows: NDArray[np.bool_]) -> NDArray[np.int64]:
        count: NDArray[np.int64] = np.einsum("xyz,xa,yb,zc->abc", windows.astype(np.int64), *self._along)
        return count


class _RowImage:
    """The input of the encoder under one row of windows; slices that two rows share are read once."""

    def __init__(self, scan: _Scan) -> None:
        self._scan = scan
        x, y, _ = scan.layout.padded_shape
        self._image = torch.zeros(x, y, scan.layout.window[2])
        self._first = self._stop = 0

    def read(self, row: int) -> Tensor:
        """Return the image ``[X, Y, depth]`` under a row; rows must be read in ascending order."""
        grid, depth = self._scan.grid, self._scan.layout.window[2]
        first = self._scan.layout.origins[2][row]
        if first - self._first < depth:
            if first > self._first:
                shift_down(self._image, first - self._first)
        else:
            self._image.zero_()
        start, stop = max(first, self._stop), min(first + depth, grid.shape[2])
        for z0 in range(start, stop, SECTION_SLICES):
            z1 = min(z0 + SECTION_SLICES, stop)
            section = torch.from_numpy(grid.section(self._scan.volume, z0, z1))
            self._image[: grid.shape[0], : grid.shape[1], z0 - first : z1 - first] = section
        self._first, self._stop = first, max(stop, self._stop)
        return self._image


def encode_on_demand(
    volume: Volume,
    *,
    bundle: EncoderBundle,
    session: EncoderSession,
    store: FeatureStore,
    storage: StorageType = "float16",
    grid: Grid | None = None,
    budget: Budget = AS_MUCH_AS_IS_FREE,
) -> EncodedScan:
    """Return a scan whose features are encoded on demand; the map of the store, if it is complete, is used as it is.

    An encoder that computes a whole scan in one pass (:attr:`EncoderBundle.whole_scan`) encodes the scan at once.

    Args:
        volume: the CT; read again whenever windows are encoded.
        bundle: encoder bundle.
        session: open session of the same encoder; must be open whenever windows are encoded.
        store: cache of feature maps; must exist as long as the features are used.
        storage: number format on disk.
        grid: grid of the scan; ``None`` computes the grid.
        budget: memory that may be used.

    Raises:
        OutOfSpaceError: the feature cache cannot be written.
    """
    grid = grid or Grid.of(volume, bundle.preprocessing)
    if bundle.whole_scan is not None:
        encoded = encode_scan(
            volume, bundle=bundle, session=session, store=store, storage=storage, grid=grid, budget=budget
        )
        meta = encoded.features.meta
        layout = _one_window(meta, lattice=max(level.stride for level in bundle.levels))
        scan = _Scan(volume, grid, layout, bundle, session, store, budget, meta, key="")
        return EncodedScan(grid, FeaturesOnDemand(scan, encoded.features))
    layout = layout_of(grid, bundle)
    key = store.key(volume, bundle.preprocessing, bundle.encoder_id, OVERLAP, storage, precision=session.precision)
    meta = FeatureMapMeta(
        grid_shape=grid.shape,
        padded_shape=layout.padded_shape,
        levels=bundle.levels,
        dtype=storage,
        encoder_id=bundle.encoder_id,
    )
    scan = _Scan(volume, grid, layout, bundle, session, store, budget, meta, key)
    return EncodedScan(grid, FeaturesOnDemand(scan, store.get(key)))


def _one_window(meta: FeatureMapMeta, lattice: int) -> WindowLayout:
    """Return the layout of a map that was encoded as a whole: one window, which is the padded grid."""
    shape = meta.padded_shape
    return WindowLayout(meta.grid_shape, shape, lattice, interval=shape, padded_shape=shape, origins=((0,), (0,), (0,)))


def _encoded_whole(scan: _Scan) -> Features:
    """Return the map of the whole scan."""
    return encode_scan(
        scan.volume,
        bundle=scan.bundle,
        session=scan.session,
        store=scan.store,
        storage=scan.meta.dtype,
        grid=scan.grid,
        budget=scan.budget,
    ).features


def _section_bounds(z: Range, lattice: int) -> list[Range]:
    thickness = math.ceil(SECTION_SLICES / lattice) * lattice
    return [(start, min(start + thickness, z[1])) for start in range(*z, thickness)]


def _scaled(box: Ranges, stride: int) -> Ranges:
    x, y, z = ((low * stride, high * stride) for low, high in box)
    return x, y, z


def _divided(box: Ranges, stride: int) -> Ranges:
    x, y, z = ((low // stride, high // stride) for low, high in box)
    return x, y, z
