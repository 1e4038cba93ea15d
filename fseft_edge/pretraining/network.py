"""The network that pre-training optimises: an encoder with its head, and what only training needs."""

from __future__ import annotations

from torch import Tensor, nn

from fseft_edge.runtime.encoder.networks.base import FeatureNetwork


class PretrainingNetwork(nn.Module):
    """The encoder with its classifier, and the helpers that only training needs.

    Args:
        encoder: the feature network.
        organs: number of classes.
        supervised_levels: how many coarser levels carry a classifier of their own.
    """

    def __init__(self, encoder: FeatureNetwork, organs: int, supervised_levels: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.heads = nn.ModuleList(
            nn.Conv3d(level.channels, organs, 1) for level in encoder.levels[: 1 + supervised_levels]
        )
        self.restorer = nn.Conv3d(encoder.levels[0].channels, 1, 1)

    def forward(self, windows: Tensor) -> tuple[list[Tensor], Tensor]:
        """Return the logits of every supervised level, finest first, and the restored image."""
        pyramid = self.encoder(windows)
        return [head(level) for head, level in zip(self.heads, pyramid, strict=False)], self.restorer(pyramid[0])

    @property
    def head(self) -> nn.Conv3d:
        """The classifier on level 0, which is the encoder's head."""
        head = self.heads[0]
        assert isinstance(head, nn.Conv3d)  # noqa: S101 - narrows the type for the checker
        return head

    @property
    def head_bias(self) -> Tensor:
        """The head's bias ``[K]``."""
        bias = self.head.bias
        assert bias is not None  # noqa: S101 - narrows the type for the checker
        return bias

    def freeze_statistics(self) -> None:
        """Let every batch normalisation use its running statistics from now on, and keep them."""
        for module in self.modules():
            if isinstance(module, nn.BatchNorm3d):
                module.eval()
