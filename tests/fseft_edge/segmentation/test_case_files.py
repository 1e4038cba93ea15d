"""The files of a case: they appear together, describe one another, and are recognised by a later run."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813 - its customary name
from doubles.encoder import SPACING, scan, write_random_adapter, write_tiny_encoder
from doubles.errors import refused

from fseft_edge.adapters.file import read_adapter, write_adapter
from fseft_edge.adapters.network import AdapterSettings
from fseft_edge.masks.prediction import predict_sections
from fseft_edge.masks.probabilities import file_stems
from fseft_edge.masks.result import SegmentedCase, organ_labels
from fseft_edge.phantom import phantom
from fseft_edge.runtime.encoder.bundle import EncoderBundle
from fseft_edge.runtime.encoder.encoding import encode_scan
from fseft_edge.runtime.encoder.feature_store import FeatureStore
from fseft_edge.runtime.encoder.session import open_session
from fseft_edge.runtime.errors import InputError, LabelError, OutOfSpaceError, SomeCasesFailedError
from fseft_edge.runtime.scans.nifti import read_ct, read_label_map, read_label_names, write_ct
from fseft_edge.runtime.scans.volume import Volume
from fseft_edge.segmentation.segment import segment

SOFTMAX = AdapterSettings(method="linear", levels="all", activation="softmax")


@dataclass(frozen=True)
class Site:
    """An encoder, an adapter of two organs, and a small scan; all tests share the cache."""

    root: Path
    bundle: EncoderBundle

    @property
    def image(self) -> Path:
        return self.root / "images" / "ct.nii.gz"

    @property
    def adapter(self) -> Path:
        return self.root / "a.adapter"

    def segment(
        self, output: Path, scans: Sequence[Path] = (), adapters: Sequence[Path] = (), **more: Any
    ) -> list[SegmentedCase]:
        more = {"encoder": self.bundle.path, "cache": self.root / "cache", "device": "cpu", "backend": "torch", **more}
        return segment(scans or [self.image], adapters or [self.adapter], output, **more)

    def labelled(self, path: Path, **labels: int) -> Path:
        """Write an adapter whose organs have these label values in its annotations."""
        file = write_random_adapter(path, self.bundle, tuple(labels), seed=len(labels))
        organs = [organ.model_copy(update={"label": labels[organ.name]}) for organ in file.description.organs]
        changed = {"organs": tuple(organs), "shots": 1}
        write_adapter(path, replace(file, description=file.description.model_copy(update=changed)))
        return path


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Site:
    root = tmp_path_factory.mktemp("site")
    site = Site(root, write_tiny_encoder(root / "tiny.encoder"))
    volume = scan(1).volume
    write_ct(site.image, Volume(np.asarray(volume.array)[12:52, 8:40, 16:44], volume.affine))
    write_random_adapter(site.adapter, site.bundle, ("liver", "spleen"))
    return site


def description(folder: Path, case: str = "ct") -> dict[str, Any]:
    fields: dict[str, Any] = json.loads((folder / f"{case}.json").read_text(encoding="utf-8"))
    return fields


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_description_has_the_checksum_of_every_file_and_the_mask_has_the_names(site: Site, tmp_path: Path) -> None:
    site.segment(tmp_path, preview=True, split=True, save_probabilities=True)
    fields = description(tmp_path)
    files = {name: hashlib.sha256(data).hexdigest() for name, data in content(tmp_path).items()}
    assert files.pop("ct.nii.gz") == fields["mask_sha256"]
    del files["ct.json"]
    assert fields["files"] == files
    organs = [f"ct/{organ}{kind}.nii.gz" for organ in ("liver", "spleen") for kind in ("", ".probability")]
    assert sorted(files) == sorted(["ct.png", *organs])
    assert fields["source_sha256"] == sha256(site.image)
    assert read_label_names(tmp_path / "ct.nii.gz") == {1: "liver", 2: "spleen"}
    assert organ_labels(tmp_path / "ct.json", tmp_path / "ct.nii.gz") == {"liver": 1, "spleen": 2}


def failing(error: BaseException) -> Callable[..., None]:
    def fails(*_: object, **__: object) -> None:
        raise error

    return fails


def test_a_full_disk_leaves_the_earlier_result_whole(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    site.segment(out, preview=True)
    before = content(out)
    full = OutOfSpaceError("The disk is full.", remedy="Free disk space.")
    monkeypatch.setattr("fseft_edge.segmentation.segmenter.three_plane_picture", failing(full))
    swapped = site.labelled(tmp_path / "b.adapter", spleen=1, liver=2)
    with refused(OutOfSpaceError):
        site.segment(out, adapters=[swapped], preview=True)
    assert content(out) == before


def test_a_picture_that_fails_does_not_cost_the_mask(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    out = tmp_path / "out"
    (complete,) = site.segment(out, preview=True)
    monkeypatch.setattr("fseft_edge.segmentation.segmenter.three_plane_picture", failing(ValueError("Secretname")))
    with refused(SomeCasesFailedError, "ct (preview)") as caught:
        site.segment(out, preview=True, fill_holes=True)
    (case,) = caught.value.completed
    assert isinstance(case, SegmentedCase)
    assert case.not_written == ("preview",)
    assert sorted(content(out)) == ["ct.json", "ct.nii.gz"]  # the picture of the other mask is gone
    assert any("ValueError" in warning and "test_case_files.py" in warning for warning in description(out)["warnings"])
    assert "Secretname" not in caplog.text + str(caught.value) + (out / "ct.json").read_text()
    monkeypatch.undo()
    (again,) = site.segment(out, preview=True, fill_holes=True, skip_existing=True)
    assert not again.existing
    assert (out / "ct.png").exists()
    assert complete.not_written == ()


@pytest.mark.parametrize("renamed", [0, 1, 2])
def test_a_crash_between_two_renames_never_leaves_a_description_of_another_mask(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, renamed: int
) -> None:
    out = tmp_path / "out"
    site.segment(out, preview=True)
    done: list[str] = []
    rename = Path.replace

    def crashing(path: Path, target: Path) -> Path:
        if target.parent == out:
            if len(done) == renamed:
                raise KeyboardInterrupt
            done.append(target.name)
        return rename(path, target)

    monkeypatch.setattr(Path, "replace", crashing)
    swapped = site.labelled(tmp_path / "b.adapter", spleen=1, liver=2)
    with pytest.raises(KeyboardInterrupt):
        site.segment(out, adapters=[swapped], preview=True)
    assert len(done) == renamed
    if not renamed:
        assert organ_labels(out / "ct.json", out / "ct.nii.gz") == {"liver": 1, "spleen": 2}
        return
    with refused(LabelError, out / "ct.json", out / "ct.nii.gz"):
        organ_labels(out / "ct.json", out / "ct.nii.gz")
    assert organ_labels(out / "ct.json") == {"spleen": 1, "liver": 2}  # for a mask that a person corrected


def test_a_description_without_checksum_is_trusted_as_before(site: Site, tmp_path: Path) -> None:
    site.segment(tmp_path)
    fields = description(tmp_path)
    del fields["mask_sha256"]
    (tmp_path / "ct.json").write_text(json.dumps(fields))
    assert organ_labels(tmp_path / "ct.json", tmp_path / "ct.nii.gz") == {"liver": 1, "spleen": 2}


@pytest.mark.parametrize("listed", [True, False], ids=["this version", "an earlier version"])
def test_files_of_another_mask_are_removed_and_files_of_others_are_kept(
    site: Site, tmp_path: Path, listed: bool
) -> None:
    site.segment(tmp_path, preview=True, split=True)
    (tmp_path / "ct" / "notes.txt").write_text("of the user")
    (tmp_path / "ct2.png").write_text("of another case")
    if not listed:
        fields = {"organs": description(tmp_path)["organs"]}
        (tmp_path / "ct.json").write_text(json.dumps(fields))
    site.segment(tmp_path)
    kept = ["ct.json", "ct.nii.gz", "ct/notes.txt", "ct2.png"]
    assert sorted(content(tmp_path)) == sorted(kept if listed else [*kept, "ct/liver.nii.gz", "ct/spleen.nii.gz"])


def test_a_picture_without_a_description_is_not_deleted(site: Site, tmp_path: Path) -> None:
    (tmp_path / "ct.png").write_text("of the user")
    site.segment(tmp_path)
    assert (tmp_path / "ct.png").read_text() == "of the user"


def _other_voxel(path: Path) -> None:
    volume = read_ct(path)
    array = np.array(volume.array)
    array[3, 3, 3] += 1
    write_ct(path, Volume(array, volume.affine))


CHANGES: dict[str, Callable[[Path, Path], object]] = {
    "the scan": lambda image, _: _other_voxel(image),
    "no mask": lambda _, out: (out / "ct.nii.gz").unlink(),
    "no picture": lambda _, out: (out / "ct.png").unlink(),
    "another picture": lambda _, out: (out / "ct.png").write_bytes(b"changed"),
    "an old description": lambda _, out: (out / "ct.json").write_text('{"organs": []}'),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_result_that_is_not_complete_is_made_again(site: Site, tmp_path: Path, change: str) -> None:
    image, out = tmp_path / "ct.nii.gz", tmp_path / "out"
    shutil.copy(site.image, image)
    (first,) = site.segment(out, [image], preview=True, skip_existing=True)
    before = content(out)
    CHANGES[change](image, out)
    (second,) = site.segment(out, [image], preview=True, skip_existing=True)
    assert not first.existing
    assert not second.existing
    assert organ_labels(out / "ct.json", out / "ct.nii.gz") == {"liver": 1, "spleen": 2}
    assert description(out)["source_sha256"] == sha256(image)
    assert change == "the scan" or content(out) == before


@pytest.mark.parametrize("skip_existing", [False, True])
@pytest.mark.parametrize("changed", ["mask", "description"])
def test_a_mask_that_somebody_changed_is_not_replaced(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changed: str, skip_existing: bool
) -> None:
    out = tmp_path / "out"
    site.segment(out)
    (out / {"mask": "ct.nii.gz", "description": "ct.json"}[changed]).write_bytes(b"corrected")
    before = content(out)
    monkeypatch.setattr("fseft_edge.segmentation.segmenter.encode_scan", failing(AssertionError("encoded")))
    with refused(InputError, out / "ct.nii.gz"):
        site.segment(out, skip_existing=skip_existing)
    assert content(out) == before


def test_a_mask_of_another_program_is_not_replaced(site: Site, tmp_path: Path) -> None:
    (tmp_path / "ct.nii.gz").write_bytes(b"contours of a person")
    with refused(InputError, tmp_path / "ct.nii.gz"):
        site.segment(tmp_path)
    assert (tmp_path / "ct.nii.gz").read_bytes() == b"contours of a person"


def test_a_complete_result_is_kept_and_returned(site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image, out = tmp_path / "in" / "ct.nii.gz", tmp_path / "out"
    image.parent.mkdir()
    shutil.copy(site.image, image)
    (first,) = site.segment(out, [image], preview=True, split=True)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    monkeypatch.setattr("fseft_edge.segmentation.segmenter.encode_scan", failing(AssertionError("encoded again")))
    for wanted in ({}, {"preview": True}, {"split": True, "preview": True}):
        (again,) = site.segment(out, [image], skip_existing=True, **wanted)
        assert again == replace(first, existing=True)
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before
    image.touch()
    (again,) = site.segment(out, [image], skip_existing=True)  # the content decides, not the time
    assert again.existing


@pytest.mark.parametrize("other", ["adapter", "fill_holes", "largest_component", "save_probabilities"])
def test_a_result_of_other_adapters_or_options_is_made_again(site: Site, tmp_path: Path, other: str) -> None:
    site.segment(tmp_path / "out")
    options: dict[str, Any] = {other: True}
    if other == "adapter":
        options = {"adapters": [site.labelled(tmp_path / "b.adapter", liver=4)]}
    (case,) = site.segment(tmp_path / "out", skip_existing=True, **options)
    assert not case.existing


def test_only_an_adapter_that_a_checksum_identifies_is_recognised(site: Site, tmp_path: Path) -> None:
    """A zero-shot mask is determined by the encoder; an adapter in memory has no checksum."""
    file = replace(read_adapter(site.adapter), sha256=None)
    trained = replace(file, description=file.description.model_copy(update={"shots": 3}))
    for adapters, existing in (([], True), ([trained], False)):
        segment([site.image], adapters, tmp_path, encoder=site.bundle.path, device="cpu", backend="torch")
        (case,) = segment(
            [site.image],
            adapters,
            tmp_path,
            encoder=site.bundle.path,
            device="cpu",
            backend="torch",
            skip_existing=True,
        )
        assert case.existing == existing


def test_existing_and_new_cases_are_returned_in_the_order_of_the_scans(site: Site, tmp_path: Path) -> None:
    scans = [tmp_path / "in" / f"{name}.nii.gz" for name in "abc"]
    for path in scans:
        path.parent.mkdir(exist_ok=True)
        shutil.copy(site.image, path)
    site.segment(tmp_path / "out", scans[1:2])
    cases = site.segment(tmp_path / "out", scans, skip_existing=True)
    assert [(case.case, case.existing) for case in cases] == [("a", False), ("b", True), ("c", False)]


LAYOUTS = {"LPS": ("L", "P", "S"), "SRA": ("S", "R", "A"), "IPR": ("I", "P", "R")}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("settings", [AdapterSettings("linear", "finest"), SOFTMAX], ids=["sigmoid", "softmax"])
def test_probabilities_lie_on_the_scan_and_are_those_that_decide(
    site: Site, tmp_path: Path, layout: str, settings: AdapterSettings
) -> None:
    whole = phantom(2, shape=(40, 36, 34), spacing=SPACING).volume
    turned = nib.Nifti1Image(np.asarray(whole.array), whole.affine).as_reoriented(
        nib.orientations.ornt_transform(
            nib.orientations.io_orientation(whole.affine), nib.orientations.axcodes2ornt(LAYOUTS[layout])
        )
    )
    write_ct(tmp_path / "ct.nii.gz", Volume(np.asarray(turned.dataobj), turned.affine))
    volume = read_ct(tmp_path / "ct.nii.gz")
    write_random_adapter(tmp_path / "b.adapter", site.bundle, ("liver", "spleen"), seed=4, settings=settings)
    out = tmp_path / "out"
    site.segment(out, [tmp_path / "ct.nii.gz"], [tmp_path / "b.adapter"], save_probabilities=True)
    plain = tmp_path / "plain"
    site.segment(plain, [tmp_path / "ct.nii.gz"], [tmp_path / "b.adapter"])
    assert (out / "ct.nii.gz").read_bytes() == (plain / "ct.nii.gz").read_bytes()

    adapter = read_adapter(tmp_path / "b.adapter").adapter
    with open_session(site.bundle, device="cpu", backend="torch") as session:
        encoded = encode_scan(volume, bundle=site.bundle, session=session, store=FeatureStore(site.root / "cache"))
    expected = np.full((adapter.classes, *volume.shape), np.nan, np.float32)
    for piece in encoded.grid.to_source(predict_sections(encoded, [adapter])):
        where: list[Any] = [slice(None)] * 4
        where[1 + piece.axis] = slice(piece.start, piece.stop)
        expected[tuple(where)] = piece.probabilities
    found = []
    for channel, organ in enumerate(("liver", "spleen"), start=adapter.backgrounds):
        path = out / "ct" / f"{organ}.probability.nii.gz"
        image = sitk.ReadImage(path)
        values = sitk.GetArrayFromImage(image).transpose(2, 1, 0)
        np.testing.assert_allclose(values, expected[channel], atol=0.51 / 65535)
        assert 0 <= values.min() < values.max() <= 1
        scan_image = sitk.ReadImage(tmp_path / "ct.nii.gz")
        for corner in ((0, 0, 0), tuple(length - 1 for length in volume.shape)):
            np.testing.assert_allclose(
                image.TransformIndexToPhysicalPoint(corner), scan_image.TransformIndexToPhysicalPoint(corner), atol=1e-4
            )
        stored = nib.load(path)
        assert stored.get_data_dtype() == np.uint16
        np.testing.assert_allclose(np.asanyarray(stored.dataobj), values, atol=1e-6)  # ITK computes in float32
        found.append(values)
    background = expected[0] if adapter.backgrounds else np.full(volume.shape, 0.5)
    decided = np.where(np.max(found, axis=0) > background, np.argmax(found, axis=0) + 1, 0)
    assert np.mean(decided == read_label_map(out / "ct.nii.gz").array) > 0.999  # but for rounding to 1/65535


def test_separate_masks_are_those_of_the_whole_mask(site: Site, tmp_path: Path) -> None:
    adapter = site.labelled(tmp_path / "b.adapter", liver=6, spleen=300)
    site.segment(tmp_path / "out", adapters=[adapter], split=True)
    whole = sitk.GetArrayFromImage(sitk.ReadImage(tmp_path / "out" / "ct.nii.gz"))
    for organ, label in (("liver", 6), ("spleen", 300)):
        path = tmp_path / "out" / "ct" / f"{organ}.nii.gz"
        part = sitk.ReadImage(path)
        assert part.GetPixelID() == sitk.sitkUInt8
        np.testing.assert_array_equal(sitk.GetArrayFromImage(part), whole == label)
        assert (whole == label).sum() > 100
        assert read_label_names(path) == {1: organ}


@pytest.mark.parametrize(("labels", "dtype"), [((6, 2), np.uint8), ((300, 2), np.uint16), ((1, 65535), np.uint16)])
def test_organs_keep_the_label_values_of_their_annotations(
    site: Site, tmp_path: Path, labels: tuple[int, int], dtype: type[np.generic]
) -> None:
    adapter = site.labelled(tmp_path / "b.adapter", liver=labels[0], spleen=labels[1])
    numbered = site.labelled(tmp_path / "c.adapter", liver=1, spleen=2)
    (case,) = site.segment(tmp_path / "out", adapters=[adapter], preview=True)
    (plain,) = site.segment(tmp_path / "plain", adapters=[numbered])
    mask, positions = read_label_map(case.mask).array, read_label_map(plain.mask).array
    np.testing.assert_array_equal(mask, np.array([0, *labels])[positions])
    assert set(np.unique(positions)) == {0, 1, 2}
    assert nib.load(case.mask).get_data_dtype() == dtype
    assert [(organ.name, organ.label) for organ in case.organs] == [("liver", labels[0]), ("spleen", labels[1])]
    assert [replace(organ, label=0) for organ in case.organs] == [replace(organ, label=0) for organ in plain.organs]
    assert read_label_names(case.mask) == {labels[0]: "liver", labels[1]: "spleen"}
    assert case.warnings == ()


def test_adapters_whose_label_values_collide_are_numbered_with_a_warning(
    site: Site, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = site.labelled(tmp_path / "b.adapter", liver=6, spleen=2)
    second = site.labelled(tmp_path / "c.adapter", aorta=2)
    with caplog.at_level(logging.WARNING):
        (case,) = site.segment(tmp_path / "out", adapters=[first, second])
    assert [(organ.name, organ.label) for organ in case.organs] == [("liver", 1), ("spleen", 2), ("aorta", 3)]
    assert "label value 2 " in caplog.text
    assert "1 to 3" in caplog.text
    assert description(tmp_path / "out")["label_values"] == "new"
    third = site.labelled(tmp_path / "d.adapter", aorta=9)
    (case,) = site.segment(tmp_path / "out", adapters=[first, third])
    assert [organ.label for organ in case.organs] == [6, 2, 9]
    assert description(tmp_path / "out")["label_values"] == "of the annotations"


def test_a_name_that_is_too_long_for_a_result_ends_only_its_case_before_the_work(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    allowed, longer = "P." + "x" * 246, "z" * 249  # with .nii.gz, 255 and 256 bytes
    for name in (allowed, "m"):
        (tmp_path / "in").mkdir(exist_ok=True)
        shutil.copy(site.image, tmp_path / "in" / f"{name}.nii.gz")
    volume = read_ct(site.image)
    write_ct(tmp_path / "in" / f"{longer}.nii", volume)
    with caplog.at_level(logging.ERROR), refused(SomeCasesFailedError, longer) as caught:
        site.segment(tmp_path / "out", [tmp_path / "in"])
    assert "256 bytes" in caplog.text
    assert [case.case for case in caught.value.completed] == [allowed, "m"]  # type: ignore[attr-defined]  # cases
    assert sorted(content(tmp_path / "out")) == sorted(
        f"{name}{end}" for name in (allowed, "m") for end in (".json", ".nii.gz")
    )
    monkeypatch.setattr("fseft_edge.segmentation.segmenter.encode_scan", failing(AssertionError("encoded")))
    with refused(InputError, "256 bytes"):
        site.segment(tmp_path / "out", [tmp_path / "in" / f"{longer}.nii"])


def test_a_name_with_control_characters_is_written_as_it_is_and_never_logged(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    names = ["a\nb\x1b[31m", "-dash", "dots..", "M\udcfcller"]
    for name in names:
        (tmp_path / "in").mkdir(exist_ok=True)
        shutil.copy(site.image, tmp_path / "in" / f"{name}.nii.gz")
    monkeypatch.setattr("fseft_edge.segmentation.segmenter.three_plane_picture", failing(ValueError("x")))
    with caplog.at_level(logging.WARNING), refused(SomeCasesFailedError) as caught:
        site.segment(tmp_path / "out", [tmp_path / "in"], preview=True)
    written = {f"{name}{suffix}" for name in names for suffix in (".json", ".nii.gz")}
    assert {path.name for path in (tmp_path / "out").iterdir()} == written
    for text in (*(record.getMessage() for record in caplog.records), caught.value.message):
        assert text.isprintable()


@pytest.mark.parametrize("memory_gb", [None, 64.0], ids=["overlapped", "one after another"])
def test_an_unexpected_error_ends_only_its_case(
    site: Site,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    memory_gb: float | None,
) -> None:
    scans = [tmp_path / "in" / f"{name}.nii.gz" for name in "abc"]
    for path in scans:
        path.parent.mkdir(exist_ok=True)
        shutil.copy(site.image, path)

    def encode(volume: Volume, **more: Any) -> object:
        if volume.source == scans[1]:
            raise ValueError("Secretname")
        return encode_scan(volume, **more)

    monkeypatch.setattr("fseft_edge.segmentation.segmenter.encode_scan", encode)
    with caplog.at_level(logging.ERROR), refused(SomeCasesFailedError, "1 of 3", "b") as caught:
        site.segment(tmp_path / "out", scans, memory_gb=memory_gb)
    assert len(caught.value.completed) == 2
    assert "ValueError in test_case_files.py" in caplog.text
    assert "bug" in caplog.text
    assert "Secretname" not in caplog.text
    with pytest.raises(ValueError, match="Secretname"):  # the only case: as it is, for the report of the bug
        site.segment(tmp_path / "out", [scans[1]])


@pytest.mark.parametrize("memory_gb", [None, 64.0], ids=["overlapped", "one after another"])
def test_an_interrupt_ends_all_cases(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, memory_gb: float | None
) -> None:
    monkeypatch.setattr("fseft_edge.segmentation.segmenter.encode_scan", failing(KeyboardInterrupt()))
    shutil.copy(site.image, tmp_path / "b.nii.gz")
    with pytest.raises(KeyboardInterrupt):
        site.segment(tmp_path / "out", [site.image, tmp_path / "b.nii.gz"], memory_gb=memory_gb)
    assert not (tmp_path / "out").exists()


def test_file_names_of_organs_are_plain_and_different() -> None:
    stems = file_stems(["liver", "Liver", "../x", "ä b", "liver_2"])
    assert len({stem.casefold() for stem in stems.values()}) == 5
    assert stems["liver"] == "liver"
    assert all(stem.replace("_", "").replace("-", "").isalnum() and stem.isascii() for stem in stems.values())
