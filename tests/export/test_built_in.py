"""Encoders that are given by the name of a built-in model."""

from __future__ import annotations

from pathlib import Path

import pytest
from doubles.encoder import write_tiny_encoder
from doubles.errors import refused

from fseft_edge.export import built_in
from fseft_edge.export.built_in import exported_built_in_encoders, open_encoder
from fseft_edge.export.export import export_encoder
from fseft_edge.runtime.errors import EncoderBundleError, OutOfSpaceError, UsageError


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
