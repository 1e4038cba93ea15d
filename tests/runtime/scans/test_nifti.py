"""Reading and writing of CTs and label maps as NIfTI, and refused files."""

from __future__ import annotations

import gzip
import io
import tempfile
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK
from doubles.errors import refused
from doubles.nifti_files import affine_in_itk
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy.spatial.transform import Rotation

from fseft_edge.runtime.errors import (
    FseftEdgeError,
    GeometryError,
    InputError,
    LabelError,
    NotACtError,
    OutOfSpaceError,
    UnreadableFileError,
    UsageError,
)
from fseft_edge.runtime.scans import nifti
from fseft_edge.runtime.scans.lattice import deviation
from fseft_edge.runtime.scans.nifti import (
    case_name,
    cases_by_name,
    files_of,
    list_cases,
    read_ct,
    read_label_map,
    read_label_names,
    write_ct,
    write_label_map,
)
from fseft_edge.runtime.scans.volume import LabelMap, Volume, labels_on
from fseft_edge.runtime.system import atomic

LPS = np.array([[-0.9, 0, 0, 120.0], [0, -0.9, 0, 90.5], [0, 0, 3.0, -600.25], [0, 0, 0, 1.0]])
HU = np.random.default_rng(7).integers(-1000, 1500, (9, 8, 5)).astype(np.int16)
SUFFIXES = [".nii", ".nii.gz"]


def save(path: Path, array, affine=LPS, *, rescale=(None, None), kind=nib.Nifti1Image) -> Path:
    """Write a file with nibabel, with exactly the given stored values, rescale and geometry."""
    image = kind(array, affine)
    image.header.set_slope_inter(*rescale)
    nib.save(image, path)
    return path


def patched(path: Path, **fields) -> Path:
    """Overwrite header fields of an uncompressed file."""
    raw = bytearray(path.read_bytes())
    header = nib.Nifti1Header(bytes(raw[:348]), check=False)
    for name, value in fields.items():
        header[name] = value
    raw[:348] = header.binaryblock
    path.write_bytes(raw)
    return path


def resident_mib() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / 2**20


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("kind", [nib.Nifti1Image, nib.Nifti2Image])
@pytest.mark.parametrize("dtype", ["<i2", ">i2", "<i4", "<f4"])
def test_ct_equals_that_of_nibabel(tmp_path, suffix, kind, dtype):
    endian_header = kind.header_class(endianness=">" if dtype.startswith(">") else "<")
    image = kind(HU.astype(dtype), LPS, endian_header)
    image.header.set_data_dtype(dtype)
    nib.save(image, tmp_path / f"ct{suffix}")
    scan = read_ct(tmp_path / f"ct{suffix}")
    reference = nib.load(tmp_path / f"ct{suffix}")
    assert scan.array.dtype == np.dtype(dtype)
    np.testing.assert_array_equal(scan.array, np.asanyarray(reference.dataobj))
    np.testing.assert_array_equal(scan.affine, reference.affine)
    assert scan.source == tmp_path / f"ct{suffix}"


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_hu_equal_those_of_nibabel_and_the_stored_type_is_kept(tmp_path, suffix):
    stored = (HU + 1024).astype(np.uint16)
    scan = read_ct(save(tmp_path / f"ct{suffix}", stored, rescale=(0.5, -1024.0)))
    assert scan.array.dtype == np.uint16
    assert (scan.slope, scan.intercept) == (0.5, -1024.0)
    everything = tuple(slice(0, n) for n in scan.shape)
    np.testing.assert_allclose(scan.hu(everything), nib.load(scan.source).get_fdata())


def test_ct_is_mapped_read_only_and_survives_release(tmp_path):
    scan = read_ct(save(tmp_path / "ct.nii.gz", HU))
    assert not scan.array.flags.writeable
    scan.release()
    np.testing.assert_array_equal(scan.array, HU)


def test_compression_is_detected_from_the_file_content(tmp_path):
    save(tmp_path / "ct.nii.gz", HU).rename(tmp_path / "compressed.nii")
    np.testing.assert_array_equal(read_ct(tmp_path / "compressed.nii").array, HU)


def test_trailing_axes_of_length_one_are_dropped(tmp_path):
    scan = read_ct(save(tmp_path / "ct.nii", HU[..., None, None]))
    np.testing.assert_array_equal(scan.array, HU)


def test_qform_is_used_without_sform(tmp_path):
    path = patched(save(tmp_path / "ct.nii", HU), sform_code=0, qform_code=1)
    np.testing.assert_allclose(read_ct(path).affine, LPS, atol=1e-4)


def written(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def truncated(path: Path, keep: float) -> Path:
    return written(path, path.read_bytes()[: int(keep * path.stat().st_size)])


def corrupted(path: Path) -> Path:
    raw = bytearray(path.read_bytes())
    raw[-6] ^= 0xFF  # inside the CRC-32 at the end of a gzip file (RFC 1952)
    return written(path, bytes(raw))


UNREADABLE = {
    "missing": lambda d: d / "none.nii.gz",
    "folder": lambda d: d,
    "empty": lambda d: written(d / "ct.nii", b""),
    "empty gz": lambda d: written(d / "ct.nii.gz", gzip.compress(b"")),
    "text": lambda d: written(d / "ct.nii", b"patient notes " * 100),
    "text gz": lambda d: written(d / "ct.nii.gz", gzip.compress(b"patient notes " * 100)),
    "DICOM": lambda d: written(d / "ct.nii", bytes(128) + b"DICM" + bytes(1000)),
    "Analyze pair": lambda d: patched(save(d / "ct.nii", HU), magic=b"ni1"),
    "header only": lambda d: written(d / "ct.nii", save(d / "ct.nii", HU).read_bytes()[:352]),
    "half": lambda d: truncated(save(d / "ct.nii", HU), 0.5),
    "last byte lost": lambda d: written(d / "ct.nii", save(d / "ct.nii", HU).read_bytes()[:-1]),
    "half of gz": lambda d: truncated(save(d / "ct.nii.gz", HU), 0.5),
    "end of gz lost": lambda d: truncated(save(d / "ct.nii.gz", HU), 0.99),
    "wrong CRC": lambda d: corrupted(save(d / "ct.nii.gz", HU)),
    "unknown type code": lambda d: patched(save(d / "ct.nii", HU), datatype=77),
    **{
        f"voxels at {offset}": lambda d, offset=offset: patched(save(d / "ct.nii", HU), vox_offset=offset)
        for offset in (np.nan, np.inf, -352.0, 1e6, 0.0, 348.0, 352.5)
    },
    "no dimensions": lambda d: patched(save(d / "ct.nii", HU), dim=[0, 9, 8, 5, 1, 1, 1, 1]),
    "eight dimensions": lambda d: patched(save(d / "ct.nii", HU), dim=[8, 9, 8, 5, 1, 1, 1, 1]),
    "second gzip stream damaged": lambda d: written(
        d / "ct.nii.gz", save(d / "ct.nii.gz", HU).read_bytes() + b"\x1f\x8b\x08 and more"
    ),
    "gzip header alone": lambda d: written(d / "ct.nii.gz", save(d / "ct.nii.gz", HU).read_bytes()[:10]),
    "negative length": lambda d: patched(save(d / "ct.nii", HU), dim=[3, -9, 8, 5, 1, 1, 1, 1]),
}


@pytest.mark.parametrize("read", [read_ct, read_label_map])
@pytest.mark.parametrize("make", UNREADABLE.values(), ids=UNREADABLE.keys())
def test_unreadable_file_is_refused(tmp_path, make, read):
    path = make(tmp_path)
    with refused(UnreadableFileError, path):
        read(path)


NO_CT = {
    "four-dimensional": lambda d: save(d / "x.nii", np.stack([HU, HU], axis=3)),
    "two-dimensional": lambda d: save(d / "x.nii", HU[:, :, 0]),
    "one slice": lambda d: save(d / "x.nii", HU[:, :, :1]),
    "colour": lambda d: save(d / "x.nii", np.zeros(HU.shape, [("R", "u1"), ("G", "u1"), ("B", "u1")])),
    "complex": lambda d: save(d / "x.nii", HU.astype(np.complex64)),
    "MRI": lambda d: save(d / "x.nii", np.abs(HU)),
    "scaled to 0..1": lambda d: save(d / "x.nii", ((HU + 1000) / 2500).astype(np.float32)),
    "lost intercept": lambda d: save(d / "x.nii", (HU + 1024).astype(np.uint16)),
    "windowed": lambda d: save(d / "x.nii", HU.clip(-175, 250)),
    "air only": lambda d: save(d / "x.nii", HU.clip(-1000, -900)),
    "constant": lambda d: save(d / "x.nii", np.full(HU.shape, -1000, np.int16)),
    "not a number": lambda d: save(d / "x.nii", np.where(HU > 1400, np.nan, HU).astype(np.float32)),
    "infinite": lambda d: save(d / "x.nii", np.where(HU > 1400, np.inf, HU).astype(np.float32)),
    "rescaled twice": lambda d: save(d / "x.nii", HU, rescale=(1000.0, 0.0)),
    "infinite intercept": lambda d: patched(save(d / "x.nii", HU), scl_slope=1.0, scl_inter=np.inf),
}


@pytest.mark.parametrize("make", NO_CT.values(), ids=NO_CT.keys())
def test_image_that_is_not_a_ct_is_refused(tmp_path, make):
    path = make(tmp_path)
    with refused(NotACtError, path):
        read_ct(path)


NO_GEOMETRY = {
    "no sform, no qform": {"sform_code": 0, "qform_code": 0},
    "sform not a number": {"srow_x": [np.nan, 0, 0, 0]},
    "sform singular": {"srow_z": [0, 0, 0, 0]},
    "qform no rotation": {"sform_code": 0, "qform_code": 1, "quatern_b": 3.0},
    "voxels of a metre": {"srow_x": [1000, 0, 0, 0]},
}


@pytest.mark.parametrize("read", [read_ct, read_label_map])
@pytest.mark.parametrize("fields", NO_GEOMETRY.values(), ids=NO_GEOMETRY.keys())
def test_missing_or_impossible_geometry_is_refused(tmp_path, fields, read):
    array = HU if read is read_ct else np.abs(HU)
    path = patched(save(tmp_path / "x.nii", array), **fields)
    with refused(GeometryError, path):
        read(path)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(position=st.integers(0, 347), value=st.integers(0, 255))
def test_a_damaged_header_byte_is_harmless_or_an_error_that_names_the_file(tmp_path, position, value):
    buffer = io.BytesIO()
    image = nib.Nifti1Image(HU, LPS)
    image.to_file_map({"image": nib.FileHolder(fileobj=buffer), "header": nib.FileHolder(fileobj=buffer)})
    raw = bytearray(buffer.getvalue())
    raw[position] = value
    path = written(tmp_path / "damaged.nii", bytes(raw))
    for read in (read_ct, read_label_map):
        try:
            read(path)
        except FseftEdgeError as error:
            assert str(path) in error.message  # noqa: PT017 - an error is allowed, not required


def test_full_temporary_folder_is_an_error_that_names_file_and_folder(tmp_path, monkeypatch):
    path = save(tmp_path / "ct.nii.gz", HU)

    def full(buffering):
        return open("/dev/full", "r+b", buffering=buffering)  # noqa: PTH123 - every write to this device fails

    monkeypatch.setattr(tempfile, "TemporaryFile", full)
    with refused(OutOfSpaceError, path, tempfile.gettempdir()) as caught:
        read_ct(path)
    assert "TMPDIR" in caught.value.remedy


BEHIND = {
    "zeros behind gzip": (".nii.gz", lambda raw: raw + bytes(512), "compressed data"),
    "garbage behind gzip": (".nii.gz", lambda raw: raw + b"patient notes", "compressed data"),
    "one byte behind gzip": (".nii.gz", lambda raw: raw + b"\x1f", "compressed data"),
    "bytes behind the voxels": (".nii", lambda raw: raw + bytes(100), "100 bytes behind its voxels"),
    "bytes behind the voxels in gzip": (
        ".nii.gz",
        lambda raw: gzip.compress(gzip.decompress(raw) + bytes(7)),
        "7 bytes behind its voxels",
    ),
}


@pytest.mark.parametrize(("suffix", "change", "warning"), BEHIND.values(), ids=BEHIND.keys())
def test_bytes_behind_the_image_are_ignored_with_a_warning(tmp_path, caplog, suffix, change, warning):
    path = save(tmp_path / f"ct{suffix}", HU)
    path.write_bytes(change(path.read_bytes()))
    scan = read_ct(path)
    np.testing.assert_array_equal(scan.array, HU)
    (said,) = scan.warnings
    assert warning in said
    path = save(tmp_path / f"labels{suffix}", np.abs(HU))
    path.write_bytes(change(path.read_bytes()))
    np.testing.assert_array_equal(read_label_map(path).array, np.abs(HU))
    assert warning in caplog.text


def test_several_gzip_streams_in_one_file_are_one_image(tmp_path):
    raw = gzip.decompress(save(tmp_path / "ct.nii.gz", HU).read_bytes())
    path = written(tmp_path / "ct.nii.gz", b"".join(gzip.compress(raw[i : i + 100]) for i in range(0, len(raw), 100)))
    scan = read_ct(path)
    np.testing.assert_array_equal(scan.array, HU)
    assert scan.warnings == ()


@pytest.mark.parametrize("level", [0, 1, 9])
def test_a_stream_longer_than_a_buffer_is_unpacked_completely(tmp_path, monkeypatch, level):
    monkeypatch.setattr(nifti, "_PACKED_BYTES", 50)
    monkeypatch.setattr(nifti, "_UNPACKED_BYTES", 64)
    constant = np.where(np.indices(HU.shape)[2] > 2, -1000, HU).astype(np.int16)
    raw = gzip.decompress(save(tmp_path / "ct.nii.gz", constant).read_bytes())
    path = written(tmp_path / "ct.nii.gz", gzip.compress(raw, level))
    np.testing.assert_array_equal(read_ct(path).array, constant)


@pytest.mark.parametrize(("slope", "intercept"), [(0.0, -1024.0), (np.nan, 10.0), (2.0, np.nan), (1.0, np.inf)])
def test_a_slope_and_intercept_that_programs_read_differently_are_refused(tmp_path, slope, intercept):
    """ITK adds an intercept without a slope, nibabel does not."""
    path = patched(save(tmp_path / "ct.nii", HU), scl_slope=slope, scl_inter=intercept)
    with refused(NotACtError, path, "slope"):
        read_ct(path)


@pytest.mark.parametrize(("slope", "intercept"), [(0.0, 0.0), (np.nan, np.nan), (0.0, np.nan), (np.inf, np.nan)])
def test_no_valid_slope_means_no_scaling(tmp_path, slope, intercept):
    scan = read_ct(patched(save(tmp_path / "ct.nii", HU), scl_slope=slope, scl_inter=intercept))
    assert (scan.slope, scan.intercept) == (1.0, 0.0)


PAIRS = {
    "plain": (".hdr", ".img"),
    "packed": (".hdr.gz", ".img.gz"),
    "only the voxels packed": (".hdr", ".img.gz"),
    "capitals": (".HDR", ".IMG"),
}


def pair(folder: Path, name: str, array, suffixes=(".hdr", ".img"), kind=nib.Nifti1Pair) -> tuple[Path, Path]:
    """Write a pair of header and voxels, each packed if its name says so."""
    nib.save(kind(array, LPS), folder / "pair.img")
    paths = []
    for plain, suffix in zip((".hdr", ".img"), suffixes, strict=True):
        raw = (folder / f"pair{plain}").read_bytes()
        paths.append(written(folder / f"{name}{suffix}", gzip.compress(raw) if suffix.endswith(".gz") else raw))
        (folder / f"pair{plain}").unlink()
    return paths[0], paths[1]


@pytest.mark.parametrize("suffixes", PAIRS.values(), ids=PAIRS.keys())
@pytest.mark.parametrize("kind", [nib.Nifti1Pair, nib.Nifti2Pair])
def test_a_pair_of_header_and_voxels_is_one_image_whichever_file_is_given(tmp_path, suffixes, kind):
    header, voxels = pair(tmp_path, "a", HU, suffixes, kind)
    for path in (header, voxels):
        scan = read_ct(path)
        np.testing.assert_array_equal(scan.array, HU)
        np.testing.assert_array_equal(scan.affine, LPS.astype(np.float32 if kind is nib.Nifti1Pair else np.float64))
        assert scan.warnings == ()
        assert list_cases(path) == [header]
        assert case_name(path) == "a"
        assert files_of(path) == (header, voxels)
    assert cases_by_name(tmp_path) == {"a": header}


def test_a_pair_that_itk_wrote_is_read(tmp_path):
    image = SimpleITK.GetImageFromArray(HU.T.copy())
    image.SetSpacing((0.5, 0.75, 2.0))
    image.SetOrigin((1, 2, 3))
    SimpleITK.WriteImage(image, str(tmp_path / "a.hdr"))
    scan = read_ct(tmp_path / "a.img")
    np.testing.assert_array_equal(scan.array, HU)
    np.testing.assert_allclose(scan.affine, affine_in_itk(tmp_path / "a.hdr"), atol=1e-5)


def test_pairs_are_cases_beside_single_files_and_other_img_files_are_not(tmp_path):
    pair(tmp_path, "b", HU)
    save(tmp_path / "a.nii", HU)
    (tmp_path / "disc.img").touch()
    (tmp_path / "radiance.hdr").touch()
    assert [path.name for path in list_cases(tmp_path)] == ["a.nii", "b.hdr"]
    assert list(cases_by_name(tmp_path)) == ["a", "b"]
    save(tmp_path / "b.nii.gz", HU)
    with refused(InputError, "b.hdr", "b.nii.gz"):
        cases_by_name(tmp_path)


def test_a_label_map_in_a_pair_has_its_names_and_values(tmp_path):
    header, _ = pair(tmp_path, "labels", np.abs(HU) % 5)
    np.testing.assert_array_equal(read_label_map(header).array, np.abs(HU) % 5)
    assert read_label_names(header) == {}
    image = nib.Nifti1Pair((np.abs(HU) % 5).astype(np.uint8), LPS)
    image.header.extensions.append(
        nib.nifti1.Nifti1Extension(30, b'<CaretExtension><Label Key="4">liver</Label></CaretExtension>')
    )
    nib.save(image, tmp_path / "named.img")
    assert read_label_names(tmp_path / "named.img") == {4: "liver"}


def test_a_link_to_one_half_leads_to_the_pair(tmp_path):
    (tmp_path / "in").mkdir()
    header, voxels = pair(tmp_path / "in", "a", HU)
    (tmp_path / "case.hdr").symlink_to(header)
    np.testing.assert_array_equal(read_ct(tmp_path / "case.hdr").array, HU)
    assert files_of(tmp_path / "case.hdr")[1] == voxels


def test_the_other_half_of_a_long_name_or_of_an_endless_link_does_not_exist(tmp_path):
    long, endless = tmp_path / f"{'n' * 251}.hdr", tmp_path / "a.hdr"
    long.touch()
    endless.symlink_to(endless)
    for path in (long, endless):
        assert files_of(path) == (path,)
        with refused(UnreadableFileError, path):
            read_ct(path)


@pytest.mark.parametrize("missing", [0, 1])
def test_half_a_pair_is_refused(tmp_path, missing):
    halves = pair(tmp_path, "a", HU)
    halves[missing].unlink()
    with refused(UnreadableFileError, halves[1 - missing]):
        read_ct(halves[1 - missing])


def test_an_analyze_image_is_refused_because_its_sides_are_unknown(tmp_path):
    nib.save(nib.AnalyzeImage(HU, LPS), tmp_path / "a.img")
    with refused(GeometryError, "a.hdr", "Analyze 7.5", "left and right"):
        read_ct(tmp_path / "a.hdr")
    pair(tmp_path, "b", HU)
    patched(tmp_path / "b.hdr", magic=b"n+1")
    with refused(UnreadableFileError, "b.hdr"):
        read_ct(tmp_path / "b.hdr")


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("dtype", ["u1", "<i2", ">u2", "<i4", "<f4", "<f8"])
def test_labels_have_the_smallest_unsigned_type(tmp_path, suffix, dtype):
    small = (np.abs(HU) % 8).astype(dtype)
    large = small.copy()
    large[0, 0, 0] = 255 if dtype == "u1" else 300
    labels = read_label_map(save(tmp_path / f"a{suffix}", small))
    assert labels.array.dtype == np.uint8
    np.testing.assert_array_equal(labels.array, small)
    labels = read_label_map(save(tmp_path / f"b{suffix}", large))
    assert labels.array.dtype == (np.uint8 if dtype == "u1" else np.uint16)
    np.testing.assert_array_equal(labels.array, large)


def test_stored_labels_are_rescaled(tmp_path):
    path = save(tmp_path / "labels.nii", np.array(HU % 4, np.int16), rescale=(2.0, 1.0))
    np.testing.assert_array_equal(read_label_map(path).array, HU % 4 * 2 + 1)


SCALED = {
    "float32": lambda d, labels: save(d / "x.nii", (labels * np.float64(1 + 1e-7)).astype(np.float32)),
    "float64": lambda d, labels: save(d / "x.nii", labels * (1 - 1e-7)),
    "scaled by 1/3": lambda d, labels: save(d / "x.nii", (labels * 3).astype(np.int16), rescale=(1 / 3, 0.0)),
    "scaled with an intercept": lambda d, labels: save(d / "x.nii", (labels * 10).astype(np.int16), rescale=(0.1, 0.0)),
    "floats as int16 by nibabel": lambda d, labels: stored_as(d / "x.nii", labels.astype(np.float64), np.int16),
    "floats as int16 with many labels": lambda d, labels: stored_as(d / "x.nii", labels * 26.0, np.int16),
}


def stored_as(path: Path, array, dtype) -> Path:
    """Write with nibabel, which chooses a scale factor for the type."""
    image = nib.Nifti1Image(array, LPS)
    image.set_data_dtype(dtype)
    nib.save(image, path)
    return path


@pytest.mark.parametrize("name", SCALED)
def test_scaled_labels_are_rounded_to_the_whole_numbers_that_they_were(tmp_path, name):
    labels = np.abs(HU) % 5
    path = SCALED[name](tmp_path, labels)
    by_nibabel = nib.load(path).get_fdata()
    assert (by_nibabel != np.rint(by_nibabel)).any()
    found = read_label_map(path)
    np.testing.assert_array_equal(found.array, labels * 26 if "many" in name else labels)
    assert found.array.dtype == np.uint8


@pytest.mark.parametrize("off", [0.011, 0.5])
def test_a_value_between_two_labels_is_refused_and_named(tmp_path, off):
    labels = (np.abs(HU) % 5).astype(np.float32)
    labels[3, 4, 2] += off
    path = save(tmp_path / "x.nii", labels)
    with refused(LabelError, path, f"{labels[3, 4, 2]:.6g}") as caught:
        read_label_map(path)
    assert "without a scale factor" in caught.value.remedy


NO_LABELS = {
    "negative": lambda d: save(d / "x.nii", HU),
    "fractions": lambda d: save(d / "x.nii", np.abs(HU / 7).astype(np.float32)),
    "fractions by rescale": lambda d: save(d / "x.nii", np.abs(HU), rescale=(0.3, 0.0)),
    "a little negative": lambda d: save(d / "x.nii", np.where(HU > 0, -0.6, 0).astype(np.float32)),
    "not a number": lambda d: save(d / "x.nii", np.where(HU > 0, np.nan, 0).astype(np.float32)),
    "huge": lambda d: save(d / "x.nii", np.where(HU > 0, 1e30, 0).astype(np.float32)),
    "four-dimensional": lambda d: save(d / "x.nii", np.zeros((4, 4, 4, 4), np.uint8)),
    "colour": lambda d: save(d / "x.nii", np.zeros(HU.shape, [("R", "u1"), ("G", "u1"), ("B", "u1")])),
}


@pytest.mark.parametrize("make", NO_LABELS.values(), ids=NO_LABELS.keys())
def test_file_without_label_values_is_refused(tmp_path, make):
    path = make(tmp_path)
    with refused(LabelError, path):
        read_label_map(path)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@example(np.zeros((1, 1, 1), np.uint8), (2.0, 180.0, 2.0), (1.0, 1.0, 2.0), (0.0, 0.0, 0.0), ".nii")
@example(np.ones((1, 2, 3), np.uint8), (10.0, 20.0, 30.0), (1.0, 1.0, 2.0), (0.0, 0.0, 0.0), ".nii")
@given(
    array=hnp.arrays(
        st.sampled_from([np.uint8, np.uint16, np.uint32]),
        hnp.array_shapes(min_dims=3, max_dims=3, min_side=1, max_side=9),
    ),
    angles=st.tuples(*[st.floats(-180, 180)] * 3),
    spacing=st.tuples(*[st.floats(0.2, 10)] * 3),
    origin=st.tuples(*[st.floats(-2000, 2000)] * 3),
    suffix=st.sampled_from(SUFFIXES),
)
def test_written_labels_and_their_lattice_are_read_unchanged(tmp_path, array, angles, spacing, origin, suffix):
    affine = np.eye(4)
    affine[:3, :3] = Rotation.from_euler("xyz", angles, degrees=True).as_matrix() @ np.diag(spacing)
    affine[:3, 3] = origin
    path = tmp_path / f"mask{suffix}"
    write_label_map(path, LabelMap(array, affine))
    back = read_label_map(path)
    np.testing.assert_array_equal(back.array, array)
    assert back.shape == array.shape
    assert deviation(affine, back.affine, array.shape).mm < 1e-3
    by_nibabel = nib.load(path)
    np.testing.assert_array_equal(np.asanyarray(by_nibabel.dataobj), array)
    qform, code = by_nibabel.get_qform(coded=True)
    if code:
        np.testing.assert_allclose(qform, affine, atol=2e-3)
    else:  # near a rotation of 180 degrees the float32 quaternion is too coarse, so only the sform is written
        header = nib.Nifti1Header()
        header.set_qform(affine)
        assert not np.allclose(header.get_qform(), affine, atol=1e-3)
    assert by_nibabel.header["sform_code"] == 1
    assert by_nibabel.header.get_xyzt_units()[0] == "mm"


def test_written_labels_have_exactly_the_affine_of_the_scan(tmp_path):
    scan = read_ct(save(tmp_path / "ct.nii", HU))
    write_label_map(tmp_path / "mask.nii.gz", LabelMap(np.zeros(scan.shape, np.uint8), scan.affine))
    np.testing.assert_array_equal(read_label_map(tmp_path / "mask.nii.gz").affine, scan.affine)


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("dtype", ["<i2", ">i2", "<u2", "<f4"])
def test_written_ct_is_read_with_its_stored_values(tmp_path, suffix, dtype):
    stored = (HU + 1024).clip(0).astype(dtype)
    volume = Volume(stored, LPS, slope=2.0, intercept=-1024.0)
    write_ct(tmp_path / f"ct{suffix}", volume)
    back = read_ct(tmp_path / f"ct{suffix}")
    assert back.array.dtype == np.dtype(dtype).newbyteorder("=")
    np.testing.assert_array_equal(back.array, stored)
    assert (back.slope, back.intercept) == (2.0, -1024.0)
    assert deviation(volume.affine, back.affine, volume.shape).mm < 1e-3
    np.testing.assert_array_equal(nib.load(back.source).get_fdata(), stored * 2.0 - 1024.0)


def test_sheared_lattice_is_written_without_a_qform(tmp_path):
    gantry_tilt = LPS.copy()
    gantry_tilt[1, 2] = 0.8
    write_label_map(tmp_path / "mask.nii", LabelMap(np.ones((4, 4, 4), np.uint8), gantry_tilt))
    header = nib.load(tmp_path / "mask.nii").header
    assert header["qform_code"] == 0
    np.testing.assert_allclose(header.get_sform(), gantry_tilt, atol=1e-5)


def test_labels_are_written_in_the_smallest_type(tmp_path):
    write_label_map(tmp_path / "mask.nii", LabelMap(np.full((3, 3, 3), 5, np.uint32), LPS))
    assert nib.load(tmp_path / "mask.nii").get_data_dtype() == np.uint8


def test_equal_labels_give_equal_bytes(tmp_path):
    array = (np.abs(HU) % 5).astype(np.uint8)
    write_label_map(tmp_path / "first.nii.gz", LabelMap(array, LPS))
    write_label_map(tmp_path / "second.nii.gz", LabelMap(np.asfortranarray(array), LPS))
    assert (tmp_path / "first.nii.gz").read_bytes() == (tmp_path / "second.nii.gz").read_bytes()


def test_very_long_axis_is_written_as_nifti_2(tmp_path):
    array = np.zeros((2, 2, 40_000), np.uint8)
    array[0, 0, -1] = 3
    write_label_map(tmp_path / "mask.nii.gz", LabelMap(array, LPS))
    np.testing.assert_array_equal(read_label_map(tmp_path / "mask.nii.gz").array, array)


def test_failed_write_leaves_the_old_mask(tmp_path, monkeypatch):
    path = tmp_path / "mask.nii.gz"
    write_label_map(path, LabelMap(np.ones((3, 3, 3), np.uint8), LPS))
    before = path.read_bytes()

    def full(_path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(atomic, "_flush", full)
    with refused(OutOfSpaceError, path):
        write_label_map(path, LabelMap(np.zeros((3, 3, 3), np.uint8), LPS))
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_label_map_with_another_suffix_is_refused(tmp_path):
    with refused(UsageError, "mask.mha"):
        write_label_map(tmp_path / "mask.mha", LabelMap(np.zeros((3, 3, 3), np.uint8), LPS))


def test_cases_of_a_folder_are_its_nifti_files_in_order(tmp_path):
    for name in ("b.nii.gz", "a.nii", "C.NII.GZ", "notes.txt", ".half.partial.nii.gz"):
        (tmp_path / name).touch()
    (tmp_path / "folder.nii").mkdir()
    assert [path.name for path in list_cases(tmp_path)] == ["C.NII.GZ", "a.nii", "b.nii.gz"]
    assert list_cases(tmp_path / "a.nii") == [tmp_path / "a.nii"]


@pytest.mark.parametrize("name", ["missing.nii", "notes.txt", "empty"])
def test_path_without_a_case_is_refused(tmp_path, name):
    (tmp_path / "notes.txt").touch()
    (tmp_path / "empty").mkdir()
    with refused(UnreadableFileError, tmp_path / name):
        list_cases(tmp_path / name)


@pytest.mark.parametrize(
    ("name", "case"), [("hn_002.nii.gz", "hn_002"), ("a.b.nii", "a.b"), ("C.NII.GZ", "C"), ("series", "series")]
)
def test_case_name_is_the_file_name_without_its_suffix(name, case):
    assert case_name(Path("folder.x") / name) == case


@pytest.mark.real_ct
def test_clinical_size_scan_is_read_and_hashed_in_little_memory(real_ct):
    before = resident_mib()
    scan = read_ct(real_ct / "fullsize" / "thorax_512.nii.gz")
    assert resident_mib() - before < 40
    voxels = 0
    for chunk in scan.chunks():
        voxels += chunk.size
    assert voxels == 512 * 512 * 130
    assert resident_mib() - before < 40
    assert scan.array.nbytes == 130 * 2**20
    assert scan.axcodes == "LPS"


@pytest.mark.real_ct
def test_scan_and_its_annotation_have_the_same_lattice(real_ct):
    scan = read_ct(real_ct / "headneck" / "ct" / "hn_002.nii.gz")
    labels = read_label_map(real_ct / "headneck" / "label" / "hn_002.nii.gz")
    assert labels_on(scan, labels).array is labels.array
    assert scan.axcodes == "PLI"


@pytest.mark.parametrize("name", ["ct.nii", "ct.nii.gz"])
def test_an_empty_file_is_named_as_such(tmp_path: Path, name: str) -> None:
    (tmp_path / name).touch()
    with refused(UnreadableFileError, tmp_path / name, "0 bytes"):
        read_ct(tmp_path / name)
