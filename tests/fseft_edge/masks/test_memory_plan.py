"""Memory plans of the segmentation: budget, equal masks for all plans, and measured memory of adapters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from doubles.encoder import scan, write_case, write_random_adapter, write_tiny_encoder
from doubles.errors import refused
from doubles.features import random_features
from doubles.storages import LiveStorage
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from fseft_edge.adapters.blocks import Box, read_block
from fseft_edge.adapters.network import Adapter, AdapterSettings
from fseft_edge.evaluation.metrics import dice
from fseft_edge.masks import prediction
from fseft_edge.masks.memory_plan import AMPLE, LEAST, adapter_bytes, in_smaller_pieces, plan_segmentation, plans
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
def test_an_adapter_needs_at_most_the_predicted_memory(method: Any, levels: Any, organs: int) -> None:
    adapter = Adapter(AdapterSettings(method, levels), LEVELS, organs).eval()
    features: Any = random_features((64, 64, 64), tuple(level.channels for level in LEVELS))
    core = Box((8, 56), (8, 56), (16, 48))
    with torch.inference_mode(), LiveStorage() as live:
        blocks = [block.clone() for block in read_block(features, adapter.boxes(core))]
        adapter.probabilities(adapter(blocks, core))
    taken = live.peak - sum(tensor.nbytes for tensor in features.tensors[: len(adapter.levels)])
    assert 0.55 <= taken / adapter_bytes(adapter, core) <= 1.0


@given(shape=st.tuples(*[st.integers(2, 600)] * 3), organs=st.integers(1, 40), ram=st.integers(GB // 10, 20 * GB))
def test_the_predicted_memory_of_a_plan_is_within_the_budget(
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


def test_plans_are_ordered_by_decreasing_memory_and_the_first_is_the_default() -> None:
    found = list(plans(grid_of((512, 512, 300)), [Adapter(AdapterSettings(), LEVELS, 5)], held=0))
    assert (found[0].tile, found[0].slab) == (AMPLE.tile, AMPLE.slab)
    taken = [plan.footprint.ram for plan in found]
    assert taken == sorted(taken, reverse=True)


def test_all_plans_give_the_same_mask(tmp_path: Path) -> None:
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


@pytest.mark.parametrize(("largest_block", "is_enough"), [(32, True), (16, False)])
def test_segmentation_repeats_with_smaller_pieces_if_memory_is_exhausted(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    largest_block: int,
    is_enough: bool,
) -> None:
    image, _ = write_case(tmp_path, "case", 1)
    bundle = write_tiny_encoder(tmp_path / "tiny.encoder")
    write_random_adapter(tmp_path / "a.adapter", bundle)
    where: Any = {"device": "cpu", "backend": "torch", "cache": tmp_path / "cache"}
    (expected,) = segment([image], [tmp_path / "a.adapter"], tmp_path / "ample", **where)
    predict = prediction.predict_block

    def scarce(adapter: Adapter, encoded: EncodedScan, core: Box) -> NDArray[np.float32]:
        if max(core.shape) > largest_block:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        return predict(adapter, encoded, core)

    monkeypatch.setattr(prediction, "predict_block", scarce)
    caplog.clear()
    if not is_enough:
        with refused(OutOfMemoryError, LEAST.tile, LEAST.slab) as caught:
            segment([image], [tmp_path / "a.adapter"], tmp_path / "out", **where)
        assert caught.value.exit_code == 4
        return
    (case,) = segment([image], [tmp_path / "a.adapter"], tmp_path / "out", **where)
    assert [record.name for record in caplog.records if record.levelname == "WARNING"] == [in_smaller_pieces.__module__]
    assert case.mask.read_bytes() == expected.mask.read_bytes()
