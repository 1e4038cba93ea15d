"""Only the part of a scan where the organs are is encoded: the masks, the fallbacks, and what the results say."""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from doubles.encoder import label_of, write_case, write_random_adapter, write_tiny_encoder
from numpy.typing import NDArray

from fseft_edge.adaptation import locator, size_threshold
from fseft_edge.adaptation.adapt import adapt
from fseft_edge.adaptation.locator import Located
from fseft_edge.adaptation.training import TrainingSettings
from fseft_edge.adapters.blocks import Box
from fseft_edge.adapters.file import AdapterFile, read_adapter, write_adapter
from fseft_edge.adapters.network import AdapterSettings
from fseft_edge.runtime.encoder.bundle import EncoderBundle
from fseft_edge.runtime.errors import OutOfMemoryError
from fseft_edge.runtime.scans.components import components
from fseft_edge.segmentation import located
from fseft_edge.segmentation.organ_segmenter import load
from fseft_edge.segmentation.segment import segment

ORGAN = "liver"


@dataclass(frozen=True)
class Site:
    """A tiny encoder, an adapter with a locator, and a scan to segment."""

    root: Path
    bundle: EncoderBundle
    file: AdapterFile
    scan: Path

    @property
    def adapter(self) -> Path:
        return self.root / "liver.adapter"

    def segment(self, output: Path, *adapters: Path, **options: Any) -> tuple[dict[str, Any], NDArray[np.uint8]]:
        """Segment the scan; return the JSON file and the mask."""
        chosen = adapters or (self.adapter,)
        segment(self.scan, chosen, output, encoder=self.bundle.path, backend="torch", device="cpu", **options)
        mask = np.asarray(nib.load(output / "query.nii.gz").dataobj)  # type: ignore[attr-defined]  # nibabel's image type
        return json.loads((output / "query.json").read_text()), mask


@pytest.fixture(scope="module", autouse=True)
def small_locator(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EncoderBundle]:
    """Windows of the tiny encoder count as costly, and another tiny encoder makes the coarse pass."""
    coarse = write_tiny_encoder(tmp_path_factory.mktemp("coarse") / "coarse.encoder", seed=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(locator, "_LEAST_GAIN", 0)
        patch.setattr(locator, "_MOST_SELECTED", 1.0)
        patch.setattr(locator, "open_encoder", lambda _: coarse)
        yield coarse


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory, small_locator: EncoderBundle) -> Site:
    root = tmp_path_factory.mktemp("located")
    bundle = write_tiny_encoder(root / "tiny.encoder")
    for seed in (1, 2):
        write_case(root, f"case_{seed}", seed)
    scan, _ = write_case(root / "new", "query", 9)
    return Site(root, bundle, adapted(root, bundle, root / "liver.adapter"), scan)


def adapted(root: Path, bundle: EncoderBundle, output: Path, **options: Any) -> AdapterFile:
    return adapt(
        bundle.path,
        root / "images",
        root / "labels",
        {ORGAN: label_of(ORGAN)},
        output,
        settings=AdapterSettings("linear", "finest"),
        training=TrainingSettings(linear_blocks=6),
        backend="torch",
        device="cpu",
        **options,
    )


def at(monkeypatch: pytest.MonkeyPatch, *boxes: Box, missing: tuple[str, ...] = ()) -> None:
    """Let every locator find these boxes."""
    monkeypatch.setattr(located, "locate", lambda *_: Located(boxes, missing))


def test_an_adapter_with_a_locator_is_written_and_read(
    site: Site, small_locator: EncoderBundle, tmp_path: Path
) -> None:
    read = read_adapter(site.adapter)
    described = read.description
    assert described.schema_version == 4
    assert described.windows_elsewhere == 2
    assert described.locator is not None
    assert described.locator.encoder_id == small_locator.encoder_id
    assert [len(organ.recall) for organ in described.locator.organs] == [2]
    assert [len(organ.left_out_dsc) for organ in described.organs] == [2]
    assert read.locator is not None
    write_adapter(tmp_path / "again.adapter", read)
    assert (tmp_path / "again.adapter").read_bytes() == site.adapter.read_bytes()


def test_the_same_scans_give_the_same_bytes_and_whole_scans_give_no_locator(site: Site, tmp_path: Path) -> None:
    adapted(site.root, site.bundle, tmp_path / "again.adapter")
    assert (tmp_path / "again.adapter").read_bytes() == site.adapter.read_bytes()
    whole = adapted(site.root, site.bundle, tmp_path / "whole.adapter", whole_scan=True)
    assert whole.locator is None
    assert whole.description.schema_version == 3


def test_each_component_that_was_found_is_that_of_the_whole_scan(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = copy.deepcopy(site.file)
    with torch.no_grad():
        file.adapter.set_linear(file.adapter.linear_weight(), file.adapter.linear_bias() - 1.0)  # small components
    write_adapter(tmp_path / "careful.adapter", file)
    careful, steps = tmp_path / "careful.adapter", {"largest_component": False, "fill_holes": False}
    described, whole = site.segment(tmp_path / "whole", careful, whole_scan=True, **steps)
    total = described["encoded"]["of"]
    assert described["encoded"] == {"windows": total, "of": total, "why": "whole scan"}
    numbered, sizes = components(whole > 0)
    small = np.argwhere(np.isin(numbered, 1 + np.flatnonzero(sizes < 30)))
    seed = small[np.abs(small / np.array(whole.shape) - 0.5).max(axis=1).argmax()]  # few windows lie near the border
    at(monkeypatch, Box(*((int(place), int(place) + 1) for place in seed)))  # the grid is the lattice of the scan
    described, part = site.segment(tmp_path / "part", careful, **steps)
    found = np.unique(numbered[part > 0])
    assert numbered[tuple(seed)] in found
    np.testing.assert_array_equal(part > 0, np.isin(numbered, found))
    assert described["encoded"]["why"] == "located"
    assert 0 < described["encoded"]["windows"] < total
    assert described["warnings"] == []


@pytest.mark.parametrize(("shares", "grows"), [((0.5, 0.6), False), ((1.4, 1.5), True)])
def test_thresholds_follow_the_size_of_what_is_found_in_the_located_part(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shares: tuple[float, float], grows: bool
) -> None:
    monkeypatch.setattr(size_threshold, "touches_border", lambda mask, *_: torch.zeros(len(mask), dtype=torch.bool))

    def expecting(low: float, high: float) -> Path:
        (organ,) = site.file.description.organs
        organ = organ.model_copy(update={"expected_ml": (low, high)})
        changed = site.file.description.model_copy(update={"organs": (organ,), "schema_version": 5})
        path = tmp_path / "a.adapter"
        write_adapter(path, AdapterFile(changed, site.file.adapter, locator=site.file.locator))
        return path

    described, before = site.segment(tmp_path / "plain", expecting(1e-3, 1e9))
    assert described["encoded"]["why"] == "located"
    (entry,) = described["thresholds"]
    assert entry["log_odds"] == 0
    volume = entry["before_ml"]
    described, after = site.segment(tmp_path / "out", expecting(*(share * volume for share in shares)))
    assert described["encoded"]["why"] == "located"
    (entry,) = described["thresholds"]
    assert entry["before_ml"] == volume
    assert (entry["log_odds"] < 0) is grows
    smaller, larger = (before, after) if grows else (after, before)
    assert ((smaller > 0) <= (larger > 0)).all()
    assert 0 < (smaller > 0).sum() < (larger > 0).sum()
    described, fixed = site.segment(tmp_path / "fixed", tmp_path / "a.adapter", follow_size=False)
    assert "thresholds" not in described
    np.testing.assert_array_equal(fixed, before)


def test_an_organ_that_is_not_located_means_the_whole_scan_and_a_warning(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    at(monkeypatch, missing=(ORGAN,))
    described, mask = site.segment(tmp_path / "missing")
    assert described["encoded"]["why"] == "nothing located"
    assert described["encoded"]["windows"] == described["encoded"]["of"]
    assert [ORGAN in warning for warning in described["warnings"]] == [True]
    np.testing.assert_array_equal(mask, site.segment(tmp_path / "whole", whole_scan=True)[1])


def test_an_organ_that_is_not_found_where_it_was_located_means_the_whole_scan_and_a_warning(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = site.segment(tmp_path / "whole", whole_scan=True)[1]
    assert whole.any()
    outside = np.argwhere(whole == 0)[0]
    at(monkeypatch, Box(*((int(place), int(place) + 1) for place in outside)))
    described, mask = site.segment(tmp_path / "missing")
    assert described["encoded"]["why"] == "nothing located"
    assert described["encoded"]["windows"] == described["encoded"]["of"]
    (warning,) = described["warnings"]
    assert ORGAN in warning
    np.testing.assert_array_equal(mask, whole)


def test_the_number_of_windows_does_not_depend_on_the_cache(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(name: str, **options: Any) -> dict[str, Any]:
        return site.segment(tmp_path / name, cache=tmp_path / "cache", **options)[0]["encoded"]

    first = run("first")
    assert run("second") == first
    run("whole", whole_scan=True)
    assert run("third") == first


def test_probabilities_are_those_of_the_whole_scan(site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    at(monkeypatch, Box((0, 8), (0, 8), (0, 8)))
    described, mask = site.segment(tmp_path / "probabilities", save_probabilities=True)
    assert described["encoded"]["why"] == "whole scan"
    np.testing.assert_array_equal(mask, site.segment(tmp_path / "whole", whole_scan=True)[1])
    with load(site.adapter, site.bundle.path, device="cpu", backend="torch") as model:
        in_memory = model.predict_proba(site.scan)
        part = np.asarray(model.predict(site.scan).dataobj)
    assert (in_memory[0] > 0.5).sum() > 0
    np.testing.assert_array_equal(part, site.segment(tmp_path / "part")[1])


def test_an_adapter_without_a_locator_beside_it_means_the_whole_scan(
    site: Site, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_random_adapter(tmp_path / "spleen.adapter", site.bundle, ["spleen"])
    with caplog.at_level(logging.WARNING):
        described, _ = site.segment(tmp_path / "out", site.adapter, tmp_path / "spleen.adapter")
    assert described["encoded"]["why"] == "whole scan"
    assert any("spleen has no locator" in warning for warning in described["warnings"])
    assert "no locator" in caplog.text


def test_a_locator_of_another_version_of_its_encoder_is_not_used(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    other = write_tiny_encoder(tmp_path / "other.encoder", seed=2)
    monkeypatch.setattr(locator, "open_encoder", lambda _: other)
    with caplog.at_level(logging.WARNING):
        described, _ = site.segment(tmp_path / "out")
    assert described["encoded"]["why"] == "whole scan"
    assert other.encoder_id[:12] in caplog.text


def test_a_result_of_the_whole_scan_is_not_taken_for_one_of_a_part(site: Site, tmp_path: Path) -> None:
    site.segment(tmp_path / "out", whole_scan=True)
    (again,) = segment(
        site.scan, site.adapter, tmp_path / "out", encoder=site.bundle.path, skip_existing=True, whole_scan=True
    )
    assert again.existing
    (other,) = segment(site.scan, site.adapter, tmp_path / "out", encoder=site.bundle.path, skip_existing=True)
    assert not other.existing


def test_a_result_with_probabilities_is_not_taken_for_one_of_a_part(site: Site, tmp_path: Path) -> None:
    segment(site.scan, site.adapter, tmp_path / "out", encoder=site.bundle.path, save_probabilities=True)
    (other,) = segment(site.scan, site.adapter, tmp_path / "out", encoder=site.bundle.path, skip_existing=True)
    assert not other.existing


def test_a_locator_that_runs_out_of_memory_means_the_whole_scan(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(*_: object) -> Located:
        raise OutOfMemoryError("The memory is too small.", remedy="Give more.")

    monkeypatch.setattr(located, "locate", fails)
    with caplog.at_level(logging.WARNING):
        described, _ = site.segment(tmp_path / "out")
    assert described["encoded"]["why"] == "whole scan"
    assert "The memory is too small." in caplog.text
    assert "The memory is too small." in described["warnings"][0]


def test_whole_scans_are_encoded_if_they_have_few_windows(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(locator, "_FEWEST_WINDOWS", 1000)
    assert site.segment(tmp_path / "out")[0]["encoded"]["why"] == "whole scan"
