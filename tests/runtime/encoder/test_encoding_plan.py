"""Plans of encoding: memory budget, equal feature maps of all plans, and predicted memory."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from doubles.encoder import scan, write_tiny_encoder
from doubles.errors import refused
from hypothesis import given
from hypothesis import strategies as st

from fseft_edge.runtime.encoder.encoding import encode_scan, held_after_encoding
from fseft_edge.runtime.encoder.encoding_plan import Encoding, encoding_of
from fseft_edge.runtime.encoder.feature_store import FeatureStore
from fseft_edge.runtime.encoder.session import open_session
from fseft_edge.runtime.encoder.windows import WindowLayout
from fseft_edge.runtime.errors import OutOfMemoryError
from fseft_edge.runtime.scans.grid import Grid
from fseft_edge.runtime.system.memory import GB, Budget, first_that_fits

SIDES = st.tuples(*[st.integers(1, 700)] * 3)


def encoding(shape: tuple[int, int, int], *, on_gpu: bool = False, max_batch: int = 1) -> Encoding:
    """Return the quantities for SwinUNETR-48 on a scan of this shape."""
    layout = WindowLayout.plan(shape, (96, 96, 96), 16)
    levels = ((1, 48), (2, 48), (4, 96), (8, 192), (16, 384))
    return Encoding(layout, levels, 1_335_000_000, max_batch, on_gpu, 2, 400_000_000, 260_000_000)


@given(shape=SIDES, ram=st.integers(GB // 10, 40 * GB), vram=st.integers(GB // 10, 40 * GB), on_gpu=st.booleans())
def test_the_predicted_memory_of_a_plan_never_exceeds_the_budget(
    shape: tuple[int, int, int], ram: int, vram: int, on_gpu: bool
) -> None:
    plans = list(encoding(shape, on_gpu=on_gpu, max_batch=2).plans())
    device = torch.device("cpu")
    try:
        plan = first_that_fits(plans, Budget(ram, vram), device, "encoding")
    except OutOfMemoryError:
        assert all(plan.footprint.ram > ram or plan.footprint.vram > vram for plan in plans)
        return
    assert (plan.footprint.ram, plan.footprint.vram) <= (ram, max(vram, plan.footprint.vram))
    more = first_that_fits(plans, Budget(ram + GB, vram + GB), device, "encoding")
    assert plans.index(more) <= plans.index(plan)


@given(shape=SIDES, on_gpu=st.booleans())
def test_a_slower_place_never_needs_more_of_the_faster_memory(shape: tuple[int, int, int], on_gpu: bool) -> None:
    by_place = {plan.place: plan.footprint for plan in encoding(shape, on_gpu=on_gpu).plans()}
    assert by_place["disk"].ram <= by_place["memory"].ram
    if on_gpu:
        assert by_place["memory"].vram <= by_place["device"].vram
        assert by_place["disk"].vram == by_place["memory"].vram


@given(length=st.integers(200, 2000))
def test_the_prediction_does_not_grow_with_the_number_of_slices(length: int) -> None:
    first, longer = (next(encoding((200, 180, slices)).plans()) for slices in (200, length))
    assert first.footprint == longer.footprint


def test_the_sums_cover_one_window_depth() -> None:
    """Channels of all levels (48 + 48/8 + 96/64 + ...) over 336x336x96 voxels in float32: 2.4 GB in memory."""
    plans = {plan.place: plan.footprint.ram for plan in encoding((336, 336, 300)).plans()}
    sums = 4 * 336 * 336 * 96 * (48 + 48 / 8 + 96 / 64 + 192 / 512 + 384 / 4096)
    window = 4 * 96**3 * (48 + 48 / 8 + 96 / 64 + 192 / 512 + 384 / 4096)
    assert plans["memory"] - plans["disk"] == pytest.approx(sums - window, rel=1e-6)


def test_half_precision_halves_the_stored_bytes() -> None:
    half = encoding((600, 600, 300))
    full = replace(half, stored=4, activations=0)
    half = replace(half, activations=0)
    section = 4 * 608 * 608 * 16
    difference = next(full.plans()).footprint.ram - next(half.plans()).footprint.ram
    assert difference == pytest.approx(1.5 * section * 48 / 2, rel=1e-6)


def test_every_plan_gives_the_same_map_bit_for_bit(tmp_path: Path) -> None:
    bundle, volume = write_tiny_encoder(tmp_path / "tiny.encoder"), scan(1).volume
    maps = []
    with open_session(bundle, device="cpu", backend="torch") as session:
        ample = encode_scan(volume, bundle=bundle, session=session, store=FeatureStore(tmp_path / "ample")).features
        layout = WindowLayout.plan(ample.shape, bundle.window, max(level.stride for level in bundle.levels))
        for number, plan in enumerate(encoding_of(layout, bundle, session).plans()):
            budget = Budget(ram=plan.footprint.ram + GB // 50)
            store = FeatureStore(tmp_path / str(number))
            maps.append(encode_scan(volume, bundle=bundle, session=session, store=store, budget=budget).features)
        with refused(OutOfMemoryError) as caught:
            encode_scan(
                volume, bundle=bundle, session=session, store=FeatureStore(tmp_path / "no"), budget=Budget(ram=1)
            )
        assert re.search(r"--memory \d+\.\d\d", str(caught.value))
    for features in maps:
        for level in range(len(ample.levels)):
            whole = [(0, size) for size in ample.meta.level_shape(level)]
            np.testing.assert_array_equal(features.read(level, *whole), ample.read(level, *whole))


def test_running_out_of_memory_while_storing_is_an_error_with_a_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr("fseft_edge.runtime.encoder.feature_map.stored", full)
    bundle = write_tiny_encoder(tmp_path / "tiny.encoder")
    store = FeatureStore(tmp_path / "store")
    with open_session(bundle, device="cpu", backend="torch") as session, refused(OutOfMemoryError) as caught:
        encode_scan(scan(1).volume, bundle=bundle, session=session, store=store)
    assert "--memory" in caught.value.remedy
    assert not list((tmp_path / "store").glob("*/entry"))


def test_a_second_scan_does_not_need_a_larger_budget(tmp_path: Path) -> None:
    """Engines keep memory of the first scan's windows and use this memory again, so it must not count twice."""
    bundle = write_tiny_encoder(tmp_path / "tiny.encoder")
    grid = Grid.of(scan(1).volume, bundle.preprocessing)
    with open_session(bundle, device="cpu", backend="torch") as session:
        layout = WindowLayout.plan((64, 48, 56), bundle.window, 8)
        first = list(encoding_of(layout, bundle, session).plans())
        kept = torch.ones(1 << 25)  # 128 MiB that represent memory kept by an engine
        assert list(encoding_of(layout, bundle, session).plans()) == first
        assert held_after_encoding(grid, bundle, session) <= session.held_before + (64 << 20)
    assert kept[0] == 1
