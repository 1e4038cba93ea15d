"""A tiny encoder with random weights in an encoder bundle, adapters for it, and phantoms on its grid as NIfTI files.

The features are arbitrary but informative functions of the CT. They are fast to compute and equal in every run.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fseft_edge.adapters.file import AdapterDescription, AdapterFile, AdapterOrgan, stored_settings, write_adapter
from fseft_edge.adapters.network import Adapter, AdapterSettings
from fseft_edge.phantom import ORGANS, Phantom, phantom
from fseft_edge.runtime.encoder.bundle import BundleContents, EncoderBundle
from fseft_edge.runtime.encoder.networks.residual_unet import ResidualUNet
from fseft_edge.runtime.scans.nifti import write_ct, write_label_map
from fseft_edge.runtime.scans.preprocessing import Preprocessing
from fseft_edge.runtime.scans.volume import LabelMap

CHANNELS = (4, 6, 8, 8)
WINDOW = (32, 32, 32)
SPACING = (6.0, 6.0, 6.0)
SHAPE = (64, 48, 56)
HEAD_ORGANS = ("liver", "left_lung")
"""The organs of the head of the tiny encoder. The rows of the head are random."""


def label_of(organ: str) -> int:
    """Return the label value of an organ in the phantoms."""
    return ORGANS.index(organ) + 1


@functools.cache
def scan(seed: int) -> Phantom:
    """Return a phantom of a trunk with the voxel spacing of the encoder."""
    return phantom(seed, shape=SHAPE, spacing=SPACING)


def write_tiny_encoder(
    path: Path,
    *,
    seed: int = 0,
    graph: Path | None = None,
    architecture: str = "residual_unet",
    whole_scan: bool = False,
) -> EncoderBundle:
    """Write an encoder bundle. Another seed gives another encoder."""
    network, _ = _calibrated(seed)
    generator = torch.Generator().manual_seed(seed)
    contents = BundleContents(
        name="tiny",
        architecture=architecture,
        settings={"channels": list(CHANNELS)},
        preprocessing=Preprocessing(spacing=SPACING),
        window=WINDOW,
        organs=HEAD_ORGANS,
        checkpoint_sha256="0" * 64,
        tools={},
        parity={},
        network=network,
        head_weight=torch.randn(len(HEAD_ORGANS), CHANNELS[0], generator=generator),
        head_bias=torch.tensor([-0.25, 0.125]),
        graph=graph,
        whole_scan=network.whole_scan if whole_scan else None,
    )
    return EncoderBundle.write(path, contents)


def write_random_adapter(
    path: Path,
    bundle: EncoderBundle,
    organs: Sequence[str] = ("liver",),
    *,
    seed: int = 0,
    settings: AdapterSettings | None = None,
    support_volumes_ml: tuple[float, ...] = (),
    deviation: float = 1.0,
) -> AdapterFile:
    """Write an adapter with random weights. The mask of every organ covers about half of the scan.

    A smaller standard deviation of the weights, ``deviation``, gives a smaller amplification of rounding errors.
    """
    settings = settings or AdapterSettings(method="linear", levels="finest")
    generator = torch.Generator().manual_seed(seed)
    adapter = Adapter(settings, bundle.levels, len(organs))
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.copy_(deviation * torch.randn(parameter.shape, generator=generator))
        adapter.direct.bias.zero_()
        _, pyramid = _calibrated(0)
        for level in range(len(adapter.levels)):
            values = pyramid[level][0].flatten(1)
            adapter.mean(level).copy_(values.mean(1))
            adapter.scale(level).copy_(values.std(1).clamp_min(1e-3))
    description = AdapterDescription(
        encoder_id=bundle.encoder_id,
        encoder_name=bundle.manifest.name,
        levels=tuple((level.stride, level.channels) for level in bundle.levels),
        settings=stored_settings(settings),
        organs=tuple(
            AdapterOrgan(name=organ, label=number, support_volumes_ml=support_volumes_ml)
            for number, organ in enumerate(organs, start=1)
        ),
        shots=0,
        seed=seed,
        steps=0,
        losses=(),
        bfloat16=False,
    )
    file = AdapterFile(description, adapter.eval())
    write_adapter(path, file)
    return file


def write_case(root: Path, name: str, seed: int, *, only: Sequence[str] | None = None) -> tuple[Path, Path]:
    """Write a phantom and its annotation as ``root/images/name`` and ``root/labels/name``; return both paths.

    Args:
        root: folder of the folders ``images`` and ``labels``.
        name: case name, without suffix.
        seed: seed of the phantom; another seed is another patient.
        only: organs to annotate; None annotates all organs.
    """
    patient = scan(seed)
    labels: NDArray[np.unsignedinteger] = patient.labels.array
    if only is not None:
        labels = np.where(np.isin(labels, [label_of(organ) for organ in only]), labels, np.uint8(0))
    image, annotation = (root / part / f"{name}.nii.gz" for part in ("images", "labels"))
    write_ct(image, patient.volume)
    write_label_map(annotation, LabelMap(labels, patient.labels.affine))
    return image, annotation


@functools.cache
def _calibrated(seed: int) -> tuple[ResidualUNet, list[Tensor]]:
    """Return a network whose norms have the statistics of one window, and the features of that window."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = ResidualUNet(CHANNELS)
    x, y, z = (slice((size - edge) // 2, (size - edge) // 2 + edge) for size, edge in zip(SHAPE, WINDOW, strict=True))
    low, high = Preprocessing().hu_window
    window = torch.from_numpy((scan(1).volume.array[x, y, z].astype(np.float32) - low) / (high - low)).clamp(0, 1)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm3d):
            module.momentum = 1.0
    with torch.no_grad():
        network.train()(window[None, None])
        return network.eval(), network(window[None, None])
