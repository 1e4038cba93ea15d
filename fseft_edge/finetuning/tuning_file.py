"""The tuning file ``NAME.tuning``: the tensors that fine-tuning trained in an encoder, and the trained classifier."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationError
from torch import Tensor

from fseft_edge._version import __version__
from fseft_edge.adapters.described_tensors import (
    TUNING_KEY,
    check_content,
    does_not_fit,
    read_described,
    write_described,
)
from fseft_edge.adapters.file import STORED_LEVELS, AdapterOrgan, SupportSetDescription
from fseft_edge.adapters.network import Levels
from fseft_edge.finetuning.settings import Decoder, TuningMethod
from fseft_edge.runtime.encoder.bundle import EncoderBundle
from fseft_edge.runtime.errors import AdapterError

SUFFIX = "tuning"


class TuningDescription(SupportSetDescription):
    """The metadata of a tuning: its encoder, its organs and its training.

    Attributes:
        encoder_id: id of the encoder that was fine-tuned.
        encoder_name: name of the encoder that was fine-tuned.
        method: method of the fine-tuning (see :class:`fseft_edge.finetuning.settings.TuningSettings`).
        decoder: training of the decoder (see :class:`fseft_edge.finetuning.settings.TuningSettings`).
        reads: the levels that the classifier uses, in the terms of the file format.
        rank: rank of low-rank sums.
        organs: the organs of the classifier, in the order of its outputs.
        shots: number of annotated scans.
        seed: seed for all random choices.
        steps: number of training steps.
        parameters: number of trained parameters.
        losses: mean loss of every ten steps.
        bfloat16: True if the network was computed in bfloat16 during training.
    """

    schema_version: Literal[1] = 1
    toolkit_version: str = __version__
    encoder_id: str
    encoder_name: str
    method: TuningMethod
    decoder: Decoder
    reads: Literal["last", "pyramid"]
    rank: int
    organs: tuple[AdapterOrgan, ...] = Field(min_length=1)
    shots: int
    seed: int
    steps: int
    parameters: int
    losses: tuple[float, ...]
    bfloat16: bool

    @property
    def levels(self) -> Levels:
        """The levels that the classifier uses."""
        return next(levels for levels, word in STORED_LEVELS.items() if word == self.reads)

    @property
    def kind(self) -> str:
        """Description of the fine-tuning for printed lines."""
        levels = "all levels" if self.levels == "all" else "the finest level"
        return f"{self.method}, decoder {self.decoder}, classifier on {levels}, {self.parameters} parameters"


@dataclass(frozen=True, eq=False)
class TuningFile:
    """The content of a tuning file.

    Attributes:
        description: the metadata.
        tensors: the trained tensors, by their name in a :class:`fseft_edge.finetuning.training.TunedNetwork`.
    """

    description: TuningDescription
    tensors: dict[str, Tensor]

    def check_encoder(self, bundle: EncoderBundle, path: Path) -> None:
        """Raise AdapterError if ``bundle`` is not the encoder that was fine-tuned; ``path`` is the tuning file."""
        if bundle.encoder_id != self.description.encoder_id:
            raise AdapterError(
                f"{path} belongs to the encoder {self.description.encoder_name} (id "
                f"{self.description.encoder_id[:12]}), but {bundle.path} has the id {bundle.encoder_id[:12]}.",
                remedy=bundle.tiling_explained(self.description.encoder_id)
                + "Set --encoder to the encoder that was fine-tuned.",
            )


def write_tuning(path: Path, file: TuningFile) -> None:
    """Write a tuning file atomically; equal tunings give equal bytes."""
    write_described(path, TUNING_KEY, file.description, file.tensors)


def read_tuning(path: Path) -> TuningFile:
    """Return the tuning in a file.

    Raises:
        AdapterError: the file is missing, is damaged, is not a tuning, or has an unknown schema version.
    """
    header, tensors = read_described(path, TUNING_KEY, suffix=SUFFIX, schemas=(1,))
    try:
        description = TuningDescription.model_validate_json(header)
    except ValidationError as error:
        raise does_not_fit(path) from error
    check_content(path, description, tensors)
    return TuningFile(description, tensors)
