"""The locator of an adapter: a coarse pass that tells where the organs are, learned from the same annotated scans.

An encoder with windows can encode a part of a scan (:mod:`fseft_edge.runtime.encoder.on_demand`). The locator names
this part. It is a linear adapter on all levels of the built-in encoder ``edge_base``, which encodes a scan at 3 mm in
seconds. A *place* of an organ is the bounding box of connected voxels whose probability exceeds a threshold, plus a
margin. Threshold and margin are chosen for each organ on scans that were left out of the training: with the margin, the
places contain every voxel of the organ in every left-out scan; the threshold is the lowest one whose places need few
windows. The recall in the adapter file is that of scans that were left out of the training and of this choice.

The mask decides what the organ is: while it touches the edge of the decided part, this part grows
(:mod:`fseft_edge.masks.region`). So a place that contains only a piece of an organ is sufficient.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import product
from typing import Final

import numpy as np
from numpy.typing import NDArray

from fseft_edge.adaptation.block_sampling import SupportScan
from fseft_edge.adaptation.cross_validation import can_validate, folds
from fseft_edge.adaptation.training import TrainingSettings, train_adapter
from fseft_edge.adapters.blocks import Box
from fseft_edge.adapters.file import LocatedOrgan, Locator, LocatorDescription, stored_settings
from fseft_edge.adapters.network import Adapter, AdapterSettings, HeadRows
from fseft_edge.export.built_in import open_encoder
from fseft_edge.masks.prediction import predict_sections
from fseft_edge.masks.region import clipped, separate
from fseft_edge.runtime.encoder.backends.base import EncoderSession
from fseft_edge.runtime.encoder.bundle import WEIGHTS, EncoderBundle
from fseft_edge.runtime.encoder.encoding import EncodedScan, encode_scan
from fseft_edge.runtime.encoder.feature_store import FeatureStore
from fseft_edge.runtime.encoder.session import open_session
from fseft_edge.runtime.encoder.windows import WindowLayout
from fseft_edge.runtime.scans.components import components
from fseft_edge.runtime.scans.grid import Grid
from fseft_edge.runtime.scans.volume import Volume
from fseft_edge.runtime.system.memory import Budget
from fseft_edge.runtime.system.progress import Progress, SilentProgress

_LOG = logging.getLogger(__name__)

ENCODER: Final = "edge_base"
"""Name of the built-in encoder of the coarse pass."""

_SETTINGS = AdapterSettings(method="linear", levels="all")
_THRESHOLDS = (0.5, 0.3, 0.2, 0.1, 0.05, 0.02, 0.01)
_LEAST_SHARE = 0.01
"""Smaller components than this share of the largest one, in voxels, are no places."""
_MARGIN_MM = 6.0
"""Addition to the largest margin that a left-out scan needed."""
_MORE_WINDOWS = 1.1
"""A lower threshold is chosen if it needs at most this many times the windows: it finds an organ more surely."""

_LEAST_RECALL = 0.5
"""A locator that finds less of an organ in a left-out scan is not used."""
_MOST_SELECTED = 0.8
"""A locator that selects a larger share of the windows gains nothing."""

_FEWEST_WINDOWS = 3
_LEAST_GAIN = 24
_COARSE_COST = 96**3 * 15.3e6
"""Voxels of a window of the encoder of the coarse pass, times the bytes of its weights."""


@dataclass(frozen=True, eq=False)
class CoarseEncoder:
    """The open encoder of the coarse pass."""

    bundle: EncoderBundle
    session: EncoderSession

    def encode(self, volume: Volume, store: FeatureStore, budget: Budget) -> EncodedScan:
        """Return the features of a scan for :func:`locate`."""
        return encode_scan(volume, bundle=self.bundle, session=self.session, store=store, budget=budget)


@contextmanager
def open_coarse_encoder(device: str) -> Iterator[CoarseEncoder]:
    """Open the encoder of the coarse pass; the built-in encoder is exported at its first use."""
    bundle = open_encoder(ENCODER)
    with open_session(bundle, device) as session:
        yield CoarseEncoder(bundle, session)


def is_worthwhile(bundle: EncoderBundle, windows: int) -> bool:
    """Return whether a part of a scan is encoded much faster than the whole scan, although a locator is needed.

    The time of a window is estimated as the product of its voxels and of the bytes of the weights.

    Args:
        bundle: encoder of the adapter.
        windows: number of windows of the scan.
    """
    if bundle.whole_scan is not None or windows < _FEWEST_WINDOWS:
        return False
    weights = bundle.graph if bundle.graph_only and bundle.graph is not None else bundle.path / WEIGHTS
    return windows * math.prod(bundle.window) * weights.stat().st_size >= _LEAST_GAIN * _COARSE_COST


@dataclass(frozen=True, eq=False)
class CoarseScan:
    """A support scan for the training of a locator.

    Attributes:
        scan: the scan with the features of the coarse pass, with its grid.
        grid: grid of the adapter's encoder.
        layout: windows of the adapter's encoder.
    """

    scan: SupportScan
    grid: Grid
    layout: WindowLayout


@dataclass(frozen=True, eq=False)
class TrainedLocator:
    """A locator, and the places that it found in the support scans.

    Attributes:
        locator: the locator, trained on all scans.
        left_out: for every support scan, the boxes on the grid of the adapter's encoder that were located without this
            scan; None if an organ was not located.
    """

    locator: Locator
    left_out: tuple[tuple[Box, ...] | None, ...]


@dataclass(frozen=True)
class Located:
    """The places of the organs in a scan.

    Attributes:
        boxes: boxes on the grid of the adapter's encoder that contain the places of all organs.
        missing: names of the organs without a place.
    """

    boxes: tuple[Box, ...]
    missing: tuple[str, ...]


def locate(locator: Locator, encoded: EncodedScan, grid: Grid) -> Located:
    """Return the places of the organs of a locator.

    Args:
        locator: the locator.
        encoded: the scan with the features of the coarse pass.
        grid: grid of the adapter's encoder for the same scan.
    """
    organs = locator.description.organs
    shape = encoded.grid.shape
    above = np.empty((len(organs), *shape), np.bool_)
    for start, slab in predict_sections(encoded, [locator.adapter]):
        for organ, kept, values in zip(organs, above, slab, strict=True):
            kept[..., start : start + values.shape[-1]] = values > organ.threshold
    boxes: list[Box] = []
    missing: list[str] = []
    for organ, kept in zip(organs, above, strict=True):
        places = _places(kept)
        boxes += [on_grid(place, encoded.grid, grid, organ.margin_mm) for place in places]
        if not places:
            missing.append(organ.name)
    return Located(tuple(separate(boxes)), tuple(missing))


def on_grid(place: Box, coarse: Grid, grid: Grid, margin_mm: float) -> Box:
    """Return the box on another grid of the same scan that contains a place and a margin around it.

    Args:
        place: the place, in voxels of ``coarse``.
        coarse: grid of the coarse pass.
        grid: grid of the result.
        margin_mm: margin in mm.
    """
    between = np.linalg.inv(grid.affine) @ coarse.affine
    corners = np.array([[low - 0.5, high - 0.5] for low, high in place.ranges])
    ends = between[:3, :3, None] * corners  # the axes of both grids are those of the scan
    low = ends.min(axis=2).sum(axis=1) + between[:3, 3]
    high = ends.max(axis=2).sum(axis=1) + between[:3, 3]
    margin = margin_mm / np.linalg.norm(grid.affine[:3, :3], axis=0)
    box = Box(
        *(
            (math.floor(first - around + 0.5), math.ceil(last + around + 0.5))
            for first, last, around in zip(low, high, margin, strict=True)
        )
    )
    return clipped(box, Box(*((0, length) for length in grid.shape)))


def train_locator(
    support: Sequence[CoarseScan],
    organs: Sequence[str],
    rows: HeadRows,
    *,
    coarse: EncoderBundle,
    reach: Callable[[Box], Box],
    groups: Sequence[int],
    training: TrainingSettings,
    progress: Progress | None = None,
) -> TrainedLocator | None:
    """Train a locator, and choose threshold and margin of each organ on left-out scans.

    Args:
        support: the support scans.
        organs: names of the organs.
        rows: classifiers of the organs in the head of the encoder of the coarse pass.
        coarse: encoder of the coarse pass.
        reach: returns the box of level 0 that an adapter reads to decide a box, for the number of windows.
        groups: number of the group of each scan; a group is left out together.
        training: seed and device of the training.
        progress: receiver of progress reports; None reports nothing.

    Returns:
        The locator; None, with a warning, if an organ is not annotated in two groups, if an organ was not found at all
        or for the most part missed in a left-out scan, or if nearly all windows would be encoded.
    """
    of_organs = ([scan.scan.annotated[k : k + 1] for scan in support] for k in range(len(organs)))
    if not all(can_validate(annotated, groups) for annotated in of_organs):
        _LOG.warning("the adapter gets no locator: a locator needs scans of two patients for each organ")
        return None
    training = replace(training, variations=0, ridge=TrainingSettings.ridge)
    parts = folds(groups)
    views: list[_View] = [None] * len(support)  # type: ignore[list-item]  # every scan is left out by one fold
    with (progress or SilentProgress()).task("learn to locate", len(parts) + 1) as task:
        for part in parts:
            others = [scan.scan for index, scan in enumerate(support) if index not in part]
            adapter = train_adapter(_SETTINGS, others, head_rows=rows, training=training).adapter
            for index in part:
                views[index] = _View.of(support[index], adapter)
            task.advance(1)
        adapter = train_adapter(_SETTINGS, [scan.scan for scan in support], head_rows=rows, training=training).adapter
        task.advance(1)
    chosen = [_choice(views, organ, reach) for organ in range(len(organs))]
    unfound = [name for name, choice in zip(organs, chosen, strict=True) if choice is None]
    if unfound:
        _LOG.warning(
            "the adapter gets no locator: in a left-out scan, no place was found for %s; whole scans are encoded",
            ", ".join(unfound),
        )
        return None
    left_out: list[tuple[Box, ...] | None] = [()] * len(support)
    recall: list[list[float]] = [[] for _ in organs]
    for part in parts:
        others_views = [view for index, view in enumerate(views) if index not in part]
        choices = [_choice(others_views, organ, reach) for organ in range(len(organs))]
        for index in part:
            left_out[index] = views[index].located(choices)
            for organ, choice in enumerate(choices):
                share = views[index].recall(organ, choice)
                if share is not None:
                    recall[organ].append(round(share, 4))
    missed = [name for name, found in zip(organs, recall, strict=True) if min(found, default=1.0) < _LEAST_RECALL]
    if missed:
        _LOG.warning(
            "the adapter gets no locator, because it looked for %s in the wrong place of a left-out scan; whole scans "
            "are encoded",
            ", ".join(missed),
        )
        return None
    selected = [
        1.0 if boxes is None else windows_over(view.layout, [reach(box) for box in boxes]) / view.layout.windows
        for boxes, view in zip(left_out, views, strict=True)
    ]
    mean_selected = sum(selected) / len(selected)
    if mean_selected > _MOST_SELECTED:
        _LOG.warning(
            "the adapter gets no locator: %.0f %% of the windows would be encoded; an adapter that reads less context "
            "needs fewer windows (--levels finest, or --method pointwise)",
            100 * mean_selected,
        )
        return None
    description = LocatorDescription(
        encoder_id=coarse.encoder_id,
        encoder_name=coarse.manifest.name,
        levels=tuple((level.stride, level.channels) for level in coarse.levels),
        settings=stored_settings(_SETTINGS),
        organs=tuple(
            LocatedOrgan(name=name, threshold=choice.threshold, margin_mm=choice.margin_mm, recall=tuple(found))
            for name, choice, found in zip(organs, chosen, recall, strict=True)
            if choice is not None
        ),
        selected=tuple(round(share, 4) for share in selected),
    )
    return TrainedLocator(Locator(description, adapter), tuple(left_out))


def windows_over(layout: WindowLayout, boxes: Sequence[Box]) -> int:
    """Return the number of windows that overlap any of the boxes of level 0."""
    over: set[tuple[int, ...]] = set()
    for box in boxes:
        along = [
            [origin for origin in origins if origin < high and origin + size > low]
            for (low, high), origins, size in zip(box.ranges, layout.origins, layout.window, strict=True)
        ]
        over |= set(product(*along))
    return len(over)


@dataclass(frozen=True)
class _Choice:
    """Threshold and margin of an organ."""

    threshold: float
    margin_mm: float


@dataclass(frozen=True, eq=False)
class _View:
    """What a locator that was trained without a scan sees in the scan.

    Attributes:
        places: for each organ and each threshold of ``_THRESHOLDS``, the places without a margin, in coarse voxels.
        voxels: for each organ, the positions ``[m, 3]`` of the coarse voxels that the organ fills in part; None if it
            is not annotated.
        coarse: grid of the coarse pass.
        grid: grid of the adapter's encoder.
        layout: windows of the adapter's encoder.
    """

    places: tuple[tuple[list[Box], ...], ...]
    voxels: tuple[NDArray[np.int64] | None, ...]
    coarse: Grid
    grid: Grid
    layout: WindowLayout

    @classmethod
    def of(cls, support: CoarseScan, adapter: Adapter) -> _View:
        """Return the view of a scan through an adapter that was trained without it."""
        scan = support.scan
        assert scan.grid is not None  # noqa: S101 - narrows the type; the caller gives a grid
        sections = predict_sections(EncodedScan(scan.grid, scan.features), [adapter])
        probabilities = np.concatenate([section for _, section in sections], axis=-1)
        shares = scan.occupancy.block(Box(*((0, length) for length in scan.shape))).numpy()
        return cls(
            tuple(tuple(_places(organ > threshold) for threshold in _THRESHOLDS) for organ in probabilities),
            tuple(
                np.argwhere(share > 0) if known else None for share, known in zip(shares, scan.annotated, strict=True)
            ),
            scan.grid,
            support.grid,
            support.layout,
        )

    def needed_mm(self, organ: int, number: int) -> float | None:
        """Return the smallest margin with which the places of a threshold contain the organ; None if it is unknown."""
        distances = self._distances(organ, number)
        return None if distances is None else float(distances.max(initial=0.0))

    def recall(self, organ: int, choice: _Choice | None) -> float | None:
        """Return the share of the voxels of an organ inside its places; None if it is not annotated.

        Without a place, the share is 1, because the whole scan is encoded.
        """
        distances = None if choice is None else self._distances(organ, _THRESHOLDS.index(choice.threshold))
        if choice is None or distances is None or not distances.size:
            return None
        return 1.0 if np.isinf(distances).all() else float((distances <= choice.margin_mm).mean())

    def boxes(self, organ: int, choice: _Choice) -> list[Box]:
        """Return the places of an organ on the grid of the adapter's encoder."""
        places = self.places[organ][_THRESHOLDS.index(choice.threshold)]
        return [on_grid(place, self.coarse, self.grid, choice.margin_mm) for place in places]

    def located(self, choices: Sequence[_Choice | None]) -> tuple[Box, ...] | None:
        """Return the places of all organs; None if an organ has none."""
        boxes = [self.boxes(organ, choice) if choice else [] for organ, choice in enumerate(choices)]
        return tuple(separate([box for organ in boxes for box in organ])) if all(boxes) else None

    def _distances(self, organ: int, number: int) -> NDArray[np.float64] | None:
        """Return for each voxel of an organ the margin in mm with which the nearest place contains the voxel."""
        voxels = self.voxels[organ]
        if voxels is None:
            return None
        spacing = np.linalg.norm(self.coarse.affine[:3, :3], axis=0)
        nearest = np.full(len(voxels), np.inf)
        for place in self.places[organ][number]:
            low, high = np.array(place.ranges).T
            outside = np.maximum(np.maximum(low - voxels, voxels - (high - 1)), 0) * spacing
            nearest = np.minimum(nearest, outside.max(axis=1))
        return nearest


def _choice(views: Sequence[_View], organ: int, reach: Callable[[Box], Box]) -> _Choice | None:
    """Return the lowest threshold that needs few windows, and the margin that contains an organ in all scans."""
    known = [view for view in views if view.voxels[organ] is not None]
    possible: list[tuple[int, _Choice]] = []
    for number, threshold in enumerate(_THRESHOLDS):
        needed = max((view.needed_mm(organ, number) or 0.0 for view in known), default=math.inf)
        if math.isinf(needed):
            continue
        choice = _Choice(threshold, round(needed + _MARGIN_MM, 1))
        windows = sum(windows_over(view.layout, [reach(box) for box in view.boxes(organ, choice)]) for view in known)
        possible.append((windows, choice))
    if not possible:
        return None
    fewest = min(windows for windows, _ in possible)
    return [choice for windows, choice in possible if windows <= _MORE_WINDOWS * fewest][-1]


def _places(above: NDArray[np.bool_]) -> list[Box]:
    """Return the bounding boxes of the connected components of a mask that are not much smaller than the largest."""
    if not above.any():
        return []
    from scipy.ndimage import find_objects  # noqa: PLC0415 - slow to import

    numbered, sizes = components(above)
    kept = np.flatnonzero(sizes >= _LEAST_SHARE * sizes.max()) + 1
    found = find_objects(numbered)
    return [Box(*((part.start, part.stop) for part in found[number - 1])) for number in kept]
