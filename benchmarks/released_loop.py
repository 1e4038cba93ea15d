"""Comparison of `adapt` with the training loop of the released FSEFT code: `make benchmark BENCHMARK=released_loop`.

The released code computes the whole frozen network in every training step: six windows of a scan per step (positive and
negative windows alternate), a spatial adapter on the last feature layer, AdamW at 1e-4 with one warm-up epoch and a
cosine decay over 200 epochs, soft Dice loss. This script implements that loop from the description in the paper, in
eager PyTorch, with the window of the encoder.

A few unchanged steps of the loop are timed. Their time gives the number of steps that the loop can compute in a
multiple of the time of `adapt`, encoding included. These steps then read the features of the crops from the cached
feature map instead of the network. This saves time and changes features only at the border of a crop. Both adapters are
scored by DSC on support scans that were not used for training.
"""

from __future__ import annotations

import argparse
import math
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import headneck
import numpy as np
import torch
from bench import Bench
from numpy.typing import NDArray

from fseft_edge.adaptation.adapt import head_rows
from fseft_edge.adaptation.block_sampling import SupportScan
from fseft_edge.adaptation.losses import soft_dice_loss
from fseft_edge.adaptation.training import TrainingSettings
from fseft_edge.adapters.blocks import Box, read_block
from fseft_edge.adapters.network import Adapter, AdapterSettings
from fseft_edge.runtime.encoder.bundle import EncoderBundle
from fseft_edge.runtime.encoder.feature_store import FeatureStore
from fseft_edge.runtime.encoder.session import open_session
from fseft_edge.runtime.scans.grid import Grid
from fseft_edge.runtime.scans.nifti import read_ct

_CROPS = 6
_EPOCHS = 200
_TIMED_STEPS = 3


class ReleasedLoop:
    """The training loop of the released code.

    Args:
        bundle: the encoder bundle.
        support: the annotated scans.
        images: images of the annotated scans on the grid, ``[X, Y, Z]``, scaled to 0..1.
    """

    def __init__(
        self, bundle: EncoderBundle, support: Sequence[SupportScan], images: Sequence[NDArray[np.float32]]
    ) -> None:
        self._network = bundle.network().eval()
        self._window, self._support, self._images = bundle.window, support, images
        self.adapter = Adapter(AdapterSettings("spatial", "finest"), bundle.levels, len(headneck.ORGANS))
        self.adapter.start_from_head(head_rows(bundle, headneck.ORGANS))
        self.adapter.train()
        self._optimizer = torch.optim.AdamW(self.adapter.parameters(), lr=1e-4, weight_decay=0.0)
        self._random = np.random.default_rng(0)
        self._core = Box(*((0, size) for size in self._window))
        self.steps = 0

    def step(self, *, encode: bool) -> None:
        """Compute one step with six crops of one scan, encoded by the network or read from the cached feature map."""
        epoch = len(self._support)
        done = (self.steps - epoch) / (epoch * (_EPOCHS - 1))
        for group in self._optimizer.param_groups:
            warm = (self.steps + 1) / epoch
            group["lr"] = 1e-4 * (warm if self.steps < epoch else 0.5 * (1 + math.cos(math.pi * done)))
        index = self.steps % len(self._support)
        scan, image = self._support[index], self._images[index]
        cores = [_crop(scan, self._window, self._random, positive=number % 2 == 0) for number in range(_CROPS)]
        if encode:
            crops = torch.stack([torch.from_numpy(_cut(image, core)) for core in cores])
            with torch.no_grad():
                features = self._network(crops[:, None])[0]
        else:
            features = torch.cat([read_block(scan.features, [core])[0] for core in cores])
        targets = torch.stack([scan.occupancy.block(core) for core in cores])
        logits = self.adapter([torch.nn.functional.pad(features, (2,) * 6)], self._core)
        loss = soft_dice_loss(torch.sigmoid(logits), targets).mean()
        self._optimizer.zero_grad()
        loss.backward()
        self._optimizer.step()
        self.steps += 1


def _crop(scan: SupportScan, window: tuple[int, int, int], random: np.random.Generator, *, positive: bool) -> Box:
    inside = np.concatenate([scan.occupancy.positions(organ) for organ in range(len(scan.occupancy))])
    centre = inside[random.integers(len(inside))] if positive else random.integers(0, scan.shape)
    ranges = []
    for middle, size, voxels in zip(centre, window, scan.features.padded_shape, strict=True):
        start = int(np.clip(middle - size // 2, 0, voxels - size))
        ranges.append((start, start + size))
    return Box(*ranges)


def _cut(array: NDArray[Any], box: Box) -> NDArray[Any]:
    """Return the part of an array ``[..., X, Y, Z]`` in a box, with zeros outside the array."""
    part = array[..., *(slice(low, high) for low, high in box.ranges)]
    missing = [(0, size - got) for size, got in zip(box.shape, part.shape[-3:], strict=True)]
    return np.pad(part, [(0, 0)] * (array.ndim - 3) + missing)


def main() -> None:
    """Time and score both methods, and print the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="model file of an encoder; default: the built-in encoder")
    parser.add_argument("--times", type=float, default=20, help="time of the loop as a multiple of the time of `adapt`")
    parser.add_argument("--draw", type=int, default=0)
    parser.add_argument(
        "--cases", type=int, default=8, help="number of support scans for scoring, which are not used for training"
    )
    arguments = parser.parse_args()
    bundle = headneck.encoder(arguments.model)
    cases = headneck.draw_support(5, arguments.draw)
    unseen = [case for case in headneck.split("support") if case not in cases][: arguments.cases]
    with open_session(bundle) as session, tempfile.TemporaryDirectory() as fresh:
        bench = Bench(bundle, session, FeatureStore(Path(fresh)))
        started = time.monotonic()
        ours = bench.train(bench.support(cases), AdapterSettings(), TrainingSettings(seed=arguments.draw))
        seconds = time.monotonic() - started
        images = []
        for case in cases:
            volume = read_ct(headneck.image_path(case))
            grid = Grid.of(volume, bundle.preprocessing)
            images.append(grid.section(volume, 0, grid.shape[2]))
        loop = ReleasedLoop(bundle, bench.support(cases), images)
        loop.step(encode=True)
        started = time.monotonic()
        for _ in range(_TIMED_STEPS):
            loop.step(encode=True)
        step_seconds = (time.monotonic() - started) / _TIMED_STEPS
        affordable = min(int(arguments.times * seconds / step_seconds), len(cases) * _EPOCHS)
        while loop.steps < affordable:
            loop.step(encode=False)
        scores = [[bench.score(case, adapter.eval()) for adapter in (ours.adapter, loop.adapter)] for case in unseen]
    whole = step_seconds * len(cases) * _EPOCHS
    print("| | seconds | DSC base | DSC novel |\n|---|---|---|---|")
    _row(f"adapt, encoding included ({ours.steps} steps)", seconds, [score[0] for score in scores])
    _row(f"released loop, {loop.steps} steps", loop.steps * step_seconds, [score[1] for score in scores])
    print(f"\nThe whole released loop: {step_seconds:.2f} s a step, {whole:.0f} s, {whole / seconds:.0f} times ours.")


def _row(name: str, seconds: float, scores: Sequence[dict[str, float]]) -> None:
    base, novel = (
        np.mean([score[organ.name] for score in scores for organ in group]) for group in (headneck.BASE, headneck.NOVEL)
    )
    print(f"| {name} | {seconds:.0f} | {base:.3f} | {novel:.3f} |")


if __name__ == "__main__":
    main()
