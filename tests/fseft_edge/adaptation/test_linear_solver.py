"""The linear solver: comparison with another solver, gradient at the solution, and sampling of voxels."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from doubles.features import MemoryFeatures
from sklearn.linear_model import LogisticRegression

from fseft_edge.adaptation.linear_solver import Voxels, gather_voxels, solve
from fseft_edge.adaptation.losses import adaptation_loss
from fseft_edge.adapters.blocks import Box, read_block
from fseft_edge.adapters.network import Adapter, AdapterSettings


def _voxels(organs: int = 1, count: int = 3000) -> Voxels:
    generator = torch.Generator().manual_seed(3)
    features = torch.randn(count, 5, generator=generator)
    logits = features @ torch.randn(5, organs, generator=generator) - 0.5
    targets = (torch.rand(count, organs, generator=generator) < torch.sigmoid(logits)).float()
    if organs > 1:  # no voxel belongs to two organs
        targets = targets * (targets.cumsum(1) == 1)
    weight = torch.randint(1, 4, (count, 1), generator=generator).float()
    return Voxels(features, targets, weight.expand(-1, organs))


def test_the_solution_equals_logistic_regression() -> None:
    voxels, ridge = _voxels(), 1e-2
    solution = solve(voxels, torch.zeros(1, 5), torch.zeros(1), ridge=ridge, activation="sigmoid", dice_weight=0.0)
    other = LogisticRegression(C=1 / (ridge * float(voxels.weight[:, 0].sum())), tol=1e-8, max_iter=1000)
    other.fit(voxels.features.numpy(), voxels.targets[:, 0].numpy(), sample_weight=voxels.weight[:, 0].numpy())
    np.testing.assert_allclose(solution.weight.numpy(), other.coef_, atol=2e-3)
    np.testing.assert_allclose(solution.bias.numpy(), other.intercept_, atol=2e-3)


def test_the_softmax_solution_equals_multinomial_regression_up_to_a_common_offset() -> None:
    voxels, ridge = _voxels(organs=2), 1e-2
    solution = solve(voxels, torch.zeros(3, 5), torch.zeros(3), ridge=ridge, activation="softmax", dice_weight=0.0)
    other = LogisticRegression(C=1 / (ridge * float(voxels.weight[:, 0].sum())), tol=1e-8, max_iter=1000)
    labels = (voxels.targets * torch.tensor([1.0, 2.0])).sum(1).numpy()
    other.fit(voxels.features.numpy(), labels, sample_weight=voxels.weight[:, 0].numpy())
    np.testing.assert_allclose(solution.weight.numpy(), other.coef_, atol=2e-3)
    offset = solution.bias.numpy() - other.intercept_
    np.testing.assert_allclose(offset, offset.mean(), atol=2e-3)


@pytest.mark.parametrize("activation", ["sigmoid", "softmax"])
def test_the_gradient_at_the_solution_is_zero_with_the_dice_term(activation: str) -> None:
    voxels, ridge = _voxels(organs=2), 1e-2
    classes = 2 + (activation == "softmax")
    start = torch.randn(classes, 5, generator=torch.Generator().manual_seed(0))
    solution = solve(voxels, start, torch.zeros(classes), ridge=ridge, activation=activation)  # type: ignore[arg-type]  # parametrised literal
    weight = solution.weight.clone().requires_grad_()
    logits, targets = voxels.features @ weight.T + solution.bias, voxels.targets
    as_samples = (..., None, None, None)
    loss = adaptation_loss(logits[as_samples], targets[as_samples], voxels.weight, activation)  # type: ignore[arg-type]  # parametrised literal
    assert float(loss.detach()) == pytest.approx(solution.loss)
    (loss + ridge / 2 * (weight - start).square().sum()).backward()
    assert weight.grad is not None
    assert float(weight.grad.abs().max()) < 1e-3


def test_a_strong_ridge_keeps_the_start_values() -> None:
    start = torch.tensor([[1.0, -2.0, 0.0, 0.5, 3.0]])
    solution = solve(_voxels(), start, torch.zeros(1), ridge=1e4, activation="sigmoid")
    torch.testing.assert_close(solution.weight, start, atol=1e-3, rtol=0)


def test_voxels_without_annotation_have_no_influence() -> None:
    voxels = _voxels()
    unannotated = Voxels(voxels.features, 1 - voxels.targets, torch.zeros_like(voxels.weight))
    both = Voxels.joined([voxels, unannotated])
    expected, solution = (
        solve(part, torch.zeros(1, 5), torch.zeros(1), ridge=1e-2, activation="sigmoid") for part in (voxels, both)
    )
    torch.testing.assert_close(expected.weight, solution.weight, atol=1e-3, rtol=1e-3)


def test_voxels_near_an_organ_are_sampled_more_often_and_the_weights_represent_the_complete_block() -> None:
    generator = torch.Generator().manual_seed(0)
    features = MemoryFeatures((torch.randn(3, 32, 32, 32), torch.randn(4, 16, 16, 16)))
    adapter = Adapter(AdapterSettings("linear", "all"), features.levels, 2)
    core = Box((0, 32), (0, 32), (0, 32))
    targets = torch.zeros(2, 32, 32, 32)
    targets[1, 10:14, 10:14, 10:14] = 1
    block = read_block(features, adapter.boxes(core))  # type: ignore[arg-type]  # a test double
    voxels = gather_voxels(adapter, block, targets, torch.tensor([1.0, 0.0]), generator)
    near, far = voxels.weight[:, 0] == 4, voxels.weight[:, 0] == 50
    assert bool((near | far).all())
    assert 4 * int(near.sum()) == pytest.approx(10**3, rel=0.2)
    assert float(voxels.weight[:, 0].sum()) == pytest.approx(32**3, rel=0.1)
    assert float((voxels.targets[:, 1] * voxels.weight[:, 0]).sum()) == pytest.approx(4**3, rel=0.5)
    assert not bool(voxels.targets[far].any())
    assert not bool(voxels.weight[:, 1].any())
    weight = adapter.linear_weight()
    logits = adapter(block, core)[0].flatten(1).T
    everywhere = adapter.penultimate(block, core)[0].flatten(1).T @ weight.T + adapter.linear_bias()
    torch.testing.assert_close(everywhere, logits, atol=1e-4, rtol=1e-4)


def test_the_linear_weights_of_an_adapter_can_be_set_and_read() -> None:
    features = MemoryFeatures((torch.randn(3, 8, 8, 8), torch.randn(4, 4, 4, 4)))
    adapter = Adapter(AdapterSettings("linear", "all"), features.levels, 2)
    weight, bias = torch.randn(2, 7), torch.randn(2)
    adapter.set_linear(weight, bias)
    assert torch.equal(adapter.linear_weight(), weight)
    assert torch.equal(adapter.linear_bias(), bias)
