"""Training an adapter on blocks of the support set's cached features (FSEFT).

Blocks of 32x32x32 voxels with the adapter's own receptive field around them stand for whole windows; the map is
seamless, so a block sees exactly what it would see inside the whole scan.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fseft_edge.adapters import Adapter, AdapterSettings
from fseft_edge.blocks import Box, read_block, stack_blocks
from fseft_edge.losses import adaptation_loss
from fseft_edge.report.progress import Progress, SilentProgress
from fseft_edge.runtime.feature_map import FeatureMap

_STATISTICS_BLOCKS = 6
_POSITIONS = 4000
_PAPER_EPOCHS = 200


@dataclass(frozen=True)
class SupportScan:
    """One annotated scan on the grid.

    Attributes:
        features: its cached feature map.
        shape: grid voxels that belong to the scan, ``[X, Y, Z]``; the map may be padded beyond them.
        occupancy: uint8 ``[K, X, Y, Z]``; share of each voxel that the organ fills, 255 is all of it.
        annotated: bool ``[K]``; False where nobody contoured the organ in this scan, which then says nothing on it.
        volumes_mm3: volume of each organ on the source lattice, 0 where not annotated.
    """

    features: FeatureMap
    shape: tuple[int, int, int]
    occupancy: NDArray[np.uint8]
    annotated: NDArray[np.bool_]
    volumes_mm3: tuple[float, ...]


@dataclass(frozen=True)
class TrainingSettings:
    """How an adapter is trained. Where the defaults come from: docs/architecture.md, "Constants".

    Attributes:
        seed: of everything random.
        block: edge of a block in voxels, a multiple of the coarsest level's stride.
        batch: blocks a step; half of them are centred on an organ, half anywhere.
        blocks_per_epoch: blocks per scan and epoch.
        blocks: blocks of the whole training when ``epochs`` is None (at most 200 epochs, the paper's number).
        epochs: at most; None divides ``blocks`` by what an epoch holds.
        bfloat16: compute in bfloat16 (weights and loss stay float32); None does where the CPU has instructions for it.
        feature_shift: each block's channels are shifted by noise of this standard deviation (1 is the channel's own).
        channel_dropout: share of the channels of levels 1, 2, ... that a block does without.
        linear_rate: AdamW's peak rate for parameters that the logits are linear in; warm-up over the first epoch, then
            a cosine to zero.
        residual_rate: the same for convolutions of the residual path.
        patience: end when the loss, smoothed over ``smoothing`` epochs, has gained less than ``least_gain`` in this
            many epochs.
    """

    seed: int = 0
    block: int = 32
    batch: int = 4
    blocks_per_epoch: int = 6
    blocks: int = 1200
    epochs: int | None = None
    bfloat16: bool | None = None
    feature_shift: float = 0.5
    channel_dropout: float = 0.5
    linear_rate: float = 1e-2
    residual_rate: float = 2e-3
    smoothing: int = 10
    patience: int = 20
    least_gain: float = 1e-3

    def epochs_for(self, shots: int) -> int:
        """Return the greatest number of epochs for a support set of ``shots`` scans."""
        if self.epochs is not None:
            return self.epochs
        return max(1, min(_PAPER_EPOCHS, round(self.blocks / (self.blocks_per_epoch * shots))))


@dataclass(frozen=True)
class TrainedAdapter:
    """An adapter and how its training went.

    Attributes:
        adapter: the network, in evaluation mode.
        losses: mean loss of every epoch.
        steps: optimiser steps.
        bfloat16: whether the network computed in bfloat16.
    """

    adapter: Adapter
    losses: tuple[float, ...]
    steps: int
    bfloat16: bool


def train_adapter(
    settings: AdapterSettings,
    support: Sequence[SupportScan],
    *,
    head_rows: Sequence[tuple[Tensor, float] | None],
    training: TrainingSettings | None = None,
    progress: Progress | None = None,
) -> TrainedAdapter:
    """Train an adapter on a support set.

    Args:
        settings: the kind of adapter.
        support: ``k`` annotated scans, each organ annotated in at least one.
        head_rows: for each organ the encoder's own classifier, or None (see :meth:`Adapter.start_from_head`).
        training: schedule and seed.
        progress: where to show progress.
    """
    training = training or TrainingSettings()
    progress = progress or SilentProgress()
    random = np.random.default_rng(training.seed)
    adapter = untrained_adapter(settings, support, head_rows=head_rows, seed=training.seed)
    adapter.train()
    optimizer = _optimizer(adapter, training)
    generator = torch.Generator().manual_seed(training.seed)
    steps = max(1, math.ceil(training.blocks_per_epoch * len(support) / training.batch))
    bfloat16 = _cpu_has_bfloat16() if training.bfloat16 is None else training.bfloat16
    epochs = training.epochs_for(len(support))
    sampler = _BlockSampler(adapter, support, training, random)
    losses: list[float] = []
    with progress.task("adapt", epochs) as task, ThreadPoolExecutor(1) as reader:
        upcoming = reader.submit(sampler.draw)
        for epoch in range(epochs):
            total = 0.0
            for step in range(steps):
                batch = upcoming.result()
                upcoming = reader.submit(sampler.draw)
                share = (epoch * steps + step + 1) / (epochs * steps)
                for group in optimizer.param_groups:
                    group["lr"] = group["peak"] * _schedule(share, 1 / epochs)
                with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
                    logits = adapter(perturbed(batch.features, adapter, training, generator), sampler.core)
                loss = adaptation_loss(logits.float(), batch.targets, batch.annotated, settings.activation)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                total += float(loss.detach())
            losses.append(total / steps)
            task.advance(1)
            if _has_settled(losses, training):
                break
        upcoming.cancel()
    return TrainedAdapter(adapter.eval(), tuple(losses), len(losses) * steps, bfloat16)


def untrained_adapter(
    settings: AdapterSettings,
    support: Sequence[SupportScan],
    *,
    head_rows: Sequence[tuple[Tensor, float] | None],
    seed: int = 0,
) -> Adapter:
    """Return the adapter that training starts from: normalised to the support's features, started from the head."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        adapter = Adapter(settings, support[0].features.levels, len(head_rows))
    _fit_normalisation(adapter, support, np.random.default_rng(seed))
    adapter.start_from_head(head_rows)
    return adapter


def perturbed(
    features: Sequence[Tensor], adapter: Adapter, training: TrainingSettings, generator: torch.Generator
) -> list[Tensor]:
    """Return features as another scan might have shown them, so that the adapter leans on no single channel.

    A handful of scans cannot tell what a channel says about the organ from what it says about the scan: deep channels
    are offset from one scan to the next. Each block's channels are shifted as a whole, and coarse ones dropped.
    """
    perturbed = []
    for level, x in enumerate(features):
        mean, scale = adapter.mean(level), adapter.scale(level)
        shift = training.feature_shift * scale * torch.randn(*x.shape[:2], generator=generator)
        changed = x + shift[..., None, None, None]
        if level and training.channel_dropout:
            kept = torch.rand(*x.shape[:2], generator=generator) >= training.channel_dropout
            gain = (kept / (1 - training.channel_dropout))[..., None, None, None]
            centre = mean[:, None, None, None]
            changed = centre + (changed - centre) * gain
        perturbed.append(changed)
    return perturbed


def _optimizer(adapter: Adapter, training: TrainingSettings) -> torch.optim.AdamW:
    linear = adapter.linear_parameters()
    chosen = {id(parameter) for parameter in linear}
    residual = [parameter for parameter in adapter.parameters() if id(parameter) not in chosen]
    groups = [(linear, training.linear_rate), (residual, training.residual_rate)]
    return torch.optim.AdamW(
        [{"params": parameters, "peak": rate} for parameters, rate in groups if parameters], weight_decay=0.0
    )


def _cpu_has_bfloat16() -> bool:
    """Return whether the CPU multiplies bfloat16 itself; where it does not, PyTorch emulates it slowly."""
    capabilities: dict[str, object] = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(capabilities.get("avx512_bf16", False))


def _schedule(share: float, warmup: float) -> float:
    if share <= warmup:
        return share / warmup
    return 0.5 * (1 + math.cos(math.pi * (share - warmup) / (1 - warmup)))


def _has_settled(losses: Sequence[float], training: TrainingSettings) -> bool:
    span, patience = training.smoothing, training.patience
    if len(losses) < span + patience:
        return False
    recent = sum(losses[-span:]) / span
    before = sum(losses[-span - patience : -patience]) / span
    return before - recent < training.least_gain


def _fit_normalisation(adapter: Adapter, support: Sequence[SupportScan], random: np.random.Generator) -> None:
    """Set each channel's mean and standard deviation from blocks around organs and elsewhere in every scan."""
    sums = [torch.zeros(2, level.channels, dtype=torch.float64) for level in adapter.levels]
    counts = [0] * len(adapter.levels)
    for scan in support:
        positions = _positions(scan, random)
        for number in range(_STATISTICS_BLOCKS):
            centre = _draw_centre(positions, random, positive=number % 2 == 0)
            core = _aligned_core(centre, 32, adapter)
            boxes = [core]
            for _ in adapter.levels[1:]:
                boxes.append(Box(*((low // 2, high // 2) for low, high in boxes[-1].ranges)))
            for level, block in enumerate(read_block(scan.features, boxes)):
                values = block[0].flatten(1).double()
                sums[level][0] += values.sum(1)
                sums[level][1] += values.square().sum(1)
                counts[level] += values.shape[1]
    for level, (total, squares) in enumerate(sums):
        mean = total / counts[level]
        deviation = (squares / counts[level] - mean.square()).clamp_min(0).sqrt()
        adapter.mean(level).copy_(mean)
        adapter.scale(level).copy_(deviation.clamp_min(1e-3 * float(deviation.max().clamp_min(1e-6))))


@dataclass(frozen=True)
class _Batch:
    features: list[Tensor]
    targets: Tensor
    annotated: Tensor


@dataclass(frozen=True)
class _Positions:
    """Grid positions ``[m, 3]`` of each annotated organ present, and the scan's shape to draw anywhere from."""

    organs: tuple[NDArray[np.int64], ...]
    shape: tuple[int, int, int]


class _BlockSampler:
    def __init__(
        self, adapter: Adapter, support: Sequence[SupportScan], training: TrainingSettings, random: np.random.Generator
    ) -> None:
        self._adapter, self._support, self._training, self._random = adapter, support, training, random
        self._positions = [_positions(scan, random) for scan in support]
        self._order: list[int] = []
        self._drawn = 0
        edge = training.block
        self.core = Box((0, edge), (0, edge), (0, edge))

    def draw(self) -> _Batch:
        """Return the next batch; scans take turns, positive and negative blocks alternate."""
        blocks, targets, annotated = [], [], []
        for _ in range(self._training.batch):
            if not self._order:
                self._order = list(self._random.permutation(len(self._support)))
            index = self._order.pop()
            scan = self._support[index]
            centre = _draw_centre(self._positions[index], self._random, positive=self._drawn % 2 == 0)
            self._drawn += 1
            core = _aligned_core(centre, self._training.block, self._adapter)
            blocks.append(read_block(scan.features, self._adapter.boxes(core)))
            targets.append(_target(scan.occupancy, core))
            annotated.append(torch.from_numpy(scan.annotated).float())
        return _Batch(stack_blocks(blocks), torch.stack(targets), torch.stack(annotated))


def _positions(scan: SupportScan, random: np.random.Generator) -> _Positions:
    organs = []
    for organ in scan.occupancy:
        flat = np.flatnonzero(organ > 127)
        if len(flat) == 0:
            continue
        if len(flat) > _POSITIONS:
            flat = random.choice(flat, _POSITIONS, replace=False)
        organs.append(np.stack(np.unravel_index(flat, organ.shape), axis=1))
    return _Positions(tuple(organs), scan.shape)


def _draw_centre(positions: _Positions, random: np.random.Generator, *, positive: bool) -> NDArray[np.int64]:
    if positive and positions.organs:
        organ = positions.organs[random.integers(len(positions.organs))]
        centre: NDArray[np.int64] = organ[random.integers(len(organ))] + random.integers(-8, 9, 3)
        return centre
    return random.integers(0, positions.shape)


def _aligned_core(centre: NDArray[np.int64], edge: int, adapter: Adapter) -> Box:
    """Return a block around ``centre`` that starts on the coarsest level's lattice, as blocks of one batch must."""
    stride = adapter.levels[-1].stride
    starts = [int(c - edge // 2 + stride // 2) // stride * stride for c in centre]
    return Box(*((start, start + edge) for start in starts))


def _target(occupancy: NDArray[np.uint8], core: Box) -> Tensor:
    inside = [
        (max(low, 0), min(high, size)) for (low, high), size in zip(core.ranges, occupancy.shape[1:], strict=True)
    ]
    target = torch.zeros(len(occupancy), *core.shape)
    if all(low < high for low, high in inside):
        part = torch.from_numpy(occupancy[:, *(slice(low, high) for low, high in inside)].astype(np.float32) / 255)
        where = (slice(low - start, high - start) for (low, high), (start, _) in zip(inside, core.ranges, strict=True))
        target[:, *where] = part
    return target
