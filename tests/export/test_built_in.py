"""Encoders that are given by the name of a built-in model."""

from __future__ import annotations

from pathlib import Path

import pytest
from doubles.encoder import write_tiny_encoder
from doubles.errors import refused

from fseft_edge.adapters.find_encoder import find_encoder
from fseft_edge.export import built_in
from fseft_edge.export.built_in import exported_built_in_encoders, open_encoder
from fseft_edge.export.export import export_encoder
from fseft_edge.runtime.errors import EncoderBundleError, InputError, OutOfSpaceError, UsageError


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder of the user, and an export without the ONNX graphs, which take most of its time."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("fseft_edge.export.export.cpu_engines", lambda *_: [])
    return tmp_path / "cache" / "fseft-edge" / "encoders"


def test_a_built_in_encoder_is_exported_once(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert exported_built_in_encoders() == []
    first = open_encoder("edge_base")
    assert first.path.parent == cache
    assert exported_built_in_encoders() == [first.path]
    monkeypatch.setattr(built_in, "_export", None)  # a second export would fail
    assert open_encoder(Path("edge_base")).encoder_id == first.encoder_id
    assert sorted(cache.iterdir()) == [first.path]


def test_bundles_of_earlier_versions_are_found_after_those_of_this_version(cache: Path) -> None:
    earlier = cache / "edge_base-0.0.9-0123456789ab.encoder"
    windows = export_encoder(None, model="edge_base", output=earlier, onnx=False, tiling="windows")
    current = open_encoder("edge_base")
    assert exported_built_in_encoders() == [current.path, earlier]
    assert find_encoder(None, windows.encoder_id, "edge_base") == earlier


def test_an_adapter_of_windows_is_refused_with_the_command_that_writes_its_encoder(cache: Path) -> None:
    current = open_encoder("edge_base")
    with refused(InputError, "edge_base", current.id_with_windows[:12]) as caught:
        find_encoder(None, current.id_with_windows, "edge_base")
    assert "fseft-edge export --tiling windows" in caught.value.remedy


def test_the_bundle_of_a_faster_process_is_kept(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def slower(checkpoint: None, *, model: str, output: Path) -> None:
        export_encoder(checkpoint, model=model, output=output, onnx=False)
        (bundle,) = [cache / output.name.removeprefix(".").rpartition(".")[0]]
        export_encoder(checkpoint, model=model, output=bundle, onnx=False)
        (bundle / "of the faster process").touch()

    monkeypatch.setattr("fseft_edge.export.export.export_encoder", slower)
    opened = open_encoder("edge_base")
    assert (opened.path / "of the faster process").exists()
    assert list(cache.iterdir()) == [opened.path]


def test_a_bundle_with_the_name_of_a_model_has_priority(cache: Path) -> None:
    bundle = write_tiny_encoder(Path("edge_base"))
    assert open_encoder("edge_base").encoder_id == bundle.encoder_id
    assert not cache.exists()


def test_a_model_that_is_not_built_in_is_refused() -> None:
    with refused(UsageError, "fseft"):
        open_encoder("fseft")


def test_a_path_without_a_bundle_is_refused(cache: Path) -> None:
    with refused(EncoderBundleError, "nowhere.encoder"):
        open_encoder("nowhere.encoder")


def test_a_cache_folder_that_cannot_be_written_is_named(cache: Path) -> None:
    cache.parent.mkdir(parents=True)
    cache.write_text("a file in the place of the folder")
    with refused(OutOfSpaceError, cache):
        open_encoder("edge_base")
