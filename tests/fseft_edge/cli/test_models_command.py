"""``fseft-edge models``, and what ``fseft-edge export`` answers to files that are not what was named."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from doubles.own_network import make_network
from doubles.releases import authors_swin

import fseft_edge
from fseft_edge.cli.main import cli
from fseft_edge.export.zoo import MODELS
from fseft_edge.runtime.errors import FseftEdgeError

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
    """Run ``fseft-edge``; how much it says afterwards is as before."""
    logger = logging.getLogger("fseft_edge")
    level = logger.level
    yield lambda *arguments: CliRunner().invoke(cli, [str(argument) for argument in arguments])
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
        assert (spec.sha256 or "the bundle records that of the file that was used") in words
    assert "the authors' file makes its head from texts" in " ".join(printed.split())


def test_list_names_projects_and_no_place_on_the_network(command: Command) -> None:
    printed = command("models").stdout + command("models", "--json").stdout
    assert not re.search(r"https?:|www\.|\.(com|org|co|io|net)\b", printed)


def test_list_as_json_holds_the_same(command: Command) -> None:
    answer = json.loads(command("models", "--json").stdout)
    assert answer["schema_version"] == 1
    assert [entry["name"] for entry in answer["models"]] == list(MODELS)
    (btcv,) = (entry for entry in answer["models"] if entry["name"] == "btcv")
    assert btcv["published"]["organs"][:3] == ["spleen", "right_kidney", "left_kidney"]
    assert btcv["published"]["preprocessing"]["hu_window"] == [-175.0, 250.0]
    assert btcv["sha256"] is None
    assert [entry["name"] for entry in answer["models"] if entry["built_in"]] == ["edge_base"]


def test_own_network_is_exported(command: Command, tmp_path: Path) -> None:
    torch.save(make_network().state_dict(), tmp_path / "own.pt")
    (tmp_path / "own.toml").write_text(OWN, encoding="utf-8")
    done = command(
        "export", tmp_path / "own.pt", "--description", tmp_path / "own.toml", "--output", tmp_path / "own.encoder"
    )
    assert done.exit_code == 0
    assert "own.encoder: own, 2 organs, id " in done.stdout


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
    ("arguments", "code", "message"),
    [
        (unknown, 3, r"none of this network's weights; it has 1 tensors \(blocks\.0\.weight\)"),
        (truncated, 3, r"c\.pth is truncated or no checkpoint"),
        (small, 3, "feature size 12; btcv has 48"),
        (described(OWN.replace('organs = ["liver", "spleen"]\n', "")), 3, "organs: Field required"),
        (described(OWN.replace('["liver", "spleen"]', '["liver"]')), 3, "names 1 organs"),
        (described(f'colour = "red"\n{OWN}'), 3, "colour: Extra inputs are not permitted"),
        (described("name ="), 3, "no readable TOML"),
        (lambda folder: [folder / "c.pth", "--model", "nobody"], 2, "'nobody' is unknown.*suprem_unet"),
        (lambda _: ["--model", "clipdriven"], 2, r"needs its checkpoint \(supervised_clip_driven"),
        (lambda folder: ["--description", folder / "own.toml"], 2, "needs its weights"),
    ],
)
def test_what_cannot_be_exported_is_refused_with_its_exit_code_and_leaves_nothing(
    command: Command, tmp_path: Path, arguments: Callable[[Path], list[object]], code: int, message: str
) -> None:
    done = command("export", *arguments(tmp_path), "--output", tmp_path / "o.encoder")
    assert isinstance(done.exception, FseftEdgeError)
    assert done.exception.exit_code == code
    assert re.search(message, str(done.exception))
    assert not (tmp_path / "o.encoder").exists()
