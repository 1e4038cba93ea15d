"""Parity reports: the relative error, the compared windows, and the detection of differences."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import pytest
import torch
from doubles.encoder import write_case
from doubles.models import WINDOW, small_network

from fseft_edge.export.parity import GATES, Engine, _ct_windows, cpu_engines, head_of, parity_reports, relative_errors
from fseft_edge.runtime.encoder.bundle import ParityReport, parity_key
from fseft_edge.runtime.scans.preprocessing import Preprocessing

HEAD = (torch.tensor([[0.0, 0, 1, 0], [0, 0, 0, 1]]) * 1e5, torch.tensor([-0.19, -0.23]) * 1e5)
"""Each row classifies about half of the voxels of a CT as organ, nearly all of them with high confidence."""


def reports(
    engines: list[Engine], *, seed: int = 0, volumes: tuple[Path, ...] = (), spacing: float = 6.0
) -> dict[str, ParityReport]:
    found = parity_reports(
        small_network(seed),
        engines,
        classify=head_of(*HEAD),
        window=WINDOW,
        preprocessing=Preprocessing(spacing=(spacing,) * 3),
        volumes=volumes,
    )
    return {parity_key(report.backend, report.precision): report for report in found}


def test_relative_error_is_the_largest_difference_divided_by_the_largest_feature() -> None:
    expected = [torch.tensor([1.0, -4.0]), torch.tensor([2.0])]
    features = [torch.tensor([1.5, -4.0]), torch.tensor([2.0])]
    assert relative_errors(expected, features) == [0.125, 0.0]


def test_relative_error_of_a_nan_feature_is_infinite() -> None:
    assert relative_errors([torch.tensor([1.0])], [torch.tensor([float("nan")])]) == [float("inf")]


@pytest.fixture
def engines(small_graph: Path, small_mixed_graph: Path) -> list[Engine]:
    return cpu_engines(small_graph, small_mixed_graph)


def test_float32_graph_passes_on_noise(engines: list[Engine]) -> None:
    found = reports(engines)
    assert {"onnxruntime", "openvino"} <= found.keys()
    for name in ("onnxruntime", "openvino"):
        assert found[name].shortcoming is None
        assert found[name].source == "noise"
        assert found[name].windows == 1
        assert len(found[name].relative_error) == 2
        assert 0 < max(found[name].relative_error) < GATES["float32"]


def test_comparison_on_noise_is_not_sufficient_for_a_lower_precision() -> None:
    exact = Engine("onnxruntime", "bfloat16", "1", small_network)
    (found,) = reports([exact]).values()
    assert found.relative_error == (0.0, 0.0)
    assert found.mask_dsc is None
    assert "--parity-ct" in str(found.shortcoming)


def test_reports_are_reproducible(engines: list[Engine]) -> None:
    assert reports(engines) == reports(engines)


def test_an_engine_that_fails_has_no_report_and_the_others_have_one(engines: list[Engine]) -> None:
    def refuses() -> NoReturn:
        raise RuntimeError("unsupported instruction")

    def crashes() -> Callable[[torch.Tensor], NoReturn]:
        return lambda _: refuses()

    failing = [Engine("openvino", "bfloat16", "1", refuses), Engine("tensorrt", "mixed", "1", crashes)]
    failed: list[tuple[str, str]] = []
    found = parity_reports(
        small_network(),
        [*failing, *engines],
        classify=head_of(*HEAD),
        window=WINDOW,
        preprocessing=Preprocessing(),
        volumes=(),
        on_failure=lambda engine, error: failed.append((engine.backend, str(error))),
    )
    assert failed == [("openvino", "unsupported instruction"), ("tensorrt", "unsupported instruction")]
    assert [(report.backend, report.precision) for report in found] == [(one.backend, one.precision) for one in engines]
    with pytest.raises(RuntimeError, match="unsupported instruction"):
        reports([failing[1]])


def test_mixed_graph_has_its_own_gate(engines: list[Engine]) -> None:
    found = reports(engines)["onnxruntime-mixed"]
    assert found.gate == GATES["mixed"]
    assert GATES["float32"] < max(found.relative_error) < GATES["mixed"]
    assert "--parity-ct" in str(found.shortcoming)


def test_graph_of_another_network_fails(engines: list[Engine]) -> None:
    for found in reports(engines, seed=1).values():
        assert f"{max(found.relative_error):.1e}" in str(found.shortcoming)
        assert max(found.relative_error) > 0.01


def test_masks_are_compared_on_a_ct(tmp_path: Path) -> None:
    """A constant is added to the finest features of the other engine, which changes its masks like another bias."""
    image, _ = write_case(tmp_path, "case_1", 1)
    shift = 0.005

    def shifted(windows: torch.Tensor) -> list[torch.Tensor]:
        with torch.no_grad():
            finest, *coarse = small_network()(windows)
            return [finest + shift, *coarse]

    (found,) = reports([Engine("onnxruntime", "bfloat16", "1", lambda: shifted)], volumes=(image,)).values()
    reference, other = torch.zeros(2, 0, dtype=torch.bool), torch.zeros(2, 0, dtype=torch.bool)
    for windows in _ct_windows([image], Preprocessing(spacing=(6.0,) * 3), WINDOW):
        with torch.no_grad():
            finest = small_network()(windows)[0][0].flatten(1)
        reference = torch.cat([reference, HEAD[0] @ finest + HEAD[1][:, None] > 0], 1)
        other = torch.cat([other, HEAD[0] @ (finest + shift) + HEAD[1][:, None] > 0], 1)
    expected = [
        2 * int((a & b).sum()) / int(a.sum() + b.sum()) for a, b in zip(reference, other, strict=True) if a.any()
    ]
    assert found.mask_dsc == pytest.approx(min(expected))
    assert 0.5 < min(expected) < 1


def test_masks_of_low_confidence_are_not_compared(engines: list[Engine], tmp_path: Path) -> None:
    image, _ = write_case(tmp_path, "case_1", 1)
    uncertain = (HEAD[0] / 1e5, HEAD[1] / 1e5)
    found = parity_reports(
        small_network(),
        engines,
        classify=head_of(*uncertain),
        window=WINDOW,
        preprocessing=Preprocessing(spacing=(6.0,) * 3),
        volumes=[image],
    )
    assert [report.mask_dsc for report in found] == [None] * len(found)


@pytest.mark.real_ct
@pytest.mark.parametrize("spacing", [6.0, 40.0])
def test_graph_passes_on_real_cts_also_if_they_are_smaller_than_the_window(
    engines: list[Engine], real_ct: Path, spacing: float
) -> None:
    volumes = sorted((real_ct / "headneck" / "ct").glob("*.nii.gz"))[:2]
    found = reports(engines, volumes=tuple(volumes), spacing=spacing)
    for name in ("onnxruntime", "openvino"):
        assert found[name].source == "ct"
        assert found[name].windows == 4
        assert found[name].shortcoming is None


def test_graphs_of_a_whole_scan_encoder_are_also_compared_on_a_larger_window(
    small_whole_graph: Path, small_whole_mixed_graph: Path
) -> None:
    seen: set[tuple[int, ...]] = set()

    def watched(windows: torch.Tensor) -> list[torch.Tensor]:
        seen.add(tuple(windows.shape[2:]))
        with torch.no_grad():
            return list(small_network().in_air()(windows))

    found = parity_reports(
        small_network(),
        [*cpu_engines(small_whole_graph, small_whole_mixed_graph), Engine("torch", "float32", "1", lambda: watched)],
        classify=head_of(*HEAD),
        window=WINDOW,
        preprocessing=Preprocessing(spacing=(6.0,) * 3),
        volumes=(),
        whole_scan=True,
    )
    assert seen == {WINDOW, (21, 17, 27)}
    assert {report.windows for report in found} == {2}
    assert all(max(report.relative_error) < report.gate for report in found)
