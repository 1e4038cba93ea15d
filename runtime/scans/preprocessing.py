"""Preprocessing: what a scan is turned into before the encoder sees it, as data."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, field_validator

_Millimetres = Annotated[float, Field(gt=0, allow_inf_nan=False)]
_Hounsfield = Annotated[float, Field(allow_inf_nan=False)]


class Preprocessing(BaseModel):
    """Orientation, spacing, HU window and crop of the grid that an encoder works on; stored in its bundle.

    Attributes:
        axcodes: where the grid's axes point, nearest anatomical direction.
        spacing: mm between grid voxels along its x, y, z.
        hu_window: HU mapped to 0 and to 1; values outside are clipped.
        antialias: when down-sampling, widen the interpolation's triangle to the grid's spacing instead of interpolating
            between the two nearest voxels. Published models were trained without.
        crop_below_hu: cut the grid to the bounding box of voxels above this value, plus a margin of 10 mm; ``None``
            keeps the whole scan.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    axcodes: str = "RAS"
    spacing: tuple[_Millimetres, _Millimetres, _Millimetres] = (1.5, 1.5, 1.5)
    hu_window: tuple[_Hounsfield, _Hounsfield] = (-175.0, 250.0)
    antialias: bool = False
    crop_below_hu: _Hounsfield | None = None

    @field_validator("axcodes")
    @classmethod
    def _three_different_axes(cls, axcodes: str) -> str:
        if sorted("RAS".find(c) if c in "RAS" else "LPI".find(c) for c in axcodes) != [0, 1, 2]:
            raise ValueError("axcodes names one direction of each axis: R or L, A or P, S or I, in any order")
        return axcodes

    @field_validator("hu_window")
    @classmethod
    def _window_is_not_empty(cls, window: tuple[float, float]) -> tuple[float, float]:
        if window[0] >= window[1]:
            raise ValueError("hu_window goes from a lower to a higher value")
        return window
