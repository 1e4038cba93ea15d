"""Adaptation against the released method's loop: `make benchmark BENCHMARK=released_loop`.

The released FSEFT code adapts by running the whole frozen network in every step: six windows a scan and step (positive
and negative in turn), the spatial adapter on the last feature layer, AdamW at 1e-4 with one warm-up epoch and a cosine
over 200 epochs, soft Dice. Its loop is written here from the paper's description, in eager PyTorch, with the encoder's
own window. It is given a multiple of the time that `adapt` needs (encoding included); what each has reached then is
scored by DSC on support scans that neither has seen. A step of the loop is also timed, and multiplied by all epochs.
"""

from __future__ import annotations

import argparse
import math
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import headneck
import numpy as np
import torch
from kshot import Bench

from fseft_edge.adaptation import describe, head_rows, support_scan
from fseft_edge.adapter_training import SupportScan, TrainedAdapter, TrainingSettings
from fseft_edge.adapters import Adapter, AdapterSettings
from fseft_edge.blocks import Box
from fseft_edge.losses import soft_dice_loss
from fseft_edge.runtime.bundle import EncoderBundle
from fseft_edge.runtime.feature_store import FeatureStore
from fseft_edge.runtime.grid import Grid
from fseft_edge.runtime.nifti import read_ct, read_label_map
from fseft_edge.runtime.session import open_session

_CROPS = 6
_EPOCHS = 200


def released_loop(
    bundle: EncoderBundle, support: Sequence[SupportScan], images: Sequence[np.ndarray], seconds: float
) -> tuple[Adapter, int, float]:
    """Train as the released code does, for so many seconds.

    Returns:
        The adapter, the steps done, and the seconds of a step.
    """
    network = bundle.network().eval()
    adapter = Adapter(AdapterSettings("spatial", "last"), bundle.levels, len(headneck.ORGANS))
    adapter.start_from_head(head_rows(bundle, headneck.ORGANS))
    adapter.train()
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=1e-4, weight_decay=0.0)
    random = np.random.default_rng(0)
    window = bundle.window
    core = Box(*((0, size) for size in window))
    started, steps = time.monotonic(), 0
    epoch = len(support)
    while time.monotonic() - started < seconds:
        done = (steps - epoch) / (epoch * (_EPOCHS - 1))
        for group in optimizer.param_groups:
            group["lr"] = 1e-4 * ((steps + 1) / epoch if steps < epoch else 0.5 * (1 + math.cos(math.pi * done)))
        index = steps % len(support)
        crops, targets = zip(
            *(
                _crop(images[index], support[index].occupancy, window, random, positive=number % 2 == 0)
                for number in range(_CROPS)
            ),
            strict=True,
        )
        with torch.no_grad():
            features = network(torch.stack(crops)[:, None])[0]
        padded = torch.nn.functional.pad(features, (2,) * 6)
        loss = soft_dice_loss(torch.sigmoid(adapter([padded], core)), torch.stack(targets)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        steps += 1
    return adapter.eval(), steps, (time.monotonic() - started) / steps


def _crop(
    image: np.ndarray,
    occupancy: np.ndarray,
    window: tuple[int, int, int],
    random: np.random.Generator,
    *,
    positive: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    pads = [(0, max(0, size - n)) for size, n in zip(window, image.shape, strict=True)]
    image, occupancy = np.pad(image, pads), np.pad(occupancy, [(0, 0), *pads])
    inside = np.argwhere(occupancy.max(0) > 127)
    centre = inside[random.integers(len(inside))] if positive else random.integers(0, image.shape)
    starts = [int(np.clip(c - size // 2, 0, n - size)) for c, size, n in zip(centre, window, image.shape, strict=True)]
    where = tuple(slice(start, start + size) for start, size in zip(starts, window, strict=True))
    return torch.from_numpy(image[where]), torch.from_numpy(occupancy[:, *where].astype(np.float32) / 255)


def main() -> None:
    """Time and score both, and print what came out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="model file of another encoder than the built-in one")
    parser.add_argument("--times", type=float, default=20, help="the loop gets this multiple of our time")
    parser.add_argument("--draw", type=int, default=0)
    parser.add_argument("--cases", type=int, default=8, help="unseen support scans to score on")
    arguments = parser.parse_args()
    bundle = headneck.encoder(arguments.model)
    cases = headneck.draw_support(5, arguments.draw)
    unseen = [case for case in headneck.split("support") if case not in cases][: arguments.cases]
    with open_session(bundle) as session, tempfile.TemporaryDirectory() as fresh:
        bench = Bench(bundle, session, FeatureStore(Path(fresh)))
        started = time.monotonic()
        ours = bench.train(cases, AdapterSettings(), TrainingSettings(seed=arguments.draw))
        seconds = time.monotonic() - started
        support, images = [], []
        for case in cases:
            volume, labels = read_ct(headneck.image_path(case)), read_label_map(headneck.label_path(case))
            grid = Grid.of(volume, bundle.preprocessing)
            images.append(grid.section(volume, 0, grid.shape[2]))
            support.append(
                support_scan(volume, labels, headneck.ORGANS, bundle=bundle, session=session, store=bench.store)
            )
        adapter, steps, step_seconds = released_loop(bundle, support, images, arguments.times * seconds)
        theirs = describe(
            TrainedAdapter(adapter, (), steps, bfloat16=False), support, headneck.ORGANS, bundle=bundle, seed=0
        )
        scores = [bench.score(case, [ours, theirs]) for case in unseen]
    whole = step_seconds * len(cases) * _EPOCHS
    print("| | seconds | DSC base | DSC novel |\n|---|---|---|---|")
    _row(f"adapt, encoding included ({ours.description.steps} steps)", seconds, [score[0] for score in scores])
    _row(f"released loop, stopped after {steps} steps", steps * step_seconds, [score[1] for score in scores])
    print(f"\nThe whole released loop: {step_seconds:.2f} s a step, {whole:.0f} s, {whole / seconds:.0f} times ours.")


def _row(name: str, seconds: float, scores: Sequence[dict[str, float]]) -> None:
    base, novel = (
        np.mean([score[organ.name] for score in scores for organ in group]) for group in (headneck.BASE, headneck.NOVEL)
    )
    print(f"| {name} | {seconds:.0f} | {base:.3f} | {novel:.3f} |")


if __name__ == "__main__":
    main()
