"""Fine-tuning: training of an encoder and its classifier on augmented crops of annotated scans."""

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
from fseft_edge.pretraining.training_cases import Batch, TrainingCase, batch_of, random_crop
from fseft_edge.runtime.encoder.backend_choice import has_bfloat16
from fseft_edge.runtime.encoder.networks.base import FeatureNetwork
from fseft_edge.runtime.errors import CheckpointError
from fseft_edge.runtime.scans.preprocessing import Preprocessing
from fseft_edge.runtime.system.gpu_arithmetic import exact_float32
from fseft_edge.runtime.system.memory import memory_explained
from fseft_edge.runtime.system.progress import Progress, SilentProgress

_CROP_MM = 144.0
_CROP_MULTIPLE = 32
_BOTTLENECK = 2  # the stride of the bottleneck is at most this many times the coarsest level's stride
_WARMUP_STEPS = 20
_LIVE_STATISTICS = 0.8
_GREATEST_GRADIENT = 5.0
_STEPS_OF_A_LOSS = 10
_STATISTICS_CROPS = 4


class TunedNetwork(nn.Module):
    """An encoder prepared for fine-tuning, with a linear adapter as the classifier of the organs.

    Args:
        encoder: pre-trained encoder; changed in place (:func:`fseft_edge.finetuning.unfreezing.unfreeze`).
        organs: number of organs.
        settings: settings of the fine-tuning.

    Attributes:
        added: names, within the encoder, of the trained parameters that have no pre-trained values.
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
        """Set the initial state of the classifier.

        Args:
            rows: for each organ, its classifier in the encoder's head, or None.
            batches: windows ``[n, 1, X, Y, Z]``; the statistics of their features normalise the features.
        """
        statistics = FeatureStatistics(self.head)
        for windows in batches:
            for level, features in zip(range(len(self.head.levels)), self.encoder(windows), strict=False):
                statistics.add(level, features.transpose(0, 1).flatten(1))
        statistics.apply()
        self.head.start_from_head(rows)

    def learned(self) -> dict[str, Tensor]:
        """Return trained tensors by name: parameters, and statistics of the head and of a new decoder."""
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
        network: the network on the CPU, in evaluation mode.
        losses: mean loss of every ten steps.
        steps: number of training steps.
        bfloat16: True if the network was computed in bfloat16.
    """

    network: TunedNetwork
    losses: tuple[float, ...]
    steps: int
    bfloat16: bool

    @property
    def parameters(self) -> int:
        """Number of trained parameters, including the parameters of the classifier."""
        return sum(parameter.numel() for parameter in self.network.parameters() if parameter.requires_grad)


class OutOfTimeError(Exception):
    """Fine-tuning would take longer than its time limit."""


class DivergedError(CheckpointError):
    """The gradient of a step of fine-tuning is not finite."""


@memory_explained(
    "Memory ran out while the encoder was fine-tuned.",
    remedy="Add --gradient-checkpointing, reduce --crops, or increase --accumulate.",
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

    Batch normalisations of pre-trained parts use their running statistics and do not change them. Batch normalisations
    of a new decoder update their running statistics during the first 80 % of the steps.

    Args:
        encoder: pre-trained encoder; changed in place.
        cases: the support set on the encoder's grid.
        rows: for each organ, its classifier in the encoder's head, or None.
        settings: settings of the fine-tuning.
        preprocessing: preprocessing of the encoder, which determines the size of a crop.
        window: window of the encoder in grid voxels, which limits the size of a crop.
        seconds: time limit in seconds. Training stops after a few steps if all steps would take longer; None for no
            limit.
        progress: display for the progress; None shows nothing.

    Raises:
        UsageError: the method cannot be used with the encoder.
        OutOfTimeError: all steps would take longer than ``seconds``.
        DivergedError: the gradient of a step is not finite.
        OutOfMemoryError: memory ran out.
    """
    cases = [
        case for case in cases if case.task_mask.any()
    ]  # scans without an annotation do not contribute to the loss
    network = TunedNetwork(encoder, len(rows), settings).to(settings.device)
    for module in network.modules():
        if isinstance(module, nn.Conv3d | nn.ConvTranspose3d):
            module.to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]  # torch's type stubs cover 2D only
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
    cudnn = exact_float32()  # cuDNN is then deterministic; gradients of padding and pooling on a GPU are not
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
                    remedy="Check that the values of all scans are HU, or choose another --seed or --method.",
                )
            optimizer.step()
            losses.append(total)
            task.advance(1)
            if step == 0:
                begun = time.monotonic()  # the first step includes one-time initialisation
            elif seconds is not None and (time.monotonic() - begun) / step * settings.steps > seconds:
                raise OutOfTimeError
    encoder.gradient_checkpointing = False
    means = [float(np.mean(losses[i : i + _STEPS_OF_A_LOSS])) for i in range(0, len(losses), _STEPS_OF_A_LOSS)]
    return FineTuned(network.cpu().eval(), tuple(means), settings.steps, bfloat16)


def _image(batch: Batch, device: torch.device) -> Tensor:
    """Return the images of a batch on a device, in the channels-last memory format."""
    return batch.clean.to(device).contiguous(memory_format=torch.channels_last_3d)


def crop_edge(encoder: FeatureNetwork, preprocessing: Preprocessing, window: tuple[int, int, int]) -> int:
    """Return the edge of a crop in grid voxels: 144 mm, at most the encoder's window.

    The edge is a multiple of 32 and of the largest possible stride of the bottleneck, and at least twice this stride.
    """
    bottleneck = _BOTTLENECK * encoder.levels[-1].stride
    multiple = max(_CROP_MULTIPLE, bottleneck)
    wanted = math.ceil(_CROP_MM / min(preprocessing.spacing) / multiple) * multiple
    return min(max(wanted, 2 * bottleneck), *window)


def _set_mode(network: TunedNetwork, settings: TuningSettings, *, live: bool) -> None:
    """Set training mode; only batch normalisations of a new decoder update their statistics, and only if ``live``."""
    network.train()
    updated = renewed_parts(network.encoder) if live and settings.of_decoder == "new" else ()
    for name, module in network.encoder.named_modules():
        if isinstance(module, nn.BatchNorm3d) and name.partition(".")[0] not in updated:
            module.eval()


def _optimizer(network: TunedNetwork, settings: TuningSettings) -> torch.optim.AdamW:
    """Return AdamW with peak rates; without batch normalisation, pre-trained matrices have a lower rate."""
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
