"""Training on a part of a scan: which windows are encoded, and that blocks need no others."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from doubles.encoder import WINDOW, write_tiny_encoder

from fseft_edge.adaptation.block_sampling import BlockSampler, SupportScan
from fseft_edge.adaptation.partial_encoding import AROUND_ORGAN, PartialEncoding
from fseft_edge.adaptation.soft_labels import Occupancy
from fseft_edge.adapters.blocks import Box
from fseft_edge.adapters.network import Adapter, AdapterSettings
from fseft_edge.runtime.encoder.backends.base import EncoderSession
from fseft_edge.runtime.encoder.bundle import EncoderBundle
from fseft_edge.runtime.encoder.feature_store import FeatureStore
from fseft_edge.runtime.encoder.on_demand import FeaturesOnDemand, encode_on_demand
from fseft_edge.runtime.encoder.session import open_session
from fseft_edge.runtime.scans.volume import Volume

SHAPE = (176, 80, 64)
ORGAN = Box((60, 68), (34, 44), (20, 30))


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[EncoderBundle, EncoderSession]]:
    bundle = write_tiny_encoder(tmp_path_factory.mktemp("part") / "tiny.encoder")
    with open_session(bundle, "cpu", "torch") as session:
        yield bundle, session


def scan_on_demand(encoder: tuple[EncoderBundle, EncoderSession], organ: Box = ORGAN) -> SupportScan:
    """Return a scan of noise with a box-shaped organ; no window is encoded."""
    bundle, session = encoder
    voxels = np.random.default_rng(1).integers(-150, 200, SHAPE, np.int16)
    volume = Volume(voxels, np.diag([*bundle.preprocessing.spacing, 1.0]))
    share = np.zeros(SHAPE, np.float32)
    share[tuple(slice(*along) for along in organ.ranges)] = 1.0
    store = FeatureStore(Path(tempfile.mkdtemp(dir=bundle.path.parent)))  # an empty one for each scan
    features = encode_on_demand(volume, bundle=bundle, session=session, store=store).features
    assert isinstance(features, FeaturesOnDemand)
    return SupportScan(features, SHAPE, Occupancy([share]), np.array([True]), (1.0,))  # type: ignore[arg-type]  # reads like a map


def adapter_for(bundle: EncoderBundle, method: str = "linear", levels: str = "all") -> Adapter:
    return Adapter(AdapterSettings(method, levels), bundle.levels, 1)  # type: ignore[arg-type]  # literals


@pytest.mark.parametrize(
    ("organ", "method", "levels"),
    [
        (ORGAN, "linear", "finest"),
        (ORGAN, "spatial", "all"),
        (Box((0, 4), (76, 80), (0, 30)), "linear", "all"),
    ],
    ids=["finest", "context", "corner"],
)
def test_blocks_need_no_window_beyond_those_that_were_encoded(
    encoder: tuple[EncoderBundle, EncoderSession], organ: Box, method: str, levels: str
) -> None:
    scan, adapter = scan_on_demand(encoder, organ), adapter_for(encoder[0], method, levels)
    features = scan.features
    assert isinstance(features, FeaturesOnDemand)
    region = PartialEncoding(adapter, 2, [None]).encode(scan, np.random.default_rng(0))
    encoded = features.asked
    assert 0 < encoded < features.windows
    sampler = BlockSampler(adapter, [replace(scan, region=region)], block=32, batch=4, random=np.random.default_rng(2))
    shown = sum(float(sampler.draw().targets.sum()) for _ in range(12))
    assert features.asked == encoded
    assert shown > 0


def test_windows_elsewhere_are_at_most_the_stated_number_and_drawn_by_the_seed(
    encoder: tuple[EncoderBundle, EncoderSession],
) -> None:
    def encoded(elsewhere: int, seed: int = 0) -> tuple[int, tuple[Box, ...]]:
        scan = scan_on_demand(encoder)
        part = PartialEncoding(adapter_for(encoder[0], levels="finest"), elsewhere, [None])
        region = part.encode(scan, np.random.default_rng(seed))
        assert isinstance(scan.features, FeaturesOnDemand)
        return scan.features.asked, region

    around, (organ,) = encoded(0)
    for (low, high), (first, last) in zip(organ.ranges, ORGAN.ranges, strict=True):
        assert low <= first - AROUND_ORGAN + 24
        assert last + AROUND_ORGAN - 24 <= high
    more, places = encoded(8)
    assert around < more <= around + 8
    assert places[0] == organ
    assert len(places) > 1
    assert encoded(8) == (more, places)
    assert encoded(8, seed=1)[1] != places


def test_a_scan_whose_windows_are_all_encoded_has_no_region(encoder: tuple[EncoderBundle, EncoderSession]) -> None:
    scan = scan_on_demand(encoder, Box(*((0, size) for size in SHAPE)))
    assert min(SHAPE) > max(WINDOW)
    assert PartialEncoding(adapter_for(encoder[0]), 0, [None]).encode(scan, np.random.default_rng(0)) == ()
