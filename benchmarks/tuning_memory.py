"""Time and memory of a step of fine-tuning: `make benchmark BENCHMARK=tuning_memory`, or this script with options.

Each method is measured in a separate process, with steps of one crop on a network with random weights, with and without
gradient checkpointing. The script prints the number of trained parameters, the processor time of a step after the first
step, and the peak memory of the process, of which the interpreter and its libraries need about 300 MiB. On a GPU
(`--device cuda`), the script also prints the peak of PyTorch's GPU memory.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from typing import Any

import numpy as np
import torch

from fseft_edge.finetuning.settings import TUNING_METHODS, TuningSettings
from fseft_edge.finetuning.training import fine_tune
from fseft_edge.pretraining.training_cases import TrainingCase
from fseft_edge.runtime.encoder.networks import build_network
from fseft_edge.runtime.errors import UsageError
from fseft_edge.runtime.scans.preprocessing import Preprocessing

NETWORKS: dict[str, dict[str, Any]] = {
    "swin_unetr": {"feature_size": 48},
    "genesis_unet": {},
    "residual_unet": {"channels": [16, 32, 64, 128, 128]},
}


def main() -> None:
    """Print one row for each method."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", choices=NETWORKS, default="swin_unetr")
    parser.add_argument("--methods", nargs="+", choices=TUNING_METHODS, default=["lora", "med-adapter", "full"])
    parser.add_argument("--decoder", choices=["frozen", "tuned", "new"], default="frozen")
    parser.add_argument("--crop", type=int, default=96)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    for method in arguments.methods:
        for checkpointing in (False, True):
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as executor:
                row = executor.submit(
                    _measured,
                    arguments.network,
                    TuningSettings(
                        method,
                        arguments.decoder if method not in {"full", "decoder"} else "tuned",
                        crops=1,
                        crop=arguments.crop,
                        device=torch.device(arguments.device),
                        checkpointing=checkpointing,
                    ),
                ).result()
            print(json.dumps(row) if arguments.json else _text(row), flush=True)


def _measured(network: str, settings: TuningSettings) -> dict[str, Any]:
    edge = settings.crop or 96
    random = np.random.default_rng(0)
    image = random.random((edge, edge, edge), dtype=np.float32).astype(np.float16)
    centres = np.full((1, 3), edge // 2)
    case = TrainingCase(image, (image > 0.9).astype(np.int32), np.array([True]), (centres, centres))
    torch.manual_seed(0)
    try:
        taken = []
        for steps in (1, 1, 2):  # the first run includes one-time initialisation
            encoder = build_network(network, **NETWORKS[network])
            started = time.process_time()
            tuned = fine_tune(
                encoder,
                [case],
                [None],
                replace(settings, steps=steps),
                preprocessing=Preprocessing(),
                window=(edge, edge, edge),
            )
            taken.append(time.process_time() - started)
    except UsageError as error:
        return {"method": settings.name, "refused": error.message}
    on_gpu = torch.cuda.max_memory_allocated() / 2**20 if settings.device.type == "cuda" else None
    return {
        "method": settings.name,
        "checkpointing": settings.checkpointing,
        "parameters": tuned.parameters,
        "bfloat16": tuned.bfloat16,
        "seconds_a_step": round(taken[2] - taken[1], 1),
        "peak_mib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
        "gpu_mib": on_gpu and round(on_gpu),
    }


def _text(row: dict[str, Any]) -> str:
    return "  ".join(f"{key} {value}" for key, value in row.items() if value is not None)


if __name__ == "__main__":
    main()
