"""Fine-tuning with the annotated scans of a site: the result is a tuning file."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from fseft_edge.adaptation.adapt import annotations_of, describe_organs, head_rows, warn_of_organs_not_learned
from fseft_edge.adaptation.cross_validation import OrganScores, can_validate, folds
from fseft_edge.adaptation.patients import Grouping, GroupRule, SupportIdentity, grouped
from fseft_edge.adaptation.support_set import (
    AnnotatedScan,
    GivenAnnotations,
    GivenScans,
    annotated_volumes_ml,
    find_annotated,
    identity_of,
    patients_of,
    read_image,
    read_support_scan,
)
from fseft_edge.adapters.file import STORED_LEVELS, PostProcessing
from fseft_edge.adapters.network import AdapterSettings, HeadRows
from fseft_edge.export.built_in import open_encoder
from fseft_edge.finetuning.merging import plain_bundle
from fseft_edge.finetuning.settings import TuningSettings
from fseft_edge.finetuning.training import FineTuned, fine_tune
from fseft_edge.finetuning.tuning_file import SUFFIX, TuningDescription, TuningFile, write_tuning
from fseft_edge.finetuning.unfreezing import unfreeze
from fseft_edge.masks.prediction import segment_encoded
from fseft_edge.outbox.accepted_masks import ReviewedBatch
from fseft_edge.pretraining.config import MOST_ORGANS
from fseft_edge.pretraining.training_cases import TrainingCase, prepare_case
from fseft_edge.runtime.encoder.bundle import EncoderBundle
from fseft_edge.runtime.encoder.encoding import encode_scan
from fseft_edge.runtime.encoder.feature_store import open_store
from fseft_edge.runtime.encoder.session import open_session, resolve_device
from fseft_edge.runtime.errors import UsageError
from fseft_edge.runtime.scans.annotated import AnnotationSettings
from fseft_edge.runtime.scans.components import BoxedMask
from fseft_edge.runtime.scans.intensities import HuPercentiles, hu_percentiles
from fseft_edge.runtime.scans.organs import GivenOrgans, OrganLabel, organs_of
from fseft_edge.runtime.system.atomic import check_writable
from fseft_edge.runtime.system.progress import Progress, SilentProgress

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class TuningSupport:
    """A support set for fine-tuning.

    Attributes:
        annotated: path of each CT, with its annotation.
        cases: the annotated scans on the encoder's grid.
        organs: the organs to segment.
        rows: for each organ, its classifier in the encoder's head, or None.
        bundle: the encoder bundle.
        volumes_ml: for each scan, the volume of each organ in ml; 0 for an organ that is not annotated.
        hu: for each scan, the HU percentiles of each organ; None for an organ that is not annotated.
        identities: case name and hashes of each scan and its annotation.
        groups: groups of the scans; cross-validation leaves out a group as a whole.
    """

    annotated: Sequence[AnnotatedScan]
    cases: Sequence[TrainingCase]
    organs: Sequence[OrganLabel]
    rows: HeadRows
    bundle: EncoderBundle
    volumes_ml: Sequence[Sequence[float]]
    hu: Sequence[Sequence[HuPercentiles | None]]
    identities: Sequence[SupportIdentity]
    groups: Grouping

    def tuned(
        self, settings: TuningSettings, among: Sequence[int], progress: Progress, *, seconds: float | None = None
    ) -> FineTuned:
        """Return the encoder after fine-tuning on the scans with the indices ``among`` (see :func:`fine_tune`)."""
        return fine_tune(
            self.bundle.network(),
            [self.cases[index] for index in among],
            self.rows,
            settings,
            preprocessing=self.bundle.preprocessing,
            window=self.bundle.window,
            seconds=seconds,
            progress=progress,
        )


def finetune(
    encoder: str | Path,
    images: GivenScans | None,
    labels: GivenAnnotations | None,
    organs: GivenOrgans,
    output: str | Path,
    *,
    settings: TuningSettings,
    reviewed: ReviewedBatch | None = None,
    validate: bool = False,
    cases: Sequence[str] | None = None,
    groups: GroupRule | None = None,
    structure_set: str | None = None,
    interpolate: bool = True,
    device: str = "auto",
    progress: Progress | None = None,
) -> TuningFile:
    """Fine-tune an encoder on annotated scans and write a tuning.

    Args:
        encoder: encoder bundle, which is not changed, or the name of a built-in encoder.
        images: folder of CTs, one CT, or a list of CTs (see :func:`fseft_edge.adaptation.adapt.adapt`); None together
            with ``labels`` if ``reviewed`` contains all scans.
        labels: folder of annotations, one annotation, or a list of the annotations of the CTs.
        organs: organs to segment, at most 31. A scan without voxels of an organ counts as not annotated for this organ.
        output: path of the tuning file, ``NAME.tuning``.
        settings: settings of the fine-tuning.
        reviewed: a batch whose accepted masks are used as annotations, too; None for no batch.
        validate: True performs cross-validation (see :func:`fseft_edge.adaptation.cross_validation.folds`) and stores
            the scores of the left-out scans in the file. Each fold takes as long as the fine-tuning itself.
        cases: names of the cases of ``images`` to use; None uses all cases with an annotation.
        groups: patient of each case (see :func:`fseft_edge.adaptation.adapt.adapt`), for the cross-validation.
        structure_set: which structure set or segmentation of a CT to use, if there are several in DICOM (see
            :class:`fseft_edge.runtime.scans.annotated.AnnotationSettings`); None selects the newest approved one.
        interpolate: fill the slices between contours on every second or every n-th slice. If not, they stay empty.
        device: device for training (see :func:`fseft_edge.runtime.encoder.session.open_session`).
        progress: display for the progress; None shows nothing.

    Raises:
        UsageError: the method cannot be used with the encoder, there are too many organs, there are no annotated
            scans, or ``output`` is a folder or does not end in ``.tuning``.
        OutOfSpaceError: ``output`` cannot be written.
        InputError: an image or an annotation cannot be used.
        LabelError: an organ is not annotated in any case.
    """
    progress = progress or SilentProgress()
    organs, output = organs_of(organs), Path(output)
    check_output(output)
    bundle = open_encoder(encoder)
    check_tunable(bundle, organs, settings)
    annotated = find_annotated(
        images,
        labels,
        organs,
        AdapterSettings(),
        cases=cases,
        reviewed=reviewed,
        reading=AnnotationSettings(structure_set, interpolate),
    )
    patients = patients_of(annotated, groups, images=images, reviewed=reviewed)
    settings = replace(settings, device=resolve_device(device))
    support = load_tuning_support(annotated, organs, bundle, progress, patients)
    scores = OrganScores(len(organs))
    if validate and can_validate([case.task_mask for case in support.cases], support.groups.numbers):
        scores = cross_validate(support, settings, progress)
    elif validate:
        _LOG.warning("no organ is annotated in %s: cross-validation is not possible", support.groups.two)
    tuned = support.tuned(settings, range(len(annotated)), progress)
    file = describe_tuning(tuned, support, settings, *scores.summary())
    write_tuning(output, file)
    warn_of_organs_not_learned(file.description.organs)
    return file


def check_output(output: Path) -> None:
    """Raise an error if a tuning cannot be written to this path.

    Raises:
        UsageError: the name does not end in ``.tuning``, or is the name of a folder.
        OutOfSpaceError: the file cannot be written.
    """
    if output.suffix != f".{SUFFIX}":
        raise UsageError(f"--output is {output}, which does not end in .tuning.", remedy="Set --output to NAME.tuning.")
    check_writable(output)


def check_tunable(bundle: EncoderBundle, organs: Sequence[OrganLabel], settings: TuningSettings) -> None:
    """Raise UsageError if an encoder cannot be fine-tuned with these settings; no scan is needed.

    Raises:
        UsageError: the method cannot be used with the encoder; the bundle contains only a graph; the encoder has parts
            with random weights that the settings do not train; or there are too many organs.
    """
    if len(organs) > MOST_ORGANS:
        raise UsageError(
            f"--organ names {len(organs)} organs; fine-tuning can train at most {MOST_ORGANS} organs at a time.",
            remedy="Name fewer organs with --organ.",
        )
    if bundle.graph_only:
        raise UsageError(
            f"{bundle.path} contains only the ONNX graph of its network, and a graph cannot be fine-tuned.",
            remedy="Fine-tune the network with its own code and export it again, or train an adapter with "
            "`fseft-edge adapt`.",
        )
    network = bundle.network()
    unfreeze(network, settings)
    left = [
        part
        for part in bundle.manifest.untrained
        if not all(parameter.requires_grad for parameter in network.get_submodule(part).parameters())
    ]
    if left:
        raise UsageError(
            f"The parts {', '.join(left)} of {bundle.path} have random weights, which --method {settings.method} with "
            f"--decoder {settings.of_decoder} does not train.",
            remedy="Add --decoder new.",
        )


def load_tuning_support(
    annotated: Sequence[AnnotatedScan],
    organs: Sequence[OrganLabel],
    bundle: EncoderBundle,
    progress: Progress,
    patients: Mapping[str, str] | None = None,
) -> TuningSupport:
    """Return annotated scans as a support set on an encoder's grid.

    Args:
        annotated: path of each CT, with its annotation.
        organs: the organs to segment.
        bundle: the encoder bundle.
        progress: display for the progress.
        patients: patient of each case; None if the patients are not known.

    Raises:
        InputError: a CT cannot be read, or its annotation has another lattice.
    """
    label_values = {organ.name: organ.label for organ in organs}
    prepared, looks, identities, ordered = [], [], [], []
    with progress.task("read", len(annotated)) as task:
        for image, stored in annotated:
            volume, labels = read_support_scan(image, stored)
            ordered.append((image, labels))
            identities.append(identity_of(image, volume, labels, organs))
            prepared.append(
                prepare_case(volume, labels, label_values, list(label_values), bundle.preprocessing, partial=True)
            )
            looks.append([hu_percentiles(volume, BoxedMask.of(labels.mask(organ.label))) for organ in organs])
            task.advance(1)
    volumes = [annotated_volumes_ml(labels, organs) for _, labels in annotated]
    groups = grouped(identities, patients)
    rows = head_rows(bundle, organs)
    return TuningSupport(ordered, prepared, organs, rows, bundle, volumes, looks, identities, groups)


def cross_validate(support: TuningSupport, settings: TuningSettings, progress: Progress) -> OrganScores:
    """Return the scores of a cross-validation in which every group of scans is left out once."""
    scores = OrganScores(len(support.organs))
    groups = folds(support.groups.numbers)
    with progress.task(f"validate {settings.name}", len(groups)) as task:
        for left_out in groups:
            add_fold(scores, support, settings, left_out)
            task.advance(1)
    return scores


def add_fold(
    scores: OrganScores,
    support: TuningSupport,
    settings: TuningSettings,
    left_out: Sequence[int],
    *,
    seconds: float | None = None,
) -> None:
    """Fine-tune without some scans, segment these scans on their own lattices, and add their scores.

    Args:
        scores: receives the scores.
        support: the support set.
        settings: settings of the fine-tuning.
        left_out: indices of the left-out scans; if no organ is annotated both in these scans and in the other scans,
            nothing is done.
        seconds: time limit of the fine-tuning in seconds (see :func:`fseft_edge.finetuning.training.fine_tune`); None
            for no limit.
    """
    others = [index for index in range(len(support.cases)) if index not in left_out]
    known = np.any([support.cases[index].task_mask for index in others], axis=0)
    if not any((support.cases[index].task_mask & known).any() for index in left_out):
        return
    tuned = support.tuned(settings, others, SilentProgress(), seconds=seconds)
    values = [organ.label for organ in support.organs]
    with tempfile.TemporaryDirectory(prefix="fseft-edge-") as folder:
        bundle = plain_bundle(tuned.network, support.bundle, settings, Path(folder) / "fold.encoder")
        with open_session(bundle, str(settings.device), "torch") as session, open_store(None, None) as store:
            for index in left_out:
                image, labels = support.annotated[index]
                encoded = encode_scan(read_image(image), bundle=bundle, session=session, store=store)
                mask = segment_encoded(encoded, [tuned.network.head])
                scores.add(mask, labels, values, support.cases[index].task_mask & known)


def describe_tuning(
    tuned: FineTuned,
    support: TuningSupport,
    settings: TuningSettings,
    left_out: Sequence[Sequence[float]],
    post_processing: Sequence[PostProcessing],
) -> TuningFile:
    """Return the trained tensors with their description, as the content of a tuning file."""
    count = len(support.organs)
    description = TuningDescription(
        support_annotations=annotations_of(support.identities),
        support_groups=support.groups.stored_count,
        encoder_id=support.bundle.encoder_id,
        encoder_name=support.bundle.manifest.name,
        method=settings.method,
        decoder=settings.of_decoder,
        reads=STORED_LEVELS[settings.levels],
        rank=settings.rank,
        organs=describe_organs(
            support.organs,
            [
                tuple(
                    volumes[k]
                    for volumes, scan in zip(support.volumes_ml, support.cases, strict=True)
                    if scan.task_mask[k]
                )
                for k in range(count)
            ],
            [tuple(look for of_scan in support.hu if (look := of_scan[k]) is not None) for k in range(count)],
            left_out=left_out,
            post_processing=post_processing,
        ),
        shots=len(support.cases),
        seed=settings.seed,
        steps=tuned.steps,
        parameters=tuned.parameters,
        losses=tuple(round(loss, 6) for loss in tuned.losses),
        bfloat16=tuned.bfloat16,
    )
    return TuningFile(description, tuned.network.learned())
