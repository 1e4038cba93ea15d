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
        windows: number of windows that were encoded.
        of: number of windows of the whole scan.
        why: ``located``: only the windows around the organs; ``whole scan``; ``nothing located``: the whole scan,
            because an organ was not located.
    """

    windows: int
    of: int
    why: str


@dataclass(frozen=True, eq=False)
class OrganFinder:
    """The open encoder of the coarse pass with the locators of all adapters."""

    bundle: EncoderBundle
    coarse: CoarseEncoder
    locators: Sequence[Locator]

    def find(self, volume: Volume, grid: Grid, store: FeatureStore, settings: SegmentationSettings) -> Located | None:
        """Return the places of all organs; None if the whole scan has too few windows, or cannot be located."""
        if not is_worthwhile(self.bundle, layout_of(grid, self.bundle).windows):
            return None
        try:
            encoded = self.coarse.encode(volume, store, settings.budget)
            places = [locate(locator, encoded, grid) for locator in self.locators]
        except FseftEdgeError as error:
            _LOG.warning("the organs are not located, and the whole scan is encoded: %s", error.message)
            return None
        boxes: list[Box] = [box for found in places for box in found.boxes]
        return Located(tuple(separate(boxes)), tuple(name for found in places for name in found.missing))


@contextmanager
def open_finder(
    settings: SegmentationSettings, files: Sequence[AdapterFile], bundle: EncoderBundle
) -> Iterator[OrganFinder | None]:
    """Open the encoder of the coarse pass; yield None if whole scans are encoded."""
    if bundle.whole_scan is not None or not needs_no_whole_scan(settings):
        yield None
        return
    locators = [file.locator for file in files if file.locator is not None]
    if len(locators) < len(files):
        if locators:
            _LOG.warning("whole scans are encoded, because an adapter has no locator")
        yield None
        return
    try:
        opened = open_coarse_encoder(settings.device)
        coarse = opened.__enter__()
    except FseftEdgeError as error:
        _LOG.warning("whole scans are encoded, because the locator cannot be opened: %s", error.message)
        yield None
        return
    try:
        others = [locator for locator in locators if locator.description.encoder_id != coarse.bundle.encoder_id]
        if others:
            _LOG.warning(
                "whole scans are encoded, because the locator was trained with another version of the encoder %s (id "
                "%s, now %s); train the adapter again with `fseft-edge adapt`",
                others[0].description.encoder_name,
                others[0].description.encoder_id[:12],
                coarse.bundle.encoder_id[:12],
            )
            yield None
            return
        for locator in locators:
            locator.adapter.to(coarse.session.device)
        yield OrganFinder(bundle, coarse, locators)
    finally:
        opened.__exit__(None, None, None)


def needs_no_whole_scan(settings: SegmentationSettings) -> bool:
    """Return whether the settings allow to encode only a part of a scan; say why not."""
    reasons = {
        "--transductive needs the sizes of the organs in the whole scan": settings.transduction is not None,
        "--save-probabilities writes the probabilities of the whole scan": settings.save_probabilities,
    }
    for reason, given in reasons.items():
        if given:
            _LOG.info("whole scans are encoded, because %s", reason)
    return not settings.whole_scan and not any(reasons.values())


def windows_entry(encoded: EncodedWindows | None) -> dict[str, Any]:
    """Return the entry ``encoded`` of the JSON file of a case; nothing for an encoder without windows."""
    if encoded is None:
        return {}
    return {"encoded": {"windows": encoded.windows, "of": encoded.of, "why": encoded.why}}
