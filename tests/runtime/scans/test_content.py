"""Hashes of scans and annotations: equal for every file of the same content, different for other content."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import SimpleITK
from doubles.encoder import label_of, scan

from fseft_edge.runtime.scans.content import annotation_sha256, found_label_values, scan_sha256
from fseft_edge.runtime.scans.nifti import read_ct, read_label_map, write_ct, write_label_map
from fseft_edge.runtime.scans.volume import LabelMap, Volume

ORGANS = (label_of("liver"), label_of("spleen"))


def written_by_itk(path: Path, out: Path, change: Callable[[SimpleITK.Image], SimpleITK.Image]) -> Path:
    SimpleITK.WriteImage(change(SimpleITK.ReadImage(path)), out, True)
    return out


def same(image: SimpleITK.Image) -> SimpleITK.Image:
    return image


def permuted_and_flipped(image: SimpleITK.Image) -> SimpleITK.Image:
    return SimpleITK.Flip(SimpleITK.PermuteAxes(image, [2, 0, 1]), [True, False, True])


def as_float(image: SimpleITK.Image) -> SimpleITK.Image:
    return SimpleITK.Cast(image, SimpleITK.sitkFloat64)


@pytest.mark.parametrize("change", [same, permuted_and_flipped, as_float])
@pytest.mark.parametrize("name", ["again.nii", "again.nii.gz"])
def test_a_scan_or_annotation_that_another_program_saved_again_keeps_its_hash(
    tmp_path: Path, change: Callable[[SimpleITK.Image], SimpleITK.Image], name: str
) -> None:
    write_ct(tmp_path / "ct.nii.gz", scan(1).volume)
    write_label_map(tmp_path / "label.nii.gz", scan(1).labels)
    again = written_by_itk(tmp_path / "ct.nii.gz", tmp_path / f"ct_{name}", change)
    assert scan_sha256(read_ct(again)) == scan_sha256(scan(1).volume)
    again = written_by_itk(tmp_path / "label.nii.gz", tmp_path / f"label_{name}", change)
    assert annotation_sha256(read_label_map(again), ORGANS) == annotation_sha256(scan(1).labels, ORGANS)


def test_a_scan_keeps_its_hash_with_another_slope_and_another_padding_value(tmp_path: Path) -> None:
    padded, other = scan(1).volume.array.copy(), scan(1).volume.array.copy()
    padded[0, 0], other[0, 0] = -1024, -3024
    affine = scan(1).volume.affine
    write_ct(tmp_path / "stored.nii", Volume((other.astype(np.int32) + 1024) * 2, affine, 0.5, -1024.0))
    assert scan_sha256(read_ct(tmp_path / "stored.nii")) == scan_sha256(Volume(padded, affine))


def test_another_scan_has_another_hash() -> None:
    volume = scan(1).volume
    changed = volume.array.copy()
    changed[30, 20, 20] += 1
    mirrored = Volume(volume.array[::-1], volume.affine)  # the patient is mirrored, because the affine is unchanged
    hashes = {scan_sha256(v) for v in (volume, scan(2).volume, Volume(changed, volume.affine), mirrored)}
    assert len(hashes) == 4


def test_another_annotation_with_the_same_volumes_has_another_hash() -> None:
    labels = scan(1).labels
    moved = LabelMap(np.roll(labels.array, 1, axis=0), labels.affine)
    swapped = np.select([labels.array == v for v in ORGANS], ORGANS[::-1], 0).astype(np.uint8)
    hashes = {annotation_sha256(one, ORGANS) for one in (labels, moved, LabelMap(swapped, labels.affine))}
    assert len(hashes) == 3


def test_only_the_organs_of_the_adapter_count_and_not_their_label_values() -> None:
    labels = scan(1).labels
    only = np.where(np.isin(labels.array, ORGANS), labels.array, 0).astype(np.uint16)
    renumbered = np.select([only == v for v in ORGANS], [300, 7], 0).astype(np.uint16)
    expected = annotation_sha256(labels, ORGANS)
    assert annotation_sha256(LabelMap(only, labels.affine), ORGANS) == expected
    assert annotation_sha256(LabelMap(renumbered, labels.affine), (300, 7)) == expected


def test_the_label_values_in_files_are_listed_with_their_volumes() -> None:
    first, second = (np.zeros((10, 10, 10), np.uint8) for _ in range(2))
    first[:2], first[5:] = 3, 12
    second[:4] = 3
    affine = np.diag([1.0, 1.0, 10.0, 1.0])
    maps = [LabelMap(first, affine), LabelMap(second, affine)]
    assert found_label_values(maps) == "3 (in 2 files, 2.0 to 4.0 ml), 12 (in 1 file, 5.0 ml)"
    assert found_label_values([LabelMap(np.zeros_like(first), affine)]) == "none"
    many = LabelMap(np.arange(1000, dtype=np.uint16).reshape(10, 10, 10), affine)
    assert found_label_values([many]).endswith("20 (in 1 file, 0.0 ml), and 979 more")
