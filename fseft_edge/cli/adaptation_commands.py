"""The commands for training on annotated scans; see :mod:`fseft_edge.cli.commands`."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fseft_edge.cli.options import ORGAN_HELP, PATH, Common, common_options, logging_options
from fseft_edge.runtime.errors import UsageError
from fseft_edge.runtime.scans.organs import parse_organs

if TYPE_CHECKING:
    from fseft_edge.adapters.file import AdapterFile, AdapterOrgan
    from fseft_edge.finetuning.tuning_file import TuningFile
    from fseft_edge.outbox.accepted_masks import ReviewedBatch

_ADAPTERS = ("linear", "pointwise", "spatial")
# equal to `fseft_edge.finetuning.settings.TUNING_METHODS`, whose import brings in torch
_TUNINGS = ("lora", "adaptformer", "affine", "bitfit", "compacter", "conv-adapter", "med-adapter", "full", "decoder")
# Options of one kind of method only; an option that was not given is None, and the settings contain its default.
_OF_ADAPTERS = ("activation", "epochs", "variations", "cache", "memory", "vram")
_OF_TUNINGS = ("decoder", "steps", "crops", "accumulate", "gradient_checkpointing")


@click.command()
@click.option("--encoder", type=PATH, required=True, help="Encoder bundle, NAME.encoder.")
@click.option("--images", type=PATH, help="Folder of annotated CTs (NIfTI).")
@click.option("--labels", type=PATH, help="Folder of the annotations, with the file names of the CTs.")
@click.option(
    "--from-reviewed",
    type=PATH,
    metavar="OUTBOX",
    help="Batch whose accepted masks are used as annotations, in addition to --images and --labels or instead of them.",
)
@click.option(
    "--corrected",
    type=PATH,
    help="With --from-reviewed: folder of corrected masks <key>.nii.gz, which replace the masks of the batch.",
)
@click.option(
    "--state", type=PATH, help="With --from-reviewed: state file of the batch, if `batch run` was started with --state."
)
@click.option("--organ", "organs", multiple=True, required=True, metavar="NAME=ID", help=ORGAN_HELP)
@click.option(
    "-o",
    "--output",
    type=PATH,
    required=True,
    help="File to write: NAME.adapter for an adapter, NAME.tuning for fine-tuning.",
)
@click.option(
    "--case", "cases", multiple=True, help="Use only this case. May be repeated.  [default: all annotated cases]"
)
@click.option(
    "--method",
    type=click.Choice(["auto", *_ADAPTERS, *_TUNINGS]),
    default="spatial",
    show_default=True,
    help="linear, pointwise and spatial train an adapter on the encoder's features. auto chooses the adapter and the "
    "levels that are best in cross-validation. The other methods fine-tune the encoder itself.",
)
@click.option(
    "--levels",
    type=click.Choice(["finest", "all"]),
    help="Use only the finest level of the feature pyramid, or all levels.  [default: all; --method auto chooses]",
)
@click.option(
    "--validate/--no-validate",
    default=None,
    help="Estimate the accuracy on new scans by cross-validation: one scan per fold; with more than ten scans, ten "
    "folds of several scans each.  [default: yes for adapters, no for fine-tuning]",
)
@click.option(
    "--activation",
    type=click.Choice(["sigmoid", "softmax"]),
    help="Adapters only: activation of the output.  [default: sigmoid]",
)
@click.option(
    "--epochs",
    type=click.IntRange(min=1),
    help="Adapters except linear: largest number of epochs.  [default: depends on the number of scans]",
)
@click.option(
    "--variations",
    type=click.IntRange(min=0, max=64),
    help="Adapters only: number of variations (rotated, zoomed, restyled) of each scan.  [default: depends on the "
    "number of scans]",
)
@click.option(
    "--decoder",
    type=click.Choice(["frozen", "tuned", "new"]),
    help="Fine-tuning only: the encoder's decoder is not trained (frozen), trained from its weights (tuned), or "
    "trained from random weights (new).  [default: tuned for full and decoder, else frozen]",
)
@click.option("--steps", type=click.IntRange(min=1), help="Fine-tuning only: number of training steps.  [default: 400]")
@click.option("--crops", type=click.IntRange(min=1), help="Fine-tuning only: crops in a training step.  [default: 2]")
@click.option(
    "--accumulate",
    type=click.IntRange(min=1),
    help="Fine-tuning only: number of portions in which a step's crops are computed, to save memory.  [default: 1]",
)
@click.option(
    "--gradient-checkpointing", is_flag=True, default=None, help="Fine-tuning only: use less memory, but more time."
)
@click.option(
    "--time-limit",
    type=click.FloatRange(min=0, min_open=True),
    metavar="MINUTES",
    help="With --method auto: if the adapter is poor for a new organ, also try fine-tuning, for at most this time.",
)
@click.option(
    "--seed", type=click.IntRange(0, 2**32 - 1), default=0, show_default=True, help="Seed for all random choices."
)
@click.option("--json", "as_json", is_flag=True, help="Print the metadata of the written file as JSON.")
@common_options
def adapt(
    *,
    encoder: Path,
    images: Path | None,
    labels: Path | None,
    from_reviewed: Path | None,
    corrected: Path | None,
    state: Path | None,
    organs: tuple[str, ...],
    output: Path,
    cases: tuple[str, ...],
    method: str,
    validate: bool | None,
    time_limit: float | None,
    seed: int,
    as_json: bool,
    common: Common,
    **particular: Any,  # noqa: ANN401 - options of one kind of method; click has checked them
) -> None:
    """Train an adapter, or fine-tune the encoder, on a few annotated CTs."""
    wanted = parse_organs(organs)
    if from_reviewed is None and (corrected or state):
        raise UsageError(
            "--corrected and --state can only be used with --from-reviewed.",
            remedy="Add --from-reviewed, or remove --corrected and --state.",
        )
    given = {**particular, "cache": common.cache, "memory": common.memory, "vram": common.vram}
    _check_method(method, validate, time_limit, given)
    scans = (encoder, images, labels, wanted)
    shared: dict[str, Any] = {
        "reviewed": _reviewed(from_reviewed, state, corrected),
        "cases": cases or None,
        "device": common.device,
    }
    printer = _ResultPrinter(as_json=as_json, reviewed=from_reviewed is not None)
    with common.progress() as progress:
        if method in _TUNINGS:
            from fseft_edge.finetuning.finetune import finetune  # noqa: PLC0415 - brings in torch

            settings = _tuning_settings(method, seed, particular)
            tuning = finetune(*scans, output, settings=settings, validate=bool(validate), progress=progress, **shared)
            printer.print(tuning, output)
            return
        from fseft_edge.adaptation.adapt import adapt as run  # noqa: PLC0415 - brings in torch
        from fseft_edge.adaptation.training import TrainingSettings  # noqa: PLC0415 - brings in torch
        from fseft_edge.adapters.network import AdapterSettings  # noqa: PLC0415 - brings in torch

        trial = _tuning_settings("full", seed, particular) if time_limit is not None else None
        if trial is not None:
            from fseft_edge.finetuning.choosing import check_trial  # noqa: PLC0415 - brings in torch

            check_trial(encoder, wanted, output, trial)
        kind: dict[str, Any] = {} if method == "auto" else {"method": method, "levels": particular["levels"] or "all"}
        file = run(
            *scans,
            output,
            settings=AdapterSettings(activation=particular["activation"] or "sigmoid", **kind),
            training=TrainingSettings(seed=seed, epochs=particular["epochs"], variations=particular["variations"]),
            choose=method == "auto",
            validate=validate is not False,
            cache=common.cache,
            cache_gb=common.cache_gb,
            backend=common.backend,
            precision=common.precision,
            memory_gb=common.memory,
            vram_gb=common.vram,
            progress=progress,
            **shared,
        )
        printer.print(file, output)
        if trial is not None and time_limit is not None:
            from fseft_edge.finetuning.choosing import try_finetuning, tuning_beside  # noqa: PLC0415 - brings in torch

            beside = tuning_beside(output)
            better = try_finetuning(
                file, *scans, output=output, minutes=time_limit, settings=trial, progress=progress, **shared
            )
            if better is not None:
                printer.print(better, beside)
                click.echo(
                    f"Fine-tuning is better than the adapter on left-out scans. To use it: fseft-edge merge {beside} "
                    "-o NAME.encoder",
                    err=True,
                )


@click.command()
@click.argument("tuning", type=PATH)
@click.option("-o", "--output", type=PATH, required=True, help="Encoder bundle to write, NAME.encoder.")
@click.option(
    "--encoder",
    type=PATH,
    help="Encoder that was fine-tuned.  [default: searched in the folder of TUNING and the working folder]",
)
@click.option(
    "--onnx/--no-onnx", default=True, show_default=True, help="Write ONNX graphs in addition to the weights, or not."
)
@click.option(
    "--parity-ct", type=PATH, multiple=True, help="CT on which backends are compared with PyTorch. May be repeated."
)
@logging_options
def merge(
    *, tuning: Path, output: Path, encoder: Path | None, onnx: bool, parity_ct: tuple[Path, ...], quiet: bool
) -> None:
    """Merge TUNING and its encoder into a new encoder bundle, and write NAME.adapter beside it for `segment`."""
    from fseft_edge.finetuning.merging import merge as run  # noqa: PLC0415 - brings in torch

    merged = run(tuning, output, encoder=encoder, onnx=onnx, parity_volumes=parity_ct)
    if not quiet:
        click.echo(f"{merged.bundle.path}: id {merged.bundle.encoder_id[:12]}; adapter for `segment`: {merged.adapter}")


def _check_method(method: str, validate: bool | None, time_limit: float | None, particular: dict[str, Any]) -> None:
    """Raise UsageError if an option has no effect with the method or contradicts the method."""
    if method == "auto" and validate is False:
        raise UsageError(
            "--method auto needs cross-validation, so --no-validate cannot be used with it.",
            remedy="Remove --no-validate, or choose another --method.",
        )
    if method == "auto" and particular["levels"]:
        raise UsageError(
            "--method auto chooses the levels, so --levels cannot be used with it.",
            remedy="Remove --levels, or choose another --method.",
        )
    if time_limit is not None and method != "auto":
        raise UsageError(
            "--time-limit can only be used with --method auto.",
            remedy="Add --method auto, or remove --time-limit.",
        )
    if time_limit is not None and particular["activation"] == "softmax":
        raise UsageError(
            "--activation softmax cannot be used with --time-limit, because fine-tuning always uses sigmoid.",
            remedy="Remove --activation softmax or --time-limit.",
        )
    foreign: tuple[str, ...]
    if method in _TUNINGS:
        foreign, kind = _OF_ADAPTERS, "fine-tunes the encoder and trains no adapter"
    elif time_limit is None:
        foreign, kind = _OF_TUNINGS, "does not change the encoder"
    else:
        foreign, kind = ("decoder",), "chooses the training of the decoder"
    given = [name for name in foreign if particular[name] is not None]
    if given:
        option = f"--{given[0].replace('_', '-')}"
        raise UsageError(
            f"{option} has no effect with --method {method}, which {kind}.",
            remedy=f"Remove {option}, or choose another --method.",
        )


def _reviewed(outbox: Path | None, state: Path | None, corrected: Path | None) -> ReviewedBatch | None:
    from fseft_edge.outbox.accepted_masks import ReviewedBatch  # noqa: PLC0415 - brings in torch

    return ReviewedBatch(outbox, state, corrected) if outbox else None


def _tuning_settings(method: str, seed: int, particular: dict[str, Any]) -> Any:  # noqa: ANN401 - a TuningSettings
    from fseft_edge.finetuning.settings import TuningSettings  # noqa: PLC0415 - brings in torch

    given = {
        name: particular[name] for name in ("decoder", "levels", "steps", "crops", "accumulate") if particular[name]
    }
    return TuningSettings(
        method,  # type: ignore[arg-type]  # click.Choice has checked it
        seed=seed,
        checkpointing=bool(particular["gradient_checkpointing"]),
        **given,
    )


@dataclass(frozen=True)
class _ResultPrinter:
    """Prints the result of a training, and the accuracy to expect."""

    as_json: bool
    reviewed: bool

    def print(self, file: AdapterFile | TuningFile, output: Path) -> None:
        """Print the metadata of a written file; as JSON, on one line."""
        made = file.description
        if self.as_json:
            click.echo(made.model_dump_json(exclude={"content_sha256"}))  # only the file itself contains this hash
            return
        for organ in made.organs:
            click.echo(_organ_text(organ))
        if self.reviewed and any(organ.left_out_dsc for organ in made.organs):
            click.echo(
                "The expected DSC is too optimistic, because the references include masks made by an adapter. For a "
                "reliable estimate, use scans contoured by a person."
            )
        steps = f", {made.steps} steps, loss {made.losses[-1]:.3f}" if made.steps else ""
        click.echo(f"{output}: {made.kind}{steps}")


def _organ_text(organ: AdapterOrgan) -> str:
    volumes, left_out = organ.support_volumes_ml, organ.left_out_dsc
    expected = (
        f"; expected DSC on new scans: {sum(left_out) / len(left_out):.2f} ({min(left_out):.2f} to "
        f"{max(left_out):.2f} on left-out scans)"
        if left_out
        else ""
    )
    done = [name.replace("_", " ") for name, wanted in asdict(organ.post_processing).items() if wanted]
    treated = f"; post-processing of its masks: {', '.join(done)}" if done else ""
    return f"{organ.name}: {len(volumes)} scans, {min(volumes):.1f} to {max(volumes):.1f} ml{expected}{treated}"
