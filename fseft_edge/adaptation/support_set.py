"""Annotated scans: found on disk, checked, encoded, and laid on the grid."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fseft_edge.adaptation.augmentation import default_variations, vary
from fseft_edge.adaptation.block_sampling import SupportScan
from fseft_edge.adaptation.soft_labels import Occupancy
from fseft_edge.adapters.network import AdapterSettings
from fseft_edge.outbox.accepted_masks import ReviewedBatch, accepted_annotations
from fseft_edge.runtime.encoder.backends.base import EncoderSession
from fseft_edge.runtime.encoder.bundle import EncoderBundle
from fseft_edge.runtime.encoder.encoding import EncodedScan, encode_scan, layout_of
from fseft_edge.runtime.encoder.feature_store import FeatureStore
from fseft_edge.runtime.errors import LabelError, UnreadableFileError, UsageError
from fseft_edge.runtime.scans.grid import Grid
from fseft_edge.runtime.scans.intensities import hu_percentiles
from fseft_edge.runtime.scans.nifti import case_name, cases_by_name, read_label_map
from fseft_edge.runtime.scans.organs import OrganLabel
from fseft_edge.runtime.scans.sources import read_scan
from fseft_edge.runtime.scans.volume import LabelMap, Volume, check_labels_match
from fseft_edge.runtime.system.memory import AS_MUCH_AS_IS_FREE, Budget
from fseft_edge.runtime.system.progress import Progress, SilentProgress

_LOG = logging.getLogger(__name__)


def find_pairs(images: Path, labels: Path, cases: Sequence[str] | None = None) -> list[tuple[Path, Path]]:
    """Return each CT with its annotation.

    Args:
        images: folder of CTs, or one CT.
        labels: folder of annotations of the same file names, or one.
        cases: names of the cases wanted; None takes all that have an annotation.

    Raises:
        UnreadableFileError: there is none, or a case that was asked for lacks one of the two.
    """
    annotations, scans = cases_by_name(labels), cases_by_name(images)
    if images.is_file() and labels.is_file():
        return [(images, labels)]
    wanted = list(dict.fromkeys(cases)) if cases is not None else [name for name in scans if name in annotations]
    missing = [name for name in wanted if name not in scans or name not in annotations]
    if missing:
        raise UnreadableFileError(
            f"The cases {', '.join(missing)} lack an image in {images} or an annotation in {labels}.",
            remedy="An image and its annotation share their file name.",
        )
    if not wanted:
        raise UnreadableFileError(
            f"No image in {images} has an annotation of the same file name in {labels}.",
            remedy="Give each annotation its CT's file name.",
        )
    left_out = sorted(scans.keys() - annotations.keys())
    if cases is None and left_out:
        _LOG.warning("no annotation for %s: left out", ", ".join(left_out))
    return [(scans[name], annotations[name]) for name in wanted]


def find_annotated(
    images: Path | None,
    labels: Path | None,
    organs: Sequence[OrganLabel],
    settings: AdapterSettings,
    *,
    cases: Sequence[str] | None = None,
    reviewed: ReviewedBatch | None = None,
) -> list[tuple[Path, LabelMap]]:
    """Return each CT to learn from with its annotation read (see :func:`find_pairs` and :func:`read_annotations`).

    Args:
        images: folder of CTs, or one CT; None with ``labels`` where ``reviewed`` gives all scans.
        labels: folder of annotations of the same file names, or one.
        organs: what is to be learned.
        settings: of the adapter.
        cases: names of the cases of ``images`` to use; None takes all that have an annotation.
        reviewed: a batch whose accepted masks count as annotations too.

    Raises:
        UsageError: there is nothing to learn from, or no mask of ``reviewed`` was accepted.
        InputError: an annotation cannot be read, or does not serve.
    """
    if images is not None and labels is not None:
        pairs = find_pairs(images, labels, cases)
    elif images is None and labels is None and reviewed is not None:
        pairs = []
    else:
        raise UsageError(
            "There are no annotated scans to learn from.",
            remedy="Name their folders by --images and --labels, or a reviewed batch by --from-reviewed.",
        )
    accepted = accepted_annotations(reviewed, organs, [image for image, _ in pairs]) if reviewed else []
    return read_annotations(pairs, organs, labels, settings, reviewed=accepted)


def read_annotations(
    pairs: Sequence[tuple[Path, Path]],
    organs: Sequence[OrganLabel],
    labels: Path | None,
    settings: AdapterSettings,
    *,
    reviewed: Sequence[tuple[Path, LabelMap]] = (),
) -> list[tuple[Path, LabelMap]]:
    """Return each CT with its annotation read, having made sure that there is something to learn from.

    Args:
        pairs: CTs and annotation files, see :func:`find_pairs`.
        organs: what is to be learned.
        labels: the folder of the annotations, for messages; None where there are only reviewed masks.
        settings: of the adapter.
        reviewed: CTs with masks of a batch that were accepted; they come last.

    Raises:
        UnreadableFileError: an annotation cannot be read.
        LabelError: an organ is annotated in no case; with softmax, no case is annotated for all of them.
    """
    annotated = [*((image, read_label_map(annotation)) for image, annotation in pairs), *reviewed]
    present = [_labels_in(label_map, organs) for _, label_map in annotated]
    for organ in organs:
        # By the annotation's name: of a reviewed case it is the pseudonym.
        without = [
            case_name(label_map.source or image)
            for (image, label_map), values in zip(annotated, present, strict=True)
            if organ.label not in values
        ]
        if len(without) == len(annotated):
            raise LabelError(
                f"No annotation in {labels} contains the label {organ.label} ({organ.name})."
                if labels
                else f"No accepted mask holds the organ {organ.name}.",
                remedy="Check --organ NAME=ID: the number against the annotation files, the name against a batch's.",
            )
        if without:
            _LOG.warning("%s: label %d is missing in %s: not annotated there", organ.name, organ.label, without)
    if settings.activation == "softmax" and not any(
        all(organ.label in values for organ in organs) for values in present
    ):
        raise LabelError(
            "No scan is annotated for all the organs, so softmax never sees background.",
            remedy="Use --activation sigmoid, or annotate every organ in at least one scan.",
        )
    return annotated


def _labels_in(label_map: LabelMap, organs: Sequence[OrganLabel]) -> set[int]:
    return {organ.label for organ in organs if bool((label_map.array == organ.label).any())}


def of_support_set(
    annotated: Sequence[tuple[Path, LabelMap]], organs: Sequence[OrganLabel], volumes_ml: Sequence[Sequence[float]]
) -> list[tuple[Path, LabelMap]]:
    """Return those annotated scans that an adapter was made from, told by the volumes of their organs.

    Others that lie in the same folder may be those to segment, whose annotations must not help to segment them.

    Args:
        annotated: what :func:`read_annotations` found.
        organs: of the adapter.
        volumes_ml: each organ's volumes in the adapter's support set, as :func:`annotated_volumes_ml` gives them.

    Raises:
        LabelError: none of the scans was in the support set.
    """
    mine = []
    for image, labels in annotated:
        here = annotated_volumes_ml(labels, organs)
        if all(volume in known for volume, known in zip(here, volumes_ml, strict=True) if volume):
            mine.append((image, labels))
        else:
            _LOG.warning("%s was not in the adapter's support set: left out", case_name(image))
    if not mine:
        raise LabelError(
            "None of the annotated scans was in the adapter's support set.",
            remedy="Name by --support-images and --support-labels what adapt was given, unchanged.",
        )
    return mine


def annotated_volumes_ml(labels: LabelMap, organs: Sequence[OrganLabel]) -> list[float]:
    """Return each organ's volume in an annotation, to 0.001 ml; 0 where it is not annotated."""
    return [round(float((labels.array == organ.label).sum()) * labels.voxel_volume_mm3 / 1000, 3) for organ in organs]


def load_support(
    annotated: Sequence[tuple[Path, LabelMap]],
    organs: Sequence[OrganLabel],
    *,
    bundle: EncoderBundle,
    session: EncoderSession,
    store: FeatureStore,
    budget: Budget = AS_MUCH_AS_IS_FREE,
    variations: int | None = 0,
    seed: int = 0,
    progress: Progress | None = None,
) -> list[SupportScan]:
    """Encode annotated scans, and variations of each.

    Args:
        annotated: a CT and its annotation each, see :func:`read_annotations`.
        organs: what to take from the annotations.
        bundle: the encoder.
        session: the same encoder, opened.
        store: where feature maps are kept.
        budget: memory that encoding may take.
        variations: how many variations of each scan are encoded too; None leaves the number to
            :func:`fseft_edge.adaptation.augmentation.default_variations`.
        seed: of the variations.
        progress: where to show progress.
    """

    def encoded(volume: Volume, grid: Grid) -> EncodedScan:
        return encode_scan(volume, bundle=bundle, session=session, store=store, budget=budget, grid=grid)

    support: list[SupportScan] = []
    with (progress or SilentProgress()).task("encode", len(annotated)) as task:
        for image, label_map in annotated:
            volume = read_scan(image)
            check_labels_match(volume, label_map)
            grid = Grid.of(volume, bundle.preprocessing)
            scan = _support_scan(volume, encoded(volume, grid), label_map, organs)
            count = variations
            if count is None:
                count = default_variations(len(annotated), layout_of(grid, bundle).windows)
            if min(grid.shape) < 2:  # too thin to be a scan of its own
                count = 0
            varied: list[SupportScan] = []
            for number in range(count):
                random = np.random.default_rng([seed, number])
                masks = _masks(label_map, organs)
                variation = vary(volume, grid, masks, margin=min(bundle.window) // 2, random=random)
                whole = Grid.of(variation.volume, bundle.preprocessing.model_copy(update={"crop_below_hu": None}))
                features = encoded(variation.volume, whole).features
                occupancy = Occupancy(share / np.float32(255) for share in variation.shares)
                varied.append(replace(scan, features=features, shape=whole.shape, occupancy=occupancy, grid=whole))
            support.append(replace(scan, variations=tuple(varied)))
            task.advance(1)
    return support


def _masks(labels: LabelMap, organs: Sequence[OrganLabel]) -> Iterator[NDArray[np.bool_]]:
    """Yield each organ's mask; all at once are large where a scan is."""
    return (labels.array == organ.label for organ in organs)


def _support_scan(volume: Volume, encoded: EncodedScan, labels: LabelMap, organs: Sequence[OrganLabel]) -> SupportScan:
    """Return an annotated scan on the grid."""
    values = [organ.label for organ in organs]
    voxels = [int(mask.sum()) for mask in _masks(labels, organs)]
    return SupportScan(
        features=encoded.features,
        shape=encoded.grid.shape,
        occupancy=Occupancy(encoded.grid.occupancy(mask) for mask in _masks(labels, organs)),
        annotated=np.array([count > 0 for count in voxels]),
        volumes_mm3=tuple(count * labels.voxel_volume_mm3 for count in voxels),
        grid=encoded.grid,
        reference=(labels, tuple(values)),
        hu=tuple(hu_percentiles(volume, mask) for mask in _masks(labels, organs)),
    )
