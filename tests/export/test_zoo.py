"""The table of models, and what choosing one wrongly says."""

from __future__ import annotations

from pathlib import Path

import pytest
from doubles.models import small_model

from fseft_edge.export.checkpoints import write_model_file
from fseft_edge.export.zoo import MODELS, load_model
from fseft_edge.runtime.errors import UsageError


def test_fseft_is_described_as_published() -> None:
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


def test_custom_model_is_a_model_file(tmp_path: Path) -> None:
    write_model_file(tmp_path / "m.safetensors", small_model())
    loaded = load_model("custom", tmp_path / "m.safetensors")
    assert loaded.model.description == small_model().description
    assert loaded.source == tmp_path / "m.safetensors"


def test_unknown_model_lists_the_known_ones() -> None:
    with pytest.raises(UsageError, match=r"'nobody' is unknown.*edge_base.*fseft.*custom"):
        load_model("nobody", None)


@pytest.mark.parametrize("name", ["fseft", "custom"])
def test_model_that_is_not_built_in_needs_a_checkpoint(name: str) -> None:
    with pytest.raises(UsageError, match="needs its checkpoint"):
        load_model(name, None)


def test_built_in_model_takes_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="built in"):
        load_model("edge_base", tmp_path / "m.safetensors")
