"""Segment a CT with the predictor of nnU-Net v2: one of the programs that `peers.py` compares.

This script needs a Python with nnunetv2 (2.8 or later) and not the packages of this project, for example

    python -m venv nnunet && nnunet/bin/pip install 'torch==2.13.0' torchvision nnunetv2

in one command, so that pip takes all three packages for the same version of PyTorch.

`--prepare` writes a folder of results as nnU-Net's training leaves it: dataset.json, plans.json, and a checkpoint of a
PlainConvUNet of 4.1 million parameters with random weights, 17 organs and the background, patches of 96x96x96, voxels
of 3 mm. Without `--prepare`, nnU-Net's predictor segments the scan from file to mask on the CPU, with its default step
of 0.5 and without mirroring: by `predict_from_files` with three processes for reading and three for writing, as the
command nnUNetv2_predict does, or with `--sequential` by `predict_from_files_sequential` in one process.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

ORGANS = 17
FEATURES = (16, 32, 64, 128, 160)  # 4.1 million parameters
_PROCESSES = 3  # default of nnUNetv2_predict for reading and for writing
_STAGES = len(FEATURES)
_RESAMPLING = {"order_z": 0, "force_separate_z": None}


def plans() -> dict[str, Any]:
    """Return plans as nnU-Net's planner writes them."""
    block = {
        "network_class_name": "dynamic_network_architectures.architectures.unet.PlainConvUNet",
        "arch_kwargs": {
            "n_stages": _STAGES,
            "features_per_stage": FEATURES,
            "conv_op": "torch.nn.modules.conv.Conv3d",
            "kernel_sizes": [[3, 3, 3]] * _STAGES,
            "strides": [[1, 1, 1]] + [[2, 2, 2]] * (_STAGES - 1),
            "n_conv_per_stage": [2] * _STAGES,
            "n_conv_per_stage_decoder": [2] * (_STAGES - 1),
            "conv_bias": True,
            "norm_op": "torch.nn.modules.instancenorm.InstanceNorm3d",
            "norm_op_kwargs": {"eps": 1e-05, "affine": True},
            "dropout_op": None,
            "dropout_op_kwargs": None,
            "nonlin": "torch.nn.LeakyReLU",
            "nonlin_kwargs": {"inplace": True},
        },
        "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
    }
    configuration = {
        "data_identifier": "random",
        "preprocessor_name": "DefaultPreprocessor",
        "batch_size": 2,
        "patch_size": [96, 96, 96],
        "median_image_size_in_voxels": [130, 160, 160],
        "spacing": [3.0, 3.0, 3.0],
        "normalization_schemes": ["CTNormalization"],
        "use_mask_for_norm": [False],
        "resampling_fn_data": "resample_data_or_seg_to_shape",
        "resampling_fn_seg": "resample_data_or_seg_to_shape",
        "resampling_fn_data_kwargs": {"is_seg": False, "order": 3, **_RESAMPLING},
        "resampling_fn_seg_kwargs": {"is_seg": True, "order": 1, **_RESAMPLING},
        "resampling_fn_probabilities": "resample_data_or_seg_to_shape",
        "resampling_fn_probabilities_kwargs": {"is_seg": False, "order": 1, **_RESAMPLING},
        "architecture": block,
        "batch_dice": True,
    }
    intensities = {"mean": 50.0, "std": 150.0, "percentile_00_5": -175.0, "percentile_99_5": 250.0}
    return {
        "dataset_name": "Dataset001_Random",
        "plans_name": "nnUNetPlans",
        "original_median_spacing_after_transp": [3.0, 0.98, 0.98],
        "original_median_shape_after_transp": [130, 512, 512],
        "image_reader_writer": "SimpleITKIO",
        "transpose_forward": [0, 1, 2],
        "transpose_backward": [0, 1, 2],
        "configurations": {"3d_fullres": configuration},
        "experiment_planner_used": "ExperimentPlanner",
        "label_manager": "LabelManager",
        "foreground_intensity_properties_per_channel": {"0": intensities},
    }


def dataset() -> dict[str, Any]:
    """Return the description of a dataset with one CT channel and all organs."""
    labels = {"background": 0, **{f"organ_{number}": number for number in range(1, ORGANS + 1)}}
    return {"channel_names": {"0": "CT"}, "labels": labels, "numTraining": 1, "file_ending": ".nii.gz"}


def prepare(results: Path) -> int:
    """Write a folder of results with random weights, and return the number of parameters of the network."""
    fold = results / "fold_0"
    fold.mkdir(parents=True)
    (results / "plans.json").write_text(json.dumps(plans()))
    (results / "dataset.json").write_text(json.dumps(dataset()))
    torch.manual_seed(0)
    manager = PlansManager(json.loads((results / "plans.json").read_text()))
    network = nnUNetTrainer.build_network_architecture(
        manager, manager.get_configuration("3d_fullres"), 1, ORGANS + 1, enable_deep_supervision=False
    )
    checkpoint = {
        "trainer_name": "nnUNetTrainer",
        "init_args": {"configuration": "3d_fullres"},
        "inference_allowed_mirroring_axes": None,
        "network_weights": network.state_dict(),
    }
    torch.save(checkpoint, fold / "checkpoint_final.pth")
    return sum(parameter.numel() for parameter in network.parameters())


def segment(scan: Path, results: Path, output: Path, *, sequential: bool) -> None:
    """Write the mask of a scan into a folder."""
    predictor = nnUNetPredictor(use_mirroring=False, device=torch.device("cpu"), allow_tqdm=False)
    predictor.initialize_from_trained_model_folder(str(results), use_folds=(0,))
    output.mkdir(parents=True, exist_ok=True)
    if sequential:
        predictor.predict_from_files_sequential([[str(scan)]], [str(output / "mask")])
    else:
        predictor.predict_from_files(
            [[str(scan)]],
            [str(output / "mask")],
            num_processes_preprocessing=_PROCESSES,
            num_processes_segmentation_export=_PROCESSES,
        )


def main() -> None:
    """Write the folder of results, or segment one scan."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, required=True, help="folder of nnU-Net's results")
    parser.add_argument("--prepare", action="store_true", help="write this folder, which must not exist")
    parser.add_argument("--scan", type=Path)
    parser.add_argument("--output", type=Path, help="folder for the mask")
    parser.add_argument("--sequential", action="store_true", help="use one process")
    arguments = parser.parse_args()
    if arguments.prepare:
        print(json.dumps({"parameters": prepare(arguments.results)}))
    elif arguments.scan and arguments.output:
        segment(arguments.scan, arguments.results, arguments.output, sequential=arguments.sequential)
    else:
        parser.error("--scan and --output are needed without --prepare")


if __name__ == "__main__":
    main()
