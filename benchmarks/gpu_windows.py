"""Seconds of one window in plain PyTorch, which needs no other package: a part of `gpu_day.py`.

The networks have random weights. A CPU computes in float32. A GPU also computes in float16 by `torch.autocast`, which
is not the mixed precision of the encoder bundles; TF32 is off.
"""

from __future__ import annotations

import argparse
import json
import time

import torch

from fseft_edge.runtime.encoder.networks import build_network
from fseft_edge.runtime.system.gpu_arithmetic import exact_float32

SETTINGS = {"residual_unet": {"channels": [16, 32, 64, 128, 128]}, "swin_unetr": {"feature_size": 48}}


def seconds(architecture: str, edge: int, device: torch.device, repeats: int, number: torch.dtype) -> float:
    """Return the fastest time of a window of ``edge`` voxels along each side, after one window as a warm-up."""
    torch.manual_seed(0)
    network = build_network(architecture, **SETTINGS[architecture]).eval().to(device)
    window = torch.rand(1, 1, edge, edge, edge, device=device)
    taken = []
    with torch.inference_mode(), torch.autocast(device.type, number, enabled=number != torch.float32), exact_float32():
        for _ in range(1 + repeats):
            started = time.monotonic()
            network(window)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            taken.append(time.monotonic() - started)
    return min(taken[1:])


def main() -> None:
    """Print the results as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--architecture", choices=sorted(SETTINGS), required=True)
    parser.add_argument("--window", type=int, default=96, help="edge of the window in voxels")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    result: dict[str, float] = {}
    for number in (torch.float32, torch.float16) if device.type == "cuda" else (torch.float32,):
        taken = seconds(arguments.architecture, arguments.window, device, arguments.repeats, number)
        result[f"{str(number).removeprefix('torch.')}, s"] = round(taken, 5)
    if device.type == "cuda":
        result["peak GPU MiB"] = round(torch.cuda.max_memory_allocated(device) / 2**20)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
