"""Table of the models that can be exported, and errors of a wrong choice."""

from __future__ import annotations

from pathlib import Path

import pytest
from doubles.errors import refused
from doubles.models import small_model

from fseft_edge.export.checkpoints import write_model_file
from fseft_edge.export.zoo import MODELS, load_model
from fseft_edge.runtime.errors import UsageError


def test_metadata_of_fseft_equal_the_publication() -> None:
    # github.com/jusiro/fewshot-finetuning: models/configs.py and pretrain/datasets/templates.py (ids there start at 1)
    description = MODELS["fseft"].published
    assert description is not None
    assert description.preprocessing.hu_window == (-175.0, 250.0)
    assert description.preprocessing.spacing == (1.5, 1.5, 1.5)
    assert description.window == (96, 96, 96)
    assert description.organs == (
        *("spleen", "right_kidney", "left_kidney", "gallbladder", "esophagus", "liver", "stomach", "aorta"),
        *("postcava", "portal_and_splenic_vein", "pancreas", "right_adrenal_gland", "left_adrenal_gland"),
        *("duodenum", "bladder", "prostate_or_uterus", "liver_tumour", "kidney_tumour", "kidney_cyst"),
        *("celiac_trunk", "right_lung", "left_lung", "bone", "brain", "lung_tumour", "pancreas_tumour"),
        *("hepatic_vessel", "hepatic_vessel_tumour", "colon_tumour"),
    )


def test_custom_model_is_read_from_a_model_file(tmp_path: Path) -> None:
    write_model_file(tmp_path / "m.safetensors", small_model())
    loaded = load_model("custom", tmp_path / "m.safetensors")
    assert loaded.model.description == small_model().description
    assert loaded.source == tmp_path / "m.safetensors"


def test_error_of_an_unknown_model_lists_the_known_models() -> None:
    with refused(UsageError, "nobody") as caught:
        load_model("nobody", None)
    assert all(name in caught.value.remedy for name in MODELS)


@pytest.mark.parametrize("name", ["fseft", "custom"])
def test_model_that_is_not_built_in_needs_a_checkpoint(name: str) -> None:
    with refused(UsageError, name):
        load_model(name, None)


def test_checkpoint_for_a_built_in_model_is_refused(tmp_path: Path) -> None:
    with refused(UsageError, "edge_base", tmp_path / "m.safetensors"):
        load_model("edge_base", tmp_path / "m.safetensors")
