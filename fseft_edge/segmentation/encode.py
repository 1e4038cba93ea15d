"""The feature map of one CT, for programs that use the features themselves."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Literal

from fseft_edge.export.built_in import open_encoder
from fseft_edge.runtime.encoder.bundle import Precision
from fseft_edge.runtime.encoder.encoding import EncodedScan, encode_scan
from fseft_edge.runtime.encoder.feature_store import open_store
from fseft_edge.runtime.encoder.session import open_session
from fseft_edge.runtime.scans.given import GivenScan, given_scan
from fseft_edge.runtime.system.memory import Budget

_LOG = logging.getLogger(__name__)


def encode(
    scan: GivenScan,
    encoder: str | Path = "edge_base",
    *,
    series: str | None = None,
    cache: str | Path | None = None,
    cache_gb: float | None = None,
    device: str = "auto",
    backend: str = "auto",
    precision: Precision | Literal["auto"] = "auto",
    memory_gb: float | None = None,
    vram_gb: float | None = None,
) -> EncodedScan:
    """Return the feature map of a CT.

    The attribute ``levels`` of the result lists the levels, finest first. ``array(level)`` returns a level as an array
    ``[C, X, Y, Z]``, ``affine(level)`` its position in RAS+ mm, and ``features.read(...)`` a box of a level.

    Args:
        scan: path of a NIfTI file or DICOM series, NIfTI image of nibabel, or ``Volume``.
        encoder: encoder bundle, or the name of a built-in encoder.
        series: number or UID of the DICOM series; None means the CT series with the most slices.
        cache: folder of the feature map cache; None keeps the feature map in an unnamed temporary file, which is
            deleted together with the returned object.
        cache_gb: largest size of the cache in units of 1e9 bytes; None sets no limit.
        device: device to compute on (see :func:`fseft_edge.runtime.encoder.session.open_session`).
        backend: inference engine (see :func:`fseft_edge.runtime.encoder.session.open_session`).
        precision: number format of the encoder (see :func:`fseft_edge.runtime.encoder.session.open_session`).
        memory_gb: memory that may be used, in units of 1e9 bytes; None means 90 % of the free memory.
        vram_gb: GPU memory that may be used, in units of 1e9 bytes; None means 90 % of the free memory of the GPU.

    Raises:
        UsageError: the path contains several scans, or an argument is not usable.
        InputError: the scan or the encoder is not usable.
        OutOfMemoryError: the memory budget is too small for the scan.
        OutOfSpaceError: the feature map cannot be written.
    """
    budget = Budget.of(memory_gb, vram_gb)
    bundle = open_encoder(encoder)
    found = given_scan(scan, series)
    volume = found.read()
    for warning in volume.warnings:
        _LOG.warning("%s: %s", found.name, warning)
    with (
        open_store(None if cache is None else Path(cache), cache_gb) as store,
        open_session(bundle, device, backend, precision=precision) as session,
    ):
        return encode_scan(volume, bundle=bundle, session=session, store=store, budget=budget)
