"""Training cases on the encoder's grid, and random augmented crops of them."""

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
from fseft_edge.runtime.errors import LabelError, UnreadableFileError
from fseft_edge.runtime.scans.grid import Grid
from fseft_edge.runtime.scans.nifti import case_name, list_cases, read_ct, read_label_map
from fseft_edge.runtime.scans.preprocessing import Preprocessing
from fseft_edge.runtime.scans.volume import LabelMap, Volume, check_labels_match
from fseft_edge.runtime.system.progress import Progress

Crop = tuple[Tensor, Tensor, Tensor, Tensor]
"""One crop's part of :class:`Batch`: image, the same before boxes of it were erased, targets, task mask."""

_CENTRES_PER_ORGAN = 2000
_AIR_LEVEL = 0.05


@dataclass(frozen=True)
class TrainingCase:
    """One scan on the grid.

    Attributes:
        image: float16 ``[X, Y, Z]``, scaled to 0..1.
        organs: int32 ``[X, Y, Z]``; bit ``k`` is organ ``k`` of the plan, so organs may overlap.
        task_mask: bool ``[K]``; which organs are annotated here.
        centres: voxel positions ``[m, 3]`` from which crops are drawn: one array per organ present, the last one
            spread over everything that is not air.
    """

    image: NDArray[np.float16]
    organs: NDArray[np.int32]
    task_mask: NDArray[np.bool_]
    centres: tuple[NDArray[np.int64], ...]


@dataclass(frozen=True)
class Batch:
    """Crops of one optimiser step.

    Attributes:
        image: ``[n, 1, X, Y, Z]``, boxes of some crops erased.
        clean: the same before that.
        targets: ``[n, K, X, Y, Z]`` of 0 and 1.
        task_mask: ``[n, K]`` of 0 and 1.
    """

    image: Tensor
    clean: Tensor
    targets: Tensor
    task_mask: Tensor

    def on(self, device: torch.device) -> Batch:
        """Return the batch on a device."""
        return Batch(*(part.to(device) for part in (self.image, self.clean, self.targets, self.task_mask)))


def load_cohorts(plan: PretrainingConfig, root: Path, progress: Progress) -> list[list[TrainingCase]]:
    """Return the cases of every data set of the plan, in the plan's order."""
    cohorts: list[list[TrainingCase]] = []
    for dataset in plan.dataset:
        cohort: list[TrainingCase] = []
        scans = _phantom_scans(dataset) if isinstance(dataset, PhantomsConfig) else _file_scans(dataset, root)
        with progress.task(f"read {dataset.name}", len(scans)) as task:
            for volume, labels, ids in scans:
                partial = isinstance(dataset, FilesConfig) and dataset.partial
                halves = dataset.halves if isinstance(dataset, FilesConfig) else {}
                cohort.append(
                    prepare_case(volume, labels, ids, plan.organs, plan.preprocessing, partial=partial, halves=halves)
                )
                task.advance(1)
        if not cohort:
            raise LabelError(f"Data set {dataset.name!r} has no cases.", remedy="Check 'images' and 'cases'.")
        cohorts.append(cohort)
    return cohorts


class _Scans:
    """A sized, lazy sequence of (volume, labels, label values of each organ)."""

    def __init__(self, size: int, make: Iterator[tuple[Volume, LabelMap, Mapping[str, Labels]]]) -> None:
        self._size, self._make = size, make

    def __len__(self) -> int:
        return self._size

    def __iter__(self) -> Iterator[tuple[Volume, LabelMap, Mapping[str, Labels]]]:
        return self._make


def _file_scans(plan: FilesConfig, root: Path) -> _Scans:
    paths = list_cases(root / plan.images)
    wanted = case_names(plan, root)
    if wanted is not None:
        missing = sorted(set(wanted) - {case_name(path) for path in paths})
        if missing:
            raise UnreadableFileError(
                f"{root / plan.images} lacks {', '.join(missing[:5])}, which {plan.cases} lists.",
                remedy="Add the scans, or take them off the list.",
            )
        paths = [path for path in paths if case_name(path) in set(wanted)]

    def read() -> Iterator[tuple[Volume, LabelMap, Mapping[str, Labels]]]:
        for path in paths:
            volume, labels = read_ct(path), read_label_map(root / plan.labels / path.name)
            check_labels_match(volume, labels)
            yield volume, labels, plan.organs

    return _Scans(len(paths), read())


def _phantom_scans(plan: PhantomsConfig) -> _Scans:
    from fseft_edge.phantom import ORGANS, SITES, phantom  # noqa: PLC0415 - needed for phantom plans only

    def make() -> Iterator[tuple[Volume, LabelMap, Mapping[str, Labels]]]:
        for number in range(plan.count):
            site = SITES[plan.sites[number % len(plan.sites)]]
            scan = phantom(plan.first_seed + number, shape=plan.shape, site=site)
            yield scan.volume, scan.labels, {organ: ORGANS.index(organ) + 1 for organ in plan.organs}

    return _Scans(plan.count, make())


def prepare_case(
    volume: Volume,
    labels: LabelMap,
    ids: Mapping[str, Labels],
    organs: Sequence[str],
    preprocessing: Preprocessing,
    *,
    partial: bool,
    halves: Mapping[str, tuple[str, str]] | None = None,
) -> TrainingCase:
    """Return an annotated scan on the grid.

    Args:
        volume: the CT.
        labels: its annotation, on the same lattice.
        ids: label value of each organ that is annotated.
        organs: all organs, at most 31, in the order of the case's bits.
        preprocessing: the encoder's.
        partial: whether an organ that the annotation lacks was not contoured, rather than absent.
        halves: organs to be split in two, and what the right and the left half are called.
    """
    grid = Grid.of(volume, preprocessing)
    image = grid.section(volume, 0, grid.shape[2])
    bits = np.zeros(grid.shape, np.int32)
    task_mask = np.zeros(len(organs), np.bool_)
    for organ, values in ids.items():
        mask = np.isin(labels.array, values)
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


def _filled(occupancy: NDArray[np.float32]) -> NDArray[np.bool_]:
    """Return the voxels that an organ fills by half; of one too thin to, those that it fills by half of its most."""
    half: NDArray[np.bool_] = occupancy > 0.5
    return half if half.any() else occupancy > 0.5 * occupancy.max()


def _mark(organs: NDArray[np.int32], task_mask: NDArray[np.bool_], region: NDArray[np.bool_], bit: int) -> None:
    organs[region] |= np.int32(1 << bit)
    task_mask[bit] = True


def _split_halves(region: NDArray[np.bool_], body: NDArray[np.bool_]) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Return the patient's (right, left) parts of an organ that straddles the midline, or of a pair of organs.

    The grid's x axis runs to the patient's right (RAS+). The cut is the middle of the organ's extent. What lies
    wholly on one side of the body's median is one of a pair whose other is missing, and is not cut.
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
    plan: PretrainingConfig, cohorts: list[list[TrainingCase]], step: int, own: slice = slice(None)
) -> Batch:
    """Return the crops of a step; they depend on the plan's seed and the step alone, so a resumed run sees the same.

    Args:
        plan: data sets, crops and seed.
        cohorts: the cases of every data set.
        step: number of the step.
        own: which of the step's crops to return; the crops of all data sets stand in the plan's order.
    """
    sources = [
        cohort for dataset, cohort in zip(plan.dataset, cohorts, strict=True) for _ in range(dataset.crops_per_step)
    ]
    schedule = plan.schedule
    order = schedule.mirrored(plan.organs) if "x" in schedule.flips else None

    def drawn(cohort: Sequence[TrainingCase], random: np.random.Generator) -> Crop:
        spacing = plan.preprocessing.spacing
        return random_crop(cohort, schedule.crop, random, spacing=spacing, flips=schedule.flips, mirrored=order)

    if schedule.random == "crop":
        slots = range(len(sources))[own]
        return batch_of([drawn(sources[slot], np.random.default_rng([plan.seed, step, slot])) for slot in slots])
    random = np.random.default_rng([plan.seed, step])
    return batch_of([drawn(cohort, random) for cohort in sources][own])


def batch_of(crops: Sequence[Crop]) -> Batch:
    """Return crops of equal size as one batch."""
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
        cohort: the cases.
        edge: of the crop, in grid voxels.
        random: decides on everything.
        spacing: of the grid, in mm.
        flips: axes along which every second crop is flipped.
        mirrored: the organs' order under a flip along x, where right and left change places.
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
    targets = ((_sample_organs(case.organs, position, edge)[None] >> shifts) & 1).float()
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


def _sample_organs(organs: NDArray[np.int32], position: Tensor, edge: int) -> Tensor:
    nearest = position.round().long()
    size = torch.tensor(organs.shape)[:, None]
    inside = ((nearest >= 0) & (nearest < size)).all(0)
    x, y, z = torch.minimum(nearest.clamp_min(0), size - 1)
    bits = torch.from_numpy(organs).flatten()[(x * organs.shape[1] + y) * organs.shape[2] + z]
    return torch.where(inside, bits, 0).reshape(edge, edge, edge)


def _erase_boxes(image: Tensor, random: np.random.Generator) -> Tensor:
    erased = image.clone()
    for _ in range(random.integers(1, 5)):
        low = random.integers(0, np.array(image.shape) - 8)
        high = low + random.integers(6, 20, 3)
        erased[low[0] : high[0], low[1] : high[1], low[2] : high[2]] = float(random.random())
    return erased
