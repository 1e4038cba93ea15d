"""Check that the images of a series are slices of one CT of one patient."""

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
from fseft_edge.runtime.scans.dicom.elements import element_name
from fseft_edge.runtime.scans.dicom.headers import CT_IMAGE, MULTI_FRAME_CT, SliceHeader

_SECONDARY_CAPTURE = "1.2.840.10008.5.1.4.1.1.7"
_LOCALISERS = frozenset({"LOCALIZER", "SCOUT", "TOPOGRAM", "SURVIEW"})
"""Value 3 of ImageType of a localiser: LOCALIZER (PS3.3 C.8.2.1.1.1), or an equivalent word of a vendor."""


def is_localiser(slice_: SliceHeader) -> bool:
    """Return True if a slice is a localiser: an overview image for planning a CT."""
    return not _LOCALISERS.isdisjoint(slice_.image_type)


def is_ct(slice_: SliceHeader) -> bool:
    """Return True if a slice is an image of a CT, which may be a localiser."""
    return slice_.modality == "CT" and slice_.sop_class in (CT_IMAGE, *MULTI_FRAME_CT)


def check_kind(slices: Sequence[SliceHeader], path: Path) -> None:
    """Check that slices are images of one CT of one patient.

    Raises:
        SecondaryCaptureError: the images are screenshots or scanned pictures.
        OtherModalityError: the modality is not CT.
        LocaliserError: the images are localisers.
        NotACtError: there are fewer than two slices, or an ordinary CT image has several frames.
        MixedSeriesError: the images belong to several patients, studies or frames of reference.
    """
    first, found = slices[0], f"The series in {path}"
    if first.sop_class == _SECONDARY_CAPTURE or first.sop_class.startswith(f"{_SECONDARY_CAPTURE}."):
        raise SecondaryCaptureError(
            f"{found} contains secondary captures: pictures of a screen or a film, without HU.",
            remedy="Export the original CT series from the PACS.",
        )
    if not is_ct(first):
        keyword = "SOPClassUID" if first.modality == "CT" or not first.sop_class else "Modality"
        raise OtherModalityError(
            f"{found} is not a CT, according to its {element_name(keyword)}.",
            remedy="Give a CT series; other modalities are not supported.",
        )
    if is_localiser(first):
        raise LocaliserError(
            f"{found} is a localiser (scout), not a CT scan.", remedy="Give the CT series of the same study."
        )
    if first.sop_class == CT_IMAGE and first.frames != 1:
        raise NotACtError(
            f"{found} has {first.frames} frames in one image, but is not an enhanced CT.",
            remedy="Export the series from the PACS as single-frame CT images or as enhanced CT.",
        )
    if len(slices) < 2:
        raise NotACtError(
            f"{found} has fewer than two slices.", remedy="Give the folder of a complete CT series, not a single slice."
        )
    for name, values in (
        ("patients", {slice_.patient for slice_ in slices}),
        ("studies", {slice_.study_uid for slice_ in slices}),
        ("frames of reference", {slice_.frame_of_reference_uid for slice_ in slices}),
    ):
        if len(values - {""}) > 1:
            raise MixedSeriesError(
                f"{found} contains images of {len(values)} {name} with the same SeriesInstanceUID.",
                remedy="Export the series again from the PACS.",
            )
