"""The pre-training loop: loss with partial labels (FSEFT, equation 1), deep supervision, inpainting, checkpoints."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fseft_edge.adaptation.bfloat16_fix import short_inputs_in_float32
from fseft_edge.adaptation.losses import adaptation_loss, partial_label_loss
from fseft_edge.export.checkpoints import load_weights
from fseft_edge.export.zoo import CUSTOM, load_model
from fseft_edge.pretraining.config import PretrainingConfig
from fseft_edge.pretraining.metrics_log import MetricsLog, StepMetrics
from fseft_edge.pretraining.network import PretrainingNetwork
from fseft_edge.pretraining.processes import Processes
from fseft_edge.pretraining.run_folder import (
    LOSS_WINDOW,
    TrainingState,
    restore_checkpoint,
    save_checkpoint,
    write_trained,
)
from fseft_edge.pretraining.training_cases import Batch, TrainingCase, draw_batch, load_cohorts
from fseft_edge.runtime.encoder.backend_choice import has_bfloat16
from fseft_edge.runtime.encoder.bundle import sha256_of_file
from fseft_edge.runtime.encoder.networks import build_network
from fseft_edge.runtime.encoder.session import resolve_device
from fseft_edge.runtime.errors import CheckpointError, UsageError
from fseft_edge.runtime.system.memory import memory_explained
from fseft_edge.runtime.system.progress import Progress, SilentProgress

_LOG = logging.getLogger(__name__)


@memory_explained(
    "Memory ran out while the encoder was trained.",
    remedy="In the configuration, reduce 'crop' or 'crops_per_step', or set 'gradient_checkpointing = true'.",
)
def pretrain(
    config: PretrainingConfig,
    *,
    data_root: str | Path,
    output: str | Path,
    initial: str | Path | None = None,
    initial_model: str | None = None,
    resume: bool = False,
    stop_after: int | None = None,
    tensorboard: bool = False,
    processes: Processes | None = None,
    progress: Progress | None = None,
) -> Path:
    """Train an encoder and its head, and return the path of the model file ``output/NAME.safetensors``.

    Args:
        config: data sets, network and schedule.
        data_root: folder that the paths in the configuration are relative to.
        output: folder for the checkpoint, the metrics of every step (``metrics.csv``) and the model file.
        initial: file with the initial weights: a model file, or the checkpoint of ``initial_model``. The encoder's
            weights and the head rows of organs of equal name are copied. All other weights are random. If neither
            ``initial`` nor ``initial_model`` is given, all weights are random.
        initial_model: name in :data:`fseft_edge.export.zoo.MODELS` of the model that ``initial`` is the checkpoint of;
            None if ``initial`` is a model file.
        resume: True continues from the checkpoint in ``output``; False raises CheckpointError if there is a checkpoint.
        stop_after: number of steps after which this call writes a checkpoint and ends; None trains to the end.
        tensorboard: True also writes events for TensorBoard.
        processes: device and rank of this process (:func:`fseft_edge.pretraining.open_processes`); None trains in a
            single process, on the first GPU or on the CPU.
        progress: display for the progress; None shows nothing.

    Raises:
        CheckpointError: the checkpoint in ``output`` belongs to another configuration or to other initial weights; a
            checkpoint exists and ``resume`` is False; the initial weights belong to another network; or training
            diverged.
        InputError: a data set is missing or inconsistent.
        MissingBackendError: ``tensorboard`` is True and TensorBoard is not installed.
        OutOfMemoryError: memory ran out.
        UsageError: there are more processes than crops in a step, or the processes read different files.
    """
    data_root, output = Path(data_root), Path(output)
    initial = None if initial is None else Path(initial)
    progress = progress or SilentProgress()
    processes = processes or Processes(resolve_device("auto"))
    _LOG.info("pre-training on %s, process %d of %d", processes.device, processes.rank + 1, processes.count)
    checkpoint = output / "checkpoint.pt"
    if checkpoint.exists() and not resume:
        raise CheckpointError(
            f"{checkpoint} already contains a run.",
            remedy="Add --resume to continue that run, or choose another --output.",
        )
    _check_feasible(config, processes)
    output.mkdir(parents=True, exist_ok=True)
    state = _initial_state(config, initial, initial_model, processes)
    if checkpoint.exists():
        restore_checkpoint(state, checkpoint, config)
    processes.check_agreement(state.step, output)
    log = MetricsLog(output, done=state.step, tensorboard=tensorboard) if processes.first else None
    cohorts = load_cohorts(config, data_root, progress)
    last = config.schedule.steps if stop_after is None else min(config.schedule.steps, state.step + stop_after)
    step = _Step(state, config, processes)
    batches = _batches(config, cohorts, range(state.step, last), processes)
    with progress.task("pre-train", config.schedule.steps) as task, short_inputs_in_float32(state.network):
        task.advance(state.step)
        while state.step < last:
            metrics = step.take(batches)
            task.advance(1)
            if log is None:
                continue
            log.add(metrics)
            if state.step % LOSS_WINDOW == 0:
                _LOG.info("step %d: loss %.4f", state.step, state.recent_loss())
            if state.step % config.schedule.checkpoint_every == 0 or state.step == last:
                log.save()
                save_checkpoint(state, checkpoint, config)
    path = output / f"{config.name}.safetensors"
    if log is not None:
        log.close()
        write_trained(state, config, path, [len(cohort) for cohort in cohorts])
    processes.wait()
    return path


def learning_rate(config: PretrainingConfig, step: int) -> float:
    """Return the learning rate of a step: linear warm-up, then cosine decay to zero after the last step."""
    schedule = config.schedule
    if step < schedule.warmup_steps:
        return schedule.learning_rate * (step + 1) / schedule.warmup_steps
    done = (step - schedule.warmup_steps) / max(1, schedule.steps - schedule.warmup_steps)
    return schedule.learning_rate * 0.5 * (1 + math.cos(math.pi * done))


def _check_feasible(config: PretrainingConfig, processes: Processes) -> None:
    if processes.count > config.crops_per_step:
        raise UsageError(
            f"There are {processes.count} processes, but only {config.crops_per_step} crops in a step.",
            remedy="Start fewer processes, or increase 'crops_per_step' in the configuration.",
        )


def _initial_state(
    config: PretrainingConfig, initial: Path | None, initial_model: str | None, processes: Processes
) -> TrainingState:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        encoder = build_network(config.encoder.architecture, **config.encoder.settings)
        network = PretrainingNetwork(encoder, len(config.organs), len(config.schedule.deep_supervision))
    encoder.gradient_checkpointing = config.encoder.gradient_checkpointing
    source = None
    if initial is not None or initial_model is not None:
        source = _start_from(network, initial, initial_model or CUSTOM, config)
    processes.share_statistics(network)
    network = network.to(processes.device, memory_format=torch.channels_last_3d)  # type: ignore[call-overload]  # torch's type stubs cover 2D only
    optimizer = torch.optim.AdamW(network.parameters(), weight_decay=config.schedule.weight_decay)
    return TrainingState(network, optimizer, None if source is None else sha256_of_file(source))


def _start_from(network: PretrainingNetwork, path: Path | None, name: str, config: PretrainingConfig) -> Path:
    """Copy the weights of a known model into the network, and return the file of the weights."""
    loaded = load_model(name, path)
    model = loaded.model
    if model.description.architecture != config.encoder.architecture:
        raise CheckpointError(
            f"{loaded.source} contains weights of a {model.description.architecture}, but the configuration trains a "
            f"{config.encoder.architecture}.",
            remedy="Give initial weights of that architecture, or change [encoder] in the configuration.",
        )
    own = network.encoder.state_dict()
    untrained = {key: own[key] for key in own if key.partition(".")[0] in model.untrained}
    load_weights(network.encoder, {**model.encoder, **untrained}, source=str(loaded.source))
    rows = {organ: row for row, organ in enumerate(model.description.organs)}
    head = network.head
    with torch.no_grad():
        for row, organ in enumerate(config.organs):
            if organ in rows:
                head.weight[row] = model.head_weight[rows[organ]].reshape(head.weight[row].shape)
                network.head_bias[row] = model.head_bias[rows[organ]]
    return loaded.source


def _batches(
    config: PretrainingConfig, cohorts: list[list[TrainingCase]], steps: range, processes: Processes
) -> Iterator[Batch]:
    """Yield this process's crops of every step; a thread makes the crops of the next step while a GPU computes."""
    if processes.device.type == "cpu":
        yield from (draw_batch(config, cohorts, step, processes.own) for step in steps)
        return
    with ThreadPoolExecutor(1) as maker:
        coming = [maker.submit(draw_batch, config, cohorts, step, processes.own) for step in steps[:1]]
        for step in steps:
            batch = coming.pop().result()
            if step + 1 in steps:
                coming.append(maker.submit(draw_batch, config, cohorts, step + 1, processes.own))
            yield batch


class _Step:
    """A training step, which all processes compute together."""

    def __init__(self, state: TrainingState, config: PretrainingConfig, processes: Processes) -> None:
        self._state, self._config, self._processes = state, config, processes
        self._shared = processes.shared(state.network)
        self._bfloat16 = config.schedule.bfloat16
        if self._bfloat16 and processes.device.type == "cuda" and not has_bfloat16(processes.device):
            _LOG.warning("this GPU does not support bfloat16; the network is computed in float32")
            self._bfloat16 = False

    def take(self, batches: Iterator[Batch]) -> StepMetrics:
        """Train on the next batch, advance the state by one step and return the metrics."""
        started = time.monotonic()
        state, schedule = self._state, self._config.schedule
        batch = next(batches).on(self._processes.device)
        self._shared.train()
        if state.step >= schedule.steps * (1 - schedule.frozen_norm_fraction):
            state.network.freeze_statistics()
        rate = learning_rate(self._config, state.step)
        for group in state.optimizer.param_groups:
            group["lr"] = rate
        inpainting, segmentation, deep_supervision = self._losses(batch)
        loss = inpainting + segmentation
        for part in deep_supervision:
            loss = loss + part
        state.optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(state.network.parameters(), 5.0)
        if not bool(torch.isfinite(norm)):
            raise CheckpointError(
                f"Training diverged: the gradient of step {state.step + 1} is not finite.",
                remedy="Reduce 'learning_rate' in the configuration and start again with another --output.",
            )
        state.optimizer.step()
        state.losses.append(float(loss.detach()))
        state.step += 1
        seconds = time.monotonic() - started
        state.seconds += seconds
        parts = float(segmentation.detach()), sum((float(part.detach()) for part in deep_supervision), 0.0)
        return StepMetrics(state.step, state.losses[-1], *parts, float(inpainting.detach()), rate, seconds)

    def _losses(self, batch: Batch) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Return the weighted losses of a step: inpainting, segmentation on level 0, and on each coarser level."""
        schedule, total = self._config.schedule, self._processes.total
        image = batch.image.contiguous(memory_format=torch.channels_last_3d)
        with torch.autocast(self._processes.device.type, torch.bfloat16, enabled=self._bfloat16):
            logits, restored = self._shared(image)
        voxels = self._config.crops_per_step * batch.clean[0].numel()
        differences = total(F.l1_loss(restored.float(), batch.clean, reduction="sum"))
        segmentation: list[Tensor] = []
        targets = batch.targets
        for level, weight in enumerate((1.0, *schedule.deep_supervision)):
            if level:
                targets = F.avg_pool3d(targets, 2)
            if schedule.dice == "crop":
                labelled = partial_label_loss(logits[level].float(), targets, batch.task_mask, total=total)
            else:
                labelled = adaptation_loss(logits[level].float(), targets, batch.task_mask, "sigmoid", total=total)
            segmentation.append(weight * labelled)
        return schedule.inpainting * (differences / voxels), segmentation[0], segmentation[1:]
