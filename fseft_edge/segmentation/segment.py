"""Segment many scans, one after another or overlapping: the function behind ``fseft-edge segment``.

This module checks the arguments and collects results and failures; ``segmenter.py`` segments each scan.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeAlias, TypedDict, Unpack, overload

from fseft_edge.adaptation.transduction import TransductionInputs
from fseft_edge.adapters.file import AdapterFile
from fseft_edge.masks.mask_image import Mask
from fseft_edge.masks.result import SegmentedCase
from fseft_edge.outbox.records import printable
from fseft_edge.runtime.encoder.bundle import Precision
from fseft_edge.runtime.errors import SomeCasesFailedError, UsageError
from fseft_edge.runtime.scans.given import GivenScan, given_scan, one_or_many
from fseft_edge.runtime.scans.sources import Scan
from fseft_edge.runtime.system.memory import AS_MUCH_AS_IS_FREE
from fseft_edge.runtime.system.overlap import overlapped
from fseft_edge.runtime.system.progress import Progress, SilentProgress
from fseft_edge.segmentation.failures import as_known_error, reason_and_remedy
from fseft_edge.segmentation.inputs import (
    cases_of,
    check_dicom,
    check_output,
    check_series,
    name_of,
    no_scan,
)
from fseft_edge.segmentation.models import LoadedModels, load_models
from fseft_edge.segmentation.segmenter import EncodedCase, ReadCase, Segmenter, open_segmenter
from fseft_edge.segmentation.settings import SegmentationSettings

if TYPE_CHECKING:
    from fseft_edge.dicom_output import DicomKind

_LOG = logging.getLogger(__name__)


GivenAdapter: TypeAlias = str | Path | AdapterFile
"""An adapter: path of an adapter file, or the adapter that :func:`fseft_edge.adapt` returned."""


class SegmentOptions(TypedDict, total=False):
    """The options of :func:`segment`; its docstring describes them."""

    organs: str | Sequence[str]
    encoder: str | Path | None
    series: str | None
    transduction: TransductionInputs | None
    largest_component: bool | None
    fill_holes: bool | None
    preview: bool
    dicom: Sequence[DicomKind]
    save_probabilities: bool
    split: bool
    whole_scan: bool
    follow_size: bool
    skip_existing: bool
    cache: str | Path | None
    cache_gb: float | None
    device: str
    backend: str
    precision: Precision | Literal["auto"]
    memory_gb: float | None
    vram_gb: float | None
    progress: Progress | None


@overload
def segment(  # type: ignore[overload-overlap]  # a text is also a sequence of texts; this signature has priority
    scans: GivenScan,
    adapters: GivenAdapter | Sequence[GivenAdapter] = (),
    output: None = None,
    **options: Unpack[SegmentOptions],
) -> Mask: ...


@overload
def segment(
    scans: Sequence[GivenScan],
    adapters: GivenAdapter | Sequence[GivenAdapter] = (),
    output: None = None,
    **options: Unpack[SegmentOptions],
) -> list[Mask]: ...


@overload
def segment(
    scans: GivenScan | Sequence[GivenScan],
    adapters: GivenAdapter | Sequence[GivenAdapter],
    output: str | Path,
    **options: Unpack[SegmentOptions],
) -> list[SegmentedCase]: ...


@overload
def segment(
    scans: GivenScan | Sequence[GivenScan],
    adapters: GivenAdapter | Sequence[GivenAdapter] = (),
    *,
    output: str | Path,
    **options: Unpack[SegmentOptions],
) -> list[SegmentedCase]: ...


def segment(
    scans: GivenScan | Sequence[GivenScan],
    adapters: GivenAdapter | Sequence[GivenAdapter] = (),
    output: str | Path | None = None,
    *,
    organs: str | Sequence[str] = (),
    encoder: str | Path | None = None,
    series: str | None = None,
    transduction: TransductionInputs | None = None,
    largest_component: bool | None = None,
    fill_holes: bool | None = None,
    preview: bool = False,
    dicom: Sequence[DicomKind] = (),
    save_probabilities: bool = False,
    split: bool = False,
    whole_scan: bool = False,
    follow_size: bool = True,
    skip_existing: bool = False,
    cache: str | Path | None = None,
    cache_gb: float | None = 50.0,
    device: str = "auto",
    backend: str = "auto",
    precision: Precision | Literal["auto"] = "auto",
    memory_gb: float | None = None,
    vram_gb: float | None = None,
    progress: Progress | None = None,
) -> Mask | list[Mask] | list[SegmentedCase]:
    """Segment CTs, in memory or into a folder.

    Without ``output``, the result is in memory: the mask of one CT, or a list of masks for a list of CTs. With
    ``output``, this function writes ``output/<case>.nii.gz`` and ``output/<case>.json`` for each CT.

    Organs keep the label values of their annotations. If two adapters use the same value, the organs are numbered 1 to
    K in the order of the adapters and of their organs, with a warning. Where organs overlap, the voxel gets the organ
    with the higher probability.

    All files of a case appear together. They replace the files of an earlier result of the same name.

    Args:
        scans: one CT or several: NIfTI files, DICOM files, zip archives of DICOM files, folders of NIfTI or DICOM
            files, NIfTI images of nibabel, and ``Volume`` objects.
        adapters: one adapter or several, all trained on the same encoder: adapter files, or adapters that
            :func:`fseft_edge.adapt` returned. Without an adapter, the classifiers of ``encoder`` itself segment the
            organs that the encoder knows (zero-shot).
        output: output folder; created if it does not exist. None returns the masks in memory.
        organs: name or names of organs to segment without an adapter; empty means all organs that the encoder knows.
        encoder: encoder bundle, or the name of a built-in encoder; None searches for the bundle beside the first
            adapter, in the working folder, and among the built-in encoders that were exported for this user.
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
        save_probabilities: also write ``output/<case>/<organ>.probability.nii.gz``, the probability of each organ on
            the lattice of the scan, from 0 to 1, before post-processing.
        split: also write ``output/<case>/<organ>.nii.gz``, a mask of each organ with the value 1.
        whole_scan: encode and segment whole scans. Without it, an adapter with a locator of an encoder with windows
            segments only the part of a scan where its organs are located; voxels elsewhere are background.
        follow_size: move the threshold of each organ towards its expected size, where the adapter says so (see
            :mod:`fseft_edge.adaptation.size_threshold`). If not, all thresholds are a probability of 0.5.
        skip_existing: do not segment a scan again if ``output`` contains its complete result: the same scan, encoder,
            adapters and options, every wanted file, and no file changed since it was written.
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
        Without ``output``, a mask or a list of masks, each a NIfTI image of nibabel on the lattice of its CT. With
        ``output``, the segmented cases in the order of the scans.

    Raises:
        UsageError: no scan is given, neither an adapter nor an encoder is given, the output folder contains the scans,
            or an option needs an output folder.
        InputError: the only scan, an adapter or the encoder is not usable.
        OutOfMemoryError: the memory budget is too small for the only scan.
        SomeCasesFailedError: several scans were given and some of them failed; the masks of the others are written.
            Also if a picture or a DICOM object of a case could not be written; its mask is written then.
    """
    progress = progress or SilentProgress()
    given = [adapters] if isinstance(adapters, str | Path | AdapterFile) else list(adapters)
    settings = SegmentationSettings(
        adapters=tuple(Path(adapter) for adapter in given if not isinstance(adapter, AdapterFile)),
        encoder=None if encoder is None else Path(encoder),
        series=series,
        transduction=transduction,
        largest_component=largest_component,
        fill_holes=fill_holes,
        preview=preview,
        dicom=tuple(dicom),
        save_probabilities=save_probabilities,
        split=split,
        whole_scan=whole_scan,
        follow_size=follow_size,
        cache=None if cache is None else Path(cache),
        cache_gb=cache_gb,
        device=device,
        backend=backend,
        precision=precision,
        memory_gb=memory_gb,
        vram_gb=vram_gb,
        organs=_names(organs),
    )
    in_memory = [adapter for adapter in given if isinstance(adapter, AdapterFile)]
    models = load_models(settings, in_memory) if in_memory else None
    if output is None:
        _check_no_files(settings, skip_existing=skip_existing)
        single, listed = one_or_many(scans)
        if not listed:
            raise no_scan()
        check_series(series, len(listed))
        found = [given_scan(scan, series) for scan in listed]
        masks: list[Mask] = []
        with (
            open_segmenter(settings, progress, models=models) as segmenter,
            progress.task("segment", len(found)) as task,
        ):
            for scan in found:
                masks.append(segmenter.mask(scan))
                task.advance(1)
        return masks[0] if single else masks
    cases = cases_of(scans, series)
    return _into_folder(
        cases, Path(output), settings=settings, models=models, skip_existing=skip_existing, progress=progress
    )


def _names(organs: str | Sequence[str]) -> tuple[str, ...]:
    if isinstance(organs, Mapping):
        raise UsageError(
            "organs contains label values, but segment only takes names of organs of the encoder.",
            remedy="Give a list of names, such as organs=['mandible']. Their label values in the mask are 1 to K.",
        )
    return (organs,) if isinstance(organs, str) else tuple(organs)


def _check_no_files(settings: SegmentationSettings, *, skip_existing: bool) -> None:
    """Raise UsageError if an option writes files, because there is no output folder."""
    options = {
        "preview": settings.preview,
        "dicom": settings.dicom,
        "save_probabilities": settings.save_probabilities,
        "split": settings.split,
        "skip_existing": skip_existing,
    }
    for option, given in options.items():
        if given:
            raise UsageError(
                f"The option {option} needs an output folder.", remedy=f"Give the argument output, or omit {option}."
            )


def _into_folder(
    paths: Sequence[Path | Scan],
    output: Path,
    *,
    settings: SegmentationSettings,
    models: LoadedModels | None,
    skip_existing: bool,
    progress: Progress,
) -> list[SegmentedCase]:
    """Segment CTs into a folder, and collect results and failures."""
    check_output(output, paths)
    if settings.dicom:
        check_dicom(paths)
    done: list[SegmentedCase] = []
    failed: list[str] = []
    with open_segmenter(settings, progress, models=models) as segmenter, progress.task("segment", len(paths)) as task:
        stages = _Stages(segmenter, output, skip_existing)
        for path, outcome in zip(paths, _outcomes(paths, stages), strict=True):
            try:
                done.append(outcome.result())
            except Exception as error:
                if len(paths) == 1:
                    known = as_known_error(error)
                    if known is error:
                        raise
                    raise known from None
                failed.append(printable(name_of(path)))
                _LOG.error("%s failed: %s", failed[-1], " ".join(reason_and_remedy(error)))
            task.advance(1)
    incomplete = [f"{printable(case.case)} ({', '.join(case.not_written)})" for case in done if case.not_written]
    if failed or incomplete:
        counts = [f"{len(failed)} of {len(paths)} cases failed: {', '.join(failed)}."] if failed else []
        if incomplete:
            counts.append(
                f"Results of {len(incomplete)} of {len(paths)} cases are not complete: {', '.join(incomplete)}."
            )
        raise SomeCasesFailedError(
            " ".join(counts),
            remedy="Read the reasons in the messages above. The masks of the other cases were written."
            if failed
            else "Read the reasons in the messages above. The masks were written.",
            completed=done,
        )
    return done


class _Stages:
    """The stages of a case. A complete result that exists passes through them unchanged."""

    def __init__(self, segmenter: Segmenter, output: Path, skip_existing: bool) -> None:
        self.segmenter = segmenter
        self._output = output
        self._skip_existing = skip_existing

    def read(self, path: Path | Scan) -> ReadCase | SegmentedCase:
        self.segmenter.check_output(name_of(path), self._output)
        existing = self.segmenter.existing(path, self._output) if self._skip_existing else None
        return existing or self.segmenter.read(path)

    def encode(self, case: ReadCase | SegmentedCase) -> EncodedCase | SegmentedCase:
        return case if isinstance(case, SegmentedCase) else self.segmenter.encode(case)

    def finish(self, case: EncodedCase | SegmentedCase) -> SegmentedCase:
        return case if isinstance(case, SegmentedCase) else self.segmenter.finish(case, self._output)


def _outcomes(paths: Sequence[Path | Scan], stages: _Stages) -> Iterator[Future[SegmentedCase]]:
    """Yield the outcome of each case. Stages of several cases overlap only if no memory budget limits them."""
    if len(paths) > 1 and stages.segmenter.settings.budget == AS_MUCH_AS_IS_FREE:
        yield from overlapped(paths, stages.read, stages.encode, stages.finish)
        return
    for path in paths:
        outcome: Future[SegmentedCase] = Future()
        try:
            outcome.set_result(stages.finish(stages.encode(stages.read(path))))
        except Exception as error:  # raised again by result() of this case's outcome
            outcome.set_exception(error)
        yield outcome
