"""Options that several commands have in common."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import click

from fseft_edge.runtime.system.progress import Progress, open_progress

if TYPE_CHECKING:
    from fseft_edge.runtime.encoder.bundle import Precision

PATH = click.Path(path_type=Path)
ORGAN_HELP = (
    "Organ and its label value in label maps: NAME=ID[,NAME=ID...]. In annotations that name their structures: NAME, "
    "whose known names are searched, or 'NAME=ROI|OTHER ROI'. May be repeated."
)
_STRUCTURE_OPTIONS = (
    click.option(
        "--structure-set",
        metavar="CHOICE",
        help="In DICOM, which annotation of a CT to use: its number in the list of `contours`, its label, or the end "
        "of its SOP Instance UID.  [default: the newest approved one, else the newest one]",
    ),
    click.option(
        "--interpolate/--no-interpolate",
        default=True,
        show_default=True,
        help="If a structure has contours only on every second or n-th slice, fill the slices between them, or leave "
        "them empty.",
    ),
)


def structure_options(command: Callable[..., None]) -> Callable[..., None]:
    """Add the options ``--structure-set`` and ``--interpolate``."""
    for option in reversed(_STRUCTURE_OPTIONS):
        command = option(command)
    return command


_GB = click.FloatRange(min=0, min_open=True)
device_option = click.option("--device", default="auto", show_default=True, help="Device: auto, cpu, cuda or cuda:N.")
"""Adds ``--device``."""


@dataclass(frozen=True)
class Common:
    """Options of every command that encodes scans: device, backend, precision, cache, memory limits, messages."""

    device: str
    backend: str
    precision: Precision | Literal["auto"]
    cache: Path | None
    cache_gb: float
    memory: float | None
    vram: float | None
    quiet: bool

    def progress(self) -> AbstractContextManager[Progress]:
        """Return a progress display that writes to stderr."""
        return open_progress(quiet=self.quiet)


def logging_options(command: Callable[..., None]) -> Callable[..., None]:
    """Add ``--quiet`` and ``--verbose``, and configure logging to stderr; the command receives ``quiet``."""

    @click.option("-q", "--quiet", is_flag=True, help="Print only errors and results.")
    @click.option("-v", "--verbose", is_flag=True, help="Also print decisions and their reasons.")
    @functools.wraps(command)
    def wrapped(*, quiet: bool, verbose: bool, **options: object) -> None:
        level = logging.ERROR if quiet else logging.INFO if verbose else logging.WARNING
        logging.basicConfig(level=max(level, logging.WARNING), format="%(levelname)s: %(message)s")
        logging.getLogger("fseft_edge").setLevel(level)
        command(quiet=quiet, **options)

    return wrapped


def common_options(command: Callable[..., None]) -> Callable[..., None]:
    """Add the options of :class:`Common` and ``--verbose``; the command receives ``common``."""

    @device_option
    @click.option(
        "--backend",
        default="auto",
        show_default=True,
        help="Software that computes the encoder: auto, torch, onnxruntime, openvino, tensorrt_rtx or tensorrt.",
    )
    @click.option(
        "--precision",
        type=click.Choice(["auto", "float32", "mixed", "bfloat16"]),
        default="auto",
        show_default=True,
        help="Precision of the encoder's computation; auto uses less than float32 only if the bundle records that the "
        "masks are as good.",
    )
    @click.option(
        "--cache", type=PATH, help="Folder in which feature maps are stored for later runs.  [default: no cache]"
    )
    @click.option(
        "--cache-gb",
        type=click.FloatRange(min=0),
        default=50.0,
        show_default=True,
        help="Largest size of the cache in GB; the least recently used feature maps are deleted first.",
    )
    @click.option(
        "--memory",
        type=_GB,
        metavar="GB",
        help="Memory limit for encoding and segmentation of one scan: scans are then processed one after another. All "
        "worker processes of a batch share it.  [default: 90 % of the free memory]",
    )
    @click.option(
        "--vram",
        type=_GB,
        metavar="GB",
        help="GPU memory limit, with the same meaning.  [default: 90 % of the free GPU memory]",
    )
    @logging_options
    @functools.wraps(command)
    def wrapped(
        *,
        device: str,
        backend: str,
        precision: Precision | Literal["auto"],
        cache: Path | None,
        cache_gb: float,
        memory: float | None,
        vram: float | None,
        quiet: bool,
        **options: object,
    ) -> None:
        command(common=Common(device, backend, precision, cache, cache_gb, memory, vram, quiet), **options)

    return wrapped


def dicom_option(command: Callable[..., None]) -> Callable[..., None]:
    """Add ``--dicom``; the command receives ``dicom``, the kinds of DICOM objects to write."""

    @click.option(
        "--dicom",
        "dicom",
        type=click.Choice(["seg", "rtstruct"]),
        multiple=True,
        help="For DICOM series, also write the mask as a DICOM Segmentation (seg) or an RT Structure Set (rtstruct). "
        "May be repeated.",
    )
    @functools.wraps(command)
    def wrapped(**options: object) -> None:
        command(**options)

    return wrapped


def follow_size_option(command: Callable[..., None]) -> Callable[..., None]:
    """Add ``--follow-size`` and ``--no-follow-size``; the command receives ``follow_size``."""

    @click.option(
        "--follow-size/--no-follow-size",
        default=True,
        show_default=True,
        help="Move the threshold of an organ so that its mask has an expected size, if the cross-validation of the "
        "adapter has shown that this helps. With --no-follow-size, all thresholds are a probability of 0.5.",
    )
    @functools.wraps(command)
    def wrapped(**options: object) -> None:
        command(**options)

    return wrapped


def whole_scan_option(command: Callable[..., None]) -> Callable[..., None]:
    """Add ``--whole-scan``; the command receives ``whole_scan``."""

    @click.option(
        "--whole-scan",
        is_flag=True,
        help="Encode all windows of a scan. Without this option, an adapter with a locator encodes and segments only "
        "the part of a scan where its organs are located. No effect if the encoder computes whole scans in one pass.",
    )
    @functools.wraps(command)
    def wrapped(**options: object) -> None:
        command(**options)

    return wrapped


def counted(number: int, thing: str) -> str:
    """Return a number with the thing that it counts: ``1 case``, ``2 cases``."""
    return f"{number} {thing}{'' if number == 1 else 's'}"
