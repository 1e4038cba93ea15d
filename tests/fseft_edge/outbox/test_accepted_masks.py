"""Accepted masks as a support set: whose they are, how they are numbered, and what is never learned from."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import numpy as np
import pytest
from doubles.encoder import label_of, scan, write_case, write_tiny_encoder
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
LIVER, SPLEEN = OrganLabel("liver", 6), OrganLabel("spleen", 300)
"""The batch numbers the spleen 1 and the liver 2; the site's annotations are numbered in another way."""


@pytest.fixture
def batch(tmp_path: Path) -> Batch:
    return run_batch(tmp_path / "batch")


def accepted(batch: Batch, *organs: OrganLabel, corrected: Path | None = None) -> list[tuple[Path, LabelMap]]:
    return accepted_annotations(ReviewedBatch(batch.outbox, corrected=corrected), organs)


def test_organs_are_matched_by_name_not_by_number(batch: Batch) -> None:
    batch.decide(batch.keys[0], Decision.ACCEPTED)
    [(image, mask)] = accepted(batch, LIVER, SPLEEN)
    truth = scan(1).labels
    assert image == batch.source(batch.keys[0])
    for organ in (LIVER, SPLEEN):
        np.testing.assert_array_equal(mask.array == organ.label, truth.array == label_of(organ.name))
    assert set(np.unique(mask.array)) == {0, 6, 300}
    np.testing.assert_array_equal(mask.affine, truth.affine)


def test_a_site_may_use_the_batchs_numbers_the_other_way_round(batch: Batch) -> None:
    batch.decide(batch.keys[0], Decision.ACCEPTED)
    [(_, mask)] = accepted(batch, OrganLabel("liver", 1), OrganLabel("spleen", 2))
    own = read_label_map(batch.mask(batch.keys[0])).array
    np.testing.assert_array_equal(mask.array, np.array([0, 2, 1])[own])


def test_organs_that_are_not_asked_for_are_background_and_unknown_ones_not_annotated(batch: Batch) -> None:
    batch.decide(batch.keys[0], Decision.ACCEPTED)
    [(_, mask)] = accepted(batch, LIVER, OrganLabel("pancreas", 1))
    np.testing.assert_array_equal(mask.array, np.where(scan(1).labels.array == label_of("liver"), 6, 0))


def test_rejected_and_undecided_masks_are_never_taken(batch: Batch) -> None:
    with pytest.raises(UsageError, match=r"No mask in .* was accepted"):
        accepted(batch, LIVER)
    batch.decide(batch.keys[0], Decision.REJECTED)
    with pytest.raises(UsageError, match=r"No mask in .* was accepted"):
        accepted(batch, LIVER)
    batch.decide(batch.keys[1], Decision.ACCEPTED)
    assert [image for image, _ in accepted(batch, LIVER)] == [batch.source(batch.keys[1])]
    batch.decide(batch.keys[1], Decision.REJECTED)
    batch.decide(batch.keys[0], Decision.ACCEPTED)
    assert [image for image, _ in accepted(batch, LIVER)] == [batch.source(batch.keys[0])]


def corrections(batch: Batch, folder: Path, *keys: str) -> Path:
    """Write masks in which the liver is one voxel."""
    for key in keys:
        labels = np.zeros(scan(1).labels.shape, np.uint8)
        labels[10, 11, 12] = 2
        write_label_map(folder / f"{key}.nii.gz", LabelMap(labels, scan(1).labels.affine))
    return folder


def test_a_corrected_mask_takes_the_place_of_the_batchs(batch: Batch, tmp_path: Path) -> None:
    for key in batch.keys:
        batch.decide(key, Decision.ACCEPTED)
    folder = corrections(batch, tmp_path / "corrected", batch.keys[0])
    (_, first), (_, second) = accepted(batch, LIVER, corrected=folder)
    assert np.argwhere(first.array == 6).tolist() == [[10, 11, 12]]
    np.testing.assert_array_equal(second.array == 6, scan(2).labels.array == label_of("liver"))


def test_a_corrected_mask_has_to_be_accepted_too(
    batch: Batch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    batch.decide(batch.keys[0], Decision.ACCEPTED)
    batch.decide(batch.keys[1], Decision.REJECTED)
    folder = corrections(batch, tmp_path / "corrected", batch.keys[1])
    assert len(accepted(batch, LIVER, corrected=folder)) == 1
    assert f"{batch.keys[1]}: corrected but not accepted" in caplog.text
    with pytest.raises(InputError, match="case-typo, which are no cases"):
        accepted(batch, LIVER, corrected=corrections(batch, folder, "case-typo"))


def test_a_scan_that_has_changed_is_refused(batch: Batch) -> None:
    for key in batch.keys:
        batch.decide(key, Decision.ACCEPTED)
    source = batch.source(batch.keys[0])
    volume = scan(1).volume
    write_ct(source, Volume(np.asarray(volume.array) + 1, volume.affine))
    with pytest.raises(InputError, match=f"The scan of {batch.keys[0]} has changed"):
        accepted(batch, LIVER)
    source.unlink()
    with pytest.raises(UnreadableFileError):
        accepted(batch, LIVER)
    batch.decide(batch.keys[0], Decision.REJECTED)  # the remedy
    assert len(accepted(batch, LIVER)) == 1


@pytest.mark.parametrize("text", ["", "{", '{"organs": 3}', '{"organs": [{"name": "liver"}]}', "[]"])
def test_a_mask_without_a_description_is_refused(batch: Batch, text: str) -> None:
    batch.decide(batch.keys[0], Decision.ACCEPTED)
    batch.mask(batch.keys[0], ".json").write_text(text)
    with pytest.raises(LabelError, match="does not say which label"):
        accepted(batch, LIVER)


def test_the_descriptions_numbers_count_wherever_they_come_from(batch: Batch) -> None:
    batch.decide(batch.keys[0], Decision.ACCEPTED)
    batch.mask(batch.keys[0], ".json").write_text(json.dumps({"organs": [{"name": "liver", "label": 1}]}))
    [(_, mask)] = accepted(batch, LIVER, SPLEEN)
    np.testing.assert_array_equal(mask.array, np.where(scan(1).labels.array == label_of("spleen"), 6, 0))


def test_an_adapter_is_made_of_accepted_masks_alone_or_with_annotations(batch: Batch, tmp_path: Path) -> None:
    """Phantoms that the batch found exactly: the organs' volumes say which masks were learned from."""
    encoder = write_tiny_encoder(tmp_path / "tiny.encoder").path
    write_case(tmp_path, "annotated", 3)
    batch.decide(batch.keys[1], Decision.ACCEPTED)
    liver = OrganLabel("liver", label_of("liver"))  # as in the annotations

    def volumes(images: Path | None, labels: Path | None) -> tuple[float, ...]:
        made = adapt(
            encoder,
            images,
            labels,
            [liver],
            tmp_path / "liver.adapter",
            reviewed=ReviewedBatch(batch.outbox),
            settings=LINEAR,
            training=TrainingSettings(epochs=1, block=16, batch=1, blocks_per_epoch=1),
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


def test_a_scan_annotated_by_hand_is_not_taken_twice(
    batch: Batch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Twice in the support set, it would also be scored by an adapter that had seen it."""
    for key in batch.keys:
        batch.decide(key, Decision.ACCEPTED)
    by_hand = tmp_path / "by_hand.nii.gz"
    shutil.copy(batch.source(batch.keys[0]), by_hand)
    with caplog.at_level(logging.WARNING):
        taken = accepted_annotations(ReviewedBatch(batch.outbox), [LIVER], [by_hand])
    assert [image for image, _ in taken] == [batch.source(batch.keys[1])]
    assert f"{batch.keys[0]} has an annotation" in caplog.text


def test_there_has_to_be_something_to_learn_from(batch: Batch, tmp_path: Path) -> None:
    encoder = write_tiny_encoder(tmp_path / "tiny.encoder").path
    output = tmp_path / "liver.adapter"
    for images, labels in ((None, None), (tmp_path, None), (None, tmp_path)):
        with pytest.raises(UsageError, match="no annotated scans"):
            adapt(encoder, images, labels, [LIVER], output)
    with pytest.raises(UsageError, match="no annotated scans"):
        adapt(encoder, tmp_path, None, [LIVER], output, reviewed=ReviewedBatch(batch.outbox))
    batch.decide(batch.keys[0], Decision.ACCEPTED)
    with pytest.raises(LabelError, match="No accepted mask holds the organ pancreas"):
        adapt(encoder, None, None, [OrganLabel("pancreas", 1)], output, reviewed=ReviewedBatch(batch.outbox))


def test_a_corrected_mask_on_another_lattice_is_refused(batch: Batch, tmp_path: Path) -> None:
    encoder = write_tiny_encoder(tmp_path / "tiny.encoder").path
    batch.decide(batch.keys[0], Decision.ACCEPTED)
    shifted = read_label_map(batch.mask(batch.keys[0]))
    affine = np.array(shifted.affine)
    affine[0, 3] += 3
    write_label_map(tmp_path / "corrected" / f"{batch.keys[0]}.nii.gz", LabelMap(shifted.array, affine))
    with pytest.raises(GeometryError, match="different lattices"):
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
