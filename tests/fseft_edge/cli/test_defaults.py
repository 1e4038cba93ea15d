"""The default of every option is the default of the Python parameter behind it."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest

from fseft_edge.adaptation.adapt import adapt
from fseft_edge.adaptation.training import TrainingSettings
from fseft_edge.adaptation.transduction import TransductionInputs
from fseft_edge.adapters.network import AdapterSettings
from fseft_edge.adapters.onnx_export import export_adapter
from fseft_edge.batch.settings import BatchSettings
from fseft_edge.cli.main import cli
from fseft_edge.demonstration import run_demo
from fseft_edge.evaluation.evaluate import evaluate
from fseft_edge.export.engines import build_engines
from fseft_edge.export.export import export_encoder
from fseft_edge.finetuning.choosing import try_finetuning
from fseft_edge.finetuning.finetune import finetune
from fseft_edge.finetuning.merging import merge
from fseft_edge.finetuning.settings import TuningSettings
from fseft_edge.machine.doctor import diagnose
from fseft_edge.machine.speed import benchmark
from fseft_edge.outbox.accepted_masks import ReviewedBatch
from fseft_edge.outbox.store import BatchStore, state_path
from fseft_edge.pretraining import open_processes, pretrain
from fseft_edge.review.importing import import_corrections
from fseft_edge.review.server import open_review
from fseft_edge.runtime.scans.structure_list import list_annotations
from fseft_edge.segmentation.segment import segment
from fseft_edge.segmentation.settings import SegmentationSettings

FUNCTIONS: dict[str, tuple[Callable[..., Any], ...]] = {
    "demo": (run_demo,),
    "models": (),
    "export": (export_encoder,),
    "build-engines": (build_engines,),
    "contours": (list_annotations,),
    "adapt": (adapt, AdapterSettings, TrainingSettings, ReviewedBatch),
    "finetune": (finetune, try_finetuning, TuningSettings, ReviewedBatch),
    "merge": (merge,),
    "segment": (segment, SegmentationSettings, TransductionInputs),
    "batch run": (BatchSettings, SegmentationSettings),
    "batch status": (state_path,),
    "batch retry": (state_path, BatchStore.retry),
    "batch cancel": (state_path, BatchStore.cancel),
    "batch install-service": (BatchSettings, SegmentationSettings),
    "export-adapter": (export_adapter,),
    "evaluate": (evaluate,),
    "review": (open_review,),
    "review-import": (import_corrections,),
    "pretrain": (pretrain, open_processes),
    "doctor": (diagnose,),
    "benchmark": (benchmark,),
}
"""The Python behind each command. An option is compared with every function that has a parameter of its name."""

RENAMED = {
    "from_reviewed": "reviewed",
    "gradient_checkpointing": "checkpointing",
    "group_pattern": "groups",
    "limit": "limit_minutes",
    "memory": "memory_gb",
    "nsd_tolerance": "nsd_tolerance_mm",
    "parity_ct": "parity_volumes",
    "prediction_organs": "prediction_ids",
    "size_priors": "priors",
    "size_volumes": "table",
    "support_images": "images",
    "support_labels": "labels",
    "time_limit": "minutes",
    "transductive": "transduction",
    "vram": "vram_gb",
}
"""Parameters whose Python name says more, for example the unit."""

SET_BY_THE_FUNCTION = {(TrainingSettings, "device"), (TuningSettings, "device")}
"""Fields that `adapt` and `finetune` replace by their own parameter."""

OF_THE_COMMAND_LINE = {"quiet", "verbose", "as_json", "json_file", "csv_file", "open_browser"}
"""Options about what the command prints or opens."""

EXCEPTIONS = {
    ("build-engines", "adapter"): "Python takes the function that classifies, `classify`, not an adapter file",
    ("batch status", "show_ids"): "Python returns the records, which always have the names",
    ("batch run", "one_by_one"): "the contrary of `pipeline`, compared below",
    ("batch run", "workers"): "the word auto is None in Python",
    ("batch install-service", "at"): "only the command line writes systemd units",
    ("batch install-service", "until"): "a night has an end, a run in Python need not have one",
    ("batch install-service", "units"): "only the command line writes systemd units",
}


def leaves() -> dict[str, click.Command]:
    context = click.Context(cli)
    found: dict[str, click.Command] = {}
    for name in cli.list_commands(context):
        command = cli.get_command(context, name)
        assert command is not None
        parts = command.commands if isinstance(command, click.Group) else {}
        found |= {f"{name} {part}": below for part, below in parts.items()} or {name: command}
    return found


def python_defaults(name: str, functions: tuple[Callable[..., Any], ...]) -> list[object]:
    found: list[object] = []
    for function in functions:
        parameter = inspect.signature(function).parameters.get(name)
        if parameter is not None and (function, name) not in SET_BY_THE_FUNCTION:
            fields = {field.name: field for field in dataclasses.fields(function)} if inspect.isclass(function) else {}
            default = parameter.default
            if name in fields and fields[name].default_factory is not dataclasses.MISSING:
                default = fields[name].default_factory()
            found.append(default)
    return found


def nothing_or(value: object) -> object:
    """Return None for all ways to say that nothing was given."""
    return None if value is None or value is False or value in ((), {}) else value


@pytest.mark.parametrize("name", list(FUNCTIONS))
def test_defaults_agree(name: str) -> None:
    command = leaves()[name]
    wrong = []
    for parameter in command.params:
        key = parameter.name or ""
        if parameter.required or key in OF_THE_COMMAND_LINE or (name, key) in EXCEPTIONS:
            continue
        shown = nothing_or(parameter.to_info_dict()["default"])
        defaults = python_defaults(RENAMED.get(key, key), FUNCTIONS[name])
        if not defaults:
            wrong.append(f"{key}: no such parameter in Python")
        # Where Python needs a value, it has no default that could differ from an option that is not given.
        given = [None if value is inspect.Parameter.empty else nothing_or(value) for value in defaults]
        wrong += [f"{key}: {shown!r} but {value!r} in Python" for value in given if value != shown]
    assert not wrong


def test_the_table_of_commands_is_complete_and_has_no_needless_exception() -> None:
    assert FUNCTIONS.keys() == leaves().keys()
    parameters = {(name, parameter.name) for name, command in leaves().items() for parameter in command.params}
    assert set(EXCEPTIONS) <= parameters
    assert set(RENAMED) <= {name for _, name in parameters}


def test_defaults_that_are_said_in_other_words_agree() -> None:
    settings = BatchSettings(Path("inbox"), Path("outbox"), SegmentationSettings((Path("a.adapter"),)))
    defaults = {parameter.name: parameter.to_info_dict()["default"] for parameter in leaves()["batch run"].params}
    assert (settings.pipeline, settings.workers) == (not defaults["one_by_one"], None)
    assert defaults["workers"] == "auto"
