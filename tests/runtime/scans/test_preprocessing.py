"""Preprocessing settings: defaults, JSON, and refused values."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from fseft_edge.runtime.scans.preprocessing import Preprocessing


def test_defaults_are_those_of_the_published_models():
    published = Preprocessing()
    assert published.axcodes == "RAS"
    assert published.spacing == (1.5, 1.5, 1.5)
    assert published.hu_window == (-175.0, 250.0)
    assert not published.antialias
    assert published.crop_below_hu is None


def test_preprocessing_survives_json():
    custom = Preprocessing(axcodes="LPS", spacing=(1, 1, 3), hu_window=(-1000, 400), antialias=True, crop_below_hu=-500)
    assert Preprocessing.model_validate_json(custom.model_dump_json()) == custom


@pytest.mark.parametrize(
    "wrong",
    [
        {"axcodes": "RAL"},
        {"axcodes": "RA"},
        {"axcodes": "XYZ"},
        {"axcodes": ""},
        {"spacing": (1.5, 0.0, 1.5)},
        {"spacing": (1.5, -1.5, 1.5)},
        {"spacing": (1.5, float("inf"), 1.5)},
        {"hu_window": (250, -175)},
        {"hu_window": (0, 0)},
        {"hu_window": (float("nan"), 250)},
        {"hu_window": (-1e308, 250)},
        {"crop_below_hu": 1e308},
        {"hu_windov": (-175, 250)},
    ],
    ids=str,
)
def test_invalid_preprocessing_is_refused(wrong):
    with pytest.raises(ValidationError):
        Preprocessing.model_validate(wrong)


def test_preprocessing_cannot_be_changed():
    with pytest.raises(ValidationError):
        Preprocessing().spacing = (3.0, 3.0, 3.0)
