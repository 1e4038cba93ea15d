"""Selection of one series among all series in a file, folder or archive."""

from __future__ import annotations

from collections.abc import Sequence

from fseft_edge.runtime.errors import ChooseSeriesError, NoSeriesError, NotACtError, SeveralPatientsError
from fseft_edge.runtime.scans.dicom.series import DicomSeries


def choose_series(series: Sequence[DicomSeries], wanted: str | None = None) -> DicomSeries:
    """Return the series to read.

    Without ``wanted``, all series must belong to one patient, and the CT series with the most slices is selected. Other
    modalities, localisers, screenshots and single slices are skipped. If the largest CT series is not readable, its
    error is raised; a smaller series does not replace it.

    Args:
        series: all series in a file, folder or archive, not empty.
        wanted: number of the series in the list of the error messages, its SeriesInstanceUID, or a unique end of its
            SeriesInstanceUID; None selects the series automatically.

    Raises:
        SeveralPatientsError: the series belong to several patients, and ``wanted`` is None.
        ChooseSeriesError: no series or several series match ``wanted``, or several series have the most slices.
        NoSeriesError: no series is a CT scan.
        InputError: the selected series is not readable; the error states the reason.
    """
    if wanted is not None:
        chosen = _series_named(series, wanted)
    else:
        patients = len({candidate.patient for candidate in series})
        if patients > 1:
            raise SeveralPatientsError(
                f"{series[0].source} contains images of {patients} patients:{_series_list(series, patients=True)}",
                remedy="Give the folder of one patient, or select a series with --series NUMBER.",
            )
        chosen = _largest_series(series)
    problem = chosen.problem
    if problem is not None and wanted is None and len(series) > 1:
        raise type(problem)(
            f"{problem.message} Available series:{_series_list(series)}",
            remedy=f"{problem.remedy} Or select another series with --series NUMBER.",
        )
    if problem is not None:
        raise problem
    return chosen


def _series_named(series: Sequence[DicomSeries], wanted: str) -> DicomSeries:
    found = [candidate for candidate in series if str(candidate.number) == wanted]
    found = found or [candidate for candidate in series if candidate.uid == wanted]
    found = found or [candidate for candidate in series if wanted and candidate.uid.endswith(wanted)]
    if len(found) == 1:
        return found[0]
    source = series[0].source
    if found:
        message = f"{len(found)} series in {source} match the value of --series:{_series_list(found)}"
    else:
        message = f"No series in {source} matches the value of --series. Available series:{_series_list(series)}"
    raise ChooseSeriesError(message, remedy="Select one series with --series NUMBER.")


def _largest_series(series: Sequence[DicomSeries]) -> DicomSeries:
    if len(series) == 1:
        return series[0]
    scans = [candidate for candidate in series if not isinstance(candidate.problem, NotACtError)]
    if not scans:
        raise NoSeriesError(
            f"{series[0].source} contains no CT scan. Available series:{_series_list(series)}",
            remedy="Select a series with --series NUMBER to see why the series is refused.",
        )
    most = max(len(candidate.slices) for candidate in scans)
    largest = [candidate for candidate in scans if len(candidate.slices) == most]
    if len(largest) == 1:
        return largest[0]
    raise ChooseSeriesError(
        f"{series[0].source} contains {len(largest)} series of {most} slices:{_series_list(series)}",
        remedy="Select one series with --series NUMBER.",
    )


def _series_list(series: Sequence[DicomSeries], *, patients: bool = False) -> str:
    order = list(dict.fromkeys(candidate.patient for candidate in series))
    lines = []
    for candidate in series:
        who = f"patient {order.index(candidate.patient) + 1}: " if patients else ""
        lines.append(
            f"\n  {candidate.number}: {who}{candidate.description()}{'; not readable' if candidate.problem else ''}"
        )
    return "".join(lines)
