"""The real head-and-neck CTs of the benchmarks: folders, splits and organs.

CTs and contours: OpenKBP, Babier et al., Medical Physics 48 (2021) 5549-5561.
"""

from __future__ import annotations

import json
import os
import sys
from importlib.resources import files
from pathlib import Path

import numpy as np

from fseft_edge.export.export import export_encoder
from fseft_edge.runtime.encoder.bundle import EncoderBundle, sha256_of_file
from fseft_edge.runtime.scans.organs import OrganLabel

BASE = (OrganLabel("brainstem", 1), OrganLabel("spinal_cord", 2), OrganLabel("mandible", 7))
NOVEL = (OrganLabel("parotid_right", 3), OrganLabel("parotid_left", 4))
ORGANS = BASE + NOVEL
RUNS = Path("runs")
_BUNDLES = "schema3"  # part of the names of bundles: those of earlier schemas compute other features


def data_root() -> Path:
    """Return the data folder, which the environment variable FSEFT_EDGE_DATA names."""
    root = os.environ.get("FSEFT_EDGE_DATA")
    if not root:
        sys.exit("FSEFT_EDGE_DATA is unset: it names the folder with headneck/ct, headneck/label and splits.json.")
    return Path(root)


def split(name: str) -> list[str]:
    """Return the names of the cases in the split ``support`` or ``test``."""
    names: list[str] = json.loads((data_root() / "headneck" / "splits.json").read_text())[name]
    return names


def image_path(case: str) -> Path:
    """Return the CT of a case."""
    return data_root() / "headneck" / "ct" / f"{case}.nii.gz"


def label_path(case: str) -> Path:
    """Return the contours of a case."""
    return data_root() / "headneck" / "label" / f"{case}.nii.gz"


def draw_support(shots: int, draw: int) -> list[str]:
    """Return the ``draw``-th random support set of ``shots`` scans."""
    return sorted(np.random.default_rng([2303, 17051, draw]).choice(split("support"), shots, replace=False).tolist())


def model_file(model: Path | None) -> Path:
    """Return a model file; None means the model file of the built-in encoder."""
    return model or Path(str(files("fseft_edge") / "encoders" / "edge_base.safetensors"))


def encoder(model: Path | None) -> EncoderBundle:
    """Return the bundle of a model file (None: the built-in encoder); export the bundle if it does not exist."""
    source = model_file(model)
    output = RUNS / f"{source.stem}-{sha256_of_file(source)[:12]}-{_BUNDLES}.encoder"
    if output.exists():
        return EncoderBundle.open(output)
    return export_encoder(model, model="custom" if model else "edge_base", output=output)
