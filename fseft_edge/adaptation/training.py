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
from torch import Tensor

from fseft_edge.adaptation.block_sampling import (
    BlockSampler,
    SupportScan,
    aligned_core,
    draw_centre,
    organ_positions,
    with_variations,
)
from fseft_edge.adaptation.linear_solver import Voxels, gather_voxels, solve
from fseft_edge.adaptation.losses import adaptation_loss
from fseft_edge.adaptation.normalisation import FeatureStatistics
from fseft_edge.adapters.blocks import Box, read_block
from fseft_edge.adapters.network import Adapter, AdapterSettings, HeadRows
from fseft_edge.runtime.encoder.backend_choice import has_bfloat16
from fseft_edge.runtime.system.progress import Progress, SilentProgress

_STATISTICS_BLOCKS = 6
_PAPER_EPOCHS = 200
_TELLING_BLOCKS = 30
_BLOCKS_A_SCAN, _LEAST_BLOCKS, _MOST_BLOCKS = 480, 1200, 7200


@dataclass(frozen=True)
class TrainingSettings:
    """How an adapter is trained. Where the defaults come from: docs/architecture.md, "Constants".

    Attributes:
        seed: of everything random.
        block: edge of a block in voxels, a multiple of the coarsest level's stride.
        batch: blocks a step; half of them are centred on an organ, half anywhere.
        blocks_per_epoch: blocks per scan and epoch, each variation counting as a scan.
        blocks: blocks of the whole training when ``epochs`` is None (at most 200 epochs, as in the paper). None takes
            480 a scan, at least 1200 and at most 7200.
        epochs: at most; a linear adapter has none. None divides ``blocks`` by what an epoch holds.
        bfloat16: compute in bfloat16 (weights and loss stay float32); None does where the device has instructions for
            it.
        device: where the network computes; a linear adapter is solved on the CPU.
        variations: how often each scan is encoded anew, turned, zoomed and restyled; None leaves it to
            :func:`fseft_edge.adaptation.augmentation.default_variations`.
        feature_shift: each block's channels are shifted by noise of this standard deviation (1 is the channel's own).
        channel_dropout: share of the channels of levels 1, 2, ... that a block does without.
        linear_rate: AdamW's peak rate for parameters that the logits are linear in; warm-up over the first epoch, then
            a cosine to zero.
        residual_rate: the same for convolutions of the residual path.
        linear_blocks: blocks per scan that a linear adapter is solved on.
        ridge: strength of a linear adapter's pull towards its start.
        anchor: weight of the squared distance of known organs' classifiers from the encoder's head, where they start.
        patience: end when the loss, smoothed over ``smoothing`` epochs, has gained less than ``least_gain`` in this
            many epochs. Both are longer where an epoch has fewer than 30 blocks, which do not tell how the loss moves.
    """

    seed: int = 0
    block: int = 32
    batch: int = 4
    blocks_per_epoch: int = 6
    blocks: int | None = None
    epochs: int | None = None
    bfloat16: bool | None = None
    device: torch.device = torch.device("cpu")  # noqa: RUF009 - it is immutable
    variations: int | None = None
    feature_shift: float = 0.5
    channel_dropout: float = 0.5
    linear_rate: float = 1e-2
    residual_rate: float = 2e-3
    linear_blocks: int = 24
    ridge: float = 1e-2
    anchor: float = 0.03
    smoothing: int = 10
    patience: int = 20
    least_gain: float = 1e-3

    def epochs_for(self, shots: int, scans: int) -> int:
        """Return the greatest number of epochs for a support set of ``shots`` scans, ``scans`` with variations."""
        if self.epochs is not None:
            return self.epochs
        blocks = self.blocks
        if blocks is None:
            blocks = min(max(_BLOCKS_A_SCAN * shots, _LEAST_BLOCKS), _MOST_BLOCKS)
        return max(1, min(_PAPER_EPOCHS, round(blocks / (self.blocks_per_epoch * scans))))


@dataclass(frozen=True)
class TrainedAdapter:
    """An adapter and how its training went.

    Attributes:
        adapter: the network, in evaluation mode.
        losses: mean loss of every epoch; of a linear adapter, which is solved, the loss of the solution alone.
        steps: optimiser steps; of a linear adapter, evaluations of the loss.
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
    head_rows: HeadRows,
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
    adapter = untrained_adapter(settings, support, head_rows=head_rows, seed=training.seed).to(training.device)
    if settings.method == "linear":
        return _solved(adapter, support, training, progress)
    adapter.train()
    anchor = _Anchor(adapter, head_rows, training.anchor)
    optimizer = _optimizer(adapter, training)
    generator = torch.Generator().manual_seed(training.seed)
    scans = with_variations(support)
    steps = max(1, math.ceil(training.blocks_per_epoch * len(scans) / training.batch))
    bfloat16 = has_bfloat16(training.device) if training.bfloat16 is None else training.bfloat16
    epochs = training.epochs_for(len(support), len(scans))
    random = np.random.default_rng(training.seed)
    sampler = BlockSampler(adapter, scans, block=training.block, batch=training.batch, random=random)
    losses: list[float] = []
    repeatable = torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=True)
    with progress.task("adapt", epochs) as task, ThreadPoolExecutor(1) as reader, repeatable:
        upcoming = reader.submit(sampler.draw)
        for epoch in range(epochs):
            total = 0.0
            for step in range(steps):
                batch = upcoming.result()
                upcoming = reader.submit(sampler.draw)
                share = (epoch * steps + step + 1) / (epochs * steps)
                for group in optimizer.param_groups:
                    group["lr"] = group["peak"] * rate_share(share, 1 / epochs)
                with torch.autocast(training.device.type, torch.bfloat16, enabled=bfloat16):
                    logits = adapter(perturbed(batch.features, adapter, training, generator), sampler.core)
                loss = adaptation_loss(logits.float(), batch.targets, batch.annotated, settings.activation)
                optimizer.zero_grad()
                (loss + anchor.penalty()).backward()
                optimizer.step()
                total += float(loss.detach())
            losses.append(total / steps)
            task.advance(1)
            if _has_settled(losses, training, steps * training.batch):
                break
        upcoming.cancel()
    return TrainedAdapter(adapter.eval(), tuple(losses), len(losses) * steps, bfloat16)


def _solved(
    adapter: Adapter,
    support: Sequence[SupportScan],
    training: TrainingSettings,
    progress: Progress,
) -> TrainedAdapter:
    solution = solve(
        support_voxels(
            adapter,
            support,
            training,
            blocks=training.linear_blocks * len(support),
            task="adapt",
            progress=progress,
        ),
        adapter.linear_weight(),
        adapter.linear_bias(),
        ridge=training.ridge,
        activation=adapter.settings.activation,
    )
    adapter.set_linear(solution.weight, solution.bias)
    return TrainedAdapter(adapter.eval(), (solution.loss,), solution.evaluations, bfloat16=False)


def support_voxels(
    adapter: Adapter,
    support: Sequence[SupportScan],
    training: TrainingSettings,
    *,
    blocks: int,
    task: str,
    progress: Progress,
) -> Voxels:
    """Return voxels of a support set, as an adapter's classifiers see them, from blocks drawn as in training.

    Args:
        adapter: sees them.
        support: the scans.
        training: how blocks are drawn.
        blocks: how many.
        task: what the progress is called.
        progress: where to show it.
    """
    random = np.random.default_rng(training.seed)
    generator = torch.Generator().manual_seed(training.seed)
    sampler = BlockSampler(adapter, with_variations(support), block=training.block, batch=training.batch, random=random)
    parts: list[Voxels] = []
    batches = math.ceil(blocks / training.batch)
    with progress.task(task, batches) as stage, torch.no_grad():
        for _ in range(batches):
            batch = sampler.draw()
            for number in range(training.batch):
                block = [level[number : number + 1] for level in batch.features]
                parts.append(gather_voxels(adapter, block, batch.targets[number], batch.annotated[number], generator))
            stage.advance(1)
    return Voxels.joined(parts)


def untrained_adapter(
    settings: AdapterSettings,
    support: Sequence[SupportScan],
    *,
    head_rows: HeadRows,
    seed: int = 0,
) -> Adapter:
    """Return the adapter that training starts from: normalised to the support's features, started from the head."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        adapter = Adapter(settings, support[0].features.levels, len(head_rows))
        _fit_normalisation(adapter, with_variations(support), np.random.default_rng(seed))
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
        noise = torch.randn(*x.shape[:2], generator=generator).to(x.device)
        shift = training.feature_shift * scale * noise
        changed = x + shift[..., None, None, None]
        if level and training.channel_dropout:
            kept = torch.rand(*x.shape[:2], generator=generator).to(x.device) >= training.channel_dropout
            gain = (kept / (1 - training.channel_dropout))[..., None, None, None]
            centre = mean[:, None, None, None]
            changed = centre + (changed - centre) * gain
        perturbed.append(changed)
    return perturbed


class _Anchor:
    """Ties the classifiers of organs that the encoder knows to where they start (L2-SP; Li et al., ICML 2018).

    A few scans say little that the many scans of pre-training did not; what they do say is worth its distance.
    """

    def __init__(self, adapter: Adapter, head_rows: HeadRows, weight: float) -> None:
        self._rows = [adapter.backgrounds + k for k, row in enumerate(head_rows) if row is not None]
        self._weight = weight
        self._pairs = [(weights, weights.detach().clone()) for weights in adapter.classifiers()]

    def penalty(self) -> Tensor:
        """Return the weighted squared distance, 0 where no organ is known."""
        return self._weight * sum(
            ((weights - start)[self._rows].square().sum() for weights, start in self._pairs), torch.zeros(())
        )


def _optimizer(adapter: Adapter, training: TrainingSettings) -> torch.optim.AdamW:
    linear = adapter.linear_parameters()
    chosen = {id(parameter) for parameter in linear}
    residual = [parameter for parameter in adapter.parameters() if id(parameter) not in chosen]
    groups = [(linear, training.linear_rate), (residual, training.residual_rate)]
    return torch.optim.AdamW(
        [{"params": parameters, "peak": rate} for parameters, rate in groups if parameters], weight_decay=0.0
    )


def rate_share(share: float, warmup: float) -> float:
    """Return what share of its peak a rate has after a share of the training: linear warm-up, then a cosine to zero."""
    if share <= warmup:
        return share / warmup
    return 0.5 * (1 + math.cos(math.pi * (share - warmup) / (1 - warmup)))


def _has_settled(losses: Sequence[float], training: TrainingSettings, blocks_an_epoch: int) -> bool:
    stretch = math.ceil(_TELLING_BLOCKS / blocks_an_epoch)
    span, patience = stretch * training.smoothing, stretch * training.patience
    if len(losses) < span + patience:
        return False
    recent = sum(losses[-span:]) / span
    before = sum(losses[-span - patience : -patience]) / span
    return before - recent < training.least_gain


def _fit_normalisation(adapter: Adapter, support: Sequence[SupportScan], random: np.random.Generator) -> None:
    """Set each channel's mean and standard deviation from blocks around organs and elsewhere in every scan."""
    statistics = FeatureStatistics(adapter)
    for scan in support:
        positions = organ_positions(scan, random)
        for number in range(_STATISTICS_BLOCKS):
            centre = draw_centre(positions, random, positive=number % 2 == 0)
            core = aligned_core(centre, 32, adapter)
            boxes = [core]
            for _ in adapter.levels[1:]:
                boxes.append(Box(*((low // 2, high // 2) for low, high in boxes[-1].ranges)))
            for level, block in enumerate(read_block(scan.features, boxes)):
                statistics.add(level, block[0].flatten(1))
    statistics.apply()
