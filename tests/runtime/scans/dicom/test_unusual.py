"""Unusual headers that have one right reading are read as by SimpleITK and dcm2niix, with a warning where needed."""

from __future__ import annotations

import numpy as np
import pytest
from doubles.dicom_readers import assert_agrees, hu_of, read_with_simpleitk
from doubles.odd_dicom import READABLE, SERIES

from fseft_edge.runtime.scans.sources import read_scan


@pytest.fixture(scope="module")
def usual(tmp_path_factory):
    """HU and affine of the series according to SimpleITK."""
    return read_with_simpleitk(SERIES.write(tmp_path_factory.mktemp("usual")))


@pytest.mark.parametrize("case", READABLE)
def test_an_unusual_series_is_read_as_the_usual_one(tmp_path, usual, case):
    write, warning = READABLE[case]
    scan = read_scan(write(tmp_path / "in"))
    assert_agrees(scan, usual, voxels=0.1)
    if warning:
        assert any(warning in sentence for sentence in scan.warnings)
    else:
        assert [sentence for sentence in scan.warnings if "several values" not in sentence] == []
    assert "Secretname" not in "".join(scan.warnings)
    np.testing.assert_array_equal(hu_of(scan), SERIES.hu)
