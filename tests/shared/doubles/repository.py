"""Where the checkout lies whose code is tested."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).parents[3]
