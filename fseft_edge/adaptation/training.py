"""Training of an adapter on blocks of the cached features of the support set (FSEFT).

The training uses blocks of 32x32x32 voxels plus the receptive field of the adapter, where the paper uses complete
windows. The feature map covers the complete scan, so the adapter computes the same values for a block as for the scan.
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
from fseft_edge.adaptation.calibration import calibrate
from fseft_edge.adaptation.kept_features import kept_in_memory
from fseft_edge.adaptation.linear_solver import Voxels, gather_voxels, solve
from fseft_edge.adaptation.losses import adaptation_loss
from fseft_edge.adaptation.normalisation import FeatureStatistics
from fseft_edge.adapters.blocks import Box, read_block
from fseft_edge.adapters.network import Adapter, AdapterSettings, HeadRows
from fseft_edge.adapters.training_pass import ChannelChange, training_logits
from fseft_edge.runtime.encoder.backend_choice import has_bfloat16
from fseft_edge.runtime.errors import UsageError
from fseft_edge.runtime.system.gpu_arithmetic import exact_float32
from fseft_edge.runtime.system.progress import Progress, SilentProgress

_STATISTICS_BLOCKS = 6
_PAPER_EPOCHS = 200
_MIN_BLOCKS_TO_JUDGE_LOSS = 30
_BLOCKS_PER_SCAN, _MIN_BLOCKS, _MAX_BLOCKS = 480, 1200, 7200


@dataclass(frozen=True)
class TrainingSettings:
    """The settings of adapter training. docs/architecture.md, "Constants", explains the default values.

    Attributes:
        seed: seed for all random choices.
        block: edge length of a block in voxels; a multiple of the stride of the coarsest level.
        batch: number of blocks per training step; half of them are centred near an organ, half at any position.
        blocks_per_epoch: number of blocks per scan and epoch; each variation counts as a scan.
        blocks: number of blocks of the training if ``epochs`` is None; the limit of 200 epochs (as in the paper)
            applies. None means 480 per scan, but at least 1200 and at most 7200.
        epochs: maximum number of epochs; no effect on a linear adapter. None means ``blocks`` divided by the number of
            blocks per epoch.
        bfloat16: compute the 3x3x3 convolutions in bfloat16, all else in float32; None uses bfloat16 if the device has
            instructions for it.
        device: device of the network; a linear adapter is always solved on the CPU.
        variations: number of variations of each scan (rotated, scaled, restyled) to encode; None means the number of
            :func:`fseft_edge.adaptation.augmentation.default_variations`.
        feature_shift: standard deviation of the random shift of each channel of a block, in units of the standard
            deviation of the channel.
        channel_dropout: share of the channels of the levels 1, 2, ... that are dropped in a block.
        calibration: share of the move of each threshold, after the training, that gives the masks of the support scans
            their volumes (:mod:`fseft_edge.adaptation.calibration`); 0 moves none. No effect on a linear adapter, which
            is not trained with perturbed features, and with softmax.
        linear_rate: peak learning rate of AdamW for the parameters in which the logits are linear. The rate increases
            linearly during the first epoch, then decreases as a cosine to zero.
        residual_rate: peak learning rate of AdamW for the convolutions of the residual path, with the schedule of
            ``linear_rate``.
        linear_blocks: number of blocks per scan on which a linear adapter is solved.
        ridge: strength of the ridge that pulls a linear adapter towards its start values.
        anchor: weight of the squared distance between the classifiers of known organs and the head of the encoder.
        smoothing: number of epochs over which the loss is averaged for early stopping.
        patience: number of epochs after which training stops early if the averaged loss has decreased by less than
            ``least_gain``. If an epoch has fewer than 30 blocks, its loss is too noisy, and ``smoothing`` and
            ``patience`` are extended.
        least_gain: smallest decrease of the averaged loss that continues the training.

    Raises:
        UsageError: a number of blocks, epochs or variations is not a whole number in its range, or ``calibration`` is
            not from 0 to 1.
    """

    seed: int = 0
    block: int = 32
    batch: int = 4
    blocks_per_epoch: int = 6
    blocks: int | None = None
    epochs: int | None = None
    bfloat16: bool | None = None
    device: torch.device = torch.device("cpu")  # noqa: RUF009 - a torch.device is immutable
    variations: int | None = None
    feature_shift: float = 0.5
    channel_dropout: float = 0.5
    calibration: float = 0.5
    linear_rate: float = 1e-2
    residual_rate: float = 2e-3
    linear_blocks: int = 24
    ridge: float = 1e-2
    anchor: float = 0.03
    smoothing: int = 10
    patience: int = 20
    least_gain: float = 1e-3

    def __post_init__(self) -> None:
        least = {
            "block": 1,
            "batch": 1,
            "blocks_per_epoch": 1,
            "blocks": 1,
            "epochs": 1,
            "variations": 0,
            "linear_blocks": 1,
        }
        if not 0 <= self.calibration <= 1:
            raise UsageError(
                f"The training setting calibration is {self.calibration!r}, but it must be a share from 0 to 1.",
                remedy="Correct calibration, or leave it out to use the default.",
            )
        for name, smallest in least.items():
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or value < smallest):
                raise UsageError(
                    f"The training setting {name} is {value!r}, but it must be a whole number of at least {smallest}.",
                    remedy=f"Correct {name}, or leave it out to use the default.",
                )

    def epochs_for(self, shots: int, scans: int) -> int:
        """Return the maximum number of epochs.

        Args:
            shots: number of scans in the support set.
            scans: number of scans including their variations.
        """
        if self.epochs is not None:
            return self.epochs
        blocks = self.blocks
        if blocks is None:
            blocks = min(max(_BLOCKS_PER_SCAN * shots, _MIN_BLOCKS), _MAX_BLOCKS)
        return max(1, min(_PAPER_EPOCHS, round(blocks / (self.blocks_per_epoch * scans))))


@dataclass(frozen=True)
class TrainedAdapter:
    """A trained adapter with a record of its training.

    Attributes:
        adapter: the network, in evaluation mode.
        losses: mean loss of every epoch; for a linear adapter, only the loss of the solution.
        steps: number of training steps; for a linear adapter, number of evaluations of the loss.
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
        settings: kind of adapter.
        support: annotated scans; each organ is annotated in at least one scan.
        head_rows: for each organ, its classifier in the head of the encoder, or None (see
            :meth:`Adapter.start_from_head`).
        training: training schedule and seed.
        progress: receiver of progress reports; None reports nothing.
    """
    training = training or TrainingSettings()
    progress = progress or SilentProgress()
    support = kept_in_memory(support)
    adapter = untrained_adapter(settings, support, head_rows=head_rows, seed=training.seed).to(training.device)
    if settings.method == "linear":
        return _solved(adapter, support, training, progress)
    anchor = _Anchor(adapter, head_rows, training.anchor)
    optimizer = _optimizer(adapter, training)
    generator = torch.Generator().manual_seed(training.seed)
    scans = with_variations(support)
    steps = max(1, math.ceil(training.blocks_per_epoch * len(scans) / training.batch))
    bfloat16 = has_bfloat16(training.device) if training.bfloat16 is None else training.bfloat16
    precision = torch.bfloat16 if bfloat16 else torch.float32
    epochs = training.epochs_for(len(support), len(scans))
    random = np.random.default_rng(training.seed)
    sampler = BlockSampler(adapter, scans, block=training.block, batch=training.batch, random=random)
    losses: list[float] = []
    with progress.task("adapt", epochs) as task, ThreadPoolExecutor(1) as reader, exact_float32():
        upcoming = reader.submit(sampler.draw)
        for epoch in range(epochs):
            total = 0.0
            for step in range(steps):
                batch = upcoming.result()
                upcoming = reader.submit(sampler.draw)
                share = (epoch * steps + step + 1) / (epochs * steps)
                for group in optimizer.param_groups:
                    group["lr"] = group["peak"] * rate_share(share, 1 / epochs)
                changes = drawn_changes(adapter, training.batch, training, generator)
                logits = training_logits(adapter, batch.features, changes, sampler.core, precision)
                loss = adaptation_loss(logits, batch.targets, batch.annotated, settings.activation)
                optimizer.zero_grad()
                (loss + anchor.penalty()).backward()
                optimizer.step()
                total += float(loss.detach())
            losses.append(total / steps)
            task.advance(1)
            if _has_settled(losses, training, steps * training.batch):
                break
        upcoming.cancel()
        adapter.eval()
        if training.calibration and settings.activation == "sigmoid":
            calibrate(adapter, support, training.calibration)
    return TrainedAdapter(adapter, tuple(losses), len(losses) * steps, bfloat16)


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
    """Return a sample of voxels of a support set, as input of the classifiers of an adapter.

    Args:
        adapter: adapter that computes the input of the classifiers.
        support: annotated scans.
        training: settings for the sampling of blocks.
        blocks: number of blocks to sample.
        task: name of the task in progress reports.
        progress: receiver of progress reports.
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
    """Return an adapter before training: normalised to the features of the support set and started from the head.

    Args:
        settings: kind of adapter.
        support: annotated scans.
        head_rows: for each organ, its classifier in the head of the encoder, or None (see
            :meth:`Adapter.start_from_head`).
        seed: seed for all random choices.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        adapter = Adapter(settings, support[0].features.levels, len(head_rows))
        _fit_normalisation(adapter, with_variations(support), np.random.default_rng(seed))
        adapter.start_from_head(head_rows)
    return adapter


def drawn_changes(
    adapter: Adapter, count: int, training: TrainingSettings, generator: torch.Generator
) -> list[ChannelChange]:
    """Return random changes of the channels of ``count`` blocks, so that the adapter does not depend on single ones.

    The values of deep channels have different offsets in different scans. A few scans are not enough to separate these
    offsets from the contribution of the organ. Therefore each channel of a block is shifted by a random constant, and
    random channels of the coarser levels are dropped.

    Args:
        adapter: adapter with the levels and the device of the features.
        count: number of blocks.
        training: settings ``feature_shift`` and ``channel_dropout``.
        generator: generator for all random choices.

    Returns:
        The change of the normalised features of each level.
    """
    changes = []
    for number, level in enumerate(adapter.levels):
        offset = training.feature_shift * torch.randn(count, level.channels, generator=generator)
        factor = torch.ones_like(offset)
        if number and training.channel_dropout:
            kept = torch.rand(count, level.channels, generator=generator) >= training.channel_dropout
            factor = kept / (1 - training.channel_dropout)
        changes.append(ChannelChange(factor.to(adapter.device), (offset * factor).to(adapter.device)))
    return changes


class _Anchor:
    """A penalty on the distance of the classifiers of known organs from their start (L2-SP; Li et al., ICML 2018).

    For known organs, the many scans of pre-training contain more information than the few scans of the support set.
    """

    def __init__(self, adapter: Adapter, head_rows: HeadRows, weight: float) -> None:
        self._rows = [adapter.backgrounds + k for k, row in enumerate(head_rows) if row is not None]
        self._weight = weight
        self._pairs = [(weights, weights.detach().clone()) for weights in adapter.classifiers()]

    def penalty(self) -> Tensor:
        """Return the weighted squared distance; 0 if the encoder knows none of the organs."""
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
    """Return the learning rate as a share of its peak: linear warm-up, then a cosine to zero.

    Args:
        share: share of the training that is complete, 0 to 1.
        warmup: share of the training that is warm-up, 0 to 1.
    """
    if share <= warmup:
        return share / warmup
    return 0.5 * (1 + math.cos(math.pi * (share - warmup) / (1 - warmup)))


def _has_settled(losses: Sequence[float], training: TrainingSettings, blocks_per_epoch: int) -> bool:
    stretch = math.ceil(_MIN_BLOCKS_TO_JUDGE_LOSS / blocks_per_epoch)
    span, patience = stretch * training.smoothing, stretch * training.patience
    if len(losses) < span + patience:
        return False
    recent = sum(losses[-span:]) / span
    before = sum(losses[-span - patience : -patience]) / span
    return before - recent < training.least_gain


def _fit_normalisation(adapter: Adapter, support: Sequence[SupportScan], random: np.random.Generator) -> None:
    """Set mean and scale of each channel from blocks near organs and at random positions in every scan."""
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
