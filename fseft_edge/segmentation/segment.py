"""Segmentation: one mask a scan, on the scan's own lattice."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from fseft_edge.adaptation.transduction import TransductionInputs
from fseft_edge.masks.result import SegmentedCase
from fseft_edge.runtime.encoder.bundle import Precision
from fseft_edge.runtime.errors import FseftEdgeError, SomeCasesFailedError
from fseft_edge.runtime.scans.sources import scan_name
from fseft_edge.runtime.system.memory import AS_MUCH_AS_IS_FREE
from fseft_edge.runtime.system.overlap import overlapped
from fseft_edge.runtime.system.progress import Progress, SilentProgress
from fseft_edge.segmentation.inputs import cases_of, check_dicom, check_output
from fseft_edge.segmentation.segmenter import SegmentationSettings, Segmenter, open_segmenter

if TYPE_CHECKING:
    from fseft_edge.dicom_output import DicomKind

_LOG = logging.getLogger(__name__)


def segment(
    scans: Sequence[Path],
    adapters: Sequence[Path],
    output: Path,
    *,
    encoder: Path | None = None,
    series: str | None = None,
    transduction: TransductionInputs | None = None,
    largest_component: bool | None = None,
    fill_holes: bool | None = None,
    preview: bool = False,
    dicom: Sequence[DicomKind] = (),
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
        transduction: refit the adapters to each scan under a prior on organ sizes; None uses them as they are.
        largest_component: keep only the largest 26-connected component of each organ; None does what the adapter found
            to help (see :mod:`fseft_edge.adaptation.cross_validation`).
        fill_holes: fill what an organ encloses on all sides; None likewise.
        preview: also write ``output/<case>.png``, three planes with the organs outlined.
        dicom: also write the masks as DICOM: ``seg`` (Segmentation), ``rtstruct`` (RT Structure Set) or both. All scans
            have to be DICOM.
        cache: folder in which feature maps are kept; None keeps none.
        cache_gb: size that the cache is held to, least recently used maps going first; None sets no limit.
        device: where to compute (see :func:`fseft_edge.runtime.encoder.session.open_session`).
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
    settings = SegmentationSettings(
        tuple(adapters),
        encoder,
        series,
        transduction,
        largest_component,
        fill_holes,
        preview,
        tuple(dicom),
        cache,
        cache_gb,
        device,
        backend,
        precision,
        memory_gb,
        vram_gb,
    )
    paths = cases_of(scans, series)
    check_output(output, paths)
    if dicom:
        check_dicom(paths)
    done: list[SegmentedCase] = []
    failed: list[str] = []
    with open_segmenter(settings, progress) as segmenter, progress.task("segment", len(paths)) as task:
        for path, outcome in zip(paths, _outcomes(paths, segmenter, output), strict=True):
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


def _outcomes(paths: Sequence[Path], segmenter: Segmenter, output: Path) -> Iterator[Future[SegmentedCase]]:
    """Yield what became of each case; their stages overlap where no budget says what they may take together."""
    if len(paths) > 1 and segmenter.settings.budget == AS_MUCH_AS_IS_FREE:
        yield from overlapped(
            paths, segmenter.open, segmenter.encode, lambda encoded: segmenter.finish(encoded, output)
        )
        return
    for path in paths:
        outcome: Future[SegmentedCase] = Future()
        try:
            outcome.set_result(segmenter.finish(segmenter.encode(segmenter.open(path)), output))
        except Exception as error:  # the case's own trouble, which its outcome tells
            outcome.set_exception(error)
        yield outcome
