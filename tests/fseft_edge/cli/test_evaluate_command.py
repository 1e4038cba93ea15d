"""The command `evaluate`: false positives, label values of masks, and hints."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from doubles.command_line import Run, runner

from fseft_edge.runtime.scans.nifti import write_label_map
from fseft_edge.runtime.scans.volume import LabelMap


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    return runner(monkeypatch, capsys)


@pytest.fixture
def folders(tmp_path: Path) -> list[object]:
    """Masks of two scans with swapped label values. The reference of the second scan does not contain the kidney."""
    both = np.zeros((20, 20, 20), np.uint8)
    both[4:14, 4:14, 4:9], both[4:14, 4:14, 9:14] = 1, 2
    swapped = np.array([0, 2, 1], np.uint8)[both]
    only = np.array([0, 0, 2], np.uint8)[both]
    files = {"masks/a": swapped, "masks/b": swapped, "references/a": both, "references/b": only}
    for name, array in files.items():
        write_label_map(tmp_path / f"{name}.nii.gz", LabelMap(array, np.diag([2.0, 2.0, 2.0, 1.0])))
    return ["evaluate", "--predictions", tmp_path / "masks", "--references", tmp_path / "references"]


def test_false_positives_and_swapped_label_values_are_shown(tmp_path: Path, run: Run, folders: list[object]) -> None:
    organs = ("--organ", "kidney=1,spleen=2")
    outcome = run(*folders, *organs)
    assert outcome.code == 0
    assert "only in the mask: 1 of 1" in outcome.out
    assert "WARNING: The label values of kidney may be wrong: in 1 case," in outcome.err
    assert "--prediction-organ" in outcome.err
    right = ("--prediction-organ", "kidney=2,spleen=1")
    outcome = run(*folders, *organs, *right, "--always-annotated", "kidney", "--json", tmp_path / "e.json")
    assert outcome.code == 0
    assert "WARNING" not in outcome.err
    assert "false positive" in outcome.out
    kidney, spleen = json.loads((tmp_path / "e.json").read_text())["organs"]
    assert (kidney["dsc"]["mean"], kidney["false_positives"], kidney["only_predicted_ml"]) == (0.5, 1, 4.0)
    assert (spleen["dsc"]["mean"], spleen["false_positives"], spleen["only_predicted_ml"]) == (1.0, 0, 0.0)
    both = json.loads((tmp_path / "e.json").read_text())
    run(*folders, *organs, *right, "--always-annotated", "all", "--json", tmp_path / "all.json")
    assert json.loads((tmp_path / "all.json").read_text())["always_annotated"] == ["kidney", "spleen"]
    assert both["always_annotated"] == ["kidney"]


def test_an_organ_that_is_always_annotated_must_be_an_organ_of_the_evaluation(run: Run, folders: list[object]) -> None:
    outcome = run(*folders, "--organ", "kidney=1", "--always-annotated", "spleen")
    assert outcome.code == 2
    assert "--always-annotated" in outcome.err
