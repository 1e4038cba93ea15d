"""The organs of the abdomen, painted in the order of `paint_abdomen`: a later organ covers an earlier organ."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from fseft_edge.phantom.canvas import Canvas, Field, ellipsoid, smooth_path, tube, waves
from fseft_edge.phantom.wall import SPINE_Y, Trunk

Tissue = dict[str, float]


def paint_abdomen(canvas: Canvas, trunk: Trunk, tissue: Tissue, labels: Mapping[str, int]) -> None:
    """Paint bowel, liver, stomach, spleen, gallbladder, kidneys, pancreas, vena cava and aorta, in this order."""
    _paint_bowel(canvas, trunk, tissue)
    _paint_liver(canvas, trunk, tissue, labels["liver"])
    _paint_stomach(canvas, trunk, tissue, labels["stomach"])
    _paint_spleen(canvas, trunk, tissue, labels["spleen"])
    _paint_gallbladder(canvas, tissue, labels["gallbladder"])
    _paint_kidney(canvas, trunk, tissue, labels["right_kidney"], 1.0)
    _paint_kidney(canvas, trunk, tissue, labels["left_kidney"], -1.0)
    _paint_pancreas(canvas, tissue, labels["pancreas"])
    _paint_great_vessels(canvas, tissue, labels["aorta"])


def _paint_bowel(canvas: Canvas, trunk: Trunk, tissue: Tissue) -> None:
    """Paint the colon with gas and faeces, and loops of small bowel, without a label."""
    rng = canvas.patient.rng("bowel")
    half_x, half_y = canvas.patient.cavity
    side = half_x - 34
    drop = rng.uniform(-35, 15)
    colon = smooth_path(
        [
            (side - 8, 0, -175),
            (side, -8, -110),
            (side - 4, 8, -62),
            (side * 0.55, half_y * 0.62, -85 + drop * 0.5),
            (0, half_y * 0.66, -88 + drop),
            (-side * 0.6, half_y * 0.6, -60 + drop * 0.5),
            (-side, 0, -22),
            (-side - 4, -18, -80),
            (-side, -10, -140),
            (-side + 20, 0, -200),
        ],
        5,
    )
    radii = rng.uniform(14, 24, len(colon))
    step = 6
    for first in range(0, len(colon) - 1, step):
        points, width = colon[first : first + step + 1], radii[first : first + step + 1]
        region = canvas.region(points.min(axis=0) - 26, points.max(axis=0) + 26)
        shape = np.maximum(tube(region, points, width), trunk.crop(region).wall + 2)
        gas = np.maximum(shape + 2, points[:, 1].mean() + rng.uniform(-12, 25) - region.y)
        faeces = rng.uniform(-60, 60) + 90 * np.clip(waves(region, rng, 12, 4), -2, 1)
        canvas.paint(region, shape, tissue["bowel_wall"])
        canvas.paint(region, shape + 2, faeces)
        canvas.paint(region, gas, tissue["gas"])
    for _ in range(int(rng.integers(10, 16))):
        loop = [np.array([rng.uniform(-75, 75), rng.uniform(-5, half_y * 0.55), rng.uniform(-190, -75)])]
        heading = rng.normal(size=3) * (1, 0.7, 0.5)
        for _ in range(6):
            heading = heading / np.linalg.norm(heading) + rng.normal(size=3) * (0.6, 0.6, 0.4)
            ahead = loop[-1] + 26 * heading / np.linalg.norm(heading)
            loop.append(np.clip(ahead, (-85, -20, -230), (85, half_y * 0.68, -62)))
        path, radius = smooth_path(np.stack(loop), 3), rng.uniform(9, 14)
        region = canvas.region(path.min(axis=0) - 16, path.max(axis=0) + 16)
        shape = np.maximum(tube(region, path, np.full(len(path), radius)), trunk.crop(region).wall + 3)
        filled = rng.uniform(120, 260) if canvas.patient.oral_contrast and rng.random() < 0.6 else rng.uniform(5, 35)
        canvas.paint(region, shape, tissue["bowel_wall"])
        canvas.paint(region, (shape + 3), filled)


def _paint_liver(canvas: Canvas, trunk: Trunk, tissue: Tissue, label: int) -> None:
    """Paint the liver below the right dome of the diaphragm; its label includes vessels and lesions."""
    patient = canvas.patient
    rng = patient.rng("liver")
    region = canvas.region([-85, -110, -130], [160, 125, 90])
    part = trunk.crop(region)
    x, y, z = region.x, region.y, region.z
    reach = rng.uniform(-62, -22)  # left end of the left lobe, mm
    bulk = ellipsoid(region, (rng.uniform(52, 62), 6, rng.uniform(-10, 0)), (108, 104, rng.uniform(84, 96)))
    under = rng.uniform(-88, -62) + 0.5 * (95 - x) + 0.28 * np.clip(20 - y, 0, None) + 5 * waves(region, rng, 110, 3)
    left = (reach - x) * 0.8 + 0.35 * np.clip(30 - y, -40, None) * np.clip((40 - x) / 60, 0, 1)
    spine = 34 - np.sqrt(np.square(x) + np.square(y - SPINE_Y) * 0.6)
    surface = _rounded(_rounded(bulk, (under - z) * 0.85), _rounded(left, spine))
    surface = surface + 2.5 * waves(region, rng, 70, 3)
    surface = np.maximum(surface, np.maximum(part.wall + 3.0, part.below_diaphragm * 0.7 + 3.0))
    parenchyma = tissue["liver"] * rng.uniform(0.92, 1.08) + 3 * waves(region, rng, 45, 3)
    canvas.paint(region, surface, parenchyma, label=label)
    for _ in range(7):
        begin = np.array([rng.uniform(12, 28), rng.uniform(-25, -5), rng.uniform(-15, 10)])
        end = begin + rng.normal(size=3) * (55, 38, 32) + (35, 15, 6)
        middle = 0.5 * (begin + end) + rng.normal(0, 9, 3)
        path = smooth_path([begin, middle, end], 3)
        branch = canvas.region(path.min(axis=0) - 7, path.max(axis=0) + 7)
        vessel = tube(branch, path, np.linspace(rng.uniform(4.5, 6.5), 1.2, len(path)))
        canvas.paint(branch, vessel, tissue["liver_vessel"], label=None, within=label)
    for _ in range(patient.liver_lesions):
        centre, radius = (rng.uniform(35, 115), rng.uniform(-50, 60), rng.uniform(-35, 35)), rng.uniform(6, 22)
        spot = canvas.region(np.subtract(centre, radius + 6), np.add(centre, radius + 6))
        lesion = ellipsoid(spot, centre, (radius, radius * 0.85, radius * 1.1)) + 1.5 * waves(spot, rng, 20, 3)
        canvas.paint(spot, lesion, tissue["lesion"], label=None, within=label)
    fissure = np.maximum(np.abs(x + 6 + 0.15 * z) - 1.2, 62 - y + 0.4 * z)
    canvas.paint(region, fissure, tissue["visceral_fat"], within=label)


def _rounded(a: Field, b: Field, radius: float = 14.0) -> Field:
    """Return the intersection of two shapes with a rounded edge (a smooth maximum)."""
    blend = np.clip(radius - np.abs(a - b), 0, None)
    rounded: Field = np.maximum(a, b) + np.square(blend) / np.float32(4 * radius)
    return rounded


def _paint_stomach(canvas: Canvas, trunk: Trunk, tissue: Tissue, label: int) -> None:
    """Paint the stomach from the left dome to the midline: wall, content (contrast or food) and gas."""
    patient = canvas.patient
    rng = patient.rng("stomach")
    low = rng.uniform(-75, -45)
    front = patient.cavity[1] * 0.5
    path = smooth_path(
        [
            (-52, -22, patient.dome_mm - 42),
            (-66, 2, -2),
            (-62, front, -30),
            (-32, front + 4, low),
            (6, front - 4, low + 4),
            (30, front - 22, low + 20),
        ],
        3,
    )
    fullness = rng.uniform(0.75, 1.2)
    knots = np.linspace(0, 1, 6)
    radii = fullness * np.interp(np.linspace(0, 1, len(path)), knots, (30, 33, 29, 24, 17, 11))
    region = canvas.region(path.min(axis=0) - 42, path.max(axis=0) + 42)
    part = trunk.crop(region)
    shape = tube(region, path, radii) + 2.0 * waves(region, rng, 60, 3)
    shape = np.maximum(shape, np.maximum(part.wall + 5, part.below_diaphragm * 0.7 + 5))
    content = rng.uniform(90, 250) if patient.oral_contrast else rng.uniform(10, 45)
    mixed = content + 0.1 * content * waves(region, rng, 35, 3)
    canvas.paint(region, shape, tissue["bowel_wall"], label=label)
    canvas.paint(region, (shape + rng.uniform(3, 5)), mixed, label=label)
    if rng.random() < 0.7:
        level = rng.uniform(front * 0.5, front + 25)
        gas = np.maximum(shape + 4, level - region.y)
        canvas.paint(region, gas, tissue["gas"], label=label)


def _paint_spleen(canvas: Canvas, trunk: Trunk, tissue: Tissue, label: int) -> None:
    """Paint the spleen at the left posterior wall, below the left dome of the diaphragm."""
    patient = canvas.patient
    rng = patient.rng("spleen")
    size = rng.uniform(0.88, 1.1) * (rng.uniform(1.3, 1.5) if patient.large_spleen else 1.0)
    centre = (-patient.cavity[0] + 33 * size + 6, rng.uniform(-38, -24), rng.uniform(-8, 6) - 14 * (size - 1))
    turn = rng.uniform(0.3, 0.6)
    rotation = np.array([[np.cos(turn), np.sin(turn), 0], [-np.sin(turn), np.cos(turn), 0], [0, 0, 1]])
    region = canvas.region(np.subtract(centre, 75 * size), np.add(centre, 75 * size))
    part = trunk.crop(region)
    shape = ellipsoid(region, centre, (33 * size, 50 * size, 55 * size), rotation) + 2.5 * waves(region, rng, 55, 3)
    hilum = ellipsoid(region, (centre[0] + 48 * size, centre[1] + 18, centre[2] - 8), (30, 26, 30))
    shape = np.maximum(shape, 0.0 - hilum)
    shape = np.maximum(shape, np.maximum(part.wall + 3, part.below_diaphragm * 0.7 + 3))
    hu = tissue["spleen"] * rng.uniform(0.92, 1.08) + 2 * waves(region, rng, 40, 2)
    canvas.paint(region, shape, hu, label=label)


def _paint_gallbladder(canvas: Canvas, tissue: Tissue, label: int) -> None:
    """Paint the gallbladder below the liver; one patient in ten has no gallbladder."""
    rng = canvas.patient.rng("gallbladder")
    if rng.random() < 0.1:
        return
    centre = (rng.uniform(42, 58), rng.uniform(28, 46), rng.uniform(-50, -38))
    lean = rng.uniform(-0.5, 0.5)
    rotation = np.array([[1, 0, 0], [0, np.cos(lean), np.sin(lean)], [0, -np.sin(lean), np.cos(lean)]])
    size = rng.uniform(0.85, 1.2)
    region = canvas.region(np.subtract(centre, 45), np.add(centre, 45))
    shape = ellipsoid(region, centre, (14 * size, 15 * size, 29 * size), rotation) + waves(region, rng, 35, 3)
    canvas.paint(region, shape, tissue["bowel_wall"], label=label)
    canvas.paint(region, shape + 2, tissue["gallbladder"], label=label)


def _paint_kidney(canvas: Canvas, trunk: Trunk, tissue: Tissue, label: int, side: float) -> None:
    """Paint a kidney with its fat beside the spine; the right kidney (side = 1) is lower than the left (side = -1)."""
    rng = canvas.patient.rng("right_kidney" if side > 0 else "left_kidney")
    centre = np.array([side * rng.uniform(62, 70), rng.uniform(-46, -38), rng.uniform(-72, -52) + (side < 0) * 16])
    size = rng.uniform(0.92, 1.1)
    lean, roll = rng.uniform(0.1, 0.28), rng.uniform(0.4, 0.8)
    # The upper pole leans towards the spine, and the hilum points medially and forward, rotated by `roll`.
    long_axis = np.array([-side * np.sin(lean), 0.12, np.cos(lean)])
    long_axis /= np.linalg.norm(long_axis)
    hilum_axis = np.array([-side * np.cos(roll), np.sin(roll), 0.0])
    hilum_axis -= long_axis * (hilum_axis @ long_axis)
    hilum_axis /= np.linalg.norm(hilum_axis)
    rotation = np.stack([hilum_axis, np.cross(long_axis, hilum_axis), long_axis])
    radii = (29.5 * size, 26.5 * size, 56 * size)
    region = canvas.region(centre - 70, centre + 70)
    wall = trunk.crop(region).wall
    whole = ellipsoid(region, centre, radii, rotation) + 1.5 * waves(region, rng, 45, 3)
    canvas.paint(region, np.maximum(whole - rng.uniform(3, 9), wall + 1), tissue["visceral_fat"])
    notch = ellipsoid(region, centre + hilum_axis * 30 * size, (19 * size, 14 * size, 17 * size), rotation)
    shape = np.maximum(np.maximum(whole, -notch), wall + 4)
    canvas.paint(region, shape, tissue["renal_cortex"], label=label)
    pyramids = np.maximum(shape + 7, -1.5 * waves(region, rng, 24, 4) - 0.5)
    canvas.paint(region, pyramids, tissue["renal_medulla"], label=label)
    pelvis = ellipsoid(region, centre + hilum_axis * 20 * size, (11, 6, 12), rotation)
    canvas.paint(region, pelvis, tissue["fluid"], within=0)
    if canvas.patient.kidney_cyst and side * (rng.random() - 0.5) > 0:
        radius = rng.uniform(7, 20)
        middle = centre - hilum_axis * 20 * size + long_axis * rng.uniform(-30, 30)
        cyst = np.maximum(ellipsoid(region, middle, (radius, radius, radius)), wall + 3)
        canvas.paint(region, cyst, tissue["fluid"], label=label)


def _paint_pancreas(canvas: Canvas, tissue: Tissue, label: int) -> None:
    """Paint the duodenum without a label, and the pancreas from the duodenum across the spine to the spleen."""
    rng = canvas.patient.rng("pancreas")
    rise = rng.uniform(0, 16)
    knots = [
        (34, -4, -66),
        (26, 0, -48),
        (2, 8, -40 + rise * 0.4),
        (-28, -2, -32 + rise * 0.8),
        (-58, -22, -24 + rise),
    ]
    path = smooth_path(np.asarray(knots) + rng.normal(0, 3, (5, 3)), 4)
    size = rng.uniform(0.85, 1.15)
    radii = size * np.interp(np.linspace(0, 1, len(path)), np.linspace(0, 1, 5), (16, 17, 12, 12.5, 10))
    curve = smooth_path([(30, 22, -36), (50, 4, -46), (52, -8, -80), (38, -10, -104), (0, -8, -108)], 3)
    region = canvas.region(curve.min(axis=0) - 16, curve.max(axis=0) + 16)
    duodenum = tube(region, curve, np.full(len(curve), 12.0))
    canvas.paint(region, duodenum, tissue["bowel_wall"], within=0)
    filled = rng.uniform(100, 220) if canvas.patient.oral_contrast else rng.uniform(5, 30)
    canvas.paint(region, duodenum + 3, filled, within=0)
    region = canvas.region(path.min(axis=0) - 20, path.max(axis=0) + 20)
    lobules = waves(region, rng, 16, 4)
    shape: Field = tube(region, path, radii) + 1.3 * lobules
    hu = tissue["pancreas"] * rng.uniform(0.92, 1.08) - 14 * np.clip(lobules, 0, 1)
    canvas.paint(region, shape, hu, label=label)


def _paint_great_vessels(canvas: Canvas, tissue: Tissue, label: int) -> None:
    """Paint the vena cava and the iliac arteries without a label, and the aorta down to its bifurcation."""
    rng = canvas.patient.rng("vessels")
    front = SPINE_Y + 27
    wide = rng.uniform(9.5, 13)
    fork = rng.uniform(-128, -105)
    sway = rng.uniform(-4, 4)
    cava = smooth_path([(14, -34, -260), (20, front, -110), (24, front + 5, -40), (22, -8, 20), (8, 2, 70)], 3)
    region = canvas.region(cava.min(axis=0) - 18, cava.max(axis=0) + 18)
    canvas.paint(
        region, tube(region, cava, rng.uniform(9, 12) * np.linspace(0.9, 1.15, len(cava))), tissue["vena_cava"]
    )
    for side in (-1.0, 1.0):
        iliac = smooth_path([(-5, front + 1, fork), (side * 28, front - 4, fork - 50), (side * 60, -10, fork - 120)], 3)
        region = canvas.region(iliac.min(axis=0) - 10, iliac.max(axis=0) + 10)
        canvas.paint(region, tube(region, iliac, np.full(len(iliac), 6.0)), tissue["aorta"], within=0)
    aorta = smooth_path(
        [
            (-7, front + 2, fork),
            (-12, front + 3, -50),
            (-9 + sway, front + 1, 10),
            (-22, SPINE_Y + 14, 90),
            (-25, -50, 400),
        ]
    )
    region = canvas.region(aorta.min(axis=0) - 18, aorta.max(axis=0) + 18)
    radii = wide * np.interp(np.linspace(0, 1, len(aorta)), (0, 0.4, 1), (0.82, 1.0, 1.15))
    shape = tube(region, aorta, radii)
    canvas.paint(region, shape - 1.2, tissue["muscle"] - 10, within=0)
    canvas.paint(region, shape, tissue["aorta"], label=label)
