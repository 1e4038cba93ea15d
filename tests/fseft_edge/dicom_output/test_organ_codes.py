from __future__ import annotations

import pytest
from pydicom.sr.codedict import codes

from fseft_edge.dicom_output import organ_codes
from fseft_edge.dicom_output.organ_codes import PRIVATE_SCHEME, organ_code

LEFT, RIGHT = "7771000", "24028007"

PUBLISHED = {
    # Code values copied from PS3.16 2024: CID 7151 and the context groups included in it, and CID 244.
    "brainstem": "119238007",
    "spinal_cord": "2748008",
    "mandible": "91609006",
    "esophagus": "32849002",
    "larynx": "4596009",
    "spleen": "78961009",
    "gallbladder": "28231008",
    "liver": "10200004",
    "stomach": "69695003",
    "aorta": "15825003",
    "inferior_vena_cava": "64131007",
    "portal_vein": "32764006",
    "splenic_vein": "35819009",
    "pancreas": "15776009",
    "duodenum": "38848004",
    "bladder": "89837001",
    "prostate": "41216001",
    "uterus": "35039007",
    "bone": "272673000",
    "brain": "12738006",
    "colon": "71854001",
    "kidneys": "64033007",
    "lungs": "39607008",
    "left_atrium": "82471001",
}


@pytest.mark.parametrize(("name", "value"), PUBLISHED.items())
def test_organs_have_the_codes_of_the_standard(name: str, value: str) -> None:
    code = organ_code(name)
    assert (code.kind.value, code.kind.scheme_designator, code.side) == (value, "SCT", None)
    assert code.category.value == "91723000"


@pytest.mark.parametrize(
    ("names", "value", "side"),
    [
        (["left_kidney", "kidney_left", "Left Kidney", "Kidney_L", "kidney-lt", "LeftKidney"], "64033007", LEFT),
        (["right_parotid", "parotid_right", "Parotid_R", "parotid gland right"], "45289007", RIGHT),
        (["left_parotid", "Parotid_L"], "45289007", LEFT),
        (["right_adrenal_gland", "adrenal_gland_right", "adrenal_right"], "23451007", RIGHT),
        (["lung_left", "left_lung"], "39607008", LEFT),
    ],
)
def test_the_side_of_a_paired_organ_is_a_modifier_in_every_spelling(names: list[str], value: str, side: str) -> None:
    for name in names:
        code = organ_code(name)
        assert code.side is not None
        assert (code.kind.value, code.side.value) == (value, side), name


def test_all_spellings_of_an_organ_have_one_code() -> None:
    assert {organ_code(name) for name in ("SpinalCord", "spinal_cord", "Spinal Cord", "SPINAL_CORD")} == {
        organ_code("spinalcord")
    }


@pytest.mark.parametrize(
    "name", ["liver_left", "liver_segment_4", "portal_and_splenic_vein", "PTV_high", "left_right_lung"]
)
def test_an_unknown_name_gets_a_private_code(name: str) -> None:
    code = organ_code(name)
    assert code.private
    assert (code.kind.scheme_designator, code.kind.meaning) == (PRIVATE_SCHEME, name)
    assert PRIVATE_SCHEME.startswith("99")
    assert 1 <= len(code.kind.value) <= 16


def test_private_codes_of_long_names_differ() -> None:
    assert (
        organ_code("tumour_bed_of_the_left_breast_1").kind.value
        != organ_code("tumour_bed_of_the_left_breast_2").kind.value
    )


def test_abnormal_tissue_has_another_category() -> None:
    assert organ_code("tumor").category == codes.CID7150.MorphologicallyAbnormalStructure


@pytest.mark.parametrize("table", [organ_codes._PAIRED, organ_codes._SINGLE, organ_codes._ABNORMAL])
def test_every_table_entry_names_a_snomed_concept_of_the_standard(table: dict[str, str]) -> None:
    for name, keyword in table.items():
        code = getattr(codes.SCT, keyword)
        assert code.scheme_designator == "SCT"
        assert code.value.isdigit(), name
