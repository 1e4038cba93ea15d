"""Public names of the package and the modules that define them; ``__init__.py`` reads this file when it is imported."""

from ._version import __version__
from .adaptation.adapt import adapt
from .adaptation.training import TrainingSettings
from .adapters.network import AdapterSettings
from .adapters.onnx_export import export_adapter
from .batch.coordinator import run_batch
from .batch.settings import BatchSettings
from .demonstration import run_demo
from .evaluation.evaluate import evaluate
from .export.engines import build_engines
from .export.export import export_encoder
from .export.zoo import models
from .finetuning.choosing import try_finetuning
from .finetuning.finetune import finetune
from .finetuning.merging import merge
from .finetuning.settings import TuningSettings
from .machine.doctor import diagnose
from .machine.speed import benchmark
from .masks.mask_image import Mask
from .outbox.accepted_masks import ReviewedBatch
from .pretraining import pretrain, read_pretraining_config
from .review.importing import import_corrections
from .review.server import open_review
from .runtime.scans.organs import OrganLabel
from .runtime.scans.structure_list import list_annotations
from .runtime.scans.volume import LabelMap, Volume
from .segmentation.encode import encode
from .segmentation.organ_segmenter import OrganSegmenter, load
from .segmentation.segment import segment
from .segmentation.settings import SegmentationSettings

__all__ = [
    "AdapterSettings",
    "BatchSettings",
    "LabelMap",
    "Mask",
    "OrganLabel",
    "OrganSegmenter",
    "ReviewedBatch",
    "SegmentationSettings",
    "TrainingSettings",
    "TuningSettings",
    "Volume",
    "__version__",
    "adapt",
    "benchmark",
    "build_engines",
    "diagnose",
    "encode",
    "evaluate",
    "export_adapter",
    "export_encoder",
    "finetune",
    "import_corrections",
    "list_annotations",
    "load",
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
