"""Every kind of encoder that can be exported: adaptation to an organ and segmentation of a scan."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from doubles.encoder import WINDOW, label_of, write_case
from doubles.errors import refused
from doubles.own_network import make_network
from doubles.releases import (
    FEATURE_SIZE,
    RELEASES,
    WIDTH,
    AuthorsUnet,
    Release,
    authors_swin,
    authors_unet,
    prefixed,
    pretext_heads,
    transformer,
)

from fseft_edge import AdapterSettings, OrganLabel, TrainingSettings, adapt, export_encoder, segment
from fseft_edge.adaptation.adapt import zero_shot_adapter
from fseft_edge.adapters.file import write_adapter
from fseft_edge.export.onnx_graph import write_graph
from fseft_edge.export.zoo import MODELS
from fseft_edge.runtime.encoder.backends.onnxruntime import GraphRunner
from fseft_edge.runtime.encoder.backends.openvino import CompiledGraph
from fseft_edge.runtime.encoder.bundle import EncoderBundle
from fseft_edge.runtime.encoder.networks.swin_unetr import SwinUnetrFeatures
from fseft_edge.runtime.errors import LabelError
from fseft_edge.runtime.scans.nifti import read_label_map
from fseft_edge.runtime.scans.preprocessing import Preprocessing

SWIN_WINDOW = (64, 32, 32)
ONE_EACH = {release.model: release for release in reversed(RELEASES.values())}  # the first layout of each model
SPACING = 12.0  # with this voxel spacing, a phantom fits into one window
LIVER = OrganLabel("liver", label_of("liver"))
SHORT = TrainingSettings(seed=0, block=16, batch=2, linear_blocks=4, variations=0)


@pytest.fixture
def coarse(monkeypatch: pytest.MonkeyPatch) -> None:
    """The published models with fewer channels and with the grid of the phantoms."""
    for name, spec in MODELS.items():
        if spec.published is None:
            continue
        is_unet = spec.published.architecture == "genesis_unet"
        small = {
            "settings": {"width": WIDTH} if is_unet else {"feature_size": FEATURE_SIZE},
            "window": WINDOW if is_unet else SWIN_WINDOW,
            "preprocessing": Preprocessing(spacing=(SPACING,) * 3),
        }
        monkeypatch.setitem(MODELS, name, replace(spec, published=spec.published.model_copy(update=small)))


def published(release: Release, folder: Path, *, onnx: bool = False) -> EncoderBundle:
    """Export the encoder of a release."""
    network = (authors_unet if release.model == "suprem_unet" else authors_swin)(release.classes or 1)
    state = network.state() if isinstance(network, AuthorsUnet) else dict(network.state_dict())
    torch.save(release.content(state), folder / "c.pth")
    return export_encoder(folder / "c.pth", model=release.model, output=folder / "e.encoder", onnx=onnx)


def self_supervised(folder: Path) -> EncoderBundle:
    weights = transformer(authors_swin(1).state_dict()) | pretext_heads(16 * FEATURE_SIZE)
    torch.save({"state_dict": prefixed("module.", weights)}, folder / "c.pth")
    return export_encoder(folder / "c.pth", model="selfsup", output=folder / "e.encoder", onnx=False)


def own(folder: Path) -> EncoderBundle:
    torch.save(make_network().state_dict(), folder / "own.pt")
    (folder / "own.toml").write_text(
        'name = "own"\nfactory = "doubles.own_network:make_network"\n'
        'window = [32, 32, 32]\nlevels = ["last", "middle", "deep"]\nclassifier = "score"\n'
        'organs = ["liver", "spleen"]\n[preprocessing]\nspacing = [12.0, 12.0, 12.0]\n',
        encoding="utf-8",
    )
    return export_encoder(
        folder / "own.pt", model="custom", output=folder / "e.encoder", description=folder / "own.toml"
    )


@pytest.mark.usefixtures("coarse")
@pytest.mark.parametrize(
    "export",
    [self_supervised, own, *(partial(published, release) for release in ONE_EACH.values())],
    ids=["selfsup", "own", *ONE_EACH],
)
def test_encoder_is_adapted_and_segments(export: Callable[[Path], EncoderBundle], tmp_path: Path) -> None:
    bundle = export(tmp_path)
    parts = {name.partition(".")[0] for name in SwinUnetrFeatures(FEATURE_SIZE).state_dict()} - {"swinViT"}
    assert set(bundle.manifest.untrained) == (parts if bundle.manifest.name == "selfsup" else set())
    write_case(tmp_path / "support", "case_1", 1)
    image, _ = write_case(tmp_path / "query", "case_2", 2)
    adapt(
        bundle.path,
        tmp_path / "support" / "images",
        tmp_path / "support" / "labels",
        [LIVER],
        tmp_path / "liver.adapter",
        settings=AdapterSettings(method="linear", levels="all"),
        training=SHORT,
        validate=False,
        device="cpu",
    )
    (case,) = segment(
        [image],
        [tmp_path / "liver.adapter"],
        tmp_path / "masks",
        encoder=bundle.path,
        device="cpu",
    )
    mask = read_label_map(tmp_path / "masks" / "case_2.nii.gz")
    assert mask.array.any()
    assert case.organs[0].volume_ml > 0
    if "liver" in bundle.manifest.organs:
        write_adapter(tmp_path / "zero.adapter", zero_shot_adapter(bundle, [LIVER]))
        segment([image], [tmp_path / "zero.adapter"], tmp_path / "zero", encoder=bundle.path, device="cpu")
        assert (tmp_path / "zero" / "case_2.nii.gz").exists()
    else:
        with refused(LabelError, "liver"):
            zero_shot_adapter(bundle, [LIVER])


@pytest.mark.usefixtures("coarse")
def test_the_graphs_of_a_published_unet_compute_its_features(tmp_path: Path) -> None:
    parity = published(ONE_EACH["suprem_unet"], tmp_path, onnx=True).manifest.parity
    assert {"onnxruntime", "openvino"} <= parity.keys()
    for name in ("onnxruntime", "openvino"):
        assert len(parity[name].relative_error) == 4
        assert parity[name].shortcoming is None


@pytest.mark.usefixtures("coarse")
def test_the_graph_of_a_published_swin_unetr_computes_its_features(tmp_path: Path) -> None:
    """The graph has the full depth; the other tests of SwinUNETR export the blocks of the first stage only."""
    network = published(ONE_EACH["btcv"], tmp_path).network().eval()
    graph = tmp_path / "encoder.onnx"
    write_graph(network, SWIN_WINDOW, graph)
    windows = torch.rand(1, 1, *SWIN_WINDOW, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = network(windows)
    assert len(expected) == 5
    for engine in (GraphRunner(graph, torch.device("cpu"), 1), CompiledGraph(graph, 1, "float32")):
        for wanted, level in zip(expected, engine(windows), strict=True):
            assert float((wanted - level).abs().max()) <= 1e-4 * float(wanted.abs().max())
