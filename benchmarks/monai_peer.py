"""Segment a CT with MONAI from file to mask: one of the programs that `peers.py` compares.

MONAI's transforms and sliding window run the network and head of an encoder bundle in eager PyTorch: read, orientation,
spacing, intensity, windows of 96x96x96 with an overlap of 0.25 and Gaussian importance, inverse transforms of the
logits back to the scan, decision, write. A voxel belongs to the organ with the largest logit if this logit is above 0.
The scan is not cropped to the body, which does not change the number of windows of the thorax CT.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from monai.data import decollate_batch
from monai.inferers import sliding_window_inference
from monai.transforms import (
    Compose,
    EnsureChannelFirstd,
    Invertd,
    LoadImaged,
    Orientationd,
    SaveImaged,
    ScaleIntensityRanged,
    Spacingd,
)
from torch.nn import functional as F

from fseft_edge.runtime.encoder.bundle import EncoderBundle

WINDOW = (96, 96, 96)
OVERLAP = 0.25


def segment(scan: Path, encoder: Path, output: Path) -> None:
    """Write the mask ``<scan>_seg.nii.gz`` into a folder. Label values are the numbers of the organs of the encoder."""
    bundle = EncoderBundle.open(encoder)
    network, weight, bias = bundle.network().eval(), bundle.head_weight(), bundle.head_bias()
    low, high = bundle.preprocessing.hu_window
    before = Compose(
        [
            LoadImaged("image"),
            EnsureChannelFirstd("image"),
            Orientationd("image", axcodes=bundle.preprocessing.axcodes, labels=None),
            Spacingd("image", pixdim=bundle.preprocessing.spacing, mode="bilinear"),
            ScaleIntensityRanged("image", low, high, 0.0, 1.0, clip=True),
        ]
    )
    invert = Invertd("mask", transform=before, orig_keys="image", nearest_interp=False)
    save = SaveImaged(
        "mask", output_dir=output, output_postfix="seg", output_dtype=np.uint8, resample=False, separate_folder=False
    )
    case = before({"image": scan})
    with torch.inference_mode():
        case["mask"] = sliding_window_inference(
            case["image"][None],
            WINDOW,
            1,
            lambda x: F.conv3d(network(x)[0], weight[..., None, None, None], bias),
            overlap=OVERLAP,
            mode="gaussian",
            sigma_scale=0.125,
        )
        (case["mask"],) = decollate_batch(case["mask"])
        case = invert(case)
        logit, organ = case["mask"].max(dim=0, keepdim=True)
        case["mask"] = torch.where(logit > 0, organ + 1, 0).to(torch.uint8)
    save(case)


def main() -> None:
    """Segment one scan."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scan", type=Path)
    parser.add_argument("--encoder", type=Path, required=True, help="encoder bundle")
    parser.add_argument("--output", type=Path, required=True, help="folder for the mask")
    arguments = parser.parse_args()
    segment(arguments.scan, arguments.encoder, arguments.output)


if __name__ == "__main__":
    main()
