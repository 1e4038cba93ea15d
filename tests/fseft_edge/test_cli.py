"""The command line: what is printed where, what every error ends in, and that everything is documented."""

from __future__ import annotations

import csv
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
from dataclasses import dataclass, replace
from pathlib import Path

import click
import nibabel as nib
import numpy as np
import pytest
import torch
from doubles.encoder import label_of, write_case, write_random_adapter, write_tiny_encoder

from fseft_edge._version import __version__
from fseft_edge.adapter_file import read_adapter
from fseft_edge.cli.main import cli, main
from fseft_edge.demonstration import DemoResult
from fseft_edge.evaluation import Evaluation, EvaluationRow
from fseft_edge.report.progress import Progress
from fseft_edge.runtime import atomic
from fseft_edge.runtime.bundle import EncoderBundle
from fseft_edge.runtime.nifti import read_label_map
from fseft_edge.runtime.session import EncoderSession

DOCS = Path(__file__).parents[2] / "docs"
HEAVY = {
    *("torch", "monai", "numpy", "scipy", "nibabel", "pydicom"),
    *("onnx", "onnxruntime", "blosc2", "safetensors", "pydantic"),
}
LIVER = f"liver={label_of('liver')}"
CHEAP = ("--method", "linear", "--reads", "last", "--epochs", "1", "--device", "cpu", "--backend", "torch")
ON_CPU = ("--device", "cpu", "--backend", "torch")


@dataclass(frozen=True)
class Outcome:
    """What a command left behind."""

    code: int
    out: str
    err: str


Run = Callable[..., Outcome]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run ``fseft-edge`` as its console script does, in this process."""

    def run_main(*arguments: object) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["fseft-edge", *map(str, arguments)])
        capsys.readouterr()
        try:
            code = main()
        except SystemExit as ended:
            code = ended.code
        printed = capsys.readouterr()
        return Outcome(code or 0, printed.out, printed.err)

    return run_main


@dataclass(frozen=True)
class Site:
    """Two annotated scans, an encoder, an adapter, and files that are not what they should be."""

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


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Site:
    root = tmp_path_factory.mktemp("site")
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
    (root / "bad" / "plan.toml").write_text("not = [a plan")
    (root / "shifted").mkdir()
    for name in ("case_1", "case_2"):
        labels = nib.load(site / "labels" / f"{name}.nii.gz")
        shifted = labels.affine + np.array([[0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 9], [0, 0, 0, 0]])
        nib.save(nib.Nifti1Image(np.asanyarray(labels.dataobj), shifted), root / "shifted" / f"{name}.nii.gz")
    return site


def commands() -> dict[str, click.Command]:
    context = click.Context(cli)
    found = {name: cli.get_command(context, name) for name in cli.list_commands(context)}
    assert all(found.values())
    whole = {name: command for name, command in found.items() if command is not None}
    groups = {name: command.commands for name, command in whole.items() if isinstance(command, click.Group)}
    return whole | {f"{name} {part}": command for name, parts in groups.items() for part, command in parts.items()}


def test_the_main_job_in_four_commands(site: Site, tmp_path: Path, run: Run) -> None:
    """Adapt, segment with what is found beside the adapter, evaluate; results on stdout, the rest on stderr."""
    shutil.copytree(site.bundle.path, tmp_path / "tiny.encoder")
    organs = ("--organ", f"{LIVER},spleen={label_of('spleen')}")
    adapted = run(*site.adapt(*organs, "--seed", 3, "--case", "case_1", output=tmp_path / "s.adapter"))
    assert (adapted.code, len(adapted.out.splitlines())) == (0, 3)
    assert adapted.out.startswith("liver: 1 scans, ")
    assert str(tmp_path / "s.adapter") in adapted.out
    assert "encode" in adapted.err
    description = read_adapter(tmp_path / "s.adapter").description
    assert (description.seed, description.shots, description.settings["method"]) == (3, 1, "linear")

    adapter = ("--adapter", tmp_path / "s.adapter")
    segmented = run("segment", site / "images", *adapter, "-o", tmp_path / "out", "--preview", *ON_CPU)
    assert segmented.code == 0
    assert len(segmented.out.splitlines()) == 2
    assert segmented.out.startswith(f"{tmp_path / 'out' / 'case_1.nii.gz'}: liver ")
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == [f"case_{number}.{kind}" for number in (1, 2) for kind in ("json", "nii.gz", "png")]

    where = ("--predictions", tmp_path / "out", "--references", site / "labels")
    files = ("--csv", tmp_path / "rows.csv", "--json", tmp_path / "rows.json")
    evaluated = run("evaluate", *where, *organs, *files)
    assert evaluated.code == 0
    assert "case_2" in evaluated.out
    assert "DSC" in evaluated.out
    with (tmp_path / "rows.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["case"], row["organ"]) for row in rows] == [
        (f"case_{number}", organ) for number in (1, 2) for organ in ("liver", "spleen")
    ]
    assert len(json.loads((tmp_path / "rows.json").read_text())["cases"]) == 4


def test_json_on_stdout_is_json_and_nothing_else(site: Site, tmp_path: Path, run: Run) -> None:
    adapted = run(*site.adapt("--organ", LIVER, "--json", output=tmp_path / "s.adapter"))
    assert json.loads(adapted.out)["organs"][0]["name"] == "liver"
    segmented = run(*site.segment(site / "images/case_1.nii.gz", output=tmp_path / "out"), "--json")
    (case,) = json.loads(segmented.out)
    assert case["case"] == "case_1"
    mask = read_label_map(Path(case["mask"]))
    for organ in case["organs"]:
        voxels = (mask.array == organ["label"]).sum()
        assert organ["volume_ml"] == pytest.approx(voxels * mask.voxel_volume_mm3 / 1000, abs=1e-3)
        assert "large" in organ["flags"]


def test_an_adapter_becomes_a_graph(site: Site, tmp_path: Path, run: Run) -> None:
    write_random_adapter(tmp_path / "a.adapter", site.bundle, ("liver", "spleen"), deviation=0.2)
    arguments = ("export-adapter", tmp_path / "a.adapter", "--encoder", site.bundle.path, "-o", tmp_path / "a.onnx")
    outcome = run(*arguments)
    assert (outcome.code, outcome.err) == (0, "")
    within = r"within \d\.\de-\d\d of the toolkit's own probabilities"
    assert re.fullmatch(rf"{re.escape(str(tmp_path))}/a\.onnx: liver, spleen; {within}\n", outcome.out)
    assert (tmp_path / "a.onnx").stat().st_size > 10_000


def test_quiet_prints_results_only(site: Site, tmp_path: Path, run: Run) -> None:
    outcome = run(*site.segment(site / "images", output=tmp_path), "--quiet")
    assert len(outcome.out.splitlines()) == 2
    assert outcome.err == ""


def test_a_budget_that_is_too_small_is_refused_with_the_smallest_that_works(
    site: Site, tmp_path: Path, run: Run
) -> None:
    command = ["segment", site / "images/case_1.nii.gz", "--adapter", site / "a.adapter", *ON_CPU]
    refused = run(*command, "-o", tmp_path / "no", "--memory", 0.01)
    assert refused.code == 4
    assert "A budget of 0.01 GB is too small for " in refused.err
    assert not (tmp_path / "no").exists()
    smallest = re.search(r"Give --memory (\d+\.\d\d) or more", refused.err)
    assert smallest is not None
    masks = []
    for name, more in (("ample", []), ("least", ["--memory", float(smallest[1]) + 0.1])):
        assert run(*command, "-o", tmp_path / name, *more).code == 0
        masks.append((tmp_path / name / "case_1.nii.gz").read_bytes())
    assert masks[0] == masks[1]

    refused = run(*site.adapt("--organ", LIVER, "--memory", 0.01, output=tmp_path / "no.adapter"), "--cache", tmp_path)
    assert refused.code == 4
    assert "too small for encoding this scan" in refused.err


@pytest.mark.parametrize("option", ["--memory", "--vram"])
def test_a_budget_of_nothing_is_wrong_use(site: Site, tmp_path: Path, run: Run, option: str) -> None:
    outcome = run(*site.segment(site / "images", output=tmp_path / "out"), option, 0)
    assert outcome.code == 2
    assert option in outcome.err


def test_the_demo_prints_its_figures_and_where_the_pictures_are(
    tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = EvaluationRow("phantom_11", "liver", "scored", 0.625, 4.0, 0.5, 1500.0, 1600.0)
    before, after = (
        Evaluation(
            rows=(replace(row, dsc=dsc),), failures=(), without_prediction=(), organs=("liver",), nsd_tolerance_mm=2.0
        )
        for dsc in (0.625, 0.875)
    )
    folders: list[Path] = []

    def done(output: Path, progress: Progress) -> DemoResult:
        folders.append(output)
        return DemoResult(before, after, output / "index.html")

    monkeypatch.setattr("fseft_edge.demonstration.run_demo", done)
    outcome = run("demo", "-o", tmp_path / "demo", "--quiet")
    assert (outcome.code, outcome.err) == (0, "")
    assert folders == [tmp_path / "demo"]
    (line,) = (line for line in outcome.out.splitlines() if "phantom_11" in line)
    assert re.search(r"liver.*0\.625.*0\.875", line)
    assert f"Pictures: {tmp_path / 'demo' / 'index.html'}" in outcome.out


def test_the_version_is_printed(run: Run) -> None:
    outcome = run("--version")
    assert outcome.code == 0
    assert __version__ in outcome.out


Case = tuple[int, list[str], Callable[[Site, Path], list[object]]]
ERRORS: dict[str, Case] = {
    "an unknown command": (2, ["paint"], lambda s, t: ["paint"]),
    "an unknown option": (2, ["--colour"], lambda s, t: [*s.segment("ct.nii", output=t), "--colour", "red"]),
    "a missing option": (2, ["--adapter"], lambda s, t: ["segment", "ct.nii.gz", "-o", t / "out"]),
    "a malformed organ": (
        2,
        ["'liver'", "--organ NAME=ID"],
        lambda s, t: s.adapt("--organ", "liver", output=t / "out"),
    ),
    "an organ named twice": (
        2,
        ["'liver' is named twice", "once"],
        lambda s, t: s.adapt("--organ", "liver=1,liver=2", output=t / "out"),
    ),
    "an unknown device": (
        2,
        ["'gpu'", "cpu, cuda"],
        lambda s, t: [*s.segment(s / "images/case_1.nii.gz", output=t / "out"), "--device", "gpu"],
    ),
    "an unknown backend": (
        2,
        ["'abacus'", "onnxruntime"],
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
        ["--transductive needs the annotated scans", "--support-images"],
        lambda s, t: [*s.segment(s / "images/case_1.nii.gz", output=t / "out"), "--transductive"],
    ),
    "a prior without transduction": (
        2,
        ["serve --transductive", "Add it"],
        lambda s, t: [*s.segment(s / "images/case_1.nii.gz", output=t / "out"), "--size-prior", "liver=1..2ml"],
    ),
    "a prior upside down": (
        2,
        ["A size prior of 2 to 1 ml is impossible", "the smaller volume first"],
        lambda s, t: [
            *s.segment(s / "images/case_1.nii.gz", output=t / "out"),
            *("--transductive", "--support-images", s / "images", "--support-labels", s / "labels"),
            *("--size-prior", "liver=2..1ml"),
        ],
    ),
    "a prior of another organ": (
        2,
        ["prior of tail concerns no organ", "They segment"],
        lambda s, t: [
            *s.segment(s / "images/case_1.nii.gz", output=t / "out"),
            *("--transductive", "--support-images", s / "images", "--support-labels", s / "labels"),
            *("--size-prior", "tail=1..2ml"),
        ],
    ),
    "an output among the inputs": (
        2,
        ["images holds the scans", "another folder"],
        lambda s, t: s.segment(s / "images", output=s / "images"),
    ),
    "an existing bundle": (
        2,
        ["tiny.encoder already exists", "another name"],
        lambda s, t: ["export", "-o", s.bundle.path],
    ),
    "a demo's folder that is not": (
        2,
        ["images exists and is not a demo's folder", "--output"],
        lambda s, t: ["demo", "-o", s / "images"],
    ),
    "a missing scan": (
        3,
        ["none.nii.gz does not exist", "name"],
        lambda s, t: s.segment(s / "none.nii.gz", output=t / "out"),
    ),
    "a truncated scan": (
        3,
        ["truncated.nii.gz is truncated or damaged", "Copy the file again"],
        lambda s, t: s.segment(s / "bad/truncated.nii.gz", output=t / "out"),
    ),
    "a time series": (
        3,
        ["series.nii.gz has 4 dimensions", "split"],
        lambda s, t: s.segment(s / "bad/series.nii.gz", output=t / "out"),
    ),
    "labels instead of a scan": (
        3,
        ["labels/case_1.nii.gz does not look like a CT", "Give the CT in HU"],
        lambda s, t: s.segment(s / "labels/case_1.nii.gz", output=t / "out"),
    ),
    "an annotation on another lattice": (
        3,
        ["images/case_1.nii.gz and the labels", "shifted/case_1.nii.gz", "Resample the labels"],
        lambda s, t: s.adapt("--organ", LIVER, "--labels", s / "shifted", output=t / "out"),
    ),
    "a label that is nowhere": (
        3,
        ["the label 99 (tumour)", "--organ NAME=ID"],
        lambda s, t: s.adapt("--organ", "tumour=99", output=t / "out"),
    ),
    "auto told what to read": (
        2,
        ["--method auto chooses what is read", "--reads"],
        lambda s, t: s.adapt("--organ", LIVER, "--method", "auto", "--reads", "last", output=t / "out"),
    ),
    "auto without validation": (
        2,
        ["--method auto chooses by validation", "--no-validate"],
        lambda s, t: s.adapt("--organ", LIVER, "--method", "auto", "--no-validate", output=t / "out"),
    ),
    "a case that is nowhere": (
        3,
        ["case_7", "share their file name"],
        lambda s, t: s.adapt("--organ", LIVER, "--case", "case_7", output=t / "out"),
    ),
    "a bundle with a changed byte": (
        3,
        ["broken.encoder/encoder.safetensors has changed", "Export the encoder again"],
        lambda s, t: s.adapt("--organ", LIVER, "--encoder", s / "elsewhere/broken.encoder", output=t / "out"),
    ),
    "a bundle of a newer version": (
        3,
        ["'net_of_2030' is unknown", "Update fseft-edge"],
        lambda s, t: s.adapt(
            *("--organ", LIVER, "--backend", "auto", "--encoder", s / "elsewhere/future.encoder"), output=t / "out"
        ),
    ),
    "no bundle": (
        3,
        ["images is no encoder bundle", "fseft-edge export"],
        lambda s, t: s.adapt("--organ", LIVER, "--encoder", s / "images", output=t / "out"),
    ),
    "an adapter of another encoder": (
        3,
        ["other.adapter was trained on the encoder", "--encoder"],
        lambda s, t: [
            *s.segment(s / "images/case_1.nii.gz", adapter="elsewhere/other.adapter", output=t / "out"),
            *("--encoder", s.bundle.path),
        ],
    ),
    "a graph of another encoder": (
        3,
        ["other.adapter was trained on the encoder", "--encoder"],
        lambda s, t: [
            *("export-adapter", s / "elsewhere/other.adapter", "-o", t / "out.onnx", "--encoder", s.bundle.path)
        ],
    ),
    "a graph without an encoder": (
        3,
        ["alone.adapter was trained with is neither beside it nor", "--encoder"],
        lambda s, t: ["export-adapter", s / "alone/alone.adapter", "-o", t / "out.onnx"],
    ),
    "a graph of another name": (
        2,
        ["out.engine is not called .onnx", "NAME.onnx"],
        lambda s, t: ["export-adapter", s / "a.adapter", "-o", t / "out.engine"],
    ),
    "no adapter": (
        3,
        ["text.adapter is damaged", "again"],
        lambda s, t: s.segment(s / "images/case_1.nii.gz", adapter="bad/text.adapter", output=t / "out"),
    ),
    "a checkpoint that is none": (
        3,
        ["text.adapter", "again"],
        lambda s, t: ["export", s / "bad/text.adapter", "-o", t / "out", "--no-onnx"],
    ),
    "no predictions": (
        3,
        ["nowhere does not exist"],
        lambda s, t: ["evaluate", "--predictions", s / "nowhere", "--references", s / "labels", "--organ", LIVER],
    ),
    "a plan that is none": (
        3,
        ["plan.toml"],
        lambda s, t: ["pretrain", s / "bad/plan.toml", "--data-root", s.root, "-o", t / "out"],
    ),
    "a GPU that is not there": (
        4,
        ["cuda:99", "--device cpu"],
        lambda s, t: [*s.segment(s / "images/case_1.nii.gz", output=t / "out"), "--device", "cuda:99"],
    ),
}


@pytest.mark.parametrize(("code", "fragments", "arguments"), ERRORS.values(), ids=ERRORS)
def test_an_error_ends_in_its_exit_code_and_two_lines_on_stderr(
    site: Site,
    tmp_path: Path,
    run: Run,
    code: int,
    fragments: list[str],
    arguments: Callable[[Site, Path], list[object]],
) -> None:
    before = sorted(path for path in site.root.rglob("*") if site / "cache" not in path.parents)
    outcome = run(*arguments(site, tmp_path))
    assert outcome.code == code, outcome.err
    assert outcome.out == ""
    assert "Traceback" not in outcome.err
    for fragment in fragments:
        assert fragment in outcome.err
    _, separator, message = outcome.err.partition("Error: ")
    assert separator
    if code != 2:
        assert len(message.splitlines()) == 2
    assert list(tmp_path.iterdir()) == []
    after = sorted(path for path in site.root.rglob("*") if site / "cache" not in path.parents)
    assert after == before


def test_a_missing_backend_is_an_error_of_the_environment_that_says_what_to_install(
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
    assert not (tmp_path / "out").exists()


def _full_disk(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Let every file written into ``folder`` be ``/dev/full``, a device on which every write fails with ENOSPC."""
    temporary_sibling = atomic._temporary_sibling

    def on_full_device(target: Path) -> Path:
        temporary: Path = temporary_sibling(target)
        if folder in target.parents:
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
def test_a_full_disk_is_named_and_nothing_is_left(
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
    assert re.search(r"Error: There is no room left to write .*out/\S+\.\nFree some space", outcome.err)
    assert "Traceback" not in outcome.err
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("command", FULL)
def test_a_folder_that_may_not_be_written_to_is_named(
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
    assert re.search(r"Error: \S+/out/\S+ cannot be written: Permission denied\.\nWrite to a folder", outcome.err)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", FULL)
def test_an_output_below_a_file_is_named(site: Site, tmp_path: Path, run: Run, command: str) -> None:
    (tmp_path / "out").touch()
    outcome = run(*FULL[command](site, tmp_path / "out" / "below"))
    assert (outcome.code, outcome.out) == (4, ""), outcome.err
    assert str(tmp_path / "out") in outcome.err
    assert "Traceback" not in outcome.err
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def _interrupt(*_: object, **__: object) -> list[torch.Tensor]:
    signal.raise_signal(signal.SIGINT)
    return []


@pytest.mark.parametrize("command", ["adapt", "segment"])
def test_an_interrupt_while_encoding_ends_in_130_and_leaves_nothing(
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


def test_termination_ends_as_an_interrupt_does(
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


def test_a_bug_shows_its_traceback_and_ends_in_1(
    site: Site, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("the dog ate it")

    monkeypatch.setattr("fseft_edge.segmentation.segment", broken)
    outcome = run(*site.segment("ct.nii.gz", output=tmp_path))
    assert (outcome.code, outcome.out) == (1, "")
    assert "Traceback" in outcome.err
    assert "the dog ate it" in outcome.err
    assert "bug in fseft-edge" in outcome.err


def test_used_up_memory_is_an_error_of_the_environment(
    site: Site, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def greedy(*_: object, **__: object) -> None:
        raise MemoryError

    monkeypatch.setattr("fseft_edge.segmentation.segment", greedy)
    outcome = run(*site.segment("ct.nii.gz", output=tmp_path))
    assert (outcome.code, outcome.out) == (4, "")
    assert "memory" in outcome.err
    assert "Traceback" not in outcome.err


def test_a_failed_case_among_several_gives_its_reason_and_exit_code_5(site: Site, tmp_path: Path) -> None:
    """In a process of its own, since the reason goes through the log."""
    arguments = [*site.segment(site / "images", site / "bad/truncated.nii.gz", output=tmp_path / "out"), "--verbose"]
    done = subprocess.run(  # noqa: S603 - the arguments are this test's
        [sys.executable, "-c", "from fseft_edge.cli.main import main; main()", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 5, done.stderr
    assert f"{site / 'bad/truncated.nii.gz'} is truncated or damaged" in done.stderr
    assert "Error: 1 of 3 cases failed: truncated." in done.stderr
    assert "encoding with torch in float32 on cpu" in done.stderr
    assert "Traceback" not in done.stderr
    assert [line.partition(":")[0] for line in done.stdout.splitlines()] == [
        str(tmp_path / "out" / f"case_{number}.nii.gz") for number in (1, 2)
    ]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        f"case_{number}.{kind}" for number in (1, 2) for kind in ("json", "nii.gz")
    ]


def test_masks_that_cannot_be_compared_end_in_5_and_the_others_are_shown(site: Site, tmp_path: Path, run: Run) -> None:
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


@pytest.mark.parametrize(
    "command", [[], *(name.split() for name in commands())], ids=lambda names: " ".join(names) or "all"
)
def test_help_explains_every_option(run: Run, command: list[str]) -> None:
    outcome = run(*command, "--help")
    assert (outcome.code, outcome.err) == (0, "")
    assert outcome.out.startswith("Usage: ")
    if command:
        for parameter in commands()[" ".join(command)].params:
            if isinstance(parameter, click.Option):
                assert parameter.opts[-1] in outcome.out
    else:
        assert all(name.split()[0] in outcome.out for name in commands())


def test_help_and_the_package_import_nothing_heavy() -> None:
    script = """
import sys
import tempfile
import fseft_edge
at_once = set(sys.modules)
from fseft_edge.cli.main import cli, main
for command in [[], *([name] for name in cli.list_commands(None))]:
    sys.argv = ["fseft-edge", *command, "--help"]
    main()
print(*at_once, file=sys.stderr)
print(*sys.modules, file=sys.stderr)
"""
    done = subprocess.run(  # noqa: S603 - a fixed script
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=True
    )
    package, helped = (set(line.split()) for line in done.stderr.splitlines())
    assert "fseft_edge.cli.commands" in helped
    assert not package & (HEAVY | {"rich", "click"})
    assert not helped & HEAVY


def test_every_command_and_option_is_documented() -> None:
    text = "\n".join(path.read_text(encoding="utf-8") for path in sorted(DOCS.rglob("*.md")))
    wanted = {f"fseft-edge {name}" for name in commands()}
    for command in commands().values():
        for parameter in command.params:
            if isinstance(parameter, click.Option):
                wanted |= {option for option in (*parameter.opts, *parameter.secondary_opts) if option.startswith("--")}
    missing = sorted(word for word in wanted if not re.search(rf"(?<![\w-]){re.escape(word)}(?![\w-])", text))
    assert not missing


OF_OTHER_PROGRAMS = {"--query-gpu", "--format", "--user", "--now", "--nthreads", "--nproc-per-node"}


def test_every_command_and_option_that_docs_and_messages_name_exists() -> None:
    """A remedy that names a command which is not there helps nobody."""
    root = DOCS.parent
    sources = [
        *(root / "runtime").rglob("*.py"),
        *(root / "export").rglob("*.py"),
        *(root / "fseft_edge").rglob("*.py"),
    ]
    documents = [root / "README.md", *DOCS.rglob("*.md")]
    options = {
        option
        for command in [cli, *commands().values()]
        for parameter in command.params
        for option in (*parameter.opts, *parameter.secondary_opts)
    }
    unknown = []
    for path in [*sources, *documents]:
        text = path.read_text(encoding="utf-8")
        named = re.findall(r"(?:`|^|\$ |\n)fseft-edge ([a-z]+(?:-[a-z]+)*)\b", text)
        unknown += [f"{path.relative_to(root)}: fseft-edge {name}" for name in named if name not in commands()]
    for path in sources:
        named = re.findall(r"(?<![\w(-])(--[a-z][a-z-]+)\b(?!\s*:)", path.read_text(encoding="utf-8"))
        unknown += [
            f"{path.relative_to(root)}: {name}"
            for name in named
            if name not in options | OF_OTHER_PROGRAMS | {"--help"}
        ]
    assert not unknown
