"""Fine-tuning of the encoder: what learns, files, merging, and the command."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from doubles.encoder import CHANNELS, SPACING, WINDOW, label_of, write_case, write_random_adapter, write_tiny_encoder
from safetensors.torch import load_file
from torch import nn

from fseft_edge.adapter_file import AdapterFile, read_adapter
from fseft_edge.adapters import UNKNOWN_ORGAN_BIAS, Reads
from fseft_edge.finetuning.choosing import better_tuning, default_candidates, try_finetuning, tuning_beside, why_not
from fseft_edge.finetuning.folding import CentreSum, LowRankSum, add_sum, fold_sums
from fseft_edge.finetuning.merging import folded_encoder, merge, tuned_network
from fseft_edge.finetuning.opening import open_encoder
from fseft_edge.finetuning.settings import TUNING_METHODS, TuningMethod, TuningSettings
from fseft_edge.finetuning.training import TunedNetwork, crop_edge
from fseft_edge.finetuning.tuning import check_tunable, finetune, load_tuning_support
from fseft_edge.finetuning.tuning_file import TuningFile, read_tuning, write_tuning
from fseft_edge.organs import OrganLabel
from fseft_edge.pretraining.cohort import prepare_case
from fseft_edge.report.progress import SilentProgress
from fseft_edge.runtime.bundle import EncoderBundle
from fseft_edge.runtime.errors import AdapterError, OutOfMemoryError, UsageError
from fseft_edge.runtime.networks import build_network
from fseft_edge.runtime.networks.base import FeatureNetwork
from fseft_edge.runtime.networks.residual_unet import ResidualUNet
from fseft_edge.runtime.nifti import read_ct, read_label_map
from fseft_edge.runtime.preprocessing import Preprocessing
from fseft_edge.runtime.session import open_session
from fseft_edge.runtime.volume import LabelMap
from fseft_edge.segmentation import segment
from fseft_edge.validation import OrganScores

LIVER, SPLEEN = (OrganLabel(name, label_of(name)) for name in ("liver", "spleen"))
SHORT = {"steps": 2, "crops": 1, "crop": 32, "bfloat16": False}
FOR_A_UNET: tuple[TuningMethod, ...] = ("lora", "affine", "bitfit", "conv-adapter", "med-adapter", "full", "decoder")


def unet(seed: int = 0) -> ResidualUNet:
    torch.manual_seed(seed)
    return ResidualUNet(CHANNELS).eval()


def swin() -> FeatureNetwork:
    torch.manual_seed(0)
    return build_network("swin_unetr", feature_size=12).eval()


def learning(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters() if parameter.requires_grad)


def parameters_in(tensors: dict[str, torch.Tensor]) -> int:
    """How many parameters there are; what the classifier normalises by is none."""
    normalisation = re.compile(r"head\.(mean|scale)_\d")
    return sum(value.numel() for name, value in tensors.items() if not normalisation.fullmatch(name))


@dataclass(frozen=True)
class Site:
    """An encoder and two annotated scans."""

    root: Path
    bundle: EncoderBundle

    def finetune(
        self, settings: TuningSettings, output: Path, organs: Sequence[OrganLabel] = (LIVER, SPLEEN), **more: Any
    ) -> TuningFile:
        return finetune(
            *(self.bundle.path, self.root / "images", self.root / "labels", organs, output),
            settings=settings,
            device="cpu",
            **more,
        )


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Site:
    root = tmp_path_factory.mktemp("site")
    for seed in (1, 2):
        write_case(root, f"case_{seed}", seed)
    return Site(root, write_tiny_encoder(root / "tiny.encoder"))


# What learns


@pytest.mark.parametrize("method", FOR_A_UNET)
def test_what_is_opened_computes_what_it_did(method: TuningMethod) -> None:
    network, windows = unet(), torch.rand(1, 1, 32, 32, 32)
    with torch.no_grad():
        before = network(windows)
        open_encoder(network, TuningSettings(method))
        after = network.eval()(windows)
    for one, other in zip(before, after, strict=True):
        assert torch.allclose(one, other, atol=1e-6)


def test_only_what_a_method_names_learns() -> None:
    opened = {}
    for method in FOR_A_UNET:
        network = unet()
        open_encoder(network, TuningSettings(method))
        opened[method] = {name for name, parameter in network.named_parameters() if parameter.requires_grad}
    assert all(name.startswith(("up.", "merge.")) for name in opened["decoder"])
    assert opened["full"] == {name for name, _ in unet().named_parameters()}
    assert all(name.startswith("down.") and "norm" in name for name in opened["affine"])
    assert all(name.startswith("down.") and name.endswith("bias") for name in opened["bitfit"])
    assert all(".parametrizations.weight.0." in name for name in opened["lora"] | opened["conv-adapter"])
    assert all(name.startswith("med_adapter.") for name in opened["med-adapter"])


def test_a_decoder_that_is_tuned_or_new_learns_beside_the_method() -> None:
    frozen, tuned, new = unet(), unet(), unet()
    open_encoder(frozen, TuningSettings("affine"))
    open_encoder(tuned, TuningSettings("affine", "tuned"))
    added = open_encoder(new, TuningSettings("affine", "new"))
    decoder = sum(p.numel() for part in (tuned.up, tuned.merge) for p in part.parameters())
    assert learning(tuned) == learning(frozen) + decoder == learning(new)
    assert {name.split(".")[0] for name in added} == {"up", "merge"}
    assert torch.equal(tuned.merge[0].first.convolution.weight, unet().merge[0].first.convolution.weight)
    assert not torch.equal(new.merge[0].first.convolution.weight, unet().merge[0].first.convolution.weight)


def test_a_new_decoder_of_a_swin_unetr_renews_the_bridges_too() -> None:
    network = swin()
    open_encoder(network, TuningSettings("lora", "new"))
    parts = {name.split(".")[0] for name, parameter in network.named_parameters() if parameter.requires_grad}
    assert parts == {"swinViT", "encoder1", "encoder2", "encoder3", "encoder4", "encoder10"} | {
        f"decoder{level}" for level in range(1, 6)
    }


@pytest.mark.parametrize(
    ("method", "count"),
    [
        # of the authors' released code: A [12, C] and B [3C, 12] for each of two blocks of widths 48 to 384
        ("lora", 69_120),
        # two projections with biases in each block: 2 * 16 C + 16 + C
        ("adaptformer", 2 * sum(2 * 16 * width + 16 + width for width in (48, 96, 192, 384))),
        # norm1, norm2 of each block, and one of 8C (merging) a stage
        ("affine", sum(2 * 4 * width + 2 * 8 * width for width in (48, 96, 192, 384))),
    ],
)
def test_as_many_parameters_learn_on_a_swin_unetr_as_published(method: TuningMethod, count: int) -> None:
    network = build_network("swin_unetr", feature_size=48)
    open_encoder(network, TuningSettings(method))
    assert learning(network) == count


@pytest.mark.parametrize("method", ["adaptformer", "compacter"])
def test_a_method_for_transformers_is_refused_for_a_unet(method: TuningMethod) -> None:
    with pytest.raises(UsageError, match="no place"):
        open_encoder(unet(), TuningSettings(method))


def test_nothing_to_learn_is_refused() -> None:
    with pytest.raises(UsageError, match="nothing of this encoder would learn"):
        open_encoder(unet(), TuningSettings("decoder", "frozen"))


def test_the_crop_is_144_mm_and_within_the_window() -> None:
    assert crop_edge(Preprocessing(spacing=(1.5, 1.5, 1.5)), (96, 96, 96)) == 96
    assert crop_edge(Preprocessing(spacing=(3.0, 3.0, 3.0)), (96, 96, 96)) == 64
    assert crop_edge(Preprocessing(spacing=(1.0, 1.0, 1.0)), (96, 96, 96)) == 96


# Sums that fold


def test_a_low_rank_sum_is_the_product_that_it_says() -> None:
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
def test_a_convolution_beside_another_folds_into_its_centre(stride: int) -> None:
    convolution, beside = nn.Conv3d(3, 5, 3, stride, 1, bias=False), nn.Conv3d(3, 5, 1, stride, bias=False)
    x = torch.rand(2, 3, 8, 8, 8)
    expected = convolution(x) + beside(x)
    added = CentreSum(convolution.weight)
    with torch.no_grad():
        added.weight.copy_(beside.weight[..., 0, 0, 0])
    add_sum(convolution, added)
    assert torch.allclose(convolution(x), expected, atol=1e-6)


# Training


def crops_of(site: Site) -> Any:
    labels = [
        (image, read_label_map(site.root / "labels" / image.name)) for image in sorted((site.root / "images").iterdir())
    ]
    return load_tuning_support(labels, [LIVER, SPLEEN], site.bundle, SilentProgress())


@pytest.mark.parametrize("method", FOR_A_UNET)
def test_training_changes_what_learns_and_nothing_else(site: Site, method: TuningMethod) -> None:
    support = crops_of(site)
    settings = TuningSettings(method, **SHORT)
    tuned = support.tuned(settings, [0, 1], SilentProgress())
    fresh = TunedNetwork(site.bundle.network(), 2, settings)
    before, after = fresh.state_dict(), tuned.network.state_dict()
    learned = tuned.network.learned()
    assert {name for name in before if not torch.equal(before[name], after[name])} <= set(learned)
    assert any(not torch.equal(before[name], after[name]) for name in learned if name.startswith("encoder."))
    assert tuned.parameters == parameters_in(learned)


def test_the_same_seed_gives_the_same_network_and_checkpointing_changes_nothing(site: Site) -> None:
    support = crops_of(site)
    settings = TuningSettings("full", **SHORT)
    first, again, saving, other = (
        support.tuned(each, [0, 1], SilentProgress()).network.learned()
        for each in (settings, settings, replace(settings, checkpointing=True), replace(settings, seed=1))
    )
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert all(torch.allclose(first[name], saving[name], atol=1e-6) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


def test_a_step_in_portions_sees_the_same_crops(site: Site) -> None:
    """With one crop a portion, losses are means of single crops' instead of the loss of both; both begin alike."""
    support = crops_of(site)
    settings = TuningSettings("affine", steps=1, crops=2, crop=32, bfloat16=False, rate=0.0)
    whole = support.tuned(settings, [0, 1], SilentProgress()).losses
    portions = support.tuned(replace(settings, accumulate=2), [0, 1], SilentProgress()).losses
    assert portions == pytest.approx(whole, rel=0.2)


def test_statistics_are_held_but_for_those_of_a_new_decoder(site: Site) -> None:
    support = crops_of(site)
    for decoder, moves in (("tuned", False), ("new", True)):
        settings = TuningSettings("affine", decoder, **SHORT)
        tuned = support.tuned(settings, [0], SilentProgress()).network.encoder
        name = "merge.0.first.norm.running_mean"
        assert torch.equal(tuned.state_dict()[name], site.bundle.network().state_dict()[name]) is not moves
        assert torch.equal(
            tuned.state_dict()["down.0.first.norm.running_mean"],
            site.bundle.network().state_dict()["down.0.first.norm.running_mean"],
        )


@pytest.mark.parametrize("reads", ["last", "pyramid"])
def test_it_starts_as_the_zero_shot_segmenter(site: Site, reads: Reads) -> None:
    support = crops_of(site)
    rows = list(support.rows)
    assert rows[0] is not None
    rows[1] = None
    network = TunedNetwork(site.bundle.network(), 2, TuningSettings("full", reads=reads)).eval()
    windows = torch.rand(3, 1, 32, 32, 32, generator=torch.Generator().manual_seed(0))
    network.start_head(rows, windows.split(1))
    with torch.no_grad():
        levels = network.encoder(windows)
        logits = network(windows)
    weight, bias = rows[0]
    assert torch.allclose(logits[:, 0], torch.einsum("c,ncxyz->nxyz", weight, levels[0]) + bias, atol=1e-4)
    assert torch.equal(logits[:, 1], torch.full_like(logits[:, 1], UNKNOWN_ORGAN_BIAS))
    for level, features in enumerate(levels if reads == "pyramid" else levels[:1]):
        channels = features.transpose(0, 1).flatten(1)
        assert torch.allclose(network.head.mean(level), channels.mean(1), atol=1e-5)
        assert torch.allclose(network.head.scale(level), channels.std(1, correction=0), atol=1e-5)


def test_the_classifier_reads_what_it_was_told(site: Site) -> None:
    support = crops_of(site)
    for reads in ("last", "pyramid"):
        tuned = support.tuned(TuningSettings("bitfit", reads=reads, **SHORT), [0], SilentProgress())
        learned = {name for name in tuned.network.learned() if name.startswith("head.coarse")}
        assert bool(learned) is (reads == "pyramid")
        assert all(tuned.network.learned()[name].any() for name in learned)


def test_fine_tuning_lowers_the_loss(site: Site) -> None:
    support = crops_of(site)
    settings = TuningSettings("full", steps=40, crops=2, crop=32, bfloat16=False, rate=1e-2)
    losses = support.tuned(settings, [0, 1], SilentProgress()).losses
    assert len(losses) == 4
    assert losses[-1] < 0.8 * losses[0]


# Files and merging


@pytest.fixture(scope="module")
def tuned(site: Site) -> dict[str, Path]:
    """A tuning of every method that fits, by name."""
    paths = {}
    for method in FOR_A_UNET:
        paths[method] = site.root / f"{method}.tuning"
        site.finetune(TuningSettings(method, "new" if method == "lora" else None, rate=1e-2, **SHORT), paths[method])
    return paths


@pytest.mark.parametrize("method", FOR_A_UNET)
def test_a_merged_encoder_computes_what_the_tuned_one_did(
    site: Site, tuned: dict[str, Path], tmp_path: Path, method: TuningMethod
) -> None:
    file = read_tuning(tuned[method])
    network = tuned_network(file, site.bundle, tuned[method])
    merged = merge(tuned[method], tmp_path / "merged.encoder", encoder=site.bundle.path, onnx=False)
    windows = torch.rand(1, 1, *WINDOW)
    with torch.no_grad(), open_session(merged.bundle, "cpu", "torch") as session:
        expected, found = network.encoder(windows), session.encode(windows)
    for one, other in zip(expected, found, strict=True):
        assert float((one - other).abs().max() / one.abs().max()) <= 1e-5
    adapter = read_adapter(merged.adapter).adapter
    assert all(torch.equal(value, adapter.state_dict()[name]) for name, value in network.head.state_dict().items())
    assert merged.bundle.manifest.organs == ()
    assert merged.bundle.encoder_id != site.bundle.encoder_id


def test_a_merged_encoder_segments_with_the_adapter_beside_it(
    site: Site, tuned: dict[str, Path], tmp_path: Path
) -> None:
    merged = merge(tuned["full"], tmp_path / "liver.encoder", encoder=site.bundle.path)
    adapter = read_adapter(merged.adapter)
    assert merged.adapter == tmp_path / "liver.adapter"
    assert [organ.name for organ in adapter.description.organs] == ["liver", "spleen"]
    assert adapter.description.organs == read_tuning(tuned["full"]).description.organs
    image = site.root / "images" / "case_1.nii.gz"
    masks = []
    for backend in ("torch", "onnxruntime"):
        (case,) = segment([image], [merged.adapter], tmp_path / backend, device="cpu", backend=backend)
        masks.append(read_label_map(case.mask).array)
    assert np.array_equal(*masks)


def test_folding_leaves_the_tuned_network_as_it_is(site: Site, tuned: dict[str, Path]) -> None:
    network = tuned_network(read_tuning(tuned["lora"]), site.bundle, tuned["lora"])
    names = set(network.encoder.state_dict())
    assert set(folded_encoder(network.encoder).state_dict()) == set(site.bundle.network().state_dict())
    assert set(network.encoder.state_dict()) == names


def test_a_tuning_says_what_was_learned_from_what(site: Site, tuned: dict[str, Path]) -> None:
    described = read_tuning(tuned["affine"]).description
    assert (described.method, described.decoder, described.shots, described.steps) == ("affine", "frozen", 2, 2)
    assert described.encoder_id == site.bundle.encoder_id
    assert described.parameters == parameters_in(read_tuning(tuned["affine"]).tensors)
    voxel_ml = np.prod(SPACING) / 1000
    labels = [read_label_map(path).array for path in sorted((site.root / "labels").iterdir())]
    volumes = [float((one == LIVER.label).sum() * voxel_ml) for one in labels]
    assert described.organs[0].support_volumes_ml == pytest.approx(volumes, abs=1e-3)
    assert len(described.organs[0].support_hu) == 2


def test_the_same_tuning_gives_the_same_bytes(site: Site, tuned: dict[str, Path], tmp_path: Path) -> None:
    site.finetune(TuningSettings("bitfit", rate=1e-2, **SHORT), tmp_path / "again.tuning")
    assert (tmp_path / "again.tuning").read_bytes() == tuned["bitfit"].read_bytes()


def test_small_methods_leave_small_files(tuned: dict[str, Path]) -> None:
    sizes = {method: sum(value.numel() for value in load_file(path).values()) for method, path in tuned.items()}
    assert max(sizes["affine"], sizes["bitfit"]) < 0.05 * sizes["full"]


def test_a_tuning_of_another_encoder_is_refused(site: Site, tuned: dict[str, Path], tmp_path: Path) -> None:
    other = write_tiny_encoder(tmp_path / "other.encoder", seed=1)
    with pytest.raises(AdapterError, match="changes the encoder tiny"):
        merge(tuned["full"], tmp_path / "out.encoder", encoder=other.path)
    assert not (tmp_path / "out.encoder").exists()


def damaged(path: Path, kind: str, original: Path) -> None:
    content = original.read_bytes()
    match kind:
        case "truncated":
            path.write_bytes(content[: len(content) // 2])
        case "changed":
            path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        case "another description":
            file = read_tuning(original)
            write_tuning(
                path, TuningFile(file.description.model_copy(update={"rank": 9, "method": "lora"}), file.tensors)
            )
        case "an adapter":
            write_random_adapter(path, EncoderBundle.open(original.parent / "tiny.encoder"))
        case "text":
            path.write_bytes(b"no tuning at all")


@pytest.mark.parametrize("kind", ["missing", "truncated", "changed", "another description", "an adapter", "text"])
def test_a_damaged_tuning_is_refused(site: Site, tuned: dict[str, Path], tmp_path: Path, kind: str) -> None:
    if kind != "missing":
        damaged(tmp_path / "bad.tuning", kind, tuned["affine"])
    with pytest.raises(AdapterError):
        merge(tmp_path / "bad.tuning", tmp_path / "out.encoder", encoder=site.bundle.path)
    assert not (tmp_path / "out.encoder").exists()


def test_a_tuning_in_the_place_of_an_adapter_is_recognised(site: Site, tuned: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(AdapterError) as refused:
        read_adapter(tuned["bitfit"])
    assert "fseft-edge merge" in refused.value.remedy


@pytest.mark.parametrize("name", [".", "p", "p.v2", "p.adapter"])
def test_a_merged_encoder_is_called_so(site: Site, tuned: dict[str, Path], tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError, match="no name of an encoder bundle"):
        merge(tuned["bitfit"], tmp_path / name, encoder=site.bundle.path)
    assert list(tmp_path.iterdir()) == []


def test_nothing_that_is_there_is_replaced(site: Site, tuned: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "a.adapter").touch()
    with pytest.raises(UsageError, match="already exists"):
        merge(tuned["full"], tmp_path / "a.encoder", encoder=site.bundle.path)


def test_a_merge_that_is_interrupted_leaves_nothing(
    site: Site, tuned: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("fseft_edge.finetuning.merging.write_adapter", interrupted)
    with pytest.raises(KeyboardInterrupt):
        merge(tuned["bitfit"], tmp_path / "a.encoder", encoder=site.bundle.path, onnx=False)
    assert list(tmp_path.iterdir()) == []


def test_more_organs_than_a_case_has_bits_for_are_refused(site: Site, tmp_path: Path) -> None:
    organs = [OrganLabel(f"organ_{number}", number) for number in range(1, 33)]
    with pytest.raises(UsageError, match="at most 31"):
        site.finetune(TuningSettings("bitfit", **SHORT), tmp_path / "a.tuning", organs)


# Validation and choice


def test_scans_left_out_are_scored_by_a_network_that_never_saw_them(site: Site, tmp_path: Path) -> None:
    file = site.finetune(TuningSettings("bitfit", **SHORT), tmp_path / "v.tuning", validate=True)
    assert [len(organ.left_out_dsc) for organ in file.description.organs] == [2, 2]
    assert all(0 <= score <= 1 for organ in file.description.organs for score in organ.left_out_dsc)


def test_one_scan_cannot_be_validated_and_that_is_said(
    site: Site, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        settings = TuningSettings("bitfit", **SHORT)
        file = site.finetune(settings, tmp_path / "v.tuning", validate=True, cases=["case_1"])
    assert file.description.organs[0].left_out_dsc == ()
    assert "nothing can be validated" in caplog.text


def adapter_with(scores: float | None, tmp_path: Path, site: Site) -> AdapterFile:
    """An adapter with the same score for all that was left out; None where nothing was."""
    file = write_random_adapter(tmp_path / "a.adapter", site.bundle, ("liver", "spleen"))
    left_out = () if scores is None else (scores, scores)
    organs = tuple(organ.model_copy(update={"left_out_dsc": left_out}) for organ in file.description.organs)
    return replace(file, description=file.description.model_copy(update={"organs": organs}))


@pytest.mark.parametrize(
    ("scores", "known", "why"),
    [
        (0.5, (True, False), None),
        (0.5, (False, False), None),
        (0.9, (True, False), "finds every organ"),
        (0.5, (True, True), "knows every organ"),
        (None, (True, False), "nothing can be compared"),
    ],
)
def test_fine_tuning_is_tried_where_an_adapter_falls_short_of_a_new_organ(
    site: Site, tmp_path: Path, scores: float | None, known: tuple[bool, bool], why: str | None
) -> None:
    reason = why_not(adapter_with(scores, tmp_path, site), known)
    assert reason is None if why is None else why in (reason or "")


GOOD = TuningSettings("full", steps=25, crops=2, crop=32, bfloat16=False, rate=1e-2)


def within(minutes: float) -> float:
    return time.monotonic() + 60 * minutes


def test_the_better_one_is_taken(site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On scans left out "full" is right in every voxel of the liver, and the others in none."""

    def scored(scores: OrganScores, support: Any, settings: TuningSettings, left_out: Sequence[int], **_: Any) -> None:
        for index in left_out:
            labels = support.annotated[index][1]
            mask = np.uint8(1) * (labels.array == (LIVER.label if settings.method == "full" else 255))
            scores.add(mask, labels, [LIVER.label, SPLEEN.label], np.array([True, False]))

    monkeypatch.setattr("fseft_edge.finetuning.choosing.add_fold", scored)
    support, settings = crops_of(site), TuningSettings("bitfit", **SHORT)
    candidates = [settings, replace(settings, method="full"), replace(settings, method="affine")]
    chosen = better_tuning(adapter_with(0.5, tmp_path, site), support, candidates, deadline=within(30))
    assert chosen is not None
    assert chosen.description.method == "full"
    assert chosen.description.organs[0].left_out_dsc == (1.0, 1.0)
    assert better_tuning(adapter_with(0.99, tmp_path, site), support, candidates, deadline=within(30)) is None


def test_what_is_too_slow_is_given_up_after_a_few_steps(
    site: Site, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[None] = []
    forward = TunedNetwork.forward

    def counted(network: TunedNetwork, windows: torch.Tensor) -> torch.Tensor:
        steps.append(None)
        return forward(network, windows)

    monkeypatch.setattr(TunedNetwork, "forward", counted)
    slow = replace(GOOD, steps=10_000_000, crops=1)
    with caplog.at_level(logging.WARNING):
        chosen = better_tuning(adapter_with(0.0, tmp_path, site), crops_of(site), [slow], deadline=within(1))
    assert chosen is None
    assert "3 trainings do not fit into the time" in caplog.text
    assert len(steps) == 2


def trial(site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, **more: Any) -> TuningFile | None:
    """Try one quick candidate beside an adapter that finds nothing."""
    monkeypatch.setattr("fseft_edge.finetuning.choosing.default_candidates", lambda common: [GOOD])
    return try_finetuning(
        adapter_with(0.0, tmp_path, site),
        *(site.bundle.path, site.root / "images", site.root / "labels", [LIVER, SPLEEN]),
        **{"output": tmp_path / "a.adapter", "minutes": 30, "device": "cpu", **more},
    )


def test_what_does_better_is_written_beside_the_adapter(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = adapter_with(0.0, tmp_path, site) and (tmp_path / "a.adapter").read_bytes()
    found = trial(site, tmp_path, monkeypatch)
    assert found is not None
    assert read_tuning(tmp_path / "a.tuning").description.losses == found.description.losses
    assert (tmp_path / "a.adapter").read_bytes() == before


def test_a_tuning_takes_the_place_of_nothing(site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match=r"does not end in \.adapter"):
        tuning_beside(tmp_path / "a.tuning")
    (tmp_path / "a.tuning").touch()
    with pytest.raises(UsageError, match="already exists"):
        trial(site, tmp_path, monkeypatch)


def test_why_fine_tuning_is_not_tried_is_said(site: Site, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        found = try_finetuning(
            adapter_with(0.0, tmp_path, site),
            *(site.bundle.path, site.root / "images", site.root / "labels", [LIVER]),
            output=tmp_path / "a.adapter",
            minutes=1,
            device="cpu",
        )
    assert found is None
    assert "knows every organ" in caplog.text


def test_what_is_tried_learns_different_things() -> None:
    common = TuningSettings("full", seed=4, steps=7)
    kinds = default_candidates(common)
    assert len({(kind.method, kind.decoder) for kind in kinds}) == len(kinds) > 1
    assert {(kind.seed, kind.steps) for kind in kinds} == {(4, 7)}


def test_every_method_has_a_row_in_the_docs() -> None:
    text = (Path(__file__).parents[2] / "docs" / "finetune.md").read_text(encoding="utf-8")
    assert all(f"`{method}`" in text for method in TUNING_METHODS)


@pytest.mark.parametrize("method", ["conv-adapter", "lora", "bitfit"])
def test_a_new_decoder_is_new_whatever_learns_beside_it(method: TuningMethod) -> None:
    network, fresh = swin(), swin()
    open_encoder(network, TuningSettings(method, "new", seed=5))
    folded = folded_encoder(network).state_dict()
    for name, value in fresh.state_dict().items():
        renewed = name.startswith(("decoder", "encoder")) and name.endswith("conv.weight")
        assert torch.equal(folded[name], value) is not renewed, name


def test_an_encoder_that_is_a_graph_alone_is_refused(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(EncoderBundle, "graph_only", True)
    with pytest.raises(UsageError, match="cannot be fine-tuned"):
        check_tunable(site.bundle, [LIVER], TuningSettings("full"))


def test_scans_that_annotate_nothing_teach_nothing(site: Site) -> None:
    support = crops_of(site)
    silent = replace(support.cases[1], task_mask=np.zeros(2, bool))
    settings = TuningSettings("bitfit", **SHORT)
    alone, beside = (
        replace(support, cases=cases).tuned(settings, range(len(cases)), SilentProgress()).network.learned()
        for cases in ([support.cases[0]], [support.cases[0], silent])
    )
    assert all(torch.equal(alone[name], beside[name]) for name in alone)


def test_running_out_of_memory_says_what_helps(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    def out_of_memory(*arguments: object) -> None:
        raise MemoryError

    monkeypatch.setattr(TunedNetwork, "forward", out_of_memory)
    with pytest.raises(OutOfMemoryError) as raised:
        crops_of(site).tuned(TuningSettings("bitfit", **SHORT), [0], SilentProgress())
    assert "--gradient-checkpointing" in raised.value.remedy


def test_an_organ_too_thin_for_the_grid_is_not_taught_as_absent(site: Site) -> None:
    image = site.root / "images" / "case_1.nii.gz"
    volume = read_ct(image)
    sheet = np.zeros(volume.shape, np.uint8)
    sheet[20, 5:30, 5:30] = 1
    coarse = Preprocessing(spacing=(18.0, 18.0, 18.0))
    case = prepare_case(volume, LabelMap(sheet, volume.affine), {"sheet": 1}, ["sheet"], coarse, partial=True)
    assert case.task_mask.tolist() == [True]
    assert case.organs.any()


def test_networks_without_a_decoder_refuse_a_new_one() -> None:
    class Bare(ResidualUNet):
        decoder_parts = ()

    with pytest.raises(UsageError, match="no decoder of its own"):
        open_encoder(Bare(CHANNELS), TuningSettings("affine", "new"))
