"""A picture of a segmentation: axial, coronal and sagittal plane with the outlines of prediction and reference."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Final

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from fseft_edge.evaluation.metrics import dice
from fseft_edge.report.planes import Cut, Mask, three_cuts
from fseft_edge.runtime.scans.volume import Volume
from fseft_edge.runtime.system.atomic import atomic_path

Colour = tuple[int, int, int]

SOFT_TISSUE_HU: Final = (-160.0, 240.0)
"""Lower and upper end of the usual soft-tissue window: level 40, width 400."""

PREDICTION_COLOUR: Final[Colour] = (255, 150, 0)
REFERENCE_COLOUR: Final[Colour] = (60, 185, 255)
"""Orange and sky blue can be distinguished with all common forms of colour blindness (Okabe and Ito, 2008)."""

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
_REFERENCE_WIDTH: Final = 11
"""Odd widths in supersampled pixels. The wider band of the reference is below that of the prediction, so that both are
visible where the contours agree."""


def three_plane_picture(
    volume: Volume,
    masks: Mapping[str, tuple[Mask, Mask | None]],
    path: Path,
    *,
    labels: Mapping[str, int] = MappingProxyType({}),
) -> None:
    """Write a PNG with three planes of the scan, the outlines of the masks, and a legend.

    The legend has the DSC of each organ with a reference, and says which masks are empty.

    The planes are those of :func:`fseft_edge.report.planes.three_cuts`, in radiological convention and with the same
    scale in mm. If there are several organs, they have numbers: their label values. The same arguments and version of
    Pillow give the same bytes.

    Args:
        volume: the scan.
        masks: prediction, and reference or None, of each organ name: boolean `[X, Y, Z]` on the scan's lattice.
        path: the PNG file. An existing file is replaced in one step.
        labels: label value of each organ name; empty numbers the organs in the order of ``masks``, from 1.

    Raises:
        OutOfSpaceError: the disk is full or not writable.
    """
    for name, pair in masks.items():
        for mask in pair:
            if mask is not None and (mask.shape != volume.shape or mask.dtype != np.bool_):
                raise ValueError(f"a mask of {name} is not a boolean array of the scan's shape {volume.shape}")
    cuts = three_cuts(volume, list(masks.values()))
    scale = _pixels_per_mm(cuts)
    numbers = [labels.get(name, position) for position, name in enumerate(masks, start=1)] if len(masks) > 1 else []
    panels = [_panel(cut, scale, numbers) for cut in cuts]
    with atomic_path(path) as temporary:
        _assembled(panels, _legend(masks, numbers)).save(temporary, format="PNG")


@dataclass(frozen=True)
class _LegendEntry:
    text: str
    colour: Colour | None = None


def _legend(masks: Mapping[str, tuple[Mask, Mask | None]], numbers: Sequence[int]) -> list[_LegendEntry]:
    entries = [_LegendEntry("prediction", PREDICTION_COLOUR)]
    if any(reference is not None for _, reference in masks.values()):
        entries.append(_LegendEntry("reference", REFERENCE_COLOUR))
    for position, (name, (prediction, reference)) in enumerate(masks.items()):
        score = None if reference is None else dice(prediction, reference)
        text = name if score is None else f"{name}  DSC {score:.3f}"
        if not prediction.any():
            text += "  (empty)"
        entries.append(_LegendEntry(f"{numbers[position]}  {text}" if numbers else text))
    return entries


def _pixels_per_mm(cuts: Sequence[Cut]) -> float:
    widths, heights = zip(*(cut.size_mm for cut in cuts), strict=True)
    return float(min((_LARGEST_WIDTH - _GAP * (len(cuts) + 1)) / sum(widths), _LARGEST_PANEL_HEIGHT / max(heights)))


def _panel(cut: Cut, scale: float, numbers: Sequence[int]) -> Image.Image:
    """Return one plane with outlines, edge letters and a scale bar; ``scale`` is in pixels per mm.

    ``numbers`` contains the number of each organ in the plane, or nothing.
    """
    width, height = (max(round(length * scale), 1) for length in cut.size_mm)
    fine = (width * _SUPERSAMPLING, height * _SUPERSAMPLING)
    low, high = SOFT_TISSUE_HU
    grey = np.clip((cut.hu - low) / (high - low), 0, 1) * 255
    panel = Image.fromarray(np.rint(grey).astype(np.uint8)).resize(fine, Image.Resampling.BICUBIC).convert("RGB")
    for organ in cut.organs:
        if organ.reference is not None:
            panel.paste(REFERENCE_COLOUR, mask=_outline(organ.reference, fine, _REFERENCE_WIDTH))
    for organ in cut.organs:
        panel.paste(PREDICTION_COLOUR, mask=_outline(organ.prediction, fine, _PREDICTION_WIDTH))
    panel = panel.resize((width, height), Image.Resampling.BOX)
    writer = _Writer(panel)
    for number, organ in zip(numbers, cut.organs, strict=False):  # there may be no numbers
        _write_number(
            writer, number, organ.prediction if organ.reference is None else organ.prediction | organ.reference
        )
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
    """Return a band along the edge of a mask enlarged to ``size``; the edge is the 0.5 level of the enlarged mask."""
    from scipy.ndimage import maximum_filter, minimum_filter  # noqa: PLC0415 - slow to import

    smooth = Image.fromarray(mask.astype(np.uint8) * 255).resize(size, Image.Resampling.BILINEAR)
    area = np.asarray(smooth) >= 128
    band = np.zeros(area.shape, dtype=np.uint8)
    rows, columns = np.flatnonzero(area.any(axis=1)), np.flatnonzero(area.any(axis=0))
    if rows.size:
        box = tuple(slice(max(int(at[0]) - width, 0), int(at[-1]) + 1 + width) for at in (rows, columns))
        band[box] = 255 * (maximum_filter(area[box], width) & ~minimum_filter(area[box], width))
    return Image.fromarray(band)


def _write_number(writer: _Writer, number: int, mask: Mask) -> None:
    """Write the number of an organ at the upper right corner of its mask in the plane."""
    if not mask.any():
        return
    width, height = writer.size
    rows, columns = np.nonzero(mask)
    x, y = (columns + 1) / mask.shape[1] * width, rows / mask.shape[0] * height
    corner = int(np.argmax(x - y))
    writer.write(str(number), (min(float(x[corner]), width - _TEXT_SIZE), max(float(y[corner]), _TEXT_SIZE)), "ld")


class _Writer:
    """Writes text with a dark outline, so that it is readable on any background."""

    def __init__(self, image: Image.Image) -> None:
        self.draw = ImageDraw.Draw(image)
        self.size = image.size
        self._font = ImageFont.load_default(size=_TEXT_SIZE)

    def write(self, text: str, position: tuple[float, float], anchor: str) -> None:
        """Write text at a position. ``anchor`` is the text anchor of Pillow."""
        self.draw.text(
            position, text, fill=_TEXT_COLOUR, font=self._font, anchor=anchor, stroke_width=2, stroke_fill=_BACKGROUND
        )

    def width_of(self, text: str) -> float:
        """Return the width of a text in pixels."""
        return self.draw.textlength(text, font=self._font)


def _assembled(panels: Sequence[Image.Image], entries: Iterable[_LegendEntry]) -> Image.Image:
    """Return a picture of the panels in a row, and below them the legend in as many lines as necessary."""
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
