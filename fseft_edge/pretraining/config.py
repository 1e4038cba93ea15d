"""The pre-training plan: what a TOML file says about the network, the schedule and every data set."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, ClassVar, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    JsonValue,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)

from fseft_edge.runtime.errors import UnreadableFileError
from fseft_edge.runtime.scans.preprocessing import Preprocessing
from fseft_edge.runtime.system.toml_file import read_toml

MOST_ORGANS = 31
"""Organs of a training case are bits of an int32."""


class _Strict(BaseModel):
    """A table of the plan.

    A key that came after the first release is left out of the dump where it has its default: the dump identifies a
    plan in checkpoints and model files, and an older plan keeps its identity.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    added_keys: ClassVar[frozenset[str]] = frozenset()

    @model_serializer(mode="wrap")
    def _without_added_defaults(self, dump: SerializerFunctionWrapHandler) -> dict[str, JsonValue]:
        defaults = {key: type(self).model_fields[key].default for key in self.added_keys}
        content: dict[str, JsonValue] = dump(self)
        return {
            key: value for key, value in content.items() if key not in defaults or getattr(self, key) != defaults[key]
        }


class ResidualUNetConfig(_Strict):
    """The compact encoder (:class:`fseft_edge.runtime.encoder.networks.residual_unet.ResidualUNet`) is trained."""

    architecture: Literal["residual_unet"]
    channels: tuple[int, ...]
    window: tuple[int, int, int]
    gradient_checkpointing: bool = False

    added_keys: ClassVar[frozenset[str]] = frozenset({"gradient_checkpointing"})

    @property
    def settings(self) -> dict[str, JsonValue]:
        """The network's keyword arguments."""
        return {"channels": list(self.channels)}

    @property
    def levels(self) -> int:
        """How many levels the pyramid has."""
        return len(self.channels) - 1

    @property
    def coarsest_stride(self) -> int:
        """Of the bottleneck, in grid voxels."""
        return int(2**self.levels)

    def check_edges(self, edges: Sequence[int]) -> None:
        """Raise a ValueError where a crop or window of these edges, in grid voxels, does not fit."""
        if any(edge % self.coarsest_stride for edge in edges):
            raise ValueError(
                f"window and crop must be multiples of {self.coarsest_stride}, the encoder's coarsest stride"
            )


class SwinUnetrConfig(_Strict):
    """A SwinUNETR (:class:`fseft_edge.runtime.encoder.networks.swin_unetr.SwinUnetrFeatures`) is trained."""

    architecture: Literal["swin_unetr"]
    feature_size: int = Field(default=48, gt=0, multiple_of=12)
    window: tuple[int, int, int]
    gradient_checkpointing: bool = False

    added_keys: ClassVar[frozenset[str]] = frozenset({"gradient_checkpointing"})

    @property
    def settings(self) -> dict[str, JsonValue]:
        """The network's keyword arguments."""
        return {"feature_size": self.feature_size}

    @property
    def levels(self) -> int:
        """How many levels the pyramid has."""
        return 5

    @property
    def coarsest_stride(self) -> int:
        """Of the bottleneck, in grid voxels."""
        return 32

    def check_edges(self, edges: Sequence[int]) -> None:
        """Raise a ValueError where a crop or window of these edges, in grid voxels, does not fit.

        The bottleneck normalises over its voxels and needs more than one.
        """
        if any(edge % self.coarsest_stride or edge < 64 for edge in edges):
            raise ValueError("window and crop of a swin_unetr must be multiples of 32, and at least 64")


EncoderConfig = Annotated[ResidualUNetConfig | SwinUnetrConfig, Field(discriminator="architecture")]


Axis = Literal["x", "y", "z"]
_Label = Annotated[int, Field(ge=1)]
Labels = _Label | Annotated[tuple[_Label, ...], Field(min_length=1)]


class ScheduleConfig(_Strict):
    """Optimisation: AdamW, linear warm-up, cosine decay to zero.

    Attributes:
        steps: optimiser steps.
        crop: edge of the training crops, in grid voxels.
        frozen_norm_fraction: share of the steps, at the end, during which batch normalisation uses and keeps its
            running statistics, so that training ends under the conditions of inference.
        deep_supervision: loss weight of the classifiers on levels 1, 2, ... (level 0 has weight 1).
        inpainting: loss weight of restoring the image where boxes of it were erased; needs no annotation.
        dice: over what the Dice quotient is formed: each ``crop`` (the paper's equation 1), or the whole ``batch``, of
            organs that the batch shows. With short training and small organs, the quotient of many crops that lack an
            organ holds it at nothing.
        bfloat16: run the network in bfloat16 (weights and losses stay float32).
        random: whether the crops of a step share one stream of random numbers (``step``), or each has its own
            (``crop``), so that one of several processes need not make the crops of the others.
        flips: axes of the grid along which half of the crops are mirrored.
        pairs: organs that change places in a crop mirrored along x, beside those told by ``right`` and ``left`` in
            their names.
    """

    steps: int = Field(gt=0)
    crop: int = Field(gt=0)
    learning_rate: float = Field(gt=0)
    weight_decay: float = Field(default=0.01, ge=0)
    warmup_steps: int = Field(default=100, ge=0)
    frozen_norm_fraction: float = Field(default=0.2, ge=0, le=1)
    deep_supervision: tuple[float, ...] = (0.5, 0.25)
    inpainting: float = Field(default=1.0, ge=0)
    dice: Literal["crop", "batch"] = "crop"
    bfloat16: bool = True
    checkpoint_every: int = Field(default=200, gt=0)
    random: Literal["step", "crop"] = "step"
    flips: tuple[Axis, ...] = ()
    pairs: tuple[tuple[str, str], ...] = ()

    added_keys: ClassVar[frozenset[str]] = frozenset({"random", "flips", "pairs"})

    def mirrored(self, organs: Sequence[str]) -> list[int]:
        """Return, for every organ, the position of the organ that it is in a mirror: itself, or the other of its pair.

        Raises:
            ValueError: an organ's other side is not among the organs.
        """
        twins = {organ: other for pair in self.pairs for organ, other in (pair, pair[::-1])}
        others = [twins.get(organ, _other_side(organ)) for organ in organs]
        missing = sorted(set(others) - set(organs))
        if missing:
            raise ValueError(f"'flips' along x needs the other side of each paired organ; 'organs' lacks {missing}")
        return [list(organs).index(other) for other in others]


class FilesConfig(_Strict):
    """A data set of NIfTI files.

    Attributes:
        images, labels: folders, relative to the data root; an image and its labels share their file name.
        cases: ``FILE.json:KEY``, a JSON object whose ``KEY`` lists the case names; all cases when absent.
        organs: label value of each organ in the annotation files, or the values that make it up together (a liver and
            its tumours).
        partial: whether an organ that a case's annotation lacks was not contoured (its loss is then masked for
            that case) rather than absent from the patient.
        halves: organ to be split at its own median sagittal plane into ``[right, left]`` extra organs; where the plan's
            ``organs`` do not list it, nothing but its halves is learnt (two kidneys that share a label).
        crops_per_step: how many crops of this data set are in every batch.
    """

    kind: Literal["files"]
    name: str
    images: str
    labels: str
    cases: str | None = None
    organs: dict[str, Labels] = Field(min_length=1)
    partial: bool = False
    halves: dict[str, tuple[str, str]] = {}
    crops_per_step: int = Field(gt=0)

    @model_validator(mode="after")
    def _halves_are_of_organs(self) -> Self:
        unknown = sorted(set(self.halves) - set(self.organs))
        if unknown:
            raise ValueError(f"'halves' has organs that 'organs' does not list: {unknown}")
        return self

    def annotated(self) -> list[str]:
        """Return the organs that this data set can annotate."""
        return [*self.organs, *(half for pair in self.halves.values() for half in pair)]


class PhantomsConfig(_Strict):
    """A procedural cohort: ``count`` phantoms from ``first_seed`` on, sites taken in turn; ``organs`` are annotated."""

    kind: Literal["phantoms"]
    name: str
    count: int = Field(gt=0)
    first_seed: int = Field(ge=0)
    sites: tuple[str, ...] = Field(min_length=1)
    organs: tuple[str, ...] = Field(min_length=1)
    shape: tuple[int, int, int]
    crops_per_step: int = Field(gt=0)

    @model_validator(mode="after")
    def _phantoms_have_them(self) -> Self:
        from fseft_edge.phantom import ORGANS, SITES  # noqa: PLC0415 - needed for phantom plans only

        unknown = sorted((set(self.sites) - set(SITES)) | (set(self.organs) - set(ORGANS)))
        if unknown:
            raise ValueError(f"phantoms have no {unknown}; sites are {list(SITES)}, organs {list(ORGANS)}")
        return self

    def annotated(self) -> list[str]:
        """Return the organs that this cohort annotates."""
        return list(self.organs)


DataSetConfig = Annotated[FilesConfig | PhantomsConfig, Field(discriminator="kind")]


class PretrainingConfig(_Strict):
    """Everything that determines a pre-trained encoder.

    Attributes:
        organs: the classes of the head, in order; each data set annotates some of them.
    """

    name: str
    seed: int
    organs: tuple[str, ...] = Field(min_length=1, max_length=MOST_ORGANS)
    encoder: EncoderConfig
    preprocessing: Preprocessing
    schedule: ScheduleConfig
    dataset: tuple[DataSetConfig, ...] = Field(min_length=1)

    @property
    def crops_per_step(self) -> int:
        """Crops of an optimiser step, of all data sets and processes together."""
        return sum(dataset.crops_per_step for dataset in self.dataset)

    @model_validator(mode="after")
    def _organs_are_consistent(self) -> Self:
        for dataset in self.dataset:
            split = dataset.halves if isinstance(dataset, FilesConfig) else {}
            unknown = sorted(set(dataset.annotated()) - set(self.organs) - set(split))
            if unknown:
                raise ValueError(f"data set {dataset.name!r} has organs that 'organs' does not list: {unknown}")
            if split and self.preprocessing.axcodes[0] != "R":
                raise ValueError("'halves' needs a grid whose x axis points to the patient's right: axcodes 'R..'")
        never = sorted(set(self.organs) - {organ for dataset in self.dataset for organ in dataset.annotated()})
        if never:
            raise ValueError(f"no data set annotates {never}")
        return self

    @model_validator(mode="after")
    def _network_fits(self) -> Self:
        self.encoder.check_edges((*self.encoder.window, self.schedule.crop))
        if len(self.schedule.deep_supervision) > self.encoder.levels - 1:
            raise ValueError("'deep_supervision' has more weights than the encoder has coarser levels")
        return self

    @model_validator(mode="after")
    def _mirrors_make_sense(self) -> Self:
        named = {organ for pair in self.schedule.pairs for organ in pair}
        if named - set(self.organs):
            raise ValueError(f"'pairs' has organs that 'organs' does not list: {sorted(named - set(self.organs))}")
        if "x" in self.schedule.flips:
            if self.preprocessing.axcodes[0] not in "RL":
                raise ValueError("'flips' along x needs a grid whose x axis runs from left to right")
            self.schedule.mirrored(self.organs)
        return self


def read_pretraining_config(path: Path) -> PretrainingConfig:
    """Read and check a plan.

    Raises:
        UnreadableFileError: the file is missing or no TOML.
        InputError: a key is missing, unknown or of the wrong type.
    """
    return read_toml(path, PretrainingConfig, remedy="See docs/pretrain.md for the keys of a plan.")


def _other_side(organ: str) -> str:
    """Return the name of an organ's other side: ``right`` for ``left`` and the reverse; itself where it has none."""
    swapped = {"right": "left", "left": "right"}
    return "_".join(swapped.get(word, word) for word in organ.split("_"))


def case_names(plan: FilesConfig, root: Path) -> list[str] | None:
    """Return the case names that ``plan.cases`` points to, or None for all."""
    if plan.cases is None:
        return None
    file_name, _, key = plan.cases.rpartition(":")
    path = root / file_name
    try:
        names = json.loads(path.read_text(encoding="utf-8"))[key]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UnreadableFileError(
            f"{path} has no list of cases under {key!r}.", remedy="Write 'cases' as FILE.json:KEY."
        ) from error
    return [str(name) for name in names]
