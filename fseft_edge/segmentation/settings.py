"""Settings of a segmentation, for this process or for workers."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from fseft_edge.adaptation.transduction import TransductionInputs
from fseft_edge.runtime.encoder.bundle import Precision
from fseft_edge.runtime.system.memory import Budget

if TYPE_CHECKING:
    from fseft_edge.dicom_output import DicomKind


@dataclass(frozen=True)
class SegmentationSettings:
    """Settings of a segmentation. They consist of paths and plain values, so they can be sent to another process.

    Attributes:
        adapters: adapter files, all trained on the same encoder. Without an adapter, the classifiers of the encoder
            itself segment the organs that the encoder knows (zero-shot).
        encoder: encoder bundle, or the name of a built-in encoder; None searches for the bundle (see
            :func:`fseft_edge.adapters.find_encoder.find_encoder`).
        series: DICOM series of a scan (see :func:`fseft_edge.runtime.scans.dicom.choose_series`).
        transduction: refit the classifiers of the adapters to each scan under a prior on organ sizes; None uses the
            adapters unchanged.
        largest_component: keep only the largest 26-connected component of each organ; None uses the setting stored in
            the adapter (see :mod:`fseft_edge.adaptation.cross_validation`).
        fill_holes: fill cavities that an organ encloses on all sides; None uses the setting stored in the adapter.
        preview: also write a picture of three planes with the organ outlines.
        dicom: DICOM objects to write beside the mask file of a DICOM series: ``seg``, ``rtstruct`` or both.
        cache: folder of the feature map cache; None means that no feature map is kept.
        cache_gb: maximum size of the cache in units of 1e9 bytes; the least recently used maps are deleted first. None
            means no limit.
        device: device to compute on (see :func:`fseft_edge.runtime.encoder.session.open_session`).
        backend: inference engine (see :func:`fseft_edge.runtime.encoder.session.open_session`).
        precision: number format of the encoder (see :func:`fseft_edge.runtime.encoder.session.open_session`).
        memory_gb: memory that may be used, in units of 1e9 bytes; None means 90 % of the free memory.
        vram_gb: GPU memory that may be used, in units of 1e9 bytes; None means 90 % of the free memory of the GPU.
        organs: organs to segment if no adapter is given; empty means all organs that the encoder knows.
        save_probabilities: also write the probabilities of each organ, before post-processing.
        split: also write a separate mask file for each organ.
        whole_scan: encode and segment whole scans, although the adapters have locators.
        follow_size: move the threshold of each organ towards its expected size, where the adapter says so (see
            :mod:`fseft_edge.adaptation.size_threshold`). If not, all thresholds are a probability of 0.5.
        processes: number of processes on this machine that segment with these settings and share its memory and cores.

    Raises:
        UsageError: a memory budget is not positive.
    """

    adapters: tuple[Path, ...]
    encoder: Path | None = None
    series: str | None = None
    transduction: TransductionInputs | None = None
    largest_component: bool | None = None
    fill_holes: bool | None = None
    preview: bool = False
    dicom: tuple[DicomKind, ...] = ()
    cache: Path | None = None
    cache_gb: float | None = 50.0
    device: str = "auto"
    backend: str = "auto"
    precision: Precision | Literal["auto"] = "auto"
    memory_gb: float | None = None
    vram_gb: float | None = None
    organs: tuple[str, ...] = ()
    save_probabilities: bool = False
    split: bool = False
    whole_scan: bool = False
    follow_size: bool = True
    processes: int = 1

    def __post_init__(self) -> None:
        # A Python caller may give paths as text.
        object.__setattr__(self, "adapters", tuple(Path(path) for path in self.adapters))
        for name in ("encoder", "cache"):
            value = getattr(self, name)
            object.__setattr__(self, name, value and Path(value))
        self.budget  # noqa: B018 - raises UsageError if a budget is not positive

    def absolute(self, encoder: Path) -> SegmentationSettings:
        """Return these settings with absolute paths and this encoder, for a process that works in another folder."""
        return replace(
            self,
            adapters=tuple(path.absolute() for path in self.adapters),
            encoder=encoder.absolute(),
            cache=self.cache and self.cache.absolute(),
            transduction=self.transduction and self.transduction.absolute(),
        )

    @property
    def budget(self) -> Budget:
        """Memory that each process may use."""
        return Budget.of(self.memory_gb, self.vram_gb, self.processes)
