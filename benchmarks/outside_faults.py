"""Faults that others reported of their tools, as inputs of this one: a table of what happens before and after a change.

`python benchmarks/outside_faults.py --program OLD/fseft-edge --output before.json` runs an earlier version, and
`python benchmarks/outside_faults.py --before before.json` the current one and writes the table as CSV. The inputs are
written by this script. ``--inputs FOLDER`` adds cases whose inputs lie in numbered folders below FOLDER (``FOLDER/13``
and so on); ``--rows FILE`` adds rows of a CSV that were measured elsewhere. Independent readers (SimpleITK, nibabel,
dcm2niix, dcmqi) say in the last column what they find in the same input or in the result.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import json
import logging
import os
import re
import shutil
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import nibabel as nib
import numpy as np
import pydicom
import SimpleITK
from numpy.typing import NDArray
from pydicom.dataelem import RawDataElement
from pydicom.dataset import Dataset
from pydicom.tag import Tag

logging.getLogger("nibabel").setLevel(logging.CRITICAL)
SimpleITK.ProcessObject.SetGlobalWarningDisplay(False)
ROOT: Final = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests" / "shared"))

from doubles.dicom import Series  # noqa: E402 - it lies outside the package

OLDER: Final = ROOT / "tests" / "shared" / "older_files"
MODELS: Final = ("--encoder", str(OLDER / "tiny.encoder"), "--adapter", str(OLDER / "linear.adapter"))
AFFINE: Final = np.array([[-5.0, 0, 0, 120], [0, -5, 0, 100], [0, 0, 5, -400], [0, 0, 0, 1]])
SECONDS: Final = 240
_SUPPORT: Final = re.compile(r"^(\w+): 1 scans?, ([\d.]+)", re.MULTILINE)
KINDS: Final = (
    "two geometries in a NIfTI file",
    "invented geometry",
    "part of a series",
    "mask and JSON of different runs",
    "support scans and patients",
    "evaluation",
    "odd DICOM headers",
    "one failing case of several",
    "memory and cores",
    "settings shared by threads and runs",
    "series in two parts",
    "review",
    "refused DICOM",
    "refused NIfTI",
    "full temporary folder",
    "options of segment",
    "calls in Python",
    "commands and defaults",
)
"""The kinds of fault, in the order of the table."""
COLUMNS: Final = ("kind", "case", "before", "after", "second_reader")

Affine = NDArray[np.float64]
Change = Callable[[Dataset, int], None]


@dataclass(frozen=True)
class Case:
    """A case of the table.

    Attributes:
        kind: number of the kind of fault, from 1, in ``KINDS``.
        name: what is unusual, in words.
        write: writes the input into an empty folder.
        command: arguments of the program, run in that folder; results go to ``out``. If the first one is ``python``,
            the others are arguments of the Python of the same environment.
        second: what independent readers find, given that folder.
        given: number of the folder below ``--inputs`` that is copied in place of ``write``.
        small_disk: TMPDIR is on a disk of 16 KiB, which needs a Linux that lets users mount one.
    """

    kind: int
    name: str
    write: Callable[[Path], None]
    command: tuple[str, ...]
    second: Callable[[Path], str]
    given: str = ""
    small_disk: bool = False


def main() -> None:
    """Run the program on all cases, and write a JSON file of what happened, or the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--program", type=Path, default=Path(sys.executable).with_name("fseft-edge"))
    parser.add_argument("--inputs", type=Path, help="folder with numbered folders of other inputs")
    parser.add_argument("--kind", type=int, action="append", help="only cases of these kinds")
    parser.add_argument("--rows", type=Path, help="CSV of rows to add to the table")
    parser.add_argument("--before", type=Path, help="JSON file that --output wrote for the earlier version")
    parser.add_argument("--output", type=Path, help="JSON file of what happened")
    parser.add_argument("--table", type=Path, default=ROOT / "benchmarks" / "results" / "outside_faults.csv")
    arguments = parser.parse_args()
    found: dict[str, dict[str, str]] = {}
    for case in CASES:
        if (case.given and arguments.inputs is None) or (arguments.kind and case.kind not in arguments.kind):
            continue
        found[f"{case.kind}: {case.name}"] = _run(case, arguments.program, arguments.inputs)
        print(f"{case.kind:2d} {case.name}: {found[f'{case.kind}: {case.name}']}", flush=True)
    if arguments.output is not None:
        arguments.output.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    if arguments.before is not None:
        before = json.loads(arguments.before.read_text(encoding="utf-8"))
        rows = [
            {"kind": KINDS[int(key.split(":")[0]) - 1], "case": key.partition(": ")[2], "before": before[key]["found"]}
            | {"after": now["found"], "second_reader": now["second"]}
            for key, now in found.items()
        ]
        if arguments.rows is not None:
            with arguments.rows.open(newline="", encoding="utf-8") as file:
                rows += list(csv.DictReader(file))
        rows.sort(key=lambda row: KINDS.index(row["kind"]))
        with arguments.table.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)


def _run(case: Case, program: Path, inputs: Path | None) -> dict[str, str]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if case.given and inputs is not None:
            shutil.copytree(inputs / case.given, folder, dirs_exist_ok=True)
        else:
            case.write(folder)
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200", "XDG_CACHE_HOME": str(folder / "cache")}
        command = [str(program.absolute()), *case.command]
        if case.command[0] == "python":
            command = [str(program.absolute().with_name("python")), *case.command[1:]]
        if case.small_disk:
            (folder / "tmp").mkdir()
            script = 'mount -t tmpfs -o size=16k tmpfs tmp && TMPDIR="$PWD/tmp" exec "$@"'
            command = ["unshare", "-rm", "sh", "-c", script, "sh", *command]
        try:
            done = subprocess.run(  # noqa: S603 - the program that the user named
                command,
                cwd=folder,
                capture_output=True,
                text=True,
                errors="replace",
                timeout=SECONDS,
                env=environment,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return {"found": f"not finished after {SECONDS} s", "second": case.second(folder)}
        return {"found": _happened(done, folder), "second": case.second(folder)}


def _happened(done: subprocess.CompletedProcess[str], folder: Path) -> str:
    """Return the exit code, the message, and the masks with their geometry and volumes, in words."""
    text = done.stderr.replace(f"{folder}/", "").replace(str(OLDER) + "/", "")
    parts = [f"exit {done.returncode}"]
    if "Traceback (most recent call last)" in text:
        last = [line for line in text.splitlines() if re.match(r"[A-Za-z_.]+(Error|Exception|Warning)\b", line)]
        parts.append(f"traceback: {last[-1].split(':')[0] if last else 'unknown'}")
    else:
        case = r"^(?: *ERROR: \w+ failed|(?!Error|WARNING|Usage|Try|segment|evaluate|adapt)\w+): (?!done|stopped)(.*)"
        for pattern in (r"^Error: (.*)", case) if done.returncode else ():
            parts += [_first_sentence(message) for message in re.findall(pattern, text, re.MULTILINE)[:1]]
    if warnings := re.findall(r"^(?:Warning|WARNING)[^:]*: (.*)", text, re.MULTILINE):
        parts.append(f"warning: {_first_sentence(warnings[0])}")
    if (folder / "scores.csv").is_file():
        with (folder / "scores.csv").open(newline="", encoding="utf-8") as file:
            parts += [f"{row['organ']}: {row['status']}, DSC {row['dsc'] or '-'}" for row in csv.DictReader(file)]
    parts += [f"{organ} of the annotation: {volume} ml" for organ, volume in re.findall(_SUPPORT, done.stdout)]
    masks = sorted(path for path in (folder / "out").glob("*.nii.gz"))
    parts += [_mask(path) + _beside(path, folder) for path in masks[:2]]
    if len(masks) > 2:
        parts.append(f"{len(masks)} masks")
    if (folder / "out").is_dir():
        other = sorted({_kind_of(path) for path in (folder / "out").rglob("*") if path.is_file()} - {"mask", "JSON"})
        parts += [f"with {', '.join(other)}"] if other else []
    return "; ".join(parts)


def _first_sentence(text: str) -> str:
    sentence = re.split(r"(?<=[a-z0-9\])])\. ", " ".join(text.split()))[0]
    sentence = re.sub(r"(.)\1{15,}", r"\1\1\1...", sentence)
    return sentence[:220].rstrip(".")


def _kind_of(path: Path) -> str:
    if path.name.endswith(".seg.dcm"):
        return "DICOM SEG"
    if path.suffix == ".dcm":
        return "DICOM object"
    if path.name.endswith(".probability.nii.gz"):
        return "probabilities"
    if path.name.endswith(".nii.gz"):
        return "mask"
    return "JSON" if path.suffix == ".json" else path.suffix.lstrip(".") or "other files"


def _mask(path: Path) -> str:
    try:
        image = nib.load(path)
    except Exception as error:
        return f"mask not readable ({type(error).__name__})"
    metres = image.header.get_xyzt_units()[0] == "meter"
    affine = image.affine * (1000 if metres else 1)
    millilitres = abs(np.linalg.det(affine[:3, :3])) * float((np.asarray(image.dataobj) > 0).sum()) / 1000
    unit = " (in metres, like its scan)" if metres else ""
    return f"mask {_voxels(affine, image.shape)}{unit}, organ {millilitres:.1f} ml"


def _beside(mask: Path, folder: Path) -> str:
    """Return how far a mask lies from its scan in SimpleITK; empty if on its scan, or if the scan is no NIfTI file."""
    scan = folder / mask.name
    if not scan.is_file():
        return ""
    try:
        places = [_corners(SimpleITK.ReadImage(str(path))) for path in (scan, mask)]
    except RuntimeError:
        return ""
    off = float(np.linalg.norm(places[0] - places[1], axis=1).max())
    return f", in SimpleITK up to {off:.3g} mm from its scan" if off > 0.01 else ""


def _voxels(affine: Affine, shape: Sequence[int]) -> str:
    sizes = " x ".join(f"{size:.4g}" for size in np.linalg.norm(affine[:3, :3], axis=0))
    return f"{'x'.join(map(str, shape))} voxels of {sizes} mm"


# Independent readers


def _nifti(name: str) -> Callable[[Path], str]:
    """Return what SimpleITK and nibabel find in a NIfTI file."""

    def second(folder: Path) -> str:
        path, said = folder / name, []
        try:
            image = SimpleITK.ReadImage(str(path))
            sizes = " x ".join(f"{size:.4g}" for size in image.GetSpacing())
            said.append(f"SimpleITK: voxels of {sizes} mm, the last one at {_place(_corners(image)[-1])}")
        except RuntimeError as error:
            said.append(f"SimpleITK refuses ({str(error).splitlines()[-1].split(': ')[-1][:80].strip()})")
        try:
            loaded = nib.load(path)
            last = (loaded.affine @ [*(length - 1 for length in loaded.shape[:3]), 1])[:3]
            said.append(f"nibabel: {_voxels(loaded.affine, loaded.shape)}, the last one at {_place(last)}")
            if "labels" in name:
                volume = (
                    float((np.asarray(loaded.dataobj) > 0).sum()) * abs(np.linalg.det(loaded.affine[:3, :3])) / 1000
                )
                said.append(f"{volume:.1f} ml")
            if loaded.header["qform_code"] > 0:
                other = (loaded.header.get_qform() @ [*(length - 1 for length in loaded.shape[:3]), 1])[:3]
                said += [f"by the qform at {_place(other)}"] if np.abs(other - last).max() > 0.01 else []
        except Exception as error:
            said.append(f"nibabel refuses ({type(error).__name__})")
        return "; ".join(said)

    return second


def _corners(image: SimpleITK.Image) -> Affine:
    """Return the places of the eight corner voxels in RAS+ mm."""
    last = np.array(image.GetSize()) - 1
    corners = [[int(index) for index in corner * last] for corner in np.array(list(np.ndindex(2, 2, 2)))]
    return np.array([image.TransformIndexToPhysicalPoint(corner) for corner in corners]) * (-1, -1, 1)


def _place(point: Affine) -> str:
    return f"({', '.join(f'{value:.5g}' for value in point + 0.0)})"


def _dicom(name: str) -> Callable[[Path], str]:
    """Return the volumes that SimpleITK and dcm2niix make of a folder of DICOM files."""

    def second(folder: Path) -> str:
        reader = SimpleITK.ImageSeriesReader()
        read = []
        for uid in reader.GetGDCMSeriesIDs(str(folder / name)) or ("",):
            reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(folder / name), uid))
            try:
                image = reader.Execute()
            except RuntimeError:
                continue
            shape = "x".join(map(str, image.GetSize()))
            read.append(f"{shape} voxels of {' x '.join(f'{size:.4g}' for size in image.GetSpacing())} mm")
        with tempfile.TemporaryDirectory() as output:
            program = Path(sys.executable).with_name("dcm2niix")
            subprocess.run(  # noqa: S603 - a program of the development environment
                [program, "-f", "v%d_%s", "-b", "n", "-o", output, folder / name], capture_output=True, check=False
            )
            images = [nib.load(path) for path in sorted(Path(output).glob("*.nii*"))]
            found = [f"{_voxels(image.affine, image.shape)}" for image in images]
        return f"SimpleITK: {' and '.join(read) or 'no volume'}; dcm2niix: {' and '.join(found) or 'no volume'}"

    return second


def _segmentation(folder: Path) -> str:
    """Return what pydicom and dcmqi find in a DICOM Segmentation."""
    paths = sorted((folder / "out").glob("*.dcm"))
    if not paths:
        return "no DICOM SEG"
    dataset = pydicom.dcmread(paths[0])
    with tempfile.TemporaryDirectory() as output:
        program = Path(sys.executable).with_name("segimage2itkimage")
        subprocess.run(  # noqa: S603 - a program of the development environment
            [program, "--inputDICOM", paths[0], "--outputDirectory", output, "-t", "nii"],
            capture_output=True,
            check=False,
        )
        read = sum(int((np.asarray(nib.load(path).dataobj) > 0).sum()) for path in Path(output).glob("*.nii*"))
    mask = next((folder / "out").glob("*.nii.gz"), None)
    own = int((np.asarray(nib.load(mask).dataobj) > 0).sum()) if mask else 0
    date = str(dataset.get("StudyDate", "absent"))
    return f"dcmqi reads {read} voxels of the SEG, the mask has {own}; StudyDate {date or 'empty'!r}"


def _overlap(folder: Path) -> str:
    """Return the DSC of each label value of a mask that SimpleITK computes."""
    images = [
        SimpleITK.Cast(SimpleITK.ReadImage(str(folder / part / "a.nii.gz")), SimpleITK.sitkUInt8) for part in _PARTS
    ]
    measures = SimpleITK.LabelOverlapMeasuresImageFilter()
    found = []
    for label in (1, 2):
        masks = [image == label for image in images]
        measures.Execute(*masks)
        voxels = [int(SimpleITK.GetArrayViewFromImage(mask).sum()) for mask in masks]
        score = f"{measures.GetDiceCoefficient(1):.1f}" if voxels[1] else "undefined"
        found.append(f"label {label}: {voxels[0]} and {voxels[1]} voxels, DSC {score}")
    return f"SimpleITK: {'; '.join(found)}"


def _results(folder: Path) -> str:
    """Return how many images of a result SimpleITK reads, and on how many lattices they lie; empty without images."""
    images = []
    for path in sorted((folder / "out").rglob("*.nii.gz")):
        try:
            images.append(SimpleITK.ReadImage(str(path)))
        except RuntimeError:
            return "SimpleITK does not read an image of the result"
    lattices = {(image.GetSize(), image.GetSpacing(), image.GetOrigin(), image.GetDirection()) for image in images}
    count = "1 image" if len(images) == 1 else f"{len(images)} images"
    return f"SimpleITK reads {count} on {len(lattices)} lattice{'s' * (len(lattices) != 1)}" if images else ""


# Inputs


def _hu() -> NDArray[np.int16]:
    """Return a trunk in air with a liver and a spine."""
    x, y, _ = np.meshgrid(*(np.linspace(-1, 1, size) for size in (48, 40, 16)), indexing="ij")
    hu = np.full(x.shape, -1000, np.int16)
    hu[x**2 / 0.75 + y**2 / 0.6 < 1] = 40
    hu[(x + 0.4) ** 2 / 0.09 + y**2 / 0.16 < 1] = 110
    hu[x**2 + (y - 0.5) ** 2 < 0.02] = 600
    return hu


def _write_nifti(
    path: Path,
    *,
    array: NDArray[Any] | None = None,
    sform: Affine | None = AFFINE,
    qform: Affine | None = AFFINE,
    sform_code: int = 1,
    patches: Sequence[tuple[int, str, float]] = (),
    behind: bytes = b"",
) -> None:
    """Write a NIfTI-1 file.

    Args:
        path: file to write, ``.nii``, ``.nii.gz`` or ``.hdr``.
        array: values; None is the trunk.
        sform: the first geometry; None leaves it unset.
        qform: the second geometry; None leaves it unset.
        sform_code: what the sform relates to.
        patches: offset, format and value of fields that are changed in the header.
        behind: bytes after the end of the file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    kind = nib.Nifti1Pair if path.suffix == ".hdr" else nib.Nifti1Image
    image = kind(_hu() if array is None else array, np.eye(4))
    image.set_qform(qform, int(qform is not None))
    image.set_sform(sform, sform_code if sform is not None else 0)
    image.header.set_xyzt_units("mm")
    nib.save(image, path)
    content = bytearray(gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes())
    for offset, form, value in patches:
        struct.pack_into(f"<{form}", content, offset, value)
    path.write_bytes((gzip.compress(bytes(content), mtime=0) if path.suffix == ".gz" else bytes(content)) + behind)


def _scan(**how: Any) -> Callable[[Path], None]:  # noqa: ANN401 - the arguments of _write_nifti
    return lambda folder: _write_nifti(folder / "scan.nii.gz", **how)


def _moved(x: float = 0.0, degrees: float = 0.0, scale: tuple[float, float, float] = (1, 1, 1)) -> Affine:
    """Return the geometry of the scan, moved in mm, turned about the z axis, and with other distances."""
    cosine, sine = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    turn = np.array([[cosine, -sine, 0, 0], [sine, cosine, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])
    moved: Affine = turn @ AFFINE @ np.diag([*scale, 1])
    moved[0, 3] += x
    return moved


def _mirrored() -> Affine:
    """Return the geometry of the scan with right and left exchanged."""
    mirrored: Affine = np.diag([-1.0, 1, 1, 1]) @ AFFINE
    return mirrored


def _series(change: Change | None = None, **more: Any) -> Callable[[Path], None]:  # noqa: ANN401 - fields of Series
    """Return a writer of a CT series into ``scan``; ``change`` spoils a slice."""

    def spoil(dataset: Dataset, place: int) -> None:
        dataset.StudyDate, dataset.StudyTime, dataset.PatientBirthDate, dataset.PatientSex = (
            "20200101",
            "101010",
            "",
            "",
        )
        dataset.ReferringPhysicianName, dataset.AccessionNumber, dataset.StudyID = "", "", "1"
        dataset.SliceThickness, dataset.PositionReferenceIndicator = 5, ""
        if change is not None:
            change(dataset, place)

    def write(folder: Path) -> None:
        Series(_hu(), spacing=(5.0, 5.0, 5.0), **more).write(folder / "scan", spoil)

    return write


def _raw(dataset: Dataset, tag: int, vr: str, value: bytes) -> None:
    """Put bytes into a header, unchecked."""
    dataset._dict[Tag(tag)] = RawDataElement(
        Tag(tag), vr, len(value), value, 0, is_implicit_VR=False, is_little_endian=True
    )


def _with_raw(tag: int, vr: str, value: bytes, *places: int) -> Callable[[Path], None]:
    return _series(lambda dataset, place: _raw(dataset, tag, vr, value) if not places or place in places else None)


def _without(keyword: str, *places: int) -> Callable[[Path], None]:
    def change(dataset: Dataset, place: int) -> None:
        if not places or place in places:
            delattr(dataset, keyword)

    return _series(change)


def _then(write: Callable[[Path], None], after: Callable[[Path], None]) -> Callable[[Path], None]:
    def both(folder: Path) -> None:
        write(folder)
        after(folder)

    return both


def _copies(folder: Path) -> None:
    for path in sorted((folder / "scan").iterdir()):
        shutil.copy(path, path.with_name(f"copy_{path.name}"))


def _no_preamble(folder: Path) -> None:
    for path in (folder / "scan").iterdir():
        path.write_bytes(path.read_bytes()[132:])


def _other_spacing(from_slice: int) -> Callable[[Path], None]:
    def change(dataset: Dataset, place: int) -> None:
        if place >= from_slice:
            dataset.PixelSpacing = [4, 4]

    return _series(change)


def _rounded_cosines(dataset: Dataset, place: int) -> None:
    dataset.ImageOrientationPatient = [1, 0.0002 * (place % 2), 0, -0.0002 * (place % 2), 1, 0]


def _smaller_matrix(dataset: Dataset, place: int) -> None:
    if place >= 10:
        dataset.Rows = 38
        dataset.PixelData = dataset.PixelData[: 38 * 48 * 2]


def _drifting(dataset: Dataset, place: int) -> None:
    position = list(dataset.ImagePositionPatient)
    dataset.ImagePositionPatient = [position[0], f"{float(position[1]) + 0.01 * place:.4f}", position[2]]


def _screenshot(folder: Path) -> None:
    path = sorted((folder / "scan").iterdir())[3]
    dataset = pydicom.dcmread(path)
    del dataset.ImagePositionPatient, dataset.ImageOrientationPatient, dataset.PixelSpacing
    dataset.SOPInstanceUID = dataset.file_meta.MediaStorageSOPInstanceUID = "1.2.3.4.999"
    dataset.ImageType = ["DERIVED", "SECONDARY"]
    dataset.save_as(folder / "scan" / "sheet.dcm")


def _annotated(write: Callable[[Path], None]) -> Callable[[Path], None]:
    """Return a writer of a scan in ``images`` and, by ``write``, of its annotation in ``labels``."""

    def both(folder: Path) -> None:
        _write_nifti(folder / "images" / "a.nii.gz")
        write(folder / "labels" / "a.nii.gz")

    return both


def _liver(scale: float = 1.0) -> NDArray[Any]:
    return (_hu() == 110).astype(np.uint8) if scale == 1 else (_hu() == 110).astype(np.float32) * np.float32(scale)


def _flipped(path: Path) -> None:
    flip = np.diag([-1.0, 1, 1, 1])
    flip[0, 3] = 47
    _write_nifti(path, array=_liver()[::-1], sform=AFFINE @ flip, qform=AFFINE @ flip)


def _transposed(path: Path) -> None:
    swap = AFFINE[:, [2, 0, 1, 3]]
    _write_nifti(path, array=np.ascontiguousarray(_liver().transpose(2, 0, 1)), sform=swap, qform=swap)


def _nearly_whole(path: Path) -> None:
    _write_nifti(path, array=_liver(1 + 1e-7) * np.float32(3), patches=[(112, "f", 1 / 3), (116, "f", 0.0)])


def _cases_with_a_damaged_one(folder: Path) -> None:
    for name in ("a", "b", "c"):
        _write_nifti(folder / "scans" / f"{name}.nii.gz")
    (folder / "scans" / "b.nii.gz").write_bytes((folder / "scans" / "b.nii.gz").read_bytes()[:400])


def _scored(*, other_json: bool = False, false_positive: bool = False) -> Callable[[Path], None]:
    """Return a writer of a mask with its JSON file, and of references."""

    def write(folder: Path) -> None:
        labels = _liver()
        labels[10:14, 10:14, 2:6] = 2
        _write_nifti(folder / "masks" / "a.nii.gz", array=labels)
        names = ["spleen", "liver"] if other_json else ["liver", "spleen"]
        fields: dict[str, Any] = {
            "schema_version": 1,
            "case": "a",
            "organs": [{"name": name, "label": label} for label, name in enumerate(names, start=1)],
        }
        if other_json:  # of a mask that was replaced: current versions write its checksum
            fields["mask_sha256"] = "0" * 64
        (folder / "masks" / "a.json").write_text(json.dumps(fields))
        reference = np.where(labels == 1, 0, labels) if false_positive else labels
        _write_nifti(folder / "references" / "a.nii.gz", array=reference)

    return write


SEGMENT: Final = ("segment", "scan.nii.gz", *MODELS, "--output", "out", "--device", "cpu", "--backend", "torch")


def _python(*lines: str) -> tuple[str, ...]:
    names = f"encoder, adapter = {MODELS[1]!r}, {MODELS[3]!r}"
    start = ("import pathlib", "import nibabel as nib", "import fseft_edge", names, "pathlib.Path('out').mkdir()")
    return ("python", "-c", "\n".join((*start, *lines)))


def _with_method(method: str) -> tuple[str, ...]:
    return tuple(method if part == "linear" else part for part in ADAPT)


SERIES: Final = ("segment", "scan", *SEGMENT[2:])
ADAPT: Final = (
    *("adapt", "--images", "images", "--labels", "labels", "--organ", "liver=1", "--method", "linear"),
    *("--no-validate", "--variations", "0", *MODELS[:2], "--output", "a.adapter", "--device", "cpu"),
    *("--backend", "torch"),
)
_PARTS: Final = ("masks", "references")
EVALUATE: Final = (
    *("evaluate", "--predictions", "masks", "--references", "references", "--organ", "liver=1,spleen=2"),
    *("--csv", "scores.csv"),
)
_ITK: Final = _nifti("scan.nii.gz")
_DICOM: Final = _dicom("scan")


def _on(path: str, command: tuple[str, ...] = SEGMENT) -> tuple[str, ...]:
    return (command[0], path, *command[2:])


def _given(
    kind: int, name: str, folder: str, command: tuple[str, ...], second: Callable[[Path], str] = _results
) -> Case:
    return Case(kind, name, lambda _: None, command, second, folder)


CASES: Final = (
    _given(
        1,
        "sform z-step 6.65 mm, qform and pixdim 5 mm",
        "13",
        _on("slice_distance.nii.gz"),
        _nifti("slice_distance.nii.gz"),
    ),
    Case(1, "sform steps of 1 mm, pixdim and qform 5 mm", _scan(sform=_moved(scale=(0.2, 0.2, 0.2))), SEGMENT, _ITK),
    Case(1, "sform 30 mm beside the qform", _scan(sform=_moved(x=30)), SEGMENT, _ITK),
    Case(1, "sform mirrored left to right", _scan(sform=_mirrored(), sform_code=2), SEGMENT, _ITK),
    Case(1, "qform turned by 3 degrees", _scan(qform=_moved(degrees=3)), SEGMENT, _ITK),
    Case(1, "sform and qform differ by rounding (1e-5 mm)", _scan(sform=_moved(x=1e-5)), SEGMENT, _ITK),
    _given(2, "pixdim[3] = 0, no sform", "15", _on("qform_only.nii.gz"), _nifti("qform_only.nii.gz")),
    Case(2, "pixdim[1] = NaN, no sform", _scan(sform=None, patches=[(80, "f", np.nan)]), SEGMENT, _ITK),
    Case(2, "pixdim[2] = -5, no sform", _scan(sform=None, patches=[(84, "f", -5.0)]), SEGMENT, _ITK),
    Case(2, "pixdim[0] = 0 (qfac), no sform", _scan(sform=None, patches=[(76, "f", 0.0)]), SEGMENT, _ITK),
    _given(
        3,
        "PixelSpacing changes at slice 10 of 16",
        "06",
        _on("second_part_other_view", SERIES),
        _dicom("second_part_other_view"),
    ),
    Case(3, "cosines differ by 2e-4 in every other slice", _series(_rounded_cosines), SERIES, _DICOM),
    Case(3, "PixelSpacing changes in the last slice", _other_spacing(15), SERIES, _DICOM),
    Case(3, "the last 6 slices have two rows less", _series(_smaller_matrix), SERIES, _DICOM),
    Case(4, "JSON file of another run beside a mask, names exchanged", _scored(other_json=True), EVALUATE, _overlap),
    Case(4, "JSON file of an earlier version without a checksum", _scored(), EVALUATE, _overlap),
    Case(6, "mask finds an organ that the reference does not show", _scored(false_positive=True), EVALUATE, _overlap),
    Case(
        6,
        "the same, with the statement that every reference shows its organs",
        _scored(false_positive=True),
        (*EVALUATE, "--always-annotated", "all"),
        _overlap,
    ),
    _given(
        7,
        "StudyDate 2020-01-01, --dicom seg",
        "11",
        (*_on("study_date_dashes", SERIES), "--dicom", "seg"),
        _segmentation,
    ),
    Case(
        7,
        "SliceThickness 5mm, --dicom seg",
        _with_raw(0x00180050, "DS", b"5mm "),
        (*SERIES, "--dicom", "seg"),
        _segmentation,
    ),
    Case(
        7,
        "StudyTime 25:61, --dicom seg",
        _with_raw(0x00080030, "TM", b"25:61 "),
        (*SERIES, "--dicom", "seg"),
        _segmentation,
    ),
    Case(
        7,
        "LossyImageCompressionRatio unknown, --dicom seg",
        _with_raw(0x00282112, "DS", b"unknown "),
        (*SERIES, "--dicom", "seg"),
        _segmentation,
    ),
    _given(8, "file names of 249 and 255 bytes, four scans", "22", _on(".")),
    Case(8, "one of three scans is truncated", _cases_with_a_damaged_one, _on("scans"), _results),
    _given(13, "PixelSpacing 5,0\\5,0", "01", _on("comma_spacing", SERIES), _dicom("comma_spacing")),
    Case(13, "RescaleIntercept -1024,0", _with_raw(0x00281052, "DS", b"-1024,0 "), SERIES, _DICOM),
    Case(13, "files without preamble", _then(_series(), _no_preamble), SERIES, _DICOM),
    Case(13, "every file twice, byte for byte", _then(_series(), _copies), SERIES, _DICOM),
    Case(13, "one sheet without geometry among the slices", _then(_series(), _screenshot), SERIES, _DICOM),
    Case(13, "RescaleType Hounsfield Unit", _with_raw(0x00281054, "LO", b"Hounsfield Unit "), SERIES, _DICOM),
    Case(13, "no SeriesInstanceUID", _without("SeriesInstanceUID"), SERIES, _DICOM),
    Case(13, "no SOPClassUID", _without("SOPClassUID"), SERIES, _DICOM),
    Case(
        13,
        "PixelPaddingValue of two values",
        _with_raw(0x00280120, "SS", struct.pack("<hh", -2000, -2000)),
        SERIES,
        _DICOM,
    ),
    Case(13, "table drift of 0.01 mm a slice", _series(_drifting), SERIES, _DICOM),
    Case(13, "no Modality in one slice", _without("Modality", 15), SERIES, _DICOM),
    _given(
        14,
        "annotation drawn with ITK, 0.006 mm off",
        "20",
        tuple(f"itk/{part}" if part in ("images", "labels") else part for part in ADAPT),
        lambda folder: f"annotation, {_nifti('itk/labels/a.nii.gz')(folder)}",
    ),
    Case(14, "sform of zeros with code 1, good qform", _scan(sform=np.zeros((4, 4))), SEGMENT, _ITK),
    Case(
        14,
        "quaternion 4e-7 too long",
        _scan(sform=None, patches=[(256, "f", 0.0), (260, "f", 0.0), (264, "f", 1 + 4e-7)]),
        SEGMENT,
        _ITK,
    ),
    Case(
        14,
        "units of metres",
        _scan(
            sform=AFFINE * np.array([[1e-3], [1e-3], [1e-3], [1]]),
            qform=AFFINE * np.array([[1e-3], [1e-3], [1e-3], [1]]),
            patches=[(123, "B", 1)],
        ),
        SEGMENT,
        _ITK,
    ),
    Case(14, "512 bytes of zeros behind the gzip stream", _scan(behind=bytes(512)), SEGMENT, _ITK),
    Case(14, "bytes that are no gzip behind the gzip stream", _scan(behind=b"end of file"), SEGMENT, _ITK),
    Case(
        14,
        "pair of .hdr and .img",
        lambda folder: _write_nifti(folder / "scan.hdr"),
        _on("scan.hdr"),
        _nifti("scan.hdr"),
    ),
    Case(14, "annotation scaled and off by 1e-7", _annotated(_nearly_whole), ADAPT, _nifti("labels/a.nii.gz")),
    Case(14, "annotation flipped", _annotated(_flipped), ADAPT, _nifti("labels/a.nii.gz")),
    Case(14, "annotation in another axis order", _annotated(_transposed), ADAPT, _nifti("labels/a.nii.gz")),
    Case(
        14,
        "annotation 3 mm off",
        _annotated(lambda path: _write_nifti(path, array=_liver(), sform=_moved(x=3), qform=_moved(x=3))),
        ADAPT,
        _nifti("labels/a.nii.gz"),
    ),
    Case(15, "TMPDIR on a full disk, NIfTI", _scan(), SEGMENT, _results, small_disk=True),
    Case(15, "TMPDIR on a full disk, DICOM", _series(), SERIES, _results, small_disk=True),
    Case(
        16,
        "segment without an adapter",
        _scan(),
        ("segment", "scan.nii.gz", *MODELS[:2], *SEGMENT[6:]),
        _results,
    ),
    Case(
        16,
        "segment without an adapter, one organ of the encoder",
        _scan(),
        ("segment", "scan.nii.gz", *MODELS[:2], "--organ", "liver", *SEGMENT[6:]),
        _results,
    ),
    Case(16, "--split", _scan(), (*SEGMENT, "--split"), _results),
    Case(16, "--save-probabilities", _scan(), (*SEGMENT, "--save-probabilities"), _results),
    Case(
        17,
        "segment with an image of nibabel in memory",
        _scan(),
        _python('nib.save(fseft_edge.segment(nib.load("scan.nii.gz"), adapter, encoder=encoder), "out/scan.nii.gz")'),
        _results,
    ),
    Case(
        17,
        "predict_proba with a path as text",
        _scan(),
        _python(
            'found = fseft_edge.load(adapter, encoder).predict_proba("scan.nii.gz")[0] > 0.5',
            'scan = nib.load("scan.nii.gz")',
            'nib.save(nib.Nifti1Image(found.astype("uint8"), scan.affine), "out/scan.nii.gz")',
        ),
        _results,
    ),
    Case(17, "encode with a path as text", _scan(), _python('fseft_edge.encode("scan.nii.gz", encoder)'), _results),
    Case(18, "adapt --method lora", _annotated(_flipped), _with_method("lora"), _results),
    Case(18, "finetune is a command", _scan(), ("finetune", "--help"), _results),
    Case(16, "--skip-existing", _scan(), (*SEGMENT, "--skip-existing"), _results),
)
"""All cases, by the number of their kind."""


if __name__ == "__main__":
    main()
