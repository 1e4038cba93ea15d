"""Published checkpoints: comparison with the authors' networks for every release's layout, and refused files."""

from __future__ import annotations

import functools
import logging
from pathlib import Path

import pytest
import torch
from doubles.errors import refused
from doubles.releases import (
    FEATURE_SIZE,
    RELEASES,
    WIDTH,
    Release,
    authors_swin,
    authors_unet,
    old_names,
    prefixed,
    pretext_heads,
    text_head,
    transformer,
)
from torch import Tensor, nn

from fseft_edge.export.checkpoints import ModelFile
from fseft_edge.export.published import read_published
from fseft_edge.export.zoo import MODELS, load_model
from fseft_edge.runtime.encoder.networks import build_network
from fseft_edge.runtime.errors import CheckpointError

WINDOW = (64, 32, 32)


def read_small(model: str, path: Path) -> ModelFile:
    """Read a checkpoint as a model of the zoo, but with a much smaller network."""
    spec = MODELS[model]
    assert spec.published is not None
    assert spec.layout is not None
    small = {"feature_size": FEATURE_SIZE} if "feature_size" in spec.published.settings else {"width": WIDTH}
    return read_published(spec.published.model_copy(update={"settings": small}), spec.layout, path)


def save(content: object, folder: Path) -> Path:
    torch.save(content, folder / "c.pth")
    return folder / "c.pth"


def authors_swin_output(network: nn.Module, windows: Tensor) -> tuple[list[Tensor], Tensor]:
    """Return the levels of the decoder, finest first, and the logits."""
    levels: dict[int, Tensor] = {}
    hooks = [
        network.get_submodule(f"decoder{level + 1}").register_forward_hook(
            lambda _module, _inputs, output, level=level: levels.update({level: output})
        )
        for level in range(5)
    ]
    logits = network(windows)
    for hook in hooks:
        hook.remove()
    return [levels[level] for level in range(5)], logits


def output_of(network: nn.Module, windows: Tensor) -> tuple[list[Tensor], Tensor]:
    with torch.no_grad():
        if hasattr(network, "swinViT"):
            return authors_swin_output(network, windows)
        return network(windows)


def state_of(network: nn.Module) -> dict[str, Tensor]:
    return dict(network.state_dict()) if hasattr(network, "swinViT") else network.state()


def pyramid_of(model: ModelFile, windows: Tensor) -> list[Tensor]:
    network = build_network(model.description.architecture, **model.description.settings).eval()
    network.load_state_dict(dict(model.encoder))
    with torch.no_grad():
        return network(windows)


def windows(count: int = 1) -> Tensor:
    return torch.rand(count, 1, *WINDOW, generator=torch.Generator().manual_seed(0))


def assert_close(a: Tensor, b: Tensor) -> None:
    assert a.shape == b.shape
    assert float((a - b).abs().max()) <= 1e-5 * float(a.abs().max())


@pytest.fixture(params=RELEASES.values(), ids=RELEASES.keys())
def release(request: pytest.FixtureRequest) -> Release:
    pytest.importorskip("einops", reason="MONAI's own forward pass needs einops")
    return request.param


@functools.cache
def authors_network(model: str, classes: int) -> nn.Module:
    return (authors_unet if model == "suprem_unet" else authors_swin)(classes or 1)


def test_features_and_zero_shot_logits_equal_the_authors_network(release: Release, tmp_path: Path) -> None:
    network = authors_network("suprem_unet" if release.model == "suprem_unet" else "swin", release.classes)
    model = read_small(release.model, save(release.content(state_of(network)), tmp_path))
    expected, logits = output_of(network, windows())
    pyramid = pyramid_of(model, windows())
    assert len(pyramid) == len(expected)
    for a, b in zip(expected, pyramid, strict=True):
        assert_close(a, b)
    zero_shot = torch.einsum("kc,ncxyz->nkxyz", model.head_weight, pyramid[0])
    zero_shot += model.head_bias[:, None, None, None]
    if release.model == "btcv":  # a softmax whose first class is background
        assert_close(logits[:, 1:] - logits[:, :1], zero_shot)
        labels = torch.where(zero_shot.amax(1) > 0, zero_shot.argmax(1) + 1, 0)
        assert torch.equal(labels, logits.argmax(1))
        assert len(model.description.organs) == 13
    elif release.classes:
        assert_close(logits, zero_shot)
        assert len(model.description.organs) == 29
    else:
        assert model.description.organs == ()
        assert model.head_weight.shape == (0, pyramid[0].shape[1])
        assert model.head_bias.shape == (0,)


@pytest.mark.parametrize("names", ["released", "of later pre-training", "of earlier pre-training"])
def test_self_supervised_transformer_is_completed_with_a_new_decoder(names: str, tmp_path: Path) -> None:
    pytest.importorskip("einops", reason="MONAI's own forward pass needs einops")
    network = authors_swin(1)
    weights = {key: value.clone() for key, value in network.state_dict().items()}
    swin = {key: value for key, value in weights.items() if key.startswith("swinViT.")}
    content = {
        "released": prefixed("module.", transformer(weights) | pretext_heads(16 * FEATURE_SIZE)),
        "of later pre-training": swin | pretext_heads(16 * FEATURE_SIZE),
        "of earlier pre-training": prefixed("module.", old_names(swin) | {"conv.0.weight": torch.ones(3)}),
    }[names]
    path = save({"epoch": 1, "state_dict": content, "optimizer": {}}, tmp_path)
    model = read_small("selfsup", path)
    assert model.description.organs == ()
    assert model.head_weight.shape == (0, FEATURE_SIZE)
    # The authors' network with the same transformer and the new decoder gives the expected features.
    new = {key: value for key, value in model.encoder.items() if not key.startswith("swinViT.")}
    network.load_state_dict(weights | new)
    for a, b in zip(output_of(network, windows())[0], pyramid_of(model, windows()), strict=True):
        assert_close(a, b)
    again = read_small("selfsup", path)
    assert all(torch.equal(value, again.encoder[key]) for key, value in model.encoder.items())
    assert not torch.equal(new["decoder1.transp_conv.conv.weight"], weights["decoder1.transp_conv.conv.weight"])


def test_features_of_the_unet_do_not_depend_on_the_batch(tmp_path: Path) -> None:
    """The authors evaluate one window at a time; in a batch, their normalisation would mix the windows."""
    network = authors_unet(29)
    model = read_small("suprem_unet", save(network.state(), tmp_path))
    both = torch.cat([windows(), 0.1 * windows()])
    together = pyramid_of(model, both)
    for number in (0, 1):
        single, _ = output_of(network, both[number : number + 1])
        for a, b in zip(single, together, strict=True):
            assert_close(a, b[number : number + 1])


def test_published_self_supervised_model_is_complete_and_has_no_organs(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    weights = build_network("swin_unetr", feature_size=48).state_dict()
    content = prefixed("module.", transformer(weights) | pretext_heads(768))
    with caplog.at_level(logging.WARNING):
        model = load_model("selfsup", save({"state_dict": content}, tmp_path)).model
    assert "decoder" in caplog.text
    assert model.encoder.keys() == weights.keys()
    assert torch.equal(model.encoder["swinViT.patch_embed.proj.weight"], weights["swinViT.patch_embed.proj.weight"])
    assert model.head_weight.shape == (0, 48)


def test_published_unet_is_complete_and_an_unknown_sha256_is_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    network = authors_unet(1, width=32)
    content = prefixed("module.backbone.", network.state()) | prefixed("module.", text_head(64))
    with caplog.at_level(logging.WARNING):
        model = load_model("suprem_unet", save({"net": content}, tmp_path)).model
    assert "sha256" in caplog.text
    network = build_network("genesis_unet")
    assert model.encoder.keys() == network.state_dict().keys()
    assert [level.channels for level in network.levels] == [64, 128, 256, 512]


@pytest.mark.parametrize("model", ["btcv", "fseft", "suprem_swinunetr", "clipdriven"])
def test_swin_of_another_feature_size_is_refused(model: str, tmp_path: Path) -> None:
    content = RELEASES[model if model in RELEASES else f"{model}, as released"].content(btcv_weights())
    with refused(CheckpointError, "c.pth", 12, model, 48) as caught:
        load_model(model, save(content, tmp_path))
    assert "--model custom --description" in caught.value.remedy


def test_unet_of_another_width_is_refused(tmp_path: Path) -> None:
    with refused(CheckpointError, "c.pth", 4, "suprem_unet", 32):
        load_model("suprem_unet", save(authors_unet(29).state(), tmp_path))


def test_error_of_an_unknown_layout_lists_its_tensors(tmp_path: Path) -> None:
    content = {"encoder.first.weight": torch.ones(1), "encoder.first.bias": torch.ones(1), "seg.weight": torch.ones(1)}
    with refused(CheckpointError, "c.pth", 3, *content, "encoder, seg") as caught:
        load_model("btcv", save(content, tmp_path))
    assert "--model custom --description" in caught.value.remedy


def btcv_weights() -> dict[str, Tensor]:
    return {key: value.clone() for key, value in authors_network("swin", 14).state_dict().items()}


def test_error_lists_missing_unexpected_and_misshapen_keys(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    weights = btcv_weights()
    more = [f"adapter.{number}.weight" for number in range(9)]
    weights |= {name: torch.ones(1) for name in more}
    missing, misshapen = "decoder3.conv_block.conv1.conv.weight", "swinViT.layers1.0.blocks.0.norm1.bias"
    del weights[missing]
    weights[misshapen] = torch.ones(5)
    with caplog.at_level(logging.INFO), refused(CheckpointError, "c.pth", missing, misshapen, [5], [12], 9) as caught:
        read_small("btcv", save(weights, tmp_path))
    assert [name in caught.value.message for name in more] == [True] * 3 + [False] * 6
    assert "--model custom --description" in caught.value.remedy
    assert all(name in caplog.text for name in more)


def test_other_attention_windows_are_refused(tmp_path: Path) -> None:
    weights = btcv_weights()
    changed = "swinViT.layers1.0.blocks.0.attn.relative_position_index"
    weights[changed] += 1
    with refused(CheckpointError, "c.pth", changed):
        read_small("btcv", save(weights, tmp_path))


def test_classifier_with_another_number_of_rows_is_refused(tmp_path: Path) -> None:
    with refused(CheckpointError, "c.pth", 5, 14):
        read_small("btcv", save(authors_swin(5).state_dict(), tmp_path))


def test_optional_classifier_with_another_number_of_rows_is_not_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = save({"net": authors_unet(1).state()}, tmp_path)
    with caplog.at_level(logging.WARNING):
        model = read_small("suprem_unet", path)
    assert all(text in caplog.text for text in ("c.pth", "1 rows", "29 rows"))
    assert model.description.organs == ()
    assert model.head_weight.shape == (0, 2 * WIDTH)


@pytest.mark.parametrize("model", ["fseft", "btcv"])
def test_checkpoint_without_a_required_classifier_is_refused(model: str, tmp_path: Path) -> None:
    weights = {key: value for key, value in btcv_weights().items() if not key.startswith("out.")}
    with refused(CheckpointError, "c.pth", "classifier"):
        read_small(model, save(weights, tmp_path))


def test_fine_tuned_network_is_refused_as_a_self_supervised_transformer(tmp_path: Path) -> None:
    with refused(CheckpointError, "c.pth") as caught:
        read_small("selfsup", save(btcv_weights(), tmp_path))
    assert "--model btcv" in caught.value.remedy


def test_one_tensor_under_two_prefixes_is_refused(tmp_path: Path) -> None:
    weights = btcv_weights()
    with refused(CheckpointError, "c.pth", next(iter(weights))):
        read_small("btcv", save(weights | prefixed("backbone.", weights), tmp_path))


def test_every_published_model_has_a_source_and_a_licence() -> None:
    published = [spec for spec in MODELS.values() if spec.published is not None]
    assert len(published) == 6
    for spec in published:
        assert spec.repository
        assert spec.file
        assert spec.licence
        assert spec.published is not None
        assert spec.published.preprocessing.hu_window == (-175.0, 250.0)
        assert spec.published.window == (96, 96, 96)
        assert spec.sha256 is None or len(spec.sha256) == 64
    assert MODELS["btcv"].published.organs[:2] == ("spleen", "right_kidney")
    assert MODELS["btcv"].published.organs[-1] == "left_adrenal_gland"
