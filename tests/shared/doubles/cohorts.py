"""Two small data sets that annotate different organs, and a configuration that trains on both within seconds."""

from __future__ import annotations

import json
from pathlib import Path

from fseft_edge.phantom import phantom
from fseft_edge.runtime.scans.nifti import write_ct, write_label_map
from fseft_edge.runtime.scans.volume import LabelMap

CONFIG = """
name = "tiny"
seed = 7
organs = ["liver", "spine", "spine_right", "spine_left", "spleen"]
[encoder]
architecture = "residual_unet"
channels = [4, 8, 8]
window = [32, 32, 32]
[preprocessing]
spacing = [6.0, 6.0, 6.0]
[schedule]
steps = 6
crop = 32
learning_rate = 1e-2
warmup_steps = 2
frozen_norm_fraction = 0.34
deep_supervision = [0.5]
bfloat16 = false
checkpoint_every = 3
[[dataset]]
kind = "files"
name = "files"
images = "images"
labels = "labels"
cases = "splits.json:train"
partial = true
organs = { liver = 1, spine = 11 }
halves = { spine = ["spine_right", "spine_left"] }
crops_per_step = 1
[[dataset]]
kind = "phantoms"
name = "phantoms"
count = 1
first_seed = 5
sites = ["reference"]
organs = ["spleen"]
shape = [64, 48, 56]
crops_per_step = 1
"""


def write_cohort(root: Path) -> None:
    """Write the configuration and the first data set: three phantoms at 6 mm, the second without a liver contour."""
    for folder in ("images", "labels"):
        (root / folder).mkdir()
    for seed in (1, 2, 3):
        scan = phantom(seed, shape=(64, 48, 56), spacing=(6.0, 6.0, 6.0))
        labels = scan.labels.array.copy()
        if seed == 2:
            labels[labels == 1] = 0
        write_ct(root / "images" / f"case_{seed}.nii.gz", scan.volume)
        write_label_map(root / "labels" / f"case_{seed}.nii.gz", LabelMap(labels, scan.volume.affine))
    (root / "splits.json").write_text(json.dumps({"train": ["case_1", "case_2"]}))
    (root / "config.toml").write_text(CONFIG)
