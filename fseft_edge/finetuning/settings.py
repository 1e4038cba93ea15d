"""Settings of fine-tuning."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch

from fseft_edge.adapters.network import Levels

TuningMethod = Literal[
    "lora", "adaptformer", "affine", "bitfit", "compacter", "conv-adapter", "med-adapter", "full", "decoder"
]
"""The parameters that are trained in the encoder without its decoder:

============ ============================================================== =========================================
method       trained parameters                                             source
============ ============================================================== =========================================
lora         a low-rank sum to the query, key and value of the attention;   Hu et al., ICLR 2022
             without attention, to the weights of the 3x3x3 convolutions
adaptformer  a bottleneck parallel to the MLP of each transformer block     Chen et al., NeurIPS 2022
affine       gains and offsets of normalisations                            FSEFT's baseline
bitfit       all biases                                                     Ben Zaken et al., ACL 2022
compacter    hypercomplex bottlenecks in each transformer block, and gains  Karimi Mahabadi et al., NeurIPS 2021
             and offsets of normalisations
conv-adapter a 1x1x1 convolution parallel to each 3x3x3 convolution         Rebuffi et al., CVPR 2018
med-adapter  multi-scale and Fourier branches after each stage              Med-Tuning, arXiv 2304.10880
full         all parameters
decoder      none; only for ``decoder="tuned"`` or ``decoder="new"``
============ ============================================================== =========================================
"""

Decoder = Literal["frozen", "tuned", "new"]
"""``frozen``: the decoder is not trained; ``tuned``: trained from its weights; ``new``: trained from random weights."""

TUNING_METHODS: tuple[TuningMethod, ...] = get_args(TuningMethod)

_TRAINS_VECTORS: tuple[TuningMethod, ...] = ("affine", "bitfit", "compacter")
_TRAINS_DECODER: tuple[TuningMethod, ...] = ("full", "decoder")


@dataclass(frozen=True)
class TuningSettings:
    """Settings of fine-tuning. docs/finetune.md gives the sources of the defaults.

    Attributes:
        method: the parameters that are trained in the encoder without its decoder.
        decoder: training of the decoder; None means ``tuned`` for ``full`` and ``decoder``, ``frozen`` for the others.
        levels: the levels that the classifier uses: ``all``, or ``finest`` (level 0 only, as in the paper).
        seed: seed for all random choices.
        steps: number of training steps.
        crops: number of crops of the support scans in each training step.
        accumulate: number of portions in which the crops of a step are computed, one after another, to save memory.
            The Dice loss is then computed over each portion instead of the whole step.
        crop: edge of a crop in grid voxels, a multiple of 32; None means 144 mm, at most the encoder's window.
        rate: peak learning rate of AdamW for new parameters (head, low-rank sums, inserted modules), for all parameters
            of a network with batch normalisation, and for the gains and offsets that ``affine``, ``bitfit`` and
            ``compacter`` train with a frozen decoder. Weight decay is 0.
        pretrained_rate: peak learning rate of AdamW for all other pre-trained parameters.
        rank: rank of low-rank sums. A joint matrix of queries, keys and values has three times this rank, as in FSEFT's
            code.
        bfloat16: True computes the network in bfloat16; weights and loss stay float32. None means True if the device
            has bfloat16 instructions.
        device: device for training.
        checkpointing: True recomputes activations in the backward pass instead of storing them.
    """

    method: TuningMethod
    decoder: Decoder | None = None
    levels: Levels = "all"
    seed: int = 0
    steps: int = 400
    crops: int = 2
    accumulate: int = 1
    crop: int | None = None
    rate: float = 2e-3
    pretrained_rate: float = 1e-4
    rank: int = 4
    bfloat16: bool | None = None
    device: torch.device = torch.device("cpu")  # noqa: RUF009 - a torch.device is immutable
    checkpointing: bool = False

    @property
    def learns_few_numbers(self) -> bool:
        """True if, of the pre-trained parameters, only gains and offsets are trained."""
        return self.method in _TRAINS_VECTORS and self.of_decoder == "frozen"

    @property
    def of_decoder(self) -> Decoder:
        """The training of the decoder, with the default filled in."""
        if self.decoder is not None:
            return self.decoder
        return "tuned" if self.method in _TRAINS_DECODER else "frozen"

    @property
    def name(self) -> str:
        """Text for messages, for example ``lora, decoder frozen``."""
        decoder = "" if self.decoder is None else f", decoder {self.decoder}"
        return f"{self.method}{decoder}{', finest level' if self.levels == 'finest' else ''}"
