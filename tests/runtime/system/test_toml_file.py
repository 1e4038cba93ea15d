"""TOML files are read as programs and editors write them, and what is no TOML is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
from doubles.errors import refused
from pydantic import BaseModel

from fseft_edge.runtime.errors import InputError, UnreadableFileError
from fseft_edge.runtime.system.toml_file import read_toml


class Schema(BaseModel):
    steps: int


@pytest.mark.parametrize("before", [b"", b"\xef\xbb\xbf"])
def test_a_byte_order_mark_of_an_editor_is_no_content(tmp_path: Path, before: bytes) -> None:
    (tmp_path / "a.toml").write_bytes(before + b"steps = 3\n")
    assert read_toml(tmp_path / "a.toml", Schema, remedy="Correct it.") == Schema(steps=3)


@pytest.mark.parametrize(
    "content", [b"steps", b"\xff", b"steps = " + b"9" * 5000, b"steps = " + b"[" * 50_000 + b"]" * 50_000]
)
def test_what_is_no_toml_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.toml").write_bytes(content)
    with refused(UnreadableFileError, tmp_path / "a.toml"):
        read_toml(tmp_path / "a.toml", Schema, remedy="Correct it.")


def test_a_wrong_value_is_refused_with_its_key(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text('steps = "x"\n')
    with refused(InputError, tmp_path / "a.toml", "steps"):
        read_toml(tmp_path / "a.toml", Schema, remedy="Correct it.")
