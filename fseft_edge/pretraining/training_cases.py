"""Training cases of pre-training and fine-tuning: annotated scans on the encoder's grid, and random augmented crops."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from fseft_edge.adaptation.augmentation import random_turn, restyle
from fseft_edge.pretraining.config import FilesConfig, Labels, PhantomsConfig, PretrainingConfig, case_names
from fseft_edge.runtime.errors import LabelError
from fseft_edge.runtime.scans.annotated import find_pairs, read_pair
from fseft_edge.runtime.scans.annotation import Annotation, annotation_on
from fseft_edge.runtime.scans.grid import Grid
from fseft_edge.runtime.scans.nifti import log_warnings
from fseft_edge.runtime.scans.preprocessing import Preprocessing
from fseft_edge.runtime.scans.volume import LabelMap, Volume
from fseft_edge.runtime.system.progress import Progress

Crop = tuple[Tensor, Tensor, Tensor, Tensor]
"""One crop of a :class:`Batch`: image with erased boxes, image without erased boxes, targets, task mask."""

_CENTRES_PER_ORGAN = 2000
_AIR_LEVEL = 0.05


@dataclass(frozen=True)
class TrainingCase:
    """An annotated scan on the encoder's grid.

    Attributes:
        image: image values, float16 ``[X, Y, Z]``, scaled to 0..1.
        organ_bits: organ masks, int32 ``[X, Y, Z]``; bit ``k`` stands for organ ``k``, so organs may overlap.
        task_mask: bool ``[K]``; True for each organ that is annotated in this scan.
        centres: voxel positions ``[m, 3]`` around which crops are drawn. There is one array per organ that is present;
            the last array contains positions anywhere outside air.
    """

    image: NDArray[np.float16]
    organ_bits: NDArray[np.int32]
    task_mask: NDArray[np.bool_]
    centres: tuple[NDArray[np.int64], ...]


@dataclass(frozen=True)
class Batch:
    """The crops of one training step.

    Attributes:
        image: images ``[n, 1, X, Y, Z]``; boxes are erased in some crops.
        clean: the images ``[n, 1, X, Y, Z]`` without erased boxes.
        targets: organ masks ``[n, K, X, Y, Z]``, 0 or 1.
        task_mask: ``[n, K]``; 1 for each organ that is annotated in a crop's scan, else 0.
    """

    image: Tensor
    clean: Tensor
    targets: Tensor
    task_mask: Tensor

    def on(self, device: torch.device) -> Batch:
        """Return the batch with its tensors on a device."""
        return Batch(*(part.to(device) for part in (self.image, self.clean, self.targets, self.task_mask)))


def load_cohorts(config: PretrainingConfig, root: Path, progress: Progress) -> list[list[TrainingCase]]:
    """Return the cases of every data set, in the order of the configuration.

    Args:
        config: the configuration that lists the data sets.
        root: folder that the paths in the configuration are relative to.
        progress: display for the progress.

    Raises:
        LabelError: a data set contains no cases.
        UnreadableFileError: a listed case or the list of cases is missing.
        InputError: an image or an annotation cannot be used.
    """
    cohorts: list[list[TrainingCase]] = []
    for dataset in config.dataset:
        cohort: list[TrainingCase] = []
        scans = _phantom_scans(dataset) if isinstance(dataset, PhantomsConfig) else _file_scans(dataset, root)
        with progress.task(f"read {dataset.name}", len(scans)) as task:
            for volume, labels, label_values in scans:
                partial = isinstance(dataset, FilesConfig) and dataset.partial
                halves = dataset.halves if isinstance(dataset, FilesConfig) else {}
                cohort.append(
                    prepare_case(
                        volume,
                        labels,
                        label_values,
                        config.organs,
                        config.preprocessing,
                        partial=partial,
                        halves=halves,
                    )
                )
                task.advance(1)
        if not cohort:
            raise LabelError(
                f"The data set {dataset.name!r} contains no cases.",
                remedy="Correct 'images' and 'cases' of this data set in the configuration.",
            )
        cohorts.append(cohort)
    return cohorts


class _Scans:
    """A sequence of known length of (volume, labels, label values of each organ), which reads one scan at a time."""

    def __init__(self, size: int, make: Iterator[tuple[Volume, Annotation, Mapping[str, Labels]]]) -> None:
        self._size, self._make = size, make

    def __len__(self) -> int:
        return self._size

    def __iter__(self) -> Iterator[tuple[Volume, Annotation, Mapping[str, Labels]]]:
        return self._make


def _file_scans(dataset: FilesConfig, root: Path) -> _Scans:
    values, organs = dataset.label_values()
    pairs = find_pairs(root / dataset.images, root / dataset.labels, case_names(dataset, root))

    def read() -> Iterator[tuple[Volume, Annotation, Mapping[str, Labels]]]:
        for pair in pairs:
            volume, labels = pair.scan.read(), read_pair(pair, organs)
            log_warnings(pair.scan.name, volume.warnings)
            yield volume, annotation_on(volume, labels), values

    return _Scans(len(pairs), read())


def _phantom_scans(dataset: PhantomsConfig) -> _Scans:
    from fseft_edge.phantom import ORGANS, SITES, phantom  # noqa: PLC0415 - only phantom data sets need the import

    def make() -> Iterator[tuple[Volume, Annotation, Mapping[str, Labels]]]:
        for number in range(dataset.count):
            site = SITES[dataset.sites[number % len(dataset.sites)]]
            scan = phantom(dataset.first_seed + number, shape=dataset.shape, site=site)
            yield scan.volume, scan.labels, {organ: ORGANS.index(organ) + 1 for organ in dataset.organs}

    return _Scans(dataset.count, make())


def prepare_case(
    volume: Volume,
    labels: Annotation,
    label_values: Mapping[str, Labels],
    organs: Sequence[str],
    preprocessing: Preprocessing,
    *,
    partial: bool,
    halves: Mapping[str, tuple[str, str]] | None = None,
) -> TrainingCase:
    """Return an annotated scan on the encoder's grid.

    Args:
        volume: the CT.
        labels: the annotation of the CT, on the lattice of the CT.
        label_values: label value, or label values, of each organ in the annotation.
        organs: names of all organs, at most 31, in the order of the bits of :attr:`TrainingCase.organ_bits`.
        preprocessing: preprocessing of the encoder.
        partial: True if an organ without voxels in the annotation was not contoured; False if it is absent.
        halves: for each organ to split in two, the names of its right half and its left half.
    """
    grid = Grid.of(volume, preprocessing)
    image = grid.section(volume, 0, grid.shape[2])
    bits = np.zeros(grid.shape, np.int32)
    task_mask = np.zeros(len(organs), np.bool_)
    for organ, values in label_values.items():
        mask = _organ(labels, values)
        if partial and not mask.any():
            continue
        on_grid = _filled(grid.occupancy(mask))
        if organ in organs:
            _mark(bits, task_mask, on_grid, organs.index(organ))
        if halves and organ in halves and on_grid.any():
            for half, name in zip(_split_halves(on_grid, image > _AIR_LEVEL), halves[organ], strict=True):
                if half.any() or not partial:
                    _mark(bits, task_mask, half, organs.index(name))
    random = np.random.default_rng(int(bits.sum(dtype=np.int64) % 2**32))
    centres = [_some_positions(bits & np.int32(1 << bit) != 0, random) for bit in range(len(organs))]
    centres.append(_some_positions(image > _AIR_LEVEL, random))
    return TrainingCase(image.astype(np.float16), bits, task_mask, tuple(c for c in centres if len(c)))


def _organ(labels: Annotation, values: Labels) -> NDArray[np.bool_] | NDArray[np.float32]:
    """Return the share of each voxel that an organ with these label values fills, ``[X, Y, Z]``."""
    if isinstance(labels, LabelMap):
        return np.isin(labels.array, values)
    shares = np.zeros(labels.shape, np.float32, order="F")
    for value in [values] if isinstance(values, int) else values:
        np.maximum(shares, labels.shares(value), out=shares)
    return shares


def _filled(occupancy: NDArray[np.float32]) -> NDArray[np.bool_]:
    """Return the voxels with an occupancy above 0.5; for a very thin organ, above half of its largest occupancy."""
    half: NDArray[np.bool_] = occupancy > 0.5
    return half if half.any() else occupancy > 0.5 * occupancy.max()


def _mark(organ_bits: NDArray[np.int32], task_mask: NDArray[np.bool_], region: NDArray[np.bool_], bit: int) -> None:
    organ_bits[region] |= np.int32(1 << bit)
    task_mask[bit] = True


def _split_halves(region: NDArray[np.bool_], body: NDArray[np.bool_]) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Return the patient's right part and left part of an organ on the midline, or of a pair of organs.

    The x axis of the grid points to the patient's right (RAS+). The cut is the middle of the organ's extent. A region
    that lies wholly on one side of the body's median plane is one organ of a pair whose other organ is missing. Such a
    region is not cut.
    """
    extent = np.flatnonzero(region.any(axis=(1, 2)))
    first, last = int(extent[0]), int(extent[-1])
    voxels = np.cumsum(body.sum(axis=(1, 2)))
    median = int(np.searchsorted(voxels, voxels[-1] / 2))
    cut = (first + last + 1) // 2 if first <= median <= last else median
    right, left = region.copy(), region.copy()
    right[:cut] = False
    left[cut:] = False
    return right, left


def _some_positions(region: NDArray[np.bool_], random: np.random.Generator) -> NDArray[np.int64]:
    flat = np.flatnonzero(region)
    if len(flat) > _CENTRES_PER_ORGAN:
        flat = random.choice(flat, _CENTRES_PER_ORGAN, replace=False)
    return np.stack(np.unravel_index(flat, region.shape), axis=1)


def draw_batch(
    config: PretrainingConfig, cohorts: list[list[TrainingCase]], step: int, own: slice = slice(None)
) -> Batch:
    """Return the crops of a training step.

    The crops depend only on the seed and on the number of the step, so a resumed run uses the crops of a run without a
    break.

    Args:
        config: data sets, crops and seed.
        cohorts: the cases of every data set.
        step: number of the step, from 0.
        own: slice of the step's crops to return. The crops of all data sets are in the order of the configuration.
    """
    sources = [
        cohort for dataset, cohort in zip(config.dataset, cohorts, strict=True) for _ in range(dataset.crops_per_step)
    ]
    schedule = config.schedule
    order = schedule.mirrored(config.organs) if "x" in schedule.flips else None

    def drawn(cohort: Sequence[TrainingCase], random: np.random.Generator) -> Crop:
        spacing = config.preprocessing.spacing
        return random_crop(cohort, schedule.crop, random, spacing=spacing, flips=schedule.flips, mirrored=order)

    if schedule.random == "crop":
        slots = range(len(sources))[own]
        return batch_of([drawn(sources[slot], np.random.default_rng([config.seed, step, slot])) for slot in slots])
    random = np.random.default_rng([config.seed, step])
    return batch_of([drawn(cohort, random) for cohort in sources][own])


def batch_of(crops: Sequence[Crop]) -> Batch:
    """Return a batch of crops of equal size."""
    image, clean, targets, task_mask = (torch.stack(part) for part in zip(*crops, strict=True))
    return Batch(image, clean, targets, task_mask)


def random_crop(
    cohort: Sequence[TrainingCase],
    edge: int,
    random: np.random.Generator,
    *,
    spacing: tuple[float, float, float],
    flips: Sequence[str] = (),
    mirrored: Sequence[int] | None = None,
) -> Crop:
    """Return an augmented crop of a random case.

    Args:
        cohort: the cases to choose from.
        edge: edge of the crop in grid voxels.
        random: generator for all random choices.
        spacing: voxel spacing of the grid in mm.
        flips: axes along which half of the crops are flipped.
        mirrored: order of the organs after a flip along x, in which right and left organs change places.
    """
    case = cohort[int(random.integers(len(cohort)))]
    group = case.centres[-1] if random.random() < 0.25 else case.centres[random.integers(len(case.centres))]
    centre = group[random.integers(len(group))] + random.uniform(-edge / 4, edge / 4, 3)
    turn = random_turn(random, spacing)
    flipped = [axis for axis in flips if random.random() < 0.5]
    turn[:, ["xyz".index(axis) for axis in flipped]] *= -1
    position = torch.from_numpy(centre).float()[:, None] + turn @ _lattice(edge)
    clean = _sample_image(case.image, position, edge)
    clean = restyle(clean, random)
    image = _erase_boxes(clean, random) if random.random() < 0.5 else clean
    order = list(mirrored) if mirrored is not None and "x" in flipped else list(range(len(case.task_mask)))
    shifts = torch.tensor(order, dtype=torch.int32)[:, None, None, None]
    targets = ((_sample_organs(case.organ_bits, position, edge)[None] >> shifts) & 1).float()
    return image[None], clean[None], targets, torch.from_numpy(case.task_mask[order]).float()


def _lattice(edge: int) -> Tensor:
    axis = torch.arange(edge, dtype=torch.float32) - (edge - 1) / 2
    return torch.stack(torch.meshgrid(axis, axis, axis, indexing="ij")).flatten(1)


def _sample_image(image: NDArray[np.float16], position: Tensor, edge: int) -> Tensor:
    size = torch.tensor(image.shape)
    low = torch.minimum((position.amin(1).floor().long() - 1).clamp_min(0), size - 1)
    high = torch.minimum((position.amax(1).ceil().long() + 2).clamp_min(1), size)
    near = image[tuple(slice(int(a), max(int(a) + 1, int(b))) for a, b in zip(low, high, strict=True))]
    extent = torch.tensor(near.shape, dtype=torch.float32)[:, None]
    normalised = ((2 * (position - low[:, None]) + 1) / extent - 1).flip(0).T.reshape(1, edge, edge, edge, 3)
    source = torch.from_numpy(near.astype(np.float32))[None, None]
    return F.grid_sample(source, normalised, padding_mode="zeros", align_corners=False)[0, 0]


def _sample_organs(organ_bits: NDArray[np.int32], position: Tensor, edge: int) -> Tensor:
    nearest = position.round().long()
    size = torch.tensor(organ_bits.shape)[:, None]
    inside = ((nearest >= 0) & (nearest < size)).all(0)
    x, y, z = torch.minimum(nearest.clamp_min(0), size - 1)
    bits = torch.from_numpy(organ_bits).flatten()[(x * organ_bits.shape[1] + y) * organ_bits.shape[2] + z]
    return torch.where(inside, bits, 0).reshape(edge, edge, edge)


def _erase_boxes(image: Tensor, random: np.random.Generator) -> Tensor:
    erased = image.clone()
    for _ in range(random.integers(1, 5)):
        low = random.integers(0, np.array(image.shape) - 8)
        high = low + random.integers(6, 20, 3)
        erased[low[0] : high[0], low[1] : high[1], low[2] : high[2]] = float(random.random())
    return erased
