"""The command line: output to stdout and stderr, help, and documentation of every option."""

from __future__ import annotations

import csv
import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import click
import pytest
from doubles.command_line import LIVER, ON_CPU, Run, Site, assert_error_with_remedy, command_line_site, runner
from doubles.encoder import label_of, write_random_adapter
from doubles.repository import ROOT

from fseft_edge._version import __version__
from fseft_edge.adapters.file import read_adapter
from fseft_edge.cli.main import cli
from fseft_edge.demonstration import DemoResult
from fseft_edge.evaluation.evaluate import Evaluation, EvaluationRow
from fseft_edge.runtime.scans.nifti import read_label_map
from fseft_edge.runtime.system.progress import Progress

DOCS = ROOT / "docs"
HEAVY = {
    *("torch", "monai", "numpy", "scipy", "nibabel", "pydicom"),
    *("onnx", "onnxruntime", "blosc2", "safetensors", "pydantic"),
}


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    return runner(monkeypatch, capsys)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Site:
    return command_line_site(tmp_path_factory.mktemp("site"))


def commands() -> dict[str, click.Command]:
    context = click.Context(cli)
    found = {name: cli.get_command(context, name) for name in cli.list_commands(context)}
    assert all(found.values())
    whole = {name: command for name, command in found.items() if command is not None}
    groups = {name: command.commands for name, command in whole.items() if isinstance(command, click.Group)}
    return whole | {f"{name} {part}": command for name, parts in groups.items() for part, command in parts.items()}


def test_adapt_segment_and_evaluate(site: Site, tmp_path: Path, run: Run) -> None:
    """Adapt, segment with the encoder beside the adapter, evaluate; results go to stdout, all else to stderr."""
    shutil.copytree(site.bundle.path, tmp_path / "tiny.encoder")
    organs = ("--organ", f"{LIVER},spleen={label_of('spleen')}")
    adapted = run(*site.adapt(*organs, "--seed", 3, "--case", "case_1", output=tmp_path / "s.adapter"))
    assert (adapted.code, len(adapted.out.splitlines())) == (0, 3)
    assert adapted.out.startswith("liver: 1 scan, ")
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


def test_stdout_is_only_json_with_the_option_json(site: Site, tmp_path: Path, run: Run) -> None:
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
    again = run(*site.segment(site / "images/case_1.nii.gz", output=tmp_path / "out"), "--json", "--skip-existing")
    assert json.loads(again.out) == [{**case, "existing": True}]
    text = run(*site.segment(site / "images/case_1.nii.gz", output=tmp_path / "out"), "--skip-existing")
    assert text.out.startswith(f"{case['mask']}: exists already: liver ")


def test_an_adapter_is_exported_as_a_graph(site: Site, tmp_path: Path, run: Run) -> None:
    write_random_adapter(tmp_path / "a.adapter", site.bundle, ("liver", "spleen"), deviation=0.2)
    arguments = ("export-adapter", tmp_path / "a.adapter", "--encoder", site.bundle.path, "-o", tmp_path / "a.onnx")
    outcome = run(*arguments)
    assert (outcome.code, outcome.err) == (0, "")
    (line,) = outcome.out.splitlines()
    assert re.match(rf"{re.escape(str(tmp_path))}/a\.onnx: liver, spleen; ", line)
    assert re.search(r"\d\.\de-\d\d", line)
    assert (tmp_path / "a.onnx").stat().st_size > 10_000


def test_quiet_prints_only_results(site: Site, tmp_path: Path, run: Run) -> None:
    outcome = run(*site.segment(site / "images", output=tmp_path), "--quiet")
    assert len(outcome.out.splitlines()) == 2
    assert outcome.err == ""


def test_the_error_of_a_small_memory_limit_names_the_smallest_possible_limit(
    site: Site, tmp_path: Path, run: Run
) -> None:
    command = ["segment", site / "images/case_1.nii.gz", "--adapter", site / "a.adapter", *ON_CPU]
    outcome = run(*command, "-o", tmp_path / "no", "--memory", 0.01)
    assert outcome.code == 4
    assert_error_with_remedy(outcome)
    assert not (tmp_path / "no").exists()
    smallest = re.search(r"--memory (\d+\.\d\d)", outcome.err)
    assert smallest is not None
    masks = []
    for name, more in (("ample", []), ("least", ["--memory", float(smallest[1]) + 0.1])):
        assert run(*command, "-o", tmp_path / name, *more).code == 0
        masks.append((tmp_path / name / "case_1.nii.gz").read_bytes())
    assert masks[0] == masks[1]

    outcome = run(*site.adapt("--organ", LIVER, "--memory", 0.01, output=tmp_path / "no.adapter"), "--cache", tmp_path)
    assert outcome.code == 4
    assert "--memory" in outcome.err
    assert_error_with_remedy(outcome)


@pytest.mark.parametrize("option", ["--memory", "--vram"])
def test_a_memory_limit_of_zero_is_refused(site: Site, tmp_path: Path, run: Run, option: str) -> None:
    outcome = run(*site.segment(site / "images", output=tmp_path / "out"), option, 0)
    assert outcome.code == 2
    assert option in outcome.err


def test_the_demo_prints_its_scores_and_the_path_of_the_pictures(
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
    assert str(tmp_path / "demo" / "index.html") in outcome.out


def test_the_version_is_printed(run: Run) -> None:
    outcome = run("--version")
    assert outcome.code == 0
    assert __version__ in outcome.out


@pytest.mark.parametrize(
    "command", [[], *(name.split() for name in commands())], ids=lambda names: " ".join(names) or "all"
)
def test_help_describes_every_option(run: Run, command: list[str]) -> None:
    outcome = run(*command, "--help")
    assert (outcome.code, outcome.err) == (0, "")
    assert outcome.out.startswith("Usage: ")
    if command:
        for parameter in commands()[" ".join(command)].params:
            if isinstance(parameter, click.Option):
                assert parameter.help
                assert parameter.opts[-1] in outcome.out
    else:
        assert all(name.split()[0] in outcome.out for name in commands())


def test_help_and_the_package_import_no_large_libraries() -> None:
    script = """
import sys
import tempfile
import fseft_edge
at_once = set(sys.modules)
from fseft_edge.cli.main import cli, run
for command in [[], *([name] for name in cli.list_commands(None))]:
    sys.argv = ["fseft-edge", *command, "--help"]
    run()
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


UNNEEDED = {
    *("monai", "pandas", "matplotlib", "sklearn", "onnx", "onnxscript", "onnxruntime", "openvino", "tensorrt_rtx"),
    *("pydicom", "highdicom", "jinja2", "httpx", "sympy", "torch.onnx", "torch._dynamo", "torch._inductor"),
    *("scipy.ndimage", "scipy.stats", "scipy.special"),
}


def test_a_cached_scan_is_segmented_without_libraries_that_it_does_not_need(
    site: Site, tmp_path: Path, run: Run
) -> None:
    """The command runs again in another process, because this process has loaded everything."""
    command = site.segment(site / "images" / "case_1.nii.gz", output=tmp_path)
    assert run(*command).code == 0  # the features are in the cache now
    script = """
import sys
from fseft_edge.cli.main import run
code = run()
print(*sys.modules, file=sys.stderr)
sys.exit(code)
"""
    done = subprocess.run(  # noqa: S603 - a fixed script
        [sys.executable, "-c", script, *map(str, command), "--quiet"],
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )
    loaded = set(done.stderr.split())
    assert {"torch", "blosc2", "nibabel", "fseft_edge.segmentation.segment"} <= loaded
    assert not loaded & UNNEEDED


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


def test_every_command_and_option_in_docs_and_messages_exists() -> None:
    """Otherwise a remedy could name a command that does not exist."""
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
        named = re.findall(r"(?<![\w(-])(--[a-z][a-z-]++)\b(?!\s*:)", path.read_text(encoding="utf-8"))
        unknown += [
            f"{path.relative_to(root)}: {name}"
            for name in named
            if name not in options | OF_OTHER_PROGRAMS | {"--help"}
        ]
    assert not unknown
