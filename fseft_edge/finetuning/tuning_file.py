"""The tuning file ``NAME.tuning``: what fine-tuning changed in an encoder, and the classifier that came with it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationError
from torch import Tensor

from fseft_edge._version import __version__
from fseft_edge.adapters.described_tensors import (
    TUNING_KEY,
    SelfDescription,
    check_content,
    does_not_fit,
    read_described,
    write_described,
)
from fseft_edge.adapters.file import STORED_LEVELS, AdapterOrgan
from fseft_edge.adapters.network import Levels
from fseft_edge.finetuning.settings import Decoder, TuningMethod
from fseft_edge.runtime.encoder.bundle import EncoderBundle
from fseft_edge.runtime.errors import AdapterError

SUFFIX = "tuning"


class TuningDescription(SelfDescription):
    """What a tuning is, of which encoder, and how it was made.

    Attributes:
        encoder_id, encoder_name: of the encoder that it changes.
        method, decoder, rank: which of its parts learned, see :mod:`fseft_edge.finetuning.settings`.
        reads: the levels that the classifier uses, in the words of the file format.
        organs: what the classifier's rows are for, in order.
        shots: number of annotated scans.
        seed: of everything random.
        steps: of the optimiser.
        parameters: how many learned.
        losses: mean loss of every ten steps.
        bfloat16: whether training computed in bfloat16.
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
        """What kind of fine-tuning it is, for people."""
        levels = "all levels" if self.levels == "all" else "the finest level"
        return f"{self.method}, decoder {self.decoder}, classifier on {levels}, {self.parameters} parameters"


@dataclass(frozen=True, eq=False)
class TuningFile:
    """What fine-tuning changed, with its description.

    Attributes:
        description: what it is.
        tensors: by name within a :class:`fseft_edge.finetuning.training.TunedNetwork`.
    """

    description: TuningDescription
    tensors: dict[str, Tensor]

    def check_encoder(self, bundle: EncoderBundle, path: Path) -> None:
        """Raise :class:`AdapterError` unless this is the encoder that was fine-tuned."""
        if bundle.encoder_id != self.description.encoder_id:
            raise AdapterError(
                f"{path} changes the encoder {self.description.encoder_name} "
                f"({self.description.encoder_id[:12]}), not {bundle.path} ({bundle.encoder_id[:12]}).",
                remedy="Name the encoder that was fine-tuned by --encoder.",
            )


def write_tuning(path: Path, file: TuningFile) -> None:
    """Write a tuning; it appears complete or not at all, and the same tuning gives the same bytes."""
    write_described(path, TUNING_KEY, file.description, file.tensors)


def read_tuning(path: Path) -> TuningFile:
    """Return the tuning in a file.

    Raises:
        AdapterError: the file is missing, damaged, no tuning, or of an unknown schema.
    """
    header, tensors = read_described(path, TUNING_KEY, suffix=SUFFIX, schema=1)
    try:
        description = TuningDescription.model_validate_json(header)
    except ValidationError as error:
        raise does_not_fit(path) from error
    check_content(path, description, tensors)
    return TuningFile(description, tensors)
