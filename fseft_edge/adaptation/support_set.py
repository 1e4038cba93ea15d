"""The support set: search for annotated scans on disk, checks, encoding, and annotations on the grid."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from fseft_edge.adaptation.augmentation import default_variations, vary
from fseft_edge.adaptation.block_sampling import SupportScan
from fseft_edge.adaptation.partial_encoding import PartialEncoding
from fseft_edge.adaptation.patients import GroupRule, SupportIdentity, groups_of
from fseft_edge.adaptation.soft_labels import Occupancy
from fseft_edge.adapters.network import AdapterSettings
from fseft_edge.outbox.accepted_masks import ReviewedBatch, accepted_annotations
from fseft_edge.outbox.store import BatchStore, state_path
from fseft_edge.runtime.encoder.backends.base import EncoderSession
from fseft_edge.runtime.encoder.bundle import EncoderBundle
from fseft_edge.runtime.encoder.encoding import EncodedScan, encode_scan, layout_of
from fseft_edge.runtime.encoder.feature_store import FeatureStore
from fseft_edge.runtime.encoder.on_demand import encode_on_demand
from fseft_edge.runtime.errors import LabelError, UsageError
from fseft_edge.runtime.scans.annotated import (
    DEFAULT_ANNOTATION_SETTINGS,
    AnnotationSettings,
    FoundPair,
    find_pairs,
    names_of_cases,
    read_pair,
)
from fseft_edge.runtime.scans.annotation import Annotation, annotation_on
from fseft_edge.runtime.scans.annotation_files import contents_of, names_structures
from fseft_edge.runtime.scans.components import BoxedMask
from fseft_edge.runtime.scans.content import annotation_sha256, scan_sha256
from fseft_edge.runtime.scans.given import GivenLabels, GivenScan, given_labels, given_scan
from fseft_edge.runtime.scans.grid import Grid
from fseft_edge.runtime.scans.intensities import hu_percentiles
from fseft_edge.runtime.scans.nifti import case_name
from fseft_edge.runtime.scans.organs import OrganLabel
from fseft_edge.runtime.scans.sources import Scan, read_scan
from fseft_edge.runtime.scans.volume import LabelMap, Volume
from fseft_edge.runtime.system.memory import AS_MUCH_AS_IS_FREE, Budget
from fseft_edge.runtime.system.progress import Progress, SilentProgress

_LOG = logging.getLogger(__name__)

GivenScans: TypeAlias = str | Path | Sequence[GivenScan]
"""CTs for training: a folder of NIfTI files, one NIfTI file, or a list of CTs."""

GivenAnnotations: TypeAlias = str | Path | Sequence[GivenLabels]
"""The annotations of the CTs: a folder of files with the names of their CTs, one file, or a list in the order of the
CTs."""

AnnotatedScan: TypeAlias = tuple[Path | Scan, Annotation]
"""A CT and its annotation."""


def find_annotated(
    images: GivenScans | None,
    labels: GivenAnnotations | None,
    organs: Sequence[OrganLabel],
    settings: AdapterSettings,
    *,
    cases: Sequence[str] | None = None,
    reviewed: ReviewedBatch | None = None,
    reading: AnnotationSettings = DEFAULT_ANNOTATION_SETTINGS,
) -> list[AnnotatedScan]:
    """Find the CTs for training and read their annotations.

    See :func:`fseft_edge.runtime.scans.annotated.find_pairs` and :func:`read_annotations`.

    Args:
        images: folder of CTs, one CT, or a list of CTs; None together with ``labels`` if all scans come from
            ``reviewed``.
        labels: folder of annotations with the file names of their CTs, one annotation, or a list of annotations.
        organs: organs to train.
        settings: settings of the adapter.
        cases: names of the cases of ``images`` to use; None uses all cases that have an annotation.
        reviewed: reviewed batch whose accepted masks are used as annotations.
        reading: how annotations in DICOM are chosen and read.

    Raises:
        UsageError: no annotated scans are given, no mask of ``reviewed`` was accepted, or lists of CTs and annotations
            do not have the same length.
        InputError: an annotation cannot be read, or cannot be used for these organs and settings.
    """
    pairs: list[FoundPair] = []
    listed: list[AnnotatedScan] = []
    if isinstance(images, str | Path) and isinstance(labels, str | Path):
        pairs = find_pairs(Path(images), Path(labels), cases, reading)
    elif not isinstance(images, str | Path | None) and not isinstance(labels, str | Path | None):
        listed = _listed(images, labels, organs, cases)
    elif images is not None or labels is not None or reviewed is None:
        raise UsageError(
            "The annotated scans for training are missing."
            if images is None or labels is None
            else "One of images and labels is a list, and the other is a path.",
            remedy="Give their folders with --images and --labels, or a reviewed batch with --from-reviewed. In "
            "Python, two lists are possible too.",
        )
    paths = [pair.scan.path for pair in pairs if pair.scan.path] + [
        scan.path for scan, _ in listed if isinstance(scan, Scan) and scan.path
    ]
    accepted = accepted_annotations(reviewed, organs, paths) if reviewed else []
    folder = Path(labels) if isinstance(labels, str | Path) else None
    return read_annotations(pairs, organs, folder, settings, others=[*listed, *accepted])


def _listed(
    images: Sequence[GivenScan],
    labels: Sequence[GivenLabels],
    organs: Sequence[OrganLabel],
    cases: Sequence[str] | None,
) -> list[AnnotatedScan]:
    """Return lists of CTs and annotations as pairs. CTs with equal names get their number in the list as a suffix."""
    if len(images) != len(labels) or not images:
        raise UsageError(
            f"{len(images)} images and {len(labels)} annotations are given.",
            remedy="Give a list of images, and a list with the annotation of each image in the same order.",
        )
    scans = [given_scan(image, name=f"scan_{number}") for number, image in enumerate(images, start=1)]
    names = Counter(scan.name for scan in scans)
    scans = [
        replace(scan, name=f"{scan.name}_{number}") if names[scan.name] > 1 else scan
        for number, scan in enumerate(scans, start=1)
    ]
    missing = sorted({*(cases or ())} - {scan.name for scan in scans})
    if missing:
        raise UsageError(
            f"There is no image with the case name {', '.join(missing)}.",
            remedy=f"Choose among these case names: {', '.join(scan.name for scan in scans)}.",
        )
    return [
        (
            scan,
            read_pair(FoundPair(scan, Path(annotation)), organs)
            if isinstance(annotation, str | Path)
            else given_labels(annotation),
        )
        for scan, annotation in zip(scans, labels, strict=True)
        if cases is None or scan.name in cases
    ]


def read_annotations(
    pairs: Sequence[FoundPair],
    organs: Sequence[OrganLabel],
    labels: Path | None,
    settings: AdapterSettings,
    *,
    others: Sequence[AnnotatedScan] = (),
) -> list[AnnotatedScan]:
    """Read the annotations, and check that they are sufficient to train the organs.

    Args:
        pairs: pairs of a CT and its annotation (see :func:`fseft_edge.runtime.scans.annotated.find_pairs`).
        organs: organs to train.
        labels: folder of the annotations, for messages; None if there is no such folder.
        settings: settings of the adapter.
        others: pairs whose annotation is already in memory, such as accepted masks of a reviewed batch; they are the
            last pairs of the result.

    Returns:
        Pairs of a CT and its annotation.

    Raises:
        UnreadableFileError: an annotation cannot be read.
        LabelError: no case is annotated for one of the organs; or, with softmax, no case is annotated for all organs.
    """
    annotated: list[AnnotatedScan] = [*((pair.scan, read_pair(pair, organs)) for pair in pairs), *others]
    present = [{organ.label for organ in organs if annotation.contains(organ.label)} for _, annotation in annotated]
    for organ in organs:
        without = [
            case_of(image, annotation)
            for (image, annotation), values in zip(annotated, present, strict=True)
            if organ.label not in values
        ]
        if len(without) == len(annotated):
            raise _without_organ(organ, labels, pairs, [annotation for _, annotation in annotated])
        if without:
            _LOG.warning(
                "the organ %s does not occur in the annotations of %s; these cases are treated as not annotated for "
                "this organ",
                organ.described,
                ", ".join(without),
            )
    if settings.activation == "softmax" and not any(
        all(organ.label in values for organ in organs) for values in present
    ):
        raise LabelError(
            "--activation softmax needs a scan that is annotated for all organs, but there is none.",
            remedy="Use --activation sigmoid, or annotate all organs in at least one scan.",
        )
    return annotated


def _without_organ(
    organ: OrganLabel, labels: Path | None, pairs: Sequence[FoundPair], annotations: Sequence[Annotation]
) -> LabelError:
    """Return the error for an organ that no annotation contains, with what the annotations contain instead."""
    label_maps = [annotation for annotation in annotations if isinstance(annotation, LabelMap)]
    structures = [pair.annotation for pair in pairs if names_structures(pair.annotation)]
    return LabelError(
        f"No annotation{f' in {labels}' if labels else ''} contains the organ {organ.described}. "
        + contents_of([*label_maps, *structures]),
        remedy="Check --organ: NAME=ID with a label value of the annotations, or NAME='ROI|OTHER ROI' with names of "
        "structures. For a reviewed batch, NAME must be an organ name of the batch.",
    )


def case_of(image: Path | Scan, labels: Annotation) -> str:
    """Return the name of a case: for a case of a reviewed batch the pseudonym, which only the annotation has."""
    return image.name if isinstance(image, Scan) else case_name(labels.source or image)


def patients_of(
    annotated: Sequence[AnnotatedScan],
    groups: GroupRule | None,
    *,
    images: GivenScans | None,
    reviewed: ReviewedBatch | None = None,
) -> dict[str, str] | None:
    """Return the patient of each annotated case; None if each case is of another patient, as far as is known.

    Without ``groups``, the patients of DICOM series are those of their headers.

    Args:
        annotated: pairs of a CT and its annotation (see :func:`read_annotations`).
        groups: patient of each case, or a pattern that finds the patient in a case name; None if they are unknown.
        images: the given CTs; ``groups`` may also contain CTs of a folder that are not used.
        reviewed: reviewed batch; ``groups`` may also contain cases of this batch that are not used.

    Raises:
        UsageError: a case has no patient, or ``groups`` contains a case that does not exist.
    """
    if groups is None:
        return _patients_in_dicom(annotated)
    known = set(names_of_cases(Path(images))) if isinstance(images, str | Path) else set()
    if reviewed is not None:
        with BatchStore(state_path(reviewed.outbox, reviewed.state)) as store:
            known |= {case.key for case in store.cases()}
    return groups_of(groups, [case_of(image, labels) for image, labels in annotated], known=known)


def _patients_in_dicom(annotated: Sequence[AnnotatedScan]) -> dict[str, str] | None:
    """Return the patient of each case if two DICOM series are of one patient, else None."""
    patients: dict[str, str] = {}
    numbers: dict[bytes, str] = {}
    for image, labels in annotated:
        series = image.series if isinstance(image, Scan) else None
        case = case_of(image, labels)
        patients[case] = case if series is None else numbers.setdefault(series.patient, case)
    shared = sorted(case for case, patient in patients.items() if list(patients.values()).count(patient) > 1)
    if not shared:
        return None
    _LOG.warning("cross-validation leaves out together the scans of one patient: %s", ", ".join(shared))
    return patients


def annotation_hash(labels: Annotation, organs: Sequence[OrganLabel]) -> str:
    """Return the hash of an annotation; the order of the organs has no effect."""
    return annotation_sha256(labels, [organ.label for organ in sorted(organs, key=lambda organ: organ.name)])


def identity_of(
    image: Path | Scan, volume: Volume, labels: Annotation, organs: Sequence[OrganLabel]
) -> SupportIdentity:
    """Return what identifies an annotated scan."""
    return SupportIdentity(case_of(image, labels), scan_sha256(volume), annotation_hash(labels, organs))


def read_image(image: Path | Scan) -> Volume:
    """Read the CT of a pair of CT and annotation, without its warnings."""
    return image.read() if isinstance(image, Scan) else read_scan(image)


def read_support_scan(image: Path | Scan, labels: Annotation) -> tuple[Volume, Annotation]:
    """Read the CT of an annotation, and log the warnings about it.

    Returns:
        The CT, and the annotation in the axis order of the CT.

    Raises:
        InputError: the CT cannot be read, or its lattice is not that of the annotation.
    """
    volume = read_image(image)
    for warning in volume.warnings:
        _LOG.warning("%s: %s", case_of(image, labels), warning)
    return volume, annotation_on(volume, labels)


def warn_of_adapter_without_hashes() -> None:
    """Log that an adapter file does not contain the hashes of the annotations of its support set."""
    _LOG.warning(
        "the adapter was made by an older version of fseft-edge: its support scans are recognised only by the volumes "
        "of their organs; train the adapter again, so that they are recognised by their annotations"
    )


def of_support_set(
    annotated: Sequence[AnnotatedScan],
    organs: Sequence[OrganLabel],
    volumes_ml: Sequence[Sequence[float]],
    hashes: Sequence[str] = (),
) -> list[AnnotatedScan]:
    """Return the annotated scans that belong to the support set of an adapter. The annotations identify these scans.

    The folder may also contain scans that are to be segmented. Their annotations must not influence their masks.

    Args:
        annotated: pairs of a CT and its annotation (see :func:`read_annotations`).
        organs: organs of the adapter.
        volumes_ml: volumes of each organ in the support set of the adapter (see :func:`annotated_volumes_ml`); they are
            used only if there are no hashes.
        hashes: hashes of the annotations of the support set (see :func:`annotation_hash`). Adapters of older versions
            have none.

    Raises:
        LabelError: no scan belongs to the support set of the adapter.
    """
    if not hashes:
        warn_of_adapter_without_hashes()
    members, wanted = [], Counter(hashes)
    for image, labels in annotated:
        if hashes:
            found = annotation_hash(labels, organs)
            is_member = wanted[found] > 0
            wanted[found] -= 1
        else:
            volumes = annotated_volumes_ml(labels, organs)
            is_member = all(volume in known for volume, known in zip(volumes, volumes_ml, strict=True) if volume)
        if is_member:
            members.append((image, labels))
        else:
            _LOG.warning("the case %s is skipped: it is not in the support set of the adapter", case_of(image, labels))
    if members and len(members) < len(hashes):
        _LOG.warning("only %d of the %d scans of the support set of the adapter were found", len(members), len(hashes))
    if not members:
        raise LabelError(
            "No scan of --support-images is in the support set of the adapter.",
            remedy="Give --support-images and --support-labels the unchanged scans and annotations that "
            "`fseft-edge adapt` used.",
        )
    return members


def annotated_volumes_ml(labels: Annotation, organs: Sequence[OrganLabel]) -> list[float]:
    """Return the volume of each organ in an annotation, rounded to 0.001 ml; 0 for an organ that is not annotated."""
    return [round(float(labels.mask(organ.label).sum()) * labels.voxel_volume_mm3 / 1000, 3) for organ in organs]


def load_support(
    annotated: Sequence[AnnotatedScan],
    organs: Sequence[OrganLabel],
    *,
    bundle: EncoderBundle,
    session: EncoderSession,
    store: FeatureStore,
    budget: Budget = AS_MUCH_AS_IS_FREE,
    variations: int | None = 0,
    seed: int = 0,
    part: PartialEncoding | None = None,
    progress: Progress | None = None,
) -> list[SupportScan]:
    """Encode annotated scans and the variations of each scan.

    Args:
        annotated: pairs of a CT and its annotation (see :func:`read_annotations`).
        organs: organs to use from the annotations.
        bundle: encoder bundle.
        session: open session of this encoder.
        store: store for the feature maps.
        budget: memory that encoding may use.
        variations: number of variations of each scan to encode; None means the number of
            :func:`fseft_edge.adaptation.augmentation.default_variations`.
        seed: seed for the variations and for the windows elsewhere.
        part: encode only a part of each scan; None encodes whole scans.
        progress: receiver of progress reports; None reports nothing.
    """

    def encoded(volume: Volume, grid: Grid) -> EncodedScan:
        return encode_scan(volume, bundle=bundle, session=session, store=store, budget=budget, grid=grid)

    support: list[SupportScan] = []
    with (progress or SilentProgress()).task("encode", len(annotated)) as task:
        for index, (image, stored) in enumerate(annotated):
            volume, label_map = read_support_scan(image, stored)
            grid = Grid.of(volume, bundle.preprocessing)
            identity = identity_of(image, volume, label_map, organs)
            if part is None:
                scan = support_scan(volume, encoded(volume, grid), label_map, organs, identity)
            else:
                on_demand = encode_on_demand(
                    volume, bundle=bundle, session=session, store=store, budget=budget, grid=grid
                )
                scan = support_scan(volume, on_demand, label_map, organs, identity)
                random = np.random.default_rng([seed, index])
                scan = replace(scan, region=part.encode(scan, random), located=part.located[index])
            count = variations
            if count is None:
                count = default_variations(len(annotated), layout_of(grid, bundle).windows)
            if min(grid.shape) < 2:  # a variation would be too thin for a scan
                count = 0
            varied: list[SupportScan] = []
            for number in range(count):
                random = np.random.default_rng([seed, number])
                masks = _masks(label_map, organs)
                variation = vary(volume, grid, masks, margin=min(bundle.window) // 2, random=random)
                whole = Grid.of(variation.volume, bundle.preprocessing.model_copy(update={"crop_below_hu": None}))
                features = encoded(variation.volume, whole).features
                occupancy = Occupancy(share / np.float32(255) for share in variation.shares)
                varied.append(
                    replace(
                        scan,
                        features=features,
                        shape=whole.shape,
                        occupancy=occupancy,
                        grid=whole,
                        region=(),  # the boxes of the scan are not on the grid of its variation
                        located=None,
                    )
                )
            support.append(replace(scan, variations=tuple(varied)))
            task.advance(1)
    return support


def _masks(labels: Annotation, organs: Sequence[OrganLabel]) -> Iterator[NDArray[np.bool_]]:
    """Yield the mask of each organ. Only one mask is in memory at a time, because masks of large scans are large."""
    return (labels.mask(organ.label) for organ in organs)


def support_scan(
    volume: Volume,
    encoded: EncodedScan,
    labels: Annotation,
    organs: Sequence[OrganLabel],
    identity: SupportIdentity,
) -> SupportScan:
    """Return an encoded scan with its annotation on the grid."""
    values = [organ.label for organ in organs]
    voxels = [int(mask.sum()) for mask in _masks(labels, organs)]
    return SupportScan(
        features=encoded.features,
        shape=encoded.grid.shape,
        occupancy=Occupancy(encoded.grid.occupancy(labels.shares(organ.label)) for organ in organs),
        annotated=np.array([count > 0 for count in voxels]),
        volumes_mm3=tuple(count * labels.voxel_volume_mm3 for count in voxels),
        grid=encoded.grid,
        reference=(labels, tuple(values)),
        hu=tuple(hu_percentiles(volume, BoxedMask.of(mask)) for mask in _masks(labels, organs)),
        identity=identity,
    )
