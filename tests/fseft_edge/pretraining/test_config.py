"""The configuration of pre-training, and the cases and crops of a configuration."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from doubles.cohorts import CONFIG, write_cohort
from doubles.errors import refused
from doubles.repository import ROOT

from fseft_edge.phantom import ORGANS
from fseft_edge.pretraining import PretrainingConfig, read_pretraining_config
from fseft_edge.pretraining.config import FilesConfig
from fseft_edge.pretraining.training_cases import TrainingCase, draw_batch, load_cohorts
from fseft_edge.runtime.errors import InputError, UnreadableFileError
from fseft_edge.runtime.system.progress import SilentProgress


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data")
    write_cohort(root)
    return root


def changed_config(data: Path, *changes: tuple[str, str]) -> PretrainingConfig:
    """Return the configuration with parts of its text replaced."""
    text = CONFIG
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    path = data / "changed.toml"
    path.write_text(text)
    return read_pretraining_config(path)


def organ(case: TrainingCase, config: PretrainingConfig, name: str) -> np.ndarray[Any, np.dtype[np.bool_]]:
    return case.organ_bits & (1 << config.organs.index(name)) != 0


SWIN = ('"residual_unet"\nchannels = [4, 8, 8]', '"swin_unetr"\nfeature_size = 12')
PAIR = ('"spine", "spine_right", "spine_left"', '"right_kidney", "left_kidney"')
KIDNEYS = (
    'organs = { liver = 1, spine = 11 }\nhalves = { spine = ["spine_right", "spine_left"] }',
    'organs = { liver = 1, kidneys = [3, 4] }\nhalves = { kidneys = ["right_kidney", "left_kidney"] }',
)


def test_an_organ_may_be_made_up_of_several_labels(data: Path) -> None:
    config = changed_config(data, ("liver = 1", "liver = [1, 2]"))
    single = changed_config(data, ("spine = 11", "spine = 2"), ('"spine_right", "spine_left", ', ""), ("halves", "#"))
    union, apart = (load_cohorts(each, data, SilentProgress())[0] for each in (config, single))
    liver, spleen = (organ(apart[0], single, name) for name in ("liver", "spine"))
    assert spleen.any()
    grown = organ(union[0], config, "liver")
    assert (grown >= (liver | spleen)).all()
    assert grown.sum() < 1.01 * (liver | spleen).sum()  # a voxel that both fill by less than half each
    assert union[1].task_mask[0]  # one of its labels is there


def test_a_pair_with_one_label_is_trained_as_right_and_left_only(data: Path) -> None:
    assert ORGANS[2:4] == ("right_kidney", "left_kidney")
    pair = changed_config(data, PAIR, KIDNEYS)
    single = changed_config(data, PAIR, (KIDNEYS[0], "organs = { liver = 1, right_kidney = 3, left_kidney = 4 }"))
    split, drawn = (load_cohorts(config, data, SilentProgress())[0][0] for config in (pair, single))
    assert pair.organs == ("liver", "right_kidney", "left_kidney", "spleen")
    assert split.task_mask.tolist() == [True, True, True, False]
    for name in ("right_kidney", "left_kidney"):
        assert organ(drawn, single, name).any()
        assert np.array_equal(organ(split, pair, name), organ(drawn, single, name))


@pytest.mark.parametrize(("partial", "known"), [("true", False), ("false", True)])
def test_a_single_kidney_is_not_split(data: Path, partial: str, known: bool) -> None:
    config = changed_config(data, PAIR, KIDNEYS, ("[3, 4]", "4"), ("partial = true", f"partial = {partial}"))
    case = load_cohorts(config, data, SilentProgress())[0][0]
    assert organ(case, config, "left_kidney").any()
    assert not organ(case, config, "right_kidney").any()
    assert case.task_mask[config.organs.index("right_kidney")] == known


def test_organs_of_a_pair_change_places_in_a_mirrored_crop(data: Path) -> None:
    change = ("steps = 6", 'steps = 6\nrandom = "crop"')
    plain = changed_config(data, change)
    mirrored = changed_config(data, (change[0], change[1] + '\nflips = ["x"]'))
    cohorts = load_cohorts(plain, data, SilentProgress())
    swapped = [0, 1, 3, 2, 4]
    found = set()
    for step in range(6):
        one, two = draw_batch(plain, cohorts, step), draw_batch(mirrored, cohorts, step)
        for crop, other, mask in zip(one.targets, two.targets, two.task_mask, strict=True):
            flipped = torch.equal(other, crop.flip(1)[swapped])
            assert flipped or torch.equal(other, crop)
            found.add(flipped)
            assert mask.tolist() in ([1, 1, 1, 1, 0], [0, 1, 1, 1, 0], [0, 0, 0, 0, 1])
    assert found == {True, False}


def test_pairs_are_found_by_name_or_listed_in_the_configuration(data: Path) -> None:
    named = changed_config(data, ("steps = 6", 'steps = 6\nflips = ["x", "z"]'))
    assert named.schedule.mirrored(named.organs) == [0, 1, 3, 2, 4]
    declared = changed_config(data, ("steps = 6", 'steps = 6\nflips = ["x"]\npairs = [["liver", "spleen"]]'))
    assert declared.schedule.mirrored(declared.organs) == [4, 1, 3, 2, 0]


@pytest.mark.parametrize("random", ["step", "crop"])
def test_several_processes_together_draw_the_crops_of_one_process(data: Path, random: str) -> None:
    config = changed_config(
        data, ("steps = 6", f'steps = 6\nrandom = "{random}"'), ("crops_per_step = 1", "crops_per_step = 2")
    )
    cohorts = load_cohorts(config, data, SilentProgress())
    whole = draw_batch(config, cohorts, 3)
    for rank in range(3):
        share = draw_batch(config, cohorts, 3, slice(rank, None, 3))
        assert torch.equal(share.image, whole.image[rank::3])
        assert torch.equal(share.targets, whole.targets[rank::3])
        assert torch.equal(share.task_mask, whole.task_mask[rank::3])


def test_an_older_configuration_keeps_its_identity(data: Path) -> None:
    dump = changed_config(data).model_dump_json()
    assert not any(key in dump for key in ("gradient_checkpointing", "random", "flips", "pairs"))
    changed = changed_config(data, ("steps = 6", 'steps = 6\nflips = ["y"]')).model_dump_json()
    assert '"flips":["y"]' in changed


@pytest.mark.parametrize(
    ("change", "key"),
    [
        (("steps = 6", "steps = 0"), "schedule.steps"),
        (('"spleen"]\n[encoder]', '"spleen", "unseen"]\n[encoder]'), "unseen"),
        (("liver = 1", "lever = 1"), "lever"),
        (("seed = 7", "seeds = 7"), "seed"),
        (("liver = 1", "liver = []"), "organs.liver"),
        (("organs = { liver = 1", "structures = { liver = 1"), "dataset.0.files.organs"),
        (("crops_per_step = 1", "crops = 1"), "crops_per_step"),
        (('"residual_unet"', '"unet"'), "swin_unetr"),
        (('"residual_unet"', '"swin_unetr"'), "encoder.swin_unetr.channels"),
        (SWIN, "64"),
        (("steps = 6", 'steps = 6\nflips = ["q"]'), "schedule.flips.0"),
        (("steps = 6", 'steps = 6\nflips = ["x"]\npairs = [["liver", "lung"]]'), "lung"),
        (("deep_supervision = [0.5]", "deep_supervision = [0.5, 0.2]"), "deep_supervision"),
        (("spacing = [6.0, 6.0, 6.0]", 'spacing = [6.0, 6.0, 6.0]\naxcodes = "LPS"'), "axcodes"),
    ],
)
def test_the_error_of_a_wrong_configuration_names_file_and_key(tmp_path: Path, change: Any, key: str) -> None:
    path = tmp_path / "config.toml"
    path.write_text(CONFIG.replace(*change))
    with refused(InputError, path, key):
        read_pretraining_config(path)


def test_an_unreadable_configuration_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text("= nothing")
    with refused(UnreadableFileError, tmp_path / "config.toml"):
        read_pretraining_config(tmp_path / "config.toml")


def test_mirroring_needs_both_organs_of_a_pair(data: Path) -> None:
    single = ('"spine", "spine_right", "spine_left"', '"right_kidney"')
    files = (KIDNEYS[0], "organs = { liver = 1, right_kidney = 3 }")
    changed_config(data, single, files)
    with refused(InputError, "flips", "left_kidney"):
        changed_config(data, single, files, ("steps = 6", 'steps = 6\nflips = ["x"]'))


def test_organs_of_a_phantom_data_set_are_known(data: Path) -> None:
    assert set(changed_config(data).dataset[1].annotated()) <= set(ORGANS)


BENCHMARKS = ROOT / "benchmarks"


@pytest.mark.parametrize("name", ["edge_base", "edge_base_continued", "swin_unetr"])
def test_configurations_of_the_built_in_encoders_do_not_use_the_novel_organs(name: str) -> None:
    config = read_pretraining_config(BENCHMARKS / f"{name}.toml")
    used = {label for dataset in config.dataset if dataset.kind == "files" for label in dataset.organs.values()}
    assert not used & {3, 4}  # the parotid glands of the head-and-neck annotations
    assert not any("parotid" in organ for organ in config.organs)


def test_organs_have_label_values_or_names_in_annotations() -> None:
    dataset = FilesConfig(
        kind="files",
        name="hospital",
        images="ct",
        labels="ct",
        crops_per_step=1,
        organs={"liver": 6, "lung": (1, 2), "parotid_left": "parotid_left|PAROTIS LI"},
    )
    values, organs = dataset.label_values()
    assert values == {"liver": 6, "lung": (1, 2), "parotid_left": 3}
    assert [(organ.label, organ.names, organ.in_label_maps) for organ in organs] == [
        (1, (), True),
        (2, (), True),
        (6, (), True),
        (3, ("parotid_left", "PAROTIS LI"), False),
    ]
    assert organs[-1].is_named("Parotid_L")
