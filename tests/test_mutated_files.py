"""Files that are damaged or changed at random are refused with a remedy, or read as independent readers read them.

`python benchmarks/mutated_files.py --only KIND --number N` shows one mutation; its ``--count 2000`` checks many more.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from doubles.mutated_files import FAULTS, KINDS, Kind, Mutator, Nifti, Result

from fseft_edge.runtime.errors import UnreadableFileError
from fseft_edge.runtime.scans.volume import Volume

COUNTS = {"NIfTI": 90, "label map": 60, "DICOM": 90, "adapter": 40, "encoder bundle": 40}
OTHERS = 20
SCANS = ("NIfTI", "label map", "DICOM")
"""The kinds for which independent readers exist."""


@pytest.fixture(scope="module")
def mutator(tmp_path_factory: pytest.TempPathFactory) -> Mutator:
    return Mutator(tmp_path_factory.mktemp("mutated"))


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_every_mutation_is_refused_with_a_remedy_or_read_as_other_readers_read_it(kind: Kind, mutator: Mutator) -> None:
    verdicts = {number: mutator.check(kind, number) for number in range(COUNTS.get(kind.name, OTHERS))}
    faults = [f"{number}: {verdict}" for number, verdict in verdicts.items() if verdict.result in FAULTS]
    assert not faults, "\n".join(faults)
    assert {verdict.result for verdict in verdicts.values()} & {"refused"} or kind.name == "batch record"
    assert {verdict.result for verdict in verdicts.values()} & {"agreed", "accepted"}


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_a_file_without_a_mutation_is_read_as_other_readers_read_it(kind: Kind, tmp_path: Path) -> None:
    kind.write(tmp_path)
    for folder in sorted(tmp_path.iterdir()):
        verdict = kind.compare(folder, kind.read(folder))
        assert verdict.result == ("agreed" if kind.name in SCANS else "accepted"), (folder.name, verdict)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_a_mutation_is_the_same_in_every_run(kind: Kind, tmp_path: Path) -> None:
    first, second, other = (Mutator(tmp_path / str(run), seed) for run, seed in enumerate((0, 0, 1)))
    said = [[mutator.mutate(kind, number)[2] for number in range(4)] for mutator in (first, second, other)]
    assert said[0] == said[1] != said[2]


class Misread(Nifti):
    """A reader with one fault."""

    def __init__(self, fault: str) -> None:
        self.fault = fault

    def mutate(self, folder: Path, random: np.random.Generator) -> str:
        return ""

    def read(self, folder: Path) -> Volume:
        volume = super().read(folder)
        match self.fault:
            case "shift":
                affine = np.array(volume.affine)
                affine[0, 3] += 0.2 * min(volume.spacing)
                return Volume(volume.array, affine, volume.slope, volume.intercept)
            case "values":
                return Volume(volume.array, volume.affine, volume.slope, volume.intercept + 1)
            case "error":
                raise ValueError
            case "no remedy":
                raise UnreadableFileError("No.", remedy=" ")
            case "private":
                raise UnreadableFileError("Secretname^Ada is not readable.", remedy="Copy the file.")
            case "warning":
                warnings.warn("overflow", RuntimeWarning, stacklevel=1)
        return volume


@pytest.mark.parametrize(
    ("fault", "result"),
    [
        ("none", "agreed"),
        ("shift", "wrong"),
        ("values", "wrong"),
        ("error", "traceback"),
        ("no remedy", "traceback"),
        ("private", "private"),
        ("warning", "warning"),
    ],
)
def test_the_check_sees_what_it_should(fault: str, result: Result, tmp_path: Path) -> None:
    assert Mutator(tmp_path).check(Misread(fault), 0).result == result


def test_the_check_sees_a_needless_refusal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> Volume:
        raise UnreadableFileError("No.", remedy="Copy the file.")

    monkeypatch.setattr(Misread, "read", refuse)
    mutator = Mutator(tmp_path)
    assert mutator.check(Misread(""), 0).result == "refused"
    assert mutator.check(Misread(""), 0, look_for_needless=True).result == "needless"
