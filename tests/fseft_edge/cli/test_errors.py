"""Errors of the command line: exit code, the file or option that the message names, remedy, no files left."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from doubles.command_line import LIVER, ON_CPU, Run, Site, assert_error_with_remedy, command_line_site, runner
from doubles.encoder import write_tiny_encoder

from fseft_edge.runtime.encoder.backends.base import EncoderSession
from fseft_edge.runtime.errors import MissingBackendError
from fseft_edge.runtime.system import atomic


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    return runner(monkeypatch, capsys)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Site:
    return command_line_site(tmp_path_factory.mktemp("site"))


Case = tuple[int, list[str], Callable[[Site, Path], list[object]]]
ERRORS: dict[str, Case] = {
    "an unknown command": (2, ["paint"], lambda s, t: ["paint"]),
    "an unknown option": (2, ["--colour"], lambda s, t: [*s.segment("ct.nii", output=t), "--colour", "red"]),
    "a missing option": (2, ["--output"], lambda s, t: ["segment", "ct.nii.gz", "--adapter", s / "a.adapter"]),
    "a malformed organ": (
        2,
        ["'liver='", "--organ"],
        lambda s, t: s.adapt("--organ", "liver=", output=t / "out"),
    ),
    "an organ named twice": (
        2,
        ["'liver'"],
        lambda s, t: s.adapt("--organ", "liver=1,liver=2", output=t / "out"),
    ),
    "an unknown device": (
        2,
        ["'gpu'"],
        lambda s, t: [*s.segment(s / "images/case_1.nii.gz", output=t / "out"), "--device", "gpu"],
    ),
    "an unknown backend": (
        2,
        ["'abacus'"],
        lambda s, t: [*s.segment(s / "images/case_1.nii.gz", output=t / "out"), "--backend", "abacus"],
    ),
    "a negative seed": (
        2,
        ["--seed", "-1"],
        lambda s, t: s.adapt("--organ", LIVER, "--seed", -1, output=t / "out"),
    ),
    "a negative tolerance": (
        2,
        ["--nsd-tolerance", "-1"],
        lambda s, t: [
            *("evaluate", "--predictions", s / "labels", "--references", s / "labels"),
            *("--organ", LIVER, "--nsd-tolerance", -1),
        ],
    ),
    "transduction without support": (
        2,
        ["--transductive", "--support-images"],
        lambda s, t: [*s.segment(s / "images/case_1.nii.gz", output=t / "out"), "--transductive"],
    ),
    "a prior without transduction": (
        2,
        ["--size-prior", "--transductive"],
        lambda s, t: [*s.segment(s / "images/case_1.nii.gz", output=t / "out"), "--size-prior", "liver=1..2ml"],
    ),
    "a prior upside down": (
        2,
        ["2 to 1 ml"],
        lambda s, t: [
            *s.segment(s / "images/case_1.nii.gz", output=t / "out"),
            *("--transductive", "--support-images", s / "images", "--support-labels", s / "labels"),
            *("--size-prior", "liver=2..1ml"),
        ],
    ),
    "a prior of another organ": (
        2,
        ["tail"],
        lambda s, t: [
            *s.segment(s / "images/case_1.nii.gz", output=t / "out"),
            *("--transductive", "--support-images", s / "images", "--support-labels", s / "labels"),
            *("--size-prior", "tail=1..2ml"),
        ],
    ),
    "an output among the inputs": (
        2,
        ["{s}/images"],
        lambda s, t: s.segment(s / "images", output=s / "images"),
    ),
    "an existing bundle": (
        2,
        ["tiny.encoder"],
        lambda s, t: ["export", "-o", s.bundle.path],
    ),
    "another folder instead of a demo's folder": (
        2,
        ["{s}/images", "--output"],
        lambda s, t: ["demo", "-o", s / "images"],
    ),
    "a missing scan": (
        3,
        ["none.nii.gz"],
        lambda s, t: s.segment(s / "none.nii.gz", output=t / "out"),
    ),
    "a truncated scan": (
        3,
        ["truncated.nii.gz"],
        lambda s, t: s.segment(s / "bad/truncated.nii.gz", output=t / "out"),
    ),
    "a time series": (
        3,
        ["series.nii.gz", "4"],
        lambda s, t: s.segment(s / "bad/series.nii.gz", output=t / "out"),
    ),
    "labels instead of a scan": (
        3,
        ["labels/case_1.nii.gz", "HU"],
        lambda s, t: s.segment(s / "labels/case_1.nii.gz", output=t / "out"),
    ),
    "an annotation on another lattice": (
        3,
        ["images/case_1.nii.gz", "shifted/case_1.nii.gz"],
        lambda s, t: s.adapt("--organ", LIVER, "--labels", s / "shifted", output=t / "out"),
    ),
    "a missing label": (
        3,
        ["99", "tumour", "--organ"],
        lambda s, t: s.adapt("--organ", "tumour=99", output=t / "out"),
    ),
    "auto with levels": (
        2,
        ["--method auto", "--levels"],
        lambda s, t: s.adapt("--organ", LIVER, "--method", "auto", "--levels", "finest", output=t / "out"),
    ),
    "auto without validation": (
        2,
        ["--method auto", "--no-validate"],
        lambda s, t: s.adapt("--organ", LIVER, "--method", "auto", "--no-validate", output=t / "out"),
    ),
    "a linear adapter with epochs": (
        2,
        ["--method linear", "--epochs"],
        lambda s, t: s.adapt("--organ", LIVER, "--epochs", 3, output=t / "out"),
    ),
    "a missing case": (
        3,
        ["case_7"],
        lambda s, t: s.adapt("--organ", LIVER, "--case", "case_7", output=t / "out"),
    ),
    "a bundle with a changed byte": (
        3,
        ["broken.encoder/encoder.safetensors"],
        lambda s, t: s.adapt("--organ", LIVER, "--encoder", s / "elsewhere/broken.encoder", output=t / "out"),
    ),
    "a bundle of a newer version": (
        3,
        ["'net_of_2030'"],
        lambda s, t: s.adapt(
            *("--organ", LIVER, "--backend", "auto", "--encoder", s / "elsewhere/future.encoder"), output=t / "out"
        ),
    ),
    "a folder instead of a bundle": (
        3,
        ["{s}/images"],
        lambda s, t: s.adapt("--organ", LIVER, "--encoder", s / "images", output=t / "out"),
    ),
    "an adapter of another encoder": (
        3,
        ["other.adapter", "--encoder"],
        lambda s, t: [
            *s.segment(s / "images/case_1.nii.gz", adapter="elsewhere/other.adapter", output=t / "out"),
            *("--encoder", s.bundle.path),
        ],
    ),
    "a graph of another encoder": (
        3,
        ["other.adapter", "--encoder"],
        lambda s, t: [
            *("export-adapter", s / "elsewhere/other.adapter", "-o", t / "out.onnx", "--encoder", s.bundle.path)
        ],
    ),
    "a graph without an encoder": (
        3,
        ["alone.adapter", "--encoder"],
        lambda s, t: ["export-adapter", s / "alone/alone.adapter", "-o", t / "out.onnx"],
    ),
    "a graph of another name": (
        2,
        ["out.engine", "NAME.onnx"],
        lambda s, t: ["export-adapter", s / "a.adapter", "-o", t / "out.engine"],
    ),
    "a text file instead of an adapter": (
        3,
        ["text.adapter"],
        lambda s, t: s.segment(s / "images/case_1.nii.gz", adapter="bad/text.adapter", output=t / "out"),
    ),
    "a text file instead of a checkpoint": (
        3,
        ["text.adapter"],
        lambda s, t: ["export", s / "bad/text.adapter", "-o", t / "out", "--no-onnx"],
    ),
    "no predictions": (
        3,
        ["nowhere"],
        lambda s, t: ["evaluate", "--predictions", s / "nowhere", "--references", s / "labels", "--organ", LIVER],
    ),
    "a damaged configuration": (
        3,
        ["config.toml"],
        lambda s, t: ["pretrain", s / "bad/config.toml", "--data-root", s.root, "-o", t / "out"],
    ),
    "a missing GPU": (
        4,
        ["cuda:99", "--device cpu"],
        lambda s, t: [*s.segment(s / "images/case_1.nii.gz", output=t / "out"), "--device", "cuda:99"],
    ),
}


@pytest.mark.parametrize(("code", "named", "arguments"), ERRORS.values(), ids=ERRORS)
def test_an_error_ends_with_its_exit_code_and_two_lines_on_stderr(
    site: Site,
    tmp_path: Path,
    run: Run,
    code: int,
    named: list[str],
    arguments: Callable[[Site, Path], list[object]],
) -> None:
    before = sorted(path for path in site.root.rglob("*") if site / "cache" not in path.parents)
    outcome = run(*arguments(site, tmp_path))
    assert outcome.code == code, outcome.err
    assert outcome.out == ""
    for name in named:
        assert name.format(s=site.root) in outcome.err
    assert_error_with_remedy(outcome)
    assert list(tmp_path.iterdir()) == []
    after = sorted(path for path in site.root.rglob("*") if site / "cache" not in path.parents)
    assert after == before


def test_a_missing_backend_is_an_environment_error_with_the_command_to_install_it(
    site: Site, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "graph.onnx").touch()
    bundle = write_tiny_encoder(tmp_path / "with_graph.encoder", graph=tmp_path / "graph.onnx")
    assert bundle.encoder_id == site.bundle.encoder_id
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    outcome = run(
        *site.segment(site / "images/case_1.nii.gz", output=tmp_path / "out"),
        *("--encoder", bundle.path, "--backend", "onnxruntime"),
    )
    assert outcome.code == 4
    assert "pip install 'fseft-edge[cpu]'" in outcome.err
    assert_error_with_remedy(outcome)
    assert not (tmp_path / "out").exists()


def _full_disk(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Redirect every file written into ``folder`` to ``/dev/full``, on which every write fails with ENOSPC."""
    temporary_sibling = atomic._temporary_sibling

    def on_full_device(target: Path) -> Path:
        temporary: Path = temporary_sibling(target)
        if folder in target.parents and target.suffix:  # not a folder, which a full disk can still hold
            temporary.parent.mkdir(parents=True, exist_ok=True)
            temporary.symlink_to("/dev/full")
        return temporary

    monkeypatch.setattr(atomic, "_temporary_sibling", on_full_device)


FULL: dict[str, Callable[[Site, Path], list[object]]] = {
    "adapt": lambda s, out: s.adapt("--organ", LIVER, output=out / "s.adapter"),
    "segment": lambda s, out: s.segment(s / "images/case_1.nii.gz", output=out),
    "export-adapter": lambda s, out: ["export-adapter", s / "a.adapter", "-o", out / "a.onnx"],
    "evaluate --csv": lambda s, out: [
        *("evaluate", "--predictions", s / "labels", "--references", s / "labels"),
        *("--organ", "liver=1", "--csv", out / "rows.csv"),
    ],
}


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
@pytest.mark.parametrize("arguments", FULL.values(), ids=FULL)
def test_the_error_of_a_full_disk_names_the_file_and_leaves_no_files(
    site: Site,
    tmp_path: Path,
    run: Run,
    monkeypatch: pytest.MonkeyPatch,
    arguments: Callable[[Site, Path], list[object]],
) -> None:
    _full_disk(monkeypatch, tmp_path / "out")
    outcome = run(*arguments(site, tmp_path / "out"))
    assert outcome.code == 4, outcome.err
    assert outcome.out == ""
    assert re.search(r"Error: .*out/\S+", outcome.err)
    assert_error_with_remedy(outcome)
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("command", FULL)
def test_the_error_of_a_folder_without_write_permission_names_the_file(
    site: Site, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    mkdir = os.mkdir

    def refusing(path: str | os.PathLike[str], *more: int) -> None:
        if Path(path) == tmp_path / "out":
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        mkdir(path, *more)

    monkeypatch.setattr(os, "mkdir", refusing)
    outcome = run(*FULL[command](site, tmp_path / "out"))
    assert (outcome.code, outcome.out) == (4, ""), outcome.err
    assert re.search(r"Error: .*/out\b\S* cannot be written", outcome.err)
    assert_error_with_remedy(outcome)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", FULL)
def test_the_error_of_an_output_below_a_file_names_the_file(site: Site, tmp_path: Path, run: Run, command: str) -> None:
    (tmp_path / "out").touch()
    outcome = run(*FULL[command](site, tmp_path / "out" / "below"))
    assert (outcome.code, outcome.out) == (4, ""), outcome.err
    assert str(tmp_path / "out") in outcome.err
    assert_error_with_remedy(outcome)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def _interrupt(*_: object, **__: object) -> list[torch.Tensor]:
    signal.raise_signal(signal.SIGINT)
    return []


@pytest.mark.parametrize("command", ["adapt", "segment"])
def test_an_interrupt_while_encoding_ends_with_130_and_leaves_no_files(
    site: Site, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    monkeypatch.setattr(EncoderSession, "encode", _interrupt)
    arguments = FULL[command](site, tmp_path / "out")
    outcome = run(*arguments, "--cache", tmp_path / "cache")
    assert outcome.code == 130
    assert outcome.out == ""
    assert "Interrupted" in outcome.err
    assert "Traceback" not in outcome.err
    assert not (tmp_path / "out").exists()
    assert [path.name for path in (tmp_path / "cache").rglob("*") if path.is_file()] in ([], ["lock"])


@pytest.mark.parametrize(
    "error",
    [AttributeError("no attribute 'void'"), OSError("no library"), MissingBackendError("broken", remedy="install")],
    ids=lambda error: type(error).__name__,
)
def test_an_interrupt_that_comes_out_as_another_error_is_still_an_interrupt(
    site: Site, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    """An import that is interrupted can end in any error, such as an AttributeError of a half-loaded library."""

    def half_loaded(*_: object, **__: object) -> None:
        with contextlib.suppress(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        raise error

    monkeypatch.setattr("fseft_edge.segmentation.segment.segment", half_loaded)
    outcome = run(*FULL["segment"](site, tmp_path / "out"))
    assert outcome.code == 130
    assert "Interrupted" in outcome.err
    assert "Traceback" not in outcome.err


def test_termination_ends_like_an_interrupt(
    site: Site, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def terminate(*_: object) -> list[torch.Tensor]:
        signal.raise_signal(signal.SIGTERM)
        return []

    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    monkeypatch.setattr(EncoderSession, "encode", terminate)
    arguments = [
        *("segment", site / "images/case_1.nii.gz", "--adapter", site / "a.adapter"),
        *("-o", tmp_path / "out", *ON_CPU),
    ]
    assert run(*arguments).code == 130
    assert [path.name for path in tmp_path.rglob("*")] == ["temporary"]


def test_an_interrupt_while_a_mask_is_written_keeps_the_earlier_one(
    site: Site, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = site.segment(site / "images/case_1.nii.gz", output=tmp_path / "out")
    assert run(*arguments).code == 0
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    fsync = os.fsync

    def interrupted(descriptor: int) -> None:
        if tmp_path / "out" in Path(os.readlink(f"/proc/self/fd/{descriptor}")).parents:  # noqa: PTH115 - no file name
            _interrupt()
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", interrupted)
    assert run(*arguments).code == 130
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before


def test_an_unexpected_error_prints_its_traceback_and_ends_with_1(
    site: Site, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("an unexpected error")

    monkeypatch.setattr("fseft_edge.segmentation.segment.segment", broken)
    outcome = run(*site.segment("ct.nii.gz", output=tmp_path))
    assert (outcome.code, outcome.out) == (1, "")
    assert "Traceback" in outcome.err
    assert "an unexpected error" in outcome.err
    assert "bug" in outcome.err.splitlines()[-1]


def test_too_little_memory_is_an_environment_error(
    site: Site, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def greedy(*_: object, **__: object) -> None:
        raise MemoryError

    monkeypatch.setattr("fseft_edge.segmentation.segment.segment", greedy)
    outcome = run(*site.segment("ct.nii.gz", output=tmp_path))
    assert (outcome.code, outcome.out) == (4, "")
    assert "memory" in outcome.err.lower()
    assert_error_with_remedy(outcome)


def test_a_failed_case_among_several_is_reported_and_ends_with_5(site: Site, tmp_path: Path) -> None:
    """The command runs in another process, because the reason is written to the log."""
    arguments = [*site.segment(site / "images", site / "bad/truncated.nii.gz", output=tmp_path / "out"), "--verbose"]
    done = subprocess.run(  # noqa: S603 - fixed arguments
        [sys.executable, "-c", "from fseft_edge.cli.main import main; main()", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 5, done.stderr
    reasons, _, error = done.stderr.partition("Error: ")
    assert str(site / "bad/truncated.nii.gz") in reasons
    assert all(word in reasons for word in ("torch", "float32", "cpu"))  # --verbose logs how scans are encoded
    assert all(word in error for word in ("1", "3", "truncated"))
    assert len(error.splitlines()) == 2
    assert "Traceback" not in done.stderr
    assert [line.partition(":")[0] for line in done.stdout.splitlines()] == [
        str(tmp_path / "out" / f"case_{number}.nii.gz") for number in (1, 2)
    ]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        f"case_{number}.{kind}" for number in (1, 2) for kind in ("json", "nii.gz")
    ]


def test_masks_that_cannot_be_compared_end_with_5(site: Site, tmp_path: Path, run: Run) -> None:
    predictions = tmp_path / "predictions"
    shutil.copytree(site / "labels", predictions)
    shutil.copy(site / "shifted/case_2.nii.gz", predictions)
    outcome = run(
        *("evaluate", "--predictions", predictions, "--references", site / "labels", "--organ", "liver=1"),
        *("--json", tmp_path / "rows.json"),
    )
    assert outcome.code == 5
    assert "case_1" in outcome.out
    assert "case_2" not in outcome.out
    assert "case_2" in outcome.err
    assert "lattice" in outcome.err
    assert [row["dsc"] for row in json.loads((tmp_path / "rows.json").read_text())["cases"]] == [1.0]
