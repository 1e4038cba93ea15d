"""Adaptation to a site's organ: from annotated scans to an adapter file."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path

import numpy as np
from torch import Tensor

from fseft_edge.adapter_file import AdapterDescription, AdapterFile, AdapterOrgan, write_adapter
from fseft_edge.adapter_training import SupportScan, TrainedAdapter, TrainingSettings, train_adapter
from fseft_edge.adapters import Adapter, AdapterSettings
from fseft_edge.organs import OrganLabel
from fseft_edge.report.progress import Progress, SilentProgress
from fseft_edge.runtime.bundle import EncoderBundle
from fseft_edge.runtime.encoding import encode_scan
from fseft_edge.runtime.errors import LabelError, UnreadableFileError, UsageError
from fseft_edge.runtime.feature_store import FeatureStore, open_store
from fseft_edge.runtime.nifti import case_name, cases_by_name, read_ct, read_label_map
from fseft_edge.runtime.session import EncoderSession, open_session
from fseft_edge.runtime.volume import LabelMap, Volume, check_labels_match

_LOG = logging.getLogger(__name__)


def adapt(
    encoder: Path,
    images: Path,
    labels: Path,
    organs: Sequence[OrganLabel],
    output: Path,
    *,
    settings: AdapterSettings | None = None,
    training: TrainingSettings | None = None,
    cases: Sequence[str] | None = None,
    cache: Path | None = None,
    cache_gb: float | None = None,
    device: str = "auto",
    backend: str = "auto",
    progress: Progress | None = None,
) -> AdapterFile:
    """Train an adapter on annotated scans and write it.

    Args:
        encoder: encoder bundle.
        images: folder of CTs (or one CT), NIfTI.
        labels: folder of annotations (or one), each with its CT's file name and lattice.
        organs: what to learn, and its label value in the annotations. A scan without an organ's label counts as not
            annotated for that organ.
        output: the adapter file, ``NAME.adapter``.
        settings: the kind of adapter; spatial on the pyramid by default.
        training: schedule and seed.
        cases: names of the cases to use; None takes all that have an annotation.
        cache: folder in which feature maps are kept; None keeps none.
        cache_gb: size that the cache is held to, least recently used maps going first; None sets no limit.
        device: where to encode (see :func:`fseft_edge.runtime.session.open_session`).
        backend: the inference engine (see the same).
        progress: where to show progress.

    Raises:
        UsageError: ``output`` is a folder.
        InputError: an image or annotation is not usable.
        LabelError: an organ is annotated in no case.
    """
    progress = progress or SilentProgress()
    if output.is_dir():
        raise UsageError(f"{output} is a folder.", remedy="Name the file to write, such as liver.adapter.")
    bundle = EncoderBundle.open(encoder)
    pairs = _pairs(images, labels, cases)
    with ExitStack() as stack:
        store = stack.enter_context(open_store(cache, cache_gb))
        session = stack.enter_context(open_session(bundle, device=device, backend=backend))
        support: list[SupportScan] = []
        with progress.task("encode", len(pairs)) as task:
            for image, annotation in pairs:
                volume, label_map = read_ct(image), read_label_map(annotation)
                check_labels_match(volume, label_map)
                support.append(support_scan(volume, label_map, organs, bundle=bundle, session=session, store=store))
                task.advance(1)
        _check_annotated(support, organs, pairs, labels)
        _check_background(support, settings or AdapterSettings())
        trained = train_adapter(
            settings or AdapterSettings(),
            support,
            head_rows=head_rows(bundle, organs),
            training=training,
            progress=progress,
        )
        file = describe(trained, support, organs, bundle=bundle, seed=(training or TrainingSettings()).seed)
    write_adapter(output, file)
    return file


def support_scan(
    volume: Volume,
    labels: LabelMap,
    organs: Sequence[OrganLabel],
    *,
    bundle: EncoderBundle,
    session: EncoderSession,
    store: FeatureStore,
) -> SupportScan:
    """Return an annotated scan on the grid, its features from the store if they are there."""
    encoded = encode_scan(volume, bundle=bundle, session=session, store=store)
    masks = [labels.array == organ.label for organ in organs]
    occupancy = np.stack([np.rint(255 * encoded.grid.occupancy(mask)).astype(np.uint8) for mask in masks])
    voxels = [int(mask.sum()) for mask in masks]
    return SupportScan(
        features=encoded.features,
        shape=encoded.grid.shape,
        occupancy=occupancy,
        annotated=np.array([count > 0 for count in voxels]),
        volumes_mm3=tuple(count * labels.voxel_volume_mm3 for count in voxels),
    )


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
    adapter = Adapter(AdapterSettings(method="linear", reads="last"), bundle.levels, len(organs))
    adapter.start_from_head(rows)
    return describe(TrainedAdapter(adapter.eval(), (), 0, bfloat16=False), [], organs, bundle=bundle, seed=0)


def describe(
    trained: TrainedAdapter,
    support: Sequence[SupportScan],
    organs: Sequence[OrganLabel],
    *,
    bundle: EncoderBundle,
    seed: int,
) -> AdapterFile:
    """Return a trained adapter with the description that its file carries."""
    volumes = [
        tuple(round(scan.volumes_mm3[k] / 1000, 3) for scan in support if scan.annotated[k]) for k in range(len(organs))
    ]
    description = AdapterDescription(
        encoder_id=bundle.encoder_id,
        encoder_name=bundle.manifest.name,
        levels=tuple((level.stride, level.channels) for level in bundle.levels),
        settings=asdict(trained.adapter.settings),
        organs=tuple(
            AdapterOrgan(name=organ.name, label=organ.label, support_volumes_ml=volume)
            for organ, volume in zip(organs, volumes, strict=True)
        ),
        shots=len(support),
        seed=seed,
        steps=trained.steps,
        bfloat16=trained.bfloat16,
        losses=tuple(round(loss, 6) for loss in trained.losses),
    )
    return AdapterFile(description, trained.adapter)


def _pairs(images: Path, labels: Path, cases: Sequence[str] | None) -> list[tuple[Path, Path]]:
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


def _check_background(support: Sequence[SupportScan], settings: AdapterSettings) -> None:
    if settings.activation == "softmax" and not any(scan.annotated.all() for scan in support):
        raise LabelError(
            "No scan is annotated for all the organs, so softmax never sees background.",
            remedy="Use --activation sigmoid, or annotate every organ in at least one scan.",
        )


def _check_annotated(
    support: Sequence[SupportScan],
    organs: Sequence[OrganLabel],
    pairs: Sequence[tuple[Path, Path]],
    labels: Path,
) -> None:
    for k, organ in enumerate(organs):
        without = [case_name(path) for scan, (path, _) in zip(support, pairs, strict=True) if not scan.annotated[k]]
        if len(without) == len(support):
            raise LabelError(
                f"No annotation in {labels} contains the label {organ.label} ({organ.name}).",
                remedy="Check the number in --organ NAME=ID against the annotation files.",
            )
        if without:
            _LOG.warning("%s: label %d is missing in %s: not annotated there", organ.name, organ.label, without)
