"""The transductive size constraint: an adapter is refitted to one query under size priors (FSEFT, eqs. 2-3).

Minimised from where training ended is ``L(support) + λ Σ_k L_TI(Ŝ_k)``, plus a ridge towards the start. ``Ŝ_k`` is the
sum of the query's probabilities of organ k, as a volume, and

    L_TI = |Ŝ - low|  if Ŝ < low;   |Ŝ - high|  if Ŝ > high;   0 otherwise

with ``low`` and ``high`` = (1 ∓ γ) times the mean support size. The authors' first release divides the error by the
greater of the two sizes, so that one λ serves organs of all sizes; that form is the default here.

What is refitted are the adapter's classifiers, in which the logits are linear; its convolutions stay. So the support
set and the query are passed over once, what the classifiers see is kept at the voxels that matter, and the problem is
solved there by L-BFGS (see :mod:`fseft_edge.adaptation.linear_solver`) in seconds. The query is never in memory as a
whole.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from fseft_edge.adaptation.block_sampling import SupportScan
from fseft_edge.adaptation.linear_solver import Voxels, solve
from fseft_edge.adaptation.query_sizes import Survey, VisibleVoxels, survey_of, visible_voxels
from fseft_edge.adaptation.size_priors import SizePrior
from fseft_edge.adaptation.training import TrainingSettings, support_voxels
from fseft_edge.adapters.file import AdapterFile
from fseft_edge.adapters.network import Adapter
from fseft_edge.runtime.encoder.encoding import EncodedScan
from fseft_edge.runtime.errors import UsageError
from fseft_edge.runtime.system.progress import Progress, SilentProgress

Form = Literal["relative", "absolute"]

_TOLERANCE = 0.01


@dataclass(frozen=True)
class TransductionSettings:
    """How an adapter is refitted to a query.

    Attributes:
        weight: λ.
        form: of the penalty; ``absolute`` is in ml.
        ridge: strength of the pull of the classifiers towards where they start.
        visible: voxels in which the probability of no organ that is refitted reaches this count as they are.
        voxels: of the query that are kept at most; of more, as many are drawn at random.
        blocks: of the support set that voxels are gathered from.
        iterations: of L-BFGS, at most.
        absent: an organ whose mask is at most this share of the prior's lower end is taken to be absent, and left
            alone. The mask decides and not the sum of probabilities, which a faint haze over the whole scan can fill.
        training: how support blocks are drawn.
    """

    weight: float = 0.1
    form: Form = "relative"
    ridge: float = 1e-1
    visible: float = 1e-2
    voxels: int = 30_000
    blocks: int = 24
    iterations: int = 40
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
    """An adapter refitted to one query.

    Attributes:
        adapter: in evaluation mode; the one given where nothing had to be done.
        organs: one a class of the adapter, background left out.
        evaluations: of what is minimised.
    """

    adapter: Adapter
    organs: tuple[OrganOutcome, ...]
    evaluations: int


@dataclass(frozen=True)
class TransductionInputs:
    """What :func:`fseft_edge.segmentation.segment.segment` needs to refit adapters to each scan.

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
            UsageError: a prior, or a whole table of volumes, is of no organ of the adapters, or an adapter has no organ
                with a prior.
        """
        organs = {organ.name for file in files for organ in file.description.organs}
        if self.table and not organs & self.table.keys():
            raise UsageError(
                f"The table of volumes holds {', '.join(sorted(self.table))}, none of them an organ of the adapters.",
                remedy=f"They segment {', '.join(sorted(organs))}.",
            )
        unknown = sorted(set(self.priors) - organs)
        if unknown:
            raise UsageError(
                f"The size prior of {', '.join(unknown)} concerns no organ of the adapters.",
                remedy=f"They segment {', '.join(sorted(organs))}.",
            )
        for file in files:
            _require_one(self.priors_for(file), [organ.name for organ in file.description.organs])


def refitted_adapters(
    files: Sequence[AdapterFile],
    query: EncodedScan,
    supports: Sequence[Voxels],
    plan: TransductionInputs,
) -> tuple[list[Adapter], list[OrganOutcome]]:
    """Return every adapter refitted to a query, and what became of every organ, in the adapters' order."""
    refitted: list[Adapter] = []
    outcomes: list[OrganOutcome] = []
    for file, support in zip(files, supports, strict=True):
        done = transduce(file.adapter, query, support, plan.priors_for(file), settings=plan.settings)
        refitted.append(done.adapter)
        outcomes += done.organs
    return refitted, outcomes


def support_of(
    adapter: Adapter, support: Sequence[SupportScan], settings: TransductionSettings, progress: Progress | None = None
) -> Voxels:
    """Return what :func:`transduce` needs of the annotated scans that an adapter was trained on."""
    progress = progress or SilentProgress()
    return support_voxels(
        adapter, support, settings.training, blocks=settings.blocks, task="read the support set", progress=progress
    )


def size_penalty(sizes: Tensor, low: Tensor, high: Tensor, form: Form) -> Tensor:
    """Return ``L_TI`` of every organ (FSEFT, eq. 3; all arguments ``[K]``, in one unit)."""
    bound = torch.minimum(torch.maximum(sizes.detach(), low), high)
    error = (sizes - bound).abs()
    return error if form == "absolute" else error / torch.maximum(sizes, bound).clamp_min(1e-12)


def transduce(
    adapter: Adapter,
    query: EncodedScan,
    support: Voxels,
    priors: Sequence[SizePrior | None],
    *,
    settings: TransductionSettings | None = None,
) -> Transduced:
    """Return the adapter refitted to a query; the one given is left as it is.

    Args:
        adapter: trained on the support set.
        query: the scan to segment.
        support: voxels of the annotated scans that it was trained on (see :func:`support_of`).
        priors: one an organ; None leaves an organ unconstrained.
        settings: how strong the constraint is.

    Raises:
        UsageError: no organ has a prior.
    """
    settings = settings or TransductionSettings()
    _require_one(priors, [str(number) for number in range(1, len(priors) + 1)])
    first = survey_of(adapter, query)
    organs = [_constraint(k, prior, first, settings) for k, prior in enumerate(priors)]
    pulled = torch.tensor(
        [_outside(float(size), organ) for size, organ in zip(first.sizes, organs, strict=True)], dtype=torch.bool
    )
    refitted, after, evaluations = adapter, first.sizes, 0
    if bool(pulled.any()):
        # With sigmoid every organ has a classifier of its own, and those of the others are left as they are.
        free = pulled if adapter.settings.activation == "sigmoid" else torch.ones_like(pulled)
        seen = visible_voxels(
            adapter,
            query,
            first,
            free,
            visible=settings.visible,
            most=settings.voxels,
            seed=settings.training.seed,
        )
        refitted = _copy(adapter)
        evaluations = _solve(refitted, seen, support, [organs[k] for k in free.nonzero()[:, 0].tolist()], settings)
        after = first.sizes.clone()
        after[free] = seen.sizes(refitted, *seen.classifiers(refitted))
    outcomes = tuple(
        OrganOutcome(
            before_ml=float(first.sizes[k]),
            after_ml=float(after[k]),
            prior=prior,
            notes=organ.notes + (("outside_prior",) if _outside(float(after[k]), organ) else ()),
        )
        for k, (prior, organ) in enumerate(zip(priors, organs, strict=True))
    )
    return Transduced(refitted, outcomes, evaluations)


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


def _constraint(organ: int, prior: SizePrior | None, sizes: Survey, settings: TransductionSettings) -> _Constraint:
    if prior is None:
        return _Constraint(0.0, math.inf, ())
    if float(sizes.masks[organ]) <= settings.absent * prior.low_ml:
        return _Constraint(0.0, math.inf, ("absent",))
    if bool(sizes.at_border[organ]):
        return _Constraint(0.0, prior.high_ml, ("cut_off",))
    return _Constraint(prior.low_ml, prior.high_ml, ())


def _outside(size: float, organ: _Constraint) -> bool:
    return not organ.low * (1 - _TOLERANCE) <= size <= organ.high * (1 + _TOLERANCE)


def _copy(adapter: Adapter) -> Adapter:
    twin = Adapter(adapter.settings, adapter.levels, adapter.classes - adapter.backgrounds)
    twin.load_state_dict(adapter.state_dict())
    return twin.to(adapter.device).eval()


def _solve(
    adapter: Adapter,
    seen: VisibleVoxels,
    support: Voxels,
    organs: Sequence[_Constraint],
    settings: TransductionSettings,
) -> int:
    """Put the classifiers of least support loss and penalty into the adapter; return the evaluations it took.

    Args:
        adapter: changed.
        seen: of the query.
        support: of the support set, all organs.
        organs: the constraints of those that are seen.
        settings: strengths.
    """
    low, high = (torch.tensor([getattr(organ, end) for organ in organs]) for end in ("low", "high"))

    def penalty(weight: Tensor, bias: Tensor) -> Tensor:
        return settings.weight * size_penalty(seen.sizes(adapter, weight, bias), low, high, settings.form).sum()

    solution = solve(
        Voxels(support.features, support.targets[:, seen.organs], support.weight[:, seen.organs]),
        *seen.classifiers(adapter),
        ridge=settings.ridge,
        activation=adapter.settings.activation,
        penalty=penalty,
        iterations=settings.iterations,
    )
    weight, bias = adapter.linear_weight(), adapter.linear_bias().clone()
    weight[seen.rows(adapter)], bias[seen.rows(adapter)] = solution.weight, solution.bias
    adapter.set_linear(weight, bias)
    return solution.evaluations
