"""The options of `adapt` and `finetune` for the patients of the support scans."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from doubles.command_line import Run, Site, assert_error_with_remedy, command_line_site, runner
from doubles.encoder import label_of, write_case

from fseft_edge.adapters.file import read_adapter

LIVER = f"liver={label_of('liver')}"


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    return runner(monkeypatch, capsys)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Site:
    """A site whose third scan is of the first patient."""
    site = command_line_site(tmp_path_factory.mktemp("site"))
    write_case(site.root, "case_3", 3)
    (site / "groups.csv").write_text("case,group\ncase_1,anna\ncase_2,bo\ncase_3,anna\n")
    return site


def test_the_patients_of_a_table_are_counted(site: Site, tmp_path: Path, run: Run) -> None:
    outcome = run(*site.adapt("--organ", LIVER, "--groups", site / "groups.csv", output=tmp_path / "a.adapter"))
    assert outcome.code == 0
    assert "All scans of a patient were left out together: 3 scans of 2 patients." in outcome.out
    assert "anna" not in outcome.out + outcome.err


def test_patients_are_found_in_file_names(site: Site, tmp_path: Path, run: Run) -> None:
    for part in ("images", "labels"):
        (tmp_path / part).mkdir()
        for number, name in enumerate(("P01_a", "P02_a", "P01_b"), start=1):
            shutil.copy(site / part / f"case_{number}.nii.gz", tmp_path / part / f"{name}.nii.gz")
    moved = ("--images", tmp_path / "images", "--labels", tmp_path / "labels")
    rule = ("--group-pattern", "^(P[0-9]+)_")
    outcome = run(*site.adapt("--organ", LIVER, *moved, *rule, "--json", output=tmp_path / "a.adapter"))
    described = json.loads(outcome.out)
    assert described["support_groups"] == 2
    assert len(described["support_annotations"]) == 3


def test_a_copy_of_a_scan_is_reported(site: Site, tmp_path: Path, run: Run, caplog: pytest.LogCaptureFixture) -> None:
    for part in ("images", "labels"):
        shutil.copytree(site / part, tmp_path / part, ignore=shutil.ignore_patterns("case_3*"))
        shutil.copy(site / part / "case_1.nii.gz", tmp_path / part / "again.nii.gz")
    moved = ("--images", tmp_path / "images", "--labels", tmp_path / "labels")
    outcome = run(*site.adapt("--organ", LIVER, *moved, output=tmp_path / "a.adapter"))
    assert outcome.code == 0
    assert "Copies of a scan, and scans of one patient, were left out together: 3 scans in 2 groups." in outcome.out
    assert "again and case_1 contain the same scan" in caplog.text


WRONG = {
    "two rules": (2, ["--groups", "--group-pattern"], ["--groups", "{s}/groups.csv", "--group-pattern", "(x)"]),
    "no patient in a name": (2, ["--group-pattern", "case_1, case_2, case_3"], ["--group-pattern", "^(P[0-9])"]),
    "no parentheses": (2, ["--group-pattern", "parentheses"], ["--group-pattern", "case"]),
    "a missing table": (3, ["none.csv"], ["--groups", "{s}/none.csv"]),
    "a table that is a scan": (3, ["case_1.nii.gz", "UTF-8"], ["--groups", "{s}/images/case_1.nii.gz"]),
}


@pytest.mark.parametrize("name", WRONG)
def test_groups_that_say_nothing_are_refused(site: Site, tmp_path: Path, run: Run, name: str) -> None:
    code, named, options = WRONG[name]
    more = [option.format(s=site.root) for option in options]
    for command in (
        site.adapt("--organ", LIVER, output=tmp_path / "a.adapter"),
        [
            *("finetune", "--encoder", site.bundle.path, "--images", site / "images", "--labels", site / "labels"),
            *("--organ", LIVER, "--method", "bitfit", "-o", tmp_path / "a.tuning"),
        ],
    ):
        outcome = run(*command, *more)
        assert outcome.code == code
        assert all(text in outcome.err for text in named)
        assert_error_with_remedy(outcome)
    assert list(tmp_path.iterdir()) == []


def test_the_line_of_an_organ_says_what_its_masks_get(
    site: Site, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fseft_edge.adaptation.cross_validation._LEAST_GAIN_BY_SIZE", -1)
    monkeypatch.setattr("fseft_edge.adaptation.cross_validation._FEWEST_SCANS_BY_SIZE", 1)
    monkeypatch.setattr("fseft_edge.adaptation.cross_validation._MIN_GAIN_OF_POST_PROCESSING", 2)
    outcome = run(*site.adapt("--organ", LIVER, "--validate", output=tmp_path / "a.adapter"))
    assert outcome.code == 0
    (line,) = (line for line in outcome.out.splitlines() if line.startswith("liver: "))
    assert line.endswith("on left-out scans); its threshold follows its size")
    (organ,) = read_adapter(tmp_path / "a.adapter").description.organs
    volumes = organ.support_volumes_ml
    assert organ.expected_ml == pytest.approx((0.9 * min(volumes), 1.1 * max(volumes)), abs=1e-3)
