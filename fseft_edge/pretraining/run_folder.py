"""The files of a pre-training run: the checkpoint, from which a run can be resumed, and the model file."""

from __future__ import annotations

import hashlib
import io
import pickle
from dataclasses import dataclass, field
from pathlib import Path

import torch

from fseft_edge.export.checkpoints import ModelDescription, ModelFile, write_model_file
from fseft_edge.pretraining.config import PretrainingConfig
from fseft_edge.pretraining.network import PretrainingNetwork
from fseft_edge.runtime.errors import CheckpointError
from fseft_edge.runtime.system.atomic import atomic_path

LOSS_WINDOW = 50
"""Number of steps over which a reported loss is averaged."""


@dataclass
class TrainingState:
    """The state of a training run.

    Attributes:
        network: the network with its present weights.
        optimizer: the optimiser with its moments.
        initial_sha256: sha256 of the file with the initial weights; None for random initial weights.
        step: number of finished steps.
        seconds: total duration of the finished steps.
        losses: loss of each finished step.
    """

    network: PretrainingNetwork
    optimizer: torch.optim.AdamW
    initial_sha256: str | None = None
    step: int = 0
    seconds: float = 0.0
    losses: list[float] = field(default_factory=list)

    def recent_loss(self) -> float:
        """Return the mean loss of the last :data:`LOSS_WINDOW` steps."""
        recent = self.losses[-LOSS_WINDOW:]
        return sum(recent) / max(1, len(recent))


def save_checkpoint(state: TrainingState, path: Path, config: PretrainingConfig) -> None:
    """Write the checkpoint of a run.

    Raises:
        OutOfSpaceError: there is not enough free disk space.
    """
    content = {
        "plan": _config_id(config),
        "initial_sha256": state.initial_sha256,
        "step": state.step,
        "seconds": state.seconds,
        "losses": state.losses,
        "network": state.network.state_dict(),
        "optimizer": state.optimizer.state_dict(),
    }
    serialised = io.BytesIO()
    torch.save(content, serialised)
    with atomic_path(path) as temporary:
        temporary.write_bytes(serialised.getbuffer())  # a full disk raises OSError here, but not in torch.save


def restore_checkpoint(state: TrainingState, path: Path, config: PretrainingConfig) -> None:
    """Load a checkpoint, written on any device, into a state.

    Raises:
        CheckpointError: the checkpoint is damaged, belongs to another configuration, or has other initial weights
            than the state.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, EOFError, RuntimeError, ValueError, pickle.UnpicklingError) as error:
        raise CheckpointError(
            f"{path} is damaged.", remedy="Delete the file and start again, or restore the file from a backup."
        ) from error
    if not isinstance(content, dict) or content.get("plan") != _config_id(config):
        raise CheckpointError(
            f"{path} belongs to another configuration than the one given.",
            remedy="Resume with the configuration of that run, or choose another --output.",
        )
    if state.initial_sha256 not in (None, content["initial_sha256"]):
        raise CheckpointError(
            f"{path} belongs to a run with other initial weights than --initial.",
            remedy="Resume without --initial, or choose another --output.",
        )
    state.initial_sha256 = content["initial_sha256"]
    state.network.load_state_dict(content["network"])
    state.optimizer.load_state_dict(content["optimizer"])
    state.step, state.seconds, state.losses = content["step"], content["seconds"], content["losses"]


def write_trained(state: TrainingState, config: PretrainingConfig, path: Path, cases: list[int]) -> None:
    """Write the model file of a run.

    Args:
        state: state at the end of the run.
        config: configuration of the run.
        path: path of the model file.
        cases: number of cases of each data set.

    Raises:
        CheckpointError: weights are not finite.
        OutOfSpaceError: there is not enough free disk space.
    """
    description = ModelDescription(
        name=config.name,
        architecture=config.encoder.architecture,
        settings=config.encoder.settings,
        preprocessing=config.preprocessing,
        window=config.encoder.window,
        organs=config.organs,
        training={
            "seed": config.seed,
            "steps": state.step,
            "initial_sha256": state.initial_sha256,
            "planned_steps": config.schedule.steps,
            "plan_sha256": _config_id(config),
            "data_sets": {dataset.name: count for dataset, count in zip(config.dataset, cases, strict=True)},
            "loss": state.recent_loss(),
        },
    )
    network = state.network
    weight, bias = network.head.weight.detach().flatten(1), network.head_bias.detach()
    write_model_file(path, ModelFile(description, network.encoder.state_dict(), weight, bias))


def _config_id(config: PretrainingConfig) -> str:
    return hashlib.sha256(config.model_dump_json().encode()).hexdigest()
