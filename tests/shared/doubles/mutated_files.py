"""Small files of every kind that the toolkit reads, their mutations by number, and what reading a mutated file gives.

A mutated file is either refused with an error that has a remedy, or read. What is read from a scan must have the places
and values that an independent reader finds in the same file. Mutation ``number`` of a kind is the same in every run.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import re
import shutil
import tempfile
import traceback
import warnings
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, closing, nullcontext, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Final, Literal

import nibabel as nib
import numpy as np
import pydicom
import SimpleITK
from numpy.typing import NDArray
from pydicom.dataset import Dataset
from pydicom.pixels import compress
from pydicom.uid import ExplicitVRLittleEndian, ImplicitVRLittleEndian, JPEGLSLossless, RLELossless
from safetensors.torch import load as load_tensors

from doubles import dicom, mutations
from doubles.cohorts import CONFIG
from doubles.models import small_model
from doubles.repository import ROOT
from fseft_edge.adaptation.patients import read_groups
from fseft_edge.adaptation.size_priors import read_size_priors
from fseft_edge.adapters.described_tensors import TUNING_KEY, SelfDescription, content_digest
from fseft_edge.adapters.file import AdapterDescription, read_adapter, write_adapter
from fseft_edge.batch.case_work import RECORD_FILE, read_record
from fseft_edge.export.checkpoints import read_model_file, write_model_file
from fseft_edge.finetuning.tuning_file import TuningDescription, read_tuning
from fseft_edge.masks.result import SegmentedOrgan, organ_labels
from fseft_edge.outbox.records import CaseState, Outcome, StageSeconds
from fseft_edge.outbox.store import BatchStore
from fseft_edge.pretraining.config import read_pretraining_config
from fseft_edge.runtime.errors import FseftEdgeError
from fseft_edge.runtime.scans.dicom import DicomSeries, choose_series, find_series, read_series
from fseft_edge.runtime.scans.nifti import read_ct, read_label_map, read_label_names, write_label_map
from fseft_edge.runtime.scans.sources import Scan
from fseft_edge.runtime.scans.volume import LabelMap, Volume
from fseft_edge.segmentation.segmenter import open_segmenter
from fseft_edge.segmentation.settings import SegmentationSettings

Random = np.random.Generator
Result = Literal[
    "accepted",  # no independent reader exists for this kind of file
    "agreed",  # accepted; an independent reader finds the same
    "unconfirmed",  # accepted; no independent reader reads the file
    "refused",
    "needless",  # refused, although an independent reader finds what the file contained before the mutation
    "wrong",  # accepted; an independent reader finds other places or values
    "part",  # accepted without a part of the files, and without a word
    "traceback",
    "warning",  # a warning of a library that the user would see
    "private",  # the name of the patient is in the message
]
FAULTS: Final[tuple[Result, ...]] = ("wrong", "part", "traceback", "warning", "private")

_OLDER = ROOT / "tests" / "shared" / "older_files"
_SHAPE = (12, 10, 8)
_LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])
_TENTH = 0.1
_ROUNDED_POSITION_MM = 0.1001
"""Positions of DICOM slices may be rounded to a tenth of a millimetre, also where voxels are smaller than 1 mm."""
_AIR = -1024.0
_PADDING_TAG = b"\x28\x00\x20\x01"


@dataclass(frozen=True)
class Verdict:
    """What reading a mutated file gave.

    Attributes:
        result: the result.
        said: the message of a refusal, or what is wrong.
        mutation: what was changed, in words.
        start: name of the file before the mutation.
    """

    result: Result
    said: str = ""
    mutation: str = ""
    start: str = ""


@dataclass(frozen=True)
class Image:
    """An image as one reader sees it: values ``[X, Y, Z]``, and the affine to RAS+ mm."""

    values: NDArray[Any]
    affine: NDArray[np.float64]

    def difference(self, other: Image, least_mm: float = 0.0) -> str:
        """Return how another image differs: in shape, by more than a tenth of a voxel along an axis, or in values.

        Args:
            other: image of another reader.
            least_mm: smaller distances of corners are no difference.

        Returns:
            The difference in words; empty if there is none.
        """
        if self.values.shape != other.values.shape:
            return f"the shape is {self.values.shape}, not {other.values.shape}"
        ends = np.array([[*corner, 1.0] for corner in np.ndindex(2, 2, 2)])
        ends[:, :3] *= np.array(self.values.shape) - 1
        apart = (ends @ (self.affine - other.affine).T)[:, :3]
        voxels = np.abs(np.linalg.solve(self.affine[:3, :3], apart.T)).max()
        millimetres = np.linalg.norm(apart, axis=1).max()
        if not (voxels <= _TENTH or millimetres <= least_mm):
            return f"a corner lies {millimetres:.3g} mm or {voxels:.3g} voxels elsewhere"
        if not np.allclose(self.values, other.values, rtol=1e-5, atol=0.02, equal_nan=True):
            return f"values differ by up to {np.abs(self.values - other.values).max():.3g}"
        return ""

    def sheared(self, other: Image) -> Image:
        """Return another reader's image with the affine of this one if that reader only left out its shear."""
        steps = np.linalg.norm(self.affine[:3, :3], axis=0)
        left, _, right = np.linalg.svd(self.affine[:3, :3] / steps)
        straight = self.affine.copy()
        straight[:3, :3] = (left @ right) * steps
        alike = not Image(self.values, straight).difference(other)
        return Image(other.values, self.affine) if alike else other


class Kind(ABC):
    """A kind of file. ``read`` raises what the toolkit raises."""

    name: str

    @abstractmethod
    def write(self, folder: Path) -> None:
        """Write the files before mutation, each in a folder of its own below ``folder``."""

    @abstractmethod
    def mutate(self, folder: Path, random: Random) -> str:
        """Change the files in a folder; return what was changed."""

    @abstractmethod
    def read(self, folder: Path) -> Any:
        """Read the files in a folder with the toolkit."""

    def compare(self, folder: Path, found: Any) -> Verdict:
        """Compare what the toolkit read with what an independent reader reads, if there is one for this kind."""
        return Verdict("accepted")

    def needless(self, folder: Path, original: Path) -> bool:
        """Return whether independent readers find in a refused file what it contained before."""
        return False

    def at(self, number: int, seed: int) -> Random:
        """Return the random numbers of a mutation."""
        return np.random.default_rng([seed, number, *self.name.encode()])


# NIfTI


class Nifti(Kind):
    """CTs as NIfTI files."""

    name = "NIfTI"

    def write(self, folder: Path) -> None:
        hu = dicom.some_hu(_SHAPE)
        turned = _affine(_rotation(3, 7, -12), (0.9, 0.8, 2.5))
        sheared = turned @ np.array([[1, 0, 0, 0], [0, 1, 0.2, 0], [0, 0, 1, 0], [0, 0, 0, 1]])
        straight = _affine(np.diag([-1.0, -1.0, 1.0]), (0.9, 0.8, 2.5))
        eight = np.clip((hu + 1024) / 10, 0, 255).astype(np.uint8)
        for name, array, affine, more in (
            ("plain.nii", hu, straight, {}),
            ("packed.nii.gz", hu, turned, {}),
            ("second.nii", hu, turned, {"kind": nib.Nifti2Image}),
            ("second.nii.gz", hu.astype(np.float32), straight, {"kind": nib.Nifti2Image}),
            ("big.nii", hu, turned, {"order": ">"}),
            ("sheared.nii", hu, sheared, {"qform": None}),
            ("sform.nii.gz", hu, straight, {"qform": None}),
            ("qform.nii", hu, turned, {"sform": None}),
            ("scaled.nii", eight, straight, {"scale": (10.0, -1024.0)}),
            ("pair.hdr", hu, turned, {"kind": nib.Nifti1Pair}),
            ("series.nii", hu[..., None], straight, {}),
        ):
            (folder / name).mkdir(parents=True)
            _write_nifti(folder / name / f"scan{name[name.index('.') :]}", array, affine, **more)

    def mutate(self, folder: Path, random: Random) -> str:
        path = _one(random, sorted(folder.iterdir()))
        kinds = [mutations.of_nifti_header] * 3 + [mutations.of_the_beginning(352), mutations.of_bytes]
        if path.suffix == ".img":
            kinds = [mutations.of_bytes]
        if path.suffix == ".gz" and random.random() < 0.3:
            return _apply(path, mutations.of_bytes, random)
        return _apply(path, _one(random, kinds), random, packed=path.suffix == ".gz")

    def read(self, folder: Path) -> Volume:
        return read_ct(self.path(folder))

    def path(self, folder: Path) -> Path:
        return next(path for path in sorted(folder.iterdir()) if path.suffix != ".img")

    def compare(self, folder: Path, found: Any) -> Verdict:
        others, ours = list(_nifti_images(self.path(folder))), _image(found)
        if any("perpendicular" in warning for warning in getattr(found, "warnings", ("perpendicular",))):
            # ITK leaves out the shear of an sform, as the warning of a scan says; label maps have no warnings
            others = [(reader, ours.sheared(other) if reader == "SimpleITK" else other) for reader, other in others]
        return _compared(ours, others)

    def needless(self, folder: Path, original: Path) -> bool:
        before = dict(_nifti_images(self.path(original)))
        now = dict(_nifti_images(self.path(folder)))
        return bool(now) and all(reader in before and not before[reader].difference(now[reader]) for reader in now)


class Labels(Nifti):
    """Label maps as NIfTI files, some with names of the labels."""

    name = "label map"

    def write(self, folder: Path) -> None:
        labels = np.zeros(_SHAPE, np.uint8)
        labels[2:6, 2:7, 1:5], labels[7:10, 3:6, 4:7] = 1, 7
        turned = _affine(_rotation(3, 7, -12), (0.9, 0.8, 2.5))
        straight = _affine(np.diag([-1.0, -1.0, 1.0]), (0.9, 0.8, 2.5))
        for name, array, affine, more in (
            ("plain.nii", labels, turned, {}),
            ("signed.nii.gz", labels.astype(np.int16), straight, {}),
            ("floats.nii", labels.astype(np.float32), turned, {"sform": None}),
            ("scaled.nii", (labels * 2).astype(np.float32), straight, {"scale": (0.5, 0.0)}),
            ("wide.nii", labels.astype(np.int32) * 300, turned, {"kind": nib.Nifti2Image}),
        ):
            (folder / name).mkdir(parents=True)
            _write_nifti(folder / name / f"labels{name[name.index('.') :]}", array, affine, **more)
        for name in ("named.nii", "named.nii.gz"):
            path = folder / name / f"labels{name[name.index('.') :]}"
            write_label_map(path, LabelMap(labels, turned), {1: "liver", 7: "left & right"})

    def mutate(self, folder: Path, random: Random) -> str:
        path = self.path(folder)
        if "named" in folder.name and random.random() < 0.4:
            return _apply(path, mutations.of_the_beginning(1500), random, packed=path.suffix == ".gz")
        return super().mutate(folder, random)

    def read(self, folder: Path) -> LabelMap:
        labels = read_label_map(self.path(folder))
        read_label_names(self.path(folder))
        return labels


def _write_nifti(
    path: Path,
    array: NDArray[Any],
    affine: NDArray[np.float64],
    *,
    kind: Any = nib.Nifti1Image,
    order: str = "<",
    sform: int | None = 1,
    qform: int | None = 1,
    scale: tuple[float, float] = (1.0, 0.0),
) -> None:
    header = kind.header_class(endianness=order)
    header.set_data_dtype(array.dtype.newbyteorder(order))
    image = kind(array.astype(array.dtype.newbyteorder(order)), affine, header)
    image.set_qform(affine if qform else None, qform or 0, strip_shears=True)
    image.set_sform(affine if sform else None, sform or 0)
    image.header.set_xyzt_units("mm")
    if scale != (1.0, 0.0):
        image.header.set_slope_inter(*scale)
    if path.suffix == ".hdr":
        nib.save(image, path)
        return
    header = image.header.copy()
    header.set_slope_inter(*scale)
    header["vox_offset"] = header.single_vox_offset
    content = header.binaryblock + bytes(4) + image.dataobj.tobytes(order="F")
    path.write_bytes(gzip.compress(content, mtime=0) if path.suffix == ".gz" else content)


def _nifti_images(path: Path) -> Iterator[tuple[str, Image]]:
    """Yield the image that each independent reader finds in a NIfTI file, with the name of the reader."""
    with suppress(Exception):  # whatever it raises, this reader does not read the file
        image = nib.load(path)
        factor = {"meter": 1000.0, "micron": 1e-3}.get(image.header.get_xyzt_units()[0], 1.0)
        affine = np.diag([factor, factor, factor, 1.0]) @ image.affine
        if np.linalg.matrix_rank(affine) == 4:  # it also returns an sform of zeros, which places nothing
            yield "nibabel", Image(_three_axes(np.asanyarray(image.dataobj).astype(np.float64)), affine)
    with suppress(RuntimeError):
        yield "SimpleITK", _itk_image(SimpleITK.ReadImage(str(path), imageIO="NiftiImageIO"))


def _itk_image(image: SimpleITK.Image) -> Image:
    axes = image.GetDimension()
    affine = np.eye(axes + 1)
    affine[:axes, :axes] = np.reshape(image.GetDirection(), (axes, axes)) * image.GetSpacing()
    affine[:axes, axes] = image.GetOrigin()
    keep = [0, 1, 2, axes]
    values = SimpleITK.GetArrayFromImage(image).T.astype(np.float64)
    return Image(_three_axes(values), _LPS_TO_RAS @ affine[np.ix_(keep, keep)])


def _three_axes(values: NDArray[Any]) -> NDArray[Any]:
    while values.ndim > 3 and values.shape[-1] == 1:
        values = values[..., 0]
    return values


def _image(found: Volume | LabelMap) -> Image:
    if isinstance(found, Volume):
        return Image(np.asarray(found.array, np.float64) * found.slope + found.intercept, found.affine)
    return Image(np.asarray(found.array, np.float64), found.affine)


def _compared(ours: Image, others: Sequence[tuple[str, Image]]) -> Verdict:
    differences = [f"{reader}: {said}" for reader, other in others if (said := ours.difference(other))]
    if differences:
        return Verdict("wrong", "; ".join(differences))
    return Verdict("agreed" if others else "unconfirmed")


# DICOM


class DicomKind(Kind):
    """CT series as DICOM files, in folders and archives."""

    name = "DICOM"

    def write(self, folder: Path) -> None:
        series = dicom.Series(dicom.some_hu(_SHAPE), uid="1.2.3.4", study="1.2.3", frame_of_reference="1.2.3.9")
        turned = replace(series, orientation=tuple(np.concatenate(_rotation(3, 7, -12).T[:2])), signed=False)
        for name, written, change in (
            ("explicit", series, None),
            ("oblique", turned, None),
            ("implicit", series, _implicit),
            ("padded", series, _padded),
            ("rle", series, _compressed(RLELossless, "pydicom")),
            ("jpeg_ls", series, _compressed(JPEGLSLossless, "pyjpegls")),
        ):
            written.write(folder / name / "scan", _fixed_uids(change))
        bare = series.write(folder / "no_preamble" / "scan", _fixed_uids(None))
        for path in bare.iterdir():
            path.write_bytes(path.read_bytes()[132:])
        enhanced = series.enhanced([2, 0, 1, 4, 3, 5, 7, 6])
        _fixed_uids(None)(enhanced, 0)
        dicom.save(enhanced, folder / "enhanced" / "scan" / "IM")
        packed = series.write(folder / "zip" / "unpacked", _fixed_uids(None))
        with zipfile.ZipFile(folder / "zip" / "scan.zip", "w", zipfile.ZIP_DEFLATED) as archive:
            for path in sorted(packed.iterdir()):
                archive.writestr(zipfile.ZipInfo(path.name, (2000, 1, 1, 0, 0, 0)), path.read_bytes())
        shutil.rmtree(packed)

    def mutate(self, folder: Path, random: Random) -> str:
        scan = self.path(folder)
        if scan.suffix == ".zip":
            return _apply(scan, mutations.of_bytes, random)
        files = sorted(scan.iterdir())
        kinds = [mutations.of_dicom_elements] * 4 + [mutations.of_the_beginning(700), mutations.of_bytes]
        mutation, seed = _one(random, kinds), int(random.integers(2**31))
        everywhere = random.random() < 0.4
        said = ""
        for path in files if everywhere else [_one(random, files)]:
            said = _apply(path, mutation, np.random.default_rng(seed))
        return f"{said}, in {'every file' if everywhere else 'one file'}"

    def read(self, folder: Path) -> tuple[DicomSeries, Volume]:
        series = choose_series(find_series(self.path(folder)))
        return series, read_series(series)

    def path(self, folder: Path) -> Path:
        archive = folder / "scan.zip"
        return archive if archive.exists() else folder / "scan"

    def compare(self, folder: Path, found: Any) -> Verdict:
        series, volume = found
        image, read = _image(volume), set()
        with _unpacked(self.path(folder)) as files:
            for place, slice_ in enumerate(series.slices):
                name = slice_.file.member or slice_.file.path.name
                piece = np.eye(4)
                piece[2, 3] = place
                ours = Image(image.values[:, :, place : place + 1], image.affine @ piece)
                for reader, other in _dicom_images(files / name, slice_.frame):
                    read.add(reader)
                    if said := _without_padding(ours, other, files / name).difference(other, _ROUNDED_POSITION_MM):
                        return Verdict("wrong", f"slice {place + 1} of {len(series.slices)}, {reader}: {said}")
                    break
            left = {path.name for path in files.iterdir()} - {
                slice_.file.member or slice_.file.path.name for slice_ in series.slices
            }
        if left and not volume.warnings:
            return Verdict("part", f"{len(left)} files were left out without a warning")
        return Verdict("agreed" if read else "unconfirmed")

    def needless(self, folder: Path, original: Path) -> bool:
        with _unpacked(self.path(folder)) as now, _unpacked(self.path(original)) as before:
            names = sorted(path.name for path in before.iterdir())
            if names != sorted(path.name for path in now.iterdir()):
                return False
            for name in names:
                first = dict(_dicom_images(before / name, None))
                other = dict(_dicom_images(now / name, None))
                if not other or any(reader not in first or first[reader].difference(other[reader]) for reader in other):
                    return False
        return True


def _fixed_uids(change: Callable[[Dataset, int], None] | None) -> Callable[[Dataset, int], None]:
    """Return a change that also makes the bytes of a file equal in every run."""

    def fixed(dataset: Dataset, place: int) -> None:
        dataset.SOPInstanceUID = dataset.file_meta.MediaStorageSOPInstanceUID = f"1.2.3.4.{place + 1}"
        if change is not None:
            change(dataset, place)

    return fixed


def _implicit(dataset: Dataset, place: int) -> None:
    dataset.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian


def _padded(dataset: Dataset, place: int) -> None:
    dataset.PixelPaddingValue = -2000
    pixels = np.frombuffer(dataset.PixelData, "<i2").copy()
    pixels[:9] = -2000
    dataset.PixelData = pixels.tobytes()


def _compressed(syntax: str, plugin: str) -> Callable[[Dataset, int], None]:
    def change(dataset: Dataset, place: int) -> None:
        dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        compress(dataset, syntax, encoding_plugin=plugin, generate_instance_uid=False)

    return change


class _unpacked:  # noqa: N801 - used like a function
    """The files of a scan in one folder: the folder itself, or a temporary one for an archive."""

    def __init__(self, path: Path) -> None:
        self._path, self._folder = path, tempfile.TemporaryDirectory()

    def __enter__(self) -> Path:
        if self._path.is_dir():
            return self._path
        folder = Path(self._folder.name)
        with suppress(Exception), zipfile.ZipFile(self._path) as archive:  # a damaged archive has fewer files
            for info in archive.infolist():
                (folder / Path(info.filename).name).write_bytes(archive.read(info))
        return folder

    def __exit__(self, *_: object) -> None:
        self._folder.cleanup()


def _dicom_images(path: Path, frame: int | None) -> Iterator[tuple[str, Image]]:
    """Yield the image that each independent reader finds in a file: one frame, or with None all frames."""
    if not path.is_file():
        return
    with suppress(RuntimeError):
        image = _itk_image(SimpleITK.ReadImage(str(path), imageIO="GDCMImageIO"))
        content = path.read_bytes()
        has_place = b"\x20\x00\x32\x00" in content and not re.search(rb"[0-9],[0-9]", content)
        if has_place and image.values.ndim == 3 and (frame is None or image.values.shape[2] == 1):
            yield "SimpleITK", image
    with suppress(Exception):  # whatever it raises, this reader does not read the file
        yield "pydicom", _pydicom_image(pydicom.dcmread(path, force=True), frame)


def _pydicom_image(dataset: Dataset, frame: int | None) -> Image:
    """Compute the image of a file from its elements (PS3.3 C.7.6.2.1-1), of enhanced CT for one frame."""
    if "TransferSyntaxUID" not in dataset.file_meta:
        dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    values, source = dataset.pixel_array.astype(np.float64), [dataset]
    if "PerFrameFunctionalGroupsSequence" in dataset:
        groups = [dataset.PerFrameFunctionalGroupsSequence[frame or 0], dataset.SharedFunctionalGroupsSequence[0]]
        source = [item for group in groups for element in group for item in element.value] + source
        values = values[frame or 0] if frame is not None else values

    def numbers(keyword: str) -> NDArray[np.float64]:
        raw = next(item.get_item(keyword) for item in source if keyword in item).value
        text = raw.decode("latin-1") if isinstance(raw, bytes) else "\\".join(map(str, np.atleast_1d(raw)))
        # As in dcm2niix, a decimal comma is a decimal point. GDCM takes the digits before the comma alone.
        return np.array([float(part.replace(",", ".")) for part in text.rstrip(" \0").split("\\")])

    row, column = numbers("ImageOrientationPatient").reshape(2, 3)
    spacing = numbers("PixelSpacing")
    affine = np.eye(4)
    affine[:3, 0], affine[:3, 1] = row * spacing[1], column * spacing[0]
    affine[:3, 2], affine[:3, 3] = np.cross(row, column), numbers("ImagePositionPatient")
    values = values * numbers("RescaleSlope")[0] + numbers("RescaleIntercept")[0]
    return Image(values.T.reshape(values.shape[-1], values.shape[-2], -1), _LPS_TO_RAS @ affine)


def _without_padding(ours: Image, other: Image, path: Path) -> Image:
    """Return our image with the other reader's values in place of air that stands for padding."""
    if _PADDING_TAG not in path.read_bytes() or ours.values.shape != other.values.shape:
        return ours
    return Image(np.where(np.abs(ours.values - _AIR) < 1, other.values, ours.values), ours.affine)


# Models


class AdapterKind(Kind):
    """Adapter files; in half of the mutations of the description, its checksum is right again."""

    name = "adapter"
    suffix: str = "adapter"
    key: str = "fseft_edge_adapter"
    description: type[SelfDescription] = AdapterDescription

    def write(self, folder: Path) -> None:
        for name in ("linear", "spatial"):
            (folder / name).mkdir(parents=True)
            shutil.copy(_OLDER / f"{name}.adapter", folder / name)
        file = read_adapter(_OLDER / "linear.adapter")
        (folder / "new").mkdir()
        write_adapter(folder / "new" / "linear.adapter", file)

    def mutate(self, folder: Path, random: Random) -> str:
        (path,) = folder.iterdir()
        content = path.read_bytes()
        if random.random() < 0.4:
            return _apply(path, _one(random, (mutations.of_bytes, mutations.of_safetensors)), random)
        length = int.from_bytes(content[:8], "little")
        header, data = json.loads(content[8 : 8 + length]), content[8 + length :]
        repaired = random.random() < 0.5
        description = json.loads(header["__metadata__"][self.key])
        description, said = mutations.of_tree(description, random, same_type=repaired and random.random() < 0.8)
        if random.random() < 0.2 and len(data) > 4:
            changed, what = mutations.of_safetensors(content, random)
            if changed[: 8 + length] == content[: 8 + length]:
                data, said = changed[8 + length :], f"{said}, {what}"
        header["__metadata__"][self.key] = mutations.json_text(description)
        if repaired:
            header["__metadata__"][self.key] = self._repaired(mutations.safetensors(json.dumps(header), data), header)
        path.write_bytes(mutations.safetensors(json.dumps(header), data))
        return f"description: {said}{', checksum repaired' if repaired else ''}"

    def _repaired(self, content: bytes, header: dict[str, Any]) -> str:
        text = str(header["__metadata__"][self.key])
        try:
            parsed = self.description.model_validate_json(text)
            digest = content_digest(parsed, load_tensors(content))
            return json.dumps({**json.loads(text), "content_sha256": digest})
        except Exception:
            return text

    def read(self, folder: Path) -> None:
        (path,) = folder.iterdir()
        _segment(folder, SegmentationSettings((path,), _OLDER / "tiny.encoder", split=True))


class TuningKind(AdapterKind):
    """Tuning files."""

    name = "tuning"
    key = TUNING_KEY
    description = TuningDescription

    def write(self, folder: Path) -> None:
        (folder / "bitfit").mkdir(parents=True)
        shutil.copy(_OLDER / "bitfit.tuning", folder / "bitfit")

    def read(self, folder: Path) -> None:
        (path,) = folder.iterdir()
        read_tuning(path)


class Bundle(Kind):
    """Encoder bundles: each of their files; in half of the mutations the checksums are right again."""

    name = "encoder bundle"

    def write(self, folder: Path) -> None:
        shutil.copytree(_OLDER / "tiny.encoder", folder / "tiny" / "tiny.encoder")

    def mutate(self, folder: Path, random: Random) -> str:
        bundle = folder / "tiny.encoder"
        path = _one(random, sorted(bundle.iterdir()))
        if random.random() < 0.5:
            path = bundle / "manifest.json"
        repaired = random.random() < 0.5
        if path.suffix == ".json" and repaired:
            tree, said = mutations.of_tree(json.loads(path.read_bytes()), random, same_type=random.random() < 0.7)
            path.write_text(mutations.json_text(tree), encoding="utf-8", errors="surrogatepass")
        else:
            kinds = [mutations.of_bytes, mutations.of_json] if path.suffix == ".json" else [mutations.of_safetensors]
            said = _apply(path, _one(random, (*kinds, *kinds, mutations.of_bytes)), random)
        if random.random() < 0.03:
            path.unlink()
            said = "the file is missing"
        if not repaired:
            return f"{path.name}: {said}"
        return f"{path.name}: {said}{', checksums repaired' if _repair_bundle(bundle) else ''}"

    def read(self, folder: Path) -> None:
        _segment(folder, SegmentationSettings((), folder / "tiny.encoder", split=True))


def _segment(folder: Path, settings: SegmentationSettings) -> None:
    """Segment a small scan, and check that all results are in their folder."""
    before, output = set(folder.parent.rglob("*")), folder / "out"
    volume = Volume(dicom.some_hu((24, 20, 22)), np.diag([6.0, 6.0, 6.0, 1.0]))
    with open_segmenter(replace(settings, device="cpu", backend="torch")) as segmenter:
        segmenter.finish(segmenter.encode(segmenter.read(Scan("case", volume=volume))), output)
    outside = [path for path in set(folder.parent.rglob("*")) - before if output not in (path, *path.parents)]
    if outside:
        raise AssertionError(f"{len(outside)} results are outside their folder: {outside[0].name}")
    read_label_map(output / "case.nii.gz")


def _repair_bundle(bundle: Path) -> bool:
    try:
        entries = json.loads((bundle / "manifest.json").read_bytes())
        entries["files"] = {name: hashlib.sha256((bundle / name).read_bytes()).hexdigest() for name in entries["files"]}
        zeros = "0" * 64
        text = json.dumps({**entries, "manifest_sha256": zeros})
        digest = hashlib.sha256(text.encode()).hexdigest()
        before, _, after = text.rpartition(zeros)
        (bundle / "manifest.json").write_text(before + digest + after)
    except Exception:
        return False
    return True


class ModelKind(Kind):
    """Model files of `pretrain`."""

    name = "model file"

    def write(self, folder: Path) -> None:
        (folder / "small").mkdir(parents=True)
        write_model_file(folder / "small" / "small.safetensors", small_model())

    def mutate(self, folder: Path, random: Random) -> str:
        (path,) = folder.iterdir()
        if random.random() < 0.5:
            return _apply(path, _one(random, (mutations.of_bytes, mutations.of_safetensors)), random)
        content = path.read_bytes()
        length = int.from_bytes(content[:8], "little")
        header, data = json.loads(content[8 : 8 + length]), content[8 + length :]
        (key,) = header["__metadata__"]
        description, said = mutations.of_tree(json.loads(header["__metadata__"][key]), random)
        header["__metadata__"][key] = mutations.json_text(description)
        path.write_bytes(mutations.safetensors(json.dumps(header), data))
        return f"description: {said}"

    def read(self, folder: Path) -> None:
        (path,) = folder.iterdir()
        read_model_file(path)


# Results and tables


class MaskDescription(Kind):
    """JSON files of masks."""

    name = "mask description"

    def write(self, folder: Path) -> None:
        for path in sorted((_OLDER / "outbox").glob("case-*/case-*.json")):
            (folder / path.stem).mkdir(parents=True)
            shutil.copy(path.with_suffix(".nii.gz"), folder / path.stem / "mask.nii.gz")
            fields = json.loads(path.read_bytes())
            fields["mask_sha256"] = hashlib.sha256(path.with_suffix(".nii.gz").read_bytes()).hexdigest()
            (folder / path.stem / "mask.json").write_text(json.dumps(fields))

    def mutate(self, folder: Path, random: Random) -> str:
        kinds = (mutations.of_json, mutations.of_json, mutations.of_json, mutations.of_bytes)
        return _apply(folder / "mask.json", _one(random, kinds), random)

    def read(self, folder: Path) -> None:
        labels = organ_labels(folder / "mask.json", folder / "mask.nii.gz")
        if not all(isinstance(name, str) and isinstance(label, int) for name, label in labels.items()):
            raise TypeError(labels)


class Record(Kind):
    """Records of cases in the outbox of a batch; a record that cannot be read counts as none."""

    name = "batch record"
    _key = "case-509fd0635d47"

    def write(self, folder: Path) -> None:
        shutil.copytree(_OLDER / "outbox" / self._key, folder / self._key)

    def mutate(self, folder: Path, random: Random) -> str:
        path = _one(random, (folder / RECORD_FILE, folder / RECORD_FILE, folder / f"{self._key}.json"))
        kinds = (mutations.of_json, mutations.of_json, mutations.of_json, mutations.of_bytes)
        return f"{path.name}: {_apply(path, _one(random, kinds), random)}"

    def read(self, folder: Path) -> None:
        fields = json.loads((_OLDER / "outbox" / self._key / RECORD_FILE).read_bytes())
        found = read_record(folder, fields["recipe"])
        if found is not None:
            asdict(found)


class State(Kind):
    """State files of batches: damaged bytes, and valid databases with other content."""

    name = "batch state"

    def write(self, folder: Path) -> None:
        (folder / "older").mkdir(parents=True)
        shutil.copy(_OLDER / "outbox" / "state" / "state.sqlite", folder / "older")
        (folder / "new").mkdir()
        organ = SegmentedOrgan("liver", 1, 1500.0, ("small",), (1.0, 2.0), 0.9, 50)
        with BatchStore(folder / "new" / "state.sqlite", create=True) as store:
            for key in ("case-1", "case-2"):
                store.add(Path(f"/inbox/{key}.nii.gz"), "signature", key)
                store.start(key)
                store.end(key, Outcome(CaseState.DONE, (organ,), StageSeconds(1.0, 2.0, 3.0), warnings=("A.",)))

    def mutate(self, folder: Path, random: Random) -> str:
        path = folder / "state.sqlite"
        if random.random() < 0.4:
            return _apply(path, mutations.of_bytes, random)
        content, said = mutations.of_database(path.read_bytes(), random, folder / "scratch")
        (folder / "scratch").unlink()
        path.write_bytes(content)
        return said

    def read(self, folder: Path) -> None:
        with closing(BatchStore(folder / "state.sqlite")) as store:
            for case in store.cases():
                store.case(case.key)
                store.sources_of(case.key)
            store.duplicates()
            store.metadata("recipe")


class Table(Kind):
    """Tables that users write: volumes of organs, groups of cases, configurations."""

    name = "table"
    _readers: Final[dict[str, Callable[[Path], object]]] = {
        "volumes.csv": read_size_priors,
        "groups.csv": read_groups,
        "pretraining.toml": read_pretraining_config,
    }

    def write(self, folder: Path) -> None:
        for name, text in (
            ("volumes.csv", "organ,volume_ml\nliver,1500\nliver,1400.5\nspleen,200\n"),
            ("groups.csv", "case,group\nct_1,patient_a\nct_2,patient_a\nct_3,patient_b\n"),
            ("pretraining.toml", CONFIG),
        ):
            (folder / name).mkdir(parents=True)
            (folder / name / name).write_text(text)

    def mutate(self, folder: Path, random: Random) -> str:
        (path,) = folder.iterdir()
        kinds = (mutations.of_text, mutations.of_text, mutations.of_text, mutations.of_bytes)
        return _apply(path, _one(random, kinds), random)

    def read(self, folder: Path) -> None:
        (path,) = folder.iterdir()
        self._readers[path.name](path)


KINDS: Final[tuple[Kind, ...]] = (
    *(Nifti(), Labels(), DicomKind(), AdapterKind(), TuningKind(), Bundle(), ModelKind()),
    *(MaskDescription(), Record(), State(), Table()),
)


@dataclass
class Mutator:
    """The files of all kinds before mutation, in a folder, and the check of each mutation.

    Attributes:
        folder: folder for the files; everything below it belongs to the mutator.
        seed: another seed gives other mutations.
        around_reading: context in which the toolkit, and no other reader, reads a file; for measurements.
    """

    folder: Path
    seed: int = 0
    around_reading: Callable[[], AbstractContextManager[object]] = nullcontext
    _written: set[str] = field(default_factory=set)

    def check(self, kind: Kind, number: int, *, look_for_needless: bool = False) -> Verdict:
        """Mutate a file of a kind, read it, and compare it with independent readers.

        Args:
            kind: the kind of file.
            number: number of the mutation.
            look_for_needless: also read refused files with independent readers.
        """
        original, mutated, said = self.mutate(kind, number)
        verdict = self._judged(kind, mutated, original, look_for_needless=look_for_needless)
        return replace(verdict, mutation=said, start=original.name)

    def mutate(self, kind: Kind, number: int) -> tuple[Path, Path, str]:
        """Return the folder of a file before and after a mutation, and what was changed."""
        starts = self.folder / "before" / kind.name
        if kind.name not in self._written:
            kind.write(starts)
            self._written.add(kind.name)
        random = kind.at(number, self.seed)
        original = _one(random, sorted(starts.iterdir()))
        mutated = self.folder / "after" / original.name
        shutil.rmtree(mutated.parent, ignore_errors=True)
        shutil.copytree(original, mutated)
        return original, mutated, kind.mutate(mutated, random)

    def _judged(self, kind: Kind, mutated: Path, original: Path, *, look_for_needless: bool) -> Verdict:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            warnings.filterwarnings("ignore", module=r"pydicom\b")  # as in the package
            try:
                with self.around_reading():
                    found = kind.read(mutated)
            except FseftEdgeError as error:
                refusal = Verdict("refused", str(error).replace(str(mutated), "").replace(str(mutated.parent), ""))
                if not error.message.strip() or not error.remedy.strip():
                    return Verdict("traceback", f"no remedy: {error}")
                if dicom.PATIENT.split("^", maxsplit=1)[0] in str(error):
                    return Verdict("private", str(error))
            except Exception as error:
                where = traceback.extract_tb(error.__traceback__)
                own = [frame for frame in where if str(ROOT) in frame.filename and "/tests/" not in frame.filename]
                place = own[-1] if own else where[-1]
                return Verdict(
                    "traceback", f"{type(error).__name__}: {str(error)[:200]} at {place.name}:{place.lineno}"
                )
            else:
                refusal = None
        if caught:
            return Verdict("warning", str(caught[0].message)[:200])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            SimpleITK.ProcessObject.SetGlobalWarningDisplay(False)
            if refusal is None:
                return kind.compare(mutated, found)
            if look_for_needless and kind.needless(mutated, original):
                return replace(refusal, result="needless")
        return refusal


def _apply(path: Path, mutation: mutations.Mutation, random: Random, *, packed: bool = False) -> str:
    content = path.read_bytes()
    changed, said = mutation(gzip.decompress(content) if packed else content, random)
    path.write_bytes(gzip.compress(changed, mtime=0) if packed else changed)
    return said


def _one(random: Random, values: Sequence[Any]) -> Any:
    return values[int(random.integers(len(values)))]


def _rotation(a: float, b: float, c: float) -> NDArray[np.float64]:
    """Return a rotation by three angles in degrees."""
    (ca, sa), (cb, sb), (cc, sc) = ((np.cos(x), np.sin(x)) for x in np.radians((a, b, c)))
    about_z = np.array([[ca, -sa, 0], [sa, ca, 0], [0, 0, 1]])
    about_y = np.array([[cb, 0, sb], [0, 1, 0], [-sb, 0, cb]])
    return about_z @ about_y @ np.array([[1, 0, 0], [0, cc, -sc], [0, sc, cc]])


def _affine(directions: NDArray[np.float64], spacing: tuple[float, float, float]) -> NDArray[np.float64]:
    affine = np.eye(4)
    affine[:3, :3], affine[:3, 3] = directions * spacing, (20.0, -30.0, 100.0)
    return affine
