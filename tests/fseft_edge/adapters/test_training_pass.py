"""The forward pass of training gives the logits and the gradients of the adapter for perturbed features."""

from __future__ import annotations

import itertools

import pytest
import torch
from doubles.features import random_features
from torch import Tensor, nn

from fseft_edge.adapters.blocks import Box, read_block, stack_blocks
from fseft_edge.adapters.network import Adapter, AdapterSettings
from fseft_edge.adapters.training_pass import ChannelChange, training_logits

CORE = Box((8, 16), (0, 8), (8, 24))
# With width 12, the training computes the last convolution and the classifier as one convolution, as the adapter does;
# with width 6, one after the other.
KINDS = [
    AdapterSettings(method, levels, activation, width)
    for method, levels, activation, width in itertools.product(
        ("pointwise", "spatial"), ("finest", "all"), ("sigmoid", "softmax"), (6, 12)
    )
]


def _adapter(settings: AdapterSettings, channels: tuple[int, ...]) -> Adapter:
    torch.manual_seed(1)
    adapter = Adapter(settings, random_features((32, 24, 40), channels).levels, 2).train()
    for parameter in adapter.parameters():
        nn.init.normal_(parameter, std=0.2)
    for level in range(len(adapter.levels)):
        adapter.mean(level).normal_()
        adapter.scale(level).uniform_(0.5, 2)
    return adapter


def _blocks(adapter: Adapter, channels: tuple[int, ...]) -> list[Tensor]:
    boxes = adapter.boxes(CORE)
    return stack_blocks([read_block(random_features((32, 24, 40), channels, seed), boxes) for seed in range(2)])


def _changes(adapter: Adapter) -> list[ChannelChange]:
    return [
        ChannelChange(torch.rand(2, level.channels) * 2, torch.randn(2, level.channels)) for level in adapter.levels
    ]


def _changed(adapter: Adapter, blocks: list[Tensor], changes: list[ChannelChange]) -> list[Tensor]:
    """Return the features whose normalised values are the changed normalised values of ``blocks``."""
    changed = []
    for level, (block, change) in enumerate(zip(blocks, changes, strict=True)):
        mean, scale = (values[:, None, None, None] for values in (adapter.mean(level), adapter.scale(level)))
        factor, offset = (values[..., None, None, None] for values in (change.factor, change.offset))
        changed.append(((block - mean) / scale * factor + offset) * scale + mean)
    return changed


def _with_gradients(adapter: Adapter, logits: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the logits, and the gradient of each parameter for a loss with random derivatives."""
    derivatives = torch.randn(logits.shape, generator=torch.Generator().manual_seed(3))
    adapter.zero_grad()
    logits.backward(derivatives)
    return logits.detach(), {name: p.grad.clone() for name, p in adapter.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("channels", [(12, 6, 8, 10), (12,)], ids=["four levels", "one level"])
@pytest.mark.parametrize("settings", KINDS, ids=str)
def test_logits_and_gradients_are_those_of_the_adapter(settings: AdapterSettings, channels: tuple[int, ...]) -> None:
    adapter = _adapter(settings, channels)
    blocks, changes = _blocks(adapter, channels), _changes(adapter)
    expected, expected_gradients = _with_gradients(adapter, adapter(_changed(adapter, blocks, changes), CORE))
    logits, gradients = _with_gradients(adapter, training_logits(adapter, blocks, changes, CORE, torch.float32))
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
    assert gradients.keys() == expected_gradients.keys()
    for name, gradient in expected_gradients.items():
        largest = float(gradient.abs().max())
        assert largest > 0
        torch.testing.assert_close(gradients[name], gradient, rtol=0, atol=1e-4 * largest, msg=name)


@pytest.mark.parametrize("levels", ["finest", "all"])
def test_convolutions_in_bfloat16_give_nearly_the_same(levels: str) -> None:
    channels = (12, 6, 8, 10)
    adapter = _adapter(AdapterSettings("spatial", levels, width=12), channels)  # type: ignore[arg-type]  # parametrised
    blocks, changes = _blocks(adapter, channels), _changes(adapter)
    expected, expected_gradients = _with_gradients(
        adapter, training_logits(adapter, blocks, changes, CORE, torch.float32)
    )
    logits, gradients = _with_gradients(adapter, training_logits(adapter, blocks, changes, CORE, torch.bfloat16))
    assert logits.dtype == torch.float32
    assert 0 < float((logits - expected).abs().max()) < 0.05 * float(expected.abs().max())
    for name, gradient in expected_gradients.items():
        assert float((gradients[name] - gradient).norm()) < 0.4 * float(gradient.norm()), name
