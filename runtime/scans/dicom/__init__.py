"""CT series in DICOM files: found in a file, folder or zip archive, one chosen, and read as a Volume.

What is accepted, what is refused and why is described in ``docs/dicom.md``. No error holds what stands in a file's
header about a person, or the name of a file below the path that the user gave: such names are often patients' names.
For the same reason what pydicom raises is never chained to an error: its messages quote values.
"""

from fseft_edge.runtime.scans.dicom.choice import choose_series
from fseft_edge.runtime.scans.dicom.reading import read_series
from fseft_edge.runtime.scans.dicom.series import DicomSeries, find_series

__all__ = ["DicomSeries", "choose_series", "find_series", "read_series"]
