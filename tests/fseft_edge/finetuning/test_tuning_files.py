"""Tuning files, and merging of tunings into encoders."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from doubles.encoder import SPACING, WINDOW, write_random_adapter, write_tiny_encoder
from doubles.errors import refused
from doubles.models import small_contents
from doubles.tuning_site import FOR_A_UNET, LIVER, SHORT, SPLEEN, TuningSite, parameters_in, tuning_site
from safetensors.torch import load_file

from fseft_edge.adaptation.cross_validation import OrganScores
from fseft_edge.adaptation.support_set import annotation_hash
from fseft_edge.adapters.file import read_adapter
from fseft_edge.adapters.find_encoder import find_encoder
from fseft_edge.export.parity import Classifier
from fseft_edge.finetuning.finetune import describe_tuning
from fseft_edge.finetuning.merging import folded_encoder, merge, tuned_network
from fseft_edge.finetuning.settings import TuningMethod, TuningSettings
from fseft_edge.finetuning.training import FineTuned, TunedNetwork
from fseft_edge.finetuning.tuning_file import TuningFile, read_tuning, write_tuning
from fseft_edge.runtime.encoder.bundle import EncoderBundle, ParityReport
from fseft_edge.runtime.encoder.networks import build_network
from fseft_edge.runtime.encoder.session import open_session
from fseft_edge.runtime.errors import AdapterError, UsageError
from fseft_edge.runtime.scans.nifti import read_label_map
from fseft_edge.runtime.scans.organs import OrganLabel
from fseft_edge.runtime.system.progress import SilentProgress
from fseft_edge.segmentation.segment import segment


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> TuningSite:
    return tuning_site(tmp_path_factory.mktemp("site"))


@pytest.fixture(scope="module")
def tuned(site: TuningSite) -> dict[str, Path]:
    """Tunings of the tiny encoder, by method."""
    paths = {}
    for method in FOR_A_UNET:
        paths[method] = site.root / f"{method}.tuning"
        site.finetune(TuningSettings(method, "new" if method == "lora" else None, rate=1e-2, **SHORT), paths[method])
    return paths


@pytest.mark.parametrize("method", FOR_A_UNET)
def test_a_merged_encoder_equals_the_tuned_encoder(
    site: TuningSite, tuned: dict[str, Path], tmp_path: Path, method: TuningMethod
) -> None:
    file = read_tuning(tuned[method])
    network = tuned_network(file, site.bundle, tuned[method])
    merged = merge(tuned[method], tmp_path / "merged.encoder", encoder=site.bundle.path, onnx=False)
    windows = torch.rand(1, 1, *WINDOW)
    with torch.no_grad(), open_session(merged.bundle, "cpu", "torch") as session:
        expected, found = network.encoder(windows), session.encode(windows)
    for one, other in zip(expected, found, strict=True):
        assert float((one - other).abs().max() / one.abs().max()) <= 1e-5
    described = read_adapter(merged.adapter).description
    annotations = [annotation_hash(labels, [LIVER, SPLEEN]) for _, labels in site.support().annotated]
    assert list(described.support_annotations) == list(file.description.support_annotations) == annotations
    adapter = read_adapter(merged.adapter).adapter
    assert all(torch.equal(value, adapter.state_dict()[name]) for name, value in network.head.state_dict().items())
    assert merged.bundle.manifest.organs == ()
    assert merged.bundle.encoder_id != site.bundle.encoder_id


def write_random_tuning(site: TuningSite, settings: TuningSettings, path: Path) -> None:
    """Write a tuning with random values of all trained parameters, which needs no training."""
    torch.manual_seed(0)
    network = TunedNetwork(site.bundle.network(), 2, settings)
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn_like(parameter))
    tuned = FineTuned(network.eval(), (1.0,), 2, bfloat16=False)
    write_tuning(path, describe_tuning(tuned, site.support(), settings, *OrganScores(2).summary()))


@pytest.mark.parametrize("method", ["lora", "adaptformer", "compacter"])
def test_a_merged_transformer_equals_the_tuned_one_and_gradients_reach_all_new_parameters(
    site: TuningSite, tmp_path: Path, method: TuningMethod
) -> None:
    encoder = build_network("swin_unetr", feature_size=12).eval()
    contents = small_contents(
        network=encoder,
        architecture="swin_unetr",
        settings={"feature_size": 12},
        window=(64, 64, 64),
        organs=(),
        head_weight=torch.zeros(0, 12),
        head_bias=torch.zeros(0),
    )
    swin = TuningSite(site.root, EncoderBundle.write(tmp_path / "swin.encoder", contents))
    if method == "lora":  # training takes half a minute, so only one method is really trained
        swin.finetune(TuningSettings(method, **{**SHORT, "crop": 64, "rate": 1e-2}), tmp_path / "s.tuning")
    else:
        write_random_tuning(swin, TuningSettings(method), tmp_path / "s.tuning")
    tuned = tuned_network(read_tuning(tmp_path / "s.tuning"), swin.bundle, tmp_path / "s.tuning")
    merged = merge(tmp_path / "s.tuning", tmp_path / "m.encoder", encoder=swin.bundle.path, onnx=False)
    adapter, windows = read_adapter(merged.adapter).adapter, torch.rand(1, 1, 64, 32, 32)
    with torch.no_grad():
        before, expected = encoder(windows), tuned.encoder(windows)
        found = merged.bundle.network()(windows)
        assert torch.equal(adapter.of_maps(expected), tuned(windows))
    tuned(windows).square().mean().backward()
    assert all(
        parameter.grad is not None and parameter.grad.any()
        for name, parameter in tuned.encoder.named_parameters()
        if name in tuned.added
    )
    for level, (one, other) in enumerate(zip(expected, found, strict=True)):
        assert float((one - other).abs().max() / one.abs().max()) <= 1e-5
        assert not torch.allclose(one, before[level], rtol=1e-3, atol=1e-4), level
    assert merged.bundle.manifest.settings.get("inserts") == (None if method == "lora" else method)


def test_a_merged_encoder_segments_with_the_adapter_beside_it(
    site: TuningSite, tuned: dict[str, Path], tmp_path: Path
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


def test_a_merged_encoder_with_the_name_of_the_adapter_is_preferred(
    site: TuningSite, tuned: dict[str, Path], tmp_path: Path
) -> None:
    for name in ("a", "b", "c"):
        merged = merge(tuned["bitfit"], tmp_path / f"{name}.encoder", encoder=site.bundle.path, onnx=False)
    encoder_id = merged.bundle.encoder_id
    assert find_encoder(tmp_path / "b.adapter", encoder_id, "tiny") == tmp_path / "b.encoder"
    (tmp_path / "b.adapter").rename(tmp_path / "other.adapter")
    assert find_encoder(tmp_path / "other.adapter", encoder_id, "tiny") == tmp_path / "a.encoder"


def test_folding_does_not_change_the_tuned_network(site: TuningSite, tuned: dict[str, Path]) -> None:
    network = tuned_network(read_tuning(tuned["lora"]), site.bundle, tuned["lora"])
    names = set(network.encoder.state_dict())
    assert set(folded_encoder(network.encoder).state_dict()) == set(site.bundle.network().state_dict())
    assert set(network.encoder.state_dict()) == names


def test_a_tuning_describes_its_training(site: TuningSite, tuned: dict[str, Path]) -> None:
    described = read_tuning(tuned["affine"]).description
    assert (described.method, described.decoder, described.shots, described.steps) == ("affine", "frozen", 2, 2)
    assert described.encoder_id == site.bundle.encoder_id
    assert described.parameters == parameters_in(read_tuning(tuned["affine"]).tensors)
    voxel_ml = np.prod(SPACING) / 1000
    labels = [read_label_map(path).array for path in sorted((site.root / "labels").iterdir())]
    volumes = [float((one == LIVER.label).sum() * voxel_ml) for one in labels]
    assert described.organs[0].support_volumes_ml == pytest.approx(volumes, abs=1e-3)
    assert len(described.organs[0].support_hu) == 2


def test_equal_tunings_give_equal_bytes(site: TuningSite, tuned: dict[str, Path], tmp_path: Path) -> None:
    site.finetune(TuningSettings("bitfit", rate=1e-2, **SHORT), tmp_path / "again.tuning")
    assert (tmp_path / "again.tuning").read_bytes() == tuned["bitfit"].read_bytes()


def test_methods_with_few_parameters_write_small_files(tuned: dict[str, Path]) -> None:
    sizes = {method: sum(value.numel() for value in load_file(path).values()) for method, path in tuned.items()}
    assert max(sizes["affine"], sizes["bitfit"]) < 0.05 * sizes["full"]


def test_a_tuning_of_another_encoder_is_refused(site: TuningSite, tuned: dict[str, Path], tmp_path: Path) -> None:
    other = write_tiny_encoder(tmp_path / "other.encoder", seed=1)
    with refused(AdapterError, tuned["full"], other.path):
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
def test_a_damaged_tuning_is_refused(site: TuningSite, tuned: dict[str, Path], tmp_path: Path, kind: str) -> None:
    if kind != "missing":
        damaged(tmp_path / "bad.tuning", kind, tuned["affine"])
    with refused(AdapterError, "bad.tuning"):
        merge(tmp_path / "bad.tuning", tmp_path / "out.encoder", encoder=site.bundle.path)
    assert not (tmp_path / "out.encoder").exists()


def test_a_tuning_instead_of_an_adapter_is_recognised(site: TuningSite, tuned: dict[str, Path], tmp_path: Path) -> None:
    with refused(AdapterError, tuned["bitfit"]) as caught:
        read_adapter(tuned["bitfit"])
    assert "fseft-edge merge" in caught.value.remedy


@pytest.mark.parametrize("name", [".", "p", "p.v2", "p.adapter"])
def test_the_name_of_a_bundle_must_end_in_encoder(
    site: TuningSite, tuned: dict[str, Path], tmp_path: Path, name: str
) -> None:
    with refused(UsageError, tmp_path / name, ".encoder"):
        merge(tuned["bitfit"], tmp_path / name, encoder=site.bundle.path)
    assert list(tmp_path.iterdir()) == []


def test_existing_files_are_not_replaced(site: TuningSite, tuned: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "a.adapter").touch()
    with refused(UsageError, tmp_path / "a.adapter"):
        merge(tuned["full"], tmp_path / "a.encoder", encoder=site.bundle.path)


def test_an_interrupted_merge_leaves_no_files(
    site: TuningSite, tuned: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("fseft_edge.finetuning.merging.write_adapter", interrupted)
    with pytest.raises(KeyboardInterrupt):
        merge(tuned["bitfit"], tmp_path / "a.encoder", encoder=site.bundle.path, onnx=False)
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_merge_keeps_the_bundle_of_another_process(
    site: TuningSite, tuned: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def overtaken(*arguments: object, **named: object) -> None:
        (tmp_path / "a.encoder").mkdir()
        raise KeyboardInterrupt

    monkeypatch.setattr("fseft_edge.finetuning.merging.write_encoder", overtaken)
    with pytest.raises(KeyboardInterrupt):
        merge(tuned["bitfit"], tmp_path / "a.encoder", encoder=site.bundle.path, onnx=False)
    assert [path.name for path in tmp_path.iterdir()] == ["a.encoder"]


def test_a_lower_precision_is_compared_by_the_masks_of_the_adapter(
    site: TuningSite, tuned: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Classifier] = []

    def recorded(*arguments: Any, classify: Classifier, **named: Any) -> list[ParityReport]:
        asked.append(classify)
        return []

    monkeypatch.setattr("fseft_edge.export.export.parity_reports", recorded)
    merged = merge(tuned["affine"], tmp_path / "a.encoder", encoder=site.bundle.path)
    adapter = read_adapter(merged.adapter).adapter
    with torch.no_grad(), open_session(merged.bundle, "cpu", "torch") as session:
        levels = session.encode(torch.rand(1, 1, *WINDOW))
        assert torch.allclose(torch.sigmoid(asked[0](levels)), torch.sigmoid(adapter.of_maps(levels)), atol=1e-5)


def test_an_organ_with_a_volume_of_zero_is_described(site: TuningSite, tmp_path: Path) -> None:
    support = site.support()
    speck = replace(support, volumes_ml=[[0.0, volumes[1]] for volumes in support.volumes_ml])
    settings = TuningSettings("bitfit", **SHORT)
    tuned = speck.tuned(settings, [0, 1], SilentProgress())
    described = describe_tuning(tuned, speck, settings, *OrganScores(2).summary()).description
    assert described.organs[0].support_volumes_ml == (0.0, 0.0)


def test_more_than_31_organs_are_refused(site: TuningSite, tmp_path: Path) -> None:
    organs = [OrganLabel(f"organ_{number}", number) for number in range(1, 33)]
    with refused(UsageError, "31", "32"):
        site.finetune(TuningSettings("bitfit", **SHORT), tmp_path / "a.tuning", organs)
