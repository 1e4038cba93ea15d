"""Words that identify the patient of a DICOM file, so that no message repeats them by accident."""

from __future__ import annotations

import re

import pydicom

from fseft_edge.runtime.scans.dicom.annotation_objects import Texts
from fseft_edge.runtime.scans.dicom.files import DicomFile, DicomSource

_KEYWORDS = ("PatientName", "PatientID", "OtherPatientNames", "OtherPatientIDs", "PatientBirthName", "PatientAddress")
_WORD = re.compile(r"[^\s^=\\]+")


def identifying_words(file: DicomFile) -> frozenset[str] | None:
    """Return the words in the name and the numbers of a patient.

    Returns:
        The words; None if the file cannot be read, so that they are unknown.
    """
    try:
        with DicomSource(file.path) as source, source.open(file) as stream:
            dataset = pydicom.dcmread(
                stream, stop_before_pixels=True, force=True, specific_tags=["SpecificCharacterSet", *_KEYWORDS]
            )
        texts = Texts(dataset)
        found = [texts(dataset, keyword) for keyword in _KEYWORDS]
    except Exception:  # pydicom raises many kinds of exception, whose messages quote header values
        return None
    return frozenset(word for text in found for word in _WORD.findall(text))
