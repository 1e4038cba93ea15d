"""Export of encoder and adapter as one ONNX file, for programs that do not use this toolkit."""

from __future__ import annotations

import json
import logging
import math
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path

import onnx
import torch
from torch import Tensor, nn

from fseft_edge._version import __version__
from fseft_edge.adapters.file import AdapterFile, read_adapter
from fseft_edge.adapters.find_encoder import find_encoder
from fseft_edge.adapters.network import Adapter
from fseft_edge.export.built_in import open_encoder
from fseft_edge.export.onnx_graph import graph_of, write_model
from fseft_edge.export.parity import noise_window
from fseft_edge.runtime.encoder.backends.onnxruntime import GraphRunner
from fseft_edge.runtime.encoder.backends.pytorch import inference_network
from fseft_edge.runtime.encoder.bundle import EncoderBundle
from fseft_edge.runtime.encoder.encoding import OVERLAP
from fseft_edge.runtime.encoder.networks.base import FeatureNetwork
from fseft_edge.runtime.encoder.session import open_session
from fseft_edge.runtime.encoder.windows import LEAST_IMPORTANCE, SIGMA_SCALE
from fseft_edge.runtime.errors import ParityError, UsageError
from fseft_edge.runtime.system.atomic import atomic_path, check_writable
from fseft_edge.runtime.system.threads import limit_threads

OUTPUT = "probabilities"
GATE = 1e-4
"""Largest allowed difference between a probability of the graph and a probability of the toolkit."""

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class FusedGraph:
    """An exported graph.

    Attributes:
        path: the ONNX file.
        organs: organ names in the order of the output classes; with softmax, the background precedes them.
        difference: largest difference between the probabilities of the graph and of the toolkit, over seeded windows;
            None if onnxruntime is not installed and the comparison was not possible.
    """

    path: Path
    organs: tuple[str, ...]
    difference: float | None


def export_adapter(adapter: str | Path, output: str | Path, *, encoder: str | Path | None = None) -> FusedGraph:
    """Write encoder and adapter as one ONNX file, like the command ``fseft-edge export-adapter``.

    The input of the graph is ``windows``, float32 ``[n, 1, X, Y, Z]`` scaled to 0..1, for any n. The output is
    ``probabilities``, float32 ``[n, classes, X, Y, Z]``. The metadata of the file (see :func:`_metadata`) and
    ``docs/export-adapter.md`` contain all further information that a caller needs. Equal adapters give equal bytes.

    If onnxruntime is installed, the graph is run on seeded windows and compared with the result of the toolkit. The
    file appears only if the comparison succeeds.

    Args:
        adapter: adapter file.
        output: ONNX file to write, ``NAME.onnx``; an existing file is replaced.
        encoder: encoder bundle; None searches the folder of the adapter, then the working folder.

    Raises:
        UsageError: the name of ``output`` does not end in ``.onnx``, or ``output`` is inside the encoder bundle.
        InputError: the adapter or the encoder is not usable, was not found, or they do not belong together.
        ParityError: the result of the graph differs from the result of the toolkit by more than :data:`GATE`.
        OutOfSpaceError: the disk is full, or the folder is not writable.
    """
    adapter, output = Path(adapter), Path(output)
    if output.suffix != ".onnx":
        raise UsageError(
            f"The output {output} does not have the suffix .onnx.", remedy="Choose an output name NAME.onnx."
        )
    file = read_adapter(adapter)
    bundle = open_encoder(encoder or find_encoder(adapter, file.description.encoder_id, file.description.encoder_name))
    file.check_encoder(bundle, path=adapter)
    if bundle.path.resolve() in output.resolve().parents:
        raise UsageError(
            f"The output {output} is inside the encoder bundle {bundle.path}.",
            remedy="Choose an output in another folder.",
        )
    check_writable(output)
    if following := [organ.name for organ in file.description.organs if organ.expected_ml]:
        _LOG.warning(
            "the masks of the graph are those of `segment --no-follow-size`: thresholds do not follow the size of %s",
            ", ".join(following),
        )
    fused = FusedNetwork(
        inference_network(bundle.network(), whole_scan=bundle.whole_scan is not None), file.adapter.folded()
    ).eval()
    graph = graph_of(fused, bundle.window, [OUTPUT])
    onnx.helper.set_model_props(graph, _metadata(file, bundle))
    difference: float | None = None
    with atomic_path(output) as temporary:
        write_model(graph, temporary)
        if find_spec("onnxruntime") is None:
            _LOG.warning("onnxruntime is not installed: %s was not compared with the result of the toolkit", output)
        else:
            difference = _largest_difference(temporary, file.adapter, bundle)
            if not difference <= GATE:
                raise ParityError(
                    f"The probabilities of the ONNX graph of {adapter} differ from those of the toolkit by "
                    f"{difference:.1e}, but at most {GATE:.0e} is allowed. {output} was not written.",
                    remedy="Try another version of onnxruntime. If the error remains, run `fseft-edge adapt` again, "
                    "because the weights of this adapter amplify rounding errors.",
                )
    return FusedGraph(output, tuple(organ.name for organ in file.description.organs), difference)


class FusedNetwork(nn.Module):
    """A network from windows to probabilities: the encoder, then the adapter on the features of each window.

    Beyond the window, every level of the features repeats its edge voxels, like the map of a scan
    (:mod:`fseft_edge.adapters.blocks`). For a scan that fits into one window, the result is the result of the toolkit.

    Args:
        encoder: encoder network in its form for inference.
        adapter: folded adapter that was trained on the features of this encoder.
    """

    def __init__(self, encoder: FeatureNetwork, adapter: Adapter) -> None:
        super().__init__()
        self.encoder = encoder
        self.adapter = adapter

    def forward(self, windows: Tensor) -> Tensor:
        """Return probabilities ``[n, classes, X, Y, Z]`` of windows ``[n, 1, X, Y, Z]``."""
        return self.adapter.probabilities(self.adapter.of_maps(self.encoder(windows)))


def _metadata(file: AdapterFile, bundle: EncoderBundle) -> dict[str, str]:
    """Return the ``metadata_props`` of the ONNX file. They contain no information about patients.

    Values that are not strings are stored as JSON. For each organ, ``channel`` is its index in the output,
    ``mask_label`` its label value in masks of ``segment``, and ``annotation_label`` its label value in the annotations
    of the support set.
    """
    described = file.description
    entries = {
        "schema_version": 1,
        "toolkit_version": __version__,
        "encoder_id": bundle.encoder_id,
        "encoder_name": bundle.manifest.name,
        "adapter_sha256": file.sha256,
        "activation": file.adapter.settings.activation,
        "organs": [
            {
                "name": organ.name,
                "channel": file.adapter.backgrounds + index,
                "mask_label": index + 1,
                "annotation_label": organ.label,
                "post_processing": asdict(organ.post_processing),
            }
            for index, organ in enumerate(described.organs)
        ],
        "preprocessing": bundle.preprocessing.model_dump(mode="json"),
        "window": bundle.window,
        "overlap": OVERLAP,
        "blending": {"importance": "gaussian", "sigma_scale": SIGMA_SCALE, "minimum": LEAST_IMPORTANCE},
    }
    return {
        f"fseft_edge.{key}": value if isinstance(value, str) else json.dumps(value) for key, value in entries.items()
    }


def _largest_difference(graph: Path, adapter: Adapter, bundle: EncoderBundle) -> float:
    """Return the largest difference between the probabilities of the graph and those of the torch backend."""
    limit_threads()
    runner = GraphRunner(graph, torch.device("cpu"), torch.get_num_threads())
    window = noise_window(bundle.window)
    with open_session(bundle, device="cpu", backend="torch") as session, torch.inference_mode():
        expected = adapter.probabilities(adapter.of_maps(session.encode(window)))
        (probabilities,) = runner(window)
        difference = float((probabilities - expected).abs().max())
    return difference if math.isfinite(difference) else math.inf
