"""Resampling to the grid and back, on any orientation and lattice, compared with SciPy, torch and MONAI."""

from __future__ import annotations

import itertools
import tracemalloc

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import map_coordinates
from scipy.spatial.transform import Rotation

from fseft_edge.runtime.scans.grid import CROP_MARGIN_MM, Grid
from fseft_edge.runtime.scans.nifti import read_ct
from fseft_edge.runtime.scans.preprocessing import Preprocessing
from fseft_edge.runtime.scans.volume import Volume

ORIENTATIONS = list(itertools.product(itertools.permutations(range(3)), itertools.product([False, True], repeat=3)))
WIDE = (-1e5, 1e5)


def lattice(spacing, angles=(0.0, 0.0, 0.0), origin=(-31.0, 17.0, 240.0)):
    affine = np.eye(4)
    affine[:3, :3] = Rotation.from_euler("xyz", angles, degrees=True).as_matrix() @ np.diag(spacing)
    affine[:3, 3] = origin
    return affine


def stored_differently(array, affine, permutation, flips):
    """Return the same voxels at the same world positions, with axes permuted and then flipped."""
    flipped = tuple(axis for axis in range(3) if flips[axis])
    new_to_old = np.zeros((4, 4))
    new_to_old[3, 3] = 1
    for new, old in enumerate(permutation):
        new_to_old[old, new] = -1 if flips[new] else 1
        new_to_old[old, 3] = array.shape[old] - 1 if flips[new] else 0
    return np.ascontiguousarray(reordered(array, permutation, flipped)), affine @ new_to_old


def reordered(array, permutation, flipped, leading=0):
    order = (*range(leading), *(leading + axis for axis in permutation))
    return np.flip(array.transpose(order), tuple(leading + axis for axis in flipped))


def in_hu(section, window=WIDE):
    return section.astype(np.float64) * (window[1] - window[0]) + window[0]


def whole(grid, volume):
    return grid.section(volume, 0, grid.shape[2])


def carried_back(grid, probabilities, depth=5):
    """Assemble the pieces of ``to_source``, and check that each voxel occurs exactly once."""
    together = np.full((len(probabilities), *grid.source_shape), np.nan, dtype=np.float32)
    cuts = range(0, grid.shape[2], depth)
    for piece in grid.to_source((z, probabilities[..., z : z + depth]) for z in cuts):
        place = [slice(None)] * 4
        place[1 + piece.axis] = slice(piece.start, piece.stop)
        assert np.isnan(together[tuple(place)]).all()
        together[tuple(place)] = piece.probabilities
    assert not np.isnan(together).any()
    return together


def sampled(array, affine, points_affine, shape):
    """Interpolate ``array`` linearly at the voxels of another lattice, through world coordinates (SciPy)."""
    indices = np.indices(shape).reshape(3, -1)
    world = points_affine[:3, :3] @ indices + points_affine[:3, 3:]
    back = np.linalg.inv(affine)
    coordinates = back[:3, :3] @ world + back[:3, 3:]
    values = map_coordinates(array.astype(np.float64), coordinates, order=1, mode="nearest")
    return values.reshape(shape)


def dice(a, b):
    return 2 * (a & b).sum() / (a.sum() + b.sum())


def ellipsoid(shape, affine, centre, radii):
    """Return the voxels whose centres are in an ellipsoid, given in mm relative to the centre of the lattice."""
    indices = np.indices(shape).reshape(3, -1)
    world = affine[:3, :3] @ (indices - (np.array(shape)[:, None] - 1) / 2)
    return ((((world - np.array(centre)[:, None]) / np.array(radii)[:, None]) ** 2).sum(axis=0) <= 1).reshape(shape)


def scans(longest_axis=14):
    return st.fixed_dictionaries(
        {
            "shape": st.tuples(*[st.integers(2, longest_axis)] * 3),
            "spacing": st.tuples(*[st.floats(0.4, 6.0)] * 3),
            "angles": st.tuples(*[st.floats(-20, 20)] * 3),
            "seed": st.integers(0, 2**16),
        }
    )


settings_of_grids = st.builds(
    Preprocessing,
    axcodes=st.sampled_from(["RAS", "LPS", "SAR", "PIR"]),
    spacing=st.tuples(*[st.floats(0.8, 4.0)] * 3),
    antialias=st.booleans(),
    crop_below_hu=st.sampled_from([None, 2950.0]),
)


def random_scan(scan):
    voxels = np.random.default_rng(scan["seed"]).integers(-1000, 3000, scan["shape"]).astype(np.int16)
    return voxels, lattice(scan["spacing"], scan["angles"])


@settings(max_examples=6, deadline=None)  # each example has 48 orientations
@given(scan=scans(longest_axis=7), preprocessing=settings_of_grids)
def test_all_48_orientations_give_equal_grids_and_equal_results_bit_for_bit(scan, preprocessing):
    voxels, affine = random_scan(scan)
    volume = Volume(voxels, affine)
    grid = Grid.of(volume, preprocessing)
    content = whole(grid, volume)
    occupancy = grid.occupancy(voxels > 1500)
    probabilities = np.stack([content, 1 - content])
    back = carried_back(grid, probabilities)
    for permutation, flips in ORIENTATIONS:
        other = Volume(*stored_differently(voxels, affine, permutation, flips))
        flipped = tuple(np.flatnonzero(flips))
        other_grid = Grid.of(other, preprocessing)
        assert other_grid.shape == grid.shape
        np.testing.assert_allclose(other_grid.affine, grid.affine, atol=1e-9)
        np.testing.assert_array_equal(whole(other_grid, other), content)
        np.testing.assert_array_equal(other_grid.occupancy(other.array > 1500), occupancy)
        expected = reordered(back, permutation, flipped, leading=1)
        np.testing.assert_array_equal(carried_back(other_grid, probabilities), expected)


@settings(max_examples=40, deadline=None)
@given(scan=scans(), preprocessing=settings_of_grids, depth=st.integers(1, 20))
def test_sections_equal_the_whole_grid_bit_for_bit(scan, preprocessing, depth):
    voxels, affine = random_scan(scan)
    volume = Volume(voxels, affine)
    grid = Grid.of(volume, preprocessing)
    content = whole(grid, volume)
    cuts = [(z, min(z + depth, grid.shape[2])) for z in range(0, grid.shape[2], depth)]
    np.testing.assert_array_equal(np.concatenate([grid.section(volume, *cut) for cut in cuts], axis=2), content)
    # A section may end before the next required slice, or contain no required slice.
    at_once = carried_back(grid, content[None], depth=grid.shape[2])
    np.testing.assert_array_equal(carried_back(grid, content[None], depth=depth), at_once)


@settings(max_examples=40, deadline=None)
@given(scan=scans(), preprocessing=settings_of_grids, orientation=st.sampled_from(ORIENTATIONS))
def test_resampling_to_the_grid_and_back_agrees_with_scipy(scan, preprocessing, orientation):
    voxels, affine = stored_differently(*random_scan(scan), *orientation)
    preprocessing = preprocessing.model_copy(update={"antialias": False, "hu_window": WIDE, "crop_below_hu": None})
    volume = Volume(voxels, affine)
    grid = Grid.of(volume, preprocessing)
    content = whole(grid, volume)
    np.testing.assert_allclose(in_hu(content), sampled(voxels, affine, grid.affine, grid.shape), atol=0.5)
    probabilities = np.random.default_rng(scan["seed"]).random((1, *grid.shape), dtype=np.float32)
    expected = sampled(probabilities[0], grid.affine, affine, volume.shape)
    np.testing.assert_allclose(carried_back(grid, probabilities)[0], expected, atol=1e-5)


@settings(max_examples=40, deadline=None)
@given(scan=scans(), preprocessing=settings_of_grids)
def test_grid_has_the_centre_of_the_scan_and_the_requested_spacing(scan, preprocessing):
    voxels, affine = random_scan(scan)
    preprocessing = preprocessing.model_copy(update={"crop_below_hu": None})
    grid = Grid.of(Volume(voxels, affine), preprocessing)
    np.testing.assert_allclose(np.linalg.norm(grid.affine[:3, :3], axis=0), preprocessing.spacing)
    assert grid.voxel_volume_mm3 == pytest.approx(np.prod(preprocessing.spacing))
    on_grid = Volume(np.zeros(tuple(max(2, n) for n in grid.shape), np.int16), grid.affine)
    assert on_grid.axcodes == preprocessing.axcodes
    middle_of_scan = affine @ [*(np.array(voxels.shape) - 1) / 2, 1]
    middle_of_grid = grid.affine @ [*(np.array(grid.shape) - 1) / 2, 1]
    np.testing.assert_allclose(middle_of_grid, middle_of_scan, atol=1e-9)
    for axis in grid.axes:
        field_of_view = axis.source_length * axis.source_spacing
        assert axis.length == 1 or abs(axis.length * axis.spacing - field_of_view) <= axis.spacing / 2 + 1e-9


@pytest.mark.parametrize("spacing", [(1.5, 1.5, 1.5), (3.0, 3.0, 3.0), (0.7, 1.1, 2.0)])
def test_linear_intensity_ramp_is_reproduced(spacing):
    affine = lattice((0.9, 1.2, 2.5), angles=(12, -7, 20))
    shape = (24, 20, 16)
    slope_per_mm = np.array([3.0, -5.0, 2.0])

    def ramp(at):
        points = np.indices(at[0]).reshape(3, -1)
        world = at[1][:3, :3] @ points + at[1][:3, 3:]
        return (slope_per_mm @ world).reshape(at[0])

    volume = Volume(ramp((shape, affine)), affine)
    grid = Grid.of(volume, Preprocessing(spacing=spacing, hu_window=WIDE))
    interior = (slice(1, -1),) * 3  # the outermost grid voxels can be outside the outermost scan voxel centres
    np.testing.assert_allclose(
        in_hu(whole(grid, volume))[interior], ramp((grid.shape, grid.affine))[interior], atol=0.1
    )


def test_scan_that_equals_the_grid_is_unchanged():
    voxels = np.random.default_rng(3).integers(-1000, 1500, (12, 11, 10)).astype(np.int16)
    volume = Volume(voxels, lattice((1.5, 1.5, 1.5)))
    grid = Grid.of(volume, Preprocessing(hu_window=(-1024, 1024)))
    np.testing.assert_allclose(grid.affine, volume.affine, atol=1e-12)
    content = whole(grid, volume)
    np.testing.assert_array_equal(content, ((voxels.clip(-1024, 1024) + 1024) / 2048).astype(np.float32))
    np.testing.assert_array_equal(carried_back(grid, content[None])[0], content)


def test_window_is_applied_after_interpolation():
    # The mean of -1000 and 1000 HU is 0 HU; windowing before interpolation would give the mean of -175 and 250.
    voxels = np.repeat(np.array([-1000, 1000, -1000, 1000], np.int16), 4).reshape(4, 2, 2)
    volume = Volume(voxels, lattice((1.0, 1.0, 1.0)))
    grid = Grid.of(volume, Preprocessing(spacing=(4 / 3, 1, 1)))
    np.testing.assert_allclose(whole(grid, volume)[1], 175 / 425, atol=1e-6)


def test_antialiasing_equals_torch_where_the_fields_of_view_coincide():
    voxels = np.random.default_rng(5).integers(-1000, 1500, (24, 18, 30)).astype(np.float32)
    volume = Volume(voxels, lattice((1.0, 1.0, 1.0)))
    grid = Grid.of(volume, Preprocessing(spacing=(3, 2, 1), antialias=True, hu_window=WIDE))
    planes = torch.from_numpy(voxels).permute(2, 0, 1)[:, None]
    expected = torch.nn.functional.interpolate(planes, size=(8, 9), mode="bilinear", antialias=True)
    np.testing.assert_allclose(in_hu(whole(grid, volume)), expected[:, 0].permute(1, 2, 0).numpy(), atol=0.5)


def test_grid_content_equals_monai_on_the_same_lattice():
    from monai.data import MetaTensor  # noqa: PLC0415 - the import takes seconds
    from monai.transforms import Orientation, Spacing, SpatialResample  # noqa: PLC0415 - the import takes seconds

    voxels = np.random.default_rng(6).integers(-1000, 1500, (21, 17, 9)).astype(np.float32)
    affine = lattice((-0.9, 1.3, -4.0), angles=(5, -8, 3))
    volume = Volume(voxels, affine)
    grid = Grid.of(volume, Preprocessing(hu_window=WIDE))
    image = MetaTensor(torch.from_numpy(voxels)[None], affine=torch.from_numpy(affine))
    resample = SpatialResample(mode="bilinear", padding_mode="border", align_corners=False, dtype=torch.float64)
    expected = resample(image, dst_affine=grid.affine, spatial_size=grid.shape)[0].numpy()
    np.testing.assert_allclose(in_hu(whole(grid, volume)), expected, atol=0.5)

    # MONAI aligns the centres of the first voxels, not of the fields of view: the difference is below half a voxel.
    spaced = Spacing((1.5, 1.5, 1.5), padding_mode="border")(Orientation("RAS", labels=None)(image))
    steps = spaced.affine[:3, :3].numpy()
    np.testing.assert_allclose(steps, grid.affine[:3, :3], atol=1e-6)
    offset = np.linalg.solve(steps, spaced.affine[:3, 3].numpy() - grid.affine[:3, 3])
    half_the_change_of_spacing = (np.array([0.9, 1.3, 4.0]) - 1.5) / 2 / 1.5
    rounding_of_length = 0.25
    assert (np.abs(offset - half_the_change_of_spacing) <= rounding_of_length + 1e-6).all()


@pytest.mark.parametrize(
    ("spacing", "grid_spacing", "expected"),
    [
        ((0.8, 0.8, 5.0), 1.5, 0.975),
        ((0.8, 0.8, 5.0), 3.0, 0.985),
        ((3.9, 3.9, 2.5), 1.5, 0.999),
        ((3.9, 3.9, 2.5), 3.0, 0.999),
        ((1.0, 1.0, 1.0), 1.5, 0.999),
        ((1.0, 1.0, 1.0), 3.0, 0.985),
        ((0.7, 0.7, 1.0), 1.5, 0.995),
        ((0.7, 0.7, 1.0), 3.0, 0.985),
    ],
)
def test_smooth_organ_is_kept_by_resampling_to_the_grid_and_back(spacing, grid_spacing, expected):
    affine = lattice(spacing, angles=(6, -9, 14))
    shape = tuple(int(90 / s) for s in spacing)
    organ = ellipsoid(shape, affine, centre=(4, -3, 2), radii=(24, 18, 30))
    grid = Grid.of(Volume(np.zeros(shape, np.int16), affine), Preprocessing(spacing=(grid_spacing,) * 3))
    back = carried_back(grid, grid.occupancy(organ)[None])[0] >= 0.5
    assert dice(back, organ) >= expected


@settings(max_examples=30, deadline=None)
@given(
    spacing=st.tuples(*[st.floats(0.8, 3.0)] * 3),
    grid_spacing=st.floats(1.0, 5.0),
    radius=st.floats(6.0, 18.0),
    centre=st.tuples(*[st.floats(-4, 4)] * 3),
)
def test_occupancy_keeps_the_organ_volume(spacing, grid_spacing, radius, centre):
    affine = lattice(spacing, angles=(6, -9, 14))
    shape = tuple(int(58 / s) for s in spacing)
    organ = ellipsoid(shape, affine, centre, radii=(radius,) * 3)
    grid = Grid.of(Volume(np.zeros(shape, np.int16), affine), Preprocessing(spacing=(grid_spacing,) * 3))
    occupancy = grid.occupancy(organ)
    assert occupancy.min() >= 0
    assert occupancy.max() <= 1 + 1e-6
    on_scan = organ.sum() * np.prod(spacing)
    assert occupancy.sum() * grid.voxel_volume_mm3 == pytest.approx(on_scan, rel=0.03)


def test_empty_and_full_masks_have_no_and_full_occupancy():
    grid = Grid.of(Volume(np.zeros((9, 8, 7), np.int16), lattice((1.0, 1.0, 4.0))), Preprocessing())
    assert not grid.occupancy(np.zeros((9, 8, 7), bool)).any()
    np.testing.assert_allclose(grid.occupancy(np.ones((9, 8, 7), bool)), 1.0, atol=1e-6)


def test_cropped_grid_covers_the_body_and_probabilities_outside_are_zero():
    voxels = np.full((60, 50, 40), -1000, np.int16)
    voxels[20:30, 18:33, 22:35] = 40
    affine = lattice((-1.0, 1.5, 2.0), angles=(3, 2, -4))
    volume = Volume(voxels, affine)
    cropped = Grid.of(volume, Preprocessing(spacing=(1.5, 1.5, 2.0), crop_below_hu=-500, hu_window=WIDE))
    covered = carried_back(cropped, np.ones((1, *cropped.shape), np.float32))[0]
    margins = [int(np.ceil(CROP_MARGIN_MM / s)) for s in (1.0, 1.5, 2.0)]
    expected = np.zeros(voxels.shape, np.float32)
    box = [(20, 30), (18, 33), (22, 35)]
    expected[
        tuple(slice(max(0, a - m), min(n, b + m)) for (a, b), m, n in zip(box, margins, voxels.shape, strict=True))
    ] = 1
    np.testing.assert_array_equal(covered, expected)
    content = in_hu(whole(cropped, volume))
    np.testing.assert_allclose(content, sampled(voxels, affine, cropped.affine, cropped.shape), atol=0.5)
    assert np.prod(cropped.shape) < np.prod(Grid.of(volume, Preprocessing(spacing=(1.5, 1.5, 2.0))).shape) / 4


def test_scan_with_nothing_above_the_threshold_is_not_cropped():
    volume = Volume(np.full((9, 8, 7), -1000, np.int16), lattice((1.5, 1.5, 1.5)))
    assert Grid.of(volume, Preprocessing(crop_below_hu=-500)).shape == (9, 8, 7)


def test_crop_threshold_is_in_hu_not_in_stored_units():
    stored = np.zeros((20, 20, 20), np.int16)
    stored[9:11, 9:11, 9:11] = 1100
    volume = Volume(stored, lattice((5.0, 5.0, 5.0)), intercept=-1024.0)
    assert Grid.of(volume, Preprocessing(spacing=(5, 5, 5), crop_below_hu=0.0)).shape == (6, 6, 6)


@pytest.mark.parametrize("flipped", [False, True])
def test_pieces_are_in_the_order_of_the_grid(flipped):
    voxels, affine = stored_differently(
        np.zeros((6, 5, 12), np.int16), lattice((1.5, 1.5, 3.0)), (2, 0, 1), (flipped, False, False)
    )
    grid = Grid.of(Volume(voxels, affine), Preprocessing())
    probabilities = np.zeros((1, *grid.shape), np.float32)
    pieces = list(grid.to_source((z, probabilities[..., z : z + 6]) for z in range(0, 24, 6)))
    assert {piece.axis for piece in pieces} == {0}
    starts = [piece.start for piece in pieces]
    assert len(starts) == 4  # one for each section
    assert starts == sorted(starts, reverse=flipped)


def test_zero_probability_stays_exactly_zero_and_skipping_changes_no_other_value():
    affine = lattice((0.7, 0.8, 2.2), angles=(4, 5, 6))
    grid = Grid.of(Volume(np.zeros((40, 36, 12), np.int16), affine), Preprocessing())
    random = np.random.default_rng(11)
    probabilities = np.zeros((3, *grid.shape), np.float32)
    probabilities[0, 4:9, 3:7, 5:8] = random.random((5, 4, 3))
    probabilities[2, 12:13, 10:11, 0:1] = 1.0
    together = carried_back(grid, probabilities)
    expected = [sampled(organ, grid.affine, affine, grid.source_shape) for organ in probabilities]
    np.testing.assert_allclose(together, expected, atol=1e-6)
    assert not together[1].any()
    assert (together[0] > 0).sum() == (np.array(expected[0]) > 1e-9).sum()


@pytest.mark.parametrize(
    "sections",
    [
        [(0, 4), (5, 10)],
        [(4, 10), (0, 4)],
        [(0, 4)],
        [(0, 6), (4, 10)],
        [],
    ],
    ids=["gap", "order", "end missing", "overlap", "nothing"],
)
def test_sections_that_do_not_cover_the_grid_in_order_are_refused(sections):
    grid = Grid.of(Volume(np.zeros((6, 6, 10), np.int16), lattice((1.5, 1.5, 1.5))), Preprocessing())
    probabilities = np.zeros((1, *grid.shape), np.float32)
    with pytest.raises(ValueError, match="section"):
        list(grid.to_source((a, probabilities[..., a:b]) for a, b in sections))


def test_arrays_of_another_lattice_are_refused():
    volume = Volume(np.zeros((6, 6, 10), np.int16), lattice((1.5, 1.5, 1.5)))
    grid = Grid.of(volume, Preprocessing())
    with pytest.raises(ValueError, match=r"\(6, 6, 9\)"):
        grid.occupancy(np.zeros((6, 6, 9), bool))
    with pytest.raises(ValueError, match=r"\(1, 6, 5, 10\)"):
        list(grid.to_source(iter([(0, np.zeros((1, 6, 5, 10), np.float32))])))
    with pytest.raises(ValueError, match=r"\(6, 6, 9\)"):
        grid.section(Volume(np.zeros((6, 6, 9), np.int16), volume.affine), 0, 3)
    for beyond in [(0, 11), (-1, 3), (4, 4)]:
        with pytest.raises(ValueError, match=f"{beyond[0]}:{beyond[1]}"):
            grid.section(volume, *beyond)


def test_section_reads_only_the_required_slices(monkeypatch):
    volume = Volume(np.zeros((8, 8, 60), np.int16), lattice((1.5, 1.5, -3.0)))
    grid = Grid.of(volume, Preprocessing())
    read = []
    hu = Volume.hu

    def recorded(self, selection):
        read.append(selection[2])
        return hu(self, selection)

    monkeypatch.setattr(Volume, "hu", recorded)
    grid.section(volume, 40, 56)
    # Grid slice z has the position (z + 0.5) / 2 - 0.5 in scan slices, counted from the last slice: 19.75 to 27.25.
    assert min(part.start for part in read) == 59 - 28
    assert max(part.stop for part in read) == 60 - 19


def peak_bytes(run) -> int:
    tracemalloc.start()
    try:
        run()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_memory_does_not_grow_with_the_length_of_the_scan():
    def work(slices):
        volume = Volume(np.zeros((128, 128, slices), np.int16), lattice((1.0, 1.0, 1.0)))
        grid = Grid.of(volume, Preprocessing())
        some = np.full((2, *grid.shape[:2], 16), 0.5, np.float32)

        def run():
            for z in range(0, grid.shape[2], 16):
                grid.section(volume, z, min(z + 16, grid.shape[2]))
            for _ in grid.to_source((z, some[..., : grid.shape[2] - z]) for z in range(0, grid.shape[2], 16)):
                pass

        return run

    assert peak_bytes(work(288)) < 1.1 * peak_bytes(work(96))


def test_pieces_have_at_most_32_mib_for_a_fine_scan():
    grid = Grid.of(
        Volume(np.zeros((512, 512, 90), np.int8), lattice((0.5, 0.5, 0.5))), Preprocessing(spacing=(3, 3, 3))
    )
    pieces = grid.to_source(iter([(0, np.zeros((3, *grid.shape), np.float32))]))
    assert max(piece.probabilities.nbytes for piece in pieces) <= 32 << 20


@pytest.mark.real_ct
@pytest.mark.parametrize(
    ("name", "spacing"),
    [
        ("headneck/ct/hn_002.nii.gz", 3.0),
        ("abdomen/ct_1p5mm.nii.gz", 1.5),
        ("abdomen/ct_sm.nii.gz", 1.5),
        ("fullsize/thorax_512.nii.gz", 3.0),
    ],
)
def test_real_scan_agrees_with_scipy(real_ct, name, spacing):
    volume = read_ct(real_ct / name)
    grid = Grid.of(volume, Preprocessing(spacing=(spacing,) * 3, hu_window=WIDE))
    z0 = grid.shape[2] // 2
    section = in_hu(grid.section(volume, z0, z0 + 3))
    section_affine = grid.affine.copy()
    section_affine[:3, 3] += z0 * grid.affine[:3, 2]
    expected = sampled(volume.array, volume.affine, section_affine, (*grid.shape[:2], 3))
    np.testing.assert_allclose(section, expected, atol=0.5)


@pytest.mark.real_ct
@pytest.mark.parametrize(
    ("name", "expected"),
    [("headneck/ct/hn_002.nii.gz", 0.99), ("abdomen/ct_1p5mm.nii.gz", 0.99), ("abdomen/ct_sm.nii.gz", 0.99)],
)
def test_real_body_outline_is_kept_by_resampling_to_the_grid_and_back(real_ct, name, expected):
    volume = read_ct(real_ct / name)
    grid = Grid.of(volume, Preprocessing())
    body = np.asarray(volume.array > -300)
    back = carried_back(grid, grid.occupancy(body)[None], depth=32)[0] >= 0.5
    assert dice(back, body) >= expected


@pytest.mark.parametrize("seed", range(5))
def test_probabilities_above_the_threshold_are_exact_bit_for_bit(seed):
    """The scan has a finer lattice than the grid; where no part of a piece is, values are at most the threshold."""
    random = np.random.default_rng(seed)
    affine = np.diag([1.3, -0.9, 2.1, 1.0])
    volume = Volume(random.integers(-500, 500, (40, 44, 30)).astype(np.int16), affine)
    grid = Grid.of(volume, Preprocessing(spacing=(3.0, 3.0, 3.0)))
    indices = np.indices(grid.shape)
    blobs = []
    for _ in range(3):
        centre = [random.uniform(0, size) for size in grid.shape]
        distance = sum((axis - c) ** 2 for axis, c in zip(indices, centre, strict=True))
        blobs.append(np.exp(-distance / random.uniform(2, 20)))
    probabilities = np.array(blobs, np.float32)
    whole_back = carried_back(grid, probabilities)
    least = 0.5
    cut = np.zeros_like(whole_back)
    for piece in grid.to_source(iter([(0, probabilities)]), lambda section: list(section > least), complete=False):
        for part in piece.parts:
            slices = np.moveaxis(cut[part.channel], piece.axis, 0).transpose(0, 2, 1)  # the grid has the scan's axes
            slices[piece.start + part.index, part.y, part.x] = part.probabilities
    above = whole_back > least
    assert above.any()
    assert np.array_equal(cut[above], whole_back[above])
    assert (cut[~above] <= least).all()
    assert (cut == 0).sum() > (whole_back == 0).sum()
