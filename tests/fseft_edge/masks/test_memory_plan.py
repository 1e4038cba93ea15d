"""Plans of segmentation: within the budget, the same mask, and what adapters' tensors really take."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from doubles.encoder import scan, write_case, write_random_adapter, write_tiny_encoder
from doubles.features import random_features
from doubles.storages import LiveStorage
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from fseft_edge.adapters.blocks import Box, read_block
from fseft_edge.adapters.network import Adapter, AdapterSettings
from fseft_edge.evaluation.metrics import dice
from fseft_edge.masks import prediction
from fseft_edge.masks.memory_plan import AMPLE, adapter_bytes, plan_segmentation, plans
from fseft_edge.masks.prediction import segment_encoded
from fseft_edge.runtime.encoder.encoding import EncodedScan, encode_scan
from fseft_edge.runtime.encoder.feature_store import FeatureStore
from fseft_edge.runtime.encoder.networks.base import FeatureLevel
from fseft_edge.runtime.encoder.session import open_session
from fseft_edge.runtime.errors import OutOfMemoryError
from fseft_edge.runtime.scans.grid import Grid
from fseft_edge.runtime.scans.preprocessing import Preprocessing
from fseft_edge.runtime.scans.volume import Volume
from fseft_edge.runtime.system.memory import GB, Budget
from fseft_edge.segmentation.segment import segment

LEVELS = tuple(FeatureLevel(2**level, channels) for level, channels in enumerate((16, 32, 64, 128)))
HELD = 400_000_000
METHODS = [(method, levels) for method in ("linear", "pointwise", "spatial") for levels in ("finest", "all")]


def grid_of(shape: tuple[int, int, int], spacing: float = 1.5) -> Grid:
    affine = np.diag([spacing, spacing, spacing, 1.0])
    return Grid.of(Volume(np.zeros(shape, np.int16), affine), Preprocessing())


@pytest.mark.parametrize(("method", "levels"), METHODS)
@pytest.mark.parametrize("organs", [1, 5])
def test_an_adapter_takes_what_is_said_or_a_little_less(method: Any, levels: Any, organs: int) -> None:
    adapter = Adapter(AdapterSettings(method, levels), LEVELS, organs).eval()
    features: Any = random_features((64, 64, 64), tuple(level.channels for level in LEVELS))
    core = Box((8, 56), (8, 56), (16, 48))
    with torch.inference_mode(), LiveStorage() as live:
        blocks = [block.clone() for block in read_block(features, adapter.boxes(core))]
        adapter.probabilities(adapter(blocks, core))
    taken = live.peak - sum(tensor.nbytes for tensor in features.tensors[: len(adapter.levels)])
    assert 0.55 <= taken / adapter_bytes(adapter, core) <= 1.0


@given(shape=st.tuples(*[st.integers(2, 600)] * 3), organs=st.integers(1, 40), ram=st.integers(GB // 10, 20 * GB))
def test_a_plan_never_exceeds_the_budget_by_its_own_prediction(
    shape: tuple[int, int, int], organs: int, ram: int
) -> None:
    array = np.broadcast_to(np.int16(0), shape)
    grid = Grid.of(Volume(array, np.diag([1.0, 1.0, 2.0, 1.0])), Preprocessing())
    adapters = [Adapter(AdapterSettings("linear", "finest"), LEVELS, organs)]
    try:
        plan = plan_segmentation(grid, adapters, Budget(ram), HELD)
    except OutOfMemoryError:
        assert min(plan.footprint.ram for plan in plans(grid, adapters, HELD)) > ram
        return
    assert plan.footprint.ram <= ram
    more = plan_segmentation(grid, adapters, Budget(ram + GB), HELD)
    assert (more.tile, more.slab) >= (plan.tile, plan.slab)


def test_plans_take_less_and_less_and_the_first_is_the_usual_one() -> None:
    found = list(plans(grid_of((512, 512, 300)), [Adapter(AdapterSettings(), LEVELS, 5)], held=0))
    assert (found[0].tile, found[0].slab) == (AMPLE.tile, AMPLE.slab)
    taken = [plan.footprint.ram for plan in found]
    assert taken == sorted(taken, reverse=True)


def test_the_mask_is_the_same_from_ample_memory_to_the_smallest_plan(tmp_path: Path) -> None:
    bundle = write_tiny_encoder(tmp_path / "tiny.encoder")
    settings = AdapterSettings("spatial", "all", width=4)
    adapter = write_random_adapter(tmp_path / "a.adapter", bundle, ("liver", "spleen"), settings=settings).adapter
    with open_session(bundle, device="cpu", backend="torch") as session:
        store = FeatureStore(tmp_path / "store")
        encoded = encode_scan(scan(1).volume, bundle=bundle, session=session, store=store)
    reference = segment_encoded(encoded, [adapter])
    assert len(np.unique(reference)) == 3
    for plan in plans(encoded.grid, [adapter], held=0):
        mask = segment_encoded(encoded, [adapter], plan)
        for label in (1, 2):
            score = dice(mask == label, reference == label)
            assert score is not None
            assert score >= 0.9999


@pytest.mark.parametrize(("fits", "code"), [(32, 0), (16, 4)])
def test_smaller_pieces_where_memory_runs_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, fits: int, code: int
) -> None:
    image, _ = write_case(tmp_path, "case", 1)
    bundle = write_tiny_encoder(tmp_path / "tiny.encoder")
    write_random_adapter(tmp_path / "a.adapter", bundle)
    where: Any = {"device": "cpu", "backend": "torch", "cache": tmp_path / "cache"}
    (expected,) = segment([image], [tmp_path / "a.adapter"], tmp_path / "ample", **where)
    predict = prediction._predict_block

    def scarce(adapter: Adapter, encoded: EncodedScan, core: Box) -> NDArray[np.float32]:
        if max(core.shape) > fits:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        return predict(adapter, encoded, core)

    monkeypatch.setattr(prediction, "_predict_block", scarce)
    if code:
        with pytest.raises(OutOfMemoryError, match="smallest pieces") as caught:
            segment([image], [tmp_path / "a.adapter"], tmp_path / "out", **where)
        assert caught.value.exit_code == code
        return
    (case,) = segment([image], [tmp_path / "a.adapter"], tmp_path / "out", **where)
    assert "Memory ran out while segmenting" in caplog.text
    assert case.mask.read_bytes() == expected.mask.read_bytes()
