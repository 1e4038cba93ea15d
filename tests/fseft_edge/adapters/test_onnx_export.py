"""Encoder and adapter as one ONNX graph: results, metadata, and refused arguments."""

from __future__ import annotations

import json
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
from doubles.errors import refused
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
from fseft_edge.export.export import Tiling, export_encoder
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
# Every method, both choices of levels and both activations. Export of a graph takes seconds, so not all combinations
# are tested; SPATIAL is tested with the graph of the fixture `exported`.
KINDS: list[tuple[Method, Levels, Activation]] = [
    ("linear", "all", "sigmoid"),
    ("pointwise", "all", "softmax"),
    ("spatial", "finest", "sigmoid"),
]
SPATIAL = AdapterSettings("spatial", "all", "softmax", width=4)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> EncoderBundle:
    return write_tiny_encoder(tmp_path_factory.mktemp("encoder") / "tiny.encoder")


def write_adapter(path: Path, bundle: EncoderBundle, settings: AdapterSettings = SPATIAL) -> AdapterFile:
    """Write an adapter with random weights that are small enough to keep rounding errors small."""
    return write_random_adapter(path, bundle, ORGANS, settings=settings, deviation=0.2, support_volumes_ml=(12.5,))


def one_window() -> Volume:
    """Return a part of a phantom with the shape of one window of the encoder."""
    volume = scan(1).volume
    part = tuple(slice(start, start + size) for start, size in zip((16, 8, 12), WINDOW, strict=True))
    assert volume.spacing == SPACING
    return Volume(np.ascontiguousarray(volume.array[part]), volume.affine)


def encoded_by_toolkit(volume: Volume, bundle: EncoderBundle, cache: Path) -> EncodedScan:
    with open_session(bundle, device="cpu", backend="torch") as session:
        return encode_scan(volume, bundle=bundle, session=session, store=FeatureStore(cache), storage="float32")


def probabilities_of_toolkit(
    volume: Volume, bundle: EncoderBundle, file: AdapterFile, cache: Path
) -> NDArray[np.float32]:
    """Return the probabilities of the toolkit on the grid, ``[classes, X, Y, Z]``."""
    encoded = encoded_by_toolkit(volume, bundle, cache)
    return np.concatenate([section for _, section in predict_sections(encoded, [file.adapter])], axis=3)


def run(graph: Path, windows: Tensor) -> Tensor:
    (probabilities,) = GraphRunner(graph, torch.device("cpu"), 1)(windows)
    return probabilities


def assert_result_of_toolkit(graph: Path, file: AdapterFile, bundle: EncoderBundle, cache: Path) -> None:
    """Check the probabilities of a graph for a scan of one window."""
    volume = one_window()
    expected = probabilities_of_toolkit(volume, bundle, file, cache)
    assert expected.shape == (len(ORGANS) + (file.adapter.settings.activation == "softmax"), *WINDOW)
    assert np.ptp(expected) > 0.5  # constant probabilities would not test anything
    low, high = bundle.preprocessing.hu_window
    window = torch.from_numpy(((volume.array.astype(np.float32) - low) / (high - low)).clip(0, 1))[None, None]
    probabilities = run(graph, window)[0].numpy()
    assert float(np.abs(probabilities - expected).max()) <= 1e-5


@pytest.mark.parametrize(("method", "levels", "activation"), KINDS)
def test_the_graph_gives_the_result_of_the_toolkit_for_a_scan_of_one_window(
    bundle: EncoderBundle, tmp_path: Path, method: Method, levels: Levels, activation: Activation
) -> None:
    settings = AdapterSettings(method, levels, activation, width=4)
    file = write_adapter(tmp_path / "a.adapter", bundle, settings)
    graph = export_adapter(tmp_path / "a.adapter", tmp_path / "a.onnx", encoder=bundle.path)
    assert graph.organs == ORGANS
    assert graph.difference is not None
    assert graph.difference <= GATE
    assert_result_of_toolkit(graph.path, file, bundle, tmp_path / "cache")


@pytest.fixture(scope="module")
def exported(bundle: EncoderBundle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an encoder, a spatial softmax adapter for all levels, and its graph."""
    folder = tmp_path_factory.mktemp("exported")
    write_tiny_encoder(folder / "tiny.encoder")
    write_adapter(folder / "a.adapter", bundle)
    export_adapter(folder / "a.adapter", folder / "a.onnx")
    return folder


def test_the_graph_of_a_spatial_softmax_adapter_gives_the_result_of_the_toolkit(
    exported: Path, bundle: EncoderBundle, tmp_path: Path
) -> None:
    assert_result_of_toolkit(exported / "a.onnx", read_adapter(exported / "a.adapter"), bundle, tmp_path / "cache")


def test_equal_adapters_give_equal_bytes_and_an_older_file_is_replaced(exported: Path, tmp_path: Path) -> None:
    (tmp_path / "again.onnx").write_text("older")
    export_adapter(exported / "a.adapter", tmp_path / "again.onnx")
    assert (tmp_path / "again.onnx").read_bytes() == (exported / "a.onnx").read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == ["again.onnx"]


def test_the_graph_accepts_any_number_of_windows(exported: Path) -> None:
    windows = torch.rand(3, 1, *WINDOW, generator=torch.Generator().manual_seed(0))
    together = run(exported / "a.onnx", windows)
    one_by_one = torch.cat([run(exported / "a.onnx", window) for window in windows.split(1)])
    torch.testing.assert_close(together, one_by_one, rtol=0, atol=1e-6)


def test_the_graph_is_valid_is_folded_and_uses_only_common_operators(exported: Path, bundle: EncoderBundle) -> None:
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


def test_the_metadata_are_complete_and_contain_nothing_about_patients_or_machines(
    exported: Path, bundle: EncoderBundle
) -> None:
    metadata = {entry.key: entry.value for entry in onnx.load(exported / "a.onnx").metadata_props}
    assert all(key.startswith("fseft_edge.") for key in metadata)
    metadata = {key.removeprefix("fseft_edge."): value for key, value in metadata.items()}
    assert metadata.pop("toolkit_version") == __version__
    assert metadata.pop("encoder_id") == bundle.encoder_id
    assert metadata.pop("encoder_name") == "tiny"
    assert metadata.pop("adapter_sha256") == read_adapter(exported / "a.adapter").sha256
    assert metadata.pop("activation") == "softmax"
    no_steps = {"largest_component": False, "fill_holes": False}
    organs = [
        {"name": name, "channel": number, "mask_label": number, "annotation_label": number, "post_processing": no_steps}
        for number, name in enumerate(ORGANS, start=1)
    ]
    assert {key: json.loads(value) for key, value in metadata.items()} == {
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
def _reuse_graph(exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace the tracing of the network, which takes seconds, by the graph that was exported before."""
    monkeypatch.setattr("fseft_edge.adapters.onnx_export.graph_of", lambda *_: onnx.load(exported / "a.onnx"))


@pytest.mark.usefixtures("_reuse_graph")
def test_a_graph_with_another_result_is_refused_and_an_older_file_is_kept(
    exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    call = GraphRunner.__call__
    monkeypatch.setattr(GraphRunner, "__call__", lambda runner, windows: [call(runner, windows)[0] + 2 * GATE])
    (tmp_path / "a.onnx").write_text("older")
    with refused(ParityError, exported / "a.adapter", "2.0e-04"):
        export_adapter(exported / "a.adapter", tmp_path / "a.onnx")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("a.onnx", "older")]


@pytest.mark.usefixtures("_reuse_graph")
def test_a_graph_with_a_result_that_is_not_finite_is_refused(
    exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    call = GraphRunner.__call__
    monkeypatch.setattr(GraphRunner, "__call__", lambda runner, windows: [call(runner, windows)[0] * torch.nan])
    with refused(ParityError, exported / "a.adapter", "inf"):
        export_adapter(exported / "a.adapter", tmp_path / "a.onnx")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("_reuse_graph")
def test_without_onnxruntime_the_graph_is_written_without_comparison_and_with_a_warning(
    exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    graph = export_adapter(exported / "a.adapter", tmp_path / "a.onnx")
    assert graph.difference is None
    (record,) = caplog.records
    assert (record.levelname, str(tmp_path / "a.onnx") in record.getMessage()) == ("WARNING", True)
    assert "onnxruntime" in record.getMessage()
    assert graph.path.read_bytes() == (exported / "a.onnx").read_bytes()


def test_wrong_outputs_adapters_and_encoders_are_refused_by_name(exported: Path, tmp_path: Path) -> None:
    adapter = exported / "a.adapter"
    with refused(UsageError, "a.engine", ".onnx"):
        export_adapter(adapter, tmp_path / "a.engine")
    inside = exported / "tiny.encoder" / "encoder.onnx"
    with refused(UsageError, inside):
        export_adapter(adapter, inside)
    assert not inside.exists()
    with refused(AdapterError, tmp_path / "none.adapter"):
        export_adapter(tmp_path / "none.adapter", tmp_path / "a.onnx")
    (tmp_path / "folder.onnx").mkdir()
    with refused(UsageError, tmp_path / "folder.onnx"):
        export_adapter(adapter, tmp_path / "folder.onnx")
    other = write_tiny_encoder(tmp_path / "other.encoder", seed=9)
    with refused(AdapterError, adapter, other.encoder_id[:12]):
        export_adapter(adapter, tmp_path / "a.onnx", encoder=other.path)
    (tmp_path / "alone.adapter").write_bytes(adapter.read_bytes())
    with refused(InputError, tmp_path / "alone.adapter") as caught:
        export_adapter(tmp_path / "alone.adapter", tmp_path / "a.onnx")
    assert "--encoder" in caught.value.remedy
    assert not (tmp_path / "a.onnx").exists()


def documented_caller() -> Callable[[Path, Path, Path], None]:
    """Return the function ``segment(graph, scan, output)`` of the example in the documentation."""
    caller: Callable[[Path, Path, Path], None] = runpy.run_path(str(ROOT / "docs" / "segment_onnx.py"))["segment"]
    return caller


def labels_of_toolkit(
    volume: Volume, bundle: EncoderBundle, file: AdapterFile, cache: Path
) -> NDArray[np.unsignedinteger]:
    encoded = encoded_by_toolkit(volume, bundle, cache)
    assert all(size <= edge for size, edge in zip(encoded.grid.shape, bundle.window, strict=True))
    return segment_encoded(encoded, [file.adapter])


def test_the_documented_example_gives_the_mask_of_the_toolkit_for_an_anisotropic_scan_with_other_axes(
    exported: Path, bundle: EncoderBundle, tmp_path: Path
) -> None:
    volume = phantom(1, shape=(36, 24, 28), spacing=(5.0, 7.0, 6.5)).volume
    reoriented = nib.Nifti1Image(volume.array, volume.affine).as_reoriented([[2, -1], [0, 1], [1, -1]])
    nib.save(reoriented, tmp_path / "scan.nii.gz")
    documented_caller()(exported / "a.onnx", tmp_path / "scan.nii.gz", tmp_path / "mask.nii.gz")
    mask = read_label_map(tmp_path / "mask.nii.gz")
    volume = read_ct(tmp_path / "scan.nii.gz")
    np.testing.assert_array_equal(mask.affine, volume.affine)
    expected = labels_of_toolkit(volume, bundle, read_adapter(exported / "a.adapter"), tmp_path / "cache")
    assert set(np.unique(expected)) == {0, 1, 2}
    assert np.mean(mask.array == expected) > 0.9999


@pytest.mark.real_ct
@pytest.mark.parametrize(("tiling", "least"), [("windows", 0.9999), ("whole", 0.97)])
def test_the_documented_example_gives_the_mask_of_the_toolkit_for_a_real_ct(
    real_ct: Path, tmp_path: Path, tiling: Tiling, least: float
) -> None:
    """The built-in encoder crops air and resamples with a wider triangle kernel; the axes of the scan are P-L-I.

    A window that is larger than the grid contains air beyond the grid, which an encoder of whole scans does not see.
    """
    output = tmp_path / "edge_base.encoder"
    bundle = export_encoder(None, model="edge_base", output=output, onnx=False, tiling=tiling)
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
    documented_caller()(tmp_path / "a.onnx", tmp_path / "scan.nii.gz", tmp_path / "mask.nii.gz")
    mask = read_label_map(tmp_path / "mask.nii.gz").array
    file = AdapterFile(description, adapter)
    expected = labels_of_toolkit(read_ct(tmp_path / "scan.nii.gz"), bundle, file, tmp_path / "cache")
    for label in range(1, len(organs) + 1):
        score = dice(mask == label, expected == label)
        assert score is not None
        assert score >= least
        assert np.count_nonzero(expected == label) > 100
