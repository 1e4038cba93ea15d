"""The transductive size constraint: an adapter is tuned to one query under size priors (FSEFT, eqs. 2-3).

Minimised over the adapter, from where its training ended, is ``L(support) + λ Σ_k L_TI(Ŝ_k)``. ``Ŝ_k`` is the sum of
the query's probabilities of organ k, as a volume, and

    L_TI = |Ŝ - low|  if Ŝ < low;   |Ŝ - high|  if Ŝ > high;   0 otherwise

with ``low`` and ``high`` = (1 ∓ γ) times the mean support size. The authors' first release divides the error by the
greater of the two sizes, so that one λ serves organs of all sizes; that form is the default here.

The query is never in memory as a whole. ``L_TI`` depends on the query through a single number an organ, so its gradient
is ``dL_TI/dŜ · Σ dp/dθ``, gathered block by block, from those blocks alone in which an organ is visible whose size is
outside its prior.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from fseft_edge.adapter_file import AdapterFile
from fseft_edge.adapter_training import TrainingSettings, perturbed
from fseft_edge.adapters import Adapter
from fseft_edge.block_sampling import BlockSampler, SupportScan
from fseft_edge.blocks import Box, read_block, tiles
from fseft_edge.losses import adaptation_loss
from fseft_edge.report.progress import Progress, SilentProgress
from fseft_edge.runtime.encoding import EncodedScan
from fseft_edge.runtime.errors import UsageError
from fseft_edge.size_priors import SizePrior

Form = Literal["relative", "absolute"]

_BLOCK = 32
_MM3_PER_ML = 1000.0
_FOUND = 0.5


@dataclass(frozen=True)
class TransductionSettings:
    """How an adapter is tuned to a query.

    Attributes:
        weight: λ.
        form: of the penalty; ``absolute`` is in ml.
        steps: at most; tuning ends as soon as every constrained organ is inside its prior.
        rate: AdamW's rate.
        visible: an organ is visible in a block where its probability reaches this somewhere in it.
        absent: an organ whose mask is smaller than this share of the prior's lower end is taken to be absent, and left
            alone. The mask decides and not the sum of probabilities, which a faint haze over the whole scan can fill.
        training: how support blocks are drawn.
    """

    weight: float = 0.1
    form: Form = "relative"
    steps: int = 30
    rate: float = 1e-3
    visible: float = 1e-3
    absent: float = 0.05
    training: TrainingSettings = field(default_factory=TrainingSettings)


@dataclass(frozen=True)
class OrganOutcome:
    """What became of one organ.

    Attributes:
        before_ml: sum of its probabilities before, as a volume.
        after_ml: the same afterwards.
        prior: what was applied; None where the organ has none.
        notes: any of ``cut_off`` (it reaches the border of the field of view: only the upper end of the prior was
            applied), ``absent`` (hardly anything of it is there: left alone) and ``outside_prior`` (at the end too).
    """

    before_ml: float
    after_ml: float
    prior: SizePrior | None
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Transduced:
    """An adapter tuned to one query.

    Attributes:
        adapter: in evaluation mode; the one given where nothing had to be done.
        organs: one a class of the adapter, background left out.
        steps: optimiser steps.
    """

    adapter: Adapter
    organs: tuple[OrganOutcome, ...]
    steps: int


@dataclass(frozen=True)
class TransductionPlan:
    """What :func:`fseft_edge.segmentation.segment` needs to tune adapters to each scan.

    Attributes:
        images: folder of the annotated CTs that the adapters were trained on.
        labels: folder of their annotations.
        priors: given by hand, by organ.
        table: made of a table of volumes, by organ; may hold more organs than are segmented. An organ in neither has
            its support volumes' prior.
        settings: strength and length.
    """

    images: Path
    labels: Path
    priors: Mapping[str, SizePrior] = field(default_factory=dict)
    table: Mapping[str, SizePrior] = field(default_factory=dict)
    settings: TransductionSettings = field(default_factory=TransductionSettings)

    def priors_for(self, file: AdapterFile) -> list[SizePrior | None]:
        """Return the prior of every organ of an adapter, None for one without support volumes."""
        return [
            self.priors.get(organ.name)
            or self.table.get(organ.name)
            or (SizePrior.from_volumes(organ.support_volumes_ml) if organ.support_volumes_ml else None)
            for organ in file.description.organs
        ]

    def check(self, files: Sequence[AdapterFile]) -> None:
        """Make sure, before any work, that priors and adapters belong together.

        Raises:
            UsageError: a prior is of no organ of the adapters, or an adapter has no organ with a prior.
        """
        organs = {organ.name for file in files for organ in file.description.organs}
        unknown = sorted(set(self.priors) - organs)
        if unknown:
            raise UsageError(
                f"The size prior of {', '.join(unknown)} concerns no organ of the adapters.",
                remedy=f"They segment {', '.join(sorted(organs))}.",
            )
        for file in files:
            _require_one(self.priors_for(file), [organ.name for organ in file.description.organs])


def tuned_adapters(
    files: Sequence[AdapterFile],
    query: EncodedScan,
    supports: Sequence[Sequence[SupportScan]],
    plan: TransductionPlan,
    progress: Progress,
) -> tuple[list[Adapter], list[OrganOutcome]]:
    """Return every adapter tuned to a query, and what became of every organ, in the adapters' order."""
    tuned: list[Adapter] = []
    outcomes: list[OrganOutcome] = []
    for file, support in zip(files, supports, strict=True):
        done = transduce(file.adapter, query, support, plan.priors_for(file), settings=plan.settings, progress=progress)
        tuned.append(done.adapter)
        outcomes += done.organs
    return tuned, outcomes


def size_penalty(sizes: Tensor, low: Tensor, high: Tensor, form: Form) -> Tensor:
    """Return ``L_TI`` of every organ (FSEFT, eq. 3; all arguments ``[K]``, in one unit)."""
    bound = torch.minimum(torch.maximum(sizes.detach(), low), high)
    error = (sizes - bound).abs()
    return error if form == "absolute" else error / torch.maximum(sizes, bound).clamp_min(1e-12)


def transduce(
    adapter: Adapter,
    query: EncodedScan,
    support: Sequence[SupportScan],
    priors: Sequence[SizePrior | None],
    *,
    settings: TransductionSettings | None = None,
    progress: Progress | None = None,
) -> Transduced:
    """Return the adapter tuned to a query; the one given is left as it is.

    Args:
        adapter: trained on the support set.
        query: the scan to segment.
        support: the annotated scans it was trained on.
        priors: one an organ; None leaves an organ unconstrained.
        settings: strength and length.
        progress: where to show progress.

    Raises:
        UsageError: no organ has a prior.
    """
    settings = settings or TransductionSettings()
    _require_one(priors, [str(number) for number in range(1, len(priors) + 1)])
    tuned = _copy(adapter)
    sizes = _QuerySizes(tuned, query, settings.visible)
    before = sizes.at_first
    organs = [_constraint(k, prior, sizes, settings) for k, prior in enumerate(priors)]
    low = torch.tensor([organ.low for organ in organs])
    high = torch.tensor([organ.high for organ in organs])
    steps = _tune(tuned, sizes, support, (low, high), settings=settings, progress=progress or SilentProgress())
    after = sizes.measure(torch.ones_like(before, dtype=torch.bool)) if steps else before
    outcomes = tuple(
        OrganOutcome(
            before_ml=float(before[k]),
            after_ml=float(after[k]),
            prior=prior,
            notes=organ.notes + (("outside_prior",) if _outside(float(after[k]), organ) else ()),
        )
        for k, (prior, organ) in enumerate(zip(priors, organs, strict=True))
    )
    return Transduced(tuned.eval() if steps else adapter, outcomes, steps)


@dataclass(frozen=True)
class _Constraint:
    low: float
    high: float
    notes: tuple[str, ...]


def _require_one(priors: Sequence[SizePrior | None], organs: Sequence[str]) -> None:
    if all(prior is None for prior in priors):
        raise UsageError(
            f"No organ of the adapter has a size prior: {', '.join(organs)}.",
            remedy="Give one, such as --size-prior liver=1200..1800ml, or leave --transductive out.",
        )


def _constraint(organ: int, prior: SizePrior | None, sizes: _QuerySizes, settings: TransductionSettings) -> _Constraint:
    if prior is None:
        return _Constraint(0.0, math.inf, ())
    if float(sizes.masks[organ]) < settings.absent * prior.low_ml:
        return _Constraint(0.0, math.inf, ("absent",))
    if bool(sizes.at_border[organ]):
        return _Constraint(0.0, prior.high_ml, ("cut_off",))
    return _Constraint(prior.low_ml, prior.high_ml, ())


def _outside(size: float, organ: _Constraint) -> bool:
    return not organ.low * (1 - 1e-3) <= size <= organ.high * (1 + 1e-3)


def _copy(adapter: Adapter) -> Adapter:
    twin = Adapter(adapter.settings, adapter.levels, adapter.classes - adapter.backgrounds)
    twin.load_state_dict(adapter.state_dict())
    return twin.eval()


def _tune(
    adapter: Adapter,
    sizes: _QuerySizes,
    support: Sequence[SupportScan],
    bounds: tuple[Tensor, Tensor],
    *,
    settings: TransductionSettings,
    progress: Progress,
) -> int:
    """Run the optimiser; return its steps."""
    training = settings.training
    sampler = BlockSampler(
        adapter, support, block=training.block, batch=training.batch, random=np.random.default_rng(training.seed)
    )
    generator = torch.Generator().manual_seed(training.seed)
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=settings.rate, weight_decay=0.0)
    constrained = (bounds[0] > 0) | bounds[1].isfinite()
    steps, volumes = 0, sizes.at_first
    with progress.task("fit sizes", settings.steps) as task:
        while steps < settings.steps:
            volumes = volumes.clone().requires_grad_()
            penalty = size_penalty(volumes, *bounds, settings.form).sum()
            if float(penalty.detach()) == 0.0:
                break
            (pull,) = torch.autograd.grad(settings.weight * penalty, volumes)
            optimizer.zero_grad()
            sizes.backward(pull)
            batch = sampler.draw()
            adapter.train()
            logits = adapter(perturbed(batch.features, adapter, training, generator), sampler.core)
            adaptation_loss(logits, batch.targets, batch.annotated, adapter.settings.activation).backward()
            adapter.eval()
            optimizer.step()
            volumes = sizes.measure(constrained)
            steps += 1
            task.advance(1)
    return steps


class _QuerySizes:
    """The sum of a query's probabilities as volumes in ml, and its gradient, block by block.

    A block in which an organ is not visible at first counts for that organ as it was at first.

    Args:
        adapter: may change afterwards.
        query: the scan.
        visible: see :class:`TransductionSettings`.

    Attributes:
        at_first: sum of each organ's probabilities by the adapter as it was, ``[K]``.
        masks: volume in which each organ's probability exceeded one half then, ``[K]``.
        at_border: whether that mask touches the border of the field of view, bool ``[K]``.
    """

    def __init__(self, adapter: Adapter, query: EncodedScan, visible: float) -> None:
        self._adapter, self._features = adapter, query.features
        self._ml = query.grid.voxel_volume_mm3 / _MM3_PER_ML
        self._cores = list(tiles(query.grid.shape, (_BLOCK, _BLOCK, _BLOCK)))
        sums, shown, masks, borders = [], [], [], []
        with torch.no_grad():
            for core in self._cores:
                probabilities = self._probabilities(core)
                found = probabilities > _FOUND
                sums.append(probabilities.sum((1, 2, 3)) * self._ml)
                masks.append(found.sum((1, 2, 3)) * self._ml)
                shown.append(probabilities.amax((1, 2, 3)) >= visible)
                borders.append(_touches_border(found, core, query.grid.shape))
        self._first = torch.stack(sums)
        self._visible = torch.stack(shown)
        self.at_first = self._first.sum(0)
        self.masks = torch.stack(masks).sum(0)
        self.at_border = torch.stack(borders).any(0)

    @torch.no_grad()
    def measure(self, organs: Tensor) -> Tensor:
        """Return the volumes in ml, ``[K]``; up to date for the ``organs`` (bool ``[K]``)."""
        total = torch.zeros_like(self.at_first)
        for core, first, visited in zip(self._cores, self._first, self._where(organs), strict=True):
            total += self._probabilities(core).sum((1, 2, 3)) * self._ml if visited else first
        return total

    def backward(self, pull: Tensor) -> None:
        """Add to the adapter's gradients those of ``Σ_k pull_k Ŝ_k``."""
        for core, visited in zip(self._cores, self._where(pull != 0), strict=True):
            if visited:
                sizes = self._probabilities(core).sum((1, 2, 3)) * self._ml
                (pull * sizes).sum().backward()

    def _where(self, organs: Tensor) -> list[bool]:
        """Return for each block whether any of the organs is visible in it."""
        anywhere: list[bool] = (self._visible & organs).any(1).tolist()
        return anywhere

    def _probabilities(self, core: Box) -> Tensor:
        features = read_block(self._features, self._adapter.boxes(core))
        return self._adapter.probabilities(self._adapter(features, core))[0, self._adapter.backgrounds :]


def _touches_border(found: Tensor, core: Box, shape: tuple[int, int, int]) -> Tensor:
    """Return for each organ whether its mask within a block lies at the border of the grid, bool ``[K]``."""
    touches = torch.zeros(len(found), dtype=torch.bool)
    for axis, ((low, high), size) in enumerate(zip(core.ranges, shape, strict=True), start=1):
        if low == 0:
            touches |= found.select(axis, 0).flatten(1).any(1)
        if high == size:
            touches |= found.select(axis, -1).flatten(1).any(1)
    return touches
