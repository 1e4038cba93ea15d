"""Selection of one series among all series in a file, folder or archive."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from fseft_edge.runtime.errors import (
    ChooseSeriesError,
    MixedSeriesError,
    NoSeriesError,
    NotACtError,
    SeveralPatientsError,
)
from fseft_edge.runtime.scans.dicom.elements import element_name
from fseft_edge.runtime.scans.dicom.kinds import is_ct
from fseft_edge.runtime.scans.dicom.parts import continued, differences, follows, left_out, may_be_missing, related
from fseft_edge.runtime.scans.dicom.series import DicomSeries, unreadable_files


def choose_series(series: Sequence[DicomSeries], wanted: str | None = None) -> DicomSeries:
    """Return the series to read.

    Without ``wanted``, all CT series must belong to one patient, and the CT series with the most slices is selected.
    Other modalities, localisers, screenshots and single slices are skipped. If the largest CT series is not readable,
    its error is raised; a smaller series does not replace it. The :attr:`DicomSeries.warnings` of the result also name
    what is left out beside the series: images with the same SeriesInstanceUID, and unreadable files.

    Args:
        series: all series in a file, folder or archive, not empty.
        wanted: number of the series in the list of the error messages, its SeriesInstanceUID, or a unique end of its
            SeriesInstanceUID; None selects the series automatically.

    Raises:
        SeveralPatientsError: the CT series belong to several patients, and ``wanted`` is None.
        ChooseSeriesError: no series or several series match ``wanted``, or several series have the most slices.
        NoSeriesError: no series is a CT scan.
        MixedSeriesError: images with the same SeriesInstanceUID and another geometry may be missing in the stack of
            slices, and ``wanted`` is None.
        UnreadableFileError: a file that cannot be read may contain slices of the series.
        InputError: the selected series is not readable; the error states the reason.
    """
    if wanted is not None:
        chosen = _series_named(series, wanted)
    else:
        patients = len({candidate.patient for candidate in _ct_of(series) or series})
        if patients > 1:
            raise SeveralPatientsError(
                f"{series[0].source} contains images of {patients} patients:{_series_list(series, patients=True)}",
                remedy="Give the folder of one patient, or select a series with --series NUMBER.",
            )
        chosen = _largest_series(series)
    others = chosen.others
    if unreadable := others.unreadable_slices_of(chosen.uid):
        raise unreadable_files(chosen.source, unreadable, others.dicom)
    problem = chosen.problem
    if problem is not None and wanted is None and len(series) > 1:
        raise type(problem)(
            f"{problem.message} Available series:{_series_list(series)}",
            remedy=f"{problem.remedy} Or select another series with --series NUMBER.",
        )
    if problem is not None:
        raise problem
    if wanted is None:
        _check_complete(chosen, series)
    return replace(chosen, warnings=(*chosen.warnings, *_left_out(chosen, series)))


def _check_complete(chosen: DicomSeries, series: Sequence[DicomSeries]) -> None:
    parts = _missing_parts(chosen, series)
    if not parts:
        return
    count = sum(len(part.slices) for part in parts)
    elements = dict.fromkeys(differences(chosen, part) for part in parts)
    raise MixedSeriesError(
        f"One series in {chosen.source} has parts of different geometry: {len(chosen.slices)} of "
        f"{len(chosen.slices) + count} slices form a stack, but the other {count} may belong to the scan. They differ "
        f"in {' or '.join(elements)}. Available series:{_series_list(series)}",
        remedy="Export each part as a separate series, or select one part with --series NUMBER.",
    )


def _missing_parts(chosen: DicomSeries, series: Sequence[DicomSeries]) -> list[DicomSeries]:
    return [other for other in related(chosen, series) if may_be_missing(chosen, other)]


def _left_out(chosen: DicomSeries, series: Sequence[DicomSeries]) -> Iterator[str]:
    """Yield a sentence for everything beside the selected series that may concern its user, except other series."""
    beside = related(chosen, series)
    yield from (left_out(chosen, other) for other in beside)
    yield from (continued(other) for other in series if other not in beside and follows(chosen, other))
    if count := sum(len(other.slices) for other in series if other.patient != chosen.patient):
        yield (
            f"{count} image{'s' * (count > 1)} of another patient {_was(count)} left out: {element_name('PatientID')} "
            f"or {element_name('PatientName')} differs."
        )
    others = chosen.others
    if count := len(others.unreadable):
        yield (
            f"{count} DICOM file{'s that are' if count > 1 else ' that is'} not readable {_was(count)} left out: "
            f"{'they belong' if count > 1 else 'it belongs'} to other series or other modalities."
        )
    if count := others.without_image.count(chosen.uid) if chosen.uid else 0:
        yield (
            f"{count} DICOM object{'s' * (count > 1)} without image {_was(count)} left out, although the "
            "SeriesInstanceUID (0020,000E) is that of the scan."
        )
    if count := others.no_dicom:
        yield (
            f"{count} file{'s' * (count > 1)} {_was(count)} skipped, because {'they are' if count > 1 else 'it is'} "
            "empty or not DICOM in spite of the name."
        )


def _was(count: int) -> str:
    return "were" if count > 1 else "was"


def _ct_of(series: Sequence[DicomSeries]) -> list[DicomSeries]:
    return [candidate for candidate in series if is_ct(candidate.slices[0])]


def _series_named(series: Sequence[DicomSeries], wanted: str) -> DicomSeries:
    found = [candidate for candidate in series if str(candidate.number) == wanted]
    found = found or [candidate for candidate in series if wanted and candidate.uid == wanted]
    found = found or [candidate for candidate in series if wanted and candidate.uid.endswith(wanted)]
    scans = [candidate for candidate in found if not isinstance(candidate.problem, NotACtError)]
    for selected in (found, scans):  # a localiser may have the SeriesInstanceUID of its scan
        if len(selected) == 1:
            return selected[0]
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
    # A series in several parts counts as a whole, so that no smaller series replaces it.
    sizes = [_size_with_parts(candidate, series) for candidate in scans]
    largest = [candidate for candidate, size in zip(scans, sizes, strict=True) if size == max(sizes)]
    if len(largest) == 1:
        return largest[0]
    most = max(len(candidate.slices) for candidate in largest)
    raise ChooseSeriesError(
        f"{series[0].source} contains {len(largest)} series of {most} slices:{_series_list(series)}",
        remedy="Select one series with --series NUMBER.",
    )


def _size_with_parts(candidate: DicomSeries, series: Sequence[DicomSeries]) -> int:
    """Return the number of slices, including parts of the scan that are not larger than the candidate."""
    size = len(candidate.slices)
    return size + sum(len(part.slices) for part in _missing_parts(candidate, series) if len(part.slices) <= size)


def _series_list(series: Sequence[DicomSeries], *, patients: bool = False) -> str:
    order = list(dict.fromkeys(candidate.patient for candidate in series))
    lines = []
    for candidate in series:
        who = f"patient {order.index(candidate.patient) + 1}: " if patients else ""
        state = "; not readable" if candidate.problem else "; with warnings" if candidate.warnings else ""
        lines.append(f"\n  {candidate.number}: {who}{candidate.description()}{state}")
    return "".join(lines)
