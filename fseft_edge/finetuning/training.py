"""Fine-tuning: an encoder and its classifier learn from augmented crops of annotated scans."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from fseft_edge.adaptation.bfloat16_fix import short_inputs_in_float32
from fseft_edge.adaptation.losses import adaptation_loss
from fseft_edge.adaptation.normalisation import FeatureStatistics
from fseft_edge.adaptation.training import rate_share
from fseft_edge.adapters.network import Adapter, AdapterSettings, HeadRows
from fseft_edge.finetuning.settings import TuningSettings
from fseft_edge.finetuning.unfreezing import renewed_parts, unfreeze
from fseft_edge.pretraining.cohort import Batch, TrainingCase, batch_of, random_crop
from fseft_edge.runtime.encoder.backend_choice import has_bfloat16
from fseft_edge.runtime.encoder.networks.base import FeatureNetwork
from fseft_edge.runtime.errors import CheckpointError
from fseft_edge.runtime.scans.preprocessing import Preprocessing
from fseft_edge.runtime.system.memory import memory_explained
from fseft_edge.runtime.system.progress import Progress, SilentProgress

_CROP_MM = 144.0
_CROP_MULTIPLE = 32
_BOTTLENECK = 2  # at most, of the coarsest level's stride
_WARMUP_STEPS = 20
_LIVE_STATISTICS = 0.8
_GREATEST_GRADIENT = 5.0
_STEPS_OF_A_LOSS = 10
_STATISTICS_CROPS = 4


class TunedNetwork(nn.Module):
    """An encoder opened for fine-tuning, and the classifier of the organs to learn: a linear adapter.

    Args:
        encoder: pre-trained; opened in place (:func:`fseft_edge.finetuning.unfreezing.unfreeze`).
        organs: how many to learn.
        settings: which of the encoder's parameters learn, and what the classifier reads.

    Attributes:
        added: names, within the encoder, of those among them that hold nothing pre-trained.
        head: the classifier.
    """

    def __init__(self, encoder: FeatureNetwork, organs: int, settings: TuningSettings) -> None:
        super().__init__()
        self.added = unfreeze(encoder, settings)
        self.encoder = encoder
        self._renewed = renewed_parts(encoder) if settings.of_decoder == "new" else ()
        self.head = Adapter(AdapterSettings(method="linear", levels=settings.levels), encoder.levels, organs)

    def forward(self, windows: Tensor) -> Tensor:
        """Return logits ``[n, K, X, Y, Z]`` of windows ``[n, 1, X, Y, Z]``."""
        return self.head.of_maps(self.encoder(windows))

    @torch.no_grad()
    def start_head(self, rows: HeadRows, batches: Iterable[Tensor]) -> None:
        """Set the classifier to where it starts.

        Args:
            rows: for each organ the encoder's own classifier, or None.
            batches: windows ``[n, 1, X, Y, Z]``, whose features say by what features are normalised.
        """
        statistics = FeatureStatistics(self.head)
        for windows in batches:
            for level, features in zip(range(len(self.head.levels)), self.encoder(windows), strict=False):
                statistics.add(level, features.transpose(0, 1).flatten(1))
        statistics.apply()
        self.head.start_from_head(rows)

    def learned(self) -> dict[str, Tensor]:
        """Return what learned and what belongs to it, by name: parameters, and statistics of head and new decoder."""
        state = self.state_dict()
        names = {name for name, parameter in self.named_parameters() if parameter.requires_grad}
        names |= {f"head.{name}" for name, _ in self.head.named_buffers()}
        names |= {
            f"encoder.{name}" for name, _ in self.encoder.named_buffers() if name.partition(".")[0] in self._renewed
        }
        return {name: state[name].detach().cpu() for name in sorted(names)}


@dataclass(frozen=True, eq=False)
class FineTuned:
    """A network after fine-tuning.

    Attributes:
        network: on the CPU, in evaluation mode.
        losses: mean loss of every ten steps.
        steps: of the optimiser.
        bfloat16: whether it computed in bfloat16.
    """

    network: TunedNetwork
    losses: tuple[float, ...]
    steps: int
    bfloat16: bool

    @property
    def parameters(self) -> int:
        """How many parameters learned, the classifier's included."""
        return sum(parameter.numel() for parameter in self.network.parameters() if parameter.requires_grad)


class OutOfTimeError(Exception):
    """Fine-tuning would take longer than it may."""


class DivergedError(CheckpointError):
    """The weights that fine-tuning makes are not finite."""


@memory_explained(
    "Memory ran out while the encoder was fine-tuned.",
    remedy="Add --gradient-checkpointing, or let a step have fewer --crops or more portions (--accumulate).",
)
def fine_tune(
    encoder: FeatureNetwork,
    cases: Sequence[TrainingCase],
    rows: HeadRows,
    settings: TuningSettings,
    *,
    preprocessing: Preprocessing,
    window: tuple[int, int, int],
    seconds: float | None = None,
    progress: Progress | None = None,
) -> FineTuned:
    """Fine-tune an encoder on annotated scans.

    Batch statistics of what was pre-trained are held; a new decoder's are gathered during the first four fifths.

    Args:
        encoder: pre-trained; changed in place.
        cases: the support set on the encoder's grid.
        rows: for each organ the encoder's own classifier, or None.
        settings: what learns, and how.
        preprocessing: the encoder's, for the size of a crop.
        window: the encoder's, likewise.
        seconds: give up after a few steps if all of them would take longer; None takes what it takes.
        progress: where to show progress.

    Raises:
        UsageError: the method does not fit the encoder.
        OutOfTimeError: it would take longer than ``seconds``.
        DivergedError: the weights are not finite.
        OutOfMemoryError: memory ran out.
    """
    cases = [case for case in cases if case.task_mask.any()]  # the others teach nothing
    network = TunedNetwork(encoder, len(rows), settings).to(settings.device)
    for module in network.modules():
        if isinstance(module, nn.Conv3d | nn.ConvTranspose3d):
            module.to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]  # stubs know 2D only
    encoder.gradient_checkpointing = settings.checkpointing
    edge, spacing = settings.crop or crop_edge(encoder, preprocessing, window), preprocessing.spacing
    bfloat16 = has_bfloat16(settings.device) if settings.bfloat16 is None else settings.bfloat16
    optimizer = _optimizer(network, settings)
    learned = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    portions = [len(part) for part in np.array_split(np.arange(settings.crops), settings.accumulate) if len(part)]
    warmup = min(_WARMUP_STEPS / settings.steps, 0.5)
    losses: list[float] = []
    begun = time.monotonic()
    _set_mode(network, settings, live=True)
    with torch.autocast(settings.device.type, torch.bfloat16, enabled=bfloat16):
        random = np.random.default_rng([settings.seed, settings.steps])
        crops = (random_crop(cases, edge, random, spacing=spacing) for _ in range(_STATISTICS_CROPS))
        network.start_head(rows, (_image(batch_of([crop]), settings.device) for crop in crops))
    # What cuDNN does is repeated exactly; gradients of padding and pooling are not on a GPU.
    cudnn = torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=True)
    title = f"fine-tune ({settings.name})"
    exact = short_inputs_in_float32(network)
    with (progress or SilentProgress()).task(title, settings.steps) as task, cudnn, exact:
        for step in range(settings.steps):
            _set_mode(network, settings, live=step < _LIVE_STATISTICS * settings.steps)
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * rate_share((step + 1) / (settings.steps + 1), warmup)
            random = np.random.default_rng([settings.seed, step])
            optimizer.zero_grad()
            total = 0.0
            for count in portions:
                batch = batch_of([random_crop(cases, edge, random, spacing=spacing) for _ in range(count)])
                with torch.autocast(settings.device.type, torch.bfloat16, enabled=bfloat16):
                    logits = network(_image(batch, settings.device))
                targets, annotated = batch.targets.to(settings.device), batch.task_mask.to(settings.device)
                loss = adaptation_loss(logits.float(), targets, annotated, "sigmoid") * (count / settings.crops)
                loss.backward()
                total += float(loss.detach())
            norm = nn.utils.clip_grad_norm_(learned, _GREATEST_GRADIENT)
            if not bool(torch.isfinite(norm)):
                raise DivergedError(
                    f"Fine-tuning diverged: the gradient of step {step + 1} is not finite.",
                    remedy="Check the scans for values that are no HU, or choose another --seed or --method.",
                )
            optimizer.step()
            losses.append(total)
            task.advance(1)
            if step == 0:
                begun = time.monotonic()  # the first step also sets things up
            elif seconds is not None and (time.monotonic() - begun) / step * settings.steps > seconds:
                raise OutOfTimeError
    encoder.gradient_checkpointing = False
    means = [float(np.mean(losses[i : i + _STEPS_OF_A_LOSS])) for i in range(0, len(losses), _STEPS_OF_A_LOSS)]
    return FineTuned(network.cpu().eval(), tuple(means), settings.steps, bfloat16)


def _image(batch: Batch, device: torch.device) -> Tensor:
    """Return a batch's crops as the network wants them."""
    return batch.clean.to(device).contiguous(memory_format=torch.channels_last_3d)


def crop_edge(encoder: FeatureNetwork, preprocessing: Preprocessing, window: tuple[int, int, int]) -> int:
    """Return the edge of a crop in grid voxels: 144 mm, and within the encoder's window.

    It is a multiple of 32 and of what the bottleneck's stride may be, of which there are two at least.
    """
    bottleneck = _BOTTLENECK * encoder.levels[-1].stride
    multiple = max(_CROP_MULTIPLE, bottleneck)
    wanted = math.ceil(_CROP_MM / min(preprocessing.spacing) / multiple) * multiple
    return min(max(wanted, 2 * bottleneck), *window)


def _set_mode(network: TunedNetwork, settings: TuningSettings, *, live: bool) -> None:
    """Set training mode, with batch statistics held but for those of a new decoder that are still being gathered."""
    network.train()
    gathered = renewed_parts(network.encoder) if live and settings.of_decoder == "new" else ()
    for name, module in network.encoder.named_modules():
        if isinstance(module, nn.BatchNorm3d) and name.partition(".")[0] not in gathered:
            module.eval()


def _optimizer(network: TunedNetwork, settings: TuningSettings) -> torch.optim.AdamW:
    """Return AdamW with its peak rates: pre-trained matrices of a network without batch statistics learn slowly."""
    has_batch_norm = any(isinstance(module, nn.BatchNorm3d) for module in network.modules())
    all_fast = has_batch_norm or settings.learns_few_numbers
    fast: list[nn.Parameter] = list(network.head.parameters())
    slow: list[nn.Parameter] = []
    for name, parameter in network.encoder.named_parameters():
        if parameter.requires_grad:
            (fast if all_fast or name in network.added else slow).append(parameter)
    groups = [(fast, settings.rate), (slow, settings.pretrained_rate)]
    return torch.optim.AdamW(
        [{"params": parameters, "peak": rate} for parameters, rate in groups if parameters], weight_decay=0.0
    )
