"""Networks of the user's own code: exported as a graph, and run from the graph without importing the code."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from doubles import own_network
from doubles.errors import refused
from doubles.own_network import make_network
from torch import Tensor

from fseft_edge.export.export import export_encoder
from fseft_edge.export.imported import import_model
from fseft_edge.runtime.encoder.backend_choice import backend_choices
from fseft_edge.runtime.encoder.bundle import EncoderBundle
from fseft_edge.runtime.encoder.encoding import encode_scan
from fseft_edge.runtime.encoder.encoding_plan import encoding_of
from fseft_edge.runtime.encoder.feature_store import FeatureStore
from fseft_edge.runtime.encoder.networks.base import FeatureLevel
from fseft_edge.runtime.encoder.on_demand import encode_on_demand
from fseft_edge.runtime.encoder.session import open_session
from fseft_edge.runtime.encoder.windows import WindowLayout
from fseft_edge.runtime.errors import CheckpointError, EncoderBundleError, InputError, UnreadableFileError, UsageError
from fseft_edge.runtime.scans.volume import Volume

WINDOW = (16, 16, 16)
DESCRIPTION = """\
name = "own"
factory = "doubles.own_network:make_network"
window = [16, 16, 16]
levels = ["last", "middle", "deep"]
classifier = "score"
organs = ["liver", "spleen"]

[settings]
width = 4

[preprocessing]
spacing = [6.0, 6.0, 6.0]
hu_window = [-200.0, 300.0]
axcodes = "RAS"
"""


def write(folder: Path, text: str = DESCRIPTION) -> tuple[Path, Path]:
    """Write a description and weights, and return both paths."""
    torch.save({"state_dict": make_network().state_dict()}, folder / "own.pt")
    (folder / "own.toml").write_text(text, encoding="utf-8")
    return folder / "own.toml", folder / "own.pt"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> EncoderBundle:
    folder = tmp_path_factory.mktemp("own")
    description, weights = write(folder)
    output = folder / "own.encoder"
    export_encoder(weights, model="custom", output=output, description=description)
    return EncoderBundle.open(output)


def windows() -> Tensor:
    return torch.rand(3, 1, *WINDOW, generator=torch.Generator().manual_seed(0))


def expected() -> list[Tensor]:
    network = make_network(pyramid=True).eval()
    with torch.no_grad():
        return network(windows())


def test_manifest_contains_the_description(bundle: EncoderBundle) -> None:
    manifest = bundle.manifest
    assert (manifest.name, manifest.organs, manifest.window) == ("own", ("liver", "spleen"), WINDOW)
    assert manifest.preprocessing.hu_window == (-200.0, 300.0)
    assert bundle.levels == (FeatureLevel(1, 4), FeatureLevel(2, 8), FeatureLevel(4, 12))
    assert manifest.settings["factory"] == "doubles.own_network:make_network"
    assert manifest.settings["graph_sha256"] == manifest.files["encoder.onnx"]
    assert bundle.mixed_graph is None
    score = make_network().get_submodule("score")
    assert torch.equal(bundle.head_weight(), score.weight.flatten(1))
    assert torch.equal(bundle.head_bias(), score.bias)


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino", "auto"])
def test_features_equal_the_networks_features_and_its_code_is_not_imported(
    bundle: EncoderBundle, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    reference, before = expected(), len(own_network.CALLS)
    monkeypatch.setitem(sys.modules, "doubles.own_network", None)  # an import of this module now fails
    opened = EncoderBundle.open(bundle.path)
    with open_session(opened, "cpu", backend, 1) as session:
        features = session.encode(windows())
        layout = WindowLayout.plan((40, 40, 40), opened.window, 4)
        assert encoding_of(layout, opened, session).activations >= 4 * 16**3 * 4
    assert len(own_network.CALLS) == before
    for a, b in zip(reference, features, strict=True):
        assert float((a - b).abs().max()) <= 1e-5 * float(a.abs().max())


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_windows_that_are_encoded_on_demand_give_the_features_of_the_whole_scan(
    bundle: EncoderBundle, tmp_path: Path, backend: str
) -> None:
    hu = np.random.default_rng(0).integers(-300, 400, (40, 30, 20), dtype=np.int16)
    volume = Volume(hu, np.diag([6.0, 6.0, 6.0, 1.0]))
    with open_session(bundle, "cpu", backend, 1) as session:
        whole = encode_scan(volume, bundle=bundle, session=session, store=FeatureStore(tmp_path / "whole")).features
        scan = encode_on_demand(volume, bundle=bundle, session=session, store=FeatureStore(tmp_path / "parts"))
        for box in (((30, 38), (2, 9), (0, 3)), ((3, 14), (10, 13), (14, 17))):
            assert torch.equal(scan.features.read(0, *box), whole.read(0, *box))


def test_pytorch_is_refused(bundle: EncoderBundle) -> None:
    with refused(EncoderBundleError, "doubles.own_network:make_network") as caught:
        bundle.network()
    assert "onnxruntime" in caught.value.remedy
    with refused(EncoderBundleError, "doubles.own_network:make_network"):
        open_session(bundle, "cpu", "torch")
    (choice,) = backend_choices(bundle, torch.device("cpu"), "torch")
    assert not choice.usable


def test_predicted_memory_of_the_graph_is_close_to_the_size_of_its_tensors(bundle: EncoderBundle) -> None:
    # Memory peaks at the last concatenation: the stem's 4 channels, the middle's 8 channels upsampled, both
    # concatenated, and the coarser levels, which are outputs.
    least = 4 * 16**3 * (4 + 8 + 12 + 8 / 8 + 12 / 64)
    assert least <= int(str(bundle.manifest.settings["activation_bytes"])) <= 1.5 * least


def test_network_may_return_its_pyramid_and_have_no_head(tmp_path: Path) -> None:
    text = DESCRIPTION.replace('levels = ["last", "middle", "deep"]\nclassifier = "score"\n', "")
    text = text.replace('organs = ["liver", "spleen"]', "organs = []").replace("width = 4", "width = 4\npyramid = true")
    loaded = import_model(*write(tmp_path, text))
    assert loaded.network is not None
    with torch.no_grad():
        features = loaded.network(windows())
    assert all(torch.equal(a, b) for a, b in zip(expected(), features, strict=True))
    assert loaded.model.head_weight.shape == (0, 4)
    assert loaded.model.description.organs == ()


@pytest.mark.parametrize(
    ("old", "new", "named"),
    [
        ('organs = ["liver", "spleen"]\n', "", ["organs"]),
        ('classifier = "score"\n', "", ["classifier", "organs"]),
        ("window = [16", "windows = [1, 1, 1]\nwindow = [16", ["windows"]),
        ("window = [16", "window = [1", [[1, 16, 16]]),
        ("axcodes =", "axes =", ["preprocessing.axes"]),
        ('["liver", "spleen"]', '["liver", "liver"]', ["organs"]),
        ("doubles.own_network:make_network", "make_network", ["factory"]),
        ("doubles.own_network:make_network", "no_such_package:make", ["no_such_package:make"]),
        ("doubles.own_network:make_network", "doubles.own_network:no_such", ["doubles.own_network:no_such"]),
        ("doubles.own_network:make_network", "doubles.own_network:make_nothing", ["settings", "TypeError"]),
        ("width = 4", "depth = 4", ["settings", "TypeError"]),
        ('"middle"', '"centre"', ["levels", "centre"]),
        ('["last", "middle", "deep"]', '["last", "deep"]', ["level 1", [1, 12, 4, 4, 4], "[1, C, 8, 8, 8]"]),
        ('["last", "middle", "deep"]', "[]", ["level 0", [2, 16, 16, 16], "[1, C, 16, 16, 16]"]),
        ('classifier = "score"', 'classifier = "last"', ["classifier", "last"]),
    ],
)
def test_wrong_description_is_refused(tmp_path: Path, old: str, new: str, named: list[object]) -> None:
    assert old in DESCRIPTION
    description, weights = write(tmp_path, DESCRIPTION.replace(old, new))
    with refused(InputError, description, *named) as caught:
        import_model(description, weights)
    assert caught.value.exit_code == 3


def test_settings_may_be_left_out(tmp_path: Path) -> None:
    import_model(*write(tmp_path, DESCRIPTION.replace("[settings]\nwidth = 4\n", "")))


def test_factory_that_does_not_return_a_network_is_refused(tmp_path: Path) -> None:
    text = DESCRIPTION.replace(":make_network", ":make_nothing").replace("[settings]\nwidth = 4\n", "")
    with refused(InputError, "own.toml", "doubles.own_network:make_nothing", "str", "torch.nn.Module"):
        import_model(*write(tmp_path, text))


def test_error_of_a_factory_is_quoted(tmp_path: Path) -> None:
    text = DESCRIPTION.replace(":make_network", ":make_stubborn").replace("[settings]\nwidth = 4\n", "")
    with refused(InputError, "own.toml", "doubles.own_network:make_stubborn", "ValueError: not today"):
        import_model(*write(tmp_path, text))


def test_network_that_cannot_be_exported_is_refused_and_no_files_are_left(tmp_path: Path) -> None:
    text = DESCRIPTION.replace(":make_network", ":make_undecided").replace("[settings]\nwidth = 4\n", "")
    text = text.replace('levels = ["last", "middle", "deep"]\nclassifier = "score"\n', "")
    description, weights = write(tmp_path, text.replace('organs = ["liver", "spleen"]', "organs = []"))
    torch.save(own_network.make_undecided().state_dict(), weights)
    with refused(InputError, "ONNX"):
        export_encoder(weights, model="custom", output=tmp_path / "o.encoder", description=description)
    assert not (tmp_path / "o.encoder").exists()


def test_classifier_with_other_rows_than_organs_is_refused(tmp_path: Path) -> None:
    description, weights = write(tmp_path, DESCRIPTION.replace('"spleen"]', '"spleen", "aorta"]'))
    with refused(CheckpointError, "score", [2, 4], "own.toml", 3):
        import_model(description, weights)


def test_weights_of_another_network_are_refused(tmp_path: Path) -> None:
    description, weights = write(tmp_path, DESCRIPTION.replace("width = 4", "width = 6"))
    with refused(CheckpointError, weights, "stem.0.weight"):
        import_model(description, weights)


def test_description_that_is_not_toml_is_refused(tmp_path: Path) -> None:
    with refused(UnreadableFileError, "own.toml"):
        import_model(*write(tmp_path, "name = "))


def test_weights_file_with_code_is_refused(tmp_path: Path) -> None:
    description, weights = write(tmp_path)
    torch.save(make_network(), weights)  # saves the whole module instead of its state dict
    with refused(CheckpointError, weights):
        import_model(description, weights)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"model": "btcv"}, ["--description", "btcv"]),
        ({"model": "custom", "checkpoint": None}, ["own.toml"]),
        ({"model": "custom", "onnx": False}, ["--no-onnx"]),
    ],
)
def test_contradicting_options_are_refused_before_any_code_is_called(
    tmp_path: Path, options: dict[str, object], named: list[str]
) -> None:
    description, weights = write(tmp_path)
    before = len(own_network.CALLS)
    with refused(UsageError, *named):
        export_encoder(**{"checkpoint": weights, "output": tmp_path / "o", "description": description, **options})
    assert len(own_network.CALLS) == before


def test_another_graph_gives_another_encoder_id(bundle: EncoderBundle) -> None:
    settings = {**bundle.manifest.settings, "graph_sha256": "0" * 64}
    other = EncoderBundle(bundle.path, bundle.manifest.model_copy(update={"settings": settings}))
    assert other.encoder_id != bundle.encoder_id


def test_export_logs_no_warnings(caplog: pytest.LogCaptureFixture, bundle: EncoderBundle) -> None:
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []
    assert {"onnxruntime", "openvino"} <= bundle.manifest.parity.keys()
    assert bundle.manifest.parity["onnxruntime"].shortcoming is None
