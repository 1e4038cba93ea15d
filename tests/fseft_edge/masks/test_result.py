"""The JSON fields of an organ and of a mask: what another program changed is refused as one kind of error."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from doubles.errors import refused

from fseft_edge.masks.result import SegmentedOrgan, organ_labels
from fseft_edge.runtime.errors import LabelError

LIVER = SegmentedOrgan("liver", 1, 1500.5, ("small", "fragmented"), (1200.0, 1800.0), 0.75, -3)


def test_an_organ_is_read_as_it_was_written() -> None:
    assert SegmentedOrgan.from_json(json.loads(json.dumps(asdict(LIVER)))) == LIVER


def test_fields_that_an_older_version_did_not_write_are_none() -> None:
    fields = {"name": "liver", "label": 1, "volume_ml": 2, "flags": []}
    assert SegmentedOrgan.from_json(fields) == SegmentedOrgan("liver", 1, 2.0, ())


@pytest.mark.parametrize(
    "changes",
    [
        {"volume_ml": "much"},
        {"volume_ml": None},
        {"label": 1.5},
        {"label": float("inf")},
        {"flags": "small"},
        {"support_ml": [1.0]},
        {"name": 3},
        {"unheard_of": 1},
    ],
    ids=str,
)
def test_a_field_of_the_wrong_type_is_a_value_error(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(changes))):
        SegmentedOrgan.from_json({**asdict(LIVER), **changes})


@pytest.mark.parametrize("fields", [None, 1.5, True, [], "liver"])
def test_what_is_no_organ_is_a_value_error(fields: object) -> None:
    with pytest.raises(ValueError, match="SegmentedOrgan"):
        SegmentedOrgan.from_json(fields)


@pytest.mark.parametrize(
    "text",
    [
        "[" * 100_000 + "]" * 100_000,
        '{"organs": [{"name": "liver", "label": Infinity}]}',
        '{"organs": [{"name": "liver", "label": NaN}]}',
        '{"organs": [{"name": "liver"}]}',
        '{"organs": {"liver": 1}}',
        "null",
    ],
    ids=lambda text: text[:40],
)
def test_a_description_without_names_and_label_values_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.json").write_text(text)
    with refused(LabelError, tmp_path / "a.json"):
        organ_labels(tmp_path / "a.json")
