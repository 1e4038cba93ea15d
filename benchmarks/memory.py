"""Memory of encoding and segmenting one scan, predicted and measured: `make benchmark BENCHMARK=memory`.

Every measurement runs in a process of its own. Printed are

- predicted and measured peak of encoding with each backend, and of segmenting from the cached map;
- the same mask from ample memory down to the smallest budget, with the peak of each;
- how many windows hold only air, and what encoding them once saves;
- whether a scan can be segmented under a hard limit (RLIMIT_DATA: heap, stacks and other private writable memory;
  mapped files do not count).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
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

from fseft_edge.adaptation import describe, head_rows
from fseft_edge.adapter_file import write_adapter
from fseft_edge.adapter_training import TrainedAdapter
from fseft_edge.adapters import Adapter, AdapterSettings
from fseft_edge.organs import OrganLabel
from fseft_edge.runtime.bundle import EncoderBundle
from fseft_edge.runtime.encoding import OVERLAP, encode_scan
from fseft_edge.runtime.encoding_plan import EncodingPlan, encoding_of, held_after_encoding
from fseft_edge.runtime.feature_store import open_store
from fseft_edge.runtime.grid import Grid
from fseft_edge.runtime.memory import Budget
from fseft_edge.runtime.nifti import read_ct
from fseft_edge.runtime.session import EncoderSession, open_session
from fseft_edge.runtime.streaming import stream_features
from fseft_edge.runtime.volume import Volume
from fseft_edge.runtime.windows import WindowLayout
from fseft_edge.segmentation import segment
from fseft_edge.segmentation_plan import plans as segmentation_plans

MIB = 1 << 20
ORGANS = [OrganLabel("brainstem", 1), OrganLabel("spinal_cord", 2), OrganLabel("mandible", 3)]
_SLACK = 24 * MIB  # between the prediction and the work, the process grows a little


def peak() -> int:
    """Return the most bytes that this process has held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


def layout_of(volume: Volume, bundle: EncoderBundle) -> WindowLayout:
    """Return where the windows of a scan lie."""
    shape = Grid.of(volume, bundle.preprocessing).shape
    return WindowLayout.plan(shape, bundle.window, max(level.stride for level in bundle.levels), OVERLAP)


def spatial_adapter(bundle: EncoderBundle) -> Adapter:
    """Return the encoder's own classifiers in a spatial adapter that nothing was learned with."""
    adapter = Adapter(AdapterSettings("spatial", "pyramid"), bundle.levels, len(ORGANS))
    adapter.start_from_head(head_rows(bundle, ORGANS))
    return adapter.eval()


def planned(volume: Volume, bundle: EncoderBundle, session: EncoderSession) -> list[EncodingPlan]:
    """Return the plans of an encoding."""
    return list(encoding_of(layout_of(volume, bundle), bundle, session).plans())


def encode(bundle: EncoderBundle, scan: Path, backend: str, which: int, cache: Path | None) -> dict[str, object]:
    """Return prediction and seconds of encoding by one of the plans."""
    volume = read_ct(scan)
    with open_session(bundle, backend=backend) as session, open_store(cache) as store:
        plans = planned(volume, bundle, session)
        plan = plans[which]
        budget = Budget(ram=plan.footprint.ram + _SLACK)
        started = time.monotonic()
        encode_scan(volume, bundle=bundle, session=session, store=store, budget=budget)
        seconds = time.monotonic() - started
    return {"what": f"encode, {backend}, sums: {plan.place}", "predicted": plan.footprint.ram, "seconds": seconds}


def segment_from_cache(bundle: EncoderBundle, scan: Path, adapter: Path, cache: Path, which: int) -> dict[str, object]:
    """Return prediction and seconds of segmenting from a map that is there."""
    volume = read_ct(scan)
    grid = Grid.of(volume, bundle.preprocessing)
    with tempfile.TemporaryDirectory() as output:
        with open_session(bundle) as session:
            held = held_after_encoding(bundle, session)
        plan = list(segmentation_plans(grid, [spatial_adapter(bundle)], held))[which]
        started = time.monotonic()
        budget = (plan.footprint.ram + _SLACK) / 1e9
        segment([scan], [adapter], Path(output), encoder=bundle.path, cache=cache, memory_gb=budget)
        seconds = time.monotonic() - started
    return {
        "what": f"segment, tile {plan.tile}, slab {plan.slab}",
        "predicted": plan.footprint.ram,
        "seconds": seconds,
    }


def segment_within(
    bundle: EncoderBundle, scan: Path, adapter: Path, gigabytes: float | None, limit: int
) -> dict[str, object]:
    """Return the hash of the mask made within a budget, under a hard limit if there is one (0: none)."""
    if limit:
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    with tempfile.TemporaryDirectory() as output:
        started = time.monotonic()
        (case,) = segment([scan], [adapter], Path(output), encoder=bundle.path, memory_gb=gigabytes)
        mask = hashlib.sha256(case.mask.read_bytes()).hexdigest()
        volumes = {organ.name: organ.volume_ml for organ in case.organs}
    seconds = time.monotonic() - started
    what = f"segment within {'what is free' if gigabytes is None else f'{gigabytes:.2f} GB'}"
    return {"what": what, "mask": mask[:12], "volumes": volumes, "seconds": seconds}


def air(bundle: EncoderBundle, scan: Path) -> dict[str, object]:
    """Return how many windows hold only air, at the encoder's spacing and at 1.5 mm, and the ratio of times."""
    volume = read_ct(scan)
    shares: dict[str, str] = {}
    of_air = 0
    for spacing in (bundle.preprocessing.spacing, (1.5, 1.5, 1.5)):
        grid = Grid.of(volume, bundle.preprocessing.model_copy(update={"spacing": spacing}))
        layout = WindowLayout.plan(grid.shape, bundle.window, 16, OVERLAP)
        image = np.zeros(layout.padded_shape, np.float32)
        x, y, z = grid.shape
        image[:x, :y, :z] = grid.section(volume, 0, z)
        windows = [
            image[tuple(slice(o, o + n) for o, n in zip((a, b, c), layout.window, strict=True))].any()
            for a in layout.origins[0]
            for b in layout.origins[1]
            for c in layout.origins[2]
        ]
        found = len(windows) - sum(map(int, windows))
        shares.setdefault(f"{spacing[0]} mm", f"{found} of {len(windows)}")
        of_air += found if spacing == bundle.preprocessing.spacing else 0
    if not of_air:
        return {"what": "air", "windows": shares, "ratio": 1.0}
    grid, layout = Grid.of(volume, bundle.preprocessing), layout_of(volume, bundle)
    seconds = {"once": math.inf, "each": math.inf}

    def almost_air(start: int, stop: int) -> NDArray[np.float32]:
        # The smallest number there is: the window is encoded, and the features are those of air.
        return np.maximum(grid.section(volume, start, stop), np.float32(1e-45))

    reads: dict[str, Callable[[int, int], NDArray[np.float32]]] = {
        "once": lambda start, stop: grid.section(volume, start, stop),
        "each": almost_air,
    }
    with open_session(bundle) as session:
        for _ in range(2):
            for name, read in reads.items():
                started = time.process_time()
                for _section in stream_features(read, layout, session):
                    pass
                seconds[name] = min(seconds[name], time.process_time() - started)
    return {"what": "air", "windows": shares, "ratio": round(seconds["each"] / seconds["once"], 3)}


def measure(arguments: argparse.Namespace) -> None:
    """Run one measurement in this process and print it as JSON."""
    bundle = EncoderBundle.open(arguments.encoder)
    kind, *rest = arguments.measure.split(",")
    scan, adapter, cache = arguments.scan, arguments.adapter, arguments.cache
    if kind == "encode":
        result = encode(bundle, scan, rest[0], int(rest[1]), cache if rest[2] == "keep" else None)
    elif kind == "segment":
        result = segment_from_cache(bundle, scan, adapter, cache, int(rest[0]))
    elif kind == "within":
        result = segment_within(bundle, scan, adapter, float(rest[0]) or None, int(float(rest[1]) * (1 << 30)))
    elif kind == "smallest":
        with open_session(bundle) as session:
            plans = planned(read_ct(scan), bundle, session)
            result = {"footprints": sorted({plan.footprint.ram + _SLACK for plan in plans}, reverse=True)}
    else:
        result = air(bundle, scan)
    print(json.dumps({**result, "peak": peak()}))


def main() -> None:
    """Measure, and print Markdown tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scan", type=Path, action="append", help="may be repeated")
    parser.add_argument("--encoder", type=Path)
    parser.add_argument("--backend", nargs="+", default=["torch", "onnxruntime"])
    parser.add_argument("--limit", type=float, default=3.0, help="GiB of the hard limit")
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
            result: dict[str, object] = json.loads(subprocess.check_output(command))  # noqa: S603 - this very file
            return result

        for scan in scans:
            _print_scan(scan, arguments.backend, arguments.limit, run)


def _print_scan(scan: Path, backends: list[str], limit: float, run: Callable[[Path, str], dict[str, object]]) -> None:
    volume = read_ct(scan)
    print(f"\n{scan.name}, {volume.shape}\n\n| | predicted MiB | measured MiB | ratio | s |\n|---|---|---|---|---|")
    first, *others = backends
    encodings = [f"encode,{first},0,keep", *(f"encode,{backend},0,drop" for backend in others)]
    for what in [*encodings, f"encode,{first},-1,drop", "segment,0", "segment,-1"]:
        result = run(scan, what)
        predicted, measured = int(str(result["predicted"])), int(str(result["peak"]))
        print(
            f"| {result['what']} | {predicted / MIB:.0f} | {measured / MIB:.0f} | {measured / predicted:.3f} | "
            f"{result['seconds']:.0f} |",
            flush=True,
        )
    footprints = run(scan, "smallest,")["footprints"]
    print("\n| | mask | peak MiB | s |\n|---|---|---|---|")
    for gigabytes in [0.0, *(footprint / 1e9 for footprint in footprints)]:  # type: ignore[attr-defined]  # a list
        result = run(scan, f"within,{gigabytes},0")
        print(
            f"| {result['what']} | {result['mask']} | {int(str(result['peak'])) / MIB:.0f} | {result['seconds']:.0f} |"
        )
    result = run(scan, f"within,0,{limit}")
    print(f"\nunder RLIMIT_DATA of {limit} GiB: mask {result['mask']}, peak {int(str(result['peak'])) / MIB:.0f} MiB")
    result = run(scan, "air,")
    print(
        f"windows of air: {result['windows']}; encoding each of them takes {result['ratio']} times as long", flush=True
    )


if __name__ == "__main__":
    main()
