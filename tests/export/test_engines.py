"""Engines: TensorRT-RTX, which needs no GPU for a build, really builds them. Engines that do not match are refused."""

from __future__ import annotations

import errno
import gc
import json
import logging
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from click.testing import CliRunner, Result
from doubles.encoder import write_random_adapter, write_tiny_encoder
from doubles.errors import refused
from doubles.models import CHANNELS, WINDOW, small_contents, small_model, small_network
from doubles.releases import FEATURE_SIZE

from fseft_edge.cli.main import cli
from fseft_edge.export import export
from fseft_edge.export.checkpoints import write_model_file
from fseft_edge.export.engines import _target_setter, build_engines, compile_graph, prepare_build
from fseft_edge.export.export import export_encoder
from fseft_edge.export.onnx_graph import write_graph
from fseft_edge.export.parity import Classifier
from fseft_edge.export.zoo import load_model
from fseft_edge.runtime.encoder.backends.tensorrt import check_validity
from fseft_edge.runtime.encoder.backends.tensorrt_library import fresh_logger, import_library
from fseft_edge.runtime.encoder.bundle import EncoderBundle
from fseft_edge.runtime.encoder.chunks import CORE
from fseft_edge.runtime.encoder.engine_files import (
    EngineDescription,
    EngineFile,
    EngineLibrary,
    engine_for_gpu,
    read_engine,
)
from fseft_edge.runtime.encoder.networks import build_network
from fseft_edge.runtime.errors import (
    AdapterError,
    EncoderBundleError,
    EngineError,
    MissingBackendError,
    OutOfSpaceError,
    UsageError,
)

TARGETS = ["sm_75", "sm_86", "sm_89", "sm_120", "portable"]


@pytest.fixture(scope="module")
def rtx() -> ModuleType:
    return import_library("tensorrt_rtx")


@pytest.fixture(scope="module")
def built(small_graph: Path, small_mixed_graph: Path, tmp_path_factory: pytest.TempPathFactory) -> EncoderBundle:
    """A bundle with an engine for each target."""
    path = tmp_path_factory.mktemp("built") / "small.encoder"
    bundle = EncoderBundle.write(path, small_contents(graph=small_graph, mixed_graph=small_mixed_graph))
    build_engines(bundle.path, TARGETS, max_batch=3)
    return bundle


@pytest.fixture
def bundle(built: EncoderBundle, tmp_path: Path) -> EncoderBundle:
    """A copy of the bundle."""
    shutil.copytree(built.path, tmp_path / "copy.encoder")
    return EncoderBundle.open(tmp_path / "copy.encoder")


@pytest.fixture
def command() -> Iterator[Callable[..., Result]]:
    """Run ``fseft-edge``, and restore the level of its logger afterwards."""
    logger = logging.getLogger("fseft_edge")
    level = logger.level
    yield lambda *arguments: CliRunner().invoke(cli, [str(argument) for argument in arguments])
    logger.setLevel(level)


def engine(bundle: EncoderBundle, target: str = "sm_86", suffix: str = "engine") -> Path:
    return bundle.path / "engines" / f"tensorrt_rtx-mixed-{target}.{suffix}"


def version() -> str:
    return str(import_library("tensorrt_rtx").__version__)


def read(bundle: EncoderBundle, target: str = "sm_86") -> Path:
    return read_engine(bundle, "tensorrt_rtx", version(), "mixed", target).path


def test_engines_are_in_the_bundles_folder_but_not_in_its_manifest(built: EncoderBundle) -> None:
    names = {f"tensorrt_rtx-mixed-{target}.{kind}" for target in TARGETS for kind in ("engine", "json")}
    assert {path.name for path in (built.path / "engines").iterdir()} == names
    assert not any("engine" in name for name in EncoderBundle.open(built.path).manifest.files)


@pytest.mark.parametrize("target", TARGETS)
def test_description_lists_inputs_and_outputs_of_the_engine(built: EncoderBundle, target: str) -> None:
    described = EngineDescription.model_validate_json(engine(built, target, "json").read_bytes())
    assert (described.library, described.target, described.precision) == ("tensorrt_rtx", target, "mixed")
    assert described.version == version()
    assert described.max_batch == 3
    assert described.graph_sha256 == built.manifest.files["encoder.mixed.onnx"]
    assert [tensor.name for tensor in described.tensors] == ["windows", "level_0", "level_1"]
    assert {tensor.number_format for tensor in described.tensors} == {"float32"}
    assert [tensor.shape for tensor in described.tensors] == [
        (-1, 1, *WINDOW),
        (-1, CHANNELS[0], *WINDOW),
        (-1, CHANNELS[1], *(side // 2 for side in WINDOW)),
    ]
    content = engine(built, target).read_bytes()
    assert all(tensor.name.encode() in content for tensor in described.tensors)


def test_engines_of_different_gpus_differ(built: EncoderBundle) -> None:
    assert len({engine(built, target).read_bytes() for target in TARGETS}) == len(TARGETS)


@pytest.mark.parametrize(("target", "capabilities"), [("sm_75", ["SM75"]), ("sm_120", ["SM120"]), ("portable", [])])
def test_build_is_strongly_typed_without_tf32_and_for_any_batch(
    rtx: ModuleType, small_mixed_graph: Path, target: str, capabilities: list[str]
) -> None:
    build = prepare_build(rtx, small_mixed_graph, target, max_batch=5)
    assert build.network.get_flag(rtx.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    assert not build.config.get_flag(rtx.BuilderFlag.TF32)
    assert [tuple(shape) for shape in build.profile.get_shape("windows")] == [(n, 1, *WINDOW) for n in (1, 5, 5)]
    assert build.config.num_optimization_profiles == 1
    chosen = [build.config.get_compute_capability(index).name for index in range(build.config.num_compute_capabilities)]
    assert chosen == capabilities
    layers = [build.network.get_layer(index) for index in range(build.network.num_layers)]
    convolutions = [layer for layer in layers if layer.type == rtx.LayerType.CONVOLUTION]
    assert convolutions
    assert {layer.get_input(0).dtype for layer in convolutions} == {rtx.float16}


def test_engine_of_a_whole_scan_encoder_accepts_all_sizes_up_to_the_largest_chunk(
    rtx: ModuleType, small_whole_graph: Path, small_whole_mixed_graph: Path, tmp_path: Path
) -> None:
    whole_scan = small_network().whole_scan
    assert whole_scan is not None
    largest = (256, 256, CORE + 2 * whole_scan.context)
    profile = prepare_build(rtx, small_whole_mixed_graph, "portable", 1, largest=largest).profile
    least, typical, most = (tuple(shape) for shape in profile.get_shape("windows"))
    assert (least, most) == ((1, 1, 1, 1, 1), (1, 1, *largest))
    assert all(side <= limit for side, limit in zip(typical, most, strict=True))
    bundle = EncoderBundle.write(
        tmp_path / "whole.encoder",
        small_contents(graph=small_whole_graph, mixed_graph=small_whole_mixed_graph, whole_scan=whole_scan),
    )
    (made,) = build_engines(bundle.path, ["portable"])
    assert read(bundle, "portable") == made.path
    assert (made.description.largest, made.description.max_batch) == (largest, 1)
    assert [tensor.shape for tensor in made.description.tensors] == [
        (-1, channels, -1, -1, -1) for channels in (1, *CHANNELS[:2])
    ]
    before = made.path.stat().st_mtime_ns
    build_engines(bundle.path, ["portable"])
    assert made.path.stat().st_mtime_ns == before


def test_a_description_of_an_earlier_version_is_read(bundle: EncoderBundle) -> None:
    sidecar = engine(bundle, suffix="json")
    entries = json.loads(sidecar.read_bytes())
    assert entries.pop("largest") is None
    sidecar.write_text(json.dumps({**entries, "schema_version": 1}))
    assert read(bundle) == engine(bundle)


def test_engine_of_the_float32_graph_computes_in_float32(rtx: ModuleType, small_graph: Path) -> None:
    build = prepare_build(rtx, small_graph, "sm_86", max_batch=2)
    layers = [build.network.get_layer(index) for index in range(build.network.num_layers)]
    assert {layer.get_output(0).dtype for layer in layers} == {rtx.float32}
    assert compile_graph(rtx, small_graph, "sm_86", 2)[0]


def test_engine_of_a_swin_unetr_normalises_in_float32(rtx: ModuleType, swin_mixed_graph: Path) -> None:
    build = prepare_build(rtx, swin_mixed_graph, "portable", 2)
    layers = [build.network.get_layer(index) for index in range(build.network.num_layers)]
    kind = rtx.LayerType
    for exact in (kind.SOFTMAX, kind.NORMALIZATION, kind.REDUCE):
        assert {layer.get_input(0).dtype for layer in layers if layer.type == exact} == {rtx.float32}
    for half in (kind.CONVOLUTION, kind.DECONVOLUTION, kind.MATRIX_MULTIPLY):
        assert {layer.get_input(0).dtype for layer in layers if layer.type == half} == {rtx.float16}
    for target in ("sm_75", "portable"):
        content, tensors = compile_graph(rtx, swin_mixed_graph, target, 2)
        assert len(content) > swin_mixed_graph.stat().st_size / 2
        assert [tensor.name for tensor in tensors] == ["windows", *(f"level_{level}" for level in range(5))]
        assert [tensor.shape[1] for tensor in tensors] == [1, *(FEATURE_SIZE * width for width in (1, 1, 2, 4, 8))]


def test_engines_of_the_built_in_encoder_are_built_for_every_target(rtx: ModuleType, tmp_path: Path) -> None:
    model = load_model("edge_base", None).model
    network = build_network(model.description.architecture, **model.description.settings)
    network.load_state_dict(dict(model.encoder))
    graph = tmp_path / "eb.onnx"
    write_graph(network.eval(), model.description.window, graph, "mixed")
    for target in TARGETS:
        content, tensors = compile_graph(rtx, graph, target, 2)
        assert [tensor.shape for tensor in tensors[1:]] == [
            (-1, level.channels, *(side // level.stride for side in model.description.window))
            for level in network.levels
        ]
        assert len(content) > graph.stat().st_size


def test_export_builds_the_requested_engines(
    small_whole_graph: Path,
    small_whole_mixed_graph: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    command: Callable[..., Result],
) -> None:
    graphs = {"float32": small_whole_graph, "mixed": small_whole_mixed_graph}

    def copy(network: object, window: object, path: Path, precision: str = "float32", *, whole_scan: object) -> None:
        shutil.copyfile(graphs[precision], path)

    monkeypatch.setattr(export, "write_graph", copy)  # the exporter takes seconds
    write_model_file(tmp_path / "small.safetensors", small_model())
    output = tmp_path / "small.encoder"
    done = command("export", tmp_path / "small.safetensors", "-o", output, "--target", "sm_89,portable")
    assert done.exit_code == 0
    made = EncoderBundle.open(output)
    assert [read(made, target).is_file() for target in ("sm_89", "portable")] == [True, True]


def test_a_current_engine_is_not_built_again(bundle: EncoderBundle) -> None:
    before = engine(bundle).stat().st_mtime_ns
    build_engines(bundle.path, ["sm_86"], max_batch=3)
    assert engine(bundle).stat().st_mtime_ns == before


def truncate(bundle: EncoderBundle) -> None:
    content = engine(bundle).read_bytes()
    engine(bundle).write_bytes(content[: len(content) // 2])


def change_a_byte(bundle: EncoderBundle) -> None:
    content = bytearray(engine(bundle).read_bytes())
    content[len(content) // 2] ^= 1
    engine(bundle).write_bytes(content)


def describe(bundle: EncoderBundle, **changes: object) -> None:
    sidecar = engine(bundle, suffix="json")
    described = EngineDescription.model_validate_json(sidecar.read_bytes())
    sidecar.write_text(described.model_copy(update=changes).model_dump_json())


def replace_by_the_engine_of_another_gpu(bundle: EncoderBundle) -> None:
    for suffix in ("engine", "json"):
        shutil.copyfile(engine(bundle, "sm_120", suffix), engine(bundle, suffix=suffix))


STALE = [
    (truncate, "sm_86.engine"),
    (change_a_byte, "sm_86.engine"),
    (lambda bundle: engine(bundle, suffix="json").write_text("{"), "sm_86.json"),
    (lambda bundle: engine(bundle, suffix="json").unlink(), "sm_86.json"),
    (lambda bundle: engine(bundle).unlink(), "sm_86.engine"),
    (lambda bundle: describe(bundle, version="0.9"), "0.9"),
    (lambda bundle: describe(bundle, graph_sha256="0" * 64), "copy.encoder"),
    (lambda bundle: describe(bundle, schema_version=3), "sm_86.json"),
    (replace_by_the_engine_of_another_gpu, "sm_86.engine"),
]


@pytest.mark.parametrize(("spoil", "named"), STALE)
def test_an_engine_that_does_not_match_is_refused_and_built_again(
    bundle: EncoderBundle, caplog: pytest.LogCaptureFixture, spoil: Callable[[EncoderBundle], object], named: str
) -> None:
    spoil(bundle)
    with refused(EngineError, named) as caught:
        read(bundle)
    assert caught.value.exit_code == 4
    assert f"build-engines {bundle.path} --target sm_86 --precision mixed" in caught.value.remedy
    with caplog.at_level(logging.INFO):
        build_engines(bundle.path, ["sm_86"], max_batch=3)
    assert caught.value.message in caplog.text
    assert read(bundle) == engine(bundle)


def test_an_engine_for_another_batch_is_built_again(bundle: EncoderBundle) -> None:
    (rebuilt,) = build_engines(bundle.path, ["sm_86"], max_batch=1)
    assert rebuilt.description.max_batch == 1


@pytest.mark.parametrize(
    ("capability", "taken"), [((8, 6), "sm_86"), ((12, 0), "sm_120"), ((8, 0), "portable"), ((7, 5), "sm_75")]
)
def test_a_gpu_uses_its_own_engine_or_else_the_portable_one(
    bundle: EncoderBundle, capability: tuple[int, int], taken: str
) -> None:
    found = engine_for_gpu(bundle, "tensorrt_rtx", version(), "mixed", capability)
    assert found.path == engine(bundle, taken)


def test_the_portable_engine_replaces_a_damaged_one_from_ampere_on(bundle: EncoderBundle) -> None:
    truncate(bundle)
    found = engine_for_gpu(bundle, "tensorrt_rtx", version(), "mixed", (8, 6))
    assert found.path == engine(bundle, "portable")
    engine(bundle, "sm_75").unlink()
    with refused(EngineError, engine(bundle, "sm_75")):
        engine_for_gpu(bundle, "tensorrt_rtx", version(), "mixed", (7, 5))


def test_a_gpu_that_the_library_does_not_support_is_refused(bundle: EncoderBundle) -> None:
    with refused(EngineError, "tensorrt_rtx", "sm_90") as caught:
        build_engines(bundle.path, ["sm_86", "sm_90"])
    assert all(target in caught.value.remedy for target in TARGETS)


@pytest.mark.parametrize("target", ["sm86", "8.6", "sm_8", "sm_8600", ""])
def test_an_unknown_target_is_a_usage_error(bundle: EncoderBundle, target: str) -> None:
    with refused(UsageError, repr(target)):
        build_engines(bundle.path, [target])


def test_without_a_gpu_a_target_must_be_given(bundle: EncoderBundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with refused(UsageError, "--target"):
        build_engines(bundle.path)


def test_a_bundle_without_graphs_is_refused(tmp_path: Path) -> None:
    bare = EncoderBundle.write(tmp_path / "bare.encoder", small_contents())
    with refused(EncoderBundleError, bare.path, "float32"):
        build_engines(bare.path, ["portable"])


def test_engines_of_a_bundle_without_a_mixed_graph_are_float32(small_graph: Path, tmp_path: Path) -> None:
    plain = EncoderBundle.write(tmp_path / "plain.encoder", small_contents(graph=small_graph))
    (found,) = build_engines(plain.path, ["portable"])
    assert found.path.name == "tensorrt_rtx-float32-portable.engine"


@pytest.mark.parametrize(("library", "extra"), [("tensorrt_rtx", "rtx"), ("tensorrt", "tensorrt")])
def test_the_remedy_of_a_missing_library_is_its_installation(
    bundle: EncoderBundle, monkeypatch: pytest.MonkeyPatch, library: EngineLibrary, extra: str
) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    with refused(MissingBackendError, library) as caught:
        build_engines(bundle.path, ["portable"], library=library)
    assert f"pip install 'fseft-edge[{extra}]'" in caught.value.remedy
    assert caught.value.exit_code == 4


def test_export_without_any_library_is_refused_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fseft_edge.export.engines.find_spec", lambda name: None)
    with refused(MissingBackendError, "TensorRT-RTX", "TensorRT"):
        export_encoder(None, model="edge_base", output=tmp_path / "eb.encoder", targets=["portable"])
    assert list(tmp_path.iterdir()) == []


def test_targets_without_a_graph_are_refused(tmp_path: Path) -> None:
    with refused(UsageError, "--target", "--no-onnx"):
        export_encoder(None, model="edge_base", output=tmp_path / "eb.encoder", onnx=False, targets=["portable"])


def test_tensorrt_only_builds_for_the_gpu_of_this_machine(
    rtx: ModuleType, small_mixed_graph: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TensorRT is simulated by the module of TensorRT-RTX without the list of compute capabilities."""
    tensorrt = ModuleType("tensorrt")
    vars(tensorrt).update({name: value for name, value in vars(rtx).items() if name != "ComputeCapability"})
    tensorrt.__name__ = "tensorrt"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with refused(EngineError, "tensorrt"):
        prepare_build(tensorrt, small_mixed_graph, "sm_86", 2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (8, 9))
    with refused(EngineError, "tensorrt", "sm_89", "sm_86"):
        prepare_build(tensorrt, small_mixed_graph, "sm_86", 2)
    for target, level in (("sm_89", None), ("portable", tensorrt.HardwareCompatibilityLevel.AMPERE_PLUS)):
        config = SimpleNamespace(hardware_compatibility_level=None)  # TensorRT-RTX's object does not store this value
        _target_setter(tensorrt, target)(config)
        assert config.hardware_compatibility_level == level


def test_the_logger_exists_after_the_librarys_objects_are_deleted(rtx: ModuleType, small_mixed_graph: Path) -> None:
    """The library keeps its first logger, and ends the process if this logger was deleted."""
    for _ in range(2):
        build = prepare_build(rtx, small_mixed_graph, "portable", 2)
        build.config.hardware_compatibility_level = rtx.HardwareCompatibilityLevel.AMPERE_PLUS  # logs an error
        assert build.config.hardware_compatibility_level == rtx.HardwareCompatibilityLevel.NONE
        del build
        gc.collect()


def test_a_full_disk_leaves_the_bundle_unchanged(
    small_graph: Path, small_mixed_graph: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = EncoderBundle.write(
        tmp_path / "plain.encoder", small_contents(graph=small_graph, mixed_graph=small_mixed_graph)
    )

    def full(path: Path, content: bytes) -> int:
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(Path, "write_bytes", full)
    with refused(OutOfSpaceError, "portable.engine"):
        build_engines(plain.path, ["portable"])
    assert list((plain.path / "engines").iterdir()) == []
    EncoderBundle.open(plain.path)


def test_the_library_refuses_a_file_that_is_not_an_engine(rtx: ModuleType, tmp_path: Path) -> None:
    runtime = rtx.Runtime(fresh_logger(rtx))
    with refused(EngineError, "x.engine", "malformed engine"):
        check_validity(rtx, runtime, tmp_path / "x.engine", b"x" * 1000)


def test_a_missing_driver_is_reported(rtx: ModuleType, built: EncoderBundle) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a driver")
    runtime = rtx.Runtime(fresh_logger(rtx))
    with refused(EngineError, engine(built), "driver") as caught:
        check_validity(rtx, runtime, engine(built), engine(built).read_bytes())
    assert "driver" in caught.value.remedy


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (["UNSUPPORTED_CC"], "unsupported cc"),
        (["OLD_CUDA_DRIVER", "VERSION_MISMATCH"], "version mismatch, old cuda driver"),
    ],
)
def test_the_message_contains_the_librarys_reasons(rtx: ModuleType, flags: list[str], reason: str) -> None:
    known = rtx.EngineInvalidityDiagnostics.__members__
    answer = (rtx.EngineValidity.INVALID, sum(int(known[flag]) for flag in flags))
    runtime = SimpleNamespace(get_engine_validity=lambda content: answer)
    with refused(EngineError, "x.engine", reason):
        check_validity(rtx, runtime, Path("x.engine"), b"")


def test_command_builds_the_requested_engines_and_prints_their_paths(
    bundle: EncoderBundle, command: Callable[..., Result]
) -> None:
    shutil.rmtree(bundle.path / "engines")
    targets = ("--target", "sm_86, portable", "--target", "sm_120")
    done = command("build-engines", bundle.path, *targets, "--max-batch", 1)
    assert done.exit_code == 0
    lines = [str(engine(bundle, target)) for target in ("sm_86", "portable", "sm_120")]
    assert [line.partition(": ")[0] for line in done.stdout.splitlines()] == lines
    assert all(read(bundle, target).is_file() for target in ("sm_86", "portable", "sm_120"))
    failed = command("build-engines", bundle.path, "--target", "sm_90")
    assert isinstance(failed.exception, EngineError)


def test_command_compares_masks_of_the_given_adapter(
    bundle: EncoderBundle, command: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    classifiers: list[Classifier] = []

    def record(*arguments: object, classify: Classifier, **named: object) -> list[EngineFile]:
        classifiers.append(classify)
        return []

    monkeypatch.setattr("fseft_edge.export.engines.build_engines", record)
    own, other = tmp_path / "own.adapter", tmp_path / "other.adapter"
    file = write_random_adapter(own, bundle)
    write_random_adapter(other, write_tiny_encoder(tmp_path / "other.encoder"))
    assert command("build-engines", bundle.path, "--adapter", own).exit_code == 0
    levels = [torch.rand(1, level.channels, *(16 // level.stride,) * 3) for level in bundle.levels]
    with torch.no_grad():
        assert torch.equal(classifiers[0](levels), file.adapter.log_odds(levels))
    assert isinstance(command("build-engines", bundle.path, "--adapter", other).exception, AdapterError)


def test_a_copied_bundle_keeps_its_engines(bundle: EncoderBundle, tmp_path: Path) -> None:
    moved = EncoderBundle.open(Path(shutil.copytree(bundle.path, tmp_path / "elsewhere" / "moved.encoder")))
    assert moved.encoder_id == bundle.encoder_id
    assert read(moved) == engine(moved)
