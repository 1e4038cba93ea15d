"""Segmentation: cached features through adapters, back to the scan's own lattice, one mask a scan."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import ExitStack
from dataclasses import KW_ONLY, asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from fseft_edge._version import __version__
from fseft_edge.adapter_file import AdapterFile, AdapterOrgan, read_adapter
from fseft_edge.adapters import Adapter
from fseft_edge.blocks import Box, read_block, tiles
from fseft_edge.decision import decide, least_decisive
from fseft_edge.organs import OrganLabel
from fseft_edge.overlap import overlapped
from fseft_edge.postprocessing import PostProcessing, post_process
from fseft_edge.quality import quality_flags
from fseft_edge.report.pictures import three_plane_picture
from fseft_edge.report.progress import Progress, SilentProgress
from fseft_edge.runtime.atomic import atomic_path
from fseft_edge.runtime.bundle import EncoderBundle, Precision
from fseft_edge.runtime.encoding import EncodedScan, encode_scan, layout_of
from fseft_edge.runtime.encoding_plan import held_after_encoding, plan_encoding
from fseft_edge.runtime.errors import FseftEdgeError, OutOfMemoryError, SomeCasesFailedError, UsageError
from fseft_edge.runtime.feature_store import FeatureStore, open_store
from fseft_edge.runtime.grid import Grid
from fseft_edge.runtime.memory import AS_MUCH_AS_IS_FREE, Budget
from fseft_edge.runtime.nifti import write_label_map
from fseft_edge.runtime.scans import read_scan, scan_name
from fseft_edge.runtime.session import EncoderSession, open_session
from fseft_edge.runtime.volume import LabelMap, Volume
from fseft_edge.segmentation_inputs import cases_of, check_organs, check_output, find_encoder
from fseft_edge.segmentation_plan import AMPLE, SegmentationPlan, in_smaller_pieces, plan_segmentation
from fseft_edge.support import find_pairs, load_support, of_support_set, read_annotations
from fseft_edge.transduction import OrganOutcome, TransductionPlan, support_of, tuned_adapters

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class SegmentedOrgan:
    """An organ in a mask: its name, label value, volume, and what to look at (see :mod:`fseft_edge.quality`)."""

    name: str
    label: int
    volume_ml: float
    flags: tuple[str, ...]


@dataclass(frozen=True)
class SegmentedCase:
    """A scan's result: the mask file, and its organs as ``OUT/<case>.json`` holds them."""

    case: str
    mask: Path
    organs: tuple[SegmentedOrgan, ...]


def segment(
    scans: Sequence[Path],
    adapters: Sequence[Path],
    output: Path,
    *,
    encoder: Path | None = None,
    series: str | None = None,
    transduction: TransductionPlan | None = None,
    largest_component: bool | None = None,
    fill_holes: bool | None = None,
    preview: bool = False,
    cache: Path | None = None,
    cache_gb: float | None = None,
    device: str = "auto",
    backend: str = "auto",
    precision: Precision | Literal["auto"] = "auto",
    memory_gb: float | None = None,
    vram_gb: float | None = None,
    progress: Progress | None = None,
) -> list[SegmentedCase]:
    """Segment CTs and write ``output/<case>.nii.gz`` and ``output/<case>.json``.

    Labels are 1..K in the adapters' order. Where organs overlap, the more probable one has the voxel.

    Args:
        scans: NIfTI files, folders of them, and DICOM series in folders, zip archives or files of their own.
        adapters: adapter files, all trained on the same encoder.
        output: folder, made if need be.
        encoder: encoder bundle; None looks beside the first adapter and in the working folder.
        series: which DICOM series of the only scan, by number or UID; None takes the CT series with most slices.
        transduction: tune the adapters to each scan under a prior on organ sizes; None uses them as they are.
        largest_component: keep only the largest 26-connected component of each organ; None does what the adapter found
            to help (see :mod:`fseft_edge.validation`).
        fill_holes: fill what an organ encloses on all sides; None likewise.
        preview: also write ``output/<case>.png``, three planes with the organs outlined.
        cache: folder in which feature maps are kept; None keeps none.
        cache_gb: size that the cache is held to, least recently used maps going first; None sets no limit.
        device: where to compute (see :func:`fseft_edge.runtime.session.open_session`).
        backend: the inference engine (see the same).
        precision: what the encoder computes in (see the same).
        memory_gb: memory that may be taken, in units of 1e9 bytes; None: 90 % of what is free.
        vram_gb: memory of the GPU that may be taken; None likewise.
        progress: where to show progress.

    Returns:
        The cases in the order given.

    Raises:
        UsageError: nothing to segment or to segment with, or the output would take a scan's place.
        InputError: the only case, an adapter or the encoder is not usable.
        OutOfMemoryError: the budget is too small for the only case.
        SomeCasesFailedError: of several cases some failed; the others are written.
    """
    progress = progress or SilentProgress()
    budget = Budget.of(memory_gb, vram_gb)
    paths = cases_of(scans, series)
    check_output(output, paths)
    files = [read_adapter(path) for path in adapters]
    if not files:
        raise UsageError("No adapter was given.", remedy="Name at least one by --adapter.")
    bundle = EncoderBundle.open(encoder or find_encoder(adapters[0], files[0].description.encoder_id))
    for path, file in zip(adapters, files, strict=True):
        file.check_encoder(bundle.encoder_id, path=path)
    check_organs(files)
    if transduction is not None:
        transduction.check(files)
    treatment = [
        PostProcessing(
            organ.post_processing.largest_component if largest_component is None else largest_component,
            organ.post_processing.fill_holes if fill_holes is None else fill_holes,
        )
        for file in files
        for organ in file.description.organs
    ]
    done: list[SegmentedCase] = []
    failed: list[str] = []
    with ExitStack() as stack:
        session = stack.enter_context(open_session(bundle, device=device, backend=backend, precision=precision))
        for file in files:
            file.adapter.to(session.device)
        tune: _Tune = _unchanged
        if transduction is not None:
            with open_store(cache, cache_gb) as store:
                tune = _tuner(
                    transduction, files, bundle=bundle, session=session, store=store, budget=budget, progress=progress
                )
        task = stack.enter_context(progress.task("segment", len(paths)))
        stages = _Stages(
            files,
            output,
            bundle=bundle,
            session=session,
            budget=budget,
            tune=tune,
            treatment=treatment,
            series=series,
            preview=preview,
            cache=cache,
            cache_gb=cache_gb,
        )
        for path, outcome in zip(paths, stages.outcomes(paths), strict=True):
            try:
                done.append(outcome.result())
            except FseftEdgeError as error:
                if len(paths) == 1:
                    raise
                failed.append(scan_name(path))
                _LOG.error("%s failed: %s", scan_name(path), error)
            task.advance(1)
    if failed:
        raise SomeCasesFailedError(
            f"{len(failed)} of {len(paths)} cases failed: {', '.join(failed)}.",
            remedy="The reasons stand above; the other cases are written.",
            completed=done,
        )
    return done


def segment_encoded(
    encoded: EncodedScan, adapters: Sequence[Adapter], plan: SegmentationPlan = AMPLE
) -> NDArray[np.uint8] | NDArray[np.uint16]:
    """Return the label map of an encoded scan on the scan's own lattice, labels 1..K in the adapters' order."""
    organs = sum(adapter.classes - adapter.backgrounds for adapter in adapters)
    labels = np.zeros(encoded.grid.source_shape, np.uint8 if organs < 256 else np.uint16)
    for piece in encoded.grid.to_source(predict_sections(encoded, adapters, plan), least_decisive(adapters)):
        where = [slice(None)] * 3
        where[piece.axis] = slice(piece.start, piece.stop)
        labels[tuple(where)] = decide(piece.probabilities, adapters, labels.dtype)
    return labels


def predict_sections(
    encoded: EncodedScan, adapters: Sequence[Adapter], plan: SegmentationPlan = AMPLE
) -> Iterator[tuple[int, NDArray[np.float32]]]:
    """Yield ``(z0, probabilities)`` of the grid slab by slab: float32 ``[Σ classes, X, Y, n]``, adapters in order."""
    classes = [adapter.classes for adapter in adapters]
    x, y, z = encoded.grid.shape
    for start in range(0, z, plan.slab):
        depth = min(plan.slab, z - start)
        slab = np.empty((sum(classes), x, y, depth), np.float32)
        for tile in tiles((x, y, depth), (plan.tile, plan.tile, plan.slab)):
            core = Box(tile.x, tile.y, (start, start + depth))
            first = 0
            for adapter, count in zip(adapters, classes, strict=True):
                probabilities = _predict_block(adapter, encoded, core)
                slab[first : first + count, slice(*tile.x), slice(*tile.y)] = probabilities
                first += count
        yield start, slab


def _predict_block(adapter: Adapter, encoded: EncodedScan, core: Box) -> NDArray[np.float32]:
    with torch.inference_mode():
        features = read_block(encoded.features, adapter.boxes(core), adapter.device)
        probabilities: NDArray[np.float32] = adapter.probabilities(adapter(features, core))[0].cpu().numpy()
    return probabilities


_Tune = Callable[[Sequence[AdapterFile], EncodedScan], tuple[Sequence[Adapter], Sequence[OrganOutcome]]]


def _unchanged(files: Sequence[AdapterFile], _: EncodedScan) -> tuple[Sequence[Adapter], Sequence[OrganOutcome]]:
    return [file.adapter for file in files], ()


def _tuner(
    plan: TransductionPlan,
    files: Sequence[AdapterFile],
    *,
    bundle: EncoderBundle,
    session: EncoderSession,
    store: FeatureStore,
    budget: Budget,
    progress: Progress,
) -> _Tune:
    supports = []
    pairs = find_pairs(plan.images, plan.labels)
    for file in files:
        organs = [OrganLabel(organ.name, organ.label) for organ in file.description.organs]
        annotated = read_annotations(pairs, organs, plan.labels, file.adapter.settings)
        if file.description.shots:
            volumes = [organ.support_volumes_ml for organ in file.description.organs]
            annotated = of_support_set(annotated, organs, volumes)
        support = load_support(
            annotated, organs, bundle=bundle, session=session, store=store, budget=budget, progress=progress
        )
        supports.append(support_of(file.adapter, support, plan.settings, progress))
    return lambda adapters, encoded: tuned_adapters(adapters, encoded, supports, plan)


@dataclass(frozen=True, eq=False)
class _Opened:
    """A scan that was read, and how it will be turned into a mask."""

    path: Path
    volume: Volume
    grid: Grid
    plan: SegmentationPlan


@dataclass(frozen=True, eq=False)
class _Encoded:
    """A scan with its features; ``resources`` holds the store that they lie in."""

    opened: _Opened
    scan: EncodedScan
    resources: ExitStack


@dataclass(frozen=True, eq=False)
class _Stages:
    """What every case goes through, and with what."""

    adapters: Sequence[AdapterFile]
    output: Path
    _: KW_ONLY
    bundle: EncoderBundle
    session: EncoderSession
    budget: Budget
    tune: _Tune
    treatment: Sequence[PostProcessing]
    series: str | None
    preview: bool
    cache: Path | None
    cache_gb: float | None

    def outcomes(self, paths: Sequence[Path]) -> Iterator[Future[SegmentedCase]]:
        """Yield what became of each case; their stages overlap where no budget says what they may take together."""
        if len(paths) > 1 and self.budget == AS_MUCH_AS_IS_FREE:
            yield from overlapped(paths, self._open, self._encode, self._finish)
            return
        for path in paths:
            outcome: Future[SegmentedCase] = Future()
            try:
                outcome.set_result(self._finish(self._encode(self._open(path))))
            except Exception as error:  # the case's own trouble, which its outcome tells
                outcome.set_exception(error)
            yield outcome

    def _open(self, path: Path) -> _Opened:
        volume = read_scan(path, self.series)
        grid = Grid.of(volume, self.bundle.preprocessing)
        # Before the long work, not after it.
        held = held_after_encoding(self.bundle, self.session)
        adapters = [file.adapter for file in self.adapters]
        try:
            plan = plan_segmentation(grid, adapters, self.budget, held)
        except OutOfMemoryError as refused:
            try:
                plan_encoding(layout_of(grid, self.bundle), self.bundle, self.session, self.budget)
            except OutOfMemoryError as also_refused:
                if also_refused.least > refused.least:  # what is said to be enough has to be enough for both
                    raise also_refused from None
            raise
        return _Opened(path, volume, grid, plan)

    def _encode(self, opened: _Opened) -> _Encoded:
        with ExitStack() as stack:
            store = stack.enter_context(open_store(self.cache, self.cache_gb))
            scan = encode_scan(
                opened.volume,
                bundle=self.bundle,
                session=self.session,
                store=store,
                grid=opened.grid,
                budget=self.budget,
            )
            return _Encoded(opened, scan, stack.pop_all())

    def _finish(self, encoded: _Encoded) -> SegmentedCase:
        opened = encoded.opened
        with encoded.resources:
            tuned, outcomes = self.tune(self.adapters, encoded.scan)
            found = in_smaller_pieces(opened.plan, lambda pieces: segment_encoded(encoded.scan, tuned, pieces))
        labels = LabelMap(post_process(found, self.treatment), opened.volume.affine)
        organs = tuple(_measured(labels, self.adapters, outcomes))
        name = scan_name(opened.path)
        case = SegmentedCase(name, self.output / f"{name}.nii.gz", organs)
        _write_summary(case, opened.volume, self.bundle, self.adapters, outcomes)
        if self.preview:
            masks = {organ.name: (labels.array == organ.label, None) for organ in organs}
            three_plane_picture(opened.volume, masks, self.output / f"{name}.png")
        write_label_map(case.mask, labels)
        return case


def _measured(
    labels: LabelMap, adapters: Sequence[AdapterFile], outcomes: Sequence[OrganOutcome]
) -> Iterator[SegmentedOrgan]:
    organs: list[AdapterOrgan] = [organ for file in adapters for organ in file.description.organs]
    for label, organ in enumerate(organs, start=1):
        mask = labels.array == label
        volume_ml = float(mask.sum()) * labels.voxel_volume_mm3 / 1000
        flags = quality_flags(mask, volume_ml, organ.support_volumes_ml)
        if outcomes:
            flags += outcomes[label - 1].notes
        yield SegmentedOrgan(organ.name, label, round(volume_ml, 3), flags)


def _write_summary(
    case: SegmentedCase,
    volume: Volume,
    bundle: EncoderBundle,
    adapters: Sequence[AdapterFile],
    outcomes: Sequence[OrganOutcome],
) -> None:
    summary = {
        "schema_version": 1,
        "case": case.case,
        "organs": [asdict(organ) for organ in case.organs],
        "shape": list(volume.shape),
        "spacing_mm": [round(float(value), 6) for value in volume.spacing],
        "encoder": {"name": bundle.manifest.name, "id": bundle.encoder_id},
        "adapters": [
            {"sha256": file.sha256, "organs": [organ.name for organ in file.description.organs]} for file in adapters
        ],
        "toolkit_version": __version__,
    }
    if outcomes:
        summary["transduction"] = [
            {"name": organ.name, **asdict(outcome)} for organ, outcome in zip(case.organs, outcomes, strict=True)
        ]
    with atomic_path(case.mask.with_name(f"{case.case}.json")) as temporary:
        temporary.write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
