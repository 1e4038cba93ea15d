"""Encoder and adapter as one ONNX file, for programs that run networks but know nothing of this toolkit."""

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
from fseft_edge.export.onnx_graph import graph_of, write_model
from fseft_edge.export.parity import noise_windows
from fseft_edge.runtime.encoder.backends.onnxruntime import GraphRunner
from fseft_edge.runtime.encoder.backends.pytorch import inference_network
from fseft_edge.runtime.encoder.bundle import EncoderBundle
from fseft_edge.runtime.encoder.encoding import OVERLAP
from fseft_edge.runtime.encoder.networks.base import FeatureNetwork
from fseft_edge.runtime.encoder.session import open_session
from fseft_edge.runtime.encoder.windows import LEAST_IMPORTANCE, SIGMA_SCALE
from fseft_edge.runtime.errors import ParityError, UsageError
from fseft_edge.runtime.system.atomic import atomic_path, check_writable

OUTPUT = "probabilities"
GATE = 1e-4
"""The largest difference of a probability from the toolkit's own that a graph may have."""

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class FusedGraph:
    """A written graph.

    Attributes:
        path: the ONNX file.
        organs: names of the organs in the order of the graph's classes; with softmax the background comes before them.
        difference: the largest difference of a probability from the toolkit's own, over seeded windows; None where
            onnxruntime is not installed and nothing was compared.
    """

    path: Path
    organs: tuple[str, ...]
    difference: float | None


def export_adapter(adapter: Path, output: Path, *, encoder: Path | None = None) -> FusedGraph:
    """Write encoder and adapter as one ONNX file; the twin of ``fseft-edge export-adapter``.

    The graph takes ``windows``, float32 ``[n, 1, X, Y, Z]`` scaled to 0..1, any n, and returns ``probabilities``,
    float32 ``[n, classes, X, Y, Z]``. What a caller has to know beside it stands in the file's metadata (see
    :func:`_metadata`) and in ``docs/export-adapter.md``. The same adapter gives the same bytes.

    Where onnxruntime is installed, the graph is run on seeded windows and compared with the toolkit's own result
    before it appears under its name.

    Args:
        adapter: the adapter file.
        output: the file to write, ``NAME.onnx``; an older one is replaced.
        encoder: encoder bundle; None looks beside the adapter and in the working folder.

    Raises:
        UsageError: ``output`` is not called ``.onnx``, or lies within the encoder bundle.
        InputError: the adapter or the encoder is not usable, does not fit the other, or is not found.
        ParityError: the graph differs from the toolkit's own result by more than :data:`GATE`.
        OutOfSpaceError: the disk is full or not writable.
    """
    if output.suffix != ".onnx":
        raise UsageError(f"{output} is not called .onnx.", remedy="Name the output NAME.onnx.")
    file = read_adapter(adapter)
    bundle = EncoderBundle.open(encoder or find_encoder(adapter, file.description.encoder_id))
    file.check_encoder(bundle.encoder_id, path=adapter)
    if bundle.path.resolve() in output.resolve().parents:
        raise UsageError(f"{output} lies within the encoder bundle.", remedy="Write to another folder.")
    check_writable(output)
    fused = FusedNetwork(inference_network(bundle.network()), file.adapter.folded()).eval()
    graph = graph_of(fused, bundle.window, [OUTPUT])
    onnx.helper.set_model_props(graph, _metadata(file, bundle))
    difference: float | None = None
    with atomic_path(output) as temporary:
        write_model(graph, temporary)
        if find_spec("onnxruntime") is None:
            _LOG.warning("onnxruntime is not installed: %s was not compared with the toolkit's own result", output)
        else:
            difference = _largest_difference(temporary, file.adapter, bundle)
            if not difference <= GATE:
                raise ParityError(
                    f"The graph of {adapter} differs from the toolkit's own probabilities by {difference:.1e}, "
                    f"more than the {GATE:.0e} allowed, and was not written.",
                    remedy="Try another version of onnxruntime; if that does not help, adapt again: weights that "
                    "magnify rounding errors so much are not sound.",
                )
    return FusedGraph(output, tuple(organ.name for organ in file.description.organs), difference)


class FusedNetwork(nn.Module):
    """A window to probabilities: the encoder, then the adapter on the features of that window alone.

    The window's features continue beyond it as a scan's map does (:mod:`fseft_edge.adapters.blocks`): every level
    repeats its edge. A scan that fits into one window gives what the toolkit gives.

    Args:
        encoder: in its form for inference.
        adapter: trained on its features, folded.
    """

    def __init__(self, encoder: FeatureNetwork, adapter: Adapter) -> None:
        super().__init__()
        self.encoder = encoder
        self.adapter = adapter

    def forward(self, windows: Tensor) -> Tensor:
        """Return probabilities ``[n, classes, X, Y, Z]`` of windows ``[n, 1, X, Y, Z]``."""
        return self.adapter.probabilities(self.adapter.of_maps(self.encoder(windows)))


def _metadata(file: AdapterFile, bundle: EncoderBundle) -> dict[str, str]:
    """Return what a caller has to know beside the graph, as the file's ``metadata_props``; nothing about patients.

    Everything but plain words is JSON. An organ's ``channel`` is its place in the output, ``mask_label`` the value that
    ``segment`` gives it, ``annotation_label`` its value in the files that the adapter learned from.
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
    """Return the largest difference of the graph's probabilities from those of the torch backend and the adapter."""
    runner = GraphRunner(graph, torch.device("cpu"), torch.get_num_threads())
    largest = 0.0
    with open_session(bundle, device="cpu", backend="torch") as session:
        for windows in noise_windows(bundle.window):
            with torch.inference_mode():
                expected = adapter.probabilities(adapter.of_maps(session.encode(windows)))
            (probabilities,) = runner(windows)
            difference = float((probabilities - expected).abs().max())
            largest = max(largest, difference if math.isfinite(difference) else math.inf)
    return largest
