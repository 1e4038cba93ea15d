"""Adaptation to the organs of a hospital: from annotated scans to an adapter file."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Final, Literal

from torch import Tensor

from fseft_edge.adaptation.block_sampling import SupportScan
from fseft_edge.adaptation.cross_validation import (
    Candidate,
    Validated,
    best_of,
    can_validate,
    candidates,
    cross_validate,
)
from fseft_edge.adaptation.locator import (
    CoarseScan,
    TrainedLocator,
    is_worthwhile,
    open_coarse_encoder,
    train_locator,
)
from fseft_edge.adaptation.partial_encoding import PartialEncoding
from fseft_edge.adaptation.patients import Grouping, GroupRule, SupportIdentity, grouped
from fseft_edge.adaptation.size_priors import SizePrior
from fseft_edge.adaptation.size_threshold import expected_range
from fseft_edge.adaptation.support_set import (
    AnnotatedScan,
    GivenAnnotations,
    GivenScans,
    find_annotated,
    identity_of,
    load_support,
    patients_of,
    read_image,
    support_scan,
)
from fseft_edge.adaptation.training import TrainedAdapter, TrainingSettings
from fseft_edge.adapters.file import (
    AdapterDescription,
    AdapterFile,
    AdapterOrgan,
    Locator,
    PostProcessing,
    schema_version_of,
    stored_settings,
    write_adapter,
)
from fseft_edge.adapters.network import Adapter, AdapterSettings, zero_shot
from fseft_edge.export.built_in import open_encoder
from fseft_edge.masks.region import read_by
from fseft_edge.outbox.accepted_masks import ReviewedBatch
from fseft_edge.runtime.encoder.bundle import EncoderBundle, Precision
from fseft_edge.runtime.encoder.encoding import layout_of
from fseft_edge.runtime.encoder.feature_store import FeatureStore, open_store
from fseft_edge.runtime.encoder.on_demand import FeaturesOnDemand
from fseft_edge.runtime.encoder.session import open_session
from fseft_edge.runtime.errors import LabelError
from fseft_edge.runtime.scans.annotated import AnnotationSettings
from fseft_edge.runtime.scans.annotation import annotation_on
from fseft_edge.runtime.scans.grid import Grid
from fseft_edge.runtime.scans.intensities import HuPercentiles
from fseft_edge.runtime.scans.organs import GivenOrgans, OrganLabel, organs_of
from fseft_edge.runtime.system.atomic import check_writable
from fseft_edge.runtime.system.memory import Budget
from fseft_edge.runtime.system.progress import Progress, SilentProgress

_LOG = logging.getLogger(__name__)

# With a lower mean DSC on left-out scans, an adapter did not learn an organ.
_NOT_LEARNED = 0.1

WINDOWS_ELSEWHERE: Final = 2
"""Default number of windows of a support scan that are encoded in addition to those around the organs."""


def adapt(
    encoder: str | Path,
    images: GivenScans | None,
    labels: GivenAnnotations | None,
    organs: GivenOrgans,
    output: str | Path | None = None,
    *,
    reviewed: ReviewedBatch | None = None,
    settings: AdapterSettings | None = None,
    training: TrainingSettings | None = None,
    choose: bool = False,
    validate: bool = True,
    cases: Sequence[str] | None = None,
    groups: GroupRule | None = None,
    structure_set: str | None = None,
    interpolate: bool = True,
    cache: str | Path | None = None,
    cache_gb: float | None = 50.0,
    device: str = "auto",
    backend: str = "auto",
    precision: Precision | Literal["auto"] = "auto",
    memory_gb: float | None = None,
    vram_gb: float | None = None,
    whole_scan: bool = False,
    windows_elsewhere: int = WINDOWS_ELSEWHERE,
    progress: Progress | None = None,
) -> AdapterFile:
    """Train an adapter on annotated scans and write the adapter file.

    Args:
        encoder: encoder bundle, or the name of a built-in encoder.
        images: folder of CTs, or one CT; or a list of CTs: paths of image files or DICOM series, NIfTI images of
            nibabel, or ``Volume`` objects. None together with ``labels`` if all scans come from ``reviewed``.
        labels: folder of annotations, or one annotation (see :mod:`fseft_edge.runtime.scans.annotated`). For a list of
            CTs, a list of their annotations in the same order.
        organs: organs to train, with their label values in the annotations, such as ``{"liver": 1}``, or their names
            there, such as ``{"parotid_left": "Parotid L|PAROTID LT"}`` (see
            :func:`fseft_edge.runtime.scans.organs.organs_of`). A scan whose annotation does not contain an organ is not
            annotated for that organ.
        output: adapter file to write, ``NAME.adapter``; None writes no file.
        reviewed: reviewed batch whose accepted masks are used as annotations; organs are matched by name.
        settings: kind of adapter; the default is the method ``spatial`` on all levels.
        training: training schedule and seed.
        choose: use the method and the levels with the best cross-validation result; of ``settings``, only
            ``activation`` and ``width`` are then used.
        validate: run a cross-validation (see :mod:`fseft_edge.adaptation.cross_validation`) and store its DSC values
            in the file. This takes about the time of one training per fold (at most ten). It needs an organ that is
            annotated in at least two scans, and of at least two patients if ``groups`` are given.
        cases: names of the cases of ``images`` to use; None uses all cases that have an annotation.
        groups: patient (or another group) of each case name, or of each CT of a list, or a pattern whose first capture
            group is the patient in a case name (see :func:`fseft_edge.adaptation.patients.groups_of`). Cross-validation
            leaves out all scans of a patient together. None means that each scan is of another patient. Copies of one
            scan are always left out together.
        structure_set: which structure set or segmentation of a CT to use, if there are several in DICOM (see
            :class:`fseft_edge.runtime.scans.annotated.AnnotationSettings`); None selects the newest approved one.
        interpolate: fill the slices between contours on every second or every n-th slice. If not, they stay empty.
        cache: folder of the feature cache; None keeps no feature maps.
        cache_gb: largest size of the cache in units of 1e9 bytes; the least recently used feature maps are deleted
            first. None sets no limit.
        device: device for encoding and training (see :func:`fseft_edge.runtime.encoder.session.open_session`).
        backend: inference engine (see :func:`fseft_edge.runtime.encoder.session.open_session`).
        precision: precision of the encoder (see :func:`fseft_edge.runtime.encoder.session.open_session`).
        memory_gb: memory that encoding may use, in units of 1e9 bytes; None means 90 % of the free memory. The limit
            does not apply to training.
        vram_gb: GPU memory that encoding may use, in units of 1e9 bytes; None means 90 % of the free GPU memory. The
            limit does not apply to training.
        whole_scan: encode whole scans, and train no locator.
        windows_elsewhere: for an encoder with many windows, only the windows around the organs are encoded, and up to
            this number of further windows of each scan, at random places.
        progress: receiver of progress reports; None reports nothing.

    Raises:
        UsageError: ``output`` is a folder, no annotated scans are given, no mask of ``reviewed`` was accepted, or
            ``groups`` do not match the cases.
        OutOfMemoryError: the budget is too small to encode a scan.
        OutOfSpaceError: ``output`` cannot be written.
        InputError: an image or an annotation is not usable.
        LabelError: no case is annotated for one of the organs.
    """
    progress = progress or SilentProgress()
    settings = settings or AdapterSettings()
    budget = Budget.of(memory_gb, vram_gb)
    organs = organs_of(organs)
    if output is not None:
        check_writable(Path(output))
    bundle = open_encoder(encoder)
    annotated = find_annotated(
        images,
        labels,
        organs,
        settings,
        cases=cases,
        reviewed=reviewed,
        reading=AnnotationSettings(structure_set, interpolate),
    )
    patients = patients_of(annotated, groups, images=images, reviewed=reviewed)
    with ExitStack() as stack:
        store = stack.enter_context(open_store(None if cache is None else Path(cache), cache_gb))
        located = None
        reading = Adapter(settings, bundle.levels, len(organs))
        if not whole_scan and bundle.whole_scan is None:
            located = _located(
                annotated,
                organs,
                bundle=bundle,
                reading=reading,
                device=device,
                store=store,
                budget=budget,
                training=training or TrainingSettings(),
                patients=patients,
                progress=progress,
            )
        session = stack.enter_context(open_session(bundle, device=device, backend=backend, precision=precision))
        training = replace(training or TrainingSettings(), device=session.device)
        support = load_support(
            annotated,
            organs,
            bundle=bundle,
            session=session,
            store=store,
            budget=budget,
            variations=training.variations,
            seed=training.seed,
            part=None if located is None else PartialEncoding(reading, windows_elsewhere, located.left_out),
            progress=progress,
        )
        if located:
            _log_windows(support)
        rows = head_rows(bundle, organs)
        candidate = Candidate(settings.name, settings, training)
        validated: Validated | None = None
        grouping = grouped([scan.identity for scan in support if scan.identity], patients)
        numbers = grouping.numbers
        if (choose or validate) and not can_validate([scan.annotated for scan in support], numbers):
            _LOG.warning(
                "no organ is annotated in %s: cross-validation is not possible; the adapter is made with the method %s",
                grouping.two,
                candidate.name,
            )
        elif choose:
            validated, finalists = best_of(
                candidates(training, settings, rows), support, rows, groups=numbers, progress=progress
            )
            candidate = validated.candidate
            for result in finalists:
                _LOG.info("%s: DSC %.3f", result.candidate.name, result.mean)
        elif validate:
            validated = cross_validate(candidate, support, rows, groups=numbers, progress=progress)
        trained = candidate.make(support, rows, progress)
        file = describe(
            trained,
            support,
            organs,
            bundle=bundle,
            seed=training.seed,
            validated=validated,
            grouping=grouping,
            locator=None if located is None else located.locator,
            windows_elsewhere=None if located is None else windows_elsewhere,
        )
    if output is not None:
        write_adapter(Path(output), file)
    warn_of_organs_not_learned(file.description.organs)
    return file


def _located(
    annotated: Sequence[AnnotatedScan],
    organs: Sequence[OrganLabel],
    *,
    bundle: EncoderBundle,
    reading: Adapter,
    device: str,
    store: FeatureStore,
    budget: Budget,
    training: TrainingSettings,
    patients: Mapping[str, str] | None,
    progress: Progress,
) -> TrainedLocator | None:
    """Return a locator that was trained on the scans; None if whole scans are encoded."""
    grids = [Grid.of(read_image(image), bundle.preprocessing) for image, _ in annotated]
    layouts = [layout_of(grid, bundle) for grid in grids]
    if not any(is_worthwhile(bundle, layout.windows) for layout in layouts):
        return None
    with open_coarse_encoder(device) as coarse:
        scans = []
        with progress.task("encode for the locator", len(annotated)) as task:
            for (image, stored), grid, layout in zip(annotated, grids, layouts, strict=True):
                volume = read_image(image)
                labels = annotation_on(volume, stored)
                identity = identity_of(image, volume, labels, organs)
                scan = support_scan(volume, coarse.encode(volume, store, budget), labels, organs, identity)
                scans.append(CoarseScan(scan, grid, layout))
                task.advance(1)
        return train_locator(
            scans,
            [organ.name for organ in organs],
            head_rows(coarse.bundle, organs),
            coarse=coarse.bundle,
            reach=lambda box: read_by([reading], box),
            groups=grouped([scan.scan.identity for scan in scans if scan.scan.identity], patients).numbers,
            training=replace(training, device=coarse.session.device),
            progress=progress,
        )


def _log_windows(support: Sequence[SupportScan]) -> None:
    """Log how many windows of the support scans the training uses."""
    maps = [scan.features for scan in support if isinstance(scan.features, FeaturesOnDemand)]
    _LOG.info(
        "training uses %d of %d windows of the support scans, those around the organs and some elsewhere",
        sum(features.asked for features in maps),
        sum(features.windows for features in maps),
    )


def warn_of_organs_not_learned(organs: Sequence[AdapterOrgan]) -> None:
    """Log a warning for each organ that was hardly found in the left-out scans of the cross-validation."""
    for organ in organs:
        scores = organ.left_out_dsc
        if scores and sum(scores) / len(scores) < _NOT_LEARNED:
            _LOG.warning(
                "the organ %s was not learned: its mean DSC on left-out scans is %.2f, without any overlap in %d of %d "
                "scans; check the label value of the organ (--organ) and the annotations, or choose another --method",
                organ.name,
                sum(scores) / len(scores),
                sum(score == 0 for score in scores),
                len(scores),
            )


def head_rows(bundle: EncoderBundle, organs: Sequence[OrganLabel]) -> list[tuple[Tensor, float] | None]:
    """Return weight ``[C_0]`` and bias of each organ in the head of the encoder; None for a novel organ."""
    weight, bias = bundle.head_weight(), bundle.head_bias()
    known = {name: row for row, name in enumerate(bundle.manifest.organs)}
    return [
        (weight[known[organ.name]], float(bias[known[organ.name]])) if organ.name in known else None for organ in organs
    ]


def zero_shot_adapter(bundle: EncoderBundle, organs: Sequence[OrganLabel]) -> AdapterFile:
    """Return the classifiers of the encoder's head as an adapter, without training.

    Args:
        bundle: encoder bundle.
        organs: organs that the head of the encoder knows.

    Raises:
        LabelError: the head does not know one of the organs.
    """
    rows = head_rows(bundle, organs)
    unknown = [organ.name for organ, row in zip(organs, rows, strict=True) if row is None]
    if unknown:
        raise LabelError(
            f"The encoder {bundle.manifest.name} has no classifier for {', '.join(unknown)}; it has classifiers for "
            f"{', '.join(bundle.manifest.organs) or 'no organ'}.",
            remedy="Train an adapter for these organs with `fseft-edge adapt`.",
        )
    trained = TrainedAdapter(zero_shot(bundle.levels, rows), (), 0, bfloat16=False)
    return describe(trained, [], organs, bundle=bundle, seed=0)


def describe(
    trained: TrainedAdapter,
    support: Sequence[SupportScan],
    organs: Sequence[OrganLabel],
    *,
    bundle: EncoderBundle,
    seed: int,
    validated: Validated | None = None,
    grouping: Grouping | None = None,
    locator: Locator | None = None,
    windows_elsewhere: int | None = None,
) -> AdapterFile:
    """Return a trained adapter together with the description for its file.

    Args:
        trained: the trained adapter.
        support: the scans that the adapter was trained on.
        organs: organs of the adapter.
        bundle: encoder bundle.
        seed: seed for all random choices of the training.
        validated: result of the cross-validation; None without validation.
        grouping: groups of the support scans; None if they are not known.
        locator: the locator of the adapter; None for an adapter of whole scans.
        windows_elsewhere: see :class:`AdapterDescription`.
    """
    volumes = [
        tuple(round(scan.volumes_mm3[k] / 1000, 3) for scan in support if scan.annotated[k]) for k in range(len(organs))
    ]
    hu = [tuple(values for scan in support if (values := scan.hu[k])) for k in range(len(organs))]
    located_by = None if locator is None else locator.description
    described = describe_organs(
        organs,
        volumes,
        hu,
        left_out=validated.dsc if validated else None,
        post_processing=validated.post_processing if validated else None,
        follows_size=validated.follows_size if validated else None,
    )
    description = AdapterDescription(
        schema_version=schema_version_of(described, windows_elsewhere, located_by),
        support_annotations=annotations_of([scan.identity for scan in support]),
        support_groups=grouping.stored_count if grouping else None,
        encoder_id=bundle.encoder_id,
        encoder_name=bundle.manifest.name,
        levels=tuple((level.stride, level.channels) for level in bundle.levels),
        settings=stored_settings(trained.adapter.settings),
        organs=described,
        shots=len(support),
        seed=seed,
        steps=trained.steps,
        bfloat16=trained.bfloat16,
        losses=tuple(round(loss, 6) for loss in trained.losses),
        windows_elsewhere=windows_elsewhere,
        locator=located_by,
    )
    return AdapterFile(description, trained.adapter, locator=locator)


def annotations_of(support: Sequence[SupportIdentity | None]) -> tuple[str, ...]:
    """Return the hashes of the annotations of support scans; an empty tuple if they are not known."""
    return tuple(scan.annotation for scan in support if scan is not None)


def describe_organs(
    organs: Sequence[OrganLabel],
    volumes_ml: Sequence[tuple[float, ...]],
    hu: Sequence[tuple[HuPercentiles, ...]],
    *,
    left_out: Sequence[Sequence[float]] | None,
    post_processing: Sequence[PostProcessing] | None,
    follows_size: Sequence[bool] | None = None,
) -> tuple[AdapterOrgan, ...]:
    """Return the metadata of each organ of an adapter.

    Args:
        organs: organs of the adapter.
        volumes_ml: for each organ, its volume in every support scan that annotates it.
        hu: for each organ, its HU percentiles in every support scan that annotates it.
        left_out: for each organ, DSC values of the cross-validation, including ``post_processing`` and the moved
            threshold; None without validation.
        post_processing: for each organ, the post-processing of its masks; None means no post-processing.
        follows_size: for each organ, whether its threshold is moved towards its expected size
            (:mod:`fseft_edge.adaptation.size_threshold`); None means that none is moved.
    """
    left_out = left_out or [()] * len(organs)
    post_processing = post_processing or [PostProcessing()] * len(organs)
    follows_size = follows_size or [False] * len(organs)
    return tuple(
        AdapterOrgan(
            name=organ.name,
            label=organ.label,
            support_volumes_ml=volume,
            left_out_dsc=tuple(round(score, 4) for score in scores),
            post_processing=steps,
            support_hu=percentiles,
            annotation_names=organ.names,
            in_label_maps=organ.in_label_maps,
            expected_ml=_ends(expected_range(volume)) if follows else None,
        )
        for organ, volume, percentiles, scores, steps, follows in zip(
            organs, volumes_ml, hu, left_out, post_processing, follows_size, strict=True
        )
    )


def _ends(prior: SizePrior | None) -> tuple[float, float] | None:
    return None if prior is None else (round(prior.low_ml, 3), round(prior.high_ml, 3))
