from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from fseft_edge.report.pictures import PREDICTION_COLOUR, REFERENCE_COLOUR, Colour, _legend, three_plane_picture
from fseft_edge.report.planes import PLANES, three_cuts
from fseft_edge.runtime.scans.nifti import read_ct, read_label_map
from fseft_edge.runtime.scans.volume import Volume

Mask = NDArray[np.bool_]
SHAPE = (44, 36, 26)
SPACING = (2.0, 3.0, 5.0)
AFFINE = np.diag([*SPACING, 1.0])


def ball(centre_mm: tuple[float, float, float], radius_mm: float) -> Mask:
    offsets = [np.arange(n) * step - c for n, step, c in zip(SHAPE, SPACING, centre_mm, strict=True)]
    x, y, z = np.meshgrid(*offsets, indexing="ij")
    return np.asarray(x**2 + y**2 + z**2 <= radius_mm**2)


def scan() -> NDArray[np.int16]:
    """Return a RAS+ scan without any symmetry: a box of noise in the range of soft tissue, surrounded by air."""
    hu = np.full(SHAPE, -1000, dtype=np.int16)
    hu[3:-6, 4:-2, 1:-3] = np.random.default_rng(5).integers(-100, 200, size=(35, 30, 22))
    return hu


def orientations() -> Iterator[NDArray[np.float64]]:
    for axes in itertools.permutations(range(3)):
        for flips in itertools.product((1, -1), repeat=3):
            yield np.array(list(zip(axes, flips, strict=True)), dtype=float)


def turned(array: NDArray[np.generic], orientation: NDArray[np.float64]) -> NDArray[np.generic]:
    return np.ascontiguousarray(nib.orientations.apply_orientation(array, orientation))


def turned_volume(orientation: NDArray[np.float64]) -> Volume:
    affine = AFFINE @ nib.orientations.inv_ornt_aff(orientation, SHAPE)
    return Volume(turned(scan(), orientation), affine)


def pixels(path: Path) -> NDArray[np.uint8]:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def has_colour(picture: NDArray[np.uint8], colour: Colour) -> Mask:
    return np.asarray(np.abs(picture.astype(int) - colour).max(axis=-1) < 40)


PREDICTION, REFERENCE = ball((40, 50, 60), 22), ball((44, 56, 60), 24)


def test_all_48_orientations_of_a_scan_give_the_same_planes() -> None:
    expected = three_cuts(Volume(scan(), AFFINE), [(PREDICTION, REFERENCE)])
    seen = 0
    for orientation in orientations():
        masks = (turned(PREDICTION, orientation), turned(REFERENCE, orientation))
        for cut, wanted in zip(three_cuts(turned_volume(orientation), [masks]), expected, strict=True):
            np.testing.assert_array_equal(cut.hu, wanted.hu)
            np.testing.assert_array_equal(cut.organs[0].prediction, wanted.organs[0].prediction)
            np.testing.assert_array_equal(cut.organs[0].reference, wanted.organs[0].reference)
            assert (cut.row_mm, cut.column_mm) == (wanted.row_mm, wanted.column_mm)
        seen += 1
    assert seen == 48


def test_picture_has_the_same_bytes_for_each_orientation(tmp_path: Path) -> None:
    path = tmp_path / "new folder" / "picture.png"
    bytes_written = set()
    for orientation in list(orientations())[1::24]:
        masks = (turned(PREDICTION, orientation), turned(REFERENCE, orientation))
        three_plane_picture(turned_volume(orientation), {"organ": masks}, path)
        bytes_written.add(path.read_bytes())
    assert len(bytes_written) == 1
    assert [file.name for file in path.parent.iterdir()] == ["picture.png"]


def test_planes_are_in_radiological_convention() -> None:
    hu = np.full(SHAPE, 40, dtype=np.int16)
    hu[-1, -1, -1] = 3000  # rightmost, most anterior, most superior
    mask = np.zeros(SHAPE, dtype=bool)
    mask[-1, -1, -1] = True
    for cut in three_cuts(Volume(hu, AFFINE), [(mask, None)]):
        row, column = np.unravel_index(int(cut.hu.argmax()), cut.hu.shape)
        assert (row, column) == (0, 0), cut.plane.name  # up is A or S, left is R or (sagittal) A
    assert [plane.edges for plane in PLANES] == [("R", "L", "A", "P"), ("R", "L", "S", "I"), ("A", "P", "S", "I")]


def test_planes_of_paired_organs_go_through_an_organ_and_not_between_them() -> None:
    pair = [(ball((12, 50, 60), 10), None), (ball((74, 50, 60), 10), None)]
    axial, coronal, sagittal = three_cuts(Volume(scan(), AFFINE), pair)
    assert all(organ.prediction.any() for cut in (axial, coronal) for organ in cut.organs)
    assert any(organ.prediction.any() for organ in sagittal.organs)


def test_planes_are_cropped_to_the_region_of_the_organs() -> None:
    shape = (300, 60, 30)
    mask = np.zeros(shape, dtype=bool)
    mask[100:110, 20:30, 10:20] = True
    axial, _, sagittal = three_cuts(Volume(np.full(shape, 40, np.int16), np.eye(4)), [(mask, None)])
    assert axial.hu.shape == (60, 45 + 10 + 45)
    assert sagittal.hu.shape == (30, 60)


def test_planes_go_through_the_middle_of_a_scan_with_an_empty_mask() -> None:
    empty = np.zeros(SHAPE, dtype=bool)
    axial, _, _ = three_cuts(Volume(scan(), AFFINE), [(empty, None)])
    middle = scan()[:, :, SHAPE[2] // 2].T[::-1, ::-1]
    assert axial.hu.shape[0] <= middle.shape[0]
    assert axial.hu.sum() == pytest.approx(middle[middle > -400].sum() - 1000 * (axial.hu == -1000).sum())


def test_a_ball_is_round_in_every_plane_of_an_anisotropic_scan(tmp_path: Path) -> None:
    path = tmp_path / "ball.png"
    three_plane_picture(Volume(scan(), AFFINE), {"ball": (ball((44, 54, 60), 32), None)}, path)
    picture = pixels(path)[:-60]  # without the legend
    orange = has_colour(picture, PREDICTION_COLOUR)
    columns = np.flatnonzero(orange.any(axis=0))
    outlines = np.split(columns, np.flatnonzero(np.diff(columns) > 40) + 1)
    assert len(outlines) == 3
    sizes = []
    for outline in outlines:
        rows = np.flatnonzero(orange[:, outline[0] : outline[-1] + 1].any(axis=1))
        sizes += [np.ptp(outline), np.ptp(rows)]
    assert max(sizes) < 1.12 * min(sizes)  # the coarsest axis has voxels of 5 mm in 64


def test_reference_has_its_own_colour_if_there_is_one(tmp_path: Path) -> None:
    volume, path = Volume(scan(), AFFINE), tmp_path / "p.png"
    three_plane_picture(volume, {"organ": (PREDICTION, None)}, path)
    assert not has_colour(pixels(path), REFERENCE_COLOUR).any()
    three_plane_picture(volume, {"organ": (PREDICTION, REFERENCE)}, path)
    picture = pixels(path)
    assert has_colour(picture, REFERENCE_COLOUR).sum() > 1000
    assert has_colour(picture, PREDICTION_COLOUR).sum() > 1000


def test_legend_numbers_organs_and_states_the_dsc_if_there_is_a_reference() -> None:
    organs: dict[str, tuple[Mask, Mask | None]] = {"liver": (PREDICTION, PREDICTION), "spleen": (REFERENCE, None)}
    texts = [entry.text for entry in _legend(organs, [6, 2])]
    assert texts == ["prediction", "reference", "6  liver  DSC 1.000", "2  spleen"]
    assert [entry.text for entry in _legend({"liver": (PREDICTION, None)}, [])] == ["prediction", "liver"]


def test_legend_names_empty_masks() -> None:
    organs: dict[str, tuple[Mask, Mask | None]] = {
        "liver": (PREDICTION, None),
        "spleen": (np.zeros_like(PREDICTION), REFERENCE),
    }
    texts = [entry.text for entry in _legend(organs, [1, 2])]
    assert texts[2:] == ["1  liver", "2  spleen  DSC 0.000  (empty)"]


def test_the_numbers_in_the_picture_are_the_label_values(tmp_path: Path) -> None:
    volume = Volume(scan(), AFFINE)
    organs: dict[str, tuple[Mask, Mask | None]] = {"a": (PREDICTION, None), "b": (REFERENCE, None)}
    three_plane_picture(volume, organs, tmp_path / "positions.png")
    three_plane_picture(volume, organs, tmp_path / "same.png", labels={"a": 1, "b": 2})
    three_plane_picture(volume, organs, tmp_path / "labels.png", labels={"a": 6, "b": 2})
    assert (tmp_path / "same.png").read_bytes() == (tmp_path / "positions.png").read_bytes()
    assert (tmp_path / "labels.png").read_bytes() != (tmp_path / "positions.png").read_bytes()


def test_mask_on_another_lattice_is_refused_and_nothing_is_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="spleen"):
        three_plane_picture(Volume(scan(), AFFINE), {"spleen": (PREDICTION[1:], None)}, tmp_path / "p.png")
    assert not list(tmp_path.iterdir())


@pytest.mark.real_ct
def test_real_scan_gives_a_picture_of_readable_size(real_ct: Path, tmp_path: Path) -> None:
    volume = read_ct(real_ct / "headneck/ct/hn_002.nii.gz")
    labels = read_label_map(real_ct / "headneck/label/hn_002.nii.gz")
    mandible = labels.array == 7
    three_plane_picture(volume, {"mandible": (mandible, mandible)}, tmp_path / "p.png")
    height, width, _ = pixels(tmp_path / "p.png").shape
    assert 700 <= width <= 1440
    assert 250 <= height <= 800
