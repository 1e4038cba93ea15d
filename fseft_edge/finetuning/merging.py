"""A tuning and its encoder become an encoder bundle of their own, and the adapter that goes with it."""

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
    """What :func:`merge` wrote.

    Attributes:
        bundle: the new encoder.
        adapter: the file of the adapter that segments with it.
    """

    bundle: EncoderBundle
    adapter: Path


def merge(
    tuning: Path,
    output: Path,
    *,
    encoder: Path | None = None,
    onnx: bool = True,
    parity_volumes: Sequence[Path] = (),
) -> Merged:
    """Write a fine-tuned encoder as a bundle, and beside it ``NAME.adapter``; the twin of ``fseft-edge merge``.

    Low-rank sums and convolution adapters fold into the weights, so that inference pays nothing for them. Inserted
    modules become part of the network.

    Args:
        tuning: the file that fine-tuning wrote.
        output: the bundle to write, ``NAME.encoder``; nothing may be there yet, nor at ``NAME.adapter``.
        encoder: the encoder that was fine-tuned; None looks beside the tuning and in the working folder.
        onnx: see :func:`fseft_edge.export.export.export_encoder`.
        parity_volumes: likewise.

    Raises:
        AdapterError: the tuning is damaged, or of another encoder.
        EncoderBundleError: the encoder is damaged.
        UsageError: ``output`` does not end in ``.encoder``, or something is there or at the adapter's place already.
        OutOfSpaceError: the disk is full or not writable.
    """
    if output.suffix != ".encoder":
        raise UsageError(f"{output} is no name of an encoder bundle.", remedy="Call --output NAME.encoder.")
    adapter = output.with_suffix(".adapter")
    _check_free(output, adapter)
    check_writable(output)
    check_writable(adapter)
    file = read_tuning(tuning)
    base = EncoderBundle.open(encoder or find_encoder(tuning, file.description.encoder_id))
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
        write_encoder(loaded, made, onnx=onnx, parity_volumes=parity_volumes, classify=network.head.log_odds)
        _check_free(output, adapter)  # another process may have been faster
        made.rename(output)
    try:
        bundle = EncoderBundle.open(output)
        write_adapter(adapter, _adapter(file, network.head, bundle))
    except BaseException:
        shutil.rmtree(output, ignore_errors=True)  # one without the other would only be in the way of the next try
        raise
    return Merged(bundle, adapter)


def _check_free(*paths: Path) -> None:
    for path in paths:
        if path.exists():
            raise UsageError(f"{path} already exists.", remedy="Choose another --output, or remove it first.")


def tuned_network(file: TuningFile, base: EncoderBundle, path: Path) -> TunedNetwork:
    """Return the encoder with a tuning applied, as it was when fine-tuning ended.

    Args:
        file: the tuning.
        base: the encoder that was fine-tuned.
        path: of the tuning, for messages.

    Raises:
        AdapterError: the tensors are not those that the description says.
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
    """Return a copy of an encoder in which whatever can be is folded into ordinary weights; it computes the same."""
    folded = copy.deepcopy(encoder)
    fold_sums(folded)
    return folded.eval()


def plain_bundle(network: TunedNetwork, base: EncoderBundle, settings: TuningSettings, path: Path) -> EncoderBundle:
    """Write a fine-tuned encoder as a bundle without graphs, which PyTorch alone runs, and return it.

    Args:
        network: after fine-tuning.
        base: the encoder before.
        settings: of the fine-tuning.
        path: where to.
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
    )
    return EncoderBundle.write(path, contents)


def _settings(base: EncoderBundle, method: str) -> dict[str, JsonValue]:
    """Return the architecture's settings with the modules that a method inserts."""
    return {**base.manifest.settings, "inserts": method} if method in INSERTS else base.manifest.settings


def _no_classifier(encoder: FeatureNetwork) -> tuple[Tensor, Tensor]:
    """Return weight and bias of a bundle's classifier that knows no organ: what was learned is in the adapter."""
    return torch.zeros(0, encoder.levels[0].channels), torch.zeros(0)


def _adapter(file: TuningFile, adapter: Adapter, bundle: EncoderBundle) -> AdapterFile:
    """Return the classifier that was tuned with the encoder as an adapter that says what the tuning says."""
    tuned = file.description
    description = AdapterDescription(
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
