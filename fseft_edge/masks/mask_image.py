"""A mask in memory: a NIfTI image of nibabel that also carries the measurements of its organs."""

from __future__ import annotations

import nibabel as nib

from fseft_edge.masks.result import SegmentedOrgan
from fseft_edge.runtime.scans.images import image_of_label_map
from fseft_edge.runtime.scans.volume import LabelMap


class Mask(nib.Nifti1Image):
    """A mask on the lattice of its scan.

    The image has the label values, and its header has the geometry of the scan and the names of the organs, as in a
    mask file. ``nib.save(mask, "mask.nii.gz")`` writes it.

    Attributes:
        organs: measurements of the organs, with their label values.
        warnings: everything that was left out, corrected or assumed, one sentence each.
    """

    organs: tuple[SegmentedOrgan, ...]
    warnings: tuple[str, ...]

    @classmethod
    def of(cls, labels: LabelMap, organs: tuple[SegmentedOrgan, ...], warnings: tuple[str, ...]) -> Mask:
        """Return a label map as a mask.

        Args:
            labels: label map on the lattice of the scan.
            organs: measurements of the organs.
            warnings: everything that was left out, corrected or assumed.
        """
        image = image_of_label_map(labels, {organ.label: organ.name for organ in organs})
        mask = cls(image.dataobj, None, image.header)
        mask.organs, mask.warnings = organs, warnings
        return mask
