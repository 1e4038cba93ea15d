"""Reading of TOML files that a user wrote, with a check against a schema."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from fseft_edge.runtime.errors import InputError, UnreadableFileError

_Schema = TypeVar("_Schema", bound=BaseModel)


def read_toml(path: Path, schema: type[_Schema], *, remedy: str) -> _Schema:
    """Return the content of a TOML file as an instance of a schema.

    Args:
        path: path of the TOML file.
        schema: pydantic model of the content. Unknown keys are errors if the model forbids them.
        remedy: remedy for content that does not match the schema, such as a reference to the documentation of the keys.

    Raises:
        UnreadableFileError: the file is missing, or is not a TOML file.
        InputError: a key is missing, unknown or of the wrong type.
    """
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:  # of a number with thousands of digits, too
        raise UnreadableFileError(
            f"{path} cannot be read as a TOML file: {error}.", remedy="Check the path and the syntax of the file."
        ) from error
    try:
        return schema.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the whole file"
        raise InputError(f"{path}: {where}: {first['msg']}.", remedy=remedy) from error
