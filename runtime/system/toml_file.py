"""TOML files that a user writes, checked against a schema."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from fseft_edge.runtime.errors import InputError, UnreadableFileError

_Schema = TypeVar("_Schema", bound=BaseModel)


def read_toml(path: Path, schema: type[_Schema], *, remedy: str) -> _Schema:
    """Return what a TOML file says.

    Args:
        path: the file.
        schema: what it may say; unknown keys are errors where the schema forbids them.
        remedy: where its keys are described.

    Raises:
        UnreadableFileError: the file is missing or no TOML.
        InputError: a key is missing, unknown or of the wrong type.
    """
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UnreadableFileError(
            f"{path} is no readable TOML file: {error}.", remedy="Check the path and the file's syntax."
        ) from error
    try:
        return schema.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the whole"
        raise InputError(f"{path}: {where}: {first['msg']}.", remedy=remedy) from error
