"""Organ names and label values: parsing of ``--organ``."""

from __future__ import annotations

import pytest
from doubles.errors import refused
from hypothesis import given, settings
from hypothesis import strategies as st

from fseft_edge.runtime.errors import UsageError
from fseft_edge.runtime.scans.organs import OrganLabel, organs_of, parse_organs


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
        "liver=",
        "=6",
        "liver=6|7",
        "liver=Liver|",
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


def test_an_organ_may_have_names_in_annotations_that_name_their_structures() -> None:
    bare, aliases, both = parse_organs(["parotid_left", "cord=Myelon|SPINAL CANAL,liver=6|Leber"])
    assert (bare.label, bare.names, bare.in_label_maps) == (1, ("parotid_left",), False)
    assert (aliases.label, aliases.names, aliases.in_label_maps) == (2, ("Myelon", "SPINAL CANAL"), False)
    assert (both.label, both.names, both.in_label_maps) == (6, ("Leber",), True)
    assert organs_of({"parotid_left": "parotid_left", "cord": "Myelon|SPINAL CANAL", "liver": "6|Leber"}) == (
        bare,
        aliases,
        both,
    )
    assert organs_of(["parotid_left"]) == (bare,)


@pytest.mark.parametrize(
    ("organ", "structure", "same"),
    [
        ("parotid_left", "Parotid_L", True),
        ("parotid_left", "LT PAROTID", True),
        ("parotid_left", "Parotid L", True),
        ("parotid_left", "Parotid_R", False),
        ("parotid_left", "Parotids", False),
        ("parotid_left", "Parotid_L_PRV", False),
        ("mandible", "Bone_Mandible", True),
        ("spinal_cord", "SpinalCord", True),
        ("spinal_cord", "SpinalCord_PRV05", False),
        ("submandibular_left", "Glnd_Submand_L", True),
        ("inferior_vena_cava", "V_Venacava_I", True),
        ("aorta", "A_Aorta", True),
        ("brainstem", "BRAIN_STEM", True),
        ("brainstem", "Brain", False),
        ("brain", "~Brain", False),
        ("liver", "Liver?", False),
    ],
)
def test_known_names_of_an_organ(organ: str, structure: str, *, same: bool) -> None:
    (wanted,) = parse_organs([organ])
    assert wanted.is_named(structure) is same


def test_given_names_are_compared_without_case_blanks_and_underscores_only() -> None:
    (wanted,) = parse_organs(["ctv=CTV +1cm|My Target"])
    assert wanted.is_named("ctv_+1CM")
    assert wanted.is_named("MYTARGET")
    assert not wanted.is_named("CTV -1cm")
    assert not wanted.is_named("ctv")


def test_a_comma_before_a_blank_belongs_to_a_name() -> None:
    assert [organ.names for organ in parse_organs(["tumour=Neoplasm, Primary"])] == [("Neoplasm, Primary",)]
    assert [organ.label for organ in parse_organs(["liver=6, spleen=1"])] == [6, 1]
    assert [organ.name for organ in parse_organs(["liver,spleen"])] == ["liver", "spleen"]
