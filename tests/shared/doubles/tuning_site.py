"""A tiny encoder and two annotated scans for tests of fine-tuning."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from doubles.encoder import label_of, write_case, write_tiny_encoder
from fseft_edge.finetuning.finetune import TuningSupport, finetune, load_tuning_support
from fseft_edge.finetuning.settings import TuningMethod, TuningSettings
from fseft_edge.finetuning.tuning_file import TuningFile
from fseft_edge.runtime.encoder.bundle import EncoderBundle
from fseft_edge.runtime.scans.nifti import read_label_map
from fseft_edge.runtime.scans.organs import OrganLabel
from fseft_edge.runtime.system.progress import SilentProgress

LIVER, SPLEEN = (OrganLabel(name, label_of(name)) for name in ("liver", "spleen"))
SHORT: dict[str, Any] = {"steps": 2, "crops": 1, "crop": 32, "bfloat16": False}
FOR_A_UNET: tuple[TuningMethod, ...] = ("lora", "affine", "bitfit", "conv-adapter", "med-adapter", "full", "decoder")


def parameters_in(tensors: dict[str, torch.Tensor]) -> int:
    """Return the number of parameters, without the statistics for normalising features."""
    normalisation = re.compile(r"head\.(mean|scale)_\d")
    return sum(value.numel() for name, value in tensors.items() if not normalisation.fullmatch(name))


@dataclass(frozen=True)
class TuningSite:
    """A tiny encoder and two annotated scans."""

    root: Path
    bundle: EncoderBundle

    def finetune(
        self, settings: TuningSettings, output: Path, organs: Sequence[OrganLabel] = (LIVER, SPLEEN), **more: Any
    ) -> TuningFile:
        """Fine-tune on both scans and write the tuning."""
        return finetune(
            *(self.bundle.path, self.root / "images", self.root / "labels", organs, output),
            settings=settings,
            device="cpu",
            **more,
        )

    def support(self) -> TuningSupport:
        """Return the support set of both scans, with liver and spleen."""
        images = sorted((self.root / "images").iterdir())
        annotated = [(image, read_label_map(self.root / "labels" / image.name)) for image in images]
        return load_tuning_support(annotated, [LIVER, SPLEEN], self.bundle, SilentProgress())


def tuning_site(root: Path) -> TuningSite:
    """Write two annotated scans and a tiny encoder."""
    for seed in (1, 2):
        write_case(root, f"case_{seed}", seed)
    return TuningSite(root, write_tiny_encoder(root / "tiny.encoder"))
