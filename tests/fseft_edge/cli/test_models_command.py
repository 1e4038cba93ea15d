"""``fseft-edge models``, and refusals of ``fseft-edge export``."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from doubles.errors import refused
from doubles.own_network import make_network
from doubles.releases import authors_swin

import fseft_edge
from fseft_edge.cli.main import cli
from fseft_edge.export.zoo import MODELS
from fseft_edge.runtime.errors import CheckpointError, FseftEdgeError, InputError, UnreadableFileError, UsageError

Command = Callable[..., Result]

OWN = """\
name = "own"
factory = "doubles.own_network:make_network"
window = [16, 16, 16]
levels = ["last", "middle", "deep"]
classifier = "score"
organs = ["liver", "spleen"]
[preprocessing]
spacing = [6.0, 6.0, 6.0]
"""


@pytest.fixture
def command() -> Iterator[Command]:
    """Return a function that runs ``fseft-edge``; the log level is restored afterwards."""
    logger = logging.getLogger("fseft_edge")
    level = logger.level
    yield lambda *arguments: CliRunner().invoke(cli, [str(argument) for argument in arguments], catch_exceptions=False)
    logger.setLevel(level)


def test_every_model_is_listed_with_its_file_and_the_command_that_exports_it(command: Command) -> None:
    printed = command("models").stdout
    for spec in fseft_edge.models():
        paragraph = next(part for part in printed.split("\n\n") if part.startswith(f"{spec.name}: "))
        if spec.published is None:
            continue
        assert f"fseft-edge export {spec.file} --model {spec.name} --output {spec.name}.encoder" in paragraph
        assert spec.repository in paragraph
        words = " ".join(paragraph.split())
        assert spec.licence in words
        assert (spec.sha256 or "unknown") in words
    assert "from texts" in " ".join(printed.split())  # the head of the SuPreM file


def test_the_list_contains_no_addresses(command: Command) -> None:
    printed = command("models").stdout + command("models", "--json").stdout
    assert not re.search(r"https?:|www\.|\.(com|org|co|io|net)\b", printed)


def test_the_list_as_json_contains_all_models(command: Command) -> None:
    answer = json.loads(command("models", "--json").stdout)
    assert answer["schema_version"] == 1
    assert [entry["name"] for entry in answer["models"]] == list(MODELS)
    (btcv,) = (entry for entry in answer["models"] if entry["name"] == "btcv")
    assert btcv["published"]["organs"][:3] == ["spleen", "right_kidney", "left_kidney"]
    assert btcv["published"]["preprocessing"]["hu_window"] == [-175.0, 250.0]
    assert btcv["sha256"] is None
    assert [entry["name"] for entry in answer["models"] if entry["built_in"]] == ["edge_base"]


def test_a_network_of_the_user_is_exported(command: Command, tmp_path: Path) -> None:
    torch.save(make_network().state_dict(), tmp_path / "own.pt")
    (tmp_path / "own.toml").write_text(OWN, encoding="utf-8")
    done = command(
        "export", tmp_path / "own.pt", "--description", tmp_path / "own.toml", "--output", tmp_path / "own.encoder"
    )
    assert done.exit_code == 0
    assert "own.encoder: own, 2 organs, windows of 16 x 16 x 16 voxels, id " in done.stdout


def unknown(folder: Path) -> list[object]:
    torch.save({"blocks.0.weight": torch.ones(1)}, folder / "c.pth")
    return [folder / "c.pth", "--model", "suprem_unet"]


def truncated(folder: Path) -> list[object]:
    torch.save({"a": torch.randn(4000)}, folder / "c.pth")
    (folder / "c.pth").write_bytes((folder / "c.pth").read_bytes()[:-5000])
    return [folder / "c.pth", "--model", "btcv"]


def small(folder: Path) -> list[object]:
    torch.save(authors_swin(14).state_dict(), folder / "c.pth")
    return [folder / "c.pth", "--model", "btcv"]


def described(text: str) -> Callable[[Path], list[object]]:
    def arguments(folder: Path) -> list[object]:
        torch.save(make_network().state_dict(), folder / "own.pt")
        (folder / "own.toml").write_text(text, encoding="utf-8")
        return [folder / "own.pt", "--model", "custom", "--description", folder / "own.toml"]

    return arguments


@pytest.mark.parametrize(
    ("arguments", "kind", "named"),
    [
        (unknown, CheckpointError, ("c.pth", "blocks.0.weight")),
        (truncated, CheckpointError, ("c.pth",)),
        (small, CheckpointError, ("c.pth", "btcv", 12, 48)),
        (described(OWN.replace('organs = ["liver", "spleen"]\n', "")), InputError, ("own.toml", "organs")),
        (described(OWN.replace('["liver", "spleen"]', '["liver"]')), CheckpointError, ("own.toml", "1 organs")),
        (described(f'colour = "red"\n{OWN}'), InputError, ("own.toml", "colour")),
        (described("name ="), UnreadableFileError, ("own.toml",)),
        (lambda folder: [folder / "c.pth", "--model", "nobody"], UsageError, ("nobody",)),
        (lambda _: ["--model", "clipdriven"], UsageError, ("supervised_clip_driven",)),
        (lambda folder: ["--description", folder / "own.toml"], UsageError, ("own.toml",)),
    ],
    ids=[
        *("another network", "truncated", "another feature size", "no organs", "too few organs", "unknown key"),
        *("no TOML", "unknown model", "no checkpoint", "no weights"),
    ],
)
def test_a_refused_export_leaves_no_files(
    command: Command,
    tmp_path: Path,
    arguments: Callable[[Path], list[object]],
    kind: type[FseftEdgeError],
    named: tuple[object, ...],
) -> None:
    with refused(kind, *named):
        command("export", *arguments(tmp_path), "--output", tmp_path / "o.encoder")
    assert not (tmp_path / "o.encoder").exists()
