"""How faithfully contours and segments are read: shapes with known volumes, our own files, and files of others.

`python benchmarks/contours.py` writes `benchmarks/results/contours.csv`. Three kinds of row:

- ``shape``: structure sets of analytic shapes. ``truth_ml`` is the volume of the shape; the columns after it are errors
  in per cent: of our sum of shares, of our mask, and of the masks of other converters. A text says why there is none.
- ``round trip``: real masks (``FSEFT_EDGE_DATA``) written by `fseft_edge.dicom_output` and read again: DSC with the
  mask, by us, by plastimatch (RTSTRUCT) and by dcmqi (SEG).
- ``files of others``: ``--others FOLDER`` with the structure sets, segmentations and CTs that nobody here wrote: ours
  beside the answers that come with them. See ``benchmarks/results/contours.md`` for what to put there.

``--peers FOLDER`` names the folder of virtual environments ``rt-utils``, ``dcmrtstruct2nii`` and ``platipy``, each with
the package of that name; plastimatch is taken from ``PATH``. What is missing is left out.
"""

from __future__ import annotations

import argparse
import csv
import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import nibabel as nib
import numpy as np
import SimpleITK as sitk  # noqa: N813 - its customary name
from numpy.typing import NDArray
from pydicom.dataset import Dataset

ROOT: Final = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests" / "shared"))

from doubles.dicom import Series, save  # noqa: E402 - it lies outside the package
from doubles.structure_sets import Roi, circle, keyhole, structure_set  # noqa: E402 - it lies outside the package

from fseft_edge.dicom_output import (  # noqa: E402 - after the path
    SegmentationAlgorithm,
    write_dicom_segmentation,
    write_structure_set,
)
from fseft_edge.masks.result import SegmentedOrgan  # noqa: E402 - after the path
from fseft_edge.runtime.errors import FseftEdgeError  # noqa: E402 - after the path
from fseft_edge.runtime.scans.dicom import find_series  # noqa: E402 - after the path
from fseft_edge.runtime.scans.dicom.annotation_objects import AnnotationObject  # noqa: E402 - after the path
from fseft_edge.runtime.scans.dicom.annotations import find_annotations  # noqa: E402 - after the path
from fseft_edge.runtime.scans.structures import Lattice, Structure  # noqa: E402 - after the path
from fseft_edge.runtime.scans.volume import LabelMap  # noqa: E402 - after the path

COLUMNS: Final = (
    *("kind", "case", "truth_ml", "share", "mask"),
    *("plastimatch", "rt_utils", "dcmrtstruct2nii", "platipy", "dcmqi", "warnings"),
)
PEERS: Final = ("rt-utils", "dcmrtstruct2nii", "platipy")
ORGANS: Final = {1: "brainstem", 2: "spinal_cord", 3: "parotid_right", 4: "parotid_left", 7: "mandible"}
CASES: Final = 3
OBLIQUE: Final = (*(0.8, 0.6, 0.0), *(-0.6 * 0.8, 0.8 * 0.8, -0.6))
"""Direction cosines of a row and a column: turned about two axes."""

Points = NDArray[np.float64]
Section = Callable[[float], list[Points]]
"""Contours at a height in mm, in the plane."""


@dataclass(frozen=True)
class Shape:
    """An analytic shape.

    Attributes:
        name: name in the table.
        contours: contours at a height, in mm, ``[n, 3]`` with the height as last coordinate.
        volume: volume in mm^3.
        low: lowest slice with contours.
        high: highest slice with contours.
        every: distance between contoured slices.
        spacing: distance in mm between columns, rows and slices.
        orientation: direction cosines of a row, then of a column.
        form: geometric type.
    """

    name: str
    contours: Section
    volume: float
    low: int = 5
    high: int = 14
    every: int = 1
    spacing: tuple[float, float, float] = (1.0, 1.0, 3.0)
    orientation: tuple[float, ...] = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)
    form: str = "CLOSED_PLANAR"

    @property
    def series(self) -> Series:
        """A CT of air around the shape."""
        return Series(
            np.full((80, 72, 24), -1000, np.int16), self.spacing, self.orientation, origin=(-31.5, 12.25, 140.0)
        )

    def roi(self) -> Roi:
        """Return the ROI, in the coordinates of the CT."""
        series = self.series
        axes = np.stack([series.orientation[:3], series.orientation[3:], series.normal])
        placed = []
        for index in range(self.low, self.high + 1, self.every):
            placed += [points @ axes + series.origin for points in self.contours(index * self.spacing[2])]
        return Roi("shape", placed, self.form, number=3)


CENTRE: Final = (37.3, 34.2)


def disc(radius: float, centre: Sequence[float] = CENTRE, *, backwards: bool = False) -> Section:
    """Return a cylinder with its axis across the slices."""
    return lambda height: [circle(centre, radius, height)[:: -1 if backwards else 1]]


def together(*sections: Section) -> Section:
    """Return the contours of several shapes."""
    return lambda height: [contour for section in sections for contour in section(height)]


def ellipsoid(half: Sequence[float], middle: float) -> Section:
    """Return an ellipsoid with its centre at a height."""

    def section(height: float) -> list[Points]:
        scale = np.sqrt(max(0.0, 1 - ((height - middle) / half[2]) ** 2))
        points = circle((0, 0), 1.0, height)
        points[:, :2] = points[:, :2] * np.array(half[:2]) * scale + CENTRE
        return [points]

    return section


def tilted(radius: float, slope: float) -> Section:
    """Return a cylinder whose centre moves with the height."""
    return lambda height: [circle((CENTRE[0] + slope * (height - 30), CENTRE[1]), radius, height)]


def lens(radius: float, distance: float) -> float:
    """Return the area that two discs have in common."""
    half = distance / (2 * radius)
    return float(2 * radius**2 * np.arccos(half) - distance / 2 * np.sqrt(4 * radius**2 - distance**2))


def shapes() -> Iterator[Shape]:
    """Yield all shapes of the table. Slices stand for a slab of their distance."""
    high = 30.0
    for radius in (20.0, 3.0, 1.5):
        yield Shape(f"disc of {radius:g} mm", disc(radius), np.pi * radius**2 * high)
    ring = np.pi * (20**2 - 10**2) * high
    inner = disc(10, (39.3, 33.2), backwards=True)
    yield Shape("ring, two contours", together(disc(20), inner), ring)
    yield Shape("ring, CLOSEDPLANAR_XOR", together(disc(20), inner), ring, form="CLOSEDPLANAR_XOR")
    yield Shape("ring, keyhole", lambda height: [keyhole(disc(20)(height)[0], disc(10)(height)[0])], ring)
    three = np.pi * (20**2 - 10**2 + 4**2) * high
    yield Shape("three nested contours", together(disc(20), disc(10), disc(4)), three)
    apart = together(disc(8), disc(8, (58.1, 34.2)))
    yield Shape("two separate contours", apart, 2 * np.pi * 8**2 * high)
    united = (2 * np.pi * 12**2 - lens(12, 10)) * high
    yield Shape("two overlapping contours", together(disc(12), disc(12, (47.3, 34.2))), united)
    yield Shape(
        "disc of 20 mm, pixels 0.7 x 1.3 mm", disc(20, (28.4, 45.2)), np.pi * 20**2 * high, spacing=(0.7, 1.3, 3)
    )
    yield Shape("disc of 3 mm, pixels 0.7 x 1.3 mm", disc(3, (28.4, 45.2)), np.pi * 3**2 * high, spacing=(0.7, 1.3, 3))
    yield Shape("disc of 20 mm, oblique", disc(20), np.pi * 20**2 * high, orientation=OBLIQUE)
    yield Shape("ring, two contours, oblique", together(disc(20), inner), ring, orientation=OBLIQUE)
    sphere = 4 / 3 * np.pi * 20**3
    for every, what in ((1, "each"), (2, "every second")):
        yield Shape(f"sphere of 20 mm, {what} slice", ellipsoid((20, 20, 20), 30), sphere, 4, 16, every)
    half = (25.0, 12.0, 28.6)
    whole = 4 / 3 * np.pi * float(np.prod(half))
    for every, what in ((1, "each"), (2, "every second"), (3, "every third")):
        yield Shape(f"ellipsoid, {what} slice", ellipsoid(half, 31.5), whole, 1, 19, every)
    for radius in (10.0, 3.0):
        yield Shape(
            f"tilted cylinder of {radius:g} mm, every second slice",
            tilted(radius, 0.5),
            np.pi * radius**2 * 33,
            4,
            14,
            2,
        )
    yield Shape("disc of 20 mm, every second slice", disc(20), np.pi * 20**2 * 33, 4, 14, 2)


def lattice_of(folder: Path) -> Lattice:
    """Return the lattice of the only readable CT in a folder."""
    (series,) = [series for series in find_series(folder) if series.problem is None]
    return Lattice(series.shape, series.affine)


def error(volume: float, truth: float) -> str:
    """Return a relative error in per cent."""
    return f"{100 * (volume / truth - 1):+.2f}"


def shape_rows(peers: Path | None) -> Iterator[dict[str, Any]]:
    """Yield a row for each shape."""
    with tempfile.TemporaryDirectory() as folder:
        every = list(shapes())
        jobs = []
        for number, shape in enumerate(every):
            place = Path(folder, f"{number:02d}")
            images = shape.series.datasets()
            for index, image in enumerate(images):
                save(image, place / "ct" / f"{index:03d}.dcm")
            save(structure_set([shape.roi()], images), place / "rs" / "rs.dcm")
            jobs.append(place)
        found = {name: masks_of_peer(peers / name, name, jobs) for name in PEERS if peers and (peers / name).is_dir()}
        for number, (shape, place) in enumerate(zip(every, jobs, strict=True)):
            truth = shape.volume / 1000
            row: dict[str, Any] = {"kind": "shape", "case": shape.name, "truth_ml": f"{truth:.4f}"}
            lattice = lattice_of(place / "ct")
            ((structure,),) = (found_.structures for found_ in find_annotations(place / "rs").objects)
            row |= read_by_us(structure, lattice, truth)
            voxel = lattice.voxel_volume_mm3 / 1000
            answers = {"plastimatch": plastimatch(place), **{name: given[number] for name, given in found.items()}}
            for name, answer in answers.items():
                row[name.replace("-", "_")] = answer if isinstance(answer, str) else error(answer * voxel, truth)
            yield row


def read_by_us(structure: Structure, lattice: Lattice, truth: float) -> dict[str, str]:
    """Return our errors of the volume."""
    try:
        share, said = structure.share(lattice)
    except FseftEdgeError as refusal:
        return {"share": "refused", "mask": "refused", "warnings": refusal.message}
    voxel = lattice.voxel_volume_mm3 / 1000
    return {
        "share": error(share.voxels * voxel, truth),
        "mask": error(share.mask().voxels * voxel, truth),
        "warnings": " ".join(said),
    }


_PEER_SCRIPTS: Final = {
    "rt-utils": """
from rt_utils import RTStructBuilder
def voxels(place):
    found = RTStructBuilder.create_from(str(place / "ct"), str(place / "rs" / "rs.dcm"))
    return int(found.get_roi_mask_by_name("shape").sum())
""",
    "dcmrtstruct2nii": """
import SimpleITK as sitk
from dcmrtstruct2nii import dcmrtstruct2nii
def voxels(place):
    out = place / "dcmrtstruct2nii"
    dcmrtstruct2nii(str(place / "rs" / "rs.dcm"), str(place / "ct"), str(out), convert_original_dicom=False)
    masks = sorted(out.glob("mask_*"))
    if not masks:
        return "left out"
    return int((sitk.GetArrayFromImage(sitk.ReadImage(str(masks[0]))) > 0).sum())
""",
    "platipy": """
import SimpleITK as sitk
from platipy.dicom.io.rtstruct_to_nifti import convert_rtstruct
def voxels(place):
    out = place / "platipy"
    out.mkdir()
    convert_rtstruct(str(place / "ct"), str(place / "rs" / "rs.dcm"), output_dir=str(out))
    masks = sorted(out.glob("*shape*"))
    if not masks:
        return "left out"
    return int((sitk.GetArrayFromImage(sitk.ReadImage(str(masks[0]))) > 0).sum())
""",
}
_PEER_LOOP: Final = """
import json, logging, sys
from pathlib import Path
logging.disable(logging.CRITICAL)
answers = []
for place in sys.argv[1:]:
    try:
        answers.append(voxels(Path(place)))
    except Exception as error:
        answers.append(f"fails: {type(error).__name__}")
print("ANSWERS" + json.dumps(answers))
"""


def masks_of_peer(environment: Path, name: str, places: Sequence[Path]) -> list[float | str]:
    """Return the number of voxels that another converter finds in each structure set, or what it says instead."""
    command = [str(environment / "bin" / "python"), "-W", "ignore", "-c", _PEER_SCRIPTS[name] + _PEER_LOOP]
    done = subprocess.run([*command, *map(str, places)], check=False, capture_output=True, text=True)  # noqa: S603 - fixed
    if "ANSWERS" not in done.stdout:
        return ["does not run"] * len(places)
    answers: list[float | str] = json.loads(done.stdout.split("ANSWERS")[1])
    return answers


def plastimatch(place: Path) -> float | str:
    """Return the number of voxels that plastimatch finds in a structure set."""
    masks = plastimatch_masks(place / "rs" / "rs.dcm", place / "ct", place / "plastimatch")
    if masks is None:
        return ""
    return float((sitk.GetArrayFromImage(sitk.ReadImage(str(masks[0]))) > 0).sum()) if masks else "left out"


def plastimatch_masks(structures: Path, ct: Path, output: Path) -> list[Path] | None:
    """Return the masks that plastimatch writes; None if it is not installed."""
    program = shutil.which("plastimatch")
    if program is None:
        return None
    command = [program, "convert", "--input", str(structures), "--referenced-ct", str(ct)]
    command += ["--output-prefix", str(output), "--prefix-format", "nii.gz"]
    subprocess.run(command, check=False, capture_output=True)  # noqa: S603 - fixed arguments
    return sorted(output.glob("*.nii.gz"))


def dice(a: NDArray[np.bool_], b: NDArray[np.bool_]) -> str:
    """Return the DSC of two masks."""
    return f"{2 * np.count_nonzero(a & b) / (np.count_nonzero(a) + np.count_nonzero(b)):.5f}"


def mask_of(structure: Structure, lattice: Lattice) -> NDArray[np.bool_]:
    """Return our mask of a structure on a lattice."""
    boxed = structure.share(lattice)[0].mask()
    mask = np.zeros(lattice.shape, bool)
    mask[boxed.box] = boxed.inside
    return mask


def round_trips(data: Path) -> Iterator[dict[str, Any]]:
    """Yield a row for each organ of some real masks, and for each object."""
    names = json.loads((data / "headneck" / "splits.json").read_text())["support"][:CASES]
    for name in names:
        path = next((data / "headneck" / "label").glob(f"{name}*"))
        image = nib.load(path)
        labels = LabelMap(np.asarray(image.dataobj).astype(np.uint8), np.asarray(image.affine))
        organs = [SegmentedOrgan(organ, label, 0.0, ()) for label, organ in ORGANS.items()]
        labels = LabelMap(np.where(np.isin(labels.array, list(ORGANS)), labels.array, 0), labels.affine)
        algorithm = SegmentationAlgorithm("e" * 64, {organ.name: "a" * 64 for organ in organs})
        with tempfile.TemporaryDirectory() as folder:
            place = Path(folder)
            images = ct_like(labels)
            for index, header in enumerate(images):
                save(header, place / "ct" / f"{index:03d}.dcm")
            write_structure_set(place / "rs" / "rs.dcm", labels, organs, images, algorithm)
            write_dicom_segmentation(place / "seg" / "seg.dcm", labels, organs, images, algorithm)
            yield from _rows_of_case(name, place, labels)


def _rows_of_case(name: str, place: Path, labels: LabelMap) -> Iterator[dict[str, Any]]:
    lattice = Lattice(labels.shape, labels.affine)
    others = plastimatch_masks(place / "rs" / "rs.dcm", place / "ct", place / "plastimatch") or []
    second = {path.name.removesuffix(".nii.gz"): path for path in others}
    segments = dcmqi(place / "seg" / "seg.dcm", place / "dcmqi")
    for kind in ("rs", "seg"):
        (found,) = find_annotations(place / kind).objects
        for structure in found.structures:
            label = next(label for label, organ in ORGANS.items() if organ == structure.name)
            truth = labels.array == label
            share, said = structure.share(lattice)
            volume = truth.sum() * lattice.voxel_volume_mm3 / 1000
            row: dict[str, Any] = {"kind": f"round trip {found.kind}", "case": f"{name} {structure.name}"}
            row |= {"truth_ml": f"{volume:.3f}", "warnings": " ".join(said)}
            row |= {"share": error(share.voxels, float(truth.sum())), "mask": dice(mask_of(structure, lattice), truth)}
            if kind == "rs" and structure.name in second:
                row["plastimatch"] = dice(on_lattice(second[structure.name], lattice), truth)
            if kind == "seg" and structure.number in segments:
                row["dcmqi"] = dice(on_lattice(segments[structure.number], lattice), truth)
            yield row


def ct_like(labels: LabelMap) -> list[Dataset]:
    """Return CT images of air on the lattice of a label map."""
    lps = np.diag([-1.0, -1.0, 1.0, 1.0]) @ labels.affine
    spacing = np.linalg.norm(lps[:3, :3], axis=0)
    cosines = lps[:3, :3] / spacing
    series = Series(
        np.full(labels.shape, -1000, np.int16),
        (float(spacing[0]), float(spacing[1]), float(spacing[2])),
        tuple(cosines[:, :2].T.ravel().tolist()),
        origin=(float(lps[0, 3]), float(lps[1, 3]), float(lps[2, 3])),
    )
    if not np.allclose(series.normal, cosines[:, 2]):
        raise ValueError("the third axis of the label map runs against the slice normal of DICOM")
    images: list[Dataset] = list(series.datasets())
    for image in images:
        image.SliceThickness = f"{spacing[2]:.8g}"
    return images


def dcmqi(path: Path, output: Path) -> dict[int, Path]:
    """Return the masks that dcmqi finds in a segmentation, by segment number."""
    program = Path(sys.executable).with_name("segimage2itkimage")
    output.mkdir(parents=True)
    command = [str(program), "--inputDICOM", str(path), "--outputDirectory", str(output), "--outputType", "nii"]
    subprocess.run(command, check=False, capture_output=True)  # noqa: S603 - fixed arguments
    return {int(found.name.split(".")[0].split("-")[-1]): found for found in output.glob("*.nii.gz")}


def on_lattice(path: Path, lattice: Lattice) -> NDArray[np.bool_]:
    """Return a mask file voxel by voxel on a lattice; its voxels must be voxels of the lattice."""
    image = nib.load(path)
    found = np.argwhere(np.asarray(image.dataobj) > 0)
    places = np.linalg.inv(lattice.affine) @ image.affine @ np.c_[found, np.ones(len(found))].T
    indices = np.rint(places[:3]).astype(int)
    if np.abs(places[:3] - indices).max(initial=0) > 0.1:
        raise ValueError("the mask is on another lattice")
    mask = np.zeros(lattice.shape, bool)
    mask[tuple(indices)] = True
    return mask


def files_of_others(folder: Path) -> Iterator[dict[str, Any]]:
    """Yield rows for objects that nobody here wrote: RIDER in ``rider``, RTMaskConformanceTest in ``rtmask``."""
    if (folder / "rider").is_dir():
        yield from _rider(folder / "rider")
    if (folder / "rtmask").is_dir():
        yield from _rtmask(folder / "rtmask")


def _rider(folder: Path) -> Iterator[dict[str, Any]]:
    """Yield the ROIs of a structure set beside the segments of the same tumour in a segmentation."""
    lattice = lattice_of(folder)
    objects: dict[str, AnnotationObject] = {found.kind: found for found in find_annotations(folder).objects}
    regions = sorted(objects["rtstruct"].structures, key=lambda one: one.share(lattice)[0].voxels)
    segments = sorted(objects["seg"].structures, key=lambda one: one.share(lattice)[0].voxels)
    ct = {image.parent for image in folder.rglob("*.dcm") if len(list(image.parent.glob("*.dcm"))) > 1}
    with tempfile.TemporaryDirectory() as output:
        others = plastimatch_masks(objects["rtstruct"].path, ct.pop(), Path(output)) or []
        second = [on_lattice(path, lattice) for path in others]
        second.sort(key=np.count_nonzero)
        for number, (region, segment) in enumerate(zip(regions, segments, strict=True), start=1):
            share, said = region.share(lattice)
            truth = mask_of(segment, lattice)
            volume = np.count_nonzero(truth) * lattice.voxel_volume_mm3 / 1000
            row: dict[str, Any] = {"kind": "files of others", "case": f"RIDER tumour {number}: ROI against segment"}
            row |= {"truth_ml": f"{volume:.3f}", "share": error(share.voxels, float(np.count_nonzero(truth)))}
            row |= {"mask": dice(mask_of(region, lattice), truth), "warnings": " ".join(said)}
            if len(second) == len(regions):
                row["plastimatch"] = dice(second[number - 1], truth)
            yield row


def _rtmask(folder: Path) -> Iterator[dict[str, Any]]:
    """Yield the ROIs of RTMaskConformanceTest beside its masks of the exact shapes."""
    lattice = lattice_of(folder / "refct")
    (found,) = find_annotations(folder / "rtstruct").objects
    with tempfile.TemporaryDirectory() as output:
        structures = folder / "rtstruct" / "primitives_planar.dcm"
        others = plastimatch_masks(structures, folder / "refct", Path(output)) or []
        second = {path.name.removesuffix(".nii.gz"): path for path in others}
        for region in found.structures:
            exact = json.loads((folder / "specs" / f"{region.name}.json").read_text())["analytical_volume_mm3"] / 1000
            truth = on_lattice(folder / "groundtruth" / f"{region.name}.nii.gz", lattice)
            share, said = region.share(lattice)
            row: dict[str, Any] = {"kind": "files of others", "case": f"RTMaskConformanceTest {region.name}"}
            row |= {"truth_ml": f"{exact:.3f}", "share": error(share.voxels * lattice.voxel_volume_mm3 / 1000, exact)}
            row |= {"mask": dice(mask_of(region, lattice), truth), "warnings": " ".join(said)}
            if region.name in second:
                row["plastimatch"] = dice(on_lattice(second[region.name], lattice), truth)
            yield row


def main() -> None:
    """Measure, print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", type=Path, help="folder of the virtual environments of other converters")
    parser.add_argument("--others", type=Path, help="folder with the files of others")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "contours.csv")
    given = parser.parse_args()
    logging.getLogger("nibabel").setLevel(logging.CRITICAL)
    rows = list(shape_rows(given.peers))
    if data := os.environ.get("FSEFT_EDGE_DATA"):
        rows += round_trips(Path(data))
    if given.others:
        rows += files_of_others(given.others)
    with given.output.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    for row in rows:
        print("; ".join(f"{key} {value}" for key, value in row.items() if value))


if __name__ == "__main__":
    main()
