"""What independent readers find in a DICOM series: SimpleITK (GDCM) and dcm2niix."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import nibabel as nib
import numpy as np
import SimpleITK as sitk  # noqa: N813 - its customary name
from numpy.typing import NDArray

from fseft_edge.runtime.scans.volume import Volume

LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])


def hu_of(volume: Volume) -> NDArray[np.float32]:
    """Return all HU of a volume."""
    return volume.hu((slice(None), slice(None), slice(None)))


def read_with_simpleitk(
    folder: Path, files: Sequence[Path] | None = None
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return HU ``[x, y, z]`` and affine (RAS+ mm) of a series; ``files`` names its files instead of GDCM's search."""
    reader = sitk.ImageSeriesReader()
    names = [str(path) for path in files] if files is not None else reader.GetGDCMSeriesFileNames(str(folder))
    reader.SetFileNames(names)
    image = reader.Execute()
    affine = np.eye(4)
    affine[:3, :3] = np.reshape(image.GetDirection(), (3, 3)) * image.GetSpacing()
    affine[:3, 3] = image.GetOrigin()
    return sitk.GetArrayFromImage(image).transpose(2, 1, 0).astype(np.float64), LPS_TO_RAS @ affine


def read_with_dcm2niix(folder: Path) -> list[tuple[NDArray[np.float64], NDArray[np.float64]]]:
    """Return HU and affine of every volume that dcm2niix finds in a folder, in its own axes."""
    converter = Path(sys.executable).with_name("dcm2niix")
    found = []
    with tempfile.TemporaryDirectory() as output:
        command = [converter, "-o", output, "-f", "%s_%r", "-b", "n", folder]
        subprocess.run(command, check=False, capture_output=True)  # noqa: S603 - a program with fixed arguments
        for path in sorted(Path(output).glob("*.nii")):
            image = nib.load(path)
            found.append((np.asarray(image.get_fdata()), np.asarray(image.affine)))
    return found


def assert_agrees(
    volume: Volume, second: tuple[NDArray[np.float64], NDArray[np.float64]], *, voxels: float = 1e-4
) -> None:
    """Check HU, and the place of every corner voxel to a part of the smallest voxel spacing, in any order of axes."""
    hu, affine = second
    turned = nib.orientations.ornt_transform(
        nib.orientations.io_orientation(affine), nib.orientations.io_orientation(volume.affine)
    )
    affine = affine @ nib.orientations.inv_ornt_aff(turned, hu.shape)
    hu = nib.orientations.apply_orientation(hu, turned)
    np.testing.assert_allclose(hu_of(volume), hu, rtol=0, atol=1e-2)
    corners = np.array(np.meshgrid(*[(0, size - 1) for size in volume.shape], indexing="ij")).reshape(3, -1)
    off = (volume.affine - affine) @ np.vstack([corners, np.ones(8)])
    assert np.linalg.norm(off[:3], axis=0).max() <= voxels * min(volume.spacing)
