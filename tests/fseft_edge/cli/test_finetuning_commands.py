"""Fine-tuning from the command line: ``adapt`` with a method of fine-tuning, ``merge``, and refusals."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from doubles.encoder import label_of, write_case, write_tiny_encoder
from doubles.errors import refused

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
    return CliRunner().invoke(cli, [str(argument) for argument in arguments], catch_exceptions=False)


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


def test_the_name_of_a_tuning_must_end_in_tuning(site: Path, tmp_path: Path) -> None:
    (tmp_path / "a.adapter").touch()
    with refused(UsageError, tmp_path / "a.adapter", ".tuning"):
        adapt(site, tmp_path / "a.adapter", "--method", "bitfit", *SHORT)
    assert (tmp_path / "a.adapter").read_bytes() == b""


def test_portions_and_checkpointing_can_be_used_together(site: Path, tmp_path: Path) -> None:
    saving = ("--accumulate", 2, "--gradient-checkpointing", "--crops", 2)
    tuned = adapt(site, tmp_path / "a.tuning", "--method", "bitfit", *SHORT, *saving)
    assert tuned.exit_code == 0, tuned.output


def test_auto_with_a_time_limit_keeps_the_adapter_and_adds_a_better_tuning(
    site: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The trial of fine-tuning is replaced by one that always finds a better tuning; JSON has one line per file."""
    found = adapt(site, tmp_path / "b.tuning", "--method", "bitfit", *SHORT)
    assert found.exit_code == 0, found.output
    tuning = read_tuning(tmp_path / "b.tuning")
    minutes_given: list[float] = []

    def tried(adapter: AdapterFile, *scans: object, minutes: float, **more: object) -> TuningFile:
        minutes_given.append(minutes)
        return tuning

    monkeypatch.setattr("fseft_edge.finetuning.choosing.try_finetuning", tried)
    monkeypatch.setattr("fseft_edge.adaptation.adapt.candidates", lambda training, settings, rows: [CHEAP])
    chosen = adapt(site, tmp_path / "a.adapter", "--method", "auto", "--time-limit", 7, "--device", "cpu", "--json")
    assert chosen.exit_code == 0, chosen.output
    first, second = (json.loads(line) for line in chosen.stdout.splitlines())
    assert first["settings"]["method"] == "linear"
    assert second["method"] == "bitfit"
    assert minutes_given == [7]
    assert "fseft-edge merge" in chosen.stderr
    assert (tmp_path / "a.adapter").exists()


def test_a_time_limit_is_refused_before_training_if_the_tuning_cannot_be_written(site: Path, tmp_path: Path) -> None:
    with refused(UsageError, tmp_path / "a.tuning", ".adapter"):
        adapt(site, tmp_path / "a.tuning", "--method", "auto", "--time-limit", 7)


@pytest.mark.parametrize(
    ("more", "named"),
    [
        (("--method", "lora", "--activation", "softmax"), ("--activation", "--method lora")),
        (("--method", "full", "--epochs", 3), ("--epochs", "--method full")),
        (("--method", "full", "--cache", "features"), ("--cache", "--method full")),
        (("--method", "linear", "--decoder", "tuned"), ("--decoder", "--method linear")),
        (("--method", "spatial", "--steps", 3), ("--steps", "--method spatial")),
        (("--method", "spatial", "--gradient-checkpointing"), ("--gradient-checkpointing", "--method spatial")),
        (("--method", "spatial", "--time-limit", 3), ("--time-limit", "--method auto")),
        (("--method", "auto", "--time-limit", 3, "--activation", "softmax"), ("--activation softmax", "--time-limit")),
        (("--method", "auto", "--time-limit", 3, "--decoder", "new"), ("--decoder", "--method auto")),
        (("--method", "lora", "--memory", 3), ("--memory", "--method lora")),
        (("--method", "adaptformer"), ("adaptformer",)),
        (("--method", "decoder", "--decoder", "frozen"), ("--method decoder", "--decoder frozen")),
    ],
    ids=lambda value: " ".join(map(str, value)),
)
def test_options_that_contradict_the_method_are_refused(
    site: Path, tmp_path: Path, more: tuple[object, ...], named: tuple[str, ...]
) -> None:
    with refused(UsageError, *named):
        adapt(site, tmp_path / "out" / "a.tuning", *more)
    assert not (tmp_path / "out").exists()


def test_the_command_offers_every_method() -> None:
    assert adaptation_commands._TUNINGS == TUNING_METHODS
