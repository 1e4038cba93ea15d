"""Organ names and label values: parsing of ``--organ``."""

from __future__ import annotations

import pytest
from doubles.errors import refused
from hypothesis import given, settings
from hypothesis import strategies as st

from fseft_edge.runtime.errors import UsageError
from fseft_edge.runtime.scans.organs import OrganLabel, parse_organs


def test_repeated_options_and_commas_give_organs_in_order() -> None:
    assert parse_organs(["liver=6,spleen=1", " left_kidney = 3 "]) == (
        OrganLabel("liver", 6),
        OrganLabel("spleen", 1),
        OrganLabel("left_kidney", 3),
    )


@settings(max_examples=25, deadline=None)
@given(
    st.lists(
        st.tuples(st.from_regex(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}", fullmatch=True), st.integers(1, 65535)),
        min_size=1,
        max_size=3,
        unique_by=(lambda organ: organ[0], lambda organ: organ[1]),
    ).map(dict)
)
def test_every_allowed_name_and_label_is_parsed(organs: dict[str, int]) -> None:
    text = ",".join(f"{name}={label}" for name, label in organs.items())
    assert {organ.name: organ.label for organ in parse_organs([text])} == organs


@pytest.mark.parametrize(
    "text",
    [
        "",
        "liver",
        "liver=",
        "=6",
        "liver=six",
        "liver=6.0",
        "liver=-1",
        "liver=0",
        "liver=65536",
        "liver=1234567890",
        "liver=٣",
        "liver=6,",
        "../liver=6",
        "a/b=6",
        "-liver=6",
        "leber links=6",
        "käse=6",
        "liver==6",
        f"{'x' * 65}=6",
    ],
)
def test_malformed_organ_is_refused_with_an_example(text: str) -> None:
    with refused(UsageError) as caught:
        parse_organs([text])
    assert caught.value.exit_code == 2
    assert "--organ liver=6,spleen=1" in caught.value.remedy


def test_no_organ_is_refused() -> None:
    with refused(UsageError, "--organ"):
        parse_organs([])


@pytest.mark.parametrize(("text", "named"), [("liver=6,liver=7", "'liver'"), ("liver=6,spleen=6", "'spleen'")])
def test_repeated_name_or_label_is_refused(text: str, named: str) -> None:
    with refused(UsageError, named):
        parse_organs([text])
