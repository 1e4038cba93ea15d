"""Whether fine-tuning is worth it where an adapter alone falls short: decided on scans left out, within a time."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from fseft_edge.adaptation.adapt import head_rows
from fseft_edge.adaptation.cross_validation import OrganScores, folds, mean_over_organs
from fseft_edge.adaptation.support_set import find_annotated
from fseft_edge.adapters.file import AdapterFile
from fseft_edge.adapters.network import AdapterSettings
from fseft_edge.finetuning.finetune import TuningSupport, add_fold, check_tunable, describe_tuning, load_tuning_support
from fseft_edge.finetuning.settings import TuningSettings
from fseft_edge.finetuning.training import DivergedError, OutOfTimeError
from fseft_edge.finetuning.tuning_file import SUFFIX, TuningFile, write_tuning
from fseft_edge.outbox.accepted_masks import ReviewedBatch
from fseft_edge.runtime.encoder.bundle import EncoderBundle
from fseft_edge.runtime.encoder.networks.inserts import HasBlocks
from fseft_edge.runtime.encoder.session import resolve_device
from fseft_edge.runtime.errors import OutOfMemoryError, UsageError
from fseft_edge.runtime.scans.organs import OrganLabel
from fseft_edge.runtime.system.atomic import check_writable
from fseft_edge.runtime.system.progress import Progress, SilentProgress

_LOG = logging.getLogger(__name__)

# An organ that an adapter finds this well on scans left out needs no encoder of its own.
_GOOD_ENOUGH = 0.85

# A fine-tuned encoder serves its own organs alone and every scan is encoded anew for it: on organs new to the encoder
# it has to be this much better, and on all of them together no worse.
_WORTHWHILE = 0.02

# After two folds, a candidate this far behind the adapter on new organs is not looked at any further.
_HOPELESS = 0.05

_GIVES_UP = (DivergedError, OutOfMemoryError)


def tuning_beside(adapter: Path) -> Path:
    """Return where a tuning is written that does better than the adapter in a file.

    Raises:
        UsageError: the file is not called after an adapter, or something is at the tuning's place already.
        OutOfSpaceError: the tuning's place cannot be written to.
    """
    if adapter.suffix != ".adapter":
        raise UsageError(
            f"A tuning is written beside the adapter under the same name, and {adapter} does not end in .adapter.",
            remedy="Call --output NAME.adapter.",
        )
    tuning = adapter.with_suffix(f".{SUFFIX}")
    if tuning.exists():
        raise UsageError(f"{tuning} already exists.", remedy="Choose another --output, or remove it first.")
    check_writable(tuning)
    return tuning


def check_trial(encoder: Path, organs: Sequence[OrganLabel], output: Path, settings: TuningSettings) -> None:
    """Make sure, before an adapter is made, that fine-tuning can be tried afterwards (see :func:`try_finetuning`).

    Raises:
        UsageError: the encoder cannot be fine-tuned, there are too many organs, or ``output`` does not serve.
        EncoderBundleError: the encoder is damaged.
    """
    tuning_beside(output)
    bundle = EncoderBundle.open(encoder)
    for kind in default_candidates(bundle, settings):
        check_tunable(bundle, organs, kind)


def try_finetuning(
    adapter: AdapterFile,
    encoder: Path,
    images: Path | None,
    labels: Path | None,
    organs: Sequence[OrganLabel],
    *,
    output: Path,
    minutes: float,
    settings: TuningSettings | None = None,
    reviewed: ReviewedBatch | None = None,
    cases: Sequence[str] | None = None,
    device: str = "auto",
    progress: Progress | None = None,
) -> TuningFile | None:
    """Fine-tune the encoder where that does better than an adapter on scans left out, and write ``NAME.tuning``.

    Args:
        adapter: what ``adapt`` made with the same encoder, scans and organs, with its left-out scores.
        encoder: as for :func:`fseft_edge.finetuning.finetune.finetune`.
        images: likewise.
        labels: likewise.
        organs: likewise.
        output: the adapter's file; the tuning is written beside it (:func:`tuning_beside`).
        minutes: time that all of it may take.
        settings: seed, steps and the like of what is tried.
        reviewed: as for :func:`fseft_edge.finetuning.finetune.finetune`.
        cases: likewise.
        device: likewise.
        progress: where to show progress.

    Returns:
        The tuning, or None where nothing better was found in the time.

    Raises:
        UsageError: the encoder cannot be fine-tuned, there are too many organs, or ``output`` does not serve.
        InputError: an image or annotation is not usable.
    """
    deadline = time.monotonic() + 60 * minutes
    progress = progress or SilentProgress()
    common = replace(settings or TuningSettings("full"), device=resolve_device(device))
    check_trial(encoder, organs, output, common)
    bundle = EncoderBundle.open(encoder)
    obstacle = why_not(adapter, [row is not None for row in head_rows(bundle, organs)])
    if obstacle is not None:
        _LOG.warning("fine-tuning was not tried: %s", obstacle)
        return None
    annotated = find_annotated(images, labels, organs, AdapterSettings(), cases=cases, reviewed=reviewed)
    support = load_tuning_support(annotated, organs, bundle, progress)
    file = better_tuning(adapter, support, default_candidates(bundle, common), deadline=deadline, progress=progress)
    if file is not None:
        write_tuning(tuning_beside(output), file)
    return file


def default_candidates(bundle: EncoderBundle, common: TuningSettings) -> list[TuningSettings]:
    """Return what is tried on an encoder, in order: what changes few numbers of it first, then everything.

    Args:
        bundle: the encoder. A transformer learns by ``lora``, which FSEFT (arXiv 2303.17051) found best, others by
            ``affine`` with the decoder. A decoder that was never trained is new in any case.
        common: seed, steps and the like.
    """
    if not bundle.graph_only and isinstance(bundle.network(), HasBlocks):
        few = replace(common, method="lora", decoder="frozen")
    else:
        few = replace(common, method="affine", decoder="tuned")
    if bundle.manifest.untrained:
        few = replace(few, decoder="new")
    return [few, replace(common, method="full", decoder=None)]


def why_not(adapter: AdapterFile, known: Sequence[bool]) -> str | None:
    """Return why fine-tuning need not be tried, None where it should be.

    Args:
        adapter: with its left-out scores.
        known: for each organ whether the encoder knows it.
    """
    if all(known):
        return "the encoder knows every organ"
    scores = [organ.left_out_dsc for organ, of in zip(adapter.description.organs, known, strict=True) if not of]
    validated = [sum(of_organ) / len(of_organ) for of_organ in scores if of_organ]
    if not validated:
        return "no organ that the encoder does not know is annotated in two scans, so nothing can be compared"
    if min(validated) >= _GOOD_ENOUGH:
        return "the adapter finds every organ that the encoder does not know"
    return None


def better_tuning(
    adapter: AdapterFile,
    support: TuningSupport,
    candidates: Sequence[TuningSettings],
    *,
    deadline: float,
    progress: Progress | None = None,
) -> TuningFile | None:
    """Return the fine-tuning that does better than an adapter on scans left out, None where none does in the time.

    Candidates are validated one after another. One whose steps are too slow for all its folds and the final training is
    given up after a few of them.

    Args:
        adapter: made on the same support set, with its left-out scores.
        support: the support set.
        candidates: in the order in which they are tried.
        deadline: by :func:`time.monotonic`.
        progress: where to show progress.
    """
    progress = progress or SilentProgress()
    adapters = _LeftOut(
        [organ.left_out_dsc for organ in adapter.description.organs], [row is None for row in support.rows]
    )
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
                "%s is not worth it: DSC %.3f of new organs on scans left out, %.3f wanted; %.3f of all organs, where "
                "the adapter has %.3f",
                *(settings.name, found.of_new_organs, to_beat, found.of_all, adapters.of_all),
            )
            continue
        _LOG.info("%s: DSC %.3f of new organs on scans left out", settings.name, found.of_new_organs)
        to_beat, best = found.of_new_organs, validated
    if best is None:
        return None
    try:
        tuned = support.tuned(best.settings, range(len(support.cases)), progress)
    except _GIVES_UP as error:
        _LOG.warning("%s was given up: %s", best.settings.name, error.message)
        return None
    return describe_tuning(tuned, support, best.settings, *best.scores.summary())


@dataclass(frozen=True)
class _LeftOut:
    """Scores of scans left out, in the order of the folds.

    Attributes:
        dsc: of each organ.
        new: whether an organ is new to the encoder.
    """

    dsc: Sequence[Sequence[float]]
    new: Sequence[bool]

    @property
    def of_all(self) -> float:
        """Mean over organs."""
        return mean_over_organs(self.dsc)

    @property
    def of_new_organs(self) -> float:
        """Mean over those organs that are new to the encoder."""
        return mean_over_organs([scores for scores, new in zip(self.dsc, self.new, strict=True) if new])


@dataclass(frozen=True)
class _Validated:
    """A candidate, its scores on scans left out, and the seconds that its slowest fold took."""

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
    """Return a candidate's scores on every scan left out, None where it was given up."""
    scores = OrganScores(len(support.organs))
    groups = folds(len(support.cases))
    longest = 0.0
    with progress.task(f"validate {settings.name}", len(groups)) as task:
        for number, left_out in enumerate(groups, start=1):
            begun = time.monotonic()
            trainings = len(groups) - number + 2  # this fold, those after it, and the final training
            share = (deadline - begun) / trainings
            try:
                if share < longest:
                    raise OutOfTimeError
                add_fold(scores, support, settings, left_out, seconds=share)
            except OutOfTimeError:
                _LOG.warning("%s was given up: %d trainings do not fit into the time", settings.name, trainings)
                return None
            except _GIVES_UP as error:
                _LOG.warning("%s was given up: %s", settings.name, error.message)
                return None
            longest = max(longest, time.monotonic() - begun)
            task.advance(1)
            if number == 2 and _is_hopeless(scores, adapters):
                _LOG.warning("%s was given up: far behind on the first scans left out", settings.name)
                return None
    return _Validated(settings, scores, longest)


def _is_hopeless(scores: OrganScores, adapters: _LeftOut) -> bool:
    """Whether new organs are so far found much worse than by the adapter on the same scans."""
    so_far = replace(adapters, dsc=scores.summary()[0])
    same_scans = [others[: len(own)] for own, others in zip(so_far.dsc, adapters.dsc, strict=True)]
    return replace(adapters, dsc=same_scans).of_new_organs - so_far.of_new_organs > _HOPELESS
