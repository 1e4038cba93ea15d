"""The part of a scan in which the organs are: which part is encoded, and why.

The locators of the adapters name the part (:mod:`fseft_edge.adaptation.locator`). The whole scan is encoded if it has
few windows, if an adapter has no usable locator, if an organ is not located, or if the result needs the whole scan.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

from fseft_edge.adaptation.locator import CoarseEncoder, Located, is_worthwhile, locate, open_coarse_encoder
from fseft_edge.adapters.blocks import Box
from fseft_edge.adapters.file import AdapterFile, Locator
from fseft_edge.masks.region import separate
from fseft_edge.runtime.encoder.bundle import EncoderBundle
from fseft_edge.runtime.encoder.encoding import layout_of
from fseft_edge.runtime.encoder.feature_store import FeatureStore
from fseft_edge.runtime.errors import FseftEdgeError
from fseft_edge.runtime.scans.grid import Grid
from fseft_edge.runtime.scans.volume import Volume
from fseft_edge.segmentation.settings import SegmentationSettings

_LOG = logging.getLogger(__name__)

LOCATED: Final = "located"
WHOLE_SCAN: Final = "whole scan"
NOTHING_LOCATED: Final = "nothing located"


@dataclass(frozen=True)
class EncodedWindows:
    """What was encoded of a scan, for an encoder with windows.

    Attributes:
        windows: number of windows that the result needed, encoded now or by an earlier run that used the same cache.
        of: number of windows of the whole scan.
        why: ``located``: only the windows around the organs; ``whole scan``; ``nothing located``: the whole scan,
            because an organ was not located, or has no voxel where it was located.
    """

    windows: int
    of: int
    why: str


@dataclass(frozen=True)
class WholeScan:
    """Whole scans are encoded.

    Attributes:
        warning: a sentence that the results state, if the locator should have been used; else empty.
    """

    warning: str = ""


@dataclass(frozen=True, eq=False)
class OrganFinder:
    """The open encoder of the coarse pass with the locators of all adapters."""

    bundle: EncoderBundle
    coarse: CoarseEncoder
    locators: Sequence[Locator]

    def find(
        self, volume: Volume, grid: Grid, store: FeatureStore, settings: SegmentationSettings
    ) -> Located | WholeScan:
        """Return the places of all organs, or why the whole scan is encoded."""
        if not is_worthwhile(self.bundle, layout_of(grid, self.bundle).windows):
            return WholeScan()
        try:
            encoded = self.coarse.encode(volume, store, settings.budget)
            places = [locate(locator, encoded, grid) for locator in self.locators]
        except FseftEdgeError as error:
            return WholeScan(f"The whole scan was encoded, because the organs could not be located: {error.message}")
        boxes: list[Box] = [box for found in places for box in found.boxes]
        return Located(tuple(separate(boxes)), tuple(name for found in places for name in found.missing))


@contextmanager
def open_finder(
    settings: SegmentationSettings, files: Sequence[AdapterFile], bundle: EncoderBundle
) -> Iterator[OrganFinder | WholeScan]:
    """Open the encoder of the coarse pass, or yield why whole scans are encoded."""
    locators = [file.locator for file in files if file.locator is not None]
    if bundle.whole_scan is not None or not locators or settings.whole_scan:
        yield WholeScan()
        return
    reason = needs_whole_scan(settings)
    if reason:
        _LOG.warning("whole scans are encoded, because %s", reason)
        yield WholeScan()
        return
    without = [organ.name for file in files if file.locator is None for organ in file.description.organs]
    if without:
        yield WholeScan(f"The whole scan was encoded, because the adapter of {', '.join(without)} has no locator.")
        return
    try:
        opened = open_coarse_encoder(settings.device)
        coarse = opened.__enter__()
    except FseftEdgeError as error:
        yield WholeScan(f"The whole scan was encoded, because the locator cannot be opened: {error.message}")
        return
    try:
        others = [locator for locator in locators if locator.description.encoder_id != coarse.bundle.encoder_id]
        if others:
            of = others[0].description
            yield WholeScan(
                "The whole scan was encoded, because the locator was trained with another version of the encoder "
                f"{of.encoder_name} (id {of.encoder_id[:12]}, now {coarse.bundle.encoder_id[:12]}): train the adapter "
                "again with `fseft-edge adapt`."
            )
            return
        for locator in locators:
            locator.adapter.to(coarse.session.device)
        yield OrganFinder(bundle, coarse, locators)
    finally:
        opened.__exit__(None, None, None)


def needs_whole_scan(settings: SegmentationSettings) -> str | None:
    """Return why settings other than ``whole_scan`` need the whole scan; None if they do not need it."""
    if settings.transduction is not None:
        return "--transductive needs the sizes of the organs in the whole scan"
    if settings.save_probabilities:
        return "--save-probabilities writes the probabilities of the whole scan"
    return None


def windows_entry(encoded: EncodedWindows | None) -> dict[str, Any]:
    """Return the entry ``encoded`` of the JSON file of a case; nothing for an encoder without windows."""
    if encoded is None:
        return {}
    return {"encoded": {"windows": encoded.windows, "of": encoded.of, "why": encoded.why}}
