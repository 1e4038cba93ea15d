"""SwinUNETR without its classifier: MONAI's layers and parameter names, with a forward pass that exports well.

Hatamizadeh et al., "Swin UNETR", arXiv 2201.01266; layers and weights as in ``monai.networks.nets.SwinUNETR``. Three
differences from MONAI's forward pass:

- Attention masks of shifted windows are comparisons of region ids. An exported graph contains one region id per token
  and compares the ids during the forward pass. MONAI's masks contain one number per pair of voxels and become constants
  in an exported graph: 195 MB for a window of 96^3 voxels. Positions of the relative bias are differences of voxel
  codes. The exporter computes these differences and stores them as constants: 0.94 MB for each block with attention
  windows of 7^3 voxels, 6.4 MB for all blocks and a window of 96^3 voxels.
- Patch merging uses the offsets of MONAI 0.9 to 1.5, which contain (0,1,0) and (0,0,1) twice, and do not contain
  (1,1,0) and (0,1,1). Published checkpoints and FSEFT's code were trained with these offsets. Later versions of MONAI
  merge with other offsets under the same parameter names, so they load these weights but compute other features.
- The network returns all decoder levels.

Softmax and the normalisation without weights compute in float32, also if the network is in half precision
(:mod:`fseft_edge.runtime.encoder.networks.mixed_precision`). In a float32 network, these casts have no effect.
"""

from __future__ import annotations

from functools import partial
from typing import ClassVar, cast

import torch
from monai.networks.nets.swin_unetr import SwinUNETR
from torch import Tensor, nn
from torch.nn import functional as F

from fseft_edge.runtime.encoder.networks.base import FeatureLevel, FeatureNetwork
from fseft_edge.runtime.encoder.networks.block_inserts import BlockInsert, BlockPlace, block_inserts
from fseft_edge.runtime.encoder.networks.med_adapter import med_adapters

_ATTENTION_WINDOW = 7
_STAGES = 4
_MASKED = -100.0
_MERGED_OFFSETS = ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 0, 1), (0, 1, 0), (0, 0, 1), (1, 1, 1))


class SwinUnetrFeatures(FeatureNetwork):
    """SwinUNETR that returns its feature pyramid: five decoder levels with strides 1, 2, 4, 8, 16.

    All sides of an input window must be multiples of 32, and at least one side must be larger than 32, because the
    bottleneck normalises over its voxels.

    Args:
        feature_size: number of channels of the finest level, a multiple of 12. All published checkpoints have 48.
    """

    decoder_parts: ClassVar = ("decoder1", "decoder2", "decoder3", "decoder4", "decoder5")
    bridge_parts: ClassVar = ("encoder1", "encoder2", "encoder3", "encoder4", "encoder10")

    def __init__(self, feature_size: int = 48) -> None:
        super().__init__()
        self.levels = tuple(
            FeatureLevel(stride, width * feature_size) for stride, width in ((1, 1), (2, 1), (4, 2), (8, 4), (16, 8))
        )
        layers = SwinUNETR(in_channels=1, out_channels=1, feature_size=feature_size)
        for name, layer in layers.named_children():
            if name != "out":
                self.add_module(name, layer)

    def forward(self, windows: Tensor) -> list[Tensor]:
        """Return the feature pyramid, finest level first (:meth:`FeatureNetwork.forward`)."""
        tokens = [self.get_submodule("swinViT.patch_embed")(windows)]
        adapters, narrow = med_adapters(self), None
        for stage in range(_STAGES):
            x = self._transformed(stage, tokens[-1])
            if adapters:
                x, narrow = adapters[stage](x, narrow, self._part)
            tokens.append(self._part(partial(_merged, self._merging(stage)), x))
        hidden = [_channel_norm(token) for token in tokens]

        skips = [
            self._block("encoder1", windows),
            self._block("encoder2", hidden[0]),
            self._block("encoder3", hidden[1]),
            self._block("encoder4", hidden[2]),
            hidden[3],
        ]
        x = self._block("encoder10", hidden[4])
        pyramid: list[Tensor] = []
        for level in (5, 4, 3, 2, 1):
            x = self._block(f"decoder{level}", x, skips[level - 1])
            pyramid.append(x)
        return pyramid[::-1]

    def _block(self, name: str, *inputs: Tensor) -> Tensor:
        return self._part(self.get_submodule(name), *inputs)

    def _transformed(self, stage: int, x: Tensor) -> Tensor:
        """Return the tokens ``[n, C, X, Y, Z]`` after all blocks of a stage."""
        inserts = block_inserts(self)
        x = x.permute(0, 2, 3, 4, 1)
        for position, block in enumerate(self._blocks(stage)):
            insert = inserts.at(BlockPlace(stage, position)) if inserts else None
            x = self._part(partial(_swin_block, block, insert, shifted=position % 2 == 1), x)
        return x.permute(0, 4, 1, 2, 3)

    def stage_widths(self) -> list[int]:
        """Return the number of channels at the end of each stage, before patch merging, where inserts are added."""
        return [cast(int, self._merging(stage).dim) for stage in range(_STAGES)]

    def block_widths(self) -> dict[BlockPlace, int]:
        """Return the number of channels of each transformer block."""
        return {
            BlockPlace(stage, position): cast(int, block.dim)
            for stage in range(_STAGES)
            for position, block in enumerate(self._blocks(stage))
        }

    def _blocks(self, stage: int) -> nn.ModuleList:
        return cast(nn.ModuleList, self.get_submodule(f"swinViT.layers{stage + 1}.0.blocks"))

    def _merging(self, stage: int) -> nn.Module:
        return self.get_submodule(f"swinViT.layers{stage + 1}.0.downsample")


def _swin_block(block: nn.Module, insert: BlockInsert | None, x: Tensor, *, shifted: bool) -> Tensor:
    """Return the tokens ``[n, X, Y, Z, C]`` after attention and MLP of a block, with the block's insert."""
    attention = _attention(block, x, shifted=shifted)
    x = x + (insert.attention_output(attention) if insert else attention)
    mlp: Tensor = cast(nn.Module, block.mlp)(cast(nn.LayerNorm, block.norm2)(x))
    return x + (insert.mlp_output(x, mlp) if insert else mlp)


def _merged(merging: nn.Module, x: Tensor) -> Tensor:
    """Merge every 2x2x2 tokens of ``[n, C, X, Y, Z]``; return ``[n, 2C, X/2, Y/2, Z/2]``."""
    x = x.permute(0, 2, 3, 4, 1)
    x = torch.cat([x[:, i::2, j::2, k::2] for i, j, k in _MERGED_OFFSETS], dim=-1)
    x = cast(nn.Linear, merging.reduction)(cast(nn.LayerNorm, merging.norm)(x))
    return x.permute(0, 4, 1, 2, 3)


def _attention(block: nn.Module, x: Tensor, *, shifted: bool) -> Tensor:
    """Return multi-head self-attention within (shifted) windows of tokens ``[n, X, Y, Z, C]``."""
    size = x.shape[1:4]
    window = [min(_ATTENTION_WINDOW, length) for length in size]
    shift = [_ATTENTION_WINDOW // 2 if shifted and length > _ATTENTION_WINDOW else 0 for length in size]
    x = cast(nn.LayerNorm, block.norm1)(x)
    padding = [-length % side for length, side in zip(size, window, strict=True)]
    x = F.pad(x, (0, 0, 0, padding[2], 0, padding[1], 0, padding[0]))
    padded = x.shape[1:4]
    regions = None
    if any(shift):
        x = torch.roll(x, shifts=[-step for step in shift], dims=(1, 2, 3))
        regions = _partition(_regions(padded, window, shift, x.device), window)[..., 0]
    x = _self_attention(cast(nn.Module, block.attn), _partition(x, window), regions)
    x = _reverse(x, window, padded)
    if any(shift):
        x = torch.roll(x, shifts=shift, dims=(1, 2, 3))
    return x[:, : size[0], : size[1], : size[2]]


def _self_attention(attention: nn.Module, x: Tensor, regions: Tensor | None) -> Tensor:
    """Return the self-attention of the tokens in each window.

    Args:
        attention: MONAI's ``WindowAttention``, whose weights are used.
        x: tokens ``[n * W, T, C]`` of W windows.
        regions: region ids ``[W, T]``; a token only attends to tokens of its own region. None means one region.
    """
    tokens, channels = x.shape[1:]
    heads = cast(int, attention.num_heads)
    qkv = cast(nn.Linear, attention.qkv)(x).reshape(-1, tokens, 3, heads, channels // heads)
    query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    scores = ((query * cast(float, attention.scale)) @ key.transpose(-2, -1)).float()
    scores = scores + _position_bias(cast(Tensor, attention.relative_position_bias_table), tokens).float()
    if regions is not None:
        mask = torch.where(regions[:, None, :] != regions[:, :, None], _MASKED, 0.0)
        scores = scores.reshape(-1, mask.shape[0], heads, tokens, tokens) + mask[None, :, None]
        scores = scores.reshape(-1, heads, tokens, tokens)
    mixed = (torch.softmax(scores, dim=-1).to(value.dtype) @ value).transpose(1, 2).reshape(-1, tokens, channels)
    projected: Tensor = cast(nn.Linear, attention.proj)(mixed)
    return projected


def _position_bias(table: Tensor, tokens: int) -> Tensor:
    """Return the relative position bias ``[heads, T, T]`` from its table ``[13^3, heads]``.

    For a smaller window, the first T voxels of a 7^3 window are used, as in MONAI.
    """
    span = 2 * _ATTENTION_WINDOW - 1
    steps = torch.arange(_ATTENTION_WINDOW, device=table.device)
    codes = (span * span * steps[:, None, None] + span * steps[:, None] + steps).reshape(-1)[:tokens]
    centre = (span**3 - 1) // 2
    index = codes[:, None] - codes[None, :] + centre
    return F.embedding(index, table).permute(2, 0, 1)


def _regions(size: torch.Size, window: list[int], shift: list[int], device: torch.device) -> Tensor:
    """Return region ids ``[1, X, Y, Z, 1]`` of a shifted lattice; tokens from opposite sides have different ids."""
    ids = torch.zeros(1, dtype=torch.int64, device=device)
    for length, side, step in zip(size, window, shift, strict=True):
        places = torch.arange(length, device=device)
        along = (places >= length - side).long() + (places >= length - step).long()
        ids = 3 * ids[..., None] + (along if step else torch.zeros_like(places))
    return ids.reshape(1, *size, 1)


def _partition(x: Tensor, window: list[int]) -> Tensor:
    """Divide tokens ``[n, X, Y, Z, C]`` into windows ``[n * W, T, C]``."""
    counts = [length // side for length, side in zip(x.shape[1:4], window, strict=True)]
    x = x.reshape(-1, counts[0], window[0], counts[1], window[1], counts[2], window[2], x.shape[-1])
    return x.permute(0, 1, 3, 5, 2, 4, 6, 7).reshape(-1, window[0] * window[1] * window[2], x.shape[-1])


def _reverse(x: Tensor, window: list[int], size: torch.Size) -> Tensor:
    """Join windows of tokens ``[n * W, T, C]`` to ``[n, X, Y, Z, C]``."""
    counts = [length // side for length, side in zip(size, window, strict=True)]
    x = x.reshape(-1, *counts, *window, x.shape[-1])
    return x.permute(0, 1, 4, 2, 5, 3, 6, 7).reshape(-1, *size, x.shape[-1])


def _channel_norm(x: Tensor) -> Tensor:
    """Normalise ``[n, C, X, Y, Z]`` over the channels, without weights."""
    return F.layer_norm(x.permute(0, 2, 3, 4, 1).float(), x.shape[1:2]).permute(0, 4, 1, 2, 3).to(x.dtype)
