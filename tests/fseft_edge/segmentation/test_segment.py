"""Segmentation: from scans and adapters to mask files on the lattices of the scans."""

from __future__ import annotations

import copy
import hashlib
import json
import logging
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from doubles.encoder import SHAPE, SPACING, label_of, scan, write_case, write_random_adapter, write_tiny_encoder
from doubles.errors import refused
from numpy.typing import NDArray
from PIL import Image

from fseft_edge.adaptation import size_threshold
from fseft_edge.adaptation.adapt import adapt, zero_shot_adapter
from fseft_edge.adaptation.size_priors import SizePrior
from fseft_edge.adaptation.size_threshold import move_thresholds
from fseft_edge.adaptation.training import TrainingSettings
from fseft_edge.adaptation.transduction import OrganOutcome, Transduced, TransductionInputs, TransductionSettings
from fseft_edge.adapters.file import AdapterFile, PostProcessing, read_adapter, write_adapter
from fseft_edge.adapters.network import Adapter, AdapterSettings
from fseft_edge.masks.post_processing import post_process
from fseft_edge.masks.prediction import decide_encoded, predict_sections, segment_encoded
from fseft_edge.masks.quality import quality_flags
from fseft_edge.masks.result import SegmentedCase, SegmentedOrgan
from fseft_edge.phantom import phantom
from fseft_edge.runtime.encoder.backends.base import EncoderSession
from fseft_edge.runtime.encoder.bundle import EncoderBundle
from fseft_edge.runtime.encoder.encoding import EncodedScan, encode_scan
from fseft_edge.runtime.encoder.feature_store import FeatureStore, open_store
from fseft_edge.runtime.encoder.session import open_session
from fseft_edge.runtime.errors import (
    AdapterError,
    InputError,
    LabelError,
    NotACtError,
    OutOfMemoryError,
    SomeCasesFailedError,
    UnreadableFileError,
    UsageError,
)
from fseft_edge.runtime.scans.components import BoxedMask
from fseft_edge.runtime.scans.grid import Grid
from fseft_edge.runtime.scans.nifti import read_ct, read_label_map, write_ct
from fseft_edge.runtime.scans.organs import OrganLabel
from fseft_edge.runtime.scans.volume import Volume
from fseft_edge.segmentation.segment import segment

SOFTMAX = AdapterSettings(method="linear", levels="all", activation="softmax")
SPATIAL = AdapterSettings(method="spatial", levels="all", width=4)


@dataclass(frozen=True)
class Site:
    """An encoder, three scans and a cache that all tests share."""

    root: Path
    bundle: EncoderBundle

    @property
    def cache(self) -> Path:
        return self.root / "cache"

    def image(self, name: str) -> Path:
        return self.root / "images" / f"{name}.nii.gz"

    def segment(
        self, scans: Sequence[Path], adapters: Sequence[Path], output: Path, **more: Any
    ) -> list[SegmentedCase]:
        more = {"encoder": self.bundle.path, "cache": self.cache, "device": "cpu", "backend": "torch", **more}
        return segment(scans, adapters, output, **more)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Site:
    root = tmp_path_factory.mktemp("site")
    for seed in (1, 2, 3):
        write_case(root, f"case_{seed}", seed)
    return Site(root, write_tiny_encoder(root / "tiny.encoder"))


@pytest.fixture(scope="module")
def encoded(site: Site) -> EncodedScan:
    volume = read_ct(site.image("case_1"))
    with open_session(site.bundle, device="cpu", backend="torch") as session:
        return encode_scan(volume, bundle=site.bundle, session=session, store=FeatureStore(site.cache))


def labels_in(case: SegmentedCase) -> NDArray[np.unsignedinteger]:
    return read_label_map(case.mask).array


def probabilities(encoded: EncodedScan, file: AdapterFile) -> NDArray[np.float32]:
    """Return one adapter's probabilities on the scan's own lattice, ``[classes, X, Y, Z]``."""
    whole = np.full((file.adapter.classes, *encoded.grid.source_shape), np.nan, np.float32)
    for piece in encoded.grid.to_source(predict_sections(encoded, [file.adapter])):
        where = [slice(None)] * 4
        where[1 + piece.axis] = slice(piece.start, piece.stop)
        whole[tuple(where)] = piece.probabilities
    assert np.isfinite(whole).all()
    return whole


def test_without_an_adapter_the_encoder_segments_the_organs_that_it_knows(site: Site, tmp_path: Path) -> None:
    """The masks are those of an adapter that holds the classifiers of the encoder's head."""
    organs = [OrganLabel(name, label) for label, name in enumerate(site.bundle.manifest.organs, start=1)]
    write_adapter(tmp_path / "head.adapter", zero_shot_adapter(site.bundle, organs))
    (expected,) = site.segment([site.image("case_1")], [tmp_path / "head.adapter"], tmp_path / "adapter")
    (found,) = site.segment([site.image("case_1")], [], tmp_path / "none")
    assert [organ.name for organ in found.organs] == list(site.bundle.manifest.organs)
    np.testing.assert_array_equal(labels_in(found), labels_in(expected))
    (one,) = site.segment([site.image("case_1")], [], tmp_path / "one", organs=["left_lung"])
    assert [(organ.name, organ.label) for organ in one.organs] == [("left_lung", 1)]
    assert labels_in(one).max() == 1


def test_zero_shot_segmentation_is_refused_without_an_encoder_or_a_classifier(site: Site, tmp_path: Path) -> None:
    scans, output = [site.image("case_1")], tmp_path / "out"
    with refused(UsageError, "adapter", "encoder"):
        site.segment(scans, [], output, encoder=None)
    with refused(LabelError, "heart", "liver"):
        site.segment(scans, [], output, organs=["heart"])
    with refused(UsageError, "liver"):
        site.segment(scans, [], output, organs=["liver", "liver"])
    write_random_adapter(tmp_path / "a.adapter", site.bundle)
    with refused(UsageError, "--organ"):
        site.segment(scans, [tmp_path / "a.adapter"], output, organs=["liver"])
    with refused(UsageError, "--transductive"):
        site.segment(scans, [], output, transduction=TransductionInputs(site.root / "images", site.root / "labels"))
    assert not output.exists()


ORIENTATIONS = ["RAS", "LPS", "PLI", "IRP"]


def test_the_mask_does_not_depend_on_the_stored_order_of_the_axes(site: Site, tmp_path: Path) -> None:
    """The masks of an oblique, anisotropic scan stored in several orientations are permutations of one another."""
    turn = np.array([[0.98, -0.19, 0.0], [0.19, 0.98, 0.06], [-0.01, -0.06, 0.998]])
    affine = np.eye(4)
    affine[:3, :3] = turn * (5.0, 7.0, 6.5)
    affine[:3, 3] = -affine[:3, :3] @ ((50, 44, 50) * np.array(0.5))
    upright = phantom(1, shape=(50, 44, 50), affine=affine).volume
    assert upright.axcodes == "RAS"
    write_random_adapter(tmp_path / "a.adapter", site.bundle, ("liver", "spleen"), settings=SPATIAL)
    masks = []
    for axcodes in ORIENTATIONS:
        turned = nib.orientations.ornt_transform(
            nib.orientations.io_orientation(affine), nib.orientations.axcodes2ornt(tuple(axcodes))
        )
        array = np.ascontiguousarray(nib.orientations.apply_orientation(upright.array, turned))
        stored = Volume(array, affine @ nib.orientations.inv_ornt_aff(turned, upright.shape))
        assert stored.axcodes == axcodes
        write_ct(tmp_path / axcodes / "ct.nii", stored)
        (case,) = site.segment([tmp_path / axcodes], [tmp_path / "a.adapter"], tmp_path / "out" / axcodes)
        mask = read_label_map(case.mask)
        assert mask.shape == stored.shape
        np.testing.assert_array_equal(mask.affine, read_ct(tmp_path / axcodes / "ct.nii").affine)
        back = nib.orientations.ornt_transform(
            nib.orientations.axcodes2ornt(tuple(axcodes)), nib.orientations.axcodes2ornt(tuple("RAS"))
        )
        masks.append(nib.orientations.apply_orientation(mask.array, back))
    assert min(np.bincount(masks[0].ravel(), minlength=3)) > 1000
    for mask in masks[1:]:
        np.testing.assert_array_equal(mask, masks[0])


def test_the_mask_is_on_the_finer_lattice_of_the_scan(site: Site, tmp_path: Path) -> None:
    """The encoder works at 6 mm; the mask has the spacing of the scan, 4 x 5 x 3 mm."""
    fine = phantom(1, shape=(90, 56, 110), spacing=(4.0, 5.0, 3.0)).volume
    write_ct(tmp_path / "fine.nii.gz", fine)
    write_random_adapter(tmp_path / "a.adapter", site.bundle)
    (case,) = site.segment([tmp_path / "fine.nii.gz"], [tmp_path / "a.adapter"], tmp_path / "out")
    mask = read_label_map(case.mask)
    assert mask.shape == fine.shape
    np.testing.assert_array_equal(mask.affine, read_ct(tmp_path / "fine.nii.gz").affine)
    written = nib.load(case.mask)
    assert written.get_data_dtype() == np.uint8
    np.testing.assert_allclose(written.header.get_qform(), fine.affine, atol=1e-4)
    np.testing.assert_allclose(written.header.get_sform(), fine.affine, atol=1e-4)


def test_label_values_follow_the_adapters_and_overlap_goes_to_the_more_probable_organ(
    site: Site, encoded: EncodedScan, tmp_path: Path
) -> None:
    first = write_random_adapter(tmp_path / "1.adapter", site.bundle, ("liver", "spleen"), seed=1)
    second = write_random_adapter(tmp_path / "2.adapter", site.bundle, ("aorta",), seed=2, settings=SPATIAL)
    both = np.concatenate([probabilities(encoded, first), probabilities(encoded, second)])
    wanted = np.where(both.max(0) > 0.5, both.argmax(0) + 1, 0)
    overlap = (both > 0.5).sum(0) > 1
    assert overlap.mean() > 0.05
    assert set(np.unique(wanted)) == {0, 1, 2, 3}
    assert len(np.unique(wanted[overlap])) == 3

    paths = [tmp_path / "1.adapter", tmp_path / "2.adapter"]
    (case,) = site.segment([site.image("case_1")], paths, tmp_path / "out")
    np.testing.assert_array_equal(labels_in(case), wanted)
    assert [(organ.name, organ.label) for organ in case.organs] == [("liver", 1), ("spleen", 2), ("aorta", 3)]

    (swapped,) = site.segment([site.image("case_1")], paths[::-1], tmp_path / "swapped")
    np.testing.assert_array_equal(labels_in(swapped), np.array([0, 2, 3, 1])[wanted])
    assert [organ.name for organ in swapped.organs] == ["aorta", "liver", "spleen"]


def test_a_softmax_adapter_labels_each_voxel_with_its_most_probable_class(
    site: Site, encoded: EncodedScan, tmp_path: Path
) -> None:
    file = write_random_adapter(tmp_path / "a.adapter", site.bundle, ("liver", "spleen"), seed=4, settings=SOFTMAX)
    wanted = probabilities(encoded, file).argmax(0)
    assert set(np.unique(wanted)) == {0, 1, 2}
    (case,) = site.segment([site.image("case_1")], [tmp_path / "a.adapter"], tmp_path / "out")
    np.testing.assert_array_equal(labels_in(case), wanted)


def test_softmax_and_sigmoid_adapters_can_be_combined(site: Site, encoded: EncodedScan, tmp_path: Path) -> None:
    soft = write_random_adapter(tmp_path / "1.adapter", site.bundle, ("liver", "spleen"), seed=4, settings=SOFTMAX)
    sigmoid = write_random_adapter(tmp_path / "2.adapter", site.bundle, ("aorta",), seed=5)
    background, liver, spleen = probabilities(encoded, soft)
    (aorta,) = probabilities(encoded, sigmoid)
    candidates = np.stack(
        [
            np.where(liver > background, liver, 0),
            np.where(spleen > background, spleen, 0),
            np.where(aorta > 0.5, aorta, 0),
        ]
    )
    wanted = np.where(candidates.max(0) > 0, candidates.argmax(0) + 1, 0)
    found = decide_encoded(encoded, [soft.adapter, sigmoid.adapter])
    np.testing.assert_array_equal(found.labels, wanted)
    assert set(np.unique(wanted)) == {0, 1, 2, 3}
    for label, (confidence, candidate) in enumerate(zip(found.confidence, candidates, strict=True), start=1):
        assert confidence == pytest.approx(candidate[wanted == label].mean(), rel=1e-5)


def test_the_summary_describes_the_mask(site: Site, tmp_path: Path) -> None:
    organs = ("liver", "spleen")
    write_random_adapter(tmp_path / "a.adapter", site.bundle, organs, support_volumes_ml=(1.0, 2.0))
    (case,) = site.segment([site.image("case_2")], [tmp_path / "a.adapter"], tmp_path / "out")
    mask = nib.load(case.mask)
    array = np.asanyarray(mask.dataobj)
    summary = json.loads((tmp_path / "out" / "case_2.json").read_text())
    assert summary["schema_version"] == 1
    assert summary["case"] == "case_2"
    assert summary["shape"] == list(SHAPE)
    assert summary["spacing_mm"] == list(SPACING)
    assert summary["encoder"] == {"name": "tiny", "id": site.bundle.encoder_id}
    adapter_sha256 = hashlib.sha256((tmp_path / "a.adapter").read_bytes()).hexdigest()
    assert summary["adapters"] == [{"sha256": adapter_sha256, "organs": list(organs)}]
    voxel_ml = float(np.prod(mask.header.get_zooms())) / 1000
    for label, (organ, entry) in enumerate(zip(organs, summary["organs"], strict=True), start=1):
        voxels = int((array == label).sum())
        assert voxels > 0
        assert entry["name"] == organ
        assert entry["label"] == label
        assert entry["volume_ml"] == pytest.approx(voxels * voxel_ml, abs=1e-3)
        assert entry["flags"] == list(
            quality_flags(
                BoxedMask.of(array == label),
                voxels * voxel_ml,
                (1.0, 2.0),
                confidence=entry["confidence"],
                method="linear",
            )
        )
        assert "large" in entry["flags"]
        assert entry["support_ml"] == [1.0, 2.0]
        assert 0.5 < entry["confidence"] <= 1
        assert entry["median_hu"] == pytest.approx(np.median(scan(2).volume.array[array == label]), abs=0.5)
    assert [SegmentedOrgan.from_json(entry) for entry in summary["organs"]] == list(case.organs)
    assert case.mask == tmp_path / "out" / "case_2.nii.gz"


def test_the_summary_does_not_contain_the_path_of_the_scan(site: Site, tmp_path: Path) -> None:
    write_random_adapter(tmp_path / "a.adapter", site.bundle)
    site.segment([site.image("case_1")], [tmp_path / "a.adapter"], tmp_path / "out")
    assert str(site.root) not in (tmp_path / "out" / "case_1.json").read_text()


def test_an_organ_without_voxels_is_listed_as_empty(site: Site, tmp_path: Path) -> None:
    file = write_random_adapter(tmp_path / "a.adapter", site.bundle, ("liver", "spleen"))
    with torch.no_grad():
        file.adapter.direct.weight[1] = 0.0
        file.adapter.direct.bias[1] = -5.0
    write_adapter(tmp_path / "a.adapter", file)
    (case,) = site.segment([site.image("case_1")], [tmp_path / "a.adapter"], tmp_path / "out")
    empty = case.organs[1]
    assert (empty.volume_ml, empty.flags, empty.confidence, empty.median_hu) == (0, ("empty",), None, None)
    assert empty.support_ml is None
    assert not (labels_in(case) == 2).any()


def test_hu_that_differ_from_the_support_set_are_flagged(site: Site, tmp_path: Path) -> None:
    """The adapter is trained on one scan; in another scan the same anatomy is 300 HU denser."""
    file = adapt(
        site.bundle.path,
        site.image("case_1"),
        site.root / "labels" / "case_1.nii.gz",
        [OrganLabel("liver", label_of("liver"))],
        tmp_path / "a.adapter",
        settings=AdapterSettings("linear", "all"),
        training=TrainingSettings(block=16, variations=0),
        validate=False,
        cache=site.cache,
        device="cpu",
        backend="torch",
    )
    array, labels = scan(1).volume.array, scan(1).labels.array
    (liver,) = file.description.organs
    (hu,) = liver.support_hu
    inside = array[labels == label_of("liver")]
    assert (hu.low, hu.median, hu.high) == tuple(np.percentile(inside, (1, 50, 99), method="inverted_cdf"))
    write_ct(tmp_path / "denser.nii.gz", Volume(array + np.int16(300) * (array > -200), scan(1).volume.affine))
    same, denser = (
        site.segment([path], [tmp_path / "a.adapter"], tmp_path / "out" / path.name)[0].organs[0]
        for path in (site.image("case_1"), tmp_path / "denser.nii.gz")
    )
    assert same.volume_ml > 0
    assert denser.volume_ml > 0
    assert "implausible_hu" not in same.flags
    assert "implausible_hu" in denser.flags


def test_a_second_run_writes_equal_bytes(site: Site, tmp_path: Path) -> None:
    write_random_adapter(tmp_path / "a.adapter", site.bundle, ("liver", "spleen"), settings=SPATIAL)
    for output in ("first", "second"):
        site.segment([site.image("case_3")], [tmp_path / "a.adapter"], tmp_path / output, cache=None, preview=True)
    names = sorted(path.name for path in (tmp_path / "first").iterdir())
    assert names == ["case_3.json", "case_3.nii.gz", "case_3.png"]
    for name in names:
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes()


def test_results_of_an_earlier_run_are_replaced(site: Site, tmp_path: Path) -> None:
    write_random_adapter(tmp_path / "a.adapter", site.bundle, seed=1)
    write_random_adapter(tmp_path / "b.adapter", site.bundle, seed=2)
    (first,) = site.segment([site.image("case_1")], [tmp_path / "a.adapter"], tmp_path / "out")
    before = first.mask.read_bytes()
    (second,) = site.segment([site.image("case_1")], [tmp_path / "b.adapter"], tmp_path / "out")
    assert second.mask == first.mask
    assert second.mask.read_bytes() != before


def test_folders_and_files_are_segmented_in_the_order_given(site: Site, tmp_path: Path) -> None:
    write_random_adapter(tmp_path / "a.adapter", site.bundle)
    shutil.copy(site.image("case_1"), tmp_path / "aa.nii.gz")
    done = site.segment([site.root / "images", tmp_path / "aa.nii.gz"], [tmp_path / "a.adapter"], tmp_path / "out")
    assert [case.case for case in done] == ["case_1", "case_2", "case_3", "aa"]
    assert (tmp_path / "out" / "aa.nii.gz").read_bytes() == (tmp_path / "out" / "case_1.nii.gz").read_bytes()


def test_two_scans_with_one_mask_name_are_refused_before_any_output(site: Site, tmp_path: Path) -> None:
    write_random_adapter(tmp_path / "a.adapter", site.bundle)
    write_ct(tmp_path / "other" / "case_1.nii", scan(2).volume)
    with refused(UsageError, site.image("case_1"), tmp_path / "other" / "case_1.nii"):
        site.segment([site.root / "images", tmp_path / "other"], [tmp_path / "a.adapter"], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_mask_never_overwrites_its_scan(site: Site, tmp_path: Path) -> None:
    write_random_adapter(tmp_path / "a.adapter", site.bundle)
    shutil.copytree(site.root / "images", tmp_path / "scans")
    before = {path.name: path.read_bytes() for path in (tmp_path / "scans").iterdir()}
    with refused(UsageError, tmp_path / "out" / ".." / "scans"):
        site.segment([tmp_path / "scans"], [tmp_path / "a.adapter"], tmp_path / "out" / ".." / "scans")
    assert {path.name: path.read_bytes() for path in (tmp_path / "scans").iterdir()} == before


def test_an_output_that_is_a_file_is_refused(site: Site, tmp_path: Path) -> None:
    write_random_adapter(tmp_path / "a.adapter", site.bundle)
    (tmp_path / "out").write_text("content")
    with refused(UsageError, tmp_path / "out"):
        site.segment([site.image("case_1")], [tmp_path / "a.adapter"], tmp_path / "out")
    assert (tmp_path / "out").read_text() == "content"


def test_one_unusable_scan_of_three_does_not_stop_the_others(
    site: Site, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_random_adapter(tmp_path / "a.adapter", site.bundle)
    scans = tmp_path / "scans"
    shutil.copytree(site.root / "images", scans)
    (scans / "case_2.nii.gz").write_bytes(site.image("case_2").read_bytes()[:20_000])
    with caplog.at_level(logging.ERROR), refused(SomeCasesFailedError, "case_2") as caught:
        site.segment([scans], [tmp_path / "a.adapter"], tmp_path / "out", preview=True)
    assert caught.value.exit_code == 5
    assert [case.case for case in caught.value.completed] == ["case_1", "case_3"]
    assert str(scans / "case_2.nii.gz") in caplog.text
    written = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert written == [f"case_{n}.{kind}" for n in (1, 3) for kind in ("json", "nii.gz", "png")]


def test_the_error_of_the_only_scan_is_raised(site: Site, tmp_path: Path) -> None:
    write_random_adapter(tmp_path / "a.adapter", site.bundle)
    patient = scan(1)
    write_ct(tmp_path / "mr.nii.gz", Volume(np.clip(patient.volume.array, 0, 1000), patient.volume.affine))
    with refused(NotACtError, tmp_path / "mr.nii.gz"):
        site.segment([tmp_path / "mr.nii.gz"], [tmp_path / "a.adapter"], tmp_path / "out")
    with refused(UnreadableFileError, tmp_path / "none.nii.gz"):
        site.segment([tmp_path / "none.nii.gz"], [tmp_path / "a.adapter"], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_no_scan_or_neither_adapter_nor_encoder_is_a_usage_error(site: Site, tmp_path: Path) -> None:
    write_random_adapter(tmp_path / "a.adapter", site.bundle)
    with refused(UsageError, "CT"):
        site.segment([], [tmp_path / "a.adapter"], tmp_path / "out")
    with refused(UsageError, "adapter"):
        site.segment([site.image("case_1")], [], tmp_path / "out", encoder=None)


def test_the_encoder_is_found_beside_the_adapter_by_its_id_and_not_by_its_name(site: Site, tmp_path: Path) -> None:
    write_tiny_encoder(tmp_path / "a_other.encoder", seed=9)
    shutil.copytree(site.bundle.path, tmp_path / "renamed.encoder")
    write_random_adapter(tmp_path / "a.adapter", site.bundle)
    (found,) = site.segment([site.image("case_1")], [tmp_path / "a.adapter"], tmp_path / "out", encoder=None)
    (named,) = site.segment([site.image("case_1")], [tmp_path / "a.adapter"], tmp_path / "out2")
    assert found.mask.read_bytes() == named.mask.read_bytes()


def test_the_encoder_is_found_in_the_working_folder(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_random_adapter(tmp_path / "a.adapter", site.bundle)
    monkeypatch.chdir(site.root)
    site.segment([site.image("case_1")], [tmp_path / "a.adapter"], tmp_path / "out", encoder=None)
    assert (tmp_path / "out" / "case_1.nii.gz").exists()


def test_a_missing_encoder_is_an_input_error_that_names_the_adapter(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_random_adapter(tmp_path / "a.adapter", site.bundle)
    write_tiny_encoder(tmp_path / "other.encoder", seed=9)
    monkeypatch.chdir(tmp_path)
    with refused(InputError, tmp_path / "a.adapter") as caught:
        site.segment([site.image("case_1")], [tmp_path / "a.adapter"], tmp_path / "out", encoder=None)
    assert "--encoder" in caught.value.remedy


def test_a_damaged_bundle_beside_the_adapter_is_skipped(site: Site, tmp_path: Path) -> None:
    (tmp_path / "a_damaged.encoder").mkdir()
    shutil.copytree(site.bundle.path, tmp_path / "b.encoder")
    write_random_adapter(tmp_path / "a.adapter", site.bundle)
    site.segment([site.image("case_1")], [tmp_path / "a.adapter"], tmp_path / "out", encoder=None)
    assert (tmp_path / "out" / "case_1.nii.gz").exists()


def test_an_adapter_of_another_encoder_is_refused_before_encoding(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = write_tiny_encoder(tmp_path / "other.encoder", seed=9)
    write_random_adapter(tmp_path / "a.adapter", site.bundle)
    write_random_adapter(tmp_path / "b.adapter", other)
    monkeypatch.setattr(EncoderSession, "encode", _no_encoding)
    with refused(AdapterError, tmp_path / "b.adapter"):
        site.segment([site.image("case_1")], [tmp_path / "a.adapter", tmp_path / "b.adapter"], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def _no_encoding(self: EncoderSession, windows: torch.Tensor) -> list[torch.Tensor]:
    raise AssertionError("a scan was encoded")


def test_a_scan_in_the_cache_is_not_encoded_again_for_any_adapter(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_random_adapter(tmp_path / "a.adapter", site.bundle, seed=1)
    write_random_adapter(tmp_path / "b.adapter", site.bundle, seed=2, settings=SPATIAL)
    cache = tmp_path / "cache"
    (first,) = site.segment([site.image("case_1")], [tmp_path / "a.adapter"], tmp_path / "out", cache=cache)
    monkeypatch.setattr(EncoderSession, "encode", _no_encoding)
    (again,) = site.segment([site.image("case_1")], [tmp_path / "a.adapter"], tmp_path / "again", cache=cache)
    assert again.mask.read_bytes() == first.mask.read_bytes()
    site.segment([site.image("case_1")], [tmp_path / "b.adapter"], tmp_path / "b", cache=cache)
    with pytest.raises(AssertionError, match="was encoded"):
        site.segment([site.image("case_2")], [tmp_path / "a.adapter"], tmp_path / "c", cache=cache)


def test_several_adapters_use_one_feature_map(site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counted: list[int] = []
    encode = EncoderSession.encode

    def counting(self: EncoderSession, windows: torch.Tensor) -> list[torch.Tensor]:
        counted.append(len(windows))
        return encode(self, windows)

    monkeypatch.setattr(EncoderSession, "encode", counting)
    for seed in range(3):
        write_random_adapter(tmp_path / f"{seed}.adapter", site.bundle, (f"organ_{seed}",), seed=seed)
    site.segment([site.image("case_1")], [tmp_path / "0.adapter"], tmp_path / "one", cache=None)
    windows_of_one = sum(counted)
    counted.clear()
    adapters = [tmp_path / f"{seed}.adapter" for seed in range(3)]
    site.segment([site.image("case_1")], adapters, tmp_path / "three", cache=None)
    assert sum(counted) == windows_of_one > 0


def test_without_a_cache_no_temporary_file_remains(site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    write_random_adapter(tmp_path / "a.adapter", site.bundle)
    site.segment([site.image("case_1")], [tmp_path / "a.adapter"], tmp_path / "out", cache=None)
    assert list((tmp_path / "temporary").iterdir()) == []


def test_a_preview_picture_is_written_only_on_request(site: Site, tmp_path: Path) -> None:
    write_random_adapter(tmp_path / "a.adapter", site.bundle, ("liver", "spleen"))
    site.segment([site.image("case_1")], [tmp_path / "a.adapter"], tmp_path / "out")
    assert not (tmp_path / "out" / "case_1.png").exists()
    site.segment([site.image("case_1")], [tmp_path / "a.adapter"], tmp_path / "out", preview=True)
    with Image.open(tmp_path / "out" / "case_1.png") as picture:
        assert picture.format == "PNG"
        assert len(np.unique(np.asarray(picture.convert("RGB")).reshape(-1, 3), axis=0)) > 50


@pytest.mark.real_ct
def test_the_mask_of_a_real_ct_is_on_its_lattice(site: Site, real_ct: Path, tmp_path: Path) -> None:
    """The scan is thinner than the window of the encoder."""
    path = next((real_ct / "abdomen").glob("ct_sm.nii*"))
    write_random_adapter(tmp_path / "a.adapter", site.bundle, settings=SPATIAL)
    (case,) = site.segment([path], [tmp_path / "a.adapter"], tmp_path / "out")
    source, mask = nib.load(path), nib.load(case.mask)
    assert mask.shape == source.shape
    np.testing.assert_array_equal(mask.affine, source.affine)
    assert read_adapter(tmp_path / "a.adapter").description.organs[0].name == case.organs[0].name


def test_a_transductive_run_records_the_result_of_every_organ(
    site: Site, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """One organ has its prior from a table, the other has a prior given by the user."""
    organs = [OrganLabel(name, label_of(name)) for name in ("liver", "spleen")]
    adapter = tmp_path / "a.adapter"
    adapt(
        site.bundle.path,
        site.root / "images",
        site.root / "labels",
        organs,
        adapter,
        settings=SPATIAL,
        training=TrainingSettings(epochs=2, block=16, batch=2, blocks_per_epoch=2),
        cases=["case_1", "case_2"],
        validate=False,
        cache=site.cache,
        device="cpu",
        backend="torch",
    )
    inputs = TransductionInputs(
        site.root / "images",
        site.root / "labels",
        {"spleen": SizePrior(1.0, 2.0)},
        {"liver": SizePrior(1.0, 1e6), "heart": SizePrior(1.0, 2.0)},
        TransductionSettings(blocks=2, training=TrainingSettings(block=16, batch=1)),
    )
    (case,) = site.segment([site.image("case_3")], [adapter], tmp_path / "out", transduction=inputs)
    summary = json.loads((tmp_path / "out" / "case_3.json").read_text())
    assert "case_3" in caplog.text  # not in the support set of the adapter
    assert "case_1" not in caplog.text
    liver, spleen = summary["transduction"]
    assert (liver["name"], liver["prior"]) == ("liver", {"low_ml": 1.0, "high_ml": 1e6})
    assert (spleen["name"], spleen["prior"]) == ("spleen", {"low_ml": 1.0, "high_ml": 2.0})
    for outcome, organ in zip((liver, spleen), case.organs, strict=True):
        assert outcome["before_ml"] > 0
        assert set(outcome["notes"]) <= set(organ.flags)
    assert spleen["after_ml"] != spleen["before_ml"]
    site.segment([site.image("case_3")], [adapter], tmp_path / "plain")
    plain = json.loads((tmp_path / "plain" / "case_3.json").read_text())
    assert "transduction" not in plain
    assert summary["adapters"] == plain["adapters"]


def not_at_border(mask: torch.Tensor, *_: object) -> torch.Tensor:
    """Replace the test for the border of the scan, which masks of random adapters touch."""
    return torch.zeros(len(mask), dtype=torch.bool)


def expecting(path: Path, share: float, site: Site, scan: Path) -> Path:
    """Let an adapter expect a share of the size that it finds in a scan; return its file."""
    file = read_adapter(path)
    volume = read_ct(scan)
    grid = Grid.of(volume, site.bundle.preprocessing)
    with open_session(site.bundle, "cpu", "torch") as session, open_store(None, None) as store:
        encoded = encode_scan(volume, bundle=site.bundle, session=session, store=store, grid=grid)
        _, found = move_thresholds(file.adapter, encoded, [SizePrior(1e-3, 1e9)] * len(file.description.organs))
    organs = [
        organ.model_copy(update={"expected_ml": (0.95 * share * moved.before_ml, 1.05 * share * moved.before_ml)})
        for organ, moved in zip(file.description.organs, found, strict=True)
        if moved
    ]
    changed = file.description.model_copy(update={"organs": tuple(organs), "schema_version": 5})
    write_adapter(path, AdapterFile(changed, file.adapter))
    return path


@pytest.mark.parametrize("share", [0.7, 1.3])
def test_a_mask_follows_the_size_that_the_adapter_expects(
    site: Site, tmp_path: Path, share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(size_threshold, "touches_border", not_at_border)
    scan = site.image("case_1")
    write_random_adapter(tmp_path / "a.adapter", site.bundle)
    adapter = expecting(tmp_path / "a.adapter", share, site, scan)
    (plain,) = site.segment([scan], [adapter], tmp_path / "plain", follow_size=False)
    (case,) = site.segment([scan], [adapter], tmp_path / "out", save_probabilities=True)
    description = json.loads((tmp_path / "out" / "case_1.json").read_text())
    assert description["options"]["follow_size"] is True
    (before,), (organ,), (entry,) = plain.organs, case.organs, description["thresholds"]
    assert (entry["name"], entry["notes"]) == ("liver", [])
    assert entry["after_ml"] == pytest.approx(share * entry["before_ml"], rel=0.051)
    assert (entry["log_odds"] > 0) is (share < 1)
    assert "threshold_moved" in organ.flags
    assert organ.volume_ml == pytest.approx(share * before.volume_ml, rel=0.1)
    saved = nib.load(tmp_path / "out" / "case_1" / "liver.probability.nii.gz").get_fdata()  # type: ignore[attr-defined]  # nibabel's image type
    np.testing.assert_array_equal(labels_in(case) > 0, saved > 0.5)
    assert "thresholds" not in json.loads((tmp_path / "plain" / "case_1.json").read_text())


def test_a_refit_starts_from_the_moved_thresholds(site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[float]] = []

    def watched(adapter: Adapter, _: EncodedScan, __: object, priors: Sequence[SizePrior], **___: object) -> Transduced:
        seen.append(adapter.linear_bias().tolist())
        return Transduced(adapter, (OrganOutcome(1.0, 1.0, priors[0], ()),), evaluations=0)

    monkeypatch.setattr("fseft_edge.adaptation.transduction.transduce", watched)
    monkeypatch.setattr(size_threshold, "touches_border", not_at_border)
    scan = site.image("case_1")
    write_random_adapter(tmp_path / "a.adapter", site.bundle, support_volumes_ml=(100.0,))
    adapter = expecting(tmp_path / "a.adapter", 0.7, site, scan)
    inputs = TransductionInputs(site.root / "images", site.root / "labels", {"liver": SizePrior(1, 2)})
    site.segment([scan], [adapter], tmp_path / "own", transduction=inputs)
    assert seen.pop() == read_adapter(adapter).adapter.linear_bias().tolist()  # the user's prior replaces the range
    inputs = TransductionInputs(site.root / "images", site.root / "labels")
    site.segment([scan], [adapter], tmp_path / "out", transduction=inputs)
    (entry,) = json.loads((tmp_path / "out" / "case_1.json").read_text())["thresholds"]
    assert entry["log_odds"] > 0
    assert seen == [[pytest.approx(read_adapter(adapter).adapter.linear_bias().item() - entry["log_odds"], abs=1e-3)]]


def test_the_mask_comes_from_the_refitted_adapter(site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_random_adapter(tmp_path / "a.adapter", site.bundle, support_volumes_ml=(100.0,))

    def emptied(adapter: Adapter, _: EncodedScan, __: object, priors: Sequence[SizePrior], **___: object) -> Transduced:
        refitted = copy.deepcopy(adapter)
        with torch.no_grad():
            refitted.linear_bias().fill_(-1e4)
        return Transduced(refitted, (OrganOutcome(9.0, 0.0, priors[0], ("outside_prior",)),), evaluations=1)

    inputs = TransductionInputs(site.root / "images", site.root / "labels")
    scans = [site.image("case_1"), site.image("case_2")]
    plain = site.segment(scans, [tmp_path / "a.adapter"], tmp_path / "plain")
    monkeypatch.setattr("fseft_edge.adaptation.transduction.transduce", emptied)
    refitted = site.segment(scans, [tmp_path / "a.adapter"], tmp_path / "out", transduction=inputs)
    assert all(labels_in(case).any() for case in plain)
    assert not any(labels_in(case).any() for case in refitted)
    assert all("outside_prior" in case.organs[0].flags for case in refitted)


def test_a_prior_of_the_user_precedes_the_table_and_the_support_set(site: Site, tmp_path: Path) -> None:
    write_random_adapter(tmp_path / "a.adapter", site.bundle, ("liver", "spleen", "left_lung"))
    file = read_adapter(tmp_path / "a.adapter")
    organs = [
        organ.model_copy(update={"support_volumes_ml": (100.0,) if organ.name == "left_lung" else (10.0,)})
        for organ in file.description.organs
    ]
    file = replace(file, description=file.description.model_copy(update={"organs": tuple(organs)}))
    given, table = SizePrior(1, 2), SizePrior(3, 4)
    inputs = TransductionInputs(tmp_path, tmp_path, {"liver": given}, {"liver": table, "spleen": table})
    assert inputs.priors_for(file) == [given, table, SizePrior.from_volumes([100.0])]


def test_a_table_that_contains_only_other_organs_is_refused(site: Site, tmp_path: Path) -> None:
    write_random_adapter(tmp_path / "a.adapter", site.bundle, support_volumes_ml=(100.0,))
    inputs = TransductionInputs(tmp_path, tmp_path, table={"heart": SizePrior(1, 2)})
    with refused(UsageError, "heart"):
        inputs.check([read_adapter(tmp_path / "a.adapter")])


def test_overlapped_and_sequential_cases_give_equal_bytes(site: Site, tmp_path: Path) -> None:
    """With a memory budget the cases run one after another. Without a cache each case has a separate feature store."""
    write_random_adapter(tmp_path / "a.adapter", site.bundle, ("liver", "spleen"), settings=SPATIAL)
    scans = [site.image(f"case_{number}") for number in (1, 2, 3)]
    for name, budget in (("overlapped", None), ("sequential", 64.0)):
        site.segment(scans, [tmp_path / "a.adapter"], tmp_path / name, memory_gb=budget, cache=None)
    for path in sorted((tmp_path / "overlapped").iterdir()):
        assert path.read_bytes() == (tmp_path / "sequential" / path.name).read_bytes()
    assert len(list((tmp_path / "overlapped").iterdir())) == 6


@pytest.mark.parametrize(("encoding", "segmenting", "least"), [(9, 5, 9), (5, 9, 9), (None, 5, 5)])
def test_the_reported_budget_is_enough_for_encoding_and_segmentation(
    site: Site,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    encoding: int | None,
    segmenting: int,
    least: int,
) -> None:
    def needs(minimum: int | None) -> Callable[..., None]:
        def planned(*_: object, **__: object) -> None:
            if minimum is not None:
                raise OutOfMemoryError(f"{minimum} GB", remedy="Give more memory.", least=minimum)

        return planned

    write_random_adapter(tmp_path / "a.adapter", site.bundle)
    monkeypatch.setattr("fseft_edge.segmentation.segmenter.planned_encoding", needs(encoding))
    monkeypatch.setattr("fseft_edge.segmentation.segmenter.plan_segmentation", needs(segmenting))
    with refused(OutOfMemoryError, f"{least} GB"):
        site.segment([site.image("case_1")], [tmp_path / "a.adapter"], tmp_path / "out", memory_gb=1.0)


@pytest.mark.parametrize("settings", [SPATIAL, SOFTMAX], ids=["sigmoid", "softmax"])
def test_skipped_pieces_do_not_change_any_label(
    site: Site, encoded: EncodedScan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: AdapterSettings
) -> None:
    file = write_random_adapter(tmp_path / "a.adapter", site.bundle, ("liver", "spleen"), settings=settings)
    found = segment_encoded(encoded, [file.adapter])
    monkeypatch.setattr("fseft_edge.masks.prediction.decisive_in", lambda _: None)
    assert np.array_equal(found, segment_encoded(encoded, [file.adapter]))
    assert set(np.unique(found)) == {0, 1, 2}


def test_post_processing_follows_the_adapter_unless_the_user_sets_it(site: Site, tmp_path: Path) -> None:
    file = write_random_adapter(tmp_path / "a.adapter", site.bundle)
    organ = file.description.organs[0].model_copy(update={"post_processing": PostProcessing(largest_component=True)})
    file = replace(file, description=file.description.model_copy(update={"organs": (organ,)}))
    write_adapter(tmp_path / "treated.adapter", file)
    image = [site.image("case_1")]
    (plain,) = site.segment(image, [tmp_path / "a.adapter"], tmp_path / "plain")
    (switched_on,) = site.segment(image, [tmp_path / "a.adapter"], tmp_path / "on", largest_component=True)
    (treated,) = site.segment(image, [tmp_path / "treated.adapter"], tmp_path / "treated")
    (off,) = site.segment(image, [tmp_path / "treated.adapter"], tmp_path / "off", largest_component=False)
    assert not np.array_equal(labels_in(plain), labels_in(treated))
    assert np.array_equal(labels_in(switched_on), labels_in(treated))
    assert np.array_equal(labels_in(plain), labels_in(off))
    (filled,) = site.segment(image, [tmp_path / "treated.adapter"], tmp_path / "filled", fill_holes=True)
    expected = post_process(labels_in(plain), [PostProcessing(largest_component=True, fill_holes=True)])
    assert np.array_equal(labels_in(filled), expected)
