"""Mixed precision: number formats of weights and operations, and accuracy."""

from __future__ import annotations

import pytest
import torch
from doubles.models import small_network, windows
from torch import Tensor, nn
from torch.nn import functional as F

from fseft_edge.runtime.encoder.backends.pytorch import inference_network
from fseft_edge.runtime.encoder.networks import swin_unetr
from fseft_edge.runtime.encoder.networks.mixed_precision import MixedPrecision
from fseft_edge.runtime.encoder.networks.swin_unetr import SwinUnetrFeatures


def test_features_are_float32_and_close_to_those_of_the_float32_network() -> None:
    network = inference_network(small_network(), whole_scan=False)
    with torch.no_grad():
        expected, features = network(windows(2)), MixedPrecision(network)(windows(2))
    for a, b in zip(expected, features, strict=True):
        assert b.dtype == torch.float32
        assert 2**-13 < float((a - b).abs().max() / a.abs().max()) < 5e-3


def test_the_original_network_is_not_changed() -> None:
    network = SwinUnetrFeatures(12).eval()
    MixedPrecision(network)
    assert {parameter.dtype for parameter in network.parameters()} == {torch.float32}
    assert isinstance(network.get_submodule("swinViT.layers1.0.blocks.0.norm1"), nn.LayerNorm)


def test_weights_of_norms_stay_float32_and_all_others_are_float16() -> None:
    network = MixedPrecision(SwinUnetrFeatures(12).eval())
    kinds = {name: parameter.dtype for name, parameter in network.named_parameters()}
    norms = {name for name in kinds if ".norm" in name}
    assert norms
    assert {kinds[name] for name in norms} == {torch.float32}
    assert {kinds[name] for name in kinds.keys() - norms} == {torch.float16}


@pytest.mark.parametrize("function", ["layer_norm", "softmax"])
def test_softmax_and_norms_without_modules_compute_in_float32(monkeypatch: pytest.MonkeyPatch, function: str) -> None:
    formats = []
    home = F if function == "layer_norm" else torch
    original = getattr(home, function)

    def watched(x: Tensor, *arguments: object, **settings: object) -> Tensor:
        formats.append(x.dtype)
        result: Tensor = original(x, *arguments, **settings)
        return result

    monkeypatch.setattr(home, function, watched)
    half = torch.rand(1, 2, 2, 2, 2).half()
    if function == "layer_norm":
        assert swin_unetr._channel_norm(half).dtype == torch.float16
    else:
        attention = SwinUnetrFeatures(12).half().get_submodule("swinViT.layers1.0.blocks.0.attn")
        assert swin_unetr._self_attention(attention, torch.rand(1, 8, 12).half(), None).dtype == torch.float16
    assert formats == [torch.float32]
