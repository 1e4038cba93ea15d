"""CT series in DICOM files: search in a file, folder or zip archive, selection of one series, and reading as a Volume.

``docs/dicom.md`` describes which series are accepted.

Privacy: no error message contains header values about a person, or the name of a file inside the path that the user
gave, because such names are often names of patients. Exceptions of pydicom are never chained to an error, because their
messages quote header values.
"""

from fseft_edge.runtime.scans.dicom.choice import choose_series
from fseft_edge.runtime.scans.dicom.reading import read_series
from fseft_edge.runtime.scans.dicom.series import DicomSeries, find_series

__all__ = ["DicomSeries", "choose_series", "find_series", "read_series"]
