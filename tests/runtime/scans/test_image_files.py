"""CTs and label maps as NRRD and MetaImage: as SimpleITK reads them, refused files, names and pairs of files."""

from __future__ import annotations

import bz2
import itertools
import logging
import subprocess
import sys
import zlib
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK
from doubles import mutations
from doubles.errors import refused
from doubles.nifti_files import affine_in_itk, turned
from numpy.typing import NDArray

from fseft_edge.runtime.errors import (
    FseftEdgeError,
    GeometryError,
    InputError,
    LabelError,
    NotACtError,
    UnreadableFileError,
    UsageError,
)
from fseft_edge.runtime.scans.given import given_labels, given_scan
from fseft_edge.runtime.scans.grid import Grid
from fseft_edge.runtime.scans.image_files import annotations_by_name, read_ct, read_label_map, read_label_names
from fseft_edge.runtime.scans.nifti import case_name, cases_by_name, list_cases, write_label_map
from fseft_edge.runtime.scans.preprocessing import Preprocessing
from fseft_edge.runtime.scans.sources import find_scan, list_scans, read_scan, scan_name
from fseft_edge.runtime.scans.volume import LabelMap, labels_on

HU = np.random.default_rng(7).integers(-1000, 1500, (9, 8, 5)).astype(np.int16)
LABELS = np.random.default_rng(8).integers(0, 4, HU.shape).astype(np.uint8)
AFFINE = np.array([[-0.9, 0, 0, 120.0], [0, -0.8, 0, 90.5], [0, 0, 3.0, -600.25], [0, 0, 0, 1.0]])
ENDINGS = [".nrrd", ".nhdr", ".mha", ".mhd"]
ORDERS = list(itertools.product(itertools.permutations(range(3)), itertools.product((1, -1), repeat=3)))


def by_itk(path: Path, array: NDArray, affine: NDArray = AFFINE, *, packed: bool = False) -> Path:
    """Write an image with SimpleITK."""
    image = SimpleITK.GetImageFromArray(array.T.copy())
    in_lps = np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine
    steps = np.linalg.norm(in_lps[:3, :3], axis=0)
    image.SetSpacing(steps.tolist())
    image.SetDirection((in_lps[:3, :3] / steps).ravel().tolist())
    image.SetOrigin(in_lps[:3, 3].tolist())
    path.parent.mkdir(parents=True, exist_ok=True)
    SimpleITK.WriteImage(image, str(path), packed)
    return path


def voxels_in_itk(path: Path) -> NDArray:
    return SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(path))).T


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dtype", [np.int16, np.int32, np.float32, np.float64])
def test_ct_equals_that_of_simpleitk(tmp_path, ending, packed, dtype):
    path = by_itk(tmp_path / f"a{ending}", HU.astype(dtype), turned((10, 20, -15)), packed=packed)
    scan = read_scan(path)
    assert scan.array.dtype == dtype
    np.testing.assert_array_equal(scan.array, voxels_in_itk(path))
    np.testing.assert_allclose(scan.affine, affine_in_itk(path), atol=1e-9)
    assert (scan.slope, scan.intercept, scan.source, scan.warnings, scan.forms) == (1.0, 0.0, path, (), None)


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.uint16, np.uint32, np.int64, np.uint64, np.float32])
def test_label_map_equals_that_of_simpleitk(tmp_path, ending, dtype):
    path = by_itk(tmp_path / f"a{ending}", LABELS.astype(dtype), packed=True)
    found = read_label_map(path)
    assert found.array.dtype == np.uint8
    np.testing.assert_array_equal(found.array, LABELS)
    np.testing.assert_allclose(found.affine, affine_in_itk(path), atol=1e-9)
    assert read_label_names(path) == {}
    assert given_labels(path).source == path


def test_mask_lies_on_the_scan_in_the_eyes_of_itk_for_every_axis_order(tmp_path):
    for order, signs in ORDERS:
        to_lattice = np.eye(4)
        to_lattice[:3, :3] = np.eye(3)[list(order)].T * signs
        affine = turned((0, 0, 0)) @ to_lattice
        for ending in (".nrrd", ".mha"):
            scan = read_scan(by_itk(tmp_path / f"a{ending}", HU, affine))
            np.testing.assert_array_equal(scan.array, HU)
            np.testing.assert_allclose(scan.affine, affine, atol=1e-9)
        write_label_map(tmp_path / "mask.nii", scan.label_map(LABELS))
        np.testing.assert_array_equal(voxels_in_itk(tmp_path / "mask.nii"), LABELS)
        np.testing.assert_allclose(affine_in_itk(tmp_path / "mask.nii"), affine_in_itk(tmp_path / "a.nrrd"), atol=1e-4)


@pytest.mark.parametrize("ending", ENDINGS)
def test_mask_lies_on_an_oblique_scan_in_the_eyes_of_itk(tmp_path, ending):
    path = by_itk(tmp_path / f"a{ending}", HU, turned((31, -12, 7), digits=6))
    write_label_map(tmp_path / "mask.nii.gz", read_scan(path).label_map(LABELS))
    np.testing.assert_allclose(affine_in_itk(tmp_path / "mask.nii.gz"), affine_in_itk(path), atol=1e-4)


def test_annotation_in_another_format_and_axis_order_lies_on_its_scan(tmp_path):
    scan = read_scan(by_itk(tmp_path / "a.nrrd", HU))
    image = SimpleITK.PermuteAxes(SimpleITK.ReadImage(by_itk(tmp_path / "labels.mha", LABELS)), [2, 0, 1])
    SimpleITK.WriteImage(SimpleITK.Flip(image, [True, False, True]), tmp_path / "turned.mha")
    np.testing.assert_array_equal(labels_on(scan, read_label_map(tmp_path / "turned.mha")).array, LABELS)


# Headers written by hand


def nrrd(path: Path, *, data: bytes | None = None, without: tuple[str, ...] = (), behind: str = "", **fields) -> Path:
    """Write an NRRD file by hand; ``fields`` replace those of a CT in RAS, and ``_`` stands for a blank."""
    lines = {
        "type": "int16",
        "dimension": "3",
        "sizes": "9 8 5",
        "space": "right-anterior-superior",
        "space directions": "(-0.9,0,0) (0,-0.8,0) (0,0,3)",
        "space origin": "(120,90.5,-600.25)",
        "endian": "little",
        "encoding": "raw",
        **{name.replace("_", " "): value for name, value in fields.items()},
    }
    text = "\n".join(f"{name}: {value}" for name, value in lines.items() if name not in without)
    block = HU.tobytes(order="F") if data is None else data
    path.write_bytes(f"NRRD0005\n{text}\n{behind}\n".encode() + (b"" if "data_file" in fields else block))
    return path


def metaimage(path: Path, *, data: bytes | None = None, without: tuple[str, ...] = (), **keys) -> Path:
    """Write a MetaImage by hand; ``keys`` replace those of a CT."""
    lines = {
        "ObjectType": "Image",
        "NDims": "3",
        "BinaryData": "True",
        "BinaryDataByteOrderMSB": "False",
        "TransformMatrix": "1 0 0 0 1 0 0 0 1",
        "Offset": "-120 -90.5 -600.25",
        "ElementSpacing": "0.9 0.8 3",
        "DimSize": "9 8 5",
        "ElementType": "MET_SHORT",
        **keys,
    }
    lines["ElementDataFile"] = keys.get("ElementDataFile", "LOCAL")
    text = "".join(
        f"{key} = {value}\n" for key, value in lines.items() if key not in without and key != "ElementDataFile"
    )
    text += f"ElementDataFile = {lines['ElementDataFile']}\n" if "ElementDataFile" not in without else ""
    block = HU.tobytes(order="F") if data is None else data
    path.write_bytes(text.encode() + (block if lines["ElementDataFile"] == "LOCAL" else b""))
    return path


def assert_is_the_ct(path: Path, affine: NDArray = AFFINE, *warnings: str) -> None:
    scan = read_ct(path)
    np.testing.assert_array_equal(scan.array, HU)
    np.testing.assert_allclose(scan.affine, affine, atol=1e-12)
    assert len(scan.warnings) == len(warnings)
    for found, wanted in zip(scan.warnings, warnings, strict=True):
        assert wanted in found


@pytest.mark.parametrize(
    ("space", "signs"),
    [
        ("right-anterior-superior", (1, 1)),
        ("RAS", (1, 1)),
        ("left-posterior-superior", (-1, -1)),
        ("LPS", (-1, -1)),
        ("left-anterior-superior", (-1, 1)),
        ("Left-Anterior-Superior", (-1, 1)),
        ("LAS", (-1, 1)),
    ],
)
def test_the_space_of_nrrd_decides_left_and_right_as_in_itk(tmp_path, space, signs):
    path = nrrd(tmp_path / "a.nrrd", space=space)
    assert_is_the_ct(path, np.diag([*signs, 1.0, 1.0]) @ AFFINE)
    np.testing.assert_allclose(read_ct(path).affine, affine_in_itk(path), atol=1e-12)


@pytest.mark.parametrize(
    ("fields", "data"),
    [
        ({"endian": "big"}, HU.astype(">i2").tobytes(order="F")),
        ({"encoding": "gzip"}, zlib.compress(HU.tobytes(order="F"), wbits=31)),
        ({"encoding": "gz", "byte_skip": "3"}, zlib.compress(b"abc" + HU.tobytes(order="F"), wbits=31)),
        ({"encoding": "gzip", "line_skip": "1"}, b"a line\n" + zlib.compress(HU.tobytes(order="F"), wbits=31)),
        ({"encoding": "ascii"}, " ".join(map(str, HU.ravel(order="F"))).encode()),
        ({"encoding": "text", "type": "float"}, "\n".join(map(str, HU.ravel(order="F"))).encode()),
        ({"line_skip": "2", "byte_skip": "1"}, b"one\ntwo\n!" + HU.tobytes(order="F")),
        ({"byte_skip": "-1"}, b"any other bytes" + HU.tobytes(order="F")),
        ({"lineskip": "1"}, b"\n" + HU.tobytes(order="F")),
        ({"type": "short", "kinds": "domain domain domain", "centerings": "cell cell cell"}, None),
        ({"space_units": '"mm" "mm" "mm"', "measurement_frame": "(0,1,0) (1,0,0) (0,0,1)"}, None),
        ({"behind": "key:=value: with a colon\n# space: RAS\nkey2:= ä\n"}, None),
    ],
)
def test_encodings_and_fields_of_nrrd_are_read_as_by_itk(tmp_path, fields, data):
    path = nrrd(tmp_path / "a.nrrd", data=data, **fields)
    assert_is_the_ct(path)
    np.testing.assert_array_equal(read_ct(path).array, voxels_in_itk(path))


def test_nrrd_with_bzip2_is_read(tmp_path):
    """SimpleITK is built without bzip2."""
    half = len(HU.tobytes()) // 2
    parts = [bz2.compress(part) for part in (HU.tobytes(order="F")[:half], HU.tobytes(order="F")[half:])]
    assert_is_the_ct(nrrd(tmp_path / "a.nrrd", data=b"".join(parts), encoding="bzip2"))


@pytest.mark.parametrize("directions", ["none (-0.9,0,0) (0,-0.8,0) (0,0,3)", "(-0.9,0,0) (0,-0.8,0) (0,0,3) none"])
def test_an_axis_of_length_one_within_a_voxel_is_dropped(tmp_path, directions):
    sizes = "1 9 8 5" if directions.startswith("none") else "9 8 5 1"
    assert_is_the_ct(nrrd(tmp_path / "a.nrrd", dimension="4", sizes=sizes, space_directions=directions))


@pytest.mark.parametrize(
    ("keys", "data"),
    [
        ({"BinaryDataByteOrderMSB": "True"}, HU.astype(">i2").tobytes(order="F")),
        ({"ElementByteOrderMSB": "True"}, HU.astype(">i2").tobytes(order="F")),
        (
            {"CompressedData": "True", "CompressedDataSize": str(len(zlib.compress(HU.tobytes(order="F"))))},
            zlib.compress(HU.tobytes(order="F")),
        ),
        ({"AnatomicalOrientation": "LPI", "CenterOfRotation": "1 2 3", "ElementSize": "1 1 1"}, None),
        ({"ElementNumberOfChannels": "1", "Comment": "a = b", "Modality": "MET_MOD_CT"}, None),
        ({"HeaderSize": "0", "Name": "ä"}, None),
    ],
)
def test_encodings_and_keys_of_metaimage_are_read_as_by_itk(tmp_path, keys, data):
    without = ("BinaryDataByteOrderMSB",) if "ElementByteOrderMSB" in keys else ()
    path = metaimage(tmp_path / "a.mha", data=data, without=without, **keys)
    np.testing.assert_array_equal(HU, voxels_in_itk(path))
    assert_is_the_ct(path)
    np.testing.assert_allclose(read_ct(path).affine, affine_in_itk(path), atol=1e-12)


def test_metaimages_that_itk_misreads_or_refuses_are_read(tmp_path):
    """Without CompressedDataSize, SimpleITK 2.5.7 returns voxels that are not those of the file, without an error."""
    packed = zlib.compress(HU.tobytes(order="F"))
    assert_is_the_ct(metaimage(tmp_path / "a.mha", data=packed, CompressedData="True"))
    text = " ".join(map(str, HU.ravel(order="F"))).encode()
    assert_is_the_ct(metaimage(tmp_path / "b.mha", data=text, BinaryData="False"))


@pytest.mark.parametrize("key", ["Position", "Origin"])
def test_other_names_of_keys_of_metaimage_are_read_as_by_itk(tmp_path, key):
    path = metaimage(
        tmp_path / "a.mha",
        without=("Offset", "TransformMatrix"),
        **{key: "-120 -90.5 -600.25", "Orientation": "0 1 0 1 0 0 0 0 -1"},
    )
    np.testing.assert_allclose(read_ct(path).affine, affine_in_itk(path), atol=1e-12)


@pytest.mark.parametrize("skip", ["0", "7", "-1"])
def test_the_header_of_a_file_of_voxels_is_skipped_as_by_itk(tmp_path, skip):
    (tmp_path / "a.raw").write_bytes(b"" if skip == "0" else b"7 bytes")
    with (tmp_path / "a.raw").open("ab") as file:
        file.write(HU.tobytes(order="F"))
    path = metaimage(tmp_path / "a.mhd", ElementDataFile="a.raw", HeaderSize=skip)
    assert_is_the_ct(path)
    np.testing.assert_array_equal(voxels_in_itk(path), HU)


def test_axes_that_are_not_perpendicular_are_read_with_a_warning(tmp_path):
    tilted = AFFINE.copy()
    tilted[1, 2] = 0.4
    assert_is_the_ct(
        nrrd(tmp_path / "a.nrrd", space_directions="(-0.9,0,0) (0,-0.8,0) (0,0.4,3)"), tilted, "not perpendicular"
    )
    write_label_map(tmp_path / "mask.nii", read_ct(tmp_path / "a.nrrd").label_map(LABELS))
    np.testing.assert_allclose(nib.load(tmp_path / "mask.nii").affine, tilted, atol=1e-4)
    with pytest.raises(RuntimeError, match="orthonormal"):
        SimpleITK.ReadImage(str(tmp_path / "mask.nii"))
    length = np.hypot(0.1, 1)
    path = metaimage(tmp_path / "a.mha", TransformMatrix=f"1 0 0 0 1 0 0 {0.1 / length} {1 / length}")
    assert "not perpendicular" in read_ct(path).warnings[0]
    np.testing.assert_allclose(read_ct(path).affine, affine_in_itk(path), atol=1e-12)


@pytest.mark.parametrize(
    ("kind", "says", "fields"),
    [
        (GeometryError, "has no 'space'", {"without": ("space",)}),
        (GeometryError, "has no 'space'", {"without": ("space",), "space_dimension": "3"}),
        (GeometryError, "'scanner-xyz'", {"space": "scanner-xyz"}),
        (GeometryError, "'3d-left-handed'", {"space": "3D-left-handed"}),
        (GeometryError, "'3d-right-handed'", {"space": "3D-right-handed"}),
        (GeometryError, "'left-posterior-superior-time'", {"space": "left-posterior-superior-time"}),
        (GeometryError, "space directions", {"without": ("space directions",)}),
        (GeometryError, "space directions", {"without": ("space directions",), "spacings": "0.9 0.8 3"}),
        (GeometryError, "two geometries", {"spacings": "0.9 0.8 3"}),
        (GeometryError, "space origin", {"without": ("space origin",)}),
        (GeometryError, "2 axes in space", {"space_directions": "(-0.9,0,0) (0,-0.8,0) none"}),
        (GeometryError, "in one plane", {"space_directions": "(-0.9,0,0) (0,-0.8,0) (0,0.8,0)"}),
        (GeometryError, "no length", {"space_directions": "(-0.9,0,0) (0,-0.8,0) (0,0,0)"}),
        (GeometryError, "not finite", {"space_directions": "(-0.9,0,nan) (0,-0.8,0) (0,0,3)"}),
        (GeometryError, "not finite", {"space_origin": "(inf,0,0)"}),
        (GeometryError, "impossibly large", {"space_directions": "(1e300,0,0) (0,1e300,0) (0,0,1e300)"}),
        (GeometryError, "spacing", {"space_directions": "(-900,0,0) (0,-800,0) (0,0,3000)"}),
        (GeometryError, "'cm'", {"space_units": '"cm" "cm" "cm"'}),
        (UnreadableFileError, "do not belong", {"space_directions": "(-0.9,0) (0,-0.8) (0,3)"}),
        (UnreadableFileError, "do not belong", {"space_directions": "(-0.9,0,0) (0,-0.8,0)"}),
        (UnreadableFileError, "three numbers", {"space_origin": "(0,0)"}),
        (UnreadableFileError, "line that is not valid", {"space_origin": "(a,0,0)"}),
        *((UnreadableFileError, "line that is not valid", {"sizes": f"9 8 {size}"}) for size in ("x", "5.7", "nan")),
        (UnreadableFileError, "line that is not valid", {"behind": "no field\n"}),
        (UnreadableFileError, "line that is not valid", {"behind": "Type: short\n"}),
        (UnreadableFileError, "line that is not valid", {"space_units": '"mm'}),
        (UnreadableFileError, "key twice", {"behind": "a:=1\na:=2\n"}),
        (UnreadableFileError, "no sizes", {"without": ("sizes",)}),
        (UnreadableFileError, "no encoding", {"without": ("encoding",)}),
        (UnreadableFileError, "4 axes, but 3 sizes", {"dimension": "4"}),
        (UnreadableFileError, "no voxels", {"sizes": "9 8 0"}),
        (UnreadableFileError, "no voxels", {"sizes": "9 -8 -5"}),
        (UnreadableFileError, "truncated", {"sizes": "9 8 6"}),
        (UnreadableFileError, "truncated", {"sizes": "90000000 80000000 50000000"}),
        (UnreadableFileError, "truncated", {"data": b""}),
        (UnreadableFileError, "truncated", {"data": b"", "byte_skip": "-1"}),
        (UnreadableFileError, "truncated", {"byte_skip": "1"}),
        (UnreadableFileError, "truncated", {"line_skip": "1000000000000"}),
        (UnreadableFileError, "not possible", {"byte_skip": "-2"}),
        (UnreadableFileError, "not possible", {"line_skip": "-1"}),
        (UnreadableFileError, "not possible", {"byte_skip": "-1", "encoding": "gzip"}),
        (UnreadableFileError, "truncated or damaged", {"encoding": "gzip"}),
        (UnreadableFileError, "truncated or damaged", {"encoding": "bzip2"}),
        (UnreadableFileError, "truncated", {"encoding": "gzip", "data": zlib.compress(bytes(100), wbits=31)}),
        (UnreadableFileError, "truncated", {"encoding": "gzip", "data": zlib.compress(bytes(720), wbits=31)[:-9]}),
        (UnreadableFileError, "values", {"encoding": "text"}),
        (UnreadableFileError, "not numbers", {"encoding": "text", "data": b"a " * 360}),
        (UnreadableFileError, "not numbers", {"encoding": "text", "data": b"99999 " * 360}),
        (UnreadableFileError, "not supported", {"encoding": "hex"}),
        (UnreadableFileError, "not supported", {"type": "block", "block_size": "2"}),
        (UnreadableFileError, "byte order", {"without": ("endian",)}),
        (UnreadableFileError, "byte order", {"endian": "middle"}),
        (
            NotACtError,
            "4 dimensions",
            {"dimension": "4", "sizes": "3 3 8 5", "space_directions": "none (1,0,0) (0,1,0) (0,0,1)"},
        ),
        (NotACtError, "HU", {"data": (HU + 1024).tobytes(order="F")}),
        (NotACtError, "(72, 5, 1)", {"sizes": "72 5 1"}),
    ],
)  # fmt: skip
def test_bad_nrrd_is_refused(tmp_path, kind, says, fields):
    path = nrrd(tmp_path / "a.nrrd", **fields)
    with refused(kind, path, says):
        read_scan(path)


@pytest.mark.parametrize(
    ("kind", "says", "keys"),
    [
        *((GeometryError, key, {"without": (key,)}) for key in ("TransformMatrix", "Offset", "ElementSpacing")),
        (GeometryError, "in one plane", {"TransformMatrix": "1 0 0 0 1 0 0 1 0"}),
        (GeometryError, "lengths are not 1", {"TransformMatrix": "2 0 0 0 1 0 0 0 1"}),
        (GeometryError, "lengths are not 1", {"TransformMatrix": "0 0 0 0 1 0 0 0 1"}),
        (GeometryError, "lengths are not 1", {"TransformMatrix": "nan 0 0 0 1 0 0 0 1"}),
        (GeometryError, "voxel spacing", {"ElementSpacing": "0.9 0 3"}),
        (GeometryError, "voxel spacing", {"ElementSpacing": "0.9 -1 3"}),
        (GeometryError, "voxel spacing", {"ElementSpacing": "0.9 nan 3"}),
        (GeometryError, "spacing", {"ElementSpacing": "900 800 3000"}),
        (GeometryError, "not finite", {"Offset": "0 0 inf"}),
        (GeometryError, "'cm'", {"DistanceUnits": "cm"}),
        (GeometryError, "2 axes", {"NDims": "2"}),
        (GeometryError, "4 axes", {"NDims": "4", "DimSize": "9 8 5 1"}),
        (UnreadableFileError, "9 values for each voxel", {"ElementNumberOfChannels": "9"}),
        (UnreadableFileError, "NDims", {"without": ("NDims",)}),
        (UnreadableFileError, "NDims", {"NDims": "3.5"}),
        (UnreadableFileError, "DimSize", {"DimSize": "9 8"}),
        (UnreadableFileError, "number is expected", {"DimSize": "9 8 x"}),
        (UnreadableFileError, "not a whole number", {"DimSize": "9 8 inf"}),
        (UnreadableFileError, "TransformMatrix", {"TransformMatrix": "1 0 0 1"}),
        (UnreadableFileError, "no voxels", {"DimSize": "9 8 0"}),
        (UnreadableFileError, "no voxels", {"DimSize": "-9 -8 5"}),
        (UnreadableFileError, "truncated", {"DimSize": "9 8 6"}),
        (UnreadableFileError, "truncated", {"DimSize": "9e9 8e9 5e9"}),
        (UnreadableFileError, "truncated or damaged", {"CompressedData": "True"}),
        (UnreadableFileError, "truncated", {"CompressedData": "True", "data": zlib.compress(bytes(100))}),
        (UnreadableFileError, "end too early", {"CompressedData": "True", "data": zlib.compress(HU.tobytes())[:-9]}),
        (UnreadableFileError, "neither True nor False", {"CompressedData": "maybe"}),
        (UnreadableFileError, "HeaderSize", {"HeaderSize": "-1"}),
        (UnreadableFileError, "HeaderSize", {"HeaderSize": "-7"}),
        (UnreadableFileError, "'MET_LONG'", {"ElementType": "MET_LONG"}),
        (UnreadableFileError, "None", {"without": ("ElementType",)}),
        (UnreadableFileError, "scale", {"ElementToIntensityFunctionSlope": "2"}),
        (UnreadableFileError, "key twice", {"Position": "0 0 0"}),
        (UnreadableFileError, "not a MetaImage", {"without": ("ElementDataFile",)}),
        (NotACtError, "HU", {"data": (HU + 1024).tobytes(order="F")}),
    ],
)  # fmt: skip
def test_bad_metaimage_is_refused(tmp_path, kind, says, keys):
    path = metaimage(tmp_path / "a.mha", **keys)
    with refused(kind, path, says):
        read_scan(path)


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("content", [b"", b"NRRD", b"NRRD0009\n\n", b"NRRD0004\n", b"text", b"a = b\n", bytes(99)])
def test_a_file_of_another_kind_is_refused(tmp_path, ending, content):
    path = tmp_path / f"a{ending}"
    path.write_bytes(content)
    with refused(UnreadableFileError, path):
        read_scan(path)


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_missing_file_and_a_folder_are_refused(tmp_path, ending):
    with refused(UnreadableFileError, tmp_path / f"a{ending}"):
        read_ct(tmp_path / f"a{ending}")
    with refused(UnreadableFileError, tmp_path / f"a{ending}"):
        list_scans(tmp_path / f"a{ending}")


def test_a_header_without_end_is_refused_after_a_bounded_part(tmp_path):
    (tmp_path / "a.nrrd").write_bytes(b"NRRD0004\n" + b"# comment\n" * 500_000)
    with refused(UnreadableFileError, "does not end"):
        read_ct(tmp_path / "a.nrrd")
    (tmp_path / "a.mha").write_bytes(b"".join(b"key%d = value\n" % number for number in range(2000)))
    with refused(UnreadableFileError, "not a MetaImage"):
        read_ct(tmp_path / "a.mha")


@pytest.mark.parametrize("wbits", [31, 15])
def test_compressed_data_are_unpacked_only_as_far_as_the_header_states(tmp_path, wbits, monkeypatch):
    """A file of 16 kB that would become 16 MiB."""
    written = []

    class Counting:
        def __getattr__(self, name):
            return getattr(file, name)

        def write(self, piece):
            written.append(len(piece))
            return file.write(piece)

    data = zlib.compress(HU.tobytes(order="F") + bytes(16 << 20), wbits=wbits)
    path = (
        nrrd(tmp_path / "a.nrrd", data=data, encoding="gzip")
        if wbits == 31
        else metaimage(tmp_path / "a.mha", data=data, CompressedData="True")
    )
    with (tmp_path / "unpacked").open("w+b") as file:
        counting = Counting()
        monkeypatch.setattr("fseft_edge.runtime.scans.stored_image.unnamed_file", lambda _: _Open(counting))
        monkeypatch.setattr("fseft_edge.runtime.scans.stored_image._mapped", lambda *_: (HU, ("bytes behind",)))
        assert read_ct(path).warnings == ("bytes behind",)
    assert sum(written) <= 2 << 20


class _Open:
    def __init__(self, file):
        self.file = file

    def __enter__(self):
        return self.file

    def __exit__(self, *_):
        return None


def test_bytes_behind_the_voxels_are_ignored_with_a_warning(tmp_path):
    assert_is_the_ct(nrrd(tmp_path / "a.nrrd", data=HU.tobytes(order="F") + b"more"), AFFINE, "bytes behind")
    packed = zlib.compress(HU.tobytes(order="F") + b"more")
    assert_is_the_ct(metaimage(tmp_path / "a.mha", data=packed, CompressedData="True"), AFFINE, "bytes behind")


@pytest.mark.parametrize(
    "name", ["../a.raw", "/etc/passwd", "sub/../../a.raw", "..\\a.raw", "C:\\a.raw", "C:/a.raw", "."]
)
def test_a_file_of_voxels_outside_the_folder_is_not_opened(tmp_path, name):
    (tmp_path / "a.raw").write_bytes(HU.tobytes(order="F"))
    (tmp_path / "in").mkdir()
    with refused(UnreadableFileError, "outside its own folder"):
        read_ct(nrrd(tmp_path / "in" / "a.nhdr", data_file=name))
    with refused(UnreadableFileError, "outside its own folder"):
        read_ct(metaimage(tmp_path / "in" / "a.mhd", ElementDataFile=name))


@pytest.mark.parametrize(
    ("name", "says"),
    [("LIST", "several files"), ("a%03d.raw 1 5 1", "several files"), ("b.raw", "b.raw"), ("x" * 300, "xxx")],
)
def test_several_and_missing_files_of_voxels_are_refused(tmp_path, name, says):
    with refused(UnreadableFileError, tmp_path / "a.nhdr", says):
        read_ct(nrrd(tmp_path / "a.nhdr", data_file=name, behind="a.raw\n" if name == "LIST" else ""))
    with refused(UnreadableFileError, tmp_path / "a.mhd", says):
        read_ct(metaimage(tmp_path / "a.mhd", ElementDataFile=name))


def test_files_of_voxels_in_a_folder_below_and_behind_a_link_are_found(tmp_path):
    (tmp_path / "in" / "raw").mkdir(parents=True)
    (tmp_path / "in" / "raw" / "a b.raw").write_bytes(HU.tobytes(order="F"))
    assert_is_the_ct(nrrd(tmp_path / "in" / "a.nhdr", data_file="raw/a b.raw"))
    assert_is_the_ct(metaimage(tmp_path / "in" / "a.mhd", ElementDataFile="raw\\a b.raw"))
    (tmp_path / "link.nhdr").symlink_to(tmp_path / "in" / "a.nhdr")
    assert_is_the_ct(tmp_path / "link.nhdr")


@pytest.mark.parametrize("ending", ENDINGS)
def test_label_map_with_other_values_is_refused(tmp_path, ending):
    for array, says in ((HU, "negative"), (LABELS + np.float32(0.5), "not the label value")):
        with refused(LabelError, says):
            read_label_map(by_itk(tmp_path / f"a{ending}", array))


def test_warnings_about_a_label_map_are_logged(tmp_path, caplog):
    path = nrrd(tmp_path / "a.nrrd", type="uint8", data=LABELS.tobytes(order="F") + b"more")
    with caplog.at_level(logging.WARNING):
        read_label_map(path)
    assert "bytes behind" in caplog.text


# Changed files


_READ_WITH_ITK = """
import sys
from pathlib import Path
import numpy as np
import SimpleITK
SimpleITK.ProcessObject.SetGlobalWarningDisplay(False)
for path in sys.argv[1:]:
    print(path, flush=True)
    try:
        image = SimpleITK.ReadImage(path)
    except RuntimeError:
        continue
    if image.GetDimension() == 3 and image.GetNumberOfComponentsPerPixel() == 1:
        affine = np.eye(4)
        affine[:3, :3] = np.reshape(image.GetDirection(), (3, 3)) * image.GetSpacing()
        affine[:3, 3] = image.GetOrigin()
        np.savez(path, voxels=SimpleITK.GetArrayFromImage(image).T, affine=np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine)
"""


def read_with_itk(paths: list[Path]) -> None:
    """Write what SimpleITK reads beside each file as ``.npz``, in another process: it crashes on some files."""
    while paths:
        run = [sys.executable, "-c", _READ_WITH_ITK, *map(str, paths)]
        seen = subprocess.run(run, capture_output=True, text=True, check=False).stdout.split()  # noqa: S603 - own code
        assert seen
        paths = paths[len(seen) :]


def _changed(tmp_path: Path, ending: str, *, packed: bool, count: int) -> dict[Path, str]:
    """Write changed files; return what was changed in each."""
    original = by_itk(tmp_path / f"a{ending}", LABELS, turned((10, 20, 30)), packed=packed).read_bytes()
    mark = b"\n\n" if ending == ".nrrd" else b"LOCAL\n"
    end = original.index(mark) + len(mark)
    said = {}
    for seed in range(count):
        random = np.random.default_rng(seed)
        path = tmp_path / f"{seed}{ending}"
        if seed % 3:
            head, said[path] = mutations.of_text(original[:end], random)
            path.write_bytes(head + original[end:])
        else:
            content, said[path] = mutations.of_bytes(original, random)
            path.write_bytes(content)
    return said


def _read(paths: Iterable[Path]) -> dict[Path, LabelMap]:
    found = {}
    for path in paths:
        with suppress(FseftEdgeError):
            found[path] = read_label_map(path)
    return found


@pytest.mark.parametrize("ending", [".nrrd", ".mha"])
def test_a_changed_file_is_refused_or_read_as_by_itk(tmp_path, ending):
    said = _changed(tmp_path, ending, packed=False, count=100)
    found = _read(said)
    read_with_itk([path for path in found if "deep" not in said[path]])  # it crashes on nearly all of these
    compared = 0
    for path, ours in found.items():
        if path.with_name(f"{path.name}.npz").exists():
            with np.load(path.with_name(f"{path.name}.npz")) as theirs:
                np.testing.assert_array_equal(ours.array, theirs["voxels"], err_msg=said[path])
                np.testing.assert_allclose(ours.affine, theirs["affine"], atol=1e-6, err_msg=said[path])
            compared += 1
    assert compared > 20
    assert len(found) < 80


@pytest.mark.parametrize("ending", [".nrrd", ".mha"])
def test_a_changed_compressed_file_is_refused_or_read(tmp_path, ending):
    """SimpleITK is no judge here: if the size of the data is changed in the header, it returns other voxels."""
    found = _read(_changed(tmp_path, ending, packed=True, count=150))
    assert 10 < len(found) < 120


# Names and pairs of files


def test_case_names_leave_out_the_ending():
    names = {"a.nrrd": "a", "a.seg.nrrd": "a", "a.SEG.NRRD": "a", "a.b.nhdr": "a.b", "a.mha": "a", "A.MHD": "A"}
    names |= {"a.seg.nhdr": "a", "a.nii.gz": "a", "a.txt": "a.txt"}
    assert {name: case_name(Path(name)) for name in names} == names


def test_a_folder_may_hold_scans_of_all_formats(tmp_path):
    files = [by_itk(tmp_path / f"{number}{ending}", HU) for number, ending in enumerate([".nii.gz", *ENDINGS])]
    nrrd(tmp_path / "0.seg.nrrd")
    by_itk(tmp_path / ".hidden.mha", HU)
    assert list_scans(tmp_path) == list_cases(tmp_path) == files
    assert [scan_name(path) for path in files] == ["0", "1", "2", "3", "4"]
    for path in files:
        np.testing.assert_array_equal(find_scan(path).read().array, HU)
        assert list_scans(path) == [path]
        assert given_scan(path).name == scan_name(path)
    with refused(UsageError, "--series"):
        find_scan(files[1], "1")


def test_a_segmentation_is_no_scan(tmp_path):
    path = nrrd(tmp_path / "a.seg.nrrd")
    for function in (list_scans, list_cases, cases_by_name):
        with refused(UnreadableFileError, path, "segmentation"):
            function(path)
    with refused(UnreadableFileError, tmp_path):
        list_scans(tmp_path)
    with refused(LabelError, path, "3D Slicer"):
        read_label_map(path)


def test_two_files_of_one_case_are_refused(tmp_path):
    by_itk(tmp_path / "a.nrrd", HU)
    by_itk(tmp_path / "a.nii.gz", HU)
    with refused(InputError, "a.nrrd", "a.nii.gz"):
        cases_by_name(tmp_path)
    by_itk(tmp_path / "b" / "a.nrrd", LABELS)
    nrrd(tmp_path / "b" / "a.seg.nrrd")
    with refused(InputError, "a.seg.nrrd"):
        annotations_by_name(tmp_path / "b", tmp_path)


def test_annotations_and_scans_pair_by_name_in_one_folder_and_in_two(tmp_path):
    scans = {name: by_itk(tmp_path / f"{name}{ending}", HU) for name, ending in (("a", ".nrrd"), ("b", ".nii.gz"))}
    segmentations = {name: nrrd(tmp_path / f"{name}.seg.nrrd") for name in "ab"}
    assert cases_by_name(tmp_path) == scans
    assert annotations_by_name(tmp_path, tmp_path) == segmentations
    other = tmp_path / "labels"
    label_maps = {name: by_itk(other / f"{name}{ending}", LABELS) for name, ending in (("a", ".mha"), ("c", ".nii"))}
    assert annotations_by_name(other, tmp_path) == label_maps
    label_maps["b"] = nrrd(other / "b.seg.nrrd")
    assert annotations_by_name(other, tmp_path) == label_maps
    assert annotations_by_name(other / "b.seg.nrrd", scans["b"]) == {"b": other / "b.seg.nrrd"}
    assert annotations_by_name(other / "a.mha", scans["a"]) == {"a": other / "a.mha"}


def test_a_folder_of_segmentations_alone_holds_annotations(tmp_path):
    (tmp_path / "labels").mkdir()
    with refused(UnreadableFileError, tmp_path / "labels"):
        annotations_by_name(tmp_path / "labels", tmp_path)
    path = nrrd(tmp_path / "labels" / "a.seg.nrrd")
    assert annotations_by_name(tmp_path / "labels", tmp_path) == {"a": path}
    with refused(UnreadableFileError, tmp_path / "missing.seg.nrrd"):
        annotations_by_name(tmp_path / "missing.seg.nrrd", tmp_path)


@pytest.mark.real_ct
@pytest.mark.parametrize("scan", ["abdomen/ct_sm.nii.gz", "headneck/ct/hn_001.nii.gz"])
@pytest.mark.parametrize("ending", [".nrrd", ".mha"])
def test_real_ct_gives_the_grid_voxels_of_nifti(real_ct, tmp_path, scan, ending):
    image = SimpleITK.Cast(SimpleITK.ReadImage(str(real_ct / scan)), SimpleITK.sitkInt16)
    SimpleITK.WriteImage(image, str(tmp_path / f"a{ending}"), True)
    volumes = [read_scan(real_ct / scan), read_scan(tmp_path / f"a{ending}")]
    grids = [Grid.of(volume, Preprocessing(spacing=(3, 3, 3))) for volume in volumes]
    np.testing.assert_array_equal(volumes[0].array, volumes[1].array)
    np.testing.assert_array_equal(
        *(grid.section(volume, 0, grid.shape[2]) for grid, volume in zip(grids, volumes, strict=True))
    )
