"""The size constraint on synthetic feature maps whose first channel is the organ, so that every size is known."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest
import torch
from doubles.errors import refused
from doubles.features import MemoryFeatures

from fseft_edge.adaptation.block_sampling import SupportScan
from fseft_edge.adaptation.linear_solver import Voxels
from fseft_edge.adaptation.losses import adaptation_loss
from fseft_edge.adaptation.query_sizes import survey_of, visible_voxels
from fseft_edge.adaptation.size_priors import SizePrior
from fseft_edge.adaptation.soft_labels import Occupancy
from fseft_edge.adaptation.training import TrainingSettings, untrained_adapter
from fseft_edge.adaptation.transduction import Form, TransductionSettings, size_penalty, support_of, transduce
from fseft_edge.adapters.blocks import Box
from fseft_edge.adapters.network import Adapter, AdapterSettings
from fseft_edge.runtime.encoder.encoding import EncodedScan
from fseft_edge.runtime.encoder.feature_store import FeatureMap
from fseft_edge.runtime.errors import UsageError
from fseft_edge.runtime.scans.grid import Grid

SHAPE = (48, 48, 64)
SAMPLED = 800  # voxels; the organ is visible in more voxels
VOXEL_MM3 = 27.0
BALL_ML = 4 / 3 * np.pi * 8**3 * VOXEL_MM3 / 1000
TRAINING = TrainingSettings(block=16, batch=4, epochs=12, linear_rate=0.05, residual_rate=0.05)
SETTINGS = TransductionSettings(weight=10.0, blocks=8, training=replace(TRAINING, batch=2))


def _map(seed: int, centre: tuple[float, float, float], *, strength: float = 1.0) -> tuple[MemoryFeatures, np.ndarray]:
    random = np.random.default_rng(seed)
    distance = np.sqrt(sum((axis - c) ** 2 for axis, c in zip(np.indices(SHAPE), centre, strict=True)))
    organ = distance < 8
    finest = torch.from_numpy(random.normal(0, 0.1, (3, *SHAPE)).astype(np.float32))
    # The signal of the organ decreases towards its border, so that the size depends on the threshold.
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
def scans() -> list[SupportScan]:
    return [_support(1), _support(2, (28, 20, 34))]


@pytest.fixture(scope="module")
def adapter(scans: list[SupportScan]) -> Adapter:
    """An adapter with the exact mask of these maps: a voxel belongs to the organ if the first channel is above 1."""
    settings = AdapterSettings("spatial", "all", width=4)
    row = torch.tensor([20.0, 0.0, 0.0]), -20.0
    return untrained_adapter(settings, scans, head_rows=[row]).eval()


@pytest.fixture(scope="module")
def support(adapter: Adapter, scans: list[SupportScan]) -> Voxels:
    return support_of(adapter, scans, SETTINGS)


PRIOR = SizePrior(0.7 * BALL_ML, 1.3 * BALL_ML)


def test_a_size_inside_the_prior_needs_no_refit(adapter: Adapter, support: Voxels) -> None:
    done = transduce(adapter, _query(3), support, [PRIOR], settings=SETTINGS)
    assert done.evaluations == 0
    assert done.adapter is adapter
    assert done.organs[0].flags == ()
    assert PRIOR.low_ml < done.organs[0].before_ml == done.organs[0].after_ml < PRIOR.high_ml


@pytest.mark.parametrize("form", ["relative", "absolute"])
@pytest.mark.parametrize("strength", [0.7, 1.5])
def test_the_refit_brings_the_size_of_an_organ_into_its_prior(
    adapter: Adapter, support: Voxels, strength: float, form: str
) -> None:
    before = [tensor.clone() for tensor in adapter.state_dict().values()]
    settings = replace(SETTINGS, form=form, weight=10.0 if form == "relative" else 1.0)
    done = transduce(adapter, _query(3, strength=strength), support, [PRIOR], settings=settings)
    (organ,) = done.organs
    assert (organ.before_ml < PRIOR.low_ml) if strength < 1 else (organ.before_ml > PRIOR.high_ml)
    assert PRIOR.low_ml * 0.99 <= organ.after_ml <= PRIOR.high_ml * 1.01
    assert organ.flags == ()
    assert done.evaluations > 0
    for now, old in zip(adapter.state_dict().values(), before, strict=True):
        assert torch.equal(now, old)


def test_only_the_classifiers_are_refitted(adapter: Adapter, support: Voxels) -> None:
    done = transduce(adapter, _query(3, strength=0.7), support, [PRIOR], settings=SETTINGS)
    assert not torch.equal(done.adapter.linear_weight(), adapter.linear_weight())
    assert torch.equal(
        done.adapter.get_parameter("steps.0.first.weight"), adapter.get_parameter("steps.0.first.weight")
    )


def test_an_organ_at_the_border_of_the_field_of_view_is_not_made_larger(adapter: Adapter, support: Voxels) -> None:
    """The lower half of the organ is outside the scan, so that the correct size is half of the organ."""
    query = _query(3, (24, 24, 0))
    done = transduce(adapter, query, support, [PRIOR], settings=SETTINGS)
    assert done.organs[0].before_ml == pytest.approx(BALL_ML / 2, rel=0.2)
    assert done.organs[0].before_ml < PRIOR.low_ml
    assert done.organs[0].flags == ("cut_off",)
    assert done.evaluations == 0


def test_an_organ_at_the_border_that_is_too_large_is_made_smaller(adapter: Adapter, support: Voxels) -> None:
    done = transduce(adapter, _query(3, (24, 24, 2)), support, [SizePrior(10.0, 30.0)], settings=SETTINGS)
    assert "cut_off" in done.organs[0].flags
    assert done.organs[0].after_ml < done.organs[0].before_ml


def test_an_absent_organ_is_not_refitted(adapter: Adapter, support: Voxels) -> None:
    done = transduce(adapter, _query(3, strength=0.0), support, [PRIOR], settings=SETTINGS)
    assert done.organs[0].flags == ("absent",)
    assert done.evaluations == 0


def _with_constant_probability(adapter: Adapter, bias: float) -> Adapter:
    """Return an adapter with a small constant probability in all voxels."""
    constant = Adapter(adapter.settings, adapter.levels, 1)
    constant.load_state_dict(adapter.state_dict())
    with torch.no_grad():
        constant.linear_bias()[0] = bias
        constant.direct.weight.zero_()
    return constant.eval()


def test_small_probabilities_over_the_complete_scan_are_not_an_organ(adapter: Adapter, support: Voxels) -> None:
    """The sum of the probabilities is the size of an organ, but all probabilities are far below 0.5."""
    constant = _with_constant_probability(adapter, -4.5)
    done = transduce(constant, _query(3, strength=0.0), support, [PRIOR], settings=SETTINGS)
    assert PRIOR.low_ml < done.organs[0].before_ml < PRIOR.high_ml
    assert done.organs[0].flags == ("absent",)
    assert done.evaluations == 0


def test_a_query_inside_its_priors_is_read_only_once(
    adapter: Adapter, support: Voxels, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward, computed = Adapter.forward, []

    def counted(self: Adapter, features: list[torch.Tensor], core: Box) -> torch.Tensor:
        computed.append(core)
        return forward(self, features, core)

    monkeypatch.setattr(Adapter, "forward", counted)
    transduce(adapter, _query(3), support, [PRIOR], settings=SETTINGS)
    assert len(computed) == len(set(computed)) == 2


@pytest.mark.parametrize("voxels", [100_000, SAMPLED])
def test_sizes_from_the_visible_voxels_equal_those_of_the_complete_query(adapter: Adapter, voxels: int) -> None:
    """The test uses all voxels in which the organ is visible, or a sample of them."""
    query = _query(3, (16, 16, 16), strength=0.7)
    survey = survey_of(adapter, query)
    settings = replace(SETTINGS, voxels=voxels)
    voxels_of_query = visible_voxels(
        adapter, query, survey, torch.tensor([True]), visible=settings.visible, most=settings.voxels, seed=0
    )
    if voxels == SAMPLED:
        assert len(voxels_of_query.features) == SAMPLED
    else:
        assert SAMPLED < len(voxels_of_query.features) < np.prod(SHAPE) / 4
    bias = adapter.linear_bias() + 0.5
    with torch.no_grad():
        sizes = voxels_of_query.sizes(adapter, adapter.linear_weight(), bias)
    moved = Adapter(adapter.settings, adapter.levels, 1)
    moved.load_state_dict(adapter.state_dict())
    moved.set_linear(adapter.linear_weight(), bias)
    expected = float(survey_of(moved.eval(), query).sizes)
    assert expected > float(survey.sizes)
    assert float(sizes) == pytest.approx(expected, rel=0.05 if voxels == SAMPLED else 0.01)


def test_a_size_that_remains_outside_the_prior_is_flagged(adapter: Adapter, support: Voxels) -> None:
    weak = replace(SETTINGS, weight=1e-9, ridge=1e6)
    done = transduce(adapter, _query(3, strength=0.7), support, [PRIOR], settings=weak)
    assert done.organs[0].flags == ("outside_prior",)
    assert done.evaluations > 0


def test_equal_queries_give_bit_identical_weights(adapter: Adapter, support: Voxels) -> None:
    first, second = (transduce(adapter, _query(3, strength=0.7), support, [PRIOR], settings=SETTINGS) for _ in range(2))
    for a, b in zip(first.adapter.state_dict().values(), second.adapter.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_a_refit_without_any_prior_is_refused(adapter: Adapter, support: Voxels) -> None:
    with refused(UsageError, "prior"):
        transduce(adapter, _query(3), support, [None])


@pytest.mark.parametrize("form", ["relative", "absolute"])
def test_the_gradient_of_the_penalty_equals_finite_differences(form: Form) -> None:
    """The penalty is a function of the weights, in double precision, for sizes below and above the prior."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(500, 6, generator=generator, dtype=torch.float64)
    start = torch.randn(3, 6, generator=generator, dtype=torch.float64)
    low, high = torch.tensor([1.5, 10.0, 0.0]).double(), torch.tensor([2.0, 12.0, torch.inf]).double()

    def penalty(weight: torch.Tensor) -> torch.Tensor:
        return size_penalty(torch.sigmoid(features @ weight.T).sum(0) * 0.02, low, high, form).sum()

    assert torch.autograd.gradcheck(penalty, start.requires_grad_())
    (gradient,) = torch.autograd.grad(penalty(start), start)
    assert bool(gradient[:2].abs().amax(1).gt(0).all())
    assert not bool(gradient[2].any())


def test_the_refit_minimises_the_sum_of_support_loss_ridge_and_penalty(adapter: Adapter, support: Voxels) -> None:
    """At the solution, the gradient of the sum is zero. The size is outside its prior, where the sum is smooth."""
    query = _query(3, strength=0.7)
    settings = replace(SETTINGS, weight=0.05)
    survey = survey_of(adapter, query)
    voxels_of_query = visible_voxels(
        adapter, query, survey, torch.tensor([True]), visible=settings.visible, most=settings.voxels, seed=0
    )
    refitted = transduce(adapter, query, support, [PRIOR], settings=settings)
    assert refitted.organs[0].flags == ("outside_prior",)
    weight = refitted.adapter.linear_weight().requires_grad_()
    bias = refitted.adapter.linear_bias()
    logits = (support.features @ weight.T + bias)[..., None, None, None]
    loss = adaptation_loss(logits, support.targets[..., None, None, None], support.weight, "sigmoid")
    sizes = voxels_of_query.sizes(adapter, weight, bias)
    low, high = torch.tensor([PRIOR.low_ml]), torch.tensor([PRIOR.high_ml])
    ridge = settings.ridge / 2 * (weight - adapter.linear_weight()).square().sum()
    (loss + ridge + settings.weight * size_penalty(sizes, low, high, "relative").sum()).backward()
    assert weight.grad is not None
    assert float(weight.grad.abs().max()) < 5e-3


@pytest.mark.parametrize(
    ("size", "relative", "absolute"), [(50.0, 0.5, 50.0), (100.0, 0.0, 0.0), (180.0, 0.0, 0.0), (400.0, 0.5, 200.0)]
)
def test_the_penalty_is_the_formula_of_the_paper(size: float, relative: float, absolute: float) -> None:
    bounds = torch.tensor([100.0]), torch.tensor([200.0])
    assert float(size_penalty(torch.tensor([size]), *bounds, "relative")) == pytest.approx(relative)
    assert float(size_penalty(torch.tensor([size]), *bounds, "absolute")) == pytest.approx(absolute)


def test_with_softmax_the_classifier_of_the_background_is_refitted_too(scans: list[SupportScan]) -> None:
    settings = AdapterSettings("linear", "all", activation="softmax")
    softmax = untrained_adapter(settings, scans, head_rows=[(torch.tensor([20.0, 0.0, 0.0]), -20.0)]).eval()
    support = support_of(softmax, scans, SETTINGS)
    done = transduce(softmax, _query(3, strength=0.7), support, [PRIOR], settings=SETTINGS)
    assert done.organs[0].before_ml < PRIOR.low_ml
    assert PRIOR.low_ml * 0.99 <= done.organs[0].after_ml <= PRIOR.high_ml * 1.01
    assert not torch.equal(done.adapter.linear_weight()[0], softmax.linear_weight()[0])


def test_an_organ_inside_its_prior_keeps_its_classifier(scans: list[SupportScan]) -> None:
    """One organ is inside its prior and one is too small. The classifier of the first stays bit-identical."""
    settings = AdapterSettings("linear", "finest")
    rows = [(torch.tensor([20.0, 0.0, 0.0]), -20.0)] * 2
    adapter = untrained_adapter(settings, scans, head_rows=rows).eval()
    both = [replace(scan, occupancy=_twice(scan), annotated=np.array([True, True])) for scan in scans]
    support = support_of(adapter, both, SETTINGS)
    size = float(survey_of(adapter, _query(3)).sizes[0])
    priors = [SizePrior(0.9 * size, 1.1 * size), SizePrior(1.5 * size, 2 * size)]
    refitted = transduce(adapter, _query(3), support, priors, settings=SETTINGS).adapter
    assert torch.equal(refitted.linear_weight()[0], adapter.linear_weight()[0])
    assert not torch.equal(refitted.linear_weight()[1], adapter.linear_weight()[1])


def _twice(scan: SupportScan) -> Occupancy:
    organ = scan.occupancy.block(Box(*((0, size) for size in SHAPE)))[0].numpy()
    return Occupancy([organ, organ])


def test_small_probabilities_are_not_refitted_if_the_prior_starts_at_zero(adapter: Adapter, support: Voxels) -> None:
    """The sum of the probabilities is above the prior, but the organ is not visible in any voxel."""
    constant = _with_constant_probability(adapter, -5.0)
    done = transduce(constant, _query(3, strength=0.0), support, [SizePrior(0.0, 1.0)], settings=SETTINGS)
    assert done.organs[0].before_ml > 1.0
    assert done.organs[0].flags == ("absent",)
    assert done.evaluations == 0
