"""Where the time of a scan goes, from its file to its features or its mask.

The pipeline runs as it always does, under Python's own profiler; a stage is the time of the functions that do it, less
that of the stages they call. Nothing in the pipeline knows of it. The work is done in few calls of long ones, so
the profiler costs next to nothing.
"""

from __future__ import annotations

import cProfile
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any, Final, cast

from fseft_edge.masks.prediction import predict_sections
from fseft_edge.runtime.encoder.backends.base import EncoderSession
from fseft_edge.runtime.encoder.bundle import EncoderBundle, Precision
from fseft_edge.runtime.encoder.encoding import encode_scan
from fseft_edge.runtime.encoder.feature_store import FeatureStore, open_store
from fseft_edge.runtime.encoder.session import open_session
from fseft_edge.runtime.encoder.streaming import stream_features
from fseft_edge.runtime.scans.grid import Grid
from fseft_edge.runtime.scans.nifti import write_label_map
from fseft_edge.runtime.scans.sources import Scan, find_scan, read_scan
from fseft_edge.segmentation.segment import segment

STAGES: Final = {
    "read": "the file, unpacked and checked",
    "grid": "resampling to the encoder's lattice",
    "encode": "the network",
    "blend": "overlapping windows into one map",
    "store": "hashing, compressing, writing",
    "adapter": "features read back, classified",
    "back": "to the scan's own lattice",
    "write": "the mask",
    "other": "everything else",
}
"""The stages in the order of the work, and what each is."""


def encoded(scan: Path, *, encoder: Path, backend: str, precision: Precision, device: str) -> None:
    """Take a scan from its file to its stored features."""
    bundle = EncoderBundle.open(encoder)
    with open_session(bundle, device, backend, precision=precision) as session, open_store(None) as store:
        encode_scan(read_scan(scan), bundle=bundle, session=session, store=store)


def segmented(scan: Path, *, encoder: Path, backend: str, precision: Precision, device: str, adapter: Path) -> None:
    """Take a scan from its file to its mask."""
    with tempfile.TemporaryDirectory(prefix="fseft-edge-") as output:
        segment([scan], [adapter], Path(output), encoder=encoder, backend=backend, precision=precision, device=device)


@dataclass(frozen=True)
class StageTimes:
    """Seconds that opening the encoder took, and those of each stage in the order of the work.

    What the work did not do, such as adapters, is left out.
    """

    opening: float
    stages: dict[str, float]


def stage_times(work: Callable[[], object]) -> StageTimes:
    """Run work and return where its time went."""
    profile = cProfile.Profile()
    started = time.perf_counter()
    profile.runcall(work)
    total = time.perf_counter() - started
    entries = {entry.code: entry.totaltime for entry in profile.getstats() if isinstance(entry.code, CodeType)}

    def inside(*functions: Callable[..., Any]) -> float:
        """Seconds within functions, callees included; none of them calls another."""
        return sum(entries.get(cast("FunctionType", function).__code__, 0.0) for function in functions)

    section, encode, stream = inside(Grid.section), inside(EncoderSession.encode), inside(stream_features)
    adapter = inside(predict_sections)
    opening = inside(EncoderBundle.open, open_session)
    seconds = {
        "read": inside(find_scan, Scan.read),
        "grid": inside(Grid.of) + section,
        "encode": encode,
        "blend": stream - section - encode,
        "store": inside(FeatureStore.key, FeatureStore.get, FeatureStore.build) - stream,
        "adapter": adapter,
        "back": inside(Grid.to_source) - adapter,
        "write": inside(write_label_map),
    }
    seconds["other"] = total - opening - sum(seconds.values())
    return StageTimes(opening, {stage: value for stage, value in seconds.items() if value > 0.0})
