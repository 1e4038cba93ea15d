"""A page of the review in a real browser: headless Chromium, with WebGL computed on the CPU."""

from __future__ import annotations

import io
import os
import shutil
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

CHROMIUM = os.environ.get("FSEFT_EDGE_CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
MILLISECONDS = 60_000
SOFTWARE_WEBGL = ["--use-gl=angle", "--use-angle=swiftshader", "--enable-unsafe-swiftshader"]


@dataclass
class Tab:
    """A page with its requests, errors and warnings."""

    page: Any
    requested: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def wait(self, selector: str) -> None:
        self.page.wait_for_selector(selector, timeout=MILLISECONDS)

    def shown(self, key: str) -> None:
        """Wait until the mask of a case is displayed, so that a decision is possible."""
        self.wait(f'#cases button[aria-current="true"]:has-text("{key}")')
        self.wait("#accept:not([disabled])")

    def text(self, selector: str) -> str:
        return str(self.page.inner_text(selector))

    def add_console_line(self, line: Any) -> None:
        """Keep an error or a warning of the browser's console, with the address that it concerns."""
        if line.type in ("error", "warning"):
            self.problems.append(f"{line.text} ({line.location['url']})")

    def canvas(self) -> NDArray[np.int64]:
        """Return the displayed colours of the canvas, ``[height, width, 3]``."""
        picture = Image.open(io.BytesIO(self.page.locator("#canvas").screenshot()))
        return np.asarray(picture.convert("RGB")).astype(np.int64)

    def slices(self) -> list[int]:
        """Return the numbers of the axial, coronal and sagittal slice."""
        words = self.text("#position").replace(",", "").split()
        return [int(words[words.index(plane) - 1]) for plane in ("axial", "coronal", "sagittal")]

    def moved(self, action: Any) -> list[int]:
        """Run an action, wait until the cross has moved, and return its movement in slices."""
        before, text = self.slices(), self.text("#position")
        action()
        self.wait(f'#position:not(:text-is("{text}"))')
        return [now - then for now, then in zip(self.slices(), before, strict=True)]
