"""The size constraint on synthetic maps whose first channel is the organ, so that every size is known."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest
import torch
from doubles.features import MemoryFeatures

from fseft_edge.adapter_training import TrainingSettings, untrained_adapter
from fseft_edge.adapters import Adapter, AdapterSettings
from fseft_edge.block_sampling import SupportScan
from fseft_edge.blocks import Box
from fseft_edge.occupancy import Occupancy
from fseft_edge.runtime.encoding import EncodedScan
from fseft_edge.runtime.errors import UsageError
from fseft_edge.runtime.feature_store import FeatureMap
from fseft_edge.runtime.grid import Grid
from fseft_edge.size_priors import SizePrior
from fseft_edge.transduction import (
    TransductionSettings,
    _QuerySizes,
    size_penalty,
    transduce,
)

SHAPE = (48, 48, 64)
VOXEL_MM3 = 27.0
BALL_ML = 4 / 3 * np.pi * 8**3 * VOXEL_MM3 / 1000
TRAINING = TrainingSettings(block=16, batch=4, epochs=12, linear_rate=0.05, residual_rate=0.05)
SETTINGS = TransductionSettings(rate=5e-2, steps=40, training=replace(TRAINING, batch=2))


def _map(seed: int, centre: tuple[float, float, float], *, strength: float = 1.0) -> tuple[MemoryFeatures, np.ndarray]:
    random = np.random.default_rng(seed)
    distance = np.sqrt(sum((axis - c) ** 2 for axis, c in zip(np.indices(SHAPE), centre, strict=True)))
    organ = distance < 8
    finest = torch.from_numpy(random.normal(0, 0.1, (3, *SHAPE)).astype(np.float32))
    # The organ fades towards its rim, so that a threshold decides on its size.
    finest[0] += strength * torch.from_numpy(np.clip(2 - distance / 8, 0, 2).astype(np.float32))
    return MemoryFeatures((finest, torch.nn.functional.avg_pool3d(finest[None], 2)[0])), organ


def _support(seed: int, centre: tuple[float, float, float] = (24, 24, 30)) -> SupportScan:
    features, organ = _map(seed, centre)
    volume = float(organ.sum() * VOXEL_MM3)
    occupancy = Occupancy([organ])
    return SupportScan(cast("FeatureMap", features), SHAPE, occupancy, np.array([True]), (volume,))


def _query(seed: int, centre: tuple[float, float, float] = (20, 26, 30), *, strength: float = 1.0) -> EncodedScan:
    features, _ = _map(seed, centre, strength=strength)
    grid = SimpleNamespace(shape=SHAPE, voxel_volume_mm3=VOXEL_MM3)
    return EncodedScan(cast("Grid", grid), cast("FeatureMap", features))


@pytest.fixture(scope="module")
def support() -> list[SupportScan]:
    return [_support(1), _support(2, (28, 20, 34))]


@pytest.fixture(scope="module")
def adapter(support: list[SupportScan]) -> Adapter:
    """The exact segmenter of these maps: a voxel is the organ's where the first channel exceeds 1."""
    settings = AdapterSettings("spatial", "pyramid", width=4)
    row = torch.tensor([20.0, 0.0, 0.0]), -20.0
    return untrained_adapter(settings, support, head_rows=[row]).eval()


PRIOR = SizePrior.from_volumes([BALL_ML])


def test_a_size_inside_the_prior_changes_nothing(adapter: Adapter, support: list[SupportScan]) -> None:
    done = transduce(adapter, _query(3), support, [PRIOR], settings=SETTINGS)
    assert done.steps == 0
    assert done.adapter is adapter
    assert done.organs[0].notes == ()
    assert PRIOR.low_ml < done.organs[0].before_ml == done.organs[0].after_ml < PRIOR.high_ml


@pytest.mark.parametrize("form", ["relative", "absolute"])
@pytest.mark.parametrize("strength", [0.7, 1.5])
def test_an_organ_found_too_small_or_too_large_is_brought_inside(
    adapter: Adapter, support: list[SupportScan], strength: float, form: str
) -> None:
    before = [tensor.clone() for tensor in adapter.state_dict().values()]
    settings = replace(SETTINGS, form=form, weight=1.0 if form == "relative" else 0.1)
    done = transduce(adapter, _query(3, strength=strength), support, [PRIOR], settings=settings)
    (organ,) = done.organs
    assert (organ.before_ml < PRIOR.low_ml) if strength < 1 else (organ.before_ml > PRIOR.high_ml)
    assert PRIOR.low_ml * 0.999 <= organ.after_ml <= PRIOR.high_ml * 1.001
    assert organ.notes == ()
    assert 0 < done.steps < settings.steps
    for mine, old in zip(adapter.state_dict().values(), before, strict=True):
        assert torch.equal(mine, old)


def test_an_organ_that_the_field_of_view_cuts_is_not_made_larger(adapter: Adapter, support: list[SupportScan]) -> None:
    query = _query(3, (24, 24, 0))
    done = transduce(adapter, query, support, [PRIOR], settings=SETTINGS)
    assert done.organs[0].before_ml < PRIOR.low_ml
    assert done.organs[0].notes == ("cut_off",)
    assert done.steps == 0


def test_a_cut_organ_that_is_too_large_all_the_same_is_made_smaller(
    adapter: Adapter, support: list[SupportScan]
) -> None:
    small = SizePrior(10.0, 30.0)
    settings = replace(SETTINGS, weight=1.0)
    done = transduce(adapter, _query(3, (24, 24, 2)), support, [small], settings=settings)
    assert "cut_off" in done.organs[0].notes
    assert done.organs[0].after_ml < done.organs[0].before_ml


def test_an_absent_organ_is_not_conjured(adapter: Adapter, support: list[SupportScan]) -> None:
    done = transduce(adapter, _query(3, strength=0.0), support, [PRIOR], settings=SETTINGS)
    assert done.organs[0].notes == ("absent",)
    assert done.steps == 0


def test_a_haze_over_the_whole_scan_is_no_organ(adapter: Adapter, support: list[SupportScan]) -> None:
    """Probabilities far below one half everywhere add up to an organ's size, and are none."""
    hazy = Adapter(adapter.settings, adapter.levels, 1)
    hazy.load_state_dict(adapter.state_dict())
    with torch.no_grad():
        hazy.linear_bias()[0] = -4.5
        hazy.direct.weight.zero_()
    done = transduce(hazy.eval(), _query(3, strength=0.0), support, [PRIOR], settings=SETTINGS)
    assert PRIOR.low_ml < done.organs[0].before_ml < PRIOR.high_ml
    assert done.organs[0].notes == ("absent",)
    assert done.steps == 0


def test_a_query_inside_its_priors_is_passed_over_once(
    adapter: Adapter, support: list[SupportScan], monkeypatch: pytest.MonkeyPatch
) -> None:
    forward, seen = Adapter.forward, []

    def counted(self: Adapter, features: list[torch.Tensor], core: Box) -> torch.Tensor:
        seen.append(core)
        return forward(self, features, core)

    monkeypatch.setattr(Adapter, "forward", counted)
    transduce(adapter, _query(3), support, [PRIOR], settings=SETTINGS)
    assert len(seen) == len(set(seen)) == 2 * 2 * 2


def test_only_blocks_with_something_of_a_pulled_organ_are_visited(adapter: Adapter) -> None:
    """What is left out weighs nothing: the volumes and the gradient stay what they are with every block."""
    query = _query(3, (16, 16, 16), strength=0.7)
    gradients, visits = [], []
    for visible in (0.0, 1e-3):
        twin = Adapter(adapter.settings, adapter.levels, 1)
        twin.load_state_dict(adapter.state_dict())
        sizes = _QuerySizes(twin.eval(), query, visible)
        visits.append(sum(sizes._where(torch.tensor([True]))))
        torch.testing.assert_close(sizes.measure(torch.tensor([True])), sizes.at_first)
        sizes.backward(torch.tensor([1.0]))
        gradients.append(twin.direct.weight.grad)
        twin.zero_grad()
        sizes.backward(torch.tensor([0.0]))
        assert all(parameter.grad is None for parameter in twin.parameters())
    assert visits[0] == 8 > visits[1]
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-3, atol=1e-4)


def test_a_size_that_stays_outside_is_flagged(adapter: Adapter, support: list[SupportScan]) -> None:
    one_step = replace(SETTINGS, steps=1, rate=1e-6)
    done = transduce(adapter, _query(3, strength=0.7), support, [PRIOR], settings=one_step)
    assert done.organs[0].notes == ("outside_prior",)
    assert done.steps == 1


def test_the_same_query_gives_the_same_bytes(adapter: Adapter, support: list[SupportScan]) -> None:
    first, second = (transduce(adapter, _query(3, strength=0.7), support, [PRIOR], settings=SETTINGS) for _ in range(2))
    for a, b in zip(first.adapter.state_dict().values(), second.adapter.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_without_any_prior_it_refuses(adapter: Adapter, support: list[SupportScan]) -> None:
    with pytest.raises(UsageError, match="prior"):
        transduce(adapter, _query(3), support, [None])


def test_the_gradient_of_the_penalty_is_that_of_finite_differences(adapter: Adapter) -> None:
    """Through the sum over blocks, in double precision, for the classifier's bias and a weight of each layer."""
    double = Adapter(adapter.settings, adapter.levels, 1).double().eval()
    double.load_state_dict(adapter.state_dict())
    features, _ = _map(3, (20, 26, 30), strength=0.7)
    wide = MemoryFeatures(tuple(tensor.double() for tensor in features.tensors))
    query = replace(_query(3), features=cast("FeatureMap", _Double(wide.tensors)))
    sizes = _QuerySizes(double, query, visible=0.0)
    low, high = torch.tensor([PRIOR.low_ml]).double(), torch.tensor([PRIOR.high_ml]).double()

    def penalty() -> float:
        return float(size_penalty(sizes.measure(torch.tensor([True])), low, high, "relative").sum())

    volumes = sizes.at_first.clone().requires_grad_()
    (pull,) = torch.autograd.grad(size_penalty(volumes, low, high, "relative").sum(), volumes)
    double.zero_grad()
    sizes.backward(pull)
    step = 1e-5
    for name, parameter in double.named_parameters():
        assert parameter.grad is not None
        flat, grad = parameter.data.flatten(), parameter.grad.flatten()
        index = int(grad.abs().argmax())
        old = float(flat[index])
        values = []
        for shifted in (old + step, old - step):
            parameter.data.view(-1)[index] = shifted
            values.append(penalty())
        parameter.data.view(-1)[index] = old
        assert float(grad[index]) == pytest.approx((values[0] - values[1]) / (2 * step), rel=1e-3, abs=1e-7), name


class _Double(MemoryFeatures):
    """Keeps its own precision: ``read_block`` calls ``float`` on what is read."""

    def read(self, level: int, x: tuple[int, int], y: tuple[int, int], z: tuple[int, int]) -> torch.Tensor:
        part = super().read(level, x, y, z)
        part.float = part.double  # type: ignore[method-assign]  # see above
        return part


@pytest.mark.parametrize(
    ("size", "relative", "absolute"), [(50.0, 0.5, 50.0), (100.0, 0.0, 0.0), (180.0, 0.0, 0.0), (400.0, 0.5, 200.0)]
)
def test_the_penalty_is_that_of_the_paper(size: float, relative: float, absolute: float) -> None:
    bounds = torch.tensor([100.0]), torch.tensor([200.0])
    assert float(size_penalty(torch.tensor([size]), *bounds, "relative")) == pytest.approx(relative)
    assert float(size_penalty(torch.tensor([size]), *bounds, "absolute")) == pytest.approx(absolute)
