"""Adapters: the light networks that a site trains on frozen features (FSEFT, section on spatial adapters).

=========== ====================================================== =============================================
method      on ``last``                                            on ``pyramid``
=========== ====================================================== =============================================
linear      1x1x1 classifier (linear probe)                        one 1x1x1 classifier a level, upsampled, summed
pointwise   ``x + C1(ReLU(C1(x)))``, classifier                    the same, plus: each level projected to ``width``
spatial     ``x + C3(ReLU(C3(x)))``, classifier                    channels, the residual step at every level, coarse
                                                                   to fine, classifier
=========== ====================================================== =============================================

The second convolution of a residual step starts at zero. Where the encoder's head knows an organ, the classifier starts
as the head's row, so an untrained adapter is the zero-shot segmenter.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fseft_edge.adapters.blocks import Box, surrounded, upsample_into
from fseft_edge.runtime.encoder.networks.base import FeatureLevel

Method = Literal["linear", "pointwise", "spatial"]
Levels = Literal["finest", "all"]
Activation = Literal["sigmoid", "softmax"]

HeadRows = Sequence[tuple[Tensor, float] | None]
"""For each organ the weight ``[C_0]`` and bias of the encoder's own classifier, None where it does not know it."""

UNKNOWN_ORGAN_BIAS = -3.0
"""Where a sigmoid classifier of an organ starts that the encoder does not know: nearly nothing is it."""


@dataclass(frozen=True)
class AdapterSettings:
    """What kind of adapter.

    Attributes:
        method: ``linear``, ``pointwise`` or ``spatial``.
        levels: of the feature pyramid, the levels that the adapter uses: ``finest`` (level 0 only, as in the paper) or
            ``all``.
        activation: ``sigmoid`` per organ, or ``softmax`` with background.
        width: channels that each level is projected to (``pointwise`` and ``spatial`` on the pyramid).
    """

    method: Method = "spatial"
    levels: Levels = "all"
    activation: Activation = "sigmoid"
    width: int = 16

    @property
    def name(self) -> str:
        """A name for people, for example ``spatial on all levels``."""
        return f"{self.method} on {'all levels' if self.levels == 'all' else 'the finest level'}"


class ResidualStep(nn.Module):
    """``x + C(ReLU(C(x)))`` with kernels of ``kernel`` voxels and no bias; the second convolution starts at zero."""

    def __init__(self, channels: int, kernel: int) -> None:
        super().__init__()
        self.first = nn.Conv3d(channels, channels, kernel, bias=False)
        self.second = nn.Conv3d(channels, channels, kernel, bias=False)
        nn.init.zeros_(self.second.weight)

    @property
    def halo(self) -> int:
        """Voxels of context used up on every side."""
        return 2 * (self.first.kernel_size[0] // 2)

    def forward(self, x: Tensor) -> Tensor:
        """Return the step's result on the inner voxels: ``[n, C, X - 2 h, ...]`` for a halo of ``h``."""
        residual: Tensor = self.second(torch.relu(self.first(x)))
        return residual + _inner(x, self.halo)


class Adapter(nn.Module):
    """A trainable head on a frozen feature pyramid.

    Args:
        settings: the kind of adapter.
        levels: the encoder's pyramid.
        organs: number of organs ``K``; with softmax there is one more class, the background, at index 0.
    """

    fold: Tensor | None

    def __init__(self, settings: AdapterSettings, levels: Sequence[FeatureLevel], organs: int) -> None:
        super().__init__()
        self.settings = settings
        self.levels = tuple(levels if settings.levels == "all" else levels[:1])
        self.backgrounds = 1 if settings.activation == "softmax" else 0
        self.classes = organs + self.backgrounds
        for index, level in enumerate(self.levels):
            self.register_buffer(f"mean_{index}", torch.zeros(level.channels))
            self.register_buffer(f"scale_{index}", torch.ones(level.channels))
        self.register_buffer("fold", None, persistent=False)
        finest = self.levels[0].channels
        self.direct = nn.Conv3d(finest, self.classes, 1)
        self.coarse = nn.ModuleList(nn.Conv3d(x.channels, self.classes, 1, bias=False) for x in self.levels[1:])
        if settings.method == "linear":
            return
        kernel = 3 if settings.method == "spatial" else 1
        if settings.levels == "finest":
            self.steps = nn.ModuleList([ResidualStep(finest, kernel)])
        else:
            self.project = nn.ModuleList(nn.Conv3d(x.channels, settings.width, 1) for x in self.levels)
            self.steps = nn.ModuleList(ResidualStep(settings.width, kernel) for _ in self.levels)
            self.classifier = nn.Conv3d(settings.width, self.classes, 1, bias=False)

    def start_from_head(self, rows: HeadRows) -> None:
        """Start the classifier of known organs from the encoder's head.

        Args:
            rows: the head's classifiers.
        """
        first, bias = self.backgrounds, self._bias()
        with torch.no_grad():
            if first:
                nn.init.xavier_uniform_(self.direct.weight[:1])
                bias[0] = 0.0
                if self.settings.method == "linear":
                    self._zero(0)
            for k, row in enumerate(rows, start=first):
                if row is None:
                    bias[k] = 0.0 if first else UNKNOWN_ORGAN_BIAS
                    if self.settings.method == "linear":
                        self._zero(k)
                    continue
                known, known_bias = row[0].to(bias.device), row[1]
                self.direct.weight[k, :, 0, 0, 0] = known * self.scale(0)
                bias[k] = (known @ self.mean(0)).double() + known_bias
                if self.settings.levels == "all":
                    for extra in self._other_classifiers():
                        extra.weight[k] = 0.0

    def _zero(self, row: int) -> None:
        """Empty a classifier: a linear adapter is solved with a ridge towards what stands there."""
        for weight in self.classifiers():
            weight[row] = 0.0

    def classifiers(self) -> list[Tensor]:
        """Return the weights ``[classes, C, 1, 1, 1]`` that make logits: ``direct`` first."""
        return [layer.weight for layer in (self.direct, *self._other_classifiers())]

    def _other_classifiers(self) -> list[nn.Conv3d]:
        """The classifiers beside ``direct``: one a coarser level, and that of the residual path."""
        linear = [module for module in self.coarse if isinstance(module, nn.Conv3d)]
        has_residual_path = self.settings.method != "linear" and self.settings.levels == "all"
        return [*linear, self.classifier] if has_residual_path else linear

    def linear_parameters(self) -> list[nn.Parameter]:
        """Return the parameters beside the residual path, which logits are linear in; they bear a higher rate."""
        if self.settings.levels == "finest":
            return []
        return [*self.direct.parameters(), *self.coarse.parameters()]

    @property
    def device(self) -> torch.device:
        """Where the adapter computes."""
        return self.direct.weight.device

    def linear_weight(self) -> Tensor:
        """Return the weights ``[classes, D]`` of all classifiers on the CPU, in the order of :meth:`penultimate`."""
        return torch.cat([weight.detach().flatten(1) for weight in self.classifiers()], dim=1).cpu()

    def linear_bias(self) -> Tensor:
        """Return the classifiers' bias ``[classes]`` on the CPU."""
        return self._bias().cpu()

    def _bias(self) -> Tensor:
        bias = self.direct.bias
        assert bias is not None  # noqa: S101 - narrows the type for the checker
        return bias.detach()

    @torch.no_grad()
    def set_linear(self, weight: Tensor, bias: Tensor) -> None:
        """Replace what :meth:`linear_weight` and :meth:`linear_bias` return."""
        classifiers = self.classifiers()
        for mine, new in zip(classifiers, weight.split([mine.shape[1] for mine in classifiers], dim=1), strict=True):
            mine.copy_(new[..., None, None, None])
        self._bias().copy_(bias)

    def mean(self, level: int) -> Tensor:
        """Return the level's channel means over the support set, ``[C_l]``."""
        return self.get_buffer(f"mean_{level}")

    def scale(self, level: int) -> Tensor:
        """Return the level's channel standard deviations over the support set, ``[C_l]``."""
        return self.get_buffer(f"scale_{level}")

    def boxes(self, core: Box) -> list[Box]:
        """Return what must be read of each level so that :meth:`forward` covers ``core`` (voxels of level 0)."""
        boxes = [core.grown(self._halo(0))]
        for level in range(1, len(self.levels)):
            boxes.append(boxes[-1].coarser().grown(self._halo(level)))
        return boxes

    def forward(self, features: Sequence[Tensor], core: Box) -> Tensor:
        """Return logits ``[n, classes, *core.shape]``.

        Args:
            features: each level's part ``boxes(core)``, ``[n, C_l, ...]``.
            core: where the wanted voxels lie (for blocks of one batch: any of them, they share their alignment).
        """
        normalised = [self._normalised(x, level) for level, x in enumerate(features)]
        boxes = self.boxes(core)
        if self.settings.method == "linear":
            return self._linear(normalised, boxes, core)
        if self.settings.levels == "finest":
            return self._classify(normalised[0], self.direct)
        context = self._context(normalised, boxes)
        return self._classify(context, self.classifier) + self._linear(normalised, boxes, core)

    def of_maps(self, levels: Sequence[Tensor]) -> Tensor:
        """Return logits ``[n, classes, X, Y, Z]`` of whole feature maps held in memory, ``[n, C_l, ...]`` a level."""
        core = Box(*((0, size) for size in levels[0].shape[2:]))
        logits: Tensor = self(surrounded(levels, self.boxes(core)), core)
        return logits

    def log_odds(self, levels: Sequence[Tensor]) -> Tensor:
        """Return each organ's log odds ``[n, K, X, Y, Z]`` of whole feature maps, as for :meth:`of_maps`."""
        return torch.logit(self.probabilities(self.of_maps(levels))[:, self.backgrounds :])

    def penultimate(self, features: Sequence[Tensor], core: Box) -> Tensor:
        """Return what the classifiers see, ``[n, D, *core.shape]``: logits are ``W p + b`` of it.

        ``W`` and ``b`` are :meth:`linear_weight` and :meth:`linear_bias`. For a linear adapter these are the normalised
        features, every level interpolated; on the pyramid the outcome of the residual path stands behind them.

        Args:
            features: as for :meth:`forward`.
            core: likewise.
        """
        normalised = [self._normalised(x, level) for level, x in enumerate(features)]
        boxes = self.boxes(core)
        if self.settings.method != "linear" and self.settings.levels == "finest":
            alone: Tensor = self.steps[0](normalised[0])
            return alone
        wanted = [core]
        for _ in self.coarse:
            wanted.append(wanted[-1].coarser())
        below: Tensor | None = None
        for level in reversed(range(len(self.levels))):
            here = _part(normalised[level], boxes[level], wanted[level])
            if below is not None:
                here = torch.cat([here, upsample_into(below, wanted[level + 1], wanted[level])], dim=1)
            below = here
        assert below is not None  # noqa: S101 - narrows the type for the checker
        if self.settings.method == "linear":
            return below
        return torch.cat([below, self.steps[0](self._context(normalised, boxes))], dim=1)

    def folded(self) -> Adapter:
        """Return a copy for inference alone that holds the fold of :meth:`_classify` instead of computing it."""
        adapter = copy.deepcopy(self).eval()
        if self.settings.method != "linear":
            classifier = adapter.direct if self.settings.levels == "finest" else adapter.classifier
            adapter.fold = adapter._folded_weight(classifier).detach()
        return adapter

    def probabilities(self, logits: Tensor) -> Tensor:
        """Return probabilities of the same shape; with softmax, class 0 is the background."""
        return torch.sigmoid(logits) if self.settings.activation == "sigmoid" else torch.softmax(logits, dim=1)

    def _normalised(self, x: Tensor, level: int) -> Tensor:
        return (x - self.mean(level)[:, None, None, None]) / self.scale(level)[:, None, None, None]

    def _context(self, normalised: Sequence[Tensor], boxes: Sequence[Box]) -> Tensor:
        """Return what reaches the finest residual step on the pyramid: each level's projection and all coarser ones."""
        x: Tensor = self.project[-1](normalised[-1])
        for level in reversed(range(len(self.levels) - 1)):
            coarse: Tensor = self.steps[level + 1](x)
            coarse_box = boxes[level + 1].grown(-self._halo(level + 1))
            x = self.project[level](normalised[level]) + upsample_into(coarse, coarse_box, boxes[level])
        return x

    def _classify(self, x: Tensor, classifier: nn.Conv3d) -> Tensor:
        """Return ``V(x + C(ReLU(C(x))))`` of the finest level's step and its classifier ``V``.

        For inference the step's second convolution and the classifier, linear in sequence, are folded into one
        convolution ``V C``, which has as many outputs as there are classes instead of the step's width.
        """
        step = self.steps[0]
        assert isinstance(step, ResidualStep)  # noqa: S101 - narrows the type for the checker
        if self.training:
            logits: Tensor = classifier(step(x))
            return logits
        weight = self._folded_weight(classifier) if self.fold is None else self.fold
        straight: Tensor = classifier(_inner(x, step.halo))
        return straight + F.conv3d(torch.relu(step.first(x)), weight)

    def _folded_weight(self, classifier: nn.Conv3d) -> Tensor:
        """Return ``V C`` of :meth:`_classify`, ``[classes, width, *kernel]``."""
        second = self.get_parameter("steps.0.second.weight")
        return torch.einsum("kc,cixyz->kixyz", classifier.weight[:, :, 0, 0, 0], second)

    def _linear(self, normalised: Sequence[Tensor], boxes: Sequence[Box], core: Box) -> Tensor:
        """Return the sum of every level's own 1x1x1 classifier, interpolated to ``core``."""
        wanted = [core]
        for _ in self.coarse:
            wanted.append(wanted[-1].coarser())
        logits: Tensor = self.direct(_part(normalised[0], boxes[0], core))
        below: Tensor | None = None
        for level in reversed(range(1, len(self.levels))):
            here: Tensor = self.coarse[level - 1](_part(normalised[level], boxes[level], wanted[level]))
            below = here if below is None else here + upsample_into(below, wanted[level + 1], wanted[level])
        return logits if below is None else logits + upsample_into(below, wanted[1], core)

    def _halo(self, level: int) -> int:
        if self.settings.method != "spatial":
            return 0
        step = self.steps[level]
        assert isinstance(step, ResidualStep)  # noqa: S101 - narrows the type for the checker
        return step.halo


def zero_shot(levels: Sequence[FeatureLevel], rows: HeadRows) -> Adapter:
    """Return the encoder's own classifiers as an adapter (see :meth:`Adapter.start_from_head`)."""
    adapter = Adapter(AdapterSettings(method="linear", levels="finest"), levels, len(rows))
    adapter.start_from_head(rows)
    return adapter.eval()


def _part(x: Tensor, box: Box, wanted: Box) -> Tensor:
    """Return the part ``wanted`` of what lies at ``box``."""
    return x[:, :, *(slice(a - low, b - low) for (a, b), (low, _) in zip(wanted.ranges, box.ranges, strict=True))]


def _inner(x: Tensor, halo: int) -> Tensor:
    return x[:, :, halo:-halo, halo:-halo, halo:-halo] if halo else x
