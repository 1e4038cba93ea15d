"""Merging of a tuning and its encoder into a new encoder bundle and an adapter for this bundle."""

from __future__ import annotations

import copy
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from pydantic import JsonValue
from torch import Tensor

from fseft_edge.adapters.described_tensors import does_not_fit
from fseft_edge.adapters.file import AdapterDescription, AdapterFile, stored_settings, write_adapter
from fseft_edge.adapters.find_encoder import find_encoder
from fseft_edge.adapters.network import Adapter
from fseft_edge.export.built_in import open_encoder
from fseft_edge.export.checkpoints import ModelDescription, ModelFile
from fseft_edge.export.export import write_encoder
from fseft_edge.export.zoo import LoadedModel
from fseft_edge.finetuning.folding import fold_sums
from fseft_edge.finetuning.settings import TuningSettings
from fseft_edge.finetuning.training import TunedNetwork
from fseft_edge.finetuning.tuning_file import TuningFile, read_tuning
from fseft_edge.runtime.encoder.bundle import BundleContents, EncoderBundle
from fseft_edge.runtime.encoder.networks.base import FeatureNetwork
from fseft_edge.runtime.encoder.networks.inserts import INSERTS
from fseft_edge.runtime.errors import UsageError
from fseft_edge.runtime.system.atomic import check_writable


@dataclass(frozen=True, eq=False)
class Merged:
    """The files that :func:`merge` wrote.

    Attributes:
        bundle: the new encoder bundle.
        adapter: path of the adapter file that belongs to the new encoder.
    """

    bundle: EncoderBundle
    adapter: Path


def merge(
    tuning: str | Path,
    output: str | Path,
    *,
    encoder: str | Path | None = None,
    onnx: bool = True,
    parity_volumes: Sequence[Path] = (),
) -> Merged:
    """Write a fine-tuned encoder as a new bundle and its classifier as ``NAME.adapter``, like ``fseft-edge merge``.

    Low-rank sums and the parallel 1x1x1 convolutions of the method ``conv-adapter`` are folded into the weights, so
    they do not slow down inference. Inserted modules become part of the network.

    Args:
        tuning: path of the tuning file.
        output: path of the bundle to write, ``NAME.encoder``; neither this path nor ``NAME.adapter`` may exist.
        encoder: path of the encoder that was fine-tuned; None searches the folder of the tuning and the working folder.
        onnx: True also writes ONNX graphs (see :func:`fseft_edge.export.export.export_encoder`).
        parity_volumes: CTs on which the backends are compared with PyTorch (see
            :func:`fseft_edge.export.export.export_encoder`).

    Raises:
        AdapterError: the tuning is damaged or belongs to another encoder.
        EncoderBundleError: the encoder bundle is damaged.
        UsageError: ``output`` does not end in ``.encoder``, or ``output`` or the adapter file already exists.
        OutOfSpaceError: the disk is full or cannot be written.
    """
    tuning, output = Path(tuning), Path(output)
    if output.suffix != ".encoder":
        raise UsageError(
            f"--output is {output}, which does not end in .encoder.", remedy="Set --output to NAME.encoder."
        )
    adapter = output.with_suffix(".adapter")
    _check_free(output, adapter)
    check_writable(output)
    check_writable(adapter)
    file = read_tuning(tuning)
    base = open_encoder(encoder or find_encoder(tuning, file.description.encoder_id, file.description.encoder_name))
    file.check_encoder(base, tuning)
    network = tuned_network(file, base, tuning)
    described = ModelDescription(
        name=output.stem,
        architecture=base.manifest.architecture,
        settings=_settings(base, file.description.method),
        preprocessing=base.preprocessing,
        window=base.window,
        organs=(),
    )
    folded = folded_encoder(network.encoder)
    loaded = LoadedModel(ModelFile(described, folded.state_dict(), *_no_classifier(folded)), tuning)
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".merge-", dir=output.parent) as folder:
        made = Path(folder) / output.name
        write_encoder(
            loaded,
            made,
            onnx=onnx,
            parity_volumes=parity_volumes,
            classify=network.head.log_odds,
            tiling=None if base.whole_scan else "windows",
        )
        _check_free(output, adapter)  # another process may have written these files in the meantime
        made.rename(output)
    try:
        bundle = EncoderBundle.open(output)
        write_adapter(adapter, _adapter(file, network.head, bundle))
    except BaseException:
        shutil.rmtree(output, ignore_errors=True)  # a bundle without its adapter would block the next attempt
        raise
    return Merged(bundle, adapter)


def _check_free(*paths: Path) -> None:
    for path in paths:
        if path.exists():
            raise UsageError(f"{path} already exists.", remedy="Choose another --output, or delete this path first.")


def tuned_network(file: TuningFile, base: EncoderBundle, path: Path) -> TunedNetwork:
    """Return the network with its state at the end of fine-tuning.

    Args:
        file: the tuning.
        base: the encoder that was fine-tuned.
        path: path of the tuning file, for messages.

    Raises:
        AdapterError: the tensors do not match the description of the tuning.
    """
    described = file.description
    settings = TuningSettings(
        described.method, described.decoder, described.levels, seed=described.seed, rank=described.rank
    )
    network = TunedNetwork(base.network(), len(described.organs), settings)
    expected = {name: value.shape for name, value in network.learned().items()}
    if expected != {name: value.shape for name, value in file.tensors.items()}:
        raise does_not_fit(path)
    network.load_state_dict(file.tensors, strict=False)
    return network.eval()


def folded_encoder(encoder: FeatureNetwork) -> FeatureNetwork:
    """Return a copy of an encoder with all sums folded into plain weights; its output does not change."""
    folded = copy.deepcopy(encoder)
    fold_sums(folded)
    return folded.eval()


def plain_bundle(network: TunedNetwork, base: EncoderBundle, settings: TuningSettings, path: Path) -> EncoderBundle:
    """Write a fine-tuned encoder as a bundle without graphs, for the PyTorch backend only, and return the bundle.

    Args:
        network: the network after fine-tuning.
        base: the encoder bundle before fine-tuning.
        settings: settings of the fine-tuning.
        path: path of the bundle to write.
    """
    folded = folded_encoder(network.encoder)
    weight, bias = _no_classifier(folded)
    contents = BundleContents(
        name=base.manifest.name,
        architecture=base.manifest.architecture,
        settings=_settings(base, settings.method),
        preprocessing=base.preprocessing,
        window=base.window,
        organs=(),
        checkpoint_sha256=base.manifest.checkpoint_sha256,
        tools={},
        parity={},
        network=folded,
        head_weight=weight,
        head_bias=bias,
        graph=None,
        whole_scan=folded.whole_scan if base.whole_scan else None,
    )
    return EncoderBundle.write(path, contents)


def _settings(base: EncoderBundle, method: str) -> dict[str, JsonValue]:
    """Return the settings of the architecture, including the modules that a method inserts."""
    return {**base.manifest.settings, "inserts": method} if method in INSERTS else base.manifest.settings


def _no_classifier(encoder: FeatureNetwork) -> tuple[Tensor, Tensor]:
    """Return weight and bias of a head without organs; the trained classifier is in the adapter."""
    return torch.zeros(0, encoder.levels[0].channels), torch.zeros(0)


def _adapter(file: TuningFile, adapter: Adapter, bundle: EncoderBundle) -> AdapterFile:
    """Return the tuning's classifier as an adapter, with the description of the tuning."""
    tuned = file.description
    description = AdapterDescription(
        support_annotations=tuned.support_annotations,
        support_groups=tuned.support_groups,
        encoder_id=bundle.encoder_id,
        encoder_name=bundle.manifest.name,
        levels=tuple((level.stride, level.channels) for level in bundle.levels),
        settings=stored_settings(adapter.settings),
        organs=tuned.organs,
        shots=tuned.shots,
        seed=tuned.seed,
        steps=tuned.steps,
        losses=tuned.losses,
        bfloat16=tuned.bfloat16,
    )
    return AdapterFile(description, adapter)
