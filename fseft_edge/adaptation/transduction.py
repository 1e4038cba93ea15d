"""The transductive size constraint: refit the classifiers of an adapter to one query (FSEFT, equations 2 and 3).

The refit starts from the trained adapter and minimises ``L(support) + λ Σ_k L_TI(Ŝ_k)``, plus a ridge that pulls the
weights towards the trained weights. ``Ŝ_k`` is the sum of the probabilities of organ k in the query, as a volume. The
size prior of organ k is the range from ``low`` to ``high``, and

    L_TI = |Ŝ - low|  if Ŝ < low;   |Ŝ - high|  if Ŝ > high;   0 otherwise

In the paper, ``low`` and ``high`` are (1 ∓ γ) times the mean size in the support set. The first released code of the
authors divides the error by the larger of the two sizes, so that one λ is suitable for organs of all sizes. This
relative form is the default.

The refit changes only the classifiers of the adapter, in which the logits are linear; the convolutions stay unchanged.
The support set and the query are therefore read only once. The input of the classifiers is stored for the voxels that
contribute, and L-BFGS solves the problem for these voxels in seconds (see
:mod:`fseft_edge.adaptation.linear_solver`). The complete query is never in memory.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
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
    """The settings of the refit of an adapter to a query.

    Attributes:
        weight: weight ``λ`` of the size penalty.
        form: form of the size penalty: ``relative``, or ``absolute`` in ml.
        ridge: strength of the ridge that pulls the classifiers towards the trained classifiers.
        visible: smallest probability at which an organ is visible in a voxel. In voxels where no refitted organ is
            visible, the probabilities are treated as constant.
        voxels: maximum number of query voxels to use; if more voxels contribute, a random sample is used.
        blocks: number of blocks of the support set from which voxels are sampled.
        iterations: maximum number of L-BFGS iterations.
        absent: an organ is treated as absent and is not refitted if its mask is at most this share of the lower end of
            its prior. The criterion uses the mask, because small probabilities over the complete scan can add up to
            the size of an organ.
        training: settings for the sampling of blocks of the support set.
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
    """The result of the refit for one organ.

    Attributes:
        before_ml: sum of the probabilities of the organ before the refit, as a volume.
        after_ml: sum of the probabilities of the organ after the refit, as a volume.
        prior: size prior of the organ; None if it has none.
        flags: any of ``cut_off`` (the organ touches the border of the field of view; only the upper end of the prior
            was applied), ``absent`` (almost no voxel of the organ was found; the organ was not refitted), and
            ``outside_prior`` (the size after the refit is outside the prior).
    """

    before_ml: float
    after_ml: float
    prior: SizePrior | None
    flags: tuple[str, ...]


@dataclass(frozen=True)
class Transduced:
    """An adapter that was refitted to one query.

    Attributes:
        adapter: the refitted adapter, in evaluation mode; the given adapter if no refit was necessary.
        organs: result for each organ, in the order of the classes of the adapter.
        evaluations: number of evaluations of the loss; 0 if no refit was necessary.
    """

    adapter: Adapter
    organs: tuple[OrganOutcome, ...]
    evaluations: int


@dataclass(frozen=True)
class TransductionInputs:
    """The inputs with which :func:`fseft_edge.segmentation.segment.segment` refits adapters to each scan.

    Attributes:
        images: folder of the annotated CTs that the adapters were trained on.
        labels: folder of the annotations of these CTs.
        priors: size priors that the user gave, by organ name.
        table: size priors from a table of volumes, by organ name; the table may contain further organs. An organ that
            is not in ``priors`` and not in ``table`` has the prior of its volumes in the support set.
        settings: settings of the refit.
    """

    images: Path
    labels: Path
    priors: Mapping[str, SizePrior] = field(default_factory=dict)
    table: Mapping[str, SizePrior] = field(default_factory=dict)
    settings: TransductionSettings = field(default_factory=TransductionSettings)

    def absolute(self) -> TransductionInputs:
        """Return these inputs with absolute paths, for a process that works in another folder."""
        return replace(self, images=self.images.absolute(), labels=self.labels.absolute())

    def priors_for(self, file: AdapterFile) -> list[SizePrior | None]:
        """Return the prior of every organ of an adapter; None for an organ without a prior and support volumes."""
        return [
            self.priors.get(organ.name)
            or self.table.get(organ.name)
            or (SizePrior.from_volumes(organ.support_volumes_ml) if organ.support_volumes_ml else None)
            for organ in file.description.organs
        ]

    def check(self, files: Sequence[AdapterFile]) -> None:
        """Check that the priors match the organs of the adapters.

        Raises:
            UsageError: a prior is for an organ that no adapter has, the table contains no organ of the adapters, or no
                organ of an adapter has a prior.
        """
        organs = {organ.name for file in files for organ in file.description.organs}
        if self.table and not organs & self.table.keys():
            raise UsageError(
                f"The table of volumes contains no organ of the adapters, but only {', '.join(sorted(self.table))}.",
                remedy=f"Give a table of volumes for organs of the adapters: {', '.join(sorted(organs))}.",
            )
        unknown = sorted(set(self.priors) - organs)
        if unknown:
            raise UsageError(
                f"--size-prior is given for {', '.join(unknown)}, but no adapter has this organ.",
                remedy=f"Give --size-prior only for organs of the adapters: {', '.join(sorted(organs))}.",
            )
        for file in files:
            _require_prior(self.priors_for(file), [organ.name for organ in file.description.organs])


def refitted_adapters(
    files: Sequence[AdapterFile],
    query: EncodedScan,
    supports: Sequence[Voxels],
    inputs: TransductionInputs,
) -> tuple[list[Adapter], list[OrganOutcome]]:
    """Refit adapters to a query; return the refitted adapters and the results of all organs, in this order.

    Args:
        files: adapters to refit.
        query: scan to segment.
        supports: for each adapter, sampled voxels of its support set (see :func:`support_of`).
        inputs: size priors and settings.
    """
    refitted: list[Adapter] = []
    outcomes: list[OrganOutcome] = []
    for file, support in zip(files, supports, strict=True):
        done = transduce(file.adapter, query, support, inputs.priors_for(file), settings=inputs.settings)
        refitted.append(done.adapter)
        outcomes += done.organs
    return refitted, outcomes


def support_of(
    adapter: Adapter, support: Sequence[SupportScan], settings: TransductionSettings, progress: Progress | None = None
) -> Voxels:
    """Return the sample of voxels of the support set of an adapter that :func:`transduce` needs."""
    progress = progress or SilentProgress()
    return support_voxels(
        adapter, support, settings.training, blocks=settings.blocks, task="read the support set", progress=progress
    )


def size_penalty(sizes: Tensor, low: Tensor, high: Tensor, form: Form) -> Tensor:
    """Return ``L_TI`` of every organ (FSEFT, eq. 3).

    Args:
        sizes: sizes ``Ŝ``, ``[K]``, in the unit of ``low`` and ``high``.
        low: lower ends of the priors, ``[K]``.
        high: upper ends of the priors, ``[K]``.
        form: ``absolute``, or ``relative`` to the larger of size and bound.
    """
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
    """Return the adapter refitted to a query. The given adapter is not changed.

    Args:
        adapter: adapter that was trained on the support set.
        query: scan to segment.
        support: sampled voxels of the support set of the adapter (see :func:`support_of`).
        priors: one prior per organ; None leaves the organ without a constraint.
        settings: settings of the refit.

    Raises:
        UsageError: no organ has a prior.
    """
    settings = settings or TransductionSettings()
    _require_prior(priors, [str(number) for number in range(1, len(priors) + 1)])
    first = survey_of(adapter, query)
    organs = [_constraint(k, prior, first, settings) for k, prior in enumerate(priors)]
    outside = torch.tensor(
        [_outside(float(size), organ) for size, organ in zip(first.sizes, organs, strict=True)], dtype=torch.bool
    )
    refitted, after, evaluations = adapter, first.sizes, 0
    if bool(outside.any()):
        # With sigmoid, every organ has a separate classifier, and only organs outside their priors are refitted.
        free = outside if adapter.settings.activation == "sigmoid" else torch.ones_like(outside)
        query_voxels = visible_voxels(
            adapter,
            query,
            first,
            free,
            visible=settings.visible,
            most=settings.voxels,
            seed=settings.training.seed,
        )
        refitted = _copy(adapter)
        constraints = [organs[k] for k in free.nonzero()[:, 0].tolist()]
        evaluations = _refit(refitted, query_voxels, support, constraints, settings)
        after = first.sizes.clone()
        after[free] = query_voxels.sizes(refitted, *query_voxels.classifiers(refitted))
    outcomes = tuple(
        OrganOutcome(
            before_ml=float(first.sizes[k]),
            after_ml=float(after[k]),
            prior=prior,
            flags=organ.flags + (("outside_prior",) if _outside(float(after[k]), organ) else ()),
        )
        for k, (prior, organ) in enumerate(zip(priors, organs, strict=True))
    )
    return Transduced(refitted, outcomes, evaluations)


@dataclass(frozen=True)
class _Constraint:
    low: float
    high: float
    flags: tuple[str, ...]


def _require_prior(priors: Sequence[SizePrior | None], organs: Sequence[str]) -> None:
    if all(prior is None for prior in priors):
        raise UsageError(
            f"No organ of the adapter has a size prior. The organs are {', '.join(organs)}.",
            remedy="Give a size prior, for example --size-prior liver=1200..1800ml, or remove --transductive.",
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
    copied = Adapter(adapter.settings, adapter.levels, adapter.classes - adapter.backgrounds)
    copied.load_state_dict(adapter.state_dict())
    return copied.to(adapter.device).eval()


def _refit(
    adapter: Adapter,
    query_voxels: VisibleVoxels,
    support: Voxels,
    constraints: Sequence[_Constraint],
    settings: TransductionSettings,
) -> int:
    """Refit the classifiers of the selected organs in place; return the number of evaluations of the loss.

    Args:
        adapter: adapter to change.
        query_voxels: voxels of the query, with the selected organs.
        support: sampled voxels of the support set, for all organs.
        constraints: size constraints of the selected organs.
        settings: settings of the refit.
    """
    low, high = (torch.tensor([getattr(constraint, end) for constraint in constraints]) for end in ("low", "high"))

    def penalty(weight: Tensor, bias: Tensor) -> Tensor:
        sizes = query_voxels.sizes(adapter, weight, bias)
        return settings.weight * size_penalty(sizes, low, high, settings.form).sum()

    selected = query_voxels.organs
    solution = solve(
        Voxels(support.features, support.targets[:, selected], support.weight[:, selected]),
        *query_voxels.classifiers(adapter),
        ridge=settings.ridge,
        activation=adapter.settings.activation,
        penalty=penalty,
        iterations=settings.iterations,
    )
    weight, bias = adapter.linear_weight(), adapter.linear_bias().clone()
    weight[query_voxels.rows(adapter)], bias[query_voxels.rows(adapter)] = solution.weight, solution.bias
    adapter.set_linear(weight, bias)
    return solution.evaluations
