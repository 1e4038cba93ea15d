"""Difference between the leave-one-out estimate and the DSC on `test`: `make benchmark BENCHMARK=expectation`.

Uses the adapters that kshot.py wrote to OUTPUT/adapters, performs leave-one-out cross-validation on their support sets,
and scores the adapters on `test`, with and without the post-processing that the cross-validation chose. The result of
each support set is a line of OUTPUT/expectation.jsonl; existing results are not computed again.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import headneck
import numpy as np
from bench import Bench
from kshot import ADAPTERS

from fseft_edge.adaptation.adapt import head_rows
from fseft_edge.adaptation.cross_validation import Candidate, cross_validate
from fseft_edge.adaptation.training import TrainingSettings
from fseft_edge.adapters.file import PostProcessing, read_adapter
from fseft_edge.evaluation.metrics import dice
from fseft_edge.masks.post_processing import post_process
from fseft_edge.masks.prediction import segment_encoded
from fseft_edge.runtime.encoder.feature_store import FeatureStore
from fseft_edge.runtime.encoder.session import open_session
from fseft_edge.runtime.scans.nifti import read_label_map


def main() -> None:
    """Compute missing results and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shots", type=int, nargs="+", default=[5, 10])
    parser.add_argument("--draws", type=int, default=3)
    parser.add_argument("--method", choices=list(ADAPTERS), default="spatial on all levels")
    parser.add_argument("--output", type=Path, default=headneck.RUNS / "kshot")
    arguments = parser.parse_args()
    file = arguments.output / "expectation.jsonl"
    bundle = headneck.encoder(None)
    with open_session(bundle) as session:
        bench = Bench(bundle, session, FeatureStore(headneck.RUNS / "features"))
        for shots in arguments.shots:
            for draw in range(arguments.draws):
                identity = {"method": arguments.method, "shots": shots, "draw": draw}
                if any(identity.items() <= result.items() for result in _results(file)):
                    continue
                name = f"{arguments.method.replace(' ', '_')}-{shots}-{draw}.adapter"
                result = _compared(bench, arguments.method, shots, draw, arguments.output / "adapters" / name)
                with file.open("a", encoding="utf-8") as lines:
                    lines.write(json.dumps({**identity, **result}) + "\n")
    print(markdown(_results(file)))


def _results(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def _compared(bench: Bench, method: str, shots: int, draw: int, adapter: Path) -> dict[str, Any]:
    support = bench.support(headneck.draw_support(shots, draw))
    candidate = Candidate(method, ADAPTERS[method], TrainingSettings(seed=draw))
    started = time.monotonic()
    validated = cross_validate(candidate, support, head_rows(bench.bundle, headneck.ORGANS))
    seconds = time.monotonic() - started
    trained = read_adapter(adapter).adapter
    plain: dict[str, list[float]] = {organ.name: [] for organ in headneck.ORGANS}
    treated: dict[str, list[float]] = {organ.name: [] for organ in headneck.ORGANS}
    for case in headneck.split("test"):
        labels = segment_encoded(bench.encoded(case), [trained])
        reference = read_label_map(headneck.label_path(case)).array
        for scores, steps in ((plain, [PostProcessing()] * len(headneck.ORGANS)), (treated, validated.post_processing)):
            done = post_process(labels, steps)
            for number, organ in enumerate(headneck.ORGANS, start=1):
                scores[organ.name].append(float(dice(done == number, reference == organ.label) or 0.0))
    return {
        "seconds": round(seconds, 1),
        "left_out": {
            organ.name: [round(score, 4) for score in scores]
            for organ, scores in zip(headneck.ORGANS, validated.dsc, strict=True)
        },
        "post_processing": [vars(steps) for steps in validated.post_processing],
        "test": {name: round(float(np.mean(scores)), 4) for name, scores in treated.items()},
        "test_plain": {name: round(float(np.mean(scores)), 4) for name, scores in plain.items()},
    }


def markdown(results: list[dict[str, Any]]) -> str:
    """Return the table: for each k and organ, the estimate, the DSC on `test`, and their mean absolute difference."""
    lines = [
        "| method | k | organ | left out | test | mean absolute gap | test without post-processing |",
        "|---|---|---|---|---|---|---|",
    ]
    for method, shots in dict.fromkeys((result["method"], result["shots"]) for result in results):
        draws = [result for result in results if (result["method"], result["shots"]) == (method, shots)]
        gaps = []
        for organ in headneck.ORGANS:
            estimate = [float(np.mean(draw["left_out"][organ.name])) for draw in draws]
            test, plain = ([draw[key][organ.name] for draw in draws] for key in ("test", "test_plain"))
            gap = float(np.mean(np.abs(np.subtract(estimate, test))))
            gaps.append(gap)
            lines.append(
                f"| {method} | {shots} | {organ.name} | {np.mean(estimate):.3f} | {np.mean(test):.3f} | {gap:.3f} | "
                f"{np.mean(plain):.3f} |"
            )
        lines.append(f"| {method} | {shots} | all, {len(draws)} draws | | | {np.mean(gaps):.3f} | |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
