"""Variations of annotated scans: geometry, number, and use in training and cross-validation."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from doubles.encoder import label_of, write_case, write_tiny_encoder

from fseft_edge.adaptation.augmentation import Variation, default_variations, vary
from fseft_edge.adaptation.block_sampling import SupportScan, with_variations
from fseft_edge.adaptation.cross_validation import Candidate, cross_validate
from fseft_edge.adaptation.soft_labels import Occupancy
from fseft_edge.adaptation.support_set import load_support
from fseft_edge.adaptation.training import TrainingSettings, train_adapter
from fseft_edge.adapters.network import AdapterSettings
from fseft_edge.runtime.encoder.feature_store import FeatureStore
from fseft_edge.runtime.encoder.session import open_session
from fseft_edge.runtime.scans.grid import Grid
from fseft_edge.runtime.scans.nifti import read_label_map
from fseft_edge.runtime.scans.organs import OrganLabel
from fseft_edge.runtime.scans.preprocessing import Preprocessing
from fseft_edge.runtime.scans.volume import Volume

ORGANS = [OrganLabel(name, label_of(name)) for name in ("liver", "spleen")]
SPACING = (6.0, 6.0, 6.0)


def ball(shape: tuple[int, int, int], centre: tuple[float, float, float], radius: float) -> np.ndarray:
    axes = np.meshgrid(*(np.arange(length) for length in shape), indexing="ij")
    squared = sum((axis - middle) ** 2 for axis, middle in zip(axes, centre, strict=True))
    return np.asarray(squared <= radius**2)


def varied(mask: np.ndarray, seed: int, *, margin: int = 8, affine: np.ndarray | None = None) -> Variation:
    """Return a variation of a scan with 250 HU inside the organ and air outside."""
    affine = np.diag((*SPACING, 1.0)) if affine is None else affine
    volume = Volume(np.where(mask, 250, -1000).astype(np.int16), affine)
    grid = Grid.of(volume, Preprocessing(spacing=SPACING))
    return vary(volume, grid, [mask], margin=margin, random=np.random.default_rng(seed))


@pytest.mark.parametrize("seed", range(6))
def test_image_and_annotation_have_the_same_rotation_and_scale(seed: int) -> None:
    mask = ball((48, 44, 40), (30, 18, 22), 7) | ball((48, 44, 40), (14, 28, 14), 4)
    variation = varied(mask, seed)
    bright = variation.volume.array > 0.5 * (variation.volume.array.max() + variation.volume.array.min())
    filled = variation.shares[0] > 127
    overlap = 2 * (bright & filled).sum() / (bright.sum() + filled.sum())
    assert overlap > 0.85
    assert 0.8**3 * 0.9 < filled.sum() / mask.sum() < 1.25**3 * 1.1


def test_a_variation_keeps_the_position_of_the_scan() -> None:
    """The centre of an organ at the centre of the field of view keeps its world coordinates after the crop."""
    mask = ball((49, 45, 41), (24, 22, 20), 6)
    affine = np.diag((*SPACING, 1.0))
    affine[:3, 3] = (-100.0, 30.0, 7.0)
    variation = varied(mask, 3, affine=affine)
    position = np.argwhere(variation.shares[0] > 127).mean(0)
    world = variation.volume.affine[:3, :3] @ position + variation.volume.affine[:3, 3]
    assert world == pytest.approx(affine[:3, :3] @ (24, 22, 20) + affine[:3, 3], abs=3.0)


def test_a_rotation_with_anisotropic_voxels_is_a_rotation_in_millimetres() -> None:
    """A ball stays a ball: the second moments of its mask are equal in all directions."""
    spacing = (3.0, 3.0, 9.0)
    axes = np.meshgrid(*(np.arange(n) * s for n, s in zip((64, 64, 24), spacing, strict=True)), indexing="ij")
    mask = sum((axis - axis.mean()) ** 2 for axis in axes) <= 45.0**2
    volume = Volume(np.where(mask, 250, -1000).astype(np.int16), np.diag((*spacing, 1.0)))
    grid = Grid.of(volume, Preprocessing(spacing=spacing))
    for seed in range(4):
        variation = vary(volume, grid, [mask], margin=4, random=np.random.default_rng(seed))
        position = np.argwhere(variation.shares[0] > 127) * np.array(spacing)
        lengths = np.sqrt(np.linalg.eigvalsh(np.cov(position.T)))
        assert lengths.max() / lengths.min() < 1.1


def test_a_variation_is_cropped_to_its_organs_plus_a_margin() -> None:
    mask = ball((96, 90, 80), (40, 40, 40), 5)
    shape = varied(mask, 1, margin=6).volume.shape
    assert all(2 * 6 + 2 * 4 - 1 <= length <= 2 * 6 + 2 * 8 for length in shape)
    assert all(length % 2 == 0 for length in shape)


def test_an_organ_that_leaves_the_field_of_view_is_not_an_error() -> None:
    mask = np.zeros((40, 40, 40), bool)
    mask[0, 0, 0] = True
    shapes = [varied(mask, seed).shares[0].any() for seed in range(8)]
    assert not all(shapes)


def test_equal_seeds_give_equal_variations_and_other_seeds_give_others() -> None:
    mask = ball((40, 40, 40), (20, 20, 20), 6)
    first, again, other = (varied(mask, seed) for seed in (1, 1, 2))
    assert np.array_equal(first.volume.array, again.volume.array)
    assert np.array_equal(first.shares, again.shares)
    assert first.volume.shape != other.volume.shape or not np.array_equal(first.volume.array, other.volume.array)


@pytest.fixture(scope="module")
def support(tmp_path_factory: pytest.TempPathFactory) -> list[SupportScan]:
    """Two phantoms with two variations of each."""
    return load(tmp_path_factory.mktemp("variations"), variations=2)


def load(root: Path, *, variations: int | None, seed: int = 0, cases: Sequence[int] = (1, 2)) -> list[SupportScan]:
    bundle = write_tiny_encoder(root / f"{variations}-{len(cases)}.encoder")
    pairs = [write_case(root, f"case_{number}", number) for number in cases]
    annotated = [(image, read_label_map(labels)) for image, labels in pairs]
    with open_session(bundle, "cpu", "torch") as session:
        store = FeatureStore(root / "cache")
        return load_support(
            annotated, ORGANS, bundle=bundle, session=session, store=store, variations=variations, seed=seed
        )


def test_each_scan_has_variations_with_annotations(support: list[SupportScan]) -> None:
    assert [len(one.variations) for one in support] == [2, 2]
    assert len(with_variations(support)) == 6
    for one in support:
        for variation in one.variations:
            assert variation.features.meta.grid_shape == variation.shape
            assert variation.annotated.tolist() == one.annotated.tolist() == [True, True]
            assert all(len(variation.occupancy.positions(organ)) for organ in range(2))


def test_variations_are_used_in_training(support: list[SupportScan]) -> None:
    training = TrainingSettings(epochs=1, block=16, batch=2, blocks_per_epoch=2)
    settings = AdapterSettings(method="spatial", width=4)
    rows = [None, None]
    with_them = train_adapter(settings, support, head_rows=rows, training=training)
    without = train_adapter(
        settings, [SupportScan(**{**vars(one), "variations": ()}) for one in support], head_rows=rows, training=training
    )
    assert with_them.steps == 3 * without.steps
    assert not (with_them.adapter.direct.weight == without.adapter.direct.weight).all()


def test_a_left_out_scan_is_left_out_with_its_variations(
    support: list[SupportScan], monkeypatch: pytest.MonkeyPatch
) -> None:
    trained_on: list[list[Occupancy]] = []

    def recorded(settings: object, scans: list[SupportScan], **more: object) -> object:
        trained_on.append([scan.occupancy for scan in with_variations(scans)])
        return train_adapter(settings, scans, **more)  # type: ignore[arg-type]  # passed on unchanged

    monkeypatch.setattr("fseft_edge.adaptation.cross_validation.train_adapter", recorded)
    training = TrainingSettings(epochs=1, block=16, batch=1, blocks_per_epoch=1)
    cross_validate(Candidate("", AdapterSettings(method="spatial", width=4), training), support, [None, None])
    first, second = ([scan.occupancy for scan in with_variations([one])] for one in support)
    assert trained_on == [second, first]


def test_only_a_single_scan_with_few_windows_has_variations_by_default() -> None:
    assert default_variations(1, 1) == default_variations(1, 16) == 8
    assert default_variations(2, 1) == default_variations(1, 17) == 0


def test_the_number_of_variations_is_the_given_number_or_the_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fseft_edge.adaptation.augmentation._DEFAULT_VARIATIONS", 2)  # each one must be encoded
    assert [len(one.variations) for one in load(tmp_path, variations=1)] == [1, 1]
    assert [len(one.variations) for one in load(tmp_path, variations=None, cases=(1,))] == [2]
    assert [len(one.variations) for one in load(tmp_path, variations=None)] == [0, 0]
