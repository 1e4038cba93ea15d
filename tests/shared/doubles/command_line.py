"""The command line, run in this process with a small site."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from doubles.encoder import label_of, write_case, write_random_adapter, write_tiny_encoder
from fseft_edge.cli.main import run as run_command
from fseft_edge.runtime.encoder.bundle import EncoderBundle

LIVER = f"liver={label_of('liver')}"
CHEAP = ("--method", "linear", "--levels", "finest", "--device", "cpu", "--backend", "torch")
ON_CPU = ("--device", "cpu", "--backend", "torch")


@dataclass(frozen=True)
class Outcome:
    """Exit code and output of a command."""

    code: int
    out: str
    err: str


Run = Callable[..., Outcome]


def assert_error_with_remedy(outcome: Outcome) -> None:
    """Check that stderr ends with ``Error: MESSAGE`` and a second line with a remedy, or is a usage error of click."""
    assert "Traceback" not in outcome.err
    before, separator, error = outcome.err.partition("Error: ")
    assert separator
    if before.startswith("Usage: "):
        assert "--help" in before
        return
    lines = error.splitlines()
    assert len(lines) == 2
    assert all(line.strip() for line in lines)


def runner(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Return a function that runs ``fseft-edge`` like its console script, but in this process."""

    def run_main(*arguments: object) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["fseft-edge", *map(str, arguments)])
        capsys.readouterr()
        code = run_command()
        printed = capsys.readouterr()
        return Outcome(code, printed.out, printed.err)

    return run_main


@dataclass(frozen=True)
class Site:
    """A folder with two annotated scans, an encoder, an adapter, and damaged or wrong files."""

    root: Path
    bundle: EncoderBundle

    def __truediv__(self, name: str) -> Path:
        return self.root / name

    def adapt(self, *more: object, output: object) -> list[object]:
        where = ["--encoder", self.bundle.path, "--images", self / "images", "--labels", self / "labels"]
        return ["adapt", *where, "-o", output, *CHEAP, "--cache", self / "cache", *more]

    def segment(self, *scans: object, output: object, adapter: str = "a.adapter") -> list[object]:
        where = ["--adapter", self / adapter, "-o", output, "--cache", self / "cache"]
        return ["segment", *scans, *where, *ON_CPU]


def command_line_site(root: Path) -> Site:
    """Write the files of a site into an empty folder."""
    for seed in (1, 2):
        write_case(root, f"case_{seed}", seed)
    site = Site(root, write_tiny_encoder(root / "tiny.encoder"))
    write_random_adapter(root / "a.adapter", site.bundle, ("liver", "spleen"), support_volumes_ml=(1.0,))
    other = write_tiny_encoder(root / "elsewhere" / "other.encoder", seed=9)
    write_random_adapter(root / "elsewhere" / "other.adapter", other)
    write_tiny_encoder(root / "elsewhere" / "future.encoder", architecture="net_of_2030")
    broken = root / "elsewhere" / "broken.encoder"
    shutil.copytree(site.bundle.path, broken)
    weights = bytearray((broken / "encoder.safetensors").read_bytes())
    weights[-1] ^= 1
    (broken / "encoder.safetensors").write_bytes(weights)
    (root / "alone").mkdir()
    shutil.copy(root / "a.adapter", root / "alone" / "alone.adapter")
    (root / "cache").mkdir()
    (root / "bad").mkdir()
    (root / "bad" / "truncated.nii.gz").write_bytes((site / "images/case_1.nii.gz").read_bytes()[:9000])
    nib.save(nib.Nifti1Image(np.zeros((8, 8, 8, 5), np.int16), np.eye(4)), root / "bad" / "series.nii.gz")
    (root / "bad" / "text.adapter").write_text("liver, spleen")
    (root / "bad" / "config.toml").write_text("not = [a table")
    (root / "shifted").mkdir()
    for name in ("case_1", "case_2"):
        labels = nib.load(site / "labels" / f"{name}.nii.gz")
        shifted = labels.affine + np.array([[0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 9], [0, 0, 0, 0]])
        nib.save(nib.Nifti1Image(np.asanyarray(labels.dataobj), shifted), root / "shifted" / f"{name}.nii.gz")
    return site
