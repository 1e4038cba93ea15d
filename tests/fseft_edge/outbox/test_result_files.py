"""A mask of the outbox is opened only if it is the one that the JSON file beside it describes."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
from doubles.errors import refused

from fseft_edge.outbox.result_files import open_result
from fseft_edge.runtime.errors import LabelError, UnreadableFileError

KEY = "case-0123456789ab"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / KEY
    folder.mkdir()
    (folder / f"{KEY}.nii.gz").write_bytes(b"mask")
    describe(folder, mask_sha256=hashlib.sha256(b"mask").hexdigest())
    return folder


def describe(folder: Path, **fields: str) -> None:
    (folder / f"{KEY}.json").write_text(json.dumps({"organs": [], **fields}))


def test_a_mask_that_its_description_fits_is_opened_at_its_start(folder: Path) -> None:
    with open_result(folder.parent, KEY, ".nii.gz") as file:
        assert file.read() == b"mask"
    describe(folder)  # as earlier versions wrote it
    with open_result(folder.parent, KEY, ".nii.gz") as file:
        assert file.read() == b"mask"


def test_a_mask_that_was_changed_is_refused(folder: Path) -> None:
    (folder / f"{KEY}.nii.gz").write_bytes(b"of another run")
    with refused(LabelError, KEY):
        open_result(folder.parent, KEY, ".nii.gz")


def test_a_description_that_is_a_link_is_refused(folder: Path, tmp_path: Path) -> None:
    (folder / f"{KEY}.json").rename(tmp_path / "elsewhere.json")
    (folder / f"{KEY}.json").symlink_to(tmp_path / "elsewhere.json")
    with refused(UnreadableFileError, f"{KEY}.json"):
        open_result(folder.parent, KEY, ".nii.gz")
