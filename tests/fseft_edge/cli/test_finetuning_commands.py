"""Fine-tuning from the command line: ``finetune``, ``merge``, and refusals."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from doubles.encoder import label_of, write_case, write_tiny_encoder
from doubles.errors import refused

from fseft_edge.adapters.file import read_adapter
from fseft_edge.cli import training_options
from fseft_edge.cli.main import cli
from fseft_edge.finetuning.settings import TUNING_METHODS, TuningSettings
from fseft_edge.finetuning.tuning_file import TuningFile, read_tuning
from fseft_edge.runtime.errors import UsageError

LIVER = f"liver={label_of('liver')}"
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


def train(verb: str, site: Path, output: Path, *more: object) -> Result:
    scans = ("--images", site / "images", "--labels", site / "labels", "--organ", LIVER)
    return run(verb, "--encoder", site / "tiny.encoder", *scans, "-o", output, *more)


def finetune(site: Path, output: Path, *more: object) -> Result:
    return train("finetune", site, output, *more)


def test_fine_tune_merge_segment(site: Path, tmp_path: Path) -> None:
    tuned = finetune(site, tmp_path / "liver.tuning", "--method", "affine", "--decoder", "tuned", *SHORT, "--seed", 3)
    assert tuned.exit_code == 0, tuned.output
    assert tuned.stdout.startswith("liver: 2 scans, ")
    assert "liver.tuning: affine, decoder tuned" in tuned.stdout
    assert "fseft-edge merge" in tuned.stderr
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
    tuned = finetune(site, tmp_path / "a.tuning", "--method", "bitfit", "--levels", "finest", *SHORT, "--json")
    described = json.loads(tuned.stdout)
    assert (described["method"], described["reads"]) == ("bitfit", "last")
    assert "content_sha256" not in described


def test_the_name_of_a_tuning_must_end_in_tuning(site: Path, tmp_path: Path) -> None:
    (tmp_path / "a.adapter").touch()
    with refused(UsageError, tmp_path / "a.adapter", ".tuning"):
        finetune(site, tmp_path / "a.adapter", "--method", "bitfit", *SHORT)
    assert (tmp_path / "a.adapter").read_bytes() == b""


def test_portions_and_checkpointing_can_be_used_together(site: Path, tmp_path: Path) -> None:
    saving = ("--accumulate", 2, "--gradient-checkpointing", "--crops", 2)
    tuned = finetune(site, tmp_path / "a.tuning", "--method", "bitfit", *SHORT, *saving)
    assert tuned.exit_code == 0, tuned.output


def test_auto_writes_a_tuning_only_if_it_is_better_than_the_adapter(
    site: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The trial of fine-tuning is replaced by one that finds a better tuning, then by one that finds none."""
    assert finetune(site, tmp_path / "b.tuning", "--method", "bitfit", *SHORT).exit_code == 0
    tried: list[tuple[object, ...]] = []
    found: list[TuningFile | None] = [read_tuning(tmp_path / "b.tuning"), None, None]

    def trial(adapter: Path, *scans: object, minutes: float, settings: TuningSettings, **more: object) -> object:
        tried.append((adapter, scans[-1], minutes, settings.steps))
        return found.pop(0)

    monkeypatch.setattr("fseft_edge.finetuning.choosing.try_finetuning", trial)
    auto = ("--method", "auto", "--adapter", tmp_path / "a.adapter")
    better = finetune(site, tmp_path / "a.tuning", *auto, "--time-limit", 7, *SHORT, "--json")
    assert json.loads(better.stdout)["method"] == "bitfit"
    assert "fseft-edge merge" in better.stderr
    none = finetune(site, tmp_path / "a.tuning", *auto, "--json")
    assert (none.exit_code, none.stdout, none.stderr) == (0, "null\n", "")
    none = finetune(site, tmp_path / "a.tuning", *auto)
    assert str(tmp_path / "a.adapter") in none.stdout
    paths = (tmp_path / "a.adapter", tmp_path / "a.tuning")
    assert tried == [(*paths, 7, 2), (*paths, 60, 400), (*paths, 60, 400)]


@pytest.mark.parametrize(
    ("more", "named"),
    [
        (("--method", "auto"), ("--method auto", "--adapter")),
        (("--method", "auto", "--adapter", "a.adapter", "--decoder", "new"), ("--decoder", "--method auto")),
        (("--method", "auto", "--adapter", "a.adapter", "--no-validate"), ("--no-validate", "--method auto")),
        (("--method", "full", "--adapter", "a.adapter"), ("--adapter", "--method full")),
        (("--method", "full", "--time-limit", 60), ("--time-limit", "--method full")),
        (("--method", "adaptformer"), ("adaptformer",)),
        (("--method", "decoder", "--decoder", "frozen"), ("--method decoder", "--decoder frozen")),
        (("--method", "full", "--state", "state.sqlite"), ("--state", "--from-reviewed")),
    ],
    ids=lambda value: " ".join(map(str, value)),
)
def test_options_that_contradict_the_method_are_refused(
    site: Path, tmp_path: Path, more: tuple[object, ...], named: tuple[str, ...]
) -> None:
    with refused(UsageError, *named):
        finetune(site, tmp_path / "out" / "a.tuning", *more)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("verb", "more", "named"),
    [
        ("finetune", ("--method", "spatial"), "fseft-edge adapt --method spatial"),
        ("adapt", ("--method", "lora"), "fseft-edge finetune --method lora"),
        ("adapt", ("--method", "loar"), "'loar' is not one of"),
        ("adapt", ("--steps", 3), "No such option '--steps'"),
        ("finetune", ("--method", "lora", "--memory", 3), "No such option '--memory'"),
        ("finetune", ("--method", "lora", "--cache", "features"), "No such option '--cache'"),
        ("finetune", (), "Missing option '--method'"),
    ],
)
def test_the_error_for_a_method_of_the_other_command_names_that_command(
    site: Path, tmp_path: Path, verb: str, more: tuple[object, ...], named: str
) -> None:
    refusal = train(verb, site, tmp_path / "out", *more)
    assert refusal.exit_code == 2
    assert named in refusal.stderr
    assert not (tmp_path / "out").exists()


def test_the_command_offers_every_method() -> None:
    assert training_options.TUNINGS == TUNING_METHODS
