"""Measured speeds of backends: a record is valid only for the same encoder, device and versions."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from doubles.errors import refused
from doubles.models import small_contents

from fseft_edge.runtime.encoder import remembered_speed
from fseft_edge.runtime.encoder.bundle import EncoderBundle
from fseft_edge.runtime.encoder.remembered_speed import device_name, remember, remembered_order, speeds_file
from fseft_edge.runtime.errors import EnvironmentProblemError
from fseft_edge.runtime.system.libraries import installed_versions

CPU = torch.device("cpu")
SECONDS = {("torch", "float32"): 2.0, ("openvino", "bfloat16"): 1.0, ("abacus", "float32"): 3.0}
IN_ORDER = [("openvino", "bfloat16"), ("torch", "float32"), ("abacus", "float32")]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> EncoderBundle:
    return EncoderBundle.write(tmp_path_factory.mktemp("speeds") / "small.encoder", small_contents())


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def other_encoder(bundle: EncoderBundle) -> EncoderBundle:
    return replace(bundle, manifest=bundle.manifest.model_copy(update={"weights_sha256": "0" * 64}))


def test_without_a_record_there_is_no_order(bundle: EncoderBundle) -> None:
    assert remembered_order(bundle, CPU) is None


def test_the_fastest_backend_is_first(bundle: EncoderBundle, tmp_path: Path) -> None:
    assert remember(bundle, CPU, SECONDS) == tmp_path / "cache/fseft-edge/speeds.json"
    assert remembered_order(bundle, CPU) == IN_ORDER


def test_a_new_measurement_replaces_the_old_record(bundle: EncoderBundle) -> None:
    remember(other_encoder(bundle), CPU, SECONDS)
    remember(bundle, CPU, SECONDS)
    remember(bundle, CPU, {("torch", "float32"): 1.0, ("openvino", "bfloat16"): 2.0})
    assert remembered_order(bundle, CPU) == [("torch", "float32"), ("openvino", "bfloat16")]
    assert remembered_order(other_encoder(bundle), CPU) == IN_ORDER
    assert len(json.loads(speeds_file().read_text())["records"]) == 2


def test_a_record_of_another_encoder_device_or_version_is_not_used(
    bundle: EncoderBundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    remember(bundle, CPU, SECONDS)
    assert remembered_order(other_encoder(bundle), CPU) is None
    threads = torch.get_num_threads()
    with monkeypatch.context() as patched:
        patched.setattr(torch, "get_num_threads", lambda: threads + 1)
        assert remembered_order(bundle, CPU) is None
    with monkeypatch.context() as patched:
        patched.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA L4")
        assert device_name(torch.device("cuda", 0)) == "NVIDIA L4"
        assert remembered_order(bundle, torch.device("cuda", 0)) is None
    newer = {**installed_versions(), "openvino": "2031.0"}
    monkeypatch.setattr(remembered_speed, "installed_versions", lambda: newer)
    assert remembered_order(bundle, CPU) is None


def test_the_file_of_schema_version_1_is_read(bundle: EncoderBundle) -> None:
    record = {
        "encoder_id": bundle.encoder_id,
        "device": device_name(CPU),
        "versions": installed_versions(),
        "seconds_a_window": {"torch float32": 0.5, "onnxruntime float32": 0.25},
    }
    speeds_file().parent.mkdir(parents=True)
    speeds_file().write_text(json.dumps({"schema_version": 1, "records": [record]}))
    assert remembered_order(bundle, CPU) == [("onnxruntime", "float32"), ("torch", "float32")]


@pytest.mark.parametrize("content", ["", "{", '{"schema_version": 2, "records": []}', '{"records": [1]}'])
def test_a_damaged_file_is_skipped_with_a_warning_and_replaced(
    bundle: EncoderBundle, caplog: pytest.LogCaptureFixture, content: str
) -> None:
    speeds_file().parent.mkdir(parents=True)
    speeds_file().write_text(content)
    with caplog.at_level(logging.WARNING):
        assert remembered_order(bundle, CPU) is None
    assert str(speeds_file()) in caplog.text
    remember(bundle, CPU, SECONDS)
    assert remembered_order(bundle, CPU) == IN_ORDER


def test_a_relative_cache_folder_is_ignored(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for value in ("", "relative/cache"):
        monkeypatch.setenv("XDG_CACHE_HOME", value)
        assert speeds_file() == tmp_path / ".cache/fseft-edge/speeds.json"


def test_without_a_home_folder_no_speeds_are_stored(bundle: EncoderBundle, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", no_home)
    assert remembered_order(bundle, CPU) is None
    with refused(EnvironmentProblemError, "home folder") as caught:
        remember(bundle, CPU, SECONDS)
    assert "XDG_CACHE_HOME" in caught.value.remedy
