"""Whether fine-tuning is worth it where an adapter alone falls short: decided on scans left out, within a time."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from fseft_edge.adapter_file import AdapterFile
from fseft_edge.adapters import AdapterSettings
from fseft_edge.finetuning.settings import TuningSettings
from fseft_edge.finetuning.tuning import TuningSupport, add_fold, describe_tuning, load_tuning_support
from fseft_edge.finetuning.tuning_file import SUFFIX, TuningFile, write_tuning
from fseft_edge.organs import OrganLabel
from fseft_edge.report.progress import Progress, SilentProgress
from fseft_edge.review.support import ReviewedBatch
from fseft_edge.runtime.bundle import EncoderBundle
from fseft_edge.runtime.session import resolve_device
from fseft_edge.support import find_annotated
from fseft_edge.validation import OrganScores, folds, mean_over_organs

_LOG = logging.getLogger(__name__)

# An organ that an adapter finds this well on scans left out needs no encoder of its own.
_GOOD_ENOUGH = 0.85

# A fine-tuned encoder serves its own organs alone and every scan is encoded anew for it; it has to be this much better.
_WORTHWHILE = 0.02

# After two folds, a candidate this far behind the adapter is not looked at any further.
_HOPELESS = 0.05


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
        encoder: as for :func:`fseft_edge.finetuning.tuning.finetune`.
        images: likewise.
        labels: likewise.
        organs: likewise.
        output: the adapter's file; the tuning is written beside it under the same name.
        minutes: time that all of it may take.
        settings: seed, steps and the like of what is tried.
        reviewed: as for :func:`fseft_edge.finetuning.tuning.finetune`.
        cases: likewise.
        device: likewise.
        progress: where to show progress.

    Returns:
        The tuning, or None where nothing better was found in the time.
    """
    progress = progress or SilentProgress()
    bundle = EncoderBundle.open(encoder)
    annotated = find_annotated(images, labels, organs, AdapterSettings(), cases=cases, reviewed=reviewed)
    support = load_tuning_support(annotated, organs, bundle, progress)
    common = replace(settings or TuningSettings("full"), device=resolve_device(device))
    file = better_tuning(adapter, support, default_candidates(common), minutes=minutes, progress=progress)
    if file is not None:
        write_tuning(output.with_suffix(f".{SUFFIX}"), file)
    return file


def default_candidates(common: TuningSettings) -> list[TuningSettings]:
    """Return what is tried, in order.

    Args:
        common: seed, steps and the like.
    """
    return [replace(common, method="affine", decoder="tuned"), replace(common, method="full", decoder=None)]


def falls_short(adapter: AdapterFile, support: TuningSupport) -> bool:
    """Return whether an adapter does poorly, on scans left out, on an organ that the encoder does not know."""
    return any(
        organ.left_out_dsc and sum(organ.left_out_dsc) / len(organ.left_out_dsc) < _GOOD_ENOUGH
        for organ, row in zip(adapter.description.organs, support.rows, strict=True)
        if row is None
    )


def better_tuning(
    adapter: AdapterFile,
    support: TuningSupport,
    candidates: Sequence[TuningSettings],
    *,
    minutes: float,
    progress: Progress | None = None,
) -> TuningFile | None:
    """Return the fine-tuning that does better than an adapter on scans left out, None where none does in the time.

    Candidates are validated one after another, as long as one more fold and the final training still fit.

    Args:
        adapter: made on the same support set, with its left-out scores.
        support: the support set.
        candidates: in the order in which they are tried.
        minutes: time that all of it may take.
        progress: where to show progress.
    """
    progress = progress or SilentProgress()
    if not falls_short(adapter, support):
        _LOG.info("no organ that the encoder does not know falls short: fine-tuning was not tried")
        return None
    deadline = time.monotonic() + 60 * minutes
    to_beat = mean_over_organs([organ.left_out_dsc for organ in adapter.description.organs]) + _WORTHWHILE
    best: tuple[TuningSettings, OrganScores] | None = None
    for settings in candidates:
        scores = _validated(support, settings, deadline, hopeless=to_beat - _WORTHWHILE - _HOPELESS, progress=progress)
        if scores is None:
            continue
        _LOG.info("%s: DSC %.3f on scans left out", settings.name, scores.mean)
        if scores.mean >= to_beat:
            to_beat, best = scores.mean, (settings, scores)
    if best is None:
        return None
    settings, scores = best
    tuned = support.tuned(settings, range(len(support.cases)), progress)
    return describe_tuning(tuned, support, settings, *scores.summary())


def _validated(
    support: TuningSupport, settings: TuningSettings, deadline: float, *, hopeless: float, progress: Progress
) -> OrganScores | None:
    """Return a candidate's scores on every scan left out, None where it was given up."""
    scores = OrganScores(len(support.organs))
    groups = folds(len(support.cases))
    longest = 0.0
    with progress.task(f"validate {settings.name}", len(groups)) as task:
        for number, left_out in enumerate(groups, start=1):
            begun = time.monotonic()
            remaining = len(groups) - number + 2  # this fold, those after it, and the final training
            if begun + remaining * longest > deadline:
                _LOG.warning("%s was given up: %d folds do not fit into the time", settings.name, len(groups))
                return None
            add_fold(scores, support, settings, left_out)
            longest = max(longest, time.monotonic() - begun)
            task.advance(1)
            if number == 2 and scores.mean < hopeless:
                _LOG.info("%s was given up: DSC %.3f on the first scans left out", settings.name, scores.mean)
                return None
    return scores
