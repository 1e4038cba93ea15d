"""The pre-training plan: what a TOML file says about the network, the schedule and every data set."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from fseft_edge.runtime.errors import UnreadableFileError
from fseft_edge.runtime.preprocessing import Preprocessing
from fseft_edge.runtime.toml_file import read_toml


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class EncoderPlan(_Strict):
    """Which network is trained (see :func:`fseft_edge.runtime.networks.build_network`)."""

    architecture: Literal["residual_unet"]
    channels: tuple[int, ...]
    window: tuple[int, int, int]


class SchedulePlan(_Strict):
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


class FilesPlan(_Strict):
    """A data set of NIfTI files.

    Attributes:
        images, labels: folders, relative to the data root; an image and its labels share their file name.
        cases: ``FILE.json:KEY``, a JSON object whose ``KEY`` lists the case names; all cases when absent.
        organs: label value of each organ in the annotation files.
        partial: whether an organ that a case's annotation lacks was not contoured (its loss is then masked for
            that case) rather than absent from the patient.
        halves: organ to be split at its own median sagittal plane into ``[right, left]`` extra organs.
        crops_per_step: how many crops of this data set are in every batch.
    """

    kind: Literal["files"]
    name: str
    images: str
    labels: str
    cases: str | None = None
    organs: dict[str, Annotated[int, Field(ge=1)]] = Field(min_length=1)
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


class PhantomsPlan(_Strict):
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


DataSetPlan = Annotated[FilesPlan | PhantomsPlan, Field(discriminator="kind")]


class PretrainingPlan(_Strict):
    """Everything that determines a pre-trained encoder.

    Attributes:
        organs: the classes of the head, in order; each data set annotates some of them.
    """

    name: str
    seed: int
    organs: tuple[str, ...] = Field(min_length=1, max_length=31)
    encoder: EncoderPlan
    preprocessing: Preprocessing
    schedule: SchedulePlan
    dataset: tuple[DataSetPlan, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _organs_are_consistent(self) -> Self:
        for dataset in self.dataset:
            unknown = sorted(set(dataset.annotated()) - set(self.organs))
            if unknown:
                raise ValueError(f"data set {dataset.name!r} has organs that 'organs' does not list: {unknown}")
        stride = 2 ** (len(self.encoder.channels) - 1)
        if any(size % stride for size in (*self.encoder.window, self.schedule.crop)):
            raise ValueError(f"window and crop must be multiples of {stride}, the encoder's coarsest stride")
        if len(self.schedule.deep_supervision) > len(self.encoder.channels) - 2:
            raise ValueError("'deep_supervision' has more weights than the encoder has coarser levels")
        never = sorted(set(self.organs) - {organ for dataset in self.dataset for organ in dataset.annotated()})
        if never:
            raise ValueError(f"no data set annotates {never}")
        return self


def read_plan(path: Path) -> PretrainingPlan:
    """Read and check a plan.

    Raises:
        UnreadableFileError: the file is missing or no TOML.
        InputError: a key is missing, unknown or of the wrong type.
    """
    return read_toml(path, PretrainingPlan, remedy="See docs/pretrain.md for the keys of a plan.")


def case_names(plan: FilesPlan, root: Path) -> list[str] | None:
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
