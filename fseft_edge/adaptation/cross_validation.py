"""Cross-validation over the support set: what accuracy to expect on a new scan, and what to do to reach it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from fseft_edge.adaptation.block_sampling import SupportScan
from fseft_edge.adaptation.training import TrainedAdapter, TrainingSettings, train_adapter
from fseft_edge.adapters.file import PostProcessing
from fseft_edge.adapters.network import AdapterSettings, HeadRows, Levels, Method, zero_shot
from fseft_edge.evaluation.metrics import dice
from fseft_edge.masks.post_processing import ALL, post_process
from fseft_edge.masks.prediction import segment_encoded
from fseft_edge.runtime.encoder.encoding import EncodedScan
from fseft_edge.runtime.scans.volume import LabelMap
from fseft_edge.runtime.system.progress import Progress, SilentProgress

_LEVELS: tuple[Levels, ...] = ("finest", "all")

_MOST_FOLDS = 10

# A method further down the list costs more; it has to be this much better to be taken.
_WORTHWHILE = 0.005

# After two folds, a candidate this far behind the best is not looked at any further.
_HOPELESS = 0.05

# What post-processing has to gain to be done by itself.
_HELPFUL = 0.002

# A linear adapter on the whole pyramid has many weights for its voxels; the default comes first, so that it is taken
# where the other gains little.
_RIDGES = (1e-2, 1e-3)


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
        dsc: for each organ the DSC of every left-out scan that annotates it, on the scan's own lattice, after
            ``post_processing``.
        post_processing: for each organ what gains the most on the left-out scans; nothing where little is gained.
    """

    candidate: Candidate
    dsc: tuple[tuple[float, ...], ...]
    post_processing: tuple[PostProcessing, ...]

    @property
    def mean(self) -> float:
        """Mean DSC over organs; an organ that could not be validated is left out."""
        return mean_over_organs(self.dsc)


def candidates(training: TrainingSettings, settings: AdapterSettings, rows: HeadRows) -> list[Candidate]:
    """Return the ways to choose from, cheapest first.

    Args:
        training: seed and length for all of them.
        settings: of which activation and width are taken.
        rows: what the encoder knows; zero-shot is a candidate only where it knows every organ.
    """
    kinds: list[Candidate] = []
    if all(row is not None for row in rows) and settings.activation == "sigmoid":
        kinds.append(Candidate("zero-shot", AdapterSettings(method="linear", levels="finest"), None))
    methods: tuple[Method, ...] = ("linear", "pointwise", "spatial")
    for method in methods:
        for levels in _LEVELS:
            kind = replace(settings, method=method, levels=levels)
            name = kind.name
            if (method, levels) == ("linear", "all"):
                for ridge in _RIDGES:
                    kinds.append(Candidate(f"{name}, ridge {ridge:g}", kind, replace(training, ridge=ridge)))
            else:
                kinds.append(Candidate(name, kind, training))
    return kinds


def can_validate(support: Sequence[SupportScan]) -> bool:
    """Return whether leaving scans out tells anything: some organ is annotated in two scans at least."""
    return bool((np.sum([scan.annotated for scan in support], axis=0) >= 2).any())


def folds(scans: int) -> list[list[int]]:
    """Return which scans are left out together: each alone, or, of more than ten scans, in ten groups."""
    return [list(range(first, scans, _MOST_FOLDS)) for first in range(min(scans, _MOST_FOLDS))]


def leave_one_out(
    candidate: Candidate, support: Sequence[SupportScan], rows: HeadRows, *, progress: Progress | None = None
) -> Validated:
    """Score a candidate on every scan of the support set, made without that scan.

    Args:
        candidate: what to validate.
        support: at least two scans, each with its grid and reference.
        rows: the encoder's classifiers.
        progress: where to show progress.
    """
    scores = _Scores(candidate, support, rows)
    groups = folds(len(support))
    with (progress or SilentProgress()).task(f"validate {candidate.name}", len(groups)) as task:
        for left_out in groups:
            scores.add(left_out)
            task.advance(1)
    return scores.summary()


def best_of(
    kinds: Sequence[Candidate], support: Sequence[SupportScan], rows: HeadRows, *, progress: Progress | None = None
) -> tuple[Validated, list[Validated]]:
    """Return the candidate that validates best, and all that stayed in the race to its end.

    A dearer candidate has to be worth it. After two folds, those that are far behind the best are given up.

    Args:
        kinds: cheapest first.
        support: at least two scans.
        rows: the encoder's classifiers.
        progress: where to show progress.
    """
    running = [_Scores(kind, support, rows) for kind in kinds]
    groups = folds(len(support))
    with (progress or SilentProgress()).task("choose the method", len(groups)) as task:
        for number, left_out in enumerate(groups, start=1):
            for scores in running:
                scores.add(left_out)
            if number >= 2:
                best = max(scores.mean for scores in running)
                running = [scores for scores in running if scores.mean >= best - _HOPELESS]
            task.advance(1)
    validated = [scores.summary() for scores in running]
    best = max(result.mean for result in validated)
    return next(result for result in validated if result.mean >= best - _WORTHWHILE), validated


class OrganScores:
    """For each organ and each post-processing, the DSC of every scan left out.

    Args:
        organs: how many.
    """

    def __init__(self, organs: int) -> None:
        self._dsc: list[dict[PostProcessing, list[float]]] = [{steps: [] for steps in ALL} for _ in range(organs)]

    def add(
        self,
        labels: NDArray[np.uint8] | NDArray[np.uint16],
        reference: LabelMap,
        values: Sequence[int],
        scored: NDArray[np.bool_],
    ) -> None:
        """Score a mask on its scan's own lattice.

        Args:
            labels: the mask, organ ``k`` as ``k + 1``.
            reference: the scan's annotation.
            values: label value of each organ in it.
            scored: ``[K]``, which organs count.
        """
        for steps in ALL:
            treated = post_process(labels, [steps] * len(values))
            for organ in np.flatnonzero(scored):
                score = dice(treated == organ + 1, reference.array == values[int(organ)])
                if score is not None:
                    self._dsc[organ][steps].append(score)

    @property
    def mean(self) -> float:
        """Mean DSC over organs, without post-processing."""
        return mean_over_organs(self.untreated)

    @property
    def untreated(self) -> list[list[float]]:
        """For each organ the scores without post-processing."""
        return [organ[ALL[0]] for organ in self._dsc]

    def summary(self) -> tuple[tuple[tuple[float, ...], ...], tuple[PostProcessing, ...]]:
        """Return each organ's scores with the post-processing that helps it, and that post-processing."""
        chosen = [_helpful(organ) for organ in self._dsc]
        dsc = [tuple(organ[steps]) for organ, steps in zip(self._dsc, chosen, strict=True)]
        return tuple(dsc), tuple(chosen)


class _Scores:
    """A candidate's scores so far."""

    def __init__(self, candidate: Candidate, support: Sequence[SupportScan], rows: HeadRows) -> None:
        self._candidate, self._support, self._rows = candidate, support, rows
        self._scores = OrganScores(len(rows))

    def add(self, left_out: Sequence[int]) -> None:
        """Make the adapter without some scans, and score it on them."""
        others = [scan for index, scan in enumerate(self._support) if index not in left_out]
        adapter = self._candidate.make(others, self._rows, SilentProgress()).adapter
        annotated = np.array([other.annotated for other in others])
        if self._candidate.settings.activation == "softmax":  # which learns from scans that show every organ
            annotated = annotated & annotated.all(axis=1, keepdims=True)
        known: NDArray[np.bool_] = np.any(annotated, axis=0)
        for index in left_out:
            scan = self._support[index]
            assert scan.grid is not None  # noqa: S101 - narrows the type; see the arguments
            assert scan.reference is not None  # noqa: S101 - likewise
            labels = segment_encoded(EncodedScan(scan.grid, scan.features), [adapter])
            self._scores.add(labels, *scan.reference, scan.annotated & known)

    @property
    def mean(self) -> float:
        """Mean DSC over organs, without post-processing."""
        return self._scores.mean

    def summary(self) -> Validated:
        """Return the scores, each organ with the post-processing that helps it."""
        return Validated(self._candidate, *self._scores.summary())


def _helpful(organ: dict[PostProcessing, list[float]]) -> PostProcessing:
    """Return the first post-processing that gains as much as the best, or none where little is gained."""
    if not organ[ALL[0]]:
        return ALL[0]
    means = {steps: float(np.mean(scores)) for steps, scores in organ.items()}
    best = max(means, key=lambda steps: means[steps])
    return best if means[best] >= means[ALL[0]] + _HELPFUL else ALL[0]


def mean_over_organs(dsc: Sequence[Sequence[float]]) -> float:
    """Return the mean over organs of each one's mean DSC; an organ without scores is left out."""
    organs = [sum(scores) / len(scores) for scores in dsc if scores]
    return sum(organs) / len(organs) if organs else 0.0
