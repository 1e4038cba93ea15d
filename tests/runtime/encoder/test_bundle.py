"""EncoderBundle: writing, reading, and refusal of changed or unknown files."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from doubles.errors import refused
from doubles.models import CHANNELS, small_contents, small_network, windows

from fseft_edge.runtime.encoder.bundle import EncoderBundle, ParityReport, sha256_of_weights
from fseft_edge.runtime.errors import EncoderBundleError, UsageError
from fseft_edge.runtime.scans.preprocessing import Preprocessing

FILES = ["encoder.onnx", "encoder.safetensors", "head.safetensors", "manifest.json"]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    (tmp_path / "graph").write_bytes(b"the content of a graph is not read")
    report = ParityReport(
        backend="onnxruntime", version="1.0", source="noise", windows=2, gate=1e-4, relative_error=(1e-6, 2e-6)
    )
    contents = small_contents(graph=tmp_path / "graph", parity={"onnxruntime": report})
    return EncoderBundle.write(tmp_path / "small.encoder", contents).path


def forged(path: Path, **changes: object) -> None:
    """Change entries of a manifest, with a correct sha256 of the manifest."""
    file = path / "manifest.json"
    entries = json.loads(file.read_text()) | changes | {"manifest_sha256": "0" * 64}
    text = json.dumps(entries)
    before, _, after = text.rpartition("0" * 64)
    file.write_text(before + hashlib.sha256(text.encode()).hexdigest() + after)


def test_bundle_returns_the_written_contents(path: Path) -> None:
    bundle = EncoderBundle.open(path)
    assert bundle.window == (16, 16, 16)
    assert [(level.stride, level.channels) for level in bundle.levels] == [(1, 4), (2, 6)]
    assert bundle.preprocessing == Preprocessing(spacing=(6.0, 6.0, 6.0))
    assert bundle.manifest.parity["onnxruntime"].relative_error == (1e-6, 2e-6)
    assert bundle.graph == path / "encoder.onnx"
    assert torch.equal(bundle.head_weight(), torch.ones(2, CHANNELS[0]))
    assert torch.equal(bundle.head_bias(), torch.tensor([0.5, -0.25]))
    with torch.no_grad():
        for a, b in zip(small_network()(windows(1)), bundle.network()(windows(1)), strict=True):
            assert torch.equal(a, b)


def test_write_and_open_return_equal_bundles(tmp_path: Path) -> None:
    written = EncoderBundle.write(tmp_path / "small.encoder", small_contents())
    read = EncoderBundle.open(tmp_path / "small.encoder")
    assert read.manifest == written.manifest
    assert read.encoder_id == written.encoder_id
    assert read.graph is None


def test_same_contents_give_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        EncoderBundle.write(tmp_path / name, small_contents())
    for file in (tmp_path / "a").iterdir():
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes(), file.name


def test_bundle_consists_of_these_files(path: Path) -> None:
    assert sorted(file.name for file in path.iterdir()) == FILES


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("place", [0.0, 0.3, 0.6, 0.999])
def test_changed_byte_is_refused_with_the_name_of_the_file(path: Path, name: str, place: float) -> None:
    content = bytearray((path / name).read_bytes())
    content[int(place * len(content))] ^= 1
    (path / name).write_bytes(content)
    with refused(EncoderBundleError, path / name) as caught:
        EncoderBundle.open(path)
    assert caught.value.exit_code == 3


def test_changed_byte_anywhere_in_the_manifest_is_refused(path: Path) -> None:
    file = path / "manifest.json"
    content = file.read_bytes()
    for place in range(0, len(content), 5):
        file.write_bytes(content[:place] + bytes([content[place] ^ 4]) + content[place + 1 :])
        with refused(EncoderBundleError, file):
            EncoderBundle.open(path)


@pytest.mark.parametrize("name", FILES[:-1])
def test_missing_file_is_refused_with_its_name(path: Path, name: str) -> None:
    (path / name).unlink()
    with refused(EncoderBundleError, path / name):
        EncoderBundle.open(path)


def test_folder_without_manifest_is_refused(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "none.encoder"):
        with refused(EncoderBundleError, folder, "manifest.json"):
            EncoderBundle.open(folder)


@pytest.mark.parametrize("content", ["", "[]", "{}", "null", '{"schema_version": 1}', "\xff"])
def test_damaged_manifest_is_refused(path: Path, content: str) -> None:
    (path / "manifest.json").write_bytes(content.encode("latin1"))
    with refused(EncoderBundleError, path / "manifest.json"):
        EncoderBundle.open(path)


def test_unknown_schema_is_refused_with_its_version(path: Path) -> None:
    forged(path, schema_version=4)
    with refused(EncoderBundleError, path / "manifest.json", 4):
        EncoderBundle.open(path)


def test_bundle_of_schema_version_1_is_read(path: Path) -> None:
    """Version 1 has no entries for the precision and for the DSC of masks."""
    before = EncoderBundle.open(path)
    reports = json.loads((path / "manifest.json").read_text())["parity"]
    for report in reports.values():
        del report["precision"], report["mask_dsc"]
    forged(path, schema_version=1, parity=reports)
    read = EncoderBundle.open(path)
    assert read.manifest.schema_version == 1
    assert read.encoder_id == before.encoder_id
    assert read.manifest.parity == before.manifest.parity


def test_manifest_with_an_unknown_entry_is_refused(path: Path) -> None:
    forged(path)
    EncoderBundle.open(path)
    forged(path, colour="blue")
    with refused(EncoderBundleError, path / "manifest.json"):
        EncoderBundle.open(path)


def test_weights_of_another_architecture_are_refused(path: Path) -> None:
    forged(path, settings={"channels": [4, 6, 9]})
    with refused(EncoderBundleError, path / "encoder.safetensors", "residual_unet"):
        EncoderBundle.open(path).network()


def test_settings_of_a_later_version_are_refused(path: Path) -> None:
    forged(path, settings={"channels": [4, 8], "from_the_future": True})
    with refused(EncoderBundleError, "from_the_future"):
        EncoderBundle.open(path).network()


def test_architecture_of_a_later_version_is_refused(path: Path) -> None:
    forged(path, architecture="from_the_future")
    with refused(EncoderBundleError, "from_the_future"):
        EncoderBundle.open(path).network()


def test_writing_to_an_existing_path_is_refused(path: Path) -> None:
    before = (path / "manifest.json").read_bytes()
    with refused(UsageError, path):
        EncoderBundle.write(path, small_contents(seed=1))
    assert (path / "manifest.json").read_bytes() == before


def test_encoder_id_is_the_same_for_the_same_features(tmp_path: Path, path: Path) -> None:
    other = replace(small_contents(), name="renamed", organs=("a", "b"), tools={}, head_bias=torch.zeros(2))
    assert EncoderBundle.write(tmp_path / "other", other).encoder_id == EncoderBundle.open(path).encoder_id


@pytest.mark.parametrize(
    "changes",
    [
        {"network": small_network(1)},
        {"preprocessing": Preprocessing(spacing=(6.0, 6.0, 6.5))},
        {"window": (16, 16, 32)},
    ],
    ids=["weights", "preprocessing", "window"],
)
def test_encoder_id_changes_with_what_determines_the_features(
    tmp_path: Path, path: Path, changes: dict[str, object]
) -> None:
    other = EncoderBundle.write(tmp_path / "other", small_contents(**changes))
    assert other.encoder_id != EncoderBundle.open(path).encoder_id


def test_weights_digest_depends_on_names_types_shapes_and_values() -> None:
    a = torch.arange(6, dtype=torch.float32)
    states = [
        {"a": a},
        {"b": a},
        {"a": a.double()},
        {"a": a.reshape(2, 3)},
        {"a": a + 1},
        {"a": a, "b": torch.tensor(0)},
    ]
    assert len({sha256_of_weights(state) for state in states}) == len(states)
    assert sha256_of_weights({"a": a, "b": a}) == sha256_of_weights({"b": a, "a": a})


def test_parity_passes_up_to_its_gate() -> None:
    report = ParityReport(backend="x", version="1", source="ct", windows=1, gate=1e-4, relative_error=(1e-4, 0.0))
    assert report.shortcoming is None
    assert "1.1e-04" in str(report.model_copy(update={"relative_error": (0.0, 1.1e-4)}).shortcoming)
    assert report.model_copy(update={"relative_error": (float("nan"),)}).shortcoming is not None


@pytest.mark.parametrize(("dsc", "reason"), [(None, "--parity-ct"), (0.9979, "0.9979"), (0.998, None)])
def test_below_float32_masks_must_agree_too(dsc: float | None, reason: str | None) -> None:
    report = ParityReport(
        backend="x", precision="mixed", version="1", source="ct", windows=1, gate=1e-2, relative_error=(1e-3,)
    ).model_copy(update={"mask_dsc": dsc})
    assert reason in str(report.shortcoming) if reason else report.shortcoming is None


@pytest.mark.parametrize("name", ["encoder.safetensors", "head.safetensors"])
@pytest.mark.parametrize("content", [b"", bytes(8), b"\xff" * 64, b"\x02" + bytes(7) + b"{}"])
def test_tensors_that_are_none_are_refused_although_their_checksum_is_right(
    path: Path, name: str, content: bytes
) -> None:
    files = json.loads((path / "manifest.json").read_text())["files"]
    (path / name).write_bytes(content)
    forged(path, files={**files, name: hashlib.sha256(content).hexdigest()})
    bundle = EncoderBundle.open(path)
    with refused(EncoderBundleError, path / name):
        bundle.network() if name == "encoder.safetensors" else bundle.head_weight()


@pytest.mark.parametrize(
    "changes",
    [
        {"levels": []},
        {"levels": [{"stride": 0, "channels": 4}]},
        {"levels": [{"stride": 1, "channels": 0}]},
        {"levels": [{"stride": 1, "channels": -4}]},
        {"window": [0, 16, 16]},
        {"window": [16, 16, 15]},
        {"window": [16, 16, 10**400]},
    ],
)
def test_levels_and_windows_that_no_encoder_can_have_are_refused(path: Path, changes: dict[str, object]) -> None:
    forged(path, **changes)
    with refused(EncoderBundleError, path / "manifest.json"):
        EncoderBundle.open(path)


@pytest.mark.parametrize(
    "channels", [[4, 6, -8], [4, 6, 0], [4], [], [4, 6, 10**9], [4, 6, 2**70], "abc", [4, 6, None]]
)
def test_settings_with_which_no_network_can_be_built_are_refused(path: Path, channels: object) -> None:
    forged(path, settings={"channels": channels})
    with refused(EncoderBundleError, "residual_unet"):
        EncoderBundle.open(path).network()


def test_levels_that_the_network_does_not_have_are_refused(path: Path) -> None:
    forged(path, levels=[{"stride": 1, "channels": 4}, {"stride": 4, "channels": 6}])
    with refused(EncoderBundleError, path / "manifest.json"):
        EncoderBundle.open(path).network()


def test_a_head_for_other_organs_is_refused(path: Path) -> None:
    forged(path, organs=["liver"])
    bundle = EncoderBundle.open(path)
    for read in (bundle.head_weight, bundle.head_bias):
        with refused(EncoderBundleError, path / "head.safetensors"):
            read()


@pytest.mark.parametrize("name", ["encoder.safetensors", "head.safetensors"])
def test_a_manifest_without_the_checksum_of_the_weights_is_refused(path: Path, name: str) -> None:
    files = json.loads((path / "manifest.json").read_text())["files"]
    del files[name]
    forged(path, files=files)
    with refused(EncoderBundleError, path / "manifest.json", name):
        EncoderBundle.open(path)
