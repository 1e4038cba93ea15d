"""The inbox: which files are scans, when a scan is complete, and keys that depend on the content only."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
from doubles.errors import refused
from hypothesis import given
from hypothesis import strategies as st

from fseft_edge.batch.inbox import Inbox, arrivals, signature_of
from fseft_edge.outbox.content_key import content_key
from fseft_edge.runtime.errors import UnreadableFileError


@dataclass
class Clock:
    now: float = 0.0

    def __call__(self) -> float:
        return self.now


def put(path: Path, content: bytes = b"x") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def test_nifti_files_archives_and_folders_of_other_files_are_scans(tmp_path: Path) -> None:
    for name in (
        "a.nii.gz",
        "b.nii",
        "c.zip",
        "d.nrrd",
        "e.mha",
        "f.nhdr",
        "g.seg.nrrd",
        "ward/d.nii.gz",
        "ward/2/e.NII.GZ",
        "dicom/study/series/1",
        "dicom/study/series/2",
        "readme.txt",
        ".hidden.nii.gz",
        "uploading/.part.nii.gz",
        ".sync/f.nii.gz",
    ):
        put(tmp_path / name)
    (tmp_path / "empty").mkdir()
    found = [arrival.source.relative_to(tmp_path).as_posix() for arrival in arrivals(tmp_path)]
    assert found == [
        "a.nii.gz",
        "b.nii",
        "c.zip",
        "d.nrrd",
        "dicom",
        "e.mha",
        "f.nhdr",
        "ward/2/e.NII.GZ",
        "ward/d.nii.gz",
    ]


def test_dicom_files_beside_other_scans_are_found(tmp_path: Path) -> None:
    dicom = bytes(128) + b"DICM and more"
    put(tmp_path / "patient" / "prior.nii.gz")
    put(tmp_path / "patient" / "series" / "IM1", dicom)
    put(tmp_path / "plain" / "scan.nii")
    put(tmp_path / "plain" / "readme.txt")
    put(tmp_path / "enhanced.dcm", dicom)
    found = [arrival.source.relative_to(tmp_path).as_posix() for arrival in arrivals(tmp_path)]
    assert found == ["enhanced.dcm", "patient/prior.nii.gz", "patient", "plain/scan.nii"]


def test_a_nifti_pair_is_one_scan_with_the_content_of_both_files(tmp_path: Path) -> None:
    header = put(tmp_path / "in" / "a.hdr", b"header")
    assert arrivals(tmp_path / "in") == []  # the voxels are still on their way
    voxels = put(tmp_path / "in" / "a.img", b"voxels")
    put(tmp_path / "in" / "disc.img")
    put(tmp_path / "in" / "below" / "b.hdr")
    put(tmp_path / "in" / "below" / "b.img")
    (first, second) = arrivals(tmp_path / "in")
    assert [first.source, second.source] == [header, tmp_path / "in" / "below" / "b.hdr"]
    key = content_key(header)
    voxels.write_bytes(b"other voxels")
    assert content_key(header) != key
    assert content_key(header) == content_key(voxels)
    assert signature_of(header) != first.signature


def test_a_scan_is_complete_when_it_has_not_changed_for_the_settle_time(tmp_path: Path) -> None:
    clock = Clock()
    inbox = Inbox(tmp_path, settle=10, clock=clock)
    file = put(tmp_path / "a.nii", b"1")
    assert inbox.complete_arrivals() == []
    assert inbox.incomplete == 1
    clock.now = 9
    put(file, b"12")
    assert inbox.complete_arrivals() == []
    clock.now = 18
    assert inbox.complete_arrivals() == []
    clock.now = 19
    assert [arrival.source for arrival in inbox.complete_arrivals()] == [file]
    assert inbox.incomplete == 0


def test_a_folder_is_complete_when_its_files_have_not_changed(tmp_path: Path) -> None:
    clock = Clock()
    inbox = Inbox(tmp_path, settle=10, clock=clock)
    for number in range(3):
        put(tmp_path / "series" / "deep" / str(number))
        clock.now += 9
        assert inbox.complete_arrivals() == []
    clock.now += 10
    assert [arrival.source.name for arrival in inbox.complete_arrivals()] == ["series"]
    (tmp_path / "series" / "deep" / "1").unlink()
    assert inbox.complete_arrivals() == []


def test_an_old_date_does_not_make_a_file_complete(tmp_path: Path) -> None:
    """Copied or unpacked files keep the dates of the originals."""
    inbox = Inbox(tmp_path, settle=10, clock=Clock())
    os.utime(put(tmp_path / "a.nii"), (0, 0))
    assert inbox.complete_arrivals() == []


@given(st.lists(st.binary(max_size=30), min_size=1, max_size=6, unique=True), st.randoms())
def test_the_key_of_a_series_depends_only_on_its_content(
    tmp_path_factory: pytest.TempPathFactory, contents: list[bytes], random: object
) -> None:
    first, second = tmp_path_factory.mktemp("first"), tmp_path_factory.mktemp("second")
    for number, content in enumerate(contents):
        put(first / f"IM{number}", content)
    for number, content in enumerate(reversed(contents)):
        put(second / "other" / f"{number}.dcm", content)
    assert content_key(first) == content_key(second)
    put(second / "one more", b"y" * 31)
    assert content_key(first) != content_key(second)


def test_a_copied_file_has_the_key_of_the_original_and_another_file_has_not(tmp_path: Path) -> None:
    a = put(tmp_path / "a.nii", b"a" * 3_000_000)
    shutil.copy(a, tmp_path / "b.nii")
    c = put(tmp_path / "c.nii", b"a" * 2_999_999 + b"b")
    assert content_key(a) == content_key(tmp_path / "b.nii") != content_key(c)
    assert content_key(a).startswith("case-")


def test_the_error_of_an_unreadable_folder_does_not_name_the_files_inside(tmp_path: Path) -> None:
    (tmp_path / "series").mkdir()
    (tmp_path / "series" / "DOE JOHN").symlink_to(tmp_path / "nowhere")
    with refused(UnreadableFileError, tmp_path / "series") as caught:
        content_key(tmp_path / "series")
    assert "DOE" not in str(caught.value)
    assert len(arrivals(tmp_path)) == 1  # the folder is still listed


def test_a_missing_inbox_is_refused(tmp_path: Path) -> None:
    with refused(UnreadableFileError, tmp_path / "nowhere"):
        Inbox(tmp_path / "nowhere", settle=0)
    with refused(UnreadableFileError, tmp_path / "nowhere"):
        arrivals(tmp_path / "nowhere")
    assert signature_of(tmp_path / "nowhere") is None
