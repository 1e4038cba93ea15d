"""Loss functions: comparison with MONAI, closed forms, and organs without annotation."""

from __future__ import annotations

import pytest
import torch
from monai.losses import DiceLoss

from fseft_edge.adaptation.losses import adaptation_loss, cross_entropy_per_organ, partial_label_loss, soft_dice_loss


def _case(n: int = 3, k: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(n, k, 6, 5, 4, generator=generator)
    targets = (torch.rand(n, k, 6, 5, 4, generator=generator) > 0.7).float()
    return logits, targets


def test_soft_dice_equals_monai() -> None:
    logits, targets = _case()
    ours = soft_dice_loss(torch.sigmoid(logits), targets)
    theirs = DiceLoss(sigmoid=True, smooth_nr=1.0, smooth_dr=1.0, reduction="none")(logits, targets)
    torch.testing.assert_close(ours, theirs.flatten(1))


def test_cross_entropy_per_organ_has_its_closed_form() -> None:
    logits = torch.full((1, 1, 2, 2, 2), 2.0)
    targets = torch.ones_like(logits)
    expected = torch.log1p(torch.exp(torch.tensor(-2.0)))
    torch.testing.assert_close(cross_entropy_per_organ(logits, targets)[0, 0], expected)


def test_partial_label_loss_is_the_mean_over_annotated_organs() -> None:
    logits, targets = _case()
    mask = torch.tensor([[1.0, 0, 1, 0], [0, 0, 0, 1], [0, 0, 0, 0]])
    each = soft_dice_loss(torch.sigmoid(logits), targets) + cross_entropy_per_organ(logits, targets)
    expected = (each[0, 0] + each[0, 2] + each[1, 3]) / 3
    torch.testing.assert_close(partial_label_loss(logits, targets, mask), expected)


def test_an_organ_without_annotation_has_a_gradient_of_zero() -> None:
    logits, targets = _case()
    logits.requires_grad_()
    mask = torch.ones(3, 4)
    mask[:, 1] = 0
    partial_label_loss(logits, targets, mask).backward()
    assert logits.grad is not None
    assert logits.grad[:, 1].abs().max() == 0
    assert logits.grad[:, 0].abs().max() > 0


def test_loss_and_gradient_are_zero_without_any_annotation() -> None:
    logits, targets = _case()
    logits.requires_grad_()
    loss = partial_label_loss(logits, targets, torch.zeros(3, 4))
    loss.backward()
    assert float(loss.detach()) == 0
    assert logits.grad is not None
    assert logits.grad.abs().max() == 0


@pytest.mark.parametrize("activation", ["sigmoid", "softmax"])
def test_adaptation_loss_is_near_zero_for_a_perfect_prediction_and_large_for_its_opposite(activation: str) -> None:
    _, targets = _case()
    exclusive = torch.zeros_like(targets).scatter_(1, targets.argmax(1, keepdim=True), 1.0) * targets
    right = 40 * exclusive - 20
    if activation == "softmax":
        background = 40 * (1 - exclusive.sum(1, keepdim=True)) - 20
        right = torch.cat([background, right], 1)
    annotated = torch.ones(3, 4)
    assert float(adaptation_loss(right, exclusive, annotated, activation)) < 1e-3
    assert float(adaptation_loss(-right, exclusive, annotated, activation)) > 5


@pytest.mark.parametrize("activation", ["sigmoid", "softmax"])
def test_adaptation_loss_ignores_samples_without_annotation(activation: str) -> None:
    logits, targets = _case()
    if activation == "softmax":
        logits = torch.cat([torch.zeros(3, 1, 6, 5, 4), logits], 1)
    annotated = torch.ones(3, 4)
    annotated[1] = 0
    before = adaptation_loss(logits, targets, annotated, activation)
    targets[1] = 1 - targets[1]
    torch.testing.assert_close(adaptation_loss(logits, targets, annotated, activation), before)


def test_batch_dice_is_formed_after_summing_over_blocks() -> None:
    """Each of two blocks contains one half of an organ, whose Dice loss has a closed form."""
    targets = torch.zeros(2, 1, 4, 4, 4)
    targets[:, :, :2] = 1
    logits = torch.full_like(targets, -100.0)
    logits[0, :, :2] = 100.0
    dice = 1 - (2 * 32 + 1) / (32 + 64 + 1)
    entropy = 0.5 * 0.5 * 100
    expected = torch.tensor(dice + entropy)
    torch.testing.assert_close(adaptation_loss(logits, targets, torch.ones(2, 1), "sigmoid"), expected)
