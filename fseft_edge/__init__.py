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
    from fseft_edge.adaptation import adapt
    from fseft_edge.adapter_training import TrainingSettings
    from fseft_edge.adapters import AdapterSettings
    from fseft_edge.batch.coordinator import run_batch
    from fseft_edge.batch.settings import BatchSettings
    from fseft_edge.benchmarking.runs import benchmark
    from fseft_edge.demonstration import run_demo
    from fseft_edge.doctor import diagnose
    from fseft_edge.evaluation import evaluate
    from fseft_edge.export.engines import build_engines
    from fseft_edge.export.export import export_encoder
    from fseft_edge.export.zoo import models
    from fseft_edge.finetuning.choosing import try_finetuning
    from fseft_edge.finetuning.merging import merge
    from fseft_edge.finetuning.settings import TuningSettings
    from fseft_edge.finetuning.tuning import finetune
    from fseft_edge.fused_export import export_adapter
    from fseft_edge.organs import OrganLabel
    from fseft_edge.pretraining import pretrain, read_plan
    from fseft_edge.review.server import open_review
    from fseft_edge.review.support import ReviewedBatch
    from fseft_edge.segmentation import segment
    from fseft_edge.segmenter import SegmentationSettings

_HOMES = {
    "SegmentationSettings": "fseft_edge.segmenter",
    "BatchSettings": "fseft_edge.batch.settings",
    "AdapterSettings": "fseft_edge.adapters",
    "OrganLabel": "fseft_edge.organs",
    "ReviewedBatch": "fseft_edge.review.support",
    "TrainingSettings": "fseft_edge.adapter_training",
    "TuningSettings": "fseft_edge.finetuning.settings",
    "adapt": "fseft_edge.adaptation",
    "benchmark": "fseft_edge.benchmarking.runs",
    "build_engines": "fseft_edge.export.engines",
    "diagnose": "fseft_edge.doctor",
    "evaluate": "fseft_edge.evaluation",
    "export_adapter": "fseft_edge.fused_export",
    "export_encoder": "fseft_edge.export.export",
    "models": "fseft_edge.export.zoo",
    "finetune": "fseft_edge.finetuning.tuning",
    "merge": "fseft_edge.finetuning.merging",
    "open_review": "fseft_edge.review.server",
    "pretrain": "fseft_edge.pretraining",
    "read_plan": "fseft_edge.pretraining",
    "run_batch": "fseft_edge.batch.coordinator",
    "run_demo": "fseft_edge.demonstration",
    "segment": "fseft_edge.segmentation",
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
    "read_plan",
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
