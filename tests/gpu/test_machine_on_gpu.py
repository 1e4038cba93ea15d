"""Doctor and benchmark on a machine with an NVIDIA GPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from doubles.encoder import write_tiny_encoder

from fseft_edge.machine.doctor import diagnose
from fseft_edge.machine.speed import benchmark

pytestmark = pytest.mark.gpu


def test_doctor_lists_the_gpus_of_pytorch(tmp_path: Path) -> None:
    diagnosis = diagnose([write_tiny_encoder(tmp_path / "tiny.encoder").path])
    assert diagnosis.cuda_problem is None
    assert [gpu.name for gpu in diagnosis.machine.gpus] == [
        torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())
    ]
    chosen = {row.device: row.backend for row in diagnosis.encoders[0].backends if row.chosen}
    assert chosen["cuda:0"] == "torch"


def test_benchmark_measures_gpu_memory_and_its_stages_add_up(tmp_path: Path) -> None:
    bundle = write_tiny_encoder(tmp_path / "tiny.encoder")
    report = benchmark(bundle.path, backends=["torch"], device="cuda", rounds=1)
    assert report.device == torch.cuda.get_device_name(0)
    assert report.failures == ()
    weights = sum(tensor.numel() * tensor.element_size() for tensor in bundle.network().parameters())
    for row in (*report.encoder, *report.scans):
        assert row.peak_vram_bytes is not None
        assert row.peak_vram_bytes > weights
    (scan,) = report.scans
    assert sum(scan.stages.values()) == pytest.approx(scan.seconds.median)
