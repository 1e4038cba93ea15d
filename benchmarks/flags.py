"""Evidence for the limits of the flags `low_confidence` and `implausible_hu`: `make benchmark BENCHMARK=flags`.

Adapters are trained on some scans of `support` and segment the other scans of `support`; `test` is not used. The masks
of each adapter are lines of OUTPUT/flags.jsonl; an adapter with results is not trained again.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import headneck
import numpy as np
from bench import Bench
from sklearn.metrics import roc_auc_score

from fseft_edge.adaptation.training import TrainingSettings
from fseft_edge.adapters.network import Adapter, AdapterSettings
from fseft_edge.evaluation.metrics import dice
from fseft_edge.masks.prediction import decide_encoded
from fseft_edge.masks.quality import LEAST_CONFIDENCE, has_implausible_hu
from fseft_edge.runtime.encoder.feature_store import FeatureStore
from fseft_edge.runtime.encoder.session import open_session
from fseft_edge.runtime.scans.components import BoxedMask
from fseft_edge.runtime.scans.intensities import HuPercentiles, hu_percentiles
from fseft_edge.runtime.scans.nifti import read_ct, read_label_map
from fseft_edge.runtime.scans.source_pieces import SourcePiece

KINDS: Final = {
    "linear": AdapterSettings(method="linear", levels="all"),
    "softmax": AdapterSettings(method="linear", levels="all", activation="softmax"),
    "spatial": AdapterSettings(method="spatial", levels="all"),
}
BAD: Final = 0.5
Row = dict[str, Any]


def main() -> None:
    """Compute missing results and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shots", type=int, default=5)
    parser.add_argument("--draws", type=int, default=2)
    parser.add_argument(
        "--blocks", type=int, help="training blocks of a spatial adapter; default: the number that `adapt` uses"
    )
    parser.add_argument("--output", type=Path, default=headneck.RUNS / "flags")
    arguments = parser.parse_args()
    file = arguments.output / "flags.jsonl"
    file.parent.mkdir(parents=True, exist_ok=True)
    bundle = headneck.encoder(None)
    with open_session(bundle) as session:
        bench = Bench(bundle, session, FeatureStore(headneck.RUNS / "features"))
        for kind, settings in KINDS.items():
            for draw in range(arguments.draws):
                identity = {"kind": kind, "shots": arguments.shots, "draw": draw}
                if any(identity.items() <= row.items() for row in _rows(file)):
                    continue
                cases = headneck.draw_support(arguments.shots, draw)
                training = TrainingSettings(blocks=arguments.blocks)
                adapter = bench.train(bench.support(cases), settings, training).adapter
                known = {organ: [hu for case in cases if (hu := _true_hu(case)[organ])] for organ in _true_hu(cases[0])}
                found = [
                    {**identity, **row}
                    for case in headneck.split("support")
                    if case not in cases
                    for row in _masks(bench, adapter, case, known)
                ]
                with file.open("a", encoding="utf-8") as lines:
                    lines.writelines(f"{json.dumps(row)}\n" for row in found)
    print(markdown(_rows(file)))


def _rows(file: Path) -> list[Row]:
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def _true_hu(case: str) -> dict[str, HuPercentiles | None]:
    labels = read_label_map(headneck.label_path(case)).array
    volume = read_ct(headneck.image_path(case))
    return {organ.name: hu_percentiles(volume, BoxedMask.of(labels == organ.label)) for organ in headneck.ORGANS}


def _masks(bench: Bench, adapter: Adapter, case: str, known: dict[str, Sequence[HuPercentiles]]) -> Iterator[Row]:
    """Yield scores and probability statistics of each organ, and the HU flags of its mask and of its reference."""
    encoded = bench.encoded(case)
    shape = encoded.grid.source_shape
    sure = np.zeros(shape, np.float32)

    def keep(piece: SourcePiece) -> None:
        where = [slice(None)] * 3
        where[piece.axis] = slice(piece.start, piece.stop)
        sure[tuple(where)] = piece.probabilities[adapter.backgrounds :].max(axis=0)  # of the label, in each mask

    labels = decide_encoded(encoded, [adapter], keep=keep).labels
    volume, reference = read_ct(headneck.image_path(case)), read_label_map(headneck.label_path(case)).array
    truth = _true_hu(case)
    for label, organ in enumerate(headneck.ORGANS, start=1):
        mask, true_hu = labels == label, truth[organ.name]
        hu = hu_percentiles(volume, BoxedMask.of(mask))
        yield {
            "case": case,
            "organ": organ.name,
            "dsc": round(float(dice(mask, reference == organ.label) or 0), 4),
            "mean": round(float(sure[mask].mean()), 4) if hu else None,
            "median": round(float(np.median(sure[mask])), 4) if hu else None,
            "below_075": round(float((sure[mask] < 0.75).mean()), 4) if hu else None,
            "hu_flagged": hu is not None and has_implausible_hu(hu.median, known[organ.name]),
            "true_hu_flagged": true_hu is not None and has_implausible_hu(true_hu.median, known[organ.name]),
            "others_flagged": [
                has_implausible_hu(other.median, known[organ.name])
                for name, other in truth.items()
                if name != organ.name and other is not None
            ],
        }


def markdown(rows: Sequence[Row]) -> str:
    """Return how well the confidence detects poor masks, and how often HU are flagged in masks and in references."""
    lines = [
        f"| adapter | masks | DSC below {BAD} | area under the curve: mean, median, share below 0.75 "
        f"| flagged | of them DSC below {BAD} | of DSC below {BAD} flagged | DSC flagged, others |",
        "|---|---|---|---|---|---|---|---|",
    ]
    filled = [row for row in rows if row["mean"] is not None]
    for kind in (*dict.fromkeys(row["kind"] for row in filled), "all"):
        mine = [row for row in filled if kind in (row["kind"], "all")]
        dsc, mean, median, below = (np.array([row[k] for row in mine]) for k in ("dsc", "mean", "median", "below_075"))
        bad, flagged = dsc < BAD, np.array([row["mean"] < LEAST_CONFIDENCE[KINDS[row["kind"]].method] for row in mine])
        area = " / ".join(f"{roc_auc_score(bad, score):.2f}" for score in (-mean, -median, below))
        right = f"{bad[flagged].mean():.0%}" if flagged.any() else "–"
        means = f"{dsc[flagged].mean():.2f}" if flagged.any() else "–"
        lines.append(
            f"| {kind} | {len(mine)} | {bad.mean():.0%} | {area} | {flagged.mean():.0%} | {right} "
            f"| {flagged[bad].mean():.0%} | {means}, {dsc[~flagged].mean():.2f} |"
        )
    others = [flag for row in rows for flag in row["others_flagged"]]
    lines += [
        "",
        f"HU flagged: {np.mean([row['hu_flagged'] for row in filled]):.1%} of masks found, "
        f"{np.mean([row['true_hu_flagged'] for row in rows]):.1%} of annotated ones, "
        f"{np.mean(others):.0%} where another organ's annotation stands for the mask.",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
