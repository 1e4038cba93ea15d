"""Annotated scans on disk: which annotation belongs to which CT, and the organs that it contains.

An annotation is a label map, a segmentation of 3D Slicer, an RT Structure Set or a DICOM Segmentation. An annotation in
DICOM states its images (PS3.3 sections C.8.8.5, C.8.8.6 and C.8.20.2), so it belongs to the CT series with these
images; if none of them is there, to the only CT series in its frame of reference. All other annotations belong to the
CT of the same name: the name of the file, or of the first subfolder in which the file lies.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple

from fseft_edge.runtime.errors import ArchiveError, InputError, NoSeriesError, UnreadableFileError, UsageError
from fseft_edge.runtime.scans.annotation import Annotation
from fseft_edge.runtime.scans.annotation_files import (
    FoundAnnotation,
    names_structures,
    organs_of_label_map,
    organs_of_structures,
    structures_of,
)
from fseft_edge.runtime.scans.image_files import annotations_by_name, is_image_file
from fseft_edge.runtime.scans.image_names import is_segmentation_file
from fseft_edge.runtime.scans.nifti import cases_by_name
from fseft_edge.runtime.scans.organs import OrganLabel
from fseft_edge.runtime.scans.sources import Scan, scan_name
from fseft_edge.runtime.scans.structures import Lattice

if TYPE_CHECKING:
    from fseft_edge.runtime.scans.dicom import DicomSeries
    from fseft_edge.runtime.scans.dicom.annotation_objects import AnnotationObject

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class AnnotationSettings:
    """How annotations in DICOM are chosen and read.

    Attributes:
        structure_set: which annotation of a CT to use if there are several: its number in the list of
            ``fseft-edge contours``, its label, or the end of its SOP Instance UID. None selects the newest approved
            one; if none is approved, the newest one.
        interpolate: whether slices between contours on every second or every n-th slice are filled. If not, they stay
            empty.
    """

    structure_set: str | None = None
    interpolate: bool = True


DEFAULT_ANNOTATION_SETTINGS: Final = AnnotationSettings()


@dataclass(frozen=True, eq=False)
class FoundPair:
    """A CT and its annotation, before both are read."""

    scan: Scan
    annotation: FoundAnnotation = field(repr=False)

    @property
    def path(self) -> Path:
        """File of the annotation, or the folder or archive that contains it."""
        return self.annotation if isinstance(self.annotation, Path) else self.annotation.path


def find_pairs(
    images: Path,
    labels: Path,
    cases: Sequence[str] | None = None,
    settings: AnnotationSettings = DEFAULT_ANNOTATION_SETTINGS,
) -> list[FoundPair]:
    """Return pairs of a CT and its annotation.

    Args:
        images: folder of CTs, or one CT; in DICOM, the folder of one patient, or of several patients.
        labels: folder of annotations, or one annotation; in DICOM, it may be the folder of the CTs.
        cases: names of the cases to return; None returns all cases that have an annotation.
        settings: choice among several annotations of a CT.

    Raises:
        UnreadableFileError: there is no pair, or the CT or the annotation of one of the ``cases`` is missing.
        InputError: a CT has annotations of several kinds, or an annotation belongs to another CT.
        UsageError: ``settings.structure_set`` matches no annotation of a CT.
    """
    scans = _Scans.at(images)
    annotations = _annotations_at(labels, images, scans, interpolate=settings.interpolate)
    if images.is_file() and labels.is_file() and len(annotations) == len(scans.named) == 1:
        (name,) = scans.named
        return [FoundPair(scans.scan(name, _Place(name)), _chosen(name, annotations, settings))]
    found: dict[_Place, list[_Named]] = {}
    for annotation in annotations:
        place = scans.place_of(annotation)
        if place is not None:
            found.setdefault(place, []).append(annotation)
    places = scans.case_names(found)
    names = [*(name for name in scans.named if all(place.name != name for place in found)), *places]
    wanted = list(dict.fromkeys(cases)) if cases is not None else list(places)
    if missing := [name for name in wanted if name not in places]:
        raise UnreadableFileError(
            f"For the cases {', '.join(missing)}, the image in {images} or the annotation in {labels} is missing.",
            remedy="Give each annotation the file name of its image, and check the case names.",
        )
    if not wanted:
        raise _no_pair(images, labels, scans, annotations)
    used = sum(len(of_place) for of_place in found.values())
    if used < len(annotations) and cases is None:
        strays = len(annotations) - used
        _LOG.warning(
            "%d of %d annotations in %s belong to no CT in %s, and are not used",
            strays,
            len(annotations),
            labels,
            images,
        )
    if cases is None and (skipped := [name for name in names if name not in places]):
        _LOG.warning("these cases are skipped, because they have no annotation: %s", ", ".join(skipped))
    rejected = [name for name in wanted if _are_rejected(found[places[name]])]
    if cases is None and settings.structure_set is None and 0 < len(rejected) < len(wanted):
        _LOG.warning("these cases are skipped, because their annotations are rejected: %s", ", ".join(rejected))
        wanted = [name for name in wanted if name not in rejected]
    return [FoundPair(scans.scan(name, places[name]), _chosen(name, found[places[name]], settings)) for name in wanted]


def names_of_cases(images: Path) -> list[str]:
    """Return the names of all CTs at a path (see :func:`find_pairs`)."""
    return list(_Scans.at(images).named)


@dataclass(frozen=True, eq=False)
class _Named:
    """An annotation with the name under which it was found."""

    name: str
    annotation: FoundAnnotation


class _Place(NamedTuple):
    """A CT to which annotations belong.

    Attributes:
        name: name of the file or folder.
        series: index among the CT series of this name; None if it is the only CT, or the one that is read by itself.
    """

    name: str
    series: int | None = None


class _Scans:
    """The CTs at a path.

    Attributes:
        named: by name of the file or folder, an image file, or the CT series in DICOM.
    """

    def __init__(self, named: Mapping[str, Path | Sequence[DicomSeries]]) -> None:
        self.named = dict(named)

    @classmethod
    def at(cls, images: Path) -> _Scans:
        if not images.is_dir():
            return cls(_patients(images) if images.exists() and not is_image_file(images) else cases_by_name(images))
        try:
            files = cases_by_name(images)
        except UnreadableFileError:
            files = {}
        # A file beside a DICOM series, in the folder of a patient or with its name, is an annotation.
        patients = _patients(images)
        in_folders = _in_folders(images, is_image_file, but=[*patients, *files]) if not files else {}
        named: dict[str, Path | Sequence[DicomSeries]] = {**files, **in_folders, **patients}
        if not named:
            raise UnreadableFileError(
                f"{images} contains no CT: no CT series in DICOM, and no .nii, .nii.gz, .nrrd, .nhdr, .mha or .mhd "
                "file.",
                remedy="Give the folder of the scans.",
            )
        return cls(dict(sorted(named.items())))

    @property
    def series(self) -> list[tuple[_Place, DicomSeries]]:
        """All CT series in DICOM."""
        return [
            (_Place(name, index), one)
            for name, of_case in self.named.items()
            if not isinstance(of_case, Path)
            for index, one in enumerate(of_case)
        ]

    def place_of(self, annotation: _Named) -> _Place | None:
        """Return the CT to which an annotation belongs; None if there is none."""
        found, series = annotation.annotation, self.series
        if isinstance(found, Path) or not series:
            return _Place(annotation.name) if annotation.name in self.named else None
        place, most = max(((place, _shared(found, one)) for place, one in series), key=lambda pair: pair[1])
        if most:
            return place
        framed = [place for place, one in series if _in_frame(found, one)]
        places = [place for place in framed if place.name == annotation.name] or framed
        if len(places) > 1:
            names = ", ".join(dict.fromkeys(place.name for place in places))
            raise InputError(
                f"The annotation {annotation.name} names none of the CT images, and {len(places)} CT series are in its "
                f"frame of reference: {names}.",
                remedy="Leave only the CT that was contoured, or export the annotation again with references to its "
                "images.",
            )
        if places and found.images:
            _LOG.warning(
                "%s: the annotation was made on images that are not there; it is used for the only CT in its frame of "
                "reference",
                places[0].name,
            )
        return places[0] if places else None

    def case_names(self, places: Collection[_Place]) -> dict[str, _Place]:
        """Return the CTs with annotations by the names of their cases, in the order of the CTs.

        Several CT series of one folder get a number.
        """
        cases: dict[str, _Place] = {}
        for name in self.named:
            of_name = sorted((place for place in places if place.name == name), key=lambda place: place.series or 0)
            if len(of_name) > 1 and any(place.series is None for place in of_name):
                raise InputError(
                    f"The case {name} has {len(of_name)} annotations of different kinds.",
                    remedy="Leave one annotation for each case in the folder.",
                )
            for number, one in enumerate(of_name, start=1):
                case = f"{name}_{number}" if len(of_name) > 1 else name
                if case in cases:
                    raise InputError(f"There are two cases {case}.", remedy="Rename the folder of one of them.")
                cases[case] = one
        return cases

    def scan(self, case: str, place: _Place) -> Scan:
        """Return the CT of a case."""
        of_case = self.named[place.name]
        if isinstance(of_case, Path):
            return Scan(case, of_case)
        from fseft_edge.runtime.scans.dicom import choose_series  # noqa: PLC0415 - loads pydicom

        chosen = choose_series(of_case, None if place.series is None else str(of_case[place.series].number))
        return Scan(case, _folder_of(chosen), chosen)


def _in_folders(path: Path, is_wanted: Callable[[Path], bool], *, but: Collection[str] = ()) -> dict[str, Path]:
    """Return the file of a kind in each subfolder, by the name of the subfolder, without the subfolders ``but``.

    Raises:
        InputError: a subfolder contains several such files.
    """
    found: dict[str, Path] = {}
    for folder in sorted(entry for entry in path.iterdir() if entry.is_dir() and not entry.name.startswith(".")):
        if folder.name in but:
            continue
        files = sorted(file for file in folder.iterdir() if not file.name.startswith(".") and is_wanted(file))
        if len(files) > 1:
            raise InputError(
                f"The folder {folder} contains {len(files)} files of one kind: "
                f"{', '.join(file.name for file in files[:5])}.",
                remedy="Leave one image and one annotation in the folder of each case, with images and annotations in "
                "two places, or name both after the case in one folder.",
            )
        if files:
            found[folder.name] = files[0]
    return found


def _shared(annotation: AnnotationObject, series: DicomSeries) -> int:
    """Return the number of images of a series to which an annotation refers."""
    return sum(slice_.sop_instance_uid in annotation.images for slice_ in series.slices)


def _in_frame(annotation: AnnotationObject, series: DicomSeries) -> bool:
    return bool(series.frame_of_reference_uid) and series.frame_of_reference_uid in annotation.frames_of_reference


def _folder_of(series: DicomSeries) -> Path:
    """Return the folder of the slices of a series if all slices lie in one, else the path that the user gave."""
    folders = {slice_.file.path.parent for slice_ in series.slices}
    return folders.pop() if len(folders) == 1 and series.source.is_dir() else series.source


def _patients(path: Path) -> dict[str, list[DicomSeries]]:
    """Return the CT series at a path by the name of their case: the first subfolder, or the name of the path."""
    from fseft_edge.runtime.scans.dicom import find_series  # noqa: PLC0415 - loads pydicom
    from fseft_edge.runtime.scans.dicom.kinds import is_ct  # noqa: PLC0415

    patients: dict[str, list[DicomSeries]] = {}
    for place in _places(path):
        try:
            found = find_series(place)
        except NoSeriesError:  # a folder of annotations
            continue
        for series in found:
            if is_ct(series.slices[0]):
                first = series.slices[0].file
                patients.setdefault(_name_in(path, first.path), []).append(series)
    return patients


def _places(path: Path) -> Iterator[Path]:
    """Yield the files, archives and folders in which to search for DICOM: each patient folder by itself."""
    from fseft_edge.runtime.scans.dicom.files import contains_dicom  # noqa: PLC0415 - loads pydicom

    inside = sorted(entry for entry in path.iterdir() if not entry.name.startswith(".")) if path.is_dir() else []
    folders = [entry for entry in inside if entry.is_dir() or entry.suffix.lower() == ".zip"]
    files = [entry for entry in inside if entry not in folders]
    if path.is_file() or any(contains_dicom(entry) for entry in files if entry.is_file()):
        yield path
    else:
        for entry in folders:
            try:
                if contains_dicom(entry):
                    yield entry
            except ArchiveError as problem:
                _LOG.warning("an archive was left out: %s", problem.message)


def _name_in(path: Path, file: Path) -> str:
    """Return the name of a case by one of its DICOM files: the first subfolder, else the name of the path itself."""
    parts = file.relative_to(path).parts if file != path else ()
    return parts[0] if len(parts) > 1 else scan_name(file if len(parts) == 1 and file.suffix == ".zip" else path)


def _annotations_at(labels: Path, images: Path | None, scans: _Scans | None, *, interpolate: bool) -> list[_Named]:
    """Return all annotations at a path with their names."""
    if not labels.is_dir() and labels.exists() and not (is_segmentation_file(labels) or is_image_file(labels)):
        found = _in_dicom(labels, interpolate=interpolate)
        if not found:
            raise UnreadableFileError(
                f"{labels} is no label map, no .seg.nrrd file, no RT Structure Set and no DICOM Segmentation.",
                remedy="Give the annotation of a scan, or the folder of the annotations.",
            )
        return found
    if not labels.is_dir():
        return [_Named(name, path) for name, path in annotations_by_name(labels, images).items()]
    is_folder_of_images = images is not None and images.is_dir() and labels.samefile(images)
    are_images = [
        name
        for name, of_case in (scans.named.items() if scans is not None and is_folder_of_images else ())
        if isinstance(of_case, Path)
    ]
    try:
        files = annotations_by_name(labels, None)
    except UnreadableFileError:
        files = {}
    files = {name: path for name, path in files.items() if name not in are_images or is_segmentation_file(path)}
    if not files:
        files = {
            **_in_folders(labels, is_image_file, but=are_images),
            **_in_folders(labels, is_segmentation_file),
        }
    found = [_Named(name, path) for name, path in sorted(files.items())]
    found += _in_dicom(labels, interpolate=interpolate)
    if not found:
        raise UnreadableFileError(
            f"{labels} contains no annotation: no label map, no .seg.nrrd file, no RT Structure Set and no DICOM "
            "Segmentation.",
            remedy="Give the folder of the annotations.",
        )
    return found


def _in_dicom(labels: Path, *, interpolate: bool) -> list[_Named]:
    """Return the readable annotations in DICOM; the others are logged, or raised if there is no readable one."""
    from fseft_edge.runtime.scans.dicom.annotations import find_annotations  # noqa: PLC0415 - loads pydicom

    found: list[_Named] = []
    problems: list[tuple[str, InputError]] = []
    for place in _places(labels):
        annotations = find_annotations(place, interpolate=interpolate)
        found += [_Named(_annotation_name(labels, one.file.path), one) for one in annotations.objects]
        problems += [(_annotation_name(labels, file.path), problem) for file, problem in annotations.problems]
    if problems and not found:
        raise problems[0][1]
    for name, problem in problems:
        _LOG.warning("%s: an annotation was left out: %s", name, problem.message)
    return found


def _annotation_name(labels: Path, file: Path) -> str:
    """Return the name of an annotation: the first subfolder, else the name of the file."""
    return _name_in(labels, file) if file.parent != labels else scan_name(file)


def _no_pair(images: Path, labels: Path, scans: _Scans, annotations: Sequence[_Named]) -> InputError:
    if not all(isinstance(one, Path) for one in scans.named.values()) and not any(
        isinstance(one.annotation, Path) for one in annotations
    ):
        return InputError(
            f"None of the {len(annotations)} annotations in {labels} belongs to a CT in {images}: they refer to other "
            "images, in another frame of reference.",
            remedy="Give the CT on which the structures were contoured, with its original DICOM files.",
        )
    return UnreadableFileError(
        f"No annotation in {labels} has the name of an image in {images}. The first annotation is "
        f"{annotations[0].name}, the first image is {next(iter(scans.named))}.",
        remedy="Give each annotation the file name of its image.",
    )


def _chosen(case: str, annotations: Sequence[_Named], settings: AnnotationSettings) -> FoundAnnotation:
    """Return the annotation of a case; of several structure sets, the wanted or the newest approved one."""
    objects = [one.annotation for one in annotations if not isinstance(one.annotation, Path)]
    if len(objects) < len(annotations):
        if len(annotations) > 1:
            raise InputError(
                f"The case {case} has {len(annotations)} annotations of different kinds.",
                remedy="Leave one annotation for each case in the folder.",
            )
        return annotations[0].annotation
    if settings.structure_set is not None:
        wanted = [
            one
            for number, one in enumerate(objects, start=1)
            if settings.structure_set in (str(number), one.label)
            or (not settings.structure_set.isdecimal() and one.sop_instance_uid.endswith(settings.structure_set))
        ]
        if len(wanted) != 1:
            raise UsageError(
                f"--structure-set {settings.structure_set} matches {len(wanted)} of the {len(objects)} annotations of "
                f"the case {case}.",
                remedy="Show the annotations with `fseft-edge contours`, and give the number, the label, or the end of "
                "the SOP Instance UID of one of them.",
            )
        return wanted[0]
    usable = [one for one in objects if one.approval != "REJECTED"]
    if not usable:
        raise InputError(
            f"All {len(objects)} annotations of the case {case} are rejected (ApprovalStatus).",
            remedy="Use an approved structure set, or choose one with --structure-set.",
        )
    best = max(usable, key=_rank)
    if sum(_rank(one) == _rank(best) for one in usable) > 1:
        raise InputError(
            f"The case {case} has several annotations of the same date and approval, so none is the newest.",
            remedy="Choose one with --structure-set, or leave one of them in the folder.",
        )
    if len(objects) > 1:
        _LOG.warning(
            "%s: of %d annotations, number %d is used, the newest%s one; choose with --structure-set",
            case,
            len(objects),
            1 + next(number for number, one in enumerate(objects) if one is best),
            " approved" if best.approval == "APPROVED" else "",
        )
    return best


def _rank(annotation: AnnotationObject) -> tuple[bool, str, str]:
    date, time = (re.sub(r"[^0-9]", "", text) for text in (annotation.date, annotation.time.partition(".")[0]))
    return annotation.approval == "APPROVED", date, time


def _are_rejected(annotations: Sequence[_Named]) -> bool:
    return all(not isinstance(one.annotation, Path) and one.annotation.approval == "REJECTED" for one in annotations)


def read_pair(pair: FoundPair, organs: Sequence[OrganLabel]) -> Annotation:
    """Read the organs in the annotation of a CT. An organ that it does not contain is left out.

    What is left out, corrected or assumed is logged as a warning.

    Args:
        pair: the CT and its annotation.
        organs: wanted organs. Their label values are those of the result.

    Raises:
        LabelError: the annotation does not name its label values or structures as ``organs`` does, or two structures
            have names of one organ.
        GeometryError: a structure is in another frame of reference than the CT, or not on its lattice.
        InputError: the annotation cannot be read.
    """
    if isinstance(pair.annotation, Path) and not names_structures(pair.annotation):
        return organs_of_label_map(pair.annotation, organs)
    frame = pair.scan.series.frame_of_reference_uid if pair.scan.series is not None else ""
    structures = structures_of(pair.annotation)
    return organs_of_structures(structures, organs, lattice_of(pair.scan), pair.scan.name, frame_of_reference=frame)


def annotations_by_case(path: Path, settings: AnnotationSettings) -> dict[str, FoundAnnotation]:
    """Return the annotations or masks at a path by the names of their cases.

    Args:
        path: folder, or one file.
        settings: choice among several annotations of a case.

    Raises:
        UnreadableFileError: the path does not exist, or contains no annotation.
        InputError: a case has annotations of different kinds.
        UsageError: ``settings.structure_set`` matches no annotation of a case.
    """
    found: dict[str, list[_Named]] = {}
    for annotation in _annotations_at(path, None, None, interpolate=settings.interpolate):
        found.setdefault(annotation.name, []).append(annotation)
    for name, of_case in found.items():
        images = [one.annotation.images for one in of_case if not isinstance(one.annotation, Path)]
        if len(images) > 1 and all(images) and not frozenset.intersection(*images):
            raise InputError(
                f"The case {name} has annotations of different CTs.",
                remedy="Put the annotation of each CT into a folder of its own, with the name of the prediction.",
            )
    return {name: _chosen(name, of_case, settings) for name, of_case in found.items()}


def lattice_of(scan: Scan) -> Lattice:
    """Return the lattice of a CT. The voxels of a DICOM series are not read."""
    if scan.series is not None:
        return Lattice(scan.series.shape, scan.series.affine)
    return Lattice.of(scan.read())
