"""Leave-one-out over the support set: what accuracy to expect on a new scan, and which method to take."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from fseft_edge.adapter_training import TrainedAdapter, TrainingSettings, train_adapter
from fseft_edge.adapters import Adapter, AdapterSettings, HeadRows, Method, Reads, zero_shot
from fseft_edge.block_sampling import SupportScan
from fseft_edge.metrics import dice
from fseft_edge.report.progress import Progress, SilentProgress
from fseft_edge.runtime.encoding import EncodedScan
from fseft_edge.segmentation import segment_encoded

_READS: tuple[Reads, ...] = ("last", "pyramid")

# A method further down the list costs more; it has to be this much better to be taken.
_WORTHWHILE = 0.005


@dataclass(frozen=True)
class Candidate:
    """A way to make an adapter.

    Attributes:
        name: for people.
        settings: the kind of adapter.
        training: how it is trained; None leaves the encoder's own classifier as it is.
    """

    name: str
    settings: AdapterSettings
    training: TrainingSettings | None

    def make(self, support: Sequence[SupportScan], rows: HeadRows, progress: Progress) -> TrainedAdapter:
        """Return the adapter made from a support set."""
        if self.training is None:
            return TrainedAdapter(zero_shot(support[0].features.levels, rows), (), 0, bfloat16=False)
        return train_adapter(self.settings, support, head_rows=rows, training=self.training, progress=progress)


@dataclass(frozen=True)
class Validated:
    """A candidate and its scores.

    Attributes:
        candidate: what was validated.
        dsc: for each organ the DSC of every left-out scan that annotates it, on the scan's own lattice.
    """

    candidate: Candidate
    dsc: tuple[tuple[float, ...], ...]

    @property
    def mean(self) -> float:
        """Mean DSC over organs; an organ that could not be validated is left out."""
        organs = [sum(scores) / len(scores) for scores in self.dsc if scores]
        return sum(organs) / len(organs) if organs else 0.0


def candidates(training: TrainingSettings, settings: AdapterSettings, rows: HeadRows) -> list[Candidate]:
    """Return the ways to choose from, cheapest first.

    Args:
        training: seed and length for all of them.
        settings: of which activation and width are taken.
        rows: what the encoder knows; zero-shot is a candidate only where it knows every organ.
    """
    kinds: list[Candidate] = []
    if all(row is not None for row in rows) and settings.activation == "sigmoid":
        kinds.append(Candidate("zero-shot", AdapterSettings(method="linear", reads="last"), None))
    methods: tuple[Method, ...] = ("linear", "pointwise", "spatial")
    for method in methods:
        for reads in _READS:
            kind = replace(settings, method=method, reads=reads)
            kinds.append(Candidate(f"{method} on {reads}", kind, training))
    return kinds


def can_validate(support: Sequence[SupportScan]) -> bool:
    """Return whether leaving scans out tells anything: some organ is annotated in two scans at least."""
    return bool((np.sum([scan.annotated for scan in support], axis=0) >= 2).any())


def leave_one_out(
    candidate: Candidate, support: Sequence[SupportScan], rows: HeadRows, *, progress: Progress | None = None
) -> Validated:
    """Score a candidate on every scan of the support set, made from the others.

    Args:
        candidate: what to validate.
        support: at least two scans, each with its grid and reference.
        rows: the encoder's classifiers.
        progress: where to show progress.
    """
    progress = progress or SilentProgress()
    scores: list[list[float]] = [[] for _ in rows]
    with progress.task(f"validate {candidate.name}", len(support)) as task:
        for left_out, scan in enumerate(support):
            others = [other for index, other in enumerate(support) if index != left_out]
            known = np.any([other.annotated for other in others], axis=0)
            for organ, score in enumerate(_scores(candidate.make(others, rows, SilentProgress()).adapter, scan)):
                if score is not None and known[organ]:
                    scores[organ].append(score)
            task.advance(1)
    return Validated(candidate, tuple(tuple(organ) for organ in scores))


def best_of(
    kinds: Sequence[Candidate], support: Sequence[SupportScan], rows: HeadRows, *, progress: Progress | None = None
) -> tuple[Validated, list[Validated]]:
    """Return the candidate that validates best, and all of them; a dearer one has to be worth it.

    Args:
        kinds: cheapest first.
        support: at least two scans.
        rows: the encoder's classifiers.
        progress: where to show progress.
    """
    validated = [leave_one_out(kind, support, rows, progress=progress) for kind in kinds]
    best = max(result.mean for result in validated)
    return next(result for result in validated if result.mean >= best - _WORTHWHILE), validated


def _scores(adapter: Adapter, scan: SupportScan) -> list[float | None]:
    assert scan.grid is not None  # noqa: S101 - narrows the type; see the arguments
    assert scan.reference is not None  # noqa: S101 - likewise
    reference, values = scan.reference
    labels = segment_encoded(EncodedScan(scan.grid, scan.features), [adapter])
    return [
        dice(labels == number, reference.array == value) if annotated else None
        for number, (value, annotated) in enumerate(zip(values, scan.annotated, strict=True), start=1)
    ]
