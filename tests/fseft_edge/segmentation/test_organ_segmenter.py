"""The calls in Python with images in memory, and the estimator."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from doubles.encoder import label_of, scan, write_case, write_tiny_encoder
from doubles.errors import refused
from sklearn.base import clone

import fseft_edge
from fseft_edge.adaptation.training import TrainingSettings
from fseft_edge.adapters.network import AdapterSettings
from fseft_edge.masks.mask_image import Mask
from fseft_edge.runtime.encoder.bundle import EncoderBundle
from fseft_edge.runtime.errors import AdapterError, LabelError, UsageError
from fseft_edge.runtime.scans.nifti import read_ct, read_label_map
from fseft_edge.segmentation.organ_segmenter import OrganSegmenter

ORGANS = {"liver": label_of("liver"), "spleen": label_of("spleen")}
QUICK = {"settings": AdapterSettings(method="linear"), "training": TrainingSettings(epochs=2), "device": "cpu"}


@dataclass(frozen=True)
class Site:
    root: Path
    bundle: EncoderBundle

    def image(self, number: int) -> Path:
        return self.root / "images" / f"case_{number}.nii.gz"

    def labels(self, number: int) -> Path:
        return self.root / "labels" / f"case_{number}.nii.gz"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Site:
    root = tmp_path_factory.mktemp("site")
    for seed in (1, 2, 3):
        write_case(root, f"case_{seed}", seed)
    return Site(root, write_tiny_encoder(root / "tiny.encoder"))


@pytest.fixture(scope="module")
def fitted(site: Site) -> OrganSegmenter:
    model = OrganSegmenter(ORGANS, site.bundle.path, **QUICK, validate=False, backend="torch")
    return model.fit([site.image(1), str(site.image(2))], [nib.load(site.labels(1)), site.labels(2)])


def voxels(mask: nib.Nifti1Image) -> np.ndarray:
    return np.asarray(mask.dataobj)


def test_a_mask_in_memory_is_the_mask_in_the_file(site: Site, fitted: OrganSegmenter, tmp_path: Path) -> None:
    fitted.save(tmp_path / "two.adapter")
    options = {"encoder": site.bundle.path, "device": "cpu", "backend": "torch"}
    given = [site.image(3), str(site.image(3)), nib.load(site.image(3)), read_ct(site.image(3))]
    (case,) = fseft_edge.segment(given[0], tmp_path / "two.adapter", tmp_path / "masks", **options)
    on_disk = nib.load(case.mask)
    for one in given:
        mask = fseft_edge.segment(one, str(tmp_path / "two.adapter"), **options)
        assert isinstance(mask, Mask)
        assert mask.header.binaryblock == on_disk.header.binaryblock
        assert (voxels(mask) == voxels(on_disk)).all()
        assert mask.organs == case.organs
    nib.save(mask, tmp_path / "saved.nii.gz")
    assert (read_label_map(tmp_path / "saved.nii.gz").array == read_label_map(case.mask).array).all()
    assert {organ.name: organ.label for organ in mask.organs} == ORGANS


def test_a_list_of_scans_gives_a_list_of_masks(site: Site, fitted: OrganSegmenter) -> None:
    masks = fseft_edge.segment([site.image(2), nib.load(site.image(3))], fitted.adapter_, encoder=site.bundle.path)
    assert [mask.shape for mask in masks] == [nib.load(site.image(number)).shape for number in (2, 3)]


def test_images_in_memory_are_written_with_a_name(site: Site, fitted: OrganSegmenter, tmp_path: Path) -> None:
    images = [nib.load(site.image(number)) for number in (2, 3)]
    cases = fseft_edge.segment(images, [fitted.adapter_], tmp_path, encoder=site.bundle.path)
    assert [case.mask.name for case in cases] == ["scan_1.nii.gz", "scan_2.nii.gz"]


def test_options_that_write_files_need_an_output_folder(site: Site, fitted: OrganSegmenter) -> None:
    for option in ({"preview": True}, {"split": True}, {"skip_existing": True}, {"save_probabilities": True}):
        with refused(UsageError, *option):
            fseft_edge.segment(site.image(3), fitted.adapter_, encoder=site.bundle.path, **option)


def test_what_is_not_a_scan_is_refused(site: Site, fitted: OrganSegmenter) -> None:
    with refused(UsageError, "ndarray"):
        fitted.predict(np.zeros((4, 4, 4)))
    with refused(UsageError, site.root / "images", "3"):
        fitted.predict(site.root / "images")


def test_a_series_is_chosen_from_one_scan(site: Site, fitted: OrganSegmenter) -> None:
    with refused(UsageError, "2 scans"):
        fseft_edge.segment([site.image(1), site.image(2)], fitted.adapter_, encoder=site.bundle.path, series="1")


def test_organs_of_an_encoder_are_names(site: Site) -> None:
    options = {"encoder": site.bundle.path, "device": "cpu", "backend": "torch"}
    mask = fseft_edge.segment(site.image(3), organs="liver", **options)
    assert [organ.name for organ in mask.organs] == ["liver"]
    with refused(UsageError, "label values"):
        fseft_edge.segment(site.image(3), organs={"liver": 7}, **options)
    with refused(UsageError):
        fseft_edge.segment([], **options)


@pytest.mark.parametrize(("setting", "value"), [("epochs", 0), ("epochs", -1), ("epochs", "2"), ("variations", -1)])
def test_settings_of_the_training_are_checked_when_they_are_made(setting: str, value: object) -> None:
    with refused(UsageError, setting, repr(value)):
        TrainingSettings(**{setting: value})


def test_organs_without_label_values_need_names_in_the_annotations(site: Site) -> None:
    with refused(LabelError, "names", "liver"):
        fseft_edge.adapt(site.bundle.path, [site.image(1)], [site.labels(1)], ["liver"])


def test_probabilities_agree_with_the_mask(site: Site, fitted: OrganSegmenter) -> None:
    ct = nib.load(site.image(3))
    probabilities = fitted.predict_proba(ct)
    assert (probabilities.shape, probabilities.dtype) == ((2, *ct.shape), np.float32)
    mask = voxels(fitted.predict(ct))
    best = np.array(list(ORGANS.values()))[probabilities.argmax(0)]
    assert (mask == np.where(probabilities.max(0) > 0.5, best, 0)).all()
    assert len(fitted.predict_proba([ct])) == 1


def test_a_saved_adapter_is_loaded(site: Site, fitted: OrganSegmenter, tmp_path: Path) -> None:
    fitted.save(tmp_path / "saved.adapter")
    with fseft_edge.load(tmp_path / "saved.adapter", site.bundle.path, device="cpu", backend="torch") as loaded:
        assert loaded.organs == ORGANS
        assert (voxels(loaded.predict(site.image(3))) == voxels(fitted.predict(site.image(3)))).all()
    with refused(AdapterError, tmp_path / "saved.adapter"):
        fseft_edge.load(tmp_path / "saved.adapter", write_tiny_encoder(tmp_path / "other.encoder", seed=1).path)


def test_the_score_is_the_mean_dsc(site: Site, fitted: OrganSegmenter) -> None:
    masks = fitted.predict([site.image(3)])
    evaluation = fseft_edge.evaluate(masks, [nib.load(site.labels(3))], ORGANS)
    assert fitted.score([site.image(3)], [site.labels(3)]) == evaluation.mean_dsc()
    with refused(LabelError, "liver"):
        fseft_edge.evaluate(masks, [nib.load(site.labels(3))], {"liver": 77})


def test_an_evaluation_is_a_table_of_pandas(site: Site) -> None:
    pd = pytest.importorskip("pandas", reason="pandas is not installed")
    references = [site.labels(number) for number in (1, 2)]
    table = fseft_edge.evaluate(references, references, ORGANS).to_dataframe()
    assert isinstance(table, pd.DataFrame)
    assert table[["case", "organ"]].to_numpy().tolist() == [
        [f"case_{number}", organ] for number in (1, 2) for organ in ORGANS
    ]
    assert (table["dsc"] == 1).all()


def test_the_estimator_has_the_parameters_of_its_constructor(fitted: OrganSegmenter) -> None:
    copy = clone(fitted)
    assert copy.get_params() == fitted.get_params()
    assert not hasattr(copy, "adapter_")
    with refused(UsageError):
        copy.predict("ct.nii.gz")
    assert copy.set_params(validate=True).validate
    with refused(UsageError, "colour"):
        copy.set_params(colour="red")


def test_adapt_takes_lists_images_in_memory_and_a_dictionary(site: Site, tmp_path: Path) -> None:
    """The adapter has the same weights as an adapter of the same scans in folders."""
    options = {"settings": QUICK["settings"], "training": QUICK["training"], "device": "cpu", "backend": "torch"}
    images = [nib.load(site.image(number)) for number in (1, 2, 3)]
    labels = [read_label_map(site.labels(number)) for number in (1, 2, 3)]
    in_memory = fseft_edge.adapt(str(site.bundle.path), images, labels, ORGANS, groups=["a", "b", "a"], **options)
    organs = [fseft_edge.OrganLabel(name, label) for name, label in ORGANS.items()]
    patients = {"case_1": "a", "case_2": "b", "case_3": "a"}
    on_disk = fseft_edge.adapt(
        site.bundle.path,
        site.root / "images",
        site.root / "labels",
        organs,
        tmp_path / "a.adapter",
        groups=patients,
        **options,
    )
    assert in_memory.description == on_disk.description
    for name, weights in in_memory.adapter.state_dict().items():
        assert weights.equal(on_disk.adapter.state_dict()[name])


@pytest.mark.parametrize("groups", [["a", "b"], "ab"])
def test_groups_that_do_not_match_the_scans_are_refused(site: Site, groups: list[str] | str) -> None:
    scans, labels = ([of(number) for number in (1, 2, 3)] for of in (site.image, site.labels))
    with refused(UsageError):
        fseft_edge.adapt(site.bundle.path, scans, labels, ORGANS, groups=groups)


def test_lists_of_different_length_are_refused(site: Site) -> None:
    with refused(UsageError, "2", "1"):
        fseft_edge.adapt(site.bundle.path, [site.image(1), site.image(2)], [site.labels(1)], ORGANS)
    with refused(UsageError, "2", "1"):
        fseft_edge.evaluate([site.labels(1), site.labels(2)], [site.labels(1)], ORGANS)
    with refused(UsageError):
        fseft_edge.evaluate([site.labels(1)], site.labels(1), ORGANS)
    with refused(UsageError):
        fseft_edge.adapt(site.bundle.path, [site.image(1)], site.labels(1), ORGANS)


def test_scans_of_the_same_name_are_different_cases(site: Site, tmp_path: Path) -> None:
    paths = []
    for number in (1, 2):
        (tmp_path / f"patient_{number}").mkdir()
        paths.append(tmp_path / f"patient_{number}" / "ct.nii.gz")
        paths[-1].symlink_to(site.image(number))
    labels = [site.labels(number) for number in (1, 2)]
    model = OrganSegmenter(ORGANS, site.bundle.path, **QUICK, validate=False)
    assert model.fit(paths, labels).adapter_.description.shots == 2


def test_the_feature_map_of_a_scan_is_an_array_with_a_place(site: Site) -> None:
    encoded = fseft_edge.encode(nib.load(site.image(1)), site.bundle.path, device="cpu", backend="torch")
    ct = read_ct(site.image(1))
    centre = ct.affine @ [*((length - 1) / 2 for length in ct.shape), 1]
    for number, level in enumerate(encoded.levels):
        features = encoded.array(number)
        assert features.shape[0] == level.channels
        assert features.shape[1:] == tuple(-(-length // level.stride) for length in encoded.grid.shape)
        index = np.linalg.solve(encoded.affine(number), centre)[:3]
        assert np.allclose(index, (np.array(encoded.grid.shape) - level.stride) / (2 * level.stride))
    whole = fseft_edge.encode(scan(1).volume, site.bundle.path, device="cpu", backend="torch")
    assert (whole.array(0) == encoded.array(0)).all()
