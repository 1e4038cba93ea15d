"""The wall of the trunk and adjacent structures: skin, fat, muscle, diaphragm, lungs, heart, spine, ribs, pelvis."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from fseft_edge.phantom.canvas import Canvas, Field, Region, ellipsoid, smooth_path, tube, waves

SPINE_Y = -62.0  # centre of the vertebral bodies
_CANAL_Y = SPINE_Y - 27.0
_BODY_CENTRE_Y = -12.0  # the back muscles make the posterior wall thicker
_EXPONENT = 2.35  # exponent of the superellipse that describes an axial cross-section of the trunk


@dataclass(frozen=True)
class Trunk:
    """Fields for positioning structures relative to the wall of the trunk, each `[x, y, z]` in one region.

    Attributes:
        region: region in which the fields were computed.
        wall: distance to the surface of the cavity, mm, negative inside.
        level: 0 on the axis of the trunk, 1 on the surface of the cavity.
        outer: distance to the outer surface of the muscle wall, mm, negative inside.
        below_diaphragm: height relative to the diaphragm, mm, positive above and negative below.
    """

    region: Region
    wall: Field
    level: Field
    outer: Field
    below_diaphragm: Field

    def crop(self, region: Region) -> Trunk:
        """Return these fields in a region of the canvas."""
        box = region.box
        return replace(
            self,
            region=region,
            wall=self.wall[box],
            level=self.level[box],
            outer=self.outer[box],
            below_diaphragm=self.below_diaphragm[box],
        )


def trunk_of(canvas: Canvas) -> Trunk:
    """Return the fields of the trunk on the whole canvas."""
    patient, region = canvas.patient, canvas.whole
    rng = patient.rng("wall")
    x, y, z = region.x, region.y, region.z
    half_x, half_y = patient.cavity
    waist = rng.uniform(0.02, 0.07)
    girth = 1 - np.float32(waist) * np.exp(-np.square((z + 45) / 45)) - np.square(np.clip(z - 20, 0, None) / 420)
    girth = np.maximum(girth, np.float32(0.35))
    belly = 1 + np.float32(rng.uniform(-0.02, 0.1)) * np.exp(-np.square((z + 70) / 70))
    front = np.where(y > 0, belly, np.float32(1))
    wall, level = _superellipse(x, y, np.float32(half_x) * girth, np.float32(half_y) * girth * front)
    back = patient.wall_mm + 13
    outer, _ = _superellipse(
        x,
        y - np.float32(_BODY_CENTRE_Y),
        np.float32(half_x + patient.wall_mm) * girth,
        np.float32(half_y + back) * girth * (1 + (front - 1) * np.float32(0.95)),
    )
    low = -38 + 42 * np.clip(y / np.float32(half_y), -1, 1)
    height = patient.dome_mm * (0.92 + 0.1 * np.tanh(x / 45) - 0.1 * np.exp(-np.square(x / 25)))
    dome = low + (height - low) * (1 - np.minimum(level, 1.1) ** 8)
    return Trunk(region, wall, level, outer, z - dome)


def _superellipse(x: Field, y: Field, half_x: Field, half_y: Field) -> tuple[Field, Field]:
    """Return the radial distance (mm) to a superellipse, and the level, which is 1 on the superellipse."""
    n = np.float32(_EXPONENT)
    level = (np.abs(x / half_x) ** n + np.abs(y / half_y) ** n) ** (1 / n)
    np.maximum(level, np.float32(1e-3), out=level)
    radius = np.sqrt(np.square(x) + np.square(y))
    return radius - radius / level, level


def paint_body(canvas: Canvas, trunk: Trunk, tissue: dict[str, float]) -> None:
    """Paint skin, subcutaneous fat, muscle wall and visceral fat; in some patients also arms and the table."""
    patient, region = canvas.patient, trunk.region
    rng = patient.rng("body")
    x, y = region.x, region.y
    fat = patient.fat_mm * (1 + 0.25 * waves(region, rng, 260, 2)) * (1 + 0.5 * np.clip((-y - 20) / 90, 0, 1))
    skin = trunk.outer - np.float32(2) - np.maximum(fat, np.float32(3))
    table_y = -(patient.cavity[1] + patient.wall_mm + 25 + 1.5 * patient.fat_mm + 8)
    if rng.random() < 0.8:
        top = np.float32(table_y) + np.square(x) * np.float32(4e-4)
        slab = np.maximum(np.abs(y - top + 6) - 6, np.abs(x) - 215)
        canvas.paint(region, slab, -620.0)
        canvas.paint(region, np.maximum(np.abs(y - top + 1) - 1, np.abs(x) - 215), -150.0)
    if patient.arms_down:
        _paint_arms(canvas, tissue)
    canvas.paint(region, skin, 15.0)
    canvas.paint(region, skin + 2, tissue["fat"])
    streaks = waves(region, rng, 30, 5)
    muscle = tissue["muscle"] - np.float32(25) * np.clip(streaks - 1.0, 0, 1)
    canvas.paint(region, trunk.outer, muscle)
    canvas.paint(region, trunk.wall, tissue["visceral_fat"] + 6 * streaks)
    # fat between the muscle layers of the wall and around the rectus abdominis
    layers = np.maximum(np.abs(trunk.wall - 6) - 1.0, np.abs(x) - 120)
    canvas.paint(region, np.maximum(layers, region.z + 30), tissue["muscle"] - 60.0)


def _paint_arms(canvas: Canvas, tissue: dict[str, float]) -> None:
    """Paint the upper arms beside the trunk."""
    patient = canvas.patient
    side = (patient.cavity[0] + patient.wall_mm + 1.2 * patient.fat_mm + 48) * 1.04
    for sign in (-1.0, 1.0):
        path = np.array([[sign * (side - 10), -25.0, 400.0], [sign * side, -20.0, 60.0], [sign * side, 0.0, -300.0]])
        region = canvas.region([sign * side - 60, -80, -400], [sign * side + 60, 60, 400])
        shape = tube(region, path, (42, 38, 30))
        canvas.paint(region, shape, tissue["fat"])
        canvas.paint(region, shape + 8, tissue["muscle"])
        canvas.paint(region, shape + 27, tissue["cortical_bone"])


def paint_chest(canvas: Canvas, trunk: Trunk, tissue: dict[str, float], *, right: int, left: int) -> None:
    """Paint lungs (label values `right`, `left`) with vessels, heart, oesophagus and, in some patients, an effusion."""
    patient = canvas.patient
    rng = patient.rng("chest")
    region = canvas.region([-170, -120, -70], [170, 130, 400])
    part = trunk.crop(region)
    x, y, z = region.x, region.y, region.z
    middle = np.float32(rng.uniform(-6, 2))
    half = 14 + 22 * np.exp(-np.square((y + 20) / 45)) + 8 * np.exp(-np.square((z - 90) / 60))
    between = half - np.abs(x - middle)
    above = -part.below_diaphragm * np.float32(0.6) + 2
    apex = z - 215 + np.square(part.level) * 60
    space = np.maximum(np.maximum(part.wall + 2.5, above), np.maximum(between, apex))
    vessels = waves(region, rng, 26, 6) * (1.15 - 0.5 * part.level)
    air = tissue["lung"] - 30 * np.clip(y / 90, -1, 1) + 25 * waves(region, rng, 60, 3)
    texture = air + (tissue["lung_vessel"] - air) * np.clip((vessels - 1.35) * 2.5, 0, 1)
    canvas.paint(region, np.maximum(space, -x), texture, label=right)
    canvas.paint(region, np.maximum(space, x), texture, label=left)
    if patient.effusion:
        fluid = np.maximum(space, y - np.float32(-patient.cavity[1] + rng.uniform(22, 45)) + 0.15 * z)
        side = -x if rng.random() < 0.5 else x
        canvas.paint(region, np.maximum(fluid, side), tissue["fluid"])
    centre = (rng.uniform(-32, -20), rng.uniform(18, 30), patient.dome_mm * 0.85 + 46)
    radii = (rng.uniform(50, 60), rng.uniform(42, 50), rng.uniform(54, 64))
    heart = np.maximum(ellipsoid(region, centre, radii), above)
    heart = np.maximum(heart, part.wall + 5)
    canvas.paint(region, (heart - 4), tissue["visceral_fat"])
    canvas.paint(region, heart, tissue["muscle"] + 15)
    septum = 4 - np.abs(x - np.float32(centre[0]) + 0.6 * (y - np.float32(centre[1])) + 6 * np.sin(z / 20))
    chambers = np.maximum(heart + 9 + 3 * waves(region, rng, 40, 3), septum)
    canvas.paint(region, chambers, tissue["heart"])
    path = smooth_path([(-2, -24, 400), (-4, -26, 120), (-12, -26, 50), (-34, -14, patient.dome_mm - 22)], 3)
    gullet = canvas.region(path.min(axis=0) - 12, path.max(axis=0) + 12)
    shape = tube(gullet, path, np.full(len(path), 8.0))
    canvas.paint(gullet, shape, tissue["muscle"], within=0)
    if rng.random() < 0.5:
        canvas.paint(gullet, shape + 5, tissue["gas"] * 0.6, within=0)


def _vertebra_number(z: Field, shift: float) -> tuple[Field, Field]:
    """Return the number of vertebrae above the twelfth thoracic vertebra (at z = shift), and their height in mm.

    The height decreases from 35 mm in the lumbar spine to 25 mm in the upper thoracic spine. The number of vertebrae is
    the integral of 1 / height.
    """
    height = np.clip(30 - np.float32(0.03) * (z - np.float32(shift)), 15, 45)
    return (-np.log(height / 30) / np.float32(0.03)), height


def paint_spine(canvas: Canvas, trunk: Trunk, tissue: dict[str, float], *, label: int) -> None:
    """Paint vertebral bodies, discs, arches and processes with a label; paint the spinal canal without a label."""
    patient = canvas.patient
    rng = patient.rng("spine")
    region = canvas.region([-52, -150, -420], [52, -35, 420])
    x, y, z = region.x, region.y - np.float32(_CANAL_Y), region.z
    number, height = _vertebra_number(z, patient.vertebra_shift)
    offset = (number - np.rint(number)) * height  # mm above the middle of the vertebra
    lumbar = np.clip((height - 25) / 10, 0, 1)
    size = np.float32(rng.uniform(0.94, 1.06))
    disc_edge = np.abs(offset) - (height / 2 - (2 + 2 * lumbar))
    waist = 1.8 * np.cos(offset * (2 * np.pi) / height)
    wide, deep = size * (17 + 7 * lumbar) - waist, size * (15.5 + 2 * lumbar) - waist
    bx, by = x / wide, (region.y - np.float32(SPINE_Y)) / deep
    radius = np.sqrt(np.square(x) + np.square(region.y - np.float32(SPINE_Y))) + np.float32(1e-3)
    body = radius - radius / np.maximum(np.sqrt(np.square(bx) + np.square(by)), np.float32(1e-3))
    canal = np.sqrt(np.square(x / 1.25) + np.square(y)) - np.float32(8.5 * size)
    lamina = np.maximum(np.maximum(canal - 6, np.abs(offset) - 0.36 * height), y - 8)
    spinous = np.maximum(np.abs(x) - 3.5, np.maximum(np.abs(y + 27) - 20, np.abs(offset + 6 - 0.3 * (y + 27)) - 9))
    transverse = np.sqrt(np.square(y + 4 + 0.2 * np.abs(x)) + np.square(offset - 2)) - 5
    transverse = np.maximum(transverse, np.abs(x) - size * 36)
    arch = np.maximum(np.minimum(np.minimum(lamina, spinous), transverse), trunk.crop(region).outer + 5)
    for shape in (body, arch):
        canvas.paint(region, shape, tissue["cortical_bone"] * 0.85, label=label)
        marrow = tissue["trabecular_bone"] + 25 * waves(region, rng, 14, 3)
        canvas.paint(region, (shape + 2.5), marrow, label=label)
    endplate = np.maximum(body + 1, np.abs(disc_edge) - 1.3)
    canvas.paint(region, endplate, tissue["cortical_bone"] * 0.7, label=label)
    canvas.paint(region, np.maximum(body, 1.3 - disc_edge), tissue["disc"], label=label)
    canvas.paint(region, canal, tissue["marrow_canal"] - 20)
    canvas.paint(region, (canal + 3), tissue["marrow_canal"] + 8)


def paint_ribs(canvas: Canvas, trunk: Trunk, tissue: dict[str, float], *, label: int) -> None:
    """Paint twelve pairs of ribs with a label; paint rib cartilage and sternum without a label.

    All ribs are computed as one shape: on the centre line of a rib, the number of the vertebra, corrected by the drop
    of the rib at this angle, is an integer.
    """
    patient = canvas.patient
    rng = patient.rng("ribs")
    region = canvas.region([-185, -145, -130], [185, 150, 400])
    part = trunk.crop(region)
    angle = np.arctan2(np.abs(region.x), -region.y - 20) / np.float32(np.pi)  # 0 posterior, 1 anterior
    number, height = _vertebra_number(region.z, patient.vertebra_shift)
    drop = np.float32(rng.uniform(3.6, 4.4))
    along = number - 0.25 + drop * np.where(angle < 0.72, angle / 0.72, 1 - 1.6 * (angle - 0.72))
    rib = np.clip(np.rint(along), 0, 11)
    end = np.select([rib == 0, rib == 1, rib == 2], [0.34, 0.5, 0.66], 0.76)
    across = (along - rib) * height * np.float32(0.93)
    depth = part.wall - np.float32(4.5)
    section = (np.sqrt(np.square(depth / 3.8) + np.square(across / 6.8)) - 1) * np.float32(4.5)
    section = np.maximum(section, 26 - np.abs(region.x))
    bony = np.maximum(section, (angle - end) * 200)
    soft = np.maximum(np.maximum(section, (end - angle) * 200), 2.0 - rib)
    canvas.paint(region, soft, tissue["cartilage"])
    canvas.paint(region, bony, tissue["cortical_bone"] * 0.9, label=label)
    canvas.paint(region, (bony + 2.2), tissue["trabecular_bone"] + 40, label=label)
    sternum = np.maximum(np.abs(part.wall - 5) - 5.5, np.maximum(np.abs(region.x) - 17, 72 - region.z))
    sternum = np.maximum(sternum, -region.y)
    canvas.paint(region, sternum, tissue["cortical_bone"] * 0.6)
    canvas.paint(region, (sternum + 2), tissue["trabecular_bone"] - 40)


def paint_pelvis(canvas: Canvas, trunk: Trunk, tissue: dict[str, float]) -> None:
    """Paint the wings of the iliac bones along the cavity, and the muscles in front of and beside the spine."""
    patient = canvas.patient
    rng = patient.rng("pelvis")
    for sign in (-1.0, 1.0):
        path = smooth_path(
            [(sign * 27, -58, 5), (sign * 38, -56, -55), (sign * 48, -48, -110), (sign * 66, -12, -190)], 3
        )
        region = canvas.region([min(sign * 5, sign * 105), -100, -220], [max(sign * 5, sign * 105), 20, 30])
        size = rng.uniform(0.85, 1.2)
        canvas.paint(region, tube(region, path, size * np.linspace(7, 24, len(path))), tissue["muscle"])
        flank = ellipsoid(region, (sign * 62, -82, -60), (26 * size, 13, 60))
        canvas.paint(region, flank, tissue["muscle"] - 3)
    region = canvas.region([-160, -130, -420], [160, 120, -95])
    part = trunk.crop(region)
    angle = np.arctan2(np.abs(region.x), -region.y) / np.float32(np.pi)
    crest = np.float32(rng.uniform(-132, -108)) - 38 * np.square((angle - 0.4) / 0.28)
    sheet = np.abs(part.wall + 1 + 6 * np.cos(angle * 9)) - (4 + 5 * np.square(np.clip(0.4 - angle, 0, 1) / 0.25))
    wing = np.maximum(np.maximum(sheet, region.z - crest), np.maximum(0.13 - angle, angle - 0.66) * 200)
    canvas.paint(region, wing, tissue["cortical_bone"])
    canvas.paint(region, (wing + 2.5), tissue["trabecular_bone"])
