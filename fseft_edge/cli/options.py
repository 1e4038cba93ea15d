"""Options that several commands share."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import click

from fseft_edge.runtime.system.progress import ProgressDisplay, open_progress

if TYPE_CHECKING:
    from fseft_edge.runtime.encoder.bundle import Precision

PATH = click.Path(path_type=Path)
ORGAN_HELP = "What to segment and its label value in the annotation files: NAME=ID[,NAME=ID...]; may be repeated."
_GB = click.FloatRange(min=0, min_open=True)


@dataclass(frozen=True)
class Common:
    """What every command that encodes takes: where to compute, where to keep features, how much to take and to say."""

    device: str
    backend: str
    precision: Precision | Literal["auto"]
    cache: Path | None
    cache_gb: float
    memory: float | None
    vram: float | None
    quiet: bool

    def progress(self) -> ProgressDisplay:
        """Return a progress display for stderr."""
        return open_progress(quiet=self.quiet)


def logging_options(command: Callable[..., None]) -> Callable[..., None]:
    """Add ``--quiet`` and ``--verbose``, and set up logging to stderr; the command receives ``quiet``."""

    @click.option("-q", "--quiet", is_flag=True, help="Show errors and results only.")
    @click.option("-v", "--verbose", is_flag=True, help="Show what is decided and why.")
    @functools.wraps(command)
    def wrapped(*, quiet: bool, verbose: bool, **options: object) -> None:
        level = logging.ERROR if quiet else logging.INFO if verbose else logging.WARNING
        logging.basicConfig(level=max(level, logging.WARNING), format="%(levelname)s: %(message)s")
        logging.getLogger("fseft_edge").setLevel(level)
        command(quiet=quiet, **options)

    return wrapped


def common_options(command: Callable[..., None]) -> Callable[..., None]:
    """Add what :class:`Common` holds, and ``--verbose``; the command receives ``common``."""

    @click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N.")
    @click.option(
        "--backend",
        default="auto",
        show_default=True,
        help="auto, torch, onnxruntime, openvino, tensorrt_rtx or tensorrt.",
    )
    @click.option(
        "--precision",
        type=click.Choice(["auto", "float32", "mixed", "bfloat16"]),
        default="auto",
        show_default=True,
        help="What the encoder computes in; auto takes less than float32 only where it was shown to be as good.",
    )
    @click.option(
        "--cache", type=PATH, help="Folder in which feature maps are kept for later runs; nothing is kept without it."
    )
    @click.option(
        "--cache-gb",
        type=click.FloatRange(min=0),
        default=50.0,
        show_default=True,
        help="Size of the cache in GB; maps used least recently go first.",
    )
    @click.option("--memory", type=_GB, metavar="GB", help="Memory to take at most.  [default: 90 % of what is free]")
    @click.option("--vram", type=_GB, metavar="GB", help="Memory of the GPU to take at most.  [default: likewise]")
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
    """Add ``--dicom``; the command receives ``dicom``, the kinds of objects to write."""

    @click.option(
        "--dicom",
        "dicom",
        type=click.Choice(["seg", "rtstruct"]),
        multiple=True,
        help="Also write the mask of a DICOM series as Segmentation or RT Structure Set; may be repeated.",
    )
    @functools.wraps(command)
    def wrapped(**options: object) -> None:
        command(**options)

    return wrapped
