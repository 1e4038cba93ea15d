"""The pre-training loop: partial labels (FSEFT, eq. 1), deep supervision, inpainting, checkpoints."""

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
from fseft_edge.pretraining.cohort import Batch, TrainingCase, draw_batch, load_cohorts
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
from fseft_edge.runtime.encoder.backend_choice import has_bfloat16
from fseft_edge.runtime.encoder.bundle import sha256_of_file
from fseft_edge.runtime.encoder.networks import build_network
from fseft_edge.runtime.encoder.session import resolve_device
from fseft_edge.runtime.errors import CheckpointError, UsageError
from fseft_edge.runtime.system.memory import memory_explained
from fseft_edge.runtime.system.progress import Progress, SilentProgress

_LOG = logging.getLogger(__name__)


@memory_explained(
    "Memory ran out while an encoder was trained.",
    remedy="Let the plan have smaller crops, fewer of them a step, or gradient_checkpointing.",
)
def pretrain(
    plan: PretrainingConfig,
    *,
    data_root: Path,
    output: Path,
    initial: Path | None = None,
    initial_model: str | None = None,
    resume: bool = False,
    stop_after: int | None = None,
    tensorboard: bool = False,
    processes: Processes | None = None,
    progress: Progress | None = None,
) -> Path:
    """Train an encoder and its head, and return the model file ``output/NAME.safetensors``.

    Args:
        plan: data sets, network and schedule.
        data_root: folder that the plan's paths are relative to.
        output: folder for the checkpoint, the metrics of every step (``metrics.csv``) and the model file.
        initial: weights that training starts from: a model file, or the checkpoint of ``initial_model``. The encoder
            is taken over, and the head rows of organs of the same name; the rest, and all of it where neither is
            given, starts from random weights.
        initial_model: name in :data:`fseft_edge.export.zoo.MODELS` of what ``initial`` is; None for a model file.
        resume: continue from ``output``'s checkpoint; without it, a folder that holds one is refused.
        stop_after: end after this many steps of this run, leaving a checkpoint; None trains to the end.
        tensorboard: write events for TensorBoard, too.
        processes: this process's place among those that share the work
            (:func:`fseft_edge.pretraining.open_processes`); None works alone, on the first GPU or the CPU.
        progress: where to show progress.

    Raises:
        CheckpointError: the folder's checkpoint is of another plan or of other initial weights, or exists and
            ``resume`` is off; the initial weights are of another network; training diverged.
        InputError: a data set is missing or inconsistent.
        MissingBackendError: TensorBoard is asked for and not installed.
        OutOfMemoryError: memory ran out.
        UsageError: there are more processes than crops in a step, or they do not see the same files.
    """
    progress = progress or SilentProgress()
    processes = processes or Processes(resolve_device("auto"))
    _LOG.info("pre-training on %s, process %d of %d", processes.device, processes.rank + 1, processes.count)
    checkpoint = output / "checkpoint.pt"
    if checkpoint.exists() and not resume:
        raise CheckpointError(
            f"{checkpoint} holds an earlier run.", remedy="Add --resume to continue it, or choose another --output."
        )
    _check_feasible(plan, processes)
    output.mkdir(parents=True, exist_ok=True)
    state = _initial_state(plan, initial, initial_model, processes)
    if checkpoint.exists():
        restore_checkpoint(state, checkpoint, plan)
    processes.check_agreement(state.step, output)
    log = MetricsLog(output, done=state.step, tensorboard=tensorboard) if processes.first else None
    cohorts = load_cohorts(plan, data_root, progress)
    last = plan.schedule.steps if stop_after is None else min(plan.schedule.steps, state.step + stop_after)
    step = _Step(state, plan, processes)
    batches = _batches(plan, cohorts, range(state.step, last), processes)
    with progress.task("pre-train", plan.schedule.steps) as task, short_inputs_in_float32(state.network):
        task.advance(state.step)
        while state.step < last:
            metrics = step.take(batches)
            task.advance(1)
            if log is None:
                continue
            log.add(metrics)
            if state.step % LOSS_WINDOW == 0:
                _LOG.info("step %d: loss %.4f", state.step, state.recent_loss())
            if state.step % plan.schedule.checkpoint_every == 0 or state.step == last:
                log.save()
                save_checkpoint(state, checkpoint, plan)
    path = output / f"{plan.name}.safetensors"
    if log is not None:
        log.close()
        write_trained(state, plan, path, [len(cohort) for cohort in cohorts])
    processes.wait()
    return path


def learning_rate(plan: PretrainingConfig, step: int) -> float:
    """Return the rate of a step: linear warm-up, then a cosine that would be at zero after the last step."""
    schedule = plan.schedule
    if step < schedule.warmup_steps:
        return schedule.learning_rate * (step + 1) / schedule.warmup_steps
    done = (step - schedule.warmup_steps) / max(1, schedule.steps - schedule.warmup_steps)
    return schedule.learning_rate * 0.5 * (1 + math.cos(math.pi * done))


def _check_feasible(plan: PretrainingConfig, processes: Processes) -> None:
    if processes.count > plan.crops_per_step:
        raise UsageError(
            f"{processes.count} processes cannot share the {plan.crops_per_step} crops of a step.",
            remedy="Start fewer, or raise 'crops_per_step' in the plan.",
        )


def _initial_state(
    plan: PretrainingConfig, initial: Path | None, initial_model: str | None, processes: Processes
) -> TrainingState:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(plan.seed)
        encoder = build_network(plan.encoder.architecture, **plan.encoder.settings)
        network = PretrainingNetwork(encoder, len(plan.organs), len(plan.schedule.deep_supervision))
    encoder.gradient_checkpointing = plan.encoder.gradient_checkpointing
    source = None
    if initial is not None or initial_model is not None:
        source = _start_from(network, initial, initial_model or CUSTOM, plan)
    processes.share_statistics(network)
    network = network.to(processes.device, memory_format=torch.channels_last_3d)  # type: ignore[call-overload]  # stubs know 2D only
    optimizer = torch.optim.AdamW(network.parameters(), weight_decay=plan.schedule.weight_decay)
    return TrainingState(network, optimizer, None if source is None else sha256_of_file(source))


def _start_from(network: PretrainingNetwork, path: Path | None, name: str, plan: PretrainingConfig) -> Path:
    """Let the network start from a model of the zoo, and return the file that it was read from."""
    loaded = load_model(name, path)
    model = loaded.model
    if model.description.architecture != plan.encoder.architecture:
        raise CheckpointError(
            f"{loaded.source} is a {model.description.architecture}, the plan trains a {plan.encoder.architecture}.",
            remedy="Start from weights of the plan's network, or change the plan's [encoder].",
        )
    own = network.encoder.state_dict()
    untrained = {key: own[key] for key in own if key.partition(".")[0] in model.untrained}
    load_weights(network.encoder, {**model.encoder, **untrained}, source=str(loaded.source))
    rows = {organ: row for row, organ in enumerate(model.description.organs)}
    head = network.head
    with torch.no_grad():
        for row, organ in enumerate(plan.organs):
            if organ in rows:
                head.weight[row] = model.head_weight[rows[organ]].reshape(head.weight[row].shape)
                network.head_bias[row] = model.head_bias[rows[organ]]
    return loaded.source


def _batches(
    plan: PretrainingConfig, cohorts: list[list[TrainingCase]], steps: range, processes: Processes
) -> Iterator[Batch]:
    """Yield this process's crops of every step; those of the next are made while a GPU computes."""
    if processes.device.type == "cpu":
        yield from (draw_batch(plan, cohorts, step, processes.own) for step in steps)
        return
    with ThreadPoolExecutor(1) as maker:
        coming = [maker.submit(draw_batch, plan, cohorts, step, processes.own) for step in steps[:1]]
        for step in steps:
            batch = coming.pop().result()
            if step + 1 in steps:
                coming.append(maker.submit(draw_batch, plan, cohorts, step + 1, processes.own))
            yield batch


class _Step:
    """An optimiser step of all processes together."""

    def __init__(self, state: TrainingState, plan: PretrainingConfig, processes: Processes) -> None:
        self._state, self._plan, self._processes = state, plan, processes
        self._shared = processes.shared(state.network)
        self._bfloat16 = plan.schedule.bfloat16
        if self._bfloat16 and processes.device.type == "cuda" and not has_bfloat16(processes.device):
            _LOG.warning("this GPU has no bfloat16, so the network computes in float32")
            self._bfloat16 = False

    def take(self, batches: Iterator[Batch]) -> StepMetrics:
        """Train on the next batch; the state then stands one step further."""
        started = time.monotonic()
        state, schedule = self._state, self._plan.schedule
        batch = next(batches).on(self._processes.device)
        self._shared.train()
        if state.step >= schedule.steps * (1 - schedule.frozen_norm_fraction):
            state.network.freeze_statistics()
        rate = learning_rate(self._plan, state.step)
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
                remedy="Lower 'learning_rate' in the plan and begin again with another --output.",
            )
        state.optimizer.step()
        state.losses.append(float(loss.detach()))
        state.step += 1
        seconds = time.monotonic() - started
        state.seconds += seconds
        parts = float(segmentation.detach()), sum((float(part.detach()) for part in deep_supervision), 0.0)
        return StepMetrics(state.step, state.losses[-1], *parts, float(inpainting.detach()), rate, seconds)

    def _losses(self, batch: Batch) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Return the losses of the whole step: inpainting, segmentation on level 0, and on coarser levels, weighted."""
        schedule, total = self._plan.schedule, self._processes.total
        image = batch.image.contiguous(memory_format=torch.channels_last_3d)
        with torch.autocast(self._processes.device.type, torch.bfloat16, enabled=self._bfloat16):
            logits, restored = self._shared(image)
        voxels = self._plan.crops_per_step * batch.clean[0].numel()
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
