"""Support scans that belong together: scans of one patient, and copies of one scan.

Cross-validation leaves the scans of a group out together. Otherwise an adapter would be scored on a patient that it was
trained on, and the expected DSC on new patients would be too high.
"""

from __future__ import annotations

import csv
import logging
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fseft_edge.runtime.errors import UnreadableFileError, UsageError

_LOG = logging.getLogger(__name__)

GroupRule = Mapping[str, str] | Sequence[str] | re.Pattern[str]
"""The group (patient) of each case name, or of each case in order; or a pattern for case names, whose first capture
group is the patient."""

_CSV_REMEDY = (
    "Give a CSV file with the header case,group (or case;group) and one row for each case, for example ct_01,patient_a."
)


@dataclass(frozen=True)
class SupportIdentity:
    """What identifies a support scan.

    Attributes:
        case: case name.
        scan: hash of the voxels (:func:`fseft_edge.runtime.scans.content.scan_sha256`).
        annotation: hash of the annotation (:func:`fseft_edge.runtime.scans.content.annotation_sha256`).
    """

    case: str
    scan: str
    annotation: str


@dataclass(frozen=True)
class Grouping:
    """The groups of a support set.

    Attributes:
        numbers: number of the group of each scan.
        by_patient: whether the user named the patients; if not, only copies of one scan are in one group.
    """

    numbers: tuple[int, ...]
    by_patient: bool

    @property
    def count(self) -> int:
        """The number of groups."""
        return len(set(self.numbers))

    @property
    def two(self) -> str:
        """What cross-validation needs, for messages."""
        return "scans of two patients" if self.by_patient else "two different scans"

    @property
    def stored_count(self) -> int | None:
        """The number of groups to store in an adapter; None if patients are unknown and each scan is a group."""
        return self.count if self.by_patient or self.count < len(self.numbers) else None


def read_groups(path: Path) -> dict[str, str]:
    """Return the group of each case from a CSV file with the columns ``case`` and ``group``.

    Raises:
        UnreadableFileError: the file is missing or not text, a column is missing, a cell is empty, or a case has two
            groups.
    """
    groups: dict[str, str] = {}
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            # Spreadsheets write semicolons in countries where the comma is the decimal sign.
            separator = ";" if ";" in file.readline() else ","
            file.seek(0)
            rows = csv.DictReader(file, delimiter=separator)
            columns = [column.strip() for column in rows.fieldnames or ()]
            rows.fieldnames = columns
            if not {"case", "group"} <= set(columns):
                raise UnreadableFileError(
                    f"The header of the groups file {path} does not have the columns case and group; it has "
                    f"{len(columns)} {'column' if len(columns) == 1 else 'columns'}.",
                    remedy=_CSV_REMEDY,
                )
            for row in rows:
                case, group = (str(row[column] or "").strip() for column in ("case", "group"))
                if not case or not group:
                    raise UnreadableFileError(
                        f"Line {rows.line_num} of the groups file {path} has no case or no group.", remedy=_CSV_REMEDY
                    )
                if groups.setdefault(case, group) != group:
                    raise UnreadableFileError(
                        f"The groups file {path} contains two groups for the case {case}.",
                        remedy="Give each case one group.",
                    )
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UnreadableFileError(
            f"The groups file {path} cannot be read as a CSV file in UTF-8.", remedy=_CSV_REMEDY
        ) from error
    if not groups:
        raise UnreadableFileError(f"The groups file {path} contains no case.", remedy=_CSV_REMEDY)
    return groups


def group_pattern(text: str) -> re.Pattern[str]:
    """Return the pattern of ``--group-pattern``.

    Raises:
        UsageError: the text is not a regular expression, or has no capture group.
    """
    remedy = "Give a regular expression with the patient in parentheses, for example --group-pattern '^(P[0-9]+)_'."
    try:
        pattern = re.compile(text)
    except re.error as error:
        raise UsageError(f"--group-pattern is not a regular expression: {error}.", remedy=remedy) from error
    if pattern.groups < 1:
        raise UsageError("--group-pattern contains no parentheses, which mark the patient.", remedy=remedy)
    return pattern


def groups_of(groups: GroupRule, cases: Sequence[str], *, known: Collection[str] = ()) -> dict[str, str]:
    """Return the group of each case.

    Args:
        groups: group of each case name; or one group for each of ``cases``, in this order; or a pattern that finds the
            group in a case name (:func:`re.Pattern.search`, first capture group).
        cases: case names of the support scans.
        known: case names that ``groups`` may also contain, although they are not used.

    Raises:
        UsageError: a case has no group, the pattern does not match a case name, or ``groups`` contains a case that does
            not exist.
    """
    if isinstance(groups, re.Pattern):
        found = {case: groups.search(case) for case in cases}
        of_cases = {case: match[1] for case, match in found.items() if match is not None and match[1]}
        if missing := [case for case in cases if case not in of_cases]:
            raise UsageError(
                f"The pattern of the groups (--group-pattern) finds no patient in the case names {', '.join(missing)}.",
                remedy="Correct --group-pattern, or name the patient of each case in a file with --groups.",
            )
        return of_cases
    if isinstance(groups, Mapping):
        if missing := [case for case in cases if case not in groups]:
            raise UsageError(
                f"The groups (--groups) do not contain the cases {', '.join(missing)}.",
                remedy="Add a group for each of these cases, or select other cases with --case.",
            )
        if unknown := [case for case in groups if case not in {*cases, *known}]:
            raise UsageError(
                f"The groups (--groups) contain the cases {', '.join(unknown)}, but there are no such scans.",
                remedy="Correct the case names of the groups: a case name is a file name without .nii.gz or .nii.",
            )
        return {case: str(groups[case]) for case in cases}
    if isinstance(groups, str) or len(groups) != len(cases):
        given = "one text" if isinstance(groups, str) else f"{len(groups)} groups"
        raise UsageError(
            f"{given[0].upper()}{given[1:]} are given for {len(cases)} scans.".replace("text are", "text is"),
            remedy="Give one group for each scan, in the order of the scans.",
        )
    return {case: str(group) for case, group in zip(cases, groups, strict=True)}


def grouped(support: Sequence[SupportIdentity], patients: Mapping[str, str] | None) -> Grouping:
    """Return the groups of a support set, and log a warning for each scan that occurs twice.

    Args:
        support: the support scans.
        patients: patient of each case (see :func:`groups_of`); None if the patients are not known.
    """
    numbers = list(range(len(support)))

    def join(first: int, second: int) -> None:
        kept, dropped = sorted((numbers[first], numbers[second]))
        numbers[:] = [kept if number == dropped else number for number in numbers]

    seen_scans: dict[str, int] = {}
    seen_patients: dict[str, int] = {}
    for index, scan in enumerate(support):
        first = seen_scans.setdefault(scan.scan, index)
        if first != index:
            _warn_of_copy(support[first], scan, patients)
            join(first, index)
        if patients is not None:
            join(seen_patients.setdefault(patients[scan.case], index), index)
    grouping = Grouping(tuple(numbers), patients is not None)
    if patients is not None:
        _LOG.info("groups of the support set: %d scans of %d patients", len(support), grouping.count)
    return grouping


def _warn_of_copy(first: SupportIdentity, copy: SupportIdentity, patients: Mapping[str, str] | None) -> None:
    other_patient = patients is not None and patients[first.case] != patients[copy.case]
    _LOG.warning(
        "the cases %s and %s contain the same scan%s%s: cross-validation leaves them out together, and the scan counts "
        "twice in the training",
        first.case,
        copy.case,
        "" if first.annotation == copy.annotation else ", with different annotations",
        ", although their groups differ" if other_patient else "",
    )
