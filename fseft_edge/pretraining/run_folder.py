"""The files of a pre-training run: its checkpoint, from which it can go on, and the model file that it makes."""

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
"""Steps over which a loss is averaged to be told."""


@dataclass
class TrainingState:
    """Where a run stands.

    Attributes:
        network: its weights.
        optimizer: with its moments.
        initial_sha256: of the file that the weights began from.
        step: how many steps are done.
        seconds: that they took.
        losses: of each of them.
    """

    network: PretrainingNetwork
    optimizer: torch.optim.AdamW
    initial_sha256: str | None = None
    step: int = 0
    seconds: float = 0.0
    losses: list[float] = field(default_factory=list)

    def recent_loss(self) -> float:
        """Return the mean loss of the last steps."""
        recent = self.losses[-LOSS_WINDOW:]
        return sum(recent) / max(1, len(recent))


def save_checkpoint(state: TrainingState, path: Path, plan: PretrainingConfig) -> None:
    """Write a run's checkpoint.

    Raises:
        OutOfSpaceError: there is no room.
    """
    content = {
        "plan": _plan_id(plan),
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
        temporary.write_bytes(serialised.getbuffer())  # a full disk is an OSError here, in torch.save it is not


def restore_checkpoint(state: TrainingState, path: Path, plan: PretrainingConfig) -> None:
    """Bring a state to where its checkpoint was written, on whatever device it was.

    Raises:
        CheckpointError: it is damaged, of another plan, or began from other weights than the state's.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, EOFError, RuntimeError, ValueError, pickle.UnpicklingError) as error:
        raise CheckpointError(
            f"{path} is damaged.", remedy="Remove it and begin again, or restore it from a copy."
        ) from error
    if not isinstance(content, dict) or content.get("plan") != _plan_id(plan):
        raise CheckpointError(
            f"{path} was made with another plan.", remedy="Continue with the same plan, or choose another --output."
        )
    if state.initial_sha256 not in (None, content["initial_sha256"]):
        raise CheckpointError(
            f"{path} began from other weights.", remedy="Continue without --initial, or choose another --output."
        )
    state.initial_sha256 = content["initial_sha256"]
    state.network.load_state_dict(content["network"])
    state.optimizer.load_state_dict(content["optimizer"])
    state.step, state.seconds, state.losses = content["step"], content["seconds"], content["losses"]


def write_trained(state: TrainingState, plan: PretrainingConfig, path: Path, cases: list[int]) -> None:
    """Write the model file of a run.

    Args:
        state: where it ended.
        plan: what it was made by.
        path: of the file.
        cases: how many each data set has.

    Raises:
        CheckpointError: weights are not finite.
        OutOfSpaceError: there is no room.
    """
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
            "loss": state.recent_loss(),
        },
    )
    network = state.network
    weight, bias = network.head.weight.detach().flatten(1), network.head_bias.detach()
    write_model_file(path, ModelFile(description, network.encoder.state_dict(), weight, bias))


def _plan_id(plan: PretrainingConfig) -> str:
    return hashlib.sha256(plan.model_dump_json().encode()).hexdigest()
