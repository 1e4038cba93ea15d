"""The choice between an adapter and fine-tuning, by cross-validation within a time limit."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from fseft_edge.adaptation.adapt import head_rows
from fseft_edge.adaptation.cross_validation import OrganScores, folds, mean_over_organs
from fseft_edge.adaptation.patients import GroupRule
from fseft_edge.adaptation.support_set import (
    GivenAnnotations,
    GivenScans,
    annotated_volumes_ml,
    annotation_hash,
    find_annotated,
    patients_of,
    warn_of_adapter_without_hashes,
)
from fseft_edge.adapters.file import AdapterFile, AdapterOrgan, read_adapter
from fseft_edge.adapters.network import AdapterSettings
from fseft_edge.export.built_in import open_encoder
from fseft_edge.finetuning.finetune import (
    TuningSupport,
    add_fold,
    check_output,
    check_tunable,
    describe_tuning,
    load_tuning_support,
)
from fseft_edge.finetuning.settings import TuningSettings
from fseft_edge.finetuning.training import DivergedError, OutOfTimeError
from fseft_edge.finetuning.tuning_file import TuningFile, write_tuning
from fseft_edge.outbox.accepted_masks import ReviewedBatch
from fseft_edge.runtime.encoder.bundle import EncoderBundle
from fseft_edge.runtime.encoder.networks.inserts import HasBlocks
from fseft_edge.runtime.encoder.session import resolve_device
from fseft_edge.runtime.errors import OutOfMemoryError, UsageError
from fseft_edge.runtime.scans.annotated import AnnotationSettings
from fseft_edge.runtime.scans.annotation import Annotation
from fseft_edge.runtime.scans.organs import GivenOrgans, OrganLabel, organs_of
from fseft_edge.runtime.system.progress import Progress, SilentProgress

_LOG = logging.getLogger(__name__)

# Fine-tuning is not tried if the adapter has at least this DSC on left-out scans for every new organ.
_GOOD_ENOUGH = 0.85

# A fine-tuned encoder can only be used for its own organs, and every scan must be encoded again with this encoder.
# Therefore its mean DSC must be higher by this value on organs that are new to the encoder, and must not be lower on
# all organs together.
_WORTHWHILE = 0.02

# A candidate whose mean DSC on new organs is lower than the adapter's by more than this value after two folds is
# rejected.
_HOPELESS = 0.05

_GIVES_UP = (DivergedError, OutOfMemoryError)


def try_finetuning(  # noqa: PLR0917 - the order of `finetune`, after the adapter to compare with
    adapter: str | Path,
    encoder: str | Path,
    images: GivenScans | None,
    labels: GivenAnnotations | None,
    organs: GivenOrgans,
    output: str | Path,
    *,
    minutes: float = 60.0,
    settings: TuningSettings | None = None,
    reviewed: ReviewedBatch | None = None,
    cases: Sequence[str] | None = None,
    groups: GroupRule | None = None,
    structure_set: str | None = None,
    interpolate: bool = True,
    device: str = "auto",
    progress: Progress | None = None,
) -> TuningFile | None:
    """Fine-tune the encoder and write a tuning if it is better than an adapter on left-out scans.

    Args:
        adapter: path of an adapter that ``adapt`` trained with this encoder, these scans and these organs, with
            cross-validation.
        encoder: encoder bundle, which is not changed, or the name of a built-in encoder.
        images: folder of CTs, one CT, or a list of CTs (see :func:`fseft_edge.adaptation.adapt.adapt`); None together
            with ``labels`` if ``reviewed`` contains all scans.
        labels: folder of annotations, one annotation, or a list of the annotations of the CTs.
        organs: organs to segment, at most 31.
        output: path of the tuning file, ``NAME.tuning``, which must not exist.
        minutes: time limit for all trials together, in minutes.
        settings: seed, number of steps and similar settings of all candidates; None means the defaults.
        reviewed: a batch whose accepted masks are used as annotations, too; None for no batch.
        cases: names of the cases of ``images`` to use; None uses all cases with an annotation.
        groups: patient of each case, as in the training of the adapter (see :func:`fseft_edge.adaptation.adapt.adapt`).
        structure_set: which structure set or segmentation of a CT to use, if there are several in DICOM (see
            :class:`fseft_edge.runtime.scans.annotated.AnnotationSettings`); None selects the newest approved one.
        interpolate: fill the slices between contours on every second or every n-th slice. If not, they stay empty.
        device: device for training (see :func:`fseft_edge.runtime.encoder.session.open_session`).
        progress: display for the progress; None shows nothing.

    Returns:
        The tuning, or None if no better candidate was found within the time limit.

    Raises:
        UsageError: the encoder cannot be fine-tuned, there are too many organs, ``output`` has a wrong name or exists,
            or the adapter was trained for other organs, with other scans, with other groups or without
            cross-validation.
        AdapterError: the adapter cannot be read, or was trained with another encoder.
        EncoderBundleError: the encoder bundle is damaged.
        InputError: an image or an annotation cannot be used.
    """
    deadline = time.monotonic() + 60 * minutes
    progress = progress or SilentProgress()
    organs, output = organs_of(organs), Path(output)
    common = replace(settings or TuningSettings("full"), device=resolve_device(device))
    check_output(output)
    if output.exists():
        raise UsageError(f"{output} already exists.", remedy="Choose another --output, or delete this file first.")
    bundle = open_encoder(encoder)
    candidates = default_candidates(bundle, common)
    for candidate in candidates:
        check_tunable(bundle, organs, candidate)
    file, of_adapter = _read_adapter(Path(adapter), bundle, organs)
    known = [row is not None for row in head_rows(bundle, organs)]
    obstacle = why_not(of_adapter, known)
    if obstacle is not None:
        _LOG.warning("fine-tuning was not tried: %s", obstacle)
        return None
    if not any(organ.left_out_dsc for organ, of in zip(of_adapter, known, strict=True) if not of):
        raise UsageError(
            f"{adapter} contains no scores of left-out scans for the organs that are new to the encoder.",
            remedy="Train the adapter with --validate on at least two scans that annotate these organs.",
        )
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
    label_maps = [label_map for _, label_map in annotated]
    if not _made_from(file, of_adapter, label_maps, organs):
        raise UsageError(
            f"{adapter} was not trained on these annotated scans: its annotations differ.",
            remedy="Give the scans and annotations of the adapter, or train the adapter again on these scans.",
        )
    support = load_tuning_support(annotated, organs, bundle, progress, patients)
    if support.groups.stored_count != file.description.support_groups:
        raise UsageError(
            f"The cross-validation of {adapter} left out {_groups_text(file.description.support_groups)}, but now "
            f"{_groups_text(support.groups.stored_count)} would be left out, so the scores cannot be compared.",
            remedy="Give the same --groups or --group-pattern as in the training of the adapter, or train it again.",
        )
    tuning = better_tuning(of_adapter, support, candidates, deadline=deadline, progress=progress)
    if tuning is not None:
        write_tuning(output, tuning)
    return tuning


def _groups_text(groups: int | None) -> str:
    return "single scans" if groups is None else f"{groups} groups of scans"


def _made_from(
    file: AdapterFile,
    of_adapter: Sequence[AdapterOrgan],
    annotations: Sequence[Annotation],
    organs: Sequence[OrganLabel],
) -> bool:
    """Return True if an adapter was trained on these annotations, in this order."""
    if file.description.support_annotations:
        return file.description.support_annotations == tuple(annotation_hash(labels, organs) for labels in annotations)
    warn_of_adapter_without_hashes()
    volumes = zip(*(annotated_volumes_ml(labels, organs) for labels in annotations), strict=True)
    return [organ.support_volumes_ml for organ in of_adapter] == [tuple(filter(None, of_organ)) for of_organ in volumes]


def _read_adapter(
    adapter: Path, bundle: EncoderBundle, organs: Sequence[OrganLabel]
) -> tuple[AdapterFile, list[AdapterOrgan]]:
    """Return an adapter, and its metadata for each of the organs, in their order.

    Raises:
        UsageError: the adapter has other organs.
        AdapterError: the adapter cannot be read, or was trained with another encoder.
    """
    file = read_adapter(adapter)
    file.check_encoder(bundle, path=adapter)
    found = {organ.name: organ for organ in file.description.organs}
    if found.keys() != {organ.name for organ in organs}:
        raise UsageError(
            f"{adapter} segments {', '.join(found)}, but --organ names {', '.join(organ.name for organ in organs)}.",
            remedy="Name the organs of the adapter with --organ.",
        )
    return file, [found[organ.name] for organ in organs]


def default_candidates(bundle: EncoderBundle, common: TuningSettings) -> list[TuningSettings]:
    """Return the candidates for an encoder, in order: first one that trains few parameters, then full fine-tuning.

    The first candidate is ``lora`` for a transformer, the best method in FSEFT (arXiv 2303.17051), and ``affine`` with
    a tuned decoder for other encoders. A decoder that was never trained is always trained from random weights.

    Args:
        bundle: the encoder bundle.
        common: seed, number of steps and similar settings of all candidates.
    """
    if not bundle.graph_only and isinstance(bundle.network(), HasBlocks):
        few = replace(common, method="lora", decoder="frozen")
    else:
        few = replace(common, method="affine", decoder="tuned")
    if bundle.manifest.untrained:
        few = replace(few, decoder="new")
    return [few, replace(common, method="full", decoder=None)]


def why_not(adapter: Sequence[AdapterOrgan], known: Sequence[bool]) -> str | None:
    """Return the reason why fine-tuning is not needed, or None if fine-tuning should be tried.

    Args:
        adapter: the organs of the adapter, with their scores on left-out scans.
        known: for each organ, True if the encoder's head has a classifier for this organ.
    """
    if all(known):
        return "the encoder already has a classifier for every organ"
    scores = [organ.left_out_dsc for organ, of in zip(adapter, known, strict=True) if not of]
    validated = [sum(of_organ) / len(of_organ) for of_organ in scores if of_organ]
    if validated and min(validated) >= _GOOD_ENOUGH:
        return f"the adapter has a DSC of at least {_GOOD_ENOUGH} for every organ that is new to the encoder"
    return None


def better_tuning(
    adapter: Sequence[AdapterOrgan],
    support: TuningSupport,
    candidates: Sequence[TuningSettings],
    *,
    deadline: float,
    progress: Progress | None = None,
) -> TuningFile | None:
    """Return the best fine-tuning that is better than an adapter on left-out scans, or None if there is none.

    Candidates are validated one after another. A candidate is stopped after a few steps if the time limit is too short
    for all its folds and the final training.

    Args:
        adapter: the organs of an adapter trained on this support set, with their scores on left-out scans.
        support: the support set.
        candidates: settings of the candidates, in the order of the trials.
        deadline: end of the time limit on the clock :func:`time.monotonic`, in seconds.
        progress: display for the progress; None shows nothing.
    """
    progress = progress or SilentProgress()
    adapters = _LeftOut([organ.left_out_dsc for organ in adapter], [row is None for row in support.rows])
    to_beat = adapters.of_new_organs + _WORTHWHILE
    best: _Validated | None = None
    for settings in candidates:
        reserved = best.longest_fold if best else 0.0
        validated = _validate(support, settings, adapters, deadline - reserved, progress)
        if validated is None:
            continue
        found = replace(adapters, dsc=validated.scores.summary()[0])
        if found.of_new_organs < to_beat or found.of_all < adapters.of_all:
            _LOG.warning(
                "%s was rejected: on left-out scans, the DSC of new organs is %.3f, at least %.3f is required; the DSC "
                "of all organs is %.3f, the adapter has %.3f",
                *(settings.name, found.of_new_organs, to_beat, found.of_all, adapters.of_all),
            )
            continue
        _LOG.info("%s: the DSC of new organs on left-out scans is %.3f", settings.name, found.of_new_organs)
        to_beat, best = found.of_new_organs, validated
    if best is None:
        return None
    try:
        tuned = support.tuned(best.settings, range(len(support.cases)), progress)
    except _GIVES_UP as error:
        _LOG.warning("%s was stopped: %s", best.settings.name, error.message)
        return None
    return describe_tuning(tuned, support, best.settings, *best.scores.summary())


@dataclass(frozen=True)
class _LeftOut:
    """Scores of left-out scans.

    Attributes:
        dsc: for each organ, the DSC of each left-out scan in the order of the folds.
        new: for each organ, True if the encoder's head has no classifier for this organ.
    """

    dsc: Sequence[Sequence[float]]
    new: Sequence[bool]

    @property
    def of_all(self) -> float:
        """Mean DSC over all organs."""
        return mean_over_organs(self.dsc)

    @property
    def of_new_organs(self) -> float:
        """Mean DSC over the organs that are new to the encoder."""
        return mean_over_organs([scores for scores, new in zip(self.dsc, self.new, strict=True) if new])


@dataclass(frozen=True)
class _Validated:
    """A candidate, its scores on left-out scans, and the duration of its slowest fold in seconds."""

    settings: TuningSettings
    scores: OrganScores
    longest_fold: float


def _validate(
    support: TuningSupport,
    settings: TuningSettings,
    adapters: _LeftOut,
    deadline: float,
    progress: Progress,
) -> _Validated | None:
    """Return a candidate with its scores on every left-out scan, or None if the candidate was stopped."""
    scores = OrganScores(len(support.organs))
    groups = folds(support.groups.numbers)
    longest = 0.0
    with progress.task(f"validate {settings.name}", len(groups)) as task:
        for number, left_out in enumerate(groups, start=1):
            begun = time.monotonic()
            trainings = len(groups) - number + 2  # this fold, the remaining folds and the final training
            share = (deadline - begun) / trainings
            try:
                if share < longest:
                    raise OutOfTimeError
                add_fold(scores, support, settings, left_out, seconds=share)
            except OutOfTimeError:
                _LOG.warning("%s was stopped: the time limit is too short for %d trainings", settings.name, trainings)
                return None
            except _GIVES_UP as error:
                _LOG.warning("%s was stopped: %s", settings.name, error.message)
                return None
            longest = max(longest, time.monotonic() - begun)
            task.advance(1)
            if number == 2 and _is_hopeless(scores, adapters):
                _LOG.warning(
                    "%s was stopped: its DSC on the first left-out scans is far lower than the adapter's", settings.name
                )
                return None
    return _Validated(settings, scores, longest)


def _is_hopeless(scores: OrganScores, adapters: _LeftOut) -> bool:
    """Return True if the DSC of new organs is much lower than the adapter's on the scans left out so far."""
    so_far = replace(adapters, dsc=scores.summary()[0])
    same_scans = [others[: len(own)] for own, others in zip(so_far.dsc, adapters.dsc, strict=True)]
    return replace(adapters, dsc=same_scans).of_new_organs - so_far.of_new_organs > _HOPELESS
