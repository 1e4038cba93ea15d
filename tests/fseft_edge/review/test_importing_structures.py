"""Structures that another program corrected become the corrections of their cases."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import SimpleITK
from doubles.dicom import save
from doubles.errors import refused
from doubles.reviewed import Batch, run_batch
from doubles.structure_sets import Roi, rectangle, structure_set

from fseft_edge.dicom_output.contours import closed_contours
from fseft_edge.masks.result import organ_labels
from fseft_edge.review.importing import import_corrections
from fseft_edge.runtime.errors import LabelError
from fseft_edge.runtime.scans.nifti import read_label_map
from fseft_edge.runtime.scans.volume import LabelMap

CORRECTED = ".corrected.nii.gz"


@pytest.fixture(scope="module")
def batch(tmp_path_factory: pytest.TempPathFactory) -> Batch:
    return run_batch(tmp_path_factory.mktemp("batch"))


def mask_of(batch: Batch, key: str) -> tuple[LabelMap, dict[str, int]]:
    return read_label_map(batch.mask(key)), dict(
        organ_labels(batch.mask(key).with_name(f"{key}.json"), batch.mask(key))
    )


def write_segmentation(path: Path, mask: LabelMap, names: dict[str, int]) -> Path:
    """Write a mask as 3D Slicer does, by ITK: cropped nowhere, with other label values than those of the batch."""
    array = np.zeros(mask.array.shape, np.uint8)
    for number, value in enumerate(names.values(), start=11):
        array[mask.array == value] = number
    image = SimpleITK.GetImageFromArray(array.T)
    lps = np.diag([-1.0, -1.0, 1.0]) @ mask.affine[:3]
    spacing = np.linalg.norm(lps[:, :3], axis=0)
    image.SetSpacing(spacing.tolist())
    image.SetDirection((lps[:, :3] / spacing).ravel().tolist())
    image.SetOrigin(lps[:, 3].tolist())
    for index, name in enumerate(names):
        image.SetMetaData(f"Segment{index}_Name", name)
        image.SetMetaData(f"Segment{index}_LabelValue", str(index + 11))
        image.SetMetaData(f"Segment{index}_Layer", "0")
    SimpleITK.WriteImage(image, str(path))
    return path


def test_a_segmentation_of_3d_slicer_becomes_a_correction(batch: Batch, tmp_path: Path) -> None:
    key = batch.keys[0]
    mask, names = mask_of(batch, key)
    changed = np.array(mask.array)
    changed[1, 2, 3] = names["spleen"]
    path = write_segmentation(tmp_path / f"{key}.seg.nrrd", LabelMap(changed, mask.affine), names)
    saved = import_corrections(batch.outbox, [path], reviewer="Bo Li")
    assert saved[key].problems == ()
    np.testing.assert_array_equal(read_label_map(batch.mask(key, CORRECTED)).array, changed)


def test_a_structure_set_becomes_a_correction(batch: Batch, tmp_path: Path) -> None:
    key = batch.keys[1]
    mask, names = mask_of(batch, key)
    to_lps = np.diag([-1.0, -1.0, 1.0]) @ mask.affine[:3]
    rois = []
    for number, (name, value) in enumerate(names.items(), start=1):
        outlines = []
        for place in range(mask.shape[2]):
            for outline in closed_contours(value == mask.array[:, :, place].T):
                voxels = np.column_stack([outline, np.full(len(outline), place), np.ones(len(outline))])
                outlines.append(voxels @ to_lps.T)
        rois.append(Roi(name, outlines, number=number))
    path = save(structure_set(rois), tmp_path / f"{key}.dcm")
    import_corrections(batch.outbox, [path], reviewer="Bo Li")
    found = read_label_map(batch.mask(key, CORRECTED)).array
    assert np.count_nonzero(found != mask.array) <= 0.001 * np.count_nonzero(mask.array)


def test_a_structure_that_is_missing_is_not_an_erased_organ(batch: Batch, tmp_path: Path) -> None:
    key = batch.keys[0]
    mask, names = mask_of(batch, key)
    filled = next(name for name, value in names.items() if (mask.array == value).any())
    others = {name: value for name, value in names.items() if name != filled}
    path = write_segmentation(tmp_path / f"{key}.seg.nrrd", mask, {"other": 99, **others})
    before = batch.mask(key, CORRECTED).exists()
    with refused(LabelError, filled, key):
        import_corrections(batch.outbox, [path])
    assert batch.mask(key, CORRECTED).exists() == before


def test_voxels_of_two_structures_are_counted(batch: Batch, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    key = batch.keys[1]
    mask, names = mask_of(batch, key)
    corner = (np.diag([-1.0, -1.0, 1.0, 1.0]) @ mask.affine @ [2, 2, 2, 1])[:3]
    step = np.abs(mask.affine[:3, :3]).sum(axis=0)
    square = rectangle(tuple(corner[:2] - step[:2] / 2), tuple(corner[:2] + step[:2] / 2), float(corner[2]))
    rois = [Roi(name, [square], number=number) for number, name in enumerate(names, start=1)]
    path = save(structure_set(rois), tmp_path / f"{key}.dcm")
    import_corrections(batch.outbox, [path], reviewer="Bo Li")
    assert "voxels that belong to several structures: 1;" in caplog.text
    assert read_label_map(batch.mask(key, CORRECTED)).array.sum() == list(names.values())[-1]
