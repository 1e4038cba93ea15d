"""Phantoms: the anatomy depends only on the seed, not on lattice, orientation and site."""

from __future__ import annotations

import functools
import itertools

import numpy as np
import pytest
from doubles.errors import refused

from fseft_edge.phantom import ORGANS, SITES, Phantom, Site, phantom
from fseft_edge.runtime.errors import UsageError

SEEDS = (0, 1, 2, 3)

COARSE = (6.0, 6.0, 6.0)
COARSE_SHAPE = (64, 48, 56)
COARSE_VOXEL_ML = 6.0**3 / 1000

# Plausible volumes in ml within the field of view, including the normal variation of adults and enlarged spleens.
PLAUSIBLE_ML = {
    "liver": (900, 2500),
    "spleen": (80, 1000),
    "right_kidney": (90, 320),
    "left_kidney": (90, 320),
    "stomach": (120, 900),
    "pancreas": (40, 160),
    "aorta": (50, 250),
    "right_lung": (700, 4500),
    "left_lung": (700, 4500),
    "spine": (300, 900),
    "ribs": (180, 700),
}


@functools.cache
def scan(seed: int, site: str = "reference") -> Phantom:
    """Return a phantom at 3 mm."""
    return phantom(seed, site=SITES[site])


@functools.cache
def coarse_scan(seed: int) -> Phantom:
    """Return a phantom at 6 mm, which takes an eighth of the time."""
    return phantom(seed, shape=COARSE_SHAPE, spacing=COARSE)


def mask(made: Phantom, organ: str) -> np.ndarray:
    return made.labels.array == ORGANS.index(organ) + 1


def centre(made: Phantom, organ: str) -> np.ndarray:
    affine = made.labels.affine
    return affine[:3, :3] @ np.argwhere(mask(made, organ)).mean(axis=0) + affine[:3, 3]


def interior_mean(made: Phantom, organ: str) -> float:
    """Return the median HU of voxels at least two voxels inside an organ, where there is no partial volume effect."""
    inside = mask(made, organ)
    for axis, step in itertools.product(range(3), (-2, -1, 1, 2)):
        inside = inside & np.roll(mask(made, organ), step, axis)
    return float(np.median(made.volume.array[inside]))


def small(seed: int, affine: np.ndarray, shape: tuple[int, int, int], site: Site = SITES["reference"]) -> Phantom:
    return phantom(seed, shape=shape, affine=affine, site=site)


def centred(matrix: np.ndarray, shape: tuple[int, int, int]) -> np.ndarray:
    affine = np.eye(4)
    affine[:3, :3] = matrix
    affine[:3, 3] = -matrix @ ((np.array(shape) - 1) / 2)
    return affine


def test_same_seed_gives_the_same_bytes() -> None:
    made = phantom(1, shape=COARSE_SHAPE, spacing=COARSE)
    np.testing.assert_array_equal(made.volume.array, coarse_scan(1).volume.array)
    np.testing.assert_array_equal(made.labels.array, coarse_scan(1).labels.array)


def test_different_seeds_give_different_patients() -> None:
    for first, second in itertools.combinations(SEEDS, 2):
        one, other = mask(coarse_scan(first), "liver"), mask(coarse_scan(second), "liver")
        overlap = 2 * (one & other).sum() / (one.sum() + other.sum())
        assert 0.3 < overlap < 0.95


def test_ct_is_int16_hu_with_air_outside_on_the_lattice_of_the_labels() -> None:
    made = scan(3)
    assert made.volume.array.dtype == np.int16
    assert made.labels.array.dtype == np.uint8
    assert made.volume.shape == made.labels.array.shape == (128, 96, 112)
    np.testing.assert_array_equal(made.volume.affine, made.labels.affine)
    corner = made.volume.array[:3, -3:, -3:].astype(float)
    assert abs(corner.mean() + 1000) < 10


@pytest.mark.parametrize("seed", SEEDS)
def test_every_organ_has_a_plausible_volume(seed: int) -> None:
    volumes = {organ: mask(coarse_scan(seed), organ).sum() * COARSE_VOXEL_ML for organ in PLAUSIBLE_ML}
    assert {o: v for o, v in volumes.items() if not PLAUSIBLE_ML[o][0] <= v <= PLAUSIBLE_ML[o][1]} == {}


def test_most_patients_have_a_gallbladder() -> None:
    volumes = [mask(coarse_scan(seed), "gallbladder").sum() * COARSE_VOXEL_ML for seed in SEEDS]
    assert sum(8 < volume < 80 for volume in volumes) >= 3


@pytest.mark.parametrize("seed", SEEDS)
def test_organs_have_anatomical_positions_in_ras_world_coordinates(seed: int) -> None:
    made = coarse_scan(seed)
    at = {organ: centre(made, organ) for organ in ORGANS if mask(made, organ).any()}
    right, anterior, superior = range(3)
    assert at["right_kidney"][right] > at["spine"][right] + 30
    assert at["left_kidney"][right] < at["spine"][right] - 30
    assert at["right_lung"][right] > at["left_lung"][right] + 80
    assert at["liver"][right] > at["stomach"][right] + 40 > at["spleen"][right] + 40
    assert at["aorta"][anterior] > at["spine"][anterior] + 20
    assert at["stomach"][anterior] > at["left_kidney"][anterior]
    assert at["right_lung"][superior] > at["liver"][superior] > at["right_kidney"][superior]


@pytest.mark.parametrize("seed", SEEDS)
def test_labelled_organs_lie_inside_the_body(seed: int) -> None:
    made = coarse_scan(seed)
    # A ray from the front, the right or the left meets tissue (skin and fat) before a label.
    for axis, sign in ((0, 1), (0, -1), (1, -1)):
        tissue = np.moveaxis(made.volume.array > -300, axis, 0)[::sign]
        labelled = np.moveaxis(made.labels.array > 0, axis, 0)[::sign]
        reached = labelled.any(axis=0)
        assert (tissue.argmax(axis=0)[reached] < labelled.argmax(axis=0)[reached]).all()


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_labels_agree_in_every_orientation(order: tuple[int, int, int]) -> None:
    shape = (48, 36, 42)
    straight = small(2, centred(np.diag([8.0, 8.0, 8.0]), shape), shape)
    for signs in itertools.product((1, -1), repeat=3):
        turned_shape = tuple(shape[axis] for axis in order)
        matrix = np.zeros((3, 3))
        for column, (axis, sign) in enumerate(zip(order, signs, strict=True)):
            matrix[axis, column] = 8.0 * sign
        turned = small(2, centred(matrix, turned_shape), turned_shape)
        expected = straight.labels.array.transpose(order)[tuple(slice(None, None, sign) for sign in signs)]
        assert (turned.labels.array != expected).mean() < 1e-4  # rounding, at voxels on a surface


def test_anatomy_does_not_depend_on_spacing_or_field_of_view() -> None:
    coarse = scan(3)
    # Part of the field of view, finer in x and coarser in z: every third voxel in x is a voxel of the coarse lattice.
    affine = coarse.volume.affine.copy()
    affine[:3, 3] += affine[:3, :3] @ (40, 30, 20)
    affine[:3, :3] = np.diag([1.0, 3.0, 6.0])
    fine = small(3, affine, (120, 40, 30))
    expected = coarse.labels.array[40:80, 30:70, 20:80:2]
    assert (fine.labels.array[::3] != expected).mean() < 1e-4


def test_an_oblique_lattice_contains_equal_organs() -> None:
    angle = np.radians(20)
    turn = np.array([[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0], [0, 0, 1]])
    shape = (64, 64, 56)
    oblique = small(3, centred(turn * 6, shape), shape)
    for organ in ("liver", "left_kidney", "spleen"):
        assert mask(oblique, organ).sum() == pytest.approx(mask(coarse_scan(3), organ).sum(), rel=0.03)
        np.testing.assert_allclose(centre(oblique, organ), centre(coarse_scan(3), organ), atol=1.0)


def test_a_lattice_outside_the_patient_contains_air() -> None:
    made = small(0, np.array([[3.0, 0, 0, 900], [0, 3, 0, 900], [0, 0, 3, 0], [0, 0, 0, 1]]), (20, 20, 20))
    assert not made.labels.array.any()
    assert made.volume.array.mean() == pytest.approx(-1000, abs=5)


@pytest.mark.parametrize(
    ("site", "expected"),
    [
        # Typical values: unenhanced liver 50-65 and spleen 40-55 HU; portal venous liver 100-120; arterial aorta > 250.
        ("native", {"liver": (50, 66), "spleen": (40, 56), "aorta": (30, 50), "right_kidney": (22, 42)}),
        ("reference", {"liver": (92, 132), "spleen": (98, 145), "aorta": (120, 180), "right_kidney": (120, 225)}),
        ("arterial", {"liver": (60, 88), "spleen": (90, 145), "aorta": (240, 360), "right_kidney": (60, 230)}),
    ],
)
def test_organs_have_the_values_of_their_contrast_phase(site: str, expected: dict[str, tuple[int, int]]) -> None:
    means = {organ: interior_mean(scan(3, site), organ) for organ in expected}
    assert {o: m for o, m in means.items() if not expected[o][0] <= m <= expected[o][1]} == {}
    assert -950 < interior_mean(scan(3, site), "right_lung") < -750


def test_another_site_changes_values_but_no_labels() -> None:
    for site in ("native", "arterial", "shifted"):
        np.testing.assert_array_equal(scan(3, site).labels.array, scan(3).labels.array)
        assert abs(interior_mean(scan(3, site), "aorta") - interior_mean(scan(3), "aorta")) > 50


def test_calibration_is_scale_then_offset() -> None:
    shape = (48, 36, 40)
    affine = centred(np.diag([8.0, 8.0, 8.0]), shape)
    plain = small(1, affine, shape, Site(noise_hu=0)).volume.array.astype(float)
    shifted = small(1, affine, shape, Site(noise_hu=0, hu_scale=1.1, hu_offset=20)).volume.array
    np.testing.assert_allclose(shifted, np.clip(1.1 * plain + 20, -1024, 3071), atol=1.1)


@pytest.mark.parametrize("noise", [8.0, 30.0])
def test_noise_has_the_sites_standard_deviation_and_is_correlated(noise: float) -> None:
    shape = (64, 48, 56)
    clean = phantom(1, shape=shape, site=Site(noise_hu=0, kernel_fwhm_mm=5)).volume.array.astype(float)
    noisy = phantom(1, shape=shape, site=Site(noise_hu=noise, kernel_fwhm_mm=5)).volume.array
    inside = (clean > -900) & (clean < 3000)  # values that are not clipped at -1024 or 3071
    difference = np.where(inside, noisy - clean, np.nan)
    assert np.nanstd(difference) == pytest.approx(noise, rel=0.03)
    neighbours = np.nanmean(difference[1:] * difference[:-1]) / np.nanvar(difference)
    assert 0.2 < neighbours < 0.9


def test_a_sharp_kernel_gives_steeper_edges_than_a_smooth_kernel() -> None:
    steps = []
    for fwhm in (1.0, 6.0):
        made = phantom(1, shape=(128, 96, 16), site=Site(noise_hu=0, kernel_fwhm_mm=fwhm))
        steps.append(np.abs(np.diff(made.volume.array.astype(float), axis=0)).max())
    assert steps[0] > 1.3 * steps[1]


@pytest.mark.parametrize("settings", [{"noise_hu": -1.0}, {"kernel_fwhm_mm": -1.0}, {"contrast_phase": "late"}])
def test_an_impossible_site_is_refused(settings: dict[str, object]) -> None:
    with refused(UsageError, *settings.values()):
        Site(**settings)  # type: ignore[arg-type]  # the test needs wrong settings
