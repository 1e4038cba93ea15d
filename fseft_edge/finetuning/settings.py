"""How an encoder is fine-tuned."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch

from fseft_edge.adapters.network import Levels

TuningMethod = Literal[
    "lora", "adaptformer", "affine", "bitfit", "compacter", "conv-adapter", "med-adapter", "full", "decoder"
]
"""What learns in the encoder, the decoder apart:

============ ============================================================== =========================================
method       what learns                                                    source
============ ============================================================== =========================================
lora         a low-rank sum to the attention's query, key and value; where  Hu et al., ICLR 2022
             there is no attention, to the 3x3x3 convolutions
adaptformer  a bottleneck beside each transformer block's MLP               Chen et al., NeurIPS 2022
affine       gains and offsets of normalisations                            FSEFT's baseline
bitfit       every bias                                                     Ben Zaken et al., ACL 2022
compacter    hypercomplex bottlenecks in each transformer block, and norms  Karimi Mahabadi et al., NeurIPS 2021
conv-adapter a 1x1x1 convolution beside each 3x3x3 one                      Rebuffi et al., CVPR 2018
med-adapter  multi-scale and Fourier branches after each stage              Med-Tuning, arXiv 2304.10880
full         every parameter
decoder      nothing: it is for ``decoder="tuned"`` or ``"new"`` alone
============ ============================================================== =========================================
"""

Decoder = Literal["frozen", "tuned", "new"]
"""Whether the decoder stays, learns from where it is, or learns from random weights."""

TUNING_METHODS: tuple[TuningMethod, ...] = get_args(TuningMethod)

_OPENS_VECTORS: tuple[TuningMethod, ...] = ("affine", "bitfit", "compacter")
_NEEDS_THE_DECODER: tuple[TuningMethod, ...] = ("full", "decoder")


@dataclass(frozen=True)
class TuningSettings:
    """How an encoder is fine-tuned. Where the defaults come from: docs/finetune.md.

    Attributes:
        method: what learns in the encoder.
        decoder: what the decoder does; None tunes it with ``full`` and ``decoder`` and freezes it with the others.
        levels: the levels that the classifier uses: ``all``, or ``finest`` (level 0 only, as in the paper).
        seed: of everything random.
        steps: of the optimiser.
        crops: crops of the support scans that the gradient of a step is taken over.
        accumulate: in how many portions; each needs the memory of its own crops only. Dice is then formed over a
            portion instead of the whole step.
        crop: edge of a crop in grid voxels, a multiple of 32; None takes 144 mm, and no more than the encoder's window.
        rate: AdamW's peak rate for parameters that were not there before (head, low-rank sums, inserted modules), for
            those of a network with batch normalisation, and for the gains and offsets that ``affine``, ``bitfit`` and
            ``compacter`` open beside a frozen decoder; weight decay is 0.
        pretrained_rate: the same for all other pre-trained parameters.
        rank: of low-rank sums; three times that for a matrix of queries, keys and values together, as in FSEFT's code.
        bfloat16: compute in bfloat16 (weights and loss stay float32); None does where the device has instructions for
            it.
        device: where the network computes.
        checkpointing: compute activations again in the backward pass instead of keeping them.
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
    device: torch.device = torch.device("cpu")  # noqa: RUF009 - it is immutable
    checkpointing: bool = False

    @property
    def learns_few_numbers(self) -> bool:
        """Whether what learns of the pre-trained parameters are gains and offsets alone."""
        return self.method in _OPENS_VECTORS and self.of_decoder == "frozen"

    @property
    def of_decoder(self) -> Decoder:
        """What the decoder does."""
        if self.decoder is not None:
            return self.decoder
        return "tuned" if self.method in _NEEDS_THE_DECODER else "frozen"

    @property
    def name(self) -> str:
        """For people, e.g. ``lora, decoder frozen``."""
        decoder = "" if self.decoder is None else f", decoder {self.decoder}"
        return f"{self.method}{decoder}{', finest level' if self.levels == 'finest' else ''}"
