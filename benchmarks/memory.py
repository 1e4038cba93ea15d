"""Memory of encoding and segmenting one scan, predicted and measured: `make benchmark BENCHMARK=memory`.

Every measurement runs in a separate process. The script prints

- the predicted and measured peak of encoding with each backend, and of segmenting from the cached feature map;
- hashes of features and masks, without a memory limit and with the smallest memory plan, whose limit is taken from the
  error messages;
- for an encoder with windows, the number of windows that contain only air, and the time saved by encoding them once;
- whether a scan can be segmented under a hard limit (RLIMIT_DATA: heap, stacks and other private writable memory,
  without mapped files).
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import headneck
import numpy as np
from numpy.typing import NDArray

from fseft_edge.adaptation.adapt import describe, head_rows
from fseft_edge.adaptation.training import TrainedAdapter
from fseft_edge.adapters.file import write_adapter
from fseft_edge.adapters.network import Adapter, AdapterSettings
from fseft_edge.export.zoo import MODELS
from fseft_edge.masks.memory_plan import plans as segmentation_plans
from fseft_edge.runtime.encoder.backends.base import EncoderSession
from fseft_edge.runtime.encoder.bundle import EncoderBundle
from fseft_edge.runtime.encoder.encoding import OVERLAP, encode_scan, held_after_encoding
from fseft_edge.runtime.encoder.encoding_plan import encoding_of
from fseft_edge.runtime.encoder.feature_map import FeatureMap
from fseft_edge.runtime.encoder.feature_store import open_store
from fseft_edge.runtime.encoder.session import open_session
from fseft_edge.runtime.encoder.streaming import stream_features
from fseft_edge.runtime.encoder.whole_scan import whole_scan_plans
from fseft_edge.runtime.encoder.windows import WindowLayout
from fseft_edge.runtime.errors import OutOfMemoryError
from fseft_edge.runtime.scans.grid import Grid
from fseft_edge.runtime.scans.nifti import read_ct
from fseft_edge.runtime.scans.organs import OrganLabel
from fseft_edge.runtime.scans.volume import Volume
from fseft_edge.runtime.system.memory import Budget, Footprint
from fseft_edge.segmentation.segment import segment

MIB = 1 << 20
ORGANS = [OrganLabel("brainstem", 1), OrganLabel("spinal_cord", 2), OrganLabel("mandible", 3)]
_SLACK = 24 * MIB  # growth of the process between the prediction and the work


def peak() -> int:
    """Return the peak memory of this process in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


def layout_of(volume: Volume, bundle: EncoderBundle) -> WindowLayout:
    """Return the positions of the windows of a scan."""
    shape = Grid.of(volume, bundle.preprocessing).shape
    return WindowLayout.plan(shape, bundle.window, max(level.stride for level in bundle.levels), OVERLAP)


def spatial_adapter(bundle: EncoderBundle) -> Adapter:
    """Return an untrained spatial adapter with the classifiers of the encoder's head."""
    adapter = Adapter(AdapterSettings("spatial", "all"), bundle.levels, len(ORGANS))
    adapter.start_from_head(head_rows(bundle, ORGANS))
    return adapter.eval()


def planned(volume: Volume, bundle: EncoderBundle, session: EncoderSession) -> dict[str, Footprint]:
    """Return the memory plans of an encoding, the fastest first: where its largest part is, and the predicted memory.

    For an encoder that computes whole scans, this part is the planes that wait; else it is the sums of windows.
    """
    if bundle.whole_scan is None:
        plans = encoding_of(layout_of(volume, bundle), bundle, session).plans()
        return {f"sums: {plan.place}, {plan.batch}, {plan.section_slices}": plan.footprint for plan in plans}
    shape = Grid.of(volume, bundle.preprocessing).shape
    return {
        f"planes: {'disk' if plan.on_disk else 'memory'}, sections of {plan.section_slices}": plan.footprint
        for plan in whole_scan_plans(shape, session)
    }


def encode(bundle: EncoderBundle, scan: Path, backend: str, which: int, cache: Path | None) -> dict[str, object]:
    """Return the predicted memory and the time in seconds of encoding with one of the memory plans."""
    volume = read_ct(scan)
    with open_session(bundle, backend=backend) as session, open_store(cache) as store:
        plans = planned(volume, bundle, session)
        name, footprint = list(plans.items())[which]
        budget = Budget(ram=footprint.ram + _SLACK)
        started = time.monotonic()
        encoded = encode_scan(volume, bundle=bundle, session=session, store=store, budget=budget)
        seconds = time.monotonic() - started
        features = features_hash(encoded.features)
    what = f"encode, {backend}, {name}"
    return {"what": what, "predicted": footprint.ram, "seconds": seconds, "result": features}


def features_hash(features: FeatureMap) -> str:
    """Return a hash of all features, which are read in thin sections."""
    digest = hashlib.sha256()
    for level in range(len(features.levels)):
        x, y, z = features.meta.level_shape(level)
        for start in range(0, z, 4):
            digest.update(features.read(level, (0, x), (0, y), (start, min(start + 4, z))).numpy().tobytes())
    return digest.hexdigest()[:12]


def segment_from_cache(bundle: EncoderBundle, scan: Path, adapter: Path, cache: Path, which: int) -> dict[str, object]:
    """Return the predicted memory and the time of segmenting from a cached feature map with one of the memory plans."""
    grid = Grid.of(read_ct(scan), bundle.preprocessing)
    with open_session(bundle) as session:
        held = held_after_encoding(grid, bundle, session)
    plan = list(segmentation_plans(grid, [spatial_adapter(bundle)], held))[which]
    budget = plan.footprint.ram / 1e9 if which else None
    result = segment_within(bundle, scan, adapter, budget, 0, cache=cache)
    return {**result, "what": f"segment, tile {plan.tile}, slab {plan.slab}", "predicted": plan.footprint.ram}


def segment_within(
    bundle: EncoderBundle, scan: Path, adapter: Path, gigabytes: float | None, limit: int, *, cache: Path | None = None
) -> dict[str, object]:
    """Return the hash of a mask that was computed within a memory limit and a hard limit (0: no hard limit).

    A memory limit that is too small is replaced by the smallest possible limit, which the error message states.
    """
    if limit:
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    with tempfile.TemporaryDirectory() as output:
        started = time.monotonic()
        while True:
            try:
                (case,) = segment(
                    [scan], [adapter], Path(output), encoder=bundle.path, memory_gb=gigabytes, cache=cache
                )
                break
            except OutOfMemoryError as error:
                if gigabytes is None or f"{gigabytes:.2f} GB is too small" not in error.message:
                    raise
                gigabytes = float(error.remedy.split()[2]) + 0.01
        mask = hashlib.sha256(case.mask.read_bytes()).hexdigest()
        volumes = {organ.name: organ.volume_ml for organ in case.organs}
    seconds = time.monotonic() - started
    what = f"segment within {'what is free' if gigabytes is None else f'{gigabytes:.2f} GB'}"
    return {"what": what, "result": mask[:12], "volumes": volumes, "seconds": seconds}


def air(bundle: EncoderBundle, scan: Path) -> dict[str, object]:
    """Return the number of windows of air on the encoder's grid and on FSEFT's grid, and the ratio of processor times.

    FSEFT's grid has voxels of 1.5 mm and is not cropped to the body. The ratio is the time of encoding every window of
    air, divided by the time of encoding one window of air, for this encoder on FSEFT's grid.
    """
    volume = read_ct(scan)
    published = MODELS["fseft"].published
    assert published is not None  # noqa: S101 - a published model has a description
    shares: dict[str, str] = {}
    own = max(level.stride for level in bundle.levels)
    for name, preprocessing, coarsest in (
        ("own grid", bundle.preprocessing, own),
        ("FSEFT's grid", published.preprocessing, 16),
    ):
        grid = Grid.of(volume, preprocessing)
        layout = WindowLayout.plan(grid.shape, bundle.window, coarsest, OVERLAP)
        image = np.zeros(layout.padded_shape, np.float32)
        x, y, z = grid.shape
        image[:x, :y, :z] = grid.section(volume, 0, z)
        windows = [
            bool(image[tuple(slice(o, o + n) for o, n in zip(corner, layout.window, strict=True))].any())
            for corner in itertools.product(*layout.origins)
        ]
        shares[name] = f"{windows.count(False)} of {len(windows)}"
    seconds = []
    # The smallest positive number instead of 0: every window is encoded, and the features do not change.
    for least in (0.0, 1e-45):
        started = time.process_time()
        with open_session(bundle) as session:
            for _section in stream_features(_at_least(least, volume, grid), layout, session):
                pass
        seconds.append(time.process_time() - started)
    return {"what": "air", "windows": shares, "ratio": round(seconds[1] / seconds[0], 3)}


def _at_least(least: float, volume: Volume, grid: Grid) -> Callable[[int, int], NDArray[np.float32]]:
    return lambda start, stop: np.maximum(grid.section(volume, start, stop), np.float32(least))


def measure(arguments: argparse.Namespace) -> None:
    """Run one measurement in this process and print the result as JSON."""
    bundle = EncoderBundle.open(arguments.encoder)
    kind, *rest = arguments.measure.split(",")
    scan, adapter, cache = arguments.scan, arguments.adapter, arguments.cache
    if kind == "encode":
        result = encode(bundle, scan, rest[0], int(rest[1]), cache if rest[2] == "keep" else None)
    elif kind == "segment":
        result = segment_from_cache(bundle, scan, adapter, cache, int(rest[0]))
    elif kind == "within":
        result = segment_within(bundle, scan, adapter, float(rest[0]) or None, int(float(rest[1]) * (1 << 30)))
    else:
        result = air(bundle, scan)
    print(json.dumps({**result, "peak": peak()}))


def main() -> None:
    """Measure and print Markdown tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scan", type=Path, action="append", help="may be repeated")
    parser.add_argument("--encoder", type=Path)
    parser.add_argument("--backend", nargs="+", default=["torch", "onnxruntime"])
    parser.add_argument("--limit", type=float, default=3.0, help="hard limit in GiB")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    parser.add_argument("--adapter", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--cache", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        arguments.scan = arguments.scan[0]
        measure(arguments)
        return
    root = headneck.data_root()
    scans = arguments.scan or [root / "fullsize" / "thorax_512.nii.gz", headneck.image_path(headneck.split("test")[0])]
    bundle = EncoderBundle.open(arguments.encoder) if arguments.encoder else headneck.encoder(None)
    with tempfile.TemporaryDirectory() as folder:
        adapter = Path(folder) / "spatial.adapter"
        trained = TrainedAdapter(spatial_adapter(bundle), (), 0, bfloat16=False)
        write_adapter(adapter, describe(trained, [], ORGANS, bundle=bundle, seed=0))

        def run(scan: Path, what: str) -> dict[str, object]:
            command = [sys.executable, __file__, "--encoder", str(bundle.path), "--scan", str(scan), "--measure", what]
            command += ["--adapter", str(adapter), "--cache", str(Path(folder) / scan.name)]
            result: dict[str, object] = json.loads(subprocess.check_output(command))  # noqa: S603 - runs this file
            return result

        for scan in scans:
            _print_scan(scan, arguments.backend, arguments.limit, run, windows=bundle.whole_scan is None)


def _print_scan(
    scan: Path, backends: list[str], limit: float, run: Callable[[Path, str], dict[str, object]], *, windows: bool
) -> None:
    volume = read_ct(scan)
    print(f"\n{scan.name}, {volume.shape}\n")
    print("| | predicted MiB | measured MiB | ratio | s | features or mask |\n|---|---|---|---|---|---|")
    first, *others = backends
    encodings = [f"encode,{first},0,keep", *(f"encode,{backend},0,drop" for backend in others)]
    for what in [*encodings, f"encode,{first},-1,drop", "segment,0", "segment,-1"]:
        result = run(scan, what)
        predicted, measured = int(str(result["predicted"])), int(str(result["peak"]))
        print(
            f"| {result['what']} | {predicted / MIB:.0f} | {measured / MIB:.0f} | {measured / predicted:.3f} | "
            f"{result['seconds']:.0f} | {result['result']} |",
            flush=True,
        )
    print("\n| | mask | peak MiB | s |\n|---|---|---|---|")
    for gigabytes in (0.0, 0.01):
        result = run(scan, f"within,{gigabytes},0")
        print(
            f"| {result['what']} | {result['result']} | {int(str(result['peak'])) / MIB:.0f} | "
            f"{result['seconds']:.0f} |",
            flush=True,
        )
    result = run(scan, f"within,0,{limit}")
    print(f"\nunder RLIMIT_DATA of {limit} GiB: mask {result['result']}, peak {int(str(result['peak'])) / MIB:.0f} MiB")
    if windows:
        result = run(scan, "air,")
        print(
            f"windows of air: {result['windows']}; encoding each of them takes {result['ratio']} times as long",
            flush=True,
        )


if __name__ == "__main__":
    main()
