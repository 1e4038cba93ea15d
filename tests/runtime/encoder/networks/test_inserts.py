"""Inserts: no effect before training, gradients of all parameters, and comparison with the papers' formulas."""

from __future__ import annotations

import pytest
import torch
from doubles.errors import refused
from doubles.inserts import FITTING, SETTINGS, network_with
from torch import Tensor, nn
from torch.nn import functional as F

from fseft_edge.runtime.encoder.backends.pytorch import inference_network
from fseft_edge.runtime.encoder.networks import build_network
from fseft_edge.runtime.encoder.networks.block_inserts import (
    AdaptFormer,
    BlockInserts,
    BlockPlace,
    Compacter,
    HypercomplexLinear,
)
from fseft_edge.runtime.encoder.networks.inserts import (
    INSERTS,
    InsertKind,
    add_inserts,
    fitting_inserts,
    insert_parameters,
)
from fseft_edge.runtime.encoder.networks.med_adapter import MedAdapter
from fseft_edge.runtime.encoder.networks.mixed_precision import MixedPrecision
from fseft_edge.runtime.encoder.networks.residual_unet import ResidualUNet
from fseft_edge.runtime.encoder.networks.slabwise import SlabwiseResidualUNet
from fseft_edge.runtime.errors import EncoderBundleError, UsageError

# One insert in blocks and one at stages, for slow tests.
ONE_EACH: list[tuple[str, InsertKind]] = [("swin_unetr", "compacter"), ("residual_unet", "med-adapter")]
SIZES = {"swin_unetr": (64, 32, 32), "residual_unet": (12, 16, 20), "genesis_unet": (16, 24, 32)}


def windows(architecture: str) -> Tensor:
    return torch.rand(1, 1, *SIZES[architecture], generator=torch.Generator().manual_seed(5))


def difference(a: list[Tensor], b: list[Tensor]) -> float:
    """Return the largest difference, relative to the largest feature of the level."""
    return max(float((x - y).abs().max() / x.abs().max()) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize(("architecture", "kind"), FITTING)
@torch.no_grad()
def test_inserts_change_the_features_only_after_training(architecture: str, kind: InsertKind) -> None:
    network = network_with(architecture, None)
    before = network(windows(architecture))
    add_inserts(network, kind)
    for a, b in zip(before, network(windows(architecture)), strict=True):
        assert torch.equal(a, b)
    trained = network_with(architecture, kind, trained=True)(windows(architecture))
    assert difference(before, trained) > 0.05


@pytest.mark.parametrize(("architecture", "kind"), FITTING)
def test_every_inserted_parameter_has_a_gradient_and_the_name_of_its_kind(architecture: str, kind: InsertKind) -> None:
    network = network_with(architecture, kind, trained=True)
    names = insert_parameters(network)
    plain = network_with(architecture, None).state_dict()
    assert names == [name for name in network.state_dict() if name not in plain]
    assert all(kind.replace("-", "_") in name.split(".") for name in names)
    assert insert_parameters(network_with(architecture, None)) == []
    # The loss weights every voxel differently, because normalisations remove the effect of parameters on means.
    pyramid = network(windows(architecture))
    torch.stack([(level * torch.randn_like(level)).sum() for level in pyramid]).sum().backward()
    parameters = dict(network.named_parameters())
    assert [name for name in names if parameters[name].grad is None or not parameters[name].grad.any()] == []


@pytest.mark.parametrize(("architecture", "kind"), FITTING[:2] + FITTING[3:])
def test_the_first_training_step_changes_the_features(architecture: str, kind: InsertKind) -> None:
    network = network_with(architecture, kind)
    names = insert_parameters(network)
    before = network(windows(architecture))
    (before[0] * torch.randn_like(before[0])).sum().backward()
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if name in names and parameter.grad is not None:
                parameter.add_(parameter.grad.sign(), alpha=-0.1)
        assert difference(before, network(windows(architecture))) > 1e-3


@pytest.mark.parametrize(("architecture", "kind"), ONE_EACH)
def test_gradient_checkpointing_gives_the_same_gradients(architecture: str, kind: InsertKind) -> None:
    gradients = []
    for checkpointing in (False, True):
        network = network_with(architecture, kind, trained=True)
        network.gradient_checkpointing = checkpointing
        network(windows(architecture))[0].square().mean().backward()
        gradients.append({name: parameter.grad for name, parameter in network.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)


def test_kinds_of_inserts_for_each_architecture() -> None:
    assert INSERTS == ("adaptformer", "compacter", "med-adapter")
    for architecture in SETTINGS:
        fitting = fitting_inserts(network_with(architecture, None))
        assert [(architecture, kind) for kind in fitting] == [pair for pair in FITTING if pair[0] == architecture]


def test_inserts_of_another_architecture_or_a_second_kind_are_refused() -> None:
    with refused(UsageError, "compacter") as caught:
        add_inserts(network_with("residual_unet", None), "compacter")
    assert "med-adapter" in caught.value.remedy
    with refused(UsageError):
        add_inserts(network_with("residual_unet", "med-adapter"), "med-adapter")


@pytest.mark.parametrize("inserts", ["from_the_future", "adaptformer", 3])
def test_settings_with_unknown_inserts_are_refused(inserts: object) -> None:
    with refused(EncoderBundleError, repr(inserts), "residual_unet"):
        build_network("residual_unet", channels=[4, 8], inserts=inserts)


def test_numbers_of_parameters() -> None:
    """SwinUNETR-48 has two blocks of each width; AdaptFormer has rank 16, as in FSEFT's released code."""
    widths = {BlockPlace(stage, position): 48 * 2**stage for stage in range(4) for position in range(2)}

    def count(network: nn.Module) -> int:
        return sum(parameter.numel() for parameter in network.parameters())

    assert count(AdaptFormer(widths)) == sum(2 * 16 * width + 16 + width for width in widths.values()) == 47_648
    # Each adapter has two maps with n (C/n + b/n) factors and their biases; all adapters share one rule of n^3 numbers.
    # The bottleneck b is C/32, rounded to a multiple of n = 4.
    bottlenecks = {48: 4, 96: 4, 192: 4, 384: 12}
    adapters = sum(2 * 3 * (width + bottlenecks[width]) for width in widths.values())
    assert count(Compacter(widths)) == adapters + 4**3 == 8_992


@torch.no_grad()
def test_adaptformer_reads_the_tokens_before_the_norm_of_the_mlp() -> None:
    inserts = AdaptFormer({BlockPlace(0, 0): 8})
    for parameter in inserts.parameters():
        nn.init.normal_(parameter)
    own = dict(inserts.named_parameters(prefix=""))
    down, up = ((own[f"blocks.0_0.{name}.weight"], own[f"blocks.0_0.{name}.bias"]) for name in ("down", "up"))
    x, output = torch.randn(2, 2, 3, 8)
    expected = output + 0.1 * F.linear(torch.relu(F.linear(x, *down)), *up)
    insert = inserts.at(BlockPlace(0, 0))
    torch.testing.assert_close(insert.mlp_output(x, output), expected)
    assert insert.attention_output(x) is x


@torch.no_grad()
def test_hypercomplex_matrix_is_a_sum_of_kronecker_products() -> None:
    layer, rule = HypercomplexLinear(24, 8), torch.randn(4, 4, 4)
    nn.init.normal_(layer.bias)
    matrix = sum(torch.kron(rule[i], torch.outer(layer.left[i], layer.right[i])) for i in range(4))
    x = torch.randn(2, 3, 24)
    torch.testing.assert_close(layer(x, rule), x @ matrix + layer.bias)


@torch.no_grad()
def test_compacter_has_separate_bottlenecks_for_attention_and_mlp() -> None:
    network = network_with("swin_unetr", "compacter")
    inserts = network.get_submodule("compacter")
    nn.init.normal_(inserts.get_submodule("attention.1_0.up").bias)
    insert, y = inserts.at(BlockPlace(1, 0)), torch.randn(2, 5, 24)
    assert not torch.allclose(insert.attention_output(y), y)
    assert torch.equal(insert.mlp_output(torch.randn_like(y), y), y)


@torch.no_grad()
def test_med_adapter_computes_the_formula_of_the_paper() -> None:
    """The expected features are computed step by step, with a gain that is equal for all frequencies."""
    adapter = MedAdapter(12, 6)
    for parameter in adapter.parameters():
        nn.init.normal_(parameter, std=0.5)
    nn.init.constant_(adapter.everywhere.gain, 0.7)
    w = dict(adapter.named_parameters())
    x, before = torch.randn(2, 12, 5, 4, 3), torch.randn(2, 1, 10, 7, 6)

    def convolved(name: str, y: Tensor, **how: int | tuple[int, ...]) -> Tensor:
        return F.conv3d(y, w[f"{name}.weight"], w[f"{name}.bias"], **how)

    reduced = F.gelu(convolved("down", x))
    near = convolved(
        "near.across", convolved("near.plane", reduced, padding=(1, 1, 0), groups=2), padding=(0, 0, 1), groups=2
    )
    wide = convolved(
        "wide.across", convolved("wide.plane", reduced, padding=(2, 2, 0), groups=2), padding=(0, 0, 2), groups=2
    )
    mixed = convolved("mix", torch.relu(near) + torch.relu(wide) + 0.7 * reduced)
    mixed = convolved("join", torch.cat([mixed, convolved("between", before, stride=2, padding=1)], dim=1))
    adapted, narrow = adapter(x, before, lambda part, *inputs: part(*inputs))
    torch.testing.assert_close(narrow, mixed, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(adapted, x + convolved("up", reduced + mixed), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_an_untrained_adapter_changes_no_bit_of_the_features_inside_autocast() -> None:
    x = torch.rand(1, 12, 4, 4, 4)
    with torch.autocast("cpu", torch.bfloat16):
        adapted, _ = MedAdapter(12, None)(x, None, lambda part, *inputs: part(*inputs))
    assert torch.equal(adapted, x)


@pytest.mark.parametrize("size", [(1, 1, 1), (3, 5, 2), (2, 7, 9)])
@torch.no_grad()
def test_med_adapter_takes_any_size(size: tuple[int, int, int]) -> None:
    adapter = MedAdapter(3, 4)
    for finer in (0, 1):
        before = torch.rand(1, 1, *(2 * side - finer for side in size))
        adapted, narrow = adapter(torch.rand(1, 3, *size), before, lambda part, *inputs: part(*inputs))
        assert adapted.shape == (1, 3, *size)
        assert narrow.shape == (1, 1, *size)


@pytest.mark.parametrize(
    ("channels", "window"), [((4, 6, 8), (12, 16, 20)), ((12, 8), (8, 8, 4)), ((4, 6, 8, 9, 7), (48, 16, 32))]
)
@torch.no_grad()
def test_slabwise_computation_equals_the_whole_network(channels: tuple[int, ...], window: tuple[int, int, int]) -> None:
    network = build_network("residual_unet", channels=channels, inserts="med-adapter").eval()
    for name, parameter in network.named_parameters():
        if name in insert_parameters(network):
            nn.init.normal_(parameter, std=0.3)
    folded = inference_network(network, whole_scan=False)
    assert isinstance(folded, ResidualUNet)
    x = torch.rand(2, 1, *window).to(memory_format=torch.channels_last_3d)
    assert difference(network(x), SlabwiseResidualUNet(folded)(x)) < 1e-5


@torch.no_grad()
def test_mixed_precision_is_close_to_float32_and_filters_stay_float32() -> None:
    network = inference_network(network_with("residual_unet", "med-adapter", trained=True), whole_scan=False)
    mixed = MixedPrecision(network)
    types = {parameter.dtype for name, parameter in mixed.named_parameters() if name.endswith("gain")}
    assert types == {torch.float32}
    assert difference(network(windows("residual_unet")), mixed(windows("residual_unet"))) < 5e-3


@pytest.mark.parametrize("kind", [AdaptFormer, Compacter])
@torch.no_grad()
def test_inserts_return_half_precision_for_half_precision(kind: type[BlockInserts]) -> None:
    inserts = kind({BlockPlace(0, 0): 24})
    for parameter in inserts.parameters():
        nn.init.normal_(parameter, std=0.3)
    x, y = torch.randn(2, 1, 5, 24)
    expected = inserts.at(BlockPlace(0, 0)).mlp_output(x, y)
    half = inserts.half().at(BlockPlace(0, 0)).mlp_output(x.half(), y.half())
    assert half.dtype == torch.float16
    assert difference([expected], [half.float()]) < 5e-3
