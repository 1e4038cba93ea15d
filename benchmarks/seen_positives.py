"""SwinUNETR-48 on cached features compared with the released loop: `make benchmark BENCHMARK=seen_positives`.

The released loop computes the whole network on six crops of 96^3 voxels, three of them positive, for each scan and
epoch, for 200 epochs. The loop of fseft-edge uses an equal number of positive blocks. The weights are random, because
they do not affect the time. The script times samples in one run and multiplies the times: a window through the network,
a crop through the spatial adapter forwards and backwards, and a block through the spatial adapter forwards and
backwards.
"""

from __future__ import annotations

import argparse
import math
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import headneck
import numpy as np
import torch
from export_swin_unetr import write_random_checkpoint

from fseft_edge.adaptation.losses import soft_dice_loss
from fseft_edge.adaptation.support_set import load_support
from fseft_edge.adaptation.training import TrainingSettings, train_adapter
from fseft_edge.adapters.blocks import Box
from fseft_edge.adapters.network import Adapter, AdapterSettings
from fseft_edge.export.export import export_encoder
from fseft_edge.runtime.encoder.encoding import OVERLAP
from fseft_edge.runtime.encoder.feature_store import open_store
from fseft_edge.runtime.encoder.session import open_session
from fseft_edge.runtime.encoder.windows import WindowLayout
from fseft_edge.runtime.scans.grid import Grid
from fseft_edge.runtime.scans.nifti import read_ct, read_label_map, write_ct
from fseft_edge.runtime.scans.volume import LabelMap, Volume

_CROPS, _POSITIVES, _EPOCHS = 6, 3, 200
_BLOCKS = 120


def main() -> None:
    """Time the samples and print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shots", type=int, default=5)
    arguments = parser.parse_args()
    cases = headneck.draw_support(arguments.shots, 0)
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = Path(folder) / "random.pth"
        write_random_checkpoint(checkpoint)
        bundle = export_encoder(checkpoint, model="fseft", output=Path(folder) / "fseft.encoder", onnx=False)
        coarsest = max(level.stride for level in bundle.levels)
        windows = 0
        for case in cases:
            shape = Grid.of(read_ct(headneck.image_path(case)), bundle.preprocessing).shape
            windows += math.prod(map(len, WindowLayout.plan(shape, bundle.window, coarsest, OVERLAP).origins))
        image, labels = _one_window(cases[0], bundle.preprocessing.spacing, bundle.window, Path(folder))
        with open_session(bundle, backend="torch") as session, open_store(None, None) as store:
            crop = torch.zeros(1, 1, *bundle.window)
            window_seconds = _seconds(lambda: session.encode(crop))
            (scan,) = load_support([(image, labels)], headneck.ORGANS, bundle=bundle, session=session, store=store)
        network = bundle.network().eval()
        with torch.no_grad():
            network_seconds = _seconds(lambda: network(crop))
        adapter = Adapter(AdapterSettings("spatial", "finest"), bundle.levels, len(headneck.ORGANS)).train()
        crop_seconds = _seconds(lambda: _crop_step(adapter, bundle.window))
        training = TrainingSettings(blocks=_BLOCKS, epochs=_BLOCKS // TrainingSettings.blocks_per_epoch)
        block_seconds = {}
        for levels in ("finest", "all"):
            settings = replace(AdapterSettings(), levels=levels)
            started = time.monotonic()
            train_adapter(settings, [scan], head_rows=[None] * len(headneck.ORGANS), training=training)
            block_seconds[levels] = (time.monotonic() - started) / _BLOCKS
    steps = _EPOCHS * arguments.shots
    loop = steps * _CROPS * (network_seconds + crop_seconds)
    encoding = windows * window_seconds
    print(f"a window: {network_seconds:.1f} s in eager PyTorch, {window_seconds:.1f} s in our session")
    print(f"released loop: {steps} steps of {_CROPS} crops, {loop:.0f} s")
    print(f"our encoding: {windows} windows of {arguments.shots} scans, {encoding:.0f} s")
    for reads, seconds in block_seconds.items():
        ours = steps * 2 * _POSITIVES * seconds
        print(
            f"spatial on {reads}: {steps * 2 * _POSITIVES} blocks, {ours:.0f} s; "
            f"the loop takes {loop / ours:.0f} times as long, {loop / (ours + encoding):.0f} times with our encoding"
        )


def _seconds(work: Callable[[], object]) -> float:
    """Return the median time of three runs, after one warm-up run."""
    work()
    times = []
    for _ in range(3):
        started = time.monotonic()
        work()
        times.append(time.monotonic() - started)
    return statistics.median(times)


def _crop_step(adapter: Adapter, window: tuple[int, int, int]) -> None:
    features = torch.zeros(1, adapter.levels[0].channels, *(size + 4 for size in window))
    logits = adapter([features], Box(*((0, size) for size in window)))
    soft_dice_loss(torch.sigmoid(logits), torch.zeros_like(logits)).mean().backward()


def _one_window(
    case: str, spacing: tuple[float, float, float], window: tuple[int, int, int], folder: Path
) -> tuple[Path, LabelMap]:
    """Return the part of a case around its organs, in the size of one window; the CT is written to a file."""
    volume, labels = read_ct(headneck.image_path(case)), read_label_map(headneck.label_path(case))
    extent = [int(size * step / own) - 1 for size, step, own in zip(window, spacing, volume.spacing, strict=True)]
    middle = np.argwhere(labels.array > 0).mean(0).astype(int)
    part = tuple(slice(max(0, m - n // 2), max(0, m - n // 2) + n) for m, n in zip(middle, extent, strict=True))
    path = folder / "part.nii.gz"
    write_ct(path, Volume(volume.array[part], volume.affine, volume.slope, volume.intercept))
    return path, LabelMap(labels.array[part], labels.affine)


if __name__ == "__main__":
    main()
