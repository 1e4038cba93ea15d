"""The pre-training loop: partial labels (FSEFT, eq. 1), deep supervision, inpainting, checkpoints."""

from __future__ import annotations

import hashlib
import io
import json
import logging
import math
import pickle
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fseft_edge.export.checkpoints import ModelDescription, ModelFile, load_weights, read_model_file, write_model_file
from fseft_edge.losses import adaptation_loss, partial_label_loss
from fseft_edge.pretraining.cohort import Batch, draw_batch, load_cohorts
from fseft_edge.pretraining.plan import PretrainingPlan
from fseft_edge.report.progress import Progress, SilentProgress
from fseft_edge.runtime.atomic import atomic_path
from fseft_edge.runtime.bundle import sha256_of_file
from fseft_edge.runtime.errors import CheckpointError
from fseft_edge.runtime.networks import build_network
from fseft_edge.runtime.networks.base import FeatureNetwork

_LOG = logging.getLogger(__name__)
_LOSS_WINDOW = 50


class PretrainingNetwork(nn.Module):
    """The encoder with its classifier, and the helpers that only training needs.

    Args:
        encoder: the feature network.
        organs: number of classes.
        supervised_levels: how many coarser levels carry a classifier of their own.
    """

    def __init__(self, encoder: FeatureNetwork, organs: int, supervised_levels: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.heads = nn.ModuleList(
            nn.Conv3d(level.channels, organs, 1) for level in encoder.levels[: 1 + supervised_levels]
        )
        self.restorer = nn.Conv3d(encoder.levels[0].channels, 1, 1)

    def forward(self, windows: Tensor) -> tuple[list[Tensor], Tensor]:
        """Return the logits of every supervised level, finest first, and the restored image."""
        pyramid = self.encoder(windows)
        return [head(level) for head, level in zip(self.heads, pyramid, strict=False)], self.restorer(pyramid[0])

    @property
    def head(self) -> nn.Conv3d:
        """The classifier on level 0, which is the encoder's head."""
        head = self.heads[0]
        assert isinstance(head, nn.Conv3d)  # noqa: S101 - narrows the type for the checker
        return head

    @property
    def head_bias(self) -> Tensor:
        """The head's bias ``[K]``."""
        bias = self.head.bias
        assert bias is not None  # noqa: S101 - narrows the type for the checker
        return bias

    def freeze_statistics(self) -> None:
        """Let every batch normalisation use its running statistics from now on, and keep them."""
        for module in self.modules():
            if isinstance(module, nn.BatchNorm3d):
                module.eval()


@dataclass
class _State:
    network: PretrainingNetwork
    optimizer: torch.optim.AdamW
    initial_sha256: str | None = None
    step: int = 0
    seconds: float = 0.0
    losses: list[float] = field(default_factory=list)


def pretrain(
    plan: PretrainingPlan,
    *,
    data_root: Path,
    output: Path,
    initial: Path | None = None,
    resume: bool = False,
    stop_after: int | None = None,
    progress: Progress | None = None,
) -> Path:
    """Train an encoder and its head, and return the model file ``output/NAME.safetensors``.

    Args:
        plan: data sets, network and schedule.
        data_root: folder that the plan's paths are relative to.
        output: folder for the checkpoint, the loss curve (``losses.json``) and the model file.
        initial: model file whose encoder, and head rows of the same organs, training starts from; None starts
            from random weights.
        resume: continue from ``output``'s checkpoint; without it, a folder that holds one is refused.
        stop_after: end after this many steps of this run, leaving a checkpoint; None trains to the end.
        progress: where to show progress.

    Raises:
        CheckpointError: the folder's checkpoint is of another plan, or exists and ``resume`` is off.
        InputError: a data set is missing or inconsistent.
    """
    progress = progress or SilentProgress()
    checkpoint = output / "checkpoint.pt"
    if checkpoint.exists() and not resume:
        raise CheckpointError(
            f"{checkpoint} holds an earlier run.", remedy="Add --resume to continue it, or choose another --output."
        )
    output.mkdir(parents=True, exist_ok=True)
    state = _initial_state(plan, initial)
    if checkpoint.exists():
        _restore(state, checkpoint, plan)
    cohorts = load_cohorts(plan, data_root, progress)
    last = plan.schedule.steps if stop_after is None else min(plan.schedule.steps, state.step + stop_after)
    with progress.task("pre-train", plan.schedule.steps) as task:
        task.advance(state.step)
        while state.step < last:
            started = time.monotonic()
            state.losses.append(_train_step(state, draw_batch(plan, cohorts, state.step), plan))
            state.step += 1
            state.seconds += time.monotonic() - started
            task.advance(1)
            if state.step % _LOSS_WINDOW == 0:
                recent = sum(state.losses[-_LOSS_WINDOW:]) / _LOSS_WINDOW
                _LOG.info("step %d: loss %.4f", state.step, recent)
            if state.step % plan.schedule.checkpoint_every == 0 or state.step == last:
                _save(state, checkpoint, plan)
    return _write_model(state, plan, output, [len(cohort) for cohort in cohorts])


def learning_rate(plan: PretrainingPlan, step: int) -> float:
    """Return the rate of a step: linear warm-up, then a cosine to zero at the last step."""
    schedule = plan.schedule
    if step < schedule.warmup_steps:
        return schedule.learning_rate * (step + 1) / schedule.warmup_steps
    done = (step - schedule.warmup_steps) / max(1, schedule.steps - schedule.warmup_steps)
    return schedule.learning_rate * 0.5 * (1 + math.cos(math.pi * done))


def _initial_state(plan: PretrainingPlan, initial: Path | None) -> _State:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(plan.seed)
        encoder = build_network(plan.encoder.architecture, **plan.encoder.settings)
        encoder.gradient_checkpointing = plan.encoder.gradient_checkpointing
        network = PretrainingNetwork(encoder, len(plan.organs), len(plan.schedule.deep_supervision))
    if initial is not None:
        _start_from(network, initial, plan)
    network = network.to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]  # stubs know 2D only
    optimizer = torch.optim.AdamW(network.parameters(), weight_decay=plan.schedule.weight_decay)
    return _State(network, optimizer, None if initial is None else sha256_of_file(initial))


def _start_from(network: PretrainingNetwork, path: Path, plan: PretrainingPlan) -> None:
    model = read_model_file(path)
    load_weights(network.encoder, model.encoder, source=str(path))
    rows = {organ: row for row, organ in enumerate(model.description.organs)}
    head = network.head
    with torch.no_grad():
        for row, organ in enumerate(plan.organs):
            if organ in rows:
                head.weight[row] = model.head_weight[rows[organ]].reshape(head.weight[row].shape)
                network.head_bias[row] = model.head_bias[rows[organ]]


def _train_step(state: _State, batch: Batch, plan: PretrainingPlan) -> float:
    schedule, network = plan.schedule, state.network
    network.train()
    if state.step >= schedule.steps * (1 - schedule.frozen_norm_fraction):
        network.freeze_statistics()
    for group in state.optimizer.param_groups:
        group["lr"] = learning_rate(plan, state.step)
    image = batch.image.contiguous(memory_format=torch.channels_last_3d)
    with torch.autocast("cpu", torch.bfloat16, enabled=schedule.bfloat16):
        logits, restored = network(image)
    loss = schedule.inpainting * F.l1_loss(restored.float(), batch.clean)
    targets = batch.targets
    for level, weight in enumerate((1.0, *schedule.deep_supervision)):
        if level:
            targets = F.avg_pool3d(targets, 2)
        if schedule.dice == "crop":
            labelled = partial_label_loss(logits[level].float(), targets, batch.task_mask)
        else:
            labelled = adaptation_loss(logits[level].float(), targets, batch.task_mask, "sigmoid")
        loss = loss + weight * labelled
    state.optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(network.parameters(), 5.0)
    state.optimizer.step()
    return float(loss.detach())


def _plan_id(plan: PretrainingPlan) -> str:
    return hashlib.sha256(plan.model_dump_json().encode()).hexdigest()


def _save(state: _State, path: Path, plan: PretrainingPlan) -> None:
    content = {
        "plan": _plan_id(plan),
        "step": state.step,
        "seconds": state.seconds,
        "losses": state.losses,
        "network": state.network.state_dict(),
        "optimizer": state.optimizer.state_dict(),
    }
    serialised = io.BytesIO()
    torch.save(content, serialised)
    with atomic_path(path) as temporary:
        temporary.write_bytes(serialised.getbuffer())  # a full disk is an OSError here, in torch.save it is not
    with atomic_path(path.with_name("losses.json")) as temporary:
        temporary.write_text(json.dumps(state.losses))


def _restore(state: _State, path: Path, plan: PretrainingPlan) -> None:
    try:
        content = torch.load(path, weights_only=True)
    except (OSError, EOFError, RuntimeError, ValueError, pickle.UnpicklingError) as error:
        raise CheckpointError(
            f"{path} is damaged.", remedy="Remove it and begin again, or restore it from a copy."
        ) from error
    if not isinstance(content, dict) or content.get("plan") != _plan_id(plan):
        raise CheckpointError(
            f"{path} was made with another plan.", remedy="Continue with the same plan, or choose another --output."
        )
    state.network.load_state_dict(content["network"])
    state.optimizer.load_state_dict(content["optimizer"])
    state.step, state.seconds, state.losses = content["step"], content["seconds"], content["losses"]


def _write_model(state: _State, plan: PretrainingPlan, output: Path, cases: list[int]) -> Path:
    description = ModelDescription(
        name=plan.name,
        architecture=plan.encoder.architecture,
        settings=plan.encoder.settings,
        preprocessing=plan.preprocessing,
        window=plan.encoder.window,
        organs=plan.organs,
        training={
            "seed": plan.seed,
            "steps": state.step,
            "initial_sha256": state.initial_sha256,
            "planned_steps": plan.schedule.steps,
            "plan_sha256": _plan_id(plan),
            "data_sets": {dataset.name: count for dataset, count in zip(plan.dataset, cases, strict=True)},
            "loss": sum(state.losses[-_LOSS_WINDOW:]) / max(1, len(state.losses[-_LOSS_WINDOW:])),
        },
    )
    path = output / f"{plan.name}.safetensors"
    encoder = state.network.encoder.state_dict()
    write_model_file(
        path,
        ModelFile(
            description,
            encoder,
            state.network.head.weight.detach().flatten(1),
            state.network.head_bias.detach(),
        ),
    )
    return path
