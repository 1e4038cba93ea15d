"""Processor time of training an adapter: `make benchmark BENCHMARK=training_time`, or this script with options.

Trains an adapter on five scans of `support` (spatial on all levels, unless options say otherwise), without and with
cross-validation, and prints one line of JSON. Features are in the cache before the measurement. To measure a CPU with
AVX2 on a newer one, set ONEDNN_MAX_CPU_ISA=AVX2 and ATEN_CPU_CAPABILITY=avx2; for one core, set OMP_NUM_THREADS=1.
`--share` shortens all trainings, where a complete measurement takes too long.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import headneck
import numpy as np
import torch
from bench import Bench

from fseft_edge.adaptation.adapt import head_rows
from fseft_edge.adaptation.cross_validation import Candidate, cross_validate
from fseft_edge.adaptation.training import TrainingSettings
from fseft_edge.adapters.network import AdapterSettings
from fseft_edge.runtime.encoder.bundle import EncoderBundle
from fseft_edge.runtime.encoder.feature_store import FeatureStore
from fseft_edge.runtime.encoder.session import open_session
from fseft_edge.runtime.system.progress import SilentProgress


def main() -> None:
    """Measure and print the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoder", type=Path, help="encoder bundle; default: that of the built-in encoder")
    parser.add_argument("--cache", type=Path, default=headneck.RUNS / "features", help="folder of the feature cache")
    parser.add_argument("--shots", type=int, default=5)
    parser.add_argument("--draw", type=int, default=0)
    parser.add_argument("--method", default="spatial")
    parser.add_argument("--levels", default="all")
    parser.add_argument("--share", type=float, default=1.0, help="share of the usual number of blocks, 0 to 1")
    parser.add_argument("--bfloat16", action="store_true", help="convolutions in bfloat16 (default: float32)")
    parser.add_argument("--no-validation", action="store_true", help="measure only the training")
    arguments = parser.parse_args()
    bundle = EncoderBundle.open(arguments.encoder) if arguments.encoder else headneck.encoder(None)
    settings = AdapterSettings(arguments.method, arguments.levels)
    with open_session(bundle, "cpu") as session:
        bench = Bench(bundle, session, FeatureStore(arguments.cache))
        support = bench.support(headneck.draw_support(arguments.shots, arguments.draw))
    usual = TrainingSettings(seed=arguments.draw, bfloat16=arguments.bfloat16)
    epochs = [
        max(1, round(arguments.share * usual.epochs_for(shots, shots))) for shots in (len(support), len(support) - 1)
    ]
    whole, fold = (
        Candidate(settings.name, settings, TrainingSettings(seed=arguments.draw, bfloat16=arguments.bfloat16, epochs=n))
        for n in epochs
    )
    rows = head_rows(bundle, headneck.ORGANS)
    started = time.process_time()
    trained = whole.make(support, rows, SilentProgress())
    seconds = time.process_time() - started
    result = {
        "adapter": settings.name,
        "shots": len(support),
        "draw": arguments.draw,
        "share": arguments.share,
        "bfloat16": arguments.bfloat16,
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "steps": trained.steps,
        "training_s": round(seconds, 1),
        "step_ms": round(1000 * seconds / trained.steps, 1),
        "losses": [round(loss, 5) for loss in (*trained.losses[:3], *trained.losses[-3:])],
    }
    if not arguments.no_validation:
        started = time.process_time()
        validated = cross_validate(fold, support, rows)
        seconds = time.process_time() - started
        result |= {
            "validation_s": round(seconds, 1),
            "validation_in_trainings": round(seconds / result["training_s"], 2),
            "left_out_dsc": [round(float(np.mean(organ)), 4) for organ in validated.dsc],
        }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
