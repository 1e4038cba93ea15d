"""Chunks of a grid: their features are those of the whole grid, for every backend without a plane-by-plane pass."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import numpy as np
import pytest
import torch
from doubles.errors import refused
from doubles.models import small_contents, small_graph_bytes, small_network
from torch import Tensor

from fseft_edge.runtime.encoder import chunks
from fseft_edge.runtime.encoder.backends.base import EncoderSession
from fseft_edge.runtime.encoder.bundle import EncoderBundle
from fseft_edge.runtime.encoder.chunks import chunk_bytes, chunks_of, encoded_in_chunks, kept_after_chunks
from fseft_edge.runtime.encoder.networks.base import WholeScan
from fseft_edge.runtime.encoder.session import open_session
from fseft_edge.runtime.encoder.whole_scan import plan_whole_scan, stream_whole_scan
from fseft_edge.runtime.errors import OutOfMemoryError
from fseft_edge.runtime.system.memory import Budget

WHOLE = small_network().whole_scan
assert WHOLE is not None
SHAPE = (10, 13, 75)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> EncoderBundle:
    folder = tmp_path_factory.mktemp("whole")
    (folder / "graph").write_bytes(small_graph_bytes(whole_scan=True))
    return EncoderBundle.write(folder / "s.encoder", small_contents(graph=folder / "graph", whole_scan=WHOLE))


@pytest.fixture(params=["onnxruntime", "openvino"])
def session(bundle: EncoderBundle, request: pytest.FixtureRequest) -> Iterator[EncoderSession]:
    with open_session(bundle, "cpu", request.param, precision="float32") as opened:
        yield opened


@pytest.fixture
def image() -> Tensor:
    return torch.rand(SHAPE, generator=torch.Generator().manual_seed(0))


def joined(results: list[tuple[tuple[int, int], list[Tensor]]]) -> list[Tensor]:
    assert results[0][0][0] == 0
    assert all(before[1] == after[0] for (before, _), (after, _) in pairwise(results))
    return [torch.cat(level, -1) for level in zip(*(levels for _, levels in results), strict=True)]


@pytest.mark.parametrize("core", [8, 24, 192])
def test_features_are_those_of_the_whole_grid_and_planes_are_read_once(
    session: EncoderSession, image: Tensor, core: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunks, "CORE", core)
    read: list[int] = []

    def planes(start: int, stop: int) -> Tensor:
        read.extend(range(start, stop))
        return image[..., start:stop]

    found = joined(list(encoded_in_chunks(session, planes, SHAPE, section=4)))
    assert read == list(range(SHAPE[2]))
    with torch.no_grad():
        expected = small_network().in_air()(image[None, None])
    for a, b in zip(expected, found, strict=True):
        assert a.shape[1:] == b.shape
        assert float((a[0] - b).abs().max()) <= 1e-5 * float(a.abs().max())


@pytest.mark.parametrize("planes", [1, 191, 192, 193, 500, 1000])
def test_chunks_cover_the_grid_in_parts_of_nearly_the_same_length(planes: int) -> None:
    whole = WholeScan(16, 96)
    cores = [core for core, _ in chunks_of(planes, whole)]
    assert cores[0][0] == 0
    assert cores[-1][1] == planes
    assert all(before[1] == after[0] for before, after in pairwise(cores))
    lengths = [stop - start for start, stop in cores]
    assert max(lengths) <= chunks.CORE
    assert len(lengths) == -(-planes // chunks.CORE)
    assert all(start % 16 == 0 for start, _ in cores)
    for core, around in chunks_of(planes, whole):
        assert around == (max(core[0] - 96, 0), min(core[1] + 96, planes))


def test_whole_scans_of_an_engine_are_those_of_the_plane_by_plane_pass(
    bundle: EncoderBundle, session: EncoderSession, image: Tensor
) -> None:
    def streamed(opened: EncoderSession) -> list[Tensor]:
        def read(start: int, stop: int) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
            return image[..., start:stop].numpy()

        plan = plan_whole_scan(SHAPE, opened, Budget(ram=1 << 40))
        sections = stream_whole_scan(read, SHAPE, opened, plan)
        return joined([((section.z0, section.z1), [*map(torch.clone, section.levels)]) for section in sections])

    with open_session(bundle, "cpu", "torch") as reference:
        expected = streamed(reference)
    for a, b in zip(expected, streamed(session), strict=True):
        assert float((a - b).abs().max()) <= 1e-5 * float(a.abs().max())


def test_a_budget_that_is_too_small_for_a_chunk_is_refused(session: EncoderSession) -> None:
    shape = (256, 256, 192)
    assert chunk_bytes(session, shape) > 1 << 30
    with refused(OutOfMemoryError, "GB"):
        plan_whole_scan(shape, session, Budget(ram=session.held_before + (1 << 30)))
    plan_whole_scan(shape, session, Budget(ram=session.held_before + 2 * chunk_bytes(session, shape)))


def test_longer_scans_need_no_more_memory_than_the_largest_chunk(session: EncoderSession) -> None:
    assert chunk_bytes(session, (64, 64, 5000)) <= chunk_bytes(session, (64, 64, 3 * chunks.CORE))


def test_only_openvino_keeps_the_memory_of_a_chunk(session: EncoderSession) -> None:
    shape = (64, 64, 100)
    kept = kept_after_chunks(session, shape)
    if session.backend == "openvino":
        assert chunk_bytes(session, shape) / 2 < kept <= chunk_bytes(session, shape)
    else:
        assert kept == 0
