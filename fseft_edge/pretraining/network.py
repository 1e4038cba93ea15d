"""The network that pre-training optimises: the encoder, its head, and layers that only training uses."""

from __future__ import annotations

from torch import Tensor, nn

from fseft_edge.runtime.encoder.networks.base import FeatureNetwork


class PretrainingNetwork(nn.Module):
    """The encoder with its head, and layers that only training uses.

    Args:
        encoder: the feature network.
        organs: number of classes.
        supervised_levels: number of levels coarser than level 0 that have a classifier.
    """

    def __init__(self, encoder: FeatureNetwork, organs: int, supervised_levels: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.heads = nn.ModuleList(
            nn.Conv3d(level.channels, organs, 1) for level in encoder.levels[: 1 + supervised_levels]
        )
        self.restorer = nn.Conv3d(encoder.levels[0].channels, 1, 1)

    def forward(self, windows: Tensor) -> tuple[list[Tensor], Tensor]:
        """Return the logits of every level with a classifier, finest level first, and the restored image."""
        pyramid = self.encoder(windows)
        return [head(level) for head, level in zip(self.heads, pyramid, strict=False)], self.restorer(pyramid[0])

    @property
    def head(self) -> nn.Conv3d:
        """The classifier on level 0, which is the encoder's head."""
        head = self.heads[0]
        assert isinstance(head, nn.Conv3d)  # noqa: S101 - narrows the type for mypy
        return head

    @property
    def head_bias(self) -> Tensor:
        """The head's bias ``[K]``."""
        bias = self.head.bias
        assert bias is not None  # noqa: S101 - narrows the type for mypy
        return bias

    def freeze_statistics(self) -> None:
        """Set every batch normalisation to use its running statistics and to leave these unchanged."""
        for module in self.modules():
            if isinstance(module, nn.BatchNorm3d):
                module.eval()
