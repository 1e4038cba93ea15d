"""The k-shot table on real CT: `make benchmark BENCHMARK=kshot`, or this script with options.

Draws support sets from the `support` split, trains each kind of adapter on them and reports mean DSC on `test`, on the
scans' own lattice. `--on support` scores on the rest of `support` instead: that is for choosing settings.
Results are kept in OUTPUT/results.json after every step, so that an interrupted run goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import headneck
import numpy as np
import torch

from fseft_edge.adaptation import head_rows, zero_shot_adapter
from fseft_edge.adapter_training import TrainedAdapter, TrainingSettings, train_adapter
from fseft_edge.adapters import Adapter, AdapterSettings
from fseft_edge.block_sampling import SupportScan
from fseft_edge.metrics import dice
from fseft_edge.organs import OrganLabel
from fseft_edge.runtime.atomic import atomic_path
from fseft_edge.runtime.bundle import EncoderBundle
from fseft_edge.runtime.encoding import encode_scan
from fseft_edge.runtime.feature_store import FeatureStore
from fseft_edge.runtime.nifti import read_ct, read_label_map
from fseft_edge.runtime.session import EncoderSession, open_session
from fseft_edge.segmentation import segment_encoded
from fseft_edge.size_priors import SizePrior
from fseft_edge.support import load_support
from fseft_edge.transduction import transduce

VARIANTS = {
    "linear last": AdapterSettings(method="linear", reads="last"),
    "linear pyramid": AdapterSettings(method="linear", reads="pyramid"),
    "pointwise last": AdapterSettings(method="pointwise", reads="last"),
    "pointwise pyramid": AdapterSettings(method="pointwise", reads="pyramid"),
    "spatial last": AdapterSettings(method="spatial", reads="last"),
    "spatial pyramid": AdapterSettings(method="spatial", reads="pyramid"),
}
DEFAULT = ("linear last", "linear pyramid", "spatial last", "spatial pyramid")


@dataclass(frozen=True)
class Bench:
    """An open encoder with its feature store."""

    bundle: EncoderBundle
    session: EncoderSession
    store: FeatureStore

    def score(
        self,
        case: str,
        adapters: Sequence[Adapter],
        organs: Sequence[OrganLabel] = headneck.ORGANS,
        *,
        transduced_on: Sequence[SupportScan] | None = None,
    ) -> list[dict[str, float]]:
        """Return the DSC of every organ of a case for each adapter of these organs.

        With ``transduced_on``, the adapters' support set, each is tuned to the case first.
        """
        volume = read_ct(headneck.image_path(case))
        reference = read_label_map(headneck.label_path(case)).array
        encoded = encode_scan(volume, bundle=self.bundle, session=self.session, store=self.store)
        scores = []
        for adapter in adapters:
            if transduced_on is not None:
                priors = [
                    SizePrior.from_volumes([scan.volumes_mm3[k] / 1000 for scan in transduced_on])
                    for k in range(len(organs))
                ]
                adapter = transduce(adapter, encoded, transduced_on, priors).adapter  # noqa: PLW2901 - its tuned twin
            labels = segment_encoded(encoded, [adapter])
            scores.append(
                {
                    organ.name: float(dice(labels == number, reference == organ.label) or 0.0)
                    for number, organ in enumerate(organs, start=1)
                }
            )
        return scores

    def support(self, cases: Sequence[str]) -> list[SupportScan]:
        """Return annotated scans with all five organs."""
        annotated = [(headneck.image_path(case), read_label_map(headneck.label_path(case))) for case in cases]
        return load_support(annotated, headneck.ORGANS, bundle=self.bundle, session=self.session, store=self.store)

    def train(self, cases: Sequence[str], settings: AdapterSettings, training: TrainingSettings) -> TrainedAdapter:
        """Return an adapter for all five organs, trained on the cases."""
        rows = head_rows(self.bundle, headneck.ORGANS)
        return train_adapter(settings, self.support(cases), head_rows=rows, training=training)


def main() -> None:
    """Run what is missing of the table, and print it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="model file of another encoder than the built-in one")
    parser.add_argument("--shots", type=int, nargs="+", default=[5])
    parser.add_argument("--draws", type=int, default=3)
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(DEFAULT))
    parser.add_argument("--transductive", action="store_true", help="tune the adapters to every case, by size")
    parser.add_argument("--on", choices=["test", "support"], default="test")
    parser.add_argument("--cases", type=int, help="score on the first so many cases only")
    parser.add_argument("--output", type=Path, default=headneck.RUNS / "kshot")
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    file = arguments.output / "results.json"
    results: dict[str, dict[str, object]] = json.loads(file.read_text()) if file.exists() else {}
    bundle = headneck.encoder(arguments.model)
    with open_session(bundle) as session:
        bench = Bench(bundle, session, FeatureStore(headneck.RUNS / "features"))
        known = [organ for organ in headneck.ORGANS if organ.name in bundle.manifest.organs]
        key = f"zero-shot|0|0|{arguments.on}|{bundle.encoder_id[:12]}|{arguments.cases}"
        if key not in results:
            cases = headneck.split(arguments.on)[: arguments.cases]
            zero_shot = [zero_shot_adapter(bundle, known).adapter]
            results[key] = {"scores": [bench.score(case, zero_shot, known)[0] for case in cases]}
            _keep(file, results)
        for shots in arguments.shots:
            for draw in range(arguments.draws):
                _run_draw(bench, arguments=arguments, shots=shots, draw=draw, results=results, file=file)
    print(markdown(results, arguments.on))


def _run_draw(
    bench: Bench,
    *,
    arguments: argparse.Namespace,
    shots: int,
    draw: int,
    results: dict[str, dict[str, object]],
    file: Path,
) -> None:
    support = headneck.draw_support(shots, draw)
    cases = [case for case in headneck.split(arguments.on) if case not in support][: arguments.cases]
    adapters, keys = [], []
    for variant in arguments.variants:
        name = f"{variant} + transduction" if arguments.transductive else variant
        key = f"{name}|{shots}|{draw}|{arguments.on}|{bench.bundle.encoder_id[:12]}|{arguments.cases}"
        if key in results:
            continue
        torch.manual_seed(0)
        started = time.monotonic()
        trained = bench.train(support, VARIANTS[variant], TrainingSettings(seed=draw))
        adapters.append(trained.adapter)
        results[key] = {"seconds": time.monotonic() - started, "support": support, "steps": trained.steps}
        keys.append(key)
    scores: dict[str, list[dict[str, float]]] = {key: [] for key in keys}
    tuned = bench.support(support) if keys and arguments.transductive else None
    for case in cases if keys else []:
        for key, score in zip(keys, bench.score(case, adapters, transduced_on=tuned), strict=True):
            scores[key].append(score)
    for key in keys:
        results[key]["scores"] = scores[key]
    _keep(file, results)
    print(markdown(results, arguments.on), flush=True)


def _keep(file: Path, results: dict[str, dict[str, object]]) -> None:
    with atomic_path(file) as temporary:
        temporary.write_text(json.dumps(results, indent=1))


def markdown(results: dict[str, dict[str, object]], on: str) -> str:
    """Return the table: mean DSC over cases and draws, the spread of the draws' means behind it."""
    names = [organ.name for organ in headneck.ORGANS]
    groups: dict[tuple[str, int], list[dict[str, object]]] = {}
    for key, result in results.items():
        variant, shots, _, where, *_ = key.split("|")
        if where == on:
            groups.setdefault((variant, int(shots)), []).append(result)
    lines = [
        f"| method | k | {' | '.join(names)} | base | novel | training s |",
        f"|---|---|{'---|' * (len(names) + 3)}",
    ]
    for (variant, shots), draws in sorted(groups.items(), key=lambda item: item[0][1]):
        means = {name: _draw_means(draws, [name]) for name in names}
        means["base"] = _draw_means(draws, [organ.name for organ in headneck.BASE])
        means["novel"] = _draw_means(draws, [organ.name for organ in headneck.NOVEL])
        cells = [
            "–" if not values else f"{np.mean(values):.3f}" + (f" ± {np.std(values):.3f}" if len(values) > 1 else "")
            for values in means.values()
        ]
        seconds = [float(str(draw["seconds"])) for draw in draws if "seconds" in draw]
        lines.append(f"| {variant} | {shots} | {' | '.join(cells)} | {np.mean(seconds) if seconds else 0:.0f} |")
    return "\n".join(lines)


def _draw_means(draws: Sequence[dict[str, object]], names: Sequence[str]) -> list[float]:
    means = []
    for draw in draws:
        scores = draw.get("scores")
        if isinstance(scores, list) and scores and all(name in scores[0] for name in names):
            means.append(float(np.mean([score[name] for score in scores for name in names])))
    return means


if __name__ == "__main__":
    main()
