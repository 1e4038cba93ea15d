"""Blending of features is exact for a linear head: comparison of the complete path with MONAI's blending of logits."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from monai.inferers import sliding_window_inference

from fseft_edge.adaptation.adapt import zero_shot_adapter
from fseft_edge.export.export import export_encoder
from fseft_edge.masks.prediction import predict_sections
from fseft_edge.runtime.encoder.encoding import OVERLAP, encode_scan
from fseft_edge.runtime.encoder.feature_store import FeatureStore
from fseft_edge.runtime.encoder.session import open_session
from fseft_edge.runtime.scans.nifti import read_ct
from fseft_edge.runtime.scans.organs import OrganLabel


@pytest.mark.real_ct
@pytest.mark.parametrize(("storage", "tolerance"), [("float32", 1e-4), ("float16", 0.02)])
def test_zero_shot_probabilities_of_a_real_ct_equal_those_of_monai(
    real_ct: Path, tmp_path: Path, storage: str, tolerance: float
) -> None:
    bundle = export_encoder(
        None, model="edge_base", output=tmp_path / "edge_base.encoder", onnx=False, tiling="windows"
    )
    organs = [OrganLabel("mandible", 7), OrganLabel("spinal_cord", 2)]
    zero_shot = zero_shot_adapter(bundle, organs)
    volume = read_ct(real_ct / "headneck" / "ct" / "hn_004.nii.gz")  # four windows, side by side along two axes
    with open_session(bundle, backend="torch") as session:
        encoded = encode_scan(
            volume,
            bundle=bundle,
            session=session,
            store=FeatureStore(tmp_path / "cache"),
            storage=storage,  # type: ignore[arg-type]  # parametrised literals
        )
    ours = np.concatenate([section for _, section in predict_sections(encoded, [zero_shot.adapter])], axis=3)

    grid, network = encoded.grid, bundle.network().eval()
    image = torch.from_numpy(grid.section(volume, 0, grid.shape[2]))
    padding = [
        n for size, full in zip(grid.shape, encoded.features.padded_shape, strict=True) for n in (full - size, 0)
    ]
    head = zero_shot.adapter.direct
    with torch.inference_mode():
        logits = sliding_window_inference(
            torch.nn.functional.pad(image, padding[::-1])[None, None],
            bundle.window,
            1,
            lambda windows: head(network(windows)[0]),
            overlap=OVERLAP,
            mode="gaussian",
        )
    x, y, z = grid.shape
    theirs = torch.sigmoid(logits)[0, :, :x, :y, :z].numpy()
    assert np.abs(ours - theirs).max() <= tolerance
