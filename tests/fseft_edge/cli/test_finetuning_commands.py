"""Fine-tuning from the command line: ``adapt`` with such a method, ``merge``, and what they refuse."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from doubles.encoder import label_of, write_case, write_tiny_encoder

from fseft_edge.adaptation.cross_validation import Candidate
from fseft_edge.adaptation.training import TrainingSettings
from fseft_edge.adapters.file import AdapterFile, read_adapter
from fseft_edge.adapters.network import AdapterSettings
from fseft_edge.cli import adaptation_commands
from fseft_edge.cli.main import cli
from fseft_edge.finetuning.settings import TUNING_METHODS
from fseft_edge.finetuning.tuning_file import TuningFile, read_tuning
from fseft_edge.runtime.errors import UsageError

LIVER = f"liver={label_of('liver')}"
CHEAP = Candidate("linear on last", AdapterSettings("linear", "finest"), TrainingSettings())
SHORT = ("--steps", 2, "--crops", 1, "--device", "cpu")


def run(*arguments: object) -> Result:
    return CliRunner().invoke(cli, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("site")
    for seed in (1, 2):
        write_case(root, f"case_{seed}", seed)
    write_tiny_encoder(root / "tiny.encoder")
    return root


def adapt(site: Path, output: Path, *more: object) -> Result:
    scans = ("--images", site / "images", "--labels", site / "labels", "--organ", LIVER)
    return run("adapt", "--encoder", site / "tiny.encoder", *scans, "-o", output, *more)


def test_fine_tune_merge_segment(site: Path, tmp_path: Path) -> None:
    tuned = adapt(site, tmp_path / "liver.tuning", "--method", "affine", "--decoder", "tuned", *SHORT, "--seed", 3)
    assert tuned.exit_code == 0, tuned.output
    assert tuned.stdout.startswith("liver: 2 scans, ")
    assert "liver.tuning: affine, decoder tuned" in tuned.stdout
    description = read_tuning(tmp_path / "liver.tuning").description
    assert (description.method, description.decoder, description.steps, description.seed) == ("affine", "tuned", 2, 3)
    merged = run(
        *("merge", tmp_path / "liver.tuning", "-o", tmp_path / "liver.encoder"),
        *("--encoder", site / "tiny.encoder", "--no-onnx"),
    )
    assert merged.exit_code == 0, merged.output
    assert str(tmp_path / "liver.adapter") in merged.stdout
    assert read_adapter(tmp_path / "liver.adapter").description.encoder_name == "liver"
    scan = site / "images" / "case_1.nii.gz"
    segmented = run("segment", scan, "--adapter", tmp_path / "liver.adapter", "-o", tmp_path / "out", "--device", "cpu")
    assert segmented.exit_code == 0, segmented.output
    assert (tmp_path / "out" / "case_1.nii.gz").exists()


def test_the_description_is_printed_as_json(site: Path, tmp_path: Path) -> None:
    tuned = adapt(site, tmp_path / "a.tuning", "--method", "bitfit", "--levels", "finest", *SHORT, "--json")
    described = json.loads(tuned.stdout)
    assert (described["method"], described["reads"]) == ("bitfit", "last")
    assert "content_sha256" not in described


def test_a_tuning_is_called_so(site: Path, tmp_path: Path) -> None:
    (tmp_path / "a.adapter").touch()
    refused = adapt(site, tmp_path / "a.adapter", "--method", "bitfit", *SHORT)
    assert isinstance(refused.exception, UsageError)
    assert "no name of a tuning" in str(refused.exception)
    assert (tmp_path / "a.adapter").read_bytes() == b""


def test_memory_is_saved_by_portions_and_checkpointing(site: Path, tmp_path: Path) -> None:
    saving = ("--accumulate", 2, "--gradient-checkpointing", "--crops", 2)
    tuned = adapt(site, tmp_path / "a.tuning", "--method", "bitfit", *SHORT, *saving)
    assert tuned.exit_code == 0, tuned.output


def test_auto_with_a_budget_leaves_the_adapter_and_adds_what_does_better(
    site: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever is tried does better than an adapter that finds nothing; JSON is one line a file."""
    found = adapt(site, tmp_path / "b.tuning", "--method", "bitfit", *SHORT)
    assert found.exit_code == 0, found.output
    tuning = read_tuning(tmp_path / "b.tuning")
    asked: list[float] = []

    def tried(adapter: AdapterFile, *scans: object, minutes: float, **more: object) -> TuningFile:
        asked.append(minutes)
        return tuning

    monkeypatch.setattr("fseft_edge.finetuning.choosing.try_finetuning", tried)
    monkeypatch.setattr("fseft_edge.adaptation.adapt.candidates", lambda training, settings, rows: [CHEAP])
    chosen = adapt(site, tmp_path / "a.adapter", "--method", "auto", "--time-limit", 7, "--device", "cpu", "--json")
    assert chosen.exit_code == 0, chosen.output
    first, second = (json.loads(line) for line in chosen.stdout.splitlines())
    assert first["settings"]["method"] == "linear"
    assert second["method"] == "bitfit"
    assert asked == [7]
    assert "fseft-edge merge" in chosen.stderr
    assert (tmp_path / "a.adapter").exists()


def test_a_budget_is_refused_before_any_work_where_the_tuning_has_no_place(site: Path, tmp_path: Path) -> None:
    refused = adapt(site, tmp_path / "a.tuning", "--method", "auto", "--time-limit", 7)
    assert isinstance(refused.exception, UsageError)
    assert "does not end in .adapter" in str(refused.exception)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--method", "lora", "--activation", "softmax"), "--activation says nothing"),
        (("--method", "full", "--epochs", 3), "--epochs says nothing"),
        (("--method", "full", "--cache", "features"), "--cache says nothing"),
        (("--method", "linear", "--decoder", "tuned"), "--decoder says nothing"),
        (("--method", "spatial", "--steps", 3), "--steps says nothing"),
        (("--method", "spatial", "--gradient-checkpointing"), "--gradient-checkpointing says nothing"),
        (("--method", "spatial", "--time-limit", 3), "--time-limit serves --method auto"),
        (("--method", "auto", "--time-limit", 3, "--activation", "softmax"), "sigmoid"),
        (("--method", "auto", "--time-limit", 3, "--decoder", "new"), "--decoder says nothing"),
        (("--method", "lora", "--memory", 3), "--memory says nothing"),
        (("--method", "adaptformer"), "no place for adaptformer"),
        (("--method", "decoder", "--decoder", "frozen"), "nothing of this encoder would learn"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, tuple) else "",
)
def test_what_contradicts_a_method_is_refused(
    site: Path, tmp_path: Path, more: tuple[object, ...], message: str
) -> None:
    refused = adapt(site, tmp_path / "out" / "a.tuning", *more)
    assert isinstance(refused.exception, UsageError)
    assert message in str(refused.exception)
    assert not (tmp_path / "out").exists()


def test_the_command_offers_every_method() -> None:
    assert adaptation_commands._TUNINGS == TUNING_METHODS
