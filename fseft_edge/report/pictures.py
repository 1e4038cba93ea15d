"""A picture of a segmentation: axial, coronal and sagittal plane, prediction and truth outlined."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from scipy.ndimage import maximum_filter, minimum_filter

from fseft_edge.evaluation.metrics import dice
from fseft_edge.report.planes import Cut, Mask, three_cuts
from fseft_edge.runtime.scans.volume import Volume
from fseft_edge.runtime.system.atomic import atomic_path

Colour = tuple[int, int, int]

SOFT_TISSUE_HU: Final = (-160.0, 240.0)
"""Level 40, width 400: the customary soft-tissue window."""

PREDICTION_COLOUR: Final[Colour] = (255, 150, 0)
TRUTH_COLOUR: Final[Colour] = (60, 185, 255)
"""Orange and sky blue stay apart in all common forms of colour blindness (after Okabe and Ito, 2008)."""

_LARGEST_WIDTH: Final = 1440
_LEAST_WIDTH: Final = 720
_LARGEST_PANEL_HEIGHT: Final = 640
_GAP: Final = 12
_TEXT_SIZE: Final = 20
_LINE_HEIGHT: Final = 30
_TEXT_COLOUR: Final[Colour] = (235, 235, 235)
_BACKGROUND: Final[Colour] = (16, 16, 18)
_SCALE_BAR_MM: Final = 50.0

_SUPERSAMPLING: Final = 2
_PREDICTION_WIDTH: Final = 5
_TRUTH_WIDTH: Final = 11
"""Widths in supersampled pixels, odd. The truth is the wider band below, so that both are seen where they agree."""


def three_plane_picture(volume: Volume, masks: Mapping[str, tuple[Mask, Mask | None]], path: Path) -> None:
    """Write one PNG with three planes of the scan, the masks' outlines, and a legend with each organ's DSC.

    The planes are those of :func:`fseft_edge.report.planes.three_cuts`, in radiological convention and at one scale
    in mm. Several organs are numbered. The bytes depend on nothing but the arguments and the version of Pillow.

    Args:
        volume: the scan.
        masks: organ name → (prediction, reference or None), boolean `[X, Y, Z]` on the scan's lattice.
        path: the PNG, replaced atomically.

    Raises:
        OutOfSpaceError: the disk is full or not writable.
    """
    for name, pair in masks.items():
        for mask in pair:
            if mask is not None and (mask.shape != volume.shape or mask.dtype != np.bool_):
                raise ValueError(f"a mask of {name} is not a boolean array of the scan's shape {volume.shape}")
    cuts = three_cuts(volume, list(masks.values()))
    scale = _pixels_per_mm(cuts)
    panels = [_panel(cut, scale, numbered=len(masks) > 1) for cut in cuts]
    with atomic_path(path) as temporary:
        _assembled(panels, _legend(masks)).save(temporary, format="PNG")


@dataclass(frozen=True)
class _LegendEntry:
    text: str
    colour: Colour | None = None


def _legend(masks: Mapping[str, tuple[Mask, Mask | None]]) -> list[_LegendEntry]:
    entries = [_LegendEntry("prediction", PREDICTION_COLOUR)]
    if any(truth is not None for _, truth in masks.values()):
        entries.append(_LegendEntry("truth", TRUTH_COLOUR))
    for number, (name, (prediction, truth)) in enumerate(masks.items(), start=1):
        score = None if truth is None else dice(prediction, truth)
        text = name if score is None else f"{name}  DSC {score:.3f}"
        entries.append(_LegendEntry(f"{number}  {text}" if len(masks) > 1 else text))
    return entries


def _pixels_per_mm(cuts: Sequence[Cut]) -> float:
    widths, heights = zip(*(cut.size_mm for cut in cuts), strict=True)
    return float(min((_LARGEST_WIDTH - _GAP * (len(cuts) + 1)) / sum(widths), _LARGEST_PANEL_HEIGHT / max(heights)))


def _panel(cut: Cut, scale: float, *, numbered: bool) -> Image.Image:
    """One plane at the given pixels per mm, with outlines, edge letters and a scale bar."""
    width, height = (max(round(length * scale), 1) for length in cut.size_mm)
    fine = (width * _SUPERSAMPLING, height * _SUPERSAMPLING)
    low, high = SOFT_TISSUE_HU
    grey = np.clip((cut.hu - low) / (high - low), 0, 1) * 255
    panel = Image.fromarray(np.rint(grey).astype(np.uint8)).resize(fine, Image.Resampling.BICUBIC).convert("RGB")
    for organ in cut.organs:
        if organ.truth is not None:
            panel.paste(TRUTH_COLOUR, mask=_outline(organ.truth, fine, _TRUTH_WIDTH))
    for organ in cut.organs:
        panel.paste(PREDICTION_COLOUR, mask=_outline(organ.prediction, fine, _PREDICTION_WIDTH))
    panel = panel.resize((width, height), Image.Resampling.BOX)
    writer = _Writer(panel)
    if numbered:
        for number, organ in enumerate(cut.organs, start=1):
            _write_number(writer, number, organ.prediction if organ.truth is None else organ.prediction | organ.truth)
    left, right, top, bottom = cut.plane.edges
    writer.write(left, (4, height / 2), "lm")
    writer.write(right, (width - 4, height / 2), "rm")
    writer.write(top, (width / 2, 4), "ma")
    writer.write(bottom, (width / 2, height - 4), "md")
    writer.write(cut.plane.name, (6, 4), "la")
    bar = round(_SCALE_BAR_MM * scale)
    if bar < width / 2:
        for colour, margin in ((_BACKGROUND, 2), (_TEXT_COLOUR, 0)):
            corners = [(width - 10 - bar - margin, height - 11 - margin), (width - 10 + margin, height - 8 + margin)]
            writer.draw.rectangle(corners, fill=colour)
        writer.write(f"{_SCALE_BAR_MM / 10:.0f} cm", (width - 10, height - 14), "rd")
    return panel


def _outline(mask: Mask, size: tuple[int, int], width: int) -> Image.Image:
    """A band along the edge of a mask shown at `size`; the edge is where linear interpolation is one half."""
    smooth = Image.fromarray(mask.astype(np.uint8) * 255).resize(size, Image.Resampling.BILINEAR)
    area = np.asarray(smooth) >= 128
    band = np.zeros(area.shape, dtype=np.uint8)
    rows, columns = np.flatnonzero(area.any(axis=1)), np.flatnonzero(area.any(axis=0))
    if rows.size:
        box = tuple(slice(max(int(at[0]) - width, 0), int(at[-1]) + 1 + width) for at in (rows, columns))
        band[box] = 255 * (maximum_filter(area[box], width) & ~minimum_filter(area[box], width))
    return Image.fromarray(band)


def _write_number(writer: _Writer, number: int, mask: Mask) -> None:
    """The organ's number beside the uppermost rightmost corner of what the plane shows of it."""
    if not mask.any():
        return
    width, height = writer.size
    rows, columns = np.nonzero(mask)
    x, y = (columns + 1) / mask.shape[1] * width, rows / mask.shape[0] * height
    corner = int(np.argmax(x - y))
    writer.write(str(number), (min(float(x[corner]), width - _TEXT_SIZE), max(float(y[corner]), _TEXT_SIZE)), "ld")


class _Writer:
    """Readable text on any background."""

    def __init__(self, image: Image.Image) -> None:
        self.draw = ImageDraw.Draw(image)
        self.size = image.size
        self._font = ImageFont.load_default(size=_TEXT_SIZE)

    def write(self, text: str, position: tuple[float, float], anchor: str) -> None:
        """Write at a position; `anchor` is Pillow's two letters for which point of the text lies there."""
        self.draw.text(
            position, text, fill=_TEXT_COLOUR, font=self._font, anchor=anchor, stroke_width=2, stroke_fill=_BACKGROUND
        )

    def width_of(self, text: str) -> float:
        """Width of a text, pixels."""
        return self.draw.textlength(text, font=self._font)


def _assembled(panels: Sequence[Image.Image], entries: Iterable[_LegendEntry]) -> Image.Image:
    """The panels in a row, centred, and the legend's entries below in as many lines as they need."""
    row_width = sum(panel.width for panel in panels) + _GAP * (len(panels) + 1)
    width, panel_height = max(row_width, _LEAST_WIDTH), max(panel.height for panel in panels)
    ruler = _Writer(Image.new("RGB", (1, 1)))
    placed: list[tuple[float, int, _LegendEntry]] = []
    x, line = float(_GAP), 0
    for entry in entries:
        length = ruler.width_of(entry.text) + (44 if entry.colour else 0)
        if x > _GAP and x + length > width - _GAP:
            x, line = float(_GAP), line + 1
        placed.append((x, line, entry))
        x += length + 36
    legend_top = panel_height + 2 * _GAP
    picture = Image.new("RGB", (width, legend_top + (line + 1) * _LINE_HEIGHT + _GAP), _BACKGROUND)
    left = (width - row_width) // 2 + _GAP
    for panel in panels:
        picture.paste(panel, (left, _GAP + (panel_height - panel.height) // 2))
        left += panel.width + _GAP
    writer = _Writer(picture)
    for x, line, entry in placed:
        y = legend_top + line * _LINE_HEIGHT + _LINE_HEIGHT // 2
        if entry.colour:
            writer.draw.line([(x, y), (x + 34, y)], fill=entry.colour, width=4)
        writer.write(entry.text, (x + (44 if entry.colour else 0), y), "lm")
    return picture
