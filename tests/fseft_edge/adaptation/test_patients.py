"""Groups of support scans: scans of one patient, and copies of one scan."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

import pytest
from doubles.errors import refused

from fseft_edge.adaptation.patients import SupportIdentity, group_pattern, grouped, groups_of, read_groups
from fseft_edge.runtime.errors import UnreadableFileError, UsageError


def support(*scans: str, annotations: str = "") -> list[SupportIdentity]:
    """Return support scans with these voxels; case names are c0, c1, ..."""
    return [
        SupportIdentity(f"c{index}", scan, annotation)
        for index, (scan, annotation) in enumerate(zip(scans, annotations or scans, strict=True))
    ]


def test_a_table_of_groups_is_read_with_columns_in_any_order(tmp_path: Path) -> None:
    path = tmp_path / "groups.csv"
    path.write_bytes("\ufeffgroup,age, case \r\nanna, 3,ct_1\r\nanna,4,ct_2\r\nbo,5,ct_3\r\n".encode())
    assert read_groups(path) == {"ct_1": "anna", "ct_2": "anna", "ct_3": "bo"}


def test_a_table_may_have_semicolons(tmp_path: Path) -> None:
    (tmp_path / "groups.csv").write_text("case;group\nct_1;anna\n")
    assert read_groups(tmp_path / "groups.csv") == {"ct_1": "anna"}


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("ct_1,anna\nct_2,bo\n", "case and group"),
        ("case|group\nct_1|anna\n", "1 column"),
        ("case,group\nct_1,\n", "Line 2"),
        ("case,group\nct_1\n", "Line 2"),
        ("case,group\nct_1,anna\nct_1,bo\n", "ct_1"),
        ("case,group\n", "no case"),
        ("", "case and group"),
        ("case,group\nct_1,\xe4", "UTF-8"),
    ],
)
def test_a_table_without_a_group_for_each_of_its_cases_is_refused(tmp_path: Path, text: str, named: str) -> None:
    path = tmp_path / "groups.csv"
    path.write_bytes(text.encode("latin-1"))
    with refused(UnreadableFileError, path, named) as caught:
        read_groups(path)
    assert "anna" not in caught.value.message


def test_a_missing_table_is_refused(tmp_path: Path) -> None:
    with refused(UnreadableFileError, tmp_path / "none.csv"):
        read_groups(tmp_path / "none.csv")


def test_groups_come_from_a_table_a_list_or_a_pattern() -> None:
    cases = ["P01_a", "P01_b", "P02_a"]
    wanted = {"P01_a": "P01", "P01_b": "P01", "P02_a": "P02"}
    assert groups_of(wanted, cases) == wanted
    assert groups_of({**wanted, "P03_a": "P03"}, cases, known=["P03_a"]) == wanted
    assert groups_of(["P01", "P01", "P02"], cases) == wanted
    assert groups_of(group_pattern(r"^(P\d+)_"), cases) == wanted


@pytest.mark.parametrize(
    ("groups", "named"),
    [
        ({"a": "1"}, ["b", "--groups"]),
        ({"a": "1", "b": "1", "c": "2"}, ["c", "--groups"]),
        (["1"], ["1 groups", "2 scans"]),
        ("ab", ["2 scans"]),
        (re.compile("(a)"), ["b", "--group-pattern"]),
        (re.compile("a|(b)"), ["a", "--group-pattern"]),
    ],
)
def test_a_case_without_a_group_or_a_group_without_a_case_is_refused(groups: Any, named: list[str]) -> None:
    with refused(UsageError, *named):
        groups_of(groups, ["a", "b"])


@pytest.mark.parametrize("text", ["P[0-9]+_", "(P[0-9]+"])
def test_a_pattern_without_a_patient_is_refused(text: str) -> None:
    with refused(UsageError, "--group-pattern"):
        group_pattern(text)


def test_scans_of_one_patient_and_copies_of_one_scan_are_one_group(caplog: pytest.LogCaptureFixture) -> None:
    patients = {"c0": "anna", "c1": "bo", "c2": "anna", "c3": "cleo"}
    assert grouped(support("u", "v", "w", "x"), patients).numbers == (0, 1, 0, 3)
    assert grouped(support("u", "v", "w", "x"), None).numbers == (0, 1, 2, 3)
    assert not caplog.records
    assert grouped(support("u", "v", "u", "x"), None).numbers == (0, 1, 0, 3)
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "c0 and c2 contain the same scan:" in record.getMessage()


def test_a_copy_joins_the_groups_of_its_patients(caplog: pytest.LogCaptureFixture) -> None:
    patients = {"c0": "anna", "c1": "bo", "c2": "bo", "c3": "anna"}
    assert grouped(support("u", "v", "u", "x"), patients).numbers == (0, 0, 0, 0)
    assert "although their groups differ" in caplog.text
    assert "anna" not in caplog.text


def test_two_annotations_of_one_scan_are_named(caplog: pytest.LogCaptureFixture) -> None:
    assert grouped(support("u", "u", annotations="xy"), None).count == 1
    assert "c0 and c1 contain the same scan, with different annotations" in caplog.text


@pytest.mark.parametrize(
    ("scans", "patients", "stored"),
    [("uvw", None, None), ("uvu", None, 2), ("uvw", {"c0": "a", "c1": "b", "c2": "c"}, 3)],
)
def test_the_number_of_groups_is_stored_if_it_says_something(
    scans: str, patients: dict[str, str] | None, stored: int | None
) -> None:
    assert grouped(support(*scans), patients).stored_count == stored
