"""Parity: the figure itself, the windows it is taken on, and that it notices a difference."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from doubles.models import WINDOW, small_network

from fseft_edge.export.parity import GATE, onnxruntime_parity, relative_errors
from fseft_edge.runtime.bundle import ParityReport
from fseft_edge.runtime.preprocessing import Preprocessing


def report(graph: Path, *, seed: int = 0, volumes: tuple[Path, ...] = (), spacing: float = 6.0) -> ParityReport:
    return onnxruntime_parity(
        small_network(seed),
        graph,
        window=WINDOW,
        preprocessing=Preprocessing(spacing=(spacing,) * 3),
        volumes=volumes,
    )


def test_relative_error_is_largest_difference_over_largest_feature() -> None:
    expected = [torch.tensor([1.0, -4.0]), torch.tensor([2.0])]
    features = [torch.tensor([1.5, -4.0]), torch.tensor([2.0])]
    assert relative_errors(expected, features) == [0.125, 0.0]


def test_feature_that_is_not_a_number_is_infinitely_wrong() -> None:
    assert relative_errors([torch.tensor([1.0])], [torch.tensor([float("nan")])]) == [float("inf")]


def test_graph_of_the_network_passes_on_noise(small_graph: Path) -> None:
    result = report(small_graph)
    assert result.passed
    assert result.source == "noise"
    assert result.windows == 2
    assert len(result.relative_error) == 2
    assert 0 < max(result.relative_error) < GATE


def test_report_is_the_same_every_time(small_graph: Path) -> None:
    assert report(small_graph) == report(small_graph)


def test_graph_of_another_network_fails(small_graph: Path) -> None:
    result = report(small_graph, seed=1)
    assert not result.passed
    assert max(result.relative_error) > 0.01


@pytest.mark.real_ct
@pytest.mark.parametrize("spacing", [6.0, 40.0])
def test_graph_passes_on_real_ct_and_on_one_smaller_than_the_window(
    small_graph: Path, real_ct: Path, spacing: float
) -> None:
    volumes = sorted((real_ct / "headneck" / "ct").glob("*.nii.gz"))[:2]
    result = report(small_graph, volumes=tuple(volumes), spacing=spacing)
    assert result.source == "ct"
    assert result.windows == 4
    assert result.passed
