"""Options of a batch: every option that determines the results makes another fingerprint, and no other option does."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import pytest
from doubles.encoder import write_case, write_random_adapter, write_tiny_encoder
from doubles.errors import refused

from fseft_edge.adaptation.size_priors import SizePrior
from fseft_edge.adaptation.training import TrainingSettings
from fseft_edge.adaptation.transduction import TransductionInputs, TransductionSettings
from fseft_edge.adapters.file import AdapterFile, read_adapter, write_adapter
from fseft_edge.batch.coordinator import run_batch
from fseft_edge.batch.options import DETERMINES_RESULTS, options_fingerprint, same_options
from fseft_edge.batch.settings import BatchSettings
from fseft_edge.runtime.errors import BatchStateError
from fseft_edge.segmentation.models import load_models
from fseft_edge.segmentation.settings import SegmentationSettings


@dataclass(frozen=True)
class Site:
    """An encoder, an adapter and its support set; and another of each."""

    root: Path

    @property
    def transduction(self) -> TransductionInputs:
        return TransductionInputs(
            self.root / "images", self.root / "labels", {}, {"liver": SizePrior(900, 1500), "lung": SizePrior(1, 2)}
        )

    @property
    def settings(self) -> SegmentationSettings:
        return SegmentationSettings((self.root / "liver.adapter",), self.root / "tiny.encoder")

    def fingerprint(self, settings: SegmentationSettings | None = None, **changes: Any) -> str:
        changed = replace(settings or self.settings, **changes)
        return options_fingerprint(changed, load_models(changed))

    def other(self, field: str) -> dict[str, Any]:
        """Return a change of the settings, by the name of a field."""
        values: dict[str, Any] = {
            "adapters": (self.root / "other.adapter",),
            "series": "1",
            "transduction": self.transduction,
            "largest_component": True,
            "fill_holes": False,
            "preview": True,
            "dicom": ("seg",),
            "cache": self.root / "cache",
            "cache_gb": 7.0,
            "device": "cpu",
            "backend": "torch",
            "precision": "mixed",
            "memory_gb": 3.0,
            "vram_gb": 3.0,
            "save_probabilities": True,
            "split": True,
            "whole_scan": True,
            "follow_size": False,
            "processes": 2,
        }
        return {field: values[field]}


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Site:
    root = tmp_path_factory.mktemp("site")
    for seed in (1, 2):
        write_case(root, f"case{seed}", seed)
    bundle = write_tiny_encoder(root / "tiny.encoder")
    for seed, name in enumerate(("liver", "other")):
        path = root / f"{name}.adapter"
        write_random_adapter(path, bundle, seed=seed, support_volumes_ml=(1000.0, 1200.0))
        file = read_adapter(path)
        (organ,) = file.description.organs
        expecting = organ.model_copy(update={"expected_ml": (900.0, 1320.0)})
        changed = file.description.model_copy(update={"organs": (expecting,), "schema_version": 5})
        write_adapter(path, AdapterFile(changed, file.adapter))
    return Site(root)


def test_every_option_has_a_decision() -> None:
    assert set(DETERMINES_RESULTS) == {field.name for field in fields(SegmentationSettings)}


@pytest.mark.parametrize("field", [name for name in DETERMINES_RESULTS if name not in ("encoder", "organs")])
def test_an_option_changes_the_fingerprint_if_it_determines_the_results(site: Site, field: str) -> None:
    changed = site.fingerprint(**site.other(field))
    assert (changed != site.fingerprint()) == DETERMINES_RESULTS[field]
    assert same_options(site.fingerprint(), changed) != DETERMINES_RESULTS[field]


def test_encoder_and_organs_change_the_fingerprint_and_the_place_of_a_file_does_not(site: Site, tmp_path: Path) -> None:
    write_tiny_encoder(tmp_path / "other.encoder", seed=5)
    zero_shot = SegmentationSettings((), site.root / "tiny.encoder", organs=("liver", "left_lung"))
    organs = site.fingerprint(zero_shot)
    assert site.fingerprint(zero_shot, organs=("left_lung", "liver")) != organs
    assert site.fingerprint(zero_shot, encoder=tmp_path / "other.encoder") != organs
    for path in (site.root / "liver.adapter", site.root / "tiny.encoder"):
        (shutil.copytree if path.is_dir() else shutil.copy)(path, tmp_path / path.name)
    moved = {"adapters": (tmp_path / "liver.adapter",), "encoder": tmp_path / "tiny.encoder"}
    assert site.fingerprint(**moved) == site.fingerprint()


def test_everything_in_a_transduction_changes_the_fingerprint(site: Site, tmp_path: Path) -> None:
    """A field that is added without a decision here makes this test fail."""
    other_images, other_labels = (shutil.copytree(site.root / name, tmp_path / name) for name in ("images", "labels"))
    shutil.copy(other_images / "case1.nii.gz", other_images / "case2.nii.gz")
    shutil.copy(other_labels / "case1.nii.gz", other_labels / "case2.nii.gz")
    changes: dict[str, Any] = {
        "images": other_images,
        "labels": other_labels,
        "priors": {"liver": SizePrior(900, 1501)},
        "table": {"liver": SizePrior(901, 1500)},
        "settings": TransductionSettings(weight=0.2),
    }
    assert set(changes) == {field.name for field in fields(TransductionInputs)}
    made = [site.fingerprint(transduction=site.transduction)]
    made += [site.fingerprint(transduction=replace(site.transduction, **{name: changes[name]})) for name in changes]
    assert len(set(made)) == len(changes) + 1
    further = replace(site.transduction, table=site.transduction.table | {"lung": SizePrior(5, 9)})
    assert site.fingerprint(transduction=further) == made[0]  # no adapter segments this organ
    copied = [shutil.copytree(site.root / name, tmp_path / "copies" / name) for name in ("images", "labels")]
    moved = replace(site.transduction, images=copied[0], labels=copied[1])
    assert site.fingerprint(transduction=moved) == made[0]
    recorded = json.loads(made[0])["transduction"][0]["settings"]
    assert recorded.keys() == asdict(TransductionSettings()).keys()
    assert recorded["training"].keys() == asdict(TrainingSettings()).keys() - {"device", "calibration"}


def test_results_of_the_first_version_are_recognised_unless_their_priors_are_unknown(site: Site) -> None:
    def first_version(**fields: Any) -> str:
        before = json.loads(site.fingerprint())
        del before["version"]
        return json.dumps(before | fields, sort_keys=True)

    assert same_options(first_version(), site.fingerprint())
    assert same_options(first_version(), site.fingerprint(precision="float32"))
    assert not same_options(first_version(fill_holes=True), site.fingerprint())
    assert not same_options(first_version(), site.fingerprint(split=True))
    assert not same_options(first_version(), site.fingerprint(series="1"))
    assert not same_options(first_version(transductive=True), site.fingerprint(transduction=site.transduction))
    assert not same_options("damaged", site.fingerprint())
    assert not same_options("[]", site.fingerprint())


def test_other_priors_need_another_outbox(site: Site, tmp_path: Path) -> None:
    (tmp_path / "inbox").mkdir()
    segmentation = replace(site.settings, transduction=site.transduction)
    settings = BatchSettings(tmp_path / "inbox", tmp_path / "outbox", segmentation, settle=0.0)
    run_batch(settings)
    run_batch(settings)
    wider = replace(site.transduction, priors={"liver": SizePrior(500, 2000)})
    with refused(BatchStateError, tmp_path / "outbox"):
        run_batch(replace(settings, segmentation=replace(segmentation, transduction=wider)))
