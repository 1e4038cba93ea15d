"""Adaptation: from annotated scans to an adapter file."""

from __future__ import annotations

import json
import logging
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from doubles.encoder import HEAD_ORGANS, SHAPE, SPACING, label_of, scan, write_case, write_tiny_encoder
from doubles.errors import refused

from fseft_edge.adaptation.adapt import adapt, zero_shot_adapter
from fseft_edge.adaptation.block_sampling import SupportScan
from fseft_edge.adaptation.cross_validation import Candidate, Validated
from fseft_edge.adaptation.linear_solver import solve
from fseft_edge.adaptation.training import TrainedAdapter, TrainingSettings
from fseft_edge.adapters.file import AdapterFile, PostProcessing, read_adapter, write_adapter
from fseft_edge.adapters.network import AdapterSettings
from fseft_edge.evaluation.evaluate import evaluate
from fseft_edge.masks.result import SegmentedCase
from fseft_edge.runtime.encoder.backends.base import EncoderSession
from fseft_edge.runtime.encoder.bundle import EncoderBundle
from fseft_edge.runtime.errors import (
    GeometryError,
    LabelError,
    NotACtError,
    UnreadableFileError,
    UsageError,
)
from fseft_edge.runtime.scans.nifti import read_label_map, write_ct, write_label_map
from fseft_edge.runtime.scans.organs import OrganLabel
from fseft_edge.runtime.scans.volume import LabelMap, Volume
from fseft_edge.segmentation.segment import segment

LINEAR = AdapterSettings(method="linear", levels="finest")
SPATIAL = AdapterSettings(method="spatial", levels="all", width=4)
# Without variations, because each variation of a scan must be encoded, too.
ONE_STEP = TrainingSettings(epochs=1, block=16, batch=1, blocks_per_epoch=1, linear_blocks=4, variations=0)
NO_TRAINING = replace(ONE_STEP, linear_rate=0.0, residual_rate=0.0, calibration=0.0)
LIVER, SPLEEN, LUNG = (OrganLabel(name, label_of(name)) for name in ("liver", "spleen", "left_lung"))


@dataclass(frozen=True)
class Site:
    """An encoder, two annotated scans and a cache, shared by all tests."""

    root: Path
    bundle: EncoderBundle

    def adapt(
        self,
        organs: Sequence[OrganLabel],
        output: Path,
        *,
        images: Path | None = None,
        labels: Path | None = None,
        **more: Any,
    ) -> AdapterFile:
        more = {
            "settings": LINEAR,
            "training": ONE_STEP,
            "validate": False,
            "cache": self.root / "cache",
            "device": "cpu",
            "backend": "torch",
            **more,
        }
        return adapt(
            self.bundle.path,
            images or self.root / "images",
            labels or self.root / "labels",
            organs,
            output,
            **more,
        )

    def segment(self, image: Path, adapter: Path, output: Path, **more: Any) -> SegmentedCase:
        (case,) = segment(
            [image],
            [adapter],
            output,
            encoder=self.bundle.path,
            cache=self.root / "cache",
            device="cpu",
            backend="torch",
            **more,
        )
        return case


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Site:
    root = tmp_path_factory.mktemp("site")
    for seed in (1, 2):
        write_case(root, f"case_{seed}", seed)
    return Site(root, write_tiny_encoder(root / "tiny.encoder"))


@pytest.fixture
def copied(site: Site, tmp_path: Path) -> Path:
    """A copy of the shared cases, which a test may change."""
    for part in ("images", "labels"):
        shutil.copytree(site.root / part, tmp_path / part)
    return tmp_path


def test_the_adapter_file_describes_organs_support_set_and_training(site: Site, tmp_path: Path) -> None:
    training = TrainingSettings(seed=5, epochs=2, block=16, batch=2, blocks_per_epoch=3)
    file = site.adapt([LIVER, SPLEEN], tmp_path / "a.adapter", settings=SPATIAL, training=training)
    description = read_adapter(tmp_path / "a.adapter").description
    assert description.losses == file.description.losses
    assert description.encoder_id == site.bundle.encoder_id
    assert description.encoder_name == "tiny"
    assert (description.shots, description.seed, description.steps) == (2, 5, 2 * 3)
    assert len(description.losses) == 2
    voxel_ml = np.prod(SPACING) / 1000
    for organ, wanted in zip(description.organs, (LIVER, SPLEEN), strict=True):
        assert (organ.name, organ.label) == (wanted.name, wanted.label)
        volumes = [float((scan(seed).labels.array == wanted.label).sum() * voxel_ml) for seed in (1, 2)]
        assert organ.support_volumes_ml == pytest.approx(volumes, abs=1e-3)


@pytest.mark.parametrize("settings", [LINEAR, SPATIAL], ids=str)
def test_equal_seeds_give_equal_bytes_with_and_without_a_cache(
    site: Site, tmp_path: Path, settings: AdapterSettings
) -> None:
    training = TrainingSettings(seed=3, epochs=2, block=16, batch=2, blocks_per_epoch=2, linear_blocks=4)
    for name, cache in (("first", site.root / "cache"), ("second", None)):
        site.adapt([LIVER], tmp_path / name, settings=settings, training=training, cache=cache)
    assert (tmp_path / "first").read_bytes() == (tmp_path / "second").read_bytes()


def test_another_seed_gives_another_adapter(site: Site, tmp_path: Path) -> None:
    for seed in (1, 2):
        training = TrainingSettings(seed=seed, epochs=1, block=16, batch=1, blocks_per_epoch=1)
        site.adapt([LIVER], tmp_path / str(seed), settings=SPATIAL, training=training)
    first, second = (read_adapter(tmp_path / name).adapter.state_dict() for name in ("1", "2"))
    assert not all(torch.equal(first[key], second[key]) for key in first)


def test_a_label_value_that_is_in_no_annotation_is_refused_before_any_encoding(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(EncoderSession, "encode", None)
    liver = f"{LIVER.label} (in 2 files, "
    with refused(LabelError, "77", "adrenal", site.root / "labels", liver) as caught:
        site.adapt([LIVER, OrganLabel("adrenal", 77)], tmp_path / "a.adapter")
    assert "--organ" in caught.value.remedy
    assert list(tmp_path.iterdir()) == []


def test_a_scan_without_the_label_of_an_organ_is_treated_as_not_annotated_for_it(
    site: Site, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_case(tmp_path, "full", 1)
    write_case(tmp_path, "partial", 2, only=["liver"])
    with caplog.at_level(logging.WARNING):
        file = site.adapt(
            [LIVER, SPLEEN], tmp_path / "a.adapter", images=tmp_path / "images", labels=tmp_path / "labels"
        )
    (record,) = (record for record in caplog.records if record.levelno == logging.WARNING)
    assert "spleen" in record.getMessage()
    assert "partial" in record.getMessage()
    liver, spleen = file.description.organs
    assert len(liver.support_volumes_ml) == 2
    assert len(spleen.support_volumes_ml) == 1
    assert file.description.shots == 2
    assert (tmp_path / "a.adapter").is_file()


@pytest.mark.parametrize("difference", ["shape", "affine"])
def test_an_annotation_on_another_lattice_is_refused_with_its_scan_and_nothing_is_written(
    site: Site, copied: Path, difference: str
) -> None:
    patient = scan(2)
    labels, affine = patient.labels.array, patient.labels.affine.copy()
    if difference == "shape":
        labels = labels[:-1]
    else:
        affine[2, 3] += 3.0
    write_label_map(copied / "labels" / "case_2.nii.gz", LabelMap(labels, affine))
    both = [copied / part / "case_2.nii.gz" for part in ("images", "labels")]
    with refused(GeometryError, *both, {"shape": "voxels", "affine": "differs in place"}[difference]):
        site.adapt([LIVER], copied / "out" / "a.adapter", images=copied / "images", labels=copied / "labels")
    assert not (copied / "out").exists()


def test_an_image_that_is_not_a_ct_is_refused_by_name_and_nothing_is_written(site: Site, copied: Path) -> None:
    patient = scan(2)
    scaled = Volume(np.clip(patient.volume.array, 0, 1000), patient.volume.affine)
    write_ct(copied / "images" / "case_2.nii.gz", scaled)
    with refused(NotACtError, copied / "images" / "case_2.nii.gz"):
        site.adapt([LIVER], copied / "a.adapter", images=copied / "images", labels=copied / "labels")
    assert not (copied / "a.adapter").exists()


def test_scans_without_annotation_are_skipped_with_a_warning(
    site: Site, copied: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (copied / "labels" / "case_2.nii.gz").unlink()
    with caplog.at_level(logging.WARNING):
        file = site.adapt([LIVER], copied / "a.adapter", images=copied / "images", labels=copied / "labels")
    assert file.description.shots == 1
    assert "case_2" in caplog.text


def test_folders_without_a_pair_are_refused_by_name(site: Site, copied: Path) -> None:
    for path in (copied / "labels").iterdir():
        path.rename(path.with_name(f"seg_{path.name}"))
    with refused(UnreadableFileError, copied / "images", copied / "labels"):
        site.adapt([LIVER], copied / "a.adapter", images=copied / "images", labels=copied / "labels")


def test_only_the_named_cases_are_used(site: Site, tmp_path: Path) -> None:
    file = site.adapt([LIVER], tmp_path / "a.adapter", cases=["case_2"])
    volume = float((scan(2).labels.array == LIVER.label).sum() * np.prod(SPACING) / 1000)
    assert file.description.shots == 1
    assert file.description.organs[0].support_volumes_ml == pytest.approx((volume,), abs=1e-3)


def test_a_case_that_is_named_twice_is_used_once(site: Site, tmp_path: Path) -> None:
    file = site.adapt([LIVER], tmp_path / "a.adapter", cases=["case_2", "case_1", "case_2"])
    assert file.description.shots == 2


@pytest.mark.parametrize("missing", ["images", "labels"])
def test_a_named_case_without_image_or_annotation_is_refused(site: Site, copied: Path, missing: str) -> None:
    (copied / missing / "case_2.nii.gz").unlink()
    with refused(UnreadableFileError, "case_2") as caught:
        site.adapt(
            [LIVER],
            copied / "a.adapter",
            images=copied / "images",
            labels=copied / "labels",
            cases=["case_1", "case_2"],
        )
    assert "case_1" not in caught.value.message
    assert not (copied / "a.adapter").exists()


def test_a_single_scan_and_a_single_annotation_may_have_different_names(site: Site, tmp_path: Path) -> None:
    image, annotation = write_case(tmp_path, "ct", 1)
    annotation = annotation.rename(annotation.with_name("contours.nii.gz"))
    assert site.adapt([LIVER], tmp_path / "a.adapter", images=image, labels=annotation).description.shots == 1


def test_scans_of_different_size_and_orientation_train_together(site: Site, tmp_path: Path) -> None:
    write_case(tmp_path, "case_1", 1)
    patient = scan(2)
    turned = np.ascontiguousarray(patient.volume.array[::-1, :40].transpose(2, 0, 1))
    flip = np.eye(4)
    flip[0, 0], flip[0, 3] = -1, SHAPE[0] - 1
    affine = (patient.volume.affine @ flip)[:, [2, 0, 1, 3]]
    labels = np.ascontiguousarray(patient.labels.array[::-1, :40].transpose(2, 0, 1))
    write_ct(tmp_path / "images" / "turned.nii.gz", Volume(turned, affine))
    write_label_map(tmp_path / "labels" / "turned.nii.gz", LabelMap(labels, affine))
    file = site.adapt([LIVER], tmp_path / "a.adapter", images=tmp_path / "images", labels=tmp_path / "labels")
    expected = (patient.labels.array[:, :40] == LIVER.label).sum() * np.prod(SPACING) / 1000
    assert file.description.organs[0].support_volumes_ml[1] == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("method", ["linear", "pointwise", "spatial"])
@pytest.mark.parametrize("levels", ["finest", "all"])
def test_before_the_first_training_step_an_adapter_gives_the_masks_of_the_head(
    site: Site, tmp_path: Path, method: str, levels: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The learning rate is zero, or the linear solver runs no iteration. The organs are those of the encoder's head."""
    monkeypatch.setattr("fseft_edge.adaptation.training.solve", partial(solve, iterations=0))
    known = [OrganLabel(name, label_of(name)) for name in HEAD_ORGANS]
    site.adapt(
        known,
        tmp_path / "adapted.adapter",
        settings=AdapterSettings(method, levels, width=4),  # type: ignore[arg-type]  # parametrised literals
        training=NO_TRAINING,
    )
    write_adapter(tmp_path / "head.adapter", zero_shot_adapter(site.bundle, known))
    image = site.root / "images" / "case_1.nii.gz"
    masks = []
    for name in ("adapted", "head"):
        case = site.segment(image, tmp_path / f"{name}.adapter", tmp_path / name)
        masks.append(read_label_map(case.mask).array)
    values, voxels = np.unique(masks[1], return_counts=True)
    assert set(values) == {0, *(organ.label for organ in known)}
    assert min(voxels) > 100
    assert (masks[0] != masks[1]).mean() < 1e-4  # rounding of probabilities at the threshold


def test_the_head_row_of_an_organ_is_found_by_its_name_in_any_order(site: Site) -> None:
    file = zero_shot_adapter(site.bundle, [OrganLabel(name, label_of(name)) for name in HEAD_ORGANS[::-1]])
    torch.testing.assert_close(
        file.adapter.direct.weight[:, :, 0, 0, 0], site.bundle.head_weight().flip(0), rtol=0, atol=0
    )
    torch.testing.assert_close(file.adapter.direct.bias, site.bundle.head_bias().flip(0), rtol=0, atol=0)
    assert [organ.name for organ in file.description.organs] == list(HEAD_ORGANS[::-1])


def test_a_zero_shot_adapter_of_a_novel_organ_is_refused(site: Site) -> None:
    with refused(LabelError, "tiny", "spleen", "liver, left_lung"):
        zero_shot_adapter(site.bundle, [LIVER, SPLEEN])


def _no_encoding(self: EncoderSession, windows: torch.Tensor) -> list[torch.Tensor]:
    raise AssertionError("a scan was encoded")


def test_softmax_needs_a_scan_that_is_annotated_for_all_organs(site: Site, tmp_path: Path) -> None:
    write_case(tmp_path, "liver_only", 1, only=["liver"])
    write_case(tmp_path, "spleen_only", 2, only=["spleen"])
    where = {"images": tmp_path / "images", "labels": tmp_path / "labels"}
    softmax = replace(LINEAR, activation="softmax")
    with refused(LabelError, "softmax") as caught:
        site.adapt([LIVER, SPLEEN], tmp_path / "a.adapter", settings=softmax, **where)
    assert "--activation sigmoid" in caught.value.remedy
    site.adapt([LIVER], tmp_path / "a.adapter", settings=softmax, cases=["liver_only"], **where)


def test_a_support_scan_is_encoded_once_for_all_adapters(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"
    site.adapt([LIVER], tmp_path / "a.adapter", cache=cache)
    monkeypatch.setattr(EncoderSession, "encode", _no_encoding)
    site.adapt([SPLEEN, LUNG], tmp_path / "b.adapter", cache=cache, settings=SPATIAL)


def test_without_a_cache_no_feature_map_remains(site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    site.adapt([LIVER], tmp_path / "a.adapter", cache=None, cases=["case_1"])
    assert list((tmp_path / "temporary").iterdir()) == []


def test_an_output_that_is_a_folder_is_refused_before_any_work(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(EncoderSession, "encode", _no_encoding)
    with refused(UsageError, tmp_path):
        site.adapt([LIVER], tmp_path, cache=None)


def test_an_interrupted_adaptation_leaves_no_file(site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("fseft_edge.adaptation.training.adaptation_loss", interrupted)
    with pytest.raises(KeyboardInterrupt):
        site.adapt([LIVER], tmp_path / "a.adapter", settings=SPATIAL)
    assert list(tmp_path.iterdir()) == []


def test_adaptation_finds_an_organ_of_a_new_patient(site: Site, tmp_path: Path) -> None:
    """The organ is the liver. The encoder and its head have random weights."""
    image, reference = write_case(tmp_path / "query", "case_3", 3)
    trained = TrainingSettings(
        epochs=12,
        block=16,
        batch=4,
        blocks_per_epoch=8,
        feature_shift=0.0,
        channel_dropout=0.0,
        linear_rate=0.02,
        residual_rate=0.01,
        bfloat16=False,
    )
    dsc = []
    for name, training in (("before", NO_TRAINING), ("after", trained)):
        site.adapt([LIVER], tmp_path / f"{name}.adapter", settings=SPATIAL, training=training)
        case = site.segment(image, tmp_path / f"{name}.adapter", tmp_path / name)
        (row,) = evaluate(case.mask, reference, {"liver": LIVER.label}).rows
        dsc.append(row.dsc or 0.0)
    before, after = dsc
    assert after > 0.45
    assert after > before + 0.2
    losses = read_adapter(tmp_path / "after.adapter").description.losses
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.real_ct
def test_an_adapter_from_a_real_scan_segments_another_real_scan_on_its_lattice(
    site: Site, real_ct: Path, tmp_path: Path
) -> None:
    splits = json.loads((real_ct / "headneck" / "splits.json").read_text())
    first, second = splits["support"][:2]
    organs = [OrganLabel("brainstem", 1), OrganLabel("mandible", 7)]
    site.adapt(
        organs,
        tmp_path / "a.adapter",
        images=real_ct / "headneck" / "ct",
        labels=real_ct / "headneck" / "label",
        cases=[first],
        settings=SPATIAL,
    )
    source = next((real_ct / "headneck" / "ct").glob(f"{second}.nii*"))
    case = site.segment(source, tmp_path / "a.adapter", tmp_path / "out")
    scan_file, mask = nib.load(source), nib.load(case.mask)
    assert mask.shape == scan_file.shape
    np.testing.assert_array_equal(mask.affine, scan_file.affine)
    volume_ml = read_adapter(tmp_path / "a.adapter").description.organs[1].support_volumes_ml[0]
    label = next((real_ct / "headneck" / "label").glob(f"{first}.nii*"))
    contour = nib.load(label)
    voxels = int((np.asanyarray(contour.dataobj) == 7).sum())
    assert volume_ml == pytest.approx(voxels * abs(np.linalg.det(contour.affine[:3, :3])) / 1000, abs=1e-2)


def test_a_left_out_score_is_the_score_of_an_adapter_from_the_other_scans(site: Site, tmp_path: Path) -> None:
    # Variations are off, because by default only a single scan has variations.
    training = TrainingSettings(epochs=5, block=16, batch=2, blocks_per_epoch=4, residual_rate=1e-2, variations=0)
    both = site.adapt([LIVER], tmp_path / "both.adapter", settings=SPATIAL, training=training, validate=True)
    site.adapt([LIVER], tmp_path / "one.adapter", settings=SPATIAL, training=training, cases=["case_2"])
    steps = asdict(both.description.organs[0].post_processing)
    site.segment(site.root / "images" / "case_1.nii.gz", tmp_path / "one.adapter", tmp_path / "masks", **steps)
    (row,) = evaluate(tmp_path / "masks", site.root / "labels", {"liver": LIVER.label}).rows
    assert len(both.description.organs[0].left_out_dsc) == 2
    assert both.description.organs[0].left_out_dsc[0] == pytest.approx(row.dsc, abs=1e-4)
    assert read_adapter(tmp_path / "both.adapter").description.organs == both.description.organs


def left_out_cases(monkeypatch: pytest.MonkeyPatch) -> list[set[str]]:
    """Record, for each adapter that cross-validation makes, the cases that it is not made from."""
    folds: list[set[str]] = []
    make = Candidate.make

    def recorded(candidate: Candidate, support: Sequence[SupportScan], *rest: Any) -> TrainedAdapter:
        used = {scan.identity.case for scan in support if scan.identity}
        folds.append({"case_1", "case_2", "case_3"} - used)
        return make(candidate, support, *rest)

    monkeypatch.setattr(Candidate, "make", recorded)
    return folds


def flipped(image: nib.Nifti1Image) -> nib.Nifti1Image:
    """Return an image with the same voxels at the same places, stored in another axis order and direction."""
    turned = nib.orientations.ornt_transform(
        nib.orientations.io_orientation(image.affine), nib.orientations.axcodes2ornt("ASL")
    )
    return image.as_reoriented(turned)


def test_all_scans_of_a_patient_are_left_out_together(
    site: Site, copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_case(copied, "case_3", 3)
    groups = {"case_1": "anna", "case_2": "bo", "case_3": "anna"}
    folds = left_out_cases(monkeypatch)
    where = {"images": copied / "images", "labels": copied / "labels"}
    file = site.adapt([LIVER], copied / "a.adapter", validate=True, groups=groups, **where)
    assert folds == [{"case_1", "case_3"}, {"case_2"}, set()]
    assert len(file.description.organs[0].left_out_dsc) == 3
    assert read_adapter(copied / "a.adapter").description.support_groups == 2


def test_a_copy_of_a_scan_is_found_and_does_not_raise_the_expected_dsc(
    site: Site, copied: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The copy has another name, is not compressed, and has another axis order."""
    for part in ("images", "labels"):
        nib.save(flipped(nib.load(copied / part / "case_1.nii.gz")), copied / part / "case_3.nii")
    folds = left_out_cases(monkeypatch)
    where = {"images": copied / "images", "labels": copied / "labels"}
    file = site.adapt([LIVER], copied / "a.adapter", validate=True, **where)
    assert folds == [{"case_1", "case_3"}, {"case_2"}, set()]
    assert file.description.support_groups == 2
    assert "case_1 and case_3 contain the same scan:" in caplog.text
    first, _, third = file.description.support_annotations
    assert first == third


def test_a_single_patient_is_not_validated_and_a_warning_states_it(
    site: Site, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    groups = {"case_1": "anna", "case_2": "anna"}
    file = site.adapt([LIVER], tmp_path / "a.adapter", validate=True, groups=groups)
    assert file.description.organs[0].left_out_dsc == ()
    assert "two patients" in caplog.text
    assert "anna" not in caplog.text


def test_groups_that_do_not_match_the_cases_are_refused_before_any_encoding(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(EncoderSession, "encode", _no_encoding)
    for groups, named in (({"case_1": "a"}, "case_2"), ({"case_1": "a", "case_2": "a", "case_9": "b"}, "case_9")):
        with refused(UsageError, named):
            site.adapt([LIVER], tmp_path / "a.adapter", groups=groups, cache=None)
    # A table for all cases of the folder can be used with a part of the cases.
    monkeypatch.undo()
    site.adapt([LIVER], tmp_path / "a.adapter", groups={"case_1": "a", "case_2": "b"}, cases=["case_1"])


def test_an_organ_that_was_not_learned_is_named(site: Site, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The classifier of a new organ is not trained, so its masks are empty."""
    settings = {"settings": SPATIAL, "training": NO_TRAINING}
    file = site.adapt([SPLEEN], tmp_path / "a.adapter", validate=True, **settings)
    assert file.description.organs[0].left_out_dsc == (0.0, 0.0)
    assert (
        "the organ spleen was not learned: its mean DSC on left-out scans is 0.00, without any overlap in 2 of 2"
        in caplog.text
    )


def test_an_organ_that_only_one_scan_annotates_is_not_validated(site: Site, tmp_path: Path, copied: Path) -> None:
    path = copied / "labels" / "case_1.nii.gz"
    labels = read_label_map(path)
    array = np.where(labels.array == SPLEEN.label, 0, labels.array)
    write_label_map(path, LabelMap(array, labels.affine))
    file = site.adapt(
        [LIVER, SPLEEN], tmp_path / "a.adapter", images=copied / "images", labels=copied / "labels", validate=True
    )
    liver, spleen = file.description.organs
    assert (len(liver.left_out_dsc), len(spleen.left_out_dsc)) == (2, 0)


def test_a_single_scan_is_not_validated_and_a_warning_states_it(
    site: Site, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = site.adapt([LIVER], tmp_path / "a.adapter", cases=["case_1"], choose=True, validate=True)
    assert file.description.organs[0].left_out_dsc == ()
    assert file.description.settings["method"] == "linear"
    (warning,) = (record for record in caplog.records if record.levelno == logging.WARNING)
    assert LINEAR.name in warning.getMessage()


def test_scans_without_a_common_organ_are_not_validated(
    site: Site, tmp_path: Path, copied: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name, kept in (("case_1", LIVER.label), ("case_2", SPLEEN.label)):
        path = copied / "labels" / f"{name}.nii.gz"
        labels = read_label_map(path)
        write_label_map(path, LabelMap(np.where(labels.array == kept, labels.array, 0), labels.affine))
    file = site.adapt(
        [LIVER, SPLEEN],
        tmp_path / "a.adapter",
        images=copied / "images",
        labels=copied / "labels",
        cases=["case_1", "case_2"],
        choose=True,
    )
    assert [organ.left_out_dsc for organ in file.description.organs] == [(), ()]
    assert any(LINEAR.name in record.getMessage() for record in caplog.records if record.levelno == logging.WARNING)


def test_the_adapter_is_made_with_the_best_candidate(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    winner = "linear on all levels, ridge 0.01"
    steps = PostProcessing(fill_holes=True)

    def best_of(kinds: Sequence[Candidate], *_: object, **__: object) -> tuple[Validated, list[Validated]]:
        (candidate,) = [kind for kind in kinds if kind.name == winner]
        validated = Validated(candidate, ((0.8, 0.7),), (steps,), (False,))
        return validated, [validated]

    monkeypatch.setattr("fseft_edge.adaptation.adapt.best_of", best_of)
    file = site.adapt([LIVER], tmp_path / "a.adapter", choose=True)
    assert (file.description.settings["method"], file.description.settings["reads"]) == ("linear", "pyramid")
    assert file.description.organs[0].left_out_dsc == (0.8, 0.7)
    assert read_adapter(tmp_path / "a.adapter").description.organs[0].post_processing == steps
    winner = "zero-shot"
    file = site.adapt([LIVER], tmp_path / "b.adapter", choose=True)
    assert file.description.steps == 0
    write_adapter(tmp_path / "head.adapter", zero_shot_adapter(site.bundle, [LIVER]))
    head = read_adapter(tmp_path / "head.adapter").adapter
    assert torch.equal(file.adapter.direct.weight, head.direct.weight)
