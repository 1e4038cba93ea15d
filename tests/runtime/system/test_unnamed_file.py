"""Unnamed temporary files, and the errors if there is no place for them."""

from __future__ import annotations

import errno
import io
import tempfile
from pathlib import Path

import pytest
from doubles.errors import refused

from fseft_edge.runtime.errors import OutOfSpaceError
from fseft_edge.runtime.system.unnamed_file import no_space_to_unpack, unnamed_file

SCAN = Path("ct.nii.gz")


@pytest.fixture
def _fresh_folder(monkeypatch):
    """Let tempfile look for its folder again; without this, it remembers the folder of the first call."""
    monkeypatch.setattr(tempfile, "tempdir", None)


@pytest.mark.usefixtures("_fresh_folder")
def test_the_file_is_in_the_folder_of_tmpdir_and_has_no_name(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    with unnamed_file(SCAN) as file:
        file.write(b"voxels")
        assert list(tmp_path.iterdir()) == []
        device = tmp_path.stat().st_dev
        assert Path(f"/proc/self/fd/{file.fileno()}").stat().st_dev == device


@pytest.mark.usefixtures("_fresh_folder")
def test_no_other_folder_takes_the_place_of_an_unusable_tmpdir(tmp_path, monkeypatch):
    """Python itself falls back to /tmp without a word."""
    missing = tmp_path / "missing"
    monkeypatch.setenv("TMPDIR", str(missing))
    assert not Path(tempfile.gettempdir()).is_relative_to(tmp_path)
    with refused(OutOfSpaceError, SCAN, missing, "TMPDIR") as caught:
        unnamed_file(SCAN)
    assert "TMPDIR" in caught.value.remedy


def test_a_folder_below_tmpdir_may_be_chosen(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "batch"))
    (tmp_path / "batch").mkdir()
    unnamed_file(SCAN).close()


def test_the_message_names_tmpdir_and_its_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    error = no_space_to_unpack(SCAN)
    assert str(tmp_path) in error.message
    assert "(environment variable TMPDIR):" in error.message
    assert "MiB are free there now" in error.remedy


def test_without_tmpdir_the_message_says_so_and_names_the_folder(monkeypatch):
    monkeypatch.delenv("TMPDIR", raising=False)
    error = no_space_to_unpack(SCAN)
    assert tempfile.gettempdir() in error.message
    assert "TMPDIR is not set" in error.message


def test_a_system_without_any_temporary_folder_is_an_error_with_a_remedy(monkeypatch):
    monkeypatch.delenv("TMPDIR", raising=False)

    def none():
        raise FileNotFoundError(2, "No usable temporary directory found")

    monkeypatch.setattr(tempfile, "gettempdir", none)
    with refused(OutOfSpaceError, SCAN, "TMPDIR"):
        unnamed_file(SCAN)


class _FullDisk(io.FileIO):
    """A file on a disk without free space."""

    def write(self, _):
        raise OSError(errno.ENOSPC, "No space left on device")


def _on_a_full_disk(monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "TemporaryFile", lambda **_: _FullDisk(tmp_path / "file", "w+"))


def test_a_full_disk_is_named_although_it_is_noticed_only_when_the_file_is_closed(tmp_path, monkeypatch):
    _on_a_full_disk(monkeypatch, tmp_path)
    with refused(OutOfSpaceError, SCAN, "TMPDIR"), unnamed_file(SCAN) as file:
        file.write(b"voxels")


def test_closing_on_a_full_disk_does_not_hide_an_earlier_error(tmp_path, monkeypatch):
    _on_a_full_disk(monkeypatch, tmp_path)

    def fail():
        with unnamed_file(SCAN) as file:
            file.write(b"voxels")
            raise KeyError

    with pytest.raises(KeyError):
        fail()
