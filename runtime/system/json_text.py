"""Parsing of JSON that another program or an earlier version wrote."""

from __future__ import annotations

import json
from typing import Any


def parse_json(text: str | bytes) -> Any:  # noqa: ANN401 - JSON can contain anything
    """Return the content of a JSON document.

    Raises:
        ValueError: the text is not JSON, or is nested so deeply that Python cannot parse it.
    """
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("the JSON is nested too deeply") from error
