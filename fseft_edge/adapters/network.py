"""Adapters: small networks that a hospital trains on frozen features (FSEFT, section on spatial adapters).

=========== ======================================= ==============================================================
method      levels ``finest``                       levels ``all``
=========== ======================================= ==============================================================
linear      1x1x1 classifier (linear probe)         one 1x1x1 classifier per level, upsampled and summed
pointwise   ``x + C1(ReLU(C1(x)))``, classifier     the linear sum, plus a residual path: each level is projected to
                                                    ``width`` channels, then a step ``x + C1(ReLU(C1(x)))`` at every
                                                    level from coarse to fine, then a classifier
spatial     ``x + C3(ReLU(C3(x)))``, classifier     the linear sum, plus the residual path with steps
                                                    ``x + C3(ReLU(C3(x)))``, on coarse levels with ``C1``
=========== ======================================= ==============================================================

``C1`` and ``C3`` are convolutions with kernels of 1 and 3 voxels. The second convolution of a residual step starts at
zero. If the head of the encoder knows an organ, the classifier of that organ starts as the row of the head. An
untrained adapter is therefore the zero-shot segmenter.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fseft_edge.adapters.blocks import Box, pad_to_boxes, upsample_into
from fseft_edge.runtime.encoder.networks.base import FeatureLevel

Method = Literal["linear", "pointwise", "spatial"]
Levels = Literal["finest", "all"]
Activation = Literal["sigmoid", "softmax"]

HeadRows = Sequence[tuple[Tensor, float] | None]
"""For each organ, weight ``[C_0]`` and bias of its classifier in the head of the encoder; None for a novel organ."""

UNKNOWN_ORGAN_BIAS = -3.0
"""Start value of the bias of a sigmoid classifier of a novel organ. It gives a low probability everywhere."""


@dataclass(frozen=True)
class AdapterSettings:
    """The kind of an adapter.

    Attributes:
        method: ``linear``, ``pointwise`` or ``spatial``.
        levels: levels of the feature pyramid that the adapter uses: ``finest`` (only level 0, as in the paper) or
            ``all``.
        activation: ``sigmoid`` for each organ, or ``softmax`` over the background and all organs.
        width: number of channels that each level is projected to; only for ``pointwise`` and ``spatial`` with levels
            ``all``.
        wide_levels: number of levels, finest first, on which the steps of the residual path of ``spatial`` have kernels
            of 3 voxels; None means all levels. Voxels of coarse levels are large and have seen much context already:
            kernels of 3 voxels at strides 8 and 16 make an adapter need 80 voxels around a block instead of 32, and
            do not raise its scores.
    """

    method: Method = "spatial"
    levels: Levels = "all"
    activation: Activation = "sigmoid"
    width: int = 16
    wide_levels: int | None = 3

    @property
    def name(self) -> str:
        """The settings as text for the user, for example ``spatial on all levels``."""
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
        """Number of context voxels that the step needs on every side."""
        return 2 * (self.first.kernel_size[0] // 2)

    def forward(self, x: Tensor) -> Tensor:
        """Return the result for the inner voxels: ``[n, C, X - 2 h, ...]`` for a halo of ``h`` voxels."""
        residual: Tensor = self.second(torch.relu(self.first(x)))
        return residual + _without_halo(x, self.halo)


class Adapter(nn.Module):
    """A trainable network on a frozen feature pyramid.

    Args:
        settings: kind of adapter.
        levels: levels of the feature pyramid of the encoder.
        organs: number of organs ``K``; with softmax, class 0 is the background and there are ``K + 1`` classes.
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
            wide = len(self.levels) if settings.wide_levels is None else settings.wide_levels
            self.steps = nn.ModuleList(
                ResidualStep(settings.width, kernel if level < wide else 1) for level in range(len(self.levels))
            )
            self.classifier = nn.Conv3d(settings.width, self.classes, 1, bias=False)

    def start_from_head(self, rows: HeadRows) -> None:
        """Initialise the classifiers of the organs that the encoder knows with the rows of its head.

        Args:
            rows: for each organ, its classifier in the head, or None.
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
                    for extra in self._further_classifiers():
                        extra.weight[k] = 0.0

    def _zero(self, row: int) -> None:
        """Set a classifier to zero; the ridge of the linear solver pulls the weights towards these start values."""
        for weight in self.classifiers():
            weight[row] = 0.0

    def classifiers(self) -> list[Tensor]:
        """Return the weights ``[classes, C, 1, 1, 1]`` of all classifiers; the weight of ``direct`` is the first."""
        return [layer.weight for layer in (self.direct, *self._further_classifiers())]

    def _further_classifiers(self) -> list[nn.Conv3d]:
        """Return all classifiers except ``direct``: one per coarser level, then the classifier of the residual path."""
        linear = [module for module in self.coarse if isinstance(module, nn.Conv3d)]
        has_residual_path = self.settings.method != "linear" and self.settings.levels == "all"
        return [*linear, self.classifier] if has_residual_path else linear

    def linear_parameters(self) -> list[nn.Parameter]:
        """Return the parameters outside the residual path. The logits are linear in them, so a higher rate is safe."""
        if self.settings.levels == "finest":
            return []
        return [*self.direct.parameters(), *self.coarse.parameters()]

    @property
    def device(self) -> torch.device:
        """Device of the adapter."""
        return self.direct.weight.device

    def linear_weight(self) -> Tensor:
        """Return the weights ``[classes, D]`` of all classifiers, on the CPU, in the order of :meth:`penultimate`."""
        return torch.cat([weight.detach().flatten(1) for weight in self.classifiers()], dim=1).cpu()

    def linear_bias(self) -> Tensor:
        """Return the bias ``[classes]`` of the classifiers, on the CPU."""
        return self._bias().cpu()

    def _bias(self) -> Tensor:
        bias = self.direct.bias
        assert bias is not None  # noqa: S101 - narrows the type for the checker
        return bias.detach()

    @torch.no_grad()
    def set_linear(self, weight: Tensor, bias: Tensor) -> None:
        """Set the weights ``[classes, D]`` and the bias ``[classes]`` of all classifiers."""
        classifiers = self.classifiers()
        for old, new in zip(classifiers, weight.split([old.shape[1] for old in classifiers], dim=1), strict=True):
            old.copy_(new[..., None, None, None])
        self._bias().copy_(bias)

    def mean(self, level: int) -> Tensor:
        """Return the mean of each channel of a level over the support set, ``[C_l]``."""
        return self.get_buffer(f"mean_{level}")

    def scale(self, level: int) -> Tensor:
        """Return the standard deviation of each channel of a level over the support set, ``[C_l]``."""
        return self.get_buffer(f"scale_{level}")

    def boxes(self, core: Box) -> list[Box]:
        """Return the box of each level that :meth:`forward` needs to compute ``core`` (in voxels of level 0)."""
        boxes = [core.grown(self._halo(0))]
        for level in range(1, len(self.levels)):
            boxes.append(boxes[-1].coarser().grown(self._halo(level)))
        return boxes

    def forward(self, features: Sequence[Tensor], core: Box) -> Tensor:
        """Return logits ``[n, classes, *core.shape]``.

        Args:
            features: features of each level in the boxes ``boxes(core)``, ``[n, C_l, ...]``.
            core: box of the voxels to compute. All blocks of a batch have one alignment, so that the box of any block
                of the batch gives the correct result.
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
        """Return logits ``[n, classes, X, Y, Z]`` of complete feature maps in memory.

        Args:
            levels: one tensor ``[n, C_l, X / s_l, Y / s_l, Z / s_l]`` per level, finest level first.
        """
        core = Box(*((0, size) for size in levels[0].shape[2:]))
        logits: Tensor = self(pad_to_boxes(levels, self.boxes(core)), core)
        return logits

    def log_odds(self, levels: Sequence[Tensor]) -> Tensor:
        """Return the log odds ``[n, K, X, Y, Z]`` of each organ for complete feature maps in memory.

        Args:
            levels: one tensor ``[n, C_l, X / s_l, Y / s_l, Z / s_l]`` per level, finest level first.
        """
        return torch.logit(self.probabilities(self.of_maps(levels))[:, self.backgrounds :])

    def penultimate(self, features: Sequence[Tensor], core: Box) -> Tensor:
        """Return the input ``p`` of the classifiers, ``[n, D, *core.shape]``. The logits are ``W p + b``.

        :meth:`linear_weight` returns ``W`` and :meth:`linear_bias` returns ``b``. For a linear adapter, ``p`` contains
        the normalised features of every level, interpolated to level 0. With levels ``all`` and a residual path, the
        output of the residual path follows them.

        Args:
            features: features of each level in the boxes ``boxes(core)``, ``[n, C_l, ...]``.
            core: box of the voxels to compute, in voxels of level 0.
        """
        normalised = [self._normalised(x, level) for level, x in enumerate(features)]
        boxes = self.boxes(core)
        if self.settings.method != "linear" and self.settings.levels == "finest":
            output_of_step: Tensor = self.steps[0](normalised[0])
            return output_of_step
        wanted = [core]
        for _ in self.coarse:
            wanted.append(wanted[-1].coarser())
        below: Tensor | None = None
        for level in reversed(range(len(self.levels))):
            here = _crop(normalised[level], boxes[level], wanted[level])
            if below is not None:
                here = torch.cat([here, upsample_into(below, wanted[level + 1], wanted[level])], dim=1)
            below = here
        assert below is not None  # noqa: S101 - narrows the type for the checker
        if self.settings.method == "linear":
            return below
        return torch.cat([below, self.steps[0](self._context(normalised, boxes))], dim=1)

    def folded(self) -> Adapter:
        """Return a copy for inference only, in which the folded convolution of :meth:`_classify` is precomputed."""
        adapter = copy.deepcopy(self).eval()
        if self.settings.method != "linear":
            classifier = adapter.direct if self.settings.levels == "finest" else adapter.classifier
            adapter.fold = adapter._folded_weight(classifier).detach()
        return adapter

    def probabilities(self, logits: Tensor) -> Tensor:
        """Return the probabilities of logits, in the shape of the logits; with softmax, class 0 is the background."""
        return torch.sigmoid(logits) if self.settings.activation == "sigmoid" else torch.softmax(logits, dim=1)

    def _normalised(self, x: Tensor, level: int) -> Tensor:
        return (x - self.mean(level)[:, None, None, None]) / self.scale(level)[:, None, None, None]

    def _context(self, normalised: Sequence[Tensor], boxes: Sequence[Box]) -> Tensor:
        """Return the input of the residual step at the finest level, for adapters with levels ``all``.

        The input is the projection of the finest level plus the upsampled output of the residual steps of all coarser
        levels.
        """
        x: Tensor = self.project[-1](normalised[-1])
        for level in reversed(range(len(self.levels) - 1)):
            coarse: Tensor = self.steps[level + 1](x)
            coarse_box = boxes[level + 1].grown(-self._halo(level + 1))
            x = self.project[level](normalised[level]) + upsample_into(coarse, coarse_box, boxes[level])
        return x

    def _classify(self, x: Tensor, classifier: nn.Conv3d) -> Tensor:
        """Return ``V(x + C(ReLU(C(x))))``, the residual step of the finest level followed by the classifier ``V``.

        The second convolution of the step and the classifier are folded into one convolution ``V C``, because both are
        linear. The folded convolution has one output per class, fewer than the channels of the step.
        """
        step = self.steps[0]
        assert isinstance(step, ResidualStep)  # noqa: S101 - narrows the type for the checker
        weight = self._folded_weight(classifier) if self.fold is None else self.fold
        identity_path: Tensor = classifier(_without_halo(x, step.halo))
        # With its channels last, a block of few channels is convolved in half the time on a CPU.
        hidden = torch.relu(step.first(x.contiguous(memory_format=torch.channels_last_3d)))
        return identity_path + F.conv3d(hidden, weight)

    def _folded_weight(self, classifier: nn.Conv3d) -> Tensor:
        """Return the folded weight ``V C`` of :meth:`_classify`, ``[classes, width, *kernel]``."""
        second = self.get_parameter("steps.0.second.weight")
        return torch.einsum("kc,cixyz->kixyz", classifier.weight[:, :, 0, 0, 0], second)

    def _linear(self, normalised: Sequence[Tensor], boxes: Sequence[Box], core: Box) -> Tensor:
        """Return the sum of the 1x1x1 classifiers of all levels, interpolated to ``core``."""
        wanted = [core]
        for _ in self.coarse:
            wanted.append(wanted[-1].coarser())
        logits: Tensor = self.direct(_crop(normalised[0], boxes[0], core))
        below: Tensor | None = None
        for level in reversed(range(1, len(self.levels))):
            here: Tensor = self.coarse[level - 1](_crop(normalised[level], boxes[level], wanted[level]))
            below = here if below is None else here + upsample_into(below, wanted[level + 1], wanted[level])
        return logits if below is None else logits + upsample_into(below, wanted[1], core)

    def _halo(self, level: int) -> int:
        if self.settings.method != "spatial":
            return 0
        step = self.steps[level]
        assert isinstance(step, ResidualStep)  # noqa: S101 - narrows the type for the checker
        return step.halo


def zero_shot(levels: Sequence[FeatureLevel], rows: HeadRows) -> Adapter:
    """Return the classifiers of the encoder's head as an adapter (see :meth:`Adapter.start_from_head`)."""
    adapter = Adapter(AdapterSettings(method="linear", levels="finest"), levels, len(rows))
    adapter.start_from_head(rows)
    return adapter.eval()


def _crop(x: Tensor, box: Box, wanted: Box) -> Tensor:
    """Return the voxels of ``wanted`` from a tensor whose voxels are those of ``box``."""
    return x[:, :, *(slice(a - low, b - low) for (a, b), (low, _) in zip(wanted.ranges, box.ranges, strict=True))]


def _without_halo(x: Tensor, halo: int) -> Tensor:
    return x[:, :, halo:-halo, halo:-halo, halo:-halo] if halo else x
