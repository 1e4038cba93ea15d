"""Times of the stages of a scan, from its file to its feature map or its mask file.

The unchanged pipeline runs under the profiler of Python. The time of a stage is the time in its functions, without the
time of other stages that these functions call. The pipeline makes few calls that take long, so the profiler costs
almost no time.
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
from fseft_edge.runtime.encoder.whole_scan import stream_whole_scan
from fseft_edge.runtime.scans.grid import Grid
from fseft_edge.runtime.scans.nifti import write_label_map
from fseft_edge.runtime.scans.sources import Scan, find_scan, read_scan
from fseft_edge.segmentation.segment import segment

STAGES: Final = {
    "read": "read and check the file",
    "grid": "resample to the encoder's grid",
    "encode": "compute the network",
    "blend": "blend overlapping windows",
    "store": "hash, compress, write features",
    "adapter": "read features, classify",
    "back": "resample to the scan's lattice",
    "write": "write the mask file",
    "other": "everything else",
}
"""Description of each stage, in the order of the computation."""


def encoded(scan: Path, *, encoder: Path, backend: str, precision: Precision, device: str) -> None:
    """Compute and store the feature map of a scan file."""
    bundle = EncoderBundle.open(encoder)
    with open_session(bundle, device, backend, precision=precision) as session, open_store(None) as store:
        encode_scan(read_scan(scan), bundle=bundle, session=session, store=store)


def segmented(scan: Path, *, encoder: Path, backend: str, precision: Precision, device: str, adapter: Path) -> None:
    """Segment a scan file into a mask file."""
    with tempfile.TemporaryDirectory(prefix="fseft-edge-") as output:
        segment([scan], [adapter], Path(output), encoder=encoder, backend=backend, precision=precision, device=device)


@dataclass(frozen=True)
class StageTimes:
    """Seconds to open the encoder, and seconds of each stage in the order of the computation.

    Stages that were not part of the work, such as adapters, are omitted.
    """

    opening: float
    stages: dict[str, float]


def stage_times(work: Callable[[], object]) -> StageTimes:
    """Run the work and return the time of each stage."""
    profile = cProfile.Profile()
    started = time.perf_counter()
    profile.runcall(work)
    total = time.perf_counter() - started
    entries = {entry.code: entry.totaltime for entry in profile.getstats() if isinstance(entry.code, CodeType)}

    def inside(*functions: Callable[..., Any]) -> float:
        """Return the seconds in functions, including the functions they call; none of them may call another."""
        return sum(entries.get(cast("FunctionType", function).__code__, 0.0) for function in functions)

    section, windows, blended = inside(Grid.section), inside(EncoderSession.encode), inside(stream_features)
    in_one_pass = inside(stream_whole_scan)
    encode = in_one_pass - section if in_one_pass else windows
    adapter = inside(predict_sections)
    opening = inside(EncoderBundle.open, open_session)
    seconds = {
        "read": inside(find_scan, Scan.read),
        "grid": inside(Grid.of) + section,
        "encode": encode,
        "blend": 0.0 if in_one_pass else blended - section - windows,
        "store": inside(FeatureStore.key, FeatureStore.get, FeatureStore.build) - blended - in_one_pass,
        "adapter": adapter,
        "back": inside(Grid.to_source) - adapter,
        "write": inside(write_label_map),
    }
    seconds["other"] = total - opening - sum(seconds.values())
    return StageTimes(opening, {stage: value for stage, value in seconds.items() if value > 0.0})
