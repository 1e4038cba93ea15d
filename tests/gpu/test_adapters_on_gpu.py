"""Adapters trained and used on a GPU: comparison with the CPU."""

from __future__ import annotations

import copy

import pytest
import torch
from doubles.scans import SHAPE, scan_with_organ

from fseft_edge.adaptation.block_sampling import SupportScan
from fseft_edge.adaptation.training import TrainingSettings, train_adapter
from fseft_edge.adapters.blocks import Box, read_block
from fseft_edge.adapters.network import Adapter, AdapterSettings

CORE = Box(*((0, size) for size in SHAPE))
FAST = TrainingSettings(
    block=16, batch=4, epochs=12, linear_rate=0.02, residual_rate=0.02, device=torch.device("cuda", 0)
)


def _probability(adapter: Adapter, scan: SupportScan) -> torch.Tensor:
    with torch.inference_mode():
        features = read_block(scan.features, adapter.boxes(CORE), adapter.device)
        return adapter.probabilities(adapter(features, CORE))[0, 0].cpu()


@pytest.mark.gpu
@pytest.mark.parametrize("method", ["linear", "pointwise", "spatial"])
def test_an_adapter_trained_on_the_gpu_gives_the_same_probabilities_on_the_cpu(method: str) -> None:
    settings = AdapterSettings(method, "all", width=4)  # type: ignore[arg-type]  # parametrised literals
    support, query = [scan_with_organ(1), scan_with_organ(2)], scan_with_organ(3)
    trained = train_adapter(settings, support, head_rows=[None], training=FAST)
    assert trained.adapter.device.type == "cuda"
    on_gpu = _probability(trained.adapter, query)
    on_cpu = _probability(copy.deepcopy(trained.adapter).cpu(), query)
    assert float((on_gpu - on_cpu).abs().max()) < 5e-3  # the GPU computes convolutions in TF32
    truth = query.occupancy.block(CORE)[0] > 0.5
    found = on_gpu > 0.5
    assert 2 * float((found & truth).sum()) / float(found.sum() + truth.sum()) > 0.75


@pytest.mark.gpu
def test_the_same_seed_gives_the_same_weights_on_one_gpu() -> None:
    settings = AdapterSettings("spatial", "all", width=4)
    first, second = (train_adapter(settings, [scan_with_organ(1)], head_rows=[None], training=FAST) for _ in range(2))
    for a, b in zip(first.adapter.state_dict().values(), second.adapter.state_dict().values(), strict=True):
        assert torch.equal(a, b)
