"""Reduced copies of pictures, so small that one page can contain hundreds of them."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from fseft_edge.runtime.errors import UnreadableFileError

WIDTH = 960
"""Width in pixels. Three planes of a head-and-neck scan take about 29 kB (PNG: 330 kB), measured on `support`."""

_QUALITY = 75
_EFFORT = 2  # four times as fast as the maximum, 6; the files are 8 % larger


@dataclass(frozen=True)
class Thumbnail:
    """A reduced picture: its ``data:`` address, and its size in pixels."""

    source: str
    width: int
    height: int


def thumbnail(path: Path, width: int = WIDTH) -> Thumbnail:
    """Return a PNG file as WebP. The same picture and version of Pillow give the same bytes.

    Args:
        path: the PNG file.
        width: maximum width in pixels.

    Raises:
        UnreadableFileError: the file is missing, is not a PNG file, or is damaged.
    """
    try:
        with Image.open(path, formats=("PNG",)) as opened:
            picture = opened.convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UnreadableFileError(
            f"{path} is missing, damaged, or not a PNG file.", remedy="Write the picture again."
        ) from error
    if picture.width > width:
        picture = picture.resize((width, round(picture.height * width / picture.width)), Image.Resampling.LANCZOS)
    content = io.BytesIO()
    picture.save(content, format="WEBP", quality=_QUALITY, method=_EFFORT)
    source = f"data:image/webp;base64,{base64.b64encode(content.getvalue()).decode('ascii')}"
    return Thumbnail(source, picture.width, picture.height)
