"""The baselines that train the network itself, on the support sets of the adapters (see kshot.py).

All baselines are trained on augmented crops of the support scans (rotated, zoomed, restyled, like the crops of
`pretrain`), with the loss of the adapters.

==================== ================================ ===========================================
baseline             initial weights                  trained parameters
==================== ================================ ===========================================
FT last              the encoder and its head         the last decoder block and the classifier
full fine-tuning     the encoder and its head         all
from scratch         random                           all
==================== ================================ ===========================================
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import headneck
import torch
from torch import nn

from fseft_edge.adaptation.losses import adaptation_loss
from fseft_edge.export.checkpoints import ModelDescription, ModelFile, load_weights, read_model_file, write_model_file
from fseft_edge.pretraining.config import FilesConfig, PretrainingConfig, ScheduleConfig
from fseft_edge.pretraining.network import PretrainingNetwork
from fseft_edge.pretraining.training import learning_rate
from fseft_edge.pretraining.training_cases import draw_batch, load_cohorts
from fseft_edge.runtime.encoder.backend_choice import has_bfloat16
from fseft_edge.runtime.encoder.networks import build_network
from fseft_edge.runtime.system.progress import SilentProgress

RATES = {"FT last": 2e-3, "full fine-tuning": 2e-3, "from scratch": 4e-3}
RATE_WITHOUT_BATCH_NORM = 1e-4
LAST_BLOCKS = {"residual_unet": "merge.0", "swin_unetr": "decoder1"}
STEPS = 400
CROPS = 2


@dataclass(frozen=True)
class FineTuned:
    """A network after fine-tuning: its model file, the number of trained parameters, and the training time in s."""

    model: Path
    parameters: int
    seconds: float


def fine_tune(
    kind: str, cases: Sequence[str], model: Path | None, *, device: torch.device, seed: int, output: Path
) -> FineTuned:
    """Train a network on support scans and write it as the model file ``output/<name>.safetensors``.

    Args:
        kind: a key of :data:`RATES`.
        cases: names of the support scans.
        model: model file of the encoder; None for the built-in one.
        device: device for training.
        seed: seed for all random choices.
        output: folder for the model file.
    """
    output.mkdir(parents=True, exist_ok=True)
    pretrained = read_model_file(headneck.model_file(model))
    config = _config(kind, cases, pretrained.description, seed=seed, output=output)
    torch.manual_seed(seed)
    network = PretrainingNetwork(
        build_network(config.encoder.architecture, **config.encoder.settings), len(config.organs), 0
    )
    if kind != "from scratch":
        load_weights(network.encoder, pretrained.encoder, source=pretrained.description.name)
        with torch.no_grad():
            network.head_bias.fill_(-3.0)
            network.head.weight.zero_()
            for row, organ in enumerate(pretrained.description.organs):
                if organ in config.organs:
                    network.head.weight[config.organs.index(organ)] = pretrained.head_weight[row, :, None, None, None]
                    network.head_bias[config.organs.index(organ)] = pretrained.head_bias[row]
    network = network.to(device, memory_format=torch.channels_last_3d)  # type: ignore[call-overload]  # torch's type stubs cover 2D only
    learned = _learned(network, kind, config.encoder.architecture)
    bfloat16 = has_bfloat16(device)
    cohorts = load_cohorts(config, headneck.data_root(), SilentProgress())
    optimizer = torch.optim.AdamW(learned, weight_decay=config.schedule.weight_decay)
    clock = time.monotonic if device.type == "cuda" else time.process_time
    started = clock()
    for step in range(config.schedule.steps):
        network.train()
        if kind != "from scratch" or step >= config.schedule.steps * (1 - config.schedule.frozen_norm_fraction):
            network.freeze_statistics()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config, step)
        batch = draw_batch(config, cohorts, step).on(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=bfloat16):
            (logits, *_), _ = network(batch.clean.contiguous(memory_format=torch.channels_last_3d))
        loss = adaptation_loss(logits.float(), batch.targets, batch.task_mask, "sigmoid")
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(learned, 5.0)
        optimizer.step()
        if step % 50 == 49:
            print(f"{config.name}: step {step + 1}, loss {float(loss.detach()):.3f}", flush=True)
    seconds = clock() - started
    network = network.cpu()
    description = pretrained.description.model_copy(
        update={"name": config.name, "organs": config.organs, "training": {}}
    )
    tuned = output / f"{config.name}.safetensors"
    weights = network.head.weight.detach().flatten(1)
    write_model_file(tuned, ModelFile(description, network.encoder.state_dict(), weights, network.head_bias.detach()))
    return FineTuned(tuned, sum(parameter.numel() for parameter in learned), seconds)


def _config(
    kind: str, cases: Sequence[str], encoder: ModelDescription, *, seed: int, output: Path
) -> PretrainingConfig:
    name = f"{encoder.name}-{kind.replace(' ', '_')}-{len(cases)}-{seed}"
    has_batch_norm = encoder.architecture == "residual_unet"
    (output / f"{name}.json").write_text(json.dumps({"cases": list(cases)}))
    return PretrainingConfig(
        name=name,
        seed=seed,
        organs=tuple(organ.name for organ in headneck.ORGANS),
        encoder={"architecture": encoder.architecture, "window": encoder.window, **encoder.settings},
        preprocessing=encoder.preprocessing,
        schedule=ScheduleConfig(
            steps=STEPS,
            crop=64 if has_batch_norm else min(encoder.window),
            learning_rate=RATES[kind] if has_batch_norm else RATE_WITHOUT_BATCH_NORM,
            warmup_steps=20,
            deep_supervision=(),
            inpainting=0.0,
        ),
        dataset=(
            FilesConfig(
                kind="files",
                name="support",
                images="headneck/ct",
                labels="headneck/label",
                cases=f"{(output / name).resolve()}.json:cases",
                organs={organ.name: organ.label for organ in headneck.ORGANS},
                crops_per_step=CROPS,
            ),
        ),
    )


def _learned(network: PretrainingNetwork, kind: str, architecture: str) -> list[nn.Parameter]:
    """Return the parameters that the baseline trains, and freeze all other parameters."""
    chosen = [*network.encoder.parameters(), *network.head.parameters()]
    if kind == "FT last":
        network.requires_grad_(False)
        chosen = [*network.encoder.get_submodule(LAST_BLOCKS[architecture]).parameters(), *network.head.parameters()]
        for parameter in chosen:
            parameter.requires_grad_(True)
    return chosen
