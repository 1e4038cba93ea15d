"""Segment many scans, one after another or overlapping: the function behind ``fseft-edge segment``.

This module checks the arguments and collects results and failures; ``segmenter.py`` segments each scan.
"""

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
    organs: Sequence[str] = (),
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

    Label values are 1 to K, in the order of the adapters and of their organs. Where organs overlap, the voxel gets the
    organ with the higher probability.

    Args:
        scans: NIfTI files, DICOM files, zip archives of DICOM files, and folders of NIfTI or DICOM files.
        adapters: adapter files, all trained on the same encoder. Without an adapter, the classifiers of ``encoder``
            itself segment the organs that the encoder knows (zero-shot).
        output: output folder; created if it does not exist.
        organs: organs to segment if no adapter is given; empty means all organs that the encoder knows.
        encoder: encoder bundle; None searches for it beside the first adapter and in the working folder.
        series: number or UID of the DICOM series to segment, if exactly one scan is given; None means the CT series
            with the most slices.
        transduction: refit the classifiers of the adapters to each scan under a prior on organ sizes; None uses the
            adapters unchanged.
        largest_component: keep only the largest 26-connected component of each organ; None uses the setting stored in
            the adapter (see :mod:`fseft_edge.adaptation.cross_validation`).
        fill_holes: fill cavities that an organ encloses on all sides; None uses the setting stored in the adapter.
        preview: also write ``output/<case>.png``, a picture of three planes with the organ outlines.
        dicom: DICOM objects to write beside each mask file: ``seg`` (Segmentation), ``rtstruct`` (RT Structure Set) or
            both. All scans have to be DICOM series.
        cache: folder of the feature map cache; None means that no feature map is kept.
        cache_gb: maximum size of the cache in units of 1e9 bytes; the least recently used maps are deleted first. None
            means no limit.
        device: device to compute on (see :func:`fseft_edge.runtime.encoder.session.open_session`).
        backend: inference engine (see :func:`fseft_edge.runtime.encoder.session.open_session`).
        precision: number format of the encoder (see :func:`fseft_edge.runtime.encoder.session.open_session`).
        memory_gb: memory that may be used, in units of 1e9 bytes; None means 90 % of the free memory.
        vram_gb: GPU memory that may be used, in units of 1e9 bytes; None means 90 % of the free memory of the GPU.
        progress: display of the progress; None shows nothing.

    Returns:
        The segmented cases in the order of the scans.

    Raises:
        UsageError: no scan is given, neither an adapter nor an encoder is given, or the output folder contains the
            scans.
        InputError: the only scan, an adapter or the encoder is not usable.
        OutOfMemoryError: the memory budget is too small for the only scan.
        SomeCasesFailedError: several scans were given and some of them failed; the masks of the others are written.
    """
    progress = progress or SilentProgress()
    settings = SegmentationSettings(
        adapters=tuple(adapters),
        encoder=encoder,
        series=series,
        transduction=transduction,
        largest_component=largest_component,
        fill_holes=fill_holes,
        preview=preview,
        dicom=tuple(dicom),
        cache=cache,
        cache_gb=cache_gb,
        device=device,
        backend=backend,
        precision=precision,
        memory_gb=memory_gb,
        vram_gb=vram_gb,
        organs=tuple(organs),
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
            remedy="Read the reasons in the messages above. The masks of the other cases were written.",
            completed=done,
        )
    return done


def _outcomes(paths: Sequence[Path], segmenter: Segmenter, output: Path) -> Iterator[Future[SegmentedCase]]:
    """Yield the outcome of each case. Stages of several cases overlap only if no memory budget limits them."""
    if len(paths) > 1 and segmenter.settings.budget == AS_MUCH_AS_IS_FREE:
        yield from overlapped(
            paths, segmenter.read, segmenter.encode, lambda encoded: segmenter.finish(encoded, output)
        )
        return
    for path in paths:
        outcome: Future[SegmentedCase] = Future()
        try:
            outcome.set_result(segmenter.finish(segmenter.encode(segmenter.read(path)), output))
        except Exception as error:  # raised again by result() of this case's outcome
            outcome.set_exception(error)
        yield outcome
