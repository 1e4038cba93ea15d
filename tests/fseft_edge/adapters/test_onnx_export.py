"""Encoder and adapter as one ONNX graph: what it computes, what it says of itself, what is refused."""

from __future__ import annotations

import json
import re
import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import onnx
import pytest
import torch
from doubles.encoder import SPACING, WINDOW, scan, write_random_adapter, write_tiny_encoder
from doubles.repository import ROOT
from numpy.typing import NDArray
from torch import Tensor

from fseft_edge._version import __version__
from fseft_edge.adaptation.adapt import head_rows, zero_shot_adapter
from fseft_edge.adapters.file import AdapterFile, read_adapter, stored_settings
from fseft_edge.adapters.file import write_adapter as save_adapter
from fseft_edge.adapters.network import Activation, Adapter, AdapterSettings, Levels, Method
from fseft_edge.adapters.onnx_export import GATE, export_adapter
from fseft_edge.evaluation.metrics import dice
from fseft_edge.export.export import export_encoder
from fseft_edge.export.onnx_graph import OPSET
from fseft_edge.masks.prediction import predict_sections, segment_encoded
from fseft_edge.phantom import phantom
from fseft_edge.runtime.encoder.backends.onnxruntime import GraphRunner
from fseft_edge.runtime.encoder.bundle import EncoderBundle
from fseft_edge.runtime.encoder.encoding import EncodedScan, encode_scan
from fseft_edge.runtime.encoder.feature_store import FeatureStore
from fseft_edge.runtime.encoder.session import open_session
from fseft_edge.runtime.errors import AdapterError, InputError, ParityError, UsageError
from fseft_edge.runtime.scans.nifti import read_ct, read_label_map
from fseft_edge.runtime.scans.organs import OrganLabel
from fseft_edge.runtime.scans.volume import Volume

ORGANS = ("liver", "spleen")
# Every method and every set of levels with either activation, which is the graph's last step.
KINDS: list[tuple[Method, Levels, Activation]] = [
    ("linear", "finest", "sigmoid"),
    ("linear", "all", "softmax"),
    ("pointwise", "finest", "softmax"),
    ("pointwise", "all", "sigmoid"),
    ("spatial", "finest", "softmax"),
    ("spatial", "all", "sigmoid"),
    ("spatial", "all", "softmax"),
]
SPATIAL = AdapterSettings("spatial", "all", "softmax", width=4)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> EncoderBundle:
    return write_tiny_encoder(tmp_path_factory.mktemp("encoder") / "tiny.encoder")


def write_adapter(path: Path, bundle: EncoderBundle, settings: AdapterSettings = SPATIAL) -> AdapterFile:
    """Write an adapter with random weights, of a size at which rounding errors stay small."""
    return write_random_adapter(path, bundle, ORGANS, settings=settings, deviation=0.2, support_volumes_ml=(12.5,))


def one_window() -> Volume:
    """Return a part of a trunk that is one window of the encoder exactly."""
    volume = scan(1).volume
    part = tuple(slice(start, start + size) for start, size in zip((16, 8, 12), WINDOW, strict=True))
    assert volume.spacing == SPACING
    return Volume(np.ascontiguousarray(volume.array[part]), volume.affine)


def own_result(volume: Volume, bundle: EncoderBundle, file: AdapterFile, cache: Path) -> NDArray[np.float32]:
    """Return what the toolkit computes, ``[classes, X, Y, Z]`` on the grid."""
    with open_session(bundle, device="cpu", backend="torch") as session:
        encoded = encode_scan(volume, bundle=bundle, session=session, store=FeatureStore(cache), storage="float32")
    return whole(encoded, file)


def whole(encoded: EncodedScan, file: AdapterFile) -> NDArray[np.float32]:
    return np.concatenate([section for _, section in predict_sections(encoded, [file.adapter])], axis=3)


def run(graph: Path, windows: Tensor) -> Tensor:
    (probabilities,) = GraphRunner(graph, torch.device("cpu"), 1)(windows)
    return probabilities


@pytest.mark.parametrize(("method", "levels", "activation"), KINDS)
def test_a_scan_of_one_window_gives_what_the_toolkit_gives(
    bundle: EncoderBundle, tmp_path: Path, method: Method, levels: Levels, activation: Activation
) -> None:
    settings = AdapterSettings(method, levels, activation, width=4)
    file = write_adapter(tmp_path / "a.adapter", bundle, settings)
    graph = export_adapter(tmp_path / "a.adapter", tmp_path / "a.onnx", encoder=bundle.path)
    assert graph.organs == ORGANS
    assert graph.difference is not None
    assert graph.difference <= GATE
    volume = one_window()
    expected = own_result(volume, bundle, file, tmp_path / "cache")
    assert expected.shape == (len(ORGANS) + (activation == "softmax"), *WINDOW)
    assert np.ptp(expected) > 0.5  # a flat result would agree with anything
    low, high = bundle.preprocessing.hu_window
    window = torch.from_numpy(((volume.array.astype(np.float32) - low) / (high - low)).clip(0, 1))[None, None]
    probabilities = run(graph.path, window)[0].numpy()
    assert float(np.abs(probabilities - expected).max()) <= 1e-5


@pytest.fixture(scope="module")
def exported(bundle: EncoderBundle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A spatial softmax adapter beside its encoder, and its graph."""
    folder = tmp_path_factory.mktemp("exported")
    write_tiny_encoder(folder / "tiny.encoder")
    write_adapter(folder / "a.adapter", bundle)
    export_adapter(folder / "a.adapter", folder / "a.onnx")
    return folder


def test_the_same_adapter_gives_the_same_bytes_and_replaces_an_older_file(exported: Path, tmp_path: Path) -> None:
    (tmp_path / "again.onnx").write_text("older")
    export_adapter(exported / "a.adapter", tmp_path / "again.onnx")
    assert (tmp_path / "again.onnx").read_bytes() == (exported / "a.onnx").read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == ["again.onnx"]


def test_any_number_of_windows_can_be_given_at_once(exported: Path) -> None:
    windows = torch.rand(5, 1, *WINDOW, generator=torch.Generator().manual_seed(0))
    together = run(exported / "a.onnx", windows)
    alone = torch.cat([run(exported / "a.onnx", window) for window in windows.split(1)])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-6)


def test_the_graph_is_valid_folded_and_made_of_what_engines_know(exported: Path, bundle: EncoderBundle) -> None:
    model = onnx.load(exported / "a.onnx")
    onnx.checker.check_model(model, full_check=True)
    assert [(entry.domain, entry.version) for entry in model.opset_import if entry.domain == ""] == [("", OPSET)]
    operators = {node.op_type for node in model.graph.node}
    arithmetic = {"Add", "Sub", "Div", "MatMul", "Relu", "Softmax"}
    assert operators == arithmetic | {"Conv", "ConvTranspose", "Concat", "Pad", "Slice", "Reshape"}
    given, returned = (
        [dimension.dim_param or dimension.dim_value for dimension in value.type.tensor_type.shape.dim]
        for (value,) in (model.graph.input, model.graph.output)
    )
    assert (model.graph.input[0].name, given) == ("windows", ["n", 1, *WINDOW])
    assert (model.graph.output[0].name, returned) == ("probabilities", ["n", 1 + len(ORGANS), *WINDOW])
    shapes = {value.name: list(value.dims) for value in model.graph.initializer}
    constant = [node.input[1] in shapes for node in model.graph.node if node.op_type == "Conv"]
    assert all(constant)
    assert "adapter.steps.0.second.weight" not in shapes
    assert [1 + len(ORGANS), 4, 3, 3, 3] in shapes.values()


def test_the_file_tells_a_caller_what_to_do_and_nothing_of_patients_or_machines(
    exported: Path, bundle: EncoderBundle
) -> None:
    said = {entry.key: entry.value for entry in onnx.load(exported / "a.onnx").metadata_props}
    assert all(key.startswith("fseft_edge.") for key in said)
    said = {key.removeprefix("fseft_edge."): value for key, value in said.items()}
    assert said.pop("toolkit_version") == __version__
    assert said.pop("encoder_id") == bundle.encoder_id
    assert said.pop("encoder_name") == "tiny"
    assert said.pop("adapter_sha256") == read_adapter(exported / "a.adapter").sha256
    assert said.pop("activation") == "softmax"
    nothing = {"largest_component": False, "fill_holes": False}
    organs = [
        {"name": name, "channel": number, "mask_label": number, "annotation_label": number, "post_processing": nothing}
        for number, name in enumerate(ORGANS, start=1)
    ]
    assert {key: json.loads(value) for key, value in said.items()} == {
        "schema_version": 1,
        "organs": organs,
        "preprocessing": bundle.preprocessing.model_dump(mode="json"),
        "window": list(WINDOW),
        "overlap": 0.25,
        "blending": {"importance": "gaussian", "sigma_scale": 0.125, "minimum": 0.001},
    }
    content = (exported / "a.onnx").read_bytes()
    for private in (b"12.5", b"site-packages", str(ROOT).encode(), str(exported).encode()):
        assert private not in content


@pytest.fixture
def _not_traced_again(exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Take the exported graph in place of tracing, which takes seconds."""
    monkeypatch.setattr("fseft_edge.adapters.onnx_export.graph_of", lambda *_: onnx.load(exported / "a.onnx"))


@pytest.mark.usefixtures("_not_traced_again")
def test_a_graph_that_differs_is_refused_and_an_older_one_stays(
    exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    call = GraphRunner.__call__
    monkeypatch.setattr(GraphRunner, "__call__", lambda runner, windows: [call(runner, windows)[0] + 2 * GATE])
    (tmp_path / "a.onnx").write_text("older")
    with pytest.raises(ParityError, match=r"differs from the toolkit's own probabilities by 2\.0e-04"):
        export_adapter(exported / "a.adapter", tmp_path / "a.onnx")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("a.onnx", "older")]


@pytest.mark.usefixtures("_not_traced_again")
def test_a_graph_that_is_not_finite_is_refused(exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    call = GraphRunner.__call__
    monkeypatch.setattr(GraphRunner, "__call__", lambda runner, windows: [call(runner, windows)[0] * torch.nan])
    with pytest.raises(ParityError, match="by inf"):
        export_adapter(exported / "a.adapter", tmp_path / "a.onnx")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("_not_traced_again")
def test_without_onnxruntime_the_graph_is_written_and_said_not_to_be_compared(
    exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    graph = export_adapter(exported / "a.adapter", tmp_path / "a.onnx")
    assert graph.difference is None
    assert "a.onnx was not compared with the toolkit's own result" in caplog.text
    assert graph.path.read_bytes() == (exported / "a.onnx").read_bytes()


def test_what_cannot_be_exported_is_refused_by_name(exported: Path, tmp_path: Path) -> None:
    adapter = exported / "a.adapter"
    with pytest.raises(UsageError, match=r"a\.engine is not called \.onnx"):
        export_adapter(adapter, tmp_path / "a.engine")
    with pytest.raises(UsageError, match=r"encoder\.onnx lies within the encoder bundle"):
        export_adapter(adapter, exported / "tiny.encoder" / "encoder.onnx")
    with pytest.raises(AdapterError, match="is no file"):
        export_adapter(tmp_path / "none.adapter", tmp_path / "a.onnx")
    (tmp_path / "folder.onnx").mkdir()
    with pytest.raises(UsageError, match=r"folder\.onnx is a folder"):
        export_adapter(adapter, tmp_path / "folder.onnx")
    other = write_tiny_encoder(tmp_path / "other.encoder", seed=9)
    with pytest.raises(AdapterError, match=r"a\.adapter was trained on the encoder"):
        export_adapter(adapter, tmp_path / "a.onnx", encoder=other.path)
    (tmp_path / "alone.adapter").write_bytes(adapter.read_bytes())
    with pytest.raises(InputError, match="neither beside it nor in the working folder"):
        export_adapter(tmp_path / "alone.adapter", tmp_path / "a.onnx")
    assert not (tmp_path / "a.onnx").exists()


def documented_caller(folder: Path) -> Callable[[Path, Path, Path], None]:
    """Return ``segment(graph, scan, output)`` of the example in the docs."""
    page = (ROOT / "docs" / "export-adapter.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    (folder / "segment_onnx.py").write_text(code)
    caller: Callable[[Path, Path, Path], None] = runpy.run_path(str(folder / "segment_onnx.py"))["segment"]
    return caller


def own_labels(volume: Volume, bundle: EncoderBundle, file: AdapterFile, cache: Path) -> NDArray[np.unsignedinteger]:
    with open_session(bundle, device="cpu", backend="torch") as session:
        encoded = encode_scan(volume, bundle=bundle, session=session, store=FeatureStore(cache), storage="float32")
    assert all(size <= edge for size, edge in zip(encoded.grid.shape, bundle.window, strict=True))
    return segment_encoded(encoded, [file.adapter])


def test_the_example_in_the_docs_gives_the_toolkits_mask_of_an_anisotropic_scan_stored_another_way(
    exported: Path, bundle: EncoderBundle, tmp_path: Path
) -> None:
    upright = phantom(1, shape=(36, 24, 28), spacing=(5.0, 7.0, 6.5)).volume
    turned = nib.Nifti1Image(upright.array, upright.affine).as_reoriented([[2, -1], [0, 1], [1, -1]])
    nib.save(turned, tmp_path / "scan.nii.gz")
    documented_caller(tmp_path)(exported / "a.onnx", tmp_path / "scan.nii.gz", tmp_path / "mask.nii.gz")
    mask = read_label_map(tmp_path / "mask.nii.gz")
    volume = read_ct(tmp_path / "scan.nii.gz")
    np.testing.assert_array_equal(mask.affine, volume.affine)
    expected = own_labels(volume, bundle, read_adapter(exported / "a.adapter"), tmp_path / "cache")
    assert set(np.unique(expected)) == {0, 1, 2}
    assert np.mean(mask.array == expected) > 0.9999


@pytest.mark.real_ct
def test_on_a_real_ct_the_example_in_the_docs_gives_the_toolkits_mask(real_ct: Path, tmp_path: Path) -> None:
    """The built-in encoder crops air away and resamples with a wider triangle; the scan is stored as P-L-I."""
    bundle = export_encoder(None, model="edge_base", output=tmp_path / "edge_base.encoder", onnx=False)
    organs = [OrganLabel("brainstem", 1), OrganLabel("spinal_cord", 2), OrganLabel("mandible", 7)]
    adapter = Adapter(AdapterSettings(), bundle.levels, len(organs))
    adapter.start_from_head(head_rows(bundle, organs))
    for step in adapter.steps:
        torch.nn.init.normal_(step.second.weight, std=0.02)
    known = zero_shot_adapter(bundle, organs).description
    description = known.model_copy(update={"settings": stored_settings(adapter.settings)})
    save_adapter(tmp_path / "a.adapter", AdapterFile(description, adapter.eval()))
    export_adapter(tmp_path / "a.adapter", tmp_path / "a.onnx")

    image = nib.load(real_ct / "headneck" / "ct" / "hn_002.nii.gz")
    nib.save(image.slicer[30:90, 34:94, 10:100], tmp_path / "scan.nii.gz")
    documented_caller(tmp_path)(tmp_path / "a.onnx", tmp_path / "scan.nii.gz", tmp_path / "mask.nii.gz")
    mask = read_label_map(tmp_path / "mask.nii.gz").array
    expected = own_labels(read_ct(tmp_path / "scan.nii.gz"), bundle, AdapterFile(description, adapter), tmp_path / "c")
    for label in range(1, len(organs) + 1):
        score = dice(mask == label, expected == label)
        assert score is not None
        assert score >= 0.9999
        assert np.count_nonzero(expected == label) > 100
