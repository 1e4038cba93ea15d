"""Which of the series in a folder is meant."""

from __future__ import annotations

from collections.abc import Sequence

from fseft_edge.runtime.errors import ChooseSeriesError, NoSeriesError, NotACtError, SeveralPatientsError
from fseft_edge.runtime.scans.dicom.series import DicomSeries


def choose_series(series: Sequence[DicomSeries], wanted: str | None = None) -> DicomSeries:
    """Return the series to read.

    Named by ``wanted``: its number in the list that errors show, its SeriesInstanceUID, or an end of it that no other
    series has. Else, of the CT series of the one patient there, the one with most slices. Series that are no CT scan
    (other modalities, localisers, screenshots, single slices) are passed over; a CT series that cannot be read is
    not, unless it has fewer slices than the one that is taken.

    Raises:
        SeveralPatientsError: images of several patients, and none is named.
        ChooseSeriesError: no series has that name, or several do; or several have most slices.
        NoSeriesError: none is a CT scan that can be read.
        InputError: the series that would be taken cannot be read; the error says why.
    """
    if wanted is not None:
        chosen = _named(series, wanted)
    else:
        if len({one.patient for one in series}) > 1:
            raise SeveralPatientsError(
                f"{series[0].source} holds images of {len({one.patient for one in series})} patients."
                f"{_listed(series, patients=True)}",
                remedy="Name the folder of one patient, or choose a series by --series.",
            )
        chosen = _largest(series)
    problem = chosen.problem
    if problem is not None and wanted is None and len(series) > 1:
        raise type(problem)(
            f"{problem.message}{_listed(series)}", remedy=f"{problem.remedy} Or choose another by --series NUMBER."
        )
    if problem is not None:
        raise problem
    return chosen


def _named(series: Sequence[DicomSeries], wanted: str) -> DicomSeries:
    found = [one for one in series if str(one.number) == wanted]
    found = found or [one for one in series if one.uid == wanted]
    found = found or [one for one in series if wanted and one.uid.endswith(wanted)]
    if len(found) == 1:
        return found[0]
    how_many = "Several series" if found else "No series"
    raise ChooseSeriesError(
        f"{how_many} in {series[0].source} can be meant by the series named.{_listed(found or series)}",
        remedy="Choose one by its number: --series NUMBER.",
    )


def _largest(series: Sequence[DicomSeries]) -> DicomSeries:
    if len(series) == 1:
        return series[0]
    scans = [one for one in series if not isinstance(one.problem, NotACtError)]
    if not scans:
        raise NoSeriesError(
            f"{series[0].source} holds no CT scan that can be read.{_listed(series)}",
            remedy="Choose one by --series NUMBER to see what is wrong with it.",
        )
    most = max(len(one.slices) for one in scans)
    largest = [one for one in scans if len(one.slices) == most]
    if len(largest) == 1:
        return largest[0]
    raise ChooseSeriesError(
        f"{series[0].source} holds {len(largest)} series of {most} slices.{_listed(series)}",
        remedy="Choose one by --series NUMBER.",
    )


def _listed(series: Sequence[DicomSeries], *, patients: bool = False) -> str:
    order = list(dict.fromkeys(one.patient for one in series))
    lines = []
    for one in series:
        who = f"patient {order.index(one.patient) + 1}: " if patients else ""
        lines.append(f"\n  {one.number}: {who}{one.description()}{'; cannot be read' if one.problem else ''}")
    return "".join(lines)
