"""Fine-tuning of the encoder: the trained parameters and the training."""

from __future__ import annotations

import importlib
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from doubles.encoder import CHANNELS, SPACING
from doubles.errors import refused
from doubles.models import small_contents
from doubles.repository import ROOT
from doubles.tuning_site import FOR_A_UNET, LIVER, SHORT, TuningSite, parameters_in, tuning_site
from torch import nn

from fseft_edge.adapters.network import UNKNOWN_ORGAN_BIAS, Levels
from fseft_edge.finetuning.finetune import check_tunable
from fseft_edge.finetuning.folding import CentreSum, LowRankSum, add_sum, fold_sums
from fseft_edge.finetuning.merging import folded_encoder
from fseft_edge.finetuning.settings import TUNING_METHODS, TuningMethod, TuningSettings
from fseft_edge.finetuning.training import TunedNetwork, _optimizer, crop_edge
from fseft_edge.finetuning.unfreezing import unfreeze
from fseft_edge.pretraining.training_cases import prepare_case, random_crop
from fseft_edge.runtime.encoder.bundle import EncoderBundle
from fseft_edge.runtime.encoder.networks import build_network
from fseft_edge.runtime.encoder.networks.base import FeatureNetwork
from fseft_edge.runtime.encoder.networks.residual_unet import ResidualUNet
from fseft_edge.runtime.errors import OutOfMemoryError, UsageError
from fseft_edge.runtime.scans.nifti import read_ct
from fseft_edge.runtime.scans.preprocessing import Preprocessing
from fseft_edge.runtime.scans.volume import LabelMap
from fseft_edge.runtime.system.progress import SilentProgress


def unet(seed: int = 0) -> ResidualUNet:
    torch.manual_seed(seed)
    return ResidualUNet(CHANNELS).eval()


def swin() -> FeatureNetwork:
    torch.manual_seed(0)
    return build_network("swin_unetr", feature_size=12).eval()


def trained_count(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters() if parameter.requires_grad)


def count_calls(monkeypatch: pytest.MonkeyPatch, name: str) -> list[None]:
    """Return a list that grows with every call of a function."""
    calls: list[None] = []
    module, _, function = name.rpartition(".")
    original = getattr(importlib.import_module(module), function)

    def counted(*arguments: object, **named: object) -> object:
        calls.append(None)
        return original(*arguments, **named)

    monkeypatch.setattr(name, counted)
    return calls


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> TuningSite:
    return tuning_site(tmp_path_factory.mktemp("site"))


# Trained parameters


@pytest.mark.parametrize("method", FOR_A_UNET)
def test_unfreezing_does_not_change_the_output(method: TuningMethod) -> None:
    network, windows = unet(), torch.rand(1, 1, 32, 32, 32)
    with torch.no_grad():
        before = network(windows)
        unfreeze(network, TuningSettings(method))
        after = network.eval()(windows)
    for one, other in zip(before, after, strict=True):
        assert torch.allclose(one, other, atol=1e-6)


def test_a_method_trains_only_its_own_parameters() -> None:
    opened = {}
    for method in FOR_A_UNET:
        network = unet()
        unfreeze(network, TuningSettings(method))
        opened[method] = {name for name, parameter in network.named_parameters() if parameter.requires_grad}
    assert all(name.startswith(("up.", "merge.")) for name in opened["decoder"])
    assert opened["full"] == {name for name, _ in unet().named_parameters()}
    assert all(name.startswith("down.") and "norm" in name for name in opened["affine"])
    assert all(name.startswith("down.") and name.endswith("bias") for name in opened["bitfit"])
    assert all(".parametrizations.weight.0." in name for name in opened["lora"] | opened["conv-adapter"])
    assert all(name.startswith("med_adapter.") for name in opened["med-adapter"])


def test_a_tuned_or_new_decoder_is_trained_in_addition_to_the_method() -> None:
    frozen, tuned, new = unet(), unet(), unet()
    unfreeze(frozen, TuningSettings("affine"))
    unfreeze(tuned, TuningSettings("affine", "tuned"))
    added = unfreeze(new, TuningSettings("affine", "new"))
    decoder = sum(p.numel() for part in (tuned.up, tuned.merge) for p in part.parameters())
    assert trained_count(tuned) == trained_count(frozen) + decoder == trained_count(new)
    assert {name.split(".")[0] for name in added} == {"up", "merge"}
    assert torch.equal(tuned.merge[0].first.convolution.weight, unet().merge[0].first.convolution.weight)
    assert not torch.equal(new.merge[0].first.convolution.weight, unet().merge[0].first.convolution.weight)


def test_a_new_decoder_of_a_swin_unetr_includes_new_bridges() -> None:
    network = swin()
    unfreeze(network, TuningSettings("lora", "new"))
    parts = {name.split(".")[0] for name, parameter in network.named_parameters() if parameter.requires_grad}
    assert parts == {"swinViT", "encoder1", "encoder2", "encoder3", "encoder4", "encoder10"} | {
        f"decoder{level}" for level in range(1, 6)
    }


WIDTHS = (48, 96, 192, 384)  # channels of the stages of SwinUNETR-48, which have two blocks each
NORMS = sum(2 * 4 * width + 2 * 8 * width for width in WIDTHS)  # norm1 and norm2 of each block; 8C in merging


def med_adapter_count(width: int, before: int | None) -> int:
    """Count one stage: two projections, depthwise 3x3 + 3 and 5x5 + 5, 4^3 gains, a mixing map, the previous path."""
    h = width // 6
    count = (width * h + h) + (h * width + width) + (9 + 1 + 3 + 1 + 25 + 1 + 5 + 1) * h + 4**3 * h + h * h + h
    return count if before is None else count + 27 * (before // 6) * h + h + 2 * h * h + h


@pytest.mark.parametrize(
    ("method", "count"),
    [
        # the number in the authors' released code: A [12, C] and B [3C, 12] in two blocks of each width
        ("lora", 69_120),
        # two projections with biases in each block: 2 * 16 C + 16 + C
        ("adaptformer", 2 * sum(2 * 16 * width + 16 + width for width in WIDTHS)),
        ("affine", NORMS),
        # biases of each block (two norms, queries, keys and values, projection, MLP), of merging, of the patches
        ("bitfit", sum(2 * (1 + 1 + 3 + 1 + 4 + 1) * width + 8 * width for width in WIDTHS) + 48),
        ("compacter", 8_992 + NORMS),
        ("med-adapter", sum(med_adapter_count(*pair) for pair in zip(WIDTHS, (None, *WIDTHS), strict=False))),
        # 1 -> 48 and 48 -> 48 at full resolution, and two for each of 48, 96, 192 and 768 channels
        ("conv-adapter", 48 + 48**2 + 2 * (48**2 + 96**2 + 192**2 + 768**2)),
    ],
)
def test_the_number_of_trained_parameters_of_a_swin_unetr(method: TuningMethod, count: int) -> None:
    network = build_network("swin_unetr", feature_size=48)
    unfreeze(network, TuningSettings(method))
    assert trained_count(network) == count


def test_conv_adapter_has_as_many_parameters_as_the_released_code_on_the_genesis_unet() -> None:
    network = build_network("genesis_unet")
    unfreeze(network, TuningSettings("conv-adapter"))
    assert trained_count(network) == 260_128


@pytest.mark.parametrize("method", ["adaptformer", "compacter"])
def test_a_method_for_transformers_is_refused_for_a_unet(method: TuningMethod) -> None:
    with refused(UsageError, method):
        unfreeze(unet(), TuningSettings(method))


def test_settings_without_trained_parameters_are_refused() -> None:
    with refused(UsageError, "--method decoder", "--decoder frozen"):
        unfreeze(unet(), TuningSettings("decoder", "frozen"))


def test_a_method_without_parameters_outside_a_new_decoder_is_refused() -> None:
    """A SwinUNETR has no 3x3x3 convolutions outside the parts that a new decoder includes."""
    with refused(UsageError, "--method conv-adapter", "--decoder new"):
        unfreeze(swin(), TuningSettings("conv-adapter", "new"))


def peak_rates(network: FeatureNetwork, settings: TuningSettings) -> dict[float, int]:
    """Return the number of trained parameters, classifier included, for each peak learning rate."""
    groups = _optimizer(TunedNetwork(network, 1, settings), settings).param_groups
    return {group["peak"]: sum(parameter.numel() for parameter in group["params"]) for group in groups}


def test_pretrained_matrices_have_a_low_rate_without_batch_normalisation() -> None:
    head = sum(level.channels for level in swin().levels) + 1
    for method, decoder, slow in (("full", None, True), ("affine", "tuned", True), ("affine", "frozen", False)):
        settings = TuningSettings(method, decoder)
        rates = peak_rates(swin(), settings)
        assert rates.keys() == ({2e-3, 1e-4} if slow else {2e-3})
        assert (rates[2e-3] == head) == slow
    assert peak_rates(unet(), TuningSettings("full")).keys() == {2e-3}


def test_the_crop_is_144_mm_and_at_most_the_window() -> None:
    assert crop_edge(unet(), Preprocessing(spacing=(1.5, 1.5, 1.5)), (96, 96, 96)) == 96
    assert crop_edge(unet(), Preprocessing(spacing=(3.0, 3.0, 3.0)), (96, 96, 96)) == 64
    assert crop_edge(unet(), Preprocessing(spacing=(1.0, 1.0, 1.0)), (96, 96, 96)) == 96


def test_the_network_can_compute_the_crop() -> None:
    assert crop_edge(swin(), Preprocessing(spacing=(5.0, 5.0, 5.0)), (96, 96, 96)) == 64
    deep = ResidualUNet([2] * 7)
    assert crop_edge(deep, Preprocessing(spacing=(1.5, 1.5, 1.5)), (128, 128, 128)) == 128


# Folding


def test_a_low_rank_sum_adds_the_product_of_its_matrices() -> None:
    layer = nn.Linear(6, 4)
    before = layer.weight.detach().clone()
    added = LowRankSum(layer.weight, 2)
    with torch.no_grad():
        added.up.normal_()
    add_sum(layer, added)
    expected = before + added.up @ added.down
    assert torch.allclose(layer.weight, expected)
    fold_sums(layer)
    assert isinstance(layer.weight, nn.Parameter)
    assert torch.allclose(layer.weight, expected)


@pytest.mark.parametrize("stride", [1, 2])
def test_a_parallel_convolution_is_folded_into_the_centre_of_the_kernel(stride: int) -> None:
    convolution, beside = nn.Conv3d(3, 5, 3, stride, 1, bias=False), nn.Conv3d(3, 5, 1, stride, bias=False)
    x = torch.rand(2, 3, 8, 8, 8)
    expected = convolution(x) + beside(x)
    added = CentreSum(convolution.weight)
    with torch.no_grad():
        added.weight.copy_(beside.weight[..., 0, 0, 0])
    add_sum(convolution, added)
    assert torch.allclose(convolution(x), expected, atol=1e-6)


# Training


@pytest.mark.parametrize("method", FOR_A_UNET)
def test_training_changes_only_the_trained_parameters(site: TuningSite, method: TuningMethod) -> None:
    support = site.support()
    settings = TuningSettings(method, **SHORT)
    tuned = support.tuned(settings, [0, 1], SilentProgress())
    fresh = TunedNetwork(site.bundle.network(), 2, settings)
    before, after = fresh.state_dict(), tuned.network.state_dict()
    learned = tuned.network.learned()
    assert {name for name in before if not torch.equal(before[name], after[name])} <= set(learned)
    assert any(not torch.equal(before[name], after[name]) for name in learned if name.startswith("encoder."))
    assert tuned.parameters == parameters_in(learned)


def test_the_same_seed_gives_the_same_network_and_checkpointing_changes_nothing(
    site: TuningSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    support = site.support()
    settings = TuningSettings("full", **SHORT)
    recomputed = count_calls(monkeypatch, "fseft_edge.runtime.encoder.networks.base.recomputed")
    first, again, saving, other = (
        support.tuned(each, [0, 1], SilentProgress()).network.learned()
        for each in (settings, settings, replace(settings, checkpointing=True), replace(settings, seed=1))
    )
    assert recomputed
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert all(torch.allclose(first[name], saving[name], atol=1e-6) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


def test_a_step_in_portions_uses_the_crops_of_a_whole_step(site: TuningSite, monkeypatch: pytest.MonkeyPatch) -> None:
    """With one crop per portion, the loss is the mean of two losses instead of the joint loss: slightly different."""
    support = site.support()
    settings = TuningSettings("affine", steps=1, crops=2, crop=32, bfloat16=False, rate=0.0)
    seen: list[torch.Tensor] = []
    forward = TunedNetwork.forward

    def noted(network: TunedNetwork, windows: torch.Tensor) -> torch.Tensor:
        seen.append(windows)
        return forward(network, windows)

    monkeypatch.setattr(TunedNetwork, "forward", noted)
    whole = support.tuned(settings, [0, 1], SilentProgress()).losses
    portions = support.tuned(replace(settings, accumulate=2), [0, 1], SilentProgress()).losses
    assert [len(windows) for windows in seen] == [2, 1, 1]
    assert torch.equal(seen[0], torch.cat(seen[1:]))
    assert portions == pytest.approx(whole, rel=0.2)


def test_portions_with_equal_crops_give_the_gradient_of_a_step(
    site: TuningSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With two equal crops, the Dice of a portion equals that of the whole step, and so must the gradient."""
    crop = random_crop(site.support().cases, 32, np.random.default_rng(3), spacing=SPACING)
    monkeypatch.setattr("fseft_edge.finetuning.training.random_crop", lambda *_, **__: crop)
    settings = TuningSettings("affine", steps=1, crops=2, crop=32, bfloat16=False, rate=0.0)
    gradients = [
        {
            name: parameter.grad
            for name, parameter in site.support().tuned(each, [0, 1], SilentProgress()).network.named_parameters()
            if parameter.grad is not None
        }
        for each in (settings, replace(settings, accumulate=2))
    ]
    assert len(gradients[0]) > 4
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-3, atol=1e-6, msg=name)


def test_only_a_new_decoder_updates_its_running_statistics(site: TuningSite) -> None:
    support = site.support()
    for decoder, updates in (("tuned", False), ("new", True)):
        settings = TuningSettings("affine", decoder, **SHORT)
        tuned = support.tuned(settings, [0], SilentProgress()).network.encoder
        name = "merge.0.first.norm.running_mean"
        unchanged = 0.0 if updates else site.bundle.network().state_dict()[name]
        assert bool((tuned.state_dict()[name] == unchanged).all()) is not updates
        assert torch.equal(
            tuned.state_dict()["down.0.first.norm.running_mean"],
            site.bundle.network().state_dict()["down.0.first.norm.running_mean"],
        )


@pytest.mark.parametrize("used", ["finest", "all"])
def test_the_classifier_starts_as_the_zero_shot_classifier(site: TuningSite, used: Levels) -> None:
    support = site.support()
    rows = list(support.rows)
    assert rows[0] is not None
    rows[1] = None
    network = TunedNetwork(site.bundle.network(), 2, TuningSettings("full", levels=used)).eval()
    windows = torch.rand(3, 1, 32, 32, 32, generator=torch.Generator().manual_seed(0))
    network.start_head(rows, windows.split(1))
    with torch.no_grad():
        levels = network.encoder(windows)
        logits = network(windows)
    weight, bias = rows[0]
    assert torch.allclose(logits[:, 0], torch.einsum("c,ncxyz->nxyz", weight, levels[0]) + bias, atol=1e-4)
    assert torch.equal(logits[:, 1], torch.full_like(logits[:, 1], UNKNOWN_ORGAN_BIAS))
    for level, features in enumerate(levels if used == "all" else levels[:1]):
        channels = features.transpose(0, 1).flatten(1)
        assert torch.allclose(network.head.mean(level), channels.mean(1), atol=1e-5)
        assert torch.allclose(network.head.scale(level), channels.std(1, correction=0), atol=1e-5)


def test_a_head_can_be_started_on_any_device() -> None:
    """The rows are on the CPU; the device ``meta`` represents a GPU."""
    network = TunedNetwork(unet(), 2, TuningSettings("bitfit")).to("meta")
    network.head.start_from_head([(torch.ones(CHANNELS[0]), 0.5), None])


def test_the_classifier_uses_the_requested_levels(site: TuningSite) -> None:
    support = site.support()
    for levels in ("finest", "all"):
        tuned = support.tuned(TuningSettings("bitfit", levels=levels, **SHORT), [0], SilentProgress())
        learned = {name for name in tuned.network.learned() if name.startswith("head.coarse")}
        assert bool(learned) is (levels == "all")
        assert all(tuned.network.learned()[name].any() for name in learned)


def test_fine_tuning_lowers_the_loss(site: TuningSite) -> None:
    support = site.support()
    settings = TuningSettings("full", steps=40, crops=2, crop=32, bfloat16=False, rate=1e-2)
    losses = support.tuned(settings, [0, 1], SilentProgress()).losses
    assert len(losses) == 4
    assert losses[-1] < 0.8 * losses[0]


def test_every_method_has_a_row_in_the_docs() -> None:
    lines = (ROOT / "docs" / "finetune.md").read_text(encoding="utf-8").splitlines()
    for method in TUNING_METHODS:
        assert any(re.match(rf"\| `{method}` \|.*\|.*\| (folded|part of)", line) for line in lines), method


@pytest.mark.parametrize("method", ["lora", "bitfit"])
def test_a_new_decoder_has_new_weights_with_every_method(method: TuningMethod) -> None:
    network, fresh = swin(), swin()
    unfreeze(network, TuningSettings(method, "new", seed=5))
    folded = folded_encoder(network).state_dict()
    for name, value in fresh.state_dict().items():
        renewed = name.startswith(("decoder", "encoder")) and name.endswith("conv.weight")
        assert torch.equal(folded[name], value) is not renewed, name


def test_an_encoder_with_only_a_graph_is_refused(site: TuningSite, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(EncoderBundle, "graph_only", True)
    with refused(UsageError, site.bundle.path):
        check_tunable(site.bundle, [LIVER], TuningSettings("full"))


@pytest.mark.parametrize(
    ("settings", "left"),
    [
        (TuningSettings("lora"), ["encoder1", "decoder1"]),
        (TuningSettings("decoder"), ["encoder1"]),
        (TuningSettings("full", "frozen"), ["decoder1"]),
        (TuningSettings("full"), []),
        (TuningSettings("lora", "new"), []),
    ],
    ids=lambda value: value.name if isinstance(value, TuningSettings) else "",
)
def test_random_weights_without_training_are_refused(tmp_path: Path, settings: TuningSettings, left: list[str]) -> None:
    network = swin()
    parts = (*network.bridge_parts, *network.decoder_parts)
    contents = small_contents(
        network=network, architecture="swin_unetr", settings={"feature_size": 12}, untrained=parts
    )
    bundle = EncoderBundle.write(tmp_path / "s.encoder", contents)
    if not left:
        check_tunable(bundle, [LIVER], settings)
        return
    with refused(UsageError, *left) as caught:
        check_tunable(bundle, [LIVER], settings)
    assert "--decoder new" in caught.value.remedy
    named = re.findall(r"\b(?:encoder1|decoder1)\b", caught.value.message)
    assert set(named) == set(left)


def test_scans_without_annotations_have_no_effect(site: TuningSite) -> None:
    support = site.support()
    silent = replace(support.cases[1], task_mask=np.zeros(2, bool))
    settings = TuningSettings("bitfit", **SHORT)
    alone, beside = (
        replace(support, cases=cases).tuned(settings, range(len(cases)), SilentProgress()).network.learned()
        for cases in ([support.cases[0]], [support.cases[0], silent])
    )
    assert all(torch.equal(alone[name], beside[name]) for name in alone)


@pytest.mark.parametrize("where", [(TunedNetwork, "forward"), (torch.optim.AdamW, "step"), (TunedNetwork, "to")])
def test_the_remedy_for_too_little_memory_names_options(
    site: TuningSite, monkeypatch: pytest.MonkeyPatch, where: tuple[type, str]
) -> None:
    def out_of_memory(*arguments: object, **named: object) -> None:
        raise MemoryError

    monkeypatch.setattr(*where, out_of_memory)
    with refused(OutOfMemoryError) as caught:
        site.support().tuned(TuningSettings("bitfit", **SHORT), [0], SilentProgress())
    assert "--gradient-checkpointing" in caught.value.remedy


def test_an_organ_too_thin_for_the_grid_is_not_treated_as_absent(site: TuningSite) -> None:
    image = site.root / "images" / "case_1.nii.gz"
    volume = read_ct(image)
    sheet = np.zeros(volume.shape, np.uint8)
    sheet[20, 5:30, 5:30] = 1
    coarse = Preprocessing(spacing=(18.0, 18.0, 18.0))
    case = prepare_case(volume, LabelMap(sheet, volume.affine), {"sheet": 1}, ["sheet"], coarse, partial=True)
    assert case.task_mask.tolist() == [True]
    assert case.organ_bits.any()


def test_a_new_decoder_is_refused_for_networks_without_a_decoder() -> None:
    class Bare(ResidualUNet):
        decoder_parts = ()

    with refused(UsageError, "decoder"):
        unfreeze(Bare(CHANNELS), TuningSettings("affine", "new"))
