"""Contours on planes as the share of each voxel that they fill.

A contour is a closed polygon in a plane and stands for a slab around it, half a slice distance to both sides (PS3.3
section C.8.8.6). The share of a voxel is therefore the share of its pixel, computed exactly.

Which planes belong together: let the step be the smallest distance between neighbouring contoured slices. If all
distances are equal to it, the contours are complete (step 1), or drawn on every second, third, ... slice and
interpolated, if they are at most 15 mm apart. A larger distance separates two pieces of a structure if it has at least
three steps and 10 mm: it is then left empty, with a warning. A smaller one is refused, because contours seem to be
missing there, and neither an empty slice nor an invented one would be what the author of the contours meant; it is left
empty if the caller wants no interpolation. For the same reason nothing is added beyond the first and last contoured
slice of a piece, and nothing between contours that do not overlap.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from fseft_edge.runtime.errors import GeometryError
from fseft_edge.runtime.scans.between_planes import interpolated
from fseft_edge.runtime.scans.lattice import LATTICE_TOLERANCE
from fseft_edge.runtime.scans.polygons import Region
from fseft_edge.runtime.scans.structures import BoxedShare, Lattice

APART_STEPS, APART_MM = 3, 10.0
"""Pieces of a structure are at least this far apart along the slice axis."""

MOST_BETWEEN_MM = 15.0
"""Largest distance in mm between two contours over which a structure is interpolated."""

SLIVER_MM, SLIVER_SHARE = 0.05, 0.05
"""Contours overlap, or one protrudes from another, only if the part has more area than a strip of this width along the
shorter contour, or more than this share of the smaller contour. Coordinates are often rounded to 0.1 mm."""

NO_AREA_MM2 = 1e-6
NEGLIGIBLE = 1e-4
"""A smaller share of a structure outside the scan is not worth a warning."""
MISSING_PIXELS, MISSING_SHARE = 9, 0.1
"""A part is missing on a slice if at least this number of pixels, and this share of what both neighbouring slices have
in common, is empty."""
_SAME_PLANE_MM = 0.05
_REDRAW = (
    "Complete the contours in the program that wrote them, leave the slices between them empty with --no-interpolate, "
    "or leave this structure out."
)
_OTHER_CT = "Give the CT on which the contours were drawn."

_Shares: TypeAlias = tuple[NDArray[np.float64], tuple[int, int]]
"""Shares of a box of pixels of a slice, and the pixel at which the box begins."""
_Outlined: TypeAlias = tuple[NDArray[np.float64], bool]
"""Vertices of a contour within its plane, float64 ``[n, 2]``, and whether it is exclusive."""


@dataclass(frozen=True, eq=False)
class Contour:
    """A closed contour.

    Attributes:
        points: vertices, float64 ``[n, 3]``, RAS+ mm; the last one is joined to the first.
        exclusive: whether contours of its plane are combined by exclusive or (CLOSEDPLANAR_XOR).
    """

    points: NDArray[np.float64]
    exclusive: bool = False


@dataclass(frozen=True)
class Extent:
    """What contours say of the size of a structure without its CT.

    Attributes:
        planes: number of planes with contours.
        spacing_mm: smallest distance between neighbouring planes; None for fewer than two planes.
        volume_ml: area on all planes times ``spacing_mm``; None where this is None.
        warnings: what was left out or assumed, as whole sentences.
    """

    planes: int
    spacing_mm: float | None
    volume_ml: float | None
    warnings: tuple[str, ...]


def share_of(
    contours: Sequence[Contour], lattice: Lattice, name: str = "The structure", *, interpolate: bool = True
) -> tuple[BoxedShare, tuple[str, ...]]:
    """Return the share of each voxel that contours fill, and warnings as whole sentences.

    The planes of the contours must be parallel to two axes of the lattice, whatever their order and direction. Within a
    contour, the even-odd rule holds. Contours of a plane are combined as follows: by exclusive or if they are
    ``exclusive``; otherwise a contour within another one is a hole, separate contours all count, and contours that
    partly overlap are united, with a warning.

    Args:
        contours: the contours of one structure.
        lattice: lattice of the CT.
        name: subject of messages, such as ``ROI 3``.
        interpolate: whether slices between contours on every second (third, ...) slice are filled.

    Raises:
        GeometryError: the contours are not on the slices, lie outside the scan, leave out single slices, or cross all
            over.
    """
    notes = _Notes(name)
    usable = list(_with_area(contours, notes))
    if not usable:
        return BoxedShare.of(np.zeros((0, 0, 0)), (0, 0, 0), lattice.shape), notes.sentences()
    stack = _Stack.of(usable, lattice, name, notes)
    regions = {index: stack.region(index, notes) for index in sorted(stack.planes)}
    planes = {index: region.shares(stack.shape) for index, region in regions.items()}
    _check_within(regions, planes, stack, name, notes)
    step = _step(sorted(regions), stack.distance, name, notes, strict=interpolate)
    if step > 1 and interpolate:
        if step * stack.distance > MOST_BETWEEN_MM:
            raise GeometryError(
                f"{name} has contours {step * stack.distance:.3g} mm apart, which is too far to interpolate between "
                "them.",
                remedy="Contour more slices, or leave the slices between them empty with --no-interpolate.",
            )
        planes |= _filled(regions, planes, step, stack, notes)
        between = len(planes) - len(regions)
        notes.add(
            f"has contours on every {_ordinal(step)} slice only: {between} slice{'s' * (between > 1)} between them "
            "were interpolated"
        )
    elif step > 1:
        notes.add(f"has contours on every {_ordinal(step)} slice only: the slices between them stay empty")
    share = BoxedShare.of_slices(planes, stack.axes, lattice.shape)
    if step == 1 or interpolate:
        _note_missing_parts(np.moveaxis(share.inside, stack.axes[2], 0), notes)
    return share, notes.sentences()


def extent_of(contours: Sequence[Contour], name: str = "The structure") -> Extent:
    """Return the size of a structure as far as it is known without a CT.

    The planes must be parallel to one another. Contours without area are left out. The areas are combined as in
    :func:`share_of`.

    Args:
        contours: the contours of one structure.
        name: subject of warnings.
    """
    notes = _Notes(name)
    usable = list(_with_area(contours, notes))
    if not usable:
        return Extent(0, None, None, notes.sentences())
    centred = np.concatenate([contour.points - contour.points.mean(axis=0) for contour in usable])
    axes = np.linalg.eigh(centred.T @ centred)[1][:, ::-1]  # the direction with the smallest extent is the last one
    placed = [contour.points @ axes for contour in usable]
    heights = np.array([float(points[:, 2].mean()) for points in placed])
    order = np.argsort(heights, kind="stable")
    plane = np.empty(len(order), int)
    plane[order] = np.cumsum(np.diff(heights[order], prepend=heights[order[0]]) > _SAME_PLANE_MM)
    groups: dict[int, list[_Outlined]] = defaultdict(list)
    for index, points, contour in zip(plane, placed, usable, strict=True):
        groups[int(index)].append((points[:, :2], contour.exclusive))
    area = sum(_combined(group, np.ones(2), notes).area() for group in groups.values())
    if len(groups) < 2:
        return Extent(len(groups), None, None, notes.sentences())
    gaps = np.diff(heights[order])
    gaps = gaps[gaps > _SAME_PLANE_MM]
    spacing = float(np.median(gaps[gaps < 1.5 * gaps.min()]))  # the smallest one, but for rounding
    wide = gaps[gaps > 1.5 * spacing]
    if wide.size:
        notes.add(
            f"has contours {spacing:.3g} mm apart, but {wide.size} distance{'s' * (wide.size > 1)} of up to "
            f"{wide.max():.3g} mm"
        )
    return Extent(len(groups), spacing, area * spacing / 1000, notes.sentences())


class _Notes:
    """What was left out or assumed, counted, as sentences with a common subject."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._said: dict[str, int] = defaultdict(int)

    def add(self, text: str) -> None:
        self._said[text] += 1

    def sentences(self) -> tuple[str, ...]:
        return tuple(
            f"{self._name} {text.format(count=count, s='s' * (count > 1))}." for text, count in self._said.items()
        )


def _with_area(contours: Sequence[Contour], notes: _Notes) -> Iterator[Contour]:
    """Yield the contours that enclose an area."""
    for contour in contours:
        away = contour.points - contour.points[:1]
        across = np.cross(away, np.roll(away, -1, axis=0))
        seen_along = int(np.abs(across).sum(axis=0).argmax())
        # The sum is the area of a contour that does not cross itself; for one that does, it may be 0.
        has_area = abs(float(across[:, seen_along].sum())) > NO_AREA_MM2
        if has_area or (len(away) > 2 and Region.excluding(np.delete(away, seen_along, axis=1)).area() > NO_AREA_MM2):
            yield contour
        else:
            notes.add("has {count} contour{s} of fewer than three points or on a line, without area")


@dataclass(frozen=True, eq=False)
class _Stack:
    """Contours on the slices of a lattice.

    Attributes:
        lattice: lattice of the CT.
        axes: the two lattice axes within a slice, then the slice axis.
        planes: vertices in pixels, float64 ``[n, 2]``, and whether they are exclusive, of the contours on each slice.
    """

    lattice: Lattice
    axes: tuple[int, int, int]
    planes: Mapping[int, list[_Outlined]]

    @classmethod
    def of(cls, contours: Sequence[Contour], lattice: Lattice, name: str, notes: _Notes) -> _Stack:
        """Assign contours to the slices of a lattice by their coordinates.

        Raises:
            GeometryError: a contour is not on a slice, or all are outside the scan.
        """
        into = np.linalg.inv(lattice.affine)
        placed = [contour.points @ into[:3, :3].T + into[:3, 3] for contour in contours]
        thickness = np.max([np.ptp(points, axis=0) for points in placed], axis=0)
        axis = int(thickness.argmin())
        distance = 1 / float(np.linalg.norm(into[axis, :3]))
        if thickness[axis] > 2 * LATTICE_TOLERANCE:
            raise GeometryError(
                f"{name} has a contour that is not parallel to the slices of the scan: its points lie at places that "
                f"are up to {thickness[axis] * distance:.3g} mm apart along the slice axis.",
                remedy=_OTHER_CT,
            )
        heights = [points[:, axis] for points in placed]
        slices = [int(np.rint(height.mean())) for height in heights]
        last = lattice.shape[axis] - 1
        within = [0 <= index <= last for index in slices]
        if not any(within):
            beyond = min(abs(height.mean() - min(max(height.mean(), 0), last)) for height in heights)
            raise GeometryError(
                f"{name} is outside the scan: its nearest contour is {beyond * distance:.3g} mm beyond the "
                f"{'first' if slices[0] < 0 else 'last'} slice along the slice axis.",
                remedy=_OTHER_CT,
            )
        off = max(
            float(np.abs(height - index).max())
            for height, index, inside in zip(heights, slices, within, strict=True)
            if inside
        )
        if off > LATTICE_TOLERANCE:
            raise GeometryError(
                f"{name} has a contour that is {off * distance:.3g} mm from the nearest slice of the scan, but at most "
                f"a tenth of the slice distance, {LATTICE_TOLERANCE * distance:.3g} mm, is allowed.",
                remedy=_OTHER_CT,
            )
        if outside := len(within) - sum(within):
            notes.add(f"has {outside} contour{'s' * (outside > 1)} above or below the scan, which were left out")
        first, second = (other for other in range(3) if other != axis)
        planes: dict[int, list[_Outlined]] = defaultdict(list)
        for contour, points, index, inside in zip(contours, placed, slices, within, strict=True):
            if inside:
                planes[index].append((points[:, [first, second]], contour.exclusive))
        return cls(lattice, (first, second, axis), planes)

    @property
    def shape(self) -> tuple[int, int]:
        """Number of pixels within a slice."""
        return self.lattice.shape[self.axes[0]], self.lattice.shape[self.axes[1]]

    @property
    def spacing(self) -> tuple[float, float]:
        """Pixel spacing within a slice in mm."""
        first, second = (float(np.linalg.norm(self.lattice.affine[:3, axis])) for axis in self.axes[:2])
        return first, second

    @property
    def distance(self) -> float:
        """Distance between slices in mm."""
        return 1 / float(np.linalg.norm(np.linalg.inv(self.lattice.affine)[self.axes[2], :3]))

    def region(self, index: int, notes: _Notes) -> Region:
        """Return the region of the contours on a slice, in pixels."""
        return _combined(self.planes[index], np.array(self.spacing), notes)


def _combined(contours: Sequence[_Outlined], spacing: NDArray[np.float64], notes: _Notes) -> Region:
    """Return the region of all contours of a plane, in pixels.

    Args:
        contours: the contours, in pixels.
        spacing: pixel spacing in mm, float64 ``[2]``.
        notes: gets warnings.
    """
    polygons = [polygon for polygon, _ in contours]
    exclusive = [flag for _, flag in contours]
    if len(polygons) == 1 or any(exclusive):
        if not all(exclusive) and any(exclusive):
            notes.add("has contours of both closed types on {count} slice{s}, which were combined by exclusive or")
        return Region.excluding(*polygons)
    areas = [Region.excluding(polygon).area() * float(spacing.prod()) for polygon in polygons]
    lengths = [
        float(np.linalg.norm((np.roll(polygon, -1, axis=0) - polygon) * spacing, axis=1).sum()) for polygon in polygons
    ]
    groups = list(range(len(polygons)))
    copies: set[int] = set()
    overlapping = False
    for a, b in _pairs_that_meet(polygons):
        if copies & {a, b}:
            continue
        apart = Region.excluding(polygons[a], polygons[b]).area() * float(spacing.prod())
        common = (areas[a] + areas[b] - apart) / 2
        sliver = min(SLIVER_MM * min(lengths[a], lengths[b]), SLIVER_SHARE * min(areas[a], areas[b]))
        if apart <= sliver:
            copies.add(b)
            notes.add("has {count} contour{s} that repeat another one, which were left out")
        elif 0 < common < min(areas[a], areas[b]) - sliver:
            old, new = groups[b], groups[a]
            groups = [new if group == old else group for group in groups]
            overlapping |= common > sliver
    if overlapping:
        notes.add("has contours that partly overlap on {count} slice{s}: they were united")
    kept = [index for index in range(len(polygons)) if index not in copies]
    return Region(tuple(polygons[index] for index in kept), tuple(groups[index] for index in kept))


def _pairs_that_meet(polygons: Sequence[NDArray[np.float64]]) -> Iterator[tuple[int, int]]:
    """Yield the pairs of polygons whose bounding boxes overlap, in their order."""
    low = np.array([polygon.min(axis=0) for polygon in polygons])
    high = np.array([polygon.max(axis=0) for polygon in polygons])
    for a in range(len(polygons) - 1):
        meeting = (low[a] < high[a + 1 :]).all(axis=1) & (low[a + 1 :] < high[a]).all(axis=1)
        yield from ((a, a + 1 + int(b)) for b in np.flatnonzero(meeting))


def _check_within(
    regions: Mapping[int, Region],
    planes: Mapping[int, _Shares],
    stack: _Stack,
    name: str,
    notes: _Notes,
) -> None:
    """Check that the regions are within the slices; a part outside them is a warning."""
    inside = whole = 0.0
    for index, region in regions.items():
        area = float(planes[index][0].sum())
        low, high = region.bounds
        is_within = (low >= -0.5).all() and (high <= np.array(stack.shape) - 0.5).all()
        inside += area
        whole += area if is_within else region.area()
    if whole <= 1e-9:
        notes.add("encloses nothing: its contours run along their own course again, and cancel by the even-odd rule")
    elif inside <= 1e-6 * whole:
        lows, highs = (np.array(bound) for bound in zip(*(region.bounds for region in regions.values()), strict=True))
        beyond = np.maximum(-0.5 - highs, lows - (np.array(stack.shape) - 0.5)) * stack.spacing
        raise GeometryError(
            f"{name} is outside the scan: its contours are at least {beyond.max(axis=1).min():.3g} mm beyond the "
            "border of the slices.",
            remedy=_OTHER_CT,
        )
    elif inside < (1 - NEGLIGIBLE) * whole:
        notes.add(f"is only partly within the slices: {100 * (1 - inside / whole):.2g} % of its area were left out")


def _step(slices: Sequence[int], distance: float, name: str, notes: _Notes, *, strict: bool) -> int:
    """Return the distance in slices between neighbouring contours of one piece.

    Args:
        slices: contoured slices in ascending order.
        distance: distance between slices in mm.
        name: subject of messages.
        notes: gets a warning for empty slices between two pieces.
        strict: whether contours that are missing on single slices are an error. If not, these slices stay empty, with
            a warning.

    Raises:
        GeometryError: contours are missing on single slices.
    """
    gaps = [second - first for first, second in pairwise(slices)]
    if not gaps:
        return 1
    step = min(gaps)
    if len(gaps) == 1 and step >= APART_STEPS and step * distance >= APART_MM:
        step = 1  # two contours far apart do not show a regular distance
    for (first, second), gap in zip(pairwise(slices), gaps, strict=True):
        if gap == step:
            continue
        if (gap < APART_STEPS * step or gap * distance < APART_MM) and strict:
            raise GeometryError(
                f"{name} has contours at irregular distances: from {step} slice{'s' * (step > 1)} between neighbouring "
                f"ones to {gap} slices between the slices {first + 1} and {second + 1}.",
                remedy=_REDRAW,
            )
        between = "slice" if gap == 2 else f"{gap - 1} slices"
        notes.add(
            f"consists of pieces: the {between} between the slices {first + 1} and {second + 1} "
            f"{'has' if gap == 2 else 'have'} no contours and {'stays' if gap == 2 else 'stay'} empty"
        )
    return step


def _filled(
    regions: Mapping[int, Region], planes: Mapping[int, _Shares], step: int, stack: _Stack, notes: _Notes
) -> dict[int, _Shares]:
    """Return the shares of the slices between contours that are one step apart and overlap."""
    from scipy.interpolate import PchipInterpolator  # noqa: PLC0415 - only needed for interpolation

    found: dict[int, _Shares] = {}
    for piece in _pieces(sorted(regions), step):
        if len(piece) < 2:
            continue
        areas = PchipInterpolator(piece, [float(planes[index][0].sum()) for index in piece])
        for first, second in pairwise(piece):
            if not _overlap(planes[first], planes[second]):
                notes.add(
                    f"has contours on the slices {first + 1} and {second + 1} that do not overlap: the slices between "
                    "them stay empty"
                )
                continue
            wanted = list(range(first + 1, second))
            parts = [(index - first) / step for index in wanted]
            between = interpolated(
                (regions[first], regions[second]), parts, areas(wanted).tolist(), stack.spacing, stack.shape
            )
            found.update(zip(wanted, between, strict=True))
    return found


def _overlap(first: _Shares, second: _Shares) -> bool:
    """Return whether two structures on different slices fill a pixel in common."""
    (a, at_a), (b, at_b) = first, second
    low = [max(x, y) for x, y in zip(at_a, at_b, strict=True)]
    high = [min(x + n, y + m) for x, n, y, m in zip(at_a, a.shape, at_b, b.shape, strict=True)]
    if any(start >= end for start, end in zip(low, high, strict=True)):
        return False
    parts = [
        shares[tuple(slice(start - origin, end - origin) for start, end, origin in zip(low, high, at, strict=True))]
        for shares, at in ((a, at_a), (b, at_b))
    ]
    return bool(np.minimum(*parts).any())


def _pieces(slices: Sequence[int], step: int) -> list[list[int]]:
    """Return contoured slices in pieces whose neighbours are one step apart."""
    pieces = [[slices[0]]]
    for first, second in pairwise(slices):
        if second - first == step:
            pieces[-1].append(second)
        else:
            pieces.append([second])
    return pieces


def _note_missing_parts(slices: NDArray[np.float32], notes: _Notes) -> None:
    """Note slices on which a part is empty although it is filled on both neighbouring slices.

    Where one of two organs in a ROI has contours on each second slice only, or lacks one, the contoured slices do not
    show it.

    Args:
        slices: shares of all slices in their order.
        notes: gets the warning.
    """
    count = 0
    for before, here, after in zip(slices, slices[1:], slices[2:], strict=False):
        around = (before > 0.5) & (after > 0.5)
        missing = np.count_nonzero(around & (here == 0))
        count += int(missing >= max(MISSING_PIXELS, MISSING_SHARE * np.count_nonzero(around)))
    if count:
        notes.add(
            f"lacks contours of a part on {count} slice{'s' * (count > 1)}, where the slices on both sides have them: "
            "check these slices"
        )


def _ordinal(number: int) -> str:
    return {2: "second", 3: "third"}.get(number, f"{number}th")
