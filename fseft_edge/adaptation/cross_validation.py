"""Cross-validation over the support set: expected accuracy on new scans, and choice of the method.

A fold leaves out one group of scans: the scans of one patient, if the patients are known
(:mod:`fseft_edge.adaptation.patients`), and else one scan. With more than ten groups, there are ten folds of several
groups each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import fmean

import numpy as np
from numpy.typing import NDArray

from fseft_edge.adaptation.block_sampling import SupportScan
from fseft_edge.adaptation.kept_features import kept_in_memory
from fseft_edge.adaptation.size_priors import SizePrior
from fseft_edge.adaptation.size_threshold import can_move_thresholds, expected_range, move_thresholds
from fseft_edge.adaptation.training import TrainedAdapter, TrainingSettings, train_adapter
from fseft_edge.adapters.blocks import Box
from fseft_edge.adapters.file import PostProcessing
from fseft_edge.adapters.network import Adapter, AdapterSettings, HeadRows, Levels, Method, zero_shot
from fseft_edge.evaluation.metrics import dice
from fseft_edge.masks.post_processing import ALL, post_process
from fseft_edge.masks.prediction import segment_encoded
from fseft_edge.masks.region import decide_region
from fseft_edge.runtime.encoder.encoding import EncodedScan
from fseft_edge.runtime.encoder.on_demand import FeaturesOnDemand
from fseft_edge.runtime.scans.annotation import Annotation
from fseft_edge.runtime.scans.components import bounding_box
from fseft_edge.runtime.system.progress import Progress, SilentProgress

_LEVELS: tuple[Levels, ...] = ("finest", "all")

_MAX_FOLDS = 10

# A candidate later in the list costs more. It is chosen only if its mean DSC is higher by this amount.
_MIN_GAIN_OF_COSTLIER_CANDIDATE = 0.005

# After two folds, a candidate whose mean DSC is lower than the best by more than this amount is dropped.
_MAX_DEFICIT = 0.05

# Post-processing becomes the default of an organ only if it increases the mean DSC by this amount.
_MIN_GAIN_OF_POST_PROCESSING = 0.002

# A threshold follows the size of an organ only if this increases the mean DSC by this amount.
_LEAST_GAIN_BY_SIZE = 0.002

# With fewer left-out scans, a gain says little, and each of them is compared with the size of one other scan.
_FEWEST_SCANS_BY_SIZE = 3

# A linear adapter on all levels has many weights compared with its training voxels, so two ridges are tried. The
# default ridge is first, so that the other ridge is chosen only if it is clearly better.
_RIDGES = (1e-2, 1e-3)


@dataclass(frozen=True)
class Candidate:
    """A method to make an adapter.

    Attributes:
        name: name for the user.
        settings: kind of adapter.
        training: training settings; None uses the classifiers of the encoder's head without training.
    """

    name: str
    settings: AdapterSettings
    training: TrainingSettings | None

    def make(self, support: Sequence[SupportScan], rows: HeadRows, progress: Progress) -> TrainedAdapter:
        """Return the adapter that this candidate makes from a support set."""
        if self.training is None:
            return TrainedAdapter(zero_shot(support[0].features.levels, rows), (), 0, bfloat16=False)
        return train_adapter(self.settings, support, head_rows=rows, training=self.training, progress=progress)


@dataclass(frozen=True)
class Validated:
    """A candidate and its cross-validation result.

    Attributes:
        candidate: the validated candidate.
        dsc: for each organ, the DSC of every left-out scan that annotates it, on the lattice of the scan, after
            ``post_processing``, with the threshold that ``follows_size`` says.
        post_processing: for each organ, the post-processing with the highest mean DSC on the left-out scans; no
            post-processing if the gain is too small.
        follows_size: for each organ, whether moving its threshold towards the size that it had in the other scans
            raises the mean DSC (:mod:`fseft_edge.adaptation.size_threshold`); False if the gain is too small.
    """

    candidate: Candidate
    dsc: tuple[tuple[float, ...], ...]
    post_processing: tuple[PostProcessing, ...]
    follows_size: tuple[bool, ...]

    @property
    def mean(self) -> float:
        """Mean of the mean DSC of all organs, without organs that could not be validated."""
        return mean_over_organs(self.dsc)


def candidates(training: TrainingSettings, settings: AdapterSettings, rows: HeadRows) -> list[Candidate]:
    """Return all candidates, in the order of increasing cost.

    Args:
        training: training settings of all candidates.
        settings: source of the activation and the width of all candidates.
        rows: classifiers of the organs in the head of the encoder. Zero-shot is a candidate only if the head knows
            every organ.
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


def can_validate(annotated: Sequence[NDArray[np.bool_]], groups: Sequence[int]) -> bool:
    """Return whether cross-validation is possible: at least one organ is annotated in at least two groups.

    Args:
        annotated: for each scan, bool ``[K]``: True for the annotated organs.
        groups: number of the group of each scan.
    """
    of_groups = [
        np.any([organs for organs, number in zip(annotated, groups, strict=True) if number == group], axis=0)
        for group in set(groups)
    ]
    return bool((np.sum(of_groups, axis=0) >= 2).any())


def folds(groups: Sequence[int]) -> list[list[int]]:
    """Return the indices of the scans that each fold leaves out: one group per fold, but at most ten folds.

    Args:
        groups: number of the group of each scan.
    """
    distinct = list(dict.fromkeys(groups))
    parts = [set(distinct[first::_MAX_FOLDS]) for first in range(min(len(distinct), _MAX_FOLDS))]
    return [[index for index, group in enumerate(groups) if group in part] for part in parts]


def cross_validate(
    candidate: Candidate,
    support: Sequence[SupportScan],
    rows: HeadRows,
    *,
    groups: Sequence[int] | None = None,
    progress: Progress | None = None,
) -> Validated:
    """Score a candidate on every scan of the support set with an adapter that was made without the scan's group.

    Args:
        candidate: candidate to validate.
        support: scans of at least two groups, each with its grid and its reference.
        rows: classifiers of the organs in the head of the encoder.
        groups: number of the group of each scan; None means that each scan is a group.
        progress: receiver of progress reports; None reports nothing.
    """
    support = kept_in_memory(support)
    scores = _Scores(candidate, support, rows)
    parts = folds(groups or range(len(support)))
    with (progress or SilentProgress()).task(f"validate {candidate.name}", len(parts)) as task:
        for left_out in parts:
            scores.add(left_out)
            task.advance(1)
    return scores.summary()


def best_of(
    kinds: Sequence[Candidate],
    support: Sequence[SupportScan],
    rows: HeadRows,
    *,
    groups: Sequence[int] | None = None,
    progress: Progress | None = None,
) -> tuple[Validated, list[Validated]]:
    """Return the best candidate, and the results of all candidates that were validated to the end.

    A more expensive candidate must be better by 0.005 to be chosen. After two folds, candidates far below the best are
    dropped.

    Args:
        kinds: candidates, in the order of increasing cost.
        support: scans of at least two groups, each with its grid and its reference.
        rows: classifiers of the organs in the head of the encoder.
        groups: number of the group of each scan; None means that each scan is a group.
        progress: receiver of progress reports; None reports nothing.
    """
    support = kept_in_memory(support)
    running = [_Scores(kind, support, rows) for kind in kinds]
    parts = folds(groups or range(len(support)))
    with (progress or SilentProgress()).task("choose the method", len(parts)) as task:
        for number, left_out in enumerate(parts, start=1):
            for scores in running:
                scores.add(left_out)
            if number >= 2:
                best = max(scores.mean for scores in running)
                running = [scores for scores in running if scores.mean >= best - _MAX_DEFICIT]
            task.advance(1)
    validated = [scores.summary() for scores in running]
    best = max(result.mean for result in validated)
    return next(result for result in validated if result.mean >= best - _MIN_GAIN_OF_COSTLIER_CANDIDATE), validated


class OrganScores:
    """The DSC of every left-out scan, for each organ and each combination of post-processing steps.

    Args:
        organs: number of organs.
    """

    def __init__(self, organs: int) -> None:
        self._dsc: list[dict[PostProcessing, list[float]]] = [{steps: [] for steps in ALL} for _ in range(organs)]

    def add(
        self,
        labels: NDArray[np.uint8] | NDArray[np.uint16],
        reference: Annotation,
        values: Sequence[int],
        scored: NDArray[np.bool_],
    ) -> None:
        """Add the scores of one mask.

        Args:
            labels: mask on the lattice of the scan; organ ``k`` has the label value ``k + 1``.
            reference: annotation of the scan.
            values: label value of each organ in the annotation.
            scored: bool ``[K]``; only organs with True are scored.
        """
        organs = [int(organ) for organ in np.flatnonzero(scored)]
        shown = labels != 0
        for organ in organs:
            shown |= reference.mask(values[organ])
        if not shown.any():
            return  # two empty masks have no DSC
        box = bounding_box(shown)
        annotated = {organ: reference.mask(values[organ])[box] for organ in organs}
        for steps in ALL:
            processed = post_process(labels[box], [steps] * len(values))
            for organ in organs:
                score = dice(processed == organ + 1, annotated[organ])
                if score is not None:
                    self._dsc[organ][steps].append(score)

    @property
    def mean(self) -> float:
        """Mean of the mean DSC of all organs, without post-processing."""
        return mean_over_organs(self.without_post_processing)

    @property
    def without_post_processing(self) -> list[list[float]]:
        """The scores of each organ without post-processing."""
        return self.of(ALL[0])

    def of(self, steps: PostProcessing) -> list[list[float]]:
        """Return the scores of each organ after post-processing with ``steps``."""
        return [organ[steps] for organ in self._dsc]

    def summary(self) -> tuple[tuple[tuple[float, ...], ...], tuple[PostProcessing, ...]]:
        """Return, for each organ, the scores with its best post-processing, and that post-processing."""
        chosen = [_best_post_processing(organ) for organ in self._dsc]
        dsc = [tuple(organ[steps]) for organ, steps in zip(self._dsc, chosen, strict=True)]
        return tuple(dsc), tuple(chosen)


class _Scores:
    """The scores of a candidate on the folds that were computed so far."""

    def __init__(self, candidate: Candidate, support: Sequence[SupportScan], rows: HeadRows) -> None:
        self._candidate, self._support, self._rows = candidate, support, rows
        self._scores, self._scores_by_size = OrganScores(len(rows)), OrganScores(len(rows))

    def add(self, left_out: Sequence[int]) -> None:
        """Make the adapter without the scans with the indices ``left_out``, and score the adapter on these scans."""
        others = [scan for index, scan in enumerate(self._support) if index not in left_out]
        adapter = self._candidate.make(others, self._rows, SilentProgress()).adapter
        annotated = np.array([other.annotated for other in others])
        if self._candidate.settings.activation == "softmax":  # trains only on scans that annotate every organ
            annotated = annotated & annotated.all(axis=1, keepdims=True)
        known: NDArray[np.bool_] = np.any(annotated, axis=0)
        for index in left_out:
            scan = self._support[index]
            assert scan.grid is not None  # noqa: S101 - narrows the type; the caller gives a grid
            assert scan.reference is not None  # noqa: S101 - narrows the type; the caller gives a reference
            encoded = EncodedScan(scan.grid, scan.features)
            scored = scan.annotated & known
            labels, boxes = _segmented(scan, encoded, adapter)
            self._scores.add(labels, *scan.reference, scored)
            if can_move_thresholds(adapter):
                moved, _ = move_thresholds(adapter, encoded, _expected_sizes(others), boxes=boxes)
                if moved is not adapter:
                    labels, _ = _segmented(scan, encoded, moved)
                self._scores_by_size.add(labels, *scan.reference, scored)
            if isinstance(scan.features, FeaturesOnDemand):
                scan.features.release()

    @property
    def mean(self) -> float:
        """Mean of the mean DSC of all organs, without post-processing."""
        return self._scores.mean

    def summary(self) -> Validated:
        """Return the candidate with its scores after the best post-processing of each organ."""
        plain, by_size = (zip(*scores.summary(), strict=True) for scores in (self._scores, self._scores_by_size))
        follows_size, dsc, steps = [], [], []
        for one, other in zip(plain, by_size, strict=True):
            comparable = len(one[0]) == len(other[0]) >= _FEWEST_SCANS_BY_SIZE
            follows_size.append(comparable and fmean(other[0]) >= fmean(one[0]) + _LEAST_GAIN_BY_SIZE)
            chosen = other if follows_size[-1] else one
            dsc.append(chosen[0])
            steps.append(chosen[1])
        return Validated(self._candidate, tuple(dsc), tuple(steps), tuple(follows_size))


def _segmented(
    scan: SupportScan, encoded: EncodedScan, adapter: Adapter
) -> tuple[NDArray[np.uint8] | NDArray[np.uint16], Sequence[Box] | None]:
    """Return the labels of a left-out scan, and the boxes in which it was segmented; None means the whole scan."""
    if scan.located is None or not isinstance(scan.features, FeaturesOnDemand):
        return segment_encoded(encoded, [adapter]), None
    region = decide_region(encoded, [adapter], scan.located, cuts=scan.features.edges)
    return region.found.labels, region.boxes


def _expected_sizes(support: Sequence[SupportScan]) -> list[SizePrior | None]:
    """Return the expected range of each organ, from its volumes in the scans that annotate it."""
    organs = range(len(support[0].annotated))
    return [expected_range([scan.volumes_mm3[k] / 1000 for scan in support if scan.annotated[k]]) for k in organs]


def _best_post_processing(organ: dict[PostProcessing, list[float]]) -> PostProcessing:
    """Return the post-processing with the highest mean DSC, or no post-processing if the gain is too small."""
    if not organ[ALL[0]]:
        return ALL[0]
    means = {steps: float(np.mean(scores)) for steps, scores in organ.items()}
    best = max(means, key=lambda steps: means[steps])
    return best if means[best] >= means[ALL[0]] + _MIN_GAIN_OF_POST_PROCESSING else ALL[0]


def mean_over_organs(dsc: Sequence[Sequence[float]]) -> float:
    """Return the mean of the mean DSC of all organs that have scores; 0 if no organ has scores."""
    organs = [sum(scores) / len(scores) for scores in dsc if scores]
    return sum(organs) / len(organs) if organs else 0.0
