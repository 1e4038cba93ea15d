"""A file or folder appears under its final name only after it is complete."""

from __future__ import annotations

import errno
import os
import stat
import tempfile
from pathlib import Path

import pytest
from doubles.errors import refused

from fseft_edge.runtime.errors import OutOfSpaceError, UsageError
from fseft_edge.runtime.system.atomic import atomic_files, atomic_folder, atomic_path, check_writable

INTERRUPTIONS = [ValueError("bug"), KeyboardInterrupt(), SystemExit(1)]


def fail_with(code: int):
    def failing(*_args, **_kwargs):
        raise OSError(code, os.strerror(code))

    return failing


def write_file(target: Path, content: str, *, then: BaseException | None = None) -> None:
    with atomic_path(target) as temporary:
        temporary.write_text(content)
        if then is not None:
            raise then


def write_folder(target: Path, content: str, *, then: BaseException | None = None, overwrite: bool = False) -> None:
    with atomic_folder(target, overwrite=overwrite) as temporary:
        (temporary / "manifest.json").write_text(content)
        if then is not None:
            raise then


def test_file_appears_under_its_name_with_the_written_content(tmp_path):
    target = tmp_path / "new" / "mask.nii.gz"
    with atomic_path(target) as temporary:
        assert temporary.parent == target.parent
        assert temporary.name.startswith(".")
        assert temporary.name.endswith(".nii.gz")
        temporary.write_bytes(b"voxels")
        assert not target.exists()
    assert target.read_bytes() == b"voxels"
    assert list(target.parent.iterdir()) == [target]


def test_file_permissions_follow_the_umask(tmp_path):
    plain, target = tmp_path / "plain", tmp_path / "atomic"
    plain.write_bytes(b"")
    with atomic_path(target) as temporary:
        temporary.write_bytes(b"")
    assert stat.S_IMODE(target.stat().st_mode) == stat.S_IMODE(plain.stat().st_mode)


@pytest.mark.parametrize("interruption", INTERRUPTIONS, ids=lambda error: type(error).__name__)
def test_interrupted_writing_keeps_the_old_file_and_leaves_no_other_file(tmp_path, interruption):
    target = tmp_path / "report.json"
    target.write_text("old")
    with pytest.raises(type(interruption)):
        write_file(target, "half of the n", then=interruption)
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES])
def test_failed_flush_names_the_file_and_leaves_no_file(tmp_path, monkeypatch, code):
    target = tmp_path / "mask.nii.gz"
    monkeypatch.setattr(os, "fsync", fail_with(code))
    with refused(OutOfSpaceError, target):
        write_file(target, "voxels")
    assert list(tmp_path.iterdir()) == []


def test_full_disk_while_writing_names_the_file(tmp_path):
    target = tmp_path / "mask.nii.gz"
    error_of_write = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))  # contains no file name
    with refused(OutOfSpaceError, target):
        write_file(target, "half", then=error_of_write)
    assert list(tmp_path.iterdir()) == []


def test_check_writable_leaves_no_file(tmp_path):
    check_writable(tmp_path / "new" / "folder" / "liver.adapter")
    check_writable(tmp_path / "liver.adapter")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EACCES])
def test_check_writable_names_an_unwritable_target(tmp_path, monkeypatch, code):
    monkeypatch.setattr(Path, "touch", fail_with(code))
    with refused(OutOfSpaceError, "liver.adapter"):
        check_writable(tmp_path / "new" / "liver.adapter")
    assert list(tmp_path.iterdir()) == []


def test_error_about_another_file_is_not_converted(tmp_path):
    unreadable_input = PermissionError(errno.EACCES, "Permission denied", "/somewhere/else/scan.nii")
    with pytest.raises(PermissionError):
        write_file(tmp_path / "out", "", then=unreadable_input)
    assert list(tmp_path.iterdir()) == []


def test_parent_that_is_a_file_is_not_replaced(tmp_path):
    (tmp_path / "out").write_text("a file")
    with pytest.raises(OSError, match="out"), atomic_path(tmp_path / "out" / "mask.nii"):
        pass
    assert (tmp_path / "out").read_text() == "a file"


def test_folder_as_the_name_of_a_file_is_refused(tmp_path):
    with refused(UsageError, tmp_path), atomic_path(tmp_path):
        pass
    with refused(UsageError, tmp_path):
        check_writable(tmp_path)


def test_folder_appears_complete(tmp_path):
    target = tmp_path / "cache" / "entry"
    with atomic_folder(target) as temporary:
        (temporary / "levels").mkdir()
        (temporary / "levels" / "0").write_bytes(b"features")
        assert not target.exists()
    assert (target / "levels" / "0").read_bytes() == b"features"
    assert list(target.parent.iterdir()) == [target]


@pytest.mark.parametrize("interruption", INTERRUPTIONS, ids=lambda error: type(error).__name__)
def test_interrupted_writing_keeps_the_old_folder_and_leaves_no_other_folder(tmp_path, interruption):
    target = tmp_path / "unet.encoder"
    target.mkdir()
    (target / "manifest.json").write_text("old")
    with pytest.raises(type(interruption)):
        write_folder(target, "new", then=interruption, overwrite=True)
    assert (target / "manifest.json").read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_old_folder_gets_its_name_back_if_the_new_folder_cannot_be_renamed(tmp_path, monkeypatch):
    target = tmp_path / "unet.encoder"
    target.mkdir()
    (target / "manifest.json").write_text("old")
    rename = Path.rename

    def fail_for_the_new_folder(self: Path, destination: Path) -> Path:
        if destination == target and (self / "manifest.json").read_text() == "new":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return rename(self, destination)

    monkeypatch.setattr(Path, "rename", fail_for_the_new_folder)
    with refused(OutOfSpaceError, target):
        write_folder(target, "new", overwrite=True)
    assert (target / "manifest.json").read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_folder_is_overwritten_only_on_request(tmp_path):
    target = tmp_path / "unet.encoder"
    target.mkdir()
    (target / "stale").write_text("old")
    with refused(UsageError, target), atomic_folder(target):
        pass
    with atomic_folder(target, overwrite=True) as temporary:
        (temporary / "fresh").write_text("new")
    assert [path.name for path in target.iterdir()] == ["fresh"]
    assert list(tmp_path.iterdir()) == [target]


def test_folder_that_another_process_wrote_meanwhile_is_kept(tmp_path):
    target = tmp_path / "entry"

    def slow() -> None:
        with atomic_folder(target):
            write_folder(target, "fast")

    with refused(UsageError, target):
        slow()
    assert (target / "manifest.json").read_text() == "fast"
    assert list(tmp_path.iterdir()) == [target]


def test_folder_never_replaces_a_file(tmp_path):
    target = tmp_path / "entry"
    target.write_text("a file")
    with refused(UsageError, target), atomic_folder(target, overwrite=True):
        pass
    assert target.read_text() == "a file"


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS])
def test_failed_flush_names_the_folder_and_leaves_no_folder(tmp_path, monkeypatch, code):
    monkeypatch.setattr(os, "fsync", fail_with(code))
    with refused(OutOfSpaceError, tmp_path / "entry"):
        write_folder(tmp_path / "entry", "features")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["x" * 255, "y" * 248 + ".nii.gz", "a." + "z" * 253, "b" * 250 + ".json"])
def test_every_name_that_the_file_system_allows_can_be_written(tmp_path, name):
    with atomic_path(tmp_path / name) as temporary:
        temporary.write_text("content")
        assert len(temporary.name) < 50
    check_writable(tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == [name]


def write_files(target: Path, *names: str, then: BaseException | None = None, outdated: tuple[str, ...] = ()) -> None:
    with atomic_files(target, first="first", last="last", outdated=outdated) as folder:
        for name in names:
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text("new")
        if then is not None:
            raise then


def content(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


def test_files_appear_together_in_the_given_order(tmp_path, monkeypatch):
    order = []
    rename = Path.replace

    def noted(path, target):
        order.append(str(target.relative_to(tmp_path)))
        return rename(path, target)

    monkeypatch.setattr(Path, "replace", noted)
    write_files(tmp_path, "last", "c/d", "b", "first")
    assert order == ["first", "b", "c/d", "last"]
    assert content(tmp_path) == dict.fromkeys(order, "new")


@pytest.mark.parametrize("interruption", INTERRUPTIONS, ids=lambda error: type(error).__name__)
def test_no_file_changes_if_the_body_fails(tmp_path, interruption):
    (tmp_path / "last").write_text("old")
    with pytest.raises(type(interruption)):
        write_files(tmp_path, "first", "last", "b", then=interruption, outdated=("last",))
    assert content(tmp_path) == {"last": "old"}


def test_outdated_files_are_removed_unless_they_are_written_again(tmp_path):
    for name in ("a", "b", "c/d", "e/f", "e/kept", "last"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("old")
    write_files(tmp_path, "first", "last", "b", outdated=("b", "c/d", "e/f", "last", "missing", "no/where"))
    assert content(tmp_path) == {"a": "old", "b": "new", "e/kept": "old", "first": "new", "last": "new"}
    assert not (tmp_path / "c").exists()


def test_files_never_replace_folders_and_folders_never_replace_files(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "c").write_text("of the user")
    for name in ("b", "c/d"):
        with refused(UsageError, tmp_path / name):
            write_files(tmp_path, "first", "last", name)
    assert content(tmp_path) == {"c": "of the user"}
    with refused(UsageError, tmp_path / "c"):
        write_files(tmp_path / "c", "first", "last")


def test_an_error_in_the_body_names_the_file_as_it_will_be_called(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", fail_with(errno.ENOSPC))
    with (
        refused(OutOfSpaceError, tmp_path / "b") as caught,
        atomic_files(tmp_path, first="a", last="c") as folder,
        atomic_path(folder / "b") as temporary,
    ):
        temporary.touch()
    assert "partial" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_of_temporary_files_names_tmpdir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The user chose the output, but not the place of a temporary file."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    for target, named in (
        (tmp_path / "fseft-edge-a1b2" / "key" / "entry", f"disk, or free disk space in {tmp_path},"),
        (tmp_path / "out" / "mask.nii.gz", "write to another disk"),
    ):
        with refused(OutOfSpaceError, target) as caught, atomic_path(target) as temporary:
            raise OSError(errno.ENOSPC, "No space left on device", str(temporary))
        assert named in caught.value.remedy
        assert ("TMPDIR" in caught.value.remedy) == ("fseft-edge-a1b2" in target.parts)
