"""Adaptation to a site's organ: from annotated scans to an adapter file."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Literal

from torch import Tensor

from fseft_edge.adaptation.block_sampling import SupportScan
from fseft_edge.adaptation.cross_validation import (
    Candidate,
    Validated,
    best_of,
    can_validate,
    candidates,
    leave_one_out,
)
from fseft_edge.adaptation.support_set import find_annotated, load_support
from fseft_edge.adaptation.training import TrainedAdapter, TrainingSettings
from fseft_edge.adapters.file import (
    AdapterDescription,
    AdapterFile,
    AdapterOrgan,
    PostProcessing,
    stored_settings,
    write_adapter,
)
from fseft_edge.adapters.network import AdapterSettings, zero_shot
from fseft_edge.outbox.accepted_masks import ReviewedBatch
from fseft_edge.runtime.encoder.bundle import EncoderBundle, Precision
from fseft_edge.runtime.encoder.feature_store import open_store
from fseft_edge.runtime.encoder.session import open_session
from fseft_edge.runtime.errors import LabelError
from fseft_edge.runtime.scans.intensities import HuPercentiles
from fseft_edge.runtime.scans.organs import OrganLabel
from fseft_edge.runtime.system.atomic import check_writable
from fseft_edge.runtime.system.memory import Budget
from fseft_edge.runtime.system.progress import Progress, SilentProgress

_LOG = logging.getLogger(__name__)


def adapt(
    encoder: Path,
    images: Path | None,
    labels: Path | None,
    organs: Sequence[OrganLabel],
    output: Path,
    *,
    reviewed: ReviewedBatch | None = None,
    settings: AdapterSettings | None = None,
    training: TrainingSettings | None = None,
    choose: bool = False,
    validate: bool = True,
    cases: Sequence[str] | None = None,
    cache: Path | None = None,
    cache_gb: float | None = None,
    device: str = "auto",
    backend: str = "auto",
    precision: Precision | Literal["auto"] = "auto",
    memory_gb: float | None = None,
    vram_gb: float | None = None,
    progress: Progress | None = None,
) -> AdapterFile:
    """Train an adapter on annotated scans and write it.

    Args:
        encoder: encoder bundle.
        images: folder of CTs (or one CT), NIfTI; None with ``labels`` where ``reviewed`` gives all scans.
        labels: folder of annotations (or one), each with its CT's file name and lattice.
        organs: what to learn, and its label value in the annotations. A scan without an organ's label counts as not
            annotated for that organ.
        output: the adapter file, ``NAME.adapter``.
        reviewed: a batch whose accepted masks are learned from too, their organs matched by name.
        settings: the kind of adapter; spatial on the pyramid by default.
        training: schedule and seed.
        choose: take the method and the levels that validate best; ``settings`` gives activation and width only.
        validate: leave every scan out once, so that the file says what to expect on new scans; takes as long as the
            training once a scan. Where no organ is annotated in two scans, nothing can be validated.
        cases: names of the cases of ``images`` to use; None takes all that have an annotation.
        cache: folder in which feature maps are kept; None keeps none.
        cache_gb: size that the cache is held to, least recently used maps going first; None sets no limit.
        device: where to encode and train (see :func:`fseft_edge.runtime.encoder.session.open_session`).
        backend: the inference engine (see the same).
        precision: what the encoder computes in (see the same).
        memory_gb: memory that encoding may take, in units of 1e9 bytes; None: 90 % of what is free. Training is not
            planned for.
        vram_gb: memory of the GPU that encoding may take; None likewise.
        progress: where to show progress.

    Raises:
        UsageError: ``output`` is a folder, there is nothing to learn from, or no mask of ``reviewed`` was accepted.
        OutOfMemoryError: the budget is too small to encode a scan.
        OutOfSpaceError: ``output`` cannot be written.
        InputError: an image or annotation is not usable.
        LabelError: an organ is annotated in no case.
    """
    progress = progress or SilentProgress()
    settings = settings or AdapterSettings()
    budget = Budget.of(memory_gb, vram_gb)
    check_writable(output)
    bundle = EncoderBundle.open(encoder)
    annotated = find_annotated(images, labels, organs, settings, cases=cases, reviewed=reviewed)
    with ExitStack() as stack:
        store = stack.enter_context(open_store(cache, cache_gb))
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
            progress=progress,
        )
        rows = head_rows(bundle, organs)
        candidate = Candidate(settings.name, settings, training)
        validated: Validated | None = None
        if (choose or validate) and not can_validate(support):
            _LOG.warning("no organ is annotated in two scans, so nothing can be validated: %s it is", candidate.name)
        elif choose:
            validated, all_of_them = best_of(candidates(training, settings, rows), support, rows, progress=progress)
            candidate = validated.candidate
            for result in all_of_them:
                _LOG.info("%s: DSC %.3f", result.candidate.name, result.mean)
        elif validate:
            validated = leave_one_out(candidate, support, rows, progress=progress)
        trained = candidate.make(support, rows, progress)
        file = describe(trained, support, organs, bundle=bundle, seed=training.seed, validated=validated)
    write_adapter(output, file)
    return file


def head_rows(bundle: EncoderBundle, organs: Sequence[OrganLabel]) -> list[tuple[Tensor, float] | None]:
    """Return the encoder's own classifier of each organ: weight ``[C_0]`` and bias, None where it has none."""
    weight, bias = bundle.head_weight(), bundle.head_bias()
    known = {name: row for row, name in enumerate(bundle.manifest.organs)}
    return [
        (weight[known[organ.name]], float(bias[known[organ.name]])) if organ.name in known else None for organ in organs
    ]


def zero_shot_adapter(bundle: EncoderBundle, organs: Sequence[OrganLabel]) -> AdapterFile:
    """Return the encoder's own classifier as an adapter that was trained on nothing.

    Args:
        bundle: the encoder.
        organs: organs that its head knows.

    Raises:
        LabelError: the head does not know one of them.
    """
    rows = head_rows(bundle, organs)
    unknown = [organ.name for organ, row in zip(organs, rows, strict=True) if row is None]
    if unknown:
        raise LabelError(
            f"The encoder {bundle.manifest.name} does not know {', '.join(unknown)}.",
            remedy=f"It knows {', '.join(bundle.manifest.organs)}; adapt it to others.",
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
) -> AdapterFile:
    """Return a trained adapter with the description that its file carries."""
    volumes = [
        tuple(round(scan.volumes_mm3[k] / 1000, 3) for scan in support if scan.annotated[k]) for k in range(len(organs))
    ]
    hu = [tuple(look for scan in support if (look := scan.hu[k])) for k in range(len(organs))]
    description = AdapterDescription(
        encoder_id=bundle.encoder_id,
        encoder_name=bundle.manifest.name,
        levels=tuple((level.stride, level.channels) for level in bundle.levels),
        settings=stored_settings(trained.adapter.settings),
        organs=describe_organs(
            organs,
            volumes,
            hu,
            left_out=validated.dsc if validated else None,
            post_processing=validated.post_processing if validated else None,
        ),
        shots=len(support),
        seed=seed,
        steps=trained.steps,
        bfloat16=trained.bfloat16,
        losses=tuple(round(loss, 6) for loss in trained.losses),
    )
    return AdapterFile(description, trained.adapter)


def describe_organs(
    organs: Sequence[OrganLabel],
    volumes_ml: Sequence[tuple[float, ...]],
    hu: Sequence[tuple[HuPercentiles, ...]],
    *,
    left_out: Sequence[Sequence[float]] | None,
    post_processing: Sequence[PostProcessing] | None,
) -> tuple[AdapterOrgan, ...]:
    """Return what is said of each organ of an adapter.

    Args:
        organs: the organs.
        volumes_ml: of each, in every support scan that annotates it.
        hu: likewise.
        left_out: DSC on scans left out, with ``post_processing``; None where nothing was validated.
        post_processing: of each organ's masks; None likewise.
    """
    left_out = left_out or [()] * len(organs)
    treatments = post_processing or [PostProcessing()] * len(organs)
    return tuple(
        AdapterOrgan(
            name=organ.name,
            label=organ.label,
            support_volumes_ml=volume,
            left_out_dsc=tuple(round(score, 4) for score in scores),
            post_processing=treatment,
            support_hu=looks,
        )
        for organ, volume, looks, scores, treatment in zip(organs, volumes_ml, hu, left_out, treatments, strict=True)
    )
