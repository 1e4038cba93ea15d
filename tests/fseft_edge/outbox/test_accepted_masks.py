"""Accepted masks as annotations: label values, corrected masks, and masks that are never used."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import numpy as np
import pytest
from doubles.encoder import label_of, scan, write_case, write_tiny_encoder
from doubles.errors import refused
from doubles.reviewed import Batch, run_batch

from fseft_edge.adaptation.adapt import adapt
from fseft_edge.adaptation.training import TrainingSettings
from fseft_edge.adapters.network import AdapterSettings
from fseft_edge.outbox.accepted_masks import ReviewedBatch, accepted_annotations
from fseft_edge.outbox.records import Decision
from fseft_edge.runtime.errors import GeometryError, InputError, LabelError, UnreadableFileError, UsageError
from fseft_edge.runtime.scans.nifti import read_label_map, write_ct, write_label_map
from fseft_edge.runtime.scans.organs import OrganLabel
from fseft_edge.runtime.scans.volume import LabelMap, Volume

LINEAR = AdapterSettings(method="linear", levels="finest")
SHORT = TrainingSettings(block=16, variations=0, linear_blocks=2)
LIVER, SPLEEN = OrganLabel("liver", 6), OrganLabel("spleen", 300)
"""In the masks of the batch the spleen has the label value 1 and the liver 2; these are other label values."""


@pytest.fixture
def batch(tmp_path: Path) -> Batch:
    return run_batch(tmp_path / "batch")


def accepted(batch: Batch, *organs: OrganLabel, corrected: Path | None = None) -> list[tuple[Path, LabelMap]]:
    return accepted_annotations(ReviewedBatch(batch.outbox, corrected=corrected), organs)


def test_organs_are_matched_by_name_and_not_by_label_value(batch: Batch) -> None:
    batch.decide(batch.keys[0], Decision.ACCEPTED)
    [(image, mask)] = accepted(batch, LIVER, SPLEEN)
    truth = scan(1).labels
    assert image == batch.source(batch.keys[0])
    for organ in (LIVER, SPLEEN):
        np.testing.assert_array_equal(mask.array == organ.label, truth.array == label_of(organ.name))
    assert set(np.unique(mask.array)) == {0, 6, 300}
    np.testing.assert_array_equal(mask.affine, truth.affine)


def test_the_accepted_mask_of_a_superseded_case_is_not_used(batch: Batch, caplog: pytest.LogCaptureFixture) -> None:
    first, second = batch.keys
    batch.decide(first, Decision.ACCEPTED)
    source = batch.source(first)
    with batch.store() as store:
        store.add(source.parent, "", "case-larger", ["1", "2", "3"])
        store.add(source, "", first, ["1", "2"])
        assert store.supersede_earlier(source.parent, "case-larger").keys == (first,)
    with refused(UsageError, batch.outbox, "superseded"):
        accepted(batch, LIVER)
    batch.decide(second, Decision.ACCEPTED)
    assert [image for image, _ in accepted(batch, LIVER)] == [batch.source(second)]
    assert f"{first} was accepted, but is superseded by case-larger" in caplog.text


def test_label_values_can_be_swapped_against_those_of_the_batch(batch: Batch) -> None:
    batch.decide(batch.keys[0], Decision.ACCEPTED)
    [(_, mask)] = accepted(batch, OrganLabel("liver", 1), OrganLabel("spleen", 2))
    own = read_label_map(batch.mask(batch.keys[0])).array
    np.testing.assert_array_equal(mask.array, np.array([0, 2, 1])[own])


def test_other_organs_become_background_and_missing_organs_are_not_annotated(batch: Batch) -> None:
    batch.decide(batch.keys[0], Decision.ACCEPTED)
    [(_, mask)] = accepted(batch, LIVER, OrganLabel("pancreas", 1))
    np.testing.assert_array_equal(mask.array, np.where(scan(1).labels.array == label_of("liver"), 6, 0))


def test_rejected_and_undecided_masks_are_never_used(batch: Batch) -> None:
    with refused(UsageError, batch.outbox):
        accepted(batch, LIVER)
    batch.decide(batch.keys[0], Decision.REJECTED)
    with refused(UsageError, batch.outbox):
        accepted(batch, LIVER)
    batch.decide(batch.keys[1], Decision.ACCEPTED)
    assert [image for image, _ in accepted(batch, LIVER)] == [batch.source(batch.keys[1])]
    batch.decide(batch.keys[1], Decision.REJECTED)
    batch.decide(batch.keys[0], Decision.ACCEPTED)
    assert [image for image, _ in accepted(batch, LIVER)] == [batch.source(batch.keys[0])]


def corrections(batch: Batch, folder: Path, *keys: str) -> Path:
    """Write masks in which the liver is a single voxel."""
    for key in keys:
        labels = np.zeros(scan(1).labels.shape, np.uint8)
        labels[10, 11, 12] = 2
        write_label_map(folder / f"{key}.nii.gz", LabelMap(labels, scan(1).labels.affine))
    return folder


def test_a_corrected_mask_replaces_the_mask_of_the_batch(batch: Batch, tmp_path: Path) -> None:
    folder = corrections(batch, tmp_path / "corrected", batch.keys[0])
    batch.decide(batch.keys[0], Decision.REJECTED)
    batch.decide(batch.keys[0], Decision.ACCEPTED, mask=folder / f"{batch.keys[0]}.nii.gz")
    batch.decide(batch.keys[1], Decision.ACCEPTED)
    (_, first), (_, second) = accepted(batch, LIVER, corrected=folder)
    assert np.argwhere(first.array == 6).tolist() == [[10, 11, 12]]
    np.testing.assert_array_equal(second.array == 6, scan(2).labels.array == label_of("liver"))


def test_only_the_mask_that_was_accepted_is_used(batch: Batch, tmp_path: Path) -> None:
    """A mask may be corrected after it was accepted, or only a corrected mask may have been accepted."""
    key = batch.keys[0]
    folder = corrections(batch, tmp_path / "corrected", key)
    corrected = folder / f"{key}.nii.gz"
    batch.decide(key, Decision.ACCEPTED)
    with refused(InputError, "corrected", key) as caught:
        accepted(batch, LIVER, corrected=folder)
    assert f"fseft-edge review {batch.outbox} --corrected {folder}" in caught.value.remedy
    batch.decide(key, Decision.ACCEPTED, mask=corrected)
    with refused(InputError, key, batch.outbox) as caught:
        accepted(batch, LIVER)
    assert "--corrected" in caught.value.remedy
    assert len(accepted(batch, LIVER, corrected=folder)) == 1
    shutil.copy(batch.mask(key), corrected)
    with refused(InputError, "corrected", key):
        accepted(batch, LIVER, corrected=folder)
    batch.decide(key, Decision.ACCEPTED)
    corrections(batch, batch.mask(key).parent, key)
    with refused(InputError, key, batch.outbox):
        accepted(batch, LIVER)


def test_a_mask_accepted_in_an_earlier_version_is_used_with_a_warning(
    batch: Batch, caplog: pytest.LogCaptureFixture
) -> None:
    with batch.store() as store:
        store.review(batch.keys[0], Decision.ACCEPTED, "", reviewer="", mask_sha256="")
    assert len(accepted(batch, LIVER)) == 1
    assert f"{batch.keys[0]} was accepted in a version that did not record" in caplog.text


def test_a_corrected_mask_is_used_only_if_its_case_was_accepted(
    batch: Batch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    batch.decide(batch.keys[0], Decision.ACCEPTED)
    batch.decide(batch.keys[1], Decision.REJECTED)
    folder = corrections(batch, tmp_path / "corrected", batch.keys[1])
    assert len(accepted(batch, LIVER, corrected=folder)) == 1
    assert batch.keys[1] in caplog.text
    with refused(InputError, folder, "case-typo"):
        accepted(batch, LIVER, corrected=corrections(batch, folder, "case-typo"))
    uncompressed = tmp_path / "uncompressed" / f"{batch.keys[0]}.nii"
    write_label_map(uncompressed, scan(1).labels)
    with refused(InputError, uncompressed, ".nii.gz"):
        accepted(batch, LIVER, corrected=uncompressed.parent)


def test_a_scan_that_has_changed_is_refused(batch: Batch) -> None:
    for key in batch.keys:
        batch.decide(key, Decision.ACCEPTED)
    source = batch.source(batch.keys[0])
    volume = scan(1).volume
    write_ct(source, Volume(np.asarray(volume.array) + 1, volume.affine))
    with refused(InputError, batch.keys[0]):
        accepted(batch, LIVER)
    source.unlink()
    with refused(UnreadableFileError, source):
        accepted(batch, LIVER)
    batch.decide(batch.keys[0], Decision.REJECTED)  # as the remedy proposes
    assert len(accepted(batch, LIVER)) == 1


@pytest.mark.parametrize("text", ["", "{", '{"organs": 3}', '{"organs": [{"name": "liver"}]}', "[]"])
def test_a_mask_without_a_description_is_refused(batch: Batch, text: str) -> None:
    batch.decide(batch.keys[0], Decision.ACCEPTED)
    batch.mask(batch.keys[0], ".json").write_text(text)
    with refused(LabelError, batch.mask(batch.keys[0], ".json")):
        accepted(batch, LIVER)


def test_label_values_come_from_the_description_of_the_mask(batch: Batch) -> None:
    batch.decide(batch.keys[0], Decision.ACCEPTED)
    batch.mask(batch.keys[0], ".json").write_text(json.dumps({"organs": [{"name": "liver", "label": 1}]}))
    [(_, mask)] = accepted(batch, LIVER, SPLEEN)
    np.testing.assert_array_equal(mask.array, np.where(scan(1).labels.array == label_of("spleen"), 6, 0))


def test_an_adapter_is_trained_on_accepted_masks_with_or_without_annotations(batch: Batch, tmp_path: Path) -> None:
    """The organ volumes in the adapter file show which masks were used for training."""
    encoder = write_tiny_encoder(tmp_path / "tiny.encoder").path
    write_case(tmp_path, "annotated", 3)
    batch.decide(batch.keys[1], Decision.ACCEPTED)
    liver = OrganLabel("liver", label_of("liver"))  # the label value in the annotations

    def volumes(images: Path | None, labels: Path | None) -> tuple[float, ...]:
        made = adapt(
            encoder,
            images,
            labels,
            [liver],
            tmp_path / "liver.adapter",
            reviewed=ReviewedBatch(batch.outbox),
            settings=LINEAR,
            training=SHORT,
            validate=False,
            cache=tmp_path / "cache",
            device="cpu",
            backend="torch",
        )
        assert made.description.shots == len(made.description.organs[0].support_volumes_ml)
        return made.description.organs[0].support_volumes_ml

    truth = {seed: float((scan(seed).labels.array == label_of("liver")).sum()) * 6.0**3 / 1000 for seed in (2, 3)}
    assert volumes(None, None) == pytest.approx([truth[2]])
    assert volumes(tmp_path / "images", tmp_path / "labels") == pytest.approx([truth[3], truth[2]])


def test_an_annotated_scan_is_not_used_a_second_time(
    batch: Batch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """If a scan were in the support set twice, cross-validation would score it with an adapter trained on it."""
    for key in batch.keys:
        batch.decide(key, Decision.ACCEPTED)
    annotated = tmp_path / "annotated.nii.gz"
    shutil.copy(batch.source(batch.keys[0]), annotated)
    with caplog.at_level(logging.WARNING):
        taken = accepted_annotations(ReviewedBatch(batch.outbox), [LIVER], [annotated])
    assert [image for image, _ in taken] == [batch.source(batch.keys[1])]
    assert batch.keys[0] in caplog.text


def test_adapt_needs_annotated_scans_that_contain_the_organ(batch: Batch, tmp_path: Path) -> None:
    encoder = write_tiny_encoder(tmp_path / "tiny.encoder").path
    output = tmp_path / "liver.adapter"
    for images, labels in ((None, None), (tmp_path, None), (None, tmp_path)):
        with refused(UsageError):
            adapt(encoder, images, labels, [LIVER], output)
    with refused(UsageError):
        adapt(encoder, tmp_path, None, [LIVER], output, reviewed=ReviewedBatch(batch.outbox))
    batch.decide(batch.keys[0], Decision.ACCEPTED)
    with refused(LabelError, "pancreas"):
        adapt(encoder, None, None, [OrganLabel("pancreas", 1)], output, reviewed=ReviewedBatch(batch.outbox))


def test_a_corrected_mask_on_another_lattice_is_refused(batch: Batch, tmp_path: Path) -> None:
    encoder = write_tiny_encoder(tmp_path / "tiny.encoder").path
    shifted = read_label_map(batch.mask(batch.keys[0]))
    affine = np.array(shifted.affine)
    affine[0, 3] += 3
    corrected = tmp_path / "corrected" / f"{batch.keys[0]}.nii.gz"
    write_label_map(corrected, LabelMap(shifted.array, affine))
    batch.decide(batch.keys[0], Decision.ACCEPTED, mask=corrected)
    with refused(GeometryError, batch.keys[0]):
        adapt(
            encoder,
            None,
            None,
            [LIVER],
            tmp_path / "liver.adapter",
            reviewed=ReviewedBatch(batch.outbox, corrected=tmp_path / "corrected"),
            settings=LINEAR,
            device="cpu",
            backend="torch",
        )
