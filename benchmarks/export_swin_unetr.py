"""Export of FSEFT's SwinUNETR (feature size 48, window 96^3): `make benchmark BENCHMARK=export_swin_unetr`.

Prints the time of the export, the size of the bundle, the error of ONNX Runtime relative to PyTorch, and the peak
memory. Without ``--checkpoint``, the weights are random, in a file with the layout of the published checkpoint.
"""

from __future__ import annotations

import argparse
import hashlib
import resource
import tempfile
import time
from pathlib import Path

import torch

from fseft_edge.export.export import export_encoder
from fseft_edge.export.zoo import MODELS
from fseft_edge.runtime.encoder.networks import build_network


def write_random_checkpoint(path: Path) -> None:
    """Write a checkpoint with the names and shapes of the published checkpoint."""
    description = MODELS["fseft"].published
    assert description is not None  # noqa: S101 - a published model has a description
    torch.manual_seed(0)
    network = build_network(description.architecture, **description.settings)
    head = torch.nn.Conv3d(network.levels[0].channels, len(description.organs), 1)
    torch.save(
        {**network.state_dict(), **{f"classifier.{key}": value for key, value in head.state_dict().items()}}, path
    )


def main() -> None:
    """Export and print the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, help="the published file fseft.pth")
    parser.add_argument(
        "--parity-ct", type=Path, action="append", default=[], help="CT on which ONNX Runtime is compared with PyTorch"
    )
    parser.add_argument("--twice", action="store_true", help="export a second time and compare the bytes")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = arguments.checkpoint or Path(folder) / "random.pth"
        if arguments.checkpoint is None:
            write_random_checkpoint(checkpoint)
        graphs = []
        for number in range(1 + arguments.twice):
            started, busy = time.monotonic(), time.process_time()
            bundle = export_encoder(
                checkpoint,
                model="fseft",
                output=Path(folder) / f"fseft_{number}.encoder",
                parity_volumes=arguments.parity_ct,
            )
            seconds, busy = time.monotonic() - started, time.process_time() - busy
            assert bundle.graph is not None  # noqa: S101 - the export writes a graph
            graphs.append(hashlib.sha256(bundle.graph.read_bytes()).hexdigest())
            report = bundle.manifest.parity["onnxruntime"]
            print(
                f"export with parity: {seconds:.0f} s "
                f"({busy:.0f} s of processor time, {torch.get_num_threads()} threads)"
            )
            print(f"ONNX graph: {bundle.graph.stat().st_size / 1e6:.1f} MB")
            errors = ", ".join(f"{error:.1e}" for error in report.relative_error)
            print(f"relative error per level on {report.windows} windows ({report.source}): {errors}")
        if arguments.twice:
            print("the second graph has the same bytes" if graphs[0] == graphs[1] else "the second graph DIFFERS")
    print(f"peak memory: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6:.1f} GB")


if __name__ == "__main__":
    main()
