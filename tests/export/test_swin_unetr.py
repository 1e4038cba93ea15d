"""SwinUNETR: comparison with MONAI's network, and with the exported graphs."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
import torch
from doubles.releases import FEATURE_SIZE, authors_swin
from torch import Tensor, nn

from fseft_edge.runtime.encoder.backends.onnxruntime import GraphRunner
from fseft_edge.runtime.encoder.networks.swin_unetr import SwinUnetrFeatures

WINDOW = (64, 32, 32)  # the third stage shifts its attention windows along one axis only


@pytest.fixture(scope="module")
def reference() -> nn.Module:
    """MONAI's SwinUNETR; all its weights affect the features, including biases and position tables."""
    pytest.importorskip("einops", reason="MONAI's own forward pass needs einops")
    return authors_swin(3)


def window(seed: int) -> Tensor:
    return torch.rand(1, 1, *WINDOW, generator=torch.Generator().manual_seed(seed))


def test_pyramid_equals_monai_with_monai_weights(reference: nn.Module) -> None:
    decoder: dict[int, Tensor] = {}
    for level in range(5):
        reference.get_submodule(f"decoder{level + 1}").register_forward_hook(
            lambda _module, _inputs, output, level=level: decoder.update({level: output})
        )
    features = SwinUnetrFeatures(FEATURE_SIZE).eval()
    weights = {key: value for key, value in reference.state_dict().items() if not key.startswith("out.")}
    features.load_state_dict(weights)
    with torch.no_grad():
        logits = reference(window(0))
        pyramid = features(window(0))
        head = reference.get_submodule("out")(pyramid[0])
    for level, (feature, description) in enumerate(zip(pyramid, features.levels, strict=True)):
        assert feature.shape[1:] == (description.channels, *(side // description.stride for side in WINDOW))
        assert float((feature - decoder[level]).abs().max()) <= 1e-5 * float(decoder[level].abs().max())
    assert torch.allclose(head, logits, atol=1e-5)


def test_graph_equals_pytorch_and_contains_no_masks(
    compacter_swin: SwinUnetrFeatures, compacter_swin_graph: Path
) -> None:
    both = torch.cat([window(0), window(1)])
    with torch.no_grad():
        expected = compacter_swin(both)
    run = GraphRunner(compacter_swin_graph, torch.device("cpu"), 1)
    for batch in (slice(0, 1), slice(0, 2)):
        for a, b in zip(expected, run(both[batch]), strict=True):
            assert float((a[batch] - b).abs().max()) <= 1e-4 * float(a.abs().max())
    # The attention masks of 45 windows would be 45 * 343^2 numbers: 5 MB as booleans, 21 MB as float32.
    assert max(len(entry.raw_data) for entry in onnx.load(compacter_swin_graph).graph.initializer) < 2e6
    weights = sum(parameter.numel() * 4 for parameter in compacter_swin.parameters())
    assert compacter_swin_graph.stat().st_size < weights + 3e6


def test_mixed_graph_is_close_to_pytorch(shallow_swin: SwinUnetrFeatures, swin_mixed_graph: Path) -> None:
    both = torch.cat([window(0), window(1)])
    with torch.no_grad():
        expected = shallow_swin(both)
    errors = []
    for a, b in zip(expected, GraphRunner(swin_mixed_graph, torch.device("cpu"), 1)(both), strict=True):
        errors.append(float((a - b).abs().max() / a.abs().max()))
    # Normalisations over few voxels in so small a window increase rounding errors: for a real CT in windows of 96^3
    # voxels, the largest error is 1.6e-3 (docs/engines.md).
    assert all(2**-13 < error < 2e-2 for error in errors), errors
    weights = sum(parameter.numel() * 2 for parameter in shallow_swin.parameters())
    assert swin_mixed_graph.stat().st_size < weights + 3e6
