"""Networks of the user's own: exported as a graph, run from it, and never imported again."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

import pytest
import torch
from doubles import own_network
from doubles.own_network import make_network
from torch import Tensor

from fseft_edge.export.export import export_encoder
from fseft_edge.export.imported import import_model
from fseft_edge.runtime.encoder.backend_choice import backend_choices
from fseft_edge.runtime.encoder.bundle import EncoderBundle
from fseft_edge.runtime.encoder.encoding_plan import encoding_of
from fseft_edge.runtime.encoder.networks.base import FeatureLevel
from fseft_edge.runtime.encoder.session import open_session
from fseft_edge.runtime.encoder.windows import WindowLayout
from fseft_edge.runtime.errors import CheckpointError, EncoderBundleError, InputError, UnreadableFileError, UsageError

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
    """Write a description, and weights beside it."""
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


def test_bundle_says_what_the_description_says(bundle: EncoderBundle) -> None:
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
def test_features_are_the_networks_and_its_code_is_not_imported(
    bundle: EncoderBundle, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    reference, before = expected(), len(own_network.CALLS)
    monkeypatch.setitem(sys.modules, "doubles.own_network", None)  # importing it now is an error
    opened = EncoderBundle.open(bundle.path)
    with open_session(opened, "cpu", backend, 1) as session:
        features = session.encode(windows())
        layout = WindowLayout.plan((40, 40, 40), opened.window, 4)
        assert encoding_of(layout, opened, session).activations >= 4 * 16**3 * 4
    assert len(own_network.CALLS) == before
    for a, b in zip(reference, features, strict=True):
        assert float((a - b).abs().max()) <= 1e-5 * float(a.abs().max())


def test_pytorch_is_refused_with_the_reason(bundle: EncoderBundle) -> None:
    with pytest.raises(
        EncoderBundleError, match=r"make_network, which is code that no bundle holds or calls.*onnxruntime"
    ):
        bundle.network()
    with pytest.raises(EncoderBundleError, match="runs from its ONNX graph"):
        open_session(bundle, "cpu", "torch")
    (choice,) = backend_choices(bundle, torch.device("cpu"), "torch")
    assert "only its ONNX graph is there" in str(choice.obstacle)


def test_memory_of_the_graph_is_near_what_its_tensors_take(bundle: EncoderBundle) -> None:
    # At the last concatenation: the stem's 4 channels, the middle's 8 upsampled, both side by side, and the coarser
    # levels, which are outputs.
    least = 4 * 16**3 * (4 + 8 + 12 + 8 / 8 + 12 / 64)
    assert least <= int(str(bundle.manifest.settings["activation_bytes"])) <= 1.5 * least


def test_network_may_return_its_pyramid_itself_and_have_no_head(tmp_path: Path) -> None:
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
    ("old", "new", "message"),
    [
        ('organs = ["liver", "spleen"]\n', "", r"own\.toml: organs: Field required"),
        ('classifier = "score"\n', "", "'classifier' and 'organs' belong together"),
        ("window = [16", "windows = [1, 1, 1]\nwindow = [16", r"own\.toml: windows: Extra inputs are not permitted"),
        ("window = [16", "window = [1", r"window: the network fails on one of \[1, 16, 16\]"),
        ("axcodes =", "axes =", r"preprocessing\.axes"),
        ('["liver", "spleen"]', '["liver", "liver"]', "names one twice"),
        ("doubles.own_network:make_network", "make_network", "factory: String should match"),
        ("doubles.own_network:make_network", "no_such_package:make", r"cannot be imported.*PYTHONPATH"),
        ("doubles.own_network:make_network", "doubles.own_network:no_such", "cannot be imported"),
        (
            "doubles.own_network:make_network",
            "doubles.own_network:make_nothing",
            r"settings: .*fails with them \(TypeError",
        ),
        ("width = 4", "depth = 4", r"settings: .*fails with them \(TypeError"),
        ("[settings]\nwidth = 4\n", "", None),
        ('"middle"', '"centre"', r"no submodule 'centre'.*stem"),
        ('["last", "middle", "deep"]', '["last", "deep"]', r"level 1 .* is \[1, 12, 4, 4, 4\], not \[1, C, 8, 8, 8\]"),
        ('["last", "middle", "deep"]', "[]", r"level 0 .* is \[2, 16, 16, 16\], not \[1, C, 16, 16, 16\]"),
        ('classifier = "score"', 'classifier = "last"', "'last' is no 1x1x1 convolution"),
    ],
)
def test_wrong_description_says_what_is_wrong(tmp_path: Path, old: str, new: str, message: str | None) -> None:
    assert old in DESCRIPTION
    description, weights = write(tmp_path, DESCRIPTION.replace(old, new))
    if message is None:
        import_model(description, weights)
        return
    with pytest.raises(InputError, match=message) as caught:
        import_model(description, weights)
    assert caught.value.exit_code == 3


def test_factory_that_returns_no_network_is_refused(tmp_path: Path) -> None:
    text = DESCRIPTION.replace(":make_network", ":make_nothing").replace("[settings]\nwidth = 4\n", "")
    with pytest.raises(InputError, match=r"returns a str, not a torch\.nn\.Module"):
        import_model(*write(tmp_path, text))


def test_factory_that_fails_is_quoted(tmp_path: Path) -> None:
    text = DESCRIPTION.replace(":make_network", ":make_stubborn").replace("[settings]\nwidth = 4\n", "")
    with pytest.raises(InputError, match=r"fails with them \(ValueError: not today\)"):
        import_model(*write(tmp_path, text))


def test_network_that_no_graph_can_say_is_refused_and_nothing_is_left(tmp_path: Path) -> None:
    text = DESCRIPTION.replace(":make_network", ":make_undecided").replace("[settings]\nwidth = 4\n", "")
    text = text.replace('levels = ["last", "middle", "deep"]\nclassifier = "score"\n', "")
    description, weights = write(tmp_path, text.replace('organs = ["liver", "spleen"]', "organs = []"))
    torch.save(own_network.make_undecided().state_dict(), weights)
    with pytest.raises(InputError, match="cannot be written as an ONNX graph"):
        export_encoder(weights, model="custom", output=tmp_path / "o.encoder", description=description)
    assert not (tmp_path / "o.encoder").exists()


def test_classifier_with_other_rows_than_organs_is_refused(tmp_path: Path) -> None:
    description, weights = write(tmp_path, DESCRIPTION.replace('"spleen"]', '"spleen", "aorta"]'))
    with pytest.raises(CheckpointError, match=r"'score' is \[2, 4\], and .*own\.toml names 3 organs"):
        import_model(description, weights)


def test_weights_of_another_network_are_refused(tmp_path: Path) -> None:
    description, weights = write(tmp_path, DESCRIPTION.replace("width = 4", "width = 6"))
    with pytest.raises(CheckpointError, match="of another shape"):
        import_model(description, weights)


def test_description_that_is_no_toml_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnreadableFileError, match="no readable TOML"):
        import_model(*write(tmp_path, "name = "))


def test_weights_that_would_execute_code_are_refused_here_too(tmp_path: Path) -> None:
    description, weights = write(tmp_path)
    torch.save(make_network(), weights)  # the whole program, as people save it
    with pytest.raises(CheckpointError, match="execute code"):
        import_model(description, weights)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": "btcv"}, "btcv is a model that is known"),
        ({"model": "custom", "checkpoint": None}, "needs its weights"),
        ({"model": "custom", "onnx": False}, "runs from its ONNX graph alone"),
    ],
)
def test_contradictions_are_refused_before_any_code_is_called(
    tmp_path: Path, options: dict[str, object], message: str
) -> None:
    description, weights = write(tmp_path)
    before = len(own_network.CALLS)
    with pytest.raises(UsageError, match=message):
        export_encoder(**{"checkpoint": weights, "output": tmp_path / "o", "description": description, **options})
    assert len(own_network.CALLS) == before


def test_another_graph_is_another_encoder(bundle: EncoderBundle) -> None:
    settings = {**bundle.manifest.settings, "graph_sha256": "0" * 64}
    other = EncoderBundle(bundle.path, bundle.manifest.model_copy(update={"settings": settings}))
    assert other.encoder_id != bundle.encoder_id


def test_export_warns_of_nothing(caplog: pytest.LogCaptureFixture, bundle: EncoderBundle) -> None:
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []
    assert {"onnxruntime", "openvino"} <= bundle.manifest.parity.keys()
    assert bundle.manifest.parity["onnxruntime"].shortcoming is None
