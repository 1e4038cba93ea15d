"""What kind of images a series holds, and whether they are one CT of one patient."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fseft_edge.runtime.errors import (
    LocaliserError,
    MixedSeriesError,
    NotACtError,
    OtherModalityError,
    SecondaryCaptureError,
)
from fseft_edge.runtime.scans.dicom.headers import CT_IMAGE, MULTI_FRAME_CT, SliceHeader

_SECONDARY_CAPTURE = "1.2.840.10008.5.1.4.1.1.7"
_LOCALISERS = frozenset({"LOCALIZER", "SCOUT", "TOPOGRAM", "SURVIEW"})
"""Value 3 of ImageType is LOCALIZER (PS3.3 C.8.2.1.1.1); the others are vendors' words for the same."""


def is_localiser(slice_: SliceHeader) -> bool:
    """Whether a slice is an overview image that a CT is planned on."""
    return not _LOCALISERS.isdisjoint(slice_.image_type)


def check_kind(slices: Sequence[SliceHeader], path: Path) -> None:
    """Make sure that slices are images of one CT of one patient.

    Raises:
        SecondaryCaptureError: screenshots or scanned pictures.
        OtherModalityError: images of another modality.
        LocaliserError: localisers.
        NotACtError: fewer than two slices.
        MixedSeriesError: images of several patients, studies or frames of reference.
    """
    first, found = slices[0], f"The series in {path}"
    if first.sop_class == _SECONDARY_CAPTURE or first.sop_class.startswith(f"{_SECONDARY_CAPTURE}."):
        raise SecondaryCaptureError(
            f"{found} holds secondary captures: pictures of a screen or a film, without HU.",
            remedy="Export the original CT series from the PACS.",
        )
    if first.modality != "CT" or first.sop_class not in (CT_IMAGE, *MULTI_FRAME_CT):
        raise OtherModalityError(f"{found} is no CT.", remedy="Give a CT series; no other modality is supported.")
    if is_localiser(first):
        raise LocaliserError(
            f"{found} is a localiser (scout), not the scan itself.", remedy="Give the CT series that it belongs to."
        )
    if first.sop_class == CT_IMAGE and first.frames != 1:
        raise NotACtError(
            f"{found} has several frames in one image, but is not an enhanced CT.",
            remedy="Export the series from the PACS as CT images, or as enhanced CT.",
        )
    if len(slices) < 2:
        raise NotACtError(
            f"{found} has fewer than two slices.", remedy="Give the folder of a whole CT series, not a single slice."
        )
    for what, values in (
        ("patients", {slice_.patient for slice_ in slices}),
        ("studies", {slice_.study_uid for slice_ in slices}),
        ("frames of reference", {slice_.frame_of_reference_uid for slice_ in slices}),
    ):
        if len(values) > 1:
            raise MixedSeriesError(
                f"{found} is of {len(values)} {what}, though its images carry one series UID.",
                remedy="Export the series again from the PACS; positions in it do not belong together.",
            )
