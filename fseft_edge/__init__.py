"""Few-shot organ segmentation of CT on a hospital workstation.

Every command has its twin here, imported when it is first used::

    import fseft_edge

    fseft_edge.export_encoder(None, model="edge_base", output=Path("edge_base.encoder"))
    liver = fseft_edge.OrganLabel("liver", 6)
    fseft_edge.adapt(Path("edge_base.encoder"), images, labels, [liver], Path("liver.adapter"))
    fseft_edge.segment([Path("ct.nii.gz")], [Path("liver.adapter")], Path("out"))
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from fseft_edge._version import __version__

if TYPE_CHECKING:
    from fseft_edge.adaptation.adapt import adapt
    from fseft_edge.adaptation.training import TrainingSettings
    from fseft_edge.adapters.network import AdapterSettings
    from fseft_edge.adapters.onnx_export import export_adapter
    from fseft_edge.batch.coordinator import run_batch
    from fseft_edge.batch.settings import BatchSettings
    from fseft_edge.demonstration import run_demo
    from fseft_edge.evaluation.evaluate import evaluate
    from fseft_edge.export.engines import build_engines
    from fseft_edge.export.export import export_encoder
    from fseft_edge.export.zoo import models
    from fseft_edge.finetuning.choosing import try_finetuning
    from fseft_edge.finetuning.finetune import finetune
    from fseft_edge.finetuning.merging import merge
    from fseft_edge.finetuning.settings import TuningSettings
    from fseft_edge.machine.doctor import diagnose
    from fseft_edge.machine.speed import benchmark
    from fseft_edge.outbox.accepted_masks import ReviewedBatch
    from fseft_edge.pretraining import pretrain, read_pretraining_config
    from fseft_edge.review.server import open_review
    from fseft_edge.runtime.scans.organs import OrganLabel
    from fseft_edge.segmentation.segment import segment
    from fseft_edge.segmentation.segmenter import SegmentationSettings

_HOMES = {
    "SegmentationSettings": "fseft_edge.segmentation.segmenter",
    "BatchSettings": "fseft_edge.batch.settings",
    "AdapterSettings": "fseft_edge.adapters.network",
    "OrganLabel": "fseft_edge.runtime.scans.organs",
    "ReviewedBatch": "fseft_edge.outbox.accepted_masks",
    "TrainingSettings": "fseft_edge.adaptation.training",
    "TuningSettings": "fseft_edge.finetuning.settings",
    "adapt": "fseft_edge.adaptation.adapt",
    "benchmark": "fseft_edge.machine.speed",
    "build_engines": "fseft_edge.export.engines",
    "diagnose": "fseft_edge.machine.doctor",
    "evaluate": "fseft_edge.evaluation.evaluate",
    "export_adapter": "fseft_edge.adapters.onnx_export",
    "export_encoder": "fseft_edge.export.export",
    "models": "fseft_edge.export.zoo",
    "finetune": "fseft_edge.finetuning.finetune",
    "merge": "fseft_edge.finetuning.merging",
    "open_review": "fseft_edge.review.server",
    "pretrain": "fseft_edge.pretraining",
    "read_pretraining_config": "fseft_edge.pretraining",
    "run_batch": "fseft_edge.batch.coordinator",
    "run_demo": "fseft_edge.demonstration",
    "segment": "fseft_edge.segmentation.segment",
    "try_finetuning": "fseft_edge.finetuning.choosing",
}

__all__ = [
    "AdapterSettings",
    "BatchSettings",
    "OrganLabel",
    "ReviewedBatch",
    "SegmentationSettings",
    "TrainingSettings",
    "TuningSettings",
    "__version__",
    "adapt",
    "benchmark",
    "build_engines",
    "diagnose",
    "evaluate",
    "export_adapter",
    "export_encoder",
    "finetune",
    "merge",
    "models",
    "open_review",
    "pretrain",
    "read_pretraining_config",
    "run_batch",
    "run_demo",
    "segment",
    "try_finetuning",
]


def __getattr__(name: str) -> object:
    """Import a public name from its home when it is first used (PEP 562)."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
