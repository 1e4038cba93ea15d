"""The options fingerprint of an outbox: all options that determine the masks and the files beside them."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any, Final

from fseft_edge.adaptation.transduction import TransductionInputs
from fseft_edge.adapters.file import AdapterFile
from fseft_edge.outbox.content_key import content_sha256
from fseft_edge.runtime.scans.annotated import find_pairs
from fseft_edge.runtime.system.json_text import parse_json
from fseft_edge.segmentation.label_values import label_values
from fseft_edge.segmentation.models import LoadedModels, expects_sizes
from fseft_edge.segmentation.settings import SegmentationSettings

_VERSION: Final = 2

DETERMINES_RESULTS: Final = {
    "adapters": True,
    "encoder": True,
    "series": True,
    "transduction": True,
    "largest_component": True,
    "fill_holes": True,
    "preview": False,  # a mask is complete without its picture
    "dicom": True,
    "cache": False,
    "cache_gb": False,
    # Backends, devices and memory plans differ by rounding, and automatically chosen precisions pass the parity gate. A
    # precision that the user names is used even if it does not pass.
    "device": False,
    "backend": False,
    "precision": True,
    "memory_gb": False,
    "vram_gb": False,
    "organs": True,
    "save_probabilities": True,
    "split": True,
    "whole_scan": True,
    "follow_size": True,
    "processes": False,
}
"""For each field of the settings of a segmentation, whether it determines the results. A test requires an entry."""

_NOT_RECORDED_IN_VERSION_1: Final = ("version", "precision")


def options_fingerprint(segmentation: SegmentationSettings, models: LoadedModels) -> str:
    """Return the options fingerprint as JSON text: files by the hash of their content, other options by their value.

    Options that have their default are left out if the first version of the fingerprint did not contain them.

    Raises:
        InputError: the support set of a transduction cannot be read.
    """
    transduction = segmentation.transduction
    fields: dict[str, Any] = {
        "version": _VERSION,
        "encoder": models.bundle.encoder_id,
        "adapters": [file.sha256 for file in models.adapters],
        "largest_component": segmentation.largest_component,
        "fill_holes": segmentation.fill_holes,
        "dicom": sorted(set(segmentation.dicom)),
        "transductive": transduction is not None,
    }
    values = label_values(models.adapters)
    optional = {
        "organs": list(segmentation.organs),
        # Earlier versions numbered the organs from 1: their masks differ exactly if these values do.
        "labels": None if values == tuple(range(1, len(values) + 1)) else list(values),
        "series": segmentation.series,
        "precision": None if segmentation.precision == "auto" else segmentation.precision,
        "save_probabilities": segmentation.save_probabilities,
        "split": segmentation.split,
        "whole_scan": segmentation.whole_scan,
        "follow_size": None if segmentation.follow_size or not expects_sizes(models.adapters) else "no",
        "transduction": transduction and [_refit(transduction, file) for file in models.adapters],
    }
    return json.dumps(fields | {name: value for name, value in optional.items() if value}, sort_keys=True)


def _refit(transduction: TransductionInputs, file: AdapterFile) -> dict[str, Any]:
    """Return what determines the refit of an adapter: its priors, the content of the support set, the settings."""
    pairs = find_pairs(transduction.images, transduction.labels)
    return {
        "priors_ml": [prior and [prior.low_ml, prior.high_ml] for prior in transduction.priors_for(file)],
        "support": [[content_sha256(pair.scan.path), content_sha256(pair.path)] for pair in pairs if pair.scan.path],
        "settings": asdict(transduction.settings) | {"training": _plain(asdict(transduction.settings.training))},
    }


def _plain(fields: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of a training that have an effect on a refit."""
    return {name: value for name, value in fields.items() if name not in {"device", "calibration"}}


def other_options(earlier: str, now: str) -> list[str]:
    """Return the names of the options that differ between two fingerprints; empty if a fingerprint is damaged."""
    try:
        before, after = parse_json(earlier), parse_json(now)
    except ValueError:
        return []
    if not isinstance(before, dict):
        return []
    return sorted(
        name for name in before.keys() | after.keys() if name != "version" and before.get(name) != after.get(name)
    )


def same_options(earlier: str, now: str) -> bool:
    """Return whether two fingerprints stand for the same options.

    The first version of the fingerprint contains no precision, so every precision counts as the same. It does not
    contain the priors of a transduction either: such options never count as the same.
    """
    try:
        before, after = parse_json(earlier), parse_json(now)
    except ValueError:
        return False
    if isinstance(before, dict) and "version" not in before:
        after = {name: value for name, value in after.items() if name not in _NOT_RECORDED_IN_VERSION_1}
    return bool(before == after)
