"""Files that an earlier version wrote open as they did then, and what is written now has the same form."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from doubles.repository import ROOT

from fseft_edge.adapters.file import read_adapter, write_adapter
from fseft_edge.adapters.network import AdapterSettings
from fseft_edge.batch.coordinator import run_batch
from fseft_edge.batch.settings import BatchSettings, BatchSummary
from fseft_edge.finetuning.merging import merge
from fseft_edge.finetuning.tuning_file import read_tuning, write_tuning
from fseft_edge.outbox.records import CaseState, Decision
from fseft_edge.outbox.store import STATE_FOLDER, BatchStore, state_path
from fseft_edge.runtime.encoder.bundle import EncoderBundle
from fseft_edge.runtime.encoder.encoding import OVERLAP
from fseft_edge.runtime.encoder.feature_store import FeatureStore
from fseft_edge.runtime.scans.nifti import read_ct, read_label_map
from fseft_edge.segmentation.segment import segment
from fseft_edge.segmentation.settings import SegmentationSettings

OLDER = ROOT / "tests" / "shared" / "older_files"
ENCODER_ID = "560a37169336fa846be57de329c7490f35e626fdd1c55b516a68c80653fbdbdc"
FEATURE_KEY = "e44ba7f95cec13d549df9a7b656f3e5553f03d97f4422cc9158cc4b47a555722"
DONE = ("case-509fd0635d47", "case-c18092f4bf24")


@pytest.fixture
def older(tmp_path: Path) -> Path:
    """A copy of the files, with the outbox as a batch leaves it."""
    folder = shutil.copytree(OLDER, tmp_path / "older")
    (folder / "outbox" / "state").rename(folder / "outbox" / STATE_FOLDER)
    return folder


def test_an_encoder_and_its_features_keep_their_identity(tmp_path: Path) -> None:
    bundle = EncoderBundle.open(OLDER / "tiny.encoder")
    volume = read_ct(OLDER / "inbox" / "scan_1.nii.gz")
    store = FeatureStore(tmp_path / "store")
    assert bundle.encoder_id == ENCODER_ID
    assert store.key(volume, bundle.preprocessing, bundle.encoder_id, OVERLAP) == FEATURE_KEY


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("linear", AdapterSettings("linear", "finest")),
        ("spatial", AdapterSettings("spatial", "all", width=4, wide_levels=None)),
    ],
)
def test_an_adapter_is_read_and_written_as_the_same_bytes(name: str, settings: AdapterSettings, tmp_path: Path) -> None:
    file = read_adapter(OLDER / f"{name}.adapter")
    assert file.adapter.settings == settings
    write_adapter(tmp_path / "again.adapter", file)
    assert (tmp_path / "again.adapter").read_bytes() == (OLDER / f"{name}.adapter").read_bytes()


def test_a_tuning_is_read_written_as_the_same_bytes_and_merged(older: Path, tmp_path: Path) -> None:
    file = read_tuning(older / "bitfit.tuning")
    assert file.description.levels == "finest"
    write_tuning(tmp_path / "again.tuning", file)
    assert (tmp_path / "again.tuning").read_bytes() == (older / "bitfit.tuning").read_bytes()
    merged = merge(older / "bitfit.tuning", tmp_path / "merged.encoder", encoder=older / "tiny.encoder", onnx=False)
    assert read_adapter(merged.adapter).description.encoder_id == merged.bundle.encoder_id != ENCODER_ID


def test_a_mask_is_the_one_that_was_made_then(older: Path, tmp_path: Path) -> None:
    """Processors round differently, so a few voxels at borders may differ from machine to machine."""
    scan, adapter = older / "inbox" / "scan_1.nii.gz", older / "spatial.adapter"
    segment([scan], [adapter], tmp_path / "masks", device="cpu", backend="torch")
    now = read_label_map(tmp_path / "masks" / "scan_1.nii.gz")
    then = read_label_map(older / "outbox" / DONE[0] / f"{DONE[0]}.nii.gz")
    np.testing.assert_array_equal(now.affine, then.affine)
    assert np.mean(np.asarray(now.array) == np.asarray(then.array)) > 0.999


def test_a_batch_goes_on_without_doing_a_case_again(older: Path) -> None:
    with BatchStore(state_path(older / "outbox")) as store:
        states = {case.key: case.state for case in store.cases()}
        review = store.case(DONE[0]).review
    assert states == {DONE[0]: CaseState.DONE, DONE[1]: CaseState.DONE, "case-0d172244dd0c": CaseState.FAILED}
    assert review is not None
    assert (review.decision, review.note, review.reviewer, review.mask_sha256) == (Decision.ACCEPTED, "good", "", "")
    before = {path: path.stat().st_mtime_ns for path in (older / "outbox").rglob("case-*.nii.gz")}
    settings = SegmentationSettings((older / "spatial.adapter",), device="cpu", backend="torch")
    summary = run_batch(BatchSettings(older / "inbox", older / "outbox", settings, settle=0.0))
    assert summary == BatchSummary(done=0, failed=0, waiting=0)
    assert {path: path.stat().st_mtime_ns for path in (older / "outbox").rglob("case-*.nii.gz")} == before
    assert len(before) == len(DONE)
