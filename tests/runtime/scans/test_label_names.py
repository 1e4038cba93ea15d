"""Names of label values in the header of a mask file."""

from __future__ import annotations

import struct
from pathlib import Path
from xml.etree import ElementTree as ET

import nibabel as nib
import numpy as np
import pytest
import SimpleITK
from doubles.errors import refused

from fseft_edge.runtime.errors import LabelError, UnreadableFileError
from fseft_edge.runtime.scans.nifti import read_label_map, read_label_names, write_label_map
from fseft_edge.runtime.scans.volume import LabelMap

LPS = np.array([[-0.9, 0, 0, 120.0], [0, -0.9, 0, 90.5], [0, 0, 3.0, -600.25], [0, 0, 0, 1]])
ARRAY = (np.arange(9 * 8 * 5).reshape(9, 8, 5) % 4).astype(np.uint8)
NAMES = {1: "liver", 2: 'lung <left> & "right"', 3: "Nebenniere_rechts – ü"}


def named(path: Path, names=NAMES, array=ARRAY) -> Path:
    write_label_map(path, LabelMap(array, LPS), names)
    return path


@pytest.mark.parametrize("name", ["mask.nii", "mask.nii.gz"])
def test_names_are_read_back_and_voxels_stay_in_place_for_every_reader(tmp_path, name):
    path = named(tmp_path / name)
    assert read_label_names(path) == NAMES
    np.testing.assert_array_equal(read_label_map(path).array, ARRAY)
    by_nibabel = nib.load(path)
    np.testing.assert_array_equal(np.asanyarray(by_nibabel.dataobj), ARRAY)
    np.testing.assert_array_equal(by_nibabel.affine, LPS.astype(np.float32))
    by_itk = SimpleITK.ReadImage(str(path))
    np.testing.assert_array_equal(SimpleITK.GetArrayFromImage(by_itk).T, ARRAY)


def test_the_table_is_the_one_of_totalsegmentator_and_of_connectome_workbench(tmp_path):
    """TotalSegmentator reads the first extension of a file, Connectome Workbench the first of code 30."""
    first, second = nib.load(named(tmp_path / "mask.nii.gz")).header.extensions
    assert [first.get_code(), second.get_code()] == [0, 30]
    assert first.content == second.content
    table = ET.fromstring(first.get_content())  # noqa: S314 - the file was written by this test
    assert table.tag == "CaretExtension"
    assert table.find("VolumeInformation").get("Index") == "0"
    assert table.find("VolumeInformation/VolumeType").text == "Label"
    labels = table.findall("VolumeInformation/LabelTable/Label")
    assert {int(label.get("Key")): label.text for label in labels} == NAMES
    colours = {tuple(label.get(part) for part in ("Red", "Green", "Blue", "Alpha")) for label in labels}
    assert len(colours) == len(NAMES)
    assert all(0 <= float(part) <= 1 for colour in colours for part in colour)


def test_names_as_totalsegmentator_writes_them_are_read(tmp_path):
    image = nib.Nifti1Image(ARRAY, LPS)
    xml = (
        '<?xml version="1.0" encoding="UTF-8"?> <CaretExtension>  <Date><![CDATA[2013-07-14T05:45:09]]></Date>   '
        '<VolumeInformation Index="0">   <LabelTable>\n'
        '<Label Key="1" Red="1.0" Green="0.0" Blue="0.0" Alpha="1"><![CDATA[spleen]]></Label>\n'
        '<Label Key="2" Red="0.0" Green="1.0" Blue="0.0" Alpha="1"><![CDATA[kidney_right]]></Label>\n\n'
        "  </LabelTable>  <StudyMetaDataLinkSet>  </StudyMetaDataLinkSet>  <VolumeType><![CDATA[Label]]></VolumeType>"
        "   </VolumeInformation></CaretExtension>\n              "
    )
    image.header.extensions.append(nib.nifti1.Nifti1Extension(0, xml.encode()))
    nib.save(image, tmp_path / "mask.nii.gz")
    assert read_label_names(tmp_path / "mask.nii.gz") == {1: "spleen", 2: "kidney_right"}


def test_the_order_of_the_names_changes_no_byte(tmp_path):
    reverse = dict(reversed(NAMES.items()))
    assert named(tmp_path / "a.nii.gz").read_bytes() == named(tmp_path / "b.nii.gz", reverse).read_bytes()


def test_a_mask_without_names_has_no_extension(tmp_path):
    path = named(tmp_path / "mask.nii", {})
    assert read_label_names(path) == {}
    assert path.stat().st_size == 352 + ARRAY.size
    assert not nib.load(path).header.extensions


def test_names_of_a_mask_in_nifti_2_are_read(tmp_path):
    array = np.zeros((2, 2, 40_000), np.uint8)
    array[0, 0, -1] = 3
    path = named(tmp_path / "mask.nii.gz", NAMES, array)
    assert read_label_names(path) == NAMES
    np.testing.assert_array_equal(np.asanyarray(nib.load(path).dataobj), array)


def test_names_in_a_big_endian_file_are_read(tmp_path):
    image = nib.Nifti1Image(ARRAY, LPS, nib.Nifti1Header(endianness=">"))
    image.header.extensions.append(nib.nifti1.Nifti1Extension(6, b"text of another program"))
    image.header.extensions.append(
        nib.nifti1.Nifti1Extension(30, b'<CaretExtension><Label Key="7">aorta</Label></CaretExtension>')
    )
    nib.save(image, tmp_path / "mask.nii")
    assert (tmp_path / "mask.nii").read_bytes()[344:348] == b"n+1\0"
    assert read_label_names(tmp_path / "mask.nii") == {7: "aorta"}


BOMB = (
    '<?xml version="1.0"?><!DOCTYPE a [<!ENTITY b "liver"><!ENTITY c "&b;&b;&b;">]>'
    '<CaretExtension><Label Key="1">&c;</Label></CaretExtension>'
)


@pytest.mark.parametrize(
    "xml",
    [
        BOMB,
        '<CaretExtension><Label Key="1">liver</Label>',
        '<CaretExtension><Label Key="one">liver</Label></CaretExtension>',
        "<CaretExtension><Label>liver</Label></CaretExtension>",
        '<CaretExtension><Label Key="1">liver</Label><Label Key="1">spleen</Label></CaretExtension>',
    ],
    ids=["entities", "cut off", "no number", "no value", "two names"],
)
def test_a_damaged_table_of_names_is_refused(tmp_path, xml):
    image = nib.Nifti1Image(ARRAY, LPS)
    image.header.extensions.append(nib.nifti1.Nifti1Extension(0, xml.encode()))
    nib.save(image, tmp_path / "mask.nii.gz")
    with refused(LabelError, tmp_path / "mask.nii.gz"):
        read_label_names(tmp_path / "mask.nii.gz")


@pytest.mark.parametrize("size", [-8, 0, 8, 1 << 30])
def test_an_extension_of_an_impossible_size_has_no_names(tmp_path, size):
    path = named(tmp_path / "mask.nii")
    raw = bytearray(path.read_bytes())
    struct.pack_into("<i", raw, 352, size)
    path.write_bytes(raw)
    assert read_label_names(path) == {}


def test_names_of_a_file_that_cannot_be_read_are_refused(tmp_path):
    half = tmp_path / "half.nii.gz"
    half.write_bytes(named(tmp_path / "mask.nii.gz").read_bytes()[:60])
    for path in (half, tmp_path, tmp_path / "none.nii"):
        with refused(UnreadableFileError, path):
            read_label_names(path)
