"""JSON of other programs is parsed, or is one kind of error."""

from __future__ import annotations

import pytest

from fseft_edge.runtime.system.json_text import parse_json


@pytest.mark.parametrize("text", ['{"a": [1, null]}', b'{"a": [1, null]}'])
def test_json_is_parsed(text: str | bytes) -> None:
    assert parse_json(text) == {"a": [1, None]}


@pytest.mark.parametrize("text", ["", "{", b"\xff", "[" * 100_000 + "]" * 100_000, '{"a":' * 100_000])
def test_everything_else_is_a_value_error(text: str | bytes) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 - the text of the message depends on the version of Python
        parse_json(text)
