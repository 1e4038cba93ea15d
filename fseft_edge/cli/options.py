"""Options that several commands share."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import click

from fseft_edge.report.progress import ProgressDisplay, open_progress

PATH = click.Path(path_type=Path)


@dataclass(frozen=True)
class Common:
    """What every command that encodes takes: where to compute, where to keep features, how much to say."""

    device: str
    backend: str
    cache: Path | None
    cache_gb: float
    quiet: bool

    def progress(self) -> ProgressDisplay:
        """Return a progress display for stderr."""
        return open_progress(quiet=self.quiet)


def talk_options(command: Callable[..., None]) -> Callable[..., None]:
    """Add ``--quiet`` and ``--verbose``, and set up logging to stderr; the command receives ``quiet``."""

    @click.option("-q", "--quiet", is_flag=True, help="Show errors and results only.")
    @click.option("-v", "--verbose", is_flag=True, help="Show what is decided and why.")
    @functools.wraps(command)
    def wrapped(*, quiet: bool, verbose: bool, **options: object) -> None:
        level = logging.ERROR if quiet else logging.INFO if verbose else logging.WARNING
        logging.basicConfig(level=level, format="%(levelname)s: %(message)s")
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
        "--cache", type=PATH, help="Folder in which feature maps are kept for later runs; nothing is kept without it."
    )
    @click.option(
        "--cache-gb",
        type=click.FloatRange(min=0),
        default=50.0,
        show_default=True,
        help="Size of the cache in GB; maps used least recently go first.",
    )
    @talk_options
    @functools.wraps(command)
    def wrapped(
        *, device: str, backend: str, cache: Path | None, cache_gb: float, quiet: bool, **options: object
    ) -> None:
        command(common=Common(device, backend, cache, cache_gb, quiet), **options)

    return wrapped
