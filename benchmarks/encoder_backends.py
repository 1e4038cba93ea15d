"""Time and numerical error of the encoder backends on one window: `make benchmark BENCHMARK=encoder_backends`.

The order of backends of ``auto`` is based on these times (``runtime/encoder/backend_choice.py``). All backends run in
one process and take turns, so that other work on the machine affects all of them. The result is the processor time of
the fastest round of each backend, on one thread, and its ratio to plain PyTorch. The weights are random, because the
speed does not depend on the weights.

    python benchmarks/encoder_backends.py                                      the compact encoder, window 96^3
    python benchmarks/encoder_backends.py --architecture swin_unetr --window 64
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import torch
from pydantic import JsonValue
from torch import Tensor

from fseft_edge.export.onnx_graph import write_graph
from fseft_edge.export.parity import relative_errors
from fseft_edge.runtime.encoder.backend_choice import backend_choices
from fseft_edge.runtime.encoder.bundle import BundleContents, EncoderBundle
from fseft_edge.runtime.encoder.networks import build_network
from fseft_edge.runtime.encoder.session import open_session
from fseft_edge.runtime.scans.preprocessing import Preprocessing

SETTINGS: dict[str, dict[str, JsonValue]] = {
    "residual_unet": {"channels": [16, 32, 64, 128, 128]},
    "swin_unetr": {"feature_size": 48},
}


def write_bundle(folder: Path, architecture: str, window: tuple[int, int, int]) -> EncoderBundle:
    """Return a bundle of a network with random weights."""
    torch.manual_seed(0)
    network = build_network(architecture, **SETTINGS[architecture]).eval()
    write_graph(network, window, folder / "encoder.onnx")
    contents = BundleContents(
        name=architecture,
        architecture=architecture,
        settings=SETTINGS[architecture],
        preprocessing=Preprocessing(),
        window=window,
        organs=(),
        checkpoint_sha256="",
        tools={},
        parity={},
        network=network,
        head_weight=torch.zeros(0, network.levels[0].channels),
        head_bias=torch.zeros(0),
        graph=folder / "encoder.onnx",
    )
    return EncoderBundle.write(folder / "random.encoder", contents)


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--architecture", choices=sorted(SETTINGS), default="residual_unet")
    parser.add_argument("--window", type=int, default=96, help="edge of the window in voxels")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    window = (arguments.window,) * 3
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack, torch.no_grad():
        bundle = write_bundle(Path(folder), arguments.architecture, window)
        plain = bundle.network()
        competitors: dict[str, Callable[[Tensor], list[Tensor]]] = {"plain PyTorch": plain}
        for choice in backend_choices(bundle, torch.device("cpu")):
            session = stack.enter_context(open_session(bundle, "cpu", choice.backend, 1, choice.precision))
            competitors[f"{choice.backend} {choice.precision}"] = session.encode
        windows = torch.rand(1, 1, *window)
        expected = plain(windows)
        errors = {name: max(relative_errors(expected, encode(windows))) for name, encode in competitors.items()}
        seconds = dict.fromkeys(competitors, float("inf"))
        for _ in range(arguments.rounds):
            for name, encode in competitors.items():
                started = time.process_time()
                encode(windows)
                seconds[name] = min(seconds[name], time.process_time() - started)
    print(f"{arguments.architecture}, one window of {arguments.window}^3, one thread, {arguments.rounds} rounds")
    for name, fastest in seconds.items():
        ratio = seconds["plain PyTorch"] / fastest
        print(f"{name:20s} {fastest:7.2f} s  {ratio:5.2f} x plain  largest relative error {errors[name]:.1e}")


if __name__ == "__main__":
    main()
