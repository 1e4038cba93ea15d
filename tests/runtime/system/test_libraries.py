"""State of libraries that are ready, missing or broken."""

from __future__ import annotations

import importlib
import importlib.metadata
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import onnxruntime
import pytest
import torch
from doubles.libraries import fake_library

from fseft_edge.runtime.system import libraries
from fseft_edge.runtime.system.libraries import (
    cuda_problem,
    deferred,
    import_problem,
    installed_versions,
    library,
    without,
)

OPENVINO = """
class Core:
    def get_property(self, device, name):
        assert (device, name) == ("CPU", "OPTIMIZATION_CAPABILITIES")
        return {capabilities}
"""


@pytest.fixture(autouse=True)
def _uncached_openvino(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace the cached `openvino_core`, so that tests with a fake OpenVINO leave no trace."""
    monkeypatch.setattr(libraries, "openvino_core", libraries.openvino_core.__wrapped__)


def test_a_ready_library_has_a_version_and_offers() -> None:
    found = library("onnxruntime")
    assert (found.state, found.problem, import_problem("onnxruntime")) == ("ready", None, None)
    assert found.version == onnxruntime.__version__
    assert found.offers == tuple(onnxruntime.get_available_providers())
    assert len(found.wheels) == 1


def test_offers_of_pytorch_are_its_build(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    assert library("torch").offers == ("CPU build",)
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    assert library("torch").offers == ("CUDA 12.8 build",)


def test_a_library_that_is_not_installed_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    found = library("tensorrt")
    assert (found.state, found.problem, found.offers) == ("missing", "not installed", ())


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("raise ImportError('libcudart.so.12: cannot open shared object file\\nmore')", "libcudart.so.12: cannot open"),
        ("raise OSError('bad ELF')", "bad ELF"),
        ("import a_dependency_that_is_not_there", "a_dependency_that_is_not_there"),
        ("raise RuntimeError", "RuntimeError"),
        ("syntax error", "syntax"),
    ],
)
def test_a_library_that_cannot_be_imported_is_broken_with_the_reason(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, source: str, message: str
) -> None:
    fake_library(monkeypatch, tmp_path, "onnxruntime", source)
    problem = import_problem("onnxruntime")
    found = library("onnxruntime")
    assert problem is not None
    assert problem.startswith("broken: ")
    assert found.state == "broken"
    assert message in str(found.problem)
    assert "\n" not in str(found.problem)


def test_a_library_that_cannot_list_its_offers_is_broken(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake_library(monkeypatch, tmp_path, "openvino", "class Core:\n    def __init__(self): raise RuntimeError('no CPU')")
    assert (library("openvino").state, library("openvino").problem) == ("broken", "no CPU")


@pytest.mark.parametrize(
    ("capabilities", "offer"),
    [(["FP32", "BF16"], "bfloat16 on this CPU"), (["FP32", "INT8"], "no bfloat16 on this CPU")],
)
def test_offers_of_openvino_state_whether_this_cpu_has_bfloat16(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capabilities: list[str], offer: str
) -> None:
    fake_library(monkeypatch, tmp_path, "openvino", OPENVINO.format(capabilities=capabilities))
    assert library("openvino").offers == (offer,)


def test_both_installed_wheels_of_a_module_are_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(libraries, "_version", lambda wheel: "1.22" if wheel.startswith("onnxruntime") else None)
    assert library("onnxruntime").wheels == ("onnxruntime", "onnxruntime-gpu")


def test_versions_are_those_of_the_installed_distributions() -> None:
    versions = installed_versions()
    assert {"torch", "fseft-edge"} <= set(versions)
    assert all(importlib.metadata.version(name) == number for name, number in versions.items())


def test_cuda_problem_states_why_pytorch_cannot_use_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    assert torch.__version__ in str(cuda_problem())

    def old_driver() -> None:
        raise RuntimeError("The NVIDIA driver is too old (found version 11040).\nPlease update.")

    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(torch.cuda, "init", old_driver)
    assert str(cuda_problem()).endswith(": The NVIDIA driver is too old (found version 11040).")
    monkeypatch.setattr(torch.cuda, "init", lambda: None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert cuda_problem() is not None
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert cuda_problem() is None


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Install a library that imports another one, and reads an attribute of it only when it is called."""
    (tmp_path / "part_of_a_library.py").write_text("answer = 42")
    (tmp_path / "a_library.py").write_text("import part_of_a_library\ndef ask(): return part_of_a_library.answer")
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("a_library", "part_of_a_library"):
        monkeypatch.delitem(sys.modules, name, raising=False)


@pytest.mark.usefixtures("installed")
def test_a_deferred_module_is_loaded_when_it_is_used() -> None:
    with deferred("part_of_a_library"):
        library_using_it = importlib.import_module("a_library")
        assert not hasattr(sys.modules["part_of_a_library"], "__file__")
    assert "part_of_a_library" not in sys.modules
    assert library_using_it.ask() == 42
    assert sys.modules["part_of_a_library"].__file__ is not None
    with pytest.raises(AttributeError):
        _ = library_using_it.part_of_a_library.unknown


@pytest.mark.usefixtures("installed")
def test_a_deferred_module_can_be_used_while_it_is_deferred() -> None:
    with deferred("part_of_a_library"):
        assert importlib.import_module("a_library").ask() == 42
    assert sys.modules["part_of_a_library"].__file__ is not None


@pytest.mark.usefixtures("installed")
def test_a_hidden_module_cannot_be_imported() -> None:
    with without("part_of_a_library"), pytest.raises(ImportError):
        importlib.import_module("a_library")
    assert importlib.import_module("a_library").ask() == 42


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("scope", [deferred, without])
def test_a_module_that_is_loaded_stays_as_it_is(scope: Callable[[str], AbstractContextManager[None]]) -> None:
    loaded = importlib.import_module("part_of_a_library")
    with scope("part_of_a_library"):
        assert importlib.import_module("a_library").part_of_a_library is loaded
    assert sys.modules["part_of_a_library"] is loaded
