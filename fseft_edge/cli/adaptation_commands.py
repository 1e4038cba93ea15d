"""The commands that learn from annotated scans; see :mod:`fseft_edge.cli.commands`."""

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
# As `fseft_edge.finetuning.settings.TUNING_METHODS`, for which torch would have to be imported.
_TUNINGS = ("lora", "adaptformer", "affine", "bitfit", "compacter", "conv-adapter", "med-adapter", "full", "decoder")
# Options of one kind of method alone are None where nothing was given: their defaults are those of the settings.
_OF_ADAPTERS = ("activation", "epochs", "variations", "cache", "memory", "vram")
_OF_TUNINGS = ("decoder", "steps", "crops", "accumulate", "gradient_checkpointing")


@click.command()
@click.option("--encoder", type=PATH, required=True, help="Encoder bundle, NAME.encoder.")
@click.option("--images", type=PATH, help="Folder of annotated CTs (NIfTI).")
@click.option("--labels", type=PATH, help="Folder of their annotations, same file names.")
@click.option(
    "--from-reviewed",
    type=PATH,
    metavar="OUTBOX",
    help="Learn from the masks of this batch that were accepted, too; or, without --images and --labels, alone.",
)
@click.option("--corrected", type=PATH, help="With --from-reviewed, a folder of masks <key>.nii.gz to take instead.")
@click.option("--state", type=PATH, help="With --from-reviewed, the batch's state, if its run had a --state.")
@click.option("--organ", "organs", multiple=True, required=True, metavar="NAME=ID", help=ORGAN_HELP)
@click.option(
    "-o", "--output", type=PATH, required=True, help="The adapter to write, NAME.adapter; of fine-tuning, NAME.tuning."
)
@click.option("--case", "cases", multiple=True, help="Use only this case; may be repeated. Default: all annotated.")
@click.option(
    "--method",
    type=click.Choice(["auto", *_ADAPTERS, *_TUNINGS]),
    default="spatial",
    show_default=True,
    help="linear, pointwise and spatial are adapters on the encoder's features; auto takes the one that does best on "
    "scans left out, and the levels to use; the others fine-tune the encoder itself.",
)
@click.option(
    "--levels",
    type=click.Choice(["finest", "all"]),
    help="Use the finest level of the feature pyramid, or all levels.  [default: all; auto chooses]",
)
@click.option(
    "--validate/--no-validate",
    default=None,
    help="Leave each scan out once, to say what to expect on new ones.  [default: adapters do, fine-tuning does not]",
)
@click.option("--activation", type=click.Choice(["sigmoid", "softmax"]), help="Of adapters.  [default: sigmoid]")
@click.option(
    "--epochs",
    type=click.IntRange(min=1),
    help="At most this many epochs (not for linear).  [default: by number of scans]",
)
@click.option(
    "--variations",
    type=click.IntRange(min=0, max=64),
    help="How often adapters see each scan turned, zoomed and restyled.  [default: by number of scans]",
)
@click.option(
    "--decoder",
    type=click.Choice(["frozen", "tuned", "new"]),
    help="Of fine-tuning: what the encoder's decoder does.  [default: tuned by full and decoder, else frozen]",
)
@click.option("--steps", type=click.IntRange(min=1), help="Of fine-tuning: optimiser steps.  [default: 400]")
@click.option("--crops", type=click.IntRange(min=1), help="Of fine-tuning: crops a step.  [default: 2]")
@click.option(
    "--accumulate", type=click.IntRange(min=1), help="Of fine-tuning: portions of a step, to save memory.  [default: 1]"
)
@click.option("--gradient-checkpointing", is_flag=True, default=None, help="Of fine-tuning: less memory, more time.")
@click.option(
    "--time-limit",
    type=click.FloatRange(min=0, min_open=True),
    metavar="MINUTES",
    help="With --method auto: try fine-tuning too, for this long, where an adapter falls short on a new organ.",
)
@click.option("--seed", type=click.IntRange(0, 2**32 - 1), default=0, show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print the description of what was learned as JSON.")
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
    **particular: Any,  # noqa: ANN401 - of adapters or of fine-tuning; click has checked them
) -> None:
    """Learn organs from a few annotated CTs and write an adapter."""
    wanted = parse_organs(organs)
    if from_reviewed is None and (corrected or state):
        raise UsageError("--corrected and --state serve --from-reviewed.", remedy="Add it, or leave them out.")
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
        from fseft_edge.adaptation.training import TrainingSettings  # noqa: PLC0415 - likewise
        from fseft_edge.adapters.network import AdapterSettings  # noqa: PLC0415 - likewise

        trial = _tuning_settings("full", seed, particular) if time_limit is not None else None
        if trial is not None:
            from fseft_edge.finetuning.choosing import check_trial  # noqa: PLC0415 - likewise

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
            from fseft_edge.finetuning.choosing import try_finetuning, tuning_beside  # noqa: PLC0415 - likewise

            beside = tuning_beside(output)
            better = try_finetuning(
                file, *scans, output=output, minutes=time_limit, settings=trial, progress=progress, **shared
            )
            if better is not None:
                printer.print(better, beside)
                click.echo(f"It does better on scans left out: fseft-edge merge {beside} -o NAME.encoder", err=True)


@click.command()
@click.argument("tuning", type=PATH)
@click.option("-o", "--output", type=PATH, required=True, help="The encoder bundle to write, NAME.encoder.")
@click.option("--encoder", type=PATH, help="The encoder that was tuned.  [default: beside TUNING or in this folder]")
@click.option("--onnx/--no-onnx", default=True, show_default=True, help="Write ONNX graphs beside the weights.")
@click.option(
    "--parity-ct", type=PATH, multiple=True, help="A CT to compare backends with PyTorch on; may be repeated."
)
@logging_options
def merge(
    *, tuning: Path, output: Path, encoder: Path | None, onnx: bool, parity_ct: tuple[Path, ...], quiet: bool
) -> None:
    """Fold TUNING into its encoder: a bundle of its own, and beside it NAME.adapter to segment with."""
    from fseft_edge.finetuning.merging import merge as run  # noqa: PLC0415 - brings in torch

    merged = run(tuning, output, encoder=encoder, onnx=onnx, parity_volumes=parity_ct)
    if not quiet:
        click.echo(f"{merged.bundle.path}: id {merged.bundle.encoder_id[:12]}; segment with {merged.adapter}")


def _check_method(method: str, validate: bool | None, time_limit: float | None, particular: dict[str, Any]) -> None:
    """Refuse options that say nothing to a method."""
    if method == "auto" and validate is False:
        raise UsageError("--method auto chooses by validation.", remedy="Leave --no-validate out, or name a method.")
    if method == "auto" and particular["levels"]:
        raise UsageError("--method auto chooses the levels.", remedy="Leave --levels out, or name a method.")
    if time_limit is not None and method != "auto":
        raise UsageError("--time-limit serves --method auto.", remedy="Add it, or leave --time-limit out.")
    if time_limit is not None and particular["activation"] == "softmax":
        raise UsageError(
            "Fine-tuning decides organs one by one (sigmoid).", remedy="Leave --time-limit or softmax out."
        )
    foreign: tuple[str, ...]
    if method in _TUNINGS:
        foreign, kind = _OF_ADAPTERS, "fine-tunes the encoder"
    elif time_limit is None:
        foreign, kind = _OF_TUNINGS, "leaves the encoder as it is"
    else:
        foreign, kind = ("decoder",), "chooses what is fine-tuned"
    given = [name for name in foreign if particular[name] is not None]
    if given:
        raise UsageError(
            f"--method {method} {kind}, and --{given[0].replace('_', '-')} says nothing to it.", remedy="Leave it out."
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
    """How is told what was learned, and what to expect of it."""

    as_json: bool
    reviewed: bool

    def print(self, file: AdapterFile | TuningFile, output: Path) -> None:
        """Print it; as JSON one line a file."""
        made = file.description
        if self.as_json:
            click.echo(made.model_dump_json(exclude={"content_sha256"}))  # which stands in the file alone
            return
        for organ in made.organs:
            click.echo(_organ_text(organ))
        if self.reviewed and any(organ.left_out_dsc for organ in made.organs):
            click.echo(
                "Masks that an adapter drew count as truth here, which flatters: judge by scans contoured by hand."
            )
        steps = f", {made.steps} steps, loss {made.losses[-1]:.3f}" if made.steps else ""
        click.echo(f"{output}: {made.kind}{steps}")


def _organ_text(organ: AdapterOrgan) -> str:
    volumes, left_out = organ.support_volumes_ml, organ.left_out_dsc
    expected = (
        f"; expect a DSC of {sum(left_out) / len(left_out):.2f} on new scans ({min(left_out):.2f} to "
        f"{max(left_out):.2f} on those left out)"
        if left_out
        else ""
    )
    done = [name.replace("_", " ") for name, wanted in asdict(organ.post_processing).items() if wanted]
    treated = f"; its masks get {' and '.join(done)}" if done else ""
    return f"{organ.name}: {len(volumes)} scans, {min(volumes):.1f} to {max(volumes):.1f} ml{expected}{treated}"
