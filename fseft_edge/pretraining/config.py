"""The pre-training configuration: a TOML file with the network, the schedule and the data sets."""

from __future__ import annotations

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
from fseft_edge.runtime.scans.organs import OrganLabel, organs_of
from fseft_edge.runtime.scans.preprocessing import Preprocessing
from fseft_edge.runtime.system.json_text import parse_json
from fseft_edge.runtime.system.toml_file import read_toml

MOST_ORGANS = 31
"""Largest number of organs: a training case stores each organ as one bit of an int32."""


class _Strict(BaseModel):
    """A table of the configuration.

    The dump of a configuration identifies it in checkpoints and model files. A key that was added after the first
    release is left out of the dump while it has its default, so that an older configuration keeps its identity.
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
    """Settings of the compact encoder (:class:`fseft_edge.runtime.encoder.networks.residual_unet.ResidualUNet`)."""

    architecture: Literal["residual_unet"]
    channels: tuple[int, ...]
    window: tuple[int, int, int]
    gradient_checkpointing: bool = False

    added_keys: ClassVar[frozenset[str]] = frozenset({"gradient_checkpointing"})

    @property
    def settings(self) -> dict[str, JsonValue]:
        """The keyword arguments of the network."""
        return {"channels": list(self.channels)}

    @property
    def levels(self) -> int:
        """Number of levels of the feature pyramid."""
        return len(self.channels) - 1

    @property
    def coarsest_stride(self) -> int:
        """Stride of the bottleneck in grid voxels."""
        return int(2**self.levels)

    def check_edges(self, edges: Sequence[int]) -> None:
        """Raise ValueError if the network cannot compute a crop or window with these edges, in grid voxels."""
        if any(edge % self.coarsest_stride for edge in edges):
            raise ValueError(
                f"'window' and 'crop' must be multiples of {self.coarsest_stride}, the coarsest stride of this encoder"
            )


class SwinUnetrConfig(_Strict):
    """Settings of a SwinUNETR (:class:`fseft_edge.runtime.encoder.networks.swin_unetr.SwinUnetrFeatures`)."""

    architecture: Literal["swin_unetr"]
    feature_size: int = Field(default=48, gt=0, multiple_of=12)
    window: tuple[int, int, int]
    gradient_checkpointing: bool = False

    added_keys: ClassVar[frozenset[str]] = frozenset({"gradient_checkpointing"})

    @property
    def settings(self) -> dict[str, JsonValue]:
        """The keyword arguments of the network."""
        return {"feature_size": self.feature_size}

    @property
    def levels(self) -> int:
        """Number of levels of the feature pyramid."""
        return 5

    @property
    def coarsest_stride(self) -> int:
        """Stride of the bottleneck in grid voxels."""
        return 32

    def check_edges(self, edges: Sequence[int]) -> None:
        """Raise ValueError if the network cannot compute a crop or window with these edges, in grid voxels.

        An edge of 32 is too small: the bottleneck normalises over its voxels and needs more than one voxel.
        """
        if any(edge % self.coarsest_stride or edge < 64 for edge in edges):
            raise ValueError("'window' and 'crop' of a swin_unetr must be multiples of 32 and at least 64")


EncoderConfig = Annotated[ResidualUNetConfig | SwinUnetrConfig, Field(discriminator="architecture")]


Axis = Literal["x", "y", "z"]
_Label = Annotated[int, Field(ge=1)]
Labels = _Label | Annotated[tuple[_Label, ...], Field(min_length=1)]
_Names = Annotated[str, Field(min_length=1)]


class ScheduleConfig(_Strict):
    """Settings of the optimisation: AdamW, linear warm-up, cosine decay to zero.

    Attributes:
        steps: number of training steps.
        crop: edge of the training crops in grid voxels.
        frozen_norm_fraction: share of the steps, at the end of training, in which batch normalisation uses its running
            statistics and does not change them, so that training ends under the conditions of inference.
        deep_supervision: loss weights of the classifiers on levels 1, 2, ...; level 0 has weight 1.
        inpainting: loss weight of restoring the image where boxes were erased; this loss needs no annotation.
        dice: ``crop`` computes the Dice quotient of each crop (the paper's equation 1); ``batch`` computes one quotient
            over the whole batch, for the organs that the batch contains. With short training and small organs, ``crop``
            can keep an organ at empty predictions, because many crops do not contain the organ.
        bfloat16: True computes the network in bfloat16; weights and losses stay float32.
        random: ``step`` draws all crops of a step from one stream of random numbers; ``crop`` gives each crop a stream
            of its own, so that one of several processes does not need to make the crops of the others.
        flips: axes of the grid along which half of the crops are flipped.
        pairs: pairs of organs that change places in a crop flipped along x, in addition to the pairs with ``right``
            and ``left`` in their names.
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
        """Return, for each organ, the index of the organ that replaces it in a crop flipped along x.

        The index of an organ of a pair is the index of the other organ of the pair. Any other organ keeps its index.

        Raises:
            ValueError: an organ of a pair is not listed in ``organs``.
        """
        twins = {organ: other for pair in self.pairs for organ, other in (pair, pair[::-1])}
        others = [twins.get(organ, _other_side(organ)) for organ in organs]
        missing = sorted(set(others) - set(organs))
        if missing:
            raise ValueError(f"'flips' along x needs both organs of each pair, but 'organs' does not list {missing}")
        return [list(organs).index(other) for other in others]


class FilesConfig(_Strict):
    """A data set of CTs and annotations in files.

    Attributes:
        images: folder of the CTs, relative to the data root.
        labels: folder of the annotations, relative to the data root (see
            :func:`fseft_edge.runtime.scans.annotated.find_pairs`). CTs without an annotation are not used.
        cases: ``FILE.json:KEY``, a JSON object whose ``KEY`` lists the names of the cases; None uses all cases.
        organs: label value of each organ in the annotation files, or several values that together form the organ (for
            example a liver and its tumours); or its names in annotations that name their structures, separated by
            ``|``. If the organ's own name is among them, all names that are known for it count too.
        partial: True if an organ without voxels in an annotation was not contoured; the organ then has no loss in that
            case. False if such an organ is absent from the patient.
        halves: organs to split at their own median sagittal plane into ``[right, left]`` extra organs. If the
            configuration's ``organs`` do not list the whole organ, only its halves are trained (for example two kidneys
            that share a label value).
        crops_per_step: number of crops of this data set in every training step.
    """

    kind: Literal["files"]
    name: str
    images: str
    labels: str
    cases: str | None = None
    organs: dict[str, Labels | _Names] = Field(min_length=1)
    partial: bool = False
    halves: dict[str, tuple[str, str]] = {}
    crops_per_step: int = Field(gt=0)

    @model_validator(mode="after")
    def _halves_are_of_organs(self) -> Self:
        unknown = sorted(set(self.halves) - set(self.organs))
        if unknown:
            raise ValueError(f"'halves' names {unknown}, which 'organs' of this data set does not list")
        return self

    def label_values(self) -> tuple[dict[str, Labels], tuple[OrganLabel, ...]]:
        """Return the label values of each organ, and how they are found in annotations.

        Organs with names get label values that no other organ has.

        Raises:
            UsageError: a name of an organ is invalid.
        """
        labels = {organ: values for organ, values in self.organs.items() if not isinstance(values, str)}
        names = {organ: values for organ, values in self.organs.items() if isinstance(values, str)}
        single = sorted(
            {one for values in labels.values() for one in ((values,) if isinstance(values, int) else values)}
        )
        found = organs_of({**{f"value-{value}": value for value in single}, **names})
        return {**labels, **{organ.name: organ.label for organ in found if organ.name in names}}, found

    def annotated(self) -> list[str]:
        """Return the organs that this data set annotates, including halves."""
        return [*self.organs, *(half for pair in self.halves.values() for half in pair)]


class PhantomsConfig(_Strict):
    """A data set of phantoms, which are computed and need no files.

    Attributes:
        count: number of phantoms.
        first_seed: seed of the first phantom; each further phantom has the next seed.
        sites: names of scanners and protocols, used in turn.
        organs: organs that are annotated.
        shape: voxels along the x, y and z axes.
        crops_per_step: number of crops of this data set in every training step.
    """

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
        from fseft_edge.phantom import ORGANS, SITES  # noqa: PLC0415 - only phantom data sets need the import

        unknown = sorted((set(self.sites) - set(SITES)) | (set(self.organs) - set(ORGANS)))
        if unknown:
            raise ValueError(
                f"phantoms have no {unknown}; known sites are {list(SITES)}, known organs are {list(ORGANS)}"
            )
        return self

    def annotated(self) -> list[str]:
        """Return the organs that this data set annotates."""
        return list(self.organs)


DataSetConfig = Annotated[FilesConfig | PhantomsConfig, Field(discriminator="kind")]


class PretrainingConfig(_Strict):
    """The settings that determine a pre-trained encoder.

    Attributes:
        name: name of the model file and of the encoder.
        seed: seed for all random choices.
        organs: the classes of the head, in order; each data set annotates some of these organs.
        encoder: architecture and window of the encoder.
        preprocessing: preprocessing of every scan.
        schedule: settings of the optimisation.
        dataset: the data sets.
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
        """Number of crops of a training step, summed over all data sets and all processes."""
        return sum(dataset.crops_per_step for dataset in self.dataset)

    @model_validator(mode="after")
    def _organs_are_consistent(self) -> Self:
        for dataset in self.dataset:
            split = dataset.halves if isinstance(dataset, FilesConfig) else {}
            unknown = sorted(set(dataset.annotated()) - set(self.organs) - set(split))
            if unknown:
                raise ValueError(f"the data set {dataset.name!r} annotates {unknown}, which 'organs' does not list")
            if split and self.preprocessing.axcodes[0] != "R":
                raise ValueError("'halves' needs a grid whose x axis points to the patient's right: axcodes = 'R..'")
        never = sorted(set(self.organs) - {organ for dataset in self.dataset for organ in dataset.annotated()})
        if never:
            raise ValueError(f"'organs' lists {never}, which no data set annotates")
        return self

    @model_validator(mode="after")
    def _network_fits(self) -> Self:
        self.encoder.check_edges((*self.encoder.window, self.schedule.crop))
        if len(self.schedule.deep_supervision) > self.encoder.levels - 1:
            raise ValueError("'deep_supervision' has more weights than the encoder has levels coarser than level 0")
        return self

    @model_validator(mode="after")
    def _mirrors_make_sense(self) -> Self:
        named = {organ for pair in self.schedule.pairs for organ in pair}
        if named - set(self.organs):
            raise ValueError(f"'pairs' names {sorted(named - set(self.organs))}, which 'organs' does not list")
        if "x" in self.schedule.flips:
            if self.preprocessing.axcodes[0] not in "RL":
                raise ValueError("'flips' along x needs a grid whose x axis is left-right: axcodes = 'R..' or 'L..'")
            self.schedule.mirrored(self.organs)
        return self


def read_pretraining_config(path: str | Path) -> PretrainingConfig:
    """Read and check a pre-training configuration.

    Raises:
        UnreadableFileError: the file is missing or is not TOML.
        InputError: a key is missing, unknown or has a wrong value.
    """
    return read_toml(Path(path), PretrainingConfig, remedy="Correct this key; docs/pretrain.md describes every key.")


def _other_side(organ: str) -> str:
    """Return the organ's name with ``right`` and ``left`` exchanged; a name without either word is unchanged."""
    swapped = {"right": "left", "left": "right"}
    return "_".join(swapped.get(word, word) for word in organ.split("_"))


def case_names(dataset: FilesConfig, root: Path) -> list[str] | None:
    """Return the names of the cases that ``dataset.cases`` lists, or None for all cases.

    Raises:
        UnreadableFileError: the list of cases is missing or unreadable.
    """
    if dataset.cases is None:
        return None
    file_name, _, key = dataset.cases.rpartition(":")
    path = root / file_name
    try:
        names = parse_json(path.read_text(encoding="utf-8"))[key]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UnreadableFileError(
            f"{path} contains no list of cases under the key {key!r}.",
            remedy="Set 'cases' to FILE.json:KEY, where KEY is the key of a list of case names.",
        ) from error
    return [str(name) for name in names]
