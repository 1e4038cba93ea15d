"""The adapter file: written adapters are read unchanged; damaged, foreign and incomplete files are refused."""

from __future__ import annotations

import hashlib
import itertools
import json
from pathlib import Path

import pytest
import torch
from doubles.encoder import write_random_adapter, write_tiny_encoder
from doubles.errors import refused
from doubles.features import random_features
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from fseft_edge.adapters.blocks import Box, read_block
from fseft_edge.adapters.described_tensors import does_not_fit
from fseft_edge.adapters.file import (
    AdapterDescription,
    AdapterFile,
    AdapterOrgan,
    LocatedOrgan,
    Locator,
    LocatorDescription,
    PostProcessing,
    read_adapter,
    stored_settings,
    write_adapter,
)
from fseft_edge.adapters.network import Adapter, AdapterSettings
from fseft_edge.runtime.encoder.bundle import sha256_of_weights
from fseft_edge.runtime.encoder.networks.base import FeatureLevel
from fseft_edge.runtime.errors import AdapterError
from fseft_edge.runtime.scans.intensities import HuPercentiles
from fseft_edge.runtime.system import atomic

LEVELS = (FeatureLevel(1, 3), FeatureLevel(2, 4), FeatureLevel(4, 5))
KINDS = [
    AdapterSettings(*kind, width=6)  # type: ignore[arg-type]  # a product of literals is typed as str
    for kind in itertools.product(("linear", "pointwise", "spatial"), ("finest", "all"), ("sigmoid", "softmax"))
]
KEY = "fseft_edge_adapter"


def random_adapter(settings: AdapterSettings = KINDS[0]) -> AdapterFile:
    """Return an adapter for two organs with random weights and buffers."""
    generator = torch.Generator().manual_seed(3)
    adapter = Adapter(settings, LEVELS, 2)
    for value in adapter.state_dict().values():
        value.copy_(torch.rand(value.shape, generator=generator) + 0.5)
    description = AdapterDescription(
        encoder_id="ab" * 32,
        encoder_name="tiny",
        levels=tuple((level.stride, level.channels) for level in LEVELS),
        settings=stored_settings(settings),
        organs=(
            AdapterOrgan(
                name="liver",
                label=6,
                support_volumes_ml=(1500.125, 1712.5),
                left_out_dsc=(0.75,),
                post_processing=PostProcessing(largest_component=True),
            ),
            AdapterOrgan(name="spleen", label=1, support_volumes_ml=()),
        ),
        shots=2,
        seed=7,
        steps=30,
        losses=(0.9, 0.1 + 0.7),
        bfloat16=True,
    )
    return AdapterFile(description, adapter.eval())


@pytest.mark.parametrize("settings", KINDS, ids=str)
def test_a_written_adapter_is_read_unchanged(tmp_path: Path, settings: AdapterSettings) -> None:
    file = random_adapter(settings)
    write_adapter(tmp_path / "a.adapter", file)
    back = read_adapter(tmp_path / "a.adapter")
    for name in ("organs", "settings", "levels", "losses", "encoder_id", "seed", "steps", "shots", "bfloat16"):
        assert getattr(back.description, name) == getattr(file.description, name)
    assert back.sha256 == hashlib.sha256((tmp_path / "a.adapter").read_bytes()).hexdigest()
    assert back.adapter.settings == settings
    assert not back.adapter.training
    wanted, found = file.adapter.state_dict(), back.adapter.state_dict()
    assert wanted.keys() == found.keys()
    assert all(torch.equal(wanted[key], found[key]) for key in wanted)


@pytest.mark.parametrize("settings", KINDS, ids=str)
def test_an_adapter_that_was_read_gives_one_probability_per_class_and_voxel(
    tmp_path: Path, settings: AdapterSettings
) -> None:
    write_adapter(tmp_path / "a.adapter", random_adapter(settings))
    adapter = read_adapter(tmp_path / "a.adapter").adapter
    core = Box((8, 20), (4, 20), (8, 12))
    features = read_block(random_features((32, 24, 32), (3, 4, 5)), adapter.boxes(core))  # type: ignore[arg-type]  # a test double
    with torch.inference_mode():
        probabilities = adapter.probabilities(adapter(features, core))
    assert probabilities.shape == (1, 3 if settings.activation == "softmax" else 2, 12, 16, 4)
    assert bool(((probabilities >= 0) & (probabilities <= 1)).all())
    if settings.activation == "softmax":
        torch.testing.assert_close(probabilities.sum(1), torch.ones(1, 12, 16, 4))


@pytest.mark.parametrize("settings", KINDS, ids=str)
def test_equal_adapters_give_equal_bytes_also_after_reading(tmp_path: Path, settings: AdapterSettings) -> None:
    for name, file in (("a", random_adapter(settings)), ("b", random_adapter(settings))):
        write_adapter(tmp_path / name, file)
    write_adapter(tmp_path / "c", read_adapter(tmp_path / "a"))
    first, second, third = ((tmp_path / name).read_bytes() for name in "abc")
    assert first == second == third


def test_the_file_is_a_safetensors_file_with_a_json_description(tmp_path: Path) -> None:
    """Other software can read the file, and reading does not unpickle anything."""
    path = tmp_path / "a.adapter"
    write_adapter(path, random_adapter())
    size = int.from_bytes(path.read_bytes()[:8], "little")
    header = json.loads(path.read_bytes()[8 : 8 + size])
    description = json.loads(header["__metadata__"][KEY])
    assert description["schema_version"] == 3
    assert description["organs"][0] == {
        "name": "liver",
        "label": 6,
        "support_volumes_ml": [1500.125, 1712.5],
        "left_out_dsc": [0.75],
        "post_processing": {"largest_component": True, "fill_holes": False},
    }
    assert load_file(path).keys() == random_adapter().adapter.state_dict().keys()


def test_hu_of_the_support_set_are_written_and_read(tmp_path: Path) -> None:
    file = random_adapter()
    liver, spleen = file.description.organs
    liver = liver.model_copy(update={"support_hu": (HuPercentiles(-20, 104, 180), HuPercentiles(0, 60, 121))})
    description = file.description.model_copy(update={"organs": (liver, spleen)})
    write_adapter(tmp_path / "a", AdapterFile(description, file.adapter))
    assert read_adapter(tmp_path / "a").description.organs == (liver, spleen)
    header = (tmp_path / "a").read_bytes()
    assert rb"\"support_hu\":[{\"low\":-20,\"median\":104,\"high\":180}" in header


def test_the_expected_volumes_of_an_organ_are_written_with_a_new_schema_version_and_read(tmp_path: Path) -> None:
    file = random_adapter()
    liver, spleen = file.description.organs
    liver = liver.model_copy(update={"expected_ml": (1350.5, 1883.75)})
    description = file.description.model_copy(update={"organs": (liver, spleen), "schema_version": 5})
    write_adapter(tmp_path / "a", AdapterFile(description, file.adapter))
    assert read_adapter(tmp_path / "a").description.organs == (liver, spleen)


@pytest.mark.parametrize("expected", [[0, 1], [2, 1], [1, 1e999], [1]])
def test_expected_volumes_that_are_no_range_are_refused(tmp_path: Path, expected: list[float]) -> None:
    organ = {"name": "liver", "label": 6, "support_volumes_ml": [], "expected_ml": expected}
    write_with_changed_description(tmp_path / "a.adapter", organs=[organ] * 2, schema_version=5)
    with refused(AdapterError, "a.adapter"):
        read_adapter(tmp_path / "a.adapter")


def test_a_file_of_an_older_version_without_hu_is_read_and_keeps_its_checksum(tmp_path: Path) -> None:
    """The test writes the description and the checksum as the older version did."""
    file = random_adapter()
    weights = dict(file.adapter.state_dict())
    organs = [
        {
            "name": name,
            "label": label,
            "support_volumes_ml": volumes,
            "left_out_dsc": [],
            "post_processing": {"largest_component": False, "fill_holes": False},
        }
        for name, label, volumes in (("liver", 6, [1500.0]), ("spleen", 1, []))
    ]
    description = {
        "schema_version": 3,
        "toolkit_version": "0.1.0",
        "encoder_id": "ab" * 32,
        "encoder_name": "tiny",
        "levels": [[level.stride, level.channels] for level in LEVELS],
        "settings": stored_settings(file.adapter.settings),
        "organs": organs,
        "shots": 1,
        "seed": 0,
        "steps": 3,
        "losses": [],
        "bfloat16": False,
        "content_sha256": "",
    }
    text = json.dumps(description, separators=(",", ":"))
    digest = hashlib.sha256(f"{text}{sha256_of_weights(weights)}".encode()).hexdigest()
    header = json.dumps({**description, "content_sha256": digest}, separators=(",", ":"))
    save_file(weights, tmp_path / "old.adapter", metadata={KEY: header})
    old = read_adapter(tmp_path / "old.adapter")
    assert [organ.support_hu for organ in old.description.organs] == [(), ()]
    write_adapter(tmp_path / "again.adapter", old)
    assert (tmp_path / "again.adapter").read_bytes() == (tmp_path / "old.adapter").read_bytes()


def test_another_encoder_is_refused_by_a_message_that_names_the_file_and_both_encoders(tmp_path: Path) -> None:
    windows = write_tiny_encoder(tmp_path / "windows.encoder")
    whole = write_tiny_encoder(tmp_path / "whole.encoder", whole_scan=True)
    file = random_adapter()
    with refused(AdapterError, "site.adapter", "tiny", "ab" * 6, windows.encoder_id[:12]) as caught:
        file.check_encoder(windows, path=Path("site.adapter"))
    assert "--encoder" in caught.value.remedy
    assert "--tiling" not in caught.value.remedy

    of_windows = write_random_adapter(tmp_path / "site.adapter", windows)
    of_windows.check_encoder(windows, path=Path("site.adapter"))
    with refused(AdapterError, "site.adapter") as caught:
        of_windows.check_encoder(whole, path=Path("site.adapter"))
    assert "--tiling windows" in caught.value.remedy


def test_a_changed_byte_at_any_position_is_detected(tmp_path: Path) -> None:
    path = tmp_path / "a.adapter"
    write_adapter(path, random_adapter())
    content = path.read_bytes()
    for position in {*range(0, len(content), 11), *range(8), len(content) - 1}:
        changed = bytearray(content)
        changed[position] ^= 0x01
        path.write_bytes(changed)
        with refused(AdapterError, path):
            read_adapter(path)


@pytest.mark.parametrize("share", [0.0, 0.001, 0.01, 0.3, 0.7, 0.999])
def test_a_truncated_file_is_refused(tmp_path: Path, share: float) -> None:
    path = tmp_path / "a.adapter"
    write_adapter(path, random_adapter())
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with refused(AdapterError, path):
        read_adapter(path)


def test_a_missing_file_and_a_folder_are_refused_by_name(tmp_path: Path) -> None:
    for path in (tmp_path / "no.adapter", tmp_path):
        with refused(AdapterError, path):
            read_adapter(path)


def test_files_of_other_formats_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.adapter"
    path.write_text("This text is not an adapter, but it is long enough for the header length of safetensors.")
    with refused(AdapterError, path):
        read_adapter(path)
    save_file({"weight": torch.zeros(2)}, path)
    with refused(AdapterError, path):
        read_adapter(path)


def with_locator() -> AdapterFile:
    """Return an adapter with a locator, each with random weights."""
    file, small = random_adapter(), random_adapter(KINDS[2])
    described = LocatorDescription(
        encoder_id="cd" * 32,
        encoder_name="coarse",
        levels=tuple((level.stride, level.channels) for level in LEVELS),
        settings=stored_settings(KINDS[2]),
        organs=tuple(
            LocatedOrgan(name=name, threshold=0.1, margin_mm=12.5, recall=(1.0, 0.9)) for name in ("liver", "spleen")
        ),
        selected=(0.25, 0.5),
    )
    changes = {"schema_version": 4, "windows_elsewhere": 4, "locator": described}
    return AdapterFile(
        file.description.model_copy(update=changes), file.adapter, locator=Locator(described, small.adapter)
    )


def test_a_locator_is_read_unchanged_and_stays_apart_from_the_adapter(tmp_path: Path) -> None:
    file = with_locator()
    write_adapter(tmp_path / "a.adapter", file)
    back = read_adapter(tmp_path / "a.adapter")
    assert back.locator is not None
    assert file.locator is not None
    assert back.locator.description == file.locator.description == back.description.locator
    assert back.description.windows_elsewhere == 4
    for one, other in ((back.adapter, file.adapter), (back.locator.adapter, file.locator.adapter)):
        assert one.state_dict().keys() == other.state_dict().keys()
        for name, value in one.state_dict().items():
            assert torch.equal(value, other.state_dict()[name])
    write_adapter(tmp_path / "again.adapter", back)
    assert (tmp_path / "again.adapter").read_bytes() == (tmp_path / "a.adapter").read_bytes()


def test_an_adapter_without_a_locator_is_written_for_earlier_versions(tmp_path: Path) -> None:
    write_adapter(tmp_path / "a.adapter", random_adapter())
    with safe_open(tmp_path / "a.adapter", framework="pt") as opened:
        description = json.loads(opened.metadata()[KEY])
    assert description["schema_version"] == 3
    assert not {"locator", "windows_elsewhere"} & description.keys()


@pytest.mark.parametrize(
    "changes",
    [
        {"locator": None},
        {"schema_version": 3},
        {"locator": None, "windows_elsewhere": None, "schema_version": 3},
    ],
    ids=["without description", "older version", "unknown tensors"],
)
def test_a_locator_that_does_not_fit_its_description_is_refused(tmp_path: Path, changes: dict[str, object]) -> None:
    file = with_locator()
    assert file.locator is not None
    tensors = dict(file.adapter.state_dict())
    tensors |= {f"locator.{name}": value for name, value in file.locator.adapter.state_dict().items()}
    description = {**json.loads(file.description.model_dump_json()), **changes}
    kept = {name: value for name, value in description.items() if value is not None}
    save_file(tensors, tmp_path / "a.adapter", metadata={KEY: json.dumps(kept)})
    with refused(AdapterError, "a.adapter", "description"):
        read_adapter(tmp_path / "a.adapter")


def write_with_changed_description(path: Path, **changes: object) -> None:
    """Write an adapter file whose description does not match its weights or its checksum."""
    file = random_adapter()
    description = {**json.loads(file.description.model_dump_json()), **changes}
    save_file(dict(file.adapter.state_dict()), path, metadata={KEY: json.dumps(description)})


@pytest.mark.parametrize("text", ["", "[]", "{", "[" * 100_000 + "]" * 100_000], ids=["empty", "list", "cut", "deep"])
def test_a_description_that_is_none_is_refused(tmp_path: Path, text: str) -> None:
    save_file(dict(random_adapter().adapter.state_dict()), tmp_path / "a.adapter", metadata={KEY: text})
    with refused(AdapterError, "a.adapter"):
        read_adapter(tmp_path / "a.adapter")


@pytest.mark.parametrize("version", [0, 2, 6, None, "1"])
def test_an_unknown_schema_is_refused_and_named(tmp_path: Path, version: object) -> None:
    write_with_changed_description(tmp_path / "a.adapter", schema_version=version)
    with refused(AdapterError, "a.adapter", "schema", version):
        read_adapter(tmp_path / "a.adapter")


@pytest.mark.parametrize(
    "changes",
    [
        {"organs": []},
        {"organs": [{"name": "liver", "label": 6, "support_volumes_ml": []}]},
        {"organs": [{"name": "liver", "label": 6, "support_volumes_ml": [], "support_hu": [[0, 1, 2]]}] * 2},
        {"levels": [[1, 4]]},
        {"levels": []},
        {"levels": [[1, 0]]},
        {"levels": [[0, 4]]},
        {"levels": "none"},
        {"settings": {"method": "spatial", "reads": "last"}},
        {"settings": {"method": "magic"}},
        {"settings": {"method": "linear", "reads": "last", "activation": "tanh"}},
        {"settings": {"depth": 3}},
        {"unheard_of": 1},
        {"encoder_id": None},
    ],
    ids=str,
)
def test_a_description_that_does_not_match_the_weights_is_refused(tmp_path: Path, changes: dict[str, object]) -> None:
    write_with_changed_description(tmp_path / "a.adapter", **changes)
    with refused(AdapterError, "a.adapter") as caught:
        read_adapter(tmp_path / "a.adapter")
    assert caught.value.message == does_not_fit(tmp_path / "a.adapter").message  # refused before the checksum


@pytest.mark.parametrize("header", ["", "[]", "3", "null", "{", '"text"'])
def test_a_header_without_a_description_is_refused(tmp_path: Path, header: str) -> None:
    save_file(dict(random_adapter().adapter.state_dict()), tmp_path / "a.adapter", metadata={KEY: header})
    with refused(AdapterError, "a.adapter"):
        read_adapter(tmp_path / "a.adapter")


def test_an_interrupt_during_writing_keeps_the_older_adapter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.adapter"
    write_adapter(path, random_adapter())
    earlier = path.read_bytes()

    def interrupted(path: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(atomic, "_flush", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_adapter(path, random_adapter(KINDS[-1]))
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.adapter"]
    assert path.read_bytes() == earlier
