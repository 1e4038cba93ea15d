"""Preprocessing settings: orientation, voxel spacing, HU window and crop of the encoder input."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, field_validator

_Millimetres = Annotated[float, Field(gt=0, allow_inf_nan=False)]
_Hounsfield = Annotated[float, Field(ge=-100_000, le=100_000)]


class Preprocessing(BaseModel):
    """Preprocessing settings of an encoder; the encoder bundle contains them.

    Attributes:
        axcodes: nearest anatomical directions of the x, y and z axis of the grid.
        spacing: distance in mm between grid voxels along x, y, z.
        hu_window: HU that are mapped to 0 and to 1; values outside are clipped.
        antialias: for down-sampling, use a triangular filter with the half width of one grid voxel instead of
            interpolation between the two nearest voxels. The published models were trained without it.
        crop_below_hu: threshold in HU. The grid is cropped to the bounding box of the voxels above the threshold, plus
            a margin of 10 mm. None keeps the whole scan.
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
            raise ValueError("axcodes must contain one direction for each axis: R or L, A or P, S or I, in any order")
        return axcodes

    @field_validator("hu_window")
    @classmethod
    def _window_is_not_empty(cls, window: tuple[float, float]) -> tuple[float, float]:
        if window[0] >= window[1]:
            raise ValueError("the first value of hu_window must be below the second value")
        return window
