"""The way back, from cached features to mask files: `make benchmark BENCHMARK=way_back`.

Prints one JSON line for each round: processor seconds of the adapters with the way to the scan's lattice, of measuring
the mask, and of writing its files. Encoding, reading and the start of the process are not counted; the scan is encoded
before the first round. With `--against PYTHON`, the rounds alternate with those of the version that is installed beside
another interpreter, and the last line has the ratio of the fastest rounds and whether masks and measurements are the
same. Run it with OMP_NUM_THREADS=1; ONEDNN_MAX_CPU_ISA=AVX2 and ATEN_CPU_CAPABILITY=avx2 stand for older processors.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import headneck

from fseft_edge.segmentation import segmenter
from fseft_edge.segmentation.segmenter import open_segmenter
from fseft_edge.segmentation.settings import SegmentationSettings


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the processor seconds of the stages of a cached scan in this process."""
    seconds = {"deciding": 0.0, "writing": 0.0}

    def timed(stage: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*given: Any, **named: Any) -> Any:  # noqa: ANN401 - hands over any arguments
            before = processor_seconds()
            result = function(*given, **named)
            seconds[stage] += processor_seconds() - before
            return result

        return call

    segmenter.decide_encoded = timed("deciding", segmenter.decide_encoded)
    segmenter.write_label_map = timed("writing", segmenter.write_label_map)
    settings = SegmentationSettings(
        tuple(arguments.adapter),
        encoder=arguments.encoder,
        cache=arguments.cache,
        device="cpu",
        save_probabilities=arguments.save_probabilities,
        split=arguments.split,
    )
    with open_segmenter(settings) as opened, tempfile.TemporaryDirectory() as output:
        encoded = opened.encode(opened.read(arguments.scan))
        before = processor_seconds()
        case = opened.finish(encoded, Path(output))
        total = processor_seconds() - before
        digest = hashlib.sha256(repr([asdict(organ) for organ in case.organs]).encode())
        for file in sorted(Path(output).rglob("*.nii.gz")):
            digest.update(file.read_bytes())
    seconds["measuring"] = total - sum(seconds.values())
    return {
        "organs": len(case.organs),
        **{stage: round(value, 3) for stage, value in seconds.items()},
        "without_writing": round(total - seconds["writing"], 3),
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10,
        "sha256": digest.hexdigest()[:16],
    }


def processor_seconds() -> float:
    """Return the processor seconds of this process so far, of all threads."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def main() -> None:
    """Measure in new processes and print the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scan", type=Path)
    parser.add_argument("--encoder", type=Path)
    parser.add_argument("--adapter", type=Path, action="append", default=[], help="default: the encoder's own organs")
    parser.add_argument("--cache", type=Path, help="default: a temporary folder for each version")
    parser.add_argument("--save-probabilities", action="store_true")
    parser.add_argument("--split", action="store_true")
    parser.add_argument("--against", help="Python interpreter beside which another version is installed")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure(arguments)))
        return
    scan = arguments.scan or headneck.data_root() / "fullsize" / "thorax_512.nii.gz"
    encoder = arguments.encoder or headneck.encoder(None).path
    pythons = {"this": sys.executable, **({"other": arguments.against} if arguments.against else {})}
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in pythons}
    with tempfile.TemporaryDirectory() as folder:
        for number in range(-1, arguments.rounds):  # the first round encodes the scan, and is not counted
            for name, python in pythons.items():
                command = [python, __file__, "--measure", "--scan", str(scan), "--encoder", str(encoder)]
                command += ["--cache", str(arguments.cache or Path(folder) / name)]
                command += [part for adapter in arguments.adapter for part in ("--adapter", str(adapter))]
                command += ["--save-probabilities"] * arguments.save_probabilities + ["--split"] * arguments.split
                result = json.loads(subprocess.check_output(command))  # noqa: S603 - runs this file
                if number >= 0:
                    results[name].append(result)
                    print(json.dumps({"version": name, "round": number, **result}), flush=True)
    if arguments.against:
        fastest = {name: min(x["without_writing"] for x in rounds) for name, rounds in results.items()}
        same = len({result["sha256"] for rounds in results.values() for result in rounds}) == 1
        print(json.dumps({"ratio": round(fastest["this"] / fastest["other"], 3), "same": same}))


if __name__ == "__main__":
    main()
