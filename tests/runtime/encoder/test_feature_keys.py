"""Key of a scan's features: it depends on everything that determines the features, and on nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from fseft_edge.runtime.encoder.feature_store import FeatureStore
from fseft_edge.runtime.scans.preprocessing import Preprocessing
from fseft_edge.runtime.scans.volume import Volume


def scan(**changes: Any) -> Volume:
    values = np.random.default_rng(0).integers(-1000, 1000, (5, 6, 7)).astype(np.int16)
    return Volume(**({"array": values, "affine": np.diag([1.0, 1.0, 2.0, 1.0])} | changes))


def key(tmp_path: Path, volume: Volume | None = None, **changes: Any) -> str:
    arguments = {"preprocessing": Preprocessing(), "encoder_id": "e", "overlap": 0.25, "dtype": "float16"} | changes
    return FeatureStore(tmp_path).key(volume or scan(), **arguments)


def test_a_key_depends_on_everything_that_determines_the_features(tmp_path: Path) -> None:
    array = scan().array
    changed = array.copy()
    changed[4, 5, 6] += 1
    volumes = [
        scan(),
        scan(array=changed),
        scan(array=array.astype(np.int32)),
        scan(array=array.reshape(6, 5, 7)),
        scan(affine=np.diag([1.0, 1.0, 2.0000001, 1.0])),
        scan(slope=2.0),
        scan(intercept=-1024.0),
    ]
    keys = [key(tmp_path, volume) for volume in volumes]
    keys += [key(tmp_path, preprocessing=Preprocessing(antialias=True)), key(tmp_path, encoder_id="f")]
    keys += [key(tmp_path, overlap=0.5), key(tmp_path, dtype="float32")]
    assert len(set(keys)) == len(keys)
    assert all(len(each) == 64 and set(each) <= set("0123456789abcdef") for each in keys)


def test_a_key_does_not_depend_on_file_name_memory_layout_or_byte_order(tmp_path: Path) -> None:
    array = scan().array
    same = [
        scan(source=Path("elsewhere.nii")),
        scan(array=np.asfortranarray(array)),
        scan(array=array.astype(">i2")),
        scan(affine=np.diag([1.0, 1.0, 2.0, 1.0]) * 1.0 - 0.0),
    ]
    assert {key(tmp_path, volume) for volume in same} == {key(tmp_path)}
